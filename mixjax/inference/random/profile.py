"""Profile likelihood: signed root deviances along every parameter, and the intervals that they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.distributions import normal_quantile
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.names import names_apart, names_of_variances
from mixjax.fitted.parameters import select
from mixjax.fitted.record import Fitted
from mixjax.inference.random import profile_of_family, profile_search
from mixjax.inference.random.held_parameter import Held, value_of
from mixjax.inference.random.profile_by_section import OneByOne
from mixjax.inference.random.profile_curve import Curve, curve_of
from mixjax.inference.random.profile_of_family import FamilyProfiles, end_of
from mixjax.inference.random.profile_search import OneDataSet
from mixjax.markup import Report, Reported
from mixjax.products.sums import CrossProducts
from mixjax.tables import frame_report
from mixjax.waiting import Waiting

# Limits of a root are sought until zeta there is as wanted to this.
TOLERANCE = 1e-7
MOST_ROUNDS = 60


class Profile(Reported):
    """Profiles of the ML deviance, or of a generalised model's -2 log-likelihood, along every parameter.

    ``zeta(x) = sign(x - estimate) sqrt(deviance(x) - least deviance)``, the deviance minimised over all other
    parameters with this one at x; standard normal in large samples (Bates et al. 2015, J. Stat. Softw. 67(1), section
    5.1). Values are standard deviations, absolute, and correlations; fixed effects of a generalised model are on the
    scale of the linear predictor.

    Attributes:
        estimate: Series, ML estimates of all parameters.
        notes: what there is to say.
    """

    def __init__(self, fitted: AnyFitted, parm: Any = None):
        fitted.check_can("profiles")
        if isinstance(fitted, Fitted):
            reason = profile_search.refusal(fitted.stats)
        else:
            reason = profile_of_family.refusal(fitted)
        if reason:
            raise ValueError(f"no profiles for this model: {reason}; use method='wald' or 'bootstrap'")
        notes = []
        if fitted.reml:
            notes.append("profiles are of the ML deviance: the REML fit was refitted by maximum likelihood")
            fitted = fitted.refitted(False)
        self._searched = _LinearProfiles(fitted) if isinstance(fitted, Fitted) else FamilyProfiles(fitted)
        self._all = self._searched.curves
        self._curves = {curve.name: curve for curve in self._all}
        self._chosen = select(parm, list(self._curves), len(fitted.labels.fixed))
        self.estimate = pd.Series({name: self._curves[name].estimate for name in self._chosen}, name="estimate")
        undefined = [name for name in self._chosen if np.isnan(self._curves[name].estimate)]
        if undefined:
            notes.append(f"no profile of {', '.join(undefined)}: an effect has no variance")
        self._curves = {n: c for n, c in self._curves.items() if not np.isnan(c.estimate)}
        self._failed: set[str] = set()
        self._caps: dict[tuple[int, int], tuple[float, np.ndarray]] = {}
        with Waiting("profiling"):
            self._begin()
        self.notes = tuple(notes)

    # --- evaluations --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The estimates, and the ends of all ranges."""
        ends = []
        estimates = np.array([curve.estimate for curve in self._all])
        for curve in self._curves.values():
            curve.add(curve.estimate, 0.0, estimates)
            if curve.held.kind == "sd":
                ends.append((curve, 0.0))
        self._evaluate(ends)
        for curve, _ in ends:
            self._caps[curve.held.term, curve.held.i] = (curve.zetas[0] ** 2, curve.conditional[0])
        chosen = [self._curves[name] for name in self._chosen if name in self._curves]
        self._evaluate([(c, end) for c in chosen if c.looks_at_ends for end in (c.low, c.high)])

    def _evaluate(self, points: Sequence[tuple[Curve, float]]) -> None:
        points = [(curve, value) for curve, value in points if value not in curve.values]
        if not points:
            return
        least = self._searched.least
        for (curve, value), deviance, good, others in zip(points, *self._searched.minimise(points), strict=True):
            rise = deviance - least
            caps = [self._caps[curve.held.term, e] for e in curve.without_meaning]
            if caps:
                cap, at_zero = min(caps, key=lambda pair: pair[0])
                if rise > cap and (np.isfinite(rise) or curve.looks_at_ends):
                    rise, good, others = cap, True, at_zero.copy()
            others[self._all.index(curve)] = value
            if (not good or not np.isfinite(rise)) and (curve.looks_at_ends or value not in curve.ends):
                self._failed.add(curve.name)
            if rise < -1e-6 * max(1.0, abs(least)) ** 0.5:
                warn(
                    f"the profile of {curve.name} found a deviance {-rise:.2g} below that of the fit: the fit is a "
                    "local minimum; try other start= values",
                    InferenceWarning,
                )
            curve.add(value, float(np.sign(value - curve.estimate) * np.sqrt(max(rise, 0.0))), others)

    def _solve(self, targets: Sequence[tuple[Curve, float]]) -> None:
        """Evaluate until each curve has a point where zeta is the target, or its range has ended."""
        for _ in range(MOST_ROUNDS):
            points = []
            for curve, target in targets:
                if curve.error(target) > TOLERANCE:
                    value = curve.guess(target)
                    if value is not None and value not in curve.values:
                        points.append((curve, value))
            if not points:
                return
            self._evaluate(points)

    # --- results ------------------------------------------------------------------------------------------------------

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """Intervals of all values that a likelihood ratio test does not reject.

        Where zeta does not reach the quantile before the parameter's range ends (a standard deviation of 0, a
        correlation of -1 or 1), the interval ends there, and ``attrs["boundary"]`` names the parameter. Of a
        generalised model it is infinite where the likelihood stays flat, as that of the size of counts that may be
        Poisson's.

        Returns:
            DataFrame with columns ``lower``, ``upper``.
        """
        check_level(level)
        z = float(normal_quantile(0.5 + level / 2))
        curves = [self._curves[name] for name in self._chosen if name in self._curves]
        with Waiting("profiling"):
            self._solve([(curve, side * z) for curve in curves for side in (-1.0, 1.0)])
        rows, boundary = {}, []
        for name in self._chosen:
            if name not in self._curves:
                rows[name] = [np.nan, np.nan]
                continue
            curve, ends = self._curves[name], []
            for side, bound in ((-1.0, curve.low), (1.0, curve.high)):
                reached = curve.error(side * z) <= 1e-4
                last = 0 if side < 0 else -1
                at_bound = curve.values[last] == bound and bool(np.isfinite(curve.zetas[last]))
                if not reached and at_bound:
                    boundary.append(name)
                if not reached and at_bound and isinstance(self._searched, FamilyProfiles):
                    bound = end_of(curve, bound)
                if not reached and not at_bound:
                    self._failed.add(name)
                ends.append(curve.at(side * z) if reached else bound if at_bound else np.nan)
            rows[name] = ends
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["lower", "upper"])
        frame.attrs["boundary"] = tuple(dict.fromkeys(boundary))
        frame.attrs["notes"] = self._notes(frame.attrs["boundary"])
        return frame

    def _notes(self, boundary: Sequence[str] = ()) -> tuple[str, ...]:
        notes = list(self.notes)
        if boundary:
            notes.append(f"intervals that end on the boundary: {', '.join(boundary)}")
        failed = sorted(self._failed & set(self._chosen))
        if failed:
            notes.append(f"searches that did not converge along the profiles of {', '.join(failed)}")
        return tuple(notes)

    def to_frame(self, largest: float = 3.5, points: int = 15) -> pd.DataFrame:
        """Curves as rows: columns ``parameter``, ``value``, ``zeta``, then one for every parameter of the model.

        These hold the conditional estimates: the values of all parameters that minimise the deviance with the row's
        parameter at its value. A standard deviation that vanishes is 0 there, a correlation beside it NaN. Fixed
        effects that are called ``parameter``, ``value`` or ``zeta`` themselves stand as ``fixed_value`` and so on.

        Args:
            largest: zeta up to which each curve goes, or to the end of the parameter's range.
            points: values per curve, at about equal distances of zeta.
        """
        if not largest > 0 or points < 3:
            raise ValueError(f"largest must be positive and points 3 or more, got {largest} and {points}")
        targets = np.linspace(-largest, largest, points)
        curves = [self._curves[name] for name in self._chosen if name in self._curves]
        for _ in range(MOST_ROUNDS):
            wanted = []
            for curve in curves:
                for target in targets:
                    value = curve.guess(target) if curve.error(target) > 0.2 * largest / points else None
                    if value is not None:
                        wanted.append((curve, value))
            if not wanted:
                break
            self._evaluate(wanted)
        rows = [
            (curve.name, value, zeta, *others)
            for curve in curves
            for value, zeta, others in zip(curve.values, curve.zetas, curve.conditional, strict=True)
            if abs(zeta) <= 1.1 * largest
        ]
        own = ["parameter", "value", "zeta"]
        names = [f"fixed_{curve.name}" if curve.name in own else curve.name for curve in self._all]
        return pd.DataFrame(rows, columns=[*own, *names])

    def zeta(self, name: str, values: Any) -> np.ndarray:
        """Signed root deviances of one parameter at given values, each minimised anew."""
        (name,) = select(name, self._chosen, 0)
        if name not in self._curves:
            raise ValueError(f"there is no profile of {name}: an effect has no variance")
        curve = self._curves[name]
        values = np.atleast_1d(np.asarray(values, dtype=np.float64))
        outside = values[~((values >= curve.low) & (values <= curve.high))]
        if len(outside) or (curve.held.kind == "sigma" and (values <= 0).any()):
            raise ValueError(f"{name} lies between {curve.low} and {curve.high}, got {values.tolist()}")
        self._evaluate([(curve, float(value)) for value in values])
        return np.array([curve.zetas[curve.values.index(float(value))] for value in values])

    def _report(self) -> Report:
        frame = self.confint()
        return frame_report(frame, ["95 % profile likelihood intervals"], frame.attrs["notes"])

    def __repr__(self) -> str:
        frame = self.confint()
        return "\n".join(["95 % profile likelihood intervals", frame.to_string(), *frame.attrs["notes"]])


