"""Several fits side by side, as in a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax import numerals
from mixjax.checks import check_count, check_level, listed, some_of
from mixjax.distributions import t_quantile
from mixjax.face.summary import coefficient_table
from mixjax.families.links import RATIOS
from mixjax.fitted.either import AnyRecord, any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import further_of, interaction_key, names_of_further, names_of_variances
from mixjax.fitted.options import ddf_of
from mixjax.fitted.parameters import parameters_of_family
from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.inference.fixed.contrasts import check_ddf, ddf_note, t_tests
from mixjax.inference.random import variance
from mixjax.markup import Cells, Report, Reported

# What may stand below an estimate: columns of the numbers, how they are called in a note, what surrounds them.
STATISTICS = {
    "std_error": (("std_error",), "standard errors in parentheses", "({})"),
    "ci": (("lower", "upper"), "confidence intervals in brackets", "[{}, {}]"),
    "p": (("p_value",), "p values in parentheses", "({})"),
    "statistic": (("statistic",), "test statistics in parentheses", "({})"),
}
STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
# Numbers of a fit as a whole and their decimals; likelihoods as lme4 shows them.
_WHOLE = {
    "ICC (adjusted)": None, "R2 marginal": None, "R2 conditional": None, "logLik": 1, "AIC": 1, "BIC": 1, "Criterion": 1
}  # fmt: skip

Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class ModelTable(Reported):
    """Fits side by side; made by :func:`mixjax.table`. ``str()`` is the table, notebooks show HTML.

    Attributes:
        cells: the table as text. notes: what stands below it.
        numbers: see :meth:`to_frame`.
    """

    cells: Cells
    notes: tuple[str, ...]
    numbers: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The numbers, not rounded: one column per fit, NaN where a fit has no such number.

        The index has three levels: ``part`` (``"fixed"``, ``"random"``, ``"fit"``), ``row`` as in the table, and
        ``value``: ``"estimate"``, or the column that the statistic below it comes from (``"std_error"``, ``"lower"``,
        ``"upper"``, ``"p_value"``, ``"statistic"``). Of the fit also whether it is by REML, singular, converged: 1 or
        0.
        """
        return self.numbers.copy()

    def _report(self) -> Report:
        return Report([self.cells], self.notes)

    def __str__(self) -> str:
        return self._report().text()

    __repr__ = __str__


