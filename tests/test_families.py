"""Families: densities and their derivatives, against JAX, SciPy, quadrature and 50 digits."""

from dataclasses import replace
from decimal import Decimal, getcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import mixjax as mj
from mixjax.families import family_of
from mixjax.families.links import LINEAR, LINKS, minus_logs_derivatives

make = mj.families
FAMILIES = [
    constructor(link)
    for constructor in (
        make.binomial, make.poisson, make.nbinom, make.gamma, make.inverse_gaussian, make.beta, make.gaussian,
    )
    for link in constructor().links
]  # fmt: skip
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.name}-{f.link}".replace("/", ":"))
ETA = np.array([-4.0, -3.1, -1.3, -0.4, 0.3, 1.0, 2.2, 2.9])
COUNTS = np.array([0.0, 1.0, 2.0, 0.0, 3.0, 5.0, 4.0, 5.0])
SIZE = np.array([5.0, 4.0, 6.0, 3.0, 3.0, 9.0, 4.0, 6.0])


def eta_of(family):
    return np.abs(ETA) if family.link in ("inverse", "1/mu^2") else ETA


def y_of(family):
    if family.name == "beta":
        return (COUNTS + 0.1) / 6
    return COUNTS + 0.3 if family.name in ("gamma", "inverse_gaussian") else COUNTS


def rows_of(family, psi=0.4):
    return eta_of(family), y_of(family), SIZE if family.name == "binomial" else None, (psi,) * family.n_psi


def close(one, other, rtol, atol=0.0):
    one, other = np.broadcast_arrays(one, other)
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


# --- derivatives -------------------------------------------------------------------------------------------------


def chain(family, eta, y, size, psi):
    """Every closed form, and JAX's derivative of the one before it."""
    eta, y = jnp.asarray(eta), jnp.asarray(y)
    ones, zeros = jnp.ones_like(eta), jnp.zeros_like(eta)
    psi = tuple(p + zeros for p in psi)

    def by(what, e=zeros, p=zeros):
        return jax.jvp(lambda a, b: what(a, y, size, b), (eta, psi), (e, tuple(p for _ in psi)))

    closed, by_eta = by(family.derivatives, e=ones)
    density, slope = by(family.density, e=ones)
    fisher, fisher_by_eta = by(lambda a, _, s, b: family.expected(a, s, b), e=ones)
    nothing = zeros if not family.n_psi else None
    by_psi = nothing if nothing is not None else by(family.derivatives, p=ones)[1]
    density_by_psi = nothing if nothing is not None else by(family.density, p=ones)[1]
    fisher_by_psi = nothing if nothing is not None else by(lambda a, _, s, b: family.expected(a, s, b), p=ones)[1]
    return closed, by_eta, density, slope, fisher, fisher_by_eta, by_psi, density_by_psi, fisher_by_psi


@by_family
@pytest.mark.parametrize("psi", [-2.5, 0.4, 6.0])
def test_derivatives_are_those_of_the_density(family, psi, x64):
    """Each closed form is JAX's derivative of the one before it, the first of the density.

    Of numbers with 16 digits sums of some ten terms, of which differences may lose four (b of the binomial against a,
    A' + C mu' of the beta): 1e-10 of the largest of a row's derivatives."""
    if psi != 0.4 and not family.n_psi:
        return
    rows = rows_of(family, psi)
    closed, by_eta, density, slope, fisher, fisher_by_eta, by_psi, density_by_psi, fisher_by_psi = chain(family, *rows)
    near = partial(close, rtol=1e-9, atol=1e-10)
    near(closed.by_eta[0], density)
    near(closed.by_eta[1], slope)
    for order in range(1, 4):
        near(closed.by_eta[order + 1], by_eta.by_eta[order])
    near(fisher.by_eta[0], fisher_by_eta.w)
    near(fisher.by_eta[1], fisher_by_eta.by_eta[0])
    assert len(closed.by_psi) == len(closed.by_psi_twice) == family.n_psi
    if family.n_psi:
        near(closed.by_psi[0][0], density_by_psi)
        for order in range(4):
            near(closed.by_psi[0][order], by_psi.by_eta[order])
        for order in range(3):
            near(closed.by_psi_twice[0][0][order], by_psi.by_psi[0][order])
        near(fisher.by_psi[0][0], fisher_by_psi.w)
        near(fisher.by_psi[0][1], fisher_by_psi.by_eta[0])
        near(fisher.by_psi_twice[0][0], fisher_by_psi.by_psi[0][0])
    if family.log_concave:
        assert (closed.by_eta[2] >= 0).all()


