"""Penalised smooths ``s(x)``: bases, fits and curves against mgcv and gamm4, and what a model with one can do.

Fits are NumPy's; nothing is compiled.
"""

import json
import pickle
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from conftest import HERE
from dense import covariance
from dense import criterion as dense_criterion
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

import mixjax as mj
from mixjax.formula.smooth_bases import smooth_of
from mixjax.inference.random.spectral import draw, spectrum

BASES = ("cr", "ps", "tp")


@cache
def curve():
    data = pd.read_csv(HERE / "data" / "curve.csv")
    return data.assign(
        f=np.where(pd.Categorical(data["g"]).codes % 2 == 1, "a", "b"),
        z=np.random.default_rng(0).normal(size=len(data)),
        n=oracle()["poisson"]["n"],
    )


@cache
def oracle():
    return json.loads((HERE / "oracle" / "smooths.json").read_text())


@cache
def fit_of(bs, reml=True):
    return mj.lmm(f"y ~ s(x, bs = '{bs}') + (1 | g)", curve(), reml=reml)


@cache
def larger():
    return mj.lmm("y ~ f + z + s(x, bs = 'cr', k = 8) + (1 | g)", curve())


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, 10])
@pytest.mark.parametrize("bs", BASES)
def test_bases_are_mgcvs_also_beyond_the_data(bs, k):
    wanted = oracle()["bases"]
    smooth = smooth_of(np.array(wanted["x"]), k, bs, "s(x)")
    B = smooth.functions(np.array(wanted["at"]))
    bend, own = B @ smooth.bend, wanted[f"{bs}{k}"]
    np.testing.assert_allclose(bend @ bend.T, own["K"], atol=1e-10 * np.abs(own["K"]).max())
    np.testing.assert_allclose(np.abs(B @ smooth.line), own["line"], rtol=1e-11, atol=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from(BASES), st.integers(4, 12))
def test_a_line_and_what_is_orthogonal_to_the_constant(seed, bs, k):
    """Columns sum to zero over the rows, the line is one, and outside the data all go on straight."""
    x = np.random.default_rng(seed).uniform(-3, 8, 60)
    smooth = smooth_of(x, k, bs, "s(x)")
    B = smooth.functions(x)
    columns = np.column_stack([B @ smooth.line, B @ smooth.bend])
    np.testing.assert_allclose(columns.mean(0), 0.0, atol=1e-9 * np.abs(columns).max())
    assert np.linalg.matrix_rank(columns) == k - 1
    slope, level = np.polyfit(x, columns[:, 0], 1)
    np.testing.assert_allclose(columns[:, 0], slope * x + level, atol=1e-9 * np.abs(columns[:, 0]).max())
    assert slope > 0
    low, high = x.min() - 0.1, x.max() + 0.1  # P-splines have knots a little outside
    for ends in (np.linspace(low - 4, low, 7), np.linspace(high, high + 4, 7)):
        far = smooth.functions(ends) @ np.column_stack([smooth.line, smooth.bend])
        np.testing.assert_allclose(np.diff(far, 2, axis=0), 0.0, atol=1e-8 * np.abs(far).max())


def test_cubic_regression_splines_are_natural_splines_through_values_at_quantiles():
    x = np.random.default_rng(1).uniform(0, 1, 80)
    smooth = smooth_of(x, 6, "cr", "s(x)")
    at, values = np.linspace(x.min(), x.max(), 31), np.random.default_rng(2).normal(size=6)
    wanted = CubicSpline(smooth.places, values, bc_type="natural")(at)
    np.testing.assert_allclose(smooth.functions(at) @ values, wanted, atol=1e-12)
    np.testing.assert_allclose(smooth.places, np.quantile(x, np.linspace(0, 1, 6)))


