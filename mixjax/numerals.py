"""Numbers as text: as many digits as mean something, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# What is smaller than this part of the largest number asks for no decimals of its own.
NEGLIGIBLE = 1e-6
# More decimals than this, or larger numbers, are written with an exponent.
MOST_DECIMALS, LARGEST = 8, 1e9


def number(x: float, decimals: int) -> str:
    """A number with these decimals; what rounds to zero has no minus, and what is beyond 1e15 an exponent.

    Example:
        >>> number(-0.004, 2), number(float("nan"), 2), number(float("-inf"), 2)
        ('0.00', 'NaN', '-inf')
    """
    if math.isnan(x):
        return "NaN"
    if abs(x) >= 1e15:
        return f"{x:.{decimals + 3}g}"
    text = f"{x:.{decimals}f}"
    return text if text.strip("-0.") else text.lstrip("-")


def p_value(p: float, digits: int = 3) -> str:
    """A p value with these decimals, ``<0.001`` where that would be zero.

    Example:
        >>> p_value(0.04321), p_value(2e-5), p_value(0.001)
        ('0.043', '<0.001', '0.001')
    """
    return f"<{10.0**-digits:.{digits}f}" if p < 10.0**-digits else number(p, digits)


def common_decimals(values: Iterable[float], digits: int) -> int:
    """Decimals with which the smallest number that is not negligible shows so many significant digits."""
    sizes = [abs(float(x)) for x in values if math.isfinite(x) and x]
    if not sizes:
        return digits - 1
    smallest = min(size for size in sizes if size >= NEGLIGIBLE * max(sizes))
    # Through text, because log10 of a number just below a power of ten may round up to it.
    return max(0, digits - 1 - int(f"{smallest:.{digits - 1}e}".split("e")[1]))


def column(values: Iterable[Any], digits: int, by: Iterable[Any] = ()) -> list[str]:
    """Numbers with common decimals.

    Args:
        digits: significant digits of the smallest; of those of ``by`` where some are given, such as the standard errors
            of the values.

    Example:
        >>> column([251.405, 10.467], 3, by=[6.825, 1.546]), column([24.74, 5.922, 1e-9], 3)
        (['251.41', '10.47'], ['24.74', '5.92', '1.00e-09'])
    """
    values, by = [float(x) for x in values], [float(x) for x in by]
    errors = [x for x in by if math.isfinite(x) and x]
    largest = max((abs(x) for x in values if math.isfinite(x)), default=0.0)
    decimals = common_decimals(errors or values, digits)
    if decimals > MOST_DECIMALS or largest >= LARGEST:
        return [f"{x + 0.0:.{digits + 2}g}" if math.isfinite(x) else number(x, 0) for x in values]
    texts = [number(x, decimals) for x in values]
    if errors:
        return texts  # beside its standard error what is negligible is a zero
    return [
        f"{x:.{digits - 1}e}" if 0 < abs(x) < NEGLIGIBLE * largest else text
        for x, text in zip(values, texts, strict=True)
    ]


def fixed_decimals(values: np.ndarray, digits: int) -> list[str]:
    """Numbers with common decimals, so that the largest shows ``digits`` significant digits; tiny ones as 1.2e-10."""
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    if largest == 0:
        return [f"{v:.0f}" for v in values]
    if largest >= 1e7 or largest < 1e-3:
        return [f"{v:.{digits - 1}e}" if v else "0" for v in values]
    decimals = max(0, digits - 1 - int(np.floor(np.log10(largest))))
    return [f"{v:.{decimals}f}" if v == 0 or abs(v) >= 10.0**-decimals else f"{v:.2e}" for v in values]