@by_family
def test_numpy_is_jax(family, x64):
    rows = rows_of(family)
    for ask in (family.derivatives, lambda eta, y, size, psi: family.expected(eta, size, psi)):
        at_once, compiled = ask(*rows), jax.jit(ask)(*map(jnp.asarray, rows[:2]), *rows[2:])
        for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(compiled), strict=True):
            assert isinstance(one, np.ndarray)
            close(one, other, 1e-11, 1e-12)
    for what in (family.density, family.deviance):
        close(what(*rows), what(*map(jnp.asarray, rows[:2]), *rows[2:]), 1e-12, 1e-12)


@by_family
def test_single_precision(family):
    """The types of the rows are kept, by both. The fourth derivative of the probit loses five digits where the normal
    tail begins: 1e5 roundings of 6e-8 of terms a hundred times smaller."""
    eta, y, size, psi = rows_of(family)
    exact = family.derivatives(eta, y, size, psi)
    single = [None if a is None else a.astype(np.float32) for a in (eta, y, size)]
    psi32 = tuple(np.float32(p) for p in psi)
    for convert in (np.asarray, jnp.asarray):
        rows = [None if a is None else convert(a) for a in single]
        found = family.derivatives(*rows, psi32)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert one.dtype == np.float32
            close(one, other, 1e-3, 1e-3 * np.abs(other).max())


@by_family
def test_lanes(family):
    eta, y, size, psi = rows_of(family)
    lanes = np.array([-0.5, 0.4, 1.3])
    found = family.derivatives(eta[:, None] + 0 * lanes, y[:, None], None if size is None else size[:, None],
                               (lanes,) * len(psi))  # fmt: skip
    alone = family.derivatives(eta, y, size, psi)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        one = np.broadcast_to(one, (8, 3))
        close(one[:, 1], other, 1e-13, 1e-13)


@by_family
def test_nothing_is_nan(family, x64):
    """At the ends of what numbers reach, JAX's gradients neither."""
    eta = jnp.array([-700.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 700.0])
    y = {"beta": 0.3, "gamma": 2.0, "inverse_gaussian": 2.0}.get(family.name, 1.0)
    size = 1.0 if family.name == "binomial" else None
    psi = (0.4,) * family.n_psi

    def density(e):
        return family.density(e, y, size, psi)

    assert not jnp.isnan(density(eta)).any()
    assert not jnp.isnan(jax.vmap(jax.grad(density))(eta)).any()
    middle = family.derivatives(eta[1:-1], y, size, psi)
    assert not any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(middle))


def normal_logs(x):
    """``-log Phi(x)``, x < 0, and four derivatives in 50 digits: Laplace's continued fraction, and the differential
    equation ``a'' = a'^2 - x a'``."""
    getcontext().prec = 50
    x = Decimal(x)
    m = Decimal(0)
    for n in range(3000, 0, -1):
        m = n / (-x + m)
    a1 = x - m
    a2 = a1 * a1 - x * a1
    a3 = 2 * a1 * a2 - a1 - x * a2
    a4 = 2 * a2 * a2 + 2 * a1 * a3 - 2 * a2 - x * a3
    two_pi = Decimal("6.28318530717958647692528676655900576839433879875021")
    return x * x / 2 + two_pi.ln() / 2 + (-a1).ln(), a1, a2, a3, a4


