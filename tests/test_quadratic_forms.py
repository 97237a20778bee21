"""Expectations of quadratic forms, against dense matrices of the rows, and the start that is made from them."""

import jax
import numpy as np
import pandas as pd
import pytest
from designs import STRUCTURES, Structure, random_design

import mixjax as mj
from mixjax.engine.engine import AtOnce
from mixjax.engine.quadratic_forms import expected_of
from mixjax.estimation.start import minque_start, start_of_products

WIDE = {
    "crossed, q=4 and 3": Structure(((4, 12, "free"), (3, 6, "free"))),
    "two terms on both": Structure(((2, 12, "free"), (1, 12, "same"), (2, 6, "free"), (1, 6, "same"))),
}
ALL = STRUCTURES | WIDE


def dense(design, stats):
    """``P (n, n)`` and ``Z`` of every factor's effects ``(n, q, m)``, rows weighted, Z in the bases of the products."""
    root = np.ones(len(design.y)) if design.weights is None else np.sqrt(design.weights)
    Q, _ = np.linalg.qr(np.asarray(design.X) * root[:, None])
    factors: dict[int, list] = {}
    for place, term, basis in zip(stats.layout.terms, design.terms, stats.Z_bases, strict=True):
        Z = np.asarray(term.Z) * root[:, None] @ basis.R_inv
        columns = Z[:, :, None] * (np.asarray(term.group)[:, None, None] == np.arange(term.n_groups))
        factors.setdefault(place.factor, []).append((place.start, columns))
    by_factor = {
        f: np.concatenate([c for _, c in sorted(parts, key=lambda x: x[0])], 1) for f, parts in factors.items()
    }
    return np.eye(len(root)) - Q @ Q.T, by_factor


def of_moments(stats):
    return AtOnce(stats, True).run(lambda engine: minque_start(engine.moments))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", [0, 1, 3])
def test_traces_are_those_of_dense_matrices(name, p):
    design = random_design(ALL[name], 5, n=60, p=p)
    stats = mj.cross_products(design)
    P, Z = dense(design, stats)
    expected = expected_of(stats)
    V = []
    for f, (a, b) in expected.spots(stats.layout):
        one = Z[f][:, a] @ Z[f][:, b].T
        V.append(P @ (one if a == b else one + one.T))
    among = np.einsum("jab,lba->jl", V, V)
    np.testing.assert_allclose(expected.equations, among, rtol=1e-12, atol=1e-12 * among.max())
    traces = np.trace(V, axis1=1, axis2=2)
    np.testing.assert_allclose(expected.traces, traces, rtol=1e-12, atol=1e-12 * traces.max())


@pytest.mark.parametrize(
    ("name", "p"),
    [*((name, 3) for name in ALL), ("one factor, q=2, weights", 0), ("nested chain of three", 0),
     ("crossed, three factors, weights", 0), ("two terms on both", 0)],
)  # fmt: skip
def test_starts_agree(name, p):
    """From products and from moments, by NumPy and compiled: to rounding, times the condition of the equations."""
    for seed in range(3):
        stats = mj.cross_products(random_design(ALL[name], seed, n=120, p=p))
        ours = start_of_products(stats)
        np.testing.assert_allclose(of_moments(stats), ours, rtol=1e-12, atol=1e-12)
        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.jit(start_of_products)(stats), ours, rtol=1e-12, atol=1e-12)


def test_levels_with_a_known_covariance():
    """Their effects meet each other, in pairs of one factor, and those of other factors."""
    rng = np.random.default_rng(0)
    own = mj.Relationship(0.6 ** np.abs(np.subtract.outer(range(8), range(8))), list("abcdefgh"))
    data = pd.DataFrame({"y": rng.normal(size=60), "x": rng.normal(size=60)}).assign(
        g=rng.choice(list("abcdefgh"), 60), h=rng.choice(list("pqrst"), 60)
    )
    for formula, pairs in (("propto(1 | g, own)", 0), ("propto(x | g, own)", 1), ("propto(x | g, own) + (1 | h)", 1)):
        stats = mj.cross_products(mj.build_design(f"y ~ x + {formula}", data, context={"own": own})[0])
        assert sum(s == t for s, t in stats.layout.pairs) == pairs
        np.testing.assert_allclose(start_of_products(stats), of_moments(stats), rtol=1e-12, atol=1e-12)
