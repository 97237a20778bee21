"""Words that choose a method, as R's packages spell them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DDF = {
    "satterthwaite": "satterthwaite",
    "kenwardroger": "kenward-roger",
    "kr": "kenward-roger",
    "kenwardrogerlinear": "kenward-roger-linear",
    "krlinear": "kenward-roger-linear",
    "wald": "wald",
}
INTERVALS = {"profile": "profile", "wald": "wald", "bootstrap": "bootstrap", "boot": "bootstrap"}
BOOTSTRAPS = {"percentile": "percentile", "perc": "percentile", "basic": "basic", "normal": "normal", "norm": "normal",
              "bca": "bca"}  # fmt: skip
# Of likelihood ratios between fits that differ in their random effects.
RATIOS = {"mixture": "mixture", "chi2": "chi2", "chisq": "chi2", "bootstrap": "bootstrap", "boot": "bootstrap"}
DROP1 = {"f": "F", "lrt": "lrt", "chisq": "lrt"}


def ddf_of(value: Any) -> Any:
    """``"Kenward-Roger"``, ``"KR"``, ``"Satterthwaite"``, ``"Wald"`` as this package calls them."""
    return option(value, DDF)


def option(value: Any, known: Mapping[str, str]) -> Any:
    """The option that a word stands for, whatever its case, hyphens and blanks. What is none comes back as it was, and
    whoever it is given to refuses it.

    Args:
        value: what a user gave. known: small letters without other signs -> option.

    Example:
        >>> from mixjax.fitted.options import INTERVALS, ddf_of, option
        >>> ddf_of("Kenward-Roger"), ddf_of("KR"), option("Wald", INTERVALS), ddf_of("none")
        ('kenward-roger', 'kenward-roger', 'wald', 'none')
    """
    if not isinstance(value, str):
        return value
    return known.get("".join(sign for sign in value.lower() if sign not in "-_ ."), value)