def table(
    fits: Any,
    stat: Literal["std_error", "ci", "p", "statistic"] | None = "std_error",
    names: Sequence[str] | None = None,
    ddf: str | None = None,
    level: float = 0.95,
    digits: int = 3,
    stars: bool = False,
    exponentiate: bool = False,
) -> ModelTable:
    """Set fits side by side, as R's modelsummary, stargazer and ``sjPlot::tab_model`` do; linear and generalised ones.

    Rows are the fixed effects, with a statistic below each; standard deviations and correlations of the random effects;
    sigma, or the parameters of the family; adjusted ICC and R2 of Nakagawa & Schielzeth (:meth:`LMMFit.icc`,
    :meth:`LMMFit.r2`); numbers of rows and groups; likelihood, AIC and BIC, the criterion that was minimised, and which
    it is. Terms stand in the order in which they appear, and a cell is empty where a fit has no such term. Notes below
    say how the numbers came about, and warn of fits that are singular, did not converge, or whose likelihoods cannot be
    compared.

    Args:
        fits: a fit, a list of fits, or a dict name -> fit.
        stat: what stands below the fixed effects: ``"std_error"``, ``"ci"`` (t or z intervals), ``"p"``,
            ``"statistic"`` (estimate / standard error), or None.
        names: of the fits, instead of (1), (2), ...
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` (which has standard errors of its own, and refits an ML fit by
            REML) or ``"wald"``. None: Satterthwaite's where p values, intervals or stars need degrees of freedom.
            Generalised models have z tests.
        level: of the intervals.
        digits: significant digits of the standard errors, with as many decimals for the estimates; of standard
            deviations; decimals of p values and shares, one less of correlations and test statistics.
        stars: mark p values below 0.05, 0.01 and 0.001.
        exponentiate: ratios of odds, means or hazards instead of the fixed effects of generalised models with a logit,
            log or cloglog link, with standard errors by the delta method and the exponentials of the intervals' ends.

    Returns:
        :class:`~mixjax.face.report.ModelTable`: ``str()``, ``to_latex()``, ``to_html()``, ``to_markdown()``, and
        ``to_frame()`` for the numbers.

    Raises:
        ValueError: an argument is none of those above; names are not one per fit, or not all different.
        TypeError: one of the fits is no fit.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy")
        >>> intercepts = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
        >>> print(mj.table([intercepts, mj.lmm("Reaction ~ Days + (Days | Subject)", data)]))
                                          (1)     (2)
        Intercept                      251.41  251.41
                                       (9.75)  (6.82)
        Days                           10.467  10.467
                                      (0.804) (1.546)
        ---------------------------------------------
        sd Intercept | Subject           37.1    24.7
        sd Days | Subject                        5.92
        cor Intercept, Days | Subject            0.07
        sigma                            31.0    25.6
        ---------------------------------------------
        Observations                      180     180
        Groups: Subject                    18      18
        ICC (adjusted)                  0.589   0.722
        R2 marginal                     0.280   0.279
        R2 conditional                  0.704   0.799
        logLik                         -893.2  -871.8
        AIC                            1794.5  1755.6
        BIC                            1807.2  1774.8
        Criterion                      1786.5  1743.6
        Estimated by                     REML    REML
        standard errors in parentheses
    """
    if hasattr(stat, "record"):
        raise ValueError("several fits are given as one list, table([m0, m1]), or with their names, table({'A': m0})")
    records, names, own_ddf = _models(fits, names)
    if stat is not None and stat not in STATISTICS:
        raise ValueError(f"stat must be one of {', '.join(map(repr, STATISTICS))} or None, got {stat!r}")
    if not isinstance(stars, bool | np.bool_):
        raise ValueError(f"stars must be True or False, got {stars!r}")
    if exponentiate:
        _check_ratios(records, names)
    ddf = ddf_of(ddf)
    if ddf is not None:
        check_ddf(ddf)
    check_level(level)
    digits = check_count("digits", digits, 1, 12)
    needs_df = stat in ("ci", "p") or bool(stars)
    methods = [_ddf_of(ddf, own, needs_df) for own in own_ddf]
    fixed = _side_by_side(
        [_fixed(record, method, level, exponentiate) for record, method in zip(records, methods, strict=True)]
    )
    random = _side_by_side([_random(record) for record in records])
    groups = _side_by_side([_groups(record) for record in records])
    whole = [_whole(record) for record in records]
    rows: list[list[str]] = []
    numbers: dict[Key, Sequence[float | None]] = {}
    for label, found in fixed.values():
        rows += _fixed_rows(label, found, stat, digits, bool(stars))
        for value in ("estimate", *(STATISTICS[stat][0] if stat else ())):
            numbers["fixed", label, value] = [None if own is None else own[value] for own in found]
    rules = [len(rows)] * bool(rows)
    for key, (label, values) in _by_group(random).items():
        rows.append([label, *_shown(values, digits, digits - 1 if key[1] == "cor" else None)])
        numbers["random", label, "estimate"] = values
    rules.append(len(rows))
    for label, counts in [("Observations", [record.nobs for record in records]), *groups.values()]:
        rows.append([label, *_shown(counts, digits, 0)])
        numbers["fit", label, ""] = counts
    for label, decimals in _WHOLE.items():
        values = [own.get(label) for own in whole]
        if all(value is None for value in values):
            continue
        rows.append([label, *_shown(values, digits, digits if decimals is None else decimals)])
        numbers["fit", label, ""] = values
    rows.append(["Estimated by", *map(_method, records)])
    if any(isinstance(record, GeneralizedFitted) for record in records):
        rows.append(["Family", *map(_family, records)])
    numbers["fit", "REML", ""] = [_is_restricted(record) for record in records]
    for label, flags, usual in (
        ("Singular", [bool(record.estimates.singular) for record in records], False),
        ("Converged", [bool(record.estimates.converged) for record in records], True),
    ):
        numbers["fit", label, ""] = flags
        if any(flag != usual for flag in flags):
            rows.append([label, *("yes" if flag else "no" for flag in flags)])
    index = pd.MultiIndex.from_tuples(list(numbers), names=["part", "row", "value"])
    frame = pd.DataFrame(np.array(list(numbers.values()), dtype=float), index=index, columns=list(names))
    notes = [*_how(stat, methods, level, bool(stars), records, names), *_warnings(records, names, methods)]
    if exponentiate:
        notes.insert(0, "fixed effects are ratios of odds (logit), of means (log) or of hazards (cloglog)")
        if any(record.labels.psi for record in records if isinstance(record, GeneralizedFitted)):
            notes.insert(1, "coefficients of dispersion and of extra zeros stay on the scales of their links")
    return ModelTable(Cells(["", *names], rows, rules=rules), tuple(notes), frame)


