"""Priors of a model's parameters: by name or by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.bases import constant_column
from mixjax.checks import some_of
from mixjax.covariance import Structure
from mixjax.covariance.custom import Written
from mixjax.design import Design, RepeatedDesign, refuse_beyond, refuse_trials
from mixjax.engine.integrated import FixedParts
from mixjax.estimation.residual import correlation_of
from mixjax.families import Family, family_of
from mixjax.products.family_rows import rows_in
from mixjax.products.rows import rows_of
from mixjax.products.visits import visit_rows
from mixjax.sampling.charts import Chart
from mixjax.sampling.model_priors import ModelPriors, TermPriors
from mixjax.sampling.names import Names, names_of
from mixjax.sampling.others import Other
from mixjax.sampling.prior import LKJ, Flat, HalfStudentT, LogNormal, Normal, Prior, StudentT, prior

CLASSES = ("intercept", "beta", "sd", "cor", "sigma", "dispersion", "rho", "zi", "family")
# brms's least scale, and degrees of freedom.
LEAST_SCALE, DF = 2.5, 3.0


@dataclass(frozen=True)
class Priors:
    """Priors by class and by name, as :func:`mixjax.priors` and :func:`mixjax.default_priors` make them.

    Attributes:
        intercept: of the mean response where all predictors are at their means, as in brms. beta: of all other fixed
            effects, or a list with one for each column of X.
        sd: of every standard deviation of random effects, or of visits. cor: of the correlations of every term. sigma:
            of the residual standard deviation. dispersion: of the coefficients of a dispersion formula; a tuple has one
            for each. rho: of the correlation of residuals. zi: of extra zeros, on the scale of the logit. family: of
            the parameters of a family, such as the size of a negative binomial. None: the default.
        by_name: name -> prior, for single parameters; these go first.
    """

    intercept: Prior | None = None
    beta: Prior | tuple[Prior, ...] | None = None
    sd: Prior | None = None
    cor: Prior | None = None
    sigma: Prior | None = None
    dispersion: Prior | tuple[Prior, ...] | None = None
    rho: Prior | None = None
    zi: Prior | tuple[Prior, ...] | None = None
    family: Prior | tuple[Prior, ...] | None = None
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
        self,
        design: Any,
        labels: Any = None,
        integrate: bool = True,
        defaults: Priors | None = None,
        family: Any = None,
        sigma: float | None = None,
    ) -> ModelPriors:
        """The priors of this model's parameters, for :func:`mixjax.log_posterior`.

        Args:
            design: the model: a :class:`mixjax.Design`, or :class:`mixjax.RepeatedDesign`. labels: its names; without
                them parameters are ``beta0``, ``sd_e0|term0``, ...
            integrate: integrate over fixed effects whose priors are flat or normal; False: all of them are coordinates,
                as they always are in a generalised model.
            defaults: of what is not said here; None: :func:`mixjax.default_priors`.
            family: of a generalised linear mixed model. sigma: a residual standard deviation that is known.

        Raises:
            ValueError: a name or class that the model does not have, one parameter by two names, a prior with another
                support than its parameter, or one under which there is no proper posterior.
        """
        family = None if family is None else family_of(family)
        _refuse_no_model(design, family)
        model = _model_of(design, labels, family, sigma)
        _check_said(self, model)
        own = self.filled(default_priors(design, family=family) if defaults is None else defaults)
        return _resolved(own, model, integrate and family is None)


def priors(
    by_name: Mapping[str, Prior] | None = None,
    /,
    *,
    intercept: Prior | None = None,
    beta: Prior | Sequence[Prior] | None = None,
    sd: Prior | None = None,
    cor: Prior | None = None,
    sigma: Prior | None = None,
    dispersion: Prior | None = None,
    rho: Prior | None = None,
    zi: Prior | None = None,
    family: Prior | None = None,
) -> Priors:
    """Priors for :func:`mixjax.bayes`, by class and by name. What is not said is as :func:`mixjax.default_priors` has
    it.

    Args:
        by_name: parameter -> prior: ``"Days"``, ``"Intercept"`` (where the predictors are 0), ``"sd_Days|Subject"``,
            ``"cor_Days.Intercept|Subject"`` (of terms with one correlation, and of ``adh``), ``"sigma"``; or the
            standard deviations or correlations of a term: ``"sd|Subject"``, ``"cor|Subject"``.
        intercept: of the mean response where all other columns of X are at their means, as in brms.
        beta: of all other fixed effects; a list has one for each column of X.
        sd: of standard deviations of random effects, of repeated measures those of visits. cor: of the correlations of
            a term. sigma: of the residual standard deviation; of a model with a dispersion formula where its columns
            are at their means, by name (``"sigma"``) where they are 0. Standard deviations are absolute.
        dispersion: of the coefficients of ``dispersion=`` and ``dispformula=``, ``"disp~x"``, which are of logarithms.
        rho: of the correlation of residuals, ``"rho|Subject"``, of two rows at the shortest distance in time, which is
            that of distance 1 where there is one: lkj, uniform where its number is 1, or normal, cut to its range.
        zi: of coefficients of ``ziformula=``, ``"zi~x"``, and of the logit of a single probability,
            ``"zero_inflation"``.
        family: of a family's parameters, ``"size"``, ``"dispersion"``, ``"precision"``, ``"sigma"``.

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
    given |= {"dispersion": dispersion, "rho": rho, "zi": zi, "family": family}
    if isinstance(beta, Sequence):
        given["beta"] = tuple(beta)
    each = {**{f"beta[{j}]": one for j, one in enumerate(beta if isinstance(beta, Sequence) else ())}, **by_name}
    each |= {name: one for name, one in given.items() if one is not None and not isinstance(one, tuple)}
    for name, one in each.items():
        if not isinstance(one, Prior):
            raise ValueError(f"{name} must be a prior such as mixjax.prior.normal(0, 10), got {one!r}")
    return Priors(**given, by_name=dict(by_name))


