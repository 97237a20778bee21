"""Likelihood ratio tests between fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, warn
from mixjax.distributions import chi2_tail
from mixjax.fitted.either import AnyFitted, any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.inference.random.comparison import Comparison, names_of
from mixjax.inference.random.nesting import (
    Bounds,
    Place,
    are_formulas_within,
    are_kernels_within,
    are_residuals_within,
    bounds_of,
    check_same_data,
    check_same_likelihood,
    free_kernels,
    is_within,
    logdet_X,
    place_of,
    residual_bounds,
)
from mixjax.inference.random.repeated_ratio import compare_repeated
from mixjax.optimise.results import Result, failed, note_of_failures
from mixjax.resampling.replicates import Drawn, Source, data_of_responses, refits

METHODS = ("chi2", "mixture", "bootstrap")


def compare(
    *fits: Any,
    refit: Literal["ml", False] = "ml",
    method: Literal["chi2", "mixture", "bootstrap"] = "chi2",
    names: Sequence[str] | None = None,
    key: Any = 0,
    n: int = 1000,
) -> Comparison:
    """Likelihood ratio tests between models of the same data, linear or generalised, like R's ``anova()`` of lme4 fits.

    Models are ordered by number of parameters and each is tested against the one before. Where the smaller model puts
    variances to zero, the bound of what they can be, chi-square p-values are too large. If that is one standard
    deviation (of an effect, or of a combination of effects), ``1/2 chi2(df - 1) + 1/2 chi2(df)`` holds for many levels
    (Self & Liang 1987, J. Am. Stat. Assoc. 82, 605; Stram & Lee 1994, Biometrics 50, 1171) and is shown as
    ``p_mixture``. If it is more than one, or the smaller model's fit is singular, use ``method="bootstrap"``; for one
    variance alone in a linear model :func:`mixjax.exact_rlrt` is exact.

    Generalised models are compared by the same approximation of their log-likelihoods. Poisson counts are the limit of
    negative binomial ones, 1/size = 0, which is a bound like that of a variance.

    Repeated measures (:func:`mixjax.mmrm`) may have other fixed effects and other covariances of visits, of which one
    can be a special case of another; no parameter is at a bound there. They are not bootstrapped.

    Args:
        fits: two or more, all linear, all generalised, or all of repeated measures.
        refit: ``"ml"``: fits by REML are refitted by maximum likelihood, because REML criteria of different fixed
            effects cannot be compared. False: criteria as they are.
        method: ``"chi2"``: as in R, ``p_mixture`` beside it where it holds. ``"mixture"``: ``p_mixture`` in every row,
            equal to ``p_value`` where no variance is at its bound, NaN where no mixture is known. ``"bootstrap"``:
            simulates from the smaller fit and refits both, for any nested pair; ``p = (1 + replicates with a statistic
            as large) / (1 + replicates)`` (Davison & Hinkley 1997, Bootstrap Methods and their
            Application, chapter 4).
        names: of the models, instead of m0, m1, ...
        key: int or JAX key of the bootstrap.
        n: replicates of the bootstrap.

    Returns:
        :class:`Comparison`.

    Raises:
        DataError: fits of different data. ValueError: criteria that cannot be compared: of different approximations
            (``nagq``, ``curvature``), of families of counts and of numbers.

    Warns:
        InferenceWarning: models that are not nested; ``method="mixture"`` without a known mixture.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.likelihood_ratio import compare
        >>> data = mj.datasets.load("sleepstudy")
        >>> formulas = ["Reaction ~ Days + (1 | Subject)", "Reaction ~ Days + (Days | Subject)"]
        >>> table = compare(*(mj.lmm(f, data, reml=False) for f in formulas)).to_frame()
        >>> table[["npar", "deviance", "chisq", "df"]].round(2)
            npar  deviance  chisq   df
        m0     4   1794.08    NaN  NaN
        m1     6   1751.94  42.14  2.0
    """
    n = check_count("n", n, 1)
    if refit is not False and refit != "ml":
        raise ValueError(f"refit must be 'ml' or False, got {refit!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if len(fits) == 1 and isinstance(fits[0], list | tuple | Mapping):
        raise ValueError("fits are given one by one, compare(m0, m1), not as a list; their names are names=['A', 'B']")
    if len(fits) < 2:
        raise ValueError(f"two fits or more are compared, got {len(fits)}")
    if any(isinstance(getattr(fit, "record", fit), RepeatedFitted) for fit in fits):
        return compare_repeated(fits, refit, method, names)
    records = [any_record_of(fit) for fit in fits]
    names = names_of(fits, names)
    check_same_likelihood(records, names)
    check_same_data(records, names)
    notes: list[str] = []
    if refit == "ml":
        restricted = [name for name, fit in zip(names, records, strict=True) if fit.reml]
        records = [f.refitted(False) for f in records]
        if restricted:
            notes.append(f"{', '.join(restricted)} fitted by REML: refitted by maximum likelihood")
    failed = [name for name, fit in zip(names, records, strict=True) if not fit.estimates.converged]
    if failed:
        notes.append(f"NOT CONVERGED: {', '.join(failed)}; no test with such a fit holds")
    order = sorted(range(len(fits)), key=lambda i: records[i].npar)
    records, names = [records[i] for i in order], [names[i] for i in order]
    criteria = _comparable_criteria(records, names, notes)
    table = _fit_statistics(records, names, criteria)
    tests, null_draws = [], {}
    for i in range(1, len(records)):
        pair = _Pair(records[i - 1], records[i], names[i - 1], names[i], criteria[i - 1] - criteria[i])
        test, nested = _test(pair, method, notes)
        if method == "bootstrap" and nested:
            draws, codes = bootstrap_null(pair.small, pair.large, key, n)
            notes += [f"{pair}: {note}" for note in notes_of_null(pair.small, pair.large, codes)]
            p = (1 + np.count_nonzero(draws >= pair.statistic - pair.rounding)) / (1 + len(draws))
            test |= {"p_bootstrap": p, "mc_error": float(np.sqrt(p * (1 - p) / max(1, len(draws))))}
            null_draws[pair.larger] = draws
        tests.append(test)
    columns = ["chisq", "df", "p_value"]
    if method == "mixture" or any(np.isfinite(test["p_mixture"]) for test in tests):
        columns.append("p_mixture")
    if method == "bootstrap":
        columns += ["p_bootstrap", "mc_error"]
    table = table.join(pd.DataFrame(tests, index=names[1:]).reindex(columns=columns))
    title = f"Data: {records[0].nobs} rows, response {records[0].labels.response}; {criterion_of(records[0])}"
    families = [f"{fit.family.name} ({fit.family.link})" for fit in records if isinstance(fit, GeneralizedFitted)]
    if len(set(families)) == 1:
        title, families = f"{title}; family {families[0]}", []
    shown = [f", family {family}" for family in families] or [""] * len(records)
    shown = [
        own + "".join(f", {name} {text}" for name, text in getattr(fit, "own_formulas", {}).items())
        for own, fit in zip(shown, records, strict=True)
    ]
    formulas = {name: fit.labels.formula + own for name, fit, own in zip(names, records, shown, strict=True)}
    return Comparison(title, formulas, table, tuple(notes), null_draws)


def criterion_of(fit: AnyFitted) -> str:
    """In words."""
    if isinstance(fit, Fitted):
        return "REML criteria" if fit.reml else "maximum likelihood"
    by = {0: "Laplace's approximation with nagq = 0", 1: "Laplace's approximation"}.get(
        fit.nagq, f"quadrature, nagq = {fit.nagq}"
    )
    criterion = "restricted likelihoods" if fit.reml else "maximum likelihood"
    return f"{criterion} by {by}{', expected curvature' * (fit.curvature == 'expected')}"


class _Pair(NamedTuple):
    """Two neighbours: records, names, and the difference of their criteria."""

    small: AnyFitted
    large: AnyFitted
    smaller: str
    larger: str
    difference: float

    def __str__(self) -> str:
        return f"{self.larger} against {self.smaller}"

    @property
    def df(self) -> int:
        """Parameters more."""
        return self.large.npar - self.small.npar

    @property
    def rounding(self) -> float:
        """The accuracy of criteria."""
        return max(1e-8, 1e-12 * abs(float(self.small.estimates.criterion)))

    @property
    def statistic(self) -> float:
        """0 or more; what is rounding is 0."""
        return self.difference if self.difference > self.rounding else 0.0


def _has_rows(pair: _Pair) -> bool:
    return pair.small.kept is not None and pair.large.kept is not None


def _comparable_criteria(records: Sequence[AnyFitted], names: list[str], notes: list[str]) -> list[float]:
    """ML deviances; or REML criteria, all for the first model's columns where fixed effects are coded differently."""
    criteria = [float(fit.estimates.criterion) for fit in records]
    restricted = [fit.reml for fit in records]
    if not any(restricted):
        return criteria
    if not all(restricted):
        raise ValueError(
            "these are fits by REML and by maximum likelihood, whose criteria cannot be compared: "
            + ", ".join(f"{name} {'REML' if reml else 'ML'}" for name, reml in zip(names, restricted, strict=True))
            + "; use refit='ml', or fit all by the same criterion"
        )
    first = records[0]
    for fit, name in zip(records[1:], names[1:], strict=True):
        if fit.kept is None or first.kept is None:
            same = fit.labels.fixed == first.labels.fixed
        else:
            same = is_within(fit, first) and is_within(first, fit)
        if not same:
            raise ValueError(
                f"{names[0]} and {name} have different fixed effects, so their REML criteria cannot be compared: use "
                "refit='ml', which compares the models by maximum likelihood"
            )
    offsets = [logdet_X(first) - logdet_X(fit) for fit in records]
    if max(map(abs, offsets)) <= 1e-9 * max(1.0, abs(logdet_X(first))):
        return criteria
    notes.append(
        f"fixed effects are coded differently: REML criteria are brought to the columns of {names[0]}, and differ from "
        "those of the fits by a constant"
    )
    return [criterion + offset for criterion, offset in zip(criteria, offsets, strict=True)]


