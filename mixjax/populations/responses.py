"""Responses of a population, and the random effects that are drawn with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixjax.families import links, sampling
from mixjax.populations.expressions import Kind, Scope
from mixjax.populations.noise import as_noise
from mixjax.populations.predictors import columns_of, covariance_root
from mixjax.populations.variables import Spec, Variable, bind_parameters, factor_of, shown, values_of

# Family -> its links here, the first one is the default: to draw from more than mixjax.families have a likelihood for.
FAMILIES = {
    "gaussian": ("identity", "log"),
    "binomial": ("logit", "probit", "cloglog", "log", "identity"),
    "poisson": ("log", "sqrt", "identity"),
}
# Linear predictor -> mean.
LINKS = {link: links.LINKS[link] for of_family in FAMILIES.values() for link in of_family}


@dataclass(frozen=True, eq=False)
class RandomEffects(Spec):
    """Effects of a factor's levels; see :func:`random_effects`."""

    by: str
    sd: Any = None
    cor: Any = None
    cov: Any = None
    distribution: Any = "normal"
    stage = "y"

    def bind(self, name: str, scope: Scope) -> Variable:
        factor_of(self.by, f"{name}: by", scope)
        cov, several = _covariance(self.sd, self.cor, self.cov, name)
        q = len(cov)
        own = as_noise(self.distribution, f"{name}: distribution")
        parts = [f"{name}_{j}" for j in range(q)] if several else [name]
        leaves = {"root": covariance_root(cov, q, name), "numbers": np.array(own.numbers, np.float64)}
        return Variable(name, self.by, {part: Kind() for part in parts}, _effects, (own.static, q), leaves)

    def describe(self) -> str:
        size = f"cov {shown(np.asarray(self.cov).tolist())}" if self.cov is not None else f"sd {shown(self.sd)}"
        cor = "" if self.cor is None else f", cor {shown(np.asarray(self.cor).tolist())}"
        return f"random effects: {size}{cor}, {as_noise(self.distribution, 'distribution').title}"


def random_effects(
    by: str, sd: Any = None, cor: Any = None, cov: Any = None, distribution: Any = "normal"
) -> RandomEffects:
    """Random effects of the levels of a factor, drawn anew with each sample of responses.

    ``b = R z`` per level, with ``R R'`` the covariance (R is ``S C^{1/2}``: standard deviations times the symmetric
    root of the correlations) and z of the distribution. All distributions of mixjax have mean 0 and variance 1 unless
    they are told otherwise, so that the covariance of b is the one that is stated.

    Args:
        by: the factor.
        sd: standard deviations: a number for one effect, which expressions call by the variable's name, or a list,
            whose effects they call ``a[0]``, ``a[1]``, ...
        cor: correlations, 0 by default: one number for all pairs, or ``(q, q)``.
        cov: ``(q, q)`` covariances, or the variance of one effect, in place of sd and cor.
        distribution: ``"normal"``, :func:`student_t` (multivariate, where there are several effects),
            :func:`skew_normal`, :func:`shifted_gamma` (of these two the entries of z are independent),
            :func:`contaminated_normal`, or a function ``(key, (m, q)) -> (m, q)`` of z, which is not rescaled.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     g=mj.factor(10), x=mj.normal(), a=mj.random_effects("g", sd=(1, 0.5), cor=0.3),
        ...     y=mj.response("a[0] + a[1] * x", error_scale=1))
        >>> pop.sample_x(20, key=1).sample_y(key=2, effects=True).columns.tolist()
        ['g', 'x', 'a_0', 'a_1', 'y']
    """
    return RandomEffects(by, sd, cor, cov, distribution)


