"""Whether fixed effects alone separate a binary or count response, so that no finite estimate exists; and which do.

Along a direction of recession d no row's likelihood falls and some rise for ever: ``x'd >= 0`` in rows of successes
only, ``x'd <= 0`` in rows of failures only, ``x'd = 0`` in rows with both. Of counts with a log link: ``x'd <= 0``
where the count is 0, ``x'd = 0`` elsewhere. A finite maximum exists exactly where there is no such d (Albert & Anderson
1984, Biometrika 71; Haberman 1974, The Analysis of Frequency Data). Konis (2007, Linear programming algorithms for
detecting separated data in binary logistic regression models, DPhil thesis, Oxford) looks for d by linear programming.
That is done here too, but only where there is no proof of the contrary: positive weights under which the signed rows
add up to zero (Gordan's alternative), which a few steps of the score equations give.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import some_of
from mixjax.design import Design, Labels
from mixjax.formula.checks import COUNTS
from mixjax.formula.table import level_names

# n p^2 beyond which nobody looks for directions: up to there some tenths of a second.
LARGEST = 5_000_000
# Rows among which the proof is looked for first: what some rows forbid, all do.
FEW = 1_000
# Steps of the score equations that look for the proof; weights smaller than this share of the residuals prove nothing,
# because rounding could make as much.
STEPS, SMALLEST = 20, 1e-11
# Rows that a linear programme starts with, and takes in addition each time.
ROWS_AT_ONCE = 400
# A change of the linear predictor, relative to the sizes of a row and of the direction, that is more than the tolerance
# (1e-7) of the linear programme; and one that is more than rounding.
CLEAR, ROUNDING = 1e-5, 1e-9
_CODED = re.compile(r"(?P<name>[^\[\]:]+)\[(?:T\.)?(?P<level>[^\[\]]*)\]")


@dataclass(frozen=True)
class Separation:
    """What the fixed effects separate.

    Attributes:
        columns: names of the columns whose coefficients the rows that are not separated leave undetermined: those
            without a finite estimate.
        direction: ``(p,)`` coefficients along which no row's likelihood falls, and that of ``rows`` rises for ever.
        rows: ``(n,)`` booleans, the rows whose fitted means run to their bounds.
        words: what these rows have in common, where that is simple: ``all 12 rows with treatment = C are 0``.
        response: what the rows are, for the sentence.
    """

    columns: tuple[str, ...]
    direction: np.ndarray
    rows: np.ndarray
    words: tuple[str, ...]
    response: str = "the response"

    @property
    def sentence(self) -> str:
        """The whole as a sentence for a warning."""
        several = len(self.columns) > 1
        rows = some_of(self.words, "; ") or f"{int(self.rows.sum())} of {len(self.rows)} rows"
        return (
            f"the fixed effects separate {self.response} ({rows}): without random effects the estimate"
            f"{'s' if several else ''} of {some_of(self.columns)} would be infinite; leave the column"
            f"{'s' if several else ''} or these rows out, or join levels, unless the random effects account for them"
        )


def separated_columns(
    X: np.ndarray,
    names: tuple[str, ...],
    y: np.ndarray,
    size: np.ndarray | None,
    family_name: str,
    factors: Mapping[str, Any] | None = None,
    response: str = "the response",
) -> Separation | None:
    """The columns of X without a finite maximum-likelihood estimate in a model without random effects.

    Random effects may absorb a separation (a level of all failures inside one group), so this is for a warning; the
    search itself says what became of the fit.

    Args:
        X: ``(n, p)`` of full rank. names: of its columns.
        y: ``(n,)`` successes or counts. size: ``(n,)`` numbers of trials, or None for one each.
        family_name: ``"binomial"`` (logit, probit, complementary log-log alike), ``"poisson"``, ``"nbinom"`` (log
            link); no other family can be separated.
        factors: column -> ``(n,)`` values of the factors in the fixed effects, for the words; without them only levels
            that have a column of their own are named.
        response: as the sentence should call it.

    Returns:
        None where every estimate is finite, or where nobody has looked: where a sample of the rows does not settle it
        and ``n p^2`` is more than 5 million (10 000 rows of 22 columns).

    Example:
        >>> import numpy as np
        >>> X = np.column_stack([np.ones(6), [0, 0, 0, 1, 1, 1]])
        >>> found = separated_columns(X, ("Intercept", "arm[T.B]"), np.array([0, 1, 0, 1, 1, 1.0]), None, "binomial")
        >>> found.columns, found.words
        (('arm[T.B]',), ('all 3 rows with arm = B are 1',))
    """
    n, p = np.shape(X)
    if family_name not in (*COUNTS, "binomial") or p == 0:
        return None
    X, y = np.asarray(X, float), np.asarray(y, float)
    sign = _signs(y, size, family_name)
    few = FEW + 10 * p
    if n > 2 * few:
        some = np.random.default_rng(0).choice(n, few, replace=False)
        if _surely_finite(X[some], sign[some]):
            return None
    if n * p**2 > LARGEST or not sign.any():
        return None
    lengths = np.maximum(np.linalg.norm(X, axis=0), np.finfo(float).tiny)
    scaled = X / lengths
    moved, direction = _recession(scaled, sign)
    undetermined = _null_space(scaled[~moved])
    # Without what rounding and the programme's tolerance leave of a change elsewhere.
    direction = undetermined @ (undetermined.T @ direction)
    if not moved.any() or not (sign[moved] * (scaled[moved] @ direction) > 0).all():
        return None
    columns = np.abs(undetermined).max(axis=1) > ROUNDING
    own = tuple(name for name, without in zip(names, columns, strict=True) if without)
    words = _words(X, names, columns, size, moved, sign, factors)
    direction = direction / lengths
    return Separation(own, direction / np.abs(direction).max(), moved, words, response)


def separation_of(design: Design, labels: Labels, family_name: str) -> Separation | None:
    """:func:`separated_columns` of a design with its names, the factors of its fixed effects known by theirs."""
    fixed = labels.state.fixed
    factors = [e for e in fixed.effects.expressions if fixed.categories(e) is not None]
    names = dict.fromkeys(name for e in factors if (name := e.column or e.factor_of) is not None)
    return separated_columns(
        np.asarray(design.X), labels.fixed, np.asarray(design.y), design.size, family_name,
        {name: labels.frame[name] for name in names}, f"the response '{labels.response}'",
    )  # fmt: skip


def _signs(y: np.ndarray, size: np.ndarray | None, family_name: str) -> np.ndarray:
    """1: the linear predictor of the row may rise for ever, -1: fall; 0: it must stay."""
    most = np.ones(len(y)) if size is None else np.asarray(size, float)
    rises = np.zeros(len(y), bool) if family_name in COUNTS else y == most
    return np.where(y == 0, -1, np.where(rises, 1, 0))


def _recession(X: np.ndarray, sign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(n,)`` all rows that some direction of recession moves, and ``(p,)`` one direction that moves them all.

    Directions are found one after the other, each on the rows that no earlier one moves: of these a multiple can be
    added that outweighs whatever a later one does there.
    """
    signed = np.flatnonzero(sign)
    stay, A = _signed_rows(X, sign)
    moved, direction = np.zeros(len(signed), bool), np.zeros(stay.shape[1])
    while not moved.all():
        B = A[~moved]
        basis = _row_space(B)
        B = B @ basis
        if not basis.shape[1] or _proves_finite(B):
            break
        step = _programme(B)
        more = B @ step > CLEAR * np.linalg.norm(B, axis=1)
        if not more.any():
            break
        step = basis @ step
        if moved.any():
            against = -(A[moved] @ step) / (A[moved] @ direction)
            direction = direction * max(2.0 * against.max(), 1.0)
        direction = direction + step
        direction /= np.abs(direction).max()
        moved[np.flatnonzero(~moved)[more]] = True
    rows = np.zeros(len(X), bool)
    rows[signed] = moved
    return rows, stay @ direction


