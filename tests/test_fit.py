"""LMMFit: what an analyst sees and types."""

import pickle
import re
from dataclasses import replace

import dense
import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, table
from scipy import sparse

import mixjax as mj
from mixjax.diagnostics.least_squares import level2
from mixjax.fitted.names import interaction_key, names_apart


@pytest.fixture(scope="module")
def sleep():
    return fit_of("sleepstudy_slopes", "REML")


def test_summary_of_sleepstudy(sleep):
    text = str(sleep.summary())
    for line in (
        "Linear mixed model fit by REML",
        "REML criterion at convergence: 1743.6",
        "-3.9536 -0.4634 0.0231 0.4634 5.1793",
        "Subject  Intercept   612.09   24.740",
        "         Days         35.07    5.922 0.07",
        "Residual             654.94   25.592",
        "Number of obs: 180, groups: Subject, 18",
        "Intercept  251.405      6.825  36.838",
        "Days        10.467      1.546   6.771",
        "Days    -0.138",
    ):
        assert line in text, text


def test_blups_of_subject_309(sleep):
    np.testing.assert_allclose(sleep.ranef()["Subject"].loc["309"], [-40.399, -8.620], atol=5e-4)


def test_summary_of_an_ml_fit():
    text = str(fit_of("sleepstudy_slopes", "ML").summary())
    assert "fit by maximum likelihood" in text
    assert re.search(r"AIC +BIC +logLik +-2\*log\(L\) +df.resid\n *1763.9 1783.1 -876.0 +1751.9 +174", text), text


def test_summary_says_what_is_special():
    assert "singular fit" in str(fit_of("dyestuff2", "REML").summary())
    crossed = str(fit_of("penicillin", "REML").summary())
    assert "groups: plate, 24; sample, 6" in crossed
    assert "Corr" not in crossed
    assert "Subject.1" in str(fit_of("sleepstudy_zerocorr", "REML").varcorr)


def test_html_escapes_and_has_both_tables(sleep):
    data = table("sleepstudy").rename(columns={"Days": "a<b"})
    page = mj.lmm("Reaction ~ `a<b` + (1 | Subject)", data)._repr_html_()
    assert "a&lt;b" in page
    assert "<b " not in page
    assert sleep._repr_html_().count("<table") == 2


def test_varcorr_frame(sleep):
    frame = sleep.varcorr.to_frame()
    assert list(frame.columns) == ["group", "name1", "name2", "vcov", "sdcor"]
    assert frame.iloc[-1]["group"] == "Residual"
    np.testing.assert_allclose(frame["sdcor"], [24.74045, 5.92213, 0.06555, 25.59182], rtol=1e-4)
    np.testing.assert_allclose(frame["vcov"][2], sleep.Sigma["Subject"][0, 1])


def test_correlation_of_a_zero_variance_is_nan():
    data = table("Dyestuff2").assign(x=np.tile(np.arange(5.0) - 2, 6))
    fit = mj.lmm("Yield ~ x + (x | Batch)", data)
    assert fit.is_singular
    frame = fit.varcorr.to_frame()
    zero = frame["sdcor"][:2].min() == 0
    assert np.isnan(frame["sdcor"][2]) == zero
    assert str(fit.summary())


def test_tidy_glance_augment(sleep):
    tidy = sleep.tidy()
    assert list(tidy.columns) == ["effect", "group", "term", "estimate", "std_error", "statistic", "df", "p_value"]
    assert list(tidy["term"]) == [
        "Intercept", "Days", "sd__Intercept", "sd__Days", "cor__Intercept.Days", "sd__Observation"]  # fmt: skip
    assert list(tidy["effect"]) == ["fixed"] * 2 + ["ran_pars"] * 4
    np.testing.assert_allclose(tidy["statistic"][:2], sleep.fixef / sleep.se)
    for ddf, level in ((None, 0.95), ("kenward-roger", 0.9)):
        found = sleep.tidy(ddf, conf_int=True, level=level)
        own = sleep.confint("beta_", level, method="wald", ddf=ddf or "wald")
        np.testing.assert_allclose(found[["lower", "upper"]][:2].astype(float), own, rtol=1e-13)
        assert found["lower"][2:].isna().all()
        assert f"{100 * level:g} % intervals" in str(found)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        sleep.tidy(conf_int=True, level=95)
    glance = sleep.glance()
    assert glance.shape[0] == 1
    assert glance["nobs"][0] == 180
    np.testing.assert_allclose(glance["bic"][0], sleep.bic)
    augmented = sleep.augment()
    np.testing.assert_allclose(augmented[".fitted"] + augmented[".resid"], augmented["Reaction"])
    np.testing.assert_allclose(augmented[".fixed"], sleep.X @ sleep.fixef)
    assert list(augmented.columns[:7]) == ["Reaction", "Days", "Subject", ".fitted", ".fixed", ".random", ".resid"]


