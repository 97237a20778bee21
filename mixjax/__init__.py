"""mixjax: differentiable mixed models on JAX.

Names are loaded when they are touched (PEP 562): ``import mixjax`` imports neither JAX nor pandas, and the functional
core imports no pandas, formulaic, optax or matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names in reading order, and the room where each lives.
_HOMES = {
    # formula and data frame
    "lmm": "mixjax.lmm",
    "LMMFit": "mixjax.lmm",
    "BatchFit": "mixjax.batch",
    "datasets": "mixjax.datasets",
    "enable_compilation_cache": "mixjax.cache",
    # functional core: arrays in, arrays out
    "Design": "mixjax.design",
    "RandomTerm": "mixjax.design",
    "Labels": "mixjax.design",
    "build_design": "mixjax.formula.build",
    "CrossProducts": "mixjax.likelihood.statistics",
    "cross_products": "mixjax.likelihood.cross_products",
    "cross_products_from": "mixjax.streams",
    "criterion": "mixjax.likelihood.criterion",
    "MarginalParams": "mixjax.likelihood.marginal",
    "marginal_loglik": "mixjax.likelihood.marginal",
    "stack": "mixjax.likelihood.statistics",
    "shard": "mixjax.likelihood.sharding",
    "estimate": "mixjax.estimation.estimate",
    "estimate_many": "mixjax.estimation.many",
    "Estimates": "mixjax.estimation.estimate",
    "to_params": "mixjax.estimation.params",
    "from_params": "mixjax.estimation.params",
    "Result": "mixjax.optimise.results",
    # tests and intervals
    "compare": "mixjax.inference.likelihood_ratio",
    "exact_lrt": "mixjax.inference.exact_lrt",
    "exact_rlrt": "mixjax.inference.exact_lrt",
    "wald": "mixjax.inference.contrasts",
    "satterthwaite": "mixjax.inference.contrasts",
    "kenward_roger": "mixjax.inference.contrasts",
    # what can go wrong
    "FormulaError": "mixjax.formula.errors",
    "DataError": "mixjax.formula.errors",
    "DataWarning": "mixjax.formula.errors",
    "ConvergenceWarning": "mixjax.fitted",
    "InferenceWarning": "mixjax.fitted",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from mixjax import datasets as datasets
    from mixjax.batch import BatchFit as BatchFit
    from mixjax.cache import enable_compilation_cache as enable_compilation_cache
    from mixjax.design import Design as Design
    from mixjax.design import Labels as Labels
    from mixjax.design import RandomTerm as RandomTerm
    from mixjax.estimation.estimate import Estimates as Estimates
    from mixjax.estimation.estimate import estimate as estimate
    from mixjax.estimation.many import estimate_many as estimate_many
    from mixjax.estimation.params import from_params as from_params
    from mixjax.estimation.params import to_params as to_params
    from mixjax.fitted import ConvergenceWarning as ConvergenceWarning
    from mixjax.fitted import InferenceWarning as InferenceWarning
    from mixjax.formula.build import build_design as build_design
    from mixjax.formula.errors import DataError as DataError
    from mixjax.formula.errors import DataWarning as DataWarning
    from mixjax.formula.errors import FormulaError as FormulaError
    from mixjax.inference.contrasts import kenward_roger as kenward_roger
    from mixjax.inference.contrasts import satterthwaite as satterthwaite
    from mixjax.inference.contrasts import wald as wald
    from mixjax.inference.exact_lrt import exact_lrt as exact_lrt
    from mixjax.inference.exact_lrt import exact_rlrt as exact_rlrt
    from mixjax.inference.likelihood_ratio import compare as compare
    from mixjax.likelihood.criterion import criterion as criterion
    from mixjax.likelihood.cross_products import cross_products as cross_products
    from mixjax.likelihood.marginal import MarginalParams as MarginalParams
    from mixjax.likelihood.marginal import marginal_loglik as marginal_loglik
    from mixjax.likelihood.sharding import shard as shard
    from mixjax.likelihood.statistics import CrossProducts as CrossProducts
    from mixjax.likelihood.statistics import stack as stack
    from mixjax.lmm import LMMFit as LMMFit
    from mixjax.lmm import lmm as lmm
    from mixjax.optimise.results import Result as Result
    from mixjax.streams import cross_products_from as cross_products_from


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixjax' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # All names of a home at once: importing mixjax.lmm makes that module an attribute, which would hide the function.
    for other, place in _HOMES.items():
        if place == _HOMES[name]:
            globals()[other] = getattr(home, other, home)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
