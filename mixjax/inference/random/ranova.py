"""Random effects left out one at a time, each tested by a likelihood ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from mixjax.checks import check_count
from mixjax.design import Design, Labels
from mixjax.distributions import chi2_tail
from mixjax.estimation.glmm_plain import Plain, fit_plain
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.formula.deletion import Deletion, design_without, find_deletion, random_deletions
from mixjax.inference.random.likelihood_ratio import bootstrap_null, criterion_of, mixture_p
from mixjax.inference.random.nesting import free_kernels, logdet_X, place_of
from mixjax.optimise.results import Result, failed, note_of_failures
from mixjax.products.responses import Responses
from mixjax.resampling.replicates import Drawn, Source, data_of_responses, refits
from mixjax.simulation import simulate_family, simulate_responses
from mixjax.tables import NotedTable

METHODS = ("mixture", "chi2", "bootstrap")
F = TypeVar("F", Fitted, GeneralizedFitted)
Method = Literal["mixture", "chi2", "bootstrap"]


def ranova(
    fitted: AnyFitted, method: Method = "mixture", reduce: bool = True, key: Any = 0, n: int = 1000
) -> pd.DataFrame:
    """Likelihood ratio tests of the random effects, each left out by itself, as R's ``lmerTest::ranova``.

    The smaller models are fitted by the criterion of the fit: REML criteria can be compared because the fixed effects
    are the same. (A generalised model by the restricted likelihood is refitted by maximum likelihood.) Where nothing
    random is left, the smaller model is a linear, or generalised linear, one.

    Args:
        fitted: the fit, linear or generalised, with its rows.
        method: ``"chi2"``: the p-value of lmerTest, chi-square with df degrees of freedom, which is too large because
            a variance of 0 is the bound of what it can be. ``"mixture"``: also ``1/2 chi2(df - 1) + 1/2 chi2(df)``
            where it is known to hold, see :func:`mixjax.compare`. ``"bootstrap"``: also a p-value by simulation from
            the smaller model, ``(1 + replicates with a statistic as large) / (1 + replicates)``, which holds for
            every row.
        reduce: of ``(x | g)`` the slope is left out and the intercept stays; of several effects one goes at a time,
            those that are part of another's interaction not. ``(0 + f | g)`` of a factor is reduced to ``(1 | g)``.
            False: whole terms are left out.
        key: int or JAX key of the bootstrap. n: its replicates.

    Returns:
        DataFrame, first ``<none>``, the fit itself, then one row per smaller model: ``npar``, ``loglik``, ``aic``,
        ``lrt`` (difference of -2 loglik), ``df`` (parameters less), ``p_value``, ``p_mixture`` (NaN where no mixture
        is known), ``p_bootstrap`` and its Monte Carlo standard error ``mc_error``. When printed it says what p-values
        these are (``attrs["notes"]``).

    Raises:
        ValueError: no such method; the fit kept no rows.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.ranova import ranova
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> ranova(fit.record)[["npar", "lrt", "df"]].round(2)
                                  npar    lrt   df
        <none>                       6    NaN  NaN
        Days in (Days | Subject)     4  42.84  2.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not isinstance(reduce, bool | np.bool_):
        raise ValueError(f"reduce must be True or False, got {reduce!r}")
    n = check_count("n", n, 1)
    _ = fitted.design  # the error says why there are no rows
    if isinstance(fitted, GeneralizedFitted):
        fitted = fitted.refitted(False)
    rows: dict[str, dict[str, float]] = {"<none>": _statistics(fitted.npar, float(fitted.estimates.criterion))}
    unknown, notes = [], []
    if not fitted.estimates.converged:
        notes.append("NOT CONVERGED: the fit itself; no test with it holds")
    for deletion in random_deletions(fitted.labels, bool(reduce)):
        small = _smaller(fitted, deletion)
        row = _statistics(small.npar, small.criterion)
        difference = small.criterion - float(fitted.estimates.criterion)
        rounding = max(1e-8, 1e-12 * abs(small.criterion))
        row["lrt"] = difference if difference > rounding else 0.0
        df = fitted.npar - small.npar
        row |= {"df": float(df), "p_value": float(chi2_tail(row["lrt"], df))}
        reason = _of_smooth(fitted, deletion) or _no_mixture(small, fitted)
        row["p_mixture"] = np.nan if reason else mixture_p(row["lrt"], df)
        if reason:
            unknown.append(f"{deletion.name} ({reason})")
        if difference < -1e-6:
            notes.append(f"{deletion.name}: the smaller model fits better; a search ended in a local minimum")
        if small.record is not None and not small.record.estimates.converged:
            notes.append(f"NOT CONVERGED: without {deletion.name}")
        if method == "bootstrap":
            if small.record is not None:
                draws, codes = bootstrap_null(small.record, fitted, key, n)
            elif isinstance(fitted, Fitted):
                draws, codes = _linear_null(fitted, key, n)
            else:
                draws, codes = _plain_null(fitted, key, n)
            failures = note_of_failures(codes)
            if failures:
                notes.append(f"{deletion.name}: {failures}")
            p = (1 + np.count_nonzero(draws >= row["lrt"] - rounding)) / (1 + len(draws))
            row |= {"p_bootstrap": p, "mc_error": float(np.sqrt(p * (1 - p) / max(1, len(draws))))}
        rows[deletion.name] = row
    columns = ["npar", "loglik", "aic", "lrt", "df", "p_value"]
    columns += ["p_mixture"] * (method != "chi2") + ["p_bootstrap", "mc_error"] * (method == "bootstrap")
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).astype({"npar": int})
    return NotedTable(table, [*_explained(fitted, method, unknown), *notes])


