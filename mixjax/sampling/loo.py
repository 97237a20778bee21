"""Leave-one-out cross-validation of rows, or of whole levels with their random effects integrated out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import pandas as pd

from mixjax.design import Design
from mixjax.engine.by_level import LevelProducts, split
from mixjax.engine.criterion import in_bases
from mixjax.engine.residual_rows import ResidualRows
from mixjax.machine import float64, jit
from mixjax.markup import Report, Reported
from mixjax.products.rows import rows_of
from mixjax.residual.transform import Transform
from mixjax.sampling.psis import smoothed

# k-hat above which a unit's weights are not to be trusted.
TRUSTED = 0.7
# Numbers of the arrays by level that a block of draws has in memory.
NUMBERS = 2**20


@dataclass(frozen=True, repr=False)
class Loo(Reported):
    """Expected log predictive density of left-out units, by Pareto-smoothed importance sampling.

    Attributes:
        elpd: sum over units. se: its standard error. p_loo: effective number of parameters.
        units: what was left out, ``"rows"`` or a grouping factor.
        pointwise: data frame ``elpd``, ``khat``, a row for each unit.
    """

    elpd: float
    se: float
    p_loo: float
    units: str
    pointwise: pd.DataFrame

    @property
    def n_bad(self) -> int:
        """Units whose k-hat is above 0.7: their part of the sum is not to be trusted."""
        return int((self.pointwise["khat"] > TRUSTED).sum())

    def _report(self) -> Report:
        n = len(self.pointwise)
        left_out = f"{n} rows, one at a time" if self.units == "rows" else f"{n} levels of {self.units}, one at a time"
        note = f"Pareto k-hat: all below {TRUSTED}" if not self.n_bad else (
            f"Pareto k-hat above {TRUSTED} for {self.n_bad} of {n}: leave these out by refits"
        )  # fmt: skip
        return Report(
            [f"elpd {self.elpd:.1f} (se {self.se:.1f}), p_loo {self.p_loo:.1f}; left out: {left_out}"], [note]
        )

    def __repr__(self) -> str:
        return self._report().text()


def loo_of(log_lik: np.ndarray, units: str, index: Any, relative_ess: float) -> Loo:
    """From log densities ``(S, units)`` at S draws."""
    S, n = log_lik.shape
    elpd, khat = np.empty(n), np.empty(n)
    for i in range(n):
        weights, khat[i] = smoothed(-log_lik[:, i], relative_ess)
        elpd[i] = np.logaddexp.reduce(weights + log_lik[:, i])
    lppd = np.logaddexp.reduce(log_lik, axis=0) - np.log(S)
    pointwise = pd.DataFrame({"elpd": elpd, "khat": khat}, index=index)
    se = float(np.sqrt(n * elpd.var(ddof=1))) if n > 1 else float("nan")
    return Loo(float(elpd.sum()), se, float((lppd - elpd).sum()), units, pointwise)


def log_lik_by_level(
    products: LevelProducts, factors: list[np.ndarray], sigma: np.ndarray, beta: np.ndarray
) -> np.ndarray:
    """``(S, m)`` log densities of the rows of every level at S draws, random effects integrated out.

    Args:
        factors: per term ``(q, q, S)`` of the absolute covariance. sigma: ``(S,)``. beta: ``(S, p)``.
    """
    S, m = len(sigma), len(products.yy)
    size = max(1, min(S, NUMBERS // max(1, sum(f.ZZ.size for f in products.stats.factors))))
    found = np.empty((S, m))
    with float64():
        for first in range(0, S, size):
            at = np.minimum(np.arange(first, first + size), S - 1)
            own = [np.moveaxis(F, -1, 0)[at] for F in factors]
            block = np.asarray(_at_draws(own, np.log(sigma[at]), beta[at], products))
            found[first : first + size] = block[: min(size, S - first)]
    return found


@jit
def _at_draws(factors: Any, log_sigma: Any, beta: Any, products: LevelProducts) -> Any:
    def one(factors: Any, log_sigma: Any, beta: Any) -> Any:
        stats = products.stats
        lambdas = in_bases([F / jax.numpy.exp(log_sigma) for F in factors], stats)
        return split(lambdas, log_sigma, stats.X_basis.R @ (beta - stats.beta0), products)

    return jax.vmap(one)(factors, log_sigma, beta)


def log_lik_of_residuals(
    design: Design,
    transform: Transform,
    group: np.ndarray,
    m: int,
    factors: list[np.ndarray],
    sigma: np.ndarray,
    gamma: np.ndarray,
    c: np.ndarray | None,
    beta: np.ndarray,
) -> np.ndarray:
    """As :func:`log_lik_by_level`, of the m levels of ``group (n,)``, where residuals have parameters.

    Args:
        sigma: ``(S,)`` where the dispersion's columns are at their means. gamma: ``(S, d)``. c: ``(S,)`` or None.
    """
    data, S = ResidualRows.of(rows_of(design), transform), len(sigma)
    size = max(1, min(S, NUMBERS // max(1, data.columns.size * data.columns.shape[1])))
    found = np.empty((S, m))
    with float64():
        for first in range(0, S, size):
            at = np.minimum(np.arange(first, first + size), S - 1)
            lambdas = [np.moveaxis(F, -1, 0)[at] / sigma[at, None, None] for F in factors]
            own = None if c is None else c[at]
            block = _of_residuals(lambdas, np.log(sigma[at]), beta[at], gamma[at], own, data, group, m=m)
            found[first : first + size] = np.asarray(block)[: min(size, S - first)]
    return found


@partial(jit, static_argnames=("m",))
def _of_residuals(
    lambdas: Any, log_sigma: Any, beta: Any, gamma: Any, c: Any, data: ResidualRows, group: Any, m: int
) -> Any:
    def one(lambdas: Any, log_sigma: Any, beta: Any, gamma: Any, c: Any) -> Any:
        return data.log_densities(lambdas, log_sigma, beta, gamma, c, group, m)

    return jax.vmap(one, in_axes=(0, 0, 0, 0, None if c is None else 0))(lambdas, log_sigma, beta, gamma, c)
