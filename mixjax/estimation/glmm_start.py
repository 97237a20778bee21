"""Where a fit of a generalised linear mixed model starts: the model without random effects, variances from scores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.covariance import pairs_of, stack_of
from mixjax.engine.block_effects import Crossed
from mixjax.engine.effects import orders_of
from mixjax.engine.laplace_fit import LONGEST, curvature_of_psi, cut
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_effects import OneFactor
from mixjax.families.links import LINEAR, mean_derivatives
from mixjax.machine import Array, namespace
from mixjax.optimise.newton import where
from mixjax.products.family_rows import POSITIVE

# Scoring steps of the model without random effects; fewer of binomial ones, whose first is the better one.
STEPS, STEPS_FROM_SHARES = 2, 1
# The same of models whose parameters have formulas, or extra zeros, after those.
REFINED = 12
# Limits of the standard deviations, in the bases of Z, in units of the predictor's scale.
LEAST, MOST = 0.2, 2.0
# The largest beside extra zeros: levels of zeros alone have two explanations, and from far out the search finds the
# wrong one.
MOST_BESIDE_ZEROS = 0.5
# Links on whose scale 1 is a change that one sees, whatever the response is measured in, or nobody knows of another.
OWN_SCALE = ("logit", "probit", "cloglog", "cauchit", "log", "custom")
# Where the predictor must be positive, the largest standard deviation to begin with, as a part of the predictor.
INSIDE = 0.15
MOST_CORRELATED = 0.7
# Effects on means are smaller than those given the random effects, by the root of one plus so many times the variance
# of these: exact for probit, and for logit near (Zeger, Liang & Albert 1988, Biometrics 44). Of the variance of the
# latter at most so much is made up for.
ATTENUATION = {"logit": (16.0 * math.sqrt(3.0) / (15.0 * math.pi)) ** 2, "probit": 1.0}
MOST_ATTENUATED = 0.6
# Limits of a size or a precision, logarithms: one that is infinite by moments is begun where it still matters. A
# dispersion has the scale of the response.
PSI = -8.0, 5.0
SCALED = ("inverse_gaussian", "gaussian")
# See far_of: on the scale of the predictor, where 3 would be far outside.
FAR = 1.5
# Evaluations of one search at most: they take longer than those of linear models, and who needs more is separated.
MOST_ITERATIONS = 80


def fixed_start(model: Model, lanes: int) -> Array:
    """``(p + s, L)``: fixed effects by Fisher scoring without random effects (McCullagh & Nelder 1989, Generalized
    Linear Models, section 2.5), parameters of the family by their moments."""
    whole, model = model, _plain(model)
    data, family, p = model.data, model.family, model.p
    xp = namespace(data.y)
    shape = (*data.y.shape[:-1], lanes)
    of_shares = _from_one_share(model) if family.name == "binomial" and p else None
    eta = family.eta_start(data.y, 1.0 if data.size is None else data.size) if of_shares is None else of_shares[0]
    eta = xp.broadcast_to(eta, shape)
    psi = xp.zeros((family.n_psi, lanes), eta.dtype)
    if family.n_psi:
        psi = _psi(model, eta)
    if not p:
        return _psi_coefficients(whole, eta)
    delta = xp.zeros((p, lanes), eta.dtype)
    target = eta if data.offset is None else eta - data.offset
    upper = pairs_of(p)
    squares = xp.stack([data.X[i] * data.X[j] for i, j in upper])
    place = np.array([[upper.index((min(i, j), max(i, j))) for j in range(p)] for i in range(p)])
    for i in range(1 + (STEPS if of_shares is None else STEPS_FROM_SHARES)):
        w = of_shares[1] if i == 0 and of_shares is not None else xp.broadcast_to(_curvature(model, eta, psi), shape)
        XX = _over_rows(squares, w)[place]
        c1 = -w * target if i == 0 else model.derivatives(eta, psi).by_eta[1]
        rhs = -_over_rows(data.X, xp.broadcast_to(c1, shape))
        ridge = 1e-10 * xp.stack([XX[j, j] for j in range(p)]).max(0) * linalg.eye(p, XX)
        step = linalg.matmul(linalg.inverse_logdet(XX + ridge)[0], rhs[:, None])[:, 0]
        step = xp.where(xp.isfinite(step).all(0), step, 0.0)
        if i:
            length = xp.sqrt((step**2).sum(0))
            most = LONGEST * model.unit
            step = step * most / xp.maximum(length, most)
        delta = delta + step
        eta = data.predictor(delta, xp.zeros(shape, eta.dtype))
    fixed = xp.concatenate([delta, _psi_coefficients(whole, eta)]) if whole.n_psi else delta
    return fixed if whole is model else _without_effects(whole, fixed)


def _from_one_share(model: Model) -> tuple[Array, Array]:
    """Of binomial rows, what a scoring step from the same share for all fits by least squares, and its weights, which
    are the same in every lane."""
    data, rows = model.data, tuple(range(model.effects.row_axes))
    xp, size = namespace(data.y), 1.0 if data.size is None else data.size
    w = data.weighted(size + xp.zeros((*data.X.shape[1:-1], 1), data.X.dtype))
    share = (w * data.y / size).sum(rows) / w.sum(rows)
    least = 0.5 / w.sum(rows)
    eta = LINEAR[model.family.link](xp.clip(share, least, 1.0 - least))
    return eta + (data.y / size - share) / mean_derivatives(model.family.link, eta)[0], w


def _over_rows(columns: Array, values: Array) -> Array:
    """``(S, L)`` sums of ``columns (S, *rows, 1)`` times ``values (*rows, L)``."""
    xp = namespace(columns, values)
    if xp is np or columns.shape[-1] > 1:
        return xp.stack([(column * values).sum(tuple(range(values.ndim - 1))) for column in columns])
    return columns.reshape(len(columns), -1) @ values.reshape(-1, values.shape[-1])


def _without_effects(model: Model, fixed: Array) -> Array:
    """``(p + s, L)`` nearer to the maximum of the likelihood without random effects, by steps that go downhill: what
    formulas of parameters start from, whose searches beside random effects may not end from far away."""
    data, p, rows = model.data, model.p, model.effects.row_axes
    xp, shape = namespace(fixed), (*data.y.shape[:-1], fixed.shape[-1])
    zero = xp.zeros(shape, fixed.dtype)
    axes = tuple(range(rows))

    def at(fixed: Array) -> Any:
        return model.derivatives(data.predictor(fixed[:p], zero), fixed[p:])

    part = xp.ones(fixed.shape[1:], fixed.dtype)
    here = at(fixed)
    for _ in range(REFINED):
        c, c1, c2, *_ = (xp.broadcast_to(own, shape) for own in here.by_eta)
        w = xp.maximum(c2, 0.0) + 1e-3 * xp.mean(abs(c2), axes)
        g = [(c1 * column).sum(axes) for column in data.X] + [xp.broadcast_to(own[0], shape).sum(axes)
                                                              for own in here.by_psi]  # fmt: skip
        steps = []
        if p:
            XX = xp.stack([xp.stack([(w * one * other).sum(axes) for one in data.X]) for other in data.X])
            steps.append(-linalg.matmul(linalg.inverse_logdet(XX)[0], xp.stack(g[:p])[:, None])[:, 0])
        twice = [[xp.broadcast_to(own[0], shape).sum(axes) for own in line] for line in here.by_psi_twice]
        H = curvature_of_psi(model, xp.stack([xp.stack(line) for line in twice]))
        steps.append(-linalg.matmul(linalg.inverse_logdet(H)[0], xp.stack(g[p:])[:, None])[:, 0])
        step = xp.concatenate(steps)
        step = xp.where(xp.isfinite(step).all(0), step, 0.0)
        tried = fixed + part * cut(model, step) * step
        there = at(tried)
        better = xp.broadcast_to(there.by_eta[0], shape).sum(axes) < c.sum(axes)
        fixed = xp.where(better, tried, fixed)
        here = where(better, there, here)
        part = xp.where(better, xp.minimum(1.0, 2.0 * part), 0.25 * part)
    return fixed


def _plain(model: Model) -> Model:
    """The model without extra zeros, and with one number for each parameter of the family."""
    plain = model.family.plain
    if plain is model.family and not model.data.psi:
        return model
    return replace(model, family=plain, data=model.data._replace(psi=()))


def _psi_coefficients(model: Model, eta: Array) -> Array:
    """``(s, L)``: of each parameter of the family those that come nearest to the number it starts from."""
    psi, columns = _psi(model, eta), model.data.psi
    if not columns:
        return psi
    xp, n = namespace(eta), model.effects.row_axes
    there = model.data.weighted(xp.ones_like(model.data.y)) > 0  # empty places stand for no row
    found = []
    for own, Q in zip(psi, columns, strict=True):
        found.append(
            own[None] if Q is None else (Q * there).sum(tuple(range(1, 1 + n))) / there.sum(tuple(range(n))) * own
        )
    return xp.concatenate(found)


def _curvature(model: Model, eta: Array, psi: Array) -> Array:
    """Expected curvature of every row, or the size of the observed one where the family does not know it."""
    if model.family.has_expected:
        return model.expected_curvature(eta, psi).w
    return abs(model.derivatives(eta, psi).by_eta[2])


def _psi(model: Model, eta: Array) -> Array:
    """Parameters of the family, ``(s, L)``, where the predictor is ``eta``."""
    data, xp = model.data, namespace(eta)
    mu = model.family.mean(eta)
    n = int(np.prod(mu.shape[:-1]))
    flat = [None if a is None else xp.broadcast_to(a, mu.shape).reshape(n, -1) for a in (data.y, mu, data.size)]
    found = [model.family.psi_start(*(None if a is None else a[:, lane] for a in flat)) for lane in range(mu.shape[-1])]
    psi = xp.stack([xp.asarray(one) for one in found], axis=-1)
    return psi if model.family.name in SCALED else xp.clip(psi, *PSI)


def scale_of(model: Model, fixed: Array) -> Array | float:
    """How large a random effect counts, ``(L,)``, in the bases of Z: 1, or where the scale is that of the response what
    one row tells of the predictor; and less where that must stay above 0."""
    link, data = model.family.link, model.data
    if link in OWN_SCALE:
        return 1.0
    xp = namespace(fixed)
    rows = tuple(range(model.effects.row_axes))
    eta = data.predictor(fixed[: model.p], xp.zeros((*data.y.shape[:-1], fixed.shape[-1]), fixed.dtype))
    w = _curvature(model, eta, fixed[model.p :])
    found = 1.0 / xp.sqrt(xp.mean(w, rows))
    if link in POSITIVE:
        found = xp.minimum(found, INSIDE * xp.sqrt(xp.mean(eta**2, rows)))
    return xp.where(xp.isfinite(found), found / model.unit, 1.0)


def far_of(model: Model) -> float:
    """Standard deviation, in the bases of Z, from which a second search comes down."""
    return FAR * INSIDE if model.family.link in POSITIVE else FAR


def covariance_start(model: Model, fixed: Array) -> tuple[Array, Array]:
    """Coordinates ``(k, L)``, and fixed effects given the random ones.

    Without random effects the scores of a level, ``g = -Z'c1``, have covariance ``A D A + A``, so the sum of
    ``g g' - A`` over levels is linear in D.

    Args:
        fixed: as :func:`fixed_start` finds them.
    """
    data, effects, p = model.data, model.effects, model.p
    structures = model.layout.structures
    shape = (*data.y.shape[:-1], fixed.shape[-1])
    xp = namespace(fixed)
    eta = data.predictor(fixed[:p], xp.zeros(shape, fixed.dtype))
    at = model.derivatives(eta, fixed[p:])
    w = _curvature(model, eta, fixed[p:])
    scale = scale_of(model, fixed)
    most = MOST if model.family.plain is model.family else MOST_BESIDE_ZEROS
    g, A = -effects.effects(at.by_eta[1]), effects.normal(w)
    if isinstance(effects, OneFactor):
        roots = _of_one_factor(g, A, [(place.start, place.q) for place in model.layout.terms], scale, most)
    else:
        assert isinstance(effects, Crossed)
        roots = _of_diagonals(g, A, effects, float(np.min(scale)), most)
    # Of crossed factors each by itself has some of what the others vary.
    c2 = ATTENUATION.get(model.family.link, 0.0) if isinstance(effects, OneFactor) else 0.0
    if c2:
        # That, too, is D on the scale of means.
        variance = sum((root * root).sum((0, 1)) for root in roots)
        larger = 1.0 / xp.sqrt(1.0 - xp.minimum(c2 * variance, MOST_ATTENUATED))
        larger = xp.where(xp.isfinite(larger), larger, 1.0)
        roots = [larger * root for root in roots]
        fixed = xp.concatenate([larger * fixed[:p], fixed[p:]])
    x = cov.near(roots, structures)
    fallback = cov.wide_start(0.5, structures, fixed)
    return xp.where(xp.isfinite(x).all(0), x, scale * fallback[:, None]), fixed


def _of_one_factor(g: Array, A: Array, places: list[tuple[int, int]], unit: Array | float, most: float) -> list[Array]:
    xp, q = namespace(g), len(g)
    spots = pairs_of(q)
    excess = xp.stack([(g[a] * g[b] - A[a, b]).sum(0) for a, b in spots])
    lhs = []
    for c, d in spots:
        AEA = {(a, b): sum((A[a, u] * A[v, b]).sum(0) for u, v in orders_of(c, d)) for a, b in spots}
        lhs.append(xp.stack([AEA[spot] for spot in spots]))
    M = xp.stack(lhs, axis=1)  # rows: equations, columns: entries of D
    scale = xp.sqrt(xp.maximum(xp.stack([M[j, j] for j in range(len(spots))]), np.finfo(g.dtype).tiny))
    scaled = M / scale[:, None] / scale[None] + 1e-8 * linalg.eye(len(spots), M)
    if len(spots) == 1:
        found = excess / scale / scaled[0] / scale
    else:
        inverse = xp.moveaxis(xp.linalg.inv(xp.moveaxis(scaled, -1, 0)), 0, -1)
        found = linalg.matmul(inverse, (excess / scale)[:, None])[:, 0] / scale
    values = dict(zip(spots, found, strict=True))
    roots = []
    for start, size in places:
        D = stack_of([
            [values[start + min(a, b), start + max(a, b)] for b in range(size)] for a in range(size)
        ])  # fmt: skip
        roots.append(_reasonable(D, unit, most))
    return roots


def _reasonable(D: Array, unit: Array | float, most: float) -> Array:
    """A root ``(q, q, L)`` of a covariance near ``D (q, q, L)``, with limits to its deviations and correlations."""
    xp, q = namespace(D), len(D)
    variances = xp.stack([D[a, a] for a in range(q)])
    deviations = xp.sqrt(xp.clip(variances, (LEAST * unit) ** 2, (most * unit) ** 2))
    if q == 1:
        return deviations[:, None]
    correlations = xp.clip(D / deviations[:, None] / deviations[None], -MOST_CORRELATED, MOST_CORRELATED)
    one = linalg.eye(q, D)
    squared, vectors = decompositions.eigh(xp.where(one > 0, 1.0, correlations))
    # Of three effects and more the limited correlations need not be possible.
    root = vectors * xp.sqrt(xp.maximum(squared, 1.0 - MOST_CORRELATED))[None]
    return deviations[:, None] * root


def _of_diagonals(g: Array, A: Any, effects: Crossed, unit: float, most: float) -> list[Array]:
    """Of several factors, each by itself: standard deviations alone."""
    roots = []
    q, m = A.first.shape[1:]
    diagonal = np.concatenate([np.diagonal(A.first).T.reshape(q * m), A.dense.diagonal()])
    for place in effects.layout.terms:
        start, size = effects.place_of(place.factor)
        sds = []
        for a in range(place.start, place.start + place.q):
            at = start + a * size + np.arange(size)
            variance = (g[at, 0] ** 2 - diagonal[at]).sum() / max((diagonal[at] ** 2).sum(), np.finfo(float).tiny)
            sds.append(np.sqrt(np.clip(variance, (LEAST * unit) ** 2, (most * unit) ** 2)))
        roots.append(np.diag(sds)[..., None])
    return roots
