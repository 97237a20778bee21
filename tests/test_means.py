"""Marginal means and slopes: closed forms of balanced tables, rows of the fitted X, recodings, families of tests."""

import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.stats
from conftest import fit_of, table

import mixjax as mj
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed import families, hypotheses, means
from mixjax.inference.fixed.contrasts import t_tests
from mixjax.inference.fixed.hypotheses import anova
from mixjax.inference.fixed.marginal_means import NOT_ESTIMABLE
from mixjax.inference.fixed.means import emmeans, emtrends

NUMBERS = ["estimate", "std_error", "df", "lower", "upper", "statistic", "p_value"]


@pytest.fixture(scope="module")
def cake():
    """recipe x temperature, all cells filled alike."""
    return fit_of("cake_factor", "REML").record


@pytest.fixture(scope="module")
def covariate():
    """recipe x temp, unbalanced."""
    return mj.lmm(FORMULA, uneven()).record


FORMULA = "angle ~ recipe * temp + (1 | recipe:replicate)"


def uneven():
    return table("cake").drop(index=[0, 7, 19, 40, 41])


def square(z):
    """A user's own function."""
    return z * z


# --- closed forms --------------------------------------------------------------------------------------------------


def test_balanced_means_are_means_of_the_cells(cake):
    data = table("cake")
    found = emmeans(cake, "recipe").to_frame()
    expected = data.groupby("recipe", observed=True)["angle"].mean()
    assert list(found["recipe"]) == list(expected.index)
    np.testing.assert_allclose(found["estimate"], expected, rtol=1e-10)
    # 15 replicates of 6 temperatures each; the stratum of replicates has 3 x 14 df.
    between, within = cake.estimates.Sigma[0][0, 0], cake.estimates.sigma**2
    se = np.sqrt((between + within / 6) / 15)
    np.testing.assert_allclose(found["std_error"], se, rtol=1e-8)
    np.testing.assert_allclose(found["df"], 42, rtol=1e-5)
    half = scipy.stats.t.ppf(0.975, 42) * se
    np.testing.assert_allclose(found["upper"] - found["estimate"], half, rtol=1e-6)
    np.testing.assert_allclose(found["estimate"] - found["lower"], half, rtol=1e-6)


def test_cells_margins_and_the_overall_mean(cake):
    cells = emmeans(cake, ["recipe", "temperature"]).to_frame()
    raw = table("cake").groupby(["recipe", "temperature"], observed=True)["angle"].mean()
    assert list(zip(cells["recipe"], cells["temperature"], strict=True)) == list(raw.index)
    np.testing.assert_allclose(cells["estimate"], raw, rtol=1e-10)
    margin = emmeans(cake, "temperature").to_frame()["estimate"]
    np.testing.assert_allclose(margin, raw.groupby(level=1, observed=True).mean(), rtol=1e-10)
    np.testing.assert_allclose(emmeans(cake, "1").to_frame()["estimate"], [raw.mean()], rtol=1e-10)


