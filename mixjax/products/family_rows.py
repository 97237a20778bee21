"""The rows of a generalised linear mixed model: what their log densities need, X and Z in bases of mean square 1.

A likelihood that is not Gaussian has no cross-products that would do for all parameters: it is a sum over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.bases import Basis, Orthonormal, change_basis
from mixjax.design import AnyArray, Design, refuse_known, refuse_padding, refuse_residual_side
from mixjax.families import Family, family_of
from mixjax.machine import is_concrete, namespace
from mixjax.products.rows import rows_of
from mixjax.products.sums import Layout

# Links without a mean below 0, whose predictor has the scale of the response.
POSITIVE = ("inverse", "1/mu^2", "sqrt")


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
        unit: root mean square of Z's columns, a power of two; static. 1 but for links whose predictor must be positive
            and has the scale of the response: there it is that of the predictor.
        psi_columns: per parameter psi of the family ``(n, r)`` basis of the columns of its linear predictor, of mean
            square 1, or None where psi is one number; ``()``: all are. psi_bases: the changes to them, likewise.
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
    unit: float = 1.0
    psi_columns: tuple[AnyArray | None, ...] = ()
    psi_bases: tuple[Basis | None, ...] = ()

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

    @property
    def n_psi(self) -> int:
        """Number of coefficients of the family's parameters: one of each that is one number."""
        return sum(self.psi_widths)

    @property
    def psi_widths(self) -> tuple[int, ...]:
        """Coefficients of each of the family's parameters."""
        if not self.psi_columns:
            return (1,) * self.family.n_psi
        return tuple(1 if own is None else own.shape[1] for own in self.psi_columns)

    def fixed_in_bases(self, beta: AnyArray, psi: AnyArray) -> AnyArray:
        """``(p + s,)``: fixed effects and coefficients of psi in the bases, from those of the original columns."""
        parts = [self.X_basis.R @ beta]
        for basis, place in zip(self._bases_of_psi, places_of(self.psi_widths), strict=True):
            parts.append(psi[place] if basis is None else basis.R @ psi[place])
        return namespace(*parts).concatenate(parts)

    def psi_of_bases(self, psi: AnyArray) -> AnyArray:
        """Coefficients ``(s, ...)`` of psi for the original columns, from those in the bases."""
        if not self.psi_columns:
            return psi
        found = [
            psi[place] if basis is None else basis.R_inv @ psi[place]
            for basis, place in zip(self._bases_of_psi, places_of(self.psi_widths), strict=True)
        ]
        return namespace(*found).concatenate(found)

    @property
    def fixed_change(self) -> AnyArray:
        """``(p + s, p + s)``: fixed effects and coefficients of psi for the original columns, from those of the
        bases."""
        blocks = [self.X_basis.R_inv, *(np.eye(1) if own is None else own.R_inv for own in self._bases_of_psi)]
        xp, n = namespace(*blocks), sum(len(block) for block in blocks)
        rows, start = [], 0
        for block in blocks:
            rows.append(xp.pad(block, ((0, 0), (start, n - start - len(block)))))
            start += len(block)
        return xp.concatenate(rows)

    @property
    def _bases_of_psi(self) -> tuple[Basis | None, ...]:
        return self.psi_bases or (None,) * self.family.n_psi

    def psi_by_row(self, psi: AnyArray) -> list[AnyArray]:
        """The family's parameters, each a number or ``(n,)``, from coefficients ``(s,)`` of the original columns."""
        if not self.psi_columns:
            return list(psi)
        places = zip(self.psi_columns, self.psi_bases, places_of(self.psi_widths), strict=True)
        return [psi[place][0] if basis is None else Q @ (basis.R @ psi[place]) for Q, basis, place in places]

    def psi_of_columns(self, psi: AnyArray, columns: Sequence[AnyArray | None]) -> list[AnyArray | None]:
        """The family's parameters, each a number or ``(m,)``, of other rows, whose original columns are ``(m, r)``;
        None where these are not known."""
        found = []
        for j, place in enumerate(places_of(self.psi_widths)):
            own = columns[j] if columns else None
            varies = bool(self.psi_columns) and self.psi_columns[j] is not None
            found.append(psi[place][0] if not varies else None if own is None else own @ psi[place])
        return found

    def with_response(self, y: AnyArray) -> FamilyRows:
        """The same rows with another response ``(n,)``, or many ``(B, n)``."""
        return replace(self, y=y)


