"""A fit as tables: text like lme4's, HTML, and data frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from mixjax.checks import check_level
from mixjax.diagnostics.residuals import conditional_residuals
from mixjax.distributions import t_quantile
from mixjax.fitted.either import AnyRecord
from mixjax.fitted.names import names_of_further, names_of_kernels, term_names
from mixjax.fitted.record import Fitted
from mixjax.fitted.search_end import FitStatistics
from mixjax.inference.fixed.contrasts import ddf_note
from mixjax.markup import Cells, Report, Reported
from mixjax.numerals import fixed_decimals, p_value
from mixjax.tables import NotedTable, text_table


def group_sizes(fitted: Fitted) -> dict[str, int]:
    """Number of levels of every grouping factor."""
    return {term.group: len(term.levels) for term in fitted.labels.terms if not term.smooth}


@dataclass(frozen=True)
class VarCorr(Reported):
    """Standard deviations, variances and correlations of the random effects. ``str()`` gives lme4's table."""

    fitted: Fitted

    def to_frame(self) -> pd.DataFrame:
        """One row per variance and covariance, as ``as.data.frame(VarCorr(m))`` in lme4.

        Columns ``group``, ``name1``, ``name2`` (None for a variance), ``vcov`` (variance or covariance), ``sdcor``
        (standard deviation or correlation; NaN where a variance is zero). The last row is ``Residual``, of a linear
        model.
        """
        rows: list[tuple[Any, ...]] = []
        for name, labels, Sigma in zip(
            term_names(self.fitted.labels), self.fitted.labels.terms, self.fitted.estimates.Sigma, strict=True
        ):
            sd = np.sqrt(np.diag(Sigma))
            if labels.smooth:  # one variance of many independent effects
                rows.append((name, "smooth", None, Sigma[0, 0], sd[0]))
                continue
            rows += [(name, e, None, Sigma[i, i], sd[i]) for i, e in enumerate(labels.effects)]
            for i in range(len(sd)):
                for j in range(i + 1, len(sd)):
                    cor = correlation(Sigma)[i, j]
                    rows.append((name, labels.effects[i], labels.effects[j], Sigma[i, j], cor))
        rows += [("Residual", None, None, sigma**2, sigma) for sigma in self._residual()]
        return pd.DataFrame(rows, columns=["group", "name1", "name2", "vcov", "sdcor"])

    def _residual(self) -> list[float]:
        """The residual standard deviation, if there is one."""
        return [float(self.fitted.estimates.sigma)]

    def table(self) -> pd.DataFrame:
        """The printed table, cells as text."""
        labels, estimates = self.fitted.labels.terms, self.fitted.estimates
        shown = [Sigma[:1, :1] if t.smooth else Sigma for t, Sigma in zip(labels, estimates.Sigma, strict=True)]
        sds = [np.sqrt(np.diag(Sigma)) for Sigma in shown]
        every = np.concatenate([*sds, self._residual()])
        sd_text, var_text = fixed_decimals(every, 5), fixed_decimals(every**2, 5)
        width = max((len(sd) for sd in sds), default=1)
        rows, k = [], 0
        for name, term, Sigma in zip(term_names(self.fitted.labels), labels, shown, strict=True):
            cor = correlation(Sigma)
            for i, effect in enumerate(("smooth",) if term.smooth else term.effects):
                cells = [f"{c:.2f}" if np.isfinite(c) else "NaN" for c in cor[i, :i]]
                cells += [""] * (width - 1 - len(cells))
                rows.append([name if i == 0 else "", effect, var_text[k], sd_text[k], *cells])
                k += 1
        rows += [["Residual", "", var_text[k], sd_text[k], *[""] * (width - 1)] for _ in self._residual()]
        heads = ["Groups", "Name", "Variance", "Std.Dev.", *(["Corr"] + [""] * (width - 2) if width > 1 else [])]
        return pd.DataFrame(rows, columns=heads)

    def beneath(self) -> list[str]:
        """Lines under the table."""
        return []

    def __str__(self) -> str:
        return "\n".join([text_table(self.table(), left=2), *self.beneath()])

    def __repr__(self) -> str:
        return str(self)

    def _report(self) -> Report:
        return Report([Cells.of(self.table(), left=2)], self.beneath())


def correlation(Sigma: np.ndarray) -> np.ndarray:
    """Correlations of a covariance; NaN where a variance is zero, or negative after a failed fit."""
    with np.errstate(invalid="ignore", divide="ignore"):
        sd = np.sqrt(np.diag(Sigma))
        cor: np.ndarray = Sigma / np.outer(sd, sd)
        return cor


