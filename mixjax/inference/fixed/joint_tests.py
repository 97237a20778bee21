"""F tests of factors and interactions as tests of contrasts of marginal means, within the levels of others too."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, InferenceWarning, warn
from mixjax.inference.fixed.contrasts import FixedEffects, check_ddf, ddf_note, f_test
from mixjax.inference.fixed.grid import FixedPart, check_names
from mixjax.inference.fixed.marginal_means import MarginalMeans
from mixjax.inference.fixed.means import marginal_means
from mixjax.inference.fixed.specs import names_of
from mixjax.inference.fixed.terms import terms_of
from mixjax.tables import NotedTable

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

COLUMNS = ["num_df", "den_df", "statistic", "p_value"]
LESS = "fewer num_df than the levels have: the rest cannot be estimated, because columns of X were left out of the fit"


def joint_tests(fitted: AnyRecord, by: Any = None, ddf: str = "satterthwaite") -> pd.DataFrame:
    """Test every factor and interaction of the fixed effects by its marginal means, as ``emmeans::joint_tests``.

    Of a factor, that all its marginal means are equal; of an interaction, that all products of differences are zero.
    With all cells filled and no ``by`` these are the tests of type III. With ``by`` they are made in each of its
    levels. A covariate stands for two values, a standard deviation below and above its mean: where the model is linear
    in it, that is its slope; others are held at their means. With empty cells, what can be estimated of a term is
    tested.

    Args:
        fitted: the fit.
        by: a factor or a list of factors within whose levels to test.
        ddf: ``"satterthwaite"`` (pooled as Fai & Cornelius 1996, where emmeans takes the smallest of the rows'),
            ``"kenward-roger"`` (with its scaled statistic) or ``"wald"``.

    Returns:
        DataFrame: the columns of ``by``, term, num_df, den_df, statistic (F), p_value. A term of which nothing can be
        estimated has num_df 0 and no numbers.

    Raises:
        DataError: unknown variables, or none left to test.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.joint_tests import joint_tests
        >>> fit = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> joint_tests(fit.record, by="recipe").round(3)
          recipe         term  num_df  den_df  statistic  p_value
        0      A  temperature       5   210.0      8.576      0.0
        1      B  temperature       5   210.0      7.210      0.0
        2      C  temperature       5   210.0      6.746      0.0
    """
    check_ddf(ddf)
    model = FixedPart(fitted)
    groups = names_of(by, "by")
    check_names(model, groups, "by=")
    found = _subsets(model, groups)
    if not found:
        raise DataError(f"{model.labels.formula!r} has no fixed effects to test beside {', '.join(groups) or 'a mean'}")
    if ddf.startswith("kenward-roger") and fitted.has_df and not fitted.reml:  # once, not for every term
        warn("Kenward-Roger needs REML estimates: the ML fit was refitted by REML for these tests", InferenceWarning)
        fitted = fitted.refitted(True)
    method = FixedEffects.of(fitted, ddf)
    parts, less = [], False
    for names in found:
        at = {name: _around_the_mean(model, name) for name in names if name not in model.factors}
        means = marginal_means(fitted, model, list(names), groups or None, at, ddf, 0.95, "", model.rows)
        rows = means.contrast_rows("trt.vs.ctrl", interaction=True if len(names) > 1 else None)
        for g in dict.fromkeys(rows.family.tolist()):
            own = rows.family == g
            where = rows.labels.loc[own, groups].iloc[:1].reset_index(drop=True)
            numbers, reduced = _test(fitted, means, rows.weights[own], ddf, method)
            less |= reduced
            parts.append(where.assign(term=":".join(names), **dict(zip(COLUMNS, numbers, strict=True))))
    table = pd.concat(parts, ignore_index=True)
    if groups:  # the levels of by in their order, the terms within them
        table = table.sort_values(groups, kind="stable", ignore_index=True, key=lambda c: pd.factorize(c)[0])
    how = f"F tests of contrasts of marginal means{', within ' + ' and '.join(groups) if groups else ''}"
    return NotedTable(table.astype({"num_df": int}), (f"{how}, {ddf_note(ddf)}", *([LESS] * less)))


def _subsets(model: FixedPart, groups: list[str]) -> list[tuple[str, ...]]:
    """Sets of variables that stand together in a term, small ones first; those of ``by`` are held."""
    columns = {e.shown: list(e.columns) for e in model.state.fixed.effects.expressions}
    terms = [[name for factor in term.factors for name in columns[factor]] for term in terms_of(model.labels)]
    order = list(dict.fromkeys(name for term in terms for name in term if name not in groups))
    most = max((len(set(term) - set(groups)) for term in terms), default=0)
    return [
        names
        for size in range(1, most + 1)
        for names in itertools.combinations(order, size)
        if any(set(names) <= set(term) for term in terms)
    ]


def _around_the_mean(model: FixedPart, name: str) -> list[float]:
    column = model.frame[name].to_numpy(float)
    return [column.mean() - column.std(), column.mean() + column.std()]


def _test(
    fitted: AnyRecord, means: MarginalMeans, weights: np.ndarray, ddf: str, method: FixedEffects
) -> tuple[tuple[int, float, float, float], bool]:
    """Of what can be estimated of the contrasts ``(r, k)``: their numbers, and whether that is less than all."""
    exists = means.estimable(weights)
    if not exists.all():
        left_open = weights @ means.open
        U, sizes, _ = np.linalg.svd(left_open, full_matrices=True)
        rank = int((sizes > 1e-8 * sizes.max()).sum())
        weights = U[:, rank:].T @ weights
    L = weights @ means.W
    L = np.where(np.abs(L) <= 1e-11 * (np.abs(weights) @ np.abs(means.W)), 0.0, L)
    if not L.any():
        return (0, np.nan, np.nan, np.nan), not exists.all()
    F = f_test(fitted, L, ddf, -weights @ means.offset, method)
    return (int(F.num_df), float(F.den_df), float(F.statistic), float(F.p_value)), not exists.all()
