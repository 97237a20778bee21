"""Parameters of a scenario as users give them -> arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixjax.covariance import n_theta, triangle
from mixjax.design import Design, Labels
from mixjax.families import Family
from mixjax.fitted.names import known_names, term_names
from mixjax.simulation import symmetric_root


def residual_deviation(sigma: float | None) -> float:
    """Sigma, 1 where it is not given; ValueError where it is no standard deviation."""
    sigma = 1.0 if sigma is None else float(sigma)
    if not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a standard deviation, 0 or more, got {sigma}")
    return sigma


def dispersion_of(given: Any, family: Family) -> dict[str, float]:
    """The family's parameters by name."""
    names = family.psi_names
    listed = f"{', '.join(names)} of the {family.name} family"
    if not names:
        if given is not None and np.size(given):
            raise ValueError(f"the {family.name} family has no parameter of its own: leave dispersion= out")
        return {}
    if given is None:
        raise ValueError(f"dispersion= is needed: {listed}")
    if isinstance(given, Mapping | pd.Series):
        values = {str(name): float(value) for name, value in dict(given).items()}
        if set(values) != set(names):
            raise ValueError(f"dispersion must name {listed}, got {', '.join(values)}")
        own = [values[name] for name in names]
    else:
        own = [float(value) for value in np.atleast_1d(np.asarray(given, np.float64))]
        if len(own) != len(names):
            raise ValueError(f"dispersion has {len(own)} numbers; {listed} is wanted")
    family.unconstrained(own)
    return dict(zip(names, own, strict=True))


def psi_of(own: Mapping[str, float], design: Design, labels: Labels, family: Family) -> list[Any]:
    """The family's parameters as it takes them, each a number or, where it has a formula, ``(n,)``.

    Args:
        own: as :func:`~mixjax.fitted.parameters.parameters_of_family` names them, in that order.

    Raises:
        ValueError: a value that a parameter cannot have.
    """
    values, each = list(own.values()), labels.psi or ((),) * family.n_psi
    natural, coefficients = list(family.natural([0.0] * family.n_psi)), {}
    for j, names in enumerate(each):
        if names:
            coefficients[j] = np.array([values.pop(0) for _ in names])
        else:
            natural[j] = values.pop(0)
    numbers = family.unconstrained([float(value) for value in natural])
    return [design.psi_columns[j] @ coefficients[j] if j in coefficients else numbers[j] for j in range(family.n_psi)]


def coefficients(beta: Any, labels: Labels) -> np.ndarray:
    """Fixed effects ``(p,)`` in the order of the columns."""
    fixed = labels.fixed
    if isinstance(beta, Mapping):
        known = known_names(labels)
        for name in beta:
            if name not in known:
                raise ValueError(f"beta names {name!r}, but the fixed effects are {', '.join(fixed)}")
        places = [known[name] for name in beta]
        missing = [name for j, name in enumerate(fixed) if j not in places]
        if missing:
            raise ValueError(f"beta has no value of {', '.join(missing)}")
        values = np.zeros(len(fixed))
        values[places] = [float(value) for value in beta.values()]
    else:
        values = np.atleast_1d(np.asarray(beta, dtype=np.float64))
        if values.shape != (len(fixed),):
            raise ValueError(f"beta has shape {values.shape}; the {len(fixed)} fixed effects are {', '.join(fixed)}")
    if not np.isfinite(values).all():
        raise ValueError(f"beta must be finite, got {values.tolist()}")
    return values


def covariances_of_theta(theta: Any, labels: Labels, sigma: float) -> tuple[np.ndarray, ...]:
    """Per term ``(q, q)``, absolute, of Cholesky factors relative to sigma."""
    theta = np.atleast_1d(np.asarray(theta, dtype=np.float64))
    qs = [len(term.effects) for term in labels.terms]
    if theta.shape != (sum(map(n_theta, qs)),) or not np.isfinite(theta).all():
        raise ValueError(f"theta must be {sum(map(n_theta, qs))} finite numbers, got {theta.tolist()}")
    Sigma, at = [], 0
    for q in qs:
        L = np.zeros((q, q))
        L[triangle(q)] = theta[at : at + n_theta(q)]
        at += n_theta(q)
        Sigma.append(sigma**2 * L @ L.T)
    return tuple(Sigma)


