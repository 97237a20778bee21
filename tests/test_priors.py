"""Priors: densities, draws, Jacobians of the coordinates, names."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from conftest import table

import mixjax as mj
from mixjax.covariance import STRUCTURES, Unstructured, structure_of
from mixjax.sampling.charts import Chart
from mixjax.sampling.density import _of_term, log_prior
from mixjax.sampling.model_priors import TermPriors
from mixjax.sampling.predictive import draw_parameters
from mixjax.sampling.prior import LKJ, Prior

SLEEP = "Reaction ~ Days + (Days | Subject)"
AGAINST_SCIPY = {
    "normal": (mj.prior.normal(1, 2), scipy.stats.norm(1, 2)),
    "student_t": (mj.prior.student_t(3, 1, 2), scipy.stats.t(3, 1, 2)),
    "half_normal": (mj.prior.half_normal(2), scipy.stats.halfnorm(0, 2)),
    "half_student_t": (mj.prior.half_student_t(1, 2), scipy.stats.halfcauchy(0, 2)),
    "exponential": (mj.prior.exponential(0.5), scipy.stats.expon(0, 2)),
}


def built(formula=SLEEP, data="sleepstudy"):
    return mj.build_design(formula, table(data))


@pytest.mark.parametrize("name", AGAINST_SCIPY)
def test_densities_and_draws(name, x64):
    own, other = AGAINST_SCIPY[name]
    x = other.ppf([0.1, 0.5, 0.9])
    assert np.allclose(own.log_prob(x), other.logpdf(x), rtol=1e-12)
    drawn = own.sample(np.random.default_rng(0), 4000)
    assert scipy.stats.kstest(drawn, other.cdf).pvalue > 1e-3


def test_a_normal_of_a_correlation_is_cut(x64):
    own = mj.prior.normal(0.9, 0.4)
    exact = scipy.stats.truncnorm((-1 - 0.9) / 0.4, 0.1 / 0.4, 0.9, 0.4)
    assert float(own.log_prob(0.3) - own.log_between(-1.0, 1.0)) == pytest.approx(exact.logpdf(0.3), rel=1e-12)


def natural_of(chart, z):
    """The natural parameters as JAX's, by their definition."""
    F = chart.factor(z)
    Sigma = F @ F.T
    sd = jnp.sqrt(jnp.diagonal(Sigma))
    found = []
    for parameter in chart.structure.natural:
        i, j = parameter.i, parameter.j
        found.append(sd[i] if parameter.kind == "sd" else Sigma[i, j] / (sd[i] * sd[j]))
    return jnp.stack(found)


@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - {"rr", "fa"}))
def test_jacobians_against_automatic_differentiation(name, x64):
    """Densities of coordinates are those of standard deviations and correlations times the Jacobian; up to a constant
    that says how lkj is normalised."""
    chart = Chart(structure_of(name, 4))
    kinds = [parameter.kind for parameter in chart.structure.natural]
    half = mj.prior.half_student_t(3, 2.0)

    @jax.jit
    def difference(z, eta):
        natural = natural_of(chart, z)
        sds = [half.log_prob(x) for x, kind in zip(natural, kinds, strict=True) if kind == "sd"]
        F = chart.factor(z)
        R = F / jnp.sqrt((F**2).sum(1))[:, None]
        logdet_R = jnp.linalg.slogdet(R @ R.T)[1]
        jacobian = jnp.linalg.slogdet(jax.jacfwd(lambda z: natural_of(chart, z))(z))[1]
        own = _of_term(z, chart, TermPriors((half,) * chart.n_scales, LKJ(eta)))
        return own - sum(sds) - (eta - 1.0) * logdet_R - jacobian, natural

    for eta in (1.0, 2.5):
        found = []
        for z in 0.6 * np.random.default_rng(1).normal(size=(4, chart.k)):
            value, natural = difference(z, eta)
            assert np.allclose(natural, chart.natural(z), rtol=1e-12)
            found.append(float(value))
        assert np.ptp(found) < 1e-9


