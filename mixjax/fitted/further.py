"""Records of fits whose search has coordinates beside those of the random effects' covariances."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from mixjax.bases import Basis, in_span
from mixjax.covariance import Structure
from mixjax.design import Design, Labels
from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.names import names_of_variances
from mixjax.fitted.parameters import VarianceParameters, inside, natural_with_slopes
from mixjax.fitted.record import Fitted
from mixjax.formula.checks import check_noise, check_varies
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows, rows_of
from mixjax.residual.transform import Natural

# What such a fit does not have, and what to do instead.
CANNOT = {
    "profiles": "use confint(method='wald') or confint(method='bootstrap')",
    "Kenward-Roger degrees of freedom": "use ddf='satterthwaite'",
    "refits without units": "use influence(method='fixed-theta'), or fit the table without the rows in question",
    "sensitivities": "use influence(method='fixed-theta')",
    "exact likelihood ratio tests": "use mixjax.compare(..., method='bootstrap')",
    "second-order or bootstrap prediction errors": "use method='henderson'",
    "resampling of residuals or cases": "use kind='parametric', and intervals other than 'bca'",
    "scenarios": "use fit.simulate() and fit.refit_many(), or bootstrap()",
}


@dataclass(frozen=True)
class FurtherFitted(Fitted):
    """One fit with further parameters: of the residuals, or of correlations by distance. What takes the variance
    parameters as known is that of a plain record; what looks at the criterion is its own.

    ``design``, ``stats`` and ``rows`` are those of the plain model at the estimates; ``kept`` and ``given`` are the
    design as it was.

    Attributes:
        x: ``(k,)`` the optimiser's coordinates, the further ones last. free: ``(k,)``.
    """

    x: np.ndarray = field(default_factory=lambda: np.zeros(0))
    free: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def given(self) -> Design:
        assert self.kept is not None
        return self.kept

    @property
    @abstractmethod
    def given_rows(self) -> Rows:
        """The design as it was given, in its bases."""

    # What the further parameters are called where a fit of them is refused, and their name among Estimates.
    what: ClassVar[str]
    extra: ClassVar[str]

    @abstractmethod
    def fit_of(self, rows: Rows, labels: Labels, reml: bool) -> Fitted:
        """The model fitted to rows in their bases."""

    @abstractmethod
    def estimates_of(self, y: np.ndarray, reml: bool) -> Estimates:
        """Estimates of another response ``(nobs,)``, from those of the fit on."""

    def refitted(self, reml: bool) -> Fitted:
        return self if reml == self.reml else self.fit_of(self.given_rows, self.labels, reml)

    def refit(self, y: np.ndarray, reml: bool | None = None) -> Fitted:
        given, labels, rows = self.given, self.labels, self.given_rows
        check_varies(y, labels.response)
        y = np.asarray(y, np.float64)
        own = y if given.offset is None else y - given.offset
        check_noise(own, np.asarray(given.X), rows.Q, given.weights, labels.response)
        if labels.response in labels.frame:
            labels = replace(labels, frame=labels.frame.assign(**{labels.response: y}))
        return self.fit_of(rows.with_response(y), labels, self.reml if reml is None else reml)

    def with_design(self, design: Design, labels: Labels) -> Fitted:
        """Another model of the same response and the same residuals, fitted by the same criterion; weights of the
        design are not looked at."""
        return self.fit_of(rows_of(replace(design, weights=self.given.weights)), labels, self.reml)

    def fit_many(
        self,
        Y: np.ndarray,
        keep: tuple[str, ...],
        reml: bool | None = None,
        engine: EngineName = "auto",
        chunk: int | None = None,
    ) -> Estimates:
        """One response after another, by NumPy, from the estimates of the fit; see :func:`mixjax.estimate_many`."""
        if engine == "jax":
            raise ValueError(
                f"engine='jax' has no program for fits with {self.what}; they are fitted one after another by NumPy: "
                "leave engine= out"
            )
        rows, given, reml = self.given_rows, self.given, self.reml if reml is None else reml
        Y = np.asarray(Y, np.float64)
        if not len(Y):
            raise ValueError("there are no responses to fit")
        own = Y if given.offset is None else Y - given.offset
        with silently():
            exact = in_span(np.where(np.isfinite(own), own, 0.0), np.asarray(given.X), rows.Q, rows.sqrt_w)
        nothing = _nothing_like(self.estimates)
        fits = []
        for y, no_noise in zip(Y, exact, strict=True):
            if no_noise or not np.isfinite(y).all():
                code = Result.NO_NOISE if no_noise and np.isfinite(y).all() else Result.NOT_FINITE
                fits.append(nothing._replace(result=np.asarray(int(code))))
                continue
            fits.append(self.estimates_of(y, reml))
        kept = {*keep, self.extra}

        def stacked(name: str) -> Any:
            if name not in kept:
                return None
            values = [getattr(est, name) for est in fits]
            if isinstance(values[0], tuple):
                return tuple(np.stack(parts) for parts in zip(*values, strict=True))
            return np.stack(values)

        return Estimates._make(stacked(name) for name in Estimates._fields)


def _nothing_like(est: Estimates) -> Estimates:
    """What is known of a response that cannot be fitted."""

    def nan(value: Any) -> Any:
        if value is None:
            return None
        return tuple(map(nan, value)) if isinstance(value, tuple) else np.full(np.shape(value), np.nan)

    return Estimates(*map(nan, est))._replace(
        converged=np.bool_(False), singular=np.bool_(False), iterations=np.asarray(0)
    )


def variance_parameters_with(
    fitted: FurtherFitted,
    structures: Sequence[Structure],
    Z_bases: Sequence[Basis],
    natural: Natural,
    names: Sequence[str],
    kinds: Sequence[str],
) -> VarianceParameters:
    """Standard deviations and correlations of random effects, the further parameters, then sigma.

    Args:
        structures, Z_bases: of the search. natural: the further parameters at the estimates. names, kinds: of these.
    """
    info, labels, sigma = fitted.information, fitted.labels, float(fitted.estimates.sigma)
    parameters = names_of_variances(labels, structures)
    k, n, r = sum(s.k for s in structures), len(parameters), len(natural.values)
    middling = sigma / np.exp(natural.log_sigma)
    with silently():
        relative, by_x = natural_with_slopes(fitted.x[:k], tuple(structures), Z_bases)
        is_sd = np.array([parameter.is_scaled for parameter in parameters], bool)
        values = np.concatenate([np.where(is_sd, middling * relative, relative), natural.values, [sigma]])
        slopes = np.zeros((n + r + 1, k + r + 1))
        slopes[:n, :k] = np.where(is_sd[:, None], middling * by_x, by_x)
        slopes[:n, -1] = np.where(is_sd, values[:n], 0.0)
        slopes[n : n + r, k : k + r] = natural.slopes
        slopes[-1, k : k + r], slopes[-1, -1] = sigma * natural.by_phi, sigma
        covariance = slopes @ info.covariance @ slopes.T
    all_kinds = (*(parameter.kind for parameter in parameters), *kinds, "sigma")
    free = inside(all_kinds, values, covariance)
    free[n : n + r] &= fitted.free[k:]
    covariance = np.where(free & free[:, None] & info.regular, covariance, np.nan)
    all_names = (*(parameter.name for parameter in parameters), *names, "sigma")
    return VarianceParameters(all_names, all_kinds, values, covariance, free)
