"""Random effects of a generalised linear mixed model given its parameters: drawn, and integrated beyond Laplace.

At the modes the penalised log density has the curvature ``A + D^{-1}``, and Laplace's approximation takes the effects
for ``N(b, K)``, ``K = (A + D^{-1})^{-1}``. What it leaves out is, at a deviation d with ``t = Z d``, the remainder of
Taylor's formula, row by row:

    ``r = -(c(eta + t) - c - c1 t) + w t^2 / 2``

so that the likelihood is Laplace's times the mean of ``exp(sum r)`` over ``d ~ N(0, K)``, and the distribution of the
effects is that normal one times ``exp(sum r)``. Deviations come of a draw of the prior and one of noise
(:mod:`mixjax.estimation.laplace_check`): no matrix of all effects is factored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.engine.effects import factor_of
from mixjax.engine.laplace import Gathered, family_loglik, gathered_model, in_bases, modes_at
from mixjax.engine.laplace_model import Model
from mixjax.engine.quadrature import MOST_EFFECTS, log_sums, lower_root, product_rule, scales
from mixjax.machine import Array, jit
from mixjax.products.family_rows import FamilyRows

# Steps of elliptical slice sampling from a draw of the normal distribution at the modes, and angles tried in each.
STEPS, TRIES = 10, 60
# Nodes an effect where levels are integrated by quadrature, by the number of effects.
NODES = {1: 25, 2: 15, 3: 9}
# Draws of all effects by which the likelihood of several grouping factors is integrated, in pairs.
PAIRS = 400


@dataclass(frozen=True)
class FamilyTarget:
    """A generalised linear mixed model whose random effects are integrated out. A JAX pytree.

    Attributes:
        rows: of the model. nagq: quadrature nodes an effect; 1 is Laplace's approximation; static.
    """

    rows: FamilyRows
    nagq: int = 1


jax.tree_util.register_dataclass(FamilyTarget, data_fields=["rows"], meta_fields=["nagq"])


class Place(NamedTuple):
    """Parameters: per term a factor ``(q, q)`` of its covariance, of Z's own columns; ``beta (p,)``; ``psi (s,)``."""

    factors: list[Array]
    beta: Array
    psi: Array


class _AtModes(NamedTuple):
    """Attributes: fixed: ``(p + s, 1)``. b: ``(N, 1)`` modes. c, c1, w: of rows ``(n, 1)``."""

    model: Model
    lambdas: list[Array]
    fixed: Array
    b: Array
    eta: Array
    c: Array
    c1: Array
    w: Array
    gain: Any
    root: Any

    def remainder(self, d: Array) -> Array:
        """By unit, ``(m, 1)`` levels of one factor or ``(1, 1)``."""
        effects: Any = self.model.effects
        t = effects.rows(d)
        c = self.model.density(self.eta + t, self.fixed[self.model.p :])
        r = -(c - self.c - t * self.c1) + 0.5 * self.w * t * t
        found: Array = effects.units(jnp.where(jnp.isfinite(c), r, -jnp.inf))
        return found

    def deviation(self, key: Any) -> Array:
        """``(N, 1)`` drawn from ``N(0, K)``."""
        effects: Any = self.model.effects
        of_prior, of_noise = jax.random.split(key)
        epsilon = jax.random.normal(of_prior, (effects.n_effects,), self.eta.dtype)
        parts, start = [], 0
        for f in effects.order:
            q, m = effects.Z[f].shape[1], effects.levels[f]
            Lambda = factor_of(self.lambdas, effects.layout, f)[..., 0]
            parts.append((Lambda @ epsilon[start : start + q * m].reshape(q, m)).reshape(-1))
            start += q * m
        prior = jnp.concatenate(parts)[:, None]
        xi = jax.random.normal(of_noise, self.eta.shape, self.eta.dtype)
        r = effects.effects(jnp.sqrt(self.w) * xi) - self.gain.times_A(prior)
        found: Array = prior + self.gain.solve(r)
        return found