@pytest.mark.parametrize("name", ["sleepstudy_weighted", "penicillin", "pastes_nested", "sleepstudy_zerocorr"])
def test_matrices_satisfy_the_model(name):
    """X, Z, Lambda, Sigma, V against each other and against the mixed-model equations."""
    fit = fit_of(name, "REML")
    Z = fit.Z
    assert sparse.issparse(Z)
    V = fit.marginal_cov()
    Sigmas = list(fit.Sigma.values())
    blocks = [np.kron(np.eye(t.n_groups), S) for t, S in zip(fit.design.terms, Sigmas, strict=True)]
    G = sparse.block_diag(blocks).toarray()
    w = np.ones(fit.nobs) if fit.design.weights is None else fit.design.weights
    np.testing.assert_allclose(V, Z @ G @ Z.T + np.diag(fit.sigma**2 / w), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(V, dense.covariance(fit.design, Sigmas, fit.sigma), rtol=1e-12, atol=1e-12)
    rows = [3, 8, 20]
    np.testing.assert_allclose(fit.marginal_cov(rows), V[np.ix_(rows, rows)])
    for Lambda, Sigma in zip(fit.Lambda.values(), Sigmas, strict=True):
        np.testing.assert_allclose(fit.sigma**2 * Lambda @ Lambda.T, Sigma, rtol=1e-12)
        assert (np.triu(Lambda, 1) == 0).all()
    # BLUP = G Z' V^{-1} (y - X beta), conditional covariance = (Z'W Z / sigma^2 + G^{-1})^{-1}.
    offset = 0 if fit.design.offset is None else fit.design.offset
    b = G @ Z.T @ np.linalg.solve(V, fit.design.y - offset - fit.X @ fit.fixef)
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in fit.estimates.b]), b, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fit.fitted, offset + fit.X @ fit.fixef + Z @ b, rtol=1e-8)
    full = np.linalg.inv((Z.T @ (Z * (w[:, None])) / fit.sigma**2) + np.linalg.inv(G))
    first = next(iter(fit.ranef(condvar=True)[1].values()))
    q = fit.design.terms[0].Z.shape[1]
    np.testing.assert_allclose(first[0][:q, :q], full[:q, :q], rtol=1e-6)


def test_marginal_cov_of_many_rows_is_refused():
    with pytest.raises(ValueError, match="too large to be dense; name the rows"):
        fit_of("insteval", "REML").marginal_cov()


def test_coef_adds_fixed_and_random(sleep):
    coef = sleep.coef()["Subject"]
    np.testing.assert_allclose(coef["Days"], sleep.fixef["Days"] + sleep.ranef()["Subject"]["Days"])
    machines = fit_of("machines_nested", "REML").coef()["Worker"]
    assert machines["Machine[T.B]"].nunique() == 1  # not random: the same for every worker


def test_residuals(sleep):
    data = table("sleepstudy")
    np.testing.assert_allclose(sleep.residuals(), data.Reaction - sleep.fitted)
    np.testing.assert_allclose(sleep.residuals("marginal"), data.Reaction - sleep.predict(random=False))
    weighted = fit_of("sleepstudy_weighted", "REML")
    np.testing.assert_allclose(
        weighted.residuals(scale="pearson"), weighted.residuals() * np.sqrt(weighted.design.weights)
    )
    with pytest.raises(ValueError, match="kind must be"):
        sleep.residuals("other")
    with pytest.raises(ValueError, match="scale of kind='conditional' must be one of"):
        sleep.residuals(scale="other")


def test_rows_keep_the_index_of_the_table():
    data = table("sleepstudy").set_axis([f"row{i}" for i in range(180)])
    data.loc["row3", "Reaction"] = np.nan
    with pytest.warns(mj.DataWarning):
        fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
    assert fit.nobs == 179
    assert list(fit.fitted.index[:4]) == ["row0", "row1", "row2", "row4"]


