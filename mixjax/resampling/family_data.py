"""Data sets that a generalised linear mixed model can be fitted to, many at a time: as replicates are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mixjax.design import Design
from mixjax.estimation.choice import EngineName
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.estimation.glmm_each import fit_each
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.products.family_rows import FamilyRows, rows_in

# Eigenvalue of X'X, relative to the largest, below which the rows of a sample do not tell all fixed effects.
DEPENDENT = 1e-12


@dataclass(frozen=True)
class FamilyResponses:
    """Many responses ``Y (B, nobs)`` of the rows of a fit."""

    fitted: GeneralizedFitted
    Y: np.ndarray

    def fits(self, n: int, keep: Sequence[str], engine: EngineName) -> GLMMEstimates:
        """Estimates of all, as some of n."""
        return self.fitted.fit_many(self.Y, tuple(keep), engine, n)


@dataclass(frozen=True)
class FamilyClusters:
    """The rows of a fit by cluster: levels of a factor in which all others are nested.

    Attributes:
        cluster: ``(n,)`` of every row. M: how many.
    """

    fitted: GeneralizedFitted
    cluster: np.ndarray
    M: int

    def numbers(self, S: int) -> int:
        """How many numbers a data set of S clusters has, about."""
        return self.fitted.nobs * S // self.M

    def gather(self, index: np.ndarray) -> FamilySamples:
        """Data sets made of clusters ``index (B, S)``, a cluster drawn twice counting as two."""
        return FamilySamples(self, index)

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """The rows of every cluster."""
        order = np.argsort(self.cluster, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.cluster, minlength=self.M))[:-1])

    def design(self, drawn: np.ndarray) -> Design:
        """Clusters ``(S,)`` as a data set of their own: a level of any factor in the s-th of them is another one than
        the same level in another."""
        design = self.fitted.design
        rows = np.concatenate([self.rows[c] for c in drawn])
        place = np.repeat(np.arange(len(drawn)), [len(self.rows[c]) for c in drawn])
        terms = []
        for term in design.terms:
            levels, group = np.unique(place * term.n_groups + np.asarray(term.group)[rows], return_inverse=True)
            terms.append(replace(term, Z=np.asarray(term.Z)[rows], group=group.reshape(-1), n_groups=len(levels)))
        others = {
            name: None if values is None else np.asarray(values)[rows]
            for name, values in (("weights", design.weights), ("offset", design.offset), ("size", design.size))
        }
        psi = tuple(None if own is None else np.asarray(own)[rows] for own in design.psi_columns)
        return Design(np.asarray(design.y)[rows], np.asarray(design.X)[rows], tuple(terms), **others, psi_columns=psi)


@dataclass(frozen=True)
class FamilySamples:
    """Data sets made of clusters of rows; see :meth:`FamilyClusters.gather`.

    Each has rows of its own, and is fitted by itself: a weight of two would make a cluster count twice with *one* draw
    of its random effects, whereas a cluster that is drawn twice has two.
    """

    clusters: FamilyClusters
    index: np.ndarray

    def fits(self, n: int, keep: Sequence[str], engine: EngineName) -> GLMMEstimates:
        """Estimates of all. ``engine`` changes nothing: nothing is compiled."""
        fitted = self.clusters.fitted
        return fit_each(self._data(), fitted.estimates_of, keep, fitted.estimates)

    def _data(self) -> Iterator[FamilyRows | None]:
        whole = self.clusters.fitted.rows
        blocks = [np.asarray(whole.Q), *(np.asarray(own) for own in whole.psi_columns if own is not None)]
        for drawn in self.index:
            design = self.clusters.design(drawn)
            rows = np.concatenate([self.clusters.rows[c] for c in drawn])
            known = all(_independent(own[rows]) for own in blocks)
            yield rows_in(design, self.clusters.fitted.family, design.y) if known else None


def _independent(columns: np.ndarray) -> bool:
    """Whether no column, in the basis of all rows, is determined by the others on these."""
    values = np.linalg.eigvalsh(columns.T @ columns) if columns.shape[1] else np.ones(1)
    return bool(values[0] > DEPENDENT * values[-1])