def default_priors(design: Any, weak: bool = False, family: Any = None) -> Priors:
    """Priors on the scale of the response. By default those of brms, so that results can be held against it.

    ``student_t(3, median(y), s)`` for the intercept at the means of the predictors, flat ones for other fixed effects,
    ``half_student_t(3, s)`` for all standard deviations, ``lkj(1)`` for correlations; s is the median absolute
    deviation of y times 1.4826, rounded to one decimal, and 2.5 at least; the median is rounded too. With a family the
    same of responses on the scale of its link, of a binomial one 0 and 2.5.

    Proper in any case, as brms's are not all: coefficients of a dispersion ``normal(0, 1 / sd(w))`` for a column w, of
    extra zeros ``normal(0, 1.5)`` on the logit, correlations of residuals ``lkj(1)``, parameters of a family
    ``log_normal(0, 2)`` (``half_student_t(3, s)`` for sigma, ``log_normal(2, 2)`` for a precision).

    Args:
        design: the model, of random effects or of repeated measures.
        weak: proper ones for all parameters, without rounding, for draws from the prior: ``normal(median, 2.5 s)`` for
            the intercept, ``normal(0, 2.5 s / sd(x))`` for the coefficient of x, ``half_normal(s)`` for standard
            deviations, ``lkj(2)``; s is then the standard deviation of y.
        family: of a generalised linear mixed model.

    Raises:
        ValueError: the design has what :func:`mixjax.bayes` has no model for.

    Example:
        >>> import mixjax as mj
        >>> design, labels = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> mj.default_priors(design)  # doctest: +NORMALIZE_WHITESPACE
        priors(intercept=student_t(3, 288.7, 59.3), beta=flat(), sd=half_student_t(3, 59.3), cor=lkj(1),
               sigma=half_student_t(3, 59.3))
    """
    family = None if family is None else family_of(family)
    _refuse_no_model(design, family)
    y = np.asarray(design.y, np.float64)
    if family is not None:
        y = np.asarray(family.plain.eta_start(y, None if design.size is None else np.asarray(design.size, np.float64)))
    y = y if design.offset is None else y - np.asarray(design.offset)
    median = float(np.median(y))
    binary = family is not None and family.support in ("trials", "unit")
    if weak:
        s = float(y.std()) or 1.0
        median, s = (0.0, LEAST_SCALE) if binary else (median, s)
        spread = np.asarray(design.X, np.float64).std(axis=0)
        each = tuple(prior.normal(0.0, 2.5 * s / sd) if sd > 0 else prior.normal(median, 2.5 * s) for sd in spread)
        own = Priors(prior.normal(median, 2.5 * s), each, prior.half_normal(s), prior.lkj(2.0), prior.half_normal(s))
        return _with_others(own, design, family)
    s = max(LEAST_SCALE, round(1.4826 * float(np.median(np.abs(y - median))), 1))
    # R rounds 288.65 as it is written, to 288.7; the number itself lies below.
    centre = round(median * (1.0 + 1e-9), 1)
    centre, s = (0.0, LEAST_SCALE) if binary else (centre, s)
    half = HalfStudentT(DF, s)
    return _with_others(Priors(StudentT(DF, centre, s), Flat(), half, LKJ(1.0), half), design, family)


