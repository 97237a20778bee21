"""The frozen record of one fit, and the chain of steps that makes one from a Design."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.compiling import float64
from mixjax.design import Design, Labels
from mixjax.estimation.estimate import Estimates, estimate, estimate_with
from mixjax.likelihood.cross_products import cross_products
from mixjax.likelihood.statistics import CrossProducts, pad
from mixjax.optimise.results import Result


class ConvergenceWarning(UserWarning):
    """A fit did not converge: its numbers are not estimates."""


class InferenceWarning(UserWarning):
    """An interval or a test is not quite what was asked for, or rests on less than it usually does."""


# As DataWarning: a second fit that fails on the same line is news again.
warnings.filterwarnings("always", category=ConvergenceWarning, append=True)
warnings.filterwarnings("always", category=InferenceWarning, append=True)


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
        design: arrays of the model, or None where the rows came in chunks and were not kept. labels: names.
        stats: cross-products of the design.
        estimates: numpy float64.
        reml: criterion is the REML criterion, not the ML deviance.
        optimizer: how the search ended.
    """

    design: Design | None
    labels: Labels
    stats: CrossProducts
    estimates: Estimates
    reml: bool
    optimizer: OptimizerInfo

    @property
    def rows(self) -> Design:
        """The design, or an error that says why there is none."""
        if self.design is None:
            raise ValueError(
                "this fit was made from chunks of rows, which were not kept: there are no residuals, fitted values or "
                "whatever else needs the rows; fit the whole table, or compute them chunk by chunk from fixef and "
                "ranef()"
            )
        return self.design

    @property
    def nobs(self) -> int:
        """Number of rows."""
        return int(self.stats.n)


def term_names(labels: Labels) -> list[str]:
    """One name per random term: its group, with ``.1``, ``.2`` where a group has several terms, as in lme4."""
    groups = [term.group for term in labels.terms]
    earlier = [groups[:t].count(group) for t, group in enumerate(groups)]
    return [f"{group}.{k}" if k else group for group, k in zip(groups, earlier, strict=True)]


def record_of(fit: Any) -> Fitted:
    """The record of a fit: of a Fitted itself, or of an object that carries one as ``record``, as LMMFit does."""
    record = getattr(fit, "record", fit)
    if not isinstance(record, Fitted):
        raise TypeError(f"a fit is needed, as mixjax.lmm returns it; got {type(fit).__name__}")
    return record


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
    return fit_products(cross_products(design), labels, reml, start, optimizer, design)


def fit_products(
    stats: CrossProducts, labels: Labels, reml: bool, start: Any, optimizer: Any, design: Design | None = None
) -> Fitted:
    """As :func:`fit_design`, from the cross-products on."""
    if start is not None:
        start = np.asarray(start, dtype=np.float64)
        if not np.isfinite(start).all():
            raise ValueError(f"start must be finite, got {start}")
    with float64():
        padded = pad(stats)
        est = estimate(padded, reml, start) if optimizer is None else estimate_with(optimizer, padded, reml, start)
        est = jax.tree.map(np.asarray, jax.device_get(est))
    sizes = [stats.factors[place.factor].ZZ.shape[2] for place in stats.layout.terms]
    est = est._replace(b=tuple(b[:m] for b, m in zip(est.b, sizes, strict=True)))
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
