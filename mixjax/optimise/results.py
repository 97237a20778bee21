"""Result codes of an optimisation, each with a message that says what to try."""

from __future__ import annotations

from enum import IntEnum


class Result(IntEnum):
    """How an optimisation ended. Anything but ``CONVERGED`` is not a solution."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NOT_FINITE = 2
    STALLED = 3

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "converged",
    Result.MAX_ITERATIONS: (
        "the iteration limit was reached before the gradient vanished; try another start=, or fewer random effects"
    ),
    Result.NOT_FINITE: (
        "the criterion is not finite; look for missing or infinite values, for collinear columns of X, and for a "
        "response that the model fits exactly"
    ),
    Result.STALLED: (
        "no step lowers the criterion although its gradient has not vanished; rescale columns of very different size, "
        "or try another start="
    ),
}
