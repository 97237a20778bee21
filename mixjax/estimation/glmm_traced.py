"""A fit of a generalised linear mixed model inside JAX's transformations: ``jit``, ``vmap``, derivatives of any order.

The optimum is found where it is found outside, by NumPy, which the program calls; what follows from it is computed by
JAX from the coordinates of the optimum, whose derivatives are those of a minimum (:mod:`mixjax.estimation.implicit`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.laplace import Point, gathered_model, modes_at, objective
from mixjax.estimation.implicit import as_minimum
from mixjax.estimation.search import own_factors
from mixjax.machine import Array, jit, silently
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows


class Optimum(NamedTuple):
    """What NumPy's fit tells, by ``T = p + s + k`` coordinates in the bases of the rows.

    Attributes:
        phi: ``(T,)`` fixed effects, psi, and coordinates of the covariances with the signs that theta has.
        free: ``(T,)`` False where a coordinate is fixed at zero.
        vcov_all, singular, iterations, grad_norm, mode_error, result: as in :class:`mixjax.GLMMEstimates`.
    """

    phi: Array
    free: Array
    vcov_all: Array
    singular: Array
    iterations: Array
    grad_norm: Array
    mode_error: Array
    result: Array


def estimate_traced(data: FamilyRows, fit: Callable[[FamilyRows], Any], curvature: str) -> dict[str, Array]:
    """The fields of :class:`mixjax.GLMMEstimates` of rows some of which are traced.

    Args:
        data: of one response. fit: rows of numbers -> their estimates, by NumPy. curvature: that ``fit`` has.

    Raises:
        ValueError: 64 bits are off.
    """
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            "glmm_estimate of traced arrays needs 64 bits, in which its fit is made: call the transformed function "
            "under jax.enable_x64(True)"
        )
    data = jax.tree.map(_as_float64, data)
    found = _optimum(data, fit)
    estimates = _of_optimum(found, data, curvature)
    covariance = _covariance(found, estimates.pop("phi"), data, curvature)
    p = data.p
    converged = jnp.stack([found.result == int(code) for code in Result if code.is_solution]).any(0)
    same = ("singular", "iterations", "grad_norm", "mode_error", "result")
    return {
        **estimates,
        "vcov": covariance[:p, :p],
        "vcov_all": covariance,
        "converged": converged,
        **{name: getattr(found, name) for name in same},
    }


def _as_float64(leaf: Array) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


# What a program and NumPy tell each other are words of 32 bits: JAX runs a call in a thread of its own, where a scope
# of 64 bits that the caller has entered does not hold, and would round numbers to float32 on their way.


def _words(leaf: Array) -> Array:
    """Numbers of a program: ``(...)`` floats -> ``(..., 2)`` words; integers as they are."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return leaf.astype(jnp.int32)


def _of_words(words: Any) -> np.ndarray:
    """The same read by NumPy."""
    array = np.ascontiguousarray(words)
    return array.view(np.float64)[..., 0] if array.dtype == np.uint32 else array


def _optimum(data: FamilyRows, fit: Callable[[FamilyRows], Any]) -> Optimum:
    """By a call from the program; lanes of ``vmap`` are fitted one after the other."""
    T = data.p + data.n_psi + sum(s.k for s in data.layout.structures)

    def of_words(words: FamilyRows) -> tuple[np.ndarray, np.ndarray]:
        rows = jax.tree.map(_of_words, words)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rows)):
            floats = np.full(T + T * T + 2, np.nan)
            return floats.view(np.uint32).reshape(-1, 2), np.array([1] * T + [0, 0, Result.NOT_FINITE], np.int32)
        est = fit(rows)
        with silently():
            x, free = coordinates_in(est.theta, rows.layout, [Z.R for Z in rows.Z_bases])
            phi = np.concatenate([rows.fixed_in_bases(est.beta, est.psi), x])
        floats = np.concatenate([phi, np.ravel(est.vcov_all), [est.grad_norm, est.mode_error]])
        integers = np.concatenate([np.ones(T - len(x)), free, [est.singular, est.iterations, est.result]])
        return floats.view(np.uint32).reshape(-1, 2), integers.astype(np.int32)

    shapes = (
        jax.ShapeDtypeStruct((T + T * T + 2, 2), np.uint32),
        jax.ShapeDtypeStruct((T + 3,), np.int32),
    )
    # The search is not differentiated: what its end depends on is known without it.
    words = jax.tree.map(_words, jax.lax.stop_gradient(data))
    told, integers = jax.pure_callback(of_words, shapes, words, vmap_method="sequential")
    floats = jax.lax.bitcast_convert_type(told, jnp.float64)
    integers = integers.astype(jnp.int64)
    return Optimum(
        phi=floats[:T],
        free=integers[:T] != 0,
        vcov_all=floats[T : T + T * T].reshape(T, T),
        singular=integers[T] != 0,
        iterations=integers[T + 1],
        grad_norm=floats[-2],
        mode_error=floats[-1],
        result=integers[T + 2],
    )


