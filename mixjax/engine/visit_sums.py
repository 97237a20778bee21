"""What the likelihood of repeated measures asks of the rows, as sums by pattern of visits that JAX takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.bases import Basis
from mixjax.engine.elimination import Reduced
from mixjax.machine import Array
from mixjax.products.visits import VisitRows


@dataclass(frozen=True)
class VisitSums:
    """Second moments between visits of X's basis and of y, summed over the subjects of a pattern. A JAX pytree.

    Attributes:
        moments: ``(C, T, T, p + 1, p + 1)``. seen: ``(C, T)`` 1.0 for the visits of a pattern. arm: ``(C,)``.
        count: ``(C,)`` subjects. n, sum_log_weights: ``()``. beta0: ``(p,)`` least squares. X_basis: the change to it.
        by_visit: ``(S, T, p + 1)`` basis and residual of every subject. pattern: ``(S,)``.
    """

    moments: Any
    seen: Any
    arm: Any
    count: Any
    n: Any
    sum_log_weights: Any
    beta0: Any
    X_basis: Basis
    by_visit: Any
    pattern: Any

    @staticmethod
    def of(rows: VisitRows) -> VisitSums:
        """Of rows of numbers."""
        residual, beta0 = rows.residuals(np.asarray(rows.design.y, np.float64))
        U = rows.by_visit(np.column_stack([rows.Q, residual]))  # (S, T, p + 1)
        moments = np.stack(
            [
                np.einsum("sau,sbv->abuv", U[first : first + count], U[first : first + count], optimize=True)
                for first, count in zip(rows.starts, rows.count, strict=True)
            ]
        )
        patterns = rows.patterns
        return VisitSums(
            moments, patterns.seen * 1.0, np.asarray(patterns.arm), rows.count * 1.0, np.float64(rows.n),
            np.float64(rows.sum_log_weights), beta0, rows.X_basis, U, np.asarray(rows.pattern),
        )  # fmt: skip

    def inverses(self, factors: Sequence[Array]) -> tuple[Array, Array]:
        """Of every pattern's covariance ``(T, T, C)``, zero at visits that are missing, and log-determinants ``(C,)``.

        Args:
            factors: per arm ``(T, T)``, any factor of its covariance.
        """
        Sigma = jnp.stack([F @ F.T for F in factors])[self.arm]  # (C, T, T)
        seen = jnp.asarray(self.seen)
        both = seen[:, :, None] * seen[:, None]
        V = Sigma * both + jnp.eye(seen.shape[1]) * (1.0 - seen)[:, :, None]
        W, logdet = linalg.inverse_logdet(jnp.moveaxis(V, 0, -1))
        return W * jnp.moveaxis(both, 0, -1), logdet

    def reduced(self, factors: Sequence[Array]) -> Reduced:
        """``[X y]'V^{-1}[X y]`` and ``log |V|``."""
        W, logdet = self.inverses(factors)
        G = jnp.einsum("abc,cabuv->uv", W, self.moments)
        return Reduced((jnp.asarray(self.count) * logdet).sum(), G[:-1, :-1], G[:-1, -1], G[-1, -1])

    def errors(self, beta: Array) -> Array:
        """``(S, T)`` what is left of y at fixed effects ``(p,)``, times the roots of the weights."""
        U = jnp.asarray(self.by_visit)
        left: Array = U[..., -1] - U[..., :-1] @ (self.X_basis.R @ (beta - self.beta0))
        return left

    def by_subject(self, factors: Sequence[Array], beta: Array) -> tuple[Array, Array, Array]:
        """Of every subject: twice minus its log density but for constants ``(S,)``; and of every visit the deviation
        from its mean given the subject's other visits, and the precision of that, ``(S, T)``."""
        W, logdet = self.inverses(factors)
        e = self.errors(beta)
        own = jnp.moveaxis(W, -1, 0)[self.pattern]
        We = jnp.einsum("sab,sb->sa", own, e)
        precision = jnp.einsum("saa->sa", own)
        safe = jnp.where(precision > 0, precision, 1.0)
        return (We * e).sum(1) + logdet[self.pattern], We / safe, precision


jax.tree_util.register_dataclass(VisitSums, data_fields=list(VisitSums.__dataclass_fields__), meta_fields=[])
