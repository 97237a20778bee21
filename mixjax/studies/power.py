"""Power: how often a test rejects, and the smallest size at which it does so often enough."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from mixjax.checks import DataError, InferenceWarning, check_count, check_level, check_list, warn
from mixjax.fitted.names import Spellings
from mixjax.markup import Report, Reported
from mixjax.studies.describe import describe
from mixjax.studies.grid import MOST_CELLS, cell_of, combinations, source_of
from mixjax.studies.study import OPTIONS, Study, names_of_effects, study
from mixjax.tables import frame_report

# Sizes that a search looks at beside its first three.
MOST_STEPS = 12
# Columns of the table beside the grid's.
COLUMNS = ("power", "mcse", "lower", "upper", "replicates", "singular", "failed", "separated", "untested")
# Failures of which no search is to blame: the likelihood has no maximum.
ENDLESS = ("failed: SEPARATED", "failed: UNBOUNDED")


@dataclass(frozen=True, eq=False)
class Power(Reported):
    """Power by cell. ``str()`` is the table.

    Attributes:
        table: the cell's values, ``power``, its Monte Carlo standard error ``mcse``, Wilson's interval ``lower`` and
            ``upper``, the ``replicates`` with a test, ``singular`` and ``failed`` ones, and of these the ``separated``
            ones, whose estimates have no finite value, and ``untested`` ones, fits that converged and have no test, as
            of degrees of freedom that cannot be found; both where there are such.
        test: what was tested. alpha: its level. study: everything else that was found.
    """

    table: pd.DataFrame
    test: str
    alpha: float
    study: Study = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def __str__(self) -> str:
        return "\n".join([self._head(), _shown(self.table), *_failures(self.table)])

    def _report(self) -> Report:
        return _power_report(self._head(), self.table, _failures(self.table))

    def _head(self) -> str:
        return f"power of {self.test} at level {self.alpha:g}"

    __repr__ = __str__


def power(
    source: Any,
    model: str | Mapping[str, str],
    test: str,
    grid: Any = None,
    replicates: int = 1000,
    key: Any = 0,
    alpha: float = 0.05,
    level: float = 0.95,
    **options: Any,
) -> Power:
    """Share of simulated data sets in which a hypothesis is rejected.

    Args:
        source, grid, replicates, key: as for :func:`mixjax.study`.
        model: formula to fit; or dict name -> formula of two models, the smaller first, for a likelihood ratio test.
        test: fixed effect, or coefficient of a formula of the family's parameters (``"zi~x"``, ``"disp~x"``), that is
            tested against ``null=``, 0 if not given; ``"lrt"`` or ``"mixture"`` of two models:
            chi-square, or the mixture of chi-squares for a variance.
        alpha: level of the test. level: of the interval around the power.
        ``**options``: of :func:`mixjax.study`: ``ddf``, ``null``, ``reml``, ``store``, ``executor``, ...

    Returns:
        :class:`Power`. Replicates whose fit failed are counted, not taken for acceptances.

    Raises:
        DataError: there is no such fixed effect; said before anything is simulated.
        ValueError: a name of the grid would be read by nothing, or is that of a column of the table.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy")
        >>> formula = "Reaction ~ Days + (Days | Subject)"
        >>> truth = mj.scenario(formula, data, beta=[250, 5], sd=[25, 6], sigma=25)
        >>> mj.power(truth, formula, "Days", replicates=500, key=1, progress=False).table["power"].round(1).tolist()
        [0.9]
    """
    check_level(level)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    if twice := [name for name in ("models", "compared") if name in options]:
        raise ValueError(f"power takes no {', '.join(twice)}: model= and test= say what is fitted and compared")
    grid = combinations(grid, COLUMNS)
    models = {"": model} if isinstance(model, str) else dict(model)
    if test in ("lrt", "mixture"):
        if len(models) != 2:
            raise ValueError(f"test={test!r} compares two models: pass model={{'small': ..., 'large': ...}}")
        options["compared"] = [tuple(models)]
    elif models:  # before a simulation that may take hours
        named = {name: options.get(name) for name in ("family", "link", "size")}
        test = _effect(test, names_of_effects(source, list(models.values())[-1], grid, **named))
    done = study(source, model, grid, replicates, key, **options)
    column = _column(test, models)
    counted = done.counts
    endless = [name for name in ENDLESS if name in counted]
    if endless:
        counted = counted.assign(separated=counted[endless].sum(axis=1))
    names = ["singular", "failed", *["separated"] * bool(endless)]
    counts = counted[names].to_numpy().reshape(len(done.cells), len(models), len(names)).max(axis=1)
    rows = []
    for i in range(len(done.cells)):
        p = done.raw(i, [column])[column].to_numpy()
        p = p[~np.isnan(p)]
        hits = int((p < alpha).sum())
        row: dict[Any, Any] = cell_of(done.cells, i)
        row |= _share(hits, len(p), level) | dict(zip(names, counts[i].tolist(), strict=True))
        row["untested"] = max(0, done.replicates - len(p) - row["failed"])
        rows.append(row)
    if not any(row["untested"] for row in rows):
        rows = [{name: value for name, value in row.items() if name != "untested"} for row in rows]
    return Power(pd.DataFrame(rows), test, alpha, done)


def _column(test: str, models: Mapping[str, str]) -> str:
    if test in ("lrt", "mixture"):
        small, large = models
        return ("p_mixture" if test == "mixture" else "p") + f"({large}|{small})"
    prefix = f"{list(models)[-1]}::" if len(models) > 1 else ""
    return f"{prefix}p({test})"


def _effect(test: str, effects: Sequence[str]) -> str:
    """The fixed effect that a user names, or DataError with those that there are."""
    known = Spellings(effects)
    if test in known:
        return effects[known[test]]
    listed = ", ".join(effects) or "none"
    # Names such as condition[T.b], C(condition, contr.sum)[S.b] and their products with others.
    own = re.compile(rf"(?:^|:)(?:C\(\s*)?{re.escape(test)}(?:\s*[,)][^:]*)?\[")
    if any(own.search(effect) for effect in effects):
        raise DataError(
            f"{test!r} is a factor, with one fixed effect for each contrast; there are {listed}. Test one of these, or "
            "the whole factor by a likelihood ratio: test='lrt' with model={'small': formula without it, 'large': "
            "formula with it}"
        )
    raise DataError(
        f"there is no fixed effect {test!r} to test; there are {listed}. Several at once, such as a whole factor, are "
        "tested by a likelihood ratio: test='lrt' with model={'small': ..., 'large': ...}"
    )


def _share(hits: int, n: int, level: float) -> dict[str, Any]:
    """Power with Wilson's score interval (1927, J. Am. Stat. Assoc. 22, 209)."""
    if n == 0:
        return {"power": np.nan, "mcse": np.nan, "lower": np.nan, "upper": np.nan, "replicates": 0}
    share = hits / n
    interval = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    mcse = float(np.sqrt(share * (1 - share) / n))
    return {"power": share, "mcse": mcse, "lower": float(interval.low), "upper": float(interval.high), "replicates": n}


