"""The no-U-turn sampler: blackjax's kernel in coordinates in which the posterior is nearly a standard normal.

These come from the exact Hessian at the mode, so that warm-up has little to learn: a step size, by dual averaging over
the acceptance of all chains together (Hoffman & Gelman 2014, J. Mach. Learn. Res. 15, 1593), and once a better
covariance from the draws of all chains. Chains run side by side in one program that is compiled once per structure of
the model, whatever the priors' numbers, the number of draws and the data.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.machine import Array, jit
from mixjax.sampling.density import Data, density
from mixjax.sampling.mode import Mode
from mixjax.sampling.model_priors import ModelPriors

# Draws of a chain in one call of the program.
CHUNK = 100
# Of dual averaging: how strongly it is pulled to its start, and its forgetting.
PULL, FORGET, DELAY = 0.05, 0.75, 10.0
# Chains begin this many times as far out as the posterior at the mode, so that R-hat can see whether they forget it.
SPREAD = 1.5
# Draws that the Hessian's covariance counts for beside those of warm-up, per coordinate.
WORTH = 3.0


class Sampled(NamedTuple):
    """Draws of all chains.

    Attributes:
        z: ``(chains, draws, dim)``. divergent: ``(chains, draws)``. steps: ``(chains, draws)`` of the integrator.
        step_size: in whitened coordinates. first_call, others: seconds of the program's first call in this process,
            which compiles it or loads it, and of all others.
    """

    z: np.ndarray
    divergent: np.ndarray
    steps: np.ndarray
    step_size: float
    first_call: float
    others: float


class Tuning(NamedTuple):
    """State of dual averaging: log step size, its average, the mean miss of the acceptance, and how many steps."""

    log_step: Any
    average: Any
    miss: Any
    count: Any


def blackjax() -> Any:
    """The package, or an error that says how to get it."""
    try:
        import blackjax as package
    except ImportError:
        raise ImportError(
            "method='nuts' needs blackjax: pip install 'mixjax[bayes]'; method='importance' needs nothing more"
        ) from None
    return package


def sample(
    mode: Mode,
    stats: Data,
    priors: ModelPriors,
    key: Any,
    chains: int,
    draws: int,
    warmup: int,
    target: float,
    max_doublings: int,
) -> Sampled:
    """Draw from the posterior; call in the float64 scope.

    Args:
        key: JAX key. warmup: iterations of each chain before the draws. target: acceptance.
    """
    blackjax()
    dim = len(mode.z)
    begin, key = jax.random.split(key)
    spread = SPREAD * np.asarray(jax.random.normal(begin, (chains, dim)))
    centre, root = mode.z, mode.root
    z = centre + np.clip(spread, -3.0, 3.0) @ root.T
    first_step = np.float64(np.log(0.9 * dim**-0.25))
    untuned = Tuning(first_step, first_step, np.float64(0.0), np.float64(0.0))
    tuning = untuned
    seconds: list[float] = []

    def run(z: Any, tuning: Tuning, at: int, adapting: bool) -> Any:
        begun = time.perf_counter()
        found = jax.tree.map(
            np.asarray,
            _chunk(z, tuning, key, np.int64(at), centre, root, stats, priors, np.float64(target), np.bool_(adapting),
                   first_step, size=CHUNK, max_doublings=max_doublings)
        )  # fmt: skip
        seconds.append(time.perf_counter() - begun)
        return found

    n_warm, done = -(-warmup // CHUNK), 0
    for part in range(n_warm):
        z, tuning, drawn, _, _ = run(z, tuning, done, True)
        done += CHUNK
        if part == 0 and n_warm > 1:
            centre, root = _learned(np.asarray(drawn)[:, CHUNK // 2 :], root)
            tuning = untuned
    tuning = tuning._replace(log_step=tuning.average)
    found: list[tuple[np.ndarray, ...]] = []
    for _ in range(-(-draws // CHUNK)):
        z, _, *of_chunk = run(z, tuning, done, False)
        found.append(tuple(map(np.asarray, of_chunk)))
        done += CHUNK
    all_z, divergent, steps = (np.concatenate(parts, axis=1)[:, :draws] for parts in zip(*found, strict=True))
    return Sampled(all_z, divergent, steps, float(np.exp(tuning.average)), seconds[0], sum(seconds[1:]))


def _learned(drawn: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and root of the covariance of draws ``(chains, n, dim)``, shrunk towards the one that they were made
    with."""
    flat = drawn.reshape(-1, drawn.shape[-1])
    flat = flat[np.isfinite(flat).all(1)]
    n, prior_n = len(flat), WORTH * drawn.shape[-1]
    if n < prior_n:
        return drawn.reshape(-1, drawn.shape[-1]).mean(0), root
    centre = flat.mean(0)
    S = (flat - centre).T @ (flat - centre)
    return centre, np.linalg.cholesky((S + prior_n * root @ root.T) / (n + prior_n))


@partial(jit, static_argnames=("size", "max_doublings"))
def _chunk(
    z: Array,
    tuning: Tuning,
    key: Array,
    first: Array,
    centre: Array,
    root: Array,
    stats: Data,
    priors: ModelPriors,
    target: Array,
    adapting: Array,
    pulled_to: Array,
    size: int,
    max_doublings: int,
) -> tuple[Array, Tuning, Array, Array, Array]:
    from blackjax.mcmc import nuts

    kernel = nuts.build_kernel()

    def whitened(w: Array) -> Array:
        return density(centre + root @ w, stats, priors)

    chains, dim = z.shape
    ones = jnp.ones(dim)
    w = jax.scipy.linalg.solve_triangular(root, (z - centre).T, lower=True).T

    def step(carried: Any, i: Array) -> Any:
        states, tuning = carried
        keys = jax.vmap(lambda chain: jax.random.fold_in(jax.random.fold_in(key, first + i), chain))(jnp.arange(chains))
        states, info = jax.vmap(
            lambda key, state: kernel(key, state, whitened, jnp.exp(tuning.log_step), ones, max_doublings)
        )(keys, states)
        moved = _adapted(tuning, info.acceptance_rate.mean(), target, pulled_to)
        tuning = jax.tree.map(lambda new, old: jnp.where(adapting, new, old), moved, tuning)
        return (states, tuning), (states.position, info.is_divergent, info.num_integration_steps)

    begun = jax.vmap(lambda w: nuts.init(w, whitened))(w)
    (_, tuning), (drawn, divergent, steps) = jax.lax.scan(step, (begun, tuning), jnp.arange(size))
    back = centre + jnp.einsum("ab,ncb->cna", root, drawn)
    return back[:, -1], tuning, back, divergent.T, steps.T


def _adapted(old: Tuning, accepted: Array, target: Array, pulled_to: Array) -> Tuning:
    count = old.count + 1.0
    weight = 1.0 / (count + DELAY)
    miss = (1.0 - weight) * old.miss + weight * (target - jnp.where(jnp.isnan(accepted), 0.0, accepted))
    log_step = pulled_to + jnp.log(2.0) - jnp.sqrt(count) / PULL * miss
    forget = count**-FORGET
    return Tuning(log_step, forget * log_step + (1.0 - forget) * old.average, miss, count)
