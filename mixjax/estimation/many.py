"""The driver of many fits: blocks, threads, devices, and what of the results is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixjax import covariance as cov
from mixjax.engine.criterion import warn_of_float32
from mixjax.engine.engine import AtOnce, engines_of
from mixjax.engine.incidence import incidence
from mixjax.engine.lanes import Lanes
from mixjax.estimation.at_once import fit_lanes, padded_lanes
from mixjax.estimation.batch import Batch, batch_axes, last, replicates
from mixjax.estimation.blocks import Blocks, for_blocks, lanes_at_once, parts_of
from mixjax.estimation.choice import EngineName, check_engine, chosen_engine
from mixjax.estimation.estimate import Estimates, estimate, fit
from mixjax.estimation.lane_program import Fits, Sizes, fit_block
from mixjax.estimation.results import Results
from mixjax.machine import LANES, Array, compiled, float64, is_concrete, jit
from mixjax.products.sizes import in_blocks, in_lanes_at_once, is_wide
from mixjax.products.sums import CrossProducts, check_products
from mixjax.waiting import Waiting

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
        with Waiting(f"fitting {B} data sets"):
            return many_at_once(stats, bool(reml), start, keep)
    waiting = Waiting(f"fitting {B} data sets; the first time, a program is compiled for their structure")
    with waiting, float64(np.asarray(stats.yy).dtype == np.float64 or jax.config.read("jax_enable_x64")):
        warn_of_float32(stats.XX)
        if not in_blocks(stats):
            return _one_by_one(stats, reml, start, keep)
        blocks = Blocks(stats, _platform(mesh))
        workers = blocks.workers
        if chunk is not None:
            workers = max(1, min(workers, -(-int(chunk) // blocks.sizes.block)))
        results = Results(blocks.batch, keep)
        if mesh is None:
            _on_threads(blocks, reml, start, results, workers)
        else:
            _on_mesh(blocks, reml, start, results, mesh)
        return results.estimates()


def many_at_once(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    """By NumPy, which needs nothing of JAX."""
    if not in_lanes_at_once(stats):
        return _one_by_one_at_once(stats, reml, start, keep)
    batch = Batch(stats, at_once=True)
    results = Results(batch, keep)
    for at in parts_of(batch):
        lanes, count = lanes_at_once(batch, at, reml), at.stop - at.start
        begin = None if start is None else last(start[padded_lanes(np.arange(at.start, at.stop))])
        results.put(at, fit_lanes(lanes, count, begin, bool(batch.one_minimum)))
    return results.estimates()


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


# --- where the blocks run ------------------------------------------------------------------------------------------


@partial(jit, compiler_options=LANES, static_argnames="sizes")
def _fit_block(lanes: Lanes, count: Array, start: Array | None, one_minimum: Array, sizes: Sizes) -> Fits:
    return fit_block(lanes, count, start, one_minimum, sizes)


def _inputs(blocks: Blocks, block: int, reml: bool, start: np.ndarray | None) -> tuple[Lanes, np.ndarray | None]:
    return blocks.lanes(block, reml), None if start is None else last(start[blocks.index(block)])


def _on_threads(blocks: Blocks, reml: bool, start: np.ndarray | None, results: Results, workers: int) -> None:
    def begin(block: int) -> Fits:
        lanes, theta = _inputs(blocks, block, reml, start)
        fits: Fits = _fit_block(lanes, np.int32(blocks.count(block)), theta, blocks.one_minimum, blocks.sizes)
        return fits

    def end(block: int, fits: Fits) -> None:
        results.put(blocks.at(block), jax.device_get(fits))

    for_blocks(blocks, begin, end, workers)


def _on_mesh(blocks: Blocks, reml: bool, start: np.ndarray | None, results: Results, mesh: Mesh) -> None:
    """As many blocks at a time as the mesh has devices, one on each."""
    D, N = mesh.size, blocks.sizes.block
    over = PartitionSpec(mesh.axis_names)
    template = _inputs(blocks, 0, reml, start)
    spec = jax.tree.map(lambda a: over if np.shape(a)[-1:] == (N,) else PartitionSpec(), template)

    def body(inputs: tuple[Lanes, Array | None], count: Array) -> Fits:
        lanes, begin = jax.tree.map(lambda a, where: a[0] if where == over else a, inputs, spec)
        fits = fit_block(lanes, count[0], begin, blocks.one_minimum, blocks.sizes)
        in_front: Fits = jax.tree.map(lambda a: a[None], fits)
        return in_front

    run = jit(
        jax.shard_map(body, mesh=mesh, in_specs=(spec, over), out_specs=over, check_vma=False),
        compiler_options=LANES,
    )

    def spread(where: PartitionSpec, *parts: Any) -> jax.Array:
        host = np.stack([np.asarray(part) for part in parts]) if where == over else np.asarray(parts[0])
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, where), lambda index: host[index])

    for first in range(0, blocks.n_blocks, D):
        numbers = [min(first + i, blocks.n_blocks - 1) for i in range(D)]
        counts = np.array([blocks.count(first + i) for i in range(D)], np.int32)
        inputs = jax.tree.map(spread, spec, *(_inputs(blocks, block, reml, start) for block in numbers))
        fits = run(inputs, spread(over, *counts))
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            fits = multihost_utils.process_allgather(fits, tiled=True)
        fits = jax.device_get(fits)
        for i in range(D):
            if first + i < blocks.n_blocks:
                results.put(blocks.at(first + i), jax.tree.map(lambda a, i=i: a[i], fits))


# --- one fit after the other ----------------------------------------------------------------------------------------


def _one_by_one_at_once(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    axes = replace(batch_axes(stats), classes=None)
    stats = replace(stats, classes=None)
    parts = []
    for i in range(len(stats.yy)):
        one = AtOnce(replicates(stats, axes, i), reml).run(fit, None if start is None else start[i])
        left_out: dict[str, Any] = {name: None for name in Estimates._fields if name not in keep}
        parts.append(one._replace(**left_out))
    estimates: Estimates = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *parts)
    return estimates


def _one_by_one(stats: CrossProducts, reml: bool, start: np.ndarray | None, keep: Sequence[str]) -> Estimates:
    """One after another over sparse rows where the dense block is large, or where there are many fixed effects; else
    ``jax.vmap`` of a few at a time."""
    axes = replace(batch_axes(stats), classes=None)
    stats = replace(stats, classes=None)
    B = len(stats.yy)
    left_out: dict[str, Any] = {name: None for name in Estimates._fields if name not in keep}
    parts = []
    if is_wide(stats) or incidence(replicates(stats, axes, 0)) is not None:
        for i, engine in enumerate(engines_of(stats, axes, reml)):
            one = compiled(fit)(engine, None if start is None else start[i])
            parts.append(jax.tree.map(lambda a: np.asarray(a)[None], one._replace(**left_out)))
    else:
        run = _jitted_estimates(tuple(jax.tree.leaves(axes)))
        for first in range(0, B, VMAP_BLOCK):
            index = np.minimum(np.arange(first, first + VMAP_BLOCK), B - 1)
            est = run(replicates(stats, axes, index), reml, None if start is None else start[index])
            parts.append(est._replace(**left_out))
    estimates: Estimates = jax.tree.map(
        lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves])[:B], *parts
    )
    return estimates


@cache
def _jitted_estimates(axes: tuple[int, ...]) -> Callable[..., Estimates]:
    def many(stats: CrossProducts, reml: Array | bool, start: Array | None) -> Estimates:
        tree = jax.tree.unflatten(jax.tree.structure(stats), [None if axis < 0 else 0 for axis in axes])
        return jax.vmap(estimate, in_axes=(tree, None, None if start is None else 0))(stats, reml, start)

    return jit(many)
