"""The profiles of a generalised linear mixed model: its parameters as curves, conditional minima for their points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixjax.covariance.names import name_of
from mixjax.estimation.glmm_held import ConditionalFit, HeldSearch, Parameter, unconditional
from mixjax.estimation.glmm_held_quadrature import HeldQuadrature
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import names_apart, names_of_variances
from mixjax.fitted.parameters import parameters_of_family
from mixjax.inference.random.held_parameter import Held, Start, value_of
from mixjax.inference.random.profile_curve import Curve, curve_of

# Standard errors from an estimate, and logarithms of a family's parameter, beyond which nobody looks: an interval whose
# end is not reached there has none.
FARTHEST, MOST_LOG = 200.0, 20.0


class FamilyProfiles:
    """What :class:`~mixjax.inference.random.profile.Profile` asks of a model.

    Attributes:
        curves: of all parameters, in their order. least: the criterion. estimate: of all parameters.
    """

    def __init__(self, fitted: GeneralizedFitted):
        self.least = float(fitted.estimates.criterion)
        self.curves = _curves(fitted)
        self._rows, self._family, self._labels = fitted.rows, fitted.family, fitted.labels
        laplace = fitted.nagq == 1
        self._search = (
            HeldSearch(fitted.rows, fitted.curvature) if laplace else HeldQuadrature(fitted.rows, fitted.nagq)
        )
        own = unconditional(fitted.estimates, fitted.layout.qs)
        # Per parameter the values that were looked at, with their minima: a search begins at the nearest.
        self._known = {curve.held: [(curve.estimate, own)] for curve in self.curves}

    def minimise(self, points: Sequence[tuple[Curve, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least criteria ``(B,)``, whether they were found ``(B,)``, and all parameters there ``(B, parameters)``."""
        found = []
        for curve, value in points:
            held, known = curve.held, self._known[curve.held]
            _, near = min(known, key=lambda pair: abs(pair[0] - value))
            kind = held.kind if held.term >= 0 or held.kind == "fixed" else "psi"
            at = float(np.log(value)) if held.kind == "positive" else value
            fit = self._search.minimise(Parameter(kind, held.term, held.i, held.j), at, near)
            if fit.converged:
                known.append((value, fit))
            found.append(fit)
        deviance = np.array([fit.criterion if fit.converged else np.inf for fit in found])
        conditional = np.array([[self._value(curve, fit) for curve in self.curves] for fit in found])
        return deviance, np.array([fit.converged for fit in found]), conditional

    def _value(self, curve: Curve, fit: ConditionalFit) -> float:
        held = curve.held
        if held.term < 0 and held.kind != "fixed":
            return float(parameters_of_family(self._labels, self._family, np.asarray(fit.psi))[1][held.i])
        at = Start(tuple(own[None] for own in fit.factors), np.ones(1))
        return float(value_of(held, self._rows, at, fit.beta[None])[0])


def refusal(fitted: GeneralizedFitted) -> str | None:
    """Why a model has no profiles; None where it has."""
    if fitted.labels.psi and fitted.nagq > 1:
        return f"it has dispformula= or ziformula= and was fitted with nagq={fitted.nagq}"
    if fitted.nagq == 0:
        return "it was fitted with nagq=0, whose fixed effects are not at the minimum"
    if fitted.nagq > 1 and fitted.layout.qs != (1,):
        return f"it was fitted with nagq={fitted.nagq}, and quadrature has profiles of one random effect a level"
    if (other := next((s for s in fitted.layout.structures if not (s.has_charts or s.has_sections)), None)) is not None:
        return f"none are written for the covariance structure {name_of(other)!r}"
    if not fitted.estimates.converged:
        return "the fit did not converge, so there is no minimum to begin at"
    return None


def _curves(fitted: GeneralizedFitted) -> list[Curve]:
    variance, curves = fitted.variance_parameters, []
    units = [np.sqrt((np.asarray(basis.R_inv) ** 2).sum(1)) for basis in fitted.rows.Z_bases]
    parameters = names_of_variances(fitted.labels, fitted.layout.structures)
    numbers = zip(variance.names, variance.kinds, variance.estimate, variance.std_error, strict=True)
    for place, (name, kind, estimate, se) in enumerate(numbers):
        estimate, known = float(estimate), bool(np.isfinite(se))
        if place >= len(parameters):
            held, step = Held(kind, i=place - len(parameters)), float(se) if known else 0.1 * max(abs(estimate), 0.1)
            low, high = np.exp(-MOST_LOG), np.exp(MOST_LOG)
            if kind == "real":
                low, high = estimate - FARTHEST * step, estimate + FARTHEST * step
            curves.append(Curve(name, held, estimate, float(low), float(high), step))
            continue
        parameter = parameters[place]
        unit = float(units[parameter.term][parameter.natural.i]) if kind == "sd" else 1.0
        curve = curve_of(parameter, estimate, float(se), unit)
        if np.isinf(curve.low):
            curve.low = estimate - FARTHEST * curve.step
        if np.isinf(curve.high):
            curve.high = max(estimate + FARTHEST * curve.step, 100.0 * unit)
        curves.append(curve)
    errors = np.sqrt(np.diag(fitted.estimates.vcov))
    for j, name in enumerate(names_apart(fitted.labels.fixed, variance.names)):
        value, reach = float(fitted.estimates.beta[j]), FARTHEST * float(errors[j])
        curves.append(Curve(name, Held("fixed", i=j), value, value - reach, value + reach, float(errors[j])))
    return curves


def end_of(curve: Curve, bound: float) -> float:
    """The end of an interval that reaches a curve's bound: infinite where that is only as far as anybody looked."""
    if bound in curve.ends:
        return bound
    if bound == curve.high:
        return np.inf
    return 0.0 if curve.held.kind == "positive" else -np.inf