jax.tree_util.register_dataclass(
    FamilyRows,
    data_fields=[
        "y",
        "size",
        "weights",
        "offset",
        "Q",
        "X_basis",
        "Z",
        "Z_bases",
        "groups",
        "psi_columns",
        "psi_bases",
    ],
    meta_fields=["levels", "layout", "family", "unit"],
)


def places_of(widths: Sequence[int]) -> list[slice]:
    """Where coefficients of so many columns stand, one set behind the other."""
    ends = [0, *accumulate(widths)]
    return [slice(*pair) for pair in pairwise(ends)]


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
    counts = known.plain.name == "binomial" and design.size is None and is_concrete(response)
    if counts and np.asarray(response).max(initial=0.0) >= 2.0:
        raise ValueError(
            f"y goes up to {np.asarray(response).max():g}, and a binomial response without size is 0 or 1: give the "
            "design's size, the numbers of trials"
        )
    return rows_in(design, known, response)


def rows_in(design: Design, family: Family, response: AnyArray, basis_of_X: Orthonormal | None = None) -> FamilyRows:
    """:func:`rows` of checked responses, with the basis of X where that is known."""
    refuse_residual_side(design, "the family of a generalised model")
    refuse_known(
        design, "a generalised linear mixed model", "only linear ones (mixjax.lmm) have them"
    )  # fmt: skip
    refuse_padding(design, "a generalised model")
    some = response if np.ndim(response) == 1 else design.X[:, :1].sum(1)
    in_bases = rows_of(replace(design, y=some, weights=None, offset=None), basis_of_X)
    scale = float(np.sqrt(in_bases.n))
    basis, unit = in_bases.X_basis, _unit(family, response, design.size)

    psi = [_psi_basis(own, j, scale) for j, own in enumerate(_of_family(design.psi_columns, family))]

    def numbers(values: Any) -> Any:
        return np.asarray(values, np.float64) if values is not None and is_concrete(values) else values

    return FamilyRows(
        y=numbers(response),
        size=numbers(design.size),
        weights=numbers(design.weights),
        offset=numbers(design.offset),
        Q=in_bases.Q * scale,
        X_basis=Basis(basis.R / scale, basis.R_inv * scale, basis.logdet - basis.R.shape[0] * np.log(scale)),
        Z=in_bases.Z if unit == 1 else tuple(Z * unit for Z in in_bases.Z),
        Z_bases=in_bases.Z_bases if unit == 1 else tuple(_scaled(own, unit) for own in in_bases.Z_bases),
        groups=in_bases.groups,
        levels=in_bases.levels,
        layout=in_bases.layout,
        family=family,
        unit=unit,
        psi_columns=tuple(Q for Q, _ in psi),
        psi_bases=tuple(basis for _, basis in psi),
    )


def _of_family(columns: Sequence[AnyArray | None], family: Family) -> Sequence[AnyArray | None]:
    """The design's ``psi_columns``, of none ``()``."""
    if len(columns) not in (0, family.n_psi):
        raise ValueError(
            f"psi_columns has {len(columns)} entries; family {family.name!r} has {family.n_psi} parameters "
            f"({', '.join(family.psi_names)}): give columns or None for each"
        )
    return columns if any(own is not None for own in columns) else ()


def _psi_basis(columns: AnyArray | None, j: int, scale: float) -> tuple[AnyArray | None, Basis | None]:
    """Columns of a linear predictor of psi in a basis of mean square 1."""
    if columns is None:
        return None, None
    Q, basis = change_basis(columns, None, scale, full_rank=True)
    if is_concrete(Q) and (not np.shape(Q)[1] or not np.isfinite(np.asarray(Q)).all()):
        raise ValueError(f"psi_columns[{j}] has none, or columns that others determine: leave these out")
    return Q, basis