@pytest.mark.parametrize("x", ["-0.75", "-1.5", "-2.984375", "-3.015625", "-5", "-10", "-30"])
def test_the_normal_tail_keeps_its_digits(x):
    """Where the continued fraction and the differences meet both have lost five digits of the fourth derivative."""
    a, b = minus_logs_derivatives("probit", np.array([float(x), -float(x)]))
    exact = [float(value) for value in normal_logs(x)]
    close([one[0] for one in a], exact, 5e-11)
    close([one[1] for one in b], np.array(exact) * [1, -1, 1, -1, 1], 5e-11)


def test_the_complementary_log_log_keeps_its_digits():
    """``-log(1 - exp(-e))`` is ``-eta + e/2 - e^2/24 + e^4/2880 - e^6/181440``: by eta, term by term."""
    eta = np.array([-30.0, -12.0, -6.0, -3.0])
    a, _ = minus_logs_derivatives("cloglog", eta)
    e = np.exp(eta)
    for order in range(5):
        series = sum(c * n**order * e**n for n, c in ((1, 1 / 2), (2, -1 / 24), (4, 1 / 2880), (6, -1 / 181440)))
        close(a[order], series - {0: eta, 1: 1}.get(order, 0), 1e-12)


@pytest.mark.parametrize("link", ["log", "sqrt"])
def test_a_large_size_is_poisson(link):
    """They differ by ``(y - (mu - y)^2 ...) / 2k``: some 1e2 / 1e9 here; what subtracts log gamma functions of 1e9 is
    off by 1e-16 of 2e10, which is 2e-6."""
    eta, y = np.abs(ETA), COUNTS
    poisson, nbinom = make.poisson(link), make.nbinom(link)
    for psi in (np.log(1e9), np.log(1e12)):
        found = nbinom.derivatives(eta, y, None, (psi,))
        for one, other in zip(found.by_eta, poisson.derivatives(eta, y, None, ()).by_eta, strict=True):
            close(one, other, 1e-6 * 1e9 / np.exp(psi) + 1e-14, 1e-6 * 1e9 / np.exp(psi))
        mu = poisson.mean(eta)
        # the leading term of the derivative by log k
        close(found.by_psi[0][0], ((y - mu) ** 2 - y) / (2 * np.exp(psi)), 1e-6, 1e-14 / np.exp(psi) * 1e3)


def test_small_dispersion_is_normal():
    """``log y`` is normal with variance phi, up to ``(1/2 + t - t^3/6 ...)``: with phi 1e-10 and t of 1e-5 to 1e-5."""
    phi, t = 1e-10, np.array([-1e-5, 0.0, 2e-5])
    c = make.gamma().density(-t, np.ones(3), None, (np.log(phi),))
    close(c, 0.5 * np.log(2 * np.pi * phi) + t**2 / (2 * phi), 0, 2e-5)


eta_values = st.floats(-6, 6).filter(lambda x: abs(x) > 1e-3)


@by_family
@settings(max_examples=15, deadline=None)
@given(eta=eta_values, draw=st.floats(0.01, 0.99), psi=st.floats(-4, 8))
@example(eta=3.5, draw=0.9375, psi=0.0)
def test_expected_curvature_is_positive_and_differences_agree(family, eta, draw, psi):
    """Slopes against central differences: their error is ``h^2`` of the third and ``eps / h`` of the value, of the
    density itself at least of its constants, logarithms of factorials that may cancel."""
    eta = abs(eta) if family.link in ("inverse", "1/mu^2") else eta
    y = {"binomial": np.round(7 * draw), "poisson": np.round(20 * draw), "nbinom": np.round(20 * draw)}.get(
        family.name, draw
    )
    size, psi = (7.0 if family.name == "binomial" else None), (psi,) * family.n_psi
    h = 1e-4 * min(1, abs(eta))
    low, middle, high = (family.derivatives(np.array([eta + d]), y, size, psi) for d in (-h, 0, h))
    assert (family.expected(np.array([eta]), size, psi).w >= 0).all()
    scale = sum(np.abs(leaf).max() for leaf in jax.tree.leaves(middle))
    for order in range(4):
        difference = (high.by_eta[order] - low.by_eta[order]) / (2 * h)
        rounding = 1e-15 * (np.abs(middle.by_eta[order]) + (order == 0)) / h
        close(difference, middle.by_eta[order + 1], 1e-4, 1e-5 * scale + 10 * rounding.max())