@pytest.mark.parametrize("name", sorted(STRUCTURES.keys() - {"rr", "fa"}))
def test_coordinates_of_a_covariance_lead_back_to_it(name):
    chart = Chart(structure_of(name, 3))
    z = 0.4 * np.random.default_rng(2).normal(size=chart.k)
    F = chart.factor(z)
    assert np.allclose(chart.factor(z[:, None])[..., 0], F, rtol=1e-14)
    back = chart.near(F / np.sqrt(0.98), np.sqrt(np.zeros(3)))
    # The same correlations pulled in by 2 % of the variances, well inside where there is none.
    assert np.allclose(back, z, atol=0.25)
    singular = chart.near(np.zeros((3, 3)), np.full(3, 0.1))
    assert np.isfinite(singular).all()
    assert np.allclose(chart.natural(singular)[0], 0.1, rtol=0.01)


def test_lkj_of_two_effects_is_normalised(x64):
    chart = Chart(Unstructured(2))

    @jax.jit
    def marginal(rho, eta):
        z = jnp.array([0.0, 0.0, jnp.arctanh(rho)])
        own = TermPriors((mj.prior.exponential(1.0),) * 2, LKJ(eta))
        return jnp.exp(_of_term(z, chart, own) + 2.0) / (1.0 - rho**2)  # exp(-1) of each sd

    for eta in (1.0, 3.0):
        total = scipy.integrate.quad(lambda r, eta=eta: float(marginal(r, eta)), -1, 1, epsabs=1e-9)[0]
        assert total == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("name", ["us", "homcs", "toep", "hetar1"])
def test_draws_from_lkj_have_its_marginals(name):
    """Uniform over what correlations the structure has: against rejection from the cube."""
    levels = table("sleepstudy").assign(visit=lambda d: (d["Days"] % 3).astype(str).astype("category"))
    design, labels = mj.build_design(f"Reaction ~ 1 + {name}(0 + visit | Subject)", levels)
    model = mj.priors(cor=mj.prior.lkj(1), intercept=mj.prior.normal(300, 50)).resolve(design, labels)
    z, _ = draw_parameters(model, 3000, np.random.default_rng(0))
    chart = model.charts[0]
    cors = chart.natural(z[:, : chart.k].T)[[p.kind == "cor" for p in chart.structure.natural]]
    rng = np.random.default_rng(1)
    cube = rng.uniform(-1, 1, (len(cors), 60_000))
    R = np.empty((60_000, 3, 3))
    R[:] = np.eye(3)
    places = [(1, 0), (2, 0), (2, 1)]
    for i, j in places:
        which = {"us": places.index((i, j)), "homcs": 0, "toep": i - j - 1, "hetar1": 0}[name]
        R[:, i, j] = R[:, j, i] = cube[which] ** (i - j) if name == "hetar1" else cube[which]
    allowed = np.linalg.eigvalsh(R)[:, 0] > 0
    for own, other in zip(cors, cube[:, allowed], strict=True):
        assert scipy.stats.ks_2samp(own, other).pvalue > 1e-3


# --- names and classes -----------------------------------------------------------------------------------------------


def test_defaults_are_those_of_brms():
    design, _ = built()
    assert repr(mj.default_priors(design)) == (
        "priors(intercept=student_t(3, 288.7, 59.3), beta=flat(), sd=half_student_t(3, 59.3), cor=lkj(1), "
        "sigma=half_student_t(3, 59.3))"
    )
    weak = mj.default_priors(design, weak=True)
    assert all(isinstance(one, Prior) and one.proper for one in (weak.intercept, *weak.beta, weak.sd, weak.sigma))