def test_differences_within_the_strata(cake):
    found = emmeans(cake, "temperature").contrasts(adjust="none").set_index("contrast")
    raw = table("cake").groupby("temperature", observed=True)["angle"].mean()
    assert len(found) == 15
    for (a, b), row in zip(((a, b) for i, a in enumerate(raw.index) for b in raw.index[i + 1 :]), found.itertuples(),
                           strict=True):  # fmt: skip
        assert row.Index == f"{a} - {b}"
        np.testing.assert_allclose(row.estimate, raw[a] - raw[b], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(row.std_error, np.sqrt(2 / 45) * cake.estimates.sigma, rtol=1e-8)
        np.testing.assert_allclose(row.df, 210, rtol=1e-5)


def test_every_method_is_a_contrast_of_the_means(cake):
    result = emmeans(cake, "recipe")
    m = result.to_frame()["estimate"].to_numpy()
    control = result.contrasts("trt.vs.ctrl")
    assert list(control["contrast"]) == ["B - A", "C - A"]
    np.testing.assert_allclose(control["estimate"], [m[1] - m[0], m[2] - m[0]], rtol=1e-9)
    effects = result.contrasts("eff")
    assert list(effects["contrast"]) == ["A effect", "B effect", "C effect"]
    np.testing.assert_allclose(effects["estimate"], m - m.mean(), rtol=1e-9, atol=1e-9)
    own = result.contrasts({"A against the rest": [1, -0.5, -0.5]}, adjust="none")
    np.testing.assert_allclose(own["estimate"], [m[0] - (m[1] + m[2]) / 2], rtol=1e-9)
    # The F test of a factor is the joint test of its contrasts: in a balanced table the mean of squared effects.
    se = result.to_frame()["std_error"].iloc[0]
    F = np.sum((m - m.mean()) ** 2) / 2 / se**2
    np.testing.assert_allclose(anova(cake, "III").loc["recipe", "statistic"], F, rtol=1e-7)


def test_slopes_are_sums_of_coefficients():
    fit = fit_of("orthodont", "REML")
    found = emtrends(fit.record, "Sex", "age").to_frame()
    L = np.array([[0, 1, 0, 0], [0, 1, 0, 1.0]])
    expected = t_tests(fit.record, L)
    np.testing.assert_array_equal(found[NUMBERS[:3]], expected[NUMBERS[:3]])
    both = emtrends(fit.record, "Sex", "age").contrasts()
    np.testing.assert_allclose(both[NUMBERS], t_tests(fit.record, [[0, 0, 0, -1.0]]), rtol=1e-10)
    np.testing.assert_allclose(emtrends(fit.record, "1", "age").to_frame()["estimate"], found["estimate"].mean())


# --- rows through the formula --------------------------------------------------------------------------------------

CURVES = "bs(temp, df=4) * recipe + center(z) + np.log(temp) + square(z) + C(k)"


@pytest.fixture(scope="module")
def curved():
    """A record whose fixed effects use all of formulaic; estimates made up, one compiled program saved."""
    data = uneven().assign(z=lambda d: np.sin(np.arange(len(d))), k=lambda d: np.arange(len(d)) % 3 + 1)
    design, labels = mj.build_design(f"angle ~ {CURVES} + (1 | recipe:replicate)", data, contrasts={"recipe": "sum"})
    p = design.X.shape[1]
    rng = np.random.default_rng(5)
    half = rng.normal(size=(p, p))
    estimates = mj.Estimates(*[None] * len(mj.Estimates._fields))._replace(
        beta=rng.normal(size=p), vcov=half @ half.T, sigma=1.0
    )
    return Fitted(labels, None, estimates, True, None, design)


def test_means_at_a_row_of_the_data_are_that_row_of_x(curved):
    """Knots, centring, contrasts and levels come from the fit, not from the grid."""
    frame, X = curved.labels.frame, np.asarray(curved.design.X)
    for i in (0, 100, 263):
        row = frame.iloc[i]
        at = {"temp": row.temp, "z": row.z, "k": row.k}
        found = emmeans(curved, "recipe", at=at, ddf="wald").to_frame().set_index("recipe").loc[row.recipe]
        np.testing.assert_allclose(found["estimate"], X[i] @ curved.estimates.beta, rtol=1e-10)
        variance = X[i] @ curved.estimates.vcov @ X[i]
        np.testing.assert_allclose(found["std_error"], np.sqrt(variance), rtol=1e-10)


def test_covariates_are_at_their_means_and_levels_weigh_the_same(curved):
    frame = curved.labels.frame
    at = {"temp": frame.temp.mean(), "z": frame.z.mean()}
    found = emmeans(curved, "recipe", ddf="wald").to_frame()
    by_hand = [emmeans(curved, "recipe", at=at | {"k": k}, ddf="wald").to_frame()["estimate"] for k in (1, 2, 3)]
    np.testing.assert_allclose(found["estimate"], np.mean(by_hand, axis=0), rtol=1e-12)
    assert list(emmeans(curved, "k", ddf="wald").to_frame()["k"]) == [1, 2, 3]


@pytest.mark.parametrize("temp", [175, 176.5, 200.0, 225])
def test_slopes_are_derivatives_of_means(curved, temp):
    """Against differences of the means themselves; at the ends of a spline they look inwards only."""
    found = emtrends(curved, "recipe", "temp", at={"temp": temp}, ddf="wald").to_frame()["estimate"].to_numpy()
    h = 1e-3 if temp < 225 else -1e-3
    points = [
        emmeans(curved, "recipe", at={"temp": temp + i * h}, ddf="wald").to_frame()["estimate"].to_numpy()
        for i in range(3)
    ]
    # One-sided: h^2 / 3 of the third derivative, and roundings / h.
    np.testing.assert_allclose(found, (-3 * points[0] + 4 * points[1] - points[2]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_slopes_of_powers_and_logarithms_are_exact():
    data = table("Orthodont")
    design, labels = mj.build_design("distance ~ age + I(age**2) + np.log(age) + Sex + (1 | Subject)", data)
    estimates = mj.Estimates(*[None] * len(mj.Estimates._fields))._replace(
        beta=np.array([1.0, 2.0, 3.0, 4.0, 5.0]), vcov=np.eye(5), sigma=1.0
    )
    order = [labels.fixed.index(name) for name in ("age", "I(age ** 2)", "np.log(age)") if name in labels.fixed]
    assert len(order) == 3
    record = Fitted(labels, None, estimates, True, None, design)
    ages = np.array([8.0, 9.3, 11.0, 14.0])
    found = emtrends(record, "age", "age", at={"age": ages}, ddf="wald").to_frame()
    d = np.zeros((4, 5))
    d[:, order] = np.column_stack([np.ones(4), 2 * ages, 1 / ages])
    np.testing.assert_allclose(found["estimate"], d @ estimates.beta, rtol=1e-11)
    np.testing.assert_allclose(found["std_error"], np.linalg.norm(d, axis=1), rtol=1e-11)


def test_a_stencil_is_exact_for_polynomials_of_degree_four():
    for moved in range(-2, 3):
        nodes = moved + np.arange(-2.0, 3.0)
        for power in range(5):
            assert means._stencil(moved) @ nodes**power == 12 * (power == 1)


def test_offsets_of_the_formula_and_beside_it_are_one():
    """As in emmeans: with their mean over the rows, unless a variable of theirs is given."""
    data = table("sleepstudy").assign(late=lambda d: d.Days > 4, t=lambda d: 1.0 + d.Days**2, s=lambda d: np.sqrt(d.t))
    inside = mj.lmm("Reaction ~ late + offset(sqrt(t)) + (1 | Subject)", data)
    beside = mj.lmm("Reaction ~ late + (1 | Subject)", data, offset="s")
    ours, theirs = inside.emmeans("late"), beside.emmeans("late")
    np.testing.assert_allclose(ours.to_frame()["estimate"], theirs.to_frame()["estimate"], rtol=1e-10)
    assert str(ours) == str(theirs)
    assert f"offset = {data.s.mean():.6g}" in str(ours)
    given = inside.emmeans("late", at={"t": 4.0})
    assert "t = 4" in str(given)
    assert "offset" not in str(given)
    moved = ours.to_frame()["estimate"] - data.s.mean() + 2.0
    np.testing.assert_allclose(given.to_frame()["estimate"], moved, rtol=1e-10)
    by = inside.emmeans("late", by="t", at={"t": [4.0, 9.0]}).to_frame()["estimate"].to_numpy().reshape(2, 2)
    np.testing.assert_allclose(by[1] - by[0], 1.0, rtol=1e-8)
    # A variable of the fixed effects too is held at its mean there, and its offset at the offset's.
    both = mj.lmm("Reaction ~ late + t + offset(sqrt(t)) + (1 | Subject)", data)
    same = mj.lmm("Reaction ~ late + t + (1 | Subject)", data, offset="s")
    a, b = (fit.emmeans("late").to_frame()["estimate"] for fit in (both, same))
    np.testing.assert_allclose(a, b, rtol=1e-10)
    slope = both.emtrends("late", "t", at={"t": 4.0}).to_frame()["estimate"]
    np.testing.assert_allclose(slope, both.fixef["t"] + 0.25, rtol=1e-8)


def test_offsets_are_known_parts_of_the_mean():
    data = table("sleepstudy").assign(known=lambda d: 3.0 * d.Days + np.arange(len(d)) / 10, late=lambda d: d.Days > 4)
    formula = "Reaction ~ late + (1 | Subject)"
    plain = mj.lmm(formula, data.assign(Reaction=data.Reaction - data.known - data.Days**2)).record
    both = mj.lmm("Reaction ~ late + offset(Days**2) + (1 | Subject)", data, offset="known").record
    without, with_offset = emmeans(plain, "late").to_frame(), emmeans(both, "late", at={"Days": 3}).to_frame()
    np.testing.assert_allclose(with_offset["estimate"], without["estimate"] + data.known.mean() + 9, rtol=1e-8)
    np.testing.assert_allclose(with_offset["std_error"], without["std_error"], rtol=1e-6)
    np.testing.assert_allclose(
        emmeans(both, "late").contrasts()["p_value"], emmeans(plain, "late").contrasts()["p_value"], rtol=1e-5
    )
    slope = emtrends(both, "1", "Days", at={"Days": 3}).to_frame()
    np.testing.assert_allclose(slope["estimate"], [6.0], rtol=1e-12)
    np.testing.assert_array_equal(slope["std_error"], [0.0])


def test_a_covariate_of_two_values_is_averaged_over_both(curved):
    data = uneven().assign(d=lambda d: (np.arange(len(d)) % 5 == 0) * 1)
    design, labels = mj.build_design("angle ~ recipe + d + (1 | recipe:replicate)", data)
    estimates = curved.estimates._replace(beta=np.array([1.0, 2.0, 3.0, 10.0]), vcov=np.eye(4))
    record = Fitted(labels, None, estimates, True, None, design)
    np.testing.assert_allclose(emmeans(record, "recipe", ddf="wald").to_frame()["estimate"], [6, 8, 9])
    found = emmeans(record, "recipe", at={"d": 0.25}, ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(found, [3.5, 5.5, 6.5])
    np.testing.assert_allclose(emmeans(record, "d", ddf="wald").contrasts()["estimate"], [-10])
    np.testing.assert_allclose(emtrends(record, "1", "d", ddf="wald").to_frame()["estimate"], [10])


# --- invariance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_coding_and_order_of_rows_do_not_matter(covariate, ddf):
    other = mj.lmm(FORMULA, uneven().sample(frac=1, random_state=2), contrasts={"recipe": "helmert"}).record
    for call in (
        lambda r: emmeans(r, "recipe", at={"temp": 190}, ddf=ddf).to_frame().drop(columns="recipe"),
        lambda r: emmeans(r, "recipe", ddf=ddf).contrasts()[NUMBERS],
        lambda r: emtrends(r, "recipe", "temp", ddf=ddf).to_frame().drop(columns="recipe"),
        lambda r: emtrends(r, "recipe", "temp", ddf=ddf).contrasts("eff")[NUMBERS],
    ):
        np.testing.assert_allclose(call(other), call(covariate), rtol=1e-4, atol=1e-8)


# --- families of tests ---------------------------------------------------------------------------------------------


def test_tukey_of_two_means_is_the_t_test():
    record = fit_of("orthodont", "REML").record
    result = emmeans(record, "Sex")
    one = result.contrasts(adjust="none").iloc[0]
    np.testing.assert_allclose(result.contrasts()["p_value"], one["p_value"], rtol=1e-12)
    # The studentized range of two is sqrt(2) |t|.
    q = np.sqrt(2) * abs(one["statistic"])
    np.testing.assert_allclose(scipy.stats.studentized_range.sf(q, 2, one["df"]), one["p_value"], rtol=1e-6)


def test_tukey_with_known_variance_is_the_range_of_normals(cake):
    k, normal = 6, scipy.stats.norm
    found = emmeans(cake, "temperature", ddf="wald").contrasts()
    for row in found.itertuples():
        q = np.sqrt(2) * abs(row.statistic)
        inside = scipy.integrate.quad(
            lambda z, q=q: k * normal.pdf(z) * (normal.cdf(z + q) - normal.cdf(z)) ** (k - 1),
            -12, 12, epsabs=1e-12,
        )[0]  # fmt: skip
        assert row.p_value == pytest.approx(1 - inside, abs=1e-8)


def test_tukey_at_a_tabulated_quantile():
    """Tables of the studentized range: upper 5 % point 3.877 for 3 means and 10 df, 4.232 for 5 means and 20 df."""
    for q, k, df in ((3.877, 3, 10), (4.232, 5, 20)):
        p = families._adjusted(np.zeros(1), np.array([q / np.sqrt(2)]), np.array([float(df)]), "tukey", k, 2)
        assert p[0] == pytest.approx(0.05, abs=2e-5)
        assert families._critical(0.95, float(df), 1, "tukey", k, 2) == pytest.approx(q / np.sqrt(2), abs=5e-4)


def test_holm_bonferroni_and_fdr_by_hand():
    """Five tests of normal statistics, of which one has none: it stays NaN and does not count."""
    p = np.array([0.02, 0.001, np.nan, 0.03, 0.5])
    z = scipy.stats.norm.isf(p / 2)
    found = families.Combinations(z, np.where(np.isnan(p), np.nan, 1.0), np.full(5, np.inf), np.eye(5))

    def adjusted(adjust):
        return families.family_tests(found, adjust).table["p_value"]

    np.testing.assert_allclose(adjusted("bonferroni"), [0.08, 0.004, np.nan, 0.12, 1.0])
    # sorted 0.001 x 4, 0.02 x 3, 0.03 x 2 = 0.06 (no less than before), 0.5 x 1
    np.testing.assert_allclose(adjusted("holm"), [0.06, 0.004, np.nan, 0.06, 0.5])
    # sorted 0.001 x 4, 0.02 x 4/2 = 0.04 (no more than after), 0.03 x 4/3, 0.5
    np.testing.assert_allclose(adjusted("fdr"), [0.04, 0.004, np.nan, 0.04, 0.5])
    np.testing.assert_allclose(adjusted("none"), p)


def test_families_lie_within_by(cake):
    whole = emmeans(cake, ["recipe", "temperature"], ddf="wald")
    parts = emmeans(cake, "recipe", by="temperature", ddf="wald")
    assert list(parts.to_frame().columns[:2]) == ["temperature", "recipe"]
    assert len(whole.contrasts(adjust="none")) == 18 * 17 // 2
    for adjust in ("bonferroni", "holm", "tukey"):
        found = parts.contrasts(adjust=adjust)
        assert list(found.columns) == ["temperature", "contrast", *NUMBERS]
        assert len(found) == 6 * 3
        for level in ("175", "225"):
            alone = emmeans(cake, "recipe", at={"temperature": level}, ddf="wald").contrasts(adjust=adjust)
            np.testing.assert_allclose(found[found.temperature == level][NUMBERS], alone[NUMBERS], rtol=1e-7)


# --- what cannot be estimated --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holed():
    data = table("cake")
    return mj.build_design, data[~((data.recipe == "C") & (data.temperature == "225"))]


@pytest.mark.filterwarnings("ignore::mixjax.checks.DataWarning")
@pytest.mark.parametrize("coding", [{}, {"recipe": "sum", "temperature": "helmert"}])
def test_empty_cells_are_nan_and_others_are_right(curved, holed, coding):
    build, data = holed
    design, labels = build("angle ~ recipe * temperature + (1 | recipe:replicate)", data, contrasts=coding)
    assert len(labels.dropped_columns) == 1
    X, y = np.asarray(design.X), np.asarray(design.y)
    # Least squares: in a saturated table estimates of cells are their means.
    estimates = curved.estimates._replace(beta=np.linalg.lstsq(X, y, rcond=None)[0], vcov=np.linalg.inv(X.T @ X))
    record = Fitted(labels, None, estimates, True, None, design)
    raw = data.groupby(["recipe", "temperature"], observed=False)["angle"].mean()
    cells = emmeans(record, ["recipe", "temperature"], ddf="wald")
    np.testing.assert_allclose(cells.to_frame()["estimate"], raw, rtol=1e-9)
    assert cells.to_frame()["estimate"].isna().sum() == 1
    assert NOT_ESTIMABLE in str(cells)
    assert NOT_ESTIMABLE not in str(emmeans(record, "recipe", at={"temperature": "175"}, ddf="wald"))
    recipes = emmeans(record, "recipe", ddf="wald")
    assert list(recipes.to_frame()["estimate"].isna()) == [False, False, True]
    pairs = recipes.contrasts().set_index("contrast")
    assert list(pairs["p_value"].isna()) == [False, True, True]
    # The family is that of three means, as in emmeans.
    q = np.sqrt(2) * abs(pairs.loc["A - B", "statistic"])
    assert pairs.loc["A - B", "p_value"] == pytest.approx(scipy.stats.studentized_range.sf(q, 3, np.inf), rel=1e-6)
    np.testing.assert_allclose(pairs.loc["A - B", "estimate"], raw["A"].mean() - raw["B"].mean(), rtol=1e-7)
    some = emmeans(record, "recipe", at={"temperature": ["175", "215"]}, ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(some, raw.unstack()[["175", "215"]].mean(axis=1), rtol=1e-9)


@pytest.mark.filterwarnings("ignore::mixjax.checks.DataWarning")
def test_differences_of_what_cannot_be_estimated_may_be_estimable(curved):
    """A covariate in other units is redundant: consistent values give means, others only their differences."""
    data = uneven().assign(fahrenheit=lambda d: 32 + 1.8 * d.temp)
    design, labels = mj.build_design("angle ~ recipe + temp + fahrenheit + (1 | recipe:replicate)", data)
    assert labels.dropped_columns == ("fahrenheit",)
    estimates = curved.estimates._replace(beta=np.array([1.0, 2.0, 4.0, 0.5]), vcov=np.eye(4))
    record = Fitted(labels, None, estimates, True, None, design)
    plain = emmeans(record, "recipe", ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(plain, np.array([1.0, 3.0, 5.0]) + 0.5 * data.temp.mean(), rtol=1e-9)
    odd = emmeans(record, "recipe", at={"temp": 180}, ddf="wald")
    assert odd.to_frame()[["estimate", "std_error", "df", "lower", "upper"]].isna().all(axis=None)
    found = odd.contrasts(adjust="tukey")
    np.testing.assert_allclose(found["estimate"], [-2, -4, -2], rtol=1e-9)
    assert found["p_value"].between(0, 1).all()
    same = emmeans(record, "recipe", at={"temp": 180, "fahrenheit": 356}, ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(same, [91, 93, 95], rtol=1e-9)
    assert emtrends(record, "1", "temp", ddf="wald").to_frame()["estimate"].isna().all()


def test_means_that_the_model_makes_equal():
    record = fit_of("cake_temp", "REML").record
    found = emtrends(record, "recipe", "temp").contrasts()
    np.testing.assert_array_equal(found[["estimate", "std_error"]], np.zeros((3, 2)))
    assert found[["df", "statistic", "p_value"]].isna().all(axis=None)


# --- errors and looks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: emmeans(r, "recpe"), r"no column 'recpe' \(spec\); did you mean 'recipe'"),
        (lambda r: emmeans(r, "recipe", by="hour"), r"no column 'hour' \(by=\)"),
        (lambda r: emmeans(r, "angle"), "'angle' .* is the response"),
        (lambda r: emmeans(r, "replicate"), "'replicate' .* is a grouping factor"),
        (lambda r: emmeans(r, "temp"), "'temp' is numeric: give its values, at=.*emtrends"),
        (lambda r: emmeans(r, "recipe", at={"temp": "hot"}), "at= for 'temp' must be numbers"),
        (lambda r: emmeans(r, "recipe", at={"temp": np.inf}), "at= for 'temp' must be finite"),
        (lambda r: emmeans(r, "recipe", at={"temp": []}), "at= has no value for 'temp'"),
        (lambda r: emmeans(r, "recipe", at={"recipe": "D"}), "'recipe' has no level 'D' .*levels: A, B, C"),
        (lambda r: emmeans(r, "recipe", at={"angle": 3}), "'angle' .* is the response"),
        (lambda r: emmeans(r, ["recipe", "recipe"]), "list of different names"),
        (lambda r: emmeans(r, "recipe", level=95), "level must be between 0 and 1, such as 0.95, got 95"),
        (lambda r: emmeans(r, "recipe", ddf="none").to_frame(), "ddf must be one of"),
        (lambda r: emmeans(r, "recipe", at={"temp": np.arange(50_000)}), "150000 rows"),
        (lambda r: emtrends(r, "recipe", "recipe"), "'recipe' is a factor, which has no slope"),
        (lambda r: emtrends(r, "recipe", "tmp"), "did you mean 'temp'"),
        (lambda r: emmeans(r, "recipe").contrasts("all"), "method must be one of 'pairwise'"),
        (lambda r: emmeans(r, "recipe").contrasts(adjust="hochberg"), "adjust must be one of 'none', 'tukey'"),
        (lambda r: emmeans(r, "recipe").contrasts("eff", "tukey"), "'tukey' is for all pairwise"),
        (lambda r: emmeans(r, "recipe").contrasts({"odd": [1, -1]}), "'odd' needs 3 finite weights, for A, B, C"),
    ],
)
def test_bad_input_is_named(covariate, call, message):
    with pytest.raises(ValueError, match=message):
        call(covariate)


def test_values_that_the_formula_refuses(curved):
    with pytest.raises(mj.DataError, match=r"cannot be evaluated at .*temp = 900"):
        emmeans(curved, "recipe", at={"temp": 900}, ddf="wald")


def test_chunks_have_no_levels_to_average_over():
    chunks = [table("cake").iloc[:100], table("cake").iloc[100:]]
    design, labels = mj.cross_products_from(chunks, "angle ~ recipe + (1 | recipe:replicate)")
    with pytest.raises(mj.DataError, match="this fit kept no rows"):
        emmeans(Fitted(labels, design, None, True, None, None), "recipe")


@pytest.mark.filterwarnings("ignore::mixjax.checks.DataWarning")
def test_the_family_of_tukey_is_all_means():
    """emmeans 1.8.4: pairs(emmeans(m, "recipe")) and "temperature" of the cake data without a cell."""
    cake = table("cake").assign(temperature=lambda d: d.temperature.astype(str), recipe=lambda d: d.recipe.astype(str))
    hole = (cake.recipe == "C") & (cake.temperature == "195")
    cake = cake[cake.temperature.isin(["175", "185", "195"]) & ~hole]
    fit = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", cake)
    for factor, p in (("recipe", 0.885985), ("temperature", 0.035840)):
        found = fit.emmeans(factor).contrasts()["p_value"]
        assert found.notna().sum() == 1
        assert found.dropna().iloc[0] == pytest.approx(p, abs=2e-3)


def test_tables_say_how_their_numbers_came_about(cake):
    result = emmeans(cake, "recipe")
    pairs, own = result.contrasts(), result.contrasts({"A against the rest": [1, -0.5, -0.5], "A - B": [1, -1, 0]})
    assert pairs.attrs["notes"][0] == (
        "satterthwaite degrees of freedom, p values and 95 % intervals adjusted by tukey for a family of 3 means"
    )
    assert repr(pairs).endswith("\n".join(pairs.attrs["notes"]))
    # Weights of one's own are not a family unless one says so.
    assert own.attrs["notes"][0].endswith("p values and 95 % intervals not adjusted")
    raw = t_tests(cake, np.array([[1, -0.5, -0.5], [1, -1, 0]]) @ result.W)["p_value"]
    np.testing.assert_allclose(own["p_value"], raw, rtol=1e-12)
    by = emmeans(cake, "recipe", by="temperature", ddf="wald").contrasts("trt.vs.ctrl", "holm", level=0.9)
    how = "p values adjusted by holm for 2 tests, 90 % intervals by bonferroni (holm has none), within temperature"
    assert repr(by).endswith(f"wald tests, without degrees of freedom, {how}")
    assert "adjusted by holm" in by._repr_html_()
    assert result.to_frame().attrs["notes"][0] == "satterthwaite degrees of freedom, 95 % intervals"
    assert repr(anova(cake, "II")).endswith("\ntype II tests, satterthwaite degrees of freedom")
    assert repr(hypotheses.test(cake, "recipe[T.B]", "wald")).endswith(
        "\nwald tests, without degrees of freedom\np values and 95 % intervals not adjusted"
    )
    # All else is pandas'.
    assert type(pairs[pairs["p_value"] < 1]) is type(pairs.round(2)) is type(pairs.copy()) is pd.DataFrame
    assert pairs.round(2).attrs["notes"] == pairs.attrs["notes"]
    again = pickle.loads(pickle.dumps(pairs))
    pd.testing.assert_frame_equal(again, pairs)
    assert repr(again) == repr(pairs)
    pairs["stars"] = "*"
    assert list(pd.concat([pairs, own])["contrast"]) == [*pairs["contrast"], *own["contrast"]]


def test_the_table_says_what_it_is(covariate):
    text = str(emmeans(covariate, "recipe", ddf="wald", level=0.9))
    assert text.startswith("marginal means of recipe (temp = ")
    assert "wald tests, without degrees of freedom, 90 % intervals" in text
    assert "slopes of temp" in str(emtrends(covariate, "recipe", "temp", ddf="wald"))
    frame = emmeans(covariate, "recipe").to_frame()
    assert list(frame.columns) == ["recipe", "estimate", "std_error", "df", "lower", "upper"]
    assert isinstance(frame["recipe"].dtype, pd.CategoricalDtype)


def test_marginaleffects_takes_a_fit(covariate):
    me = pytest.importorskip("marginaleffects")
    from mixjax.inference.fixed.marginaleffects import to_marginaleffects

    model = to_marginaleffects(covariate)
    frame = covariate.labels.frame
    found = me.predictions(model, by="recipe", eps_vcov=1.0)
    X = np.asarray(covariate.design.X)
    for i, level in enumerate("ABC"):
        row = X[(frame.recipe == level).to_numpy()].mean(axis=0)
        np.testing.assert_allclose(found["estimate"][i], row @ covariate.estimates.beta, rtol=1e-9)
        np.testing.assert_allclose(found["std_error"][i], np.sqrt(row @ covariate.estimates.vcov @ row), rtol=1e-7)
    slopes = me.slopes(model, variables="temp", by="recipe", eps_vcov=1.0)
    ours = emtrends(covariate, "recipe", "temp", ddf="wald").to_frame()
    np.testing.assert_allclose(slopes["estimate"], ours["estimate"], rtol=1e-6)
    np.testing.assert_allclose(slopes["std_error"], ours["std_error"], rtol=1e-6)


def test_a_single_number_of_numpys_is_a_value():
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
    frames = [fit.emmeans("Days", at={"Days": value}).to_frame() for value in (2.0, np.array(2.0), np.float64(2.0))]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])