# --- distributions -----------------------------------------------------------------------------------------------


def distribution(family, mu, size, psi):
    """SciPy's."""
    k = np.exp(psi[0]) if psi else None
    return {
        "binomial": lambda: stats.binom(size, mu),
        "poisson": lambda: stats.poisson(mu),
        "nbinom": lambda: stats.nbinom(k, k / (k + mu)),
        "gamma": lambda: stats.gamma(1 / k, scale=mu * k),
        "inverse_gaussian": lambda: stats.invgauss(mu * k, scale=1 / k),
        "beta": lambda: stats.beta(mu * k, (1 - mu) * k),
        "gaussian": lambda: stats.norm(mu, k),
    }[family.name]()


@by_family
def test_density_mean_and_variance(family):
    """All constants are there. SciPy takes 1 - p, which has lost digits where p is near 1: eta up to 1.5."""
    eta, y, size, psi = rows_of(family)
    eta = np.minimum(eta, 1.5)
    mu = family.mean(eta)
    own = distribution(family, mu, size, psi)
    log_density = own.logpmf(y) if hasattr(own, "logpmf") and family.name in DISCRETE else own.logpdf(y)
    close(family.density(eta, y, size, psi), -log_density, 1e-11, 1e-12)
    close(own.mean(), mu * (1 if size is None else size), 1e-12)
    close(own.var(), family.variance(mu, size, psi), 1e-10)
    close(family.natural(psi), np.exp(psi), 1e-15)


DISCRETE = ("binomial", "poisson", "nbinom")


@by_family
def test_expected_curvature(family):
    """Against c2 summed over y, or by the trapezoidal rule over logarithms or logits of y, which converges
    geometrically. Of the beta with more precision: otherwise there is mass nearer to 1 than numbers are."""
    x = np.linspace(-35, 35, 4001)
    for eta in (0.7, 1.4) if family.link in ("inverse", "1/mu^2") else (-1.2, 0.6):
        size = 6.0 if family.name == "binomial" else None
        psi = (3.0 if family.name == "beta" else 0.4,) * family.n_psi
        if family.name in DISCRETE:
            y, weight = np.arange(7.0 if size else 3000.0), 1.0
        elif family.name == "beta":
            y = 1 / (1 + np.exp(-x))
            weight = y * (1 - y) * (x[1] - x[0])
        else:
            y, weight = (x, x[1] - x[0]) if family.name == "gaussian" else (np.exp(x), np.exp(x) * (x[1] - x[0]))
        found = family.derivatives(np.full(y.shape, eta), y, size, psi).by_eta
        total = (np.exp(-found[0]) * found[2] * weight).sum()
        close(total, family.expected(np.array([eta]), size, psi).w[0], 1e-9)


@by_family
def test_draws(family, x64):
    """Mean and variance within five Monte Carlo standard errors."""
    n, size, psi = 40_000, (6.0 if family.name == "binomial" else None), (0.4,) * family.n_psi
    eta = 0.8
    y = np.asarray(family.draw(jax.random.key(1), jnp.full(n, eta), size, psi))
    assert y.shape == (n,)
    mu = float(family.mean(np.array(eta)))
    mean, variance = mu * (size or 1), float(family.variance(mu, size, psi))
    assert abs(y.mean() - mean) < 5 * np.sqrt(variance / n)
    spread = (y - mean) ** 2
    assert abs(spread.mean() - variance) < 5 * spread.std() / np.sqrt(n)
    family.check(y, None if size is None else np.full(n, size), "y")


