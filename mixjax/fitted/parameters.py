"""All parameters of a model by name, on the scale of standard deviations and correlations, with Wald inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax import covariance as cov
from mixjax.fitted.names import term_names
from mixjax.fitted.record import Fitted
from mixjax.machine import silently
from mixjax.products.sums import CrossProducts


@dataclass(frozen=True)
class VarianceParameters:
    """Standard deviations and correlations of the random effects, then sigma.

    Attributes:
        names: ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ..., ``sigma``; of every term column by column of
            the lower triangle, as in lme4.
        kinds: ``"sd"``, ``"cor"`` or ``"sigma"`` of each.
        estimate: ``(k,)`` absolute. std_error: ``(k,)``; NaN on the boundary, and where the Hessian is not positive
            definite.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    estimate: np.ndarray
    std_error: np.ndarray


def variance_parameters(fitted: Fitted) -> VarianceParameters:
    """Estimates with delta-method standard errors from the exact Hessian of the criterion that was minimised."""
    info = fitted.information
    names, kinds = [], []
    for group, term in zip(term_names(fitted.labels), fitted.labels.terms, strict=True):
        for row, column in zip(*cov.triangle(len(term.effects)), strict=True):
            is_sd = row == column
            pair = term.effects[row] if is_sd else f"{term.effects[row]}.{term.effects[column]}"
            names.append(f"{'sd' if is_sd else 'cor'}_{pair}|{group}")
            kinds.append("sd" if is_sd else "cor")
    with silently():
        values, slopes = _natural_with_slopes(info.x, float(fitted.estimates.sigma), fitted.stats)
        variances = np.einsum("ij,jk,ik->i", slopes, info.covariance, slopes)
        std_error = np.sqrt(np.where(info.regular, variances, np.nan))
    kinds.append("sigma")
    is_cor = np.array(kinds) == "cor"
    inside = np.where(is_cor, np.abs(values) < 1 - 1e-10, values > 0)
    return VarianceParameters((*names, "sigma"), tuple(kinds), values, np.where(inside, std_error, np.nan))


def _natural_with_slopes(x: np.ndarray, sigma: float, stats: CrossProducts) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations, correlations and sigma, and their derivatives by the coordinates and log sigma."""
    layout = stats.layout
    values, slopes, start = [np.atleast_1d(sigma)], np.zeros((sum(map(cov.n_theta, layout.qs)) + 1, len(x) + 1)), 0
    parts = zip(stats.Z_bases, layout.structures, cov.cut(x, layout.structures), strict=True)
    own = slopes[:-1]
    for basis, structure, part in parts:
        rows, columns = cov.triangle(structure.q)
        F = basis.R_inv @ structure.factor(part)
        D = F @ F.T
        moves = np.empty((structure.k, structure.q, structure.q))
        moves[:, columns, rows] = moves[:, rows, columns] = structure.jacobian(part[:, None])[..., 0].T
        moves = basis.R_inv @ moves @ basis.R_inv.T
        sd = np.sqrt(D.diagonal())
        of_sd = moves.diagonal(axis1=1, axis2=2) / (2.0 * sd)
        is_sd, lengths = rows == columns, sd[rows] * sd[columns]
        cor = D[rows, columns] / lengths
        of_cor = moves[:, rows, columns] / lengths - cor * (of_sd / sd)[:, rows] - cor * (of_sd / sd)[:, columns]
        found = np.where(is_sd, sigma * sd[rows], cor)
        own[: len(rows), start : start + structure.k] = np.where(is_sd, sigma * of_sd[:, rows], of_cor).T
        own[: len(rows), -1] = np.where(is_sd, found, 0.0)
        values.insert(-1, found)
        own, start = own[len(rows) :], start + structure.k
    slopes[-1, -1] = sigma
    return np.concatenate(values), slopes


def select(parm: Any, names: Sequence[str], n_fixed: int) -> list[str]:
    """Rows of a table of all parameters that a user names.

    Args:
        parm: a name or a list of names, also as in lme4 (``.sig01``, ``.sigma``, ``(Intercept)``); ``"theta_"`` for all
            variance parameters, ``"beta_"`` for all fixed effects; None for everything.
        names: all parameters, all different: those of the variances, sigma the last of them, then ``n_fixed`` fixed
            effects.

    Raises:
        ValueError: a name is none of them.
    """
    if parm is None:
        return list(names)
    if not isinstance(parm, str | Sequence | pd.Index | np.ndarray):
        raise ValueError(f"parm must be a name or a list of names of parameters, got {parm!r}")
    variance, fixed = list(names[: len(names) - n_fixed]), list(names[len(names) - n_fixed :])
    also = {f".sig{i + 1:02d}": name for i, name in enumerate(n for n in variance if n != "sigma")}
    also |= {".sigma": "sigma", "(Intercept)": "Intercept"}
    also |= {name.replace("[T.", "").replace("]", ""): name for name in fixed}
    also |= {name.replace("Intercept", "(Intercept)"): name for name in variance}
    chosen: list[str] = []
    for name in [parm] if isinstance(parm, str) else list(parm):
        if name == "theta_":
            chosen += variance
        elif name == "beta_":
            chosen += list(fixed)
        elif name in names or also.get(name) in names:
            chosen.append(name if name in names else also[name])
        else:
            raise ValueError(f"there is no parameter {name!r}; there are {', '.join(map(repr, names))}")
    return list(dict.fromkeys(chosen))
