"""All parameters of a model by name, on the scale of standard deviations and correlations, with Wald inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax import covariance as cov
from mixjax.bases import Basis
from mixjax.covariance import Structure
from mixjax.covariance.custom import Written
from mixjax.design import Labels
from mixjax.engine.coordinates import coordinates_in
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.families import Family
from mixjax.fitted.information import Information
from mixjax.fitted.names import Spellings, names_apart, names_of_variances
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import CrossProducts


@dataclass(frozen=True)
class VarianceParameters:
    """Standard deviations and correlations of the random effects, then sigma, or the parameters of a family.

    Attributes:
        names: ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ..., ``sigma``; of every term column by column of
            the lower triangle, as in lme4.
        kinds: ``"sd"``, ``"cor"``, ``"sigma"`` of each; of a family's parameters ``"positive"`` or ``"real"``,
            as of loadings and of a structure of the user's own.
        estimate: ``(k,)`` absolute. covariance: ``(k, k)`` of them, asymptotic; NaN on the boundary, and where the
            Hessian is not positive definite.
        free: ``(k,)`` False on the boundary.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    estimate: np.ndarray
    covariance: np.ndarray
    free: np.ndarray

    @property
    def std_error(self) -> np.ndarray:
        """``(k,)``; NaN where the covariance is."""
        roots: np.ndarray = np.sqrt(self.covariance.diagonal())
        return roots


class AllParameters(NamedTuple):
    """Every parameter of a fit with the joint covariance of its estimates.

    Attributes:
        names: variance parameters, then fixed effects. estimate: ``(k + p,)``.
        covariance: ``(k + p, k + p)``; NaN where a parameter is not free.
        free: ``(k + p,)`` False where a variance is zero or a correlation at its bound.
    """

    names: tuple[str, ...]
    estimate: np.ndarray
    covariance: np.ndarray
    free: np.ndarray


def variance_parameters(labels: Labels, stats: CrossProducts, info: Information, sigma: float) -> VarianceParameters:
    """Estimates with delta-method standard errors from the exact Hessian of the criterion that was minimised."""
    parameters = names_of_variances(labels, stats.layout.structures)
    kinds = (*(parameter.kind for parameter in parameters), "sigma")
    with silently():
        relative, by_x = natural_with_slopes(info.x, stats.layout.structures, stats.Z_bases)
        is_sd = np.array([parameter.is_scaled for parameter in parameters], bool)
        values = np.append(np.where(is_sd, sigma * relative, relative), sigma)
        slopes = np.zeros((len(values), len(info.x) + 1))
        slopes[:-1, :-1] = np.where(is_sd[:, None], sigma * by_x, by_x)
        slopes[:, -1] = np.append(np.where(is_sd, values[:-1], 0.0), sigma)
        covariance = slopes @ info.covariance @ slopes.T
    free = inside(kinds, values, covariance)
    covariance = np.where(free & free[:, None] & info.regular, covariance, np.nan)
    names = (*(parameter.name for parameter in parameters), "sigma")
    return VarianceParameters(names, kinds, values, covariance, free)