def test_the_penalty_is_the_integral_of_the_squared_second_derivative():
    """So curves do not depend on the basis, where it is complete: one smoothing spline by two bases."""
    rng = np.random.default_rng(5)
    data = pd.DataFrame({"x": np.repeat(np.arange(12.0), 4)})
    data["y"] = np.sin(data["x"] / 2) + 0.3 * rng.normal(size=48)
    cr, tp = (mj.lmm(f"y ~ s(x, bs = '{bs}', k = 12)", data) for bs in ("cr", "tp"))
    # REML criteria differ by the length of the line's column alone.
    length = np.linalg.norm(cr.X[:, 1]) / np.linalg.norm(tp.X[:, 1])
    assert cr.criterion - 2 * np.log(length) == pytest.approx(tp.criterion, abs=1e-9)
    np.testing.assert_allclose(cr.predict(), tp.predict(), atol=1e-6)
    np.testing.assert_allclose(cr.smooths()["edf"], tp.smooths()["edf"], rtol=1e-6)


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("bs", BASES)
def test_fits_of_gamm4(bs, method):
    wanted = json.loads((HERE / "oracle" / f"structure_s_curve_{bs}.json").read_text())["fits"][method]
    fit = fit_of(bs, method == "REML")
    assert fit.converged
    assert fit.npar == 5
    assert fit.criterion == pytest.approx(wanted["criterion"], abs=1e-9)
    table, parameters = fit.variance_parameters()["estimate"], wanted["parameters"]
    found = table[["sd|s(x)", "sd_Intercept|g", "sigma"]]
    np.testing.assert_allclose(found, [parameters[n] for n in ("sd_smooth", "sd_g", "sigma")], rtol=1e-8)
    np.testing.assert_allclose(np.abs(fit.fixef), np.abs(list(wanted["fixef"].values())), rtol=1e-9)
    assert list(fit.fixef.index) == ["Intercept", "s(x).fx1"]
    # gam()'s and gamm4's own searches are less exact.
    np.testing.assert_allclose(fit.predict()[:10], wanted["gam"]["fitted_first"], atol=5e-6)
    np.testing.assert_allclose(fit.predict()[:10], wanted["gamm4"]["fitted_first"], atol=2e-5)
    assert fit.smooths()["edf"].iloc[0] == pytest.approx(wanted["gam"]["edf"][0], abs=1e-4)


@pytest.mark.parametrize("bs", BASES)
def test_curves_of_gam(bs):
    wanted, new = oracle()[bs], np.array(oracle()["new"])
    fit = fit_of(bs)
    found = fit.smooth("s(x)", at=new)
    np.testing.assert_allclose(found["estimate"], wanted["curve"]["fit"], atol=1e-9)
    np.testing.assert_allclose(found["std_error"], wanted["curve"]["se"], rtol=1e-9)
    row = fit.smooths().loc["s(x)"]
    assert row["edf"] == pytest.approx(wanted["edf"], rel=1e-9)
    assert row["lambda"] == pytest.approx(wanted["sp"], rel=1e-7)
    assert (row["basis"], row["k"]) == (bs, 10)
    rows = {"x": new, "g": ["g01"] * len(new)}
    whole = fit.predict(rows, interval="confidence")
    np.testing.assert_allclose(whole["estimate"], wanted["whole"]["fit"], atol=1e-9)
    np.testing.assert_allclose(whole["std_error"], wanted["whole"]["se"], rtol=1e-9)


def test_one_for_every_level_of_a_factor():
    wanted, new = oracle()["by"], oracle()["new"]
    fit = mj.lmm("y ~ f + s(x, by = f, bs = 'cr', k = 8) + (1 | g)", curve())
    assert fit.criterion == pytest.approx(wanted["criterion"], abs=1e-8)
    for level in "ab":
        found = fit.smooth(f"s(x):f[{level}]", at=new)
        np.testing.assert_allclose(found["estimate"], wanted[level]["fit"], atol=1e-8)
        np.testing.assert_allclose(found["std_error"], wanted[level]["se"], rtol=1e-8)
    np.testing.assert_allclose(fit.smooths()["edf"], wanted["edf"], rtol=1e-8)
    with pytest.raises(ValueError, match="name the smooth; there are 's"):
        fit.smooth()
    with pytest.raises(mj.DataError, match=r"\['c'\]|'c'"):
        fit.predict({"x": [0.5], "f": ["c"], "g": ["g01"]})


def test_of_counts_with_nagq_0_it_is_gams():
    """gam(method = "ML") takes fixed effects at the joint mode, as nAGQ = 0 does."""
    wanted, new = oracle()["poisson"], oracle()["new"]
    fit = mj.glmm("n ~ s(x, k = 9)", curve(), "poisson", nagq=0)
    assert fit.criterion == pytest.approx(wanted["criterion"], abs=1e-7)
    found = fit.smooth(at=new)
    np.testing.assert_allclose(found["estimate"], wanted["curve"]["fit"], atol=1e-7)
    np.testing.assert_allclose(found["std_error"], wanted["curve"]["se"], rtol=1e-7)
    row = fit.smooths().iloc[0]
    np.testing.assert_allclose([row["edf"], row["lambda"]], [wanted["edf"], wanted["sp"]], rtol=1e-6)
    laplace = mj.glmm("n ~ s(x, k = 9)", curve(), "poisson")
    assert laplace.criterion < fit.criterion + 1e-9
    np.testing.assert_allclose(laplace.smooth(at=new)["estimate"], found["estimate"], atol=0.01)
    np.testing.assert_allclose(
        laplace.predict({"x": new}, random=False, scale="link"),
        laplace.fixef["Intercept"] + laplace.smooth(at=new)["estimate"],
        rtol=1e-9,
    )


