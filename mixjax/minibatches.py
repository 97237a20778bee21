"""Minibatches over the levels of a grouping factor, as designs of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.checks import check_count
from mixjax.design import Design, refuse_beyond, refuse_trials
from mixjax.machine import is_concrete
from mixjax.products.rows import rows_of
from mixjax.simulation import key_words


class GroupBatch(NamedTuple):
    """Some levels of the outermost grouping factor, all their rows; a pytree, which ``jit`` takes as it is.

    Attributes:
        design: of the batch. Level j of its outermost factor is ``levels[j]``. Rows beyond those of the levels fill up
            the shape: y, X, Z and the offset are 0 there and ``present`` is False; they do not count in n and add
            nothing, whatever a program puts in their place.
        rows: ``(n,)`` numbers of the rows in the whole design, for arrays of your own: ``features[batch.rows]``. 0
            where ``design.present`` is False.
        levels: ``(size,)`` numbers of the levels in the whole design, -1 where there are fewer.
    """

    design: Design
    rows: Any
    levels: Any


class GroupBatches:
    """What :func:`group_batches` makes: epochs of :class:`GroupBatch`.

    Attributes:
        n_levels: m, levels with rows. size: of them in a batch, at most. n_rows: rows of a batch, padding included.
        scale: what the loss of a batch is multiplied by, the number of batches of an epoch: ``m / size`` where size
            divides m.
    """

    def __init__(self, design: Design, size: int, key: Any):
        refuse_trials(design)
        refuse_beyond(design, "mixjax.group_batches")
        if not all(map(is_concrete, jax.tree.leaves(design))):
            raise ValueError("mixjax.group_batches needs numbers: call it outside JAX's transformations")
        if not design.terms:
            raise ValueError("mixjax.group_batches needs a grouping factor: the design has no random term")
        rows = rows_of(design)
        layout = rows.layout
        of_terms = [place.factor for place in layout.terms]
        if layout.dense:
            terms = ", ".join(f"terms[{t}]" for t, f in enumerate(of_terms) if f in layout.dense)
            raise ValueError(
                f"grouping factors cross each other ({terms} cross what is nested in each other here): a level shares "
                "effects with rows of other batches, and the loss of some of the levels is biased. "
                "mixjax.group_batches is for one factor, or factors nested in each other; take the whole design, "
                "mixjax.marginal_loglik"
            )
        outer = rows.groups[layout.chain[-1]]
        counts = np.bincount(outer, minlength=rows.levels[layout.chain[-1]])
        self._levels = np.flatnonzero(counts)
        m = len(self._levels)
        self.size = check_count("size", size, 1)
        if self.size > m:
            raise ValueError(f"size must be {m} or less, as many levels have rows; got {size}")
        self.n_levels = m
        self._words = key_words(key)
        self._design = jax.tree.map(np.asarray, design)
        self._of_terms = [layout.chain.index(f) for f in of_terms]
        by_level = np.argsort(outer, kind="stable").astype(np.int32)
        self._rows = np.split(by_level, np.cumsum(counts)[:-1])
        self.n_rows = self._largest(counts)
        # Per factor of the chain the levels within each of the outermost, and how many a batch has at most.
        self._within, self._most = [], []
        for f in layout.chain:
            inner = rows.groups[f]
            level, first = np.unique(inner, return_index=True)
            parent = outer[first]
            own = np.bincount(parent, minlength=len(counts))
            order = np.argsort(parent, kind="stable")
            self._within.append((inner, np.split(level[order], np.cumsum(own)[:-1]), rows.levels[f]))
            self._most.append(self._largest(own))

    def _largest(self, counts: np.ndarray) -> int:
        """The most that ``size`` levels have together."""
        return int(np.sort(counts)[-self.size :].sum())

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.n_levels // self.size)

    @property
    def scale(self) -> float:
        return float(len(self))

    def __repr__(self) -> str:
        return (
            f"GroupBatches({self.n_levels} levels, {self.size} a batch: {len(self)} batches of {self.n_rows} rows, "
            "padding included)"
        )

    def epoch(self, number: int) -> Iterator[GroupBatch]:
        """The batches of one epoch: every level once, in an order of (key, number) alone.

        Batches differ by one level at most, and chance says which have fewer: so the expectation of each batch's loss
        is the full one, and the mean over the epoch is so exactly.
        """
        number = check_count("number", number, 0)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._words, number])))
        order = rng.permutation(self._levels)
        least, more = divmod(self.n_levels, len(self))
        sizes = rng.permutation([least + 1] * more + [least] * (len(self) - more))
        for chosen in np.split(order, np.cumsum(sizes)[:-1]):
            yield self._batch(chosen)

    def epochs(self, n: int) -> Iterator[Iterator[GroupBatch]]:
        """Epochs 0 .. n - 1, each an iterator of batches."""
        for number in range(check_count("n", n, 0)):
            yield self.epoch(number)

    def _batch(self, chosen: np.ndarray) -> GroupBatch:
        design = self._design
        own = np.concatenate([self._rows[level] for level in chosen])
        n, missing = len(own), self.n_rows - len(own)

        def padded(column: Any, fill: float = 0.0) -> Any:
            if column is None:
                return None
            rest = np.full((missing, *column.shape[1:]), fill, column.dtype)
            return np.concatenate([column[own], rest])

        groups = []
        for inner, within, m in self._within:
            code = np.zeros(m, np.int32)
            levels = np.concatenate([within[level] for level in chosen])
            # The outermost levels in the order of the batch; those within them one behind the other.
            code[levels] = np.arange(len(levels), dtype=np.int32)
            groups.append(np.concatenate([code[inner[own]], np.zeros(missing, np.int32)]))
        terms = tuple(
            replace(term, Z=padded(term.Z), group=groups[f], n_groups=self._most[f])
            for term, f in zip(design.terms, self._of_terms, strict=True)
        )
        batch = replace(
            design,
            y=padded(design.y),
            X=padded(design.X),
            terms=terms,
            weights=padded(design.weights, 1.0),
            offset=padded(design.offset),
            present=np.arange(self.n_rows) < n,
            nested=tuple(self._of_terms),
        )
        rows = np.concatenate([own, np.zeros(missing, np.int32)])
        levels = np.concatenate([chosen, np.full(self.size - len(chosen), -1)]).astype(np.int32)
        return GroupBatch(batch, rows, levels)


def group_batches(design: Design, size: int, key: Any = 0) -> GroupBatches:
    """Minibatches of all rows of some levels of the outermost grouping factor, for training on part of the data.

    All batches have one shape, so a jitted step compiles once: rows and levels are padded to what the largest levels
    need together. The loss ``-scale * sum(marginal_loglik_by_level(params, batch.design))``, with ``scale = m / size``
    where size divides the m levels, is an unbiased estimate of ``-marginal_loglik(params, design)``, gradients
    included; the mean over an epoch is exact. That holds for maximum likelihood, where rows of different levels are
    independent: not for the restricted likelihood, which does not split, nor for crossed factors.

    Args:
        design: arrays of a linear mixed model with one grouping factor, or factors nested in each other.
        size: levels of the outermost factor in a batch.
        key: int or JAX key; the batches of an epoch depend on it and the epoch's number.

    Returns:
        :class:`GroupBatches`.

    Raises:
        ValueError: factors cross each other; size is larger than the number of levels; arrays are traced.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> batches = mj.group_batches(design, size=2, key=1)
        >>> p = mj.MarginalParams(beta=np.array([5.5]), log_sigma=np.array(0.0), chol=(np.array([1.0]),))
        >>> parts = [mj.marginal_loglik_by_level(p, batch.design).sum() for batch in batches.epoch(0)]
        >>> total = batches.scale * np.mean(parts)
        >>> bool(np.isclose(total, mj.marginal_loglik(p, design), rtol=1e-5))
        True
    """
    return GroupBatches(design, size, key)
