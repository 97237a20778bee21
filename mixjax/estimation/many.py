"""The driver of many fits: blocks, threads, devices, and what of the results is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.bases import Basis
from mixjax.covariance import Unstructured
from mixjax.engine.criterion import check_products, warn_of_float32
from mixjax.engine.curvature import profile_and_modes
from mixjax.engine.engine import AtOnce, Engine
from mixjax.engine.incidence import incidence
from mixjax.engine.moments import ClassSums, LevelSums, Moments, moments_of
from mixjax.estimation.estimate import Estimates, estimate, fit
from mixjax.estimation.lanes import (
    Bases,
    Fits,
    Sizes,
    fit_block,
    fit_block_at_once,
    sizes_for,
)
from mixjax.machine import LANES, compiled, float64, is_concrete, jit, n_cores, silently
from mixjax.optimise.results import Result
from mixjax.products.sizes import in_blocks, in_lanes_at_once, is_small, is_wide, pays_to_compile
from mixjax.products.sums import ClassProducts, CrossProducts, FactorProducts, PairProducts

EngineName = Literal["auto", "numpy", "jax"]

KEEP = ("theta", "beta", "sigma", "criterion", "converged", "singular", "iterations", "grad_norm", "result")
# Replicates of one call where no closed form applies.
VMAP_BLOCK = 32


def estimate_many(
    stats: CrossProducts,
    reml: bool = True,
    start: Any = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    keep: Sequence[str] = KEEP,
    engine: EngineName = "auto",
) -> Estimates:
    """Fit many responses of one design, or many designs of one structure.

    The same estimates as :func:`mixjax.estimate`, to rounding, and much faster than a loop over it: all fits of a block
    take their Newton steps side by side, and a fit that is done makes room for the next. All cores of the CPU are used.

    Args:
        stats: ``cross_products(design, Y)`` with ``Y (B, n)``, or ``stack([...])`` of B data sets. Arrays of numbers:
            inside ``jit`` use ``jax.vmap(mixjax.estimate)``.
        reml: restricted maximum likelihood if true.
        start: ``(k,)`` or ``(B, k)`` theta to start from, or None for moment estimates, which are better.
        chunk: at most about so many replicates are worked on at the same time (rounded to blocks of fixed size); None
            for one block per core. Results do not depend on it.
        mesh: devices to spread the replicates over, all its axes together. None: the threads of the default device.
            With several processes (``jax.distributed``) every process passes all of ``stats`` and gets all results.
        keep: names of the fields of :class:`~mixjax.Estimates` to return. ``vcov (B, p, p)``, ``Sigma`` and above all
            ``b`` (per term ``(B, n_groups, q)``) are large and left out unless named.
        engine: ``"numpy"`` fits at once on one core and compiles nothing; ``"jax"`` compiles a program for the
            structure, which then is 10 to 30 times as fast. ``"auto"`` compiles where the fits would take longer than
            compiling does, as far as the sizes of the model and of the batch tell: the same call always gives the same
            bits. The two differ by rounding.

    Returns:
        :class:`~mixjax.Estimates` of numpy arrays with a leading axis B; None for what is not kept. A fit that fails
        carries its code in ``result`` (see ``mixjax.Result``) and touches no other.

    Raises:
        ValueError: ``stats`` is of one response; a name in ``keep`` or the engine is unknown; ``engine="numpy"`` for
            a structure that it does not serve, or with a mesh.

    Not for differentiation: for that, ``jax.vmap(mixjax.estimate)``.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.zeros(12), X=np.ones((12, 1)), terms=(term,))
        >>> Y = np.random.default_rng(0).normal(size=(100, 12))
        >>> fits = mj.estimate_many(mj.cross_products(design, Y))
        >>> fits.beta.shape, bool(fits.converged.all())
        ((100, 1), True)
    """
    check_products(stats)
    unknown = set(keep) - set(Estimates._fields)
    if unknown:
        raise ValueError(f"keep names {sorted(unknown)}; there are {list(Estimates._fields)}")
    check_engine(engine)
    if not all(map(is_concrete, jax.tree.leaves(stats))):
        raise TypeError("estimate_many runs outside jit, on arrays of numbers; inside use jax.vmap(mixjax.estimate)")
    if np.ndim(stats.yy) != 1:
        raise ValueError(
            "these are the cross-products of one response: use mixjax.estimate, or cross_products(design, Y) with Y "
            "(B, n), or stack([...]) of several data sets"
        )
    B = len(stats.yy)
    if start is not None:
        start, n_theta = np.asarray(start, np.asarray(stats.XX).dtype), sum(map(cov.n_theta, stats.layout.qs))
        if start.shape not in ((n_theta,), (B, n_theta)):
            raise ValueError(f"start has shape {start.shape}; theta of this model is ({n_theta},), of all {B} fits "
                             f"({B}, {n_theta})")  # fmt: skip
        start = np.broadcast_to(start, (B, n_theta))
    if B == 0:
        raise ValueError("there are no responses to fit")
    if chosen_engine(stats, B, engine, mesh) == "numpy":
        return _many_at_once(stats, bool(reml), start, keep)
    with float64(np.asarray(stats.yy).dtype == np.float64 or jax.config.read("jax_enable_x64")):
        warn_of_float32(stats)
        if not in_blocks(stats):
            return _one_by_one(stats, reml, start, keep)
        batch = Batch(stats, start, _platform(mesh))
        workers = batch.workers
        if chunk is not None:
            workers = max(1, min(workers, -(-int(chunk) // batch.sizes.block)))
        results = _Results(batch, keep)
        if mesh is None:
            _on_threads(batch, reml, results, workers)
        else:
            _on_mesh(batch, reml, results, mesh)
        return results.estimates()


def _many_at_once(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    """By NumPy, which needs nothing of JAX."""
    if not in_lanes_at_once(stats):
        return _one_by_one_at_once(stats, reml, start, keep)
    batch = Batch(stats, start, "cpu", at_once=True)
    results = _Results(batch, keep)
    for block in range(batch.n_blocks):
        moments, bases, begin = batch.inputs(block)
        one = bool(batch.one_minimum)
        results.put(block, fit_block_at_once(moments, bases, batch.count(block), reml, begin, one, batch.sizes))
    return results.estimates()


def check_engine(engine: Any) -> None:
    """Raise ValueError for what is none."""
    if engine not in ("auto", "numpy", "jax"):
        raise ValueError(f"engine must be 'auto', 'numpy' or 'jax', got {engine!r}")


def chosen_engine(
    stats: CrossProducts, fits: int, engine: EngineName = "auto", mesh: Mesh | None = None
) -> Literal["numpy", "jax"]:
    """What fits a batch: what was asked for, or by the sizes of the model and the number of fits alone.

    Who works on a batch in several calls asks once, with the number of all fits.

    Raises:
        ValueError: NumPy was asked for and does not serve these fits.
    """
    double = np.asarray(stats.yy).dtype == np.float64
    served = double and mesh is None and is_small(stats)
    if engine == "numpy" and not served:
        why = "a mesh is JAX's" if mesh is not None else "the dense block is too large" if double else "not in float64"
        raise ValueError(f"engine='numpy' does not serve these fits ({why}); use engine='auto'")
    if engine != "auto":
        return engine
    at_once = served and (not in_blocks(stats) or not pays_to_compile(fits, stats))
    return "numpy" if at_once else "jax"


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


# --- the batch, block by block -------------------------------------------------------------------------------------


class Batch:
    """Replicates of one call, cut into blocks of N. What all share is prepared once.

    For models that :func:`in_blocks` says yes to.
    """

    def __init__(self, stats: CrossProducts, start: np.ndarray | None, platform: str, at_once: bool = False):
        self.stats, self.start, self.platform, self.at_once = stats, start, platform, at_once
        self.B = len(stats.yy)
        self.stacked = np.ndim(stats.XX) == 3
        self.axes = batch_axes(stats)
        self.one_minimum = np.bool_(_has_one_minimum(stats))
        if self.stacked:
            shapes = moments_of(_index(stats, self.axes, 0), alone=False)
        else:
            single = replace(_index(stats, self.axes, 0), classes=None)
            if stats.classes is not None:
                single = _without_levels(single)
            self.shared = moments_of(single, alone=False)
            if stats.classes is not None:
                ZZ, count, UU = (np.asarray(a)[..., None] for a in stats.classes[:3])
                self.shared = replace(self.shared, A=ZZ, count=count, pair_UU=UU)
            shapes = self.shared
        self.sizes: Sizes = sizes_for(shapes, platform)

    @property
    def workers(self) -> int:
        """Threads that blocks are worked on by."""
        return n_cores() if self.platform == "cpu" else 2

    @property
    def n_blocks(self) -> int:
        return -(-self.B // self.sizes.block)

    def count(self, block: int) -> int:
        return max(0, min(self.sizes.block, self.B - block * self.sizes.block))

    def index(self, block: int) -> np.ndarray:
        """Numbers of the block's replicates, padded by repeating the last one to N."""
        N = self.sizes.block
        return np.minimum(np.arange(block * N, (block + 1) * N), self.B - 1)

    def part(self, block: int) -> CrossProducts:
        """The cross-products of the block's replicates."""
        N, index = self.sizes.block, self.index(block)
        return _index(self.stats, self.axes, slice(index[0], index[0] + N) if index[-1] - index[0] == N - 1 else index)

    def inputs(self, block: int) -> tuple[Moments, Bases, np.ndarray | None]:
        """Arguments of :func:`~mixjax.estimation.lanes.fit_block`, lanes last."""
        part = self.part(block)
        if self.stacked:
            moments = stacked_moments(part) if self.at_once else _jitted_stacked_moments(part)
            bases = Bases(last(part.X_basis.R_inv), last(part.beta0), jax.tree.map(last, part.Z_bases))
        else:
            moments = self._with_responses(part)
            bases = Bases(
                np.asarray(part.X_basis.R_inv)[..., None],
                last(part.beta0),
                tuple(Basis(*(np.asarray(a)[..., None] for a in basis)) for basis in part.Z_bases),
            )
        if self.start is None:
            return moments, bases, None
        return moments, bases, last(self.start[self.index(block)])

    def levels(self, block: int) -> Moments | None:
        """The moments level by level of replicates whose :meth:`inputs` have them by class; None of others."""
        if self.stats.classes is None:
            return None
        whole = moments_of(replace(_index(self.stats, self.axes, 0), classes=None), alone=False)
        z = last(self.part(block).factors[whole.layout.chain[0]].Zy)
        return replace(whole, sums=LevelSums(whole.sums.U, z))  # type: ignore[union-attr]

    def _with_responses(self, part: CrossProducts) -> Moments:
        shared, layout = self.shared, self.shared.layout
        dense = [last(part.factors[f].Zy).reshape(q * m, -1) for f, q, m in shared.dense]
        if part.classes is not None:
            sums: Any = ClassSums(last(part.classes.Uy), last(part.classes.yy))
        else:
            sums = LevelSums(shared.sums.U, last(part.factors[layout.chain[0]].Zy))  # type: ignore[union-attr]
        return replace(shared, sums=sums, Uy=np.concatenate([*dense, last(part.Xy)]), yy=np.asarray(part.yy))


