"""The record of a fit with random effects that are correlated by distance: the plain record of levels whose covariance
is known, as the kernels give it at the estimates, and beside it what the kernels' parameters add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mixjax.checks import ConvergenceWarning, DataError, check_start, warn
from mixjax.design import Design, Labels, refuse_trials
from mixjax.engine.kernels import KernelEngine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.kernels import AT_BOUND, KernelFit, design_at, fit_at, fit_kernels, kernel_engine, start_at
from mixjax.fitted.further import CANNOT, FurtherFitted, variance_parameters_with
from mixjax.fitted.information import Information, information_at
from mixjax.fitted.names import names_of_kernels
from mixjax.fitted.parameters import VarianceParameters
from mixjax.fitted.record import Fitted, fit_rows
from mixjax.fitted.search_end import OptimizerInfo, warn_of_convergence
from mixjax.formula.random_terms import new_places
from mixjax.formula.reading import column_names, to_pandas
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows, rows_of
from mixjax.relationship import MOST_LEVELS
from mixjax.residual.transform import Natural

# Rows of a new table whose places are made known at once.
MOST_NEW = 2000


@dataclass(frozen=True)
class KernelFitted(FurtherFitted):
    """One fit with terms whose levels are correlated by distance."""

    what = "correlations by distance"
    extra = "kernels"

    @cached_property
    def kernel_engine(self) -> KernelEngine:
        """The engine of these data, the kernels' parameters included."""
        return kernel_engine(rows_of(self.given), self.reml)

    @cached_property
    def design(self) -> Design:
        """The design with the covariances of levels at the estimates."""
        engine = self.kernel_engine
        return design_at(self.given, engine.places, engine.angles(self.x))

    @property
    def given_rows(self) -> Rows:
        return self.kernel_engine.rows

    @property
    def npar(self) -> int:
        """Fixed effects, covariance parameters, those of the kernels and sigma."""
        return len(self.estimates.beta) + len(self.x) + 1

    def check_can(self, what: str) -> None:
        if what in CANNOT:
            names = " and ".join(repr(self.labels.terms[t].group) for t in self.kernel_engine.places)
            raise ValueError(f"a fit with {names} has no {what}: {CANNOT[what]}")

    # --- at the estimates -------------------------------------------------------------------------------------------

    @cached_property
    def information(self) -> Information:
        """Of the optimiser's coordinates, those of the kernels included, and the logarithm of sigma."""
        engine = self.kernel_engine
        with silently():
            R_inv = np.asarray(engine.rows.X_basis.R_inv)
            sigma, df = np.float64(self.estimates.sigma), np.float64(engine.df)
            return information_at(self.x, self.free, engine.slopes(self.x), df, sigma, R_inv)

    @cached_property
    def variance_parameters(self) -> VarianceParameters:
        engine = self.kernel_engine
        values, slopes = [], []
        for t, angles in engine.angles(self.x).items():
            own, of_log, _ = engine.places[t].bounds.at(angles)
            values.append(own)
            slopes.append(own * of_log)
        r = len(self.x) - engine.k
        natural = Natural(np.concatenate(values), np.diag(np.concatenate(slopes)), 0.0, np.zeros(r))
        return variance_parameters_with(
            self,
            engine.layout.structures,
            engine.rows.Z_bases,
            natural,
            names_of_kernels(self.labels),
            ["positive"] * r,
        )

    # --- other places -----------------------------------------------------------------------------------------------

    def in_parts(self, newdata: Any) -> list[Any] | None:
        available = column_names(newdata)
        if not all(name in available for part in self.labels.state.parsed.random for name in part.group.columns):
            return None
        frame = to_pandas(newdata, available)
        if len(frame) <= MOST_NEW:
            return None
        return [frame.iloc[i : i + MOST_NEW] for i in range(0, len(frame), MOST_NEW)]

    def knowing(self, newdata: Any) -> Fitted:
        """The same fit with the places of a new table among its levels, which no row of the fit is at: their effects
        are predicted from those nearby (kriging). Of grouping factors whose levels the fit does not know, none."""
        labels, engine = self.labels, self.kernel_engine
        available = column_names(newdata)
        terms, places, state = list(self.given.terms), dict(engine.places), labels.state
        names, levels = list(labels.terms), dict(state.levels)
        parts = {part.group.name: part for part in state.parsed.random}
        for t, own in engine.places.items():
            part = parts[labels.terms[t].group]
            if not all(name in available for name in part.group.columns):
                continue
            found = new_places(part, newdata, levels[part.group.name], own)
            if not len(found.levels):
                continue
            _check_number(part.group.name, len(found.levels), len(own.within))
            levels[part.group.name] = np.concatenate([levels[part.group.name], found.levels])
            names[t] = replace(names[t], levels=(*names[t].levels, *map(":".join, found.levels)))
            places[t] = own._replace(
                coordinates=np.concatenate([own.coordinates, found.coordinates]),
                within=np.concatenate([own.within, found.within]),
            )
            terms[t] = replace(
                terms[t], n_groups=len(places[t].within), coordinates=places[t].coordinates, within=places[t].within
            )
        if all(own is engine.places[t] for t, own in places.items()):
            return self
        given = replace(self.given, terms=tuple(terms))
        labels = replace(labels, terms=tuple(names), state=replace(state, levels=levels))
        with silently():
            fit = fit_at(kernel_engine(rows_of(given), self.reml, places), self.x, self.free)
        return _record(labels, given, fit, self.reml, self.optimizer)

    # --- again ------------------------------------------------------------------------------------------------------

    def fit_of(self, rows: Rows, labels: Labels, reml: bool) -> Fitted:
        if not rows.design.has_kernels:
            return fit_rows(rows, labels, reml, None, None)
        return fit_kernel_rows(rows, labels, reml)

    def estimates_of(self, y: np.ndarray, reml: bool) -> Estimates:
        return fit_kernels(replace(self.kernel_engine.with_response(y), reml=reml), self.x).estimates


