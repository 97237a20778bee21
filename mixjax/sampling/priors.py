"""Priors of a model's parameters: by name or by class, and as the density needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.bases import constant_column
from mixjax.checks import some_of
from mixjax.covariance import Structure, structure_of
from mixjax.covariance.custom import Written
from mixjax.design import Design, refuse_beyond, refuse_trials
from mixjax.engine.integrated import FixedParts
from mixjax.products.cross_products import cross_products
from mixjax.products.sums import CrossProducts
from mixjax.sampling.charts import Chart
from mixjax.sampling.prior import LKJ, Flat, HalfStudentT, Normal, Prior, StudentT, prior

CLASSES = ("intercept", "beta", "sd", "cor", "sigma")
# brms's least scale, and degrees of freedom.
LEAST_SCALE, DF = 2.5, 3.0


class Names(NamedTuple):
    """Names of a model's parameters.

    Attributes:
        fixed: of the columns of X. groups: per term its name. effects: per term those of its effects.
    """

    fixed: tuple[str, ...]
    groups: tuple[str, ...]
    effects: tuple[tuple[str, ...], ...]

    def of_term(self, t: int, structure: Structure) -> list[str]:
        """``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ... of a term's natural parameters."""
        return [parameter.name(self.effects[t], self.groups[t]) for parameter in structure.natural]


def names_of(design: Design, labels: Any = None) -> Names:
    """Names from labels, or numbers where there are none."""
    if labels is None:
        p = np.shape(design.X)[1]
        effects = tuple(tuple(f"e{i}" for i in range(np.shape(term.Z)[1])) for term in design.terms)
        return Names(tuple(f"beta{j}" for j in range(p)), tuple(f"term{t}" for t in range(len(effects))), effects)
    groups = [term.group for term in labels.terms]
    earlier = [groups[:t].count(group) for t, group in enumerate(groups)]
    terms = tuple(f"{group}.{k}" if k else group for group, k in zip(groups, earlier, strict=True))
    return Names(tuple(labels.fixed), terms, tuple(tuple(term.effects) for term in labels.terms))


# --- what users say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Priors:
    """Priors by class and by name, as :func:`mixjax.priors` and :func:`mixjax.default_priors` make them.

    Attributes:
        intercept: of the mean response where all predictors are at their means, as in brms. beta: of all other fixed
            effects, or a list with one for each column of X.
        sd: of every standard deviation of random effects. cor: of the correlations of every term. sigma: of the
            residual standard deviation. None: the default.
        by_name: name -> prior, for single parameters; these go first.
    """

    intercept: Prior | None = None
    beta: Prior | tuple[Prior, ...] | None = None
    sd: Prior | None = None
    cor: Prior | None = None
    sigma: Prior | None = None
    by_name: Mapping[str, Prior] = field(default_factory=dict)

    def __repr__(self) -> str:
        said = [f"{name}={getattr(self, name)!r}" for name in CLASSES if getattr(self, name) is not None]
        return f"priors({', '.join([*([repr(dict(self.by_name))] if self.by_name else []), *said])})"

    def filled(self, other: Priors) -> Priors:
        """With what is None here from there."""
        own = {
            name: getattr(self, name) if getattr(self, name) is not None else getattr(other, name) for name in CLASSES
        }
        return Priors(**own, by_name={**other.by_name, **self.by_name})

    def resolve(
        self, design: Design, labels: Any = None, integrate: bool = True, defaults: Priors | None = None
    ) -> ModelPriors:
        """The priors of this model's parameters, for :func:`mixjax.log_posterior`.

        Args:
            design: the model. labels: its names; without them parameters are ``beta0``, ``sd_e0|term0``, ...
            integrate: integrate over fixed effects whose priors are flat or normal; False: all of them are coordinates.
            defaults: of what is not said here; None: :func:`mixjax.default_priors`.

        Raises:
            ValueError: a name or class that the model does not have, one parameter by two names, a prior with another
                support than its parameter, or one under which there is no proper posterior.
        """
        _refuse_no_model(design)
        names = names_of(design, labels)
        _check_said(self, design, names)
        own = self.filled(default_priors(design) if defaults is None else defaults)
        return _resolved(own, design, names, integrate)


