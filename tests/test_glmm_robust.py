"""Cluster-robust covariances of generalised linear mixed models."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from glmm_cases import case, fit_of
from glmm_dense import laplace_dense

import mixjax as mj
from mixjax.estimation.glmm_scores import cluster_scores


def scores_of(fit, codes):
    record = fit.record
    return cluster_scores(record.rows, record.estimates, codes, record.curvature, record.nagq)


def part_of(design, at):
    """Some rows of a design with one term."""
    (term,) = design.terms
    levels, group = np.unique(np.asarray(term.group)[at], return_inverse=True)
    own = replace(term, Z=np.asarray(term.Z)[at], group=group, n_groups=len(levels))
    size = None if design.size is None else design.size[at]
    return replace(design, y=design.y[at], X=np.asarray(design.X)[at], terms=(own,), size=size)


@pytest.mark.parametrize("model", ["cbpp", "epil_nbinom2"])
def test_scores_are_derivatives_of_each_cluster_s_likelihood(model):
    fit = fit_of(model)
    codes = np.asarray(fit.design.terms[0].group)
    found = scores_of(fit, codes)
    beta, psi, sd = fit.fixef.to_numpy(), fit.estimates.psi, fit.theta[0]
    own = np.concatenate([beta, psi, [sd]])
    for c in (0, 3, 7):
        design = part_of(fit.design, np.flatnonzero(codes == c))
        size = np.ones(len(design.y)) if design.size is None else design.size

        def criterion(at, design=design, size=size):
            p, s = len(beta), len(psi)
            factor = [np.array([[at[-1]]])]
            return laplace_dense(design, size, fit.family.name, fit.link, at[:p], factor, at[p : p + s])

        for i in range(len(own)):
            move = 1e-5 * np.eye(len(own))[i]
            slope = (criterion(own + move) - criterion(own - move)) / 2e-5
            assert found[c, i] == pytest.approx(-0.5 * slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("model", ["cbpp", "owls_slopes", "cbpp_probit"])
def test_scores_sum_to_zero(model):
    fit = fit_of(model)
    found = scores_of(fit, np.asarray(fit.design.terms[0].group))
    assert np.abs(found.sum(0)).max() < 1e-5 * np.abs(found).max()


def test_scores_of_quadrature_sum_to_zero():
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    fit = mj.glmm(formula, case("cbpp").table, "binomial", nagq=7)
    found = scores_of(fit, np.asarray(fit.design.terms[0].group))
    assert np.abs(found.sum(0)).max() < 1e-5 * np.abs(found).max()
    assert fit.robust().to_frame()["std_error"].to_numpy() == pytest.approx(
        fit_of("cbpp").robust().to_frame()["std_error"].to_numpy(), rel=0.03
    )


def test_the_sandwich_and_its_tests():
    fit = fit_of("cbpp")
    codes = np.asarray(fit.design.terms[0].group)
    scores, bread = scores_of(fit, codes), fit.estimates.vcov_all
    sandwich = (bread @ scores.T @ scores @ bread)[:4, :4]
    plain, corrected = fit.robust(kind="CR0"), fit.robust()
    assert plain.vcov.to_numpy() == pytest.approx(sandwich)
    assert corrected.vcov.to_numpy() == pytest.approx(sandwich * 15 / 14)
    assert (corrected.cluster, corrected.n_clusters) == ("herd", 15)
    table = corrected.to_frame()
    se = np.sqrt(np.diag(sandwich) * 15 / 14)
    assert table["std_error"].tolist() == pytest.approx(se.tolist())
    assert table["statistic"].tolist() == pytest.approx((fit.fixef / se).tolist())
    beta = fit.fixef.to_numpy()[1:]
    joint = corrected.test([f"{name} = 0" for name in fit.fixef.index[1:]])
    assert joint["statistic"].iloc[0] == pytest.approx(beta @ np.linalg.solve(sandwich[1:, 1:] * 15 / 14, beta))
    assert corrected.confint().loc["Intercept", "upper"] == pytest.approx(
        fit.fixef.iloc[0] + 1.959964 * se[0], rel=1e-6
    )
    assert "CR1 covariance of 15 clusters, herd" in corrected.to_markdown()
    assert fit.se.iloc[0] != table["std_error"].iloc[0]  # the fit keeps its own


def test_larger_clusters_and_nested_factors():
    rng = np.random.default_rng(4)
    table = pd.DataFrame({"a": np.repeat(np.arange(12), 6), "b": np.arange(72) // 3, "x": rng.normal(size=72)})
    table["y"] = rng.poisson(
        np.exp(0.5 + 0.5 * rng.normal(size=12)[table["a"]] + 0.4 * rng.normal(size=24)[table["b"]])
    )
    fit = mj.glmm("y ~ x + (1 | a) + (1 | b)", table, "poisson")
    assert fit.robust().n_clusters == 12
    halves = fit.robust(cluster=table["a"] // 3)
    assert halves.n_clusters == 4
    with pytest.raises(ValueError, match="levels of 'a' have rows in several clusters of 'b'"):
        fit.robust(cluster="b")
    with pytest.raises(ValueError, match="covariance is singular"):
        fit.robust(cluster=(table["a"] >= 6)).test(np.eye(2))


def test_what_has_no_sandwich_is_refused():
    fit = fit_of("cbpp")
    with pytest.raises(ValueError, match="kind must be one of 'CR1', 'CR0'"):
        fit.robust(kind="CR2")
    with pytest.raises(ValueError, match="reml=True"):
        fit.refit(reml=True).robust()
    with pytest.raises(ValueError, match="cross"):
        fit_of("salamanders_presence").robust()
