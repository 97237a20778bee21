"""Names of a model's parameters, as priors and draws have them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax.covariance import Structure
from mixjax.design import RepeatedDesign
from mixjax.families import Family
from mixjax.fitted.names import names_of_residuals
from mixjax.fitted.parameters import component_of, parameters_of_family


class Names(NamedTuple):
    """Names of a model's parameters.

    Attributes:
        fixed: of the columns of X. groups: per term its name. effects: per term those of its effects. others: of
            residuals, or of the family.
    """

    fixed: tuple[str, ...]
    groups: tuple[str, ...]
    effects: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()

    def of_term(self, t: int, structure: Structure) -> list[str]:
        """``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ... of a term's natural parameters."""
        return [parameter.name(self.effects[t], self.groups[t]) for parameter in structure.natural]


def names_of(design: Any, labels: Any = None, family: Family | None = None) -> Names:
    """Names from labels, or numbers where there are none."""
    others = _names_of_others(design, labels, family)
    if labels is None:
        p = np.shape(design.X)[1]
        qs = (
            [design.n_visits] * design.n_arms
            if isinstance(design, RepeatedDesign)
            else [np.shape(term.Z)[1] for term in design.terms]
        )
        effects = tuple(tuple(f"e{i}" for i in range(q)) for q in qs)
        groups = tuple(f"term{t}" for t in range(len(effects)))
        return Names(tuple(f"beta{j}" for j in range(p)), groups, effects, others)
    groups_ = [term.group for term in labels.terms]
    earlier = [groups_[:t].count(group) for t, group in enumerate(groups_)]
    terms = tuple(f"{group}.{k}" if k else group for group, k in zip(groups_, earlier, strict=True))
    return Names(tuple(labels.fixed), terms, tuple(tuple(term.effects) for term in labels.terms), others)


def _names_of_others(design: Any, labels: Any, family: Family | None) -> tuple[str, ...]:
    if isinstance(design, RepeatedDesign):
        return ()
    if family is not None:
        columns = design.psi_columns or (None,) * family.n_psi
        if labels is not None:
            psi = np.zeros(sum(1 if own is None else np.shape(own)[1] for own in columns))
            return tuple(parameters_of_family(labels, family, psi)[0])
        return tuple(
            name
            for own, of_family in zip(columns, family.psi_names, strict=True)
            for name in (
                [of_family] if own is None else [f"{component_of(of_family)}~w{j}" for j in range(np.shape(own)[1])]
            )
        )
    if labels is not None:
        return names_of_residuals(labels)
    d = 0 if design.dispersion is None else np.shape(design.dispersion)[1]
    return (*(f"disp~w{j}" for j in range(d)), *(("rho",) if design.residual is not None else ()))
