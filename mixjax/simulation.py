"""Responses drawn from a model: ``y* = offset + X beta + Z b + e``.

A replicate has a random stream of its own, found by its number, and blocks of replicates stand at fixed places: what a
replicate is depends on the design, the parameters, the key and its number, to the last bit, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from mixjax.checks import MOST, check_count, check_memory
from mixjax.design import Design, Labels, RepeatedDesign, check_design
from mixjax.families import Family
from mixjax.machine import LANES, float64, jit, n_cores

# Random numbers of one block of replicates, so that what is made of them stays in the cache.
BLOCK = 2**17
# Negative eigenvalues of a correlation matrix up to here are rounding.
ROUNDING = 1e-8


def simulate_responses(
    design: Design,
    beta: Any,
    sigma: Any,
    Sigma: Sequence[Any],
    key: Any,
    n: int,
    first: int = 0,
    random: Literal["new", "fitted"] = "new",
    b: Sequence[Any] | None = None,
    colour: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Responses of a linear mixed model, drawn anew.

    ``y* = offset + X beta + sum_t Z_t b_t + e`` with ``e ~ N(0, sigma^2 / weights)`` and ``b_t ~ N(0, Sigma_t)``,
    independent from term to term, and from level to level where these have no known covariance.

    Args:
        design: arrays of the model; its y is not looked at.
        beta: ``(p,)`` fixed effects.
        sigma: residual standard deviation, absolute; 0 is allowed.
        Sigma: per term ``(q, q)``, absolute covariance of its random effects; it may be singular.
        key: int or JAX key. Response i depends on ``(key, first + i)``, not on n: ``first=100`` goes on after the first
            100 responses.
        n: number of responses.
        first: number of the first one.
        random: ``"new"``: random effects are drawn. ``"fitted"``: they are ``b`` in every response. The residuals are
            the same in both.
        b: per term ``(n_groups, q)``; looked at only with ``random="fitted"``.
        colour: independent residuals of variance 1, ``(B, nobs)``, to correlated ones.

    Returns:
        ``(n, nobs)`` numpy float64, one response per row.

    Raises:
        ValueError: an argument does not fit the design, or a covariance is none.

    Example:
        >>> import numpy as np
        >>> from mixjax import Design, RandomTerm
        >>> from mixjax.simulation import simulate_responses
        >>> term = RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = Design(y=np.zeros(12), X=np.ones((12, 1)), terms=(term,))
        >>> Y = simulate_responses(design, beta=[5.0], sigma=1.0, Sigma=[[[4.0]]], key=1, n=1000)
        >>> Y.shape, bool(abs(Y.mean() - 5.0) < 0.2)
        ((1000, 12), True)
    """
    check_design(replace(design, y=np.zeros(np.shape(design.X)[0])))
    X = np.asarray(design.X, np.float64)
    nobs, p = X.shape
    beta, sigma = np.asarray(beta, np.float64), np.asarray(sigma, np.float64)
    if beta.shape != (p,):
        raise ValueError(f"beta has shape {beta.shape}; this design has {p} fixed effects")
    if sigma.shape != () or not (np.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be one standard deviation, 0 or more, got {sigma}")
    mean = X @ beta if design.offset is None else X @ beta + np.asarray(design.offset, np.float64)
    scale = np.full(nobs, sigma) if design.weights is None else sigma / np.sqrt(np.asarray(design.weights, np.float64))
    columns = random_columns(design)
    coloured = colour or (lambda draws: draws)
    if random == "fitted":
        mean = mean + columns @ np.concatenate([np.zeros(0), *(effect.ravel() for effect in _checked_modes(design, b))])
        return draw_responses(lambda draws: mean + scale * coloured(draws), nobs, nobs, key, n, first)
    if random != "new":
        raise ValueError(f"random must be 'new' (random effects are drawn) or 'fitted' (they are b), got {random!r}")
    root = columns @ root_of_effects(design, _checked_roots(design, Sigma))

    def respond(draws: np.ndarray) -> np.ndarray:
        responses: np.ndarray = (
            mean + scale * coloured(draws[:, :nobs]) + (root @ np.ascontiguousarray(draws[:, nobs:].T)).T
        )
        return responses

    return draw_responses(respond, nobs, nobs + columns.shape[1], key, n, first)


def simulate_visits(
    design: RepeatedDesign, beta: Any, Sigma: Sequence[Any], key: Any, n: int, first: int = 0
) -> np.ndarray:
    """Responses of repeated measures, drawn anew: ``y* = offset + X beta + e``, the errors of a subject's visits with
    the covariance of its arm, divided by the roots of the weights.

    Random numbers belong to subjects and visits: those that a subject misses change nothing.

    Args:
        design: its y is not looked at. beta: ``(p,)``. Sigma: per arm ``(T, T)``, absolute; may be singular.
        key, n, first: as of :func:`simulate_responses`.

    Returns:
        ``(n, nobs)`` numpy float64.

    Raises:
        ValueError: an argument does not fit the design, or a covariance is none.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> from mixjax.simulation import simulate_visits
        >>> design = mj.RepeatedDesign(
        ...     y=np.zeros(12), X=np.ones((12, 1)), subject=np.repeat(np.arange(4), 3), visit=np.arange(12) % 3,
        ...     n_subjects=4, n_visits=3,
        ... )
        >>> simulate_visits(design, beta=[5.0], Sigma=[np.eye(3)], key=1, n=10).shape
        (10, 12)
    """
    X, beta = np.asarray(design.X, np.float64), np.asarray(beta, np.float64)
    nobs, T = len(X), design.n_visits
    if beta.shape != (X.shape[1],):
        raise ValueError(f"beta has shape {beta.shape}; this design has {X.shape[1]} fixed effects")
    if len(Sigma) != design.n_arms:
        raise ValueError(f"{len(Sigma)} covariances were given for {design.n_arms} arms")
    wrong = [i for i, own in enumerate(Sigma) if np.shape(own) != (T, T)]
    if wrong:
        raise ValueError(f"Sigma[{wrong[0]}] has shape {np.shape(Sigma[wrong[0]])}; of {T} visits it is ({T}, {T})")
    roots = np.stack([symmetric_root(own) for own in Sigma])
    subject, visit = np.asarray(design.subject), np.asarray(design.visit)
    arm = np.zeros(nobs, int) if design.arm is None else np.asarray(design.arm)[subject]
    rows = roots[arm, visit]  # (nobs, T)
    if design.weights is not None:
        rows = rows / np.sqrt(np.asarray(design.weights))[:, None]
    mean = X @ beta if design.offset is None else X @ beta + np.asarray(design.offset)

    n, first = check_count("n", n, 1), check_count("first", first, 0)
    check_memory(f"{n} responses of {nobs} rows", n * nobs * 8, "draw fewer at a time: first= goes on after them")
    Y, width = np.empty((n, nobs)), design.n_subjects * T
    size = max(1, BLOCK // width)
    for begin in range(0, n, size):
        own = slice(begin, min(begin + size, n))
        draws = numpys_draws(key, own.stop - begin, first + begin, width).reshape(-1, design.n_subjects, T)
        Y[own] = mean + np.einsum("bnt,nt->bn", draws[:, subject], rows)
    return Y


def simulate_family(
    design: Design,
    family: Family,
    beta: Any,
    Sigma: Sequence[Any],
    psi: Any,
    key: Any,
    n: int,
    first: int = 0,
    random: Literal["new", "fitted"] = "new",
    b: Sequence[Any] | None = None,
) -> np.ndarray:
    """Responses of a generalised linear mixed model, drawn anew: of a binomial family counts of successes.

    The response of a row is drawn once, whatever its case weight. Nothing is compiled but what draws the random
    effects.

    Args:
        design, beta, key, n, first, random, b: as of :func:`simulate_responses`; ``size`` of the design are trials.
        family: of the response given ``eta = offset + X beta + Z b``. psi: logarithms of its parameters, each
            a number or, where it has columns, ``(nobs,)``.
        Sigma: per term ``(q, q)``, absolute covariance on the scale of eta.

    Returns:
        ``(n, nobs)`` numpy float64.

    Raises:
        ValueError: an argument does not fit the design, a covariance is none, or the family cannot draw.

    Example:
        >>> import numpy as np, mixjax as mj
        >>> from mixjax.simulation import simulate_family
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.zeros(12), X=np.ones((12, 1)), terms=(term,))
        >>> Y = simulate_family(design, mj.families.poisson(), beta=[1.0], Sigma=[[[0.25]]], psi=[], key=1, n=1000)
        >>> Y.shape, bool(abs(Y.mean() - np.exp(1.125)) < 0.2)
        ((1000, 12), True)
    """
    check_design(replace(design, y=np.zeros(np.shape(design.X)[0])))
    X, psi = np.asarray(design.X, np.float64), [np.asarray(one, np.float64) for one in psi]
    nobs, p = X.shape
    beta = np.asarray(beta, np.float64)
    if beta.shape != (p,):
        raise ValueError(f"beta has shape {beta.shape}; this design has {p} fixed effects")
    if len(psi) != family.n_psi:
        raise ValueError(f"psi has {len(psi)} numbers; family {family.name!r} has {family.n_psi} parameters")
    for one in psi:
        if one.shape not in ((), (nobs,)):
            raise ValueError(f"psi has an entry of shape {one.shape}; each is a number, or one for each of {nobs} rows")
    fixed = X @ beta if design.offset is None else X @ beta + np.asarray(design.offset, np.float64)
    size = None if design.size is None else np.asarray(design.size, np.float64)
    columns = random_columns(design)
    words = key_words(key)

    def drawn(eta: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        def one(own: np.ndarray, number: int) -> np.ndarray:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, int(number)])))
            return family.sample(rng, own, size, psi)

        with np.errstate(invalid="ignore", divide="ignore"):
            Y = np.stack([one(own, number) for own, number in zip(eta, numbers, strict=True)])
        if np.isnan(Y).any():
            raise ValueError(
                f"link {family.link!r} of the {family.name} family gives no mean to {int(np.isnan(Y).sum())} of "
                f"{Y.size} drawn linear predictors, because they are 0 or less; use link='log'"
            )
        return Y

    n, first = check_count("n", n, 1), check_count("first", first, 0)
    if random == "fitted":
        eta = fixed + columns @ np.concatenate([effect.ravel() for effect in _checked_modes(design, b)])
        check_memory(f"{n} responses of {nobs} rows", n * nobs * 8, "draw fewer at a time: first= goes on after them")
        return drawn(np.broadcast_to(eta, (n, nobs)), np.arange(first, first + n))
    if random != "new":
        raise ValueError(f"random must be 'new' (random effects are drawn) or 'fitted' (they are b), got {random!r}")
    root = columns @ root_of_effects(design, _checked_roots(design, Sigma))

    def predictors(draws: np.ndarray) -> np.ndarray:
        eta: np.ndarray = fixed + (root @ np.ascontiguousarray(draws.T)).T
        return eta

    etas = draw_responses(predictors, nobs, columns.shape[1], key, n, first)
    return drawn(etas, np.arange(first, first + n))


