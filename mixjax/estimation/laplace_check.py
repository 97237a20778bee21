"""How wrong Laplace's approximation is, at its own estimates.

With one grouping factor the likelihood is integrated by quadrature. With several it is estimated by importance
sampling: effects are drawn from a t distribution around the modes with the observed curvature, antithetically, and
weighted by the joint density over the proposal's (Durbin & Koopman 1997, Biometrika 84; Shephard & Pitt 1997,
Biometrika 84). In ``b = Lambda u``, ``u = Lambda'g + y`` and ``t_j = z_j'Lambda y``, a weight over Laplace's likelihood
is ``exp(-sum_j [c_j(eta_j + t_j) - c_j - c1_j t_j] - |y|^2 / 2)`` over the proposal's density times ``(2 pi)^{d/2}
det(I + Lambda'A Lambda)^{1/2}``. Deviations with covariance ``(I + Lambda'A Lambda)^{-1}`` come of a draw ``epsilon``
of the prior and one of noise ``nu = Z'W^{1/2}xi``: ``y = epsilon + Lambda'(r - A K r)``, ``r = nu - A Lambda epsilon``
(Papandreou & Yuille 2010, NIPS 23), so that no matrix of all effects is factored and a singular Lambda is nothing
special.

The mean score under these weights is the gradient of the likelihood itself; a Newton step from the optimum of Laplace's
approximation with it says how far estimates would move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import gammaln

from mixjax import covariance as cov
from mixjax.engine.effects import factor_of
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_effects import OneFactor
from mixjax.engine.quadrature import MOST_EFFECTS, check_nodes, product_rule
from mixjax.engine.quadrature_moments import added
from mixjax.estimation.glmm import GLMMEstimates, model_of
from mixjax.estimation.glmm_quadrature import Laplace, laplace_at, zero_roots
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows

# Nodes an effect of the check, and of the coarser rule that its error is judged by, by the number of effects.
NODES, COARSER = {1: 25, 2: 25, 3: 15}, {1: 15, 2: 15, 3: 9}
# Degrees of freedom of the proposal, at least; as many as there are effects beyond, for lengths of vectors of so many
# normal numbers vary little.
FREEDOM = 5
# Least effective part of the draws.
EFFECTIVE = 0.01
# Shift of an estimate, in standard errors, from which on Laplace's approximation is not enough.
WORTHWHILE = 0.1
# Numbers of rows times draws of one evaluation.
MOST_NUMBERS = 1_000_000


@dataclass(frozen=True)
class LaplaceCheck:
    """How wrong Laplace's approximation is at its estimates.

    Attributes:
        difference: log-likelihood less its approximation. NaN where too few draws count.
        error: of the difference: standard error of the draws; of quadrature, its change from a coarser rule.
        shifts: ``(p + s + k,)`` by which beta, psi and the coordinates of the covariances in the bases of the rows
            would move, by one Newton step, in standard errors; NaN of a coordinate that is zero.
        shift_errors: ``(p + s + k,)`` their standard errors; zero of quadrature.
        method: ``"quadrature"`` or ``"importance sampling"``. n: nodes an effect, or draws.
        effective: effective number of draws, the least of all levels; None of quadrature.
        names: of the shifts, or empty. has_quadrature: the model can be fitted by quadrature.
    """

    difference: float
    error: float
    shifts: np.ndarray
    shift_errors: np.ndarray
    method: str
    n: int
    effective: float | None = None
    names: tuple[str, ...] = ()
    has_quadrature: bool = True

    def named(self, names: Sequence[str]) -> LaplaceCheck:
        """The same with names of the shifts."""
        return replace(self, names=tuple(names))

    def __str__(self) -> str:
        if not np.isfinite(self.difference):
            effective = 0.0 if self.effective is None else self.effective
            return (
                f"Laplace's approximation could not be checked: of {self.n} draws only {effective:.0f} count. The "
                "effects are too many or too far from normal for importance sampling; draw more (n=)"
            )
        of = (
            f"{self.n} nodes an effect" if self.effective is None else f"{self.n} draws, {self.effective:.0f} effective"
        )
        lines = [f"log-likelihood less Laplace's approximation: {self.difference:+.4f} (error {self.error:.1g}; "
                 f"{self.method}, {of})"]  # fmt: skip
        if not np.isfinite(self.shifts).any():
            return lines[0]
        worst = int(np.nanargmax(np.abs(self.shifts)))
        name = self.names[worst] if self.names else f"parameter {worst + 1}"
        lines.append(f"largest shift of an estimate: {self.shifts[worst]:+.2f} standard errors, of {name}")
        if abs(self.shifts[worst]) < WORTHWHILE:
            lines.append("Laplace's approximation does for these data")
        elif self.has_quadrature:
            lines.append("fit by quadrature: nagq=9 or more")
        else:
            lines.append(
                "there is no quadrature for these grouping factors: read the estimates with the shifts in mind, or fit "
                "with one grouping factor and nagq=9"
            )
        return "\n".join(lines)


def laplace_check(
    rows: FamilyRows, estimates: GLMMEstimates, key: int = 0, nagq: int | None = None, n: int | None = None
) -> LaplaceCheck:
    """How wrong Laplace's approximation is at its estimates.

    Args:
        rows: of one response. estimates: by Laplace's approximation, with the observed curvature.
        key: of the draws. nagq: nodes an effect, None for 25, of three effects a level 15; where there is one grouping
            factor with up to three effects a level.
        n: draws, an even number. Given, importance sampling is used in any case; None is 10 000 where there is no
            quadrature.

    Raises:
        ValueError: an odd number of draws, or none; no quadrature of so many nodes.
    """
    if n is not None and (n < 2 or n % 2):
        raise ValueError(f"n must be an even number of draws, they are made in pairs; got {n!r}")
    if nagq is not None:
        check_nodes(nagq, rows)
    with silently():
        model = model_of(rows)
        structures = rows.layout.structures
        lambdas = cov.lambdas_of_theta(np.asarray(estimates.theta, np.float64), rows.layout.qs)
        x = cov.near([(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)], structures)
        fixed = rows.fixed_in_bases(estimates.beta, estimates.psi)[:, None]
        at = laplace_at(model, fixed, x, np.zeros((*model.effects.effect_shape, 1)))
        q = rows.Z[0].shape[1]
        possible = len(rows.levels) == 1 and q <= MOST_EFFECTS
        if n is None and possible:
            nodes = NODES[q] if nagq is None else nagq
            value, gradient = added(model, product_rule(nodes, q), fixed, x, at.modes.b)
            coarse, _ = added(model, product_rule(min(COARSER[q], max(1, nodes - 2)), q), fixed, x, at.modes.b)
            zero = np.zeros(len(gradient))
            difference, error = -0.5 * float(value[0]), 0.5 * abs(float(value[0] - coarse[0]))
            shifts, _ = _shifts(rows, model, at, x, gradient[:, 0], zero)
            return LaplaceCheck(difference, error, shifts, zero, "quadrature", nodes)
        draws = 10_000 if n is None else n
        difference, error, effective, score, deviations = sampled(model, fixed, x, at, draws, key)
        shifts, errors = _shifts(rows, model, at, x, score - at.gradient, deviations)
        if effective < EFFECTIVE * draws:
            difference = error = np.nan
            shifts = errors = np.full(len(score), np.nan)
        return LaplaceCheck(difference, error, shifts, errors, "importance sampling", draws, effective, (), possible)


def _shifts(
    rows: FamilyRows, model: Model, at: Laplace, x: np.ndarray, gradient: np.ndarray, deviations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A Newton step with the gradient that Laplace's approximation lacks, in standard errors, for the user's columns;
    and its standard errors, of independent ones of the gradient."""
    n = model.n_fixed
    free = ~np.concatenate([np.zeros(n, bool), zero_roots(x, model.layout)[:, 0]])
    to_user = np.eye(len(gradient))
    to_user[:n, :n] = rows.fixed_change
    inverse = np.zeros_like(at.Hessian)
    inverse[np.ix_(free, free)] = np.linalg.inv(at.Hessian[np.ix_(free, free)])
    of_gradient = to_user @ inverse
    se = np.sqrt(2.0 * (of_gradient @ to_user.T).diagonal())
    se = np.where(se > 0, se, np.nan)
    return -(of_gradient @ gradient) / se, np.sqrt(of_gradient**2 @ deviations**2) / se