def priors(
    by_name: Mapping[str, Prior] | None = None,
    /,
    *,
    intercept: Prior | None = None,
    beta: Prior | Sequence[Prior] | None = None,
    sd: Prior | None = None,
    cor: Prior | None = None,
    sigma: Prior | None = None,
) -> Priors:
    """Priors for :func:`mixjax.bayes`, by class and by name. What is not said is as :func:`mixjax.default_priors` has
    it.

    Args:
        by_name: parameter -> prior: ``"Days"``, ``"Intercept"`` (where the predictors are 0), ``"sd_Days|Subject"``,
            ``"cor_Days.Intercept|Subject"`` (of terms with one correlation, and of ``adh``), ``"sigma"``; or the
            standard deviations or correlations of a term: ``"sd|Subject"``, ``"cor|Subject"``.
        intercept: of the mean response where all other columns of X are at their means, as in brms.
        beta: of all other fixed effects; a list has one for each column of X.
        sd: of standard deviations of random effects. cor: of the correlations of a term. sigma: of the residual
            standard deviation. Standard deviations are absolute.

    Fixed effects whose priors are flat or normal are integrated out of the posterior exactly, all others are sampled.

    Raises:
        ValueError: what is given is no prior.

    Example:
        >>> import mixjax as mj
        >>> mj.priors({"sd_Days|Subject": mj.prior.half_normal(10)}, beta=mj.prior.normal(0, 50))
        priors({'sd_Days|Subject': half_normal(10)}, beta=normal(0, 50))
    """
    by_name = {} if by_name is None else by_name
    if not isinstance(by_name, Mapping):
        raise ValueError(f"by_name must be a dict, parameter -> prior, got {by_name!r}")
    given: dict[str, Any] = {"intercept": intercept, "beta": beta, "sd": sd, "cor": cor, "sigma": sigma}
    if isinstance(beta, Sequence):
        given["beta"] = tuple(beta)
    each = {**{f"beta[{j}]": one for j, one in enumerate(beta if isinstance(beta, Sequence) else ())}, **by_name}
    each |= {name: one for name, one in given.items() if one is not None and not isinstance(one, tuple)}
    for name, one in each.items():
        if not isinstance(one, Prior):
            raise ValueError(f"{name} must be a prior such as mixjax.prior.normal(0, 10), got {one!r}")
    return Priors(**given, by_name=dict(by_name))


def default_priors(design: Design, weak: bool = False) -> Priors:
    """Priors on the scale of the response. By default those of brms, so that results can be held against it.

    ``student_t(3, median(y), s)`` for the intercept at the means of the predictors, flat ones for other fixed effects,
    ``half_student_t(3, s)`` for all standard deviations, ``lkj(1)`` for correlations; s is the median absolute
    deviation of y times 1.4826, rounded to one decimal, and 2.5 at least; the median is rounded too.

    Args:
        design: the model. weak: proper ones for all parameters, without rounding, for draws from the prior:
            ``normal(median, 2.5 s)`` for the intercept, ``normal(0, 2.5 s / sd(x))`` for the coefficient of x,
            ``half_normal(s)`` for standard deviations, ``lkj(2)``; s is then the standard deviation of y.

    Raises:
        ValueError: the design has what :func:`mixjax.bayes` has no model for.

    Example:
        >>> import mixjax as mj
        >>> design, labels = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> mj.default_priors(design)  # doctest: +NORMALIZE_WHITESPACE
        priors(intercept=student_t(3, 288.7, 59.3), beta=flat(), sd=half_student_t(3, 59.3), cor=lkj(1),
               sigma=half_student_t(3, 59.3))
    """
    _refuse_no_model(design)
    y = np.asarray(design.y, np.float64)
    y = y if design.offset is None else y - np.asarray(design.offset)
    median = float(np.median(y))
    if weak:
        s = float(y.std()) or 1.0
        spread = np.asarray(design.X, np.float64).std(axis=0)
        each = tuple(prior.normal(0.0, 2.5 * s / sd) if sd > 0 else prior.normal(median, 2.5 * s) for sd in spread)
        return Priors(prior.normal(median, 2.5 * s), each, prior.half_normal(s), prior.lkj(2.0), prior.half_normal(s))
    s = max(LEAST_SCALE, round(1.4826 * float(np.median(np.abs(y - median))), 1))
    # R rounds 288.65 as it is written, to 288.7; the number itself lies below.
    centre = round(median * (1.0 + 1e-9), 1)
    half = HalfStudentT(DF, s)
    return Priors(StudentT(DF, centre, s), Flat(), half, LKJ(1.0), half)


