"""Result codes of an optimisation, each with a message that says what to try."""

from __future__ import annotations

from enum import IntEnum


class Result(IntEnum):
    """How a fit ended. ``CONVERGED`` and ``NONDIFFERENTIABLE`` are solutions, the others are not."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NOT_FINITE = 2
    STALLED = 3
    NONDIFFERENTIABLE = 4
    NO_NOISE = 5

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
}
