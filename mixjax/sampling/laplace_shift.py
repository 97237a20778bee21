"""How far Laplace's approximation moves a posterior: weights of draws by the likelihood itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd

from mixjax.engine.family_draws import NODES, PAIRS, has_quadrature, left_out
from mixjax.machine import float64, jit
from mixjax.markup import Report, Reported
from mixjax.products.family_rows import FamilyRows
from mixjax.sampling.density import place_of
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.psis import smoothed

# k-hat of the weights, and shift of a mean in posterior standard deviations, beyond which draws are not to be trusted.
TRUSTED, WORTHWHILE = 0.7, 0.2
# Draws that are weighted, by quadrature and by draws of all effects.
BY_QUADRATURE, BY_DRAWS = 500, 200
# Standard error of a log-likelihood by draws of all effects, at the median, beyond which it says nothing.
MOST_ERROR = 0.5


@dataclass(frozen=True, repr=False)
class LaplaceShift(Reported):
    """What the posterior by Laplace's approximation would be by the likelihood itself, by importance weights of some of
    its draws, Pareto-smoothed.

    Attributes:
        table: data frame ``shift`` of the mean in posterior standard deviations, ``sd_ratio``, a row for each
            parameter. khat: Pareto shape of the weights. draws: how many were weighted.
        method: ``"quadrature"``, or ``"importance sampling"`` of all random effects. n: nodes an effect, or draws of
            the effects. error: standard error of a weight's logarithm at the median, zero of quadrature.
    """

    table: pd.DataFrame
    khat: float
    draws: int
    method: str
    n: int
    error: float

    @property
    def largest(self) -> float:
        """The largest shift of a mean, in standard deviations."""
        return float(np.abs(self.table["shift"]).max())

    @property
    def is_known(self) -> bool:
        """Weights say something: their errors are not too large."""
        return bool(np.isfinite(self.khat) and self.error <= MOST_ERROR)

    @property
    def note(self) -> str:
        """One line for the summary."""
        by = f"{self.draws} draws weighted by {self.method}"
        if not self.is_known:
            return f"Laplace's approximation could not be checked: {by}, standard error {self.error:.1g}"
        name = self.table.index[int(np.argmax(np.abs(self.table["shift"].to_numpy())))]
        return (
            f"Laplace's approximation: largest shift of a mean {self.largest:.2f} sd, of {name}; Pareto k-hat "
            f"{self.khat:.2f} ({by})"
        )

    @property
    def problem(self) -> str | None:
        """What speaks against the draws, or None."""
        instead = (
            "take nagq=9 or more" if self.method == "quadrature" else "sample all random effects, as brms and bambi do"
        )
        if not self.is_known:
            return f"Laplace's approximation could not be checked: the random effects are too many; {instead}"
        if self.khat > TRUSTED:
            return (
                "Laplace's approximation does not do here: Pareto k-hat of the weights by the likelihood itself is "
                f"{self.khat:.2f} (more than {TRUSTED}); {instead}"
            )
        if self.largest > WORTHWHILE:
            far = f"{self.largest:.2f} posterior standard deviations"
            return f"Laplace's approximation shifts a mean by {far}; {instead}"
        return None

    def _report(self) -> Report:
        return Report([self.note], [])

    def __repr__(self) -> str:
        return f"{self.note}\n{self.table.round(3).to_string()}"


@jit
def places_of(z: Any, model: ModelPriors) -> Any:
    """:func:`~mixjax.sampling.density.place_of` of ``z (S, dim)``."""
    return jax.vmap(lambda z: place_of(z, model))(z)


def laplace_shift(
    z: np.ndarray, parameters: np.ndarray, names: tuple[str, ...], model: ModelPriors, rows: FamilyRows, key: Any
) -> LaplaceShift:
    """Args: z: ``(S, dim)``. parameters: ``(S, k)``, called ``names``. key: JAX key."""
    by_quadrature = has_quadrature(rows)
    count = min(len(z), BY_QUADRATURE if by_quadrature else BY_DRAWS)
    at = np.linspace(0, len(z) - 1, count).round().astype(int)
    with float64():
        found = left_out(places_of(z[at], model), key, rows, by_quadrature)
        logs, errors = np.asarray(found.difference), np.asarray(found.error)
    logs = np.where(np.isfinite(logs), logs, -1e300)
    weights, khat = smoothed(logs)
    w, x = np.exp(weights), parameters[at]
    mean, sd = x.mean(axis=0), x.std(axis=0)
    moved = w @ x
    spread = np.sqrt(np.maximum(w @ (x - moved) ** 2, 0.0))
    safe = np.where(sd > 0, sd, 1.0)
    table = pd.DataFrame({"shift": (moved - mean) / safe, "sd_ratio": spread / safe}, index=list(names))
    if by_quadrature:
        return LaplaceShift(table, khat, count, "quadrature", NODES[rows.Z[0].shape[1]], 0.0)
    return LaplaceShift(table, khat, count, "importance sampling", 2 * PAIRS, float(np.median(errors)))
