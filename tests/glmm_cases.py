"""Reference fits of generalised models: formulas as mixjax reads them, tables, and estimates by mixjax's names.

``fits()`` lists ``(model, fit)``; ``case(model)`` has what a fit needs and what it must give; ``arrays(model)`` is the
same model as arrays, made here from names and columns and not by the formula language, which is held against it.
"""

import json
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import mixjax as mj

HERE = Path(__file__).parent
MODELS = tuple(sorted(path.stem.removeprefix("glmm_") for path in (HERE / "oracle").glob("glmm_*.json")))
FAMILIES = {"Gamma": "gamma", "nbinom2": "nbinom"}  # the others have one name here and there


class Case(NamedTuple):
    """A model and its reference fits.

    Attributes:
        formula: R's text, which is mixjax's too: ``cbind(successes, failures)`` or a proportion is a response.
        table: factors are categorical with the levels of the reference. Do not change it: it is shared.
        family, link: by mixjax's names.
        arguments: others, such as ``weights``.
        fits: name of a fit (``"nAGQ1"``, ``"nAGQ1_expected"``) -> what ``tests/oracle/README.md`` lists, where names of
            coefficients and effects are mixjax's: ``period[T.2]``.
    """

    formula: str
    table: pd.DataFrame
    family: str
    link: str
    arguments: dict[str, Any]
    fits: dict[str, dict[str, Any]]


class Arrays(NamedTuple):
    """A model as arrays: ``design.y`` are counts where the family is binomial, ``size`` ``(n,)`` their numbers of
    trials (ones for other families). Terms stand as in the reference, by decreasing number of levels."""

    design: mj.Design
    size: np.ndarray


def fits() -> list[tuple[str, str]]:
    """Every reference fit: name of the model, name of the fit."""
    return [(model, name) for model in MODELS for name in _read(model)["fits"]]


@cache
def case(model: str) -> Case:
    stored = _read(model)
    named = {name: _renamed(fit, stored["factor_levels"]) for name, fit in stored["fits"].items()}
    arguments = {"weights": stored["weights"]} if "weights" in stored else {}
    family = FAMILIES.get(stored["family"], stored["family"])
    return Case(stored["formula"], _table(model), family, stored["link"], arguments, named)


@cache
def arrays(model: str) -> Arrays:
    formula, table, family, _, arguments, stored = case(model)
    fit = stored["nAGQ1"]
    y, size = _response(formula, table, family, arguments)
    terms = []
    for term in fit["varcorr"]:
        group = table[term["group"]].cat
        Z = np.column_stack([_column(name, table) for name in term["terms"]])
        terms.append(mj.RandomTerm(Z=Z, group=group.codes.to_numpy(int), n_groups=len(group.categories)))
    X = np.column_stack([_column(name, table) for name in fit["fixef"]])
    offset = table["logBroodSize"].to_numpy(float) if "offset(logBroodSize)" in formula else None
    return Arrays(mj.Design(y=y, X=X, terms=tuple(terms), offset=offset), size)


def factors(model: str, name: str) -> list[np.ndarray]:
    """Absolute Cholesky factors ``(q, q)`` of a reference fit, one per term."""
    fit = case(model).fits[name]
    theta = list(fit["theta"].values())
    found = []
    for term in fit["varcorr"]:
        q = len(term["terms"])
        Lambda = np.zeros((q, q))
        rows, columns = np.triu_indices(q)  # the lower triangle, column by column
        Lambda[columns, rows], theta = theta[: len(rows)], theta[len(rows) :]
        found.append(Lambda)
    return found


def family_parameter(model: str, name: str) -> np.ndarray:
    """``psi``: log dispersion, log size or log precision, ``(1,)``; empty for families without."""
    return np.array(list(case(model).fits[name].get("dispersion", {}).values()))


@cache
def _read(model: str) -> dict[str, Any]:
    return json.loads((HERE / "oracle" / f"glmm_{model}.json").read_text())


def _table(model: str) -> pd.DataFrame:
    stored = _read(model)
    if stored["data"] in mj.datasets.NAMES:
        frame = mj.datasets.load(stored["data"])
        return frame.assign(HEIGHT_c=frame["cHEIGHT"]) if stored["data"] == "grouseticks" else frame
    # Levels of large grouping factors are listed with the random effects only.
    levels = {g: list(e["levels"]) for g, e in stored["fits"]["nAGQ1"]["ranef"].items()}
    levels |= {f: names for f, names in stored["factor_levels"].items() if names}
    path = HERE / "data" / f"{stored['data']}.csv"
    frame = pd.read_csv(path, dtype=dict.fromkeys(levels, str), keep_default_na=False, na_values=["NA"])
    return frame.assign(**{f: pd.Categorical(frame[f], categories=names) for f, names in levels.items()})


def _renamed(fit: dict[str, Any], levels: dict[str, list[str]]) -> dict[str, Any]:
    fit = dict(fit)
    for part in ("fixef", "fixef_se"):
        fit[part] = {_name(name, levels): value for name, value in fit[part].items()}
    names = [_name(name, levels) for name in fit["vcov"]["rows"]]
    fit["vcov"] = pd.DataFrame(fit["vcov"]["values"], index=names, columns=names)
    fit["ranef"] = {g: e | {"terms": [_name(t, levels) for t in e["terms"]]} for g, e in fit["ranef"].items()}
    fit["varcorr"] = [term | {"terms": [_name(t, levels) for t in term["terms"]]} for term in fit["varcorr"]]
    return fit


def _name(name: str, levels: dict[str, list[str]]) -> str:
    """R's name of a column -> formulaic's."""

    def piece(text: str) -> str:
        if text == "(Intercept)":
            return "Intercept"
        coded = [f"{f}[T.{level}]" for f, known in levels.items() for level in known if text == f + level]
        return coded[0] if coded else text

    return ":".join(map(piece, name.split(":")))


def _column(name: str, table: pd.DataFrame) -> np.ndarray:
    """A column of X or Z by its name."""

    def piece(text: str) -> np.ndarray:
        if text == "Intercept":
            return np.ones(len(table))
        factor, _, level = text.rstrip("]").partition("[T.")
        return ((table[factor] == level) if level else table[text]).to_numpy(float)

    return reduce(np.multiply, map(piece, name.split(":")))


def _response(
    formula: str, table: pd.DataFrame, family: str, arguments: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    response = formula.split("~")[0].strip()
    one = np.ones(len(table))
    if response == "cbind(incidence, size - incidence)":
        return table["incidence"].to_numpy(float), table["size"].to_numpy(float)
    if isinstance(table[response].dtype, pd.CategoricalDtype):
        return table[response].cat.codes.to_numpy(float), one  # the second level is a success
    y = table[response].to_numpy(float)
    if "weights" in arguments:
        size = table[arguments["weights"]].to_numpy(float)
        return np.round(y * size), size
    return y, one


@cache
def fit_of(model: str) -> mj.GLMMFit:
    """The model by Laplace's approximation. Do not change it: it is shared."""
    formula, table, family, link, arguments, _ = case(model)
    return mj.glmm(formula, table, family, link, **arguments)