@by_family
def test_starts(family):
    _, y, size, _ = rows_of(family)
    eta = family.eta_start(y, size)
    mu = family.mean(eta)
    assert np.isfinite(eta).all()
    close(LINEAR[family.link](LINKS[family.link](eta)), eta, 1e-9, 1e-12)
    for center in (mu, np.full_like(mu, mu.mean())):
        start = family.psi_start(y, center, size)
        assert start.shape == (family.n_psi,)
        assert np.isfinite(start).all()
    assert family.psi_start(np.stack([y, y], 1), np.stack([mu, mu], 1)).shape == (family.n_psi, 2)


@pytest.mark.parametrize("name", ["nbinom", "gamma", "inverse_gaussian", "beta", "gaussian"])
def test_moments_find_psi(name, x64):
    family = family_of(name, linear=True)
    psi, n = 0.9, 20_000
    eta = jnp.full(n, 0.4)
    y = np.asarray(family.draw(jax.random.key(2), eta, None, (psi,)))
    close(family.psi_start(y, family.mean(np.asarray(eta))), psi, 0, 0.15)


def test_deviance_is_that_of_r():
    """R's dev.resids, at y = 0 and y = size too."""
    eta, y = ETA, COUNTS
    mu = make.binomial().mean(eta)

    def log(a, b):
        return np.where(a == 0, 0.0, np.log(np.where(a == 0, 1, a) / b))

    found = make.binomial().deviance(eta, y, SIZE, ())
    p = y / SIZE
    close(found, 2 * SIZE * (p * log(p, mu) + (1 - p) * log(1 - p, 1 - mu)), 1e-11, 1e-12)
    mu = np.exp(eta)
    close(make.poisson().deviance(eta, y, None, ()), 2 * (y * log(y, mu) - (y - mu)), 1e-12, 1e-12)
    found = make.nbinom().deviance(eta, y, None, (0.4,))
    k = np.exp(0.4)
    close(found, 2 * (y * log(y, mu) - (y + k) * np.log((y + k) / (mu + k))), 1e-11, 1e-12)
    y = y + 0.3
    close(make.gamma().deviance(eta, y, None, (0.4,)), -2 * (np.log(y / mu) - (y - mu) / mu), 1e-11, 1e-12)
    close(make.inverse_gaussian().deviance(eta, y, None, (0.4,)), (y - mu) ** 2 / (y * mu**2), 1e-11)
    close(make.gaussian("log").deviance(eta, y, None, (0.4,)), (y - mu) ** 2, 1e-12)


# the mean of 1 / eta does not exist
@pytest.mark.parametrize("link", ["identity", "log", "sqrt", "logit", "probit", "cloglog", "cauchit"])
def test_integrated_mean(link):
    family = next(f for f in FAMILIES if f.link == link)
    for eta, sd in ((-1.5, 0.3), (0.4, 1.0), (2.0, 5.0), (-3.0, 5.0)):

        def integrand(z, eta=eta, sd=sd):
            return family.mean(np.array(eta + sd * z)) * stats.norm.pdf(z)

        found = family.integrated_mean(np.array(eta), np.array(sd**2))
        limits = (-12, 25) if link == "log" else (-10, 10)
        exact = integrate.quad(integrand, *limits, limit=400, epsabs=1e-13, epsrel=1e-12, points=[-eta / sd])[0]
        close(found, exact, 1e-10, 1e-10)
    close(family.integrated_mean(np.array(0.3), np.array(0.0)), family.mean(np.array(0.3)), 1e-14)
    if link == "log":
        with pytest.raises(ValueError, match="does not exist"):
            make.gamma("inverse").integrated_mean(np.array(1.0), np.array(1.0))


# --- what users write ------------------------------------------------------------------------------------------------


def custom_nbinom():
    def loglik(y, eta, size, psi):
        k, mu = jnp.exp(psi[0]), jnp.exp(eta)
        gammas = jax.lax.lgamma(y + k) - jax.lax.lgamma(k) - jax.lax.lgamma(y + 1)
        return gammas - k * jnp.log1p(mu / k) + y * (eta - jnp.log(k + mu))

    return make.custom(loglik, jnp.exp, psi=("log_size",), start=(0.5,), name="mine")


