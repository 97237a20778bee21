"""A fit of a generalised linear mixed model as tables: text like that of lme4's ``summary()`` of a ``glmer`` fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mixjax.face.summary import Summary, VarCorr, coefficient_table, likelihood_statistics, tidy_table, with_intervals
from mixjax.families.links import RATIOS
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.parameters import component_of, parameters_of_family
from mixjax.inference.fixed.contrasts import contrast_of
from mixjax.tables import NotedTable


def check_ratios(link: str) -> None:
    """Raise ValueError where exponentials of the coefficients mean nothing."""
    if link not in RATIOS:
        raise ValueError(
            f"exponentials of coefficients are ratios with links {', '.join(map(repr, RATIOS))}; of link "
            f"{link!r} they mean nothing"
        )


def z_tests(fitted: GeneralizedFitted) -> pd.DataFrame:
    """Estimate, standard error, z statistic and two-sided p value of every fixed effect; df is infinite."""
    est = fitted.estimates
    with np.errstate(invalid="ignore"):
        se = np.sqrt(np.diag(est.vcov))
    return _tests_of(est.beta, se, fitted.labels.fixed)


def _tests_of(estimate: np.ndarray, se: np.ndarray, names: tuple[str, ...]) -> pd.DataFrame:
    found = contrast_of(estimate, se, np.full(len(se), np.inf))
    columns = {"estimate": estimate, "std_error": se, "df": found.df, "statistic": found.statistic, "p_value": found.p}
    return pd.DataFrame(columns, index=pd.Index(names, name="term"))


def dispersion(fitted: GeneralizedFitted) -> dict[str, float]:
    """The family's own parameters by name, as users know them, but for those that depend on columns."""
    names, values, _ = parameters_of_family(fitted.labels, fitted.family, np.asarray(fitted.estimates.psi))
    return {name: float(x) for name, x in zip(names, values, strict=True) if name in fitted.family.psi_names}


# Component of a model beside the conditional one -> the head of its table.
COMPONENTS = {"zi": "Zero-inflation model", "disp": "Dispersion model"}


def own_coefficients(fitted: GeneralizedFitted) -> dict[str, pd.DataFrame]:
    """Per component that has a formula, ``"zi"`` and ``"disp"``, the table of its coefficients, as :func:`z_tests`."""
    est, p = fitted.estimates, fitted.rows.p
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.diag(est.vcov_all))
    found, at = {}, 0
    for name, own in zip(fitted.family.psi_names, fitted.labels.psi, strict=False):
        place, at = slice(at, at + max(len(own), 1)), at + max(len(own), 1)
        if own:
            table = _tests_of(est.psi[place], errors[p + place.start : p + place.stop], own)
            found[component_of(name)] = table
    return {name: found[name] for name in COMPONENTS if name in found}


@dataclass(frozen=True, repr=False)
class GeneralizedVarCorr(VarCorr):
    """Standard deviations, variances and correlations of the random effects on the scale of the linear predictor.
    ``str()`` gives lme4's table; parameters of the family stand beneath."""

    fitted: GeneralizedFitted  # type: ignore[assignment]

    def _residual(self) -> list[float]:
        return []

    def beneath(self) -> list[str]:
        name = self.fitted.family.name
        return [f"{own.capitalize()} parameter for {name}: {x:.4g}" for own, x in dispersion(self.fitted).items()]


