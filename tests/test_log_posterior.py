"""The log posterior with fixed effects integrated out: against REML, dense integrals and differences."""

from dataclasses import replace

import dense
import jax
import numpy as np
import pytest
from conftest import table
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.covariance import structure_of
from mixjax.sampling.density import density as plain_density
from mixjax.sampling.density import log_prior as plain_log_prior
from mixjax.sampling.density import parts_of as plain_parts_of

SLEEP = "Reaction ~ Days + (Days | Subject)"
density, log_prior, parts_of = jax.jit(plain_density), jax.jit(plain_log_prior), jax.jit(plain_parts_of)
FLAT = mj.priors(intercept=mj.prior.flat(), beta=mj.prior.flat())


def test_flat_priors_are_the_restricted_likelihood(x64):
    """An exact identity: -2 log of the integral over flat fixed effects is the REML criterion."""
    fit = mj.lmm(SLEEP, table("sleepstudy"))
    model = FLAT.resolve(fit.design, fit.labels)
    sd = np.sqrt(fit.Sigma["Subject"].diagonal())
    rho = fit.Sigma["Subject"][0, 1] / sd.prod()
    z = np.array([*np.log(sd), np.arctanh(rho), np.log(fit.sigma)])
    loglik = float(parts_of(z, fit.stats, model).likelihood.loglik)
    assert -2.0 * loglik == pytest.approx(fit.criterion, rel=1e-13)
    # And all of the log posterior is this and the prior.
    assert float(mj.log_posterior(z, fit.stats, model)) == pytest.approx(loglik + float(log_prior(z, model)), rel=1e-13)


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "nested", "crossed", "nested and crossed"])
@pytest.mark.parametrize("integrate", [True, False])
def test_normal_priors_against_the_dense_integral(name, integrate, x64):
    """y ~ N(offset + X m, V + X S X') where beta ~ N(m, S): integrated; else its density times the prior's."""
    design = random_design(STRUCTURES[name], 5, p=3)
    m, s = np.array([0.4, -0.2, 1.0]), np.array([0.7, 2.0, 0.3])
    each = {f"beta{j}": mj.prior.normal(m[j], s[j]) for j in range(3)}
    model = mj.priors(each).resolve(design, integrate=integrate)
    rng = np.random.default_rng(0)
    z = 0.4 * rng.normal(size=model.dim)
    terms, log_sigma, beta = model.cut(z)
    Sigmas = [F @ F.T for F in (chart.factor(part) for chart, part in zip(model.charts, terms, strict=True))]
    found = float(parts_of(z, mj.cross_products(design), model).likelihood.loglik)
    if integrate:
        assert len(beta) == 0
        wide = (design.X * s) @ (design.X * s).T
        V = dense.covariance(design, Sigmas, np.exp(log_sigma)) + wide
        r = design.y - design.offset - design.X @ m
        expected = -0.5 * (len(r) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r))
    else:
        expected = dense.loglik(design, beta, Sigmas, np.exp(log_sigma))
    assert found == pytest.approx(expected, rel=1e-10)


def test_some_sampled_some_integrated(x64):
    """The sampled one's prior and likelihood: the integral over the other by quadrature."""
    design = random_design(STRUCTURES["one factor, q=1"], 2)
    own = mj.priors({"beta0": mj.prior.student_t(4, 0, 2), "beta1": mj.prior.normal(0.5, 0.8)})
    mixed, sampled = own.resolve(design), own.resolve(design, integrate=False)
    stats = mj.cross_products(design)
    z = np.array([0.1, -0.2, 0.3])
    assert mixed.dim == 3
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    at = float((mixed.parts.of_beta @ stats.beta0)[1]) + 0.4 * nodes
    values = [float(density(np.append(z, b), stats, sampled)) for b in at]
    integral = np.log((weights * np.exp(values + nodes**2 / 2 - max(values))).sum() * 0.4) + max(values)
    assert float(density(z, stats, mixed)) == pytest.approx(integral, rel=1e-9)


