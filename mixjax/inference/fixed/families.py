"""Families of t tests: p values and simultaneous intervals, and what a table says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import betainccinv, chdtri, expm1, log1p

from mixjax.distributions import f_tail, t_quantile, t_tail
from mixjax.inference.fixed.simultaneous import LargestT, studentized_range_quantile, studentized_range_tail

COLUMNS = ["estimate", "std_error", "df", "lower", "upper", "statistic", "p_value"]
ADJUSTMENTS = ("none", "tukey", "dunnett", "mvt", "sidak", "scheffe", "holm", "bonferroni", "fdr")
# What R's emmeans, p.adjust and multcomp call them.
SPELLINGS = {"dunnettx": "dunnett", "bh": "fdr", "single-step": "mvt", "hsd": "tukey"}
# They order p values, and no interval belongs to them.
WITHOUT_INTERVALS = {"holm": "bonferroni", "fdr": "bonferroni"}


class Combinations(NamedTuple):
    """Linear combinations ``(r,)`` of the fixed effects; NaN where they cannot be estimated.

    Attributes:
        estimate, std_error, df: ``(r,)``, std_error 0 of what the model makes zero.
        root: ``(r, d)``; inner products of rows are covariances.
    """

    estimate: np.ndarray
    std_error: np.ndarray
    df: np.ndarray
    root: np.ndarray


class FamilyTests(NamedTuple):
    """Rows of a table, and what its note needs.

    Attributes:
        table: ``COLUMNS``. error: of p values by quasi-Monte Carlo, else 0. ranks: of the families' contrasts.
    """

    table: pd.DataFrame
    error: float
    ranks: tuple[int, ...]


def adjustment_named(adjust: Any) -> str:
    """One of ``ADJUSTMENTS``, in whatever case, or by R's name.

    Raises:
        ValueError: there is no such adjustment.
    """
    name = adjust.lower() if isinstance(adjust, str) else ""
    name = SPELLINGS.get(name, name)
    if name not in ADJUSTMENTS:
        raise ValueError(f"adjust must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust!r}")
    return name


def family_tests(
    found: Combinations,
    adjust: str = "none",
    level: float = 0.95,
    rhs: Any = 0.0,
    family: np.ndarray | None = None,
    means: int = 0,
) -> FamilyTests:
    """t tests with adjusted p values and the intervals that belong to them.

    Every test keeps its own degrees of freedom: where these differ in a family, each is judged by the distribution
    that the whole family would have under them. Tests without a standard error do not count.

    Args:
        found: ``r`` combinations. adjust: one of ``ADJUSTMENTS``. level: joint coverage of a family's intervals.
        rhs: ``(r,)`` or scalar, the values under the hypotheses.
        family: ``(r,)`` numbers of families; None: all are one. means: how many means Tukey's families compare.
    """
    estimate, std_error, df, root = found
    with np.errstate(invalid="ignore", divide="ignore"):
        statistic = np.where(std_error > 0, (estimate - rhs) / std_error, np.nan)
    p = 2.0 * np.asarray(t_tail(np.abs(statistic), df))
    critical, error, ranks = np.full(len(p), np.nan), 0.0, []
    family = np.zeros(len(p), int) if family is None else family
    for one in dict.fromkeys(family.tolist()):
        rows = np.flatnonzero((family == one) & np.isfinite(statistic) & (df > 0))
        if not len(rows):
            continue
        B = root[rows] / np.linalg.norm(root[rows], axis=1, keepdims=True)
        t, own_df, own_p = np.abs(statistic[rows]), df[rows], p[rows]
        ranks.append(int(np.linalg.matrix_rank(B, tol=1e-7)))
        if adjust in ("dunnett", "mvt"):
            largest = LargestT(B)
            p[rows], of_these = largest.tail(t, own_df)
            error = max(error, of_these)
            critical[rows] = largest.quantiles(level, own_df)
        else:
            p[rows] = _adjusted(own_p, t, own_df, adjust, means, ranks[-1])
            # Degrees of freedom that differ by roundings only share one.
            found_at = {f"{d:.11g}": d for d in own_df}
            found_at = {key: _critical(level, d, len(rows), adjust, means, ranks[-1]) for key, d in found_at.items()}
            critical[rows] = [found_at[f"{d:.11g}"] for d in own_df]
    columns = (estimate, std_error, df, estimate - critical * std_error, estimate + critical * std_error, statistic, p)
    return FamilyTests(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))), error, tuple(ranks))


def _adjusted(p: np.ndarray, t: np.ndarray, df: np.ndarray, adjust: str, means: int, rank: int) -> np.ndarray:
    m = len(p)
    if adjust == "bonferroni":
        bounded: np.ndarray = np.minimum(1.0, m * p)
        return bounded
    if adjust == "sidak":  # Šidák (1967), J. Am. Stat. Assoc. 62, 626
        joint: np.ndarray = -expm1(m * log1p(-p))
        return joint
    if adjust == "scheffe":  # Scheffé (1953), Biometrika 40, 87
        return np.asarray(f_tail(t**2 / rank, rank, df))
    if adjust == "holm":  # Holm (1979), Scand. J. Stat. 6, 65
        order = np.argsort(p, kind="stable")
        return _back(order, np.minimum(1.0, np.maximum.accumulate((m - np.arange(m)) * p[order])))
    if adjust == "fdr":  # Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57, 289
        order = np.argsort(-p, kind="stable")
        return _back(order, np.minimum(1.0, np.minimum.accumulate(m / (m - np.arange(m)) * p[order])))
    if adjust == "tukey":  # Tukey (1953); Kramer (1956), Biometrics 12, 307, where standard errors differ
        return studentized_range_tail(np.sqrt(2.0) * t, means, df)
    return p


def _back(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    result = np.empty_like(values)
    result[order] = values
    return result


def _critical(level: float, df: float, m: int, adjust: str, means: int, rank: int) -> float:
    """How many standard errors an interval reaches to each side."""
    adjust, alpha = WITHOUT_INTERVALS.get(adjust, adjust), 1.0 - level
    if adjust == "tukey":
        critical: float = studentized_range_quantile(level, means, df) / np.sqrt(2.0)
        return critical
    if adjust == "scheffe":
        return float(np.sqrt(rank * _f_quantile(level, rank, df)))
    if adjust == "sidak":
        alpha = -expm1(np.log(level) / m)
    elif adjust == "bonferroni":
        alpha /= m
    return float(-t_quantile(alpha / 2.0, df))


def _f_quantile(level: float, df: float, den_df: float) -> float:
    if np.isinf(den_df):
        return float(chdtri(df, 1.0 - level) / df)
    x = float(betainccinv(den_df / 2.0, df / 2.0, level))  # den_df / (den_df + df F)
    return den_df * (1.0 - x) / (df * x)


def family_note(
    adjust: str,
    level: float | None,
    tests: int,
    means: int = 0,
    within: Sequence[str] = (),
    found: FamilyTests | None = None,
) -> str:
    """The note on p values and intervals of a table.

    Args:
        level: of the intervals, None where there are none. tests: of a family. means: that Tukey's families compare.
        within: names of the factors in whose levels families lie.
    """
    intervals = "" if level is None else f"{100 * level:g} % intervals"
    what = f"p values and {intervals}" if intervals else "p values"
    if adjust == "none":
        return f"{what} not adjusted"
    of: Mapping[str, str] = {
        "tukey": f"tukey for a family of {means} means",
        "dunnett": f"dunnett (multivariate t) for {_count(tests)}",
        "mvt": f"mvt (multivariate t) for {_count(tests)}",
        "scheffe": f"scheffe with rank {_range(found.ranks if found else ())}",
    }
    how = of.get(adjust, f"{adjust} for {_count(tests)}")
    where = f", within {' and '.join(within)}" if within else ""
    if adjust in WITHOUT_INTERVALS and intervals:
        other = WITHOUT_INTERVALS[adjust]
        return f"p values adjusted by {how}, {intervals} by {other} ({adjust} has none){where}"
    error = f", error of p values about {found.error:.0e}" if found and found.error else ""
    return f"{what} adjusted by {how}{error}{where}"


def _count(tests: int) -> str:
    return f"{tests} test{'s' * (tests != 1)}"


def _range(ranks: tuple[int, ...]) -> str:
    if not ranks:
        return "0"
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
