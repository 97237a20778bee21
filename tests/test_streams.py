"""Tables in chunks: the same numbers and names as from the whole table."""

import sys
import types
import warnings

import jax
import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet
import pytest
from conftest import ORACLES, fit_of, oracle, table

import mixjax as mj

CASES = {
    "slopes": ("Reaction ~ Days + (Days | Subject)", "sleepstudy", {}),
    "slope without intercept": ("Reaction ~ Days + (0 + Days | Subject)", "sleepstudy", {}),
    "independent": ("Reaction ~ Days + (Days || Subject)", "sleepstudy", {}),
    "expressions": ("log(Reaction) ~ I(Days ** 2) + Days + offset(0.01 * Days) + (1 | Subject)", "sleepstudy", {}),
    "no intercept": ("Reaction ~ 0 + Days + (1 | Subject)", "sleepstudy", {}),
    "nested": ("strength ~ 1 + (1 | batch / cask)", "Pastes", {}),
    "crossed": ("diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin", {}),
    "categories": ("angle ~ recipe * temperature + (1 | recipe:replicate)", "cake", {"contrasts": {"recipe": "sum"}}),
    "category in a random term": ("score ~ Machine + (0 + Machine | Worker)", "Machines", {}),
}


def chunks(frame, k=5, seed=0):
    """Rows in random order, so that levels first appear in any chunk."""
    rows = np.random.default_rng(seed).permutation(len(frame))
    return [frame.iloc[part] for part in np.array_split(rows, k)]


@pytest.mark.parametrize("name", ORACLES)
def test_oracle_models_fit_the_same_in_chunks(name):
    """One evaluation may be more or less near the end, so theta agrees to the tolerance of a search."""
    reference, whole = oracle(name), fit_of(name, "REML")
    frame = table(reference["data"])
    fit = mj.lmm(reference["formula"], chunks(frame), weights=reference["weights"])
    np.testing.assert_allclose(fit.criterion, whole.criterion, rtol=1e-11)
    np.testing.assert_allclose(fit.theta, whole.theta, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fit.fixef, whole.fixef, rtol=1e-8)
    assert fit.is_singular == whole.is_singular


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_whole_table(name):
    formula, data, options = CASES[name]
    frame = table(data).assign(w=lambda f: np.linspace(0.5, 2.0, len(f)))
    options = {**options, "weights": "w" if name in ("slopes", "crossed") else None}
    whole = mj.lmm(formula, frame, **options)
    fit = mj.lmm(formula, chunks(frame), **options)
    np.testing.assert_allclose(fit.criterion, whole.criterion, rtol=1e-11)
    assert fit.nobs == whole.nobs
    assert fit.labels.terms == whole.labels.terms
    np.testing.assert_allclose(fit.fixef, whole.fixef, rtol=1e-8, atol=1e-9)
    assert list(fit.fixef.index) == list(whole.fixef.index)
    np.testing.assert_allclose(fit.se, whole.se, rtol=1e-6)
    np.testing.assert_allclose(fit.theta, whole.theta, rtol=1e-6, atol=1e-8)
    for group, effects in whole.ranef().items():
        pd.testing.assert_frame_equal(fit.ranef()[group], effects, rtol=1e-6, atol=1e-6)
    assert str(fit.varcorr) == str(whole.varcorr)
    assert fit.varcorr.to_frame().shape == whole.varcorr.to_frame().shape
    assert "Fixed effects" in str(fit.summary())
    ml, whole_ml = fit.refit(reml=False), whole.refit(reml=False)
    np.testing.assert_allclose(ml.criterion, whole_ml.criterion, rtol=1e-11)


def test_digits():
    """Means far from zero cost no digits: shifts are taken out before squares are summed."""
    frame = table("sleepstudy").assign(year=lambda f: f["Days"] + 2.0e6, y=lambda f: f["Reaction"] + 1e7)
    whole = mj.lmm("y ~ year + (year | Subject)", frame)
    fit = mj.lmm("y ~ year + (year | Subject)", chunks(frame))
    assert abs(fit.criterion - whole.criterion) < 1e-6
    assert abs(fit.criterion - 1743.6282719585) < 1e-6
    np.testing.assert_allclose(fit.fixef["year"], whole.fixef["year"], rtol=1e-9)


