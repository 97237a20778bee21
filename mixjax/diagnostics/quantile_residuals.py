"""Simulated (quantile) residuals: where each response stands among responses that the model gives.

They need nothing of a model but that it can be simulated from, so they are the same for every family of responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from scipy.special import ndtri

from mixjax.checks import DataError, check_count
from mixjax.fitted.either import any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.machine import float64
from mixjax.markup import Report, Reported
from mixjax.simulation import raw_key
from mixjax.tables import NotedTable, frame_report

# Numbers in all simulated responses together.
MOST_NUMBERS = 2**27
CHECKS = {
    "uniformity": "Kolmogorov-Smirnov distance of the residuals from uniformity: is the whole shape right?",
    "dispersion": "variance around the simulated means, relative to the model's: too much or too little spread?",
    "outliers": "share of responses outside all simulated ones: are there more extremes than the model gives?",
    "zeros": "share of zeros: are there more or fewer than the model gives?",
}
# Numbers with more values are cut into so many groups.
BINS = 10
# Families of counts, of which zeros are looked at.
COUNTS = ("poisson", "nbinom")


def scaled_residuals(y: np.ndarray, simulated: np.ndarray, key: Any = 0) -> np.ndarray:
    """Place of every response among simulated ones, between 0 and 1; uniform where the model is right.

    ``(r + u) / (B + 1)``, r the number of simulated values below the response and u uniform: exactly uniform if y and
    the B simulated responses are draws of one distribution. Among ties, as counts have, the place is drawn too (Dunn &
    Smyth 1996, J. Comput. Graph. Stat. 5, 236). DHARMa's residuals without u.

    Args:
        y: ``(n,)``. simulated: ``(B, n)``. key: int or JAX key of the random places.

    Returns:
        ``(n,)``.

    Example:
        >>> import numpy as np
        >>> from mixjax.diagnostics.quantile_residuals import scaled_residuals
        >>> simulated = np.arange(99.0)[:, None] * np.ones(3)
        >>> scaled_residuals(np.array([-1.0, 49.5, 200.0]), simulated).round(1)
        array([0. , 0.5, 1. ])
    """
    y, simulated = np.asarray(y, np.float64), np.asarray(simulated, np.float64)
    if y.ndim != 1 or simulated.ndim != 2 or simulated.shape[1] != len(y) or not len(simulated):
        raise ValueError(f"y must be (n,) and simulated (B, n), got {y.shape} and {simulated.shape}")
    below, equal = (simulated < y).sum(0), (simulated == y).sum(0)
    with float64():
        u = np.asarray(jax.random.uniform(raw_key(key), y.shape))
    quantiles: np.ndarray = (below + u * (equal + 1)) / (len(simulated) + 1)
    return quantiles


def quantile_residuals(
    fitted: Any, key: Any = 0, n: int = 250, random: Literal["new", "fitted"] = "new"
) -> QuantileResiduals:
    """Residuals of a fit by simulation from it, as R's DHARMa makes them; of counts and outcomes too, where no other
    residual has a known distribution.

    Args:
        fitted: the fit, with its rows, of a linear or a generalised linear mixed model.
        key: int or JAX key.
        n: simulated data sets.
        random: ``"new"``: random effects are drawn anew, so that all of the model is checked, its random effects too;
            residuals of one level then depend on each other. ``"fitted"``: they are the predicted ones, and the
            residual distribution alone is checked; predicted effects take up part of what is wrong.

    Returns:
        :class:`QuantileResiduals`.

    Parameters are taken as known: with few rows per parameter residuals look a little better than they are.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.quantile_residuals import quantile_residuals
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> found = quantile_residuals(fit.record, key=1)
        >>> found.tests().index.tolist()
        ['uniformity', 'dispersion', 'outliers']
    """
    fitted, n = any_record_of(fitted), check_count("n", n, 1)
    if random not in ("new", "fitted"):
        raise ValueError(f"random must be 'new' or 'fitted', got {random!r}")
    y = np.asarray(fitted.design.y, np.float64)
    if n * fitted.nobs > MOST_NUMBERS:
        raise ValueError(
            f"{n} simulations of {fitted.nobs} rows take too much memory: use n={MOST_NUMBERS // fitted.nobs}"
        )
    with float64():
        own, places = jax.random.split(raw_key(key))
    Y = fitted.simulate(own, n, random=random)
    zeros = isinstance(fitted, GeneralizedFitted) and fitted.family.plain.name in COUNTS
    return QuantileResiduals(y, Y, places, fitted.labels.frame, f"random effects {random}", zeros)


@dataclass(frozen=True, eq=False)
class QuantileResiduals(Reported):
    """Simulated residuals. ``str()`` shows the tests.

    Attributes:
        y: ``(n,)``. simulated: ``(B, n)``. key: of the places among ties.
        frame: table of the rows. what: how they were simulated. zeros: responses are counts, whose zeros are tested.
    """

    y: np.ndarray = field(repr=False)
    simulated: np.ndarray = field(repr=False)
    key: Any = field(repr=False)
    frame: pd.DataFrame | None = field(repr=False)
    what: str
    zeros: bool = False

    @cached_property
    def values(self) -> pd.Series:
        """Residuals ``(n,)`` between 0 and 1; see :func:`scaled_residuals`."""
        index = None if self.frame is None else self.frame.index
        return pd.Series(scaled_residuals(self.y, self.simulated, self.key), index, name="quantile_residual")

    @property
    def normal(self) -> pd.Series:
        """The same as standard normal quantiles ``(n,)``: normal where the model is right (Dunn & Smyth 1996)."""
        return pd.Series(ndtri(self.values.to_numpy()), self.values.index, name="quantile_residual")

    def to_frame(self) -> pd.DataFrame:
        """The rows with ``.quantile_resid`` beside them."""
        frame = pd.DataFrame(index=self.values.index) if self.frame is None else self.frame
        return frame.assign(**{".quantile_resid": self.values})

    @cached_property
    def _ranks(self) -> np.ndarray:
        """``(B + 1, n)`` places of the response, first, and of every simulated one among all of them, 0 to B."""
        return _ranks(np.vstack([self.y, self.simulated]), self.key)

    def tests(self) -> pd.DataFrame:
        """Is the response one of those that the model gives? One row per check.

        A statistic of the response is compared with the same statistic of every simulated response, each with its
        places among all others. p values are therefore right also where residuals depend on each other, as those of
        one level do, and where n is small (Barnard's Monte Carlo test; Davison & Hinkley 1997, section 4.2); they are
        no smaller than ``1 / (B + 1)``.

        Of counts there is a fourth, of the share of zeros.

        Returns:
            DataFrame: ``statistic``, ``expected`` (mean over simulated responses) and ``p_value`` (two-sided, of
            uniformity one-sided); notes below (``attrs["notes"]``) say what each looks at.
        """
        statistics = {
            "uniformity": _distance(self._ranks),
            "dispersion": _dispersion(self.y, self.simulated),
            "outliers": _outliers(self._ranks),
        }
        if self.zeros:
            statistics["zeros"] = np.concatenate([[(self.y == 0).mean()], (self.simulated == 0).mean(1)])
        sides = {"uniformity": "above"}
        rows = {name: row_of(values, sides.get(name, "both")) for name, values in statistics.items()}
        return NotedTable(pd.DataFrame.from_dict(rows, orient="index"), self._check_notes())

    def by(self, groups: Any, bins: int | None = None) -> pd.DataFrame:
        """Uniformity within every group of rows.

        Args:
            groups: column of the table, or ``(n,)`` labels or numbers.
            bins: cut numbers of more values into so many groups of about equal size. None: ten, of numbers that are not
                whole and have more than ten values; whole numbers are labels, as those of subjects are.

        Returns:
            DataFrame, one row per group: ``n``, ``mean`` residual, ``statistic``, ``expected``, ``p_value``, and
            ``p_holm``, adjusted for the number of groups (Holm 1979).

        Raises:
            DataError: no such column, or missing labels; ``bins`` of what is no numbers.
        """
        codes, names = self._groups(groups, bins)
        rows = []
        for g in range(len(names)):
            ranks = self._ranks[:, codes == g]
            rows.append(
                {"n": ranks.shape[1], "mean": self.values[codes == g].mean()} | row_of(_distance(ranks), "above")
            )
        frame = pd.DataFrame(rows, index=names)
        order = np.argsort(frame["p_value"].to_numpy(), kind="stable")
        steps = np.maximum.accumulate((len(order) - np.arange(len(order))) * frame["p_value"].to_numpy()[order])
        adjusted = np.empty(len(order))
        adjusted[order] = np.minimum(1.0, steps)
        return frame.assign(p_holm=adjusted)

    def recalculate(self, groups: Any, bins: int | None = None) -> QuantileResiduals:
        """Residuals of the mean response of every group of rows: what is wrong between groups.

        Args:
            groups, bins: as of :meth:`by`.
        """
        codes, names = self._groups(groups, bins)
        count = np.bincount(codes)
        sums = np.stack([np.bincount(codes, row, len(names)) for row in np.vstack([self.y, self.simulated])]) / count
        return QuantileResiduals(
            sums[0], sums[1:], self.key, pd.DataFrame(index=names), f"{self.what}, means of groups"
        )

    def _groups(self, groups: Any, bins: int | None) -> tuple[np.ndarray, pd.Index]:
        if isinstance(groups, str):
            if self.frame is None or groups not in self.frame:
                there = "no table was kept" if self.frame is None else f"there are {', '.join(map(str, self.frame))}"
                raise DataError(f"there is no column {groups!r} ({there}); pass labels of the rows instead")
            groups = self.frame[groups]
        if np.shape(groups) != self.y.shape:
            raise DataError(f"groups must be {len(self.y)} labels, one per row, got shape {np.shape(groups)}")
        if (cut := _binned(groups, bins)) is not None:
            return cut
        codes, names = pd.factorize(pd.Series(groups).to_numpy() if not hasattr(groups, "array") else groups, sort=True)
        if (codes < 0).any():
            raise DataError(f"groups has {int((codes < 0).sum())} missing labels")
        return codes, pd.Index(names)

    def __str__(self) -> str:
        frame = pd.DataFrame(self.tests())
        return "\n".join([self._head(), frame.to_string(float_format=lambda x: f"{x:.4g}"), *self._check_notes()])

    def _report(self) -> Report:
        formats = dict.fromkeys(("statistic", "expected"), "{:.4g}")
        return frame_report(pd.DataFrame(self.tests()), [self._head()], self._check_notes(), formats=formats)

    def _head(self) -> str:
        return f"simulated residuals of {len(self.y)} responses, {len(self.simulated)} simulations, {self.what}"

    def _check_notes(self) -> list[str]:
        return [f"{name}: {text}" for name, text in CHECKS.items() if name != "zeros" or self.zeros]

    __repr__ = __str__


def _binned(groups: Any, bins: int | None) -> tuple[np.ndarray, pd.Index] | None:
    """Numbers cut into groups of about equal size: codes ``(n,)`` and intervals; None of what is to stay as it is."""
    values = pd.Series(np.asarray(groups)) if not hasattr(groups, "dtype") else pd.Series(groups)
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if bins is None:
        if not numeric or values.isna().any() or values.nunique() <= BINS or (values == np.round(values)).all():
            return None
        bins = BINS
    bins = check_count("bins", bins, 2)
    if not numeric or values.isna().any():
        what = f"{int(values.isna().sum())} missing values" if numeric else f"{values.dtype} values"
        raise DataError(f"bins= cuts numbers, and groups has {what}")
    if values.nunique() <= bins:
        return None
    cut = pd.qcut(values.to_numpy(float), bins, precision=4, duplicates="drop")
    codes, names = pd.factorize(cut, sort=True)
    return codes, pd.IntervalIndex(list(names))


# --- statistics of all data sets, the observed one first ------------------------------------------------------------


def _ranks(all_y: np.ndarray, key: Any) -> np.ndarray:
    """Places along the first axis, ties in random order."""
    with float64():
        seed = np.asarray(jax.random.key_data(key)).ravel()
    ranks = np.empty(all_y.shape, np.int32)
    size = max(1, 2**22 // len(all_y))
    for first in range(0, all_y.shape[1], size):
        part = all_y[:, first : first + size]
        order = np.argsort(part, axis=0, kind="stable")
        in_order = np.take_along_axis(part, order, 0)
        if (in_order[1:] == in_order[:-1]).any():
            noise = np.random.default_rng([*seed, first]).random(part.shape)
            order = np.lexsort((noise, part), axis=0)
        np.put_along_axis(ranks[:, first : first + size], order, np.arange(len(all_y), dtype=np.int32)[:, None], 0)
    return ranks


def _distance(ranks: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov distance of each data set's residuals from the uniform distribution, ``(B + 1,)``."""
    m, n = ranks.shape
    u = (np.sort(ranks, axis=1) + 0.5) / m
    i = np.arange(n)
    distance: np.ndarray = np.maximum(((i + 1) / n - u).max(1), (u - i / n).max(1))
    return distance


def _dispersion(y: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """Mean squared deviation from the mean of the *other* data sets, relative to their average."""
    all_y = np.vstack([y, simulated])
    m = len(all_y)
    total = all_y.sum(0)
    squares = ((all_y - (total - all_y) / (m - 1)) ** 2).mean(1)
    ratio: np.ndarray = squares / squares[1:].mean()
    return ratio


def _outliers(ranks: np.ndarray) -> np.ndarray:
    """Share of responses below or above those of all other data sets."""
    share: np.ndarray = ((ranks == 0) | (ranks == len(ranks) - 1)).mean(1)
    return share


def row_of(values: np.ndarray, side: str) -> dict[str, float]:
    """A statistic of the response, first, and of every simulated one: ``statistic``, ``expected``, and the Monte Carlo
    ``p_value`` of how far above the others it lies, or on either side."""
    observed, others = values[0], values[1:]
    rounding = 1e-12 * max(1.0, abs(observed))
    m = len(values)
    above = (1 + (others >= observed - rounding).sum()) / m
    below = (1 + (others <= observed + rounding).sum()) / m
    p = min(1.0, 2 * min(above, below)) if side == "both" else above
    return {"statistic": float(observed), "expected": float(others.mean()), "p_value": float(p)}
