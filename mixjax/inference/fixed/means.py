"""Marginal means of factors and slopes of covariates, over a reference grid, as R's emmeans defines them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_level
from mixjax.distributions import studentized_range_tail, t_quantile, t_tail
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed.contrasts import ddf_note, t_tests
from mixjax.inference.fixed.grid import FixedPart, Rows, as_text, check_names, names_of, reference_grid
from mixjax.markup import Report, Reported
from mixjax.tables import NotedTable, frame_report

TESTS = ["estimate", "std_error", "df", "statistic", "p_value"]
METHODS = ("pairwise", "trt.vs.ctrl", "eff")
ADJUSTMENTS = ("tukey", "holm", "bonferroni", "none")
NOT_ESTIMABLE = "NaN: not estimable, because columns of X were left out of the fit"
SAME = "df NaN: the model makes these equal, whatever the data"


# --- results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MarginalMeans(Reported):
    """Marginal means, or slopes: linear functions of the fixed effects for the cells of some factors.

    Attributes:
        cells: the factors, one row per mean; those of ``by`` first, the last varies fastest.
        by: names of the factors whose levels are looked at one by one.
        W: ``(k, p)`` weights of the fixed effects. offset: ``(k,)`` known parts.
        open: ``(k, d)``, not zero where a mean depends on columns that were left out of the fit.
        title: what ``str()`` says above.
        ddf, level: method of the degrees of freedom, coverage of the intervals.
    """

    fitted: Fitted
    cells: pd.DataFrame
    by: tuple[str, ...]
    W: np.ndarray
    offset: np.ndarray
    open: np.ndarray
    title: str
    ddf: str
    level: float

    def to_frame(self) -> pd.DataFrame:
        """The cells with estimate, std_error, df, lower, upper; printed with notes (``attrs["notes"]``)."""
        tests = self._tests(np.eye(len(self.W)))
        half = t_quantile(0.5 + self.level / 2, tests["df"]) * tests["std_error"]
        estimates = tests[["estimate", "std_error", "df"]]
        limits = {"lower": tests["estimate"] - half, "upper": tests["estimate"] + half}
        frame = pd.concat([self.cells, estimates.assign(**limits)], axis=1)
        return NotedTable(frame, (f"{ddf_note(self.ddf)}, {100 * self.level:g} % intervals", *_notes(frame)))

    def contrasts(self, method: Any = "pairwise", adjust: str | None = None) -> pd.DataFrame:
        """Compare the means within every cell of ``by``; p values are adjusted within it, too.

        Args:
            method: ``"pairwise"``: all differences, earlier minus later; ``"trt.vs.ctrl"``: each minus the first;
                ``"eff"``: each minus their average; or a dict name -> weights, one per mean.
            adjust: ``"tukey"`` (pairwise only; studentized range of all means, also of those that cannot be
                estimated), ``"holm"``, ``"bonferroni"`` or ``"none"``. None: tukey for pairwise, none for weights of
                your own, holm otherwise.

        Returns:
            DataFrame: the columns of ``by``, contrast, estimate, std_error, df, statistic, p_value. When printed it
            says how its p values came about (``attrs["notes"]``).

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("angle ~ recipe + (1 | recipe:replicate)", mj.datasets.load("cake"))
            >>> print(fit.emmeans("recipe").contrasts()[["contrast", "p_value"]].round(3))
              contrast  p_value
            0    A - B     0.82
            1    A - C     0.81
            2    B - C     1.00
        """
        if adjust is None:
            adjust = "none" if isinstance(method, Mapping) else "tukey" if method == "pairwise" else "holm"
        if adjust not in ADJUSTMENTS:
            raise ValueError(f"adjust must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust!r}")
        if adjust == "tukey" and method != "pairwise":
            raise ValueError("adjust='tukey' is for all pairwise differences; use 'holm'")
        others = self.cells.drop(columns=list(self.by))
        groups = np.arange(len(self.cells)).reshape(-1, len(others.drop_duplicates()) if len(others.columns) else 1)
        names = [" ".join(map(as_text, row)) for row in others.itertuples(index=False)]
        weights, labels, family = [], [], []
        for g, rows in enumerate(groups):
            for label, w in _weights(method, [names[i] for i in rows]).items():
                weights.append(np.zeros(len(self.W)))
                weights[-1][rows] = w
                labels.append(label)
                family.append(g)
        table = np.reshape(weights, (-1, len(self.W)))
        frame = self._tests(table)
        for g in range(len(groups)):
            own = np.array(family, int) == g
            p, t, df = (frame[name].to_numpy()[own] for name in ("p_value", "statistic", "df"))
            # As in emmeans, the family is that of all means, also of those that cannot be estimated.
            frame.loc[own, "p_value"] = _adjusted(p, t, df, adjust, groups.shape[1])
        first = groups[:, 0][np.array(family, int)]
        where = {name: self.cells[name].take(first).reset_index(drop=True) for name in self.by}
        result = pd.concat([pd.DataFrame(where | {"contrast": labels}), frame], axis=1)
        of = f"a family of {groups.shape[1]} means" if adjust == "tukey" else f"{len(labels) // len(groups)} tests"
        how = "not adjusted" if adjust == "none" else f"adjusted by {adjust} for {of}"
        how += f", within {' and '.join(self.by)}" if self.by and adjust != "none" else ""
        return NotedTable(result, (f"{ddf_note(self.ddf)}, p values {how}", *_notes(frame)))

    def _estimable(self, weights: np.ndarray) -> np.ndarray:
        return (np.abs(weights @ self.open) <= 1e-8 * (np.abs(weights) @ np.abs(self.open))).all(axis=1)

    def _tests(self, weights: np.ndarray) -> pd.DataFrame:
        """t tests of combinations ``(r, k)`` of the means."""
        L = weights @ self.W
        # Differences that cancel leave roundings, which no standard error should be made of.
        L = np.where(np.abs(L) <= 1e-13 * (np.abs(weights) @ np.abs(self.W)), 0.0, L)
        exists = self._estimable(weights)
        some = exists & L.any(axis=1)
        frame = pd.DataFrame(np.full((len(L), len(TESTS)), np.nan), columns=TESTS)
        frame.loc[exists & ~some, ["estimate", "std_error"]] = 0.0
        if some.any():
            frame.loc[some] = t_tests(self.fitted, L[some], ddf=self.ddf)[TESTS].to_numpy()
        known = weights @ self.offset
        if known.any():
            frame["estimate"] += known
            frame["statistic"] = frame["estimate"] / frame["std_error"].where(frame["std_error"] > 0)
            t, df = frame["statistic"].abs(), frame["df"]
            frame["p_value"] = 2.0 * t_tail(t, df)
        return frame

    def _report(self) -> Report:
        frame = self.to_frame()
        return frame_report(frame, [self.title], frame.attrs["notes"])

    def __str__(self) -> str:
        frame = self.to_frame()
        text = frame.to_string(index=False, float_format=lambda x: f"{x:.5g}")
        return "\n".join([self.title, text, *frame.attrs["notes"]])

    __repr__ = __str__


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    notes = [NOT_ESTIMABLE] * bool(frame["estimate"].isna().any())
    return tuple(notes + [SAME] * bool((frame["std_error"] == 0).any()))


def _weights(method: Any, names: list[str]) -> dict[str, np.ndarray]:
    k = len(names)
    eye = np.eye(k)
    if isinstance(method, Mapping):
        if not method:
            raise ValueError("method= is a dict without a contrast: name -> weights, one for every mean")
        weights = {str(name): np.asarray(w, float) for name, w in method.items()}
        for name, w in weights.items():
            if w.shape != (k,) or not np.isfinite(w).all():
                raise ValueError(f"the contrast '{name}' needs {k} finite weights, for {', '.join(names)}; got {w}")
        return weights
    if method == "pairwise":
        return {f"{names[i]} - {names[j]}": eye[i] - eye[j] for i, j in itertools.combinations(range(k), 2)}
    if method == "trt.vs.ctrl":
        return {f"{names[i]} - {names[0]}": eye[i] - eye[0] for i in range(1, k)}
    if method == "eff":
        return {f"{names[i]} effect": eye[i] - 1.0 / k for i in range(k)}
    raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))} or a dict of weights, got {method!r}")


def _adjusted(p: np.ndarray, t: np.ndarray, df: np.ndarray, adjust: str, means: int) -> np.ndarray:
    """p values for a family that compares so many means; missing ones stay missing and do not count."""
    there = ~np.isnan(p)
    m = int(there.sum())
    result = p.copy()
    if adjust == "bonferroni":
        result[there] = np.minimum(1.0, m * p[there])
    elif adjust == "holm":  # Holm (1979), Scand. J. Stat. 6, 65
        order = np.argsort(p[there])
        steps = np.maximum.accumulate((m - np.arange(m)) * p[there][order])
        result[np.flatnonzero(there)[order]] = np.minimum(1.0, steps)
    elif adjust == "tukey" and m:
        q = np.sqrt(2.0) * np.abs(t[there])
        range_p = p[there] if means == 2 else studentized_range_tail(q, means, df[there])
        # What the integral loses far out lies between the unadjusted and Bonferroni's.
        result[there] = np.clip(range_p, p[there], np.minimum(1.0, means * (means - 1) / 2 * p[there]))
    return result


# --- means and slopes ---------------------------------------------------------------------------------------------


def emmeans(
    fitted: Fitted,
    spec: Any,
    by: Any = None,
    at: Mapping[str, Any] | None = None,
    ddf: str = "satterthwaite",
    level: float = 0.95,
) -> MarginalMeans:
    """Marginal means of factors over a reference grid, as R's ``emmeans``.

    The grid crosses all levels of all factors of the fixed effects; covariates are held at their means over the rows,
    and those of only two values are treated as factors. Means average over the factors that are not named, with equal
    weights. An ``offset(...)`` is part of the means; an ``offset=`` counts with its mean. Random effects are zero.

    Args:
        fitted: the fit.
        spec: a factor, a list of factors, or ``"1"`` for the overall mean. A covariate only with values in ``at``.
        by: factors within whose levels contrasts are made.
        at: variable -> value or values to use instead of the mean, or of all levels.
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``.
        level: coverage of the intervals.

    Returns:
        MarginalMeans: ``.to_frame()``, ``.contrasts()``, ``str()``. NaN where a cell cannot be estimated because
        columns of X were left out of the fit.

    Raises:
        DataError: unknown variables or levels, the response, a covariate without values.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.means import emmeans
        >>> fit = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> print(emmeans(fit.record, "recipe"))
        marginal means of recipe (averaged over temperature)
        recipe  estimate  std_error  df  lower  upper
             A    33.122     1.7368  42 29.617 36.627
             B    31.644     1.7368  42 28.139  35.15
             C      31.6     1.7368  42 28.095 35.105
        satterthwaite degrees of freedom, 95 % intervals
    """
    model = FixedPart(fitted)
    return _averages(fitted, model, spec, by, at, ddf, level, "marginal means", model.rows)


def emtrends(
    fitted: Fitted,
    spec: Any,
    var: str,
    by: Any = None,
    at: Mapping[str, Any] | None = None,
    ddf: str = "satterthwaite",
    level: float = 0.95,
) -> MarginalMeans:
    """Slopes of the mean in a covariate, by factors: the derivative of :func:`emmeans`, as R's ``emtrends``.

    Derivatives of the model matrix are taken by five-point differences: exact where it is a polynomial of up to fourth
    degree in the covariate, to 1e-9 or so where it is smooth.

    Args:
        fitted: the fit.
        spec: a factor, a list of factors, or ``"1"`` for the average slope.
        var: the covariate; held at its mean, or at the values of ``at``.
        by, at, ddf, level: as in :func:`emmeans`.

    Returns:
        MarginalMeans; estimates are changes of the response per unit of ``var``.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.means import emtrends
        >>> fit = mj.lmm("distance ~ age * Sex + (age | Subject)", mj.datasets.load("Orthodont"))
        >>> emtrends(fit.record, "Sex", "age").to_frame().round(3)
              Sex  estimate  std_error    df  lower  upper
        0    Male     0.784      0.086  25.0  0.607  0.961
        1  Female     0.480      0.104  25.0  0.266  0.693
    """
    model = FixedPart(fitted)
    if not isinstance(var, str):
        raise ValueError(f"var must be the name of a covariate, got {var!r}")
    check_names(model, [var], "var=")
    if not model.is_number(var):
        raise DataError(f"'{var}' is a factor, which has no slope; compare its levels with emmeans")
    model.factors.pop(var, None)  # a covariate of two values
    column = model.frame[var].to_numpy(float)
    return _averages(
        fitted, model, spec, by, at, ddf, level, f"slopes of {var}", _slopes_in(model, var, column.min(), column.max())
    )


def _averages(
    fitted: Fitted,
    model: FixedPart,
    spec: Any,
    by: Any,
    at: Mapping[str, Any] | None,
    ddf: str,
    level: float,
    what: str,
    rows_of: Callable[[pd.DataFrame], Rows],
) -> MarginalMeans:
    check_level(level)
    at = {} if at is None else at
    if not isinstance(at, Mapping):
        raise ValueError(f"at must be a dict of variables and their values, got {at!r}")
    names, groups = names_of(spec, "spec"), names_of(by, "by")
    check_names(model, names, "spec")
    check_names(model, groups, "by=")
    if both := [name for name in names if name in groups]:
        raise ValueError(f"{', '.join(map(repr, both))} cannot be both what is compared and by=, within which it is")
    check_names(model, list(at), "at=")
    shown = [*groups, *(name for name in names if name not in groups)]
    grid = reference_grid(model, shown, at)
    rows = rows_of(grid.table)
    k = len(grid.cells)
    title = what + (f" of {' and '.join(names)}" if names and what == "marginal means" else "")
    title += (f" by {' and '.join(groups)}" if groups else "") + (f" ({grid.others})" if grid.others else "")
    W, free = model.weights(rows.X.reshape(k, -1, rows.X.shape[1]).mean(axis=1))
    offset = rows.offset.reshape(k, -1).mean(axis=1)
    return MarginalMeans(fitted, grid.cells, tuple(groups), W, offset, free, title, ddf, level)


def _slopes_in(model: FixedPart, var: str, lowest: float, highest: float) -> Callable[[pd.DataFrame], Rows]:
    """Derivatives of rows with respect to a covariate.

    Steps and places are whole multiples of a power of two and the weights are integers, so that no rounding enters the
    differences of what is linear. Where a central stencil would leave the range of the data, which splines may refuse,
    it is moved inwards.
    """
    h = 2.0 ** np.round(np.log2((highest - lowest) * 2.0**-12))
    unit = h * 2.0**-26

    def rows_of(grid: pd.DataFrame) -> Rows:
        x = np.round(grid[var].to_numpy(float) / unit) * unit
        inside = (x >= lowest - unit) & (x <= highest + unit)
        x = np.where(inside, np.clip(x, lowest, highest), x)
        up = np.ceil(np.clip((lowest - x) / h + 2, 0, 2))
        down = np.ceil(np.clip((x - highest) / h + 2, 0, 2))
        moved = np.where(inside, up - down, 0.0)
        X: Any = 0.0
        offset: Any = 0.0
        for s in range(-2, 3):
            rows = model.rows(grid.assign(**{var: x + (s + moved) * h}))
            weight = np.array([_stencil(int(m))[s + 2] for m in moved])
            X, offset = X + weight[:, None] * rows.X, offset + weight * rows.offset
        return Rows(X / (12 * h), offset / (12 * h))

    return rows_of


@cache
def _stencil(moved: int) -> np.ndarray:
    """Weights of f at ``moved + (-2 .. 2)`` that give 12 f'(0) of every polynomial of degree four: integers."""
    nodes = moved + np.arange(-2.0, 3.0)
    return np.round(12 * np.linalg.solve(np.vander(nodes, increasing=True).T, np.eye(5)[1]))