def last(a: Any) -> np.ndarray:
    """The first axis moved behind all others: replicates in front -> lanes last."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(a), 0, -1))


def batch_axes(stats: CrossProducts) -> CrossProducts:
    """0 for leaves with a leading axis of replicates, -1 for shared ones, in the shape of ``stats``."""
    if np.ndim(stats.XX) == 3:
        return jax.tree.map(lambda _: 0, stats)
    none = jax.tree.map(lambda _: -1, stats)
    return replace(
        none,
        factors=tuple(f._replace(Zy=0) for f in none.factors),
        Xy=0,
        yy=0,
        beta0=0,
        classes=None if stats.classes is None else ClassProducts(-1, -1, -1, 0, 0),
    )


def _index(stats: CrossProducts, axes: CrossProducts, at: Any) -> CrossProducts:
    return jax.tree.map(lambda a, axis: np.asarray(a)[at] if axis == 0 else a, stats, axes)


@jit
def _jitted_stacked_moments(stats: CrossProducts) -> Moments:
    moments = jax.vmap(moments_of, out_axes=-1)(stats)
    return jax.tree.map(lambda a: a[..., 0, :], moments)


def stacked_moments(stats: CrossProducts) -> Moments:
    parts = [moments_of(jax.tree.map(lambda a: a[i], stats), alone=False) for i in range(len(stats.yy))]  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=-1), *parts)


def _without_levels(stats: CrossProducts) -> CrossProducts:
    """The same without the levels of the first factor, whose moments are known by class."""
    first = stats.layout.chain[0]
    factors = list(stats.factors)
    factors[first] = FactorProducts(*(a[..., :0] for a in factors[first]))
    pairs = [
        PairProducts(*(a[..., :0] for a in pair)) if s == first else pair
        for (s, _), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
    ]
    return replace(stats, factors=tuple(factors), pairs=tuple(pairs))


def _has_one_minimum(stats: CrossProducts) -> bool:
    """Whether the criterion of any response has a single minimum, so that a singular end needs no second search.

    So it is where one term of any covariance has levels of equal ``A = Z_i'Z_i`` and ``B = Z_i'X_i``, B of full row
    rank, and X has p - q directions within levels. Then the estimates of the fixed effects do not depend on the
    covariances, and with ``P = (D + A^{-1})^{-1} / sigma^2`` and ``t = 1 / sigma^2`` the criterion is ``-a log det P +
    tr(P S) - b log t + c t`` with positive a, b, c and S fixed by the data: convex, over the convex set ``0 < P <= t
    A``. A minimum over Cholesky factors is one over their products (Burer & Monteiro 2005, Math. Program. 103, square
    factors).
    """
    structures = stats.layout.structures  # convex over all covariances, not over those of some structure
    if stats.classes is None or structures != (Unstructured(structures[0].q),) or len(stats.classes.count) > 1:
        return False
    products = stats.factors[0]
    A, B = np.asarray(products.ZZ)[:, :, 0], np.asarray(products.ZX)
    q, p, m = B.shape
    if np.ptp(B, axis=2).max(initial=0.0) > 1e-9 * np.abs(B).max(initial=1.0):
        return False
    B = B[:, :, 0]
    if np.linalg.matrix_rank(A) < q or np.linalg.matrix_rank(B) < q or stats.n - m * q <= p - q:
        return False
    within = np.asarray(stats.XX) - m * B.T @ np.linalg.solve(A, B)  # X is in a basis: its own products are ones
    return bool(np.linalg.matrix_rank(within, tol=1e-8) == p - q)


# --- results -------------------------------------------------------------------------------------------------------


class _Results:
    """Arrays of all B replicates, filled block by block."""

    def __init__(self, batch: Batch, keep: Sequence[str]):
        self.batch, self.keep = batch, keep
        self.arrays: dict[str, Any] = {}

    def put(self, block: int, fits: Fits) -> None:
        """Store the block's replicates; ``fits`` has them in the last axis."""
        N, count = self.batch.sizes.block, self.batch.count(block)
        at = slice(block * N, block * N + count)
        fits = Fits(*(np.moveaxis(np.asarray(a), -1, 0) for a in fits))
        values: dict[str, Any] = {name: getattr(fits, name) for name in Fits._fields if name in self.keep}
        if "converged" in self.keep:
            values["converged"] = np.isin(fits.result, [code for code in Result if code.is_solution])
        if "Sigma" in self.keep:
            values["Sigma"] = _Sigma(fits.theta, fits.sigma, self.batch.stats.layout.qs)
        if "b" in self.keep:
            values["b"] = _modes(self.batch, block, fits.x)
        for name, value in values.items():
            if name not in self.arrays:
                self.arrays[name] = jax.tree.map(lambda a: np.empty((self.batch.B, *a.shape[1:]), a.dtype), value)
            for whole, part in zip(jax.tree.leaves(self.arrays[name]), jax.tree.leaves(value), strict=True):
                whole[at] = part[:count]

    def estimates(self) -> Estimates:
        return Estimates._make(self.arrays.get(name) for name in Estimates._fields)