def test_a_first_chunk_that_is_not_like_the_others():
    """Sorted by group and time: one level of the factor, a column that is constant, one missing category."""
    frame = table("sleepstudy").sort_values("Days").assign(late=lambda f: np.where(f["Days"] > 4, "yes", "no"))
    formula = "Reaction ~ Days + late + (Days | Subject)"
    parts = [frame[a:b] for a, b in ((0, 3), (3, 70), (70, 71), (71, 180))]
    whole = mj.lmm(formula, frame)
    fit = mj.lmm(formula, parts)
    np.testing.assert_allclose(fit.criterion, whole.criterion, rtol=1e-10)
    assert fit.labels.fixed == whole.labels.fixed
    with pytest.raises(mj.DataError, match=r"'late'.*'yes'.*categories="):
        mj.lmm(formula, iter(parts))
    stats, labels = mj.cross_products_from(iter(parts), formula, categories={"late": ["no", "yes"]})
    assert labels.fixed == whole.labels.fixed
    assert int(stats.n) == 180


def test_missing_rows_are_counted_once():
    frame = table("sleepstudy").astype({"Reaction": float})
    frame.loc[[3, 77], "Reaction"] = np.nan
    frame.loc[[5], "Subject"] = None
    with pytest.warns(mj.DataWarning, match="3 of 180 rows") as seen:
        fit = mj.lmm("Reaction ~ Days + (1 | Subject)", chunks(frame))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = mj.lmm("Reaction ~ Days + (1 | Subject)", frame)
    np.testing.assert_allclose(fit.criterion, whole.criterion, rtol=1e-11)


def test_redundant_columns():
    frame = table("sleepstudy").assign(twice=lambda f: 2 * f["Days"] + 1)
    with pytest.warns(mj.DataWarning, match="twice"):
        fit = mj.lmm("Reaction ~ Days + twice + (1 | Subject)", chunks(frame))
    assert list(fit.fixef.index) == ["Intercept", "Days"]
    np.testing.assert_allclose(fit.criterion, mj.lmm("Reaction ~ Days + (1 | Subject)", frame).criterion, rtol=1e-11)
    with pytest.raises(mj.DataError, match=r"'Subject' cannot be told apart.*twice"):
        mj.lmm("Reaction ~ Days + (Days + twice | Subject)", chunks(frame))


def test_sources(tmp_path):
    frame = table("sleepstudy")
    formula = "Reaction ~ Days + (Days | Subject)"
    expected = mj.lmm(formula, frame).criterion
    path = tmp_path / "sleep.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame), path, row_group_size=40)

    sources = [path, str(path), pyarrow.dataset.dataset(path), chunks(frame), iter(chunks(frame))]
    for source in sources:
        np.testing.assert_allclose(mj.lmm(formula, source).criterion, expected, rtol=1e-12)


def test_dask():
    """Needs the extra ``dask``, which the tests do not install."""
    dask = pytest.importorskip("dask.dataframe")
    frame = table("cake").assign(unused="x")
    whole = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", frame)
    lazy = dask.from_pandas(frame, npartitions=4)
    fit = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", lazy)
    assert fit.labels.fixed == whole.labels.fixed
    np.testing.assert_allclose(fit.criterion, whole.criterion, rtol=1e-12)


class Partitions:
    """What a dask data frame is read by."""

    npartitions = 4

    def __init__(self, frame):
        self.frame, self.columns = frame, frame.columns

    def __getitem__(self, names):
        return Partitions(self.frame[names])

    def get_partition(self, i):
        return types.SimpleNamespace(compute=lambda: chunks(self.frame, 4)[i])


def test_partitions():
    """Without dask: what is asked of it."""
    frame = table("sleepstudy")
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", Partitions(frame))
    np.testing.assert_allclose(fit.criterion, fit_of("sleepstudy_slopes", "REML").criterion, rtol=1e-12)


