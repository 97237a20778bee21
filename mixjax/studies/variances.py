"""Covariances of random effects with some of their standard deviations and correlations changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixjax.covariance import Structure
from mixjax.covariance.custom import Written
from mixjax.design import Labels
from mixjax.fitted.names import VarianceParameter, names_of_variances, term_names
from mixjax.fitted.parameters import select
from mixjax.simulation import symmetric_root

# How names of coefficients of formulas of a family's parameters begin.
COEFFICIENTS = ("zi~", "disp~")


def changed_variances(
    values: Mapping[str, Any],
    labels: Labels,
    structures: Sequence[Structure],
    Sigma: Sequence[np.ndarray],
    own: Mapping[str, float],
) -> tuple[tuple[np.ndarray, ...], dict[str, float]]:
    """Covariances, and parameters of the response's distribution, with other values of some parameters.

    Args:
        values: ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ``sigma``, also as in lme4 -> value.
        labels, structures: of the terms. Sigma: per term ``(q, q)``, absolute.
        own: those of the distribution, as ``sigma``.

    Raises:
        ValueError: a name of none, a value that its parameter cannot have, or an impossible covariance.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"a dict name -> value is needed, such as {{'sigma': 2.0}}, got {values!r}")
    parameters = names_of_variances(labels, structures)
    names = [*(parameter.name for parameter in parameters), *own]
    kinds = {parameter.name: parameter.kind for parameter in parameters}
    kinds |= dict.fromkeys([name for name in own if name.startswith(COEFFICIENTS)], "real")
    wanted: dict[str, float] = {}
    for name, value in values.items():
        found = select([name], names, 0)
        if len(found) != 1:
            raise ValueError(f"{name!r} stands for {len(found)} parameters; name one: {', '.join(found)}")
        if found[0] in wanted:
            raise ValueError(f"{found[0]!r} is given twice")
        wanted[found[0]] = _checked(found[0], value, kinds.get(found[0], "sd"))
    changed = list(map(np.asarray, Sigma))
    for t, name in enumerate(term_names(labels)):
        of_term = [parameter for parameter in parameters if parameter.term == t and parameter.name in wanted]
        if of_term:
            changed[t] = _changed(changed[t], of_term, structures[t], wanted, name)
    return tuple(changed), {name: wanted.get(name, value) for name, value in own.items()}


def _checked(name: str, value: Any, kind: str) -> float:
    number = float(value) if np.ndim(value) == 0 and not isinstance(value, bool | str) else np.nan
    if kind == "real":
        if not np.isfinite(number):
            raise ValueError(f"{name!r} must be a number, got {value!r}")
    elif name.startswith("cor"):
        if not -1.0 <= number <= 1.0:
            raise ValueError(f"{name!r} must be a correlation, from -1 to 1, got {value!r}")
    elif not (np.isfinite(number) and number >= 0.0):
        raise ValueError(f"{name!r} must be a standard deviation, 0 or more, got {value!r}")
    return number


def _changed(
    Sigma: np.ndarray,
    parameters: Sequence[VarianceParameter],
    structure: Structure,
    wanted: Mapping[str, float],
    term: str,
) -> np.ndarray:
    if any(parameter.natural.kind in ("loading", "specific") for parameter in parameters):
        x = structure.near(symmetric_root(Sigma))
        for parameter in parameters:
            x[structure.natural.index(parameter.natural)] = wanted[parameter.name]
        F = structure.factor(x)
        found: np.ndarray = F @ F.T
        return found
    of_shape = [parameter for parameter in parameters if parameter.kind == "real"]
    if of_shape:
        x = structure.near(symmetric_root(Sigma))
        assert isinstance(structure, Written)
        values = np.array(structure.reported(x)[0])
        for parameter in of_shape:
            values[parameter.natural.i - structure.n_scales] = wanted[parameter.name]
        x[structure.n_scales :] = structure.parameters_of(values, x[structure.n_scales :])
        F = structure.factor(x)
        Sigma = F @ F.T
    sd = np.sqrt(np.diagonal(Sigma))
    inverse = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    cor = Sigma * np.outer(inverse, inverse)
    for parameter in parameters:
        i, shared = parameter.natural.i, parameter.natural.shared
        if parameter.kind == "sd":
            sd[slice(None) if shared else i] = wanted[parameter.name]
        elif parameter.kind == "cor":
            for a, b in parameter.natural.pairs(len(sd)):
                cor[a, b] = cor[b, a] = wanted[parameter.name]
    np.fill_diagonal(cor, 1.0)
    if any(parameter.kind == "cor" for parameter in parameters):
        cor = structure.completed(cor)
    try:
        symmetric_root(cor)
    except ValueError:
        raise ValueError(
            f"the random effects of {term!r} cannot have the correlations {np.round(cor, 4).tolist()}: these are not "
            f"positive semidefinite (smallest eigenvalue {np.linalg.eigvalsh(cor)[0]:.3g})"
        ) from None
    changed: np.ndarray = sd[:, None] * cor * sd
    return changed
