"""Claim: of a million simulated replicates no fit is worse than what a second optimiser finds, without saying so.

Twenty structures and conditions (groups of two or three rows, covariances of deficient rank, responses in units of
1e8 and 1e-8, covariates around 1e6, columns of X that are almost equal, residuals a thousandth of the random effects,
Cauchy errors, binary responses, different designs in one batch, ...) go through ``estimate_many``. Every replicate is
judged:

* worse: the criterion is more than 1e-6 above the best end of a second optimiser, quasi-Newton (BFGS) with line search
  over logarithms of standard deviations, by automatic differentiation, from four starts, one of them the fit itself.
  Of them local: from the fit itself the second optimiser gets no lower either. The likelihood has several maxima.
* value: the criterion is not that of the elimination at the reported theta, to 1e-7 and what the Schur complements lose
  where random effects are much larger than residuals: a hundred roundings of df x (ratio of standard deviations)^2.
* flag: "singular" with a covariance of full rank, or not singular although a lower rank is no worse.
* silent: something is not finite, and the result code does not say so.
* failed: by result code; of them exact: fixed and random effects together reproduce the response, so that there is no
  maximum. The other failures are named.

    python benchmarks/sweep.py --size 1000000
    python benchmarks/sweep.py --size 20000 --only crossed
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine.criterion import in_bases, profile
from mixjax.engine.curvature import profile_lanes
from mixjax.engine.elimination import arrange
from mixjax.estimation.batch import batch_axes, replicates
from mixjax.estimation.blocks import Blocks
from mixjax.optimise.results import Result

CHUNK = 16_384
WORSE, VALUE, ROUNDING = 1e-6, 1e-7, np.finfo(float).eps
Rng = np.random.Generator


# --- the cases -----------------------------------------------------------------------------------------------------


def term(rng: Rng, group: np.ndarray, q: int = 1, structure: str = "us") -> mj.RandomTerm:
    """Random intercepts and slopes on standard normal covariates."""
    Z = np.column_stack([np.ones(len(group)), rng.normal(size=(len(group), q - 1))])
    return mj.RandomTerm(Z=Z, group=group, n_groups=int(group.max()) + 1, structure=structure)


def responses(
    rng: Rng, design: mj.Design, B: int, sd: float | tuple = 1.0, cor: float = 0.0, errors: Any = None
) -> np.ndarray:
    """``Y (B, n)``: fixed effects 1, residual sd 1, random effects of sd ``sd`` and one correlation."""
    n = len(design.X)
    noise = rng.normal(size=(B, n)) if errors is None else errors(rng, (B, n))
    Y = design.X.sum(1) + (noise if design.weights is None else noise / np.sqrt(design.weights))
    for part in design.terms:
        q = part.Z.shape[1]
        sds = np.broadcast_to(sd, q)
        values, vectors = np.linalg.eigh(np.where(np.eye(q, dtype=bool), 1.0, cor))
        root = (sds[:, None] * vectors) * np.sqrt(np.maximum(values, 0.0))
        b = rng.normal(size=(B, part.n_groups, q)) @ root.T
        Y += np.einsum("nq,bnq->bn", part.Z, b[:, part.group])
    return Y


def repeated(m: int, size: int) -> np.ndarray:
    return np.repeat(np.arange(m), size)


def with_x(rng: Rng, *terms: mj.RandomTerm, p: int = 2, weights: Any = None) -> mj.Design:
    n = len(terms[0].group)
    X = np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))])
    return mj.Design(y=np.zeros(n), X=X, terms=terms, weights=weights)


def sleepstudy() -> mj.Design:
    return mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))[0]


class Case(NamedTuple):
    """A design, or many, and ``(rng, design, B) -> Y (B, n)``."""

    design: Callable[[Rng], mj.Design]
    simulate: Callable[[Rng, mj.Design, int], np.ndarray]
    many_designs: bool = False


def collinear(rng: Rng) -> mj.Design:
    design = with_x(rng, term(rng, repeated(10, 5), 2), p=3)
    design.X[:, 2] = design.X[:, 1] + 1e-7 * rng.normal(size=50)
    return design


def far_from_zero(rng: Rng) -> mj.Design:
    design = sleepstudy()
    (one,) = design.terms
    return replace(design, X=design.X + np.array([0.0, 1e6]), terms=(replace(one, Z=one.Z + np.array([0.0, 1e6])),))


def far_responses(rng: Rng, design: mj.Design, B: int) -> np.ndarray:
    near = replace(design, X=design.X - [0.0, 1e6], terms=(replace(design.terms[0], Z=design.terms[0].Z - [0.0, 1e6]),))
    return 1e6 + responses(rng, near, B, (1.0, 0.25))


def treatments(structure: str) -> Callable[[Rng], mj.Design]:
    def make(rng: Rng) -> mj.Design:
        t = np.tile(np.arange(3), 16)
        one = mj.RandomTerm(Z=np.eye(3)[t], group=repeated(8, 6), n_groups=8, structure=structure)
        return mj.Design(y=np.zeros(48), X=np.column_stack([np.ones(48), t == 1]).astype(float), terms=(one,))

    return make


def nested(rng: Rng) -> mj.Design:
    inner = repeated(12, 3)
    return with_x(rng, term(rng, inner), term(rng, inner // 3))


def crossed(rng: Rng) -> mj.Design:
    a, b = rng.integers(0, 7, 40), rng.integers(0, 5, 40)
    return with_x(rng, term(rng, np.unique(a, return_inverse=True)[1]), term(rng, np.unique(b, return_inverse=True)[1]))


def scaled(power: int, **kwargs: Any) -> Callable[[Rng, mj.Design, int], np.ndarray]:
    return lambda rng, design, B: 10.0**power * responses(rng, design, B, **kwargs)


def binary(rng: Rng, design: mj.Design, B: int) -> np.ndarray:
    return (responses(rng, design, B, 0.5) > rng.normal(1.0, 1.5, (B, 1))).astype(float)


def mixed_sizes(rng: Rng, design: mj.Design, B: int) -> np.ndarray:
    """Ratios from 0 to 30 and correlations from -1 to 1 within one batch."""
    parts = [
        responses(rng, design, len(rows), sd, cor)
        for rows, sd, cor in zip(
            np.array_split(np.arange(B), 6), (0.0, 0.1, 1.0, 3.0, 30.0, 0.5), (0, 0.9, -0.3, 1, 0.5, 0), strict=True
        )
    ]
    return np.concatenate(parts)


def cauchy(rng: Rng, shape: tuple) -> np.ndarray:
    return rng.standard_cauchy(shape)


CASES = {
    "tiny groups": Case(lambda rng: with_x(rng, term(rng, np.repeat(np.arange(4), [2, 3, 2, 3]))), responses),
    "sleepstudy": Case(lambda rng: sleepstudy(), partial(responses, sd=(1.0, 0.25))),
    "no variance at all": Case(lambda rng: sleepstudy(), partial(responses, sd=0.0)),
    "correlation 0.999": Case(lambda rng: sleepstudy(), partial(responses, sd=(1.0, 0.25), cor=0.999)),
    "all ratios, unbalanced": Case(
        lambda rng: with_x(rng, term(rng, np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 9]), 2)), mixed_sizes
    ),
    "y in units of 1e8": Case(lambda rng: with_x(rng, term(rng, repeated(10, 4), 2)), scaled(8)),
    "y in units of 1e-8": Case(lambda rng: with_x(rng, term(rng, repeated(10, 4), 2)), scaled(-8)),
    "x and y around 1e6": Case(far_from_zero, far_responses),
    "almost equal columns": Case(collinear, responses),
    "sigma a thousandth": Case(lambda rng: with_x(rng, term(rng, repeated(8, 5), 2)), partial(responses, sd=1e3)),
    "weights 1e-3 to 1e3": Case(
        lambda rng: with_x(rng, term(rng, repeated(10, 6), 2), weights=10.0 ** rng.uniform(-3, 3, 60)), responses
    ),
    "three effects": Case(lambda rng: with_x(rng, term(rng, repeated(8, 6), 3)), mixed_sizes),
    "two terms on a factor": Case(
        lambda rng: with_x(rng, term(rng, repeated(9, 5)), mj.RandomTerm(rng.normal(size=(45, 1)), repeated(9, 5), 9)),
        partial(responses, sd=0.4),
    ),
    "nested": Case(nested, partial(responses, sd=0.5)),
    "crossed": Case(crossed, partial(responses, sd=0.5)),
    "Cauchy errors": Case(lambda rng: with_x(rng, term(rng, repeated(10, 5), 2)), partial(responses, errors=cauchy)),
    "binary responses": Case(lambda rng: with_x(rng, term(rng, repeated(6, 4), 2)), binary),
    "uncorrelated effects": Case(treatments("diag"), partial(responses, sd=0.5)),
    "one correlation": Case(treatments("homcs"), partial(responses, sd=0.5, cor=-0.3)),
    "different designs": Case(
        lambda rng: with_x(rng, term(rng, np.sort(rng.integers(0, 6, 30)), 2)), partial(responses, sd=0.6), True
    ),
}


# --- the second optimiser ------------------------------------------------------------------------------------------

STEPS, HALVINGS = 120, 25
# Logarithms of ratios. Above, the Schur complements lose so many digits that the criterion may seem lower than it is.
LOWEST, HIGHEST = np.log(1e-7), np.log(1e4)


def bfgs(value: Callable, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quasi-Newton with backtracking (Nocedal & Wright 2006, algorithms 3.1, 6.1), each lane on its own: x, value."""
    k = x0.shape[0]
    both = jax.value_and_grad(lambda x: _summed(value(x)), has_aux=True)

    def evaluate(x):
        (_, f), g = both(x)
        return jnp.where(jnp.isfinite(f), f, jnp.inf), jnp.where(jnp.isfinite(g), g, 0.0)

    def step(carry, _):
        x, f, g, H = carry
        d = -(H * g[None]).sum(1)
        slope = (d * g).sum(0)
        downhill = slope < 0
        d, slope = jnp.where(downhill, d, -g), jnp.where(downhill, slope, -(g * g).sum(0))
        d = d * jnp.minimum(1.0, 3.0 / jnp.maximum(jnp.abs(d).max(0), 1e-300))
        slope = (d * g).sum(0)

        def shorter(state):
            t, done, i = state
            f_t = value(x + t * d)
            good = f_t <= f + 1e-4 * t * slope
            return jnp.where(done | good, t, 0.4 * t), done | good, i + 1

        t, found, _ = jax.lax.while_loop(
            lambda s: (s[2] < HALVINGS) & ~s[1].all(), shorter, (jnp.ones_like(f), slope > -1e-14, 0)
        )
        new = jnp.where(found & (slope < -1e-14), x + t * d, x)
        f_new, g_new = evaluate(new)
        s, y = new - x, g_new - g
        sy = (s * y).sum(0)
        Hy = (H * y[None]).sum(1)
        rho = 1.0 / jnp.where(sy > 1e-300, sy, 1.0)
        update = (1.0 + rho * (y * Hy).sum(0)) * rho * s[:, None] * s[None] - rho * (
            Hy[:, None] * s[None] + s[:, None] * Hy
        )
        eye = jnp.broadcast_to(jnp.eye(k)[..., None], H.shape)
        H = jnp.where(sy > 1e-300, H + update, eye)
        return (new, f_new, g_new, H), None

    f, g = evaluate(x0)
    H = jnp.broadcast_to(jnp.eye(k)[..., None], (k, *x0.shape))
    (x, f, *_), _ = jax.lax.scan(step, (x0, f, g, H), None, length=STEPS)
    return x, f


