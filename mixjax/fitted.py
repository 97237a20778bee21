"""The frozen record of one fit, and the chain of steps that makes one from a Design."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.design import Design, Labels
from mixjax.estimation.estimate import Estimates, estimate, estimate_with
from mixjax.likelihood.cross_products import cross_products
from mixjax.likelihood.statistics import CrossProducts, pad
from mixjax.optimise.results import Result


class ConvergenceWarning(UserWarning):
    """A fit did not converge: its numbers are not estimates."""


# As DataWarning: a second fit that fails on the same line is news again.
warnings.filterwarnings("always", category=ConvergenceWarning, append=True)


def check_options(reml: Any, optimizer: Any) -> None:
    """Raise ValueError for options that are none."""
    if not isinstance(reml, bool | np.bool_):
        raise ValueError(f"reml must be True (REML) or False (maximum likelihood), got {reml!r}")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"optimizer must be None or an optax GradientTransformation such as optax.lbfgs(), got {optimizer!r}"
        )


class OptimizerInfo(NamedTuple):
    """How the search ended.

    Attributes:
        name: what searched. iterations: evaluations (Newton) or steps (optax).
        gradient_norm: scaled gradient at the end, in standard errors. message: how it ended, and what to try.
    """

    name: str
    iterations: int
    gradient_norm: float
    message: str


@dataclass(frozen=True)
class Fitted:
    """One fitted linear mixed model. Inference and diagnostics are functions of it.

    Attributes:
        design: arrays of the model. labels: names beside them.
        stats: cross-products of the design.
        estimates: numpy float64.
        reml: criterion is the REML criterion, not the ML deviance.
        optimizer: how the search ended.
    """

    design: Design
    labels: Labels
    stats: CrossProducts
    estimates: Estimates
    reml: bool
    optimizer: OptimizerInfo


def fit_design(design: Design, labels: Labels, reml: bool = True, start: Any = None, optimizer: Any = None) -> Fitted:
    """Cross-products, estimates and names of one design, in float64 whatever JAX's default is.

    Args:
        design, labels: the model.
        reml: restricted maximum likelihood.
        start: ``(k,)`` theta, or None.
        optimizer: None for trust-region Newton, or an optax GradientTransformation, which then searches over the
            log-Cholesky parameters.

    Warns:
        ConvergenceWarning: says why and what to try.
    """
    stats = cross_products(design)
    if start is not None:
        start = np.asarray(start, dtype=np.float64)
        if not np.isfinite(start).all():
            raise ValueError(f"start must be finite, got {start}")
    with jax.enable_x64(True):
        padded = pad(stats)
        est = estimate(padded, reml, start) if optimizer is None else estimate_with(optimizer, padded, reml, start)
        est = jax.tree.map(np.asarray, jax.device_get(est))
    est = est._replace(b=tuple(b[: term.n_groups] for b, term in zip(est.b, design.terms, strict=True)))
    result = Result(int(est.result))
    info = OptimizerInfo(
        "trust-region Newton" if optimizer is None else "optax",
        int(est.iterations),
        float(est.grad_norm),
        result.message,
    )
    if not est.converged:
        warnings.warn(
            f"the fit of {labels.formula!r} did not converge after {info.iterations} iterations (scaled gradient "
            f"{info.gradient_norm:.1e}): {result.message}",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Fitted(design, labels, stats, est, reml, info)
