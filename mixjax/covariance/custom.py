"""Covariances that a user writes: a function of parameters, differentiated by JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.checks import check_count
from mixjax.covariance.scaled import Scaled
from mixjax.covariance.structures import NaturalParameter
from mixjax.covariance.theta import pairs_of, rank_tolerance
from mixjax.machine import Array, float64, jit, namespace

# Random parameters at which a function is looked at before it is fitted.
POINTS = 3
# Steps of least squares, and starts, by which parameters are found from a covariance.
STEPS, STARTS, NEAR_ZERO = 40, 5, 0.05


@dataclass(frozen=True)
class Covariance:
    """A covariance structure of one's own: a function of parameters that gives its shape.

    The function ``fun(p, q)`` takes parameters ``p (k,)``, any real numbers, and the number of effects, and gives a
    positive definite matrix ``(q, q)`` in ``jax.numpy``. The engine multiplies it by one standard deviation of all
    effects (``scale="hom"``), or by one for each, and then it must be a correlation matrix (``"het"``). Derivatives are
    JAX's, exact to second order. Two objects are the same structure where their functions are the same object: a
    function of a module is compiled once, a lambda anew wherever it is written.

    Args:
        fun: ``(p, q) -> (q, q)``, symmetric positive definite for all p; searches begin near p = 0. With
            ``returns="factor"`` a square root of that.
        k: number of parameters, one or more.
        scale: ``"hom"`` or ``"het"``.
        names: of the parameters, all different; by default ``p1``, ``p2``, ...
        returns: ``"covariance"`` or ``"factor"``.
        natural: function ``p (k,) -> (k,)`` in ``jax.numpy``, one for one, to what is reported in place of p, such as
            ``jnp.tanh`` where that is a correlation: estimates, standard errors, intervals, scenarios; and
            Kenward-Roger's second derivatives are by these, which the choice of parameters matters to. None: p itself.

    In a formula it stands under the name that it has where :func:`mixjax.lmm` is called.

    Raises:
        ValueError: an argument that is none of these. When it is used: a matrix of another shape, not symmetric, not
            positive definite, without finite derivatives, no correlation matrix where ``scale="het"``, or one in which
            not all parameters show.

    Example:
        >>> import jax.numpy as jnp, mixjax as mj, numpy as np
        >>> def banded(p, q):
        ...     return jnp.eye(q) + jnp.tanh(p[0]) / 2 * (jnp.eye(q, k=1) + jnp.eye(q, k=-1))
        >>> near = mj.Covariance(banded, k=1, names=["u"])
        >>> fit = mj.lmm("y ~ t + near(0 + visit | subject)", data)  # doctest: +SKIP
        >>> rows = {"Z": np.eye(3)[[0, 1, 2, 0, 1, 2]], "group": np.array([0, 0, 0, 1, 1, 1]), "n_groups": 2}
        >>> term = mj.RandomTerm(**rows, structure=near)
        >>> [parameter.name(["a", "b", "c"], "g") for parameter in near.of(3).natural]
        ['sd|g', 'u|g']
    """

    fun: Callable[[Any, int], Any]
    k: int
    scale: Literal["hom", "het"] = "hom"
    names: Sequence[str] = ()
    returns: Literal["covariance", "factor"] = field(default="covariance")
    natural: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.fun):
            raise ValueError(f"fun must be a function (p, q) -> (q, q), got {self.fun!r}")
        object.__setattr__(self, "k", check_count("k", self.k, 1))
        if self.scale not in ("hom", "het"):
            raise ValueError(f"scale must be 'hom' or 'het', got {self.scale!r}")
        if self.returns not in ("covariance", "factor"):
            raise ValueError(f"returns must be 'covariance' or 'factor', got {self.returns!r}")
        if self.natural is not None and not callable(self.natural):
            raise ValueError(f"natural must be a function p (k,) -> (k,), got {self.natural!r}")
        names = (
            tuple(f"p{j + 1}" for j in range(self.k))
            if isinstance(self.names, tuple) and not self.names
            else self.names
        )
        names = (names,) if isinstance(names, str) else tuple(map(str, names))
        if len(names) != self.k or len(set(names)) < self.k:
            raise ValueError(f"names must be {self.k} different ones, got {list(names)}")
        object.__setattr__(self, "names", names)

    def matrix(self, p: Any, q: int) -> Any:
        """The shape ``(q, q)``."""
        found = jnp.asarray(self.fun(p, q))
        if found.ndim != 2 or (self.returns == "covariance" and found.shape != (q, q)) or len(found) != q:
            raise ValueError(f"the covariance function gives shape {found.shape} for {q} effects; ({q}, {q}) is needed")
        return found @ found.T if self.returns == "factor" else found

    def of(self, q: int) -> Written:
        """The structure of q effects."""
        return _checked(self, q)


class _Programs(NamedTuple):
    """Of lanes in the first axis: root and its slopes, shape with both derivatives, parameters from a shape, what is
    reported of parameters with both derivatives."""

    root: Callable[..., Any]
    derivatives: Callable[..., Any]
    near: Callable[..., Any]
    reported: Callable[..., Any]


@cache
def _programs(own: Covariance, q: int) -> _Programs:
    a, b = np.array(pairs_of(q)).T

    def symmetric(p: Any) -> Any:
        M = own.matrix(p, q)
        return 0.5 * (M + M.T)

    def root(p: Any) -> Any:
        return own.fun(p, q) if own.returns == "factor" else jnp.linalg.cholesky(symmetric(p))

    def pairs(p: Any) -> Any:
        return symmetric(p)[a, b]

    def unit(p: Any) -> Any:
        M = symmetric(p)
        return M if own.scale == "het" else M / (jnp.trace(M) / q)

    def near(T: Any, known: Any) -> Any:
        def residuals(p: Any) -> Any:
            return ((unit(p) - T) * known)[a, b]

        def step(_: Any, state: Any) -> Any:
            p, value, damping = state
            r, J = residuals(p), jax.jacfwd(residuals)(p)
            JJ = J.T @ J
            tiny = np.finfo(p.dtype).tiny
            trial = p - jnp.linalg.solve(
                JJ + damping * jnp.diag(jnp.diagonal(JJ) + 1e-12) + tiny * jnp.eye(own.k), J.T @ r
            )
            new = (residuals(trial) ** 2).sum()
            better = new < value
            return (
                jnp.where(better, trial, p),
                jnp.where(better, new, value),
                jnp.where(better, damping * 0.1, damping * 4.0),
            )

        def search(p: Any) -> Any:
            start = (p, (residuals(p) ** 2).sum(), jnp.asarray(1e-3, p.dtype))
            p, value, _ = jax.lax.fori_loop(0, STEPS, step, start)
            return p, jnp.where(jnp.isfinite(value), value, jnp.inf)

        starts = np.random.default_rng(0).normal(size=(STARTS, own.k))
        starts[0] = NEAR_ZERO  # not 0, where powers of what is 0 have no derivatives in JAX
        ends, values = jax.vmap(search)(jnp.asarray(starts, T.dtype))
        return ends[jnp.argmin(values)]

    def root_and_slopes(p: Any) -> Any:
        return root(p), jax.jacfwd(root)(p)

    def derivatives(p: Any) -> Any:
        return pairs(p), jax.jacfwd(pairs)(p), jax.jacfwd(jax.jacfwd(pairs))(p)

    def reported(p: Any) -> Any:
        natural = own.natural or (lambda p: p)
        return jnp.asarray(natural(p)), jax.jacfwd(natural)(p), jax.jacfwd(jax.jacfwd(natural))(p)

    return _Programs(*(jit(jax.vmap(fun)) for fun in (root_and_slopes, derivatives, near, reported)))


@dataclass(frozen=True)
class Written(Scaled):
    """The structure of q effects that a :class:`Covariance` describes."""

    own: Covariance
    # Its shape is a correlation matrix; and correlations that tell noise apart.
    is_correlation: bool = True
    tells_noise: bool = False

    def __str__(self) -> str:
        return f"Covariance({getattr(self.own.fun, '__name__', 'fun')}, k={self.own.k})"

    @property
    def homogeneous(self) -> bool:  # type: ignore[override]
        return self.own.scale == "hom"

    @property
    def scaling(self) -> Literal["any", "each", "common"]:  # type: ignore[override]
        return "common" if self.homogeneous else "each"

    @property
    def apart_from_noise(self) -> bool:
        return self.tells_noise

    @property
    def n_shapes(self) -> int:
        return self.own.k

    def _lanes(self, program: str, *arrays: Array, axes: int) -> Any:
        """Arrays with ``axes`` axes before the lanes, through a program; results as they come, with lanes last."""
        xp = namespace(*arrays)
        lanes = arrays[0].shape[axes:]
        wide = arrays[0].dtype == np.float64
        with float64(wide) if xp is np else nullcontext():
            flat = [jnp.moveaxis(jnp.asarray(a).reshape(*a.shape[:axes], -1), -1, 0) for a in arrays]
            found = getattr(_programs(self.own, self.q), program)(*flat)
            found = jax.tree.map(lambda a: jnp.moveaxis(a, 0, -1).reshape(*a.shape[1:], *lanes), found)
        return jax.tree.map(np.asarray, found) if xp is np else found

    def root(self, x: Array) -> list[list[Array | None]]:
        C, _ = self._lanes("root", x[self.n_scales :], axes=1)
        return [[C[i, j] for j in range(self.q)] for i in range(self.q)]

    def root_slopes(self, x: Array) -> tuple[Array, Array]:
        C, moved = self._lanes("root", x[self.n_scales :], axes=1)
        return C, namespace(x).moveaxis(moved, 2, 0)

    def shape(self, x: Array) -> tuple[Array, Array, Array]:
        R, dR, d2R = self._lanes("derivatives", x[self.n_scales :], axes=1)
        return R, dR, d2R

    def reported(self, x: Array) -> tuple[Array, Array, Array]:
        """What is reported of the shape's parameters at coordinates ``x (k, ...)``: values ``(n_shapes, ...)``, and
        their first and second derivatives by the parameters, one and two more axes of that length before the lanes."""
        values, slopes, curves = self._lanes("reported", x[self.n_scales :], axes=1)
        return values, slopes, curves

    def parameters_of(self, values: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Parameters ``(n_shapes,)`` that are reported as ``values``, searched for from ``start``.

        Raises:
            ValueError: there are none.
        """
        if self.own.natural is None:
            return values
        import scipy.optimize  # slow to load, and hardly ever needed

        def left(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found, slopes, _ = self._lanes("reported", p, axes=1)
            return np.asarray(found) - values, np.asarray(slopes)

        found = scipy.optimize.root(left, start, jac=True, tol=1e-13)
        if not np.abs(left(found.x)[0]).max() <= 1e-9 * (1.0 + np.abs(values).max()):
            given = ", ".join(f"{name} = {value:.6g}" for name, value in zip(self.own.names, values, strict=True))
            raise ValueError(f"{self} has no parameters that are reported as {given}")
        solution: np.ndarray = found.x
        return solution

    def near(self, F: Array) -> Array:
        xp, q = namespace(F), self.q
        squares = (F * F).sum(1)
        sd = xp.sqrt(squares)
        seen = sd > rank_tolerance(F.dtype) * sd.max(0)
        D = (F[:, None] * F[None]).sum(2)
        size = squares.mean(0)
        if self.homogeneous:
            known = xp.ones_like(D)
            T = xp.where(size > 0, D / xp.where(size > 0, size, 1.0), 0.0)
        else:
            known = (seen[:, None] & seen[None]) * xp.ones_like(D)
            T = D / xp.where(seen, sd, 1.0)[:, None] / xp.where(seen, sd, 1.0)[None]
        p = self._lanes("near", T, known, axes=2)
        if not self.homogeneous:
            return xp.concatenate([xp.sqrt(sd), p])
        own, _ = self._lanes("root", p, axes=1)
        return xp.concatenate([xp.sqrt(size / ((own * own).sum((0, 1)) / q))[None], p])

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        # Of a shape that is no correlation matrix the first effect's standard deviation stands for the scale.
        shared = self.homogeneous and self.is_correlation
        sds = [NaturalParameter("sd", i, shared=shared) for i in range(self.n_scales)]
        return (*sds, *self._natural_shapes())

    def _natural_shapes(self) -> list[NaturalParameter]:
        return [NaturalParameter("real", self.n_scales + j, label=name) for j, name in enumerate(self.own.names)]


@cache
def _checked(own: Covariance, q: int) -> Written:
    structure = Written(q, own)
    a, b = np.array(pairs_of(q)).T
    points = np.random.default_rng(1).normal(size=(own.k, POINTS))
    with float64():
        M = np.stack([np.asarray(own.matrix(jnp.asarray(p), q)) for p in points.T])
    title = f"the covariance function {getattr(own.fun, '__name__', 'fun')!r}, for {q} effects,"
    if not np.isfinite(M).all():
        raise ValueError(
            f"{title} gives values that are not finite at p = {_first(points, np.isfinite(M).all((1, 2)))}"
        )
    if not np.allclose(M, np.swapaxes(M, 1, 2), rtol=1e-10, atol=1e-12 * np.abs(M).max()):
        raise ValueError(f"{title} gives a matrix that is not symmetric")
    definite = np.linalg.eigvalsh(M)[:, 0] > 1e-12 * np.abs(M).max((1, 2))
    if not definite.all():
        raise ValueError(f"{title} gives a matrix that is not positive definite at p = {_first(points, definite)}")
    with float64():
        values, slopes = (np.asarray(part) for part in _programs(own, q).reported(jnp.asarray(points.T))[:2])
    if values.shape != points.T.shape:
        raise ValueError(f"natural gives shape {values.shape[1:]} for {own.k} parameters; ({own.k},) is needed")
    if not np.isfinite(slopes).all() or np.linalg.matrix_rank(slopes, tol=1e-8).min() < own.k:
        raise ValueError(f"natural is not one for one: its derivatives have no full rank at {points[:, 0].round(3)}")
    unit = np.allclose(np.diagonal(M, axis1=1, axis2=2), 1.0, atol=1e-10)
    if own.scale == "het" and not unit:
        raise ValueError(
            f"{title} must give correlations, 1 on the diagonal, where every effect has a scale of its own"
        )
    x = np.concatenate([np.ones((structure.n_scales, POINTS)), points])
    J = structure.jacobian(x)
    if not (np.isfinite(J).all() and np.isfinite(structure.shape(x)[2]).all()):
        raise ValueError(f"{title} has no finite derivatives by its parameters")
    with_noise = np.concatenate([J, np.broadcast_to((a == b)[:, None, None] * 1.0, (len(a), 1, POINTS))], 1)
    if _rank(J) < structure.k:
        raise ValueError(
            f"{title} does not show all of its {own.k} parameters: some change nothing, or what the "
            f"{'standard deviation' if own.scale == 'hom' else 'standard deviations'} beside it or the others change"
        )
    return Written(q, own, bool(unit), _rank(with_noise) > structure.k)


def _rank(J: np.ndarray) -> int:
    """The largest rank of ``(pairs, k, B)`` among the lanes."""
    lengths = np.sqrt((J * J).sum(0, keepdims=True))
    scaled = J / np.where(lengths > 0, lengths, 1.0)
    return max(int(np.linalg.matrix_rank(own, tol=1e-8)) for own in np.moveaxis(scaled, -1, 0))


def _first(points: np.ndarray, good: np.ndarray) -> list[float]:
    found: list[float] = points[:, np.flatnonzero(~good)[0]].round(3).tolist()
    return found
