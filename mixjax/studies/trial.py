"""A clinical trial by its parameters: who is seen when, what is expected, how visits depend on each other, drop-out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.covariance import structure_of
from mixjax.design import RepeatedDesign
from mixjax.fitted.names import known_names, names_of_variances
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.formula.context import caller_context
from mixjax.formula.reading import column_names, to_pandas
from mixjax.formula.repeated import RepeatedLabels
from mixjax.formula.table import level_name
from mixjax.simulation import numpys_draws, simulate_visits
from mixjax.studies.parameters import coefficients
from mixjax.studies.scenario import design_of

Missing = Callable[[np.ndarray, pd.DataFrame, np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class Trial:
    """A model for repeated measures with its parameters: a source of data for studies and power.

    Attributes:
        formula: as given. table: the predictors. design, labels: arrays and names; the design's y means nothing.
        beta: ``(p,)``. Sigma: per arm ``(T, T)``, absolute.
        hazards: ``(T - 1,)`` probabilities of not coming back for each visit after the first. slope: how they depend on
            the response before. missing: a function that says who is missed instead, or None.
        options: ``weights``, ``offset``, ``contrasts`` of the fits, and that they are of repeated measures.
    """

    formula: str
    table: pd.DataFrame = field(repr=False)
    design: RepeatedDesign = field(repr=False)
    labels: RepeatedLabels = field(repr=False)
    beta: np.ndarray
    Sigma: tuple[np.ndarray, ...]
    hazards: np.ndarray
    slope: float = 0.0
    missing: Missing | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def nobs(self) -> int:
        """Rows of a response, seen or missed."""
        return len(self.table)

    @cached_property
    def truth(self) -> dict[str, float]:
        """Parameter -> its value, by the names that a fit of the same formula has; standard deviations and
        correlations where the structure has the covariance."""
        values = dict(zip(self.labels.fixed, map(float, self.beta), strict=True))
        structure = structure_of(self.design.structure, self.design.n_visits)
        for parameter in names_of_variances(self.labels, (structure,) * self.design.n_arms):
            values[parameter.name] = float(parameter.value(self.Sigma))
        return values

    def simulate(self, key: Any, n: int, first: int = 0) -> np.ndarray:
        """Responses ``(n, nobs)``, NaN where a subject has dropped out."""
        Y = simulate_visits(self.design, self.beta, self.Sigma, key, n, first)
        if self.missing is None and not self.hazards.any():
            return Y
        design = self.design
        S, T = design.n_subjects, design.n_visits
        U = numpys_draws(key, n, first, S * T, "uniform", stream=1).reshape(n, S, T)
        subject, visit = np.asarray(design.subject), np.asarray(design.visit)
        if self.missing is not None:
            gone = np.asarray(self.missing(Y, self.table, U[:, subject, visit]))
            if gone.dtype != bool or gone.shape != Y.shape:
                raise ValueError(
                    f"dropout= as a function returns booleans {Y.shape}, got {gone.dtype} of shape {gone.shape}"
                )
            return np.where(gone, np.nan, Y)
        arm = np.zeros(S, int) if design.arm is None else np.asarray(design.arm)
        sd = np.sqrt(np.stack([np.diagonal(own) for own in self.Sigma]))[arm]  # (S, T)
        mean = np.asarray(design.X) @ self.beta + (0.0 if design.offset is None else np.asarray(design.offset))
        z = np.zeros((n, S, T))
        root_w = 1.0 if design.weights is None else np.sqrt(np.asarray(design.weights))
        z[:, subject, visit] = root_w * (Y - mean) / sd[subject, visit]
        gone = np.zeros((n, S, T), bool)
        with np.errstate(divide="ignore"):
            odds = np.log(self.hazards) - np.log1p(-self.hazards)
        for t in range(1, T):
            leave = 1.0 / (1.0 + np.exp(-(odds[t - 1] + self.slope * z[:, :, t - 1])))
            gone[:, :, t] = gone[:, :, t - 1] | (U[:, :, t] < leave)
        return np.where(gone[:, subject, visit], np.nan, Y)

    def on(self, data: Any, dropout: Any = None, dropout_slope: float | None = None) -> Trial:
        """The same parameters on another table of subjects and visits, such as one of more patients.

        Args:
            data: table with the predictors, visits and subjects, one row for each subject and visit.
            dropout, dropout_slope: as of :func:`mixjax.trial`; None for the same.

        Raises:
            DataError, ValueError: a column is missing, or the formula has other columns or visits there.
        """
        table = to_pandas(data, column_names(data)).reset_index(drop=True)
        known = self.labels.state.context
        context = {**caller_context(), **known.own}
        design, labels = design_of(self.formula, table, **self.options, context=context, trusted=known.trusted)
        assert isinstance(labels, RepeatedLabels)
        if labels.fixed != self.labels.fixed or labels.terms[0].effects != self.labels.terms[0].effects:
            raise DataError(
                f"the formula {self.formula!r} has other fixed effects or visits on that table: "
                f"{', '.join(labels.fixed)}; visits {', '.join(labels.terms[0].effects)}"
            )
        if labels.arms != self.labels.arms:
            raise DataError(f"that table has arms {', '.join(labels.arms)}; the covariances are of "
                            f"{', '.join(self.labels.arms)}")  # fmt: skip
        hazards, missing = (self.hazards, self.missing) if dropout is None else _dropout(dropout, design.n_visits)
        slope = self.slope if dropout_slope is None else _slope(dropout_slope)
        return replace(self, table=table, design=design, labels=labels, hazards=hazards, missing=missing, slope=slope)

    def with_effects(self, effects: Mapping[str, float]) -> Trial:
        """The same with other fixed effects.

        Args:
            effects: fixed effect -> its value; the others stay.

        Raises:
            ValueError: a name of no fixed effect, or a value that is not finite.
        """
        known = known_names(self.labels)
        beta = {name: float(value) for name, value in zip(self.labels.fixed, self.beta, strict=True)}
        changed = {self.labels.fixed[known[name]] if name in known else name: v for name, v in effects.items()}
        return replace(self, beta=coefficients(beta | changed, self.labels))

    def tables(self, key: Any, first: int, count: int) -> tuple[list[pd.DataFrame], np.ndarray]:
        """The table, which all replicates share, and responses ``first .. first + count - 1``."""
        return [self.table], self.simulate(key, count, first)

    def __repr__(self) -> str:
        design = self.design
        drop = "a function says who is missed" if self.missing else f"drop-out {np.round(self.hazards, 4).tolist()}"
        fixed = ", ".join(f"{name} {value:.5g}" for name, value in zip(self.labels.fixed, self.beta, strict=True))
        sds = "; ".join(np.array2string(np.sqrt(np.diagonal(S)), precision=4) for S in self.Sigma)
        return "\n".join(
            [
                f"<Trial {self.formula!r}: {design.n_subjects} subjects, {design.n_visits} visits, {drop}",
                f" fixed effects: {fixed}",
                f" standard deviations: {sds}>",
            ]
        )


def trial(
    formula: str,
    data: Any,
    beta: Any,
    sd: Any = None,
    cor: Any = None,
    Sigma: Any = None,
    dropout: Any = 0.0,
    dropout_slope: float = 0.0,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
) -> Trial:
    """Describe a trial with repeated measures by its parameters, for its power and for studies of its analysis.

    :func:`mixjax.study` and :func:`mixjax.power` take it as a source; the models that they fit to it are those of
    :func:`mixjax.mmrm`.

    Args:
        formula: as for :func:`mixjax.mmrm`; the response need not be in the table.
        data: table with a row for every subject and visit, missed ones too. Visits stand in the order of the numbers or
            categories of their column; text must have them in the alphabet's.
        beta: fixed effects: ``(p,)`` in the order of the columns, or dict name -> value with every name.
        sd: standard deviation of the response, a number or one for each visit; None: 1.
        cor: correlations of the visits: a number, of all pairs; ``("ar1", rho)``: ``rho^distance``; or a matrix
            ``(T, T)``.
        Sigma: covariance ``(T, T)`` instead of sd and cor, or a dict arm -> covariance where the formula has arms.
        dropout: probability that a subject does not come back, for each visit after the first: a number, ``(T - 1,)``
            numbers, or a function of responses ``(n, rows)``, the table and uniform random numbers ``(n, rows)`` that
            returns booleans ``(n, rows)``, which responses are missed.
        dropout_slope: by how much the log odds of dropping out rise with each standard deviation of the response at
            the visit before: missing at random.
        weights, offset, contrasts: as for :func:`mixjax.mmrm`.

    Returns:
        :class:`~mixjax.studies.trial.Trial`.

    Raises:
        DataError, ValueError: names the coefficient, or says what is wrong with the covariance or the drop-out.

    Example:
        >>> import mixjax as mj, numpy as np, pandas as pd
        >>> def plan(n):
        ...     patients = pd.DataFrame({"id": np.arange(n), "arm": np.where(np.arange(n) % 2, "active", "placebo")})
        ...     table = patients.merge(pd.DataFrame({"visit": ["w2", "w4", "w8"]}), how="cross")
        ...     return mj.trial("y ~ 0 + visit + visit:arm + us(visit | id)", table,
        ...                     beta=[0, 0, 0, 0.4, 0.2, 0], cor=("ar1", 0.6), dropout=0.1)
        >>> plan(4).labels.fixed[3]
        'visit[w2]:arm[T.placebo]'
        >>> found = mj.power(plan, "y ~ 0 + visit + visit:arm + us(visit | id)", "visit[w2]:arm[T.placebo]",
        ...                  {"n": [60, 120]}, replicates=400, key=1, ddf="kenward-roger", progress=False)
        >>> found.table["power"].round(1).tolist()
        [0.3, 0.6]
    """
    table = to_pandas(data, column_names(data)).reset_index(drop=True)
    options = {"weights": weights, "offset": offset, "contrasts": contrasts, "repeated": True}
    design, labels = design_of(formula, table, **options, context=caller_context())
    assert isinstance(labels, RepeatedLabels)
    T = design.n_visits
    _check_order(table, labels)
    covariances = _covariances(sd, cor, Sigma, labels, T)
    hazards, missing = _dropout(dropout, T)
    slope = _slope(dropout_slope)
    return Trial(
        formula, table, design, labels, coefficients(beta, labels), covariances, np.array(hazards),
        slope, missing, options,
    )  # fmt: skip


def _check_order(table: pd.DataFrame, labels: RepeatedLabels) -> None:
    """Raise DataError for visits whose names are text in another order than in the table: whose standard deviation is
    which, and who drops out when, depend on it."""
    name, visits = labels.repetition.visit, list(labels.terms[0].effects)
    column = table[name]
    if isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_numeric_dtype(column):
        return
    seen = [level_name(value) for value in column.unique()]
    if seen != visits:
        raise DataError(
            f"'{name}' is text, whose order is the alphabet's, {', '.join(visits)}; in the table it is "
            f"{', '.join(seen)}: make it a categorical with the order that is meant, "
            f"pd.Categorical(data['{name}'], categories=[...])"
        )


def _dropout(dropout: Any, T: int) -> tuple[np.ndarray, Missing | None]:
    """Hazards ``(T - 1,)``, and the function that says who is missed, if it is one."""
    if callable(dropout):
        return np.zeros(T - 1), dropout
    hazards = _numbers("dropout", dropout)
    hazards = np.full(T - 1, float(hazards)) if hazards.ndim == 0 else hazards
    if hazards.shape != (T - 1,) or not ((hazards >= 0) & (hazards < 1)).all():
        raise ValueError(
            f"dropout must be a probability, or one for each of the {T - 1} visits after the first, got {dropout!r}"
        )
    return hazards, None


def _slope(dropout_slope: Any) -> float:
    slope = _numbers("dropout_slope", dropout_slope)
    if slope.shape or not np.isfinite(slope):
        raise ValueError(f"dropout_slope must be a number, got {dropout_slope!r}")
    return float(slope)


def trial_of(fit: Any) -> Trial:
    """A fit of repeated measures with its estimates as the truth, on the rows that it has: visits that were missed are
    missed again. For power from pilot data; :meth:`Trial.on` takes it to more patients.

    Args:
        fit: as :func:`mixjax.mmrm` returns it.

    Raises:
        ValueError: the fit did not converge. DataError: its columns cannot be made again from its table.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.mmrm("distance ~ Sex * age + us(age | Subject)", mj.datasets.load("Orthodont"))
        >>> truth = mj.trial_of(fit).with_effects({"Sex[T.Female]:age": -0.5})
        >>> round(truth.truth["Sex[T.Female]:age"], 3), truth.simulate(key=1, n=2).shape
        (-0.5, (2, 108))
    """
    record = getattr(fit, "record", fit)
    if not isinstance(record, RepeatedFitted):
        raise TypeError("this is for repeated measures, as mixjax.mmrm fits them; of other fits see mixjax.scenario_of")
    labels, design, est = record.labels, record.design, record.estimates
    if not est.converged:
        raise ValueError(f"the fit of {labels.formula!r} did not converge, so its numbers are no estimates")
    state = labels.state
    if state.offset_beside or (design.weights is not None and state.weights is None):
        raise DataError(
            "weights= or offset= were given to the fit as numbers: make columns of them and name these, or describe "
            "the trial by mixjax.trial(...)"
        )
    table = labels.frame.reset_index(drop=True)
    options = {"weights": state.weights, "offset": state.offset, "contrasts": dict(state.contrasts) or None}
    for name, values in ((state.weights, design.weights), (state.offset, design.offset)):
        if name is not None and name not in table:
            table[name] = np.asarray(values)
    options |= {"repeated": True}
    context = {**caller_context(), **state.context.own}
    again, read = design_of(labels.formula, table, **options, context=context, trusted=state.context.trusted)
    assert isinstance(read, RepeatedLabels)
    Sigma = tuple(np.asarray(S) for S in est.Sigma)
    return Trial(
        labels.formula, table, again, read, np.asarray(est.beta), Sigma, np.zeros(design.n_visits - 1), 0.0, None,
        options,
    )  # fmt: skip


def _covariances(sd: Any, cor: Any, Sigma: Any, labels: RepeatedLabels, T: int) -> tuple[np.ndarray, ...]:
    n_arms = max(1, len(labels.arms))
    if Sigma is not None:
        if sd is not None or cor is not None:
            raise ValueError("Sigma is the covariance: leave sd and cor out")
        if isinstance(Sigma, Mapping):
            if set(map(str, Sigma)) != set(labels.arms):
                raise ValueError(f"Sigma names {', '.join(map(str, Sigma))}; arms of the formula are: "
                                 f"{', '.join(labels.arms) or 'none'}")  # fmt: skip
            by_name = {str(name): own for name, own in Sigma.items()}
            return tuple(_checked(by_name[arm], T, f"Sigma[{arm!r}]") for arm in labels.arms)
        return (_checked(Sigma, T, "Sigma"),) * n_arms
    if isinstance(sd, Mapping):
        raise ValueError(f"sd is a number, or one for each of the {T} visits in their order; a dict is for Sigma, arm "
                         "-> covariance")  # fmt: skip
    deviations = _numbers("sd", 1.0 if sd is None else sd)
    if deviations.shape not in ((), (T,)) or not (np.isfinite(deviations) & (deviations > 0)).all():
        raise ValueError(f"sd must be a positive number, or one for each of the {T} visits, got {sd!r}")
    deviations = np.broadcast_to(deviations, (T,))
    if isinstance(cor, Sequence) and not isinstance(cor, str) and len(cor) == 2 and isinstance(cor[0], str):
        if cor[0] != "ar1":
            raise ValueError(f"cor must be a number, ('ar1', rho) or a matrix ({T}, {T}), got {cor!r}")
        R = _numbers("cor", cor[1]) ** np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    elif cor is None or not _numbers("cor", cor).shape:
        rho = 0.0 if cor is None else float(cor)
        R = np.full((T, T), rho) + (1.0 - rho) * np.eye(T)
    else:
        R = _numbers("cor", cor)
        if R.shape == (T, T) and not np.allclose(np.diagonal(R), 1.0, rtol=0, atol=1e-8):
            raise ValueError(f"cor has {np.diagonal(R)} on its diagonal, and correlations 1; covariances are Sigma=")
    return (_checked(R * np.outer(deviations, deviations) if R.shape == (T, T) else R, T, "cor"),) * n_arms


def _numbers(name: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be of numbers, got {given!r}") from None


def _checked(matrix: Any, T: int, what: str) -> np.ndarray:
    found = _numbers(what, matrix)
    if found.shape != (T, T) or not np.allclose(found, found.T, rtol=1e-8, atol=1e-12):
        raise ValueError(f"{what} must be a symmetric matrix of the {T} visits, got shape {found.shape}")
    if not np.linalg.eigvalsh(found).min() > 0:
        raise ValueError(f"{what} is not positive definite: no visits have such correlations")
    return found
