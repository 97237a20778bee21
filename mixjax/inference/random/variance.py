"""How much of the variance lies where."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.linalg import block_diag
from scipy.special import polygamma

from mixjax.covariance import rank_tolerance, split_theta, triangle
from mixjax.design import RandomTerm, refuse_smooths
from mixjax.families.links import LINEAR, LINKS, mean_derivatives
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.tables import NotedTable

Approximation = Literal["trigamma", "delta", "lognormal"]
APPROXIMATIONS = ("trigamma", "delta", "lognormal")
# Of a binomial response's links: the variance of the latent variable that passes a threshold.
LATENT = {"logit": np.pi**2 / 3, "probit": 1.0, "cloglog": np.pi**2 / 6}


class Components(NamedTuple):
    """Variances of the linear predictor's parts, absolute.

    Attributes:
        fixed: of the fixed effects' predictions over the rows. random: per random term its mean over the rows.
        residual: ``sigma^2``, of a generalised model :func:`latent_variance`.
    """

    fixed: float
    random: np.ndarray
    residual: float


def components(fitted: AnyFitted, approximation: Approximation | None = None) -> Components:
    """Where the variance lies, of a generalised model on the scale of the linear predictor.

    That of a random term is its mean over the rows, ``mean_i z_i' Sigma z_i`` (Johnson 2014, Methods Ecol. Evol. 5,
    944, eq. 10); for random intercepts that is the intercept variance itself, where levels have a known covariance K
    times the mean over the rows of its diagonal. That of the fixed effects is the variance
    of their predictions (Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14, eq. 2.5).
    """
    X = np.asarray(fitted.design.X)
    random = [
        (np.einsum("na,ab,nb->n", term.Z, Sigma, term.Z) * _of_level(term)).mean()
        for term, Sigma in zip(fitted.design.terms, fitted.estimates.Sigma, strict=True)
    ]
    # Differences from a row: of a constant column nothing is left, not its rounding.
    fixed = float(np.var((X - X[0]) @ fitted.estimates.beta, ddof=1)) if X.shape[1] else 0.0
    if isinstance(fitted, GeneralizedFitted):
        return Components(fixed, np.array(random), latent_variance(fitted, approximation))
    if approximation is not None:
        raise ValueError("the residual variance of a linear model is no approximation")
    return Components(fixed, np.array(random), fitted.mean_residual_variance)


def _of_level(term: RandomTerm) -> np.ndarray | float:
    """``(n,)`` variance of a row's level where levels have a known covariance, which need not be 1."""
    if term.levels is None:
        return 1.0
    of_level: np.ndarray = (np.asarray(term.levels) ** 2).sum(1)[np.asarray(term.group)]
    return of_level


def latent_variance(fitted: GeneralizedFitted, approximation: Approximation | None = None) -> float:
    """The variance of a row given its linear predictor, on the scale of that: the distribution-specific variance of
    Nakagawa, Johnson & Schielzeth (2017, J. R. Soc. Interface 14, 20170213).

    Args:
        approximation: None: of a binomial response pi^2/3 (logit), 1 (probit) or pi^2/6 (cloglog), the variance of the
            latent variable, whatever the numbers of trials; of Poisson, negative binomial and gamma responses with a
            log link as ``"trigamma"``; of others as ``"delta"``.
            ``"trigamma"``: the variance of the logarithm of a gamma variable with the same mean and variance,
            ``psi'(mean^2 / variance)``. ``"lognormal"``: of a log-normal one, ``log(1 + variance / mean^2)``; both of a
            log link. ``"delta"``: variance over the squared slope of the mean; of one trial of a binomial response.

    The mean is that of the rows' means over their random effects, which is what the mean of the response estimates.
    With ``dispformula=`` every row has the variance of its own dispersion at that mean, and these are averaged over the
    rows, as the variances of random effects are.

    Raises:
        ValueError: there is no such approximation for the family, or it has no variance, as cauchit's has none; a model
        with ``ziformula=``.
    """
    if approximation is not None and approximation not in APPROXIMATIONS:
        raise ValueError(f"approximation must be None or one of {', '.join(map(repr, APPROXIMATIONS))}, got "
                         f"{approximation!r}")  # fmt: skip
    family = fitted.family
    if family.plain is not family:
        raise ValueError(
            "with ziformula= there is no accepted variance of the response on the scale of the predictor, which icc(), "
            "r2() and variance_shares() divide by: extra zeros have no predictor, and their logit is another scale. "
            "Take those of a fit without ziformula=, or compare variances of random effects, fit.varcorr"
        )
    if family.link not in LINKS:
        raise ValueError(f"link {family.link!r} has no known derivative: there is no variance on its scale")
    if approximation is None:
        if family.name == "binomial":
            if family.link not in LATENT:
                raise ValueError(
                    f"link {family.link!r} has a latent variable without a variance; approximation='delta'"
                )
            return float(LATENT[family.link])
        known = family.name in ("poisson", "nbinom", "gamma") and family.link == "log"
        approximation = "trigamma" if known else "delta"
    if approximation != "delta" and (family.link != "log" or family.name == "binomial"):
        raise ValueError(f"approximation={approximation!r} is of log links; use 'delta'")
    design, est = fitted.design, fitted.estimates
    eta = np.asarray(design.X) @ est.beta + (0.0 if design.offset is None else np.asarray(design.offset))
    random = sum(
        (np.einsum("na,ab,nb->n", term.Z, Sigma, term.Z) for term, Sigma in zip(design.terms, est.Sigma, strict=True)),
        np.zeros(len(eta)),
    )
    mean = float(np.mean(family.integrated_mean(eta, random)))
    one = None if design.size is None else 1.0
    variance = np.asarray(family.variance(mean, one, fitted.psi_by_row), np.float64)  # one for each row, or for all
    if approximation == "trigamma":
        return float(np.mean(polygamma(1, mean**2 / variance)))
    if approximation == "lognormal":
        return float(np.mean(np.log1p(variance / mean**2)))
    slope = float(mean_derivatives(family.link, LINEAR[family.link](np.array(mean)))[0])
    return float(np.mean(variance)) / slope**2