def _signed_rows(X: np.ndarray, sign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(p, k)`` the directions that leave rows without a sign alone, and what these change in the others, to the side
    that is allowed."""
    stay = _null_space(X[sign == 0])
    rows = X[sign != 0]
    A = sign[sign != 0, None] * (rows @ stay)
    A[np.linalg.norm(A, axis=1) <= ROUNDING * np.linalg.norm(rows, axis=1)] = 0.0
    return stay, A


def _surely_finite(X: np.ndarray, sign: np.ndarray) -> bool:
    """Whether these rows prove that there is no direction of recession at all, in any more of them either."""
    X = X / np.maximum(np.linalg.norm(X, axis=0), np.finfo(float).tiny)
    stay, A = _signed_rows(X, sign)
    basis = _row_space(A)
    return basis.shape[1] == stay.shape[1] and (not basis.shape[1] or _proves_finite(A @ basis))


def _proves_finite(A: np.ndarray) -> bool:
    """A proof that no d has ``A d >= 0`` but ``A d = 0``: weights ``u > 0`` with ``A'u = 0``.

    In a logistic regression of ones on A, the residuals r are positive at any coefficients, and a Newton step makes
    their sum zero: ``A'(r - W A step) = 0`` with ``W = r (1 - r)``. So these are such weights as soon as a step is less
    than about one in every row, which steps towards a finite maximum come to be, and no others do.

    Args:
        A: ``(m, k)`` signed rows, the columns orthogonal and of one length.
    """
    beta = np.zeros(A.shape[1])
    for _ in range(STEPS):
        r = 1.0 / (1.0 + np.exp(np.clip(A @ beta, -30.0, 30.0)))
        weight = r * (1.0 - r)
        try:
            step = np.linalg.solve(A.T @ (weight[:, None] * A), A.T @ r)
        except np.linalg.LinAlgError:
            return False
        move = A @ step
        u = r - weight * move
        if u.min() > SMALLEST * r.max():
            return True
        beta = beta + step * min(1.0, 4.0 / max(np.abs(move).max(), np.finfo(float).tiny))
    return False


def _programme(A: np.ndarray) -> np.ndarray:
    """``max sum A d`` over ``A d >= 0``, ``-1 <= d <= 1`` (Konis 2007), rows divided by their lengths; zero if none.

    Rows are taken in as they are violated: few of many matter.
    """
    from scipy.optimize import linprog

    lengths = np.linalg.norm(A, axis=1)
    A = A[lengths > ROUNDING * lengths.max()]
    A = A / np.linalg.norm(A, axis=1, keepdims=True)
    total = A.sum(axis=0) / len(A)
    taken = np.zeros(len(A), bool)
    taken[:: max(1, len(A) // ROWS_AT_ONCE)] = True
    while True:
        held = A[taken]
        found = linprog(-total, A_ub=-held, b_ub=np.zeros(len(held)), bounds=(-1, 1), method="highs")
        if found.x is None or -found.fun <= CLEAR / len(A):
            return np.zeros(A.shape[1])
        d: np.ndarray = found.x
        values = np.where(taken, 0.0, A @ d)
        worst = np.argsort(values)[:ROWS_AT_ONCE]
        worst = worst[values[worst] < -CLEAR / 10]
        if not len(worst):
            return d
        taken[worst] = True


def _null_space(X: np.ndarray) -> np.ndarray:
    """``(p, k)`` orthonormal directions that no row of X sees; its columns are of similar lengths."""
    values, directions = _singular(X)
    null: np.ndarray = directions[values <= ROUNDING * max(values.max(initial=0.0), 1.0)].T
    return null


def _row_space(X: np.ndarray) -> np.ndarray:
    """``(p, r)`` such that X times it has orthogonal columns of mean square 1, as many as its rank."""
    values, directions = _singular(X)
    own = values > ROUNDING * values.max(initial=0.0)
    space: np.ndarray = directions[own].T / values[own] * np.sqrt(len(X))
    return space


def _singular(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All p singular values and right singular vectors, as rows, of ``(n, p)``."""
    p = X.shape[1]
    R = np.linalg.qr(np.vstack([X, np.zeros((max(0, p - len(X)), p))]), mode="r")
    _, values, directions = np.linalg.svd(R)
    return values, directions


# --- in words --------------------------------------------------------------------------------------------------------


def _words(
    X: np.ndarray,
    names: tuple[str, ...],
    columns: np.ndarray,
    size: np.ndarray | None,
    moved: np.ndarray,
    sign: np.ndarray,
    factors: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """Levels all of whose rows are separated to one side, and thresholds of single columns."""
    found: dict[str, None] = {}
    success = "1" if size is None else "successes only"

    def rows_are(rows: np.ndarray, where: str) -> None:
        if rows.any() and moved[rows].all() and (sign[rows] == sign[rows][0]).all():
            k, value = int(rows.sum()), "0" if sign[rows][0] < 0 else success
            found[f"the only row with {where} is {value}" if k == 1 else f"all {k} rows with {where} are {value}"] = (
                None
            )

    for name, values in (factors or {}).items():
        codes, levels = level_names(pd.Series(values).reset_index(drop=True))
        for k, level in enumerate(levels):
            rows_are(codes == k, f"{name} = {level}")
    for j in np.flatnonzero(columns):
        x, parts = X[:, j], [_CODED.fullmatch(part) for part in names[j].split(":")]
        here = np.unique(x)
        if all(parts):
            if (factors is None or len(parts) > 1) and here.tolist() == [0.0, 1.0]:
                own = [(part["name"], part["level"]) for part in parts if part is not None]
                rows_are(x == 1, " and ".join(f"{name} = {level}" for name, level in own))
        elif len(here) == 2:
            for value in here:
                rows_are(x == value, f"{names[j]} = {value:g}")
        elif len(here) > 2 and sign.all():
            low, high = x[sign < 0], x[sign > 0]
            for below, above, first, then in ((low, high, "0", success), (high, low, success, "0")):
                if below.size and above.size and below.max() <= above.min():
                    span = (
                        f"at most {below.max():.6g} in rows of {first} and at least {above.min():.6g} in rows of {then}"
                    )
                    found[f"{names[j]} is {span}"] = None
    return tuple(found)
