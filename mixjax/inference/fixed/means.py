"""Marginal means of factors and slopes of covariates, over a reference grid, as R's emmeans defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_level
from mixjax.inference.fixed.grid import FixedPart, Grid, ModelRows, check_names, reference_grid
from mixjax.inference.fixed.marginal_means import MarginalMeans
from mixjax.inference.fixed.specs import read_spec
from mixjax.inference.fixed.terms import terms_of

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

# --- means and slopes ---------------------------------------------------------------------------------------------


def emmeans(
    fitted: AnyRecord,
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
        spec: a factor, a list of factors, or ``"1"`` for the overall mean. A covariate only with values in ``at``. Also
            R's way to write them: ``"A + B"`` or ``"A * B"`` for the cells of both, ``"A | B"`` for A within the levels
            of B.
        by: factors within whose levels contrasts are made.
        at: variable -> value or values to use instead of the mean, or of all levels.
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``.
        level: coverage of the intervals.

    Returns:
        MarginalMeans: ``.to_frame()``, ``.contrasts()``, ``.letters()``, ``.eff_size()``, ``str()``. NaN where a cell
        cannot be estimated because columns of X were left out of the fit. Where what is compared is in an interaction
        with a factor that is averaged over, a note says so.

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
        recipe is in an interaction with temperature, over which these are averages: its effect may differ from level to
        level
    """
    model = FixedPart(fitted)
    return marginal_means(fitted, model, spec, by, at, ddf, level, "marginal means", model.rows)


def emtrends(
    fitted: AnyRecord,
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
    slopes = _slopes_in(model, var, column.min(), column.max())
    return marginal_means(fitted, model, spec, by, at, ddf, level, f"slopes of {var}", slopes, var)


def marginal_means(
    fitted: AnyRecord,
    model: FixedPart,
    spec: Any,
    by: Any,
    at: Mapping[str, Any] | None,
    ddf: str,
    level: float,
    what: str,
    rows_of: Callable[[pd.DataFrame], ModelRows],
    var: str | None = None,
) -> MarginalMeans:
    """Averages over a reference grid of what ``rows_of`` makes of its rows."""
    return means_over_grid(fitted, model, spec, by, at, ddf, level, what, rows_of, var)[0]


def means_over_grid(
    fitted: AnyRecord,
    model: FixedPart,
    spec: Any,
    by: Any,
    at: Mapping[str, Any] | None,
    ddf: str,
    level: float,
    what: str,
    rows_of: Callable[[pd.DataFrame], ModelRows],
    var: str | None = None,
) -> tuple[MarginalMeans, Grid, ModelRows]:
    """:func:`marginal_means`, with the grid and what was made of its rows."""
    check_level(level)
    at = {} if at is None else at
    if not isinstance(at, Mapping):
        raise ValueError(f"at must be a dict of variables and their values, got {at!r}")
    names, groups = read_spec(spec, by, model.variables)
    check_names(model, names, "spec")
    check_names(model, groups, "by=")
    if both := [name for name in names if name in groups]:
        raise ValueError(f"{', '.join(map(repr, both))} cannot be both what is compared and by=, within which it is")
    check_names(model, list(at), "at=")
    model.choose([*names, *groups, *at, *([var] if var else [])])
    shown = [*groups, *(name for name in names if name not in groups)]
    grid = reference_grid(model, shown, at)
    rows = rows_of(grid.table)
    k = len(grid.cells)
    title = what + (f" of {' and '.join(names)}" if names and what == "marginal means" else "")
    title += (f" by {' and '.join(groups)}" if groups else "") + (f" ({grid.others})" if grid.others else "")
    W, free = model.weights(rows.X.reshape(k, -1, rows.X.shape[1]).mean(axis=1))
    offset = rows.offset.reshape(k, -1).mean(axis=1)
    cautions = _cautions(model, [*shown, *([var] if var else [])], grid)
    means = MarginalMeans(fitted, grid.cells, tuple(groups), W, offset, free, title, ddf, level, cautions)
    return means, grid, rows


def _cautions(model: FixedPart, shown: list[str], grid: Grid) -> tuple[str, ...]:
    """Warnings: variables that interact with factors whose levels the means average over."""
    columns = {e.shown: set(e.columns) for e in model.state.fixed.effects.expressions}
    together = [set().union(*(columns[factor] for factor in term.factors)) for term in terms_of(model.labels)]
    found = []
    for name in shown:
        met = [other for other in grid.averaged if any({name, other} <= used for used in together)]
        if met:
            found.append(
                f"{name} is in an interaction with {' and '.join(met)}, over which these are averages: its effect may "
                "differ from level to level"
            )
    return tuple(found)


def _slopes_in(model: FixedPart, var: str, lowest: float, highest: float) -> Callable[[pd.DataFrame], ModelRows]:
    """Derivatives of rows with respect to a covariate.

    Steps and places are whole multiples of a power of two and the weights are integers, so that no rounding enters the
    differences of what is linear. Where a central stencil would leave the range of the data, which splines may refuse,
    it is moved inwards.
    """
    h = 2.0 ** np.round(np.log2((highest - lowest) * 2.0**-12))
    unit = h * 2.0**-26

    def rows_of(grid: pd.DataFrame) -> ModelRows:
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
        return ModelRows(X / (12 * h), offset / (12 * h))

    return rows_of


@cache
def _stencil(moved: int) -> np.ndarray:
    """Weights of f at ``moved + (-2 .. 2)`` that give 12 f'(0) of every polynomial of degree four: integers."""
    nodes = moved + np.arange(-2.0, 3.0)
    return np.round(12 * np.linalg.solve(np.vander(nodes, increasing=True).T, np.eye(5)[1]))
