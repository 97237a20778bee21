"""A formula with parameters and a table of predictors: everything that a simulated response needs, without a fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, DataWarning
from mixjax.design import Design, Labels, refuse_kernels
from mixjax.families import Family, family_of
from mixjax.fitted.either import any_record_of
from mixjax.fitted.names import known_names, names_of_variances
from mixjax.fitted.parameters import parameters_of_family
from mixjax.fitted.record import Fitted
from mixjax.formula.build import build
from mixjax.formula.context import caller_context
from mixjax.formula.parse import parse
from mixjax.formula.reading import column_names, to_pandas
from mixjax.formula.repeated import build_repeated
from mixjax.simulation import simulate_family, simulate_responses
from mixjax.studies.parameters import (
    coefficients,
    covariances_of_sd,
    covariances_of_theta,
    dispersion_of,
    psi_of,
    residual_deviation,
)
from mixjax.studies.same_columns import refuse_other_columns, same_columns
from mixjax.studies.variances import changed_variances

# The response that stands in the table while a design is built.
RESPONSE = "_response_"
# So many parameters of a kind are shown.
SHOWN = 20

# What makes a linear model without random effects one that may be fitted: a residual variance of its own.
PLAIN = {"dispersion": "~ 1"}


@dataclass(frozen=True, repr=False)
class Scenario:
    """A linear or generalised linear mixed model with known parameters.

    Attributes:
        formula: as given. table: the predictors.
        design: as :func:`mixjax.build_design` makes it; the response is none. labels: names beside it.
        beta: ``(p,)``. Sigma: per term ``(q, q)``, absolute.
        dispersion: parameters of the response's distribution: ``sigma``, the residual standard deviation of a linear
            model, or those of the family; of one with a formula its coefficients, ``zi~x`` and ``disp~x``.
        options: ``weights``, ``offset``, ``contrasts``, and of a generalised model ``family``, ``size`` and, as
            ``of_parameters``, the formulas of the family's parameters; models are fitted with the same.
    """

    formula: str
    table: pd.DataFrame
    design: Design
    labels: Labels
    beta: np.ndarray
    Sigma: tuple[np.ndarray, ...]
    dispersion: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family | None:
        """The distribution of the response; None of a linear mixed model."""
        return self.options.get("family")

    @property
    def sigma(self) -> float:
        """Residual standard deviation of a linear mixed model.

        Raises:
            AttributeError: of a generalised one, which has none.
        """
        if self.family is not None:
            raise AttributeError(f"a {self.family.name} response has no sigma; see .dispersion")
        return self.dispersion["sigma"]

    def simulate(self, key: Any, n: int, first: int = 0) -> np.ndarray:
        """Responses ``(n, nobs)``, of a binomial family counts of successes; see :func:`mixjax.simulate`."""
        if self.family is None:
            return simulate_responses(self.design, self.beta, self.sigma, self.Sigma, key, n, first)
        psi = psi_of(self.dispersion, self.design, self.labels, self.family)
        return simulate_family(self.design, self.family, self.beta, self.Sigma, psi, key, n, first)

    @property
    def nobs(self) -> int:
        """Rows of a response."""
        return len(self.table)

    def tables(self, key: Any, first: int, count: int) -> tuple[list[pd.DataFrame], np.ndarray]:
        """The table, which all replicates share, and responses ``first .. first + count - 1``."""
        return [self.table], self.simulate(key, count, first)

    @cached_property
    def truth(self) -> dict[str, float]:
        """Parameter -> its value, by the names that a fit of the same formula has."""
        values = dict(zip(self.labels.fixed, map(float, self.beta), strict=True))
        for parameter in names_of_variances(self.labels, self.design.structures):
            value = float(parameter.value(self.Sigma))
            if not np.isnan(value):
                values[parameter.name] = value
        return values | dict(self.dispersion)

    def on(self, data: Any) -> Scenario:
        """The same parameters on another table of predictors, such as that of twice as many participants.

        Args:
            data: table with the predictors, the grouping factors, and the columns of ``weights=``, ``offset=`` and
                ``size=``.
                Levels of grouping factors are free; categories of fixed effects must be those of these parameters.

        Raises:
            DataError: a column is missing; or the columns of the formula would not mean on this table what they mean
                here, so that the parameters would be those of another model.

        Example:
            >>> import mixjax as mj, numpy as np, pandas as pd
            >>> def layout(groups):
            ...     return pd.DataFrame({"g": np.repeat(np.arange(groups), 4), "x": np.tile([0, 1, 2, 3], groups)})
            >>> small = mj.scenario("y ~ x + (1 | g)", layout(10), beta=[0, 0.3], sd=1)
            >>> small.on(layout(20)).nobs
            80
        """
        for name in ("weights", "offset", "size"):
            given = self.options.get(name)
            if given is not None and not isinstance(given, str) and np.ndim(given):
                where = f"{name}= was given as numbers" if name != "size" else "numbers of trials are known as numbers"
                cure = "" if name != "size" else ", also where the response is cbind(successes, failures)"
                raise DataError(
                    f"{where}, one for each of the {self.nobs} rows, and another table has other "
                    f"rows: make a column of it and name the column, {name}='...', when fitting or describing the model"
                    f"{cure}"
                )
        table = to_pandas(data, column_names(data)).reset_index(drop=True)
        # Constants of the formula keep the values that they had, whatever the caller's variables are by now.
        known = self.labels.state.context
        relationships = {part.known: part.relationship for part in self.labels.state.parsed.random if part.known}
        context = {**caller_context(), **known.own, **relationships}
        design, labels = design_of(self.formula, table, **self.options, context=context, trusted=known.trusted)
        refuse_other_columns(self.labels, labels)
        # Terms stand by decreasing number of levels, so that another table may turn their order.
        own = {(t.group, t.effects): Sigma for t, Sigma in zip(self.labels.terms, self.Sigma, strict=True)}
        Sigma = tuple(own[t.group, t.effects] for t in labels.terms)
        return replace(self, table=table, design=design, labels=labels, Sigma=Sigma)

    def with_effects(self, effects: Mapping[str, float]) -> Scenario:
        """The same with other values of some fixed effects, such as the smallest that would matter.

        Args:
            effects: fixed effect -> its value; the others stay.

        Raises:
            ValueError: a name of no fixed effect, or a value that is not finite.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
            >>> mj.scenario_of(fit).with_effects({"Days": 5}).truth["Days"]
            5.0
        """
        known = known_names(self.labels)
        for name in effects:
            if name not in known and name in self.truth:
                raise ValueError(f"{name!r} is no fixed effect: with_variances({{{name!r}: ...}}) changes it")
        beta = {name: float(value) for name, value in zip(self.labels.fixed, self.beta, strict=True)}
        changed = {self.labels.fixed[known[name]] if name in known else name: v for name, v in effects.items()}
        return replace(self, beta=coefficients(beta | changed, self.labels))

    def with_variances(self, values: Mapping[str, float]) -> Scenario:
        """The same with other standard deviations or correlations, to see how much hangs on them.

        Args:
            values: name -> value of standard deviations and correlations of random effects and of ``"sigma"``, or the
                parameters of the family, named as ``print()`` of the scenario and ``fit.confint()`` name them, or as
                lme4 does. The others stay; a correlation beside a standard deviation that was 0 is 0.

        Raises:
            ValueError: a name of nothing, a negative standard deviation, or correlations that cannot be together.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> wider = mj.scenario_of(fit).with_variances({"sd_Days|Subject": 9, "sigma": 20})
            >>> round(wider.truth["sd_Days|Subject"], 6), wider.truth["sigma"]
            (9.0, 20.0)
        """
        Sigma, own = changed_variances(values, self.labels, self.design.structures, self.Sigma, self.dispersion)
        if self.family is not None:
            psi_of(own, self.design, self.labels, self.family)
        return replace(self, Sigma=Sigma, dispersion=own)

    def __repr__(self) -> str:
        sizes = {term.group: len(term.levels) for term in self.labels.terms}
        p = len(self.labels.fixed)
        values = [f"{name} {value:.5g}" for name, value in self.truth.items()]
        kind = "" if self.family is None else f"{self.family.name} ({self.family.link}), "
        rest = "random effects" + (" and residual" if self.family is None else "")
        return "\n".join(
            [
                f"<Scenario {self.formula!r}: {kind}{self.nobs} rows; "
                + ", ".join(f"{m} {g}" for g, m in sizes.items()),
                f" fixed effects: {_shortened(values[:p])}",
                f" {rest}: {_shortened(values[p:])}>",
            ]
        )


def _shortened(values: list[str]) -> str:
    more = [f"... ({len(values) - SHOWN} more)"] if len(values) > SHOWN else []
    return ", ".join([*values[:SHOWN], *more]) or "none"


def scenario(
    formula: str,
    data: Any,
    beta: Any,
    sigma: float | None = None,
    sd: Any = None,
    cor: Any = None,
    theta: Any = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    family: Any = None,
    link: str | None = None,
    size: Any = None,
    dispersion: Any = None,
) -> Scenario:
    """Describe a linear or generalised linear mixed model by its parameters, to simulate from it and to study how it is
    estimated.

    Args:
        formula: as for :func:`mixjax.lmm`; the response need not be in the table.
        data: table with the predictors and grouping factors.
        beta: fixed effects: ``(p,)`` in the order of the columns, or dict name -> value with every name.
        sigma: residual standard deviation of a linear mixed model, absolute; None for 1.
        sd: standard deviations of the random effects, absolute: ``(number of effects,)`` term by term (terms by
            decreasing number of levels, as a fit shows them), or dict group -> number or ``(q,)``.
        cor: their correlations, 0 by default: dict group -> number (of two effects) or ``(q, q)``; or a number where
            only one term has two effects.
        theta: Cholesky factors ``(k,)`` in place of ``sd`` and ``cor``, as ``fit.theta``: relative to sigma, of a
            generalised model absolute.
        weights, offset, contrasts: as for :func:`mixjax.lmm`.
        family, link: as for :func:`mixjax.glmm`: beta and sd are then on the scale of the linear predictor. None for a
            linear mixed model.
        size: trials of a binomial response: a number, ``(n,)``, or the name of a column.
        dispersion: the family's parameter, such as the size of a negative binomial one; a dict name -> value where it
            has several.

    Returns:
        :class:`Scenario`.

    Raises:
        DataError, ValueError: names the term or the coefficient.

    Example:
        >>> import mixjax as mj, numpy as np, pandas as pd
        >>> data = pd.DataFrame({"group": np.arange(500) % 26, "x": np.linspace(-1, 1, 500)})
        >>> truth = mj.scenario("y ~ x + (1 | group)", data, beta=[4, 7], sd=0.5, sigma=1)
        >>> truth.simulate(key=1, n=3).shape
        (3, 500)
        >>> truth.truth["sd_Intercept|group"]
        0.5
    """
    table = to_pandas(data, column_names(data)).reset_index(drop=True)
    options = {"weights": weights, "offset": offset, "contrasts": contrasts}
    if family is None:
        if beside := [name for name, given in (("link", link), ("size", size), ("dispersion", dispersion))
                      if given is not None]:  # fmt: skip
            raise ValueError(f"{', '.join(beside)} belong to a family: name it, family='binomial'")
        own, sigma = {"sigma": residual_deviation(sigma)}, residual_deviation(sigma)
    else:
        if sigma is not None:
            raise ValueError("sigma belongs to linear mixed models; a family's own parameter is dispersion=")
        options |= {"family": family_of(family, link), "size": size}
        own, sigma = dispersion_of(dispersion, options["family"]), 1.0
    design, labels = design_of(formula, table, **options, context=caller_context())
    if theta is not None:
        if sd is not None or cor is not None:
            raise ValueError("give either theta, or sd and cor")
        Sigma = covariances_of_theta(theta, labels, sigma)
    else:
        Sigma = covariances_of_sd(sd, cor, labels)
    return Scenario(formula, table, design, labels, coefficients(beta, labels), Sigma, own, options)


def simulate(
    formula: str,
    data: Any,
    *,
    beta: Any,
    sigma: float | None = None,
    sd: Any = None,
    cor: Any = None,
    theta: Any = None,
    key: Any = 0,
    n: int = 1,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    family: Any = None,
    link: str | None = None,
    size: Any = None,
    dispersion: Any = None,
) -> np.ndarray:
    """Responses of a mixed model without a fit; see :func:`mixjax.scenario` for the parameters.

    Args:
        key: int or JAX key; response i depends on it and on i alone. n: number of responses.

    Returns:
        ``(n, rows)`` numpy float64, of a binomial family counts of successes.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy")
        >>> formula = "Reaction ~ Days + (Days | Subject)"
        >>> Y = mj.simulate(formula, data, beta=[250, 10], sd=[25, 6], cor=0.1, sigma=25, key=1, n=100)
        >>> Y.shape
        (100, 180)
    """
    truth = scenario(
        formula, data, beta, sigma, sd, cor, theta, weights, offset, contrasts, family, link, size, dispersion
    )
    return truth.simulate(key, n)


def design_of(
    formula: str,
    table: pd.DataFrame,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    family: Family | None = None,
    size: Any = None,
    context: Mapping[str, Any] | None = None,
    trusted: bool | None = None,
    repeated: bool = False,
    of_parameters: Mapping[str, str] | None = None,
    may_be_plain: bool = False,
) -> tuple[Any, Labels]:
    """Design and labels of a formula whose response is yet to come.

    Args:
        may_be_plain: a linear model may be one without random effects.
        repeated: the formula is one of repeated measures, as of :func:`mixjax.mmrm`.
        of_parameters: formulas of the family's parameters, ``"dispformula"`` and ``"ziformula"``.
        size: trials: a number for all rows, ``(n,)``, or the name of a column.

    Raises:
        DataError: rows with missing values.
    """
    right = formula.partition("~")[2] if "~" in formula else formula
    written = f"{RESPONSE} ~ {right}" if formula.partition("~")[0].strip() == "" else formula
    # Any numbers that no fixed effects reproduce: not those of a seed that a user may have drawn predictors with.
    rng = np.random.default_rng(0x6D69786A6178)
    if family is None:
        response = parse(written, column_names(table)).response.shown
        stand_in = rng.standard_normal(len(table))
    else:
        response = written.partition("~")[0].strip()
        size = np.full(len(table), size, np.float64) if size is not None and np.ndim(size) == 0 and not isinstance(
            size, str) else size  # fmt: skip
        stand_in = _stand_in(family, size, table, rng)
    if repeated:
        caller = caller_context() if context is None else context
        table = table.assign(**{RESPONSE: stand_in})
        built = build_repeated(f"{RESPONSE} ~ {right}", table, weights, offset, None, contrasts, caller, trusted)
        _refuse_missing(built.labels)
        return built.design, replace(built.labels, formula=formula, response=response)
    if may_be_plain and family is None and not of_parameters and not parse(written, column_names(table)).random:
        of_parameters = PLAIN
    if family is not None and of_parameters:
        family = family.plain  # extra zeros come by their formula
    design, labels, _ = build(
        f"{RESPONSE} ~ {right}", table.assign(**{RESPONSE: stand_in}), weights, offset, None, contrasts,
        caller_context() if context is None else context, trusted, family, size, of_parameters,
    )  # fmt: skip
    _refuse_missing(labels)
    refuse_kernels(design, "a scenario")
    return design, replace(labels, formula=formula, response=response)


def _refuse_missing(labels: Labels) -> None:
    if labels.n_missing:
        raise DataError(
            f"{labels.n_missing} rows of the predictors have missing values; a simulated response needs complete rows: "
            "fill or drop them first"
        )


def _stand_in(family: Family, size: Any, table: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Responses that the family can have, neither all alike nor at an end."""
    n = len(table)
    if family.plain is not family:
        own = _stand_in(family.plain, size, table, rng)
        return np.where(np.arange(n) % 2 == 0, 0.0, own)
    if family.name == "binomial":
        if size is None:
            return rng.permutation(np.arange(n) % 2).astype(np.float64)
        most = np.asarray(table[size] if isinstance(size, str) and size in table else size)
        # What is no number is refused where sizes are read, with its name.
        return rng.permutation(np.arange(n) % 2) * (most if most.dtype.kind in "iuf" and most.shape == (n,) else 1)
    if family.name == "beta":
        return rng.uniform(0.2, 0.8, n)
    counts: np.ndarray = rng.permutation(1.0 + np.arange(n) % 7)
    return counts