def test_names_go_before_classes(x64):
    design, labels = built()
    one, other = mj.prior.half_normal(7), mj.prior.exponential(0.1)
    model = mj.priors({"sd_Days|Subject": one}, sd=other).resolve(design, labels)
    assert model.terms[0].scales == (other, one)
    model = mj.priors({"sd|Subject": one, "cor|Subject": mj.prior.lkj(4), "sigma": other}).resolve(design, labels)
    assert model.terms[0].scales == (one, one)
    assert model.terms[0].shapes == LKJ(4.0)
    assert model.sigma == other
    # By name the intercept is where the predictors are zero, by class where they are at their means.
    by_name = mj.priors({"Intercept": mj.prior.student_t(3, 250, 10)}).resolve(design, labels)
    by_class = mj.priors(intercept=mj.prior.student_t(3, 250, 10)).resolve(design, labels)
    assert np.allclose(by_name.to_beta, np.eye(2))
    assert np.allclose(by_class.to_beta, [[1, -4.5], [0, 1]])
    a, b = (np.array([3.0, 1.0, 0.1, 3.2, x]) for x in (255.0, 255.0))
    assert float(log_prior(a, by_name)) == pytest.approx(float(log_prior(b, by_class)))


def test_numbers_without_labels():
    design, _ = built()
    model = mj.priors({"sd_e1|term0": mj.prior.half_normal(7)}).resolve(design)
    assert model.terms[0].scales[1].scale == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"by_name": {"sd_days|Subject": mj.prior.half_normal(1)}},
            "no parameter 'sd_days|Subject'.*'sd_Days|Subject'",
        ),
        ({"sd": mj.prior.normal(0, 1)}, r"sd_Intercept.Subject cannot have the prior normal.*half_normal"),
        ({"sd": mj.prior.flat()}, "improper"),
        ({"sigma": mj.prior.flat()}, "sigma cannot have the prior flat.*improper"),
        ({"sigma": mj.prior.student_t(3, 0, 1)}, "positive: use half_normal"),
        ({"beta": mj.prior.half_normal(1)}, "Days cannot have the prior half_normal.*use flat, normal"),
        ({"cor": mj.prior.half_normal(1)}, "correlation: use lkj"),
        ({"sd": mj.prior.lkj(1)}, "positive: use half_normal"),
        ({"beta": [mj.prior.flat()]}, "beta has 1 priors; this model has 2 columns"),
    ],
)
def test_bad_priors(given, message):
    design, labels = built()
    by_name = given.pop("by_name", None)
    with pytest.raises(ValueError, match=message):
        mj.priors(by_name, **given).resolve(design, labels)


def test_correlations_that_bound_each_other_have_one_prior():
    data = table("sleepstudy").assign(x=lambda d: d["Days"] ** 2)
    design, labels = mj.build_design("Reaction ~ Days + (Days + x | Subject)", data)
    with pytest.raises(ValueError, match=r"bound each other.*'cor|Subject'"):
        mj.priors({"cor_Days.Intercept|Subject": mj.prior.lkj(2)}).resolve(design, labels)
    with pytest.raises(ValueError, match="bound each other: their prior is lkj, not normal"):
        mj.priors(cor=mj.prior.normal(0, 0.5)).resolve(design, labels)
    two, names = built()
    model = mj.priors({"cor_Days.Intercept|Subject": mj.prior.normal(0, 0.2)}).resolve(two, names)
    assert model.terms[0].shapes == (mj.prior.normal(0, 0.2),)


@pytest.mark.parametrize(
    "call", [lambda: mj.priors(sd=3), lambda: mj.priors({"sigma": "normal"}), lambda: mj.priors(3)]
)
def test_what_is_no_prior(call):
    with pytest.raises(ValueError, match="must be a"):
        call()


@pytest.mark.parametrize(
    "call", [lambda: mj.prior.normal(0, -1), lambda: mj.prior.lkj(0), lambda: mj.prior.normal("a")]
)
def test_bad_numbers(call):
    with pytest.raises(ValueError, match="must be"):
        call()