# --- what the density needs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TermPriors:
    """Of one random term.

    Attributes:
        scales: of every standard deviation. shapes: LKJ of all correlations, or one prior for each.
    """

    scales: tuple[Prior, ...]
    shapes: Prior | tuple[Prior, ...]


@dataclass(frozen=True)
class ModelPriors:
    """Priors of one model's parameters, in the order of its coordinates ``z (dim,)``: per term logarithms of standard
    deviations, then correlations as :mod:`mixjax.sampling.charts` has them; log sigma; fixed effects that are sampled.
    A JAX pytree whose leaves are the priors' numbers.

    Attributes:
        terms: per random term. sigma: its prior. fixed: of the sampled fixed effects.
        parts: fixed effects that are sampled and integrated. to_beta: ``(p, p)`` from these, sampled first, to beta.
        structures: of the terms.
    """

    terms: tuple[TermPriors, ...]
    sigma: Prior
    fixed: tuple[Prior, ...]
    parts: FixedParts
    to_beta: Any
    structures: tuple[Structure, ...]

    @cached_property
    def charts(self) -> tuple[Chart, ...]:
        """Of every term."""
        return tuple(map(Chart, self.structures))

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return sum(chart.k for chart in self.charts) + 1 + len(self.fixed)

    def cut(self, z: Any) -> tuple[list[Any], Any, Any]:
        """Coordinates ``(dim, ...)`` of every term, log sigma, and sampled fixed effects."""
        parts, at = [], 0
        for chart in self.charts:
            parts.append(z[at : at + chart.k])
            at += chart.k
        return parts, z[at], z[at + 1 :]

    @property
    def proper(self) -> bool:
        """All priors are proper, so that one can draw from them."""
        return bool(np.all(np.asarray(self.parts.precision) > 0)) and all(one.proper for one in self.fixed)


jax.tree_util.register_dataclass(TermPriors, data_fields=["scales", "shapes"], meta_fields=[])
jax.tree_util.register_dataclass(
    ModelPriors, data_fields=[f.name for f in fields(ModelPriors)][:-1], meta_fields=["structures"]
)


def _refuse_no_model(design: Design) -> None:
    """Raise ValueError for designs that are not those of a linear mixed model with independent levels and errors."""
    if not isinstance(design, Design):
        raise ValueError(
            f"priors are for the designs of linear mixed models (mixjax.build_design), got {type(design).__name__}"
        )
    refuse_trials(design)
    refuse_beyond(design, "a Bayesian model (mixjax.bayes)")


