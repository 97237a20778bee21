"""Weights of means by the names of methods: pairwise differences, comparisons with a control, polynomials, ..."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

# Method -> adjustment of its p values unless asked otherwise: those of R's emmeans.
METHODS = {
    "pairwise": "tukey",
    "revpairwise": "tukey",
    "trt.vs.ctrl": "dunnett",
    "trt.vs.ctrl1": "dunnett",
    "trt.vs.ctrlk": "dunnett",
    "consec": "mvt",
    "mean_chg": "mvt",
    "poly": "none",
    "eff": "fdr",
    "del.eff": "fdr",
}
# Other names in R.
SPELLINGS = {"tukey": "pairwise", "dunnett": "trt.vs.ctrl"}
CONTROLLED = ("trt.vs.ctrl", "trt.vs.ctrl1", "trt.vs.ctrlk")
PAIRWISE = ("pairwise", "revpairwise")
MOST_DEGREES = 6
DEGREES = ("linear", "quadratic", "cubic", "quartic", "degree 5", "degree 6")


def method_named(method: Any) -> str:
    """One of ``METHODS``, in whatever case.

    Raises:
        ValueError: there is no such method.
    """
    name = method.lower() if isinstance(method, str) else ""
    name = SPELLINGS.get(name, name)
    if name not in METHODS:
        known = ", ".join(map(repr, METHODS))
        raise ValueError(
            f"method must be one of {known}, a dict name -> weights, or an array or data frame of weights, got "
            f"{method!r}"
        )
    return name


def default_adjustment(method: Any) -> str:
    """The default adjustment of a method; none for weights of one's own."""
    return METHODS[method_named(method)] if isinstance(method, str) else "none"


def contrast_weights(method: Any, names: list[str], ref: Any = None, between: str = " - ") -> dict[str, np.ndarray]:
    """Contrasts of k means.

    Args:
        method: a name, see :meth:`~mixjax.inference.fixed.marginal_means.MarginalMeans.contrasts`; a dict name ->
            ``(k,)`` weights; an array ``(r, k)``; or a data frame with a contrast in each row and the means as its
            columns.
        names: of the k means.
        ref: the control of ``"trt.vs.ctrl"``, by name or position.
        between: what stands between the names of two means.

    Returns:
        dict name -> ``(k,)``.

    Raises:
        ValueError: no such method or mean, or weights that do not fit.

    Example:
        >>> from mixjax.inference.fixed.contrast_methods import contrast_weights
        >>> [(name, w.tolist()) for name, w in contrast_weights("poly", ["low", "mid", "high"]).items()]
        [('linear', [-1.0, 0.0, 1.0]), ('quadratic', [1.0, -2.0, 1.0])]
    """
    k, eye = len(names), np.eye(len(names))
    if not isinstance(method, str):
        if ref is not None:
            raise ValueError("ref= is the control of method='trt.vs.ctrl'; weights of your own have none")
        return _own_weights(method, names)
    method = method_named(method)
    if method in CONTROLLED:
        at = _control(method, names, ref)
        return {f"{names[i]}{between}{names[at]}": eye[i] - eye[at] for i in range(k) if i != at}
    if ref is not None:
        raise ValueError(f"ref= is the control of method='trt.vs.ctrl'; method={method!r} has none")
    if method == "pairwise":
        return {f"{names[i]}{between}{names[j]}": eye[i] - eye[j] for i, j in itertools.combinations(range(k), 2)}
    if method == "revpairwise":
        return {f"{names[j]}{between}{names[i]}": eye[j] - eye[i] for j in range(k) for i in range(j)}
    if method == "consec":
        return {f"{names[i + 1]}{between}{names[i]}": eye[i + 1] - eye[i] for i in range(k - 1)}
    if method == "mean_chg":
        return {f"{names[i - 1]}|{names[i]}": np.repeat([-1.0 / i, 1.0 / (k - i)], [i, k - i]) for i in range(1, k)}
    if method == "poly":
        return dict(zip(DEGREES, orthogonal_polynomials(k), strict=False))
    effects = eye - 1.0 / k
    if method == "del.eff" and k > 1:
        effects *= k / (k - 1.0)
    return {f"{names[i]} effect": effects[i] for i in range(k if k > 1 else 0)}


