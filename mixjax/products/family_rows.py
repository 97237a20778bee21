"""The rows of a generalised linear mixed model: what their log densities need, X and Z in bases of mean square 1.

A likelihood that is not Gaussian has no cross-products that would do for all parameters: it is a sum over rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mixjax.bases import Basis, Orthonormal
from mixjax.design import AnyArray, Design
from mixjax.families import Family, family_of
from mixjax.machine import is_concrete
from mixjax.products.rows import rows_of
from mixjax.products.sums import Layout


@dataclass(frozen=True)
class FamilyRows:
    """Rows of a model ``y ~ family(eta)``, ``eta = offset + Q delta + sum_t Z_t b_t``. A JAX pytree.

    Attributes:
        y: ``(n,)`` response, of many data sets ``(B, n)``; counts of successes for a binomial family.
        size: ``(n,)`` numbers of trials, or None for 1. weights: ``(n,)`` case weights, or None. offset: ``(n,)``.
        Q: ``(n, p)`` basis of X, columns of mean square 1. X_basis: the change to it.
        Z: per grouping factor ``(n, q)``, its terms side by side. Z_bases: one per term.
        groups: per grouping factor ``(n,)`` levels. levels: how many; static.
        layout: structure; static. family: static.
    """

    y: AnyArray
    size: AnyArray | None
    weights: AnyArray | None
    offset: AnyArray | None
    Q: AnyArray
    X_basis: Basis
    Z: tuple[AnyArray, ...]
    Z_bases: tuple[Basis, ...]
    groups: tuple[AnyArray, ...]
    levels: tuple[int, ...]
    layout: Layout
    family: Family

    @property
    def n(self) -> int:
        """Number of rows."""
        n: int = self.Q.shape[0]
        return n

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        p: int = self.Q.shape[1]
        return p

    def with_response(self, y: AnyArray) -> FamilyRows:
        """The same rows with another response ``(n,)``, or many ``(B, n)``."""
        return replace(self, y=y)


jax.tree_util.register_dataclass(
    FamilyRows,
    data_fields=["y", "size", "weights", "offset", "Q", "X_basis", "Z", "Z_bases", "groups"],
    meta_fields=["levels", "layout", "family"],
)


def rows(design: Design, family: Family | str, y: AnyArray | None = None) -> FamilyRows:
    """The rows of a generalised linear mixed model, for :func:`mixjax.glmm_loglik` and :func:`mixjax.glmm_estimate`.

    Args:
        design: arrays of the model; ``weights`` are case weights, ``size`` numbers of trials.
        family: a name, for its default link, or one of :mod:`mixjax.families`.
        y: ``(n,)``, or ``(B, n)`` for many responses of one design; None for the design's own.

    Raises:
        ValueError: shapes or values do not make a model.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> mj.rows(design, "poisson").n
        12
    """
    known = family_of(family, linear=True)
    response = design.y if y is None else y
    if np.shape(response)[-1:] != np.shape(design.X)[:1] or np.ndim(response) not in (1, 2):
        raise ValueError(f"y has shape {np.shape(response)}, but X has {np.shape(design.X)[0]} rows: (n,) or (B, n)")
    return rows_in(design, known, response)


def rows_in(design: Design, family: Family, response: AnyArray, basis_of_X: Orthonormal | None = None) -> FamilyRows:
    """:func:`rows` of checked responses, with the basis of X where that is known."""
    some = response if np.ndim(response) == 1 else design.X[:, :1].sum(1)
    in_bases = rows_of(replace(design, y=some, weights=None, offset=None), basis_of_X)
    scale = float(np.sqrt(in_bases.n))
    basis = in_bases.X_basis

    def numbers(values: Any) -> Any:
        return np.asarray(values, np.float64) if values is not None and is_concrete(values) else values

    return FamilyRows(
        y=numbers(response),
        size=numbers(design.size),
        weights=numbers(design.weights),
        offset=numbers(design.offset),
        Q=in_bases.Q * scale,
        X_basis=Basis(basis.R / scale, basis.R_inv * scale, basis.logdet - basis.R.shape[0] * np.log(scale)),
        Z=in_bases.Z,
        Z_bases=in_bases.Z_bases,
        groups=in_bases.groups,
        levels=in_bases.levels,
        layout=in_bases.layout,
        family=family,
    )
