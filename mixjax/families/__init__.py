"""Distributions of responses: families and their links.

Functions here make a :class:`~mixjax.families.family.Family`, which :func:`mixjax.glmm` takes as ``family=`` where a
name is not enough; :func:`family_of` reads what users write.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from mixjax.families.binomial import Binomial
from mixjax.families.counts import NegativeBinomial, Poisson
from mixjax.families.custom import Custom
from mixjax.families.family import Derivatives as Derivatives
from mixjax.families.family import Expected as Expected
from mixjax.families.family import Family as Family
from mixjax.families.gaussian import Gaussian
from mixjax.families.positive import Gamma, InverseGaussian
from mixjax.families.proportions import Beta
from mixjax.families.zero_inflated import ZeroInflated


def binomial(link: str = "logit") -> Family:
    """Counts of successes in trials, or single outcomes 0 and 1.

    Args:
        link: ``"logit"``, ``"probit"``, ``"cloglog"`` or ``"cauchit"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.binomial("probit").name
        'binomial'
    """
    return Binomial(link)


def poisson(link: str = "log") -> Family:
    """Counts whose variance is their mean.

    Args:
        link: ``"log"`` or ``"sqrt"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.poisson().n_psi
        0
    """
    return Poisson(link)


def nbinom(link: str = "log") -> Family:
    """Overdispersed counts, negative binomial with quadratic variance (NB2): ``mu + mu^2 / size``.

    The size is estimated, by maximum likelihood; it grows without bound where counts are not overdispersed.

    Args:
        link: ``"log"`` or ``"sqrt"``.

    Example:
        >>> import numpy as np, mixjax as mj
        >>> family = mj.families.nbinom()
        >>> print(family.psi_names, family.variance(2.0, None, np.log([4.0])))
        ('size',) 3.0
    """
    return NegativeBinomial(link)


def gamma(link: str = "log") -> Family:
    """Responses above zero with variance ``dispersion mu^2``; the dispersion is estimated by maximum likelihood.

    Args:
        link: ``"log"`` or ``"inverse"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.gamma().psi_names
        ('dispersion',)
    """
    return Gamma(link)


def inverse_gaussian(link: str = "log") -> Family:
    """Responses above zero with variance ``dispersion mu^3``; the dispersion is estimated by maximum likelihood.

    Args:
        link: ``"log"``, ``"inverse"`` or ``"1/mu^2"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.inverse_gaussian().link
        'log'
    """
    return InverseGaussian(link)


def beta(link: str = "logit") -> Family:
    """Proportions strictly between 0 and 1, with variance ``mu (1 - mu) / (1 + precision)``.

    Args:
        link: ``"logit"``, ``"probit"``, ``"cloglog"`` or ``"cauchit"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.beta().psi_names
        ('precision',)
    """
    return Beta(link)


def gaussian(link: str = "identity") -> Family:
    """Normal responses; with link identity :func:`mixjax.lmm` is the model to use.

    Args:
        link: ``"identity"``, ``"log"`` or ``"inverse"``.

    Example:
        >>> import mixjax as mj
        >>> mj.families.gaussian("log").psi_names
        ('sigma',)
    """
    return Gaussian(link)


def custom(
    loglik: Callable[..., Any],
    mean: Callable[[Any], Any],
    draw: Callable[..., Any] | None = None,
    psi: Sequence[str] = (),
    start: Sequence[float] | None = None,
    name: str = "custom",
) -> Family:
    """A family of one's own: the log density of a row, differentiated by JAX.

    Args:
        loglik: ``(y, eta, size, psi)`` -> log density of one row with all constants. All are numbers, size 1 where
            there are no trials, psi ``(n_psi,)``; written with ``jax.numpy``, without Python's ``if``.
        mean: eta -> mean of y, elementwise, in ``jax.numpy``.
        draw: ``(key, mean, size, psi)`` -> responses, needed to simulate.
        psi: names of the family's parameters, which take any real value: write logarithms.
        start: values of psi to start from, 0 by default.
        name: of the family.

    Returns:
        A family, which is the same only as itself: make it once, as every other is compiled anew.

    Raises:
        ValueError: start has another length than psi, or is not finite.

    Example:
        >>> import jax, numpy as np, mixjax as mj
        >>> geometric = mj.families.custom(
        ...     lambda y, eta, size, psi: jax.nn.log_sigmoid(eta) + y * jax.nn.log_sigmoid(-eta),
        ...     mean=lambda eta: jax.numpy.exp(-eta), name="geometric")
        >>> geometric.derivatives(np.zeros(2), np.array([0.0, 3.0]), None, ()).by_eta[1]
        array([-0.5,  1. ])
    """
    if isinstance(psi, str):
        psi = (psi,)
    values = tuple(float(value) for value in ((0.0,) * len(psi) if start is None else start))
    if len(values) != len(psi) or not all(abs(value) < float("inf") for value in values):
        raise ValueError(
            f"custom: start must be {len(psi)} finite numbers, one for each of psi {list(psi)}, got {start}"
        )
    return Custom("custom", loglik, mean, draw, tuple(psi), values, name)


# Families that zeros can be added to.
INFLATED = ("poisson", "nbinom", "binomial")


def zero_inflated(base: Any, link: str | None = None) -> Family:
    """Counts of which some are 0 for certain, with a probability that :func:`mixjax.glmm` makes depend on columns by
    ``ziformula=``; the others have the distribution of ``base``.

    Args:
        base: ``"poisson"``, ``"nbinom"``, or ``"binomial"`` with numbers of trials, or made here. link: of its mean.

    Raises:
        ValueError: a base to which no zeros can be added.

    Example:
        >>> import numpy as np, mixjax as mj
        >>> family = mj.families.zero_inflated("poisson")
        >>> print(family.psi_names, np.exp(-family.density(0.0, 0.0, None, [0.0])).round(3))  # half of them, and more
        ('zero_inflation',) 0.684
    """
    own = family_of(base, link)
    if isinstance(own, ZeroInflated) or own.name not in INFLATED:
        raise ValueError(
            f"zeros can be added to {', '.join(map(repr, INFLATED))}, not to family {own.name!r}"
            + (": it has no zeros; leave them out and model whether a response is 0 by a binomial one"
               if own.support in ("positive", "unit") else "")
        )  # fmt: skip
    return ZeroInflated(own.link, own)


_CONSTRUCTORS: dict[str, Callable[..., Family]] = {
    "binomial": binomial, "poisson": poisson, "nbinom": nbinom, "gamma": gamma, "inverse_gaussian": inverse_gaussian,
    "beta": beta, "gaussian": gaussian,
}  # fmt: skip
# Spellings of other programs, without case and punctuation.
_SPELLINGS = {
    "bernoulli": "binomial", "negativebinomial": "nbinom", "nbinom2": "nbinom", "negbin": "nbinom",
    "negbinomial": "nbinom", "nb": "nbinom", "nb2": "nbinom", "inversegaussian": "inverse_gaussian", "betar": "beta",
    "betafamily": "beta", "normal": "gaussian", "wald": "inverse_gaussian",
    **{name.replace("_", ""): name for name in _CONSTRUCTORS},
}  # fmt: skip
_CALL = re.compile(r"""\s*([\w.]+)\s*\(\s*(?:link\s*=\s*)?(?:["']?([A-Za-z][\w.]*|1/mu\^2)["']?)?\s*\)\s*""")


def family_of(family: Any, link: str | None = None, linear: bool = False) -> Family:
    """The family that a user means.

    Args:
        family: a :class:`~mixjax.families.family.Family`, a function of this module that makes one, or a name as any
            program spells it: ``"binomial"``, ``"Bernoulli"``, ``"Gamma"``, ``"inverse.gaussian"``, ``"nbinom2"``,
            ``"binomial(link = 'probit')"``.
        link: the link, None for the family's own or default.
        linear: also take the Gaussian family with link identity, which is :func:`mixjax.lmm`'s.

    Raises:
        ValueError: no such family or link, two different links, a family without a likelihood.

    Example:
        >>> from mixjax.families import family_of
        >>> family_of("Gamma(link = 'inverse')").link, family_of("negative_binomial").name
        ('inverse', 'nbinom')
    """
    if link is not None and not isinstance(link, str):
        raise ValueError(f"link must be the name of a link, such as 'log', got {link!r}")
    if isinstance(family, Family):
        found = family if link is None or link == family.link else None
        if found is None:
            raise ValueError(f"link is given twice: {family.link!r} by the family, {link!r} by link=; leave one out")
    else:
        found = _named(family, link)
    if found.name == "gaussian" and found.link == "identity" and not linear:
        raise ValueError("family 'gaussian' with link 'identity' is a linear mixed model: use mj.lmm")
    return found


def _named(family: Any, link: str | None) -> Family:
    if family in tuple(_CONSTRUCTORS.values()):
        return family() if link is None else family(link)  # type: ignore[no-any-return]
    if not isinstance(family, str):
        raise ValueError(f"family must be a name, such as 'binomial', or made by mj.families, got {family!r}")
    name, own = family, None
    call = _CALL.fullmatch(family)
    if call:
        name, own = call.groups()
    plain = re.sub(r"[\s._-]", "", name).lower()
    if plain.startswith("quasi"):
        raise ValueError(
            f"{family!r} has no likelihood, and a mixed model needs one: for more variance than the family has use an "
            "observation-level random effect (a factor with a level per row), or 'nbinom' for counts"
        )
    if plain in ("nbinom1", "nb1"):
        raise ValueError(
            f"{family!r}, with variance proportional to the mean, is not here; 'nbinom' is NB2: mu + mu^2 / size"
        )
    if plain.startswith(("truncated", "hurdle")):
        raise ValueError(
            f"{family!r} is not here: no truncated and no hurdle families; zero inflation is ziformula=, and a density "
            "of one's own is mixjax.families.custom"
        )
    if plain not in _SPELLINGS:
        near = difflib.get_close_matches(plain, _SPELLINGS, n=1)
        hint = f"; did you mean {_SPELLINGS[near[0]]!r}?" if near else ""
        raise ValueError(f"there is no family {family!r}{hint} (families: {', '.join(_CONSTRUCTORS)})")
    if own is not None and link is not None and own != link:
        raise ValueError(f"link is given twice: {own!r} in {family!r}, {link!r} by link=; leave one out")
    make = _CONSTRUCTORS[_SPELLINGS[plain]]
    chosen = own if link is None else link
    return make() if chosen is None else make(chosen)