def _with_others(own: Priors, design: Any, family: Family | None) -> Priors:
    """With priors of parameters of residuals or of the family, and without one of a sigma that is not there."""
    if isinstance(design, RepeatedDesign):
        return replace(own, sigma=None)
    if family is None:
        W = design.dispersion
        return replace(
            own,
            dispersion=None if W is None or not np.shape(W)[1] else _of_columns(np.asarray(W, np.float64), 1.0),
            rho=None if design.residual is None else LKJ(1.0),
        )
    columns = design.psi_columns or (None,) * family.n_psi
    found: dict[str, tuple[Prior, ...]] = {}
    for name, W in zip(family.psi_names, columns, strict=True):
        which = _class_of(name, W)
        if W is not None:
            one = _of_columns(np.asarray(W, np.float64), 1.0 if which == "dispersion" else 1.5)
        elif which == "zi":
            one = (Normal(0.0, 1.5),)
        else:
            centre = 2.0 if name == "precision" else 0.0
            one = (own.sd if name == "sigma" and own.sd is not None else LogNormal(centre, 2.0),)
        found[which] = found.get(which, ()) + one
    return replace(own, sigma=None, **found)  # type: ignore[arg-type]


def _class_of(name: str, columns: Any) -> str:
    return "zi" if name == "zero_inflation" else "family" if columns is None else "dispersion"


def _of_columns(W: np.ndarray, scale: float) -> tuple[Prior, ...]:
    return tuple(Normal(0.0, scale / sd) if sd > 0 else StudentT(DF, 0.0, 2.5) for sd in W.std(axis=0))


# --- resolved for a model -------------------------------------------------------------------------------------------

# Parts of a design that are no model of independent levels and errors, and that priors know nevertheless.
KNOWN = frozenset({"levels", "dispersion", "residual"})


def _refuse_no_model(design: Any, family: Family | None = None) -> None:
    """Raise ValueError for designs of which there is no model."""
    if isinstance(design, RepeatedDesign) and family is None:
        return
    if not isinstance(design, Design):
        raise ValueError(
            f"priors are for the designs of mixed models (mixjax.build_design), got {type(design).__name__}"
        )
    if family is not None:
        return  # rows_in() refuses what a family cannot have
    refuse_trials(design)
    refuse_beyond(design, "a Bayesian model (mixjax.bayes)", known=KNOWN)


class _Model(NamedTuple):
    """What priors ask of a design.

    Attributes:
        X: ``(n, p)``. R: ``(p, p)`` the change to its basis. structures: of the terms. names: of the parameters.
        others: of residuals or the family: class, number within its class, and the parameter without its prior.
        has_sigma: there is a sigma to estimate. held: log sigma where it is known. means: of the dispersion's columns.
    """

    X: np.ndarray
    R: np.ndarray
    structures: tuple[Structure, ...]
    names: Names
    others: tuple[tuple[str, int, Other], ...]
    has_sigma: bool
    held: float
    means: np.ndarray


def _model_of(design: Any, labels: Any, family: Family | None, sigma: float | None) -> _Model:
    X, names, nothing = np.asarray(design.X, np.float64), names_of(design, labels, family), np.zeros(0)
    if isinstance(design, RepeatedDesign):
        visits = visit_rows(design)
        return _Model(X, np.asarray(visits.X_basis.R), visits.structures, names, (), False, 0.0, nothing)
    if family is not None:
        rows = rows_in(design, family, design.y)
        basis, structures = np.asarray(rows.X_basis.R), rows.layout.structures
        return _Model(X, basis, structures, names, _of_family(design, family), False, 0.0, nothing)
    linear = rows_of(design)
    W = np.zeros((len(X), 0)) if design.dispersion is None else np.asarray(design.dispersion, np.float64)
    others = [("dispersion", j, Other(Flat(), "real", sd if sd > 0 else 1.0)) for j, sd in enumerate(W.std(axis=0))]
    correlation = correlation_of(design)
    if correlation is not None:
        if correlation.kind != "cor":
            raise ValueError(
                f"correlations of residuals by distance ({correlation.name}) have no posteriors; mixjax.lmm fits them"
            )
        if correlation.least is None:
            raise ValueError(
                "residuals of 'ar1' at distances of which the shortest does not divide all others have no prior: a "
                "negative correlation is a branch of its own there; take 'car1', whose correlations are not negative"
            )
        others.append(("rho", 0, Other(Flat(), "correlation", 1.0, correlation.least, 1.0 / correlation.shortest)))
    held = 0.0 if sigma is None else float(np.log(sigma))
    return _Model(
        X, np.asarray(linear.X_basis.R), linear.layout.structures, names, tuple(others), sigma is None, held,
        W.mean(axis=0),
    )  # fmt: skip