def coefficient_table(fitted: AnyRecord, tests: pd.DataFrame | None = None) -> pd.DataFrame:
    """Estimate, standard error and their ratio per fixed effect; with ``tests`` also df and p_value, and the standard
    errors of that method."""
    if tests is not None:
        return tests.rename_axis("term")
    se = np.sqrt(np.diag(fitted.estimates.vcov))
    beta = fitted.estimates.beta
    return pd.DataFrame(
        {"estimate": beta, "std_error": se, "statistic": beta / se}, index=pd.Index(fitted.labels.fixed, name="term")
    )


@dataclass(frozen=True)
class Summary(Reported):
    r"""Everything one wants to read first about a fit. ``str()`` is laid out like lme4's ``summary()``.

    :meth:`to_latex`, :meth:`to_html` and :meth:`to_markdown` leave out the scaled residuals and the correlation of the
    fixed effects.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> text = fit.summary("satterthwaite").to_latex()
        >>> print(text[text.rindex(r"\midrule") :])
        \midrule
        Intercept & 251.405 & 6.825 & 17.00 & 36.838 & \textless{}0.001 \\
        Days & 10.467 & 1.546 & 17.00 & 6.771 & \textless{}0.001 \\
        \bottomrule
        \end{tabular}
        <BLANKLINE>
        {\smallskip\footnotesize\noindent satterthwaite degrees of freedom\par}
    """

    fitted: Fitted
    tests: pd.DataFrame | None = None
    ddf: str | None = None
    # Head of the table of covariances.
    covariances: ClassVar[str] = "Random effects"

    def __str__(self) -> str:
        further, head = further_table(self.fitted), _head_of_further(self.fitted)
        parts = [
            "\n".join(self._head()),
            self._fit_statistics_text(),
            self._scaled_residuals() if self.fitted.kept is not None else "",
            f"{self.covariances}:\n" + str(self._varcorr()) + "\n" + self._counts(),
            *([] if further is None else [f"{head}:\n{text_table(further, left=1)}"]),
            "Fixed effects:\n" + self._fixed_text(),
            *(f"{head}:\n{text_table(self._table_of(rows), left=1)}" for head, rows in self._components().items()),
        ]
        if 1 < len(self.fitted.labels.fixed) <= 20:
            parts.append("Correlation of Fixed Effects:\n" + text_table(self._correlation_table(), left=1))
        notes = self._notes()
        return "\n\n".join(part for part in [*parts, "\n".join(notes)] if part)

    def __repr__(self) -> str:
        return str(self)

    def _report(self) -> Report:
        fixed = self._fixed_table(p_value) if self.fitted.labels.fixed else None
        further, head = further_table(self.fitted), _head_of_further(self.fitted)
        parts = [
            *self._head(),
            ", ".join(f"{name} {value}" for name, value in self._fit_statistics().items()),
            Cells.of(self._varcorr().table(), left=2, title=self.covariances),
            *self._varcorr().beneath(),
            self._counts(),
            *([] if further is None else [Cells.of(further, left=1, title=head)]),
            "Fixed effects: none" if fixed is None else Cells.of(fixed, left=1, title="Fixed effects"),
            *(Cells.of(self._table_of(rows, p_value), left=1, title=head) for head, rows in self._components().items()),
        ]
        how = [] if self.ddf is None or fixed is None else [ddf_note(self.ddf)]
        return Report(parts, [*how, *self._notes()])

    def _varcorr(self) -> VarCorr:
        return VarCorr(self.fitted)

    def _head(self) -> list[str]:
        method = "REML" if self.fitted.reml else "maximum likelihood"
        kind = "Linear mixed model" if self.fitted.labels.terms else "Linear model"
        return [f"{kind} fit by {method}", f"Formula: {self.fitted.labels.formula}", *_of_residuals(self.fitted)]

    def _fit_statistics(self) -> dict[str, str]:
        if self.fitted.reml:
            return {"REML criterion at convergence:": f"{float(self.fitted.estimates.criterion):.1f}"}
        return likelihood_statistics(self.fitted)

    def _fit_statistics_text(self) -> str:
        cells = self._fit_statistics()
        if len(cells) == 1:
            return " ".join([*cells, *cells.values()])
        return text_table(pd.DataFrame([list(cells.values())], columns=list(cells)), left=0)

    def _scaled(self) -> np.ndarray:
        return conditional_residuals(self.fitted, scale="pearson") / float(self.fitted.estimates.sigma)

    def _scaled_residuals(self) -> str:
        scaled = self._scaled()
        quantiles = [f"{q:.4f}" for q in np.quantile(scaled, [0, 0.25, 0.5, 0.75, 1])]
        table = pd.DataFrame([quantiles], columns=["Min", "1Q", "Median", "3Q", "Max"])
        return "Scaled residuals:\n" + text_table(table, left=0)

    def _counts(self) -> str:
        groups = "; ".join(f"{name}, {m}" for name, m in group_sizes(self.fitted).items())
        if not groups:
            return f"Number of obs: {self.fitted.nobs}"
        return f"Number of obs: {self.fitted.nobs}, groups: {groups}"

    def _components(self) -> dict[str, pd.DataFrame]:
        """Coefficients of parts of the model beside the fixed effects, by their heads."""
        return {}

    def _fixed_table(self, p_text: Callable[[float], str] = "{:.3g}".format) -> pd.DataFrame:
        return self._table_of(coefficient_table(self.fitted, self.tests), p_text)

    def _table_of(self, table: pd.DataFrame, p_text: Callable[[float], str] = "{:.3g}".format) -> pd.DataFrame:
        se = table["std_error"].to_numpy()
        decimals = int(np.clip(3 - np.floor(np.log10(se.min())), 0, 12)) if len(se) and se.min() > 0 else 4
        wide = decimals > 8 or (len(se) and np.abs(table["estimate"]).max() >= 1e9)
        number: Callable[[float], str] = (lambda x: f"{x:.5g}") if wide else (lambda x: f"{x:.{decimals}f}")
        columns = {
            "": table.index,
            "Estimate": [number(x) for x in table["estimate"]],
            "Std. Error": [number(x) for x in table["std_error"]],
        }
        is_t = self.tests is None or not np.isposinf(table["df"]).all()
        if self.tests is not None and is_t:
            columns["df"] = [f"{x:.2f}" for x in table["df"]]
        columns["t value" if is_t else "z value"] = [f"{x:.3f}" for x in table["statistic"]]
        if self.tests is not None:
            columns["Pr(>|t|)" if is_t else "Pr(>|z|)"] = [p_text(x) for x in table["p_value"]]
        return pd.DataFrame(columns)

    def _fixed_text(self) -> str:
        return text_table(self._fixed_table(), left=1) if self.fitted.labels.fixed else "none"

    def _correlation_table(self) -> pd.DataFrame:
        names = list(self.fitted.labels.fixed)
        cor = correlation(self.fitted.estimates.vcov)
        heads = _abbreviate(names[:-1])
        numbered = heads[0] == "(1)"
        rows = [
            [f"({i + 1}) {names[i]}" if numbered else names[i]]
            + [f"{cor[i, j]:.3f}" if j < i else "" for j in range(len(names) - 1)]
            for i in range(0 if numbered else 1, len(names))
        ]
        return pd.DataFrame(rows, columns=["", *heads])

    def _notes(self) -> list[str]:
        notes = []
        if self.fitted.labels.n_missing:
            notes.append(f"{self.fitted.labels.n_missing} rows left out because of missing values")
        if self.fitted.labels.dropped_columns:
            notes.append(f"redundant fixed-effects columns left out: {', '.join(self.fitted.labels.dropped_columns)}")
        if self.fitted.estimates.singular:
            notes.append("singular fit: a covariance of random effects has less than full rank (a variance 0, or a "
                         "correlation at its bound)")  # fmt: skip
        if (table := further_table(self.fitted)) is not None:
            at_bound = table.loc[(table["Std. Error"] == "") & (table["Estimate"].astype(float) == 0), ""]
            notes += [f"{name} is at its bound, 0" for name in at_bound]
        if not self.fitted.estimates.converged:
            notes.append(f"NOT CONVERGED: {self.fitted.optimizer.message}")
        return notes