def test_custom_is_built_in():
    mine, own = custom_nbinom(), make.nbinom()
    for shape in (slice(None), np.s_[:, None]):
        eta, y = ETA[shape], COUNTS[shape]
        psi = (np.array([0.4]) if eta.ndim == 2 else 0.4,)
        found, expected = mine.derivatives(eta, y, None, psi), own.derivatives(eta, y, None, psi)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert isinstance(one, np.ndarray)
            assert one.shape == eta.shape
            close(one, other, 1e-10, 1e-11)
        close(mine.density(eta, y, None, psi), own.density(eta, y, None, psi), 1e-11, 1e-12)
    assert mine == mine
    assert mine != custom_nbinom()
    assert len({mine, mine}) == 1
    assert mine.psi_start(COUNTS, COUNTS) == [0.5]
    close(mine.mean(ETA), np.exp(ETA), 1e-15)
    close(mine.integrated_mean(np.array(0.2), np.array(0.5)), np.exp(0.45), 1e-10)
    for ask, match in ((lambda: mine.expected(ETA, None, (0.4,)), "observed"),
                       (lambda: mine.draw(jax.random.key(0), ETA, None, (0.4,)), "give draw=")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ask()
    with pytest.raises(ValueError, match="start must be 1 finite"):
        make.custom(lambda *_: 0.0, jnp.exp, psi=("a",), start=(1, 2))


@pytest.mark.parametrize(
    ("text", "name", "link"),
    [
        ("Bernoulli", "binomial", "logit"), ("binomial('probit')", "binomial", "probit"),
        ("binomial(link = cloglog)", "binomial", "cloglog"), ("Gamma", "gamma", "log"), ("poisson()", "poisson", "log"),
        ("negative_binomial", "nbinom", "log"), ("negbin", "nbinom", "log"), ("nbinom2", "nbinom", "log"),
        ("inverse.gaussian(link='1/mu^2')", "inverse_gaussian", "1/mu^2"), ("betar", "beta", "logit"),
        ("beta_family", "beta", "logit"), ("gaussian(log)", "gaussian", "log"),
    ],
)  # fmt: skip
def test_spellings(text, name, link):
    family = family_of(text)
    assert (family.name, family.link) == (name, link)
    assert family == family_of(name, link)
    assert hash(family) == hash(family_of(name, link))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("binomal",), "did you mean 'binomial'"),
        (("zipf",), "there is no family 'zipf'"),
        (("quasipoisson",), "observation-level random effect"),
        (("nbinom1",), "NB2"),
        (("gaussian",), "use mj.lmm"),
        ((make.gaussian(),), "use mj.lmm"),
        (("poisson", "logit"), "its links are 'log', 'sqrt'"),
        (("binomial('lgit')",), "its links are 'logit'"),
        (("binomial('probit')", "logit"), "link is given twice"),
        ((make.binomial("probit"), "logit"), "link is given twice"),
        ((3,), "family must be a name"),
        (("poisson", 2), "link must be the name"),
    ],
)
def test_what_is_no_family(args, match):
    with pytest.raises(ValueError, match=match):
        family_of(*args)


def test_objects_and_constructors_are_families():
    assert family_of(make.binomial, "probit") == make.binomial("probit") == family_of(make.binomial("probit"))
    assert family_of(make.gaussian(), linear=True).link == "identity"