def icc(fitted: AnyFitted, by_group: bool = False, approximation: Approximation | None = None) -> pd.Series:
    """Intraclass correlation: the share of variance that lies between groups, see :func:`components`.

    Args:
        by_group: one for every grouping factor: the variance of its terms / (random + residual).
        approximation: of a generalised model's residual variance, see :func:`latent_variance`.

    Returns:
        Series with ``adjusted``: random / (random + residual), and ``unadjusted``: with the variance of the fixed
        effects in the denominator. By group: a Series over grouping factors, which add up to ``adjusted``.
    """
    refuse_smooths(
        fitted.labels,
        "intraclass correlations",
        "a curve is no variance between levels; set that of fit.predict(random=False) beside those of fit.varcorr",
    )
    fixed, random, residual = components(fitted, approximation)
    total = random.sum() + residual
    if by_group:
        groups = [term.group for term in fitted.labels.terms]
        shares: pd.Series = (pd.Series(random, index=groups).groupby(level=0, sort=False).sum() / total).rename("icc")
        return shares
    return pd.Series({"adjusted": random.sum() / total, "unadjusted": random.sum() / (total + fixed)}, name="icc")


def r2(fitted: AnyFitted, approximation: Approximation | None = None) -> pd.Series:
    """Shares of explained variance (Nakagawa & Schielzeth 2013, Methods Ecol. Evol. 4, 133, eqs. 26, 30).

    Args:
        approximation: of a generalised model's residual variance, see :func:`latent_variance`.

    Returns:
        Series with ``marginal``: fixed / (fixed + random + residual), and ``conditional``: (fixed + random) / the same;
        see :func:`components`.
    """
    refuse_smooths(
        fitted.labels,
        "R squared",
        "a curve is no variance between levels; set that of fit.predict(random=False) beside those of fit.varcorr",
    )
    fixed, random, residual = components(fitted, approximation)
    total = fixed + random.sum() + residual
    return pd.Series({"marginal": fixed / total, "conditional": (fixed + random.sum()) / total}, name="r2")