@pytest.mark.parametrize("name", ["us", "diag", "homcs", "ar1", "toep", "cs", "adh"])
def test_gradients_against_differences_within_structures(name, x64):
    rng = np.random.default_rng(7)
    n, q, m = 60, 3, 10
    visit = np.tile(np.arange(q), n // q)
    term = mj.RandomTerm(Z=np.eye(q)[visit], group=np.repeat(np.arange(m), n // m), n_groups=m, structure=name)
    design = mj.Design(y=rng.normal(size=n), X=np.column_stack([np.ones(n), rng.normal(size=n)]), terms=(term,))
    model, stats = mj.priors().resolve(design), mj.cross_products(design)
    z = 0.3 * rng.normal(size=model.dim)
    gradient = np.asarray(jax.jit(jax.grad(plain_density))(z, stats, model))
    step = 1e-5
    for i in range(model.dim):
        e = np.zeros(model.dim)
        e[i] = step
        slope = (float(density(z + e, stats, model)) - float(density(z - e, stats, model))) / (2 * step)
        assert gradient[i] == pytest.approx(slope, rel=1e-6, abs=1e-6)
    assert model.charts[0].k == structure_of(name, q).k


def test_invariance(x64):
    """Order of rows and numbers of levels say nothing; a scaled response moves the coordinates."""
    design = random_design(STRUCTURES["crossed"], 3)
    own = mj.priors({"beta0": mj.prior.normal(0, 2), "beta1": mj.prior.normal(0, 2)})
    half = mj.priors(own.by_name, sd=mj.prior.half_normal(2), sigma=mj.prior.half_normal(2))
    model = half.resolve(design)
    z = 0.3 * np.random.default_rng(0).normal(size=model.dim)
    value = float(density(z, mj.cross_products(design), model))
    order = np.random.default_rng(1).permutation(len(design.y))
    terms = tuple(replace(t, Z=t.Z[order], group=(t.n_groups - 1 - t.group)[order]) for t in design.terms)
    moved = replace(design, y=design.y[order], X=design.X[order], terms=terms, offset=design.offset[order])
    assert float(density(z, mj.cross_products(moved), half.resolve(moved))) == pytest.approx(value, rel=1e-11)
    scaled = replace(design, y=8.0 * design.y, offset=8.0 * design.offset)
    wide = {name: mj.prior.normal(0, 16) for name in own.by_name}
    model8 = mj.priors(wide, sd=mj.prior.half_normal(16), sigma=mj.prior.half_normal(16)).resolve(scaled)
    up = z + np.log(8.0) * np.array([1, 1, 0, 1, 1])  # two sds, a correlation, an sd, sigma
    there = float(density(up, mj.cross_products(scaled), model8))
    assert there == pytest.approx(value - len(design.y) * np.log(8.0), rel=1e-11)


def test_a_large_mean_costs_no_digits(x64):
    design = random_design(STRUCTURES["one factor, q=2, weights"], 1)
    stats, model = mj.cross_products(design), FLAT.resolve(design)
    z = np.array([0.1, -0.3, 0.2, -0.1])
    far = replace(design, y=design.y + 1e7)
    value = float(density(z, stats, model))
    # Priors of the sds are on y's scale, which has not moved.
    assert float(density(z, mj.cross_products(far), FLAT.resolve(far))) == pytest.approx(value, rel=1e-6)


def test_bad_arguments(x64):
    design, labels = mj.build_design(SLEEP, table("sleepstudy"))
    stats, model = mj.cross_products(design), mj.priors().resolve(design, labels)
    with pytest.raises(ValueError, match="5 coordinates"):
        mj.log_posterior(np.zeros(4), stats, model)
    with pytest.raises(TypeError, match=r"resolve\(design"):
        mj.log_posterior(np.zeros(5), stats, mj.priors())
    with pytest.raises(TypeError, match="cross-products"):
        mj.log_posterior(np.zeros(5), design, model)


def test_numbers_of_priors_and_data_compile_nothing_new(x64):
    from mixjax.sampling.density import _log_posterior

    design, labels = mj.build_design(SLEEP, table("sleepstudy"))
    model = mj.priors().resolve(design, labels)
    mj.log_posterior(np.array([3.0, 1.5, 0.0, 3.2, 298.0]), mj.cross_products(design), model)
    before = _log_posterior._cache_size()
    own = {"sd": mj.prior.half_student_t(5, 10.0), "cor": mj.prior.lkj(3), "intercept": mj.prior.student_t(5, 250, 30)}
    other = mj.priors(**own).resolve(design, labels)
    mj.log_posterior(np.array([3.0, 1.5, 0.0, 3.2, 298.0]), mj.cross_products(design, design.y * 2), other)
    assert _log_posterior._cache_size() == before


def test_another_response_of_the_same_design(x64):
    """Priors are resolved for X and Z; the response is that of the products."""
    design = random_design(STRUCTURES["one factor, q=1"], 2)
    own = mj.priors({"beta0": mj.prior.student_t(4, 0, 2), "beta1": mj.prior.normal(0.5, 0.8)},
                    sd=mj.prior.half_normal(1), sigma=mj.prior.half_normal(1))  # fmt: skip
    y = design.y[::-1] * 2.0
    z = np.array([0.1, -0.2, 0.3])
    a = density(z, mj.cross_products(design, y), own.resolve(design))
    b = density(z, mj.cross_products(design, y), own.resolve(replace(design, y=y)))
    assert float(a) == pytest.approx(float(b), rel=1e-12)