@dataclass(frozen=True, repr=False)
class GeneralizedSummary(Summary):
    """Everything one wants to read first about a fit. ``str()`` is laid out like lme4's ``summary()``.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
        >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
        >>> print("\\n".join(str(fit.summary()).splitlines()[:4]))
        Generalized linear mixed model fit by maximum likelihood (Laplace approximation)
        Family: binomial (logit)
        Formula: slow ~ Days + (1 | Subject)
        Success: 'slow' is True
    """

    fitted: GeneralizedFitted  # type: ignore[assignment]

    def _varcorr(self) -> VarCorr:
        return GeneralizedVarCorr(self.fitted)

    def _head(self) -> list[str]:
        family, success = self.fitted.family, self.fitted.labels.success
        how = "Laplace approximation" + ", expected curvature" * (self.fitted.curvature == "expected")
        if not self.fitted.nagq:
            how = "nAGQ = 0" + ", expected curvature" * (self.fitted.curvature == "expected")
        elif self.fitted.nagq != 1:
            how = f"adaptive Gauss-Hermite quadrature, nAGQ = {self.fitted.nagq}"
        likelihood = "restricted maximum likelihood" if self.fitted.reml else "maximum likelihood"
        return [
            f"Generalized linear mixed model fit by {likelihood} ({how})",
            f"Family: {family.name} ({family.link})",
            f"Formula: {self.fitted.labels.formula}",
            *(f"{COMPONENTS[name]}: {text}" for name, text in self.fitted.own_formulas.items()),
            *[f"Success: {success}"] * bool(success),
        ]

    def _components(self) -> dict[str, pd.DataFrame]:
        return {COMPONENTS[name]: table for name, table in own_coefficients(self.fitted).items()}

    def _fit_statistics(self) -> dict[str, str]:
        return likelihood_statistics(self.fitted)

    def _scaled(self) -> np.ndarray:
        return self.fitted.scaled_residuals

    def _scaled_residuals(self) -> str:
        try:
            return super()._scaled_residuals()
        except ValueError:  # a family that is given by its density alone has no variance
            return ""


def generalized_summary(fitted: GeneralizedFitted) -> GeneralizedSummary:
    """The summary of a record, with z tests of the fixed effects."""
    return GeneralizedSummary(fitted, z_tests(fitted))


def generalized_tidy(fitted: GeneralizedFitted, exponentiate: bool = False, level: float | None = None) -> pd.DataFrame:
    """Estimates in rows, as broom.mixed's ``tidy()``: fixed effects with z tests, standard deviations and correlations
    of the random effects, parameters of the family.

    Args:
        exponentiate: fixed effects as ratios. level: of Wald intervals of the fixed effects, or None for none.

    Raises:
        ValueError: exponentials of the coefficients mean nothing with the fit's link.
    """
    if not isinstance(exponentiate, bool | np.bool_):
        raise ValueError(f"exponentiate must be True or False, got {exponentiate!r}")
    if exponentiate:
        check_ratios(fitted.family.link)
    family = fitted.family.name
    own = [("family", family, name, value) for name, value in dispersion(fitted).items()]
    more = pd.DataFrame(own, columns=["effect", "group", "term", "estimate"])
    notes = ["wald tests, covariances of the random effects estimated"]
    table = tidy_table(coefficient_table(fitted, z_tests(fitted)), GeneralizedVarCorr(fitted), (), more)
    table = pd.DataFrame(table)
    components = own_coefficients(fitted)
    if components:
        parts = [table.assign(component="cond")]
        parts += [
            rows.reset_index().assign(effect="fixed", component=name, group=None) for name, rows in components.items()
        ]
        table = pd.concat(parts, ignore_index=True)[["effect", "component", *table.columns[1:]]]
    fixed = (table["effect"] == "fixed").to_numpy()
    if level is not None:
        table = with_intervals(NotedTable(table, tuple(notes)), level)
        notes = list(table.attrs["notes"])
    if exponentiate:
        if components:
            fixed = fixed & (table["component"] == "cond").to_numpy()
        ratio = np.exp(table["estimate"].where(fixed))
        table["std_error"] = (ratio * table["std_error"]).where(fixed, table["std_error"])
        for name in [own for own in ("estimate", "lower", "upper") if own in table]:
            table[name] = np.exp(table[name].where(fixed)).where(fixed, table[name])
        notes.append(f"fixed effects are {RATIOS[fitted.family.link].coefficients}")
    return NotedTable(table, tuple(notes))


def generalized_glance(fitted: GeneralizedFitted) -> pd.DataFrame:
    """One row that describes the fit as a whole."""
    row = {
        "nobs": fitted.nobs,
        "npar": fitted.npar,
        "family": fitted.family.name,
        "link": fitted.family.link,
        "nagq": fitted.nagq,
        "reml": fitted.reml,
        "loglik": fitted.loglik,
        "aic": fitted.aic,
        "bic": fitted.bic,
        "criterion": float(fitted.estimates.criterion),
        "deviance": float(fitted.unit_deviances.sum()),
        "df_residual": fitted.nobs - fitted.npar,
        "converged": bool(fitted.estimates.converged),
        "singular": bool(fitted.estimates.singular),
    }
    return NotedTable(pd.DataFrame([row]), ())
