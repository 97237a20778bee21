"""Who runs what: NumPy evaluates at once, XLA compiles.

The engine is written once, against what NumPy and ``jax.numpy`` have in common, and takes its namespace from its
arguments: NumPy arrays in, NumPy arrays out, and nothing is compiled; JAX arrays or tracers in, JAX out. This room has
what the two do not share: loops, updates of entries, and how programs are compiled.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.forks import refuse_forked

# --- one source, two namespaces ----------------------------------------------------------------------------------

# NumPy's array, or JAX's, a tracer among them.
Array = Any

P = ParamSpec("P")
R = TypeVar("R")

_NUMPYS_OWN = (np.ndarray, np.generic, bool, int, float, type(None))
_ndarray = np.ndarray  # asked for hundreds of times in a fit


# glibc gives freed arrays of more than 128 kB back to the system, and pages each new one in again: a quarter of the
# time of many medium ones. It raises that size by itself once a larger one was freed, up to 32 MB; so one is.
np.empty(31 * 2**20, np.uint8)
# What mallopt (malloc.h) calls memory that is free at the end of the heap and goes back, and arrays from the system.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_keeping, _keepers = Lock(), 0


@contextmanager
def memory_kept() -> Iterator[None]:
    """Memory that is freed meanwhile stays with the process and is used again; in the end it goes back.

    For work on arrays of more than 32 MB. glibc has each of those from the system, and to clear the pages took a third
    of the time of a large crossed fit. Where the C library is another one nothing happens.
    """
    global _keepers
    libc = _glibc()
    if libc is None:
        yield
        return
    with _keeping:
        _keepers += 1
        if _keepers == 1:
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _keeping:
            _keepers -= 1
            if not _keepers:
                libc.mallopt(_MMAP_MAX, 2**16)
                libc.mallopt(_TRIM_THRESHOLD, 2**26)
                libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    with suppress(AttributeError, OSError, ValueError):
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return ctypes.CDLL(None)
    return None


def namespace(*arrays: Any) -> Any:
    """``numpy`` where all arrays are NumPy's or plain numbers, else ``jax.numpy``. None says nothing."""
    for array in arrays:
        if type(array) is not _ndarray and not isinstance(array, _NUMPYS_OWN):
            return jnp
    return np


def is_concrete(x: Any) -> bool:
    """True when x holds numbers, False inside a JAX transformation."""
    return not isinstance(x, jax.core.Tracer)


def broadcast_to(x: Any, shape: tuple[int, ...]) -> Any:
    """x in that shape; NumPy takes as long for what has it already as for ten sums."""
    return x if x.shape == shape else namespace(x).broadcast_to(x, shape)


def stack(parts: Sequence[Any]) -> Any:
    """Arrays of one shape along a new first axis; NumPy's ``stack`` takes five times as long for a few short ones."""
    return np.array(parts) if namespace(*parts) is np else jnp.stack(parts)


def set_at(x: Any, index: Any, value: Any) -> Any:
    """A copy of x with ``value`` at ``index``."""
    if isinstance(x, np.ndarray) and namespace(value) is np:
        x = x.copy()
        x[index] = value
        return x
    return jnp.asarray(x).at[index].set(value)


def add_at(x: Any, index: Any, value: Any) -> Any:
    """A copy of x with ``value`` added at ``index``; what stands there several times is added several times."""
    if isinstance(x, np.ndarray) and namespace(value) is np:
        x = x.copy()
        np.add.at(x, index, value)
        return x
    return jnp.asarray(x).at[index].add(value)


def take_or_zero(x: Any, index: Any, axis: int = 0) -> Any:
    """Entries of x along an axis; 0 where an index lies behind its end."""
    if isinstance(x, np.ndarray) and isinstance(index, np.ndarray):
        ends = x.shape[axis]
        if index.size and index.max() >= ends:
            inside = index < ends
            found = np.take(x, np.where(inside, index, 0), axis=axis)
            return np.where(inside.reshape(index.shape + (1,) * (x.ndim - 1 - axis)), found, 0.0)
        return np.take(x, index, axis=axis)
    where = (slice(None),) * axis
    return jnp.asarray(x).at[(*where, index)].get(mode="fill", fill_value=0)


def segment_sum(x: Any, index: Any, size: int, is_sorted: bool = False) -> Any:
    """Sums ``(size,)`` of the entries of x with the same index; those behind the end are left out."""
    if isinstance(x, np.ndarray) and isinstance(index, np.ndarray):
        return np.bincount(index.reshape(-1), x.reshape(-1), size)[:size].astype(x.dtype, copy=False)
    return jax.ops.segment_sum(x, index, size, indices_are_sorted=is_sorted)


def lanes_of(tree: Any, index: np.ndarray, n: int | None = None) -> Any:
    """Lanes ``index`` of the last axis of NumPy's arrays; with n, of those that have so many there.

    In memory as they were, lanes in steps of one number or behind all else, which ``a[..., index]`` is not: sums would
    be made in another order.
    """

    def some(a: np.ndarray) -> np.ndarray:
        if np.ndim(a) == 0 or (n is not None and a.shape[-1] != n):
            return a
        if a.ndim > 1 and a.strides[-1] == max(a.strides):
            return np.moveaxis(np.take(np.moveaxis(a, -1, 0), index, axis=0), 0, -1)
        return np.take(a, index, axis=-1)

    return jax.tree.map(some, tree)


def while_loop(goes_on: Callable[[Any], Any], step: Callable[[Any], Any], state: Any, xp: Any) -> Any:
    """``lax.while_loop``, or Python's under NumPy."""
    if xp is not np:
        return jax.lax.while_loop(goes_on, step, state)
    while goes_on(state):
        state = step(state)
    return state