def _explained(fitted: AnyFitted, method: str, unknown: list[str]) -> Iterator[str]:
    yield f"criterion: {'REML' if isinstance(fitted, Fitted) and fitted.reml else criterion_of(fitted)}"
    yield ("p_value: chi-square with df degrees of freedom, too large where a variance is put to 0, its bound")
    if method != "chi2":
        yield "p_mixture: 1/2 chi2(df - 1) + 1/2 chi2(df)" + "; not known for " * bool(unknown) + "; ".join(unknown)
        if unknown and method != "bootstrap":
            yield "method='bootstrap' gives a p-value for every row"


def without(fitted: F, term: str) -> F:
    """The fit without a term, by the same criterion.

    Args:
        fitted: the fit, with its rows.
        term: as :func:`ranova` and ``drop1`` name it: ``"Days in (Days | Subject)"``, ``"(1 | Subject)"``,
            ``"recipe"``; or a whole random term as the formula writes it.

    Raises:
        ValueError: there is no such term, or it is the only random one.
    """
    _ = fitted.design  # the error says why there are no rows
    return fitted.with_design(*_reduced(fitted, find_deletion(term, fitted.labels)))


def _reduced(fitted: AnyFitted, deletion: Deletion) -> tuple[Design, Labels]:
    design, labels = design_without(fitted.given, fitted.labels, deletion)
    if not design.terms and not design.has_residual_side:
        others = "ordinary regression, statsmodels.formula.api.ols or numpy.linalg.lstsq"
        if not isinstance(fitted, Fitted):
            others = "a generalised linear model, statsmodels.formula.api.glm"
        raise ValueError(
            f"without '{deletion.name}' no random term is left: that is {others}; ranova() compares the fit with it"
        )
    return design, labels


class _Smaller(NamedTuple):
    """A smaller model: its record, or None of one without random effects."""

    npar: int
    criterion: float
    record: AnyFitted | None


def _smaller(fitted: AnyFitted, deletion: Deletion) -> _Smaller:
    if deletion.effects is None and len(fitted.design.terms) == 1 and not fitted.design.has_residual_side:
        if isinstance(fitted, Fitted):
            return _Smaller(len(fitted.estimates.beta) + 1, linear_criterion(fitted), None)
        return _Smaller(fitted.npar - fitted.layout.k, float(_plain(fitted).criterion[0]), None)
    small = fitted.with_design(*_reduced(fitted, deletion))
    return _Smaller(small.npar, float(small.estimates.criterion), small)


def _statistics(npar: int, criterion: float) -> dict[str, float]:
    return {"npar": npar, "loglik": -criterion / 2, "aic": criterion + 2 * npar}


def _of_smooth(large: AnyFitted, deletion: Deletion) -> str | None:
    if deletion.place is None or not large.labels.terms[deletion.place].smooth:
        return None
    return "a smooth has one level: exact_rlrt() is exact where it is alone"