def test_prior_predictive():
    drawn = mj.prior_predictive(SLEEP, table("sleepstudy"), draws=400, key=3)
    again = mj.prior_predictive(SLEEP, table("sleepstudy"), draws=400, key=3)
    assert np.array_equal(drawn.y, again.y)
    assert drawn.y.shape == (400, 180)
    assert repr(drawn).endswith("400 draws from the prior, each with a data set of 180 rows")
    assert list(drawn.parameters) == [
        "Intercept", "Days", "sd_Intercept|Subject", "cor_Days.Intercept|Subject", "sd_Days|Subject", "sigma",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"proper priors.*flat"):
        mj.prior_predictive(SLEEP, table("sleepstudy"), mj.priors(beta=mj.prior.flat()))


def test_prior_predictive_variances():
    """Second moments of responses are those of the priors: one intercept, one sd, one sigma."""
    half = mj.prior.half_normal(2.0)
    own = mj.priors(intercept=mj.prior.normal(10, 3), sd=half, sigma=mj.prior.half_normal(1.0))
    drawn = mj.prior_predictive("Yield ~ 1 + (1 | Batch)", table("Dyestuff"), own, draws=20_000, key=1)
    y = drawn.y
    assert y.mean() == pytest.approx(10, abs=0.1)
    assert y[:, 0].var() == pytest.approx(9 + 4 + 1, rel=0.05)
    assert np.cov(y[:, 0], y[:, 1])[0, 1] == pytest.approx(9 + 4, rel=0.06)  # of one batch
    assert np.cov(y[:, 0], y[:, -1])[0, 1] == pytest.approx(9, rel=0.08)


def test_models_with_more_than_independent_levels_are_refused():
    """Whatever a design or a term may have one day, such as covariances between levels: the density would be wrong."""

    @dataclass(frozen=True)
    class Related(mj.RandomTerm):
        neighbours: object = None

    design, _ = built()
    term = design.terms[0]
    plain = Related(term.Z, term.group, term.n_groups)
    assert mj.priors().resolve(replace(design, terms=(plain,))).dim == 5
    related = replace(design, terms=(replace(plain, neighbours=np.eye(18)),))
    with pytest.raises(ValueError, match=r"a Bayesian model \(mixjax.bayes\) does not know Related.neighbours"):
        mj.priors().resolve(related)
    # Whoever has no model has no priors.
    size, present = np.ones(len(design.y)), np.ones(len(design.y), bool)
    for other, message in (
        (replace(design, size=size), "numbers of trials"),
        (replace(design, present=present), "rows that are not there"),
        (np.ones(3), "ndarray"),
    ):
        with pytest.raises(ValueError, match=message):
            mj.default_priors(other)
        with pytest.raises(ValueError, match=message):
            mj.priors().resolve(other)
    with pytest.raises(ValueError, match=r"by_level does not know Related.neighbours"):
        mj.marginal_loglik_by_level(None, related)


@pytest.mark.parametrize(
    ("formula", "own", "message"),
    [
        ("Reaction ~ Days + (Days | Subject)", {"by_name": {"Intercept": mj.prior.normal(250, 9)}, "intercept": 1},
         "are one parameter"),
        ("Reaction ~ 0 + Days + (Days | Subject)", {"intercept": 1}, "has no intercept"),
        ("Reaction ~ Days + (1 | Subject)", {"cor": mj.prior.lkj(2)}, "no correlations"),
        ("Reaction ~ 1 + (Days | Subject)", {"beta": mj.prior.flat()}, "no fixed effects beside the intercept"),
    ],
)  # fmt: skip
def test_priors_of_what_the_model_has_not_are_refused(formula, own, message):
    own = {name: mj.prior.normal(250, 9) if one == 1 else one for name, one in own.items()}
    given = mj.priors(own.pop("by_name", None), **own)
    with pytest.raises(ValueError, match=message):
        mj.bayes(formula, mj.datasets.load("sleepstudy"), priors=given)
    with pytest.raises(ValueError, match=message):
        mj.prior_predictive(formula, mj.datasets.load("sleepstudy"), priors=given, draws=2)