def test_refit(sleep):
    again = sleep.refit(table("sleepstudy")["Reaction"])
    np.testing.assert_allclose(again.theta, sleep.theta, rtol=1e-9)
    doubled = sleep.refit(2 * table("sleepstudy")["Reaction"].to_numpy())
    np.testing.assert_allclose(doubled.fixef, 2 * sleep.fixef, rtol=1e-7)
    ml = sleep.refit(reml=False)
    assert not ml.reml
    np.testing.assert_allclose(ml.criterion, fit_of("sleepstudy_slopes", "ML").criterion)
    with pytest.raises(ValueError, match=r"y has shape \(3,\)"):
        sleep.refit(np.ones(3))
    assert sleep.criterion == fit_of("sleepstudy_slopes", "REML").criterion  # a refit leaves the fit alone


def test_pickle(sleep):
    again = pickle.loads(pickle.dumps(sleep))
    assert str(again.summary()) == str(sleep.summary())
    pd.testing.assert_series_equal(again.fitted, sleep.fitted)
    assert again.refit(reml=False).converged
    optax = pytest.importorskip("optax")
    first_order = mj.lmm("Yield ~ 1 + (1 | Batch)", table("Dyestuff"), optimizer=optax.lbfgs())
    assert pickle.loads(pickle.dumps(first_order)).optimizer.name == "optax"


def test_icc_against_the_definition():
    import json

    reference = json.loads((HERE / "oracle" / "inference_performance.json").read_text())
    checked = 0
    for name, methods in reference.items():
        if name in ("versions", "note"):
            continue
        for method, values in methods.items():
            icc = fit_of(name, method).icc()
            np.testing.assert_allclose(icc["adjusted"], values["definition"]["ICC_adjusted"], rtol=1e-5)
            np.testing.assert_allclose(icc["unadjusted"], values["definition"]["ICC_unadjusted"], rtol=1e-5)
            by_group = fit_of(name, method).icc(by_group=True)
            assert by_group.sum() == pytest.approx(icc["adjusted"], rel=1e-12)
            assert list(by_group.index) == list(fit_of(name, method).ranef())
            r2 = fit_of(name, method).r2()
            np.testing.assert_allclose(r2["marginal"], values["definition"]["R2_marginal"], rtol=1e-5, atol=1e-12)
            np.testing.assert_allclose(r2["conditional"], values["definition"]["R2_conditional"], rtol=1e-5)
            checked += 1
    assert checked >= 4


def test_results_are_numpy_and_pandas_in_float64(sleep):
    for values in (sleep.theta, sleep.X, sleep.estimates.beta, sleep.stats.XX, sleep.estimates.b[0]):
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.float64
    assert isinstance(sleep.sigma, float)
    assert sleep.fixef.dtype == np.float64


def test_no_fixed_effects_at_all():
    data = table("Dyestuff").assign(Yield=lambda d: d.Yield - 1500)
    fit = mj.lmm("Yield ~ 0 + (1 | Batch)", data)
    assert len(fit.fixef) == 0
    assert "none" in str(fit.summary())
    assert fit.npar == 2


def test_second_data_set_of_the_same_structure_compiles_nothing(sleep, caplog):
    """Other numbers of rows and groups, and the other criterion, use the program that is there."""
    from mixjax.engine.engine import engine_of
    from mixjax.estimation.estimate import fit as fit_one
    from mixjax.machine import compiled

    data, sizes = table("sleepstudy"), []
    for rows, reml in ((data, True), (data[data.Subject.isin(data.Subject.unique()[:11])], True), (data[3:], False)):
        design, _ = mj.build_design("Reaction ~ Days + (Days | Subject)", rows)
        engine_of(mj.cross_products(design), reml, at_once=False).run(fit_one)
        sizes.append(compiled(fit_one)._cache_size())
    assert sizes[0] == sizes[1] == sizes[2] >= 1


def test_long_names_are_numbered_in_the_correlation_table():
    text = str(fit_of("cake_temp", "REML").summary())
    assert re.search(r"\(1\) +\(2\) +\(3\)\n\(1\) Intercept\n\(2\) recipe\[T.B\] +-0", text), text


def test_what_takes_only_keywords_does_not_swallow_a_table(sleep):
    with pytest.raises(TypeError):
        sleep.ranef("Subject")


def test_refit_lines_a_series_up(sleep):
    y = table("sleepstudy")["Reaction"].iloc[::-1]
    np.testing.assert_allclose(sleep.refit(y).criterion, sleep.criterion, atol=1e-9)
    with pytest.raises(ValueError, match="y must be numbers"):
        sleep.refit("Days")


