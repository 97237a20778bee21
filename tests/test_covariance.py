"""Covariance structures whose factors are linear in their coordinates; the others are in test_structures_*.py, which
compile one of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from conftest import fit_of, table
from dense import covariance as dense_covariance
from dense import criterion as dense_criterion
from dense import loglik as dense_loglik
from refits import fit_at_once

import mixjax as mj
from mixjax import covariance as cov
from mixjax.checks import FormulaError
from mixjax.decompositions import lower_factor
from mixjax.engine.curvature import value_gradient_hessian
from mixjax.engine.engine import Engine
from mixjax.engine.moments import moments_of
from mixjax.formula.parse import parse
from mixjax.optimise.newton import by_differentiation
from mixjax.products.cross_products import cross_products

pytestmark = pytest.mark.usefixtures("x64")
Q, LANES = 3, 5
ALL = pytest.mark.parametrize("name", ["us", "diag", "homcs"])
# Fits of unstructured covariances have their tests elsewhere.
OTHERS = pytest.mark.parametrize("name", ["diag", "homcs"])


def lanes_of(structure, seed=0):
    """Coordinates of full rank, ``(k, LANES)``."""
    return structure.near(np.random.default_rng(seed).normal(size=(Q, Q, LANES)) + 2.0 * np.eye(Q)[..., None])


def product(F):
    return np.einsum("abl,cbl->acl", F, F)


@ALL
def test_coordinates_there_and_back(name):
    s = cov.structure_of(name, Q)
    x = lanes_of(s)
    assert x.shape == (s.k, LANES)
    D = product(s.factor(x))
    np.testing.assert_allclose(product(s.factor(s.near(s.factor(x)))), D, rtol=1e-12, atol=1e-12)
    assert (np.linalg.eigvalsh(np.moveaxis(D, -1, 0)) > 0).all()
    np.testing.assert_array_equal(s.factor(jnp.zeros((s.k, LANES))), 0.0)


@ALL
def test_a_standard_deviation_has_no_sign(name):
    """D has no slope in a standard deviation that is zero, the others staying where they are."""
    s = cov.structure_of(name, Q)
    for c in range(s.n_reductions):
        x, free = s.reduced(lanes_of(s), jnp.full(LANES, c))
        fixed = ~np.asarray(free)
        rank = np.linalg.matrix_rank(np.moveaxis(product(s.factor(x)), -1, 0), tol=1e-9)
        assert fixed.any()
        assert (rank < Q).all()
        np.testing.assert_allclose(np.where(fixed[None], s.jacobian(x), 0.0), 0.0, atol=1e-12)
    unchanged, free = s.reduced(lanes_of(s), jnp.full(LANES, -1))
    np.testing.assert_array_equal(unchanged, lanes_of(s))
    assert np.asarray(free)[np.abs(unchanged) > 0].all()
    assert s.sizes(unchanged).shape == (s.n_reductions, LANES)


@ALL
def test_derivatives_of_the_covariance(name):
    s = cov.structure_of(name, Q)
    x, g = lanes_of(s), np.random.default_rng(1).normal(size=(Q * (Q + 1) // 2, LANES))
    upper = np.triu_indices(Q)
    h = 1e-5

    def D(x):
        return product(s.factor(x))[upper]

    for i in range(s.k):
        step = h * np.eye(s.k)[i][:, None]
        numeric = (D(x + step) - D(x - step)) / (2 * h)
        np.testing.assert_allclose(s.jacobian(x)[:, i], numeric, rtol=1e-8, atol=1e-8)
        slopes = [np.einsum("pl,pkl->kl", g, s.jacobian(x + sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(s.curvature(x, g)[i], (slopes[0] - slopes[1]) / (2 * h), rtol=1e-8, atol=1e-8)


def design_of(name, seed=0, spread=1.0, cor=0.3, m=12, weights=False):
    """Three treatments of four replicates in every group, effects of the structure nearest to equal correlation."""
    rng = np.random.default_rng(seed)
    group, treatment = np.repeat(np.arange(m), 12), np.tile(np.arange(Q), 4 * m)
    Z = np.eye(Q)[treatment]
    F = np.linalg.cholesky(np.where(np.eye(Q, dtype=bool), 1.0, cor)) * spread
    s = cov.structure_of(name, Q)
    effects = rng.normal(size=(m, Q)) @ np.asarray(s.factor(s.near(F[..., None])))[..., 0].T
    y = 3.0 + (Z * effects[group]).sum(1) + rng.normal(size=12 * m)
    term = mj.RandomTerm(Z=Z, group=group, n_groups=m, structure=name)
    w = rng.uniform(0.5, 2.0, 12 * m) if weights else None
    return mj.Design(y=y, X=np.column_stack([np.ones(12 * m), treatment == 1]).astype(float), terms=(term,), weights=w)


@OTHERS
@pytest.mark.parametrize("case", ["clear", "small", "weights"])
def test_the_fit_against_the_dense_likelihood(name, case):
    """No start of a simplex search over the dense textbook formula finds anything better, nor the fit itself."""
    design = design_of(name, 2, 0.1 if case == "small" else 1.0, weights=case == "weights")
    est = mj.estimate(mj.cross_products(design))
    s = cov.structure_of(name, Q)
    assert bool(est.converged)

    def deviance(x):
        return dense_criterion(design, [np.asarray(s.factor(np.asarray(x)[:, None]))[..., 0]], True)

    starts = [np.asarray(s.near(scale * jnp.eye(Q)[..., None]))[:, 0] for scale in (0.3, 1.0)]
    ends = [scipy.optimize.minimize(deviance, x0, method="BFGS", tol=1e-9) for x0 in starts]
    assert float(est.criterion) <= min(end.fun for end in ends) + 1e-8
    own = dense_criterion(design, [np.linalg.cholesky(est.Sigma[0] / est.sigma**2 + 1e-14 * np.eye(Q))], True)
    np.testing.assert_allclose(est.criterion, own, rtol=1e-10)
    np.testing.assert_allclose(mj.criterion(est.theta, mj.cross_products(design)), est.criterion, rtol=1e-12)


@ALL
def test_unconstrained_parameters_know_the_structure(name):
    design = design_of(name, 2)
    s, stats = cov.structure_of(name, Q), mj.cross_products(design)
    est = fit_at_once(stats, None, False)
    p = mj.to_params(est, design)
    assert p.chol[0].shape == (s.k,)
    np.testing.assert_allclose(-2 * mj.marginal_loglik(p, design), est.criterion, rtol=1e-12)
    for leaf in jax.tree.leaves(jax.grad(mj.marginal_loglik)(p, stats)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-5)
    back = jax.jit(mj.from_params)(p, stats)
    np.testing.assert_allclose(back.theta, est.theta, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(back.Sigma[0], est.Sigma[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mj.to_params(est._replace(theta=back.theta), stats).chol[0], p.chol[0], rtol=1e-9)
    # Any real vector is a covariance of the structure, differentiable there, many at a time.
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, s.k)))
    many = jax.vmap(lambda u: mj.marginal_loglik(p._replace(chol=(u,)), stats))(u)
    slopes = jax.vmap(jax.grad(lambda u: mj.marginal_loglik(p._replace(chol=(u,)), stats)))(u)
    for i in range(2):
        own = mj.from_params(p._replace(chol=(u[i],)), stats)
        expected = dense_loglik(design, p.beta, [np.asarray(own.Sigma[0])], float(own.sigma))
        np.testing.assert_allclose(many[i], expected, rtol=1e-10)
        step = 1e-5 * jnp.eye(s.k)[0]
        ends = [mj.marginal_loglik(p._replace(chol=(u[i] + h * step,)), stats) for h in (1, -1)]
        np.testing.assert_allclose(slopes[i][0], (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-6)
    if name != "us":
        with pytest.raises(ValueError, match=r"mixjax.to_params\(est, design\)"):
            mj.marginal_loglik(mj.to_params(est), design)


@OTHERS
@pytest.mark.parametrize("zero", [0, 1])
def test_unconstrained_parameters_of_a_singular_fit(name, zero):
    """A standard deviation that is zero, or an eigenvalue, is minus infinity, whatever rounding left of it."""
    s, design = cov.structure_of(name, Q), design_of(name)
    F = s.factor(jnp.asarray([0.7, 1.3, 0.9])[: s.k].at[zero].set(0.0))
    theta = cov.theta_of_lambdas([lower_factor(F, 1e-8)])
    est = mj.Estimates(**(dict.fromkeys(mj.Estimates._fields) | {"theta": theta, "beta": jnp.ones(2),
                          "sigma": jnp.asarray(2.0), "Sigma": (4.0 * F @ F.T,)}))  # fmt: skip
    p = mj.to_params(est, design)
    assert np.isneginf(p.chol[0]).tolist() == [i == zero for i in range(s.k)]
    np.testing.assert_allclose(mj.from_params(p, design).Sigma[0], est.Sigma[0], atol=1e-12)
    gradient = jax.grad(mj.marginal_loglik)(p, design)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert gradient.chol[0][zero] == 0


@OTHERS
def test_closed_form_derivatives_of_the_criterion(name):
    stats = cross_products(design_of(name))
    structures = stats.layout.structures
    x = lanes_of(structures[0])[:, :1]
    closed = jax.jit(lambda x, stats: value_gradient_hessian(x, moments_of(stats), True))
    differentiated = jax.jit(
        lambda x, stats: by_differentiation(lambda x: Engine(stats, True).profiled(x).criterion)(x)
    )
    for got, wanted in zip(closed(x, stats), differentiated(x, stats), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@OTHERS
def test_many_fits_equal_single_ones(name):
    design = design_of(name)
    rng = np.random.default_rng(5)
    Y = np.concatenate([design.y + rng.normal(size=(6, len(design.y))), rng.normal(size=(6, len(design.y)))])
    keep = ("theta", "beta", "sigma", "Sigma", "b", "vcov", "criterion", "singular", "result")
    many = mj.estimate_many(mj.cross_products(design, Y), keep=keep)
    for i, y in enumerate(Y):
        one = mj.estimate(mj.cross_products(design, y))
        for key in keep:
            for a, b in zip(*map(jax.tree.leaves, (getattr(many, key), getattr(one, key))), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7, err_msg=key)
    assert many.singular.any()
    halves = mj.stack([mj.cross_products(design, y) for y in Y[:2]])
    np.testing.assert_allclose(mj.estimate_many(halves).criterion, many.criterion[:2], rtol=1e-12)


@OTHERS
def test_derivatives_through_the_fit(name):
    design = design_of(name)
    direction = np.random.default_rng(1).normal(size=len(design.y))

    def fun(t):
        est = mj.estimate(mj.cross_products(design, design.y + t * direction))
        return est.theta, est.beta, est.sigma

    def refitted(t):
        est = fit_at_once(mj.cross_products(design, design.y + t * direction), None, True)
        return est.theta, est.beta, est.sigma

    _, moved = jax.jit(lambda t: jax.jvp(fun, (t,), (1.0,)))(0.0)
    for a, up, down in zip(moved, refitted(1e-5), refitted(-1e-5), strict=True):
        np.testing.assert_allclose(a, (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


@OTHERS
def test_by_formula_by_chunks_and_by_optax(name):
    import optax

    design = design_of(name)
    data = pd.DataFrame({
        "y": design.y, "t": np.array(list("abc"))[np.argmax(design.terms[0].Z, 1)], "g": design.terms[0].group
    })  # fmt: skip
    formula = f"y ~ t + {name}(0 + t | g)"
    fit = mj.lmm(formula, data)
    chunks = mj.lmm(formula, [data[:50], data[50:]])
    slow = mj.lmm(formula, data, optimizer=optax.lbfgs())
    assert fit.npar == 3 + cov.structure_of(name, Q).k + 1
    for other in (chunks, slow):
        assert other.criterion == pytest.approx(fit.criterion, rel=1e-10)
        np.testing.assert_allclose(other.Sigma["g"], fit.Sigma["g"], rtol=1e-5, atol=1e-6)
    again = mj.lmm(formula, data, start=fit.theta)
    assert again.criterion == pytest.approx(fit.criterion, rel=1e-12)
    assert str(fit.summary())


@OTHERS
def test_levels_may_be_named_and_scaled_as_one_likes(name):
    """A common scale of Z's columns, and the order of groups, change nothing but the scale of Sigma."""
    design = design_of(name)
    term = design.terms[0]
    turned = replace(design, terms=(replace(term, Z=1e3 * term.Z, group=term.n_groups - 1 - term.group),))
    a, b = (mj.estimate(mj.cross_products(d)) for d in (design, turned))
    np.testing.assert_allclose(a.criterion, b.criterion, rtol=1e-12)
    np.testing.assert_allclose(a.Sigma[0], 1e6 * b.Sigma[0], rtol=1e-6)