def orthogonal_polynomials(k: int) -> list[np.ndarray]:
    """Orthogonal polynomials of degree 1 to ``min(6, k - 1)`` at 1, 2, ..., k, as the smallest integers.

    The last value is positive. As the tables of Fisher & Yates (1963, Statistical Tables, XXIII).
    """
    x = [Fraction(2 * i - (k - 1)) for i in range(k)]
    found = [[Fraction(1)] * k]
    for degree in range(1, min(MOST_DEGREES, k - 1) + 1):
        column = [value**degree for value in x]
        for other in found:
            share = _dot(column, other) / _dot(other, other)
            column = [a - share * b for a, b in zip(column, other, strict=True)]
        whole = math.lcm(*(value.denominator for value in column))
        numbers = [int(value * whole) for value in column]
        common = math.gcd(*numbers) * (1 if numbers[-1] > 0 else -1)
        found.append([Fraction(number, common) for number in numbers])
    return [np.array([float(value) for value in column]) for column in found[1:]]


def _dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def _control(method: str, names: list[str], ref: Any) -> int:
    k = len(names)
    if method != "trt.vs.ctrl":
        if ref is not None:
            raise ValueError(f"method={method!r} says itself which mean is the control; use 'trt.vs.ctrl' with ref=")
        return 0 if method == "trt.vs.ctrl1" else k - 1
    if ref is None:
        return 0
    if isinstance(ref, str):
        if ref not in names:
            close = difflib.get_close_matches(ref, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"ref={ref!r} is none of the means; {hint}")
        return names.index(ref)
    if isinstance(ref, bool | np.bool_) or not isinstance(ref, int | np.integer):
        raise ValueError(f"ref must be the name of a mean or its position, counted from 0, got {ref!r}")
    if str(ref) in names:
        raise ValueError(
            f"ref={ref} may be the mean called '{ref}' or the one at position {ref}, counted from 0: give the name, "
            f"ref='{ref}'"
        )
    if not -k <= ref < k:
        raise ValueError(f"ref={ref}: there are {k} means, at positions 0 to {k - 1}")
    return int(ref) % k


def _own_weights(method: Any, names: list[str]) -> dict[str, np.ndarray]:
    k, shown = len(names), ", ".join(names)
    if isinstance(method, Mapping):
        if not method:
            raise ValueError("method= is a dict without a contrast: name -> weights, one for every mean")
        return {str(name): _finite(w, str(name), names) for name, w in method.items()}
    if isinstance(method, pd.DataFrame):
        columns = [str(name) for name in method.columns]
        if sorted(columns) != sorted(names):
            raise ValueError(
                f"method= is a data frame with the columns {', '.join(columns)}; contrasts are its rows, and its "
                f"columns must be the means {shown}"
            )
        frame = method.set_axis(columns, axis=1)[names]
        return {str(name): _finite(w, str(name), names) for name, w in zip(frame.index, frame.to_numpy(), strict=True)}
    if isinstance(method, np.ndarray | Sequence):
        try:
            table = np.asarray(method, float)
        except (TypeError, ValueError):
            table = np.zeros(0)
        if table.ndim != 2 or table.shape[1] != k or not len(table):
            raise ValueError(
                f"method= must have weights of shape (r, {k}), one contrast of the {k} means {shown} a row, got "
                f"{method!r}"
            )
        labels = [written(row, names) for row in table]
        if len(set(labels)) < len(labels):
            labels = [f"{label} ({i})" for i, label in enumerate(labels)]
        return {
            label: _finite(row, f"row {i}", names) for i, (label, row) in enumerate(zip(labels, table, strict=True))
        }
    method_named(method)  # which refuses it
    return {}