def _resolved(own: Priors, design: Design, names: Names, integrate: bool) -> ModelPriors:
    stats = cross_products(design)
    structures = stats.layout.structures
    asked = _Asked(own.by_name)
    fixed, to_gamma = _fixed_priors(own, np.asarray(design.X, np.float64), names, asked)
    terms = tuple(_term_priors(own, t, Chart(s), names, asked) for t, s in enumerate(structures))
    sigma = _checked("sigma", asked.take("sigma") or own.sigma, "positive")
    asked.check_all_taken([*names.fixed, *(n for t, s in enumerate(structures) for n in names.of_term(t, s)), "sigma"])
    parts, to_beta, sampled = _parts(fixed, to_gamma, stats, integrate)
    # Plain numbers would be other types to a compiled program than NumPy's.
    given = tuple(fixed[j] for j in sampled)
    terms, sigma, given = jax.tree.map(np.float64, (terms, sigma, given))
    return ModelPriors(terms, sigma, given, parts, to_beta, structures)


def _check_said(said: Priors, design: Design, names: Names) -> None:
    """Raise ValueError for classes of which the model has no parameter, and for an intercept that is said twice."""
    constant = constant_column(np.asarray(design.X, np.float64))
    if said.intercept is not None and constant is None:
        raise ValueError(
            f"this model has no intercept to give a prior to: its fixed effects are {some_of(names.fixed) or 'none'}; "
            "give theirs by beta= or by name"
        )
    if said.intercept is not None and constant is not None and names.fixed[constant] in said.by_name:
        raise ValueError(
            f"intercept= and {names.fixed[constant]!r} are one parameter, at the means of the predictors and where "
            "they are 0: give one of them"
        )
    charts = [Chart(structure_of(term.structure, np.shape(term.Z)[1])) for term in design.terms]
    if said.cor is not None and not any(chart.n_shapes and not chart.is_written for chart in charts):
        raise ValueError("this model has no correlations of random effects to give a prior to: leave cor= out")
    if said.beta is not None and not [j for j in range(len(names.fixed)) if j != constant]:
        raise ValueError("this model has no fixed effects beside the intercept: leave beta= out")


class _Asked:
    """Priors by name, and which of the names were found."""

    def __init__(self, by_name: Mapping[str, Prior]):
        self._by_name, self._taken = dict(by_name), set[str]()

    def take(self, name: str) -> Prior | None:
        self._taken.add(name)
        return self._by_name.get(name)

    def check_all_taken(self, names: Sequence[str]) -> None:
        unknown = [name for name in self._by_name if name not in self._taken]
        if unknown:
            raise ValueError(
                f"there is no parameter {unknown[0]!r} to give a prior to; there are "
                f"{some_of(list(map(repr, names)), most=20)}"
            )


def _checked(name: str, one: Prior | None, support: str) -> Prior:
    """The prior, if it is one of such a parameter."""
    if one is None:
        raise ValueError(f"there is no default prior of {name}: give one by name, such as mixjax.prior.normal(0, 1)")
    if support == "positive" and not one.proper:
        raise ValueError(
            f"{name} cannot have the prior {one!r}: the posterior of a standard deviation may then be improper, "
            "whatever the data; use mixjax.prior.half_student_t(3, scale), half_normal or exponential"
        )
    if one.support == support or (support == "correlation" and isinstance(one, Normal)):
        return one
    what = {
        "positive": "a standard deviation, which is positive: use half_normal, half_student_t or exponential",
        "real": "a fixed effect or other real number: use flat, normal or student_t",
        "correlation": "a correlation: use lkj, or normal, which is cut to its range",
    }[support]
    raise ValueError(f"{name} cannot have the prior {one!r}: it is {what}")


