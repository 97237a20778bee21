"""Rows whose residuals have parameters, as JAX transforms them: the cross-products are functions of these parameters.

What :mod:`mixjax.engine.residual` has in closed form for fits, differentiated by JAX: rows are scaled and whitened
(:mod:`mixjax.residual.transform`), and the likelihood is that of their products, the logarithms of the transform's
determinant counted as those of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.bases import Basis
from mixjax.engine.by_level import LevelProducts, split
from mixjax.engine.criterion import in_bases
from mixjax.engine.modes import conditional_modes
from mixjax.machine import Array
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts, FactorProducts, Layout, PairProducts, sum_by_group
from mixjax.residual.correlation import AR1, CAR1, CompoundSymmetry
from mixjax.residual.transform import Transform


class Whitener(NamedTuple):
    """A transform at its parameters: row i becomes ``own_i row_i + other_i (row before, or sum of the group)``.

    Attributes:
        scale: ``(n,)`` what rows are divided by before. own, other: ``(n,)``. logdet: ``(n,)``, of which the sum is
            ``log |T|``.
    """

    scale: Array
    own: Array
    other: Array
    logdet: Array


@dataclass(frozen=True)
class ResidualRows:
    """Rows in their bases, times the roots of their weights. A JAX pytree.

    Attributes:
        columns: ``(n, c)`` Z of all factors, the basis of X, and what least squares leave of y.
        W: ``(n, d)`` columns of the dispersion, means taken away.
        before: ``(n,)`` the row before, -1 for none. power: ``(n,)`` the distance to it, by the shortest one.
        odd: ``(n,)`` it is an odd number of steps. group, count: ``(n,)`` of the correlation, and rows of the group.
        groups: per grouping factor ``(n,)``. meetings: per pair of factors its levels and the pair of every row.
        log_w: ``(n,)``. beta0, X_basis, Z_bases: as of the rows.
        kind: of the correlation, ``"serial"``, ``"cs"`` or ``""``; static. levels, p, layout, n_groups: static.
    """

    columns: Any
    W: Any
    before: Any
    power: Any
    odd: Any
    group: Any
    count: Any
    groups: tuple[Any, ...]
    meetings: tuple[tuple[Any, Any, Any], ...]
    log_w: Any
    beta0: Any
    X_basis: Basis
    Z_bases: tuple[Basis, ...]
    kind: str
    levels: tuple[int, ...]
    p: int
    layout: Layout
    n_groups: int

    @staticmethod
    def of(rows: Rows, transform: Transform) -> ResidualRows:
        """Of rows of numbers, whose design has the residuals' columns."""
        n, correlation = rows.n, transform.correlation
        before, power, odd = np.full(n, -1), np.ones(n), np.zeros(n, bool)
        group, count, kind = np.zeros(n, int), np.ones(n), ""
        if isinstance(correlation, CompoundSymmetry):
            kind, group = "cs", np.asarray(correlation.group)
            count = correlation.counts[group].astype(float)
        elif isinstance(correlation, AR1 | CAR1):
            kind, group, before = "serial", np.asarray(correlation.group), correlation.before
            power = np.where(before >= 0, correlation.gap / correlation.shortest, 1.0)
            odd = np.round(power).astype(int) % 2 == 1
        elif correlation is not None:
            raise ValueError(
                f"correlations of residuals by distance ({correlation.name}) have no posteriors; mixjax.lmm fits them"
            )
        return ResidualRows(
            columns=np.concatenate([*rows.Z, rows.Q, rows.residual[:, None]], axis=1),
            W=transform.W - transform.W.mean(0),
            before=before,
            power=power,
            odd=odd,
            group=group,
            count=count,
            groups=tuple(map(np.asarray, rows.groups)),
            meetings=tuple((m.rows, m.cols, np.asarray(m.entry)) for m in rows.meetings),
            log_w=np.asarray(rows.log_w, np.float64),
            beta0=rows.beta0,
            X_basis=rows.X_basis,
            Z_bases=rows.Z_bases,
            kind=kind,
            levels=rows.levels,
            p=rows.Q.shape[1],
            layout=rows.layout,
            n_groups=int(group.max()) + 1,
        )

    @property
    def n(self) -> int:
        """Number of rows."""
        n: int = self.columns.shape[0]
        return n

    def whitener(self, gamma: Array, c: Array | None) -> Whitener:
        """The transform.

        Args:
            gamma: ``(d,)`` coefficients of the dispersion. c: the correlation, of rows at the shortest distance; None
                where there is none.
        """
        log_scale = self.W @ gamma
        if c is None:
            one = jnp.ones(self.n)
            return Whitener(jnp.exp(log_scale), one, 0.0 * one, -log_scale)
        if self.kind == "cs":
            m = self.count
            within, whole = 1.0 / jnp.sqrt(1.0 - c), 1.0 / jnp.sqrt(1.0 + (m - 1.0) * c)
            logdet = ((m - 1.0) * jnp.log(within) + jnp.log(whole)) / m
            return Whitener(jnp.exp(log_scale), jnp.broadcast_to(within, m.shape), (whole - within) / m,
                            logdet - log_scale)  # fmt: skip
        later = self.before >= 0
        size = jnp.maximum(jnp.abs(c), 1e-150)
        # c to a power, whose sign is that of c where that is odd.
        own = size**self.power * jnp.where(self.odd & (c < 0), -1.0, 1.0)
        left = -jnp.expm1(2.0 * self.power * jnp.log(size))
        root = jnp.where(later, 1.0 / jnp.sqrt(left), 1.0)
        return Whitener(jnp.exp(log_scale), root, jnp.where(later, -own * root, 0.0), jnp.log(root) - log_scale)

    def neighbours(self, rows: Array) -> Array:
        """``(n, k) -> (n, k)``: the row before, or the sum of the group."""
        if self.kind == "cs":
            found: Array = jax.ops.segment_sum(rows, self.group, self.n_groups)[self.group]
            return found
        before: Array = jnp.asarray(rows)[jnp.maximum(self.before, 0)]
        return before

    def moved(self, at: Whitener, rows: Array) -> Array:
        """``T rows (n, k)``."""
        scaled = rows / at.scale[:, None]
        return at.own[:, None] * scaled + at.other[:, None] * self.neighbours(scaled) if self.kind else scaled

    def with_last(self, residual: Array) -> ResidualRows:
        """With another response ``(n,)``, less its mean and times the roots of the weights."""
        return replace(self, columns=jnp.concatenate([self.columns[:, :-1], residual[:, None]], axis=1))

    def products(self, at: Whitener) -> CrossProducts:
        """The cross-products of the transformed rows."""
        return self.products_of(self.moved(at, self.columns), (self.log_w + 2.0 * at.logdet).sum())

    def products_of(self, columns: Array, sum_log_weights: Array) -> CrossProducts:
        """Those of rows that were transformed."""
        layout, starts = self.layout, np.cumsum([0, *self.layout.widths])
        end = int(starts[-1])
        factors, pairs = [], []
        for f, q in enumerate(layout.widths):
            own = columns[:, starts[f] : starts[f + 1]]
            both = jnp.concatenate([own, columns[:, end:]], axis=1)
            sums = sum_by_group(own.T[:, None] * both.T[None], self.groups[f], self.levels[f])
            factors.append(FactorProducts(sums[:, :q], sums[:, q : q + self.p], sums[:, -1]))
        for (s, t), (rows, cols, entry) in zip(layout.pairs, self.meetings, strict=True):
            left, right = (columns[:, starts[f] : starts[f + 1]] for f in (s, t))
            sums = sum_by_group(left.T[:, None] * right.T[None], entry, len(rows))
            pairs.append(PairProducts(rows, cols, sums))
        border = columns[:, end:]
        G = border.T @ border
        return CrossProducts(
            factors=tuple(factors),
            pairs=tuple(pairs),
            XX=G[:-1, :-1],
            Xy=G[:-1, -1],
            yy=G[-1, -1],
            n=np.float64(self.n),
            sum_log_weights=sum_log_weights,
            beta0=self.beta0,
            X_basis=self.X_basis,
            Z_bases=self.Z_bases,
            layout=layout,
        )

    def modes(self, lambdas: list[Array], left: Array, errors: Array, gamma: Array, c: Array | None) -> list[Array]:
        """Per term ``(q, m)`` conditional means of the effects of Z's own columns, of a model without fixed effects.

        Args:
            lambdas: per term ``(q, q)``, relative. left: ``(n,)`` the response, times the roots of the weights.
            errors: ``(n,)`` what is taken away of the transformed response. gamma, c: as of :meth:`whitener`.
        """
        columns = self.moved(self.whitener(gamma, c), self.with_last(left).columns)
        columns = columns.at[:, -1].add(-errors)
        stats = self.products_of(columns, jnp.zeros(()))
        found = conditional_modes(in_bases(lambdas, stats), stats)
        return [basis.R_inv @ own for basis, own in zip(self.Z_bases, found, strict=True)]

    def log_densities(
        self, lambdas: list[Array], log_sigma: Array, beta: Array, gamma: Array, c: Array | None, group: Any, m: int
    ) -> Array:
        """``(m,)`` of the rows of every level of ``group (n,)``, random effects integrated out.

        Args:
            lambdas: per term ``(q, q)``, relative. beta: ``(p,)``.
        """
        at = self.whitener(gamma, c)
        delta = self.X_basis.R @ (beta - self.beta0)
        if self.layout.terms:
            products = self.by_level(at, group, m)
            return split(in_bases(lambdas, products.stats), log_sigma, delta, products)
        columns = self.moved(at, self.columns)
        e = columns[:, -1] - columns[:, :-1] @ delta
        rows = jnp.log(2.0 * jnp.pi) + 2.0 * log_sigma - self.log_w - 2.0 * at.logdet + (e * jnp.exp(-log_sigma)) ** 2
        return -0.5 * sum_by_group(rows, group, m)

    def by_level(self, at: Whitener, group: Any, m: int) -> LevelProducts:
        """Products, and what belongs to each of the m levels of ``group (n,)``, in which correlated rows are
        together."""
        columns = self.moved(at, self.columns)
        log_w = self.log_w + 2.0 * at.logdet
        Q, residual = columns[:, -1 - self.p : -1], columns[:, -1]
        return LevelProducts(
            self.products_of(columns, log_w.sum()),
            sum_by_group(Q.T[:, None] * Q.T[None], group, m),
            sum_by_group(Q.T * residual, group, m),
            sum_by_group(residual * residual, group, m),
            sum_by_group(jnp.ones(self.n), group, m),
            sum_by_group(log_w, group, m),
        )


_STATIC = ("kind", "levels", "p", "layout", "n_groups")
jax.tree_util.register_dataclass(
    ResidualRows,
    data_fields=[name for name in ResidualRows.__dataclass_fields__ if name not in _STATIC],
    meta_fields=list(_STATIC),
)