def _finite(weights: Any, name: str, names: list[str]) -> np.ndarray:
    try:
        w = np.asarray(weights, float)
    except (TypeError, ValueError):
        w = np.zeros(0)
    if w.shape != (len(names),) or not np.isfinite(w).all():
        raise ValueError(
            f"the contrast '{name}' needs {len(names)} finite weights, for {', '.join(names)}; got {weights}"
        )
    return w


def written(weights: np.ndarray, names: Sequence[str]) -> str:
    """``2*Days - Intercept``; longer ones are cut."""
    used = np.flatnonzero(weights)
    text = ""
    for j in used[:4]:
        size = "" if abs(weights[j]) == 1 else f"{abs(weights[j]):.4g}*"
        sign = ("-" if weights[j] < 0 else "") if not text else (" - " if weights[j] < 0 else " + ")
        text += f"{sign}{size}{names[j]}"
    return text + (" + ..." if len(used) > 4 else "")


def interaction_weights(
    method: Any, interaction: Any, levels: Mapping[str, list[str]], ref: Any, between: str = " - "
) -> tuple[pd.DataFrame, np.ndarray]:
    """Products of contrasts over factors.

    Args:
        method: of every factor where ``interaction`` is True. levels: factor -> names of its levels.
        interaction: see :meth:`~mixjax.inference.fixed.marginal_means.MarginalMeans.contrasts`.
        ref: the control of ``"trt.vs.ctrl"``, for every factor that has that method; or a dict factor -> control.
        between: as of :func:`contrast_weights`.

    Returns:
        names of the contrasts, a column for every factor, and weights ``(r, k)`` of the cells, the last factor varying
        fastest in both.
    """
    factors = list(levels)
    if len(factors) < 2:
        raise ValueError(
            f"interaction= needs means of two factors or more, and these are of {', '.join(factors) or 'none'}"
        )
    if interaction is not True and method != "pairwise":
        raise ValueError(f"interaction={interaction!r} says the methods, and method={method!r} too: use one of them")
    chosen = _method_of_each(method if interaction is True else interaction, factors)
    if ref is not None and not any(one in CONTROLLED for one in chosen.values()):
        raise ValueError("ref= is the control of 'trt.vs.ctrl', which no factor has here")
    if isinstance(ref, Mapping) and (wrong := [name for name in ref if name not in factors]):
        raise ValueError(f"ref= names {', '.join(map(repr, wrong))}, and the factors here are {', '.join(factors)}")
    weights: np.ndarray = np.ones((1, 1))
    names: list[tuple[str, ...]] = [()]
    for factor, one in chosen.items():
        own = (ref.get(factor) if isinstance(ref, Mapping) else ref) if one in CONTROLLED else None
        found = contrast_weights(one, levels[factor], own, between)
        weights = np.kron(weights, np.reshape(list(found.values()), (-1, len(levels[factor]))))
        names = [(*before, name) for before in names for name in found]
    columns = [f"{factor}_{one}" for factor, one in chosen.items()]
    return pd.DataFrame(names, columns=columns, dtype=object), weights


def _method_of_each(interaction: Any, factors: list[str]) -> dict[str, str]:
    if isinstance(interaction, str):
        return dict.fromkeys(factors, method_named(interaction))
    if isinstance(interaction, Mapping):
        if sorted(map(str, interaction)) != sorted(factors):
            raise ValueError(
                f"interaction= must have a method for each of {', '.join(factors)}, got "
                f"{', '.join(map(str, interaction))}"
            )
        return {factor: method_named(interaction[factor]) for factor in factors}
    if isinstance(interaction, Sequence) and len(interaction) == len(factors):
        return {factor: method_named(one) for factor, one in zip(factors, interaction, strict=True)}
    raise ValueError(
        f"interaction= must be True, a method, or one for each of {', '.join(factors)}, got {interaction!r}"
    )
