"""``mixjax fit``."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import mixjax
from mixjax.cli import reading
from mixjax.cli.messages import Held, keep_programs

if TYPE_CHECKING:
    import pandas as pd

OK, NOT_CONVERGED = 0, 1
# Coverage of the intervals.
LEVEL = 0.95


def fit_command(arguments: argparse.Namespace) -> int:
    """Fit, and print the summary or JSON; returns the exit status."""
    _check_family(arguments)
    data = reading.read(
        arguments.data,
        lambda columns: _names_only(arguments, columns),
        arguments.sep,
        arguments.decimal,
        arguments.encoding,
    )
    data = _with_references(data, arguments)
    if arguments.repeated:
        data = _with_order(data, arguments)
    contrasts = dict(arguments.contrasts)
    if len(contrasts) < len(arguments.contrasts):
        raise ValueError("--contrasts names a column more than once")
    keep_programs(arguments)
    with Held() as held:
        fit: Any
        beside = {"weights": arguments.weights, "offset": arguments.offset, "contrasts": contrasts}
        if arguments.repeated:
            fit = mixjax.mmrm(arguments.formula, data, reml=not arguments.ml, **beside)
        elif arguments.family is None:
            own = {"dispersion": arguments.dispersion, "residual": arguments.residual}
            fit = mixjax.lmm(arguments.formula, data, reml=not arguments.ml, **beside, **own)
        else:
            fit = mixjax.glmm(
                arguments.formula, data, arguments.family, arguments.link, arguments.size, nagq=arguments.nagq or 1,
                ziformula=arguments.ziformula, dispformula=arguments.dispformula, **beside,
            )  # fmt: skip
        held.known = not arguments.json
    for column, level in arguments.ref:
        if fit.labels.frame[column].cat.categories[0] != level:
            raise ValueError(f"--ref {column}={level}: all rows of this level miss some value and are left out")
    linear = arguments.family is None
    summary = fit.summary(arguments.ddf) if linear else fit.summary()
    intervals = None
    if arguments.confint is not None:
        ddf = {"ddf": arguments.ddf or ("satterthwaite" if arguments.repeated else "wald")} if linear else {}
        intervals = fit.confint(level=LEVEL, method=arguments.confint, **ddf)
    if arguments.json:
        method = summary.ddf if arguments.repeated else arguments.ddf if linear else "wald"
        found = _as_json(fit, method, summary.tests, arguments.confint, intervals)
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print(summary)
        if arguments.exponentiate:
            print(f"\n{_ratio_text(fit)}")
        if intervals is not None:
            print(f"\n{_interval_text(arguments.confint, intervals)}")
    return OK if fit.converged else NOT_CONVERGED


def _check_family(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options of the other kind of model."""
    if arguments.repeated and arguments.family is not None:
        raise ValueError("--repeated: of normal responses; leave --family out")
    if arguments.repeated and (arguments.dispersion or arguments.residual):
        raise ValueError("--dispersion, --residual: the covariance of --repeated stands in its formula")
    if arguments.family is None:
        names = ("link", "size", "nagq", "ziformula", "dispformula", "exponentiate")
        if given := [f"--{name}" for name in names if getattr(arguments, name)]:
            raise ValueError(f"{', '.join(given)}: for generalised models; name the --family")
    elif given := [f"--{name}" for name in ("ml", "ddf", "dispersion", "residual") if getattr(arguments, name)]:
        raise ValueError(
            f"{', '.join(given)}: for linear models; generalised ones are fitted by maximum likelihood and have z tests"
        )


class _Roles(NamedTuple):
    """Names in a formula: those that effects read, those that the response and offsets read, grouping factors."""

    effects: set[str]
    others: set[str]
    groups: set[str]


def _roles(arguments: argparse.Namespace, columns: list[str]) -> _Roles:
    from mixjax.formula.own_formulas import parse_own
    from mixjax.formula.parse import parse
    from mixjax.formula.residual_side import parse_residual

    parsed = parse(arguments.formula, columns)
    effects = {name for e in parsed.effects for name in e.columns}
    others = {name for e in (parsed.response, *parsed.offsets) for name in e.columns}
    groups = {column for part in parsed.random for column in part.group.columns}
    if arguments.dispersion:
        own = parse_own("dispersion", arguments.dispersion, columns)
        effects |= set(own.columns if own else ())
    if arguments.residual:
        part = parse_residual(arguments.residual, columns)
        others |= set(part.time.columns if part.time else ())
        groups |= set(part.group.columns)
    return _Roles(effects, others, groups)


def _names_only(arguments: argparse.Namespace, columns: list[str]) -> set[str]:
    """Columns whose values are names even where they look like numbers: 007 is a level, and not that of 7."""
    roles = _roles(arguments, columns)
    numbers = roles.effects | roles.others | {arguments.weights, arguments.offset, arguments.size}
    return (roles.groups - numbers) | {column for column, _ in arguments.ref}


