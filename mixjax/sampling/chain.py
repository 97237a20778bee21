"""What all posteriors go through: arguments, the mode, draws by importance or by NUTS, integrated fixed effects."""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from mixjax.sampling import importance, nuts
from mixjax.sampling.density import Data, look
from mixjax.sampling.draws import Sampling
from mixjax.sampling.mode import mode
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.priors import Priors

Method = Literal["nuts", "importance", "auto"]
METHODS = ("nuts", "importance", "auto")
# Draws in one call of the program that looks at them.
BATCH = 1024


class Options(NamedTuple):
    """How posteriors are drawn from; see :func:`bayes`. is_quick: importance sampling may be tried first."""

    draws: int
    chains: int
    warmup: int
    target: float
    method: Method
    max_doublings: int
    is_quick: bool


def check_arguments(priors: Any, method: Any, target: Any, integrate: Any = True) -> None:
    """Raise ValueError for what is none."""
    if priors is not None and not isinstance(priors, Priors):
        raise ValueError(f"priors must be mixjax.priors(...), got {priors!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0.1 <= target < 1:
        raise ValueError(f"target must be an acceptance between 0.1 and 1, such as 0.8, got {target!r}")
    if not isinstance(integrate, bool | np.bool_):
        raise ValueError(f"integrate must be True or False, got {integrate!r}")


def sampled(start: np.ndarray, data: Data, model: ModelPriors, key: Any, how: Options) -> tuple[np.ndarray, Sampling]:
    """Draws ``(chains, draws, dim)``; call in the float64 scope."""
    begun = time.perf_counter()
    if how.method == "nuts":
        nuts.blackjax()
    at = mode(start, data, model)
    if how.method == "importance" or (how.method == "auto" and how.is_quick):
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
        found = importance.sample(at, data, model, rng, how.draws * how.chains)
        limit = importance.TRUSTED if how.method == "importance" else importance.PREFERRED
        if found.khat <= limit:
            seconds = time.perf_counter() - begun
            made = Sampling("importance", khat=found.khat, ess=found.ess, seconds=seconds)
            return found.z.reshape(how.chains, how.draws, -1), made
        if how.method == "importance":
            raise ValueError(
                f"importance sampling is not to be trusted here: Pareto k-hat is {found.khat:.2f} (more than {limit}); "
                "use method='nuts'"
            )
    drawn = nuts.sample(at, data, model, key, how.chains, how.draws, how.warmup, how.target, how.max_doublings)
    made = Sampling(
        "nuts",
        int(drawn.divergent.sum()),
        float(drawn.steps.mean()),
        drawn.step_size,
        first_call=drawn.first_call,
        seconds=time.perf_counter() - begun,
    )
    return drawn.z, made


def fixed_effects(z: np.ndarray, stats: Data, model: ModelPriors, rng: np.random.Generator) -> np.ndarray:
    """``(chains, draws, p)``: those that were sampled, and the others drawn given each draw."""
    flat = z.reshape(-1, z.shape[-1])
    S, given = len(flat), flat[:, model.dim - len(model.fixed) :]
    r = model.parts.Q.shape[1]
    drawn = np.empty((S, r))
    for first in range(0, S if r else 0, BATCH):
        at = np.minimum(np.arange(first, first + BATCH), S - 1)
        found = look(flat[at], stats, model)
        own = slice(first, min(first + BATCH, S))
        count = own.stop - first
        mean, root = np.asarray(found.mean)[:count], np.asarray(found.root)[:count]
        drawn[own] = mean + np.einsum("sab,sb->sa", root, rng.standard_normal((count, r)))
    beta: np.ndarray = np.concatenate([given, drawn], axis=1) @ np.asarray(model.to_beta).T
    return beta.reshape(*z.shape[:2], beta.shape[1])