def _fit_statistics(records: Sequence[AnyFitted], names: list[str], criteria: list[float]) -> pd.DataFrame:
    npar, criterion = np.array([fit.npar for fit in records]), np.array(criteria)
    columns = {
        "npar": npar,
        "aic": criterion + 2 * npar,
        "bic": criterion + np.log(records[0].nobs) * npar,
        "loglik": -criterion / 2,
        "deviance": criterion,
    }
    return pd.DataFrame(columns, index=names)


# --- one pair --------------------------------------------------------------------------------------------------------


def _test(pair: _Pair, method: str, notes: list[str]) -> tuple[dict[str, float], bool]:
    """Statistic, degrees of freedom and p-values, the bootstrap's aside, and whether the models are known to be nested.

    Notes and warnings as needed.
    """
    p = float(chi2_tail(pair.statistic, pair.df)) if pair.df > 0 else np.nan
    test = {"chisq": pair.statistic, "df": float(pair.df), "p_value": p, "p_mixture": np.nan}
    if not _has_rows(pair):
        notes.append(f"{pair}: rows were not kept, so whether one model is a special case of the other is not known")
        return test, False
    place = place_of(pair.small, pair.large)
    bound = "a variance to 0, its bound"
    faults = [] if pair.df > 0 else ["one has no parameter more than the other"]
    faults += [] if is_within(pair.small, pair.large) else ["fixed effects"]
    faults += [] if place.nested else ["random effects"]
    faults += [] if are_kernels_within(pair.small, pair.large) else ["correlations by distance"]
    if isinstance(pair.small, Fitted) and isinstance(pair.large, Fitted):
        faults += [] if are_residuals_within(pair.small, pair.large) else ["residuals"]
        if place.zeros is not None and residual_bounds(pair.small, pair.large):
            bound = f"{'a variance and ' * bool(place.zeros)}a correlation of residuals to 0, its bound"
            place = place._replace(zeros=place.zeros + 1)
    bounds: Bounds | None = None
    if isinstance(pair.small, GeneralizedFitted) and isinstance(pair.large, GeneralizedFitted):
        bounds = bounds_of(pair.small.family, pair.large.family)
        faults += ["family"] * (bounds is None)
        within = are_formulas_within(pair.small, pair.large)
        faults += [] if within else ["dispformula or ziformula"]
    if faults:
        warn(
            f"{pair.smaller} is not a special case of {pair.larger} ({', '.join(faults)}): a likelihood ratio test "
            "does not apply; compare by aic or bic",
            InferenceWarning,
        )
        notes.append(f"{pair}: not nested ({', '.join(faults)}): the test does not apply")
        return test | {"p_value": np.nan}, False
    if pair.difference < -1e-6:
        notes.append(f"{pair}: the larger model has the larger deviance; a search ended in a local minimum")
    if bounds and any(bounds) and place.zeros is not None:
        bound = f"{bounds} to 0, its bound"
        widths = pair.large.rows.psi_widths  # type: ignore[union-attr]
        more = widths[-1] * bounds.zeros + widths[0] * bounds.size
        place = place._replace(zeros=place.zeros + more)
    reason = _no_mixture(pair, place)
    if reason:
        instead = "trust p_bootstrap" if method == "bootstrap" else "method='bootstrap' gives a p-value"
        notes.append(f"{pair}: {reason}; p_value is a guide only and no mixture of chi-squares is known: {instead}")
        if method == "mixture":
            warn(f"{pair}: no mixture of chi-squares is known: {reason}", InferenceWarning)
    elif place.zeros:
        notes.append(
            f"{pair}: {pair.smaller} puts {bound}, so p_value is too large; p_mixture is that of "
            f"1/2 chi2({pair.df - 1}) + 1/2 chi2({pair.df})"
        )
        test["p_mixture"] = mixture_p(pair.statistic, pair.df)
    elif method == "mixture":
        test["p_mixture"] = p
    return test, True