# --- sizes -----------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """``Phi^-1(power) = intercept + slope sqrt(size)``, by maximum likelihood, with the covariance ``(2, 2)``."""

    intercept: float
    slope: float
    covariance: np.ndarray

    def power(self, size: Any) -> Any:
        """Power at a size."""
        return stats.norm.cdf(self.intercept + self.slope * np.sqrt(size))

    def size(self, target: float) -> tuple[float, float]:
        """Size with this power, and its standard error on the scale of ``sqrt(size)`` by the delta method."""
        root = (stats.norm.ppf(target) - self.intercept) / self.slope
        gradient = np.array([-1.0, -root]) / self.slope
        return root, float(np.sqrt(gradient @ self.covariance @ gradient))


@dataclass(frozen=True, eq=False)
class PowerCurve(Reported):
    """Power along a size. ``str()`` shows the table and what is enough.

    Attributes:
        table: one row per size that was looked at, as :attr:`Power.table`.
        over: name of the size. target: wanted power, or None. test, alpha: as in :class:`Power`.
        curve: the smooth curve through the sizes, with a target through those near it; None where there are too few.
        smallest: smallest size allowed whose power, by the curve, reaches the target; None where none does.
        crossing, interval: where the curve reaches the target, and a 95 % interval; NaN where there is none.
        notes: what there is to say.
    """

    table: pd.DataFrame
    over: str
    target: float | None
    test: str
    alpha: float
    curve: Curve | None
    smallest: int | None
    crossing: float
    interval: tuple[float, float]
    notes: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def __str__(self) -> str:
        return "\n".join([self._head(), _shown(self.table), *self._lines()])

    def _report(self) -> Report:
        return _power_report(self._head(), self.table, self._lines())

    def _head(self) -> str:
        return f"power of {self.test} at level {self.alpha:g}, by {self.over}"

    def _lines(self) -> list[str]:
        lines = []
        if self.target is not None and self.smallest is not None:
            low, high = self.interval
            lines.append(
                f"smallest {self.over} allowed with power {self.target:g}: {self.smallest}; the curve "
                f"through the sizes near it reaches it at {self.crossing:.1f} (95 % interval {low:.1f} to {high:.1f})"
            )
        return [*lines, *self.notes, *_failures(self.table)]

    __repr__ = __str__


