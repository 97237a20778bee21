"""Do responses vary more than their family says, and are there more zeros?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import gammaincc

from mixjax.checks import check_count
from mixjax.diagnostics.quantile_residuals import MOST_NUMBERS, quantile_residuals, row_of
from mixjax.estimation.glmm_modes import predictors_at_modes
from mixjax.fitted.generalized import GeneralizedFitted


def overdispersion(fitted: GeneralizedFitted, key: Any = 0, n: int = 250) -> pd.DataFrame:
    """Is there more variance given the random effects than the family says? See :meth:`mixjax.GLMMFit.overdispersion`.

    Raises:
        ValueError: the response is one of single outcomes; n is less than 1, or so many numbers take too much memory.
    """
    n = check_count("n", n, 1)
    rows, est = fitted.rows, fitted.estimates
    if fitted.family.name == "binomial" and (rows.size is None or np.max(np.asarray(rows.size)) <= 1):
        raise ValueError(
            "single outcomes vary as their mean says, whatever the model, so there is nothing to test; look at groups "
            "of them: fit.quantile_residuals().recalculate(group).tests()"
        )
    if n * fitted.nobs > MOST_NUMBERS:
        raise ValueError(
            f"{n} simulations of {fitted.nobs} rows take too much memory: use n={MOST_NUMBERS // fitted.nobs}"
        )
    Y = fitted.simulate(key, n)
    # The response too, from the same start, so that all are treated alike.
    Y = np.concatenate([np.asarray(rows.y, np.float64)[None], Y])
    squares = (pearson_of(fitted, Y, predictors_at_modes(rows, est, Y)) ** 2).sum(1)
    own, df = float((fitted.scaled_residuals**2).sum()), fitted.nobs - fitted.npar
    simulated = row_of(squares / squares[1:].mean(), "above")
    p_value = float(gammaincc(0.5 * df, 0.5 * own)) if df > 0 else np.nan
    found = {
        "pearson": {"statistic": own / df if df > 0 else np.nan, "df": df, "p_value": p_value},
        "simulation": {"statistic": simulated["statistic"], "df": np.nan, "p_value": simulated["p_value"]},
    }
    return pd.DataFrame.from_dict(found, orient="index")


def pearson_of(fitted: GeneralizedFitted, Y: np.ndarray, eta: np.ndarray) -> np.ndarray:
    """``(B, n)`` of responses and linear predictors, over the standard deviations that the family gives there."""
    family, rows, psi = fitted.family, fitted.rows, fitted.psi_by_row
    mean = np.asarray(family.response_mean(family.mean(eta), psi))
    variance = np.asarray(family.variance(family.mean(eta), rows.size, psi))
    if rows.weights is not None:
        variance = variance / np.asarray(rows.weights)
    expected = mean if rows.size is None else mean * np.asarray(rows.size)
    found: np.ndarray = (Y - expected) / np.sqrt(variance)
    return found


def zero_inflation(fitted: GeneralizedFitted, key: Any = 0, n: int = 250) -> pd.Series:
    """Are there more zeros than the fit gives? See :meth:`mixjax.GLMMFit.zero_inflation`.

    Raises:
        ValueError: responses of the family are never zero, or are single outcomes.
    """
    found = quantile_residuals(fitted, key, n)
    if fitted.family.name == "binomial" and (fitted.rows.size is None or np.max(np.asarray(fitted.rows.size)) <= 1):
        raise ValueError(
            "of single outcomes the share of zeros is fitted: look at groups of them, "
            "fit.quantile_residuals().recalculate(group).tests()"
        )
    if not (found.simulated == 0).any() and not (found.y == 0).any():
        raise ValueError(
            f"neither the response nor what is simulated from family {fitted.family.name} has zeros: there is nothing "
            "to compare; look at fit.quantile_residuals().tests()"
        )
    zeros = np.concatenate([[(found.y == 0).sum()], (found.simulated == 0).sum(1)]).astype(float)
    own = row_of(zeros, "both")
    ratio = own["statistic"] / own["expected"] if own["expected"] > 0 else np.inf
    return pd.Series(
        {"observed": own["statistic"], "expected": own["expected"], "ratio": ratio, "p_value": own["p_value"]},
        name="zeros",
    )
