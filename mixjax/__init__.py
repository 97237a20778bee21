"""mixjax: differentiable mixed models on JAX.

Names are loaded when they are touched (PEP 562): ``import mixjax`` imports neither JAX nor pandas, and the functional
core imports no pandas, formulaic, optax or matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixjax import forks as _forks  # noqa: F401 (what it does at a fork)

__version__ = "0.1.0"

# Public names in reading order, and the room where each lives.
_HOMES = {
    # formula and data frame
    "lmm": "mixjax.face.linear",
    "LMMFit": "mixjax.face.linear",
    "glmm": "mixjax.face.generalized",
    "GLMMFit": "mixjax.face.generalized",
    "mmrm": "mixjax.face.repeated",
    "MMRMFit": "mixjax.face.repeated",
    "BatchFit": "mixjax.fitted.batch",
    "datasets": "mixjax.datasets",
    "families": "mixjax.families",
    "enable_compilation_cache": "mixjax.cache",
    "show_progress": "mixjax.waiting",
    "show_versions": "mixjax.versions",
    # functional core: arrays in, arrays out
    "Design": "mixjax.design",
    "RandomTerm": "mixjax.design",
    "RepeatedDesign": "mixjax.design",
    "Covariance": "mixjax.covariance.custom",
    "Kernel": "mixjax.kernels",
    "Relationship": "mixjax.relationship",
    "pedigree": "mixjax.relationship",
    "phylogeny": "mixjax.relationship",
    "Labels": "mixjax.design",
    "build_design": "mixjax.formula.build",
    "CrossProducts": "mixjax.products.sums",
    "cross_products": "mixjax.products.cross_products",
    "cross_products_from": "mixjax.streams",
    "criterion": "mixjax.engine.criterion",
    "MarginalParams": "mixjax.engine.marginal",
    "marginal_loglik": "mixjax.engine.marginal",
    "marginal_loglik_by_level": "mixjax.engine.by_level",
    "group_batches": "mixjax.minibatches",
    "stack": "mixjax.products.sums",
    "shard": "mixjax.products.sharding",
    "estimate": "mixjax.estimation.estimate",
    "estimate_many": "mixjax.estimation.many",
    "Estimates": "mixjax.estimation.estimate",
    "predict": "mixjax.estimation.blup",
    "to_params": "mixjax.estimation.params",
    "from_params": "mixjax.estimation.params",
    "rows": "mixjax.products.family_rows",
    "GLMMParams": "mixjax.engine.laplace",
    "glmm_loglik": "mixjax.engine.laplace",
    "glmm_criterion": "mixjax.engine.laplace",
    "glmm_estimate": "mixjax.estimation.glmm_one",
    "glmm_estimate_many": "mixjax.estimation.glmm_many",
    "GLMMEstimates": "mixjax.estimation.glmm",
    "repeated_loglik": "mixjax.engine.visit_loglik",
    "repeated_estimate": "mixjax.estimation.repeated",
    "RepeatedEstimates": "mixjax.estimation.repeated",
    "Result": "mixjax.optimise.results",
    # tests and intervals
    "compare": "mixjax.inference.random.likelihood_ratio",
    "exact_lrt": "mixjax.inference.random.exact_lrt",
    "exact_rlrt": "mixjax.inference.random.exact_lrt",
    "wald": "mixjax.inference.fixed.contrasts",
    "satterthwaite": "mixjax.inference.fixed.contrasts",
    "kenward_roger": "mixjax.inference.fixed.contrasts",
    "lineup": "mixjax.lineups",
    "table": "mixjax.face.report",
    # simulation studies
    "simulate": "mixjax.studies.scenario",
    "scenario": "mixjax.studies.scenario",
    "scenario_of": "mixjax.studies.scenario",
    "trial": "mixjax.studies.trial",
    "trial_of": "mixjax.studies.trial",
    "study": "mixjax.studies.study",
    "power": "mixjax.studies.power",
    "power_curve": "mixjax.studies.power",
    "population": "mixjax.populations.population",
    "factor": "mixjax.populations.factors",
    "categorical": "mixjax.populations.factors",
    "occasion": "mixjax.populations.factors",
    "dirichlet": "mixjax.populations.factors",
    "normal": "mixjax.populations.predictors",
    "uniform": "mixjax.populations.predictors",
    "bernoulli": "mixjax.populations.predictors",
    "poisson": "mixjax.populations.predictors",
    "multivariate_normal": "mixjax.populations.predictors",
    "empirical": "mixjax.populations.predictors",
    "derived": "mixjax.populations.predictors",
    "custom": "mixjax.populations.predictors",
    "random_effects": "mixjax.populations.responses",
    "response": "mixjax.populations.responses",
    "student_t": "mixjax.populations.noise",
    "skew_normal": "mixjax.populations.noise",
    "shifted_gamma": "mixjax.populations.noise",
    "contaminated_normal": "mixjax.populations.noise",
    # Bayesian models
    "bayes": "mixjax.sampling.bayes",
    "Posterior": "mixjax.sampling.posterior",
    "bayes_mmrm": "mixjax.sampling.bayes_mmrm",
    "MMRMPosterior": "mixjax.sampling.mmrm_posterior",
    "GLMMPosterior": "mixjax.sampling.glmm_posterior",
    "prior": "mixjax.sampling.prior",
    "priors": "mixjax.sampling.priors",
    "default_priors": "mixjax.sampling.priors",
    "prior_predictive": "mixjax.sampling.predictive",
    "sbc": "mixjax.sampling.sbc",
    "log_posterior": "mixjax.sampling.density",
    # what can go wrong
    "FormulaError": "mixjax.checks",
    "DataError": "mixjax.checks",
    "DataWarning": "mixjax.checks",
    "ConvergenceWarning": "mixjax.checks",
    "InferenceWarning": "mixjax.checks",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from mixjax import datasets as datasets
    from mixjax import families as families
    from mixjax.cache import enable_compilation_cache as enable_compilation_cache
    from mixjax.checks import ConvergenceWarning as ConvergenceWarning
    from mixjax.checks import DataError as DataError
    from mixjax.checks import DataWarning as DataWarning
    from mixjax.checks import FormulaError as FormulaError
    from mixjax.checks import InferenceWarning as InferenceWarning
    from mixjax.covariance.custom import Covariance as Covariance
    from mixjax.design import Design as Design
    from mixjax.design import Labels as Labels
    from mixjax.design import RandomTerm as RandomTerm
    from mixjax.design import RepeatedDesign as RepeatedDesign
    from mixjax.engine.by_level import marginal_loglik_by_level as marginal_loglik_by_level
    from mixjax.engine.criterion import criterion as criterion
    from mixjax.engine.laplace import GLMMParams as GLMMParams
    from mixjax.engine.laplace import glmm_criterion as glmm_criterion
    from mixjax.engine.laplace import glmm_loglik as glmm_loglik
    from mixjax.engine.marginal import MarginalParams as MarginalParams
    from mixjax.engine.marginal import marginal_loglik as marginal_loglik
    from mixjax.engine.visit_loglik import repeated_loglik as repeated_loglik
    from mixjax.estimation.blup import predict as predict
    from mixjax.estimation.estimate import Estimates as Estimates
    from mixjax.estimation.estimate import estimate as estimate
    from mixjax.estimation.glmm import GLMMEstimates as GLMMEstimates
    from mixjax.estimation.glmm_many import glmm_estimate_many as glmm_estimate_many
    from mixjax.estimation.glmm_one import glmm_estimate as glmm_estimate
    from mixjax.estimation.many import estimate_many as estimate_many
    from mixjax.estimation.params import from_params as from_params
    from mixjax.estimation.params import to_params as to_params
    from mixjax.estimation.repeated import RepeatedEstimates as RepeatedEstimates
    from mixjax.estimation.repeated import repeated_estimate as repeated_estimate
    from mixjax.face.generalized import GLMMFit as GLMMFit
    from mixjax.face.generalized import glmm as glmm
    from mixjax.face.linear import LMMFit as LMMFit
    from mixjax.face.linear import lmm as lmm
    from mixjax.face.repeated import MMRMFit as MMRMFit
    from mixjax.face.repeated import mmrm as mmrm
    from mixjax.face.report import table as table
    from mixjax.fitted.batch import BatchFit as BatchFit
    from mixjax.formula.build import build_design as build_design
    from mixjax.inference.fixed.contrasts import kenward_roger as kenward_roger
    from mixjax.inference.fixed.contrasts import satterthwaite as satterthwaite
    from mixjax.inference.fixed.contrasts import wald as wald
    from mixjax.inference.random.exact_lrt import exact_lrt as exact_lrt
    from mixjax.inference.random.exact_lrt import exact_rlrt as exact_rlrt
    from mixjax.inference.random.likelihood_ratio import compare as compare
    from mixjax.kernels import Kernel as Kernel
    from mixjax.lineups import lineup as lineup
    from mixjax.minibatches import group_batches as group_batches
    from mixjax.optimise.results import Result as Result
    from mixjax.populations.factors import categorical as categorical
    from mixjax.populations.factors import dirichlet as dirichlet
    from mixjax.populations.factors import factor as factor
    from mixjax.populations.factors import occasion as occasion
    from mixjax.populations.noise import contaminated_normal as contaminated_normal
    from mixjax.populations.noise import shifted_gamma as shifted_gamma
    from mixjax.populations.noise import skew_normal as skew_normal
    from mixjax.populations.noise import student_t as student_t
    from mixjax.populations.population import population as population
    from mixjax.populations.predictors import bernoulli as bernoulli
    from mixjax.populations.predictors import custom as custom
    from mixjax.populations.predictors import derived as derived
    from mixjax.populations.predictors import empirical as empirical
    from mixjax.populations.predictors import multivariate_normal as multivariate_normal
    from mixjax.populations.predictors import normal as normal
    from mixjax.populations.predictors import poisson as poisson
    from mixjax.populations.predictors import uniform as uniform
    from mixjax.populations.responses import random_effects as random_effects
    from mixjax.populations.responses import response as response
    from mixjax.products.cross_products import cross_products as cross_products
    from mixjax.products.family_rows import rows as rows
    from mixjax.products.sharding import shard as shard
    from mixjax.products.sums import CrossProducts as CrossProducts
    from mixjax.products.sums import stack as stack
    from mixjax.relationship import Relationship as Relationship
    from mixjax.relationship import pedigree as pedigree
    from mixjax.relationship import phylogeny as phylogeny
    from mixjax.sampling.bayes import bayes as bayes
    from mixjax.sampling.bayes_mmrm import bayes_mmrm as bayes_mmrm
    from mixjax.sampling.density import log_posterior as log_posterior
    from mixjax.sampling.glmm_posterior import GLMMPosterior as GLMMPosterior
    from mixjax.sampling.mmrm_posterior import MMRMPosterior as MMRMPosterior
    from mixjax.sampling.posterior import Posterior as Posterior
    from mixjax.sampling.predictive import prior_predictive as prior_predictive
    from mixjax.sampling.prior import prior as prior
    from mixjax.sampling.priors import default_priors as default_priors
    from mixjax.sampling.priors import priors as priors
    from mixjax.sampling.sbc import sbc as sbc
    from mixjax.streams import cross_products_from as cross_products_from
    from mixjax.studies.power import power as power
    from mixjax.studies.power import power_curve as power_curve
    from mixjax.studies.scenario import scenario as scenario
    from mixjax.studies.scenario import scenario_of as scenario_of
    from mixjax.studies.scenario import simulate as simulate
    from mixjax.studies.study import study as study
    from mixjax.studies.trial import trial as trial
    from mixjax.studies.trial import trial_of as trial_of
    from mixjax.versions import show_versions as show_versions
    from mixjax.waiting import show_progress as show_progress


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixjax' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # No home bears the name of a function that lives in it: importing the module would hide the function.
    globals()[name] = getattr(home, name, home)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
