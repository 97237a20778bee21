"""The frozen record of one fit, and the chain of steps that makes one from a Design."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from mixjax.design import Design, Labels
from mixjax.engine.engine import engine_of
from mixjax.estimation.estimate import Estimates, estimate_with, fit
from mixjax.formula.errors import DataError, warn
from mixjax.formula.table import row_values
from mixjax.machine import float64
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows, rows_of
from mixjax.products.sums import CrossProducts, pad


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


def values_of_rows(labels: Labels, name: str, values: Any, numbers: bool = True) -> np.ndarray:
    """A column for the rows of a fit, ``(nobs,)``: of those rows, or of all rows of the table that the fit was made of.

    A pandas Series is lined up by its index.

    Raises:
        DataError: another length, or labels that are not the fit's.
    """
    index, used = labels.frame.index, labels.used
    whole = used is not None and np.shape(values) == (len(used),)
    if not isinstance(values, pd.Series):
        values = np.asarray(values)[used] if whole else values
    elif whole and values.index[used].equals(index):
        values = values[used]
    elif len(values) > len(index) and values.index.is_unique and index.isin(values.index).all():
        values = values.loc[index]
    if used is not None and np.shape(values) not in ((len(index),), ()):
        raise DataError(
            f"{name} has shape {np.shape(values)}, but the fit has {len(index)} rows, of {len(used)} of the table"
        )
    return row_values(name, values, index, len(index), numbers)


def interaction_key(name: str) -> tuple[str, ...]:
    """The factors of a column's name in alphabetical order: ``a:b`` and ``b:a`` are one product.

    A colon inside brackets, parentheses, quotes or backticks belongs to a factor.
    """
    parts, depth, quote = [""], 0, ""
    for sign in name:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"`":
            quote = sign
        depth += 0 if quote else (sign in "[(") - (sign in "])")
        if sign == ":" and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return tuple(sorted(parts))


def by_effect(values: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Looks values up by the name of an effect, fixed or random, whatever the order of its factors: ``(name, default)
    -> value``."""
    by_key = {interaction_key(name): value for name, value in values.items()}
    return lambda name, default: by_key.get(interaction_key(name), default)


def names_apart(fixed: Sequence[str], taken: Collection[str]) -> list[str]:
    """Fixed effects in a table that they share with other columns: where one of those has the name, ``beta_`` goes in
    front, as in ``beta_sigma`` of a predictor that is called sigma."""
    own: list[str] = []
    for name in fixed:
        while name in taken or name in own:
            name = f"beta_{name}"
        own.append(name)
    return own


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
    return fit_rows(rows_of(design), labels, reml, start, optimizer)


def fit_rows(rows: Rows, labels: Labels, reml: bool, start: Any, optimizer: Any) -> Fitted:
    """As :func:`fit_design`, of rows in their bases."""
    return fit_products(rows.stats, labels, reml, start, optimizer, rows.design)


def fit_products(
    stats: CrossProducts, labels: Labels, reml: bool, start: Any, optimizer: Any, design: Design | None = None
) -> Fitted:
    """As :func:`fit_design`, from the cross-products on."""
    if start is not None:
        try:
            start = np.atleast_1d(np.asarray(start, dtype=np.float64))
        except (TypeError, ValueError):
            raise ValueError(f"start must be theta as numbers, got {start!r}") from None
        if not np.isfinite(start).all():
            raise ValueError(f"start must be finite, got {start}")
    if optimizer is None:
        est = engine_of(stats, reml).run(fit, start)
    else:
        with float64():
            est = jax.device_get(estimate_with(optimizer, pad(stats), reml, start))
    est = jax.tree.map(np.asarray, est)
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
        warn(
            f"the fit of {labels.formula!r} did not converge after {info.iterations} iterations (scaled gradient "
            f"{info.gradient_norm:.1e}): {result.message}",
            ConvergenceWarning,
        )
    return Fitted(design, labels, stats, est, reml, info)
