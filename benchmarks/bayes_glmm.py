"""Claim: posteriors of generalised linear mixed models by Laplace's approximation agree with those of a sampler of all
random effects within Monte Carlo error, but for what laplace_check() says. With 118 random effects the call, check
included, has some 3 times the effective draws a CPU second; with 15 a third, because fixed costs are most of it.

The peer is blackjax's NUTS with its window adaptation (1 000 iterations, then 10 000 draws, 4 chains in vmap, float64,
acceptance 0.9) over fixed effects, log standard deviations and all random effects, non-centred, under the same priors,
one compiled program in the same process. Times are those of second calls; mixjax's is that of the whole call with the
check of Laplace's error, 4 chains of 1 000 draws.

    pip install "mixjax[bayes]"
    python benchmarks/bayes_glmm.py
"""

import time
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

import mixjax as mj
from mixjax.sampling.convergence import ess_bulk
from mixjax.sampling.prior import HalfStudentT

MODELS = {
    "cbpp": ("incidence ~ period + (1 | herd)", {"family": "binomial", "size": "size"}),
    "grouseticks": ("TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", {"family": "poisson"}),
}


def full_program(design, family, priors, warmup=1000, draws=10_000, chains=4):
    """All random effects sampled, non-centred; one term of intercepts."""
    (term,) = design.terms
    group, m, X = jnp.asarray(term.group), term.n_groups, jnp.asarray(design.X)
    y = jnp.asarray(design.y)
    size = None if design.size is None else jnp.asarray(design.size)
    centre = jnp.asarray(design.X[:, 1:].mean(axis=0))
    spread = jnp.asarray(design.X[:, 1:].std(axis=0))
    half = HalfStudentT(3.0, priors.sd.scale)

    def log_density(position):
        b0, slopes, log_sd = position["beta"][0], position["beta"][1:] / spread, position["log_sd"]
        eta = b0 + (X[:, 1:] - centre) @ slopes + (jnp.exp(log_sd) * position["raw"])[group]
        prior = priors.intercept.log_prob(b0) + half.log_prob(jnp.exp(log_sd)) + log_sd
        return prior - 0.5 * (position["raw"] ** 2).sum() - family.density(eta, y, size, ()).sum()

    adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.9)

    def chain(key):
        begin, warm, run = jax.random.split(key, 3)
        raw = 0.1 * jax.random.normal(begin, (m,))
        start = {"beta": jnp.zeros(X.shape[1]), "log_sd": jnp.log(0.5), "raw": raw}
        (state, tuned), _ = adaptation.run(warm, start, num_steps=warmup)
        step = blackjax.nuts(log_density, **tuned).step

        def one(state, key):
            state, info = step(key, state)
            own = state.position
            slopes = own["beta"][1:] / spread
            beta = jnp.concatenate([own["beta"][:1] - (centre @ slopes)[None], slopes])
            found = jnp.concatenate([beta, jnp.exp(own["log_sd"])[None], jnp.exp(own["log_sd"]) * own["raw"]])
            return state, (found, info.is_divergent)

        return jax.lax.scan(one, state, jax.random.split(run, draws))[1]

    return jax.jit(lambda key: jax.vmap(chain)(jax.random.split(key, chains)))


def main():
    warnings.simplefilter("ignore", mj.InferenceWarning)
    for name, (formula, options) in MODELS.items():
        data = mj.datasets.load(name)
        if name == "grouseticks":
            data = data.assign(YEAR=data["YEAR"].astype(str))
        mj.bayes(formula, data, key=1, **options)
        begun = time.process_time()
        post = mj.bayes(formula, data, key=2, **options)
        own_cpu = time.process_time() - begun
        with jax.enable_x64():
            program = full_program(post.design, post.family, post.priors)
            jax.block_until_ready(program(jax.random.key(1)))
            begun = time.process_time()
            found, divergent = jax.block_until_ready(program(jax.random.key(2)))
            cpu = time.process_time() - begun
        found, k = np.asarray(found), len(post.names)
        size, own_size = ess_bulk(found[..., :k]), ess_bulk(post.draws)
        shift = post.laplace_check().table["shift"].to_numpy()
        print(f"\n{name}: {formula}; {int(np.asarray(divergent).sum())} divergences of the peer")
        print(f"{'':22s}{'all effects sampled':>22s}{'ESS':>8s}{'mixjax':>20s}{'ESS':>8s}{'z':>7s}{'shift':>8s}")
        for i, parameter in enumerate(post.names):
            a, b = found[..., i], post.draws[..., i]
            error = np.hypot(a.std() / np.sqrt(size[i]), b.std() / np.sqrt(own_size[i]))
            z = (b.mean() - a.mean() + shift[i] * b.std()) / error
            print(
                f"{parameter:22s}{a.mean():13.4f} ({a.std():.4f}){size[i]:8.0f}{b.mean():11.4f} ({b.std():.4f})"
                f"{own_size[i]:8.0f}{z:7.2f}{shift[i]:8.3f}"
            )
        (b,) = post.b.values()
        effects = found[..., k:]
        worst = np.abs(b[..., 0].mean((0, 1)) - effects.mean((0, 1))) / effects.std((0, 1))
        ratio = b[..., 0].std((0, 1)) / effects.std((0, 1))
        print(f"random effects: means differ by {worst.max():.3f} sd at most, sds by factors {ratio.min():.3f} to "
              f"{ratio.max():.3f}")  # fmt: skip
        rates = own_size.min() / own_cpu, size.min() / cpu
        print(f"effective draws per CPU second: {rates[0]:.0f} and {rates[1]:.0f} of the peer, ratio "
              f"{rates[0] / rates[1]:.1f} ({own_cpu:.1f} and {cpu:.1f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