def _method(record: AnyRecord) -> str:
    """By what a model was estimated."""
    if not isinstance(record, GeneralizedFitted):
        return "REML" if record.reml else "ML"
    if record.nagq > 1:
        return f"quadrature ({record.nagq})"
    return "Laplace" + ", expected" * (record.curvature == "expected")


def _is_restricted(record: AnyRecord) -> bool:
    return not isinstance(record, GeneralizedFitted) and record.reml


def _family(record: AnyRecord) -> str:
    return f"{record.family.name} ({record.family.link})" if isinstance(record, GeneralizedFitted) else "gaussian"


def _check_ratios(records: Sequence[AnyRecord], names: Sequence[str]) -> None:
    """Raise ValueError where exponentials of the fixed effects say nothing."""
    for record, name in zip(records, names, strict=True):
        if not isinstance(record, GeneralizedFitted) or record.family.link not in RATIOS:
            raise ValueError(
                f"exponentiate=True is for links {', '.join(RATIOS)}, whose effects are ratios; {name} is "
                f"{_family(record)}"
            )


def _ddf_of(asked: str | None, own: str | None, needs_df: bool) -> str | None:
    """The degrees of freedom of one fit: those asked for, else its own, else Satterthwaite's where some are needed."""
    if asked is not None:
        return asked
    return own if needs_df or own != "satterthwaite" else None