def power_curve(
    source: Callable[..., Any],
    model: str | Mapping[str, str],
    test: str,
    over: Mapping[str, Sequence[int]],
    target: float | None = None,
    replicates: int = 1000,
    key: Any = 0,
    alpha: float = 0.05,
    **options: Any,
) -> PowerCurve:
    """Power along the number of groups, the size of groups, or any other number.

    Args:
        source: function of the size -> :func:`mixjax.scenario`, population or fit. From pilot data
            ``lambda groups: scenario_of(fit).on(table(groups))`` of :func:`mixjax.scenario_of`.
        model, test, replicates, key, alpha, ``**options``: as for :func:`mixjax.power`.
        over: name -> sizes. Without a target power is computed at each of them. With one they are the sizes allowed,
            and the smallest that reaches it is searched: a few sizes are simulated, a probit curve in the square root
            of the size is drawn through them, and the next is simulated where it crosses the target, until that size
            and its neighbours below are known.
        target: wanted power, such as 0.8.

    Returns:
        :class:`PowerCurve`.

    Warns:
        InferenceWarning: no allowed size reaches the target, or all do.

    Example:
        >>> import mixjax as mj, numpy as np, pandas as pd
        >>> def trial(groups):
        ...     data = pd.DataFrame({"g": np.repeat(np.arange(groups), 8), "x": np.tile(np.linspace(-1, 1, 8), groups)})
        ...     return mj.scenario("y ~ x + (x | g)", data, beta=[0, 0.3], sd=[1, 0.5], sigma=1)
        >>> sizes = {"groups": range(10, 101)}
        >>> found = mj.power_curve(trial, "y ~ x + (x | g)", "x", sizes, target=0.8, key=1, progress=False)
        >>> 40 < found.smallest < 60
        True
    """
    if not isinstance(over, Mapping) or len(over) != 1:
        raise ValueError(f"over must be one name with its sizes, such as {{'groups': range(10, 61, 10)}}, got {over!r}")
    ((name, values),) = over.items()
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(f"over[{name!r}] must be a list of sizes, got {values!r}")
    listed = check_list(f"over[{name!r}]", values, MOST_CELLS)
    sizes = sorted(check_count(f"over[{name!r}]", value, 1) for value in listed)
    for size, following in itertools.pairwise(sizes):
        if size == following:
            raise ValueError(f"over[{name!r}] has {size} twice: name every size once")
    if not sizes:
        raise ValueError(f"over[{name!r}] is empty: name sizes")
    if target is not None and not alpha < target < 1:
        raise ValueError(f"target must lie between alpha = {alpha:g} and 1, got {target!r}")
    if "grid" in options:
        raise ValueError("power_curve takes no grid: over= is the one name that varies; give others to the source")
    combinations({name: sizes[:1]}, COLUMNS)
    if len(sizes) > 1 and not _depends(source, name, sizes):
        raise ValueError(
            f"the data do not depend on {name!r}: the source makes the same of {sizes[0]} and of {sizes[-1]}; pass a "
            f"function of {name} that uses it"
        )

    def at(chosen: Sequence[int]) -> pd.DataFrame:
        return power(source, model, test, {name: list(chosen)}, replicates, key, alpha, **options).table

    if target is None:
        table = at(sizes)
        return PowerCurve(table, name, None, test, alpha, _curve(table, name), None, np.nan, (np.nan, np.nan))
    return _search(at, name, sizes, target, test, alpha)


def _depends(source: Any, name: str, sizes: Sequence[int]) -> bool:
    """Whether the smallest and the largest size give other data, as far as can be seen."""
    unseen: list[str] = []
    sources = [source_of(source, {name: size}, OPTIONS) for size in (sizes[0], sizes[-1])]
    ends = [json.dumps(describe(own, unseen), sort_keys=True) for own in sources]
    return bool(unseen) or ends[0] != ends[1]


