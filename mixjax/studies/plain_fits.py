"""Ordinary regressions fitted to replicates: models without random effects, the null of tests of a variance."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd

from mixjax.bases import change_basis, in_span
from mixjax.design import Design
from mixjax.estimation.estimate import Estimates
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.studies.task import Fits, Model, Task, named_apart


def plain_fits(task: Task, model: Model, Y: np.ndarray, mesh: object) -> Fits:
    """Least squares in closed form, with t tests on n - p degrees of freedom, or z tests."""
    if mesh is not None:
        raise ValueError("mesh= is for linear mixed models; models without random effects use this machine")
    each = [Y] if len(model.designs) == 1 else [y[None] for y in Y]
    parts = [_least_squares(design, own, task.reml) for design, own in zip(model.designs, each, strict=True)]
    est: Estimates = jax.tree.map(lambda *values: np.concatenate(values), *parts)
    fixed = pd.DataFrame(est.beta, columns=list(model.labels.fixed))
    se = np.sqrt(np.diagonal(est.vcov, axis1=1, axis2=2))
    n, p = np.shape(model.designs[0].X)
    # Satterthwaite's of a variance by maximum likelihood are n, as of mixjax.lmm.
    df = np.full(se.shape, {"wald": np.inf, "kenward-roger": n - p}.get(task.ddf or "", n - p * task.reml))

    def deviances() -> np.ndarray:
        again = [_least_squares(design, own, False) for design, own in zip(model.designs, each, strict=True)]
        ml = np.concatenate([part.criterion for part in again])
        return np.where(est.converged, ml, np.nan)

    return Fits(est, named_apart(fixed, pd.DataFrame({"sigma": est.sigma})), se, df, deviances)


def _least_squares(design: Design, Y: np.ndarray, reml: bool) -> Estimates:
    """Of responses ``(B, n)``."""
    X = np.asarray(design.X, np.float64)
    (n, p), B = X.shape, len(Y)
    own = Y if design.offset is None else Y - np.asarray(design.offset)
    sqrt_w = None if design.weights is None else np.sqrt(np.asarray(design.weights, np.float64))
    Q, basis = change_basis(X, sqrt_w, full_rank=True)
    exact = in_span(own, X, Q, sqrt_w)
    rest = own if sqrt_w is None else own * sqrt_w
    delta = np.zeros((B, p))
    for _ in range(2):
        more = rest @ Q
        rest, delta = rest - more @ Q.T, delta + more
    df = n - p * reml
    with silently():
        variance = (rest**2).sum(1) / df
        criterion = df * (1.0 + np.log(2.0 * np.pi * variance))
        criterion = criterion - (0.0 if sqrt_w is None else 2.0 * np.log(sqrt_w).sum())
    if reml:
        criterion = criterion + 2.0 * float(basis.logdet)
    solved = np.isfinite(criterion) & ~exact
    failed = np.where(exact, int(Result.NO_NOISE), int(Result.NOT_FINITE))
    R_inv = np.asarray(basis.R_inv)
    return Estimates(
        theta=np.zeros((B, 0)),
        beta=delta @ R_inv.T,
        sigma=np.sqrt(variance),
        Sigma=(),
        vcov=variance[:, None, None] * (R_inv @ R_inv.T),
        b=(),
        criterion=criterion,
        converged=solved,
        singular=np.zeros(B, bool),
        iterations=np.zeros(B, int),
        grad_norm=np.zeros(B),
        result=np.where(solved, int(Result.CONVERGED), failed),
    )
