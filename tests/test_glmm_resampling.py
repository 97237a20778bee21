"""Bootstrap and many refits of generalised linear mixed models."""

import numpy as np
import pandas as pd
import pytest
from glmm_cases import case, fit_of

import mixjax as mj
from mixjax.resampling.family_data import FamilyClusters
from mixjax.resampling.intervals import jackknife
from mixjax.resampling.kinds import cluster_products

TERMS = ["sd_Intercept|herd", "Intercept", "period[T.2]", "period[T.3]", "period[T.4]"]


@pytest.fixture(scope="module")
def cbpp():
    return fit_of("cbpp")


@pytest.fixture(scope="module")
def drawn(cbpp):
    with pytest.warns(mj.InferenceWarning, match=r"1 of 120 refits failed \(SEPARATED 1\) and are left out"):
        return cbpp.bootstrap(key=1, n=120, engine="numpy")


@pytest.fixture(scope="module")
def pairs():
    """Poisson counts with levels of one factor nested in those of another, of unequal sizes."""
    rng = np.random.default_rng(5)
    outer = np.repeat(np.arange(7), [4, 6, 8, 4, 6, 8, 6])
    inner = np.char.add(outer.astype(str), np.char.add("-", (np.arange(42) // 2).astype(str)))
    eta = 1.0 + rng.normal(size=7)[outer] * 0.6 + 0.1 * np.arange(42) % 3
    return pd.DataFrame({"y": rng.poisson(np.exp(eta)), "x": rng.normal(size=42), "a": outer, "b": inner})


def parameters(fit):
    return [*(np.sqrt(S[0, 0]) for S in fit.Sigma.values()), *fit.fixef]


# --- parametric ------------------------------------------------------------------------------------------------------


def test_a_replicate_is_the_refit_of_the_response_of_its_number(cbpp, drawn):
    assert list(drawn.replicates) == TERMS
    for i in (0, 17):
        refit = cbpp.refit(cbpp.record.simulate(1, 1, first=i)[0])
        assert drawn.replicates.iloc[i].tolist() == pytest.approx(parameters(refit), rel=1e-5)


def test_separated_replicates_are_counted_by_name(drawn):
    lost = drawn.result == mj.Result.SEPARATED
    assert lost.sum() == 1
    assert drawn.counts["failed: SEPARATED"] == 1
    assert drawn.replicates[lost].isna().all(axis=None)
    assert (drawn.used == 119).all()
    assert "1 failed: SEPARATED" in str(drawn)


def test_chunks_change_nothing(cbpp):
    whole = cbpp.bootstrap(key=4, n=20, engine="numpy").replicates
    for options in ({"n": 20, "chunk": 7}, {"n": 9}):  # to rounding: sums of lanes depend on how many there are
        part = cbpp.bootstrap(key=4, engine="numpy", **options).replicates
        pd.testing.assert_frame_equal(part, whole[: len(part)], rtol=1e-12)


def test_intervals_are_quantiles(cbpp, drawn):
    own = drawn.replicates["Intercept"].dropna()
    limits = np.quantile(own, [0.05, 0.95], method="weibull")
    assert drawn.confint(0.9).loc["Intercept"].tolist() == pytest.approx(limits.tolist())
    with pytest.warns(mj.InferenceWarning):
        found = cbpp.confint("beta_", 0.9, "bootstrap", key=1, n=120, kind="basic")
    centre = cbpp.fixef["Intercept"]
    assert found.loc["Intercept"].tolist() == pytest.approx((2 * centre - limits[::-1]).tolist(), rel=1e-6)
    assert found.index.tolist() == TERMS[1:]


def test_parameters_of_a_family_are_replicated():
    fit = fit_of("epil_nbinom2")
    done = fit.bootstrap(key=0, n=4)
    assert list(done.replicates)[:2] == ["sd_Intercept|subject", "size"]
    assert done.estimate["size"] == pytest.approx(fit.dispersion["size"])
    refit = fit.refit(fit.record.simulate(0, 1, first=3)[0])
    assert done.replicates.loc[3, "size"] == pytest.approx(refit.dispersion["size"], rel=1e-5)


def test_a_statistic_of_the_estimates(cbpp):
    done = cbpp.bootstrap(key=4, n=6, statistic=lambda est: {"odds": est.beta[1], "se": est.vcov[1, 1] ** 0.5})
    refit = cbpp.refit(cbpp.record.simulate(4, 1, first=5)[0])
    assert done.replicates.iloc[5].tolist() == pytest.approx([refit.fixef.iloc[1], refit.se.iloc[1]], rel=1e-5)
    assert done.estimate["se"] == pytest.approx(cbpp.se.iloc[1])


def test_replicates_of_a_fit_by_quadrature_are_by_quadrature():
    data = case("cbpp").table
    fit = mj.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", data, "binomial", nagq=5)
    done = fit.bootstrap(key=2, n=2)
    refit = fit.refit(fit.record.simulate(2, 1, first=1)[0])
    assert refit.nagq == 5
    assert done.replicates.iloc[1].tolist() == pytest.approx(parameters(refit), rel=1e-6)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_a_level_drawn_twice_is_two_levels(pairs):
    fit = mj.glmm("y ~ x + (1 | a) + (1 | b)", pairs, "poisson")
    clusters = cluster_products(fit.record)
    assert isinstance(clusters, FamilyClusters)
    index = np.array([[3, 1, 3, 0, 6, 6, 6], [0, 1, 2, 3, 4, 5, 6]])
    est = clusters.gather(index).fits(2, ("beta", "theta", "criterion", "result"), "auto")
    copies = [
        pairs[pairs["a"] == a].assign(a=lambda d, s=s: f"{s}", b=lambda d, s=s: f"{s}/" + d["b"])
        for s, a in enumerate(index[0])
    ]
    by_hand = mj.glmm("y ~ x + (1 | a) + (1 | b)", pd.concat(copies, ignore_index=True), "poisson")
    assert est.criterion[0] == pytest.approx(by_hand.criterion, abs=1e-8)
    assert est.beta[0] == pytest.approx(by_hand.fixef.tolist(), rel=1e-6)
    assert est.criterion[1] == pytest.approx(fit.criterion, abs=1e-8)  # all levels once: the data themselves


def test_cases_keep_trials_with_their_rows(cbpp):
    clusters = cluster_products(cbpp.record)
    design = clusters.design(np.array([2, 2, 0]))
    herd = np.asarray(cbpp.design.terms[0].group)
    rows = np.concatenate([np.flatnonzero(herd == h) for h in (2, 2, 0)])
    assert np.array_equal(design.size, cbpp.design.size[rows])
    assert np.array_equal(design.y, cbpp.design.y[rows])
    assert design.terms[0].n_groups == 3
    done = cbpp.bootstrap(key=0, n=12, kind="cases")
    assert done.counts["converged"] == 12
    assert done.kind == "cases"


def test_a_sample_that_cannot_tell_the_fixed_effects_fails_by_name(pairs):
    data = pairs.assign(rare=(pairs["a"] == 2) * 1.0)
    fit = mj.glmm("y ~ rare + (1 | a)", data, "poisson")
    with pytest.warns(mj.InferenceWarning, match="NOT_FINITE"):
        done = fit.bootstrap(key=0, n=12, kind="cases")
    lost = done.result == mj.Result.NOT_FINITE
    assert 0 < lost.sum() < 12
    assert done.replicates[lost].isna().all(axis=None)
    with pytest.raises(ValueError, match="without '2' it fails"):
        done.confint(kind="bca")


def test_the_jackknife_leaves_out_levels(pairs):
    fit = mj.glmm("y ~ x + (1 | a)", pairs, "poisson")
    done = fit.bootstrap(key=3, n=60, engine="numpy")
    values = jackknife(fit.record, done._compute.refitted)
    without = mj.glmm("y ~ x + (1 | a)", pairs, "poisson", subset="a != 4")
    assert values.shape == (7, 3)
    assert values[4].tolist() == pytest.approx(parameters(without), rel=1e-5)
    limits = done.confint(kind="bca").loc["x"]
    assert limits["lower"] < fit.fixef["x"] < limits["upper"]


def test_what_a_generalised_fit_cannot_draw_is_refused(cbpp, pairs):
    for kind in ("residual", "wild"):
        with pytest.raises(ValueError, match=f"kind='{kind}' rests on residuals .* binomial .* 'cases'"):
            cbpp.bootstrap(key=0, n=5, kind=kind)
    with pytest.raises(ValueError, match="kind must be one of"):
        cbpp.bootstrap(key=0, n=5, kind="rows")
    with pytest.raises(ValueError, match="modes=True"):
        cbpp.bootstrap(key=0, n=5, kind="cases", modes=True)
    crossed = mj.glmm("y ~ 1 + (1 | a) + (1 | c)", pairs.assign(c=np.arange(42) % 5), "poisson")
    with pytest.raises(ValueError, match="are crossed"):
        crossed.bootstrap(key=0, n=5, kind="cases")
    with pytest.raises(ValueError, match="method must be"):
        cbpp.confint(method="exact")


# --- many refits -----------------------------------------------------------------------------------------------------


def test_many_refits_have_names_errors_and_codes(cbpp):
    Y = cbpp.simulate(0, 5)
    Y[2], Y[3, 5] = 0.0, np.nan
    many = cbpp.refit_many(Y, ranef=True)
    assert [mj.Result(code).name for code in many.estimates.result] == [
        "CONVERGED", "CONVERGED", "SEPARATED", "NOT_FINITE", "CONVERGED",
    ]  # fmt: skip
    assert many.counts["failed: SEPARATED"] == many.counts["failed: NOT_FINITE"] == 1
    assert list(many.sdcor) == TERMS[:1]
    one = cbpp.refit(Y[4])
    assert many.fixef.loc[4].tolist() == pytest.approx(one.fixef.tolist(), rel=1e-6)
    assert many.se.loc[4].tolist() == pytest.approx(one.se.tolist(), rel=1e-6)
    assert many.ranef()["herd"].loc[4].to_numpy() == pytest.approx(one.ranef()["herd"].to_numpy(), rel=1e-5, abs=1e-8)
    assert many.to_frame().loc[2, "result"] == "SEPARATED"
    with pytest.raises(AttributeError, match="a binomial response has no sigma"):
        many.sigma  # noqa: B018


def test_many_refits_refuse_what_is_no_response(cbpp):
    Y = cbpp.simulate(0, 4)
    Y[1] += 100
    with pytest.raises(mj.DataError, match="response 2 of Y: more successes than trials"):
        cbpp.refit_many(Y)
    with pytest.raises(mj.DataError, match="turn it"):
        cbpp.refit_many(Y.T)


def test_families_with_a_sigma_have_one():
    rng = np.random.default_rng(0)
    data = {"y": np.exp(rng.normal(size=40) * 0.2 + 1.0) + 0.1 * rng.normal(size=40), "g": np.repeat(np.arange(8), 5)}
    fit = mj.glmm("y ~ 1 + (1 | g)", data, mj.families.gaussian("log"))
    many = fit.refit_many(fit.simulate(0, 2))
    assert many.sigma.to_numpy() == pytest.approx(np.exp(many.estimates.psi[:, 0]))
    assert list(many.sdcor) == ["sd_Intercept|g", "sigma"]
