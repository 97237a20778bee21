"""Shares of variance and principal components of the random effects; ICC and R2 are tested in test_fit.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import HERE, fit_of, oracle, table

import mixjax as mj
from mixjax.inference.random.variance import principal_components, shares

PERFORMANCE = json.loads((HERE / "oracle" / "inference_performance.json").read_text())
CASES = [(name, method) for name, methods in PERFORMANCE.items() if name not in ("versions", "note")
         for method in methods]  # fmt: skip
COLUMNS = ["std_dev", "share", "cumulative", "row_std_dev", "row_share", "row_cumulative", "needed"]


# --- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), CASES)
def test_shares_against_the_oracle(name, method):
    reference = PERFORMANCE[name][method]["definition"]
    fit = fit_of(name, method)
    frame = shares(fit.record)
    variance = frame.groupby("component")["variance"].sum()
    for component in ("fixed", "random", "residual"):
        value = reference[f"var_{component}"]
        np.testing.assert_allclose(variance[component], value, rtol=1e-5, atol=1e-9 * variance.sum())
    assert frame["share"].sum() == pytest.approx(1.0, rel=1e-12)
    share = frame.groupby("component")["share"].sum()
    assert share["fixed"] == pytest.approx(fit.r2()["marginal"], rel=1e-12)
    assert share["random"] == pytest.approx(fit.icc()["unadjusted"], rel=1e-12)


def test_shares_name_every_term():
    frame = shares(fit_of("sleepstudy_zerocorr", "REML").record)
    assert frame["component"].tolist() == ["random", "random", "residual", "fixed"]
    assert frame["group"].tolist() == ["Subject", "Subject", "", ""]
    assert frame["effects"].tolist() == ["Intercept", "Days", "", ""]
    varcorr = fit_of("sleepstudy_zerocorr", "REML").varcorr.to_frame()["vcov"]
    days = table("sleepstudy")["Days"]
    np.testing.assert_allclose(frame["variance"][:2], [varcorr[0], varcorr[1] * (days**2).mean()], rtol=1e-12)


# --- principal components --------------------------------------------------------------------------------------------


def test_two_effects_in_closed_form():
    """Eigenvalues of a 2 x 2 matrix from trace and determinant; theta from lme4."""
    a, b, c = oracle("sleepstudy_slopes")["fits"]["REML"]["theta"].values()
    D = np.array([[a * a, a * b], [a * b, b * b + c * c]])
    days = table("sleepstudy")["Days"]
    G = np.array([[1.0, days.mean()], [days.mean(), (days**2).mean()]])
    frame = principal_components(fit_of("sleepstudy_slopes", "REML").record)["Subject"]
    for prefix, matrix in (("", D), ("row_", D @ G)):
        half, root = np.trace(matrix) / 2, np.sqrt(np.trace(matrix) ** 2 / 4 - np.linalg.det(matrix))
        values = np.array([half + root, half - root])
        np.testing.assert_allclose(frame[f"{prefix}std_dev"], np.sqrt(values), rtol=1e-5)
        np.testing.assert_allclose(frame[f"{prefix}share"], values / values.sum(), rtol=1e-5)
        np.testing.assert_allclose(frame[f"{prefix}cumulative"], [values[0] / values.sum(), 1.0], rtol=1e-5)
    assert list(frame.columns) == COLUMNS
    assert list(frame.index) == ["PC1", "PC2"]
    assert frame["needed"].tolist() == [True, True]


@pytest.mark.parametrize("name", ["sleepstudy_slopes", "pastes_nested", "sleepstudy_zerocorr", "machines_slopes"])
def test_rows_add_up_to_the_components(name):
    fit = fit_of(name, "REML")
    frame = shares(fit.record)
    by_group = frame[frame["component"] == "random"].groupby("group")["variance"].sum()
    for group, components in principal_components(fit.record).items():
        total = fit.sigma**2 * (components["row_std_dev"] ** 2).sum()
        assert total == pytest.approx(by_group[group], rel=1e-9)


@pytest.mark.parametrize("name", ["sleepstudy_zerocorr", "sleepstudy_weighted", "penicillin", "machines_slopes"])
def test_against_dense_eigenvalues(name):
    """All terms of a group together; weights as multiples of rows."""
    fit = fit_of(name, "REML")
    design, labels = fit.design, fit.labels
    weights = np.ones(fit.nobs) if design.weights is None else design.weights
    found = principal_components(fit.record)
    assert list(found) == list(dict.fromkeys(term.group for term in labels.terms))
    for group, frame in found.items():
        ts = [t for t, term in enumerate(labels.terms) if term.group == group]
        q = sum(design.terms[t].Z.shape[1] for t in ts)
        D, at = np.zeros((q, q)), 0
        for t in ts:
            size = len(labels.terms[t].effects)
            D[at : at + size, at : at + size] = fit.estimates.Sigma[t] / fit.sigma**2
            at += size
        Z = np.hstack([design.terms[t].Z for t in ts])
        of_rows = np.sort(np.linalg.eigvals(D @ (Z.T @ (weights[:, None] * Z)) / fit.nobs).real)[::-1]
        np.testing.assert_allclose(frame["std_dev"] ** 2, np.linalg.eigvalsh(D)[::-1], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(frame["row_std_dev"] ** 2, of_rows, rtol=1e-8, atol=1e-12)


def test_units_change_rows_nothing():
    """Days in hours and counted from another day: the same model."""
    data = table("sleepstudy")
    days = principal_components(fit_of("sleepstudy_slopes", "REML").record)["Subject"]
    moved = data.assign(Days=24.0 * (data["Days"] - 5))
    hours = principal_components(mj.lmm("Reaction ~ Days + (Days | Subject)", moved).record)["Subject"]
    np.testing.assert_allclose(hours[COLUMNS[3:6]], days[COLUMNS[3:6]], rtol=1e-5)
    assert abs(hours["share"].iloc[0] - days["share"].iloc[0]) > 0.01


def test_how_many_are_needed():
    """lme4 agrees on the rank of these fits."""
    for name, group, needed in (
        ("singular_correlation_one", "g", [True, False]),
        ("singular_rank_two", "g", [True, True, False]),
        ("dyestuff2", "Batch", [False]),
    ):
        frame = principal_components(fit_of(name, "REML").record)[group]
        assert frame["needed"].tolist() == needed
        np.testing.assert_allclose(frame["std_dev"][~frame["needed"]], 0.0, atol=1e-12)
    assert frame[["share", "row_share"]].isna().all(axis=None)


def test_without_rows():
    record = fit_of("sleepstudy_slopes", "REML").record
    frame = principal_components(replace(record, kept=None))["Subject"]
    np.testing.assert_array_equal(frame, principal_components(record)["Subject"])
    with pytest.raises(ValueError, match="made from chunks of rows"):
        shares(replace(record, kept=None))