def _Sigma(theta: np.ndarray, sigma: np.ndarray, qs: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    parts = []
    for part, q in zip(np.split(theta, np.cumsum([cov.n_theta(q) for q in qs])[:-1], axis=1), qs, strict=True):
        Lambda = np.zeros((len(theta), q, q), theta.dtype)
        Lambda[(slice(None), *cov.triangle(q))] = part
        parts.append(sigma[:, None, None] ** 2 * (Lambda @ np.swapaxes(Lambda, 1, 2)))
    return tuple(parts)


def _modes(batch: Batch, block: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Random effects of the block's replicates, of which the coordinates are ``x (N, k)``."""
    count, layout = batch.count(block), batch.stats.layout
    moments, bases, _ = batch.inputs(block)
    lanes = jax.tree.map(lambda a: np.asarray(a)[..., :count], (moments, bases, batch.levels(block)))
    moments, bases, levels = lanes
    with silently():
        _, by_factor = profile_and_modes(np.asarray(x)[:count].T, moments, True, levels)
    modes = [by_factor[place.factor][place.start : place.start + place.q] for place in layout.terms]
    return tuple(
        np.moveaxis(linalg.matmul(Z.R_inv, b), -1, 0).swapaxes(1, 2) for Z, b in zip(bases.Z, modes, strict=True)
    )


# --- where the blocks run ------------------------------------------------------------------------------------------


@partial(jit, compiler_options=LANES, static_argnames="sizes")
def _fit_block(moments, bases, count, reml, start, one_minimum, sizes):
    return fit_block(moments, bases, count, reml, start, one_minimum, sizes)


def _on_threads(batch: Batch, reml: bool, results: _Results, workers: int) -> None:
    def work(block: int) -> None:
        moments, bases, start = batch.inputs(block)
        count = np.int32(batch.count(block))
        fits = _fit_block(moments, bases, count, np.bool_(reml), start, batch.one_minimum, batch.sizes)
        results.put(block, jax.device_get(fits))

    for_blocks(batch, work, workers)


def for_blocks(batch: Batch, work: Callable[[int], None], workers: int) -> None:
    """Work on blocks by a pool of threads: XLA lets go of Python's lock, and one program runs on one core at a time.
    The first block is done before all others: it compiles, and makes room for results."""
    x64 = jax.config.read("jax_enable_x64")

    def scoped(block: int) -> None:
        with float64(x64):  # the scope is each thread's own
            work(block)

    scoped(0)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(scoped, range(1, batch.n_blocks)))


def _on_mesh(batch: Batch, reml: bool, results: _Results, mesh: Mesh) -> None:
    """As many blocks at a time as the mesh has devices, one on each."""
    D, N = mesh.size, batch.sizes.block
    over = PartitionSpec(mesh.axis_names)
    template = batch.inputs(0)
    spec = jax.tree.map(lambda a: over if a.shape[-1] == N else PartitionSpec(), template)

    def body(inputs, count, reml):
        inputs = jax.tree.map(lambda a, where: a[0] if where == over else a, inputs, spec)
        moments, bases, start = inputs
        fits = fit_block(moments, bases, count[0], reml, start, batch.one_minimum, batch.sizes)
        return jax.tree.map(lambda a: a[None], fits)

    run = jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec, over, PartitionSpec()), out_specs=over, check_vma=False),
        compiler_options=LANES,
    )

    def spread(where, *parts):
        host = np.stack([np.asarray(part) for part in parts]) if where == over else np.asarray(parts[0])
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, where), lambda index: host[index])

    for first in range(0, batch.n_blocks, D):
        blocks = [min(first + i, batch.n_blocks - 1) for i in range(D)]
        counts = np.array([batch.count(first + i) for i in range(D)], np.int32)
        inputs = jax.tree.map(spread, spec, *(batch.inputs(block) for block in blocks))
        fits = run(inputs, spread(over, *counts), spread(PartitionSpec(), np.bool_(reml)))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            fits = multihost_utils.process_allgather(fits, tiled=True)
        fits = jax.device_get(fits)
        for i in range(D):
            if first + i < batch.n_blocks:
                results.put(first + i, jax.tree.map(lambda a, i=i: a[i], fits))