def zeta_of_many(
    stats: CrossProducts, est: Estimates, held: Held, value: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Signed root deviances of one parameter at one value, in B data sets at once.

    The profile interval of a data set covers the value where ``|zeta|`` is at most the normal quantile, so that the
    coverage of a simulation study needs no interval's ends.

    Args:
        stats: of B responses of one design, or of B data sets.
        est: their ML estimates, ``estimate_many(stats, reml=False)``.
        held: the parameter. Of a term with independent effects there are no correlations.
        value: ``(B,)`` or one for all; in the parameter's range, a correlation's ends and an sd of 0 among it.

    Returns:
        zeta ``(B,)``, 0 where the parameter is undefined, as a correlation beside a variance of zero is; and whether
        the fit and the search converged ``(B,)``.

    Raises:
        ValueError: the model has no profiles here.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> from mixjax.inference.random.held_parameter import Held, value_of
        >>> from mixjax.inference.random.profile import zeta_of_many
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.zeros(12), X=np.ones((12, 1)), terms=(term,))
        >>> stats = mj.cross_products(design, np.random.default_rng(0).normal(size=(100, 12)))
        >>> zeta, converged = zeta_of_many(stats, mj.estimate_many(stats, reml=False), Held("sigma"), 1.0)
        >>> bool(converged.all()), bool(80 <= (abs(zeta) < 1.96).sum() <= 100)
        (True, True)
    """
    reason = profile_search.refusal(stats, together=True)
    if reason:
        raise ValueError(f"no profiles of many data sets of this model: {reason}")
    theta, sigma, least = (np.asarray(a) for a in (est.theta, est.sigma, est.criterion))
    found = profile_search.minimise_many(stats, theta, sigma, held, value)
    rise, converged = found.deviance - least, found.converged
    at = profile_search.estimates_start(theta, sigma, stats.layout.qs)
    estimate = value_of(held, stats, at, np.asarray(est.beta))
    if held.kind == "cor":
        # As one of the two variances vanishes its correlation may be anything.
        for effect in (held.i, held.j):
            end = profile_search.minimise_many(stats, theta, sigma, Held("sd", held.term, effect), 0.0)
            cap = end.deviance - least
            converged = np.where(cap < rise, end.converged, converged)
            rise = np.minimum(rise, cap)
        rise = np.where(np.isnan(estimate), 0.0, rise)
    zeta = np.sign(value - np.where(np.isnan(estimate), value, estimate)) * np.sqrt(np.maximum(rise, 0.0))
    return zeta, converged & np.asarray(est.converged) & np.isfinite(rise)


class _LinearProfiles:
    """What :class:`Profile` asks of a linear model: its curves, the least deviance, conditional minima."""

    def __init__(self, fitted: Fitted):
        est = fitted.estimates
        plain = all(structure.has_charts for structure in fitted.layout.structures)
        self._data = (OneDataSet if plain else OneByOne)(fitted.stats, est.theta, est.sigma)
        self.least, self.curves = float(est.criterion), _curves(fitted)

    def minimise(self, points: Sequence[tuple[Curve, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least deviances ``(B,)``, whether they were found ``(B,)``, and all parameters there ``(B, parameters)``."""
        found = self._data.minimise([(curve.held, value) for curve, value in points])
        conditional = np.stack([value_of(c.held, self._data.stats, found.start(), found.beta) for c in self.curves], 1)
        return found.deviance, found.converged, conditional