@pytest.mark.parametrize(
    ("name", "y", "size", "match"),
    [
        ("binomial", [0, 2, 1], None, "give size="),
        ("binomial", [0, 0.5, 1], None, "proportions say nothing"),
        ("binomial", [0, 5, 1], [3, 4, 5], "more successes than trials in 1 rows, first 5 of 4 in row 2"),
        ("binomial", [0, 1, 1], [3, 0, 5], "no trials"),
        ("binomial", [-1, 1, 1], [3, 4, 5], "negative"),
        ("binomial", [0, 1, np.nan], None, "1 of 3 responses are missing"),
        ("binomial", [0, 0, 0], None, "every response is 0"),
        ("binomial", [1, 1, 1], None, "every response is a success"),
        ("poisson", [0, -1, 3], None, "cannot be negative"),
        ("poisson", [0, 0], None, "every count is 0"),
        ("nbinom", ["a", "b"], None, "must be numbers"),
        ("gamma", [0.0, 1.0], None, "zero or negative"),
        ("inverse_gaussian", [-1.0, 1.0], None, "zero or negative"),
        ("beta", [0.2, 1.0], None, "zero-one inflated"),
        ("beta", [0.2, 20], None, "divide percentages"),
    ],
)
def test_responses_that_cannot_be(name, y, size, match):
    with pytest.raises(mj.DataError, match=match) as error:
        family_of(name).check(np.array(y), None if size is None else np.array(size), "incidence")
    assert str(error.value).startswith("incidence")


@pytest.mark.parametrize(("name", "size"), [("poisson", None), ("nbinom", None), ("binomial", np.full(3, 4.0))])
def test_counts_that_are_not_whole_are_told(name, size):
    with pytest.warns(mj.DataWarning, match="not whole"):
        family_of(name).check(np.array([0.0, 1.5, 3.0]), size, "y")


@pytest.mark.parametrize("name", ["poisson", "nbinom"])
@pytest.mark.parametrize("odd", ["whole", "a half", "missing", "one large", "psi by row"])
def test_what_is_looked_up_by_count_is_what_is_computed(name, odd):
    """Of many rows in lanes, as of a few: the same functions of the same numbers."""
    family = getattr(make, name)()
    rng = np.random.default_rng(4)
    y = rng.negative_binomial(2.0, 0.2, (1200, 5)).astype(float)
    eta = rng.normal(1.0, 1.0, y.shape)
    psi = (np.linspace(-1.0, 4.0, 5),) if family.n_psi else ()
    if odd == "a half":
        y[3, 1] = 2.5
    elif odd == "missing":
        y[3, 1] = np.nan
    elif odd == "one large":
        y[3, 1] = 2e7
    elif odd == "psi by row":
        psi = tuple(p + np.linspace(0.0, 0.1, 1200)[:, None] for p in psi)
    whole = [family.density(eta, y, None, psi), *jax.tree.leaves(family.derivatives(eta, y, None, psi))]
    for rows in (slice(0, 10), slice(600, 610)):
        of = tuple(p[rows] if p.ndim > 1 else p for p in psi)
        parts = [family.density(eta[rows], y[rows], None, of)]
        parts += jax.tree.leaves(family.derivatives(eta[rows], y[rows], None, of))
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one[rows], other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["poisson", "binomial", "nbinom", "gamma", "beta"])
def test_densities_without_their_constants(name):
    """Nothing but the value changes, by what depends on the response alone."""
    family = family_of(name)
    bare = replace(family, normalised=False)
    rng = np.random.default_rng(6)
    eta, size = rng.normal(size=(3, 7)), np.full(7, 9.0) if name == "binomial" else None
    y = rng.integers(1, 9, 7) / (10.0 if name == "beta" else 1.0)
    psi = tuple(0.3 * np.ones(family.n_psi))
    whole, part = family.derivatives(eta, y, size, psi), bare.derivatives(eta, y, size, psi)
    constant = np.broadcast_to(family.constant(y, size), y.shape)
    assert (name in ("poisson", "binomial")) == bool(constant.any())
    expected = whole.by_eta[0] - (constant if name in ("poisson", "binomial") else 0.0)
    np.testing.assert_allclose(part.by_eta[0], expected, rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(bare.density(eta, y, size, psi), part.by_eta[0], rtol=1e-14, atol=1e-13)
    for one, other in zip(jax.tree.leaves(whole)[1:], jax.tree.leaves(part)[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    assert family != bare
    assert repr(family) == repr(bare)
