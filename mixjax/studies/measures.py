"""Measures of a cell: summaries of its replicates, each with its Monte Carlo standard error.

Formulas are those of Morris, White & Crowther (2019, Stat. Med. 38, 2074), table 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

MEASURES = ("mean", "bias", "empirical_se", "model_se", "relative_error_se", "rmse", "coverage", "rejection")
# Columns of the replicates that are no estimates.
OTHERS = ("result", "singular")
TEST = re.compile(r"(se|df|p|p_mixture|lrt|above)\((.*)\)")


class Value(NamedTuple):
    """A measure, its Monte Carlo standard error, and the number of replicates it rests on."""

    value: float
    mcse: float
    n: int


def mean(x: np.ndarray) -> Value:
    """Mean of the replicates."""
    n = len(x)
    return Value(float(x.mean()), float(x.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan, n)


def bias(x: np.ndarray, truth: float) -> Value:
    """Mean less the truth."""
    return mean(x - truth)


def empirical_se(x: np.ndarray) -> Value:
    """Standard deviation of the estimates."""
    n = len(x)
    if n < 2:
        return Value(np.nan, np.nan, n)
    sd = float(x.std(ddof=1))
    return Value(sd, sd / np.sqrt(2 * (n - 1)), n)


def model_se(se: np.ndarray) -> Value:
    """Root mean square of the standard errors."""
    n = len(se)
    root = float(np.sqrt((se**2).mean()))
    if n < 2 or root == 0:
        return Value(root, np.nan, n)
    return Value(root, float((se**2).std(ddof=1) / (2 * root * np.sqrt(n))), n)


def relative_error_se(x: np.ndarray, se: np.ndarray) -> Value:
    """``model_se / empirical_se - 1``."""
    model, empirical = model_se(se), empirical_se(x)
    ratio = model.value / empirical.value
    spread = np.hypot(model.mcse / model.value, empirical.mcse / empirical.value)
    return Value(ratio - 1.0, float(ratio * spread), len(x))


def rmse(x: np.ndarray, truth: float) -> Value:
    """Root mean squared error, its standard error by the delta method."""
    n = len(x)
    squares = (x - truth) ** 2
    root = float(np.sqrt(squares.mean()))
    if n < 2 or root == 0:
        return Value(root, np.nan, n)
    return Value(root, float(squares.std(ddof=1) / (2 * root * np.sqrt(n))), n)


def proportion(hits: np.ndarray) -> Value:
    """Share of true values."""
    n, share = len(hits), float(hits.mean())
    return Value(share, float(np.sqrt(share * (1 - share) / n)), n)


def covers(x: np.ndarray, se: np.ndarray, df: np.ndarray, truth: float, level: float) -> np.ndarray:
    """Whether ``x -+ t(df) se`` contains the truth; of an infinite df, the normal quantile."""
    quantile = np.where(
        np.isinf(df), stats.norm.ppf(0.5 + level / 2), stats.t.ppf(0.5 + level / 2, np.where(np.isinf(df), 1.0, df))
    )
    covered: np.ndarray = np.abs(x - truth) <= quantile * se
    return covered


def summarise(
    columns: Mapping[str, np.ndarray],
    truth: Mapping[str, float],
    measures: Sequence[str],
    level: float,
    alpha: float,
) -> pd.DataFrame:
    """Measures of every quantity of a cell: columns ``model``, ``term``, ``measure``, ``value``, ``mcse``,
    ``replicates``.

    ``replicates`` counts those with a value: those whose fit failed have none, nor have correlations beside a zero
    variance. Coverage and rejection are of those with a test.
    """
    rows = []
    for column in columns:
        model, name = split(column)
        if name in OTHERS:
            continue
        rows += [
            (model, term, measure, *value)
            for term, measure, value in _of(column, columns, truth, measures, level, alpha)
        ]
    return pd.DataFrame(rows, columns=["model", "term", "measure", "value", "mcse", "replicates"])


def _of(
    column: str,
    columns: Mapping[str, np.ndarray],
    truth: Mapping[str, float],
    measures: Sequence[str],
    level: float,
    alpha: float,
) -> list[tuple[str, str, Value]]:
    model, name = split(column)
    x = columns[column]
    there = ~np.isnan(x)
    part = TEST.fullmatch(name)
    if part:
        if part[1] not in ("p", "p_mixture") or "rejection" not in measures or not there.any():
            return []
        term = part[2] + (" (mixture)" if part[1] == "p_mixture" else "")
        return [(term, "rejection", proportion(x[there] < alpha))]
    if not there.any():
        return []
    value, known = x[there], name in truth
    found: dict[str, Callable[[], Value]] = {"mean": lambda: mean(value), "empirical_se": lambda: empirical_se(value)}
    if known:
        found |= {"bias": lambda: bias(value, truth[name]), "rmse": lambda: rmse(value, truth[name])}
    prefix = f"{model}::" if model else ""
    if f"{prefix}se({name})" in columns:
        se, df = columns[f"{prefix}se({name})"], columns[f"{prefix}df({name})"]
        with_se = se[there & ~np.isnan(se)]
        if len(with_se):
            found |= {
                "model_se": lambda: model_se(with_se),
                "relative_error_se": lambda: relative_error_se(value, with_se),
            }
        tested = there & ~np.isnan(df)
        if known and tested.any():
            found["coverage"] = lambda: proportion(covers(x[tested], se[tested], df[tested], truth[name], level))
    return [(name, measure, found[measure]()) for measure in measures if measure in found]


def untested(frame: pd.DataFrame) -> tuple[str, ...]:
    """A note where converged fits have no standard error or no test, which these measures then leave out."""
    own = frame[
        frame["measure"].isin(["model_se", "coverage", "rejection"]) & ~frame["term"].str.endswith(" (mixture)")
    ]
    keys = [name for name in frame.columns if name not in ("measure", "value", "mcse", "replicates")]
    every = frame[frame["measure"].isin(["mean", "bias", "empirical_se"])]
    if own.empty or every.empty:
        return ()
    both = (
        own.groupby(keys, dropna=False)["replicates"]
        .min()
        .to_frame("tested")
        .join(every.groupby(keys, dropna=False)["replicates"].max().rename("fitted"), how="inner")
    )
    lost = (both["fitted"] - both["tested"]).max()
    if not lost > 0:
        return ()
    return (
        f"up to {int(lost)} converged fits of a cell have no standard error or degrees of freedom: model_se, coverage "
        "and rejection are of the others (column replicates)",
    )


def split(column: str) -> tuple[str, str]:
    """A column of several models, ``name::rest``, into its parts; of one model the first is empty."""
    model, colons, rest = column.partition("::")
    return (model, rest) if colons else ("", column)