@pytest.mark.parametrize("bs", BASES)
def test_it_is_penalised_least_squares(bs):
    """The curve minimises ``|y - B beta|^2 + lambda beta'S beta`` in the basis itself, its penalty as mgcv scales it;
    edf is the trace of the hat matrix; and the criterion is the dense likelihood's."""
    fit = mj.lmm(f"y ~ s(x, bs = '{bs}', k = 9)", curve())
    X, Z, y = fit.X, fit.Z.toarray(), curve()["y"].to_numpy()
    row = fit.smooths().iloc[0]
    C = np.column_stack([X, Z])
    P = np.diag(np.r_[np.zeros(2), np.full(7, row["lambda"])])
    hat = C @ np.linalg.solve(C.T @ C + P, C.T)
    np.testing.assert_allclose(fit.predict(), hat @ y, atol=1e-8)
    assert row["edf"] == pytest.approx(np.trace(hat) - 1, rel=1e-8)
    se = np.sqrt(fit.sigma**2 * np.diag(C @ np.linalg.solve(C.T @ C + P, C.T)))
    np.testing.assert_allclose(fit.predict(random=False, interval="confidence")["std_error"], se, rtol=1e-8)
    ratio = np.sqrt(fit.Sigma["s(x)"][0, 0]) / fit.sigma
    assert dense_criterion(fit.record.design, [ratio * np.eye(7)], True) == pytest.approx(fit.criterion, abs=1e-8)


@pytest.mark.parametrize("bs", BASES)
def test_units_and_the_order_of_rows_do_not_matter(bs):
    fit = fit_of(bs)
    other = curve().sample(frac=1.0, random_state=2)
    other = other.assign(x=other["x"] * 40 + 1900, y=other["y"] * 100 - 3)
    again = mj.lmm(f"y ~ s(x, bs = '{bs}') + (1 | g)", other)
    np.testing.assert_allclose(again.predict().sort_index(), 100 * fit.predict() - 3, atol=1e-4)
    assert again.smooths()["edf"].iloc[0] == pytest.approx(fit.smooths()["edf"].iloc[0], rel=1e-5)
    np.testing.assert_allclose(again.smooth(at=[1910.0, 1950.0])["std_error"],
                               100 * fit.smooth(at=[0.25, 1.25])["std_error"], rtol=1e-4)  # fmt: skip


def test_a_straight_line_has_a_variance_of_zero():
    data = curve().assign(y=lambda d: 2 * d["x"] + 0.3 * d["z"])
    found = [mj.lmm(f"y ~ s(x, bs = '{bs}')", data) for bs in BASES]
    zero = [fit for fit in found if fit.is_singular]
    assert zero
    for fit in zero:
        assert fit.smooths()["edf"].iloc[0] == 1.0
        line = np.polyfit(data["x"], data["y"], 1)
        np.testing.assert_allclose(fit.predict(), np.polyval(line, data["x"]), atol=1e-9)


# --- after the fit ---------------------------------------------------------------------------------------------------


def test_smooths_are_part_of_every_mean():
    fit = larger()
    rows = curve().head(6)
    population = fit.predict(rows.drop(columns=["g", "y"]), random=False)
    by_hand = fit.X[:6] @ fit.fixef + fit.Z.toarray()[:6, -6:] @ fit.ranef()["s(x)"].to_numpy()[0]
    np.testing.assert_allclose(population, by_hand, rtol=1e-10)
    np.testing.assert_allclose(fit.predict(rows, random="g"), fit.predict(rows), rtol=1e-12)
    one_by_one = [fit.predict(rows.iloc[[i]], random=False).iloc[0] for i in range(6)]
    np.testing.assert_allclose(one_by_one, population, rtol=1e-12)
    # Responses drawn from the fit are about that curve.
    Y = np.asarray(fit.simulate(0, 4000))
    se = Y.std(0) / np.sqrt(4000)
    assert np.abs((Y.mean(0) - fit.predict(random=False)) / se).max() < 5
    kept = pickle.loads(pickle.dumps(fit))
    np.testing.assert_array_equal(kept.predict(rows), fit.predict(rows))
    np.testing.assert_array_equal(kept.smooth(at=[0.1]), fit.smooth(at=[0.1]))