def _models(fits: Any, names: Sequence[str] | None) -> tuple[list[AnyRecord], list[str], list[str | None]]:
    """Records and names of one fit, some, or a dict; and the degrees of freedom of each for its tests, of fits of
    repeated measures their own."""
    if isinstance(fits, Mapping):
        if names is not None:
            raise ValueError("names= is for a list of fits; the keys of a dict are their names")
        names, fits = list(fits), list(fits.values())
    elif isinstance(fits, AnyRecord) or hasattr(fits, "record") or not isinstance(fits, Sequence):
        fits = [fits]
    found = [getattr(fit, "record", fit) for fit in fits]
    records = [record if isinstance(record, RepeatedFitted) else any_record_of(record) for record in found]
    repeated = [isinstance(record, RepeatedFitted) for record in records]
    ddf = [
        getattr(fit, "ddf", "satterthwaite") if r else "satterthwaite" for fit, r in zip(fits, repeated, strict=True)
    ]
    if not records:
        raise ValueError("there are no fits; give one or more, as mixjax.lmm, glmm or mmrm returns them")
    if names is None:
        return records, [f"({i + 1})" for i in range(len(records))], ddf
    names = [names] if isinstance(names, str) else list(map(str, names))
    if len(names) != len(records):
        raise ValueError(f"names must be one for each of the {len(records)} fits, got {listed(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"names must be different, got {listed(names)}")
    return records, names, ddf


# --- numbers of one fit ---------------------------------------------------------------------------------------------


def _fixed(
    record: AnyRecord, ddf: str | None, level: float, exponentiate: bool
) -> dict[Key, tuple[str, dict[str, float]]]:
    """Key of a fixed effect -> its name and numbers. Factors of an interaction may stand in another order elsewhere."""
    names = record.labels.fixed
    if ddf is not None and isinstance(record, GeneralizedFitted):
        ddf = "wald"
    frame = coefficient_table(record, None if ddf is None else t_tests(record, np.eye(len(names)), ddf, names=names))
    if ddf is not None:
        half = t_quantile(0.5 + level / 2, frame["df"]) * frame["std_error"]
        frame = frame.assign(lower=frame["estimate"] - half, upper=frame["estimate"] + half)
    if exponentiate:
        ratio = np.exp(frame["estimate"])
        ends = {name: np.exp(frame[name]) for name in ("lower", "upper") if name in frame}
        frame = frame.assign(estimate=ratio, std_error=ratio * frame["std_error"], **ends)
    rows = [dict(zip(frame.columns, map(float, row), strict=True)) for row in frame.to_numpy()]
    return {interaction_key(name): (name, row) for name, row in zip(names, rows, strict=True)}


def _random(record: AnyRecord) -> dict[Key, tuple[str, float]]:
    """(group, kind, effects) -> label and estimate of standard deviations, correlations and sigma, or the parameters of
    the family.

    Effects are called by their group, whichever term they stand in, so that correlated and uncorrelated ones of several
    fits share a row. A parameter that all effects of a term share names none of them.
    """
    found: dict[Key, tuple[str, float]] = {}
    structures = record.structures if isinstance(record, RepeatedFitted) else record.layout.structures
    for parameter in names_of_variances(record.labels, structures):
        term, natural = record.labels.terms[parameter.term], parameter.natural
        places = sorted([natural.i, natural.j]) if parameter.kind == "cor" else [natural.i]
        plain = natural.shared or natural.kind == "real"
        effects = [] if plain else [term.effects[place] for place in places]
        effects = [natural.label] if natural.kind == "real" else effects
        effects = [f"lag {natural.i - natural.j}"] if natural.lag else effects
        what = f"loading {natural.j + 1}" if natural.kind == "loading" else natural.kind
        key: Key = (interaction_key(term.group), what, frozenset(map(interaction_key, effects)))
        again = sum(other[:3] == key for other in found)
        kind = "" if what == "real" else what
        label = f"{kind} {', '.join(effects)}".strip() + f" | {term.group}" + f" ({again + 1})" * bool(again)
        found[*key, again] = (label, float(parameter.value(record.estimates.Sigma)))
    if isinstance(record, Fitted):
        for name, value in zip(names_of_further(record.labels), further_of(record.estimates), strict=True):
            own, _, of = name.partition("|")
            found[(), "residual", (name,), 0] = (f"{own} | {of}" if of else own, float(value))
        return found | {((), "sigma", (), 0): ("sigma", float(record.estimates.sigma))}
    if isinstance(record, RepeatedFitted):
        return found
    names, values, _ = parameters_of_family(record.labels, record.family, np.asarray(record.estimates.psi))
    return found | {((), "sigma", (name,), 0): (name, float(x)) for name, x in zip(names, values, strict=True)}


def _groups(record: AnyRecord) -> dict[Key, tuple[str, int]]:
    """Numbers of levels of the grouping factors."""
    if isinstance(record, RepeatedFitted):
        subject = record.labels.repetition.subject.name
        return {(subject,): (f"Groups: {subject}", len(record.rows.order))}
    return {(term.group,): (f"Groups: {term.group}", len(term.levels)) for term in record.labels.terms}


def _whole(record: AnyRecord) -> dict[str, float]:
    """Numbers of the fit as a whole; without its rows no shares of variance."""
    found = {
        "logLik": record.loglik,
        "AIC": record.aic,
        "BIC": record.bic,
        "Criterion": float(record.estimates.criterion),
    }
    if record.kept is None or isinstance(record, RepeatedFitted):
        return found
    try:
        r2, icc = variance.r2(record), variance.icc(record)
    except ValueError:  # a family without a residual variance on the scale of the linear predictor
        return found
    found |= {"ICC (adjusted)": float(icc["adjusted"])}
    return found | {f"R2 {kind}": float(r2[kind]) for kind in ("marginal", "conditional")}


# --- rows of the table ----------------------------------------------------------------------------------------------


def _side_by_side(fits: Sequence[Mapping[Key, tuple[str, Any]]]) -> dict[Key, tuple[str, list[Any]]]:
    """Key -> its first label, and the value in each fit, None where it has none; in the order in which they appear."""
    keys = dict.fromkeys(key for own in fits for key in own)
    found = {key: [own.get(key) for own in fits] for key in keys}
    return {
        key: (next(pair[0] for pair in pairs if pair), [pair and pair[1] for pair in pairs])
        for key, pairs in found.items()
    }


def _by_group(rows: Mapping[Key, Any]) -> dict[Key, Any]:
    """Rows of one group together, its standard deviations before its correlations, sigma last."""
    groups = list(dict.fromkeys(key[0] for key in rows))
    kinds = ["sd", "cor", "loading", "specific", "real", "residual", "sigma"]
    order = sorted(
        rows,
        key=lambda key: (key[1] in ("sigma", "residual"), groups.index(key[0]), kinds.index(key[1].split()[0])),
    )
    return {key: rows[key] for key in order}


def _shown(values: Sequence[float | None], digits: int, decimals: int | None = None) -> list[str]:
    """Cells; empty where there is no number. Without decimals: ``digits`` significant ones of the smallest."""
    present = [x for x in values if x is not None]
    if decimals is None:
        return _placed(numerals.column(present, digits), values)
    return _placed([numerals.number(x, decimals) for x in present], values)


def _fixed_rows(
    label: str, found: Sequence[Mapping[str, float] | None], stat: str | None, digits: int, stars: bool
) -> list[list[str]]:
    """The estimates of one term, and what stands below them."""
    present = [own for own in found if own is not None]
    errors = [own["std_error"] for own in present]
    estimates = numerals.column([own["estimate"] for own in present], digits, errors)
    if stars:
        marks = [next((mark for p, mark in STARS if own["p_value"] < p), "") for own in present]
        estimates = [text + mark for text, mark in zip(estimates, marks, strict=True)]
    rows = [[label, *_placed(estimates, found)]]
    if stat is None:
        return rows
    columns, _, around = STATISTICS[stat]
    texts = []
    for name in columns:
        values = [own[name] for own in present]
        if stat == "p":
            texts.append([numerals.p_value(x, digits) for x in values])
        elif stat == "statistic":
            texts.append([numerals.number(x, digits - 1) for x in values])
        else:
            texts.append(numerals.column(values, digits, () if stat == "std_error" else errors))
    below = [around.format(*both) for both in zip(*texts, strict=True)]
    return [*rows, ["", *_placed(below, found)]]


def _placed(texts: Sequence[str], found: Sequence[Any]) -> list[str]:
    """Texts of those that are there, empty cells for the others."""
    rest = iter(texts)
    return ["" if own is None else next(rest) for own in found]


# --- notes ----------------------------------------------------------------------------------------------------------


def _how(
    stat: str | None, ddf: Sequence[str | None], level: float, stars: bool, records: Sequence[AnyRecord],
    names: Sequence[str],
) -> list[str]:  # fmt: skip
    """The statistics below the estimates, and their method."""
    parts = []
    if stat is not None:
        what = STATISTICS[stat][1]
        parts.append(f"{100 * level:g} % {what}" if stat == "ci" else what)
    linear = [not isinstance(record, GeneralizedFitted) for record in records]
    used = {name: own for name, own, is_linear in zip(names, ddf, linear, strict=True) if is_linear and own}
    if len(set(used.values())) == 1:
        parts.append(ddf_note(next(iter(used.values()))))
    else:
        parts += [f"{name}: {ddf_note(own)}" for name, own in used.items()]
    if any(own is not None for own in ddf):
        parts += ["z tests of generalised models"] * (not all(linear))
    return [", ".join(parts)] * bool(parts) + ["* p < 0.05, ** p < 0.01, *** p < 0.001"] * stars


def _warnings(records: Sequence[AnyRecord], names: Sequence[str], methods: Sequence[str | None]) -> list[str]:
    """Notes on the fits, one by one and beside each other."""
    notes = []
    for record, name, ddf in zip(records, names, methods, strict=True):
        if not record.estimates.converged:
            notes.append(f"{name} NOT CONVERGED: {record.optimizer.message}")
        if record.estimates.singular:
            notes.append(f"{name} is singular: a covariance of random effects has less than full rank")
        if record.labels.dropped_columns:
            notes.append(f"{name}: redundant columns left out: {some_of(record.labels.dropped_columns)}")
        if record.kept is None:
            notes.append(f"{name} kept no rows, which ICC and R2 need")
        if ddf and ddf.startswith("kenward-roger") and record.has_df and not record.reml:
            notes.append(f"{name}: fixed effects and their standard errors are those of its REML refit")
    if len({(record.labels.response, record.nobs) for record in records}) > 1:
        notes.append("responses or numbers of rows differ: logLik, AIC, BIC and criteria cannot be compared")
    elif len(set(map(_is_restricted, records))) > 1:
        notes.append("REML beside ML: their logLik, AIC, BIC and criteria cannot be compared")
    elif len({_method(record) for record in records if isinstance(record, GeneralizedFitted)}) > 1:
        notes.append("the integrals are approximated in several ways: logLik, AIC, BIC and criteria compare badly")
    elif _is_restricted(records[0]) and len({frozenset(map(interaction_key, r.labels.fixed)) for r in records}) > 1:
        notes.append("REML fits of different fixed effects: their logLik, AIC, BIC and criteria cannot be compared")
    return notes
