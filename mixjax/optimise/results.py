"""Result codes of an optimisation, each with a message that says what to try."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Result(IntEnum):
    """How a fit ended. ``CONVERGED`` and ``NONDIFFERENTIABLE`` are solutions, the others are not. ``SEPARATED`` and
    ``UNBOUNDED`` are ends of generalised linear mixed models, the second also of linear ones whose residuals have a
    dispersion or a correlation."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NOT_FINITE = 2
    STALLED = 3
    NONDIFFERENTIABLE = 4
    NO_NOISE = 5
    SEPARATED = 6
    UNBOUNDED = 7

    @property
    def is_solution(self) -> bool:
        return self in (Result.CONVERGED, Result.NONDIFFERENTIABLE)

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "converged",
    Result.MAX_ITERATIONS: (
        "the iteration limit was reached before the gradient vanished; try another start=, or fewer random effects"
    ),
    Result.NOT_FINITE: (
        "the criterion is not finite; look for missing or infinite values, for columns of X that others determine, and "
        "for a response that the model reproduces exactly"
    ),
    Result.STALLED: (
        "no step lowers the criterion although its gradient has not vanished: rounding is in the way, as when random "
        "effects are 100 000 times larger than residuals or the response is reproduced exactly; try another start=, "
        "or a simpler model"
    ),
    Result.NONDIFFERENTIABLE: (
        "converged, on the edge between a singular and a regular fit: the estimates stand, but have no derivatives "
        "with respect to the data there"
    ),
    Result.NO_NOISE: (
        "the fixed effects reproduce the response exactly: no variance is left; look for a column that was computed "
        "from the response"
    ),
    Result.SEPARATED: (
        "the response is separated: the likelihood grows for ever along some combination of the fixed effects, which "
        "have no finite estimates; look for a level of a factor whose rows all have the same outcome, and leave it out "
        "or join it with another"
    ),
    Result.UNBOUNDED: (
        "a standard deviation or a parameter of the family runs to infinity: look for levels whose rows all have the "
        "same outcome, or, with a negative binomial family, for counts that vary no more than Poisson ones do; of "
        "residuals with a dispersion or a correlation: these run to a bound, look for rows that the model reproduces"
    ),
}


# --- of many fits ----------------------------------------------------------------------------------------------------


def failed(codes: np.ndarray) -> np.ndarray:
    """Which codes mean that a fit has no estimates."""
    return ~np.isin(codes, [int(code) for code in Result if code.is_solution])


def counts_of(codes: np.ndarray, singular: np.ndarray, what: str) -> dict[str, int]:
    """How many fits there are (``what`` they are), how many converged, are singular (of those), and failed, by code."""
    lost = failed(codes)
    by_code = {f"failed: {code.name}": int((codes == code).sum()) for code in Result if not code.is_solution}
    counts = {
        what: len(codes),
        "converged": int((~lost).sum()),
        "singular": int((np.asarray(singular, bool) & ~lost).sum()),
        "failed": int(lost.sum()),
    }
    return counts | {code: count for code, count in by_code.items() if count}


def note_of_failures(codes: np.ndarray) -> str | None:
    """``3 of 1000 refits failed (NOT_FINITE 2, STALLED 1) and are left out``; None where none did."""
    counts = counts_of(codes, np.zeros(len(codes)), "refits")
    why = ", ".join(f"{name.split()[1]} {count}" for name, count in counts.items() if name.startswith("failed: "))
    return f"{counts['failed']} of {len(codes)} refits failed ({why}) and are left out" if counts["failed"] else None