def covariances_of_sd(sd: Any, cor: Any, labels: Labels) -> tuple[np.ndarray, ...]:
    """Per term ``(q, q)``, absolute."""
    names = term_names(labels)
    qs = {name: len(term.effects) for name, term in zip(names, labels.terms, strict=True)}
    described = "; ".join(f"{n}: {', '.join(t.effects)}" for n, t in zip(names, labels.terms, strict=True))
    sds = _by_term(sd, names, qs, described)
    correlations = _correlations(cor, qs, described)
    result = []
    for name in names:
        own = sds[name]
        Sigma = own[:, None] * correlations[name] * own
        try:
            symmetric_root(Sigma)
        except ValueError as error:
            values = np.linalg.eigvalsh(correlations[name])
            raise ValueError(
                f"the covariance of {name!r} is impossible: correlations {correlations[name].tolist()} are not "
                f"positive semidefinite (smallest eigenvalue {values[0]:.3g})"
            ) from error
        result.append(Sigma)
    return tuple(result)


def _by_term(sd: Any, names: Sequence[str], qs: Mapping[str, int], described: str) -> dict[str, np.ndarray]:
    total = sum(qs.values())
    if sd is None:
        raise ValueError(f"sd is needed: standard deviations of the random effects ({described}), or theta")
    if isinstance(sd, Mapping):
        unknown = [name for name in sd if name not in qs]
        missing = [name for name in names if name not in sd]
        if unknown or missing:
            raise ValueError(f"sd must name every random term ({described}); got {', '.join(map(str, sd))}")
        values = {name: np.atleast_1d(np.asarray(sd[name], dtype=np.float64)) for name in names}
    else:
        flat = np.atleast_1d(np.asarray(sd, dtype=np.float64))
        if flat.shape != (total,):
            raise ValueError(f"sd has shape {flat.shape}; there are {total} random effects ({described})")
        cuts = np.cumsum([qs[name] for name in names])[:-1]
        values = dict(zip(names, np.split(flat, cuts), strict=True))
    for name, own in values.items():
        if own.shape != (qs[name],):
            raise ValueError(f"sd of {name!r} must be {qs[name]} numbers ({described}), got {own.tolist()}")
        if not (np.isfinite(own) & (own >= 0)).all():
            raise ValueError(f"sd of {name!r} must be standard deviations, 0 or more, got {own.tolist()}")
    return values


def _correlations(cor: Any, qs: Mapping[str, int], described: str) -> dict[str, np.ndarray]:
    result = {name: np.eye(q) for name, q in qs.items()}
    if cor is None:
        return result
    if not isinstance(cor, Mapping):
        several = [name for name, q in qs.items() if q > 1]
        if not several and not np.any(cor):
            return result
        if len(several) != 1:
            raise ValueError(f"cor must be a dict of terms with several effects ({described}), got {cor!r}")
        cor = {several[0]: cor}
    for name, value in cor.items():
        if name not in qs:
            raise ValueError(f"cor names {name!r}; the random terms are {described}")
        q, value = qs[name], np.asarray(value, dtype=np.float64)
        if value.size == 1 and q == 2:
            result[name] = np.array([[1.0, value.item()], [value.item(), 1.0]])
        elif value.shape == (q, q):
            if not np.array_equal(value, value.T) or not np.allclose(np.diag(value), 1.0):
                raise ValueError(f"cor of {name!r} must be symmetric with a diagonal of 1, got {value.tolist()}")
            result[name] = value
        else:
            raise ValueError(f"cor of {name!r} must be ({q}, {q}){' or one number' * (q == 2)}, got {value.tolist()}")
    return result