def _unit(family: Family, response: AnyArray, size: AnyArray | None) -> float:
    """See :class:`FamilyRows`. The search takes what is small beside 1 for zero."""
    if family.link not in POSITIVE or not is_concrete(response) or not (size is None or is_concrete(size)):
        return 1.0
    eta = np.asarray(family.eta_start(np.asarray(response, np.float64), size))
    root = float(np.sqrt(np.mean(eta[np.isfinite(eta)] ** 2))) if np.isfinite(eta).any() else 1.0
    return float(2.0 ** np.round(np.log2(root))) if 0.0 < root < np.inf else 1.0


def _scaled(basis: Basis, unit: float) -> Basis:
    """The basis of columns that are ``unit`` times as long."""
    return Basis(basis.R / unit, basis.R_inv * unit, basis.logdet - basis.R.shape[0] * np.log(unit))


def constant_of(family: Family, Y: np.ndarray, size: np.ndarray | None, weights: Any) -> np.ndarray:
    """``(B,)`` terms of the responses ``(B, n)`` alone in minus their log-likelihoods."""
    own = family.constant(Y, size)
    if np.ndim(own) == 0:
        return np.zeros(len(Y))
    return np.asarray(np.sum(own if weights is None else own * np.asarray(weights), -1))


class Cells(NamedTuple):
    """Rows that are alike, summed: see :func:`cells`.

    Attributes:
        rows: one row per cell. entry: ``(n,)`` the cell of every row. constant: ``()`` or ``(B,)``, what the minus
            log-likelihood of the rows has beyond that of the cells, whatever the parameters.
    """

    rows: FamilyRows
    entry: np.ndarray
    constant: np.ndarray


def cells(rows: FamilyRows) -> Cells | None:
    """Rows with the same levels, X, Z and offset as one row: of a binomial family with the sums of successes and of
    trials, of a Poisson one with the mean response, counted as often. None where fewer than a quarter would be saved,
    of other families, and of traced rows.

    In factorial designs these are several times fewer rows, and the likelihood is the same but for a constant.
    """
    if rows.family.name not in ("binomial", "poisson") or not all(map(is_concrete, jax.tree.leaves(rows))):
        return None
    binomial = rows.family.name == "binomial"
    if binomial and rows.weights is not None:
        return None  # a weighted row is no sum of trials
    columns = [rows.Q, *rows.Z, *(np.asarray(group)[:, None] for group in rows.groups)]
    if rows.offset is not None:
        columns.append(np.asarray(rows.offset)[:, None])
    table = np.concatenate([np.asarray(column, np.float64) for column in columns], axis=1)
    _, first, entry = np.unique(table, axis=0, return_index=True, return_inverse=True)
    entry, m = entry.reshape(-1), len(first)
    if m > 0.75 * rows.n:
        return None
    Y = np.atleast_2d(np.asarray(rows.y, np.float64))
    weights = np.ones(rows.n) if rows.weights is None else np.asarray(rows.weights, np.float64)
    order = np.argsort(entry, kind="stable")
    starts = np.searchsorted(entry[order], np.arange(m))

    def summed(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.add.reduceat(values[..., order], starts, axis=-1)
        return found

    if binomial:
        size = summed(np.ones(rows.n) if rows.size is None else np.asarray(rows.size, np.float64))
        y, counts = summed(Y), None
    else:
        size, counts = None, summed(weights)
        y = summed(Y * weights) / counts
    # All that depends on the parameters is the same.
    trials = None if rows.size is None else np.asarray(rows.size)
    constant = constant_of(rows.family, Y, trials, rows.weights) - constant_of(rows.family, y, size, counts)
    alone = np.ndim(rows.y) == 1
    small = replace(
        rows,
        y=y[0] if alone else y,
        size=size,
        weights=counts,
        offset=None if rows.offset is None else np.asarray(rows.offset)[first],
        Q=rows.Q[first],
        Z=tuple(Z[first] for Z in rows.Z),
        groups=tuple(np.asarray(group)[first] for group in rows.groups),
    )
    return Cells(small, entry, constant[0] if alone else constant)
