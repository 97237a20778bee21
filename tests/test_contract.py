"""The names that users and other programs rely on: signatures, and what comes back. A change here breaks theirs."""

import inspect

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table
from scipy import sparse

import mixjax as mj

FUNCTIONS = {
    "lmm": "formula, data, reml=True, weights=None, offset=None, subset=None, contrasts=None, start=None, "
    "optimizer=None, check_identifiable=True, trusted=None, dispersion=None, residual=None",
    "glmm": "formula, data, family, link=None, size=None, weights=None, offset=None, subset=None, contrasts=None, "
    "start=None, curvature='observed', nagq=1, reml=False, check_identifiable=True, trusted=None, "
    "ziformula=None, dispformula=None",
    "mmrm": "formula, data, reml=True, ddf='satterthwaite', weights=None, offset=None, subset=None, contrasts=None, "
    "trusted=None",
    "RepeatedDesign": "y, X, subject, visit, n_subjects, n_visits, structure='us', arm=None, n_arms=1, weights=None, "
    "offset=None",
    "repeated_estimate": "design, reml=True",
    "repeated_loglik": "beta, Sigma, design",
    "RepeatedEstimates": "beta, vcov, Sigma, criterion, converged, singular, iterations, grad_norm, result, x, scale",
    "build_design": "formula, data, weights=None, offset=None, subset=None, contrasts=None, context=None, "
    "trusted=None, family=None, size=None",
    "Design": "y, X, terms, weights=None, offset=None, size=None, psi_columns=(), dispersion=None, residual=None, "
    "present=None, nested=None",
    "RandomTerm": "Z, group, n_groups, structure='us', levels=None, kernel=None, coordinates=None, within=None",
    "Kernel": "name, smoothness=None",
    "Relationship": "matrix, levels=None",
    "pedigree": "id, sire, dam",
    "phylogeny": "newick, correlation=False",
    "Covariance": "fun, k, scale='hom', names=(), returns='covariance', natural=None",
    "cross_products": "design, y=None",
    "cross_products_from": "batches, formula, weights=None, offset=None, categories=None, contrasts=None, "
    "progress=None, context=None, trusted=None",
    "stack": "all_stats",
    "shard": "stats, mesh",
    "criterion": "theta, stats, reml=True",
    "MarginalParams": "beta, log_sigma, chol",
    "marginal_loglik": "params, design",
    "marginal_loglik_by_level": "params, design, factor=None",
    "group_batches": "design, size, key=0",
    "bayes": "formula, data, priors=None, draws=1000, chains=4, key=0, *, warmup=300, target=0.8, method='nuts', "
    "integrate=True, max_doublings=10, weights=None, offset=None, subset=None, contrasts=None, trusted=None, "
    "dispersion=None, residual=None, sigma=None, family=None, link=None, size=None, nagq=1, ziformula=None, "
    "dispformula=None",
    "bayes_mmrm": "formula, data, priors=None, draws=1000, chains=4, key=0, *, warmup=300, target=0.8, method='nuts', "
    "integrate=True, max_doublings=10, weights=None, offset=None, subset=None, contrasts=None, trusted=None",
    "priors": "by_name=None, /, *, intercept=None, beta=None, sd=None, cor=None, sigma=None, dispersion=None, "
    "rho=None, zi=None, family=None",
    "default_priors": "design, weak=False, family=None",
    "prior_predictive": "formula, data, priors=None, draws=1000, key=0, *, weights=None, offset=None, subset=None, "
    "contrasts=None, trusted=None",
    "sbc": "formula, data, priors=None, replicates=1000, draws=100, key=0, *, weights=None, offset=None, "
    "contrasts=None, trusted=None",
    "log_posterior": "z, stats, priors",
    "prior.flat": "",
    "prior.normal": "loc=0.0, scale=1.0",
    "prior.student_t": "df, loc=0.0, scale=1.0",
    "prior.half_normal": "scale=1.0",
    "prior.half_student_t": "df, scale=1.0",
    "prior.exponential": "rate=1.0",
    "prior.log_normal": "loc=0.0, scale=1.0",
    "prior.lkj": "eta=1.0",
    "to_params": "est, design=None",
    "from_params": "p, design=None",
    "estimate": "stats, reml=True, start=None",
    "estimate_many": "stats, reml=True, start=None, chunk=None, mesh=None, keep=('theta', 'beta', 'sigma', "
    "'criterion', 'converged', 'singular', 'iterations', 'grad_norm', 'result'), engine='auto'",
    "Estimates": "theta, beta, sigma, Sigma, vcov, b, criterion, converged, singular, iterations, grad_norm, result, "
    "residual=None, kernels=None",
    "rows": "design, family, y=None",
    "GLMMParams": "beta, chol, psi=()",
    "glmm_loglik": "params, data, nagq=1",
    "glmm_criterion": "theta, beta, data, psi=(), curvature='observed', nagq=1",
    "glmm_estimate": "data, start=None, curvature='observed', nagq=1, reml=False",
    "glmm_estimate_many": "data, curvature='observed', keep=('theta', 'beta', 'psi', 'criterion', 'converged', "
    "'singular', 'iterations', 'grad_norm', 'result'), engine='auto', fits=None, nagq=1",
    "GLMMEstimates": "theta, beta, psi, Sigma, vcov, vcov_all, b, eta, criterion, converged, singular, iterations, "
    "grad_norm, mode_error, result",
    "compare": "*fits, refit='ml', method='chi2', names=None, key=0, n=1000",
    "exact_lrt": "m, m0=None, key=0, n=100000",
    "exact_rlrt": "m, m0=None, mA=None, key=0, n=100000",
    "wald": "est, stats, L",
    "satterthwaite": "est, stats, L, reml=True",
    "kenward_roger": "est, stats, L",
    "predict": "est, design",
    "lineup": "fit, plot, n=20, key=0",
    "table": "fits, stat='std_error', names=None, ddf=None, level=0.95, digits=3, stars=False, exponentiate=False",
    "simulate": "formula, data, *, beta, sigma=None, sd=None, cor=None, theta=None, key=0, n=1, weights=None, "
    "offset=None, contrasts=None, family=None, link=None, size=None, dispersion=None",
    "scenario": "formula, data, beta, sigma=None, sd=None, cor=None, theta=None, weights=None, offset=None, "
    "contrasts=None, family=None, link=None, size=None, dispersion=None",
    "scenario_of": "fit",
    "trial": "formula, data, beta, sd=None, cor=None, Sigma=None, dropout=0.0, dropout_slope=0.0, weights=None, "
    "offset=None, contrasts=None",
    "trial_of": "fit",
    "study": "source, models, grid=None, replicates=1000, key=0, *, truth=None, reml=True, ddf=None, "
    "null=None, compared=(), statistic=None, common=False, store=None, executor=None, mesh=None, chunk=None, "
    "progress=None, engine='auto', family=None, link=None, size=None, nagq=1, estimator='likelihood', priors=None",
    "power": "source, model, test, grid=None, replicates=1000, key=0, alpha=0.05, level=0.95, **options",
    "power_curve": "source, model, test, over, target=None, replicates=1000, key=0, alpha=0.05, **options",
    "population": "*, functions=None, **variables",
    "enable_compilation_cache": "path=None",
    "show_progress": "on=None",
    "show_versions": "",
    "datasets.load": "name",
    "families.binomial": "link='logit'",
    "families.poisson": "link='log'",
    "families.nbinom": "link='log'",
    "families.gamma": "link='log'",
    "families.inverse_gaussian": "link='log'",
    "families.beta": "link='logit'",
    "families.gaussian": "link='identity'",
    "families.zero_inflated": "base, link=None",
    "families.custom": "loglik, mean, draw=None, psi=(), start=None, name='custom'",
    "families.family_of": "family, link=None, linear=False",
}
METHODS = {
    "ranef": "*, condvar=False",
    "ranef_frame": "",
    "coef": "",
    "icc": "by_group=False",
    "r2": "",
    "summary": "ddf=None",
    "tidy": "ddf=None, conf_int=False, level=0.95",
    "test": "L, ddf='satterthwaite', joint=None, adjust='none', level=0.95",
    "joint_tests": "by=None, ddf='satterthwaite'",
    "anova": "type='III', ddf='satterthwaite'",
    "drop1": "test='F', ddf='satterthwaite'",
    "ranova": "method='mixture', reduce=True, key=0, n=1000",
    "without": "term",
    "emmeans": "spec, by=None, at=None, ddf='satterthwaite', level=0.95",
    "emtrends": "spec, var, by=None, at=None, ddf='satterthwaite', level=0.95",
    "robust": "cluster=None, kind='CR2', L=None",
    "confint": "parm=None, level=0.95, method='profile', ddf='wald', key=0, n=1000, kind='percentile'",
    "conf_int": "alpha=0.05",
    "profile": "parm=None",
    "bootstrap": "key, n, kind='parametric', statistic=None, chunk=None, progress=None, weights='mammen', "
    "modes=False, engine='auto'",
    "simulate": "key, n, random='new'",
    "variance_shares": "",
    "variance_parameters": "",
    "pca": "",
    "glance": "",
    "augment": "",
    "predict": "newdata=None, random=True, allow_new_levels=False, interval=None, level=0.95, method='henderson', "
    "key=None, n=1000",
    "residuals": "kind='conditional', scale='raw'",
    "quantile_residuals": "key=0, n=250, random='new'",
    "smooth": "name=None, at=None, n=100, level=0.95",
    "smooths": "",
    "influence": "by=None, method='exact'",
    "sensitivity": "scale='sdcor'",
    "leverage": "",
    "shrinkage": "group=None",
    "plot": "group=None",
    "marginal_cov": "rows=None",
    "refit": "y=None, reml=None",
    "refit_many": "Y, reml=None, chunk=None, ranef=False, engine='auto'",
}
POSTERIOR_METHODS = {
    "summary": "level=0.95",
    "notes": "level=0.95",
    "problems": "",
    "warn": "",
    "to_frame": "",
    "ranef": "stat='mean'",
    "predict": "newdata=None, random=True, allow_new_levels=False, interval='confidence', level=0.95, draws=False, "
    "key=None",
    "simulate": "n=None, random='fitted', key=None",
    "log_lik": "by=None",
    "loo": "by=None",
    "to_arviz": "log_likelihood=False, predictive=False",
    "to_latex": "buf=None, *, caption=None, label=None",
    "to_html": "buf=None",
    "to_markdown": "buf=None",
    "plot": "kind='trace', **options",
}
GLMM_METHODS = {
    "ranef": "*, condvar=False",
    "coef": "",
    "summary": "",
    "tidy": "exponentiate=False, conf_int=False, level=0.95",
    "glance": "",
    "residuals": "kind='deviance'",
    "predict": "newdata=None, random=None, scale='response', integrate=False, allow_new_levels=False, interval=None, "
    "level=0.95, size=None",
    "laplace_check": "key=0, nagq=None, n=None",
    "quantile_residuals": "key=0, n=250, random='new'",
    "smooth": "name=None, at=None, n=100, level=0.95",
    "smooths": "",
    "overdispersion": "key=0, n=250",
    "zero_inflation": "key=0, n=250",
    "augment": "",
    "influence": "by=None, method='exact'",
    "leverage": "",
    "plot": "group=None",
    "refit": "y=None, reml=None",
    "test": "L, joint=None, adjust='none', level=0.95",
    "anova": "type='III'",
    "drop1": "test='lrt'",
    "ranova": "method='mixture', reduce=True, key=0, n=1000",
    "without": "term",
    "joint_tests": "by=None",
    "emmeans": "spec, by=None, at=None, scale=None, integrate=False, component=None, level=0.95",
    "emtrends": "spec, var, by=None, at=None, level=0.95",
    "confint": "parm=None, level=0.95, method='profile', key=0, n=1000, kind='percentile', exponentiate=False",
    "profile": "parm=None",
    "robust": "cluster=None, kind='CR1'",
    "icc": "by_group=False, approximation=None",
    "r2": "approximation=None",
    "variance_shares": "approximation=None",
    "bootstrap": "key, n, kind='parametric', statistic=None, chunk=None, progress=None, modes=False, engine='auto'",
    "refit_many": "Y, ranef=False, engine='auto'",
    "simulate": "key, n, random='new'",
    "variance_parameters": "",
}
MMRM_METHODS = {
    "summary": "ddf=None",
    "tidy": "ddf=None, conf_int=False, level=0.95",
    "glance": "",
    "variance_parameters": "",
    "test": "L, ddf=None, joint=None, adjust='none', level=0.95",
    "anova": "type='III', ddf=None",
    "joint_tests": "by=None, ddf=None",
    "emmeans": "spec, by=None, at=None, ddf=None, level=0.95",
    "emtrends": "spec, var, by=None, at=None, ddf=None, level=0.95",
    "confint": "parm=None, level=0.95, method='wald', ddf=None, key=0, n=1000",
    "conf_int": "alpha=0.05",
    "residuals": "kind='response'",
    "resid": "kind='response'",
    "predict": "newdata=None, conditional=False, interval=None, level=0.95, ddf=None",
    "augment": "",
    "simulate": "key, n",
    "refit": "y=None, reml=None",
    "refit_many": "Y",
    "bootstrap": "key, n",
}
MMRM_PROPERTIES = {
    "fixef": pd.Series, "se": pd.Series, "params": pd.Series, "bse": pd.Series, "vcov": pd.DataFrame, "Sigma": dict,
    "residual_sd": pd.Series, "X": np.ndarray, "design": mj.RepeatedDesign, "labels": mj.Labels,
    "estimates": mj.RepeatedEstimates, "criterion": float, "loglik": float, "aic": float, "bic": float, "nobs": int,
    "npar": int, "converged": bool, "fitted": pd.Series, "reml": bool, "ddf": str, "pvalues": pd.Series,
}  # fmt: skip
GLMM_PROPERTIES = {
    "fixef": pd.Series, "se": pd.Series, "params": pd.Series, "bse": pd.Series, "vcov": pd.DataFrame,
    "vcov_all": pd.DataFrame, "theta": np.ndarray, "Sigma": dict, "dispersion": pd.Series,
    "zi": pd.Series, "disp": pd.Series, "design": mj.Design,
    "labels": mj.Labels, "estimates": mj.GLMMEstimates, "criterion": float, "loglik": float, "aic": float, "bic": float,
    "deviance": float, "nobs": int, "npar": int, "nagq": int, "reml": bool, "curvature": str, "link": str,
    "is_singular": bool,
    "converged": bool, "fitted": pd.Series, "linear_predictor": pd.Series,
}  # fmt: skip
# Parts of a population.
VARIABLES = {
    "factor", "categorical", "occasion", "dirichlet", "normal", "uniform", "bernoulli", "poisson",
    "multivariate_normal", "empirical", "derived", "custom", "random_effects", "response", "student_t", "skew_normal",
    "shifted_gamma", "contaminated_normal",
}  # fmt: skip
PROPERTIES = {
    "fixef": pd.Series, "se": pd.Series, "params": pd.Series, "bse": pd.Series, "vcov": pd.DataFrame, "sigma": float,
    "theta": np.ndarray, "Lambda": dict, "Sigma": dict, "X": np.ndarray, "Z": sparse.csc_array, "design": mj.Design,
    "labels": mj.Labels, "stats": mj.CrossProducts, "estimates": mj.Estimates, "criterion": float, "loglik": float,
    "aic": float, "bic": float, "nobs": int, "npar": int, "is_singular": bool, "converged": bool, "fitted": pd.Series,
    "reml": bool, "pvalues": pd.Series,
}  # fmt: skip