def _summed(f):
    return jnp.where(jnp.isfinite(f), f, 0.0).sum(), f


@jax.jit
def second_opinion(moments, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lowest REML criterion ``(N,)`` found from four starts, where ``(k, N)``, and that from ``own (k, N)``."""
    structures = moments.layout.structures
    logs = np.concatenate([np.isin(np.arange(s.k), s.deviations) for s in structures])[:, None]

    def coordinates(z):
        return jnp.where(logs, jnp.exp(jnp.clip(jnp.where(logs, z, 0.0), LOWEST, HIGHEST)), z)

    def value(z):
        return profile_lanes(coordinates(z), moments, True).criterion

    best, where = jnp.full(own.shape[1:], jnp.inf), own
    plain = [cov.near([scale * jnp.eye(s.q) for s in structures], structures)[:, None] for scale in (0.2, 1.0, 5.0)]
    plain[1] = plain[1] + jnp.where(logs, 0.0, 0.3)
    for x0 in (*plain, own):
        x0 = jnp.broadcast_to(x0, own.shape)
        z0 = jnp.where(logs, jnp.log(jnp.maximum(jnp.abs(jnp.where(logs, x0, 1.0)), 1e-2)), x0)
        z, f = bfgs(value, jnp.where(jnp.isfinite(z0), z0, 0.0))
        best, where = jnp.minimum(best, f), jnp.where(f < best, coordinates(z), where)
    return best, where, f


# --- the judgement -------------------------------------------------------------------------------------------------


@cache
def _programs(axes: tuple[int, ...]) -> tuple[Callable, Callable, Callable]:
    def over(fun):
        def many(stats, theta):
            tree = jax.tree.unflatten(jax.tree.structure(stats), [None if axis < 0 else 0 for axis in axes])
            return jax.vmap(fun, in_axes=(tree, 0))(stats, theta)

        return jax.jit(many)

    def value(stats, theta):
        return mj.criterion(theta, stats)

    def factors(stats, theta):
        return tuple(in_bases(cov.lambdas_of_theta(theta, stats.layout.qs), stats))

    def at_coordinates(stats, x):
        return profile(cov.factors_of(x, stats.layout.structures), arrange(stats), stats, True).criterion

    return over(value), over(factors), over(at_coordinates)


def judge(
    stats: mj.CrossProducts, exact: Callable[[int], bool], counts: Counter, rates: list[float]
) -> list[tuple[int, str, float]]:
    """Fit all replicates of ``stats``; what is wrong with which. ``exact(i)``: replicate i has no residual."""
    begin = time.perf_counter()
    keep = ("theta", "beta", "sigma", "vcov", "criterion", "converged", "singular", "iterations", "result")
    est = mj.estimate_many(stats, keep=keep)
    rates.append(len(est.result) / (time.perf_counter() - begin))
    structures = stats.layout.structures
    B = len(est.result)
    axes, plain = replace(batch_axes(stats), classes=None), replace(stats, classes=None)
    at_theta, factors_of, at_coordinates = _programs(tuple(jax.tree.leaves(axes)))
    lambdas = [np.asarray(F) for F in factors_of(plain, est.theta)]  # per term (B, q, q)
    own = np.asarray(cov.near([jnp.moveaxis(jnp.asarray(F), 0, -1) for F in lambdas], structures))

    batch, best, where, nearby = Blocks(stats, "cpu"), [], [], []
    N = batch.sizes.block
    for block in range(batch.n_blocks):
        index = np.minimum(np.arange(block * N, (block + 1) * N), B - 1)
        opinion = second_opinion(batch.lanes(block, True).moments, own[:, index])
        for whole, part in zip((best, where, nearby), opinion, strict=True):
            whole.append(np.asarray(part))
    # What it found must be so low by the elimination as well.
    where = np.concatenate(where, axis=1)[:, :B]
    best = np.maximum(np.concatenate(best)[:B], np.asarray(at_coordinates(plain, where.T)))

    solved = est.converged
    finite = np.isfinite(est.criterion) & np.isfinite(est.sigma) & (est.sigma > 0)
    for a in (est.theta, est.beta, est.vcov):
        finite &= np.isfinite(a.reshape(B, -1)).all(1)
    gap = est.criterion - best
    local = est.criterion <= np.concatenate(nearby)[:B] + WORSE
    value_gap = np.abs(np.asarray(at_theta(plain, est.theta)) - est.criterion)
    ratios = [np.linalg.svd(np.nan_to_num(F), compute_uv=False) for F in lambdas]
    smallest, largest = np.min([r[:, -1] for r in ratios], axis=0), np.max([r[:, 0] for r in ratios], axis=0)
    is_flagged = est.singular != (smallest < 1e-7)
    maybe = np.flatnonzero(solved & ~est.singular & (smallest < 1e-2))
    for i in maybe:  # would a lower rank cost anything?
        is_flagged[i] = is_flagged[i] or _costs_nothing(replicates(plain, axes, i), own[:, i], est.criterion[i])
    wrong = {
        "worse": solved & (gap > WORSE),
        "value": solved & ~(value_gap <= VALUE + 100 * ROUNDING * np.ravel(stats.n) * largest**2),
        "flag": solved & finite & is_flagged,
        "silent": solved & ~finite,
    }
    failed = np.flatnonzero(~solved)
    no_maximum = np.array([exact(int(i)) for i in failed], bool)
    counts.update(replicates=B, singular=int((est.singular & solved).sum()), failed=len(failed))
    counts.update(exact=int(no_maximum.sum()), local=int((solved & (gap > WORSE) & local).sum()))
    counts.update({f"code {Result(c).name}": int((est.result == c).sum()) for c in np.unique(est.result[~solved])})
    counts.update({"edge": int((est.result == Result.NONDIFFERENTIABLE).sum())})
    counts["evaluations"] += int(est.iterations.sum())
    counts["most"] = max(counts["most"], int(est.iterations.max()))
    measures = {"worse": gap, "value": value_gap, "flag": smallest, "silent": gap}
    found = []
    for name, which in wrong.items():
        counts[name] += int(which.sum())
        which = which & ~local if name == "worse" else which
        found += [(int(i), name, float(measures[name][i])) for i in np.flatnonzero(which)]
    return found + [(int(i), Result(est.result[i]).name, float(gap[i])) for i in failed[~no_maximum]]


def _costs_nothing(stats: mj.CrossProducts, x: np.ndarray, criterion: float) -> bool:
    """Whether a covariance of lower rank has the same criterion."""
    structures = stats.layout.structures
    for t, s in enumerate(structures):
        for c in range(s.n_reductions):
            parts = [np.asarray(part)[:, None] for part in cov.cut(x, structures)]
            parts[t] = s.reduced(parts[t], jnp.array([c]))[0]
            if (np.asarray(parts[t]) == cov.cut(x, structures)[t][:, None]).all():
                continue
            lambdas = cov.factors_of(jnp.concatenate(parts), structures)
            if float(_profile_one(stats, [F[..., 0] for F in lambdas])) <= criterion * (1 + ROUNDING):
                return True
    return False


@jax.jit
def _profile_one(stats, lambdas):
    return profile(lambdas, arrange(stats), stats, True).criterion


def products(case: Case, rng: Rng, B: int) -> tuple[mj.CrossProducts, Callable[[int], bool]]:
    """B replicates, and which of them are reproduced exactly."""
    if not case.many_designs:
        designs = [case.design(np.random.default_rng(0))] * B
        Y = case.simulate(rng, designs[0], B)
        stats = mj.cross_products(designs[0], Y)
    else:
        designs = [case.design(rng) for _ in range(B)]
        Y = [case.simulate(rng, design, 1)[0] for design in designs]
        stats = mj.stack([mj.cross_products(design, y) for design, y in zip(designs, Y, strict=True)])

    def exact(i: int) -> bool:
        design, y = designs[i], Y[i]
        columns = [design.X]
        for part in design.terms:
            indicators = np.eye(part.n_groups)[part.group]
            columns += [indicators * part.Z[:, [j]] for j in range(part.Z.shape[1])]
        columns = np.concatenate(columns, axis=1)
        left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
        return bool(np.linalg.norm(left) <= 1e-10 * np.linalg.norm(y) or np.ptp(y) == 0)

    return stats, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="replicates of all cases together")
    parser.add_argument("--only", help="cases whose name holds this text")
    parser.add_argument("--show", type=int, default=5, help="bad replicates to name per case")
    arguments = parser.parse_args()
    chosen = {name: case for name, case in CASES.items() if (arguments.only or "") in name}
    each = -(-arguments.size // len(chosen))
    columns = ("replicates", "singular", "edge", "failed", "exact", "worse", "local", "value", "flag", "silent")
    print(
        f"{'case':<24}"
        + "".join(f"{name:>11}" for name in columns)
        + f"{'evaluations (max)':>19}{'fits/s':>10}{'s':>7}"
    )
    total: Counter[str] = Counter()
    with jax.enable_x64(True):
        for name, case in chosen.items():
            begin, counts, rates, found = time.perf_counter(), Counter(), [], []
            for chunk in range(-(-each // CHUNK)):
                rng = np.random.default_rng([sum(map(ord, name)), chunk])
                stats, exact = products(case, rng, min(CHUNK, each - chunk * CHUNK))
                found += [(chunk, *rest) for rest in judge(stats, exact, counts, rates)]
            mean = counts["evaluations"] / counts["replicates"]
            print(f"{name:<24}" + "".join(f"{counts[column]:>11,}" for column in columns)
                  + f"{mean:>12.1f} ({counts['most']}){max(rates):>12,.0f}{time.perf_counter() - begin:>7.0f}"
                  )  # fmt: skip
            for code, count in sorted(counts.items()):
                if code.startswith("code"):
                    print(f"    {code.removeprefix('code ')}: {count}")
            for chunk, i, what, size in found[: arguments.show]:
                print(f"    chunk {chunk}, replicate {i}: {what} ({size:.3g})")
            sys.stdout.flush()
            total += counts
    print(f"\n{total['replicates']:,} replicates: " + ", ".join(f"{total[c]:,} {c}" for c in columns[3:]))


if __name__ == "__main__":
    main()