def _head_of_further(fitted: Any) -> str:
    return "Correlations by distance" if names_of_kernels(fitted.labels) else "Residuals"


def _of_residuals(fitted: Any) -> list[str]:
    """What the model says of its residuals."""
    heads = {"dispersion": "Dispersion", "residual": "Residuals"}
    return [f"{heads[name]}: {text}" for name, text in getattr(fitted, "own_formulas", {}).items() if name in heads]


def further_parameters(fitted: Any) -> pd.DataFrame:
    """Estimates and standard errors of what :func:`~mixjax.fitted.names.names_of_further` names; without rows if
    none."""
    found, names = fitted.variance_parameters, names_of_further(fitted.labels)
    at = [found.names.index(name) for name in names]
    return pd.DataFrame({"estimate": found.estimate[at], "std_error": found.std_error[at]}, index=list(names))


def further_table(fitted: Any) -> pd.DataFrame | None:
    """The same as text; None where there are none."""
    if not names_of_further(fitted.labels):
        return None
    frame = further_parameters(fitted)
    shown = {
        "": list(frame.index),
        "Estimate": [f"{x:.5f}" for x in frame["estimate"]],
        "Std. Error": ["" if np.isnan(x) else f"{x:.5f}" for x in frame["std_error"]],
    }
    return pd.DataFrame(shown)