# --- importance sampling ----------------------------------------------------------------------------------------------


def _times_root(model: Model, lambdas: list[Any], values: np.ndarray, transpose: bool = False) -> np.ndarray:
    """``Lambda e`` or ``Lambda'v`` of effects ``(T, *effects, 1)``."""
    effects: Any = model.effects
    if isinstance(effects, OneFactor):
        Lambda = factor_of(lambdas, effects.layout, 0)[..., 0]
        return np.asarray(np.einsum("ba,tbmx->tamx" if transpose else "ab,tbmx->tamx", Lambda, values))
    found = np.empty_like(values)
    for f in {place.factor for place in effects.layout.terms}:
        Lambda = factor_of(lambdas, effects.layout, f)[..., 0]
        begin, m = effects.place_of(f)
        part = slice(begin, begin + len(Lambda) * m)
        own = values[:, part, 0].reshape(len(values), len(Lambda), m)
        found[:, part, 0] = np.einsum("ba,tbm->tam" if transpose else "ab,tbm->tam", Lambda, own).reshape(
            len(values), -1
        )
    return found


def _by_unit(model: Model, values: np.ndarray) -> np.ndarray:
    """Rows ``(T, *rows, 1)`` -> sums over independent units ``(T, units)``: levels of one factor, else all rows."""
    effects: Any = model.effects
    return np.asarray(effects.by_level(values)[..., 0] if isinstance(effects, OneFactor) else values.sum(-2))