def test_diagonal_is_what_two_bars_are():
    wanted = fit_of("sleepstudy_doublebar", "REML")
    fit = mj.lmm("Reaction ~ Days + diag(Days | Subject)", table("sleepstudy"))
    assert fit.criterion == pytest.approx(wanted.criterion, abs=1e-8)
    assert fit.npar == wanted.npar
    np.testing.assert_allclose(
        np.diag(fit.Sigma["Subject"]), [float(S[0, 0]) for S in wanted.Sigma.values()], rtol=1e-7
    )


def test_brackets_and_spellings():
    written = [
        "homcs(0 + f | g)",
        "(homcs(0 + f | g))",
        "homcs((0 + f | g))",
        "cs(0 + f|g, hom=T)",
        "homcs(0+f|g,hom=TRUE)",
    ]
    parts = [parse(f"y ~ x + {term}").random for term in written]
    assert {(str(part.effects).replace(" ", ""), part.group.name, part.structure) for (part,) in parts} == {
        ("0+f", "g", "homcs")
    }
    assert [part.structure for part in parse("y ~ diag(x | a/b) + us(1 | c) + I(x | z)").random] == [
        "diag",
        "diag",
        "us",
    ]


@pytest.mark.parametrize("reml", [True, False])
def test_one_correlation_is_what_nested_intercepts_are(reml):
    """Of levels that are correlated by what they share: it is then not negative."""
    nested = mj.lmm("score ~ Machine + (1 | Worker) + (1 | Worker:Machine)", table("Machines"), reml=reml)
    fit = mj.lmm("score ~ Machine + homcs(0 + Machine | Worker)", table("Machines"), reml=reml)
    assert fit.criterion == pytest.approx(nested.criterion, abs=1e-9)
    assert fit.npar == nested.npar
    shared, own = (float(nested.Sigma[group][0, 0]) for group in ("Worker", "Worker:Machine"))
    np.testing.assert_allclose(fit.Sigma["Worker"], shared + own * np.eye(3), rtol=1e-6)
    lme4 = mj.lmm("score ~ Machine + cs(0 + Machine | Worker, hom = TRUE)", table("Machines"), reml=reml)
    assert lme4.criterion == fit.criterion