def likelihood_statistics(fitted: FitStatistics) -> dict[str, str]:
    """What stands above a maximum-likelihood fit in lme4's summary."""
    return {
        "AIC": f"{fitted.aic:.1f}",
        "BIC": f"{fitted.bic:.1f}",
        "logLik": f"{fitted.loglik:.1f}",
        "-2*log(L)": f"{float(fitted.estimates.criterion):.1f}",
        "df.resid": str(fitted.nobs - fitted.npar),
    }


def tidy(fitted: Fitted, tests: pd.DataFrame | None = None, level: float | None = None) -> pd.DataFrame:
    """Estimates in rows, as broom.mixed's ``tidy()``.

    Columns ``effect`` ("fixed" or "ran_pars"), ``group``, ``term``, ``estimate``, ``std_error``, ``statistic``,
    ``df``, ``p_value``. Random-effects rows are standard deviations ``sd__x`` and correlations ``cor__x.z``; degrees
    of freedom and p-values need a method for the degrees of freedom and are NaN without one. Parameters of residuals
    beside sigma have ``effect`` "residual"; those of correlations by distance are ``range`` and ``smoothness``.
    ``level``: of intervals of the fixed effects, or None for none.
    """
    notes = () if tests is None else tests.attrs.get("notes", ())
    more = None
    if names_of_further(fitted.labels):
        own = further_parameters(fitted)
        more = own.rename_axis("term").reset_index().assign(effect="residual")
        if names_of_kernels(fitted.labels):
            more[["term", "group"]] = [name.split("|", 1) for name in more["term"]]
            more["effect"] = "ran_pars"
    table = tidy_table(coefficient_table(fitted, tests), VarCorr(fitted), notes, more)
    return table if level is None else with_intervals(table, level)


def tidy_table(
    fixed: pd.DataFrame, varcorr: VarCorr, notes: tuple[str, ...], more: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The rows of :func:`tidy` from the table of coefficients; ``more`` rows stand beneath."""
    fixed = fixed.reset_index()
    fixed.insert(0, "effect", "fixed")
    fixed.insert(1, "group", None)
    frame = varcorr.to_frame()
    kind = np.where(frame["name2"].isna(), "sd__", "cor__")
    first = frame["name1"].fillna("Observation")
    second = ("." + frame["name2"].astype(object)).fillna("")
    random = pd.DataFrame(
        {"effect": "ran_pars", "group": frame["group"], "term": kind + first + second, "estimate": frame["sdcor"]}
    )
    both = [part for part in (fixed, random, more) if part is not None and len(part)]
    columns = ["effect", "group", "term", "estimate", "std_error", "statistic", "df", "p_value"]
    return NotedTable(pd.concat(both, ignore_index=True).reindex(columns=columns), notes)


def with_intervals(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """The rows of :func:`tidy` with Wald intervals ``lower`` and ``upper`` of the fixed effects, by their degrees of
    freedom where there are any."""
    check_level(level)
    df = table["df"].astype(float).fillna(np.inf)
    width = t_quantile(0.5 + level / 2, df) * table["std_error"].where(table["effect"] == "fixed")
    notes = (*table.attrs.get("notes", ()), f"{100 * level:g} % intervals of the fixed effects")
    return NotedTable(table.assign(lower=table["estimate"] - width, upper=table["estimate"] + width), notes)


def glance(fitted: Fitted) -> pd.DataFrame:
    """One row that describes the fit as a whole."""
    row = {
        "nobs": fitted.nobs,
        "npar": fitted.npar,
        "sigma": float(fitted.estimates.sigma),
        "loglik": fitted.loglik,
        "aic": fitted.aic,
        "bic": fitted.bic,
        "criterion": float(fitted.estimates.criterion),
        "reml": fitted.reml,
        "df_residual": fitted.nobs - fitted.npar,
        "converged": bool(fitted.estimates.converged),
        "singular": bool(fitted.estimates.singular),
    }
    return NotedTable(pd.DataFrame([row]), ())


def _abbreviate(names: list[str], width: int = 9) -> list[str]:
    """Names cut to a width, or numbered where cutting would make two of them equal."""
    cut = [name if len(name) <= width else name[: width - 1] + "." for name in names]
    return cut if len(set(cut)) == len(cut) else [f"({i + 1})" for i in range(len(names))]
