"""Cross-products without each of some units: subtraction, not another pass.

All sums stay in the bases of the fit, so that the deletions of many units are one batch for
:func:`mixjax.estimate_many`. Subtracting costs the digits that the unit carries; where it carries nearly everything in
some direction, the products are formed anew from the rows that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mixjax.bases import orthonormal_columns
from mixjax.design import Design
from mixjax.products.rows import Rows, rows_of
from mixjax.products.sums import CrossProducts, pad, stack
from mixjax.resampling.replicates import chunk_size

# A unit with more than this part of the squares along some direction dominates it: taking its products away would cost
# six digits there.
DOMINANT = 1 - 1e-6
# Eigenvalues of Z'Z below this part of the largest one are directions that Z does not have.
RANK = 1e-12


def dominant(rows: Rows, unit: np.ndarray) -> np.ndarray:
    """Codes of the units that carry nearly all there is of some direction of X, of a term's Z, or of y."""
    squares = rows.residual @ rows.residual
    blocks = [np.column_stack([rows.Q, rows.residual / np.sqrt(squares)]) if squares > 0 else rows.Q]
    for Z in rows.Z:
        values, vectors = np.linalg.eigh(Z.T @ Z)
        kept = values > RANK * values[-1]
        blocks.append(Z @ (vectors[:, kept] / np.sqrt(values[kept])))
    found = set().union(*(dominant_in(block, unit) for block in blocks))
    return np.array(sorted(found), np.intp)


def dominant_in(block: np.ndarray, unit: np.ndarray) -> set[int]:
    """Units that carry nearly all of some direction of orthonormal columns ``(n, c)``."""
    # A unit's share of a direction is at most the sum of its shares of all: few have to be looked at.
    shares = np.bincount(unit, weights=(block * block).sum(1))
    found = set()
    for u in np.flatnonzero(shares > DOMINANT):
        own = block[unit == u]
        if np.linalg.eigvalsh(own.T @ own)[-1] > DOMINANT:
            found.add(int(u))
    return found


def estimable(design: Design, unit: np.ndarray, u: int) -> bool:
    """X keeps its rank without unit u, by the rule that a fit of the other rows goes by."""
    left = unit != u
    weights = design.weights
    return is_of_full_rank(np.asarray(design.X)[left], None if weights is None else np.sqrt(np.asarray(weights)[left]))


def is_of_full_rank(X: np.ndarray, sqrt_w: np.ndarray | None = None) -> bool:
    """By the rule that fits go by."""
    return bool(orthonormal_columns(X, sqrt_w)[2].all())


def batches(rows: Rows, unit: np.ndarray, most: int | None = None) -> Iterator[tuple[np.ndarray, CrossProducts]]:
    """Units and the cross-products without each of them, in batches that fit into memory.

    Units without which X loses rank are left out.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``, each with rows. most: units of a batch.
    """
    U = int(unit.max()) + 1
    numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(rows.stats))
    dominating = dominant(rows, unit)
    plain = np.setdiff1d(np.arange(U), dominating)
    chunk = chunk_size(numbers) if most is None else min(most, chunk_size(numbers))
    for first in range(0, len(plain), chunk):
        deleted = plain[first : first + chunk]
        yield deleted, rows.without(unit, deleted)
    plain = np.array([u for u in dominating if estimable(rows.design, unit, u)], np.intp)
    for first in range(0, len(plain), chunk):
        deleted = plain[first : first + chunk]
        yield deleted, stack([pad(rows_of(_subset(rows.design, unit != u)).stats) for u in deleted])


def _subset(design: Design, keep: np.ndarray) -> Design:
    """Some rows; all levels stay."""

    def some(a: Any) -> Any:
        return None if a is None else np.asarray(a)[keep]

    terms = tuple(replace(term, Z=some(term.Z), group=some(term.group)) for term in design.terms)
    return Design(some(design.y), some(design.X), terms, some(design.weights), some(design.offset), some(design.size),
                  tuple(some(own) for own in design.psi_columns))  # fmt: skip
