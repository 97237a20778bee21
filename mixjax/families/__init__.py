"""Distributions of responses: families and their links.

Functions here make a :class:`~mixjax.families.family.Family`, which :func:`mixjax.glmm` takes as ``family=`` where a
name is not enough; :func:`family_of` reads what users write.
"""

from __future__ import annotations

from mixjax.families.binomial import Binomial
from mixjax.families.counts import NegativeBinomial, Poisson
from mixjax.families.family import Derivatives as Derivatives
from mixjax.families.family import Expected as Expected
from mixjax.families.family import Family as Family


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