@pytest.mark.parametrize("cor", [-1 / (Q - 1), 1.0])
def test_a_correlation_on_its_bounds(cor):
    """Exactly there where the means of groups do not vary at all, or nothing but they."""
    design = design_of("homcs")
    group, cell = design.terms[0].group, Q * design.terms[0].group + np.argmax(design.terms[0].Z, 1)

    def means(by):
        return (np.bincount(by, design.y) / np.bincount(by))[by]

    design = replace(design, y=design.y + (means(group) - means(cell) if cor == 1.0 else -means(group)))
    # A factor of D / v up to its length, and D / v itself.
    factor = np.ones((Q, 1)) if cor == 1.0 else np.eye(Q) - 1 / Q
    shape = np.where(np.eye(Q, dtype=bool), 1.0, cor)
    stats = mj.cross_products(design)
    est = mj.estimate(stats)
    best = scipy.optimize.minimize_scalar(lambda sd: dense_criterion(design, [sd * factor], True), (0.5, 1.0))
    assert bool(est.converged)
    assert bool(est.singular)
    assert float(est.criterion) == pytest.approx(best.fun, abs=1e-8)
    np.testing.assert_allclose(est.Sigma[0] / est.Sigma[0][0, 0], shape, atol=1e-14)
    np.testing.assert_array_equal(est.theta[-1], 0.0)
    # So it ends from a start on either bound.
    for F in (np.ones((Q, Q)), np.eye(Q) - 1 / Q):
        start = cov.theta_of_lambda(lower_factor(F, 1e-8), Q)
        np.testing.assert_allclose(mj.estimate(stats, start=start).criterion, est.criterion, rtol=1e-12)