def test_bad_input():
    parts = chunks(table("sleepstudy"))
    with pytest.raises(mj.FormulaError, match="center"):
        mj.lmm("Reaction ~ center(Days) + (1 | Subject)", parts)
    with pytest.raises(mj.DataError, match="got ndarray"):
        mj.lmm("Reaction ~ Days + (1 | Subject)", [parts[0].to_numpy()])
    with pytest.raises(mj.DataError, match="no chunks"):
        mj.lmm("Reaction ~ Days + (1 | Subject)", [])
    with pytest.raises(mj.DataError, match="Dayz"):
        mj.lmm("Reaction ~ Dayz + (1 | Subject)", parts)
    with pytest.raises(mj.DataError, match="no file"):
        mj.lmm("Reaction ~ Days + (1 | Subject)", "not_there.parquet")
    with pytest.raises(mj.DataError, match="subset="):
        mj.lmm("Reaction ~ Days + (1 | Subject)", parts, subset="Days > 1")
    with pytest.raises(mj.DataError, match="name of a column"):
        mj.lmm("Reaction ~ Days + (1 | Subject)", parts, weights=np.ones(180))
    with pytest.raises(mj.DataError, match="one level"):
        mj.lmm("Reaction ~ Days + (1 | one)", [part.assign(one="a") for part in parts])
    with pytest.raises(mj.DataError, match=r"'Days'.*in one of the chunks"):
        mj.lmm("Reaction ~ Days + (1 | Subject)", [parts[0], parts[1].drop(columns="Days")])
    with pytest.raises(mj.DataError, match="180 rows and 180 random effects"):
        mj.lmm("Reaction ~ Days + (1 | Subject:Days)", parts)
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", parts)
    for attempt in (lambda: fit.fitted, lambda: fit.residuals(), lambda: fit.X, lambda: fit.augment()):
        with pytest.raises(ValueError, match="not kept"):
            attempt()


def test_progress_bar(monkeypatch):
    parts, formula = chunks(table("sleepstudy")), "Reaction ~ Days + (1 | Subject)"
    seen = []
    bar = types.ModuleType("tqdm.auto")
    bar.tqdm = lambda unit, **_: types.SimpleNamespace(update=lambda n: seen.append((unit, n)), close=lambda: None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", bar)
    mj.cross_products_from(parts, formula)
    assert not seen
    mj.cross_products_from(parts, formula, progress=True)
    assert seen == [("chunk", 1)] * len(parts)


def test_chunks_add_up():
    """Sums of halves are the sums of the whole, read through the functional core."""
    parts = chunks(table("Pastes"), 7)
    formula = "strength ~ 1 + (1 | batch / cask)"
    one, _ = mj.cross_products_from(parts, formula)
    other, _ = mj.cross_products_from([pd.concat(parts)], formula)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_a_file_that_is_no_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "sleep.csv"
    mj.datasets.load("sleepstudy").to_csv(path, index=False)
    with pytest.raises(mj.DataError, match=r"sleep.csv' is no parquet file.* pandas.read_csv\('.*sleep.csv'\)"):
        mj.lmm("Reaction ~ Days + (Days | Subject)", path)


def parts_of_groups():
    rng = np.random.default_rng(1)
    data = pd.DataFrame({"g": np.repeat(np.arange(20), 10), "x": rng.normal(size=200)})
    return data.assign(y=data["x"] + 2 * rng.normal(size=20)[data["g"]] + rng.normal(size=200))


def test_sums_of_other_levels_are_not_added():
    data = parts_of_groups()
    halves = [mj.cross_products_from([own], "y ~ x + (1 | g)")[0] for own in (data[data.g < 10], data[data.g >= 10])]
    with pytest.raises(ValueError, match=r"other columns or levels cannot be added \(0, 1, 2, 3, 4 in one"):
        sum(halves)


def test_parts_with_all_levels_add_up():
    data = parts_of_groups()
    every = {"g": list(range(20))}
    halves = [
        mj.cross_products_from([own], "y ~ x + (1 | g)", categories=every)[0]
        for own in (data[data.g < 10], data[data.g >= 10])
    ]
    whole = mj.lmm("y ~ x + (1 | g)", data)
    with jax.enable_x64():
        est = mj.estimate(halves[0] + halves[1])
    assert float(est.criterion) == pytest.approx(whole.criterion, rel=1e-10)
    np.testing.assert_allclose(est.beta, whole.fixef, rtol=1e-7)


def test_a_group_that_is_text_in_one_chunk():
    data = parts_of_groups()
    with pytest.raises(mj.DataError, match="column 'g' holds text in one chunk"):
        mj.lmm("y ~ x + (1 | g)", [data[:100], data[100:].assign(g=lambda d: d["g"].astype(str))])