def scan(step: Callable[[Any, Any], Any], state: Any, over: Any) -> Any:
    """``lax.scan``, or Python's loop under NumPy."""
    if any(not isinstance(leaf, _NUMPYS_OWN) for leaf in jax.tree.leaves((state, over))):
        return jax.lax.scan(step, state, over)
    found = []
    for i in range(len(jax.tree.leaves(over)[0])):
        state, out = step(state, jax.tree.map(lambda a, i=i: a[i], over))
        found.append(out)
    return state, None if found[0] is None else np.stack(found)


def fori_loop(n: int, step: Callable[[Any, Any], Any], state: Any, xp: Any) -> Any:
    """``lax.fori_loop`` from 0, or Python's under NumPy. No steps are not traced: they may look into nothing."""
    if xp is not np and n:
        return jax.lax.fori_loop(0, n, step, state)
    for i in range(n):
        state = step(i, state)
    return state


def cond(predicate: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """``lax.cond``, or Python's under NumPy."""
    if namespace(predicate) is not np:
        return jax.lax.cond(predicate, yes, no)
    return yes() if predicate else no()


def is_nowhere(mask: Any) -> bool:
    """Whether NumPy's mask holds in no lane, so that what it asks for need not be computed; never known under XLA."""
    return isinstance(mask, np.ndarray) and not mask.any()


def as_laid_out(x: Any) -> Any:
    """x, in memory as its axes say: XLA and NumPy would otherwise keep a transpose and read it along columns."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else jax.lax.optimization_barrier(x)


def in_memory(parts: Sequence[Any]) -> Any:
    """:func:`stack` of parts that are computed once: XLA for CPUs computes anew for every reader what is not in memory,
    but leaves stacks of more than eight parts alone."""
    if namespace(*parts) is np:
        return np.array(parts)
    n = len(parts)
    return jax.lax.optimization_barrier(jnp.stack([*parts, *[parts[0]] * (9 - n)]))[:n]


def once(x: Any) -> Any:
    """x, which many elements of a larger array are made of: XLA for CPUs computes it anew for each of them, as long as
    it takes no division. What is not finite becomes NaN."""
    return x if isinstance(x, np.ndarray) else x / jnp.where(jnp.isfinite(x), 1.0, jnp.nan)


def silently() -> AbstractContextManager[None]:
    """The scope in which NumPy does what XLA does: what is not a number is NaN, and nothing is said of it."""
    return np.errstate(all="ignore")


# --- compiling -----------------------------------------------------------------------------------------------------

# XLA's newer CPU code generator doubles the time that programs of many small vector operations take to compile, and
# their run time is the same within 10 %.
QUICK = {"xla_cpu_use_fusion_emitters": False}
# For programs over lanes, of which each core runs its own. Wide vectors are worth a quarter of the run time where the
# processor has them (docs/performance.md).
LANES = {**QUICK, "xla_cpu_prefer_vector_width": 512, "xla_cpu_multi_thread_eigen": False}
# For those that sum over rows within levels: YNNPACK, to which XLA leaves reductions, takes half as long again for
# these, though it is the faster one for sums over levels.
LANES_OF_ROWS = {**LANES, "xla_cpu_experimental_ynn_fusion_type": ""}


# Options that this XLA turned out not to know: fusion emitters have had none since jaxlib 0.11.2.
_unknown: set[str] = set()


def jit(fun: Callable[P, R], compiler_options: dict[str, Any] = QUICK, **options: Any) -> Callable[P, R]:
    """``jax.jit`` with compiler options that suit small programs on CPUs, as far as they can be had.

    JAX takes compiler options only outside its transformations, and XLA only those that it knows: without any left this
    is ``jax.jit``. Settings of JAX that look for mistakes in the caller's code, of ranks that are promoted and of
    NaN, do not hold inside: lanes stand behind all other axes, and NaN is what a fit that fails has.
    """
    plain = jax.jit(fun, **options)
    # By the options that are known: as a rule one.
    quick: dict[tuple[str, ...], Any] = {}

    @wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse_forked()
        with jax.numpy_rank_promotion("allow"), jax.debug_nans(False):
            return run(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        # Inside jit even a constant is traced.
        outside = all(map(is_concrete, jax.tree.leaves((args, kwargs)))) and is_concrete(jnp.zeros(()))
        if outside and jax.default_backend() == "cpu":
            while known := tuple(name for name in compiler_options if name not in _unknown):
                if known not in quick:
                    those = {name: compiler_options[name] for name in known}
                    quick[known] = jax.jit(fun, **options, compiler_options=those)
                try:
                    return quick[known](*args, **kwargs)
                except jax.errors.JaxRuntimeError as error:
                    named = re.search(r"No such compile option: '(\w+)'", str(error))
                    if named is None or named[1] not in known:
                        raise
                    _unknown.add(named[1])
                    del quick[known]
        return plain(*args, **kwargs)

    def programs() -> int:
        return int(sum(made._cache_size() for made in (plain, *quick.values())))

    call._cache_size = programs  # type: ignore[attr-defined]
    return call


@cache
def compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``jit(fun)``: one program for all who ask for it."""
    return jit(fun)


def float64(on: bool = True) -> AbstractContextManager[None]:
    """JAX's scope of 64 bits, which every call enters that takes or gives names; refused in a forked process."""
    refuse_forked()
    scope: AbstractContextManager[None] = jax.enable_x64(on)
    return scope


def on_device() -> bool:
    """Whether programs run on an accelerator: one at a time, each on all of it, with memory of its own."""
    return jax.default_backend() != "cpu"


def n_workers() -> int:
    """Threads by which programs are worked off: one a core, since XLA lets go of Python's lock; none beside the caller
    for an accelerator, which works while the caller goes on."""
    return 1 if on_device() else n_cores()


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
