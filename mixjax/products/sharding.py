"""Cross-products spread over several devices: each holds some levels of the largest factor.

Computation follows the data: the programs that fit one device's products run on all of them, each working off its own
levels, and sums over levels go from device to device. What is not by level of that factor stands on every device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixjax.forks import refuse_forked
from mixjax.machine import is_concrete
from mixjax.products.sums import CrossProducts, FactorProducts, PairProducts, grow


def shard(stats: CrossProducts, mesh: Mesh) -> CrossProducts:
    """Spread the cross-products of one data set over devices, by levels of the factor with most levels.

    :func:`mixjax.estimate` and :func:`mixjax.criterion` of the result run on all devices of the mesh. It pays where the
    levels fill the memory of one device or keep it busy: a hundred thousand and more. The dense block of crossed
    factors stands on every device.

    Args:
        stats: cross-products of one response. For many responses give the mesh to :func:`mixjax.estimate_many`.
        mesh: all its axes together. With several processes every process passes all of ``stats``.

    Returns:
        The same products as arrays of JAX, in the dtype that JAX has then: call this inside ``with jax.enable_x64():``
        for float64. Levels are filled up to a multiple of the number of devices with empty ones, whose modes are zero.

    Example:
        >>> import jax, mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> with jax.enable_x64():
        ...     stats = mj.shard(mj.cross_products(design), jax.make_mesh((1,), ("levels",)))
        ...     est = mj.estimate(stats)
        >>> round(float(est.beta[0]), 6)
        5.5
    """
    refuse_forked()
    if not all(map(is_concrete, jax.tree.leaves(stats))):
        raise TypeError("shard() places arrays of numbers; inside jit their places are already decided")
    if np.ndim(stats.yy):
        raise ValueError("these are cross-products of many responses: give the mesh to mixjax.estimate_many")
    if stats.known:
        raise ValueError(
            "shard() spreads independent levels over devices, and the levels of this model have a known covariance: "
            "fit on one device; many responses are spread by mixjax.estimate_many(mesh=)"
        )
    mesh = Mesh(mesh.devices, mesh.axis_names)  # axes whose use the compiler decides, not every operation
    first = stats.layout.chain[0]
    m = stats.factors[first].ZZ.shape[-1]
    size = -(-m // mesh.size) * mesh.size

    def by_level(a: Any) -> jax.Array:
        a = grow(a, size)
        return _place(a, NamedSharding(mesh, PartitionSpec(*[None] * (a.ndim - 1), mesh.axis_names)))

    def whole(a: Any) -> jax.Array:
        return _place(np.asarray(a), NamedSharding(mesh, PartitionSpec()))

    pairs = []
    for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
        if s == first and t in stats.layout.chain:  # an entry per level
            rows = np.arange(size, dtype=np.int32)
            pairs.append(PairProducts(*map(by_level, (rows, pair.cols, pair.ZZ))))
        else:
            pairs.append(PairProducts(*map(whole, pair)))
    placed = jax.tree.map(whole, replace(stats, factors=(), pairs=()))
    factors = [FactorProducts(*map(by_level if f == first else whole, x)) for f, x in enumerate(stats.factors)]
    sharded: CrossProducts = replace(placed, factors=tuple(factors), pairs=tuple(pairs))
    return sharded


def _place(a: np.ndarray, where: NamedSharding) -> jax.Array:
    a = a.astype(jax.dtypes.canonicalize_dtype(a.dtype))
    return jax.make_array_from_callback(a.shape, where, lambda index: a[index])


def mesh_of(stats: CrossProducts) -> Mesh | None:
    """The mesh that :func:`shard` spread the products over; None where they are in one place."""
    where = getattr(stats.factors[stats.layout.chain[0]].ZZ, "sharding", None)
    if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and not where.is_fully_replicated:
        return where.mesh
    return None


def split_first_axis(tree: Any, mesh: Mesh) -> Any:
    """Arrays whose first axis is a multiple of the number of devices, each device with its part."""
    return jax.tree.map(lambda a: _place(np.asarray(a), NamedSharding(mesh, PartitionSpec(mesh.axis_names))), tree)