def test_a_new_level_beside_a_smooth():
    fit = fit_of("cr")
    new = fit.predict({"x": [0.3], "g": ["nobody"]}, allow_new_levels=True, interval="prediction").iloc[0]
    own = fit.predict({"x": [0.3]}, random=False, interval="confidence").iloc[0]
    between = fit.Sigma["g"][0, 0] + fit.sigma**2
    assert new["estimate"] == pytest.approx(own["estimate"])
    assert new["std_error"] == pytest.approx(np.sqrt(own["std_error"] ** 2 + between), rel=1e-9)


def test_tables_have_one_row_for_a_smooth():
    fit = larger()
    text = str(fit.summary())
    assert "s(x)     smooth" in text
    assert "groups: g, 12" in text.replace("  ", " ")
    assert "s(x)," not in text
    assert fit.varcorr.to_frame()["name1"].tolist()[:2] == ["Intercept", "smooth"]


def test_the_curve_against_its_straight_line():
    fit = mj.lmm("y ~ s(x, bs = 'cr', k = 8)", curve())
    line = mj.lmm("y ~ x", curve(), dispersion="~ 1")
    row = fit.ranova().loc["s(x)"]
    # The fixed effects are the same, differently coded: REML criteria differ by the determinant of that.
    slope = np.polyfit(curve()["x"], fit.X[:, 1], 1)[0]
    assert row["lrt"] == pytest.approx(line.criterion + 2 * np.log(abs(slope)) - fit.criterion, abs=1e-7)
    assert np.isnan(row["p_mixture"])
    test = mj.exact_rlrt(fit, n=2000)
    assert test.statistic == pytest.approx(row["lrt"], abs=1e-8)
    assert test.p_value < 0.001
    mA, m = fit_of("cr"), mj.lmm("y ~ s(x, bs = 'cr')", curve())
    beside = mj.exact_rlrt(m, mA.without("s(x)"), mA, n=500)
    assert beside.statistic == pytest.approx(mA.ranova().loc["s(x)", "lrt"], abs=1e-8)
    both = mj.compare(mj.lmm("y ~ x + (1 | g)", curve(), reml=False), fit_of("cr", False))
    assert "has one level" in str(both)


@pytest.mark.parametrize("reml", [True, False])
def test_the_spectrum_of_a_smooth_is_that_of_dense_matrices(reml):
    fit = mj.lmm("y ~ s(x, bs = 'tp', k = 8)", curve(), reml=reml)
    Z, X = fit.Z.toarray(), fit.X
    Z = Z / np.sqrt((Z**2).mean(0).mean())  # as the basis of the products has it
    left = Z - X @ np.linalg.lstsq(X, Z, rcond=None)[0]
    found = spectrum(fit.stats, reml)
    np.testing.assert_allclose(found.mu[1:], np.linalg.eigvalsh(left.T @ left), rtol=1e-8)
    xi = np.linalg.eigvalsh((left if reml else Z).T @ (left if reml else Z))
    np.testing.assert_allclose(found.xi, xi, rtol=1e-8)
    assert found.df.sum() == len(Z) - 2


def test_the_exact_test_holds_its_level():
    """Of data from straight lines: refits draw the same null distribution, and a variance of zero has its share."""
    data = curve().head(80)
    fit = mj.lmm("y ~ s(x, bs = 'cr', k = 6)", data)
    rng = np.random.default_rng(11)
    Y = 1.0 + data["x"].to_numpy() + rng.normal(size=(600, 80))
    batch = fit.refit_many(Y)
    null = [mj.exact_rlrt(fit.refit(y), n=400).p_value for y in Y[:1]]
    assert 0 < null[0] <= 1
    X = fit.X
    residual = Y - Y @ X @ np.linalg.solve(X.T @ X, X.T)
    constant = np.linalg.slogdet(X.T @ X)[1] + 78 * (1 + np.log(2 * np.pi / 78))
    statistics = 78 * np.log((residual**2).sum(1)) + constant - batch.criterion.to_numpy()
    draws = draw(spectrum(fit.stats, True), 0, 20_000)
    for at in (0.0, 0.5, 2.0, 4.0):
        assert np.mean(statistics <= at + 1e-6) == pytest.approx(np.mean(draws <= at + 1e-6), abs=0.05)


