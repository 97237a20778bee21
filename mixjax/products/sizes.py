"""How large a model is, and what therefore serves it: every limit that sizes set to the closed forms.

By sizes only, never by time or by what happens to be compiled, so that the same call gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax.decompositions import ROTATIONS_UP_TO
from mixjax.products.sums import CrossProducts

# Compiled, the closed form is written out entry by entry for the first factor's effects, keeps the products of every
# pair of columns per level, and treats all other effects as one small dense block: effects a level of the first factor,
# other random effects, and numbers.
MOST_EFFECTS, MOST_DENSE, MOST_PRODUCTS = 3, 64, 2**26
# NumPy writes nothing out: what counts is the cube of the dense block, and the numbers that stand in memory.
MOST_DENSE_AT_ONCE, MOST_NUMBERS = 1024, 2**27
# Numbers of the matrices that the exact Hessian needs, one for every direction of the first factor's covariances.
MOST_SLOPES = 2**23
# Effects beside the first factor's up to which NumPy works on lanes side by side: responses of one design, and designs.
MOST_DENSE_LANES, MOST_DENSE_STACKED = 32, 256
# The same of one data set whose levels have a known covariance, or searched one by one, with a parameter held: some
# seconds.
MOST_DENSE_HELD = 128
# Effects beside the first factor's up to which the posterior is sampled: every gradient inverts a matrix of that size,
# in each chain, thousands of times.
MOST_DENSE_DRAWS = 1024
# Fixed effects of the compiled lanes at most: their matrices of X's columns are eliminated row by row, one entry of all
# lanes after the other, and from about here on LAPACK is quicker for one fit at a time.
MOST_COLUMNS = 64
# Seconds for which NumPy may work before a program of many fits, which takes 4 to 10 to compile, is worth it: a first
# call counts as much as a second one, and the estimate may be too low.
COMPILING = 1.0


class Sizes(NamedTuple):
    """Of a model: q effects of each of m levels of the first factor, d effects of the others, p fixed effects, and C
    classes of levels."""

    q: int
    m: int
    d: int
    p: int
    C: int

    @property
    def products(self) -> int:
        """Numbers that the products of all pairs of columns are, level by level, four times over."""
        u = self.d + self.p
        return self.q * (self.q + 1) * u * (u + 1) * self.m


def sizes_of(stats: CrossProducts) -> Sizes:
    """Of one data set, or of each of many."""
    first, *rest = stats.layout.chain + stats.layout.dense
    shapes = [f.ZZ.shape[-2:] for f in stats.factors]
    q, m = shapes[first]
    C = m if stats.classes is None else len(stats.classes.count)
    return Sizes(q, m, sum(width * levels for width, levels in (shapes[f] for f in rest)), stats.XX.shape[-1], C)


def is_small(stats: CrossProducts) -> bool:
    """Whether one fit by NumPy is at most some seconds: not too many effects beside those of the first factor."""
    q, m, d, p, _ = sizes_of(stats)
    # Levels with a known covariance have no sparse rows and no other way that is quicker.
    return (d <= MOST_DENSE_AT_ONCE or bool(stats.known)) and q * q * m * (d + p) <= MOST_NUMBERS


def has_many_directions(stats: CrossProducts) -> bool:
    """Whether the exact Hessian of one fit is too much: a matrix of the other effects for every free entry of the first
    factor's covariances, several times over."""
    size = sizes_of(stats)
    first = (stats.layout.chain + stats.layout.dense)[0]
    directions = sum(place.q * (place.q + 1) // 2 for place in stats.layout.terms if place.factor == first)
    return directions * (size.d + size.p) ** 2 > MOST_SLOPES


def in_lanes_at_once(stats: CrossProducts) -> bool:
    """Whether NumPy works on many lanes side by side: not where the products of matrices in a lane are large."""
    size = sizes_of(stats)
    if np.ndim(stats.XX) == 3:
        return size.d <= MOST_DENSE_STACKED and is_small(stats)
    return size.d <= MOST_DENSE_LANES and size.products <= MOST_PRODUCTS


def most_dense_held(stats: CrossProducts, one_by_one: bool = False) -> int:
    """Effects beside the first factor's up to which NumPy works on lanes of one data set with a parameter held, or on
    one search after the other."""
    return MOST_DENSE_HELD if stats.known or one_by_one else MOST_DENSE_LANES


def in_lanes_held(stats: CrossProducts) -> bool:
    """Whether it does."""
    size = sizes_of(stats)
    return size.d <= most_dense_held(stats) and size.products <= MOST_PRODUCTS


def is_small_held(stats: CrossProducts) -> bool:
    """Whether NumPy works on one data set with a parameter held, one search after the other."""
    size = sizes_of(stats)
    return size.d <= most_dense_held(stats, one_by_one=True) and size.products <= MOST_PRODUCTS


def has_closed_form(stats: CrossProducts) -> bool:
    """Whether the closed form is compiled: few effects per level of the first factor, few other effects."""
    size = sizes_of(stats)
    small = size.q <= MOST_EFFECTS and size.d <= MOST_DENSE and stats.layout.k <= ROTATIONS_UP_TO
    return small and size.products <= MOST_PRODUCTS


def in_blocks(stats: CrossProducts) -> bool:
    """Whether many fits are compiled in lanes."""
    return not is_wide(stats) and has_closed_form(stats)


def is_wide(stats: CrossProducts) -> bool:
    """Whether the fixed effects are too many for compiled lanes."""
    return sizes_of(stats).p > MOST_COLUMNS


def pays_to_compile(fits: int, stats: CrossProducts) -> bool:
    """Whether so many fits take NumPy longer than :data:`COMPILING`.

    Microseconds of a fit, measured on one quiet core: of q effects a level of the first factor with C classes beside d
    other random and p fixed effects, ``10 + 0.2 q^6 + 0.08 q^6 C + d^2 + 0.4 p^2``, within a factor of three; where
    most fits are singular up to twenty times that.
    """
    q, _, d, p, C = sizes_of(stats)
    microseconds = 10 + (0.2 + 0.08 * C) * q**6 + d**2 + 0.4 * p**2
    return fits * microseconds > 1e6 * COMPILING