def _no_mixture(small: _Smaller, large: AnyFitted) -> str | None:
    """Why the weights of a mixture are not known, or None."""
    if free := free_kernels(small.record, large):
        return f"the range of {' and of '.join(map(repr, free))} means nothing without it"
    if small.record is None:
        # Where a variance is 0 the correlations beside it are not known.
        zeros = sum(s.n_zeros(np.ones(s.n_reductions, bool)) for s in large.layout.structures)
        return None if zeros == 1 else f"{zeros} standard deviations are 0, or correlations not known"
    place = place_of(small.record, large)
    if not place.nested or place.zeros is None:
        return "the smaller covariance can be written in several ways"
    if place.zeros != 1:
        return f"{place.zeros} standard deviations are 0"
    return "the smaller fit is singular" if small.record.estimates.singular else None


# --- without random effects ------------------------------------------------------------------------------------------


def linear_criterion(fitted: Fitted, rss: Any = None) -> Any:
    """-2 log-likelihood, or REML criterion, of the same fixed effects with independent errors ``sigma^2 / weight``.

    Args:
        fitted: of the same data. rss: weighted residual sums of squares; None for that of the data.
    """
    n, p = fitted.nobs, len(fitted.estimates.beta)
    rss = float(fitted.stats.yy) if rss is None else rss
    df = n - p if fitted.reml else n
    constant = (logdet_X(fitted) if fitted.reml else 0.0) - float(fitted.stats.sum_log_weights)
    return df * (1.0 + np.log(2.0 * math.pi * rss / df)) + constant


def _linear_null(large: Fitted, key: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics under the linear model, as :func:`bootstrap_null` gives them."""
    design, rows = large.design, large.rows
    root = np.ones(large.nobs) if rows.sqrt_w is None else np.asarray(rows.sqrt_w)
    offset = np.zeros(large.nobs) if design.offset is None else np.asarray(design.offset)
    Q, X = np.asarray(rows.Q), np.asarray(design.X)
    beta = np.linalg.lstsq(root[:, None] * X, root * (np.asarray(design.y) - offset), rcond=None)[0]
    sigma = math.sqrt(float(large.stats.yy) / (large.nobs - X.shape[1] * large.reml))
    Sigma = tuple(np.zeros_like(S) for S in large.estimates.Sigma)
    responses = Responses(rows)

    def draw(first: int, count: int) -> Drawn:
        Y = simulate_responses(design, beta, sigma, Sigma, key, count, first)
        own = (Y - offset) * root
        return Drawn((responses.products(Y),), ((own - own @ Q @ Q.T) ** 2).sum(axis=1))

    found: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    what = "likelihood ratios: refitting to"
    for drawn, (est,) in refits(Source(draw, large.nobs), n, ("criterion", "result"), large.reml, what=what):
        codes.append(np.asarray(est.result))
        found.append(np.maximum(linear_criterion(large, drawn.beside) - est.criterion, 0.0)[~failed(codes[-1])])
    return np.concatenate(found), np.concatenate(codes)


def _plain(fitted: GeneralizedFitted) -> Plain:
    """The model without random effects."""
    return fit_plain(fitted.rows.with_response(np.asarray(fitted.rows.y)[None]))


def _plain_null(large: GeneralizedFitted, key: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics under the generalised linear model, as :func:`bootstrap_null` gives them."""
    null, none = _plain(large), [np.zeros_like(S) for S in large.estimates.Sigma]
    data, psi = data_of_responses(large), large.rows.psi_by_row(null.psi[0])

    def draw(first: int, count: int) -> Drawn:
        Y = simulate_family(large.design, large.family, null.beta[0], none, psi, key, count, first)
        return Drawn((data(Y),), fit_plain(large.rows.with_response(Y)).criterion)

    found: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    what = "likelihood ratios: refitting to"
    for drawn, (est,) in refits(Source(draw, 2 * large.nobs), n, ("criterion", "result"), False, what=what):
        codes.append(np.where(np.isfinite(drawn.beside), est.result, int(Result.NOT_FINITE)))
        found.append(np.maximum(drawn.beside - est.criterion, 0.0)[~failed(codes[-1])])
    return np.concatenate(found), np.concatenate(codes)