def test_responses_as_long_as_the_table():
    data = table("sleepstudy")
    holed = data.assign(Days=data["Days"].where(data.index % 50 != 7), label=[f"r{i}" for i in data.index])
    some = [subject for subject in data["Subject"].unique() if subject not in ("308", "309")]
    with pytest.warns(mj.DataWarning, match="3 of 160 rows"):
        fit = mj.lmm(
            "Reaction ~ Days + (Days | Subject)",
            holed.set_index("label"),
            subset=holed["Subject"].isin(some).to_numpy(),
        )
    assert fit.labels.used.shape == (180,)
    assert fit.labels.used.sum() == fit.nobs
    whole = 2 * holed.set_index("label")["Reaction"]
    used = whole[fit.labels.frame.index]
    expected = fit.refit(used.to_numpy())
    np.testing.assert_allclose(expected.fixef, 2 * fit.fixef, rtol=1e-6)
    twice = whole.set_axis(["r0"] * 20 + list(whole.index[20:]))  # labels twice, but not among the used rows
    for y in (whole, whole.to_numpy(), list(whole), whole.iloc[::-1], used.iloc[::-1], twice):
        assert fit.refit(y).criterion == expected.criterion
    Y = fit.simulate(1, 3)
    full = np.full((3, 180), np.nan)
    full[:, fit.labels.used] = Y
    wanted = fit.refit_many(Y).estimates.theta
    np.testing.assert_array_equal(fit.refit_many(full).estimates.theta, wanted)
    rows = [pd.Series(y, index=whole.index).iloc[::-1] for y in full]
    np.testing.assert_array_equal(fit.refit_many(rows).estimates.theta, wanted)
    by_name, by_array = (fit.influence(by).to_frame() for by in ("Subject", holed["Subject"].to_numpy()))
    np.testing.assert_array_equal(by_array["cooks"], by_name["cooks"])
    with pytest.raises(mj.DataError, match=r"y has shape \(9,\), but the fit has 157 rows, of 180 of the table"):
        fit.refit(whole.iloc[:9])
    with pytest.raises(mj.DataError, match=r"\(B, 157\) or \(B, 180\)"):
        fit.refit_many(full[:, :9])
    # A list whose responses come in several ways, and a data frame whose columns are the table's labels.
    mixed = [full[0], Y[1], pd.Series(full[2], index=whole.index).iloc[::-1]]
    np.testing.assert_array_equal(fit.refit_many(mixed).estimates.theta, wanted)
    turned = pd.DataFrame(full, columns=whole.index).sample(frac=1, axis=1, random_state=1)
    np.testing.assert_array_equal(fit.refit_many(turned).estimates.theta, wanted)
    np.testing.assert_array_equal(fit.refit_many(pd.DataFrame(Y)).estimates.theta, wanted)
    with pytest.raises(mj.DataError, match=r"one per row: turn it, Y\.T"):
        fit.refit_many(turned.T)
    with pytest.raises(mj.DataError, match=r"response 2 has shape \(9,\)"):
        fit.refit_many([Y[0], Y[1][:9]])
    lost = whole.copy()
    lost.iloc[[7, 60]] = np.nan  # row 7 misses Days, and is not in the fit
    with pytest.raises(
        mj.DataError, match=r"y is missing or infinite in 1 of the 157 rows of the fit \(first: row r60"
    ):
        fit.refit(lost)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    rng = np.random.default_rng(19)
    data = pd.DataFrame({"g": np.repeat(np.arange(15), 10), "a": rng.normal(size=150), "b": rng.normal(size=150)})
    return data.assign(y=data.a * data.b * (1 + rng.normal(size=15)[data.g]) + rng.normal(size=150))


def test_an_interaction_is_its_factors_in_any_order(few):
    one, other = (mj.lmm(f"y ~ a * b + (0 + {slope} | g)", few) for slope in ("a:b", "b:a"))
    assert list(other.coef()["g"]) == ["Intercept", "a", "b", "a:b"]
    pd.testing.assert_frame_equal(other.coef()["g"], one.coef()["g"], rtol=1e-6)
    assert other.shrinkage()["population"].iloc[0] == one.fixef["a:b"]
    np.testing.assert_allclose(other.shrinkage()["mixed"], one.coef()["g"]["a:b"], rtol=1e-6)
    Y = one.simulate(1, 2)
    batches = [fit.refit_many(Y, ranef=True).coef()["g"] for fit in (one, other)]
    pd.testing.assert_frame_equal(*batches, rtol=1e-6)
    levels = [level2(fit) for fit in (one, other)]
    np.testing.assert_allclose(levels[1]["ls_b:a"], levels[0]["ls_a:b"], rtol=1e-6)


def test_parts_of_a_name():
    assert interaction_key("b:a") == interaction_key("a:b") == ("a", "b")
    assert interaction_key("x:f[T.p:q]") == ("f[T.p:q]", "x")
    assert interaction_key("C(f, levels=['p:q']):`odd:name`") == ("C(f, levels=['p:q'])", "`odd:name`")