def _at_modes(place: Place, rows: FamilyRows) -> _AtModes:
    model = gathered_model(rows)
    point = in_bases(place.beta, place.psi, place.factors, rows)
    b = modes_at(point, rows)
    fixed, lambdas = point.fixed[:, None], [L[..., None] for L in point.lambdas]
    eta = model.predictor(fixed, b)
    c, c1, c2 = model.derivatives(eta, fixed[model.p :]).by_eta[:3]
    w = jnp.maximum(c2, 0.0)
    effects: Any = model.effects
    gain = effects.gain(lambdas, effects.normal(w))
    # Where densities are not concave the determinant of Laplace's approximation has c2 itself.
    root = None if model.family.log_concave else effects.gain(lambdas, effects.normal(c2)).logdet
    return _AtModes(model, lambdas, fixed, b, eta, c, c1, w, gain, root)


def _effects(place: Place, key: Any, rows: FamilyRows) -> list[Array]:
    """Per term ``(n_groups, q)`` random effects drawn given everything else, by elliptical slice sampling (Murray,
    Adams & MacKay 2010, AISTATS 9, 541) from a draw of the normal distribution at the modes: every step leaves the
    distribution as it is, and is independent of the step before where it is normal. Levels of one factor have angles of
    their own."""
    at = _at_modes(place, rows)
    effects: Any = at.model.effects
    start, *keys = jax.random.split(key, STEPS + 1)

    def step(state: tuple[Array, Array], key: Any) -> tuple[tuple[Array, Array], None]:
        d, r = state
        of_other, of_level, of_angle, of_tries = jax.random.split(key, 4)
        other = at.deviation(of_other)
        least = r + jnp.log(jax.random.uniform(of_level, r.shape, r.dtype))
        angle = 2.0 * np.pi * jax.random.uniform(of_angle, r.shape, r.dtype)

        def moved(angle: Array) -> Array:
            return effects.of_units(jnp.cos(angle)) * d + effects.of_units(jnp.sin(angle)) * other

        def shrink(state: Any) -> Any:
            angle, low, high, _, i = state
            found = at.remainder(moved(angle))
            inside = found > least
            low = jnp.where(~inside & (angle < 0), angle, low)
            high = jnp.where(~inside & (angle >= 0), angle, high)
            u = jax.random.uniform(jax.random.fold_in(of_tries, i), r.shape, r.dtype)
            return jnp.where(inside, angle, low + u * (high - low)), low, high, inside, i + 1

        begin = (angle, angle - 2.0 * np.pi, angle, jnp.zeros(r.shape, bool), 0)
        angle, _, _, inside, _ = jax.lax.while_loop(lambda s: ~s[3].all() & (s[4] < TRIES), shrink, begin)
        # An interval that has shrunk to nothing is where the step began.
        d = moved(jnp.where(inside, angle, 0.0))
        return (d, at.remainder(d)), None

    d = at.deviation(start)
    # A start where a density is not finite would never be left.
    r = at.remainder(d)
    d = jnp.where(effects.of_units(jnp.isfinite(r)), d, 0.0)
    (d, _), _ = jax.lax.scan(step, (d, at.remainder(d)), jnp.stack(keys))
    return _by_term(at.b + d, effects, rows)


def _by_term(b: Array, effects: Gathered, rows: FamilyRows) -> list[Array]:
    parts, start = {}, 0
    for f in effects.order:
        q, m = effects.Z[f].shape[1], effects.levels[f]
        parts[f] = b[start : start + q * m, 0].reshape(q, m)
        start += q * m
    return [
        (basis.R_inv @ parts[place.factor][place.start : place.start + place.q]).T
        for place, basis in zip(rows.layout.terms, rows.Z_bases, strict=True)
    ]


