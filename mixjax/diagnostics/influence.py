"""How much the estimates depend on single rows, or on the rows of a group: deletion diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.diagnostics.generalized_refits import generalized_without
from mixjax.diagnostics.leverage import leverage
from mixjax.diagnostics.linear_refits import linear_without
from mixjax.diagnostics.refits import NO_STEP, RANK_DEFICIENT, Without, entry_names
from mixjax.diagnostics.units import units_of
from mixjax.fitted.either import AnyFitted, any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import known_names, term_names
from mixjax.fitted.parameters import parameters_of_family
from mixjax.markup import Report, Reported
from mixjax.tables import frame_report

Method = Literal["exact", "fixed-theta", "one-step"]
METHODS = ("exact", "fixed-theta", "one-step")
MEASURES = ("cooks", "mdffits", "covtrace", "covratio")
LEVERAGES = ("leverage_overall", "leverage_fixed", "leverage_random", "leverage_random_unconfounded")


def influence(fitted: Any, by: Any = None, method: Method = "exact") -> Influence:
    """Leave out every row, or every group of rows, and see what changes.

    Args:
        fitted: the fit, with its rows; of a linear or a generalised linear mixed model.
        by: what is left out at a time. None: single rows. The name of a grouping factor of the model, of a column that
            the model uses, or a list of such columns, whose combinations then are the groups: all rows of a level. Or
            labels ``(n,)`` of the rows, as ``data["clinic"]`` of a column that the model does not use.
        method: what happens to the variance parameters.

            * ``"exact"``: the model is fitted anew without each unit, by the criterion of the fit, all as one batch;
              designs whose crossed factors are large one after another. Fits of generalised models begin at the
              estimates of all rows.
            * ``"one-step"``: one Newton step from the estimates of all rows, with the exact gradient and Hessian of
              the criterion without the unit, no longer than half the optimiser's coordinates; fixed effects and sigma
              are then exact for the theta reached. The pattern of "exact", for models that are large or have many
              units. A variance of zero stays zero. Of generalised models it is one step of all parameters together,
              fixed effects and those of the family too.
            * ``"fixed-theta"``: theta and sigma stay, and the fixed effects change by a closed form, as HLMdiag does
              with ``approx = TRUE``. What the unit does to the variances is not seen. Linear models only.

    Returns:
        :class:`Influence`.

    Raises:
        DataError: ``by`` names no column, or its labels do not fit the rows.
        ValueError: the method is unknown; there is one unit only; the fit kept no rows, or has no finite estimates.

    Warns:
        InferenceWarning: without some units there are no estimates. Their rows are NaN, and they are counted.

    Measures, with beta and its covariance C from all rows, and ``beta_(u)``, ``C_(u)`` without unit u, p fixed effects:

    * ``cooks``: ``(beta - beta_(u))' C^{-1} (beta - beta_(u)) / p``, Cook's distance.
    * ``mdffits``: the same with ``C_(u)^{-1}``.
    * ``covtrace``: ``|tr(C^{-1} C_(u)) - p|``; ``covratio``: ``det C_(u) / det C``. What precision the unit brings:
      near 0 and 1 where it brings little; above 1 the fixed effects are less certain without the unit.

    These are the definitions of HLMdiag (Loy & Hofmann 2014, J. Stat. Softw. 56(5)). C of a linear model takes theta as
    known; that of a generalised one is part of the covariance of all estimates, as ``fit.vcov``. Without a unit whose
    rows alone keep a response from being separated there are no estimates: its ``result`` is ``SEPARATED``.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.influence import influence
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> subjects = influence(fit.record, by="Subject")
        >>> subjects.ranked().index[:3].tolist()
        ['309', '335', '337']
        >>> round(float(subjects.cooks["309"]), 4)
        0.1485
    """
    fitted = any_record_of(fitted)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    _ = fitted.design  # the error says why there is none
    fitted.check_can("influence")
    if method != "fixed-theta":
        fitted.check_can("refits without units")
    units = units_of(fitted, by)
    if isinstance(fitted, GeneralizedFitted):
        without, root = generalized_without(fitted, units.code, method)
        # With extra zeros there is no linear model at the modes, which leverages are of.
        leverages = np.full((fitted.nobs, 4), np.nan) if fitted.family.plain is not fitted.family else _each(fitted)
    else:
        leverages = _each(fitted)
        without, root = linear_without(fitted, units.code, method, leverages[:, 0])
    if not without.found.all():
        lost = units.names[~without.found]
        shown = ", ".join(str(u) for u in lost[:5]) + (", ..." if len(lost) > 5 else "")
        warn(
            f"{len(lost)} of {len(units.names)} deletions left no estimates (see .result): {shown}; what is computed "
            "from the others does not speak of these units",
            InferenceWarning,
        )
    means = np.stack([np.bincount(units.code, weights=column) for column in leverages.T], axis=1)
    count = np.bincount(units.code)
    return Influence(
        fitted,
        method,
        units.names,
        pd.Series(count, units.names, name="rows"),
        pd.DataFrame(_measures(root, without), units.names, list(MEASURES)),
        pd.DataFrame(means / count[:, None], units.names, list(LEVERAGES)),
        without,
    )


def _each(fitted: AnyFitted) -> np.ndarray:
    """Leverages ``(n, 4)`` of the rows, in the order of LEVERAGES."""
    own = leverage(fitted)
    return np.stack([own.overall, own.fixed, own.random, own.random_unconfounded], axis=1)


def _measures(root: np.ndarray, without: Without) -> np.ndarray:
    """``(U, 4)`` in the order of MEASURES; NaN without estimates, and where there are no fixed effects.

    Args:
        root: ``(p, p)`` T with ``T'T`` the inverse covariance of the fixed effects of all rows in the basis of X: in
            coordinates T that covariance is I.
    """
    p, found = len(root), without.found
    values = np.full((len(found), len(MEASURES)), np.nan)
    if not p or not found.any():
        return values
    change = without.change[found] @ root.T
    C = root @ without.covariance[found] @ root.T
    values[found, 0] = (change**2).sum(1) / p
    values[found, 1] = np.einsum("up,up->u", change, np.linalg.solve(C, change[:, :, None])[:, :, 0]) / p
    values[found, 2] = np.abs(np.trace(C, axis1=1, axis2=2) - p)
    values[found, 3] = np.linalg.det(C)
    return values


# --- results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Influence(Reported):
    """Changes without each unit; made by :func:`influence`. ``str()`` shows the most influential units.

    Frames and Series have one row per unit, in the order in which units first appear in the data.

    Attributes:
        fitted: the fit of all rows. method: how units were left out.
        units: names of the units: the table's own index for rows, levels for groups.
        rows: how many rows each unit has.
        measures: columns ``cooks``, ``mdffits``, ``covtrace``, ``covratio``; see :func:`influence`.
        leverages: ``leverage_overall``, ``_fixed``, ``_random``, ``_random_unconfounded``, of the fit of all rows, NaN
            where that has extra zeros;
            means over the rows of a unit.
    """

    fitted: AnyFitted
    method: str
    units: pd.Index
    rows: pd.Series
    measures: pd.DataFrame
    leverages: pd.DataFrame
    _without: Without = field(repr=False)

    @property
    def cooks(self) -> pd.Series:
        """Cook's distances."""
        return self.measures["cooks"]

    @property
    def cooks_lme4(self) -> pd.Series:
        """Cook's distances as ``cooks.distance(influence(m, groups))`` of lme4 has them: of U units
        ``(beta - beta_(u))' C^{-1} (beta - beta_(u)) (U - p) / (U p)``, that is ``(U - p) / U`` times :attr:`cooks`.
        """
        U, p = len(self.units), len(self.fitted.labels.fixed)
        return (self.cooks * ((U - p) / U)).rename("cooks_lme4")

    @property
    def mdffits(self) -> pd.Series:
        """Cook's distances measured by the covariance without the unit."""
        return self.measures["mdffits"]

    @property
    def covtrace(self) -> pd.Series:
        """Change of the precision of the fixed effects, by a trace."""
        return self.measures["covtrace"]

    @property
    def covratio(self) -> pd.Series:
        """Change of the precision of the fixed effects, by a determinant."""
        return self.measures["covratio"]

    @property
    def beta(self) -> pd.DataFrame:
        """Fixed effects without each unit."""
        without: pd.DataFrame = self.fitted.estimates.beta - self.dfbeta
        return without

    @property
    def se(self) -> pd.DataFrame:
        """Standard errors of the fixed effects without each unit."""
        diagonal = np.diagonal(self.vcov, axis1=1, axis2=2)
        return pd.DataFrame(np.sqrt(diagonal), self.units, list(self.fitted.labels.fixed))

    @property
    def vcov(self) -> np.ndarray:
        """``(U, p, p)`` covariance of the fixed effects without each unit."""
        covariances: np.ndarray = self._R_inv @ self._without.covariance @ self._R_inv.T
        return covariances

    @property
    def _R_inv(self) -> np.ndarray:
        """From the basis of X to its columns."""
        own = self.fitted
        return np.asarray((own.rows if isinstance(own, GeneralizedFitted) else own.stats).X_basis.R_inv)

    @property
    def sigma(self) -> pd.Series:
        """Residual standard deviation without each unit, of a linear model."""
        if isinstance(self.fitted, GeneralizedFitted):
            raise ValueError(
                "a generalised linear mixed model has no sigma; its family's parameters are in .dispersion"
            )
        return pd.Series(self._without.sigma, self.units, name="sigma")

    @property
    def dispersion(self) -> pd.DataFrame:
        """Parameters of the family without each unit, as ``fit.dispersion``; no columns where it has none."""
        own = self._scale(self._without.sigma, self._without.psi)
        return pd.DataFrame({name: values for name, values in own.items() if name != "sigma2"}, self.units)

    @property
    def theta(self) -> pd.DataFrame:
        """Cholesky factors without each unit, as ``fit.theta``: relative of a linear model, else absolute."""
        names, _ = entry_names(self.fitted, term_names(self.fitted.labels), "theta", "theta")
        return pd.DataFrame(self._without.theta, self.units, names)

    @property
    def variances(self) -> pd.DataFrame:
        """``sigma2``, of generalised models the family's parameters, and the entries of every Sigma without each unit:
        ``var_Days|Subject``, ``cov_Days.Intercept|Subject``; entries that a structure holds at zero are left out."""
        return self._variances(self._without.sigma, self._without.psi, self._without.Sigma)

    @property
    def dfbeta(self) -> pd.DataFrame:
        """Fixed effects of all rows less those without the unit."""
        return pd.DataFrame(-self._without.change @ self._R_inv.T, self.units, list(self.fitted.labels.fixed))

    @property
    def dfbetas(self) -> pd.DataFrame:
        """:attr:`dfbeta` in units of the standard error without the unit. lme4's have the other sign: without the unit
        less all."""
        return self.dfbeta / self.se

    @property
    def dftheta(self) -> pd.DataFrame:
        """theta of all rows less that without the unit."""
        change: pd.DataFrame = self.fitted.estimates.theta - self.theta
        return change

    @property
    def rvc(self) -> pd.DataFrame:
        """Relative variance change ``without / all - 1`` of :attr:`variances` (HLMdiag's ``rvc``).

        An entry that is zero in the fit of all rows has NaN, or an infinite change where it is not zero without the
        unit. All zero with ``method="fixed-theta"``, which holds the variances."""
        est = self.fitted.estimates
        sigma = np.atleast_1d(getattr(est, "sigma", np.nan))
        psi = np.atleast_2d(getattr(est, "psi", np.zeros((1, 0))))
        own = self._variances(sigma, psi, [np.asarray(S)[None] for S in est.Sigma]).to_numpy()[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            change: pd.DataFrame = self.variances / own - 1
            return change

    def _scale(self, sigma: np.ndarray, psi: np.ndarray) -> dict[str, np.ndarray]:
        """The residual variance, or the family's parameters, by name."""
        own = self.fitted
        if not isinstance(own, GeneralizedFitted):
            return {"sigma2": sigma**2}
        names, values, _ = parameters_of_family(own.labels, own.family, psi.T)
        return dict(zip(names, values, strict=True))

    def _variances(self, sigma: np.ndarray, psi: np.ndarray, Sigma: Sequence[np.ndarray]) -> pd.DataFrame:
        names, varies = entry_names(self.fitted, term_names(self.fitted.labels), "var", "cov")
        lower = [S[:, c, r] for S in Sigma for r, c in zip(*np.triu_indices(S.shape[1]), strict=True)]
        columns = self._scale(sigma, psi)
        columns |= {name: entry for name, entry, own in zip(names, lower, varies, strict=True) if own}
        return pd.DataFrame(columns, self.units if len(sigma) == len(self.units) else None)

    @property
    def singular(self) -> pd.Series:
        """Some covariance has less than full rank without the unit."""
        return pd.Series(self._without.singular, self.units, name="singular")

    @property
    def result(self) -> pd.Series:
        """How each deletion ended: a name of ``mixjax.Result``; ``"COMPUTED"`` where nothing was searched;
        ``"RANK_DEFICIENT"`` where the unit alone determines a fixed effect; ``"NO_STEP"`` where the criterion without
        the unit is not convex at the estimates of all rows, so that Newton's step leads nowhere."""
        return pd.Series(self._without.result, self.units, name="result")

    @property
    def converged(self) -> pd.Series:
        """There are estimates without the unit."""
        return pd.Series(self._without.found, self.units, name="converged")

    @property
    def counts(self) -> pd.Series:
        """How many units there are, how many were fitted, are singular (of those), and failed, by code."""
        found, result = self._without.found, self.result
        failed = result[~found].value_counts(sort=False)
        return pd.Series(
            {
                "units": len(found),
                "fitted": int(found.sum()),
                "singular": int((self._without.singular & found).sum()),
                "failed": int((~found).sum()),
                **{f"failed: {name}": int(count) for name, count in failed.items()},
            },
            name="count",
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per unit: number of rows, measures, leverages, ``dfbetas_...``, ``rvc_...``, singular, result."""
        return pd.concat(
            [
                self.rows,
                self.measures,
                self.leverages,
                self.dfbetas.add_prefix("dfbetas_"),
                self.rvc.add_prefix("rvc_"),
                self.singular,
                self.result,
            ],
            axis=1,
        )

    def ranked(self, by: str = "cooks", n: int | None = None) -> pd.DataFrame:
        """:meth:`to_frame` from the most influential unit down; units without estimates last.

        Args:
            by: a column of :meth:`to_frame`. Of ``covratio`` the distance from 1 counts, of changes their size.
            n: only so many units.
        """
        frame = self.to_frame()
        size = self._size(self.measure_called(by), frame)
        order = np.argsort(-np.where(np.isnan(size), -np.inf, size), kind="stable")
        return frame.iloc[order[:n]]

    def cutoff(self, measure: str = "cooks", rule: str | float = "boxplot") -> tuple[float, float]:
        """Below the first and above the second number a unit is flagged.

        Args:
            measure: a column of numbers of :meth:`to_frame`.
            rule: ``"boxplot"``: three interquartile ranges beyond the quartiles, far out in Tukey's words and
                HLMdiag's rule; on the upper side only, but on both sides for ``covratio``, ``dfbetas_...`` and
                ``rvc_...``. ``"size"``: by the number of units U: ``4 / U`` for ``cooks`` and ``mdffits``, ``3 p / U``
                for ``covtrace`` and around 1 for ``covratio``, ``2 / sqrt(U)`` on both sides for ``dfbetas_...``
                (Belsley, Kuh & Welsch 1980), and three times their mean for leverages. A number: the cut-off itself;
                around 1 for ``covratio``, and on both sides for changes.
        """
        measure = self.measure_called(measure)
        values = self._column(measure, frame := self.to_frame())
        U, p = len(values), len(self.fitted.labels.fixed)
        signed = measure.startswith(("dfbetas_", "rvc_"))
        if not isinstance(rule, str):
            reach = float(rule)
        elif rule == "boxplot":
            low, high = np.nanquantile(values, [0.25, 0.75]) if np.isfinite(values).any() else (np.nan, np.nan)
            # Units that are all alike differ by rounding.
            reach = 3 * (high - low) + 1e-9 * abs(high)
            return (low - reach if signed or measure == "covratio" else -np.inf), high + reach
        elif rule == "size":
            sizes = {"cooks": 4 / U, "mdffits": 4 / U, "covtrace": 3 * p / U, "covratio": 3 * p / U}
            sizes |= {name: 3 * frame[name].mean() for name in LEVERAGES}
            sizes |= {f"dfbetas_{name}": 2 / np.sqrt(U) for name in self.fitted.labels.fixed}
            if measure not in sizes:
                raise ValueError(f"there is no cut-off by size for {measure!r}; use rule='boxplot' or a number")
            reach = sizes[measure]
        else:
            raise ValueError(f"rule must be 'boxplot', 'size' or a number, got {rule!r}")
        if measure == "covratio":
            return 1 - reach, 1 + reach
        return (-reach if signed else -np.inf), reach

    def flagged(self, measure: str = "cooks", rule: str | float = "boxplot") -> pd.DataFrame:
        """The rows of :meth:`to_frame` beyond the cut-offs, the most influential first; see :meth:`cutoff`."""
        measure = self.measure_called(measure)
        low, high = self.cutoff(measure, rule)
        frame = self.ranked(measure)
        return frame[(frame[measure] > high) | (frame[measure] < low)]

    def measure_called(self, name: str) -> str:
        """The column of :meth:`to_frame` that a user means: fixed effects in ``dfbetas_...`` as R names them too."""
        known = known_names(self.fitted.labels)
        effect = name.removeprefix("dfbetas_") if isinstance(name, str) else name
        return f"dfbetas_{self.fitted.labels.fixed[known[effect]]}" if effect != name and effect in known else name

    def _column(self, name: str, frame: pd.DataFrame) -> np.ndarray:
        known = [column for column in frame if column not in ("singular", "result")]
        if name not in known:
            raise ValueError(f"there is no measure {name!r}; there are {', '.join(map(repr, known))}")
        return frame[name].to_numpy(np.float64)

    def _size(self, name: str, frame: pd.DataFrame) -> np.ndarray:
        values = self._column(name, frame)
        sizes: np.ndarray = np.abs(values - 1) if name == "covratio" else np.abs(values)
        return sizes

    def summary(self, n: int = 6) -> str:
        """The n most influential units as text, with counts above and what failed below."""
        return "\n".join([self._head(), "", self._most(n).to_string(), "", *self._notes()])

    def _report(self) -> Report:
        return frame_report(self._most(6), [self._head()], self._notes(), index=True)

    def _most(self, n: int) -> pd.DataFrame:
        return self.ranked(n=n)[["rows", *MEASURES, "leverage_overall"]]

    def _head(self) -> str:
        counts, by = self.counts, self.units.name
        what = "rows" if by is None or by == "row" else f"levels of {by}"
        head = f"Influence of {counts['units']} {what} on {self.fitted.labels.formula!r}, {self.method}: "
        return head + f"{counts['fitted']} fitted, {counts['singular']} singular, {counts['failed']} failed"

    def _notes(self) -> list[str]:
        flags = ", ".join(
            f"{len(self.flagged(measure))} by {measure} (beyond {self._shown_cutoff(measure)})"
            for measure in ("cooks", "mdffits", "covratio")
        )
        lines = [f"Far out: {flags}."]
        failed = self.result[~self._without.found]
        if len(failed):
            reasons = {RANK_DEFICIENT: "X loses rank", NO_STEP: "no Newton step"}
            shown = [f"{unit} ({reasons.get(code, code)})" for unit, code in failed.iloc[:5].items()]
            lines.append(f"No estimates without {', '.join(shown)}{', ...' if len(failed) > 5 else ''}.")
        return lines

    def _shown_cutoff(self, measure: str) -> str:
        low, high = self.cutoff(measure)
        return f"{high:.3g}" if np.isinf(low) else f"{low:.3g} .. {high:.3g}"

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        parts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"<Influence, {self.method}: {parts}>"
