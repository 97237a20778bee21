"""Posteriors of generalised linear mixed models: random effects integrated out by Laplace's approximation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixjax.checks import ConvergenceWarning, DataError
from mixjax.covariance import lambdas_of_theta
from mixjax.design import refuse_smooths
from mixjax.engine.family_draws import FamilyTarget, has_quadrature
from mixjax.families import Family, family_of, zero_inflated
from mixjax.fitted.generalized import GeneralizedFitted, fit_family_rows
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable
from mixjax.formula.own_formulas import refuse_without_parameter
from mixjax.formula.separation import separation_of
from mixjax.machine import float64
from mixjax.optimise.results import Result
from mixjax.products.family_rows import rows_in
from mixjax.products.sizes import MOST_DENSE_DRAWS
from mixjax.sampling import importance
from mixjax.sampling.chain import Options, sampled
from mixjax.sampling.glmm_posterior import GLMMPosterior
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.prior import Flat
from mixjax.sampling.priors import Priors, default_priors
from mixjax.simulation import as_key
from mixjax.waiting import Waiting

MOST_NODES = 100
# Standard deviations that a search starts from at least, on the scale of the link, and parameters of the family at
# most, which are logarithms or logits.
FLOOR, MOST_PSI = 0.2, 4.0


def bayes_glmm(
    formula: str,
    data: Any,
    family: Any,
    link: str | None,
    size: Any,
    priors: Priors | None,
    key: Any,
    how: Options,
    nagq: int,
    weights: Any,
    offset: Any,
    subset: Any,
    contrasts: Mapping[str, str] | None,
    caller: Mapping[str, Any],
    trusted: bool | None,
    ziformula: str | None,
    dispformula: str | None,
) -> GLMMPosterior:
    """See :func:`mixjax.bayes`, of a family."""
    if isinstance(nagq, bool) or not isinstance(nagq, int | np.integer) or not 1 <= nagq <= MOST_NODES:
        raise ValueError(f"nagq must be a whole number from 1 (Laplace) to {MOST_NODES}, got {nagq!r}")
    own = family_of(family, link)
    if own.plain is not own and ziformula is None:
        ziformula = "~ 1"
    inflated, own = own, own.plain
    formulas = {"dispformula": dispformula, "ziformula": ziformula}
    refuse_without_parameter(formulas, own)
    if ziformula is not None:
        inflated = zero_inflated(own)
    given = {option: text for option, text in formulas.items() if text is not None}
    built = build(formula, data, weights, offset, subset, contrasts, caller, trusted, own, size, given)
    refuse_smooths(built.labels, "mixjax.bayes", "its predictions know random effects of levels only; use mixjax.glmm")
    check_identifiable(*built, own)
    if len(built.design.psi_columns) > own.n_psi:
        own = inflated
        own.check(built.design.y, built.design.size, built.labels.response)
    if not built.design.terms:
        raise DataError("mixjax.bayes is for models with random terms; without any, bambi and brms have regressions")
    rows = rows_in(built.design, own, built.design.y, built.basis)
    _refuse_size(rows)
    if nagq > 1 and not has_quadrature(rows):
        raise ValueError(
            f"quadrature (nagq={nagq}) is for one grouping factor with up to three effects a level; leave nagq= out"
        )
    said = Priors() if priors is None else priors
    model = said.resolve(built.design, built.labels, family=own)
    said = said.filled(default_priors(built.design, family=own))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start only, and priors may do what data cannot
        fitted = fit_family_rows(rows, built.design, built.labels, None, "observed")
    _refuse_separated(fitted, model, own)
    how = how._replace(is_quick=model.dim <= importance.MOST_COORDINATES)
    target = FamilyTarget(rows, int(nagq))
    with Waiting(f"drawing from the posterior of {formula!r}; the first time, a program is compiled"), float64():
        z, sampling = sampled(_start(fitted, model), target, model, as_key(key), how)
    given_fixed = z[..., model.dim - len(model.fixed) :]
    beta = given_fixed @ np.asarray(model.to_beta).T
    post = GLMMPosterior(fitted, said, model, z, beta, sampling, key, nagq)
    post.warn()
    return post


def _refuse_size(rows: Any) -> None:
    order = [*rows.layout.chain, *rows.layout.dense]
    n_dense = sum(rows.Z[f].shape[1] * rows.levels[f] for f in order[1:])
    if n_dense > MOST_DENSE_DRAWS:
        raise ValueError(
            f"{n_dense} random effects beside those of the largest grouping factor are too many for sampling (more "
            f"than {MOST_DENSE_DRAWS}): every step of every search for modes would invert a matrix of that size; "
            "mixjax.glmm fits the model"
        )


def _refuse_separated(fitted: GeneralizedFitted, model: ModelPriors, family: Family) -> None:
    """Raise ValueError where the likelihood does not fall in a direction of fixed effects with flat priors."""
    flat = [one for one in model.fixed if isinstance(one, Flat)]
    if not flat or Result(int(fitted.estimates.result)).is_solution:
        return
    found = separation_of(fitted.design, fitted.labels, family.name)
    if found is not None:
        raise ValueError(
            f"{found.sentence}; under flat priors of fixed effects there is no posterior then: give beta= a prior such "
            "as mixjax.prior.normal(0, 2.5)"
        )


def _start(fitted: GeneralizedFitted, model: ModelPriors) -> np.ndarray:
    """Coordinates near the estimates, well inside."""
    est, rows = fitted.estimates, fitted.rows
    theta = np.nan_to_num(np.asarray(est.theta), nan=0.5, posinf=2.0, neginf=-2.0)
    parts = []
    lambdas = lambdas_of_theta(np.clip(theta, -5.0, 5.0), rows.layout.qs)
    for chart, Lambda, basis in zip(model.charts, lambdas, rows.Z_bases, strict=True):
        of_columns = np.sqrt((np.asarray(basis.R) ** 2).sum(axis=0)) * rows.unit
        parts.append(chart.near(Lambda, FLOOR / np.where(of_columns > 0, of_columns, 1.0)))
    psi = np.clip(np.nan_to_num(np.asarray(est.psi)), -MOST_PSI, MOST_PSI)
    others = [
        value if one.kind == "positive" else value * float(one.scale)
        for one, value in zip(model.others, psi, strict=True)
    ]
    beta = np.nan_to_num(np.asarray(est.beta))
    given = (np.asarray(model.parts.of_beta) @ beta)[: len(model.fixed)]
    if Result(int(est.result)) == Result.SEPARATED:
        given = np.clip(given, -3.0, 3.0)
    return np.concatenate([*parts, others, given])