def _covariance(sd: Any, cor: Any, cov: Any, name: str) -> tuple[np.ndarray, bool]:
    """The covariance, and whether there are several effects (or a list of one)."""
    if (sd is None) == (cov is None):
        raise ValueError(f"{name}: give either sd (and cor) or cov")
    try:
        given = np.asarray(sd if cov is None else cov, np.float64)
        correlations = None if cor is None else np.asarray(cor, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: sd, cor and cov must be numbers, got {sd if cov is None else cov!r}") from None
    if cov is not None:
        if cor is not None:
            raise ValueError(f"{name}: cov has the correlations in it; leave out cor")
        if given.ndim == 0:
            if not (np.isfinite(given) and given >= 0):
                raise ValueError(f"{name}: cov of one effect is its variance, 0 or more, got {given}")
            return given.reshape(1, 1), False
        if given.ndim != 2 or given.shape[0] != given.shape[1] or not given.size:
            raise ValueError(f"{name}: cov must be (q, q), got shape {given.shape}")
        return given, True
    if given.ndim > 1 or not given.size:
        raise ValueError(f"{name}: sd must be a number or a list of numbers, got shape {given.shape}")
    if not (np.isfinite(given) & (given >= 0)).all():
        raise ValueError(f"{name}: sd must be 0 or more, got {given.tolist()}")
    several, sds = given.ndim == 1, np.atleast_1d(given)
    q = len(sds)
    C = np.eye(q)
    if correlations is not None:
        if q == 1:
            raise ValueError(f"{name}: one effect has no correlations; leave out cor")
        if correlations.ndim == 0:
            C = np.where(np.eye(q, dtype=bool), 1.0, correlations)
        elif correlations.shape == (q, q):
            C = correlations
        else:
            raise ValueError(f"{name}: cor must be a number or ({q}, {q}), got shape {correlations.shape}")
        if not np.allclose(np.diag(C), 1) or not np.allclose(C, C.T) or not np.isfinite(C).all():
            raise ValueError(f"{name}: cor must be symmetric with a diagonal of 1, got {C.tolist()}")
        smallest = np.linalg.eigvalsh(C)[0]
        if smallest < -1e-8:
            raise ValueError(
                f"{name}: correlations {C.tolist()} are not positive semidefinite (smallest eigenvalue {smallest:.3g})"
            )
    return sds[:, None] * C * sds, several


def _effects(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    sampler, q = static
    z = sampler(key, (count, q), *leaves["numbers"])
    return tuple(columns_of(z, leaves["root"])), ()


# --- responses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Response(Spec):
    """A response; see :func:`response`."""

    mean: Any
    family: str = "gaussian"
    link: str | None = None
    error_scale: Any = None
    error: Any = "normal"
    trials: Any = 1
    stage = "y"

    @property
    def sources(self) -> tuple[Any, ...]:
        return tuple(source for source in (self.mean, self.error_scale, self.trials) if source is not None)

    def bind(self, name: str, scope: Scope) -> Variable:
        if self.family not in FAMILIES:
            raise ValueError(f"{name}: family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        possible = FAMILIES[self.family]
        link = possible[0] if self.link is None else self.link
        if link not in possible:
            raise ValueError(f"{name}: the links of {self.family} are {', '.join(possible)}; got {self.link!r}")
        gaussian, binomial = self.family == "gaussian", self.family == "binomial"
        if gaussian and self.error_scale is None:
            raise ValueError(f"{name}: a gaussian response needs error_scale, the standard deviation of its errors")
        if not gaussian and (self.error_scale is not None or not isinstance(self.error, str) or self.error != "normal"):
            raise ValueError(
                f"{name}: error_scale and error belong to gaussian responses; a {self.family} response that varies "
                "more has a random effect per row: factor(n, balance='cycle')"
            )
        if not binomial and not (isinstance(self.trials, int) and self.trials == 1):
            raise ValueError(f"{name}: trials belong to binomial responses")
        sources = {"mean": (self.mean, "any")}
        if gaussian:
            sources["error_scale"] = (self.error_scale, "scale")
        if binomial:
            sources["trials"] = (self.trials, "count")
        bound = bind_parameters(name, sources, scope)
        single = binomial and bound.bounds["trials"].constant == 1
        own = as_noise(self.error, f"{name}: error")
        failures = bound.failures
        if binomial:
            failures += (
                f"{name}: the mean must be a probability, and {link} of {shown(self.mean)!r} gives none in some rows",
            )
        if self.family == "poisson":
            failures += (
                f"{name}: the mean must be between 0 and 10^9, and {link} of {shown(self.mean)!r} is not in some rows",
            )
        static = (bound.static, self.family, link, single, own.static)
        leaves = {**bound.leaves, "numbers": np.array(own.numbers, np.float64)}
        kind = Kind(dtype=None if gaussian else np.int64)
        return Variable(name, None, {name: kind}, _response, static, leaves, failures, bound.needs)

    def describe(self) -> str:
        link = f", {self.link}" if self.link else ""
        text = f"{self.family}{link}: {shown(self.mean)}"
        if self.error_scale is not None:
            text += f"; error_scale {shown(self.error_scale)}"
        error = as_noise(self.error, "error").title
        text += "" if error == "normal" else f", {error}"
        return text + ("" if isinstance(self.trials, int) and self.trials == 1 else f"; trials {shown(self.trials)}")


def response(
    mean: Any,
    family: Literal["gaussian", "binomial", "poisson"] = "gaussian",
    link: str | None = None,
    error_scale: Any = None,
    error: Any = "normal",
    trials: Any = 1,
) -> Response:
    """A response of predictors, random effects and earlier responses.

    Args:
        mean: expression, as text or a function of the variables that its arguments are named after: the linear
            predictor, and without a link the mean itself.
        family: ``"gaussian"``: mean plus error. ``"binomial"``: number of successes in ``trials``. ``"poisson"``.
        link: gaussian: identity, log; binomial: logit, probit, cloglog, log, identity; poisson: log, sqrt, identity.
            The first is the default.
        error_scale: of a gaussian response, the standard deviation of its errors: a number, or an expression such as
            ``"0.5 + x**2"``.
        error: distribution of the errors: ``"normal"``, :func:`student_t`, :func:`skew_normal`, :func:`shifted_gamma`,
            :func:`contaminated_normal`, all scaled to variance 1 unless told otherwise, or a function
            ``(key, (n,)) -> (n,)``, which is not rescaled. The error is error_scale times that.
        trials: of a binomial response, a number or an expression.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     group=mj.categorical(["t", "c"]), x=mj.normal(),
        ...     y=mj.response("1 + x + by_level(group, {'t': 2, 'c': 0})", error_scale="0.5 + abs(x)"),
        ...     passed=mj.response("y - 2", family="binomial"))
        >>> pop.sample_x(3, key=1).sample_y(key=2).columns.tolist()
        ['group', 'x', 'y', 'passed']
    """
    return Response(mean, family, link, error_scale, error, trials)


def _response(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    parameters, family, link, single, sampler = static
    values, flags = values_of(parameters, leaves, count, column)
    mean = LINKS[link](values["mean"])
    if family == "gaussian":
        return (mean + values["error_scale"] * sampler(key, (count,), *leaves["numbers"]),), flags
    if family == "poisson":
        return (sampling.poisson(key, mean),), (*flags, ~((mean >= 0) & (mean <= 1e9)).all())
    drawn = sampling.bernoulli(key, mean) if single else sampling.binomial(key, values["trials"], mean)
    return (drawn,), (*flags, ~((mean >= 0) & (mean <= 1)).all())