def _search(
    at: Callable[[Sequence[int]], pd.DataFrame], name: str, sizes: list[int], target: float, test: str, alpha: float
) -> PowerCurve:
    first = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    table = at(first)
    notes = []
    for _ in range(MOST_STEPS):
        curve = _curve(table, name, target)
        candidate = _smallest(curve, table, name, sizes, target)
        if candidate is None:
            break
        # The size itself, the one below it, and two that hold the curve where it matters.
        around = [min(sizes, key=lambda size, r=r: abs(size - r * candidate)) for r in (0.75, 1.3)]  # type: ignore[misc]
        close = {candidate, sizes[max(sizes.index(candidate) - 1, 0)], *around}
        wanted = sorted(close - set(table[name]))
        if not wanted:
            break
        table = pd.concat([table, at(wanted)], ignore_index=True).sort_values(name, ignore_index=True)
        if "separated" in table:
            table["separated"] = table["separated"].fillna(0).astype(int)
    curve = _curve(table, name, target)
    smallest = _smallest(curve, table, name, sizes, target)
    crossing, interval = np.nan, (np.nan, np.nan)
    if smallest is None:
        message = f"no {name} up to {sizes[-1]} reaches power {target:g} (there it is {table['power'].iloc[-1]:.3g})"
        warn(f"{message}; allow larger ones", InferenceWarning)
        notes.append(message)
    elif smallest == sizes[0] and table["lower"].iloc[0] > target:
        message = f"the smallest {name} allowed, {sizes[0]}, has more than power {target:g}"
        warn(f"{message}; allow smaller ones", InferenceWarning)
        notes.append(message)
    if curve is not None and curve.slope > 0:
        root, error = curve.size(target)
        z = stats.norm.ppf(0.975)
        crossing, interval = root**2, (float(max(root - z * error, 0.0) ** 2), float((root + z * error) ** 2))
    return PowerCurve(table, name, target, test, alpha, curve, smallest, crossing, interval, tuple(notes))


def _smallest(curve: Curve | None, table: pd.DataFrame, name: str, sizes: list[int], target: float) -> int | None:
    """Smallest allowed size with enough power, by the curve; by the table where there is no curve, or where this falls
    short at a size that was simulated and has enough."""
    enough = [size for size in sizes if curve.power(size) >= target] if curve is not None and curve.slope > 0 else []
    enough = enough or sorted(int(size) for size in table.loc[table["power"] >= target, name])
    return enough[0] if enough else None


def _curve(table: pd.DataFrame, name: str, target: float | None = None) -> Curve | None:
    """Probit regression on the square root of the size; None where there are fewer than two sizes, or no spread.

    With a target only sizes within one normal quantile of it count, where there are three such: with few groups the
    degrees of freedom bend the curve.
    """
    rows = table[table["replicates"] > 0]
    if target is not None:
        distance = stats.norm.ppf(rows["power"].clip(1e-6, 1 - 1e-6)) - stats.norm.ppf(target)
        near = rows[np.abs(distance) <= 1]
        rows = near if near[name].nunique() >= 3 else rows
    root, n = np.sqrt(rows[name].to_numpy(float)), rows["replicates"].to_numpy(float)
    hits = (rows["power"] * rows["replicates"]).to_numpy(float)
    if len(rows) < 2 or hits.sum() in (0.0, n.sum()):
        return None
    centre, scale = root.mean(), max(root.std(), 1e-12)
    A = np.column_stack([np.ones(len(root)), (root - centre) / scale])

    def negative(b: np.ndarray) -> float:
        eta = A @ b
        return -float((hits * stats.norm.logcdf(eta) + (n - hits) * stats.norm.logcdf(-eta)).sum())

    b = optimize.minimize(negative, [stats.norm.ppf((hits.sum() + 0.5) / (n.sum() + 1)), 0.1], method="BFGS").x
    eta = A @ b
    density = np.exp(2 * stats.norm.logpdf(eta) - stats.norm.logcdf(eta) - stats.norm.logcdf(-eta))
    information = (A * (n * density)[:, None]).T @ A
    if np.linalg.cond(information) > 1e12:
        return None
    back = np.array([[1.0, -centre / scale], [0.0, 1.0 / scale]])
    intercept, slope = back @ b
    return Curve(float(intercept), float(slope), back @ np.linalg.inv(information) @ back.T)


def _shown(table: pd.DataFrame) -> str:
    return table.to_string(index=False, float_format=lambda x: f"{x:.3f}")


def _power_report(head: str, table: pd.DataFrame, notes: Sequence[str]) -> Report:
    formats = dict.fromkeys(("power", "mcse", "lower", "upper"), "{:.3f}")
    return frame_report(table, [head], notes, index=False, formats=formats)


def _failures(table: pd.DataFrame) -> list[str]:
    notes = []
    if table["failed"].any():
        which = ""
        if "separated" in table:
            which = f" ({int(table['separated'].sum())} because some estimate is infinite)"
        failed = int(table["failed"].sum())
        notes.append(f"{failed} fits failed{which}; they have no test and are not counted as acceptances")
    if "untested" in table:
        untested = int(table["untested"].sum())
        notes.append(f"{untested} fits converged, but have no degrees of freedom, and so no test: not counted either")
    return notes