def _curves(fitted: Fitted) -> list[Curve]:
    variance = fitted.variance_parameters
    curves = []
    sigma = float(fitted.estimates.sigma)
    units = [sigma * np.sqrt((np.asarray(basis.R_inv) ** 2).sum(1)) for basis in fitted.stats.Z_bases]
    parameters = names_of_variances(fitted.labels, fitted.stats.layout.structures)
    for parameter, estimate, se in zip(parameters, variance.estimate[:-1], variance.std_error[:-1], strict=True):
        unit = units[parameter.term][parameter.natural.i] if parameter.kind == "sd" else 1.0
        curves.append(curve_of(parameter, float(estimate), float(se), float(unit)))
    se = variance.std_error[-1]
    curves.append(Curve("sigma", Held("sigma"), sigma, 0.0, np.inf, se if np.isfinite(se) else 0.1 * sigma))
    errors = np.sqrt(np.diag(fitted.estimates.vcov))
    for j, name in enumerate(names_apart(fitted.labels.fixed, variance.names)):
        value = float(fitted.estimates.beta[j])
        curves.append(Curve(name, Held("fixed", i=j), value, -np.inf, np.inf, float(errors[j])))
    return curves


def profile(fitted: AnyFitted, parm: Any = None) -> Profile:
    """Profile the ML deviance, or the -2 log-likelihood of a generalised model; see :class:`Profile`.

    Args:
        fitted: a linear fit by REML is refitted by maximum likelihood, and ``notes`` says so.
        parm: parameters by name, also as in lme4 (``.sig01``); None for all.

    Raises:
        ValueError: an unknown name; a model for which this is not written.
    """
    return Profile(fitted, parm)