RIGHT = {
    "summary": lambda f: f.summary("satterthwaite"),
    "kenward-roger": lambda f: f.anova(ddf="kenward-roger"),
    "drop1": lambda f: f.drop1(),
    "tidy": lambda f: f.tidy(),
    "confint": lambda f: f.confint(method="wald"),
    "bootstrap": lambda f: f.confint(method="bootstrap", n=10),
    "second-order": lambda f: f.predict(random=False, interval="confidence", method="second-order"),
    "refit_many": lambda f: f.refit_many(f.simulate(1, 3)).criterion,
    "influence": lambda f: f.influence("g").cooks,
    "leverage": lambda f: f.leverage(),
    "marginal": lambda f: f.residuals("marginal", "cholesky"),
    "augment": lambda f: f.augment(),
    "quantile_residuals": lambda f: f.quantile_residuals(n=20).tests(),
    "sensitivity": lambda f: f.sensitivity(),
    "ranef": lambda f: f.ranef(condvar=True)[0]["g"],
    "coef": lambda f: f.coef()["g"],
    "without": lambda f: f.without("f").fixef,
    "table": lambda f: str(mj.table({"a": f})),
    "scenario_of": lambda f: str(mj.scenario_of(f)),
    "glance": lambda f: f.glance(),
}
REFUSED = {
    "emmeans": lambda f: f.emmeans("f"),
    "emtrends": lambda f: f.emtrends("z", "f"),
    "joint_tests": lambda f: f.joint_tests(),
    "r2": lambda f: f.r2(),
    "icc": lambda f: f.icc(),
    "variance_shares": lambda f: f.variance_shares(),
    "robust": lambda f: f.robust(),
    "shrinkage": lambda f: f.shrinkage(),
    "cases": lambda f: f.bootstrap(n=5, key=0, kind="cases"),
    "residual": lambda f: f.bootstrap(n=5, key=0, kind="residual"),
    "wild": lambda f: f.bootstrap(n=5, key=0, kind="wild"),
    "bca": lambda f: f.bootstrap(n=20, key=0).confint(kind="bca"),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_works(name):
    found = RIGHT[name](larger())
    if isinstance(found, pd.DataFrame) and name != "tidy" and name != "augment":
        assert not np.isnan(found.select_dtypes("number").to_numpy()).any()
    assert len(str(found)) > 0


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"of a model with a smooth, s\(x\): not there, because"):
        REFUSED[name](larger())


def test_profile_intervals_end_where_a_dense_likelihood_has_risen_by_their_quantile():
    fit = larger().refit(reml=False)
    design, (sd_g, sd_s, sigma) = fit.record.design, fit.variance_parameters()["estimate"]
    frame = fit.confint(["sd|s(x)", "sigma"])

    def deviance(sds):
        V = covariance(design, [np.atleast_2d(sds[0] ** 2), sds[1] ** 2 * np.eye(design.terms[1].Z.shape[1])], sds[2])
        white = np.linalg.solve(np.linalg.cholesky(V), np.column_stack([design.X, design.y]))
        left = white[:, -1] - white[:, :-1] @ np.linalg.lstsq(white[:, :-1], white[:, -1], rcond=None)[0]
        return len(V) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + left @ left

    start = np.array([sd_g, sd_s, sigma])
    for row, place in (("sd|s(x)", 1), ("sigma", 2)):
        for value in frame.loc[row]:
            found = scipy.optimize.minimize(
                lambda u, value=value, place=place: deviance(np.insert(np.exp(u), place, value)),
                np.log(np.delete(start, place)), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8},
            )  # fmt: skip
            assert found.fun - fit.criterion == pytest.approx(1.959963984540054**2, abs=1e-5)


