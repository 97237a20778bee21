"""Terms of the fixed effects left out one at a time."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.distributions import chi2_tail
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.record import Fitted
from mixjax.formula.deletion import Deletion, design_without, fixed_deletions
from mixjax.inference.fixed.contrasts import FixedEffects, check_ddf, ddf_note, f_test
from mixjax.inference.fixed.terms import terms_of
from mixjax.tables import NotedTable

TESTS = ("F", "lrt")


def drop1(fitted: AnyFitted, test: Literal["F", "lrt"] = "F", ddf: str = "satterthwaite") -> pd.DataFrame:
    """Test the terms of the fixed effects that can be left out: those that no other term contains.

    Args:
        fitted: the fit, linear or generalised, with its rows.
        test: ``"F"``, of linear models: F test that all coefficients of the term are zero, as R's ``lmerTest``. Where
            columns were left out of the fit because others determine them: that the mean lies in the span of the
            smaller model.
            ``"lrt"``: likelihood ratio test of maximum likelihood fits with and without the term, as ``drop1`` of
            ``lme4`` with ``test = "Chisq"``; a fit by REML is refitted.
        ddf: of the F tests: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``.

    Returns:
        DataFrame. F: one row per term, columns as :func:`~mixjax.inference.fixed.hypotheses.anova` has them:
        sum_sq, mean_sq, num_df, den_df, statistic, p_value. Likelihood ratios: ``npar``, ``loglik``, ``aic`` of the
        smaller model, ``lrt``, ``df`` and ``p_value``, after a first row ``<none>`` of the fit itself.

    Raises:
        ValueError: no such test or method; the fit kept no rows; F tests of a generalised model.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.drop1 import drop1
        >>> fit = mj.lmm("angle ~ recipe + temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> drop1(fit.record)[["num_df", "den_df", "statistic"]].round(2)
                     num_df  den_df  statistic
        recipe            2    42.0       0.25
        temperature       5   220.0      20.51
    """
    if test not in TESTS:
        raise ValueError(f"test must be one of {', '.join(map(repr, TESTS))}, got {test!r}")
    deletions = fixed_deletions(fitted.labels)
    if test == "lrt":
        return _ratio_tests(fitted, deletions)
    if not isinstance(fitted, Fitted):
        raise ValueError("F tests are of linear mixed models; use test='lrt', or anova() for Wald chi-squares")
    return _f_tests(fitted, deletions, ddf)


def _f_tests(fitted: Fitted, deletions: list[Deletion], ddf: str) -> pd.DataFrame:
    check_ddf(ddf)
    _ = fitted.design  # the error says why there are no rows
    if ddf == "kenward-roger" and not fitted.reml:
        warn("Kenward-Roger needs REML estimates: the ML fit was refitted by REML", InferenceWarning)
        fitted = fitted.refitted(True)
    method = FixedEffects.of(fitted, ddf) if deletions else None
    columns = ["sum_sq", "mean_sq", "num_df", "den_df", "statistic", "p_value"]
    rows = []
    for deletion in deletions:
        F = f_test(fitted, _hypothesis(fitted, deletion), ddf, 0.0, method)
        mean_sq = F.statistic / F.scale * float(fitted.estimates.sigma) ** 2
        numbers = (float(F.den_df), float(F.statistic), float(F.p_value))
        rows.append((mean_sq * F.num_df, mean_sq, int(F.num_df), *numbers))
    frame = pd.DataFrame(rows, index=[each.name for each in deletions], columns=columns)
    frame = frame.astype(dict.fromkeys(columns, float) | {"num_df": int})
    notes = [f"{ddf_note(ddf)}; terms that others contain are not tested"]
    notes += ["num_df 0: other terms determine this one"] * bool((frame["num_df"] == 0).any())
    return NotedTable(frame, notes)


def _hypothesis(fitted: Fitted, deletion: Deletion) -> np.ndarray:
    """``L (r, p)``: the columns of the term, or what the smaller model's span lacks."""
    p = len(fitted.labels.fixed)
    if not fitted.labels.dropped_columns:
        (own,) = [term.columns for term in terms_of(fitted.labels) if term.name == deletion.name]
        return np.eye(p)[own]
    X = np.asarray(fitted.design.X)
    small, _ = design_without(fitted.given, fitted.labels, deletion)
    X0 = np.asarray(small.X)
    lengths = np.linalg.norm(X, axis=0)
    Q0 = np.linalg.qr(X0 / np.linalg.norm(X0, axis=0))[0] if X0.shape[1] else np.zeros((len(X), 0))
    left = X / lengths
    left = left - Q0 @ (Q0.T @ left)
    _, values, Vt = np.linalg.svd(left, full_matrices=False)
    r = int((values > 1e-8).sum())
    # Rows of any orthonormal basis of what is lacking: degrees of freedom do not depend on which.
    rows: np.ndarray = values[:r, None] * Vt[:r] * lengths
    return rows


def _ratio_tests(fitted: AnyFitted, deletions: list[Deletion]) -> pd.DataFrame:
    _ = fitted.design  # the error says why there are no rows
    notes = [
        "maximum likelihood; p_value: chi-square with df degrees of freedom; terms that others contain are not tested"
    ]
    large = fitted.refitted(False)
    if fitted.reml:
        notes.append("the fit by REML was refitted by maximum likelihood")
    rows: dict[str, dict[str, Any]] = {"<none>": _statistics(large)}
    for deletion in deletions:
        design, labels = design_without(fitted.given, fitted.labels, deletion)
        small = large.with_design(design, labels)
        df = large.npar - small.npar
        lrt = max(0.0, float(small.estimates.criterion - large.estimates.criterion))
        p = float(chi2_tail(lrt, df)) if df else np.nan
        rows[deletion.name] = _statistics(small) | {"lrt": lrt if df else np.nan, "df": float(df), "p_value": p}
        if not small.estimates.converged:
            notes.append(f"NOT CONVERGED: without {deletion.name}")
    columns = ["npar", "loglik", "aic", "lrt", "df", "p_value"]
    return NotedTable(
        pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).astype({"npar": int}), notes
    )


def _statistics(fitted: AnyFitted) -> dict[str, Any]:
    return {"npar": fitted.npar, "loglik": fitted.loglik, "aic": fitted.aic}