def _term_priors(own: Priors, t: int, chart: Chart, names: Names, asked: _Asked) -> TermPriors:
    group, each = names.groups[t], names.of_term(t, chart.structure)
    kinds = [parameter.kind for parameter in chart.structure.natural]
    of_scales = [name for name, kind in zip(each, kinds, strict=True) if kind == "sd"]
    of_shapes = [name for name, kind in zip(each, kinds, strict=True) if kind != "sd"]
    whole = asked.take(f"sd|{group}")
    scales = tuple(_checked(name, asked.take(name) or whole or own.sd, "positive") for name in of_scales)
    if isinstance(chart.structure, Written):
        if chart.structure.own.natural is not None:
            raise ValueError(
                f"{chart.structure} reports other numbers than its parameters (natural=), and priors are of the "
                "parameters themselves: write it without natural= for mixjax.bayes"
            )
        return TermPriors(scales, tuple(_checked(name, asked.take(name), "real") for name in of_shapes))
    if not chart.n_shapes:
        return TermPriors(scales, ())
    whole = asked.take(f"cor|{group}") or own.cor
    if chart.separate:
        found = [_checked(name, asked.take(name) or whole, "correlation") for name in of_shapes]
        if any(isinstance(one, Normal) for one in found) or len({id(one) for one in found}) > 1:
            shapes: Prior | tuple[Prior, ...] = tuple(found)
        else:
            shapes = found[0]
    else:
        for name in of_shapes:
            if asked.take(name) is not None:
                raise ValueError(
                    f"{name} cannot have a prior of its own: the correlations of ({' + '.join(names.effects[t])} | "
                    f"{group}) bound each other; give all of them lkj, by 'cor|{group}' or cor="
                )
        shapes = _checked(f"cor|{group}", whole, "correlation")
        if not isinstance(shapes, LKJ):
            raise ValueError(
                f"the correlations of ({' + '.join(names.effects[t])} | {group}) bound each other: their prior is "
                f"lkj, not {shapes!r}"
            )
    for one in shapes if isinstance(shapes, tuple) else (shapes,):
        if isinstance(one, LKJ) and min(np.min(side) for side in chart.beta_of(one.eta)) <= 0:
            raise ValueError(f"{one!r} is improper for the correlations of {group} ({type(chart.structure).__name__})")
    return TermPriors(scales, shapes)


def _fixed_priors(own: Priors, X: np.ndarray, names: Names, asked: _Asked) -> tuple[list[Prior], np.ndarray]:
    """Priors of the coefficients gamma ``(p,)``, and ``T (p, p)`` with ``gamma = T beta``."""
    p = X.shape[1]
    if isinstance(own.beta, tuple) and len(own.beta) != p:
        raise ValueError(f"beta has {len(own.beta)} priors; this model has {p} columns of X: {some_of(names.fixed)}")
    of_beta = own.beta if isinstance(own.beta, tuple) else (own.beta,) * p
    constant = constant_column(X)
    found, T = [], np.eye(p)
    for j, name in enumerate(names.fixed):
        by_name = asked.take(name)
        if by_name is None and j == constant:
            T[j] = X.mean(axis=0) / X[0, j]
        one = by_name or (own.intercept if j == constant else of_beta[j])
        found.append(_checked(name, one, "real"))
    return found, T


def _parts(
    fixed: list[Prior], to_gamma: np.ndarray, stats: CrossProducts, integrate: bool
) -> tuple[FixedParts, np.ndarray, list[int]]:
    exact = [integrate and isinstance(one, Flat | Normal) for one in fixed]
    inner, sampled = np.flatnonzero(exact), [j for j, is_exact in enumerate(exact) if not is_exact]
    to_beta = np.linalg.inv(to_gamma)
    moves = np.asarray(stats.X_basis.R) @ to_beta
    Q, R = np.linalg.qr(moves[:, inner])
    own = [fixed[j] for j in inner]
    parts = FixedParts(
        given=moves[:, sampled],
        Q=Q,
        R_inv=np.linalg.inv(R),
        logdet=np.log(np.abs(R.diagonal())).sum(),
        of_beta=to_gamma[[*sampled, *inner]],
        mean=np.array([one.loc if isinstance(one, Normal) else 0.0 for one in own]),
        precision=np.array([one.scale**-2.0 if isinstance(one, Normal) else 0.0 for one in own]),
    )
    return parts, to_beta[:, [*sampled, *inner]], sampled
