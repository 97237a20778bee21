"""Columns to stand beside the table of a fit: means, residuals, leverages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.diagnostics.decorrelation import MOST_ROWS, decorrelated, largest_block
from mixjax.diagnostics.hat import parts_of, whiten
from mixjax.diagnostics.least_squares import least_squares
from mixjax.diagnostics.leverage import leverage, leverage_of
from mixjax.diagnostics.residuals import fixed_part, random_part, scaled
from mixjax.families.links import LINKS
from mixjax.fitted.either import any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted

# A row whose own regression keeps less than this part of its variance has no residual that says anything.
NOTHING = 1e-10


def augmented(fitted: Any) -> pd.DataFrame:
    """Columns of a fit's rows.

    * ``.fitted``, ``.fixed``, ``.random``: conditional mean, population mean, and what the random effects add.
    * ``.resid``, ``.std_resid``, ``.student_resid``: conditional residuals raw, over ``sigma / sqrt(w)``, and over
      their own standard deviations.
    * ``.mar_resid``, ``.chol_mar_resid``: marginal residuals raw, and decorrelated. The second is left out where random
      effects tie more than 5 000 rows together.
    * ``.leverage``: overall leverage. ``.cooksd``: lme4's ``cooks.distance(m)``, of the residual e and the leverage h,
      ``e^2 w h / (sigma^2 p (1 - h)^2)``; NaN where h is 1. What really changes without a row is another question, for
      :func:`mixjax.diagnostics.influence.influence`.
    * ``.ls_fitted``, ``.ls_resid``, ``.semi_ls_resid``, ``.std_ls_resid``: every level's own regression; raw, over the
      root of one minus its leverage, and over its own sigma besides. Of models with one grouping factor only. NaN where
      a level has too few rows.

    Where residuals have a dispersion formula or a correlation, ``.norm_resid`` beside them; with a correlation, columns
    that rest on leverages or on regressions of single levels are left out.

    See :func:`mixjax.diagnostics.residuals.residuals` for what each shows.

    Of a generalised linear mixed model:

    * ``.fitted``: mean given the random effects, of trials the proportion. ``.linear_predictor``: on the link's scale,
      the sum of ``.fixed``, with the offset, and ``.random``, what the random effects add.
    * ``.resid``: deviance residuals. ``.pearson_resid``, ``.response_resid``, ``.working_resid``: R's other kinds;
      the last is left out of families whose link has no known derivative.
    * ``.std_resid``, ``.student_resid``: Pearson residuals over all of the standard deviation that the family gives,
      its dispersion too, and that over the root of one minus the leverage.
    * ``.leverage``, ``.cooksd``: as above, of the linear model at the modes; ``.cooksd`` is lme4's again. With
      ``ziformula=`` there is mostly no such model, a 0 being no reason for one mean, and ``.student_resid`` and these
      are left out.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.augment import augmented
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> augmented(fit)[[".fitted", ".resid", ".std_ls_resid"]].iloc[0].round(3).tolist()
        [253.664, -4.104, 0.139]
    """
    fitted = any_record_of(fitted)
    if isinstance(fitted, GeneralizedFitted):
        return _generalized(fitted)
    y, fixed, random = np.asarray(fitted.design.y, float), fixed_part(fitted), random_part(fitted)
    sigma = float(fitted.estimates.sigma)
    if fitted.given.residual is not None:
        return _of_correlated(fitted, y, fixed, random)
    whitened = whiten(fitted)
    parts = parts_of(whitened.Q, whitened.effects)
    resid, marginal = y - fixed - random, y - fixed
    columns = {
        ".fitted": fixed + random,
        ".fixed": fixed,
        ".random": random,
        ".resid": resid,
        ".std_resid": scaled(resid, "conditional", whitened, None, sigma),
        ".student_resid": scaled(resid, "conditional", whitened, parts, sigma),
        ".mar_resid": marginal,
    }
    if largest_block(whitened) <= MOST_ROWS:
        columns[".chol_mar_resid"] = decorrelated(whitened, marginal * whitened.root_w / sigma)
    columns[".leverage"] = leverage_of(whitened, parts).overall
    columns[".cooksd"] = _cooks(columns[".std_resid"], columns[".leverage"], len(fitted.labels.fixed))
    if fitted.given.has_residual_side:
        columns[".norm_resid"] = fitted.whitened(resid)
    if len({term.group for term in fitted.labels.terms}) == 1 and not fitted.labels.terms[0].smooth:
        own = least_squares(fitted)
        ls = y - own.fitted
        codes = np.asarray(fitted.design.terms[0].group)
        left = 1 - own.leverage
        root = np.where(left > NOTHING, np.sqrt(np.maximum(left, 0.0)), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns |= {
                ".ls_fitted": own.fitted,
                ".ls_resid": ls,
                ".semi_ls_resid": ls / root,
                ".std_ls_resid": ls * whitened.root_w / (root * own.sigma[codes]),
            }
    return pd.DataFrame(columns, index=fitted.labels.frame.index)


def _of_correlated(fitted: Fitted, y: np.ndarray, fixed: np.ndarray, random: np.ndarray) -> pd.DataFrame:
    """Without what rests on residuals that are independent: leverages and all that is made of them."""
    resid = y - fixed - random
    columns = {
        ".fitted": fixed + random,
        ".fixed": fixed,
        ".random": random,
        ".resid": resid,
        ".std_resid": resid * np.sqrt(np.asarray(fitted.design.weights)) / float(fitted.estimates.sigma),
        ".mar_resid": y - fixed,
        ".norm_resid": fitted.whitened(resid),
    }
    return pd.DataFrame(columns, index=fitted.labels.frame.index)


def _generalized(fitted: GeneralizedFitted) -> pd.DataFrame:
    scaled_, zeros = fitted.scaled_residuals, fitted.family.plain is not fitted.family
    columns = {
        ".fitted": fitted.mean,
        ".linear_predictor": np.asarray(fitted.estimates.eta),
        ".fixed": fixed_part(fitted),
        ".random": random_part(fitted),
        ".resid": fitted.residuals("deviance"),
        ".pearson_resid": fitted.residuals("pearson"),
        ".response_resid": fitted.residuals("response"),
    }
    if fitted.family.link in LINKS and not zeros:
        columns[".working_resid"] = fitted.residuals("working")
    columns[".std_resid"] = scaled_
    if zeros:
        return pd.DataFrame(columns, index=fitted.labels.frame.index)
    own = leverage(fitted).overall
    left = 1 - own
    columns[".student_resid"] = np.where(left > NOTHING, scaled_ / np.sqrt(np.maximum(left, NOTHING)), np.nan)
    columns[".leverage"] = own
    columns[".cooksd"] = _cooks(scaled_, own, len(fitted.labels.fixed))
    return pd.DataFrame(columns, index=fitted.labels.frame.index)


def _cooks(std_resid: np.ndarray, leverage: np.ndarray, p: int) -> np.ndarray:
    """Cook's distances by standardized residual and leverage, as lme4 has them."""
    left = 1 - leverage
    known = (left > NOTHING) & (p > 0)
    return np.where(known, std_resid**2 * leverage / (max(p, 1) * np.where(known, left, 1.0) ** 2), np.nan)