def shares(fitted: AnyFitted, approximation: Approximation | None = None) -> pd.DataFrame:
    """Shares of the variance, see :func:`components`.

    Args:
        approximation: of a generalised model's residual variance, see :func:`latent_variance`.

    Returns:
        DataFrame with one row per random term, then ``residual``, then ``fixed``: columns ``component`` (``"random"``,
        ``"residual"``, ``"fixed"``), ``group`` and ``effects`` (of a random term, else empty), ``variance`` (absolute)
        and ``share`` (of their sum). The share of ``fixed`` is the marginal R2; without it, ``share`` of the random
        terms over that of random and residual is the adjusted ICC.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.variance import shares
        >>> fit = mj.lmm("strength ~ 1 + (1 | batch/cask)", mj.datasets.load("Pastes"))
        >>> shares(fit.record)[["component", "group", "share"]].round(3)
          component       group  share
        0    random  cask:batch  0.783
        1    random       batch  0.154
        2  residual              0.063
        3     fixed              0.000
    """
    refuse_smooths(
        fitted.labels,
        "shares of variance",
        "a curve is no variance between levels; set that of fit.predict(random=False) beside those of fit.varcorr",
    )
    fixed, random, residual = components(fitted, approximation)
    terms = fitted.labels.terms
    variance = np.array([*random, residual, fixed])
    return pd.DataFrame(
        {
            "component": [*["random"] * len(terms), "residual", "fixed"],
            "group": [*(term.group for term in terms), "", ""],
            "effects": [*(", ".join(term.effects) for term in terms), "", ""],
            "variance": variance,
            "share": variance / variance.sum(),
        }
    )


def principal_components(fitted: Fitted) -> dict[str, pd.DataFrame]:
    """Principal components of the random effects' covariance: how many dimensions do the data support?

    One frame per grouping factor, all its terms side by side, as lme4's ``rePCA`` (Bates, Kliegl, Vasishth & Baayen
    2015, arXiv 1506.04967), one row per component, largest first. Standard deviations are relative to sigma. Each of
    the two analyses has three columns:

    * ``std_dev``, ``share``, ``cumulative``: of the relative covariance ``Lambda Lambda'`` itself, what ``rePCA``
      shows. These depend on the units of Z's columns: with time in hours instead of days, slopes seem to need no
      dimension of their own.
    * ``row_std_dev``, ``row_share``, ``row_cumulative``: of what the effects do to the rows, the covariance seen in
      an orthonormal basis of Z, ``K Lambda Lambda' K'`` with ``K'K = Z'WZ / n``. Free of units: with unstructured
      covariances the same for all columns of the same span. Squares add up to the mean over rows of the variance that
      the factor gives to a row, relative to the row's residual variance; shares say what a dimension is worth.

    ``needed`` is False for components that are zero up to rounding, in any units. Where some are, the fit is singular
    and the random part has more parameters than the data can tell apart: as many dimensions are needed as rows say
    True, and fewer may do where ``row_cumulative`` is near 1 early.

    Returns:
        dict group -> DataFrame. Shares are NaN where there is no variance at all.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.variance import principal_components
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> principal_components(fit.record)["Subject"][["std_dev", "share", "row_std_dev", "row_share"]].round(3)
             std_dev  share  row_std_dev  row_share
        PC1    0.967  0.946        1.557      0.935
        PC2    0.231  0.054        0.412      0.065
    """
    stats, layout = fitted.given_stats, fitted.layout
    lambdas = []
    for theta, q in zip(split_theta(fitted.estimates.theta, layout.qs), layout.qs, strict=True):
        Lambda = np.zeros((q, q))
        Lambda[triangle(q)] = theta
        lambdas.append(Lambda)
    result: dict[str, pd.DataFrame] = {}
    for group in dict.fromkeys(term.group for term in fitted.labels.terms):
        ts = [t for t, term in enumerate(fitted.labels.terms) if term.group == group]
        places = [layout.terms[t] for t in ts]
        own = np.concatenate([np.arange(place.start, place.start + place.q) for place in places])
        products = np.asarray(stats.factors[places[0].factor].ZZ).sum(2)[np.ix_(own, own)] / fitted.nobs
        sizes, vectors = np.linalg.eigh(products)
        K = np.sqrt(np.maximum(sizes, 0.0))[:, None] * vectors.T
        in_basis = block_diag(*(stats.Z_bases[t].R @ lambdas[t] for t in ts))
        sd = np.linalg.svd(block_diag(*(lambdas[t] for t in ts)), compute_uv=False)
        row_sd = np.linalg.svd(K @ in_basis, compute_uv=False)
        with np.errstate(invalid="ignore"):
            share, row_share = sd**2 / (sd**2).sum(), row_sd**2 / (row_sd**2).sum()
        columns = {
            "std_dev": sd,
            "share": share,
            "cumulative": share.cumsum(),
            "row_std_dev": row_sd,
            "row_share": row_share,
            "row_cumulative": row_share.cumsum(),
            "needed": row_sd > rank_tolerance(np.float64) * row_sd[0],
        }
        result[group] = NotedTable(pd.DataFrame(columns, index=[f"PC{i + 1}" for i in range(len(sd))]), ())
    return result