def test_a_predictor_with_the_name_of_a_variance_parameter(few):
    right = mj.lmm("y ~ a + (1 | g)", few, reml=False)
    fit = mj.lmm("y ~ sigma + (1 | g)", few.rename(columns={"a": "sigma"}), reml=False)
    assert list(fit.fixef.index) == ["Intercept", "sigma"]
    for call in (
        lambda fit: fit.confint(method="wald"),
        lambda fit: fit.confint("theta_", method="wald"),
        lambda fit: fit.confint("beta_", method="wald"),
        lambda fit: fit.profile(["theta_", "beta_"]).confint(),
        lambda fit: fit.bootstrap(key=1, n=20).confint(),
        lambda fit: fit.bootstrap(key=1, n=20).replicates.T,
        lambda fit: fit.sensitivity().T,
    ):
        pd.testing.assert_frame_equal(call(fit), call(right).rename(index={"a": "beta_sigma"}), rtol=1e-5, atol=1e-9)
    pd.testing.assert_frame_equal(fit.confint("sigma", method="wald"), right.confint("sigma", method="wald"), rtol=1e-5)
    batch = fit.refit_many(right.simulate(1, 2))
    shared = ["sd_Intercept|g", "sigma", "criterion", "converged", "singular", "result"]
    for name in ("sigma", "sd_Intercept|g", "criterion"):
        found = replace(batch, labels=replace(batch.labels, fixed=("Intercept", name))).to_frame()
        assert list(found) == ["Intercept", f"beta_{name}", "se_Intercept", f"se_beta_{name}", *shared]
    assert names_apart(["x", "beta_x"], ["x"]) == ["beta_x", "beta_beta_x"]
    assert len(fit.tidy()) == len(right.tidy()) == 4


def test_a_model_without_fixed_effects(few):
    fit = mj.lmm("y ~ 0 + (1 | g)", few)
    for ddf in ("kenward-roger", "satterthwaite", "wald"):
        assert "Fixed effects:\nnone" in str(fit.summary(ddf))
        assert list(fit.tidy(ddf)["effect"]) == ["ran_pars", "ran_pars"]
        assert fit.anova("II", ddf).shape == (0, 6)
        assert list(fit.confint(method="wald", ddf=ddf).index) == ["sd_Intercept|g", "sigma"]
    none = np.zeros((1, 0))
    for tests in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        assert tests(fit.estimates, fit.stats, none).estimate.tolist() == [0.0]
    for call in (lambda: fit.test("a"), lambda: fit.test([]), lambda: fit.test(np.zeros((0, 0))), fit.robust):
        with pytest.raises(ValueError, match="no fixed effects"):
            call()
    assert fit.r2()["marginal"] == 0
    assert fit.icc()["adjusted"] == fit.icc()["unadjusted"]
    means = fit.predict({"g": [0, 99]}, allow_new_levels=True, interval="confidence")
    assert means["estimate"].tolist() == [fit.ranef()["g"].iloc[0, 0], 0.0]
    assert fit.influence("g").dfbetas.shape == (15, 0)


def test_a_fit_that_does_not_converge_is_warned_of_where_it_was_asked_for(few):
    optax = pytest.importorskip("optax")

    def still():
        """An optimiser that stays where it is."""
        return optax.sgd(0.0)

    with pytest.warns(mj.ConvergenceWarning) as caught:
        fit = mj.lmm("y ~ a + (1 | g)", few, optimizer=still(), start=[2.0])
    with pytest.warns(mj.ConvergenceWarning) as again:
        fit.refit(reml=False)
    assert caught[0].filename == again[0].filename == __file__


def test_one_grouping_factor_under_two_names():
    """Recognised as one factor inside; outside each name keeps its own effects."""
    data = table("sleepstudy").assign(person=lambda d: d.Subject)
    fit = mj.lmm("Reaction ~ Days + (1 | Subject) + (0 + Days | person)", data)
    reference = fit_of("sleepstudy_zerocorr", "REML")
    np.testing.assert_allclose(fit.criterion, reference.criterion, atol=1e-8)
    modes, covariances = fit.ranef(condvar=True)
    assert {group: frame.shape for group, frame in modes.items()} == {"Subject": (18, 1), "person": (18, 1)}
    both = reference.ranef(condvar=True)[1]["Subject"]
    np.testing.assert_allclose(covariances["Subject"][:, 0, 0], both[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(covariances["person"][:, 0, 0], both[:, 1, 1], rtol=1e-6)