@jit
def effects_at(places: Place, keys: Any, rows: FamilyRows) -> list[Array]:
    """Per term ``(S, n_groups, q)`` random effects drawn at each of S places."""
    return jax.vmap(lambda place, key: _effects(place, key, rows))(places, keys)


def has_quadrature(rows: FamilyRows) -> bool:
    """One grouping factor with few effects a level."""
    return len(rows.levels) == 1 and rows.Z[0].shape[1] <= MOST_EFFECTS


class Missing(NamedTuple):
    """What Laplace's approximation leaves out of the log-likelihood ``(S,)``, and the standard error of its draws, zero
    of quadrature."""

    difference: Array
    error: Array


@partial(jit, static_argnames=("quadrature",))
def left_out(places: Place, key: Any, rows: FamilyRows, quadrature: bool) -> Missing:
    """The log-likelihood less Laplace's approximation at each of S places.

    Args:
        quadrature: where the rows have it; False: by draws of all effects, the same random numbers at every place.
    """
    if quadrature:
        nodes = NODES[rows.Z[0].shape[1]]

        def exact(place: Place) -> Missing:
            better = family_loglik(place.factors, place.beta, place.psi, rows, nodes)
            return Missing(better - family_loglik(place.factors, place.beta, place.psi, rows), jnp.zeros(()))

        return Missing(*jax.lax.map(exact, places))
    keys = jax.random.split(key, PAIRS)

    def drawn(place: Place) -> Missing:
        at = _at_modes(place, rows)

        def both(key: Any) -> Array:
            d = at.deviation(key)
            return jnp.logaddexp(at.remainder(d).sum(), at.remainder(-d).sum()) - np.log(2.0)

        logs = jax.lax.map(both, keys)
        mean = jax.nn.logsumexp(logs) - np.log(PAIRS)
        error = jnp.sqrt(jnp.mean((jnp.exp(logs - mean) - 1.0) ** 2) / PAIRS)
        bent = 0.0 if at.root is None else 0.5 * (at.root - at.gain.logdet).sum()
        return Missing(mean + bent, error)

    return Missing(*jax.lax.map(drawn, places))


@partial(jit, static_argnames=("nagq",))
def log_densities_by_level(places: Place, rows: FamilyRows, nagq: int) -> Array:
    """``(S, m)`` log densities of the rows of every level of the only grouping factor, random effects integrated out by
    quadrature of ``nagq`` nodes an effect, 1 for Laplace's approximation."""

    def one(place: Place) -> Array:
        model = gathered_model(rows)
        point = in_bases(place.beta, place.psi, place.factors, rows)
        b = modes_at(point, rows)
        fixed, lambdas = point.fixed[:, None], [L[..., None] for L in point.lambdas]
        eta = model.predictor(fixed, b)
        at = model.derivatives(eta, fixed[model.p :])
        effects: Any = model.effects
        g = -effects.effects(at.by_eta[1])
        A = effects.normal(at.by_eta[2]).first
        Lambda = factor_of(lambdas, model.layout, 0)
        logdets = linalg.gain(Lambda[..., 0], A)[1]
        penalty = effects.unit_dots(g, effects.times_D(lambdas, g))[:, 0]
        found = -effects.units(at.by_eta[0])[:, 0] - 0.5 * (penalty + logdets)
        if nagq == 1:
            return found
        F = factor_of([lower_root(L[..., None]) for L in point.lambdas], model.layout, 0)
        rule = product_rule(nagq, len(F))
        more = log_sums(model, rule, scales(F, A[..., None]).C, eta, at, fixed[model.p :])
        return found + more[:, 0]

    return jax.lax.map(one, places)


@jit
def density_of_rows(eta: Array, psi: Any, rows: FamilyRows) -> Array:
    """Log density of every row ``(n,)``, times its case weight, at predictors ``(n,)`` and parameters by row."""
    found = -rows.family.density(eta, rows.y, rows.size, psi)
    return found if rows.weights is None else found * rows.weights