def _of_family(design: Design, family: Family) -> tuple[tuple[str, int, Other], ...]:
    """Parameters of the family, each a number or coefficients of columns."""
    found: list[tuple[str, int, Other]] = []
    count: dict[str, int] = {}
    plain = family.plain
    # Those of a family of the user's own are as they are estimated.
    is_log = np.array_equal(plain.natural([0.0] * plain.n_psi), np.ones(plain.n_psi))
    for j, name in enumerate(family.psi_names):
        W = design.psi_columns[j] if design.psi_columns else None
        which = _class_of(name, W)
        spreads = [1.0] if W is None else np.asarray(W, np.float64).std(axis=0)
        for sd in spreads:
            kind = "real" if W is not None else "logit" if which == "zi" else "positive" if is_log else "real"
            found.append((which, count.get(which, 0), Other(Flat(), kind, sd if sd > 0 else 1.0)))
            count[which] = count.get(which, 0) + 1
    return tuple(found)


def _resolved(own: Priors, model: _Model, integrate: bool) -> ModelPriors:
    names, structures = model.names, model.structures
    asked = _Asked(own.by_name)
    fixed, to_gamma = _fixed_priors(own, model.X, names, asked)
    terms = tuple(_term_priors(own, t, Chart(s), names, asked) for t, s in enumerate(structures))
    by_name = asked.take("sigma") if model.has_sigma else None
    sigma = _checked("sigma", by_name or own.sigma, "positive") if model.has_sigma else None
    others = tuple(_other(own, name, *one, asked) for name, one in zip(names.others, model.others, strict=True))
    every = [*names.fixed, *(n for t, s in enumerate(structures) for n in names.of_term(t, s)), *names.others]
    asked.check_all_taken([*every, *(["sigma"] if model.has_sigma else [])])
    parts, to_beta, sampled = _parts(fixed, to_gamma, model.R, integrate)
    # Plain numbers would be other types to a compiled program than NumPy's.
    given = tuple(fixed[j] for j in sampled)
    terms, sigma, given, others = jax.tree.map(np.float64, (terms, sigma, given, others))
    prior_at = np.zeros_like(model.means) if by_name is not None else model.means
    found = ModelPriors(
        terms, sigma, given, parts, to_beta, others, np.float64(model.held), model.means, prior_at, structures
    )
    if not found.dim:
        raise ValueError("there is nothing to sample: all parameters are known or integrated out")
    return found


SUPPORT = {"real": "real", "logit": "real", "positive": "positive", "correlation": "correlation"}


def _other(own: Priors, name: str, which: str, number: int, other: Other, asked: _Asked) -> Other:
    said = getattr(own, which)
    one = asked.take(name) or (said[number] if isinstance(said, tuple) else said)
    checked = _checked(name, one, SUPPORT[other.kind])
    if not checked.proper:
        raise ValueError(
            f"{name} cannot have the prior {checked!r}: the posterior may then be improper; use mixjax.prior.normal"
        )
    return replace(other, prior=checked)


def _check_said(said: Priors, model: _Model) -> None:
    """Raise ValueError for classes of which the model has no parameter, and for an intercept that is said twice."""
    names = model.names
    constant = constant_column(model.X)
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
    charts = [Chart(structure) for structure in model.structures]
    if said.cor is not None and not any(chart.n_shapes and not chart.is_written for chart in charts):
        raise ValueError("this model has no correlations of random effects to give a prior to: leave cor= out")
    if said.beta is not None and not [j for j in range(len(names.fixed)) if j != constant]:
        raise ValueError("this model has no fixed effects beside the intercept: leave beta= out")
    there = {which for which, _, _ in model.others} | ({"sigma"} if model.has_sigma else set())
    there |= {"sd"} if model.structures else set()
    for name, what in WHAT.items():
        if getattr(said, name) is not None and name not in there:
            raise ValueError(f"this model has no {what} to give a prior to: leave {name}= out")


WHAT = {
    "sd": "standard deviations of random effects",
    "sigma": "residual standard deviation",
    "dispersion": "coefficients of a dispersion",
    "rho": "correlation of residuals",
    "zi": "extra zeros",
    "family": "parameters of its family",
}


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
        "positive": "a standard deviation or another parameter that is positive: use half_normal, half_student_t, "
        "exponential or log_normal",
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
    fixed: list[Prior], to_gamma: np.ndarray, R_of_X: np.ndarray, integrate: bool
) -> tuple[FixedParts, np.ndarray, list[int]]:
    exact = [integrate and isinstance(one, Flat | Normal) for one in fixed]
    inner, sampled = np.flatnonzero(exact), [j for j, is_exact in enumerate(exact) if not is_exact]
    to_beta = np.linalg.inv(to_gamma)
    moves = R_of_X @ to_beta
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