# --- random numbers, replicate by replicate ------------------------------------------------------------------------


def draw_responses(
    respond: Callable[[np.ndarray], np.ndarray],
    nobs: int,
    width: int,
    key: Any,
    n: int,
    first: int = 0,
    distribution: Literal["normal", "uniform"] = "normal",
) -> np.ndarray:
    """Responses made of independent random numbers, block by block on all cores.

    Args:
        respond: ``(B, width)`` random numbers -> ``(B, nobs)`` responses, row by row; called from several threads.
        nobs: length of a response. width: random numbers that one response needs.
        key, n, first: as in :func:`simulate_responses`.
        distribution: standard normal, or uniform on [0, 1).

    Returns:
        ``(n, nobs)`` numpy float64.
    """
    n, first = check_count("n", n, 1), check_count("first", first, 0)
    if first + n > MOST:
        raise ValueError(f"replicates are numbered up to {MOST}; got first + n = {first + n}")
    check_memory(f"{n} responses of {nobs} rows", n * nobs * 8, "draw fewer at a time: first= goes on after them")
    # Padded, so that similar designs share the program; coarser where numbers are many.
    step = max(16, 1 << max(0, width.bit_length() - 3))
    padded = -(-width // step) * step
    size = 1 << max(0, min(11, (BLOCK // padded).bit_length() - 1))
    out = np.empty((n, nobs))
    with float64():
        key = raw_key(key)

    def work(block: int) -> None:
        with float64():  # the scope is each thread's own
            draws = np.asarray(_draws(key, np.uint32(block * size), size=size, width=padded, distribution=distribution))
        begin, end = max(first, block * size), min(first + n, (block + 1) * size)
        responses = respond(draws[:, :width])
        out[begin - first : end - first] = responses[begin - block * size : end - block * size]

    head, *rest = range(first // size, -(-(first + n) // size))
    work(head)  # compiles
    if rest:
        with ThreadPoolExecutor(n_cores()) as pool:
            list(pool.map(work, rest))
    return out


@partial(jit, compiler_options=LANES, static_argnames=("size", "width", "distribution"))
def _draws(key: Any, first: Any, size: int, width: int, distribution: str) -> Any:
    draw = jax.random.normal if distribution == "normal" else jax.random.uniform
    numbers = first + jnp.arange(size, dtype=jnp.uint32)
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i), (width,), jnp.float64))(numbers)


def as_key(key: Any) -> Any:
    """A JAX key from an int, or from a JAX key of the new or the old style. Call inside the float64 scope."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        try:
            return jax.random.key(int(key))
        except OverflowError:
            raise ValueError(f"key must fit into 64 bits, got {key}") from None
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (typed and key.shape == ()) or (dtype == np.uint32 and key.ndim == 1):
        return key if typed else jax.random.wrap_key_data(jnp.asarray(key))
    raise ValueError(f"key must be an int or one JAX key such as jax.random.key(0), got {key!r}")


def key_words(key: Any) -> list[int]:
    """The words of a key, as a seed of NumPy's generators; those of an int without a program being compiled."""
    # As jax.random.key makes them of an int, by the generator that is JAX's default.
    default = jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
    if type(key) is int and -(2**63) <= key < 2**63 and default == "threefry2x32":
        return [key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF]
    with float64():
        return np.asarray(jax.random.key_data(as_key(key))).ravel().tolist()


def raw_key(key: Any) -> Any:
    """As :func:`as_key`, but an int's without the programs that making a key takes: its words, which JAX takes too."""
    return np.array(key_words(key), np.uint32) if type(key) is int else as_key(key)


def numpys_draws(
    key: Any, n: int, first: int, width: int, distribution: Literal["normal", "uniform"] = "normal", stream: int = 0
) -> np.ndarray:
    """Random numbers ``(n, width)`` of replicates ``first ...``, by NumPy: nothing is compiled. A replicate's depend on
    the key, its number and the stream, of which each is independent of the others."""
    words, out = key_words(key), np.empty((n, width))
    for i, number in enumerate(range(first, first + n)):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, number, stream])))
        if distribution == "normal":
            rng.standard_normal(out=out[i])
        else:
            rng.random(out=out[i])
    return out