def _no_mixture(pair: _Pair, place: Place) -> str | None:
    """Why the weights of a mixture are not known, or None."""
    if free := free_kernels(pair.small, pair.large):
        return f"the range of {' and of '.join(map(repr, free))} means nothing where {pair.smaller} holds"
    others = {term.group for term in pair.small.labels.terms}
    added = [term.group for term in pair.large.labels.terms if term.smooth and term.group not in others]
    if added:
        return f"{added[0]} has one level, and no limit of many; exact_rlrt() is exact where it is alone"
    if place.zeros is None:
        return "the larger model can write the same covariance in several ways"
    if place.zeros > 1:
        of_family = isinstance(pair.large, GeneralizedFitted) and pair.large.family.n_psi > pair.small.family.n_psi  # type: ignore[union-attr]
        what = "parameters, or coefficients of their formulas," if of_family else "standard deviations"
        return f"{pair.smaller} puts {place.zeros} {what} to 0, their bound"
    # For fixed effects alone it does not matter in a linear model: the information on them and on variances is
    # orthogonal.
    other = pair.large.npar - len(pair.large.labels.fixed) > pair.small.npar - len(pair.small.labels.fixed)
    other = other or isinstance(pair.small, GeneralizedFitted)
    if pair.small.estimates.singular and other:
        return f"the fit of {pair.smaller} is singular"
    return None