def _scores(model: Model, x: np.ndarray, slope: np.ndarray, by_psi: list[np.ndarray], u: np.ndarray) -> np.ndarray:
    """Derivatives of -2 log of the joint density of rows and u by fixed and x, ``(T, units, p + s + k)``, where ``b =
    Lambda u``; ``slope (T, *rows, 1)`` are those of rows by eta."""
    effects: Any = model.effects
    parts = [_by_unit(model, slope * column) for column in model.data.X]
    parts += [_by_unit(model, np.broadcast_to(own, slope.shape)) for own in by_psi]
    pull = effects.effects(slope)  # Z'c1
    coordinates = cov.cut(x, model.layout.structures)
    for structure, place, own in zip(model.layout.structures, model.layout.terms, coordinates, strict=True):
        if isinstance(effects, OneFactor):
            part = slice(place.start, place.start + place.q)
            g, v = pull[:, part, :, 0], u[:, part, :, 0]
            products = np.einsum("tam,tbm->tmab", g, v)
        else:
            begin, m = effects.place_of(place.factor)
            part = slice(begin + place.start * m, begin + (place.start + place.q) * m)
            g, v = (values[:, part, 0].reshape(len(u), place.q, m) for values in (pull, u))
            products = np.einsum("tam,tbm->tab", g, v)[:, None]
        parts += [(products * slope[..., 0]).sum((-1, -2)) for slope in structure.slopes(own)]
    return np.asarray(2.0 * np.stack(parts, -1))