def _point(phi: Array, data: FamilyRows) -> Point:
    n = data.p + data.n_psi
    return Point(phi[:n], cov.factors_of(phi[n:], data.layout.structures))


@cache
def _objective_of(curvature: str) -> Callable[[Array, FamilyRows], Array]:
    """One function for each curvature, so that programs know it again."""

    def of_coordinates(phi: Array, data: FamilyRows) -> Array:
        return objective(_point(phi, data), data, curvature == "expected")

    return of_coordinates


@partial(jit, static_argnames="curvature")
def _of_optimum(found: Optimum, data: FamilyRows, curvature: str) -> dict[str, Array]:
    """What follows from the coordinates, and themselves, ``phi``, with their derivatives."""
    p, n, layout = data.p, data.p + data.n_psi, data.layout
    fun = _objective_of(curvature)
    phi = as_minimum(fun, found.phi, found.free, found.result == int(Result.CONVERGED), data)
    point = _point(phi, data)
    own = own_factors(phi[n:], data.Z_bases, layout)
    b = modes_at(point, data)
    return {
        "phi": phi,
        # Where there are no derivatives, the zeros of theta, which are constants, have none either.
        "theta": cov.theta_of_lambdas(own.lambdas) + 0.0 * phi.sum(),
        "beta": data.X_basis.R_inv @ phi[:p],
        "psi": data.psi_of_bases(phi[p:n]),
        "Sigma": tuple(L @ L.T for L in own.lambdas),
        "b": _by_term(b, data),
        "eta": gathered_model(data).predictor(point.fixed[:, None], b)[:, 0],
        "criterion": fun(phi, data),
    }


def _by_term(b: Array, data: FamilyRows) -> tuple[Array, ...]:
    """Modes ``(N, 1)`` in the order of elimination -> per term ``(n_groups, q)``, for the user's columns."""
    begins, start = {}, 0
    for f in (*data.layout.chain, *data.layout.dense):
        begins[f] = start
        start += data.Z[f].shape[1] * data.levels[f]
    found = []
    for place, basis in zip(data.layout.terms, data.Z_bases, strict=True):
        m = data.levels[place.factor]
        begin = begins[place.factor] + place.start * m
        found.append((basis.R_inv @ b[begin : begin + place.q * m, 0].reshape(place.q, m)).T)
    return tuple(found)


# --- covariances -----------------------------------------------------------------------------------------------------


def _covariance(found: Optimum, phi: Array, data: FamilyRows, curvature: str) -> Array:
    """``(T, T)`` of all estimates: NumPy's numbers, with the derivatives of twice the inverse of the Hessian."""
    return _known_covariance(curvature, found.vcov_all, found.free, phi, data)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known_covariance(curvature: str, known: Array, free: Array, phi: Array, data: FamilyRows) -> Array:
    return known


@_known_covariance.defjvp
def _covariance_jvp(curvature: str, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    known, free, phi, data = primals
    moved = _moved_covariance(free, (phi, data), tangents[2:], curvature)
    return _known_covariance(curvature, known, free, phi, data), moved


@partial(jit, static_argnames="curvature")
def _moved_covariance(free: Array, at: Any, along: Any, curvature: str) -> Array:
    """How the covariance moves: a program of its own, for third derivatives take long to compile."""

    def covariance(phi: Array, data: FamilyRows) -> Array:
        n, one = data.p + data.n_psi, jnp.eye(len(phi))
        H = jax.hessian(_objective_of(curvature))(phi, data)
        among = free[:, None] & free[None]
        inverse = jnp.where(among, jnp.linalg.inv(jnp.where(among, H, one)), 0.0)
        to_user = one.at[:n, :n].set(data.fixed_change)
        return to_user @ (2.0 * inverse) @ to_user.T

    moved: Array = jax.jvp(covariance, at, along)[1]
    return moved
