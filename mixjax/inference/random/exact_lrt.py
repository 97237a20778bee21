"""Exact (restricted) likelihood ratio tests of one variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import linalg as dense

from mixjax.checks import check_count
from mixjax.covariance.structures import HomogeneousDiagonal
from mixjax.fitted.record import Fitted, record_of
from mixjax.formula.build import read_formula
from mixjax.formula.context import caller_context
from mixjax.formula.evaluate import columns_of
from mixjax.inference.random.nesting import check_same_data, in_span, is_within, logdet_X, place_of
from mixjax.inference.random.spectral import Spectrum, draw, exact_p, spectrum
from mixjax.markup import Report, Reported
from mixjax.products.sums import CrossProducts


@dataclass(frozen=True)
class ExactTest(Reported):
    """A likelihood ratio test of one variance, with the null distribution that belongs to the design.

    Attributes:
        method: name of the test. alternative, null: the two models, in words.
        statistic: difference of the criteria (of -2 log-likelihood, restricted or not); 0 or more.
        p_value: probability of a statistic as large under the null; 1 where the statistic is 0.
        mc_error: its Monte Carlo standard error; 0 where the p-value has a closed form.
        n: number of draws. null_draws: ``(n,)``, draws of the statistic under the null.
        notes: what to know about the numbers.

    ``str()`` gives a report, :meth:`quantile` critical values.
    """

    method: str
    alternative: str
    null: str
    statistic: float
    p_value: float
    mc_error: float
    n: int
    null_draws: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()

    def quantile(self, probability: Any) -> Any:
        """Quantiles of the null distribution, from the draws."""
        return np.quantile(self.null_draws, probability)

    @property
    def zero_share(self) -> float:
        """Share of the draws that are 0: how often the variance is estimated as zero where it is."""
        return float(np.mean(self.null_draws == 0.0))

    def __str__(self) -> str:
        return "\n".join([*self._lines(), *self.notes])

    __repr__ = __str__

    def _report(self) -> Report:
        return Report(self._lines(), self.notes)

    def _lines(self) -> list[str]:
        error = f" (Monte Carlo standard error {self.mc_error:.1g})" if self.mc_error else ""
        return [
            self.method,
            f"alternative: {self.alternative}",
            f"null: {self.null}",
            f"statistic = {self.statistic:.5g}, p = {self.p_value:.4g}{error}",
        ]


def exact_rlrt(m: Any, m0: Any = None, mA: Any = None, key: Any = 0, n: int = 100_000) -> ExactTest:
    """Exact restricted likelihood ratio test that the one variance of a model is zero.

    The null is ordinary (weighted) least squares with the same fixed effects. The statistic's distribution under it
    depends on the design alone and is drawn by spectral simulation (Crainiceanu & Ruppert 2004, J. R. Stat. Soc. B 66,
    165); where only one eigenvalue is not zero, as in balanced one-way designs, the p-value is that of an F test and
    has no Monte Carlo error.

    With further random effects the test is approximate: the statistic compares ``mA`` with ``m0``, and the null
    distribution is that of ``m``, as if the others were known (Greven et al. 2008, J. Comput. Graph. Stat. 17, 870).

    Args:
        m: fit with one random term of one effect, such as ``(1 | g)`` or ``(0 + x | g)``: the tested one.
        m0: the model without the tested effect; only together with ``mA``.
        mA: the model with all effects, the tested one uncorrelated with the others.
        key: int or JAX key.
        n: number of draws. The draws for a larger n begin with those for a smaller one.

    Returns:
        :class:`ExactTest`. Where there are Monte Carlo errors, ``p = (1 + draws as large) / (1 + n)``.

    Raises:
        ValueError: m has more than one random effect; the three fits do not belong together.

    Fits by maximum likelihood are refitted by REML, and a note says so.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.exact_lrt import exact_rlrt
        >>> test = exact_rlrt(mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff")))
        >>> round(test.statistic, 3), round(test.p_value, 4), test.mc_error
        (6.369, 0.0044, 0.0)
    """
    n = check_count("n", n, 1)
    if (m0 is None) != (mA is None):
        raise ValueError(
            "m0 and mA belong together: m has the tested effect alone, m0 all others, mA all of them; leave out both "
            "where there are no others"
        )
    fits = [_without_own_residuals(fit) for fit in (m, m0, mA) if fit is not None]
    names = ("m", "m0", "mA")[: len(fits)]
    _check_one_effect(fits[0])
    check_same_data(fits, names)
    fits, notes = _by(True, fits, names)
    of = spectrum(fits[0].stats, True)
    tested = _term(fits[0])
    if len(fits) == 1:
        statistic = least_squares_criterion(fits[0].stats, True) - float(fits[0].estimates.criterion)
        null = f"no random effects: the variance of {tested} is 0"
        return _judged("Exact restricted likelihood ratio test", fits[0], null, statistic, of, key, n, notes)
    _check_belong_together(*fits)
    small, large = fits[1:]
    statistic = float(small.estimates.criterion - large.estimates.criterion) - logdet_X(small) + logdet_X(large)
    notes.append("approximate: the null distribution is that of the tested effect alone")
    method = "Approximate restricted likelihood ratio test"
    return _judged(method, large, f"the variance of {tested} is 0", statistic, of, key, n, notes)


def exact_lrt(m: Any, m0: str | None = None, key: Any = 0, n: int = 100_000) -> ExactTest:
    """Exact likelihood ratio test that the one variance of a model is zero, and fixed effects too if so wanted.

    As :func:`exact_rlrt`, for the criterion of maximum likelihood. For the variance alone prefer the restricted test:
    its statistic is less often zero. This one can test fixed effects and the variance at once.

    Args:
        m: fit with one random term of one effect.
        m0: formula of the null, ordinary regression with some of the fixed effects of m, such as ``"Reaction ~ 1"``;
            None for all of them. Weights and offset are those of m.
        key: int or JAX key.
        n: number of draws.

    Returns:
        :class:`ExactTest`.

    Raises:
        ValueError: m has more than one random effect; the fixed effects of m0 do not lie in the span of m's.

    A fit by REML is refitted by maximum likelihood, and a note says so.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.random.exact_lrt import exact_lrt
        >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"), reml=False)
        >>> test = exact_lrt(fit, "Reaction ~ 1", n=1000)
        >>> round(test.statistic, 2), test.p_value < 0.01
        (166.97, True)
    """
    n = check_count("n", n, 1)
    fits = [_without_own_residuals(m)]
    _check_one_effect(fits[0])
    (fit,), notes = _by(False, fits, ("m",))
    null = f"no random effects: the variance of {_term(fit)} is 0"
    zero = np.zeros((0, len(fit.labels.fixed)))
    if m0 is not None:
        zero = _zero_in(fit, m0)
        null = f"{m0}, no random effects" if len(zero) else null
    statistic = least_squares_criterion(fit.stats, False, zero) - float(fit.estimates.criterion)
    of = spectrum(fit.stats, False, len(zero))
    return _judged("Exact likelihood ratio test", fit, null, statistic, of, key, n, notes)


def least_squares_criterion(products: CrossProducts, reml: bool, zero: np.ndarray | None = None) -> float:
    """The criterion of the model without random effects, on the scale of ``Estimates.criterion``, from cross-products.

    Args:
        products: of the model with random effects.
        reml: the REML criterion, else the ML deviance.
        zero: ``(r, p)``, r independent combinations of the fixed effects that are held at 0 (ML only).
    """
    XX, Xy = np.asarray(products.XX, np.float64), np.asarray(products.Xy, np.float64)
    n, p = float(products.n), len(Xy)
    delta = dense.solve(XX, Xy, assume_a="pos") if p else Xy
    rss = float(products.yy - Xy @ delta)
    if zero is not None and len(zero):
        estimates = zero @ (products.beta0 + products.X_basis.R_inv @ delta)
        in_basis = zero @ products.X_basis.R_inv
        unscaled = in_basis @ dense.solve(XX, in_basis.T, assume_a="pos")
        rss += float(estimates @ dense.solve(unscaled, estimates, assume_a="pos"))
    df = n - p if reml else n
    criterion = df * (1.0 + np.log(2.0 * np.pi * rss / df)) - float(products.sum_log_weights)
    value: float = criterion + float(np.linalg.slogdet(XX)[1] + 2.0 * products.X_basis.logdet) * reml
    return value


def _judged(
    method: str, fit: Fitted, null: str, statistic: float, of: Spectrum, key: Any, n: int, notes: list[str]
) -> ExactTest:
    # Criteria are good to about this: below it a statistic is a zero.
    rounding = max(1e-8, 1e-12 * abs(float(fit.estimates.criterion)))
    draws = draw(of, key, n)
    closed = exact_p(of, max(statistic, rounding))
    if statistic <= rounding and not of.dropped:
        statistic, p, error = max(statistic, 0.0), 1.0, 0.0
        notes.append("the variance is estimated as 0: so is the statistic, and p is 1")
    elif closed is not None:
        p, error = closed, 0.0
        notes.append("the null distribution is a function of an F variable here, so p has no Monte Carlo error")
    else:
        p = (1 + np.count_nonzero(draws >= statistic - rounding)) / (1 + n)
        error = float(np.sqrt(p * (1.0 - p) / n))
    return ExactTest(method, fit.labels.formula, null, float(statistic), float(p), error, n, draws, tuple(notes))


def _by(reml: bool, fits: Sequence[Fitted], names: Sequence[str]) -> tuple[list[Fitted], list[str]]:
    """The fits by one criterion, refitted where needed, and notes of that and of fits that failed."""
    other = [name for fit, name in zip(fits, names, strict=True) if fit.reml != reml]
    done = [f if f.reml == reml else f.refitted(reml) for f in fits]
    wanted, had = ("REML", "maximum likelihood")[:: 1 if reml else -1]
    notes = [f"{', '.join(other)} fitted by {had}: refitted by {wanted}"] if other else []
    failed = [name for fit, name in zip(done, names, strict=True) if not fit.estimates.converged]
    if failed:
        notes.append(f"NOT CONVERGED: {', '.join(failed)}; no test with such a fit holds")
    return done, notes


def _term(fit: Fitted) -> str:
    (term,) = fit.labels.terms
    if term.smooth:
        return term.group
    effect = "1" if term.effects == ("Intercept",) else f"0 + {term.effects[0]}"
    return f"({effect} | {term.group})"


def _without_own_residuals(fit: Any) -> Fitted:
    record = record_of(fit)
    record.check_can("exact likelihood ratio tests")
    return record


def _check_one_effect(fit: Fitted) -> None:
    structures = fit.stats.layout.structures
    if len(structures) != 1 or not (structures[0].q == 1 or isinstance(structures[0], HomogeneousDiagonal)):
        effects = [f"{effect}|{term.group}" for term in fit.labels.terms for effect in term.effects]
        raise ValueError(
            f"m has the random effects {', '.join(effects)}; the exact test needs a model with one of them alone. For "
            "one of several, exact_rlrt(m, m0, mA) is approximate: m has the tested effect alone, m0 all others, mA "
            "all; else use compare(..., method='bootstrap')"
        )


def _check_belong_together(m: Fitted, m0: Fitted, mA: Fitted) -> None:
    """That ``mA`` adds one uncorrelated effect to m0, the one that m has alone."""
    for name, fit in {"m": m, "m0": m0}.items():
        if not (is_within(fit, mA) and is_within(mA, fit)):
            raise ValueError(f"{name} and mA have different fixed effects; a restricted test needs the same in all")
        if not place_of(fit, mA).nested:
            raise ValueError(f"the random effects of {name} are not among those of mA: {name} must be mA less some")
    if place_of(m, m0).nested:
        raise ValueError(f"m0 has the tested effect {_term(m)}; it must have all others")
    more = mA.stats.layout.k - m0.stats.layout.k
    if more != 1:
        raise ValueError(
            f"mA has {more} covariance parameters more than m0; the tested effect must add one, its variance: write it "
            "as a term of its own, such as (1 | g) + (0 + x | g), without correlations"
        )


def _zero_in(fit: Fitted, m0: Any) -> np.ndarray:
    """``(r, p)``, independent combinations of the fixed effects that are 0 under the formula of a smaller model."""
    if fit.kept is None or fit.labels.frame is None:
        raise ValueError("m0 needs the rows of m, which a fit from chunks does not keep; fit the table instead")
    if not isinstance(m0, str):
        raise ValueError(f"m0 must be the formula of a regression such as 'y ~ 1', or None, got {type(m0).__name__}")
    state, columns = fit.labels.state, list(map(str, fit.labels.frame.columns))
    null, context = read_formula(m0, columns, {**caller_context(), **state.context.own}, state.context.trusted)
    if null.random:
        raise ValueError(f"m0 is ordinary regression here: leave the random terms out of {m0!r}")
    if null.response.shown != state.parsed.response.shown:
        raise ValueError(f"the response of m0 is '{null.response}', that of m is '{state.parsed.response}'")
    if null.offsets not in ((), state.parsed.offsets):
        raise ValueError(f"the offset of m0 must be that of m: leave offset() out of {m0!r}")
    X0 = columns_of(null.fixed, fit.labels.frame, context)[0]
    R_inv = np.asarray(fit.stats.X_basis.R_inv, np.float64)
    X = np.asarray(fit.design.X, np.float64) @ R_inv
    if not in_span(X0, X):
        raise ValueError(f"the fixed effects of m0, {m0!r}, are not among those of m, or combinations of them")
    # In the basis of the products columns are orthonormal, so that what is zero is told from what is small.
    kept = np.linalg.lstsq(X, X0 / np.linalg.norm(X0, axis=0), rcond=None)[0]
    zero = dense.null_space(kept.T, rcond=1e-10) if X0.shape[1] else np.eye(X.shape[1])
    return np.linalg.solve(R_inv.T, zero).T