@OTHERS
def test_singular_in_single_precision_too(name):
    """Rounding of a factor that is not triangular does not count as rank."""
    design = design_of(name, 4)
    group, cell = design.terms[0].group, Q * design.terms[0].group + np.argmax(design.terms[0].Z, 1)
    y = design.y - (np.bincount(group, design.y) / np.bincount(group))[group]  # the groups' means do not vary
    if name == "diag":
        y = design.y - (np.bincount(cell, design.y) / np.bincount(cell))[cell]
    single = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a,
                          mj.cross_products(replace(design, y=y)))  # fmt: skip
    with jax.enable_x64(False), pytest.warns(UserWarning, match="float32"):
        est = mj.estimate(single)
    assert bool(est.converged)
    assert bool(est.singular)


def test_a_crossed_design_with_structures():
    """The elimination and the sparse sums take any factor of the covariance."""
    rng = np.random.default_rng(3)
    n = 240
    a, b, t = rng.integers(0, 30, n), rng.integers(0, 8, n), rng.integers(0, 2, n)
    terms = tuple(mj.RandomTerm(Z=np.eye(2)[t], group=g, n_groups=int(g.max()) + 1, structure="diag") for g in (a, b))
    design = mj.Design(y=rng.normal(size=n) + rng.normal(size=(30, 2))[a, t] + rng.normal(size=8)[b], X=np.ones((n, 1)),
                       terms=terms)  # fmt: skip
    one = mj.estimate(mj.cross_products(design))
    split = tuple(replace(term, Z=term.Z[:, [j]], structure="us") for term in terms for j in range(2))
    two = fit_at_once(mj.cross_products(replace(design, terms=split)), None, True)
    np.testing.assert_allclose(one.criterion, two.criterion, rtol=1e-11)
    np.testing.assert_allclose(one.beta, two.beta, rtol=1e-7)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("y ~ x + sph(0 + x | g)", "no covariance structure 'sph'.*there are us, diag"),
        ("y ~ x + cs(0 + x | g, hom = 1)", "only hom = TRUE"),
        ("y ~ x + toeplitz(x | g)", "no covariance structure 'toeplitz'"),
        ("y ~ x + homcs(x | g, hom = FALSE)", "'hom = FALSE'.*not understood"),
        ("y ~ x + cs(x | g, hom = TRUE, hom = TRUE)", "not understood"),
        ("y ~ x + diag(x || g)", "exclude each other"),
        ("y ~ x - diag(x | g)", "subtracted"),
        ("y ~ x + diag(x | g, het = TRUE)", "'het = TRUE'.*only hom"),
        ("y ~ x + diag(x | )", "grouping factor after it"),
    ],
)
def test_bad_formulas(formula, message):
    with pytest.raises(FormulaError, match=message):
        mj.lmm(formula, pd.DataFrame({"y": np.arange(9.0) ** 2, "x": np.arange(9) % 4, "g": np.arange(9) // 3}))


def test_unknown_structure_in_arrays():
    design = design_of("us")
    with pytest.raises(ValueError, match="no covariance structure 'banded'; there are 'us'"):
        mj.cross_products(replace(design, terms=(replace(design.terms[0], structure="banded"),)))


def test_coordinates_of_another_kind_are_left_alone():
    """A structure may have coordinates that are no standard deviations: they are never set to zero, nor held there."""

    class Turned(cov.Diagonal):
        @property
        def k(self):
            return Q + 1

        @property
        def deviations(self):
            return tuple(range(Q))

    x = jnp.ones((Q + 1, LANES)).at[Q, 0].set(0.0)
    for c in (-1, 0, Q, Q + 1):
        reduced, free = Turned(Q).reduced(x, jnp.full(LANES, c))
        np.testing.assert_array_equal(reduced[Q], x[Q])
        assert np.asarray(free)[Q].all()
        assert (np.asarray(reduced[:Q]) == 0).sum() == (LANES if c == 0 else 0)


@ALL
def test_natural_parameters_are_those_of_the_covariance(name):
    """Their values at any coordinates, their slopes by differences, and as many as there are coordinates."""
    s = cov.structure_of(name, Q)
    assert len(s.natural) == s.k
    x = np.asarray(lanes_of(s))[:, 0]
    names = [parameter.name("abc", "g") for parameter in s.natural]
    assert len(set(names)) == len(names)
    D = np.asarray(s.factor(x)) @ np.asarray(s.factor(x)).T
    sd = np.sqrt(np.diag(D))
    for parameter in s.natural:
        wanted = {"sd": sd, "cor": (D / np.outer(sd, sd))[np.tril_indices(Q, -1)]}[parameter.kind]
        own = (
            sd[parameter.i]
            if parameter.kind == "sd"
            else D[parameter.i, parameter.j] / sd[parameter.i] / sd[parameter.j]
        )
        assert own in wanted
        if parameter.shared:
            np.testing.assert_allclose(wanted, own, rtol=1e-12)
    if not s.correlated:
        np.testing.assert_array_equal(D, np.diag(np.diag(D)))


@ALL
def test_every_table_has_the_same_variance_parameters(name):
    data = table("Machines")
    fit = mj.lmm(f"score ~ Machine + {name}(0 + Machine | Worker)", data)
    names = list(fit.variance_parameters().index)
    assert len(names) == fit.npar - 3
    many = fit.refit_many(np.stack([data["score"], data["score"] * 2]))
    assert list(many.sdcor) == names
    np.testing.assert_allclose(many.sdcor.iloc[0], fit.variance_parameters()["estimate"], rtol=1e-6)
    assert list(fit.bootstrap(1, 5).replicates)[: len(names)] == names
    assert list(fit.confint(method="wald").index)[: len(names)] == names
    truth = mj.scenario(fit.labels.formula, data, beta=fit.fixef, theta=fit.theta, sigma=fit.sigma).truth
    assert set(truth) == {*fit.fixef.index, *names}
    for parameter, value in fit.variance_parameters()["estimate"].items():
        assert truth[parameter] == pytest.approx(value, rel=1e-9)


@OTHERS
def test_standard_errors_of_natural_parameters(name):
    """The delta method against differences of the deviance by the natural parameters themselves."""
    record = mj.lmm(f"score ~ Machine + {name}(0 + Machine | Worker)", table("Machines")).record
    (s,), found = record.stats.layout.structures, record.covariance_of_all()
    k = s.k + 1

    def deviance(natural):
        sd = np.full(Q, natural[0]) if s.k == 2 else natural[:Q]
        rho = natural[1] if s.k == 2 else 0.0
        Sigma = np.outer(sd, sd) * np.where(np.eye(Q, dtype=bool), 1.0, rho)
        V, X = dense_covariance(record.design, [Sigma], natural[-1]), record.design.X
        VX = np.linalg.solve(V, X)
        r = record.design.y - X @ np.linalg.solve(X.T @ VX, VX.T @ record.design.y)
        return np.linalg.slogdet(V)[1] + np.linalg.slogdet(X.T @ VX)[1] + r @ np.linalg.solve(V, r)

    at, steps = found.estimate[:k], 1e-3 * np.abs(found.estimate[:k])
    H = np.empty((k, k))
    for i in range(k):
        for j in range(k):
            e, f = np.eye(k)[i] * steps, np.eye(k)[j] * steps
            corners = [deviance(at + a * e + b * f) * a * b for a in (1, -1) for b in (1, -1)]
            H[i, j] = sum(corners) / (4 * steps[i] * steps[j])
    np.testing.assert_allclose(
        found.covariance[:k, :k], 2 * np.linalg.inv(H), rtol=2e-4, atol=1e-6 * np.abs(found.covariance[:k, :k]).max()
    )
    assert found.free.all()
    np.testing.assert_array_equal(found.covariance[k:, :k], 0.0)


def test_a_structure_may_be_given_itself():
    design = design_of("homcs")
    itself = replace(design.terms[0], structure=cov.HomogeneousCompoundSymmetry(Q))
    a, b = (mj.estimate(mj.cross_products(d)) for d in (design, replace(design, terms=(itself,))))
    np.testing.assert_array_equal(a.theta, b.theta)
    with pytest.raises(ValueError, match="is a structure of 2 effects, but the term has 3"):
        mj.cross_products(replace(design, terms=(replace(itself, structure=cov.Diagonal(2)),)))