def inside(kinds: Sequence[str], values: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """``(k,)`` which parameters are not on the boundary."""
    own = np.array(kinds, str)
    within = np.where(own == "cor", np.abs(values) < 1 - 1e-10, (values > 0) | (own == "real"))
    free: np.ndarray = within & np.isfinite(covariance.diagonal())
    return free


def generalized_parameters(labels: Labels, rows: FamilyRows, est: GLMMEstimates) -> AllParameters:
    """Every parameter of a generalised linear mixed model: standard deviations and correlations, those of the family on
    the scale that its ``psi_names`` are on, fixed effects. By the delta method from the Hessian of all of them."""
    p, s, layout = rows.p, rows.n_psi, rows.layout
    variances = names_of_variances(labels, layout.structures)
    names, of_family, family_slopes = parameters_of_family(labels, rows.family, np.asarray(est.psi))
    own = names_apart(names, [parameter.name for parameter in variances])
    taken = [*(parameter.name for parameter in variances), *own]
    x, _ = coordinates_in(est.theta, layout, [Z.R for Z in rows.Z_bases])
    k = len(variances)
    with silently():
        natural, by_x = natural_with_slopes(x, layout.structures, rows.Z_bases)
        slopes = np.zeros((k + s + p, p + s + len(x)))
        slopes[:k, p + s :] = by_x
        slopes[k : k + s, p : p + s] = np.diag(family_slopes)
        slopes[k + s :, :p] = np.eye(p)
        covariance = slopes @ est.vcov_all @ slopes.T
    kinds = [parameter.kind for parameter in variances]
    free = np.concatenate([inside(kinds, natural, covariance[:k, :k]), np.ones(s + p, bool)])
    regular = is_covariance(est.vcov_all)
    covariance = np.where(free & free[:, None] & regular, covariance, np.nan)
    return AllParameters(
        (*taken, *names_apart(labels.fixed, taken)), np.concatenate([natural, of_family, est.beta]),
        covariance, free,
    )  # fmt: skip


def parameters_of_family(labels: Labels, family: Family, psi: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names and values of a family's parameters, and the derivatives of these by psi ``(s, ...)``: of one that is a
    number on the scale of its name, of others the coefficients of their formula, ``zi~x`` and ``disp~x``."""
    each = labels.psi or ((),) * family.n_psi
    names: list[str] = []
    values, slopes = np.array(psi, np.float64), np.ones(np.shape(psi))
    for j, (name, own) in enumerate(zip(family.psi_names, each, strict=True)):
        at = len(names)
        names += [f"{component_of(name)}~{column}" for column in own] or [name]
        if not own:
            alone = np.zeros((family.n_psi, *values.shape[1:]))
            alone[j] = psi[at]
            values[at], slopes[at] = family.natural(list(alone))[j], family.natural_slope(list(alone))[j]
    return names, values, slopes


def formula_coefficients(labels: Labels, family: Family) -> dict[str, int]:
    """Coefficients of the formulas of a family's parameters, ``zi~x``, and their places in psi."""
    names = parameters_of_family(labels, family, np.zeros(sum(len(own) or 1 for own in labels.psi)))[0]
    is_own = [bool(own) for own in labels.psi for _ in own or "1"]
    return {name: place for place, (name, own) in enumerate(zip(names, is_own, strict=True)) if own}


def coefficient_names(labels: Labels, family: Family) -> list[str]:
    """Of psi ``(s,)`` as it is estimated: ``log size``, ``zi~x``."""
    names = parameters_of_family(labels, family, np.zeros(sum(len(own) or 1 for own in labels.psi) or family.n_psi))[0]
    scale = {name: "logit" if name == "zero_inflation" else "log" for name in family.psi_names}
    return [f"{scale[name]} {name}" if name in scale else name for name in names]


def component_of(name: str) -> str:
    """The part of the model that is a formula of a family's parameter, as broom.mixed calls it."""
    return "zi" if name == "zero_inflation" else "disp"


def of_variances(every: AllParameters, labels: Labels, rows: FamilyRows) -> VarianceParameters:
    """The part of all parameters of a generalised linear mixed model that is not fixed effects."""
    variances, family = names_of_variances(labels, rows.layout.structures), rows.family
    # Those of a family of the user's own are as they are estimated, as are coefficients.
    nothing = [0.0] * family.plain.n_psi
    own = "positive" if np.array_equal(family.plain.natural(nothing), np.ones(len(nothing))) else "real"
    each = labels.psi or ((),) * family.n_psi
    of_family = [
        own if not names and j < len(nothing) else "real" for j, names in enumerate(each) for _ in names or "1"
    ]
    kinds = (*(parameter.kind for parameter in variances), *of_family)
    k = len(kinds)
    return VarianceParameters(every.names[:k], kinds, every.estimate[:k], every.covariance[:k, :k], every.free[:k])


def is_covariance(matrix: np.ndarray) -> bool:
    """Positive definite among the parameters that are not held."""
    held = (matrix == 0).all(0)
    own = matrix[~held][:, ~held]
    if not np.isfinite(own).all() or not (own.diagonal() > 0).all():
        return False
    sd = np.sqrt(own.diagonal())
    return bool(np.linalg.eigvalsh(own / np.outer(sd, sd)).min(initial=1.0) > 0)


def natural_with_slopes(
    x: np.ndarray, structures: tuple[Structure, ...], Z_bases: Sequence[Basis]
) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations and correlations of covariances with coordinates ``x (k,)``, and their derivatives by x."""
    n = sum(len(structure.natural) for structure in structures)
    values, slopes = np.zeros(n), np.zeros((n, len(x)))
    row, start = 0, 0
    for basis, structure, part in zip(Z_bases, structures, cov.cut(x, structures), strict=True):
        F = basis.R_inv @ structure.factor(part)
        D = F @ F.T
        a, b = np.array(cov.pairs_of(structure.q)).T
        moves = np.empty((structure.k, structure.q, structure.q))
        moves[:, a, b] = moves[:, b, a] = structure.jacobian(part[:, None])[..., 0].T
        moves = basis.R_inv @ moves @ basis.R_inv.T
        sd = np.sqrt(D.diagonal())
        of_sd = moves.diagonal(axis1=1, axis2=2) / (2.0 * sd)
        here = slice(start, start + structure.k)
        for parameter in structure.natural:
            if parameter.kind in ("loading", "specific"):  # coordinates of columns that are on scales of their own
                j, scale = structure.natural.index(parameter), basis.R_inv[parameter.i, parameter.i]
                moving = structure.reduced(part[:, None], np.full(1, -1))[1][j, 0]
                values[row], slopes[row, start + j] = scale * part[j], scale if moving else np.nan
            elif parameter.kind == "real":
                assert isinstance(structure, Written)
                j, own = parameter.i - structure.n_scales, slice(start + structure.n_scales, start + structure.k)
                reported = structure.reported(part)
                values[row], slopes[row, own] = reported[0][j], reported[1][j]
            elif parameter.kind == "sd":
                values[row] = sd[parameter.i]
                slopes[row, here] = of_sd[:, parameter.i]
            else:
                pairs = parameter.pairs(structure.q)
                i, j = max(pairs, key=lambda pair: bool(sd[pair[0]] * sd[pair[1]] > 0))  # the first with variances
                values[row] = D[i, j] / (sd[i] * sd[j])
                relative = of_sd[:, i] / sd[i] + of_sd[:, j] / sd[j]
                slopes[row, here] = moves[:, i, j] / (sd[i] * sd[j]) - values[row] * relative
            row += 1
        start += structure.k
    return values, slopes


def select(parm: Any, names: Sequence[str], n_fixed: int) -> list[str]:
    """Rows of a table of all parameters that a user names.

    Args:
        parm: a name or a list of names, also as in lme4 (``.sig01``, ``.sigma``, ``(Intercept)``, ``recipeB``);
            ``"theta_"`` for all variance parameters, ``"beta_"`` for all fixed effects; None for everything.
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
    also[".sigma"] = "sigma"
    known = Spellings(names)
    chosen: list[str] = []
    for name in [parm] if isinstance(parm, str) else list(parm):
        if name == "theta_":
            chosen += variance
        elif name == "beta_":
            chosen += list(fixed)
        elif name in known or name in also:
            chosen.append(names[known[name]] if name in known else also[name])
        else:
            raise ValueError(f"there is no parameter {name!r}; there are {', '.join(map(repr, names))}")
    return list(dict.fromkeys(chosen))