# --- one fit after the other ----------------------------------------------------------------------------------------


def _one_by_one_at_once(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    axes = replace(batch_axes(stats), classes=None)
    stats = replace(stats, classes=None)
    parts = []
    for i in range(len(stats.yy)):
        one = AtOnce(_index(stats, axes, i), reml).run(fit, None if start is None else start[i])
        left_out: dict[str, Any] = {name: None for name in Estimates._fields if name not in keep}
        parts.append(one._replace(**left_out))
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *parts)


def _one_by_one(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    """One after another over sparse rows where the dense block is large, or where there are many fixed effects; else
    ``jax.vmap`` of a few at a time."""
    axes = replace(batch_axes(stats), classes=None)
    stats = replace(stats, classes=None)
    B = len(stats.yy)
    where = None if np.ndim(stats.XX) == 3 else incidence(_index(stats, axes, 0))
    alone = where is not None or is_wide(stats)
    size = 1 if alone else VMAP_BLOCK
    run = _jitted_estimates(tuple(jax.tree.leaves(axes)))
    parts = []
    for first in range(0, B, size):
        index = np.minimum(np.arange(first, first + size), B - 1)
        begin = None if start is None else start[index]
        if not alone:
            est = run(_index(stats, axes, index), reml, begin)
        else:
            engine = Engine(_index(stats, axes, first), reml, where)
            one = compiled(fit)(engine, None if begin is None else begin[0])
            est = jax.tree.map(lambda a: np.asarray(a)[None], one)
        parts.append(est._replace(**{name: None for name in Estimates._fields if name not in keep}))
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])[:B], *parts)


@cache
def _jitted_estimates(axes: tuple[int, ...]) -> Callable:
    def many(stats, reml, start):
        tree = jax.tree.unflatten(jax.tree.structure(stats), [None if axis < 0 else 0 for axis in axes])
        return jax.vmap(estimate, in_axes=(tree, None, None if start is None else 0))(stats, reml, start)

    return jit(many)