def mixture_p(statistic: float, df: int) -> float:
    """Upper tail of ``1/2 chi2(df - 1) + 1/2 chi2(df)``; chi2(0) is the constant 0, so 1 at a statistic of 0.

    Under the null one standard deviation of the larger model is 0 and may only grow: in the limit parameters beyond
    the null lie in a half-space.
    """
    if statistic <= 0.0:
        return 1.0
    below = float(chi2_tail(statistic, df - 1)) if df > 1 else 0.0
    return 0.5 * below + 0.5 * float(chi2_tail(statistic, df))


def bootstrap_null(small: AnyFitted, large: AnyFitted, key: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Statistics under the smaller fit: responses are drawn from it and both models refitted by its criterion.

    Of Poisson counts a negative binomial size is at infinity in about every second sample. Its likelihood is the
    Poisson one there, so such replicates count; their code remains ``UNBOUNDED``.

    Args:
        small, large: fits by the same criterion, with rows.
        key: int or JAX key. n: replicates.

    Returns:
        Statistics of the replicates where both fits ended, 0 or more; and ``(n,)`` codes of ``mixjax.Result``, of the
        larger model's fit where the smaller's converged. :func:`notes_of_null` puts these into words.
    """
    constant = logdet_X(small) - logdet_X(large) if small.reml else 0.0
    data = [data_of_responses(fit) for fit in (small, large)]

    def draw(first: int, count: int) -> Drawn:
        Y = small.simulate(key, count, first)
        return Drawn(tuple(own(Y) for own in data))

    found: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    what = "likelihood ratios: refitting both models to"
    for _, (a, b) in refits(Source(draw, 2 * small.nobs), n, ("criterion", "result"), small.reml, what=what):
        ended = at_limit(small, large, b.result)
        # What the smaller model's fit says of its own response is no limit.
        lost = np.where(a.result == Result.UNBOUNDED, int(Result.STALLED), a.result)
        codes.append(np.asarray(np.where(failed(a.result), lost, b.result)))
        difference = a.criterion - b.criterion - constant
        found.append(np.maximum(difference, 0.0)[~failed(a.result) & (~failed(b.result) | ended)])
    return np.concatenate(found), np.concatenate(codes)


def at_limit(small: AnyFitted, large: AnyFitted, codes: np.ndarray) -> np.ndarray:
    """``(n,)`` whether the larger model's fits with these codes ended at the smaller one's family."""
    generalised = isinstance(small, GeneralizedFitted) and isinstance(large, GeneralizedFitted)
    limit = generalised and any(bounds_of(small.family, large.family) or ())  # type: ignore[union-attr]
    return np.asarray((codes == int(Result.UNBOUNDED)) & limit)


def notes_of_null(small: AnyFitted, large: AnyFitted, codes: np.ndarray) -> list[str]:
    """What there is to say of the replicates of :func:`bootstrap_null`."""
    ended = at_limit(small, large, codes)
    notes = []
    if ended.any():
        bounds = bounds_of(small.family, large.family)  # type: ignore[union-attr]
        size, zeros = "size is infinite, where counts are Poisson's", "there are no extra zeros"
        what = " or ".join([zeros] * bool(bounds and bounds.zeros) + [size] * bool(bounds and bounds.size))
        notes.append(f"in {int(ended.sum())} of {len(codes)} replicates {what}")
    if failures := note_of_failures(np.where(ended, int(Result.CONVERGED), codes)):
        notes.append(failures)
    return notes