def fit_kernel_rows(rows: Rows, labels: Labels, reml: bool, start: Any = None) -> Fitted:
    """Fit a model with correlations by distance, from rows in their bases.

    Args:
        start: ``(k,)`` theta, or None.

    Warns:
        ConvergenceWarning: says why and what to try. DataWarning: a range at its bound.
    """
    refuse_trials(rows.design)
    engine = kernel_engine(rows, reml)
    start = check_start(start)
    found = fit_kernels(engine, None if start is None else start_at(engine, start))
    est = found.estimates
    info = OptimizerInfo(
        "trust-region Newton", int(est.iterations), float(est.grad_norm), Result(int(est.result)).message
    )
    if not est.converged:
        warn_of_convergence(labels.formula, info)
    record = _record(labels, rows.design, found, reml, info)
    vars(record)["kernel_engine"] = engine
    _warn_of_bounds(record)
    return record


def _record(labels: Labels, given: Design, fit: KernelFit, reml: bool, info: OptimizerInfo) -> KernelFitted:
    record = KernelFitted(labels, fit.rows.stats, fit.estimates, reml, info, given, None, fit.x, fit.free)
    vars(record).update(design=fit.rows.design, rows=fit.rows)
    return record


def _warn_of_bounds(record: KernelFitted) -> None:
    """Say where the data do not tell a kernel's parameter."""
    engine = record.kernel_engine
    start, positions = engine.k, np.cumsum([0, *(s.k for s in engine.layout.structures)])
    for t, places in engine.places.items():
        group = record.labels.terms[t].group
        for i, name in enumerate(places.kernel.parameters):
            angle = record.x[start + i]
            if record.x[positions[t]] == 0 or np.abs(np.cos(angle)) > AT_BOUND:
                continue
            value, low = places.bounds.at(record.x[start : start + places.kernel.k])[0][i], np.sin(angle) < 0
            meaning = {
                ("range", True): "effects of different places are independent as far as the data tell",
                ("range", False): "the correlation hardly falls within the map, and its standard deviation is not told",
                ("smoothness", True): "the correlation falls at once, as that of independent effects",
                ("smoothness", False): "the data want a smoother kernel: gau",
            }[name, bool(low)]
            warn(f"the {name} of '{group}' ended at its bound, {value:.4g}: {meaning}", ConvergenceWarning)
        start += places.kernel.k


def _check_number(group: str, new: int, known: int) -> None:
    if new + known > MOST_LEVELS:
        raise DataError(
            f"newdata has {new} places that '{group}' does not know, and {known} are known: {MOST_LEVELS} in all at a "
            "time, because all of them make one dense matrix; predict fewer rows at a time"
        )
