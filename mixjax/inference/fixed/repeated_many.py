"""Tests of fixed effects of repeated measures in many fits of one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from mixjax.distributions import f_tail
from mixjax.estimation.repeated import RepeatedEstimates, visits_in_parts
from mixjax.fitted.information import Information
from mixjax.inference.fixed import kenward_roger as kr
from mixjax.inference.fixed.contrasts import (
    LINEAR,
    basis_of_rows,
    check_ddf,
    pooled_df,
    satterthwaite_df,
    two_sided,
    uncorrelated_rows,
)
from mixjax.inference.fixed.kenward_roger_visits import adjust_visits, inverses
from mixjax.machine import silently
from mixjax.products.visits import VisitRows


def t_tests_of_many(
    rows: VisitRows, reml: bool, Y: np.ndarray, est: RepeatedEstimates, L: np.ndarray, rhs: Any, ddf: str
) -> dict[str, np.ndarray]:
    """t tests of every row of ``L (r, p)`` in every fit: arrays ``(B, r)`` estimate, std_error, df, statistic, p_value;
    NaN of fits that failed.

    Args:
        rows, reml: the model. Y: ``(B, nobs)`` its responses; est: their estimates. ddf: as of one fit.
    """
    estimate = np.asarray(est.beta) @ L.T
    vcov, df = np.array(est.vcov), np.full(estimate.shape, np.inf)
    if ddf != "wald":
        for own, fits in _parts(rows, reml, Y, est, ddf):
            vcov[own] = np.stack([fit.adjusted if isinstance(fit, kr.Adjusted) else fit.vcov for fit in fits])
            df[own] = np.stack(
                [kr.df_of_rows(L, fit) if isinstance(fit, kr.Adjusted) else satterthwaite_df(L, fit) for fit in fits]
            )
    with np.errstate(invalid="ignore", divide="ignore"):
        se = np.sqrt(np.einsum("rp,bpq,rq->br", L, vcov, L))
        t = (estimate - rhs) / se
        found = {"estimate": estimate, "std_error": se, "df": df, "statistic": t, "p_value": two_sided(t, df)}
    failed = ~np.asarray(est.converged)
    return {name: np.where(failed[:, None], np.nan, value) for name, value in found.items()}


def f_tests_of_many(
    rows: VisitRows, reml: bool, Y: np.ndarray, est: RepeatedEstimates, L: np.ndarray, rhs: Any, ddf: str
) -> pd.DataFrame:
    """The joint test of the rows of ``L``, which may depend on each other, in every fit: num_df, den_df, statistic,
    p_value."""
    rhs = np.broadcast_to(np.asarray(rhs, np.float64), len(L))
    basis, values = basis_of_rows(L, rhs)
    r = len(basis)
    B = len(est.result)
    statistic, den_df = np.full(B, np.nan), np.full(B, np.inf)

    def wald(beta: np.ndarray, vcov: np.ndarray) -> float:
        difference = basis @ beta - values
        return float(difference @ np.linalg.solve(basis @ vcov @ basis.T, difference)) / r

    ok = np.flatnonzero(est.converged)
    if ddf == "wald":
        for i in ok:
            statistic[i] = wald(est.beta[i], est.vcov[i])
    else:
        for own, fits in _parts(rows, reml, Y, est, ddf):
            for i, fit in zip(own, fits, strict=True):
                if not est.converged[i]:
                    continue
                if isinstance(fit, kr.Adjusted):
                    df, scale = kr.f_scaling(basis, fit)
                    statistic[i], den_df[i] = scale * wald(est.beta[i], fit.adjusted), df
                else:
                    statistic[i] = wald(est.beta[i], fit.vcov)
                    den_df[i] = pooled_df(satterthwaite_df(uncorrelated_rows(L, fit.vcov, r), fit))
    p = np.array([f_tail(F, r, df) if np.isfinite(F) else np.nan for F, df in zip(statistic, den_df, strict=True)])
    columns = {"num_df": float(r), "den_df": np.where(np.isfinite(statistic), den_df, np.nan)}
    return pd.DataFrame(columns | {"statistic": statistic, "p_value": p}, index=pd.RangeIndex(B, name="replicate"))


def _parts(
    rows: VisitRows, reml: bool, Y: np.ndarray, est: RepeatedEstimates, ddf: str
) -> Iterator[tuple[np.ndarray, list[kr.Adjusted | Information]]]:
    """Replicates part by part, with what their degrees of freedom follow from, on the scale of the responses."""
    check_ddf(ddf)
    if ddf in ("kenward-roger", LINEAR) and not reml:
        raise ValueError("Kenward-Roger needs REML estimates: make the fits with reml=True")
    for own, visits in visits_in_parts(rows, Y, reml):
        with silently():
            x = np.where(np.isfinite(est.x[own]).all(1, keepdims=True), est.x[own], 1.0).T
            scale = np.asarray(est.scale)[own] ** 2
            if ddf != "satterthwaite":
                at = adjust_visits(visits, x, ddf == LINEAR)
                parts: list[kr.Adjusted | Information] = [
                    kr.Adjusted(s * at.vcov[i], s * at.adjusted[i], s * at.P[i], at.W[i]) for i, s in enumerate(scale)
                ]
                yield own, parts
                continue
            found = visits.at(visits.covariances(x))
            _, H, jacobian = visits.by_coordinates(x, found)
            H = np.ascontiguousarray(np.moveaxis(H, -1, 0))
            covariance = 2.0 * inverses(H)
            R_inv = np.asarray(rows.X_basis.R_inv)
            slopes = R_inv @ visits.slopes_of_inverse(found, jacobian) @ R_inv.T
            regular: np.ndarray = np.isfinite(covariance).all(axis=(1, 2))  # type: ignore[assignment]
            yield (
                own,
                [
                    Information(
                        est.x[i], np.ones(len(x), bool), covariance[j], regular[j], est.vcov[i], scale[j] * slopes[j]
                    )
                    for j, i in enumerate(own)
                ],
            )
