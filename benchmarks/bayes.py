"""Claim: with random effects integrated out, NUTS gives at least 5 times the effective draws per CPU second of the
usual program, which samples them (non-centred); with fixed effects integrated out too, at least 10 times; crossed
factors (Penicillin) at least 10 times. No divergences. A second call of mixjax.bayes takes less than 3 s.

The peer is blackjax's NUTS with its window adaptation (500 iterations, then 1 000 draws, 4 chains in vmap, float64,
acceptance 0.8) over all random effects as standard normals times standard deviations, one compiled program, in the same
process. Both are timed at their second call. mixjax's time is that of the whole call: REML fit, mode, warm-up, draws,
fixed effects. Effective sizes are the smallest of all parameters, by ranks (bulk).

    pip install "mixjax[bayes]"
    python benchmarks/bayes.py
"""

import time
import warnings
from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

import mixjax as mj
from mixjax.sampling.convergence import ess_bulk, rhat
from mixjax.sampling.prior import HalfStudentT

MODELS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "Penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
}
FLAT = mj.priors(intercept=mj.prior.flat())


def usual_program(design, priors, warmup=500, draws=1000, chains=4):
    """All random effects sampled, non-centred: z of every level, log sds, Fisher's z, log sigma, fixed effects."""
    y, X = jnp.asarray(design.y), jnp.asarray(design.X)
    centre = jnp.asarray(design.X[:, 1:].mean(axis=0))
    p = X.shape[1]
    terms = [(jnp.asarray(t.Z), jnp.asarray(t.group), t.n_groups, t.Z.shape[1]) for t in design.terms]
    half = HalfStudentT(3.0, priors.sd.scale)

    def log_density(position):
        b0, slopes = position["beta"][0], position["beta"][1:]
        mean = b0 + (X[:, 1:] - centre) @ slopes
        total = priors.intercept.log_prob(b0)
        log_sigma = position["log_sigma"]
        total += half.log_prob(jnp.exp(log_sigma)) + log_sigma
        for t, (Z, group, _, q) in enumerate(terms):
            sd, raw = jnp.exp(position[f"log_sd{t}"]), position[f"raw{t}"]
            total += half.log_prob(sd).sum() + position[f"log_sd{t}"].sum() - 0.5 * (raw**2).sum()
            if q == 2:
                rho = jnp.tanh(position[f"cor{t}"])
                total += jnp.log1p(-(rho**2))  # lkj(1): uniform
                raw = jnp.stack([raw[:, 0], rho * raw[:, 0] + jnp.sqrt(1.0 - rho**2) * raw[:, 1]], 1)
            mean = mean + (Z * (raw * sd)[group]).sum(1)
        return total - 0.5 * (((y - mean) / jnp.exp(log_sigma)) ** 2).sum() - len(y) * log_sigma

    def start(key):
        position = {"beta": jnp.zeros(p).at[0].set(y.mean()), "log_sigma": jnp.log(0.5 * y.std())}
        for t, (_, _, m, q) in enumerate(terms):
            position |= {f"log_sd{t}": jnp.full(q, jnp.log(0.3 * y.std())), f"raw{t}": jnp.zeros((m, q))}
            if q == 2:
                position[f"cor{t}"] = jnp.zeros(())
        leaves, tree = jax.tree.flatten(position)
        keys = jax.random.split(key, len(leaves))
        moved = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, moved)

    adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.8)

    def chain(key):
        begin, warm, run = jax.random.split(key, 3)
        (state, tuned), _ = adaptation.run(warm, start(begin), num_steps=warmup)
        step = blackjax.nuts(log_density, **tuned).step

        def one(state, key):
            state, info = step(key, state)
            return state, (state.position, info.is_divergent, info.num_integration_steps)

        return jax.lax.scan(one, state, jax.random.split(run, draws))[1]

    return jax.jit(lambda key: jax.vmap(chain)(jax.random.split(key, chains)))


def timed(call):
    """What it gives at its second call, CPU seconds and wall seconds of that, CPU seconds of the first."""
    begun = time.process_time()
    jax.block_until_ready(call(1))
    first = time.process_time() - begun
    begun, wall = time.process_time(), time.perf_counter()
    found = jax.block_until_ready(call(2))
    return found, time.process_time() - begun, time.perf_counter() - wall, first


def of_peer(design, priors):
    with jax.enable_x64():
        program = usual_program(design, priors)
        (position, divergent, steps), cpu, wall, first = timed(lambda key: program(jax.random.key(key)))
    kept = [np.asarray(x).reshape(*x.shape[:2], -1) for name, x in position.items() if not name.startswith("raw")]
    x = np.concatenate(kept, axis=-1)
    dims = sum(np.prod(np.shape(leaf)[2:], dtype=int) for leaf in jax.tree.leaves(position))
    return dims, x, int(np.asarray(divergent).sum()), float(np.asarray(steps).mean()), cpu, wall, first


def of_mixjax(formula, data, **options):
    post, cpu, wall, first = timed(lambda key: mj.bayes(formula, data, key=key, **options))
    how = post.sampling
    return post.model.dim, post.draws, how.divergences, how.steps, cpu, wall, first


def main():
    warnings.simplefilter("ignore", mj.InferenceWarning)
    widths = {"dims": 5, "min ESS": 9, "R-hat": 7, "div": 5, "steps": 7, "first": 8, "CPU s": 8, "wall s": 8}
    head = " " * 34 + "".join(f"{name:>{width}s}" for name, width in widths.items())
    for name, formula in MODELS.items():
        data = mj.datasets.load(name)
        design, _ = mj.build_design(formula, data)
        priors = mj.default_priors(design)
        print(f"\n{name}: {formula}\n{head}{'ESS/CPU s':>11s}{'ratio':>7s}")
        base = None
        ways = {
            "b sampled, non-centred (blackjax)": partial(of_peer, design, priors),
            "b integrated": partial(of_mixjax, formula, data, integrate=False),
            "b, slopes integrated (defaults)": partial(of_mixjax, formula, data),
            "b, all beta integrated (flat)": partial(of_mixjax, formula, data, priors=FLAT),
            "the same by importance": partial(of_mixjax, formula, data, priors=FLAT, method="importance"),
        }
        for way, run in ways.items():
            dims, x, divergences, steps, cpu, wall, first = run()
            is_chain = "importance" not in way
            size = float(ess_bulk(x).min())
            rate = size / cpu
            base = base or rate
            print(
                f"{way:34s}{dims:5d}{size:9.0f}{rhat(x).max() if is_chain else float('nan'):7.3f}{divergences:5d}"
                f"{steps:7.1f}{first:8.1f}{cpu:8.2f}{wall:8.2f}{rate:11.0f}{rate / base:7.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