# --- from a fit ------------------------------------------------------------------------------------------------------


def scenario_of(fit: Any) -> Scenario:
    """A fit's model on its own table, with its estimates as the truth: for power and studies from pilot data.

    :func:`mixjax.study` and :func:`mixjax.power` take a fit in place of it. The table has the columns that the fit
    used, complete rows only.

    Args:
        fit: as :func:`mixjax.lmm` returns it.

    Raises:
        DataError: rows were not kept, or the columns of the fit cannot be made again from its table.
        ValueError: the fit did not converge.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
        >>> mj.scenario_of(fit)
        <Scenario 'Reaction ~ Days + (1 | Subject)': 180 rows; 18 Subject
         fixed effects: Intercept 251.41, Days 10.467
         random effects and residual: sd_Intercept|Subject 37.124, sigma 30.991>
    """
    record = any_record_of(fit)
    record.check_can("scenarios")
    labels, design, est = record.labels, record.kept, record.estimates
    given = "sigma=fit.sigma" if isinstance(record, Fitted) else "family=fit.family, dispersion=fit.dispersion"
    cure = f"describe it by mixjax.scenario(formula, table, beta=fit.fixef, theta=fit.theta, {given})"
    if design is None or labels.frame is None or labels.state is None:
        raise DataError(f"the fit of {labels.formula!r} has no table, because its rows were not kept: {cure}")
    if not est.converged:
        raise ValueError(
            f"the fit of {labels.formula!r} did not converge, so its numbers are no estimates to simulate from: "
            "simplify the model, or describe the truth by mixjax.scenario(...)"
        )
    table = labels.frame.reset_index(drop=True)
    # As in a fit: what the formula read beside columns has the values of then.
    known = labels.state.context
    surroundings: dict[str, Any] = {"context": {**caller_context(), **known.own}, "trusted": known.trusted}
    options: dict[str, Any] = {"weights": None, "offset": None, "contrasts": dict(labels.state.contrasts) or None}
    if isinstance(record, Fitted):
        own = {"sigma": float(record.estimates.sigma)}
    else:
        names, values, _ = parameters_of_family(labels, record.family, np.asarray(record.estimates.psi))
        own = dict(zip(names, map(float, values), strict=True))
        options |= {"family": record.family, "size": None}
        if labels.state.parsed.own:
            options["of_parameters"] = {option: f"~ {part.shown}" for option, part in labels.state.parsed.own}
        if design.size is not None:
            options["size"] = _as_column(table, labels.state.size, design.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the fit has told of the columns that it left out
        if design.weights is not None:
            options["weights"] = _as_column(table, labels.state.weights, design.weights)
        if design.offset is not None:
            part = design_of(labels.formula, table, **options, **surroundings)[0].offset
            rest = design.offset - (0.0 if part is None else part)
            if part is None or rest.any():
                options["offset"] = _as_column(table, labels.state.offset, rest)
        again, read = design_of(labels.formula, table, **options, **surroundings)
    if not same_columns(design, labels, again, read):
        raise DataError(
            f"the formula {labels.formula!r} gives other columns now than when it was fitted, perhaps by a function or "
            f"a variable that has changed since, so its estimates are not those of the model as it is now: {cure}"
        )
    kept = {*read.frame, *(name for name in options.values() if isinstance(name, str))}
    table = table[[name for name in table if name in kept]]  # without the response, which is to be simulated
    Sigma = tuple(np.asarray(S) for S in est.Sigma)
    return Scenario(labels.formula, table, again, read, np.asarray(est.beta), Sigma, own, options)


def _as_column(table: pd.DataFrame, name: str | None, values: Any) -> Any:
    """The option as it was given: the name of a column, which is put into the table, or numbers."""
    if name is None:
        return np.asarray(values)
    if name not in table:
        table[name] = np.asarray(values)
    return name