def signature(function) -> str:
    """Names and defaults, without annotations and ``self``."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(parameters))[1:-1]


def test_every_public_function_is_listed():
    others = {"LMMFit", "GLMMFit", "MMRMFit", "BatchFit", "Posterior", "MMRMPosterior", "GLMMPosterior",
              "Labels", "datasets", "CrossProducts", "Result", "__version__", "FormulaError", "DataError",
              "DataWarning", "ConvergenceWarning", "InferenceWarning", *VARIABLES}  # fmt: skip
    assert {name.split(".")[0] for name in FUNCTIONS} | others == set(mj.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    value = mj
    for part in name.split("."):
        value = getattr(value, part)
    assert signature(value) == FUNCTIONS[name]


def test_every_attribute_of_a_fit_is_listed():
    public = {name for name in dir(mj.LMMFit) if not name.startswith("_")}
    assert public == {*METHODS, *PROPERTIES, "varcorr", "optimizer", "record"}


def test_the_face_of_repeated_measures():
    public = {name for name in dir(mj.MMRMFit) if not name.startswith("_")}
    assert public == {*MMRM_METHODS, *MMRM_PROPERTIES, "varcorr", "optimizer", "record", "sigma"}
    for name, expected in MMRM_METHODS.items():
        assert signature(getattr(mj.MMRMFit, name)) == expected, name
    fit = mj.mmrm("distance ~ Sex + ar1(age | Subject)", mj.datasets.load("Orthodont"))
    for name, kind in MMRM_PROPERTIES.items():
        assert isinstance(getattr(fit, name), kind), name


def test_every_attribute_of_a_posterior_is_listed():
    public = {name for name in dir(mj.Posterior) if not name.startswith("_")}
    properties = {"reml_fit", "design", "labels", "shape", "names", "draws", "sigma", "Sigma", "b"}
    assert public == {*POSTERIOR_METHODS, *properties}
    for name, expected in POSTERIOR_METHODS.items():
        assert signature(getattr(mj.Posterior, name)) == expected


def test_every_attribute_of_a_posterior_of_repeated_measures_is_listed():
    public = {name for name in dir(mj.MMRMPosterior) if not name.startswith("_")}
    own = {**POSTERIOR_METHODS, "ranef": "", "simulate": "n=None, key=None"}
    own["predict"] = "newdata=None, interval='confidence', level=0.95, draws=False, key=None"
    assert public == {*own, "reml_fit", "design", "labels", "shape", "names", "draws", "Sigma"}
    for name, expected in own.items():
        assert signature(getattr(mj.MMRMPosterior, name)) == expected


def test_every_attribute_of_a_generalized_posterior_is_listed():
    public = {name for name in dir(mj.GLMMPosterior) if not name.startswith("_")}
    own = {**POSTERIOR_METHODS, "laplace_check": ""}
    own["predict"] += ", scale='response', size=None"
    properties = {"reml_fit", "ml_fit", "design", "labels", "shape", "names", "draws", "sigma", "Sigma", "b", "family"}
    assert public == {*own, *properties}
    for name, expected in own.items():
        assert signature(getattr(mj.GLMMPosterior, name)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_a_fit(name):
    assert signature(getattr(mj.LMMFit, name)) == METHODS[name]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_of_a_fit(name):
    assert type(getattr(fit_of("sleepstudy_slopes", "REML"), name)) is PROPERTIES[name]


def test_every_attribute_of_a_generalized_fit_is_listed():
    public = {name for name in dir(mj.GLMMFit) if not name.startswith("_")}
    assert public == {*GLMM_METHODS, *GLMM_PROPERTIES, "varcorr", "optimizer", "record", "family"}
    for name, expected in GLMM_METHODS.items():
        assert signature(getattr(mj.GLMMFit, name)) == expected


def test_attributes_of_a_generalized_fit():
    data = table("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
    fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
    for name, expected in GLMM_PROPERTIES.items():
        assert type(getattr(fit, name)) is expected
    assert fit.optimizer._fields == ("name", "iterations", "gradient_norm", "message")
    for frame in (fit.varcorr.to_frame(), fit.tidy(), fit.glance(), fit.ranef()["Subject"], fit.coef()["Subject"]):
        assert isinstance(frame, pd.DataFrame)
    for kind in ("response", "pearson", "deviance", "working"):
        assert type(fit.residuals(kind)) is pd.Series
    assert type(fit.refit(data["slow"])) is mj.GLMMFit
    assert fit.ranef(condvar=True)[1]["Subject"].shape == (18, 1, 1)


def test_what_methods_of_a_fit_give():
    fit = fit_of("sleepstudy_slopes", "REML")
    frames = [fit.varcorr.to_frame(), fit.tidy(), fit.glance(), fit.augment(), fit.ranef()["Subject"], fit.leverage()]
    frames += [fit.test("Days"), fit.anova(), fit.confint("Days", method="wald"), fit.shrinkage(), fit.sensitivity()]
    frames += [fit.predict(interval="confidence"), fit.variance_shares(), fit.variance_parameters()]
    frames += [fit.influence(method="fixed-theta").to_frame(), fit.profile("sigma").confint()]
    for frame in frames:
        assert isinstance(frame, pd.DataFrame)
    for series in (fit.icc(), fit.icc(by_group=True), fit.r2(), fit.predict(), fit.residuals()):
        assert type(series) is pd.Series
    frames, covariances = fit.ranef(condvar=True)
    assert covariances["Subject"].shape == (18, 2, 2)
    assert list(frames["Subject"].columns) == list(fit.coef()["Subject"].columns) == ["Intercept", "Days"]
    assert list(fit.tidy().columns) == [
        "effect", "group", "term", "estimate", "std_error", "statistic", "df", "p_value"
    ]  # fmt: skip
    assert list(fit.varcorr.to_frame().columns) == ["group", "name1", "name2", "vcov", "sdcor"]
    assert list(fit.icc().index) == ["adjusted", "unadjusted"]
    assert list(fit.r2().index) == ["marginal", "conditional"]
    assert fit.optimizer._fields == ("name", "iterations", "gradient_norm", "message")
    assert fit.marginal_cov([0, 1]).shape == (2, 2)
    assert type(fit.refit(reml=False)) is mj.LMMFit
    assert isinstance(fit.refit_many(np.asarray(fit.fitted)[None] + 1.0), mj.BatchFit)
    assert all(leaf.dtype in (np.float64, np.bool_, np.int64, np.int32) for leaf in jax.tree.leaves(fit.estimates))


def test_what_the_functional_core_gives():
    """Shapes of the estimates, and the way there and back to unconstrained parameters."""
    design, labels = mj.build_design("Reaction ~ Days + (Days | Subject)", table("sleepstudy"))
    stats = mj.cross_products(design)
    many = mj.cross_products(design, np.stack([design.y, design.y[::-1]]))
    assert type(labels) is mj.Labels
    assert type(stats) is type(many) is type(stats + stats) is mj.CrossProducts
    est, batch = fit_of("sleepstudy_slopes", "REML").estimates, mj.estimate_many(many)
    shapes = {"theta": (3,), "beta": (2,), "sigma": (), "vcov": (2, 2), "criterion": (), "converged": (), "result": ()}
    for name, shape in shapes.items():
        assert np.shape(getattr(est, name)) == shape
        assert getattr(batch, name) is None if name == "vcov" else np.shape(getattr(batch, name)) == (2, *shape)
    assert [np.shape(part) for part in (*est.Sigma, *est.b)] == [(2, 2), (18, 2)]
    with jax.enable_x64(True):
        back = mj.from_params(mj.to_params(est))
        assert mj.criterion(est.theta, stats).shape == mj.marginal_loglik(mj.to_params(est), design).shape == ()
    np.testing.assert_allclose(back.theta, est.theta, rtol=1e-12)
    np.testing.assert_allclose(back.Sigma[0], est.Sigma[0], rtol=1e-12)
