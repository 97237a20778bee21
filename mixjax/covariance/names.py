"""Covariance structures by the names that formulas have for them."""

from __future__ import annotations

import re

from mixjax.covariance.correlated import (
    AnteDependence,
    Autoregressive,
    CompoundSymmetry,
    HeterogeneousAutoregressive,
    HomogeneousToeplitz,
    Toeplitz,
)
from mixjax.covariance.custom import Covariance
from mixjax.covariance.factors import FactorAnalytic, Loadings, ReducedRank
from mixjax.covariance.structures import (
    Diagonal,
    HomogeneousCompoundSymmetry,
    HomogeneousDiagonal,
    Structure,
    Unstructured,
)

STRUCTURES: dict[str, type[Structure]] = {
    "us": Unstructured,
    "diag": Diagonal,
    "homdiag": HomogeneousDiagonal,
    "homcs": HomogeneousCompoundSymmetry,
    "cs": CompoundSymmetry,
    "ar1": Autoregressive,
    "hetar1": HeterogeneousAutoregressive,
    "homtoep": HomogeneousToeplitz,
    "toep": Toeplitz,
    "adh": AnteDependence,
    "rr": ReducedRank,
    "fa": FactorAnalytic,
}
# Of those with dimensions, how many there are where the formula does not say.
DIMENSIONS = {"rr": 2, "fa": 1}

# Other names of the same, of mmrm, SAS and lme4.
ALIASES = {"csh": "cs", "ar1h": "hetar1", "toeph": "toep", "homar1": "ar1", "hetcs": "cs", "hettoep": "toep"}
# Which of two structures lme4's option hom = TRUE and FALSE stand for; others take no option.
BY_OPTION = {
    "cs": ("homcs", "cs"),
    "diag": ("homdiag", "diag"),
    "ar1": ("ar1", "hetar1"),
    "toep": ("homtoep", "toep"),
}


def canonical(name: str, hom: bool | None = None) -> str | None:
    """The name in :data:`STRUCTURES` of a structure as formulas may write it; None where there is none.

    Args:
        hom: lme4's option, one variance for all effects; None where it is not given.
    """
    if hom is None:
        if dimensions_of(name) is not None:
            return name
        if name in DIMENSIONS:
            return with_dimensions(name, DIMENSIONS[name])
        known = ALIASES.get(name, name)
        return known if known in STRUCTURES else None
    if name in BY_OPTION:
        return BY_OPTION[name][not hom]
    # Said twice: homcs(..., hom = TRUE).
    twice = [pair[not hom] for pair in BY_OPTION.values() if pair[not hom] == ALIASES.get(name, name)]
    return twice[0] if twice else None


def with_dimensions(name: str, d: int) -> str:
    """``rr(d=2)``: the name of a structure with so many dimensions."""
    return f"{name}(d={d})"


def dimensions_of(name: object) -> tuple[str, int] | None:
    """``rr(d=2)`` taken apart; None of any other name."""
    found = re.fullmatch(r"(\w+)\(d=(\d+)\)", name) if isinstance(name, str) else None
    return (found[1], int(found[2])) if found and found[1] in DIMENSIONS else None


def name_of(structure: Structure) -> str:
    """The name of a structure in :data:`STRUCTURES`, or that of its class."""
    return next((name for name, kind in STRUCTURES.items() if type(structure) is kind), type(structure).__name__)


def structure_of(name: str | Structure | Covariance, q: int) -> Structure:
    """The structure of a name, or the structure itself, for q effects. Of one effect there is only one.

    Raises:
        ValueError: the name is not known, the structure is that of another number of effects, or one of the user's own
            has no meaning for so many.
    """
    if isinstance(name, Covariance):
        return name.of(q)
    if isinstance(name, Structure):
        if name.q != q:
            raise ValueError(f"{name} is a structure of {name.q} effects, but the term has {q}")
        return Unstructured(1) if q == 1 and name.k == 1 else name
    known = canonical(name)
    if known is None:
        names = ", ".join(map(repr, STRUCTURES))
        raise ValueError(f"there is no covariance structure {name!r}; there are {names}")
    if q == 1:
        return Unstructured(1)
    of = dimensions_of(known)
    if of is not None:
        kinds: dict[str, type[Loadings]] = {"rr": ReducedRank, "fa": FactorAnalytic}
        return kinds[of[0]](q, of[1])
    return STRUCTURES[known](q)