def _with_references(data: pd.DataFrame, arguments: argparse.Namespace) -> pd.DataFrame:
    """The table with these levels as the first of their factors."""
    import pandas as pd

    from mixjax.checks import some_of
    from mixjax.formula.table import level_name, refuse_unknown

    references = arguments.ref
    columns = [str(column) for column in data.columns]
    used = _roles(arguments, columns).effects
    given = [column for column, _ in references]
    for column, level in references:
        if column not in columns:
            refuse_unknown(column, columns, "--ref", data)
        if column not in used:
            raise ValueError(
                f"--ref names {column!r}, of which the formula makes no effect: there is no level to choose"
            )
        if given.count(column) > 1:
            raise ValueError(f"--ref names {column!r} more than once")
        values = data[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            levels = [level_name(own) for own in values.cat.categories]
        else:
            values = values.map(level_name, na_action="ignore")
            levels = reading.ordered(values.dropna().unique())
        if level not in levels:
            raise ValueError(f"--ref {column}={level}: there is no such level; there are {some_of(levels)}")
        first = [level, *(own for own in levels if own != level)]
        names = values.map(level_name, na_action="ignore").astype(object)
        data = data.assign(**{column: pd.Categorical(names, categories=first)})
    return data


def _with_order(data: pd.DataFrame, arguments: argparse.Namespace) -> pd.DataFrame:
    """The table with visits of text in the order of the numbers in their names, unless --ref says otherwise."""
    import pandas as pd

    from mixjax.formula.parse import parse
    from mixjax.formula.repeated import repetition_of
    from mixjax.formula.table import level_name

    columns = [str(column) for column in data.columns]
    visit = repetition_of(parse(arguments.formula, columns)).visit
    if visit not in columns or visit in dict(arguments.ref) or pd.api.types.is_numeric_dtype(data[visit]):
        return data
    if isinstance(data[visit].dtype, pd.CategoricalDtype):
        return data
    names = data[visit].map(level_name, na_action="ignore")
    levels = reading.counted(names.dropna().unique())
    return data.assign(**{visit: pd.Categorical(names.astype(object), categories=levels)})


def _as_json(fit: Any, ddf: str | None, tests: Any, method: str | None, intervals: Any) -> dict[str, Any]:
    """Estimates as plain numbers; what is not a number (the correlation of a zero variance) is null.

    With tests the standard errors are those of their method, as in the summary.
    """
    from mixjax.fitted.names import names_of_kernels, names_of_residuals

    frame = fit.varcorr.to_frame()
    found = {
        "formula": fit.labels.formula,
        **_kind(fit),
        "criterion": fit.criterion,
        "loglik": fit.loglik,
        "aic": fit.aic,
        "bic": fit.bic,
        "nobs": fit.nobs,
        "npar": fit.npar,
        "groups": {term.group: len(term.levels) for term in fit.labels.terms},
        "fixef": fit.fixef.to_dict(),
        "se": fit.se.to_dict(),
    }
    if tests is not None:
        found |= {"ddf": ddf, "se": _plain(tests["std_error"])}
        found |= {name: _plain(tests[name]) for name in ("df", "statistic", "p_value")}
    own: dict[str, Any]
    if isinstance(fit, mixjax.MMRMFit):
        own = {}
    elif isinstance(fit, mixjax.LMMFit):
        own = {"sigma": fit.sigma, "theta": fit.theta.tolist()}
        residual = names_of_residuals(fit.labels)
        if residual:
            own["residual"] = _plain(fit.variance_parameters()["estimate"][list(residual)])
        if kernels := names_of_kernels(fit.labels):
            own["kernels"] = _plain(fit.variance_parameters()["estimate"][list(kernels)])
    else:
        own = {"dispersion": fit.dispersion.to_dict(), "theta": fit.theta.tolist()}
    found |= {
        **own,
        "varcorr": json.loads(frame.to_json(orient="records", double_precision=15)),
    }
    if intervals is not None:
        found["confint"] = {"method": method, "level": LEVEL}
        found["confint"] |= {name: _plain(intervals[name]) for name in ("lower", "upper")}
    singular = {} if isinstance(fit, mixjax.MMRMFit) else {"singular": fit.is_singular}
    return found | {"converged": fit.converged, **singular}


def _kind(fit: Any) -> dict[str, Any]:
    """How a model was fitted."""
    if isinstance(fit, mixjax.LMMFit | mixjax.MMRMFit):
        return {"method": "REML" if fit.reml else "ML"}
    success = {"success": fit.labels.success} if fit.labels.success else {}
    own = {name: _plain(series) for name, series in (("zi", fit.zi), ("disp", fit.disp)) if len(series)}
    return {"method": "ML", "family": fit.family.name, "link": fit.link, "nagq": fit.nagq, **success, **own}


def _ratio_text(fit: Any) -> str:
    """Odds or rate ratios with Wald intervals."""
    import numpy as np

    from mixjax.families.links import RATIOS
    from mixjax.tables import text_table

    if fit.link not in RATIOS:
        raise ValueError(
            f"--exponentiate: effects are ratios for the links {', '.join(RATIOS)}; this one is {fit.link}"
        )
    ends = fit.confint("beta_", level=LEVEL, method="wald")
    table = ends.assign(ratio=fit.fixef.to_numpy())[["ratio", "lower", "upper"]].map(np.exp)
    what = RATIOS[fit.link].coefficients.capitalize()
    shown = table.map(lambda x: f"{x:#.5g}").rename_axis("").reset_index()
    return f"{what} with {100 * LEVEL:g} % intervals (Wald):\n{text_table(shown, left=1)}"


def _plain(column: Any) -> dict[str, float | None]:
    """Name -> number, or null where there is none: JSON has no infinite degrees of freedom of a z test."""
    return {str(name): float(value) if math.isfinite(value) else None for name, value in column.items()}


def _interval_text(method: str, intervals: Any) -> str:
    from mixjax.tables import text_table

    kind = "profile likelihood" if method == "profile" else "Wald"
    table = intervals.rename_axis("").reset_index()
    for name in ("lower", "upper"):
        table[name] = ["none" if math.isnan(x) else f"{x:#.5g}" for x in table[name]]
    return f"{100 * LEVEL:g} % confidence intervals ({kind}):\n{text_table(table, left=1)}"
