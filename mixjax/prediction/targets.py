"""Targets of a prediction: rows in the columns and levels of a fit, and which of its random effects each one has."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax.covariance import split_theta, triangle
from mixjax.design import AnyArray
from mixjax.engine.equations import EffectRows
from mixjax.products.sums import CrossProducts


class Targets(NamedTuple):
    """m linear combinations ``x'beta + sum_t z_t'b_t`` to predict, the sum over the included terms.

    Attributes:
        X: ``(m, p)``. offset: ``(m,)``.
        Z: per random term ``(m, q)``, or None where neither its effects nor their variance count.
        level: per random term ``(m,)``, -1 for a level that the fit does not know; None for a term left out.
        noise: ``(m,)`` what else varies, relative to sigma^2: ``1 / weight`` for a new response, 0 for a mean.
    """

    X: np.ndarray
    offset: np.ndarray
    Z: tuple[np.ndarray | None, ...]
    level: tuple[np.ndarray | None, ...]
    noise: np.ndarray

    def take(self, at: Any) -> Targets:
        """Some of the rows."""

        def some(parts: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(None if part is None else part[at] for part in parts)

        return Targets(self.X[at], self.offset[at], some(self.Z), some(self.level), self.noise[at])

    def with_effects(self, effects: list[np.ndarray]) -> Targets:
        """Without the effects that are False in the ``(q,)`` of a term where others are True."""
        Z = tuple(
            None if own is None else np.where(which | ~which.any(), own, 0.0)
            for own, which in zip(self.Z, effects, strict=True)
        )
        return self._replace(Z=Z)

    def mean(self, beta: np.ndarray, b: tuple[np.ndarray, ...]) -> np.ndarray:
        """``offset + x'beta + sum_t z_t'b_t``, new levels with ``b_t = 0``; ``(..., m)``.

        Args:
            beta: ``(..., p)``. b: per term ``(..., levels, q)``.
        """
        mean: np.ndarray = self.offset + beta @ self.X.T
        for Z, level, own in zip(self.Z, self.level, b, strict=True):
            if Z is not None and level is not None:
                effects = np.where((level >= 0)[:, None], np.take(own, np.maximum(level, 0), axis=-2), 0.0)
                mean = mean + np.einsum("mq,...mq->...m", Z, effects)
        return mean

    def fresh(self) -> tuple[np.ndarray | None, ...]:
        """Per random term ``(m, q)`` the columns of effects that are new: of unknown levels, or of terms left out."""
        return tuple(
            None if Z is None else Z if level is None else Z * (level < 0)[:, None]
            for Z, level in zip(self.Z, self.level, strict=True)
        )

    def fresh_variance(self, D: tuple[np.ndarray, ...]) -> np.ndarray:
        """``(..., m)`` variance of new effects and noise, relative to sigma^2.

        Args:
            D: per term ``(..., q, q)``, relative covariance of its effects.
        """
        total = self.noise
        for Z, own in zip(self.fresh(), D, strict=True):
            if Z is not None:
                total = total + np.einsum("ma,...ab,mb->...m", Z, own, Z)
        return total


def effect_rows(targets: Targets, stats: CrossProducts) -> EffectRows:
    """The targets in the bases of the cross-products, by grouping factor.

    Raises:
        ValueError: factors that were one and the same in the rows of the fit have different levels in a target.
    """
    m = len(targets.X)
    Z = [np.zeros((m, width)) for width in stats.layout.widths]
    levels = [np.full(m, -1) for _ in Z]
    for place, basis, own, level in zip(stats.layout.terms, stats.Z_bases, targets.Z, targets.level, strict=True):
        if own is not None and level is not None:
            known = level >= 0
            Z[place.factor][:, place.start : place.start + place.q] = np.where(known[:, None], own @ basis.R_inv, 0.0)
            have = levels[place.factor]
            if (known & (have >= 0) & (have != level)).any():
                raise ValueError(
                    "two grouping factors have the same levels in all rows of the fit, but not in newdata: there are "
                    "predictions, but no standard errors of those rows"
                )
            levels[place.factor] = np.where(known, level, have)
    X = targets.X @ np.asarray(stats.X_basis.R_inv)
    return EffectRows(X, Z, [np.maximum(level, 0) for level in levels])


def relative_factors(theta: AnyArray, qs: tuple[int, ...]) -> list[np.ndarray]:
    """Per term ``Lambda (..., q, q)`` of its own columns, lower triangular, from ``theta (..., k)``."""
    lambdas = []
    columns: AnyArray = np.moveaxis(theta, -1, 0)
    for part, q in zip(split_theta(columns, qs), qs, strict=True):
        Lambda = np.zeros((q, q, *part.shape[1:]))
        Lambda[triangle(q)] = part
        lambdas.append(np.moveaxis(Lambda, (0, 1), (-2, -1)))
    return lambdas