def test_other_refusals():
    with pytest.raises(ValueError, match="has one level"):
        larger().influence("s(x)")
    with pytest.raises(ValueError, match=r"mixjax\.bayes of a model with a smooth"):
        mj.bayes("y ~ s(x) + (1 | g)", curve())
    with pytest.raises(mj.FormulaError, match=r"mmrm\(\) has none"):
        mj.mmrm("y ~ s(x) + us(f | g)", curve())
    with pytest.raises(mj.FormulaError, match="knots all rows together give"):
        mj.cross_products_from([curve()], "y ~ s(x) + (1 | g)")
    with pytest.raises(mj.FormulaError, match="has a smooth, and here are fixed effects only"):
        mj.lmm("y ~ x + (1 | g)", curve(), dispersion="~ s(x)")
    with pytest.raises(ValueError, match="has no smooth"):
        mj.lmm("y ~ x + (1 | g)", curve()).smooths()
    with pytest.raises(ValueError, match=r"there is no smooth 's\(z\)'; there are 's\(x\)'"):
        larger().smooth("s(z)")
    with pytest.raises(ValueError, match="at must be finite"):
        larger().smooth(at=[np.nan])


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("s(x, z)", "of one variable"),
        ("te(x, z)", "smooths of several variables"),
        ("s()", "of one variable"),
        ("s(x, bs = 'gp')", "bases are 'cr', 'ps', 'tp'"),
        ("s(x, k = 2)", "3 to 60"),
        ("s(x, k = 2.5)", "3 to 60"),
        ("s(x, bs = 'ps', k = 3)", "4 to 60"),
        ("s(x, k = 500)", "3 to 60"),
        ("s(x, m = 1)", "'m' is not understood"),
        ("s(x, by = 2)", "by is the name of a column"),
        ("s(x, by = x)", "of one column"),
        ("s(x) + s(x, k = 5)", "stands twice"),
        ("z - s(x)", "is subtracted"),
        ("z:s(x)", "a summand of the model's own formula"),
    ],
)
def test_slips(written, says):
    with pytest.raises(mj.FormulaError, match=says):
        mj.lmm(f"y ~ {written} + (1 | g)", curve())


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("s(x, by = z)", "by = z is numeric"),
        ("s(f)", "a smooth is of numbers"),
        ("s(few)", "k = 10 basis functions need as many distinct values, and there are 4"),
    ],
)
def test_data_that_will_not_do(written, says):
    with pytest.raises(mj.DataError, match=says):
        mj.lmm(f"y ~ {written} + (1 | g)", curve().assign(few=curve().index % 4))


def test_too_many_values_for_thin_plates():
    data = pd.DataFrame({"x": np.arange(2100.0), "y": np.sin(np.arange(2100.0))})
    with pytest.raises(mj.DataError, match="up to 2000 distinct values"):
        mj.lmm("y ~ s(x)", data)


def test_other_ways_of_writing_it():
    data = curve().rename(columns={"x": "the x"})
    found = mj.lmm('y ~ (1 | g) + s(`the x`, k = 8, bs = "cr")', data)
    assert found.criterion == pytest.approx(mj.lmm("y ~ s(x, k=8, bs='cr') + (1|g)", curve()).criterion, abs=1e-9)
    untrusted = mj.lmm("y ~ s(x, k = 8, bs = 'cr') + (1 | g)", curve(), trusted=False)
    assert untrusted.criterion == pytest.approx(found.criterion, abs=1e-9)
    inside = mj.lmm("y ~ s(log(x + 1), bs = 'cr', k = 8) + (1 | g)", curve())
    assert inside.smooth().columns[0] == "log(x + 1)"
    assert inside.predict({"x": [0.5]}, random=False).iloc[0] == pytest.approx(
        inside.fixef["Intercept"] + inside.smooth(at=[np.log(1.5)])["estimate"].iloc[0]
    )


def test_several_smooths_and_residuals_of_their_own():
    two = mj.lmm("y ~ s(x, bs = 'cr', k = 6) + s(z, bs = 'ps', k = 6) + (1 | g)", curve())
    assert two.smooths().index.tolist() == ["s(x)", "s(z)"]
    assert two.converged
    design = two.record.design
    ratios = [np.sqrt(S[0, 0]) / two.sigma * np.eye(len(S)) for S in two.estimates.Sigma]
    assert dense_criterion(design, ratios, True) == pytest.approx(two.criterion, abs=1e-8)
    other = mj.lmm("y ~ s(x, bs = 'cr', k = 6) + (1 | g)", curve(), dispersion="~ f")
    assert other.smooth().notna().all().all()


def test_a_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from mixjax import plots  # matplotlib is not there everywhere

    ax = plots.smooths(larger())
    (line,) = [own for own in ax.get_lines() if len(own.get_xdata()) == 200]
    np.testing.assert_allclose(line.get_ydata(), larger().smooth(n=200)["estimate"])
    assert ax.get_xlabel() == "x"
    fit = mj.lmm("y ~ f + s(x, by = f, bs = 'cr', k = 6)", curve())
    assert len(plots.smooths(fit)) == 2
    with pytest.raises(mj.DataError, match="there is no smooth"):
        plots.smooths(fit, "s(z)")
    with pytest.raises(mj.DataError, match=r"plots.smooths\(fit\) draws"):
        plots.caterpillar(larger(), "s(x)")