def sampled(
    model: Model, fixed: np.ndarray, x: np.ndarray, at: Laplace, n: int, key: int
) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """The difference of the log-likelihood, its standard error, the effective number of draws, and the gradient of -2
    log-likelihood ``(p + s + k,)`` with its standard errors, by n draws."""
    effects: Any = model.effects
    rng = np.random.default_rng(key)
    lambdas = cov.factors_of(x, model.layout.structures)
    psi = fixed[model.p :]
    eta = model.predictor(fixed, at.modes.b)
    base = model.derivatives(eta, psi)
    c, c1, c2 = base.by_eta[:3]
    straight = np.maximum(c2, 0.0)
    gain = effects.gain(lambdas, effects.normal(straight))
    bent = 0.0
    if (c2 < 0.0).any():
        bent = 0.5 * float(effects.gain(lambdas, effects.normal(c2)).logdet[0] - gain.logdet[0])
    root = np.sqrt(straight)
    mode = _times_root(model, lambdas, -effects.effects(c1)[None], transpose=True)
    one = isinstance(effects, OneFactor)
    units = effects.effect_shape[-1] if one else 1
    d = effects.effect_shape[0]
    freedom = max(FREEDOM, d)
    constant = gammaln(0.5 * (freedom + d)) - gammaln(0.5 * freedom) - 0.5 * d * np.log(0.5 * freedom)

    sums: list[Any] = []
    top = np.full(units, -np.inf)
    pairs, chunk = n // 2, max(1, MOST_NUMBERS // (2 * int(np.prod(eta.shape))))
    for first in range(0, pairs, chunk):
        T = min(chunk, pairs - first)
        epsilon = rng.standard_normal((T, *effects.effect_shape, 1))
        xi = rng.standard_normal((T, *eta.shape))
        r = effects.effects(root * xi) - gain.times_A(_times_root(model, lambdas, epsilon))
        y = epsilon + _times_root(model, lambdas, r - gain.times_A(gain.solve(r)), transpose=True)
        stretch = np.sqrt(freedom / rng.chisquare(freedom, (T, units)))
        y = y * (stretch[:, None, :, None] if one else stretch[:, None])
        t = effects.rows(_times_root(model, lambdas, y))
        square = (y**2).sum(-3)[..., 0] if one else (y**2).sum(-2)
        length = square + _by_unit(model, straight * t**2)
        proposal = constant - 0.5 * (freedom + d) * np.log1p(length / freedom)
        logs, scores = [], []
        for sign in (1.0, -1.0):
            there = model.derivatives(eta + sign * t, psi)
            logs.append(-_by_unit(model, there.by_eta[0] - c - sign * t * c1) - 0.5 * square - proposal)
            of_psi = [own[0] for own in there.by_psi]
            scores.append(_scores(model, x, there.by_eta[1], of_psi, mode + sign * y))
        logs = [np.where(np.isfinite(log), log, -np.inf) for log in logs]
        new = np.maximum(top, np.maximum(*logs).max(0))
        weights = [np.exp(log - new) for log in logs]
        W = 0.5 * (weights[0] + weights[1])
        weighted = [
            np.where(w[..., None] > 0, w[..., None] * score, 0.0) for w, score in zip(weights, scores, strict=True)
        ]
        WS = 0.5 * (weighted[0] + weighted[1])
        # The last entry is of single draws, for how many count.
        own_sums = [W.sum(0), (W**2).sum(0), WS.sum(0), (WS**2).sum(0), (W[..., None] * WS).sum(0),
                    0.25 * (weights[0] ** 2 + weights[1] ** 2).sum(0)]  # fmt: skip
        scale = np.exp(top - new)
        powers = [scale, scale**2, scale[:, None], scale[:, None] ** 2, scale[:, None] ** 2, scale**2]
        sums = [a * power + b for a, power, b in zip(sums, powers, own_sums, strict=True)] if sums else own_sums
        top = new
    S, SS, SV, SVV, SWV, single = sums
    mean = SV / S[:, None]
    difference = float((top + np.log(S / pairs)).sum()) + bent
    error = float(np.sqrt(np.maximum(SS / S**2 - 1.0 / pairs, 0.0).sum()))
    spread = np.maximum(SVV - 2.0 * mean * SWV + mean**2 * SS[:, None], 0.0)
    deviations = np.sqrt((spread / S[:, None] ** 2).sum(0))
    effective = float((S**2 / single).min())
    return difference, error, effective, mean.sum(0), deviations