# --- the linear part -----------------------------------------------------------------------------------------------


def random_columns(design: Design) -> scipy.sparse.csr_array:
    """Z of all terms, sparse ``(n, sum of n_groups x q)``: term by term, level by level, effect by effect."""
    blocks = []
    for term in design.terms:
        Z = np.asarray(term.Z, np.float64)
        n, q = Z.shape
        columns = np.asarray(term.group)[:, None] * q + np.arange(q)
        shape = (n, term.n_groups * q)
        blocks.append(scipy.sparse.csr_array((Z.ravel(), columns.ravel(), np.arange(n + 1) * q), shape=shape))
    if not blocks:
        return scipy.sparse.csr_array((np.shape(design.X)[0], 0))
    return scipy.sparse.hstack(blocks, format="csr")


def symmetric_root(Sigma: np.ndarray) -> np.ndarray:
    """``R (q, q)`` with ``R R' = Sigma``, of any rank: ``S C^{1/2}`` with standard deviations S and correlations C.

    Unlike a Cholesky factor it is a continuous function of Sigma where the rank drops.

    Raises:
        ValueError: Sigma is not finite, not symmetric, or has a negative eigenvalue.
    """
    Sigma = np.asarray(Sigma, np.float64)
    variances = np.diagonal(Sigma)
    if not np.isfinite(Sigma).all() or (variances < 0).any():
        raise ValueError(f"a covariance must be finite and its diagonal not negative, got {Sigma.tolist()}")
    sd = np.sqrt(variances)
    inverse = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    C = Sigma * np.outer(inverse, inverse)
    values, vectors = np.linalg.eigh((C + C.T) / 2)
    beside_zero = np.abs(Sigma[sd == 0]).max(initial=0.0) > 0
    if beside_zero or np.abs(C - C.T).max() > ROUNDING or values.min() < -ROUNDING:
        raise ValueError(f"a covariance must be symmetric and positive semidefinite, got {Sigma.tolist()}")
    root: np.ndarray = sd[:, None] * (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def _checked_roots(design: Design, Sigma: Sequence[Any]) -> list[np.ndarray]:
    if len(Sigma) != len(design.terms):
        raise ValueError(f"Sigma has {len(Sigma)} covariances; this design has {len(design.terms)} random terms")
    for t, (term, own) in enumerate(zip(design.terms, Sigma, strict=True)):
        q = np.shape(term.Z)[1]
        if np.shape(own) != (q, q):
            raise ValueError(f"Sigma[{t}] has shape {np.shape(own)}; the term has {q} effects: ({q}, {q})")
    return [symmetric_root(own) for own in Sigma]


def _checked_modes(design: Design, b: Sequence[Any] | None) -> list[np.ndarray]:
    if b is None:
        raise ValueError("random='fitted' needs b, the random effects of every term, such as those of the estimates")
    if len(b) != len(design.terms):
        raise ValueError(f"b has {len(b)} parts; this design has {len(design.terms)} random terms")
    modes = [np.asarray(own, np.float64) for own in b]
    for t, (term, own) in enumerate(zip(design.terms, modes, strict=True)):
        shape = (term.n_groups, np.shape(term.Z)[1])
        if own.shape != shape:
            raise ValueError(f"b[{t}] has shape {own.shape}; levels x effects of the term are {shape}")
    return modes


def root_of_effects(design: Design, roots: list[np.ndarray]) -> scipy.sparse.csr_array:
    """A root of the covariance of all effects, in the order of :func:`random_columns`: every level's own, or, of levels
    with a known covariance, that of theirs times it."""
    blocks = [
        scipy.sparse.kron(scipy.sparse.eye_array(term.n_groups) if term.levels is None else term.levels, root)
        for term, root in zip(design.terms, roots, strict=True)
    ]
    if not blocks:
        return scipy.sparse.csr_array((0, 0))
    return scipy.sparse.csr_array(scipy.sparse.block_diag(blocks, format="csr"))


def with_curves(
    design: Design, labels: Labels, Sigma: Sequence[np.ndarray], b: Sequence[np.ndarray]
) -> tuple[Design, tuple[np.ndarray, ...]]:
    """The design and the covariances of a model whose smooths are held where they are: their curves are part of the
    offset, and their effects have no variance."""
    offset, left = np.zeros(len(np.asarray(design.X))), list(Sigma)
    for t, (label, term) in enumerate(zip(labels.terms, design.terms, strict=True)):
        if label.smooth:
            offset = offset + (np.asarray(term.Z) * np.asarray(b[t])[np.asarray(term.group)]).sum(axis=1)
            left[t] = np.zeros_like(Sigma[t])
    if not any(label.smooth for label in labels.terms):
        return design, tuple(left)
    return replace(design, offset=offset + (0.0 if design.offset is None else np.asarray(design.offset))), tuple(left)
