"""From the parameters of a random term to the covariance of its effects, and back."""

from mixjax.covariance.custom import Covariance
from mixjax.covariance.names import BY_OPTION, STRUCTURES, canonical, structure_of
from mixjax.covariance.natural import by_natural
from mixjax.covariance.structures import (
    Diagonal,
    HomogeneousCompoundSymmetry,
    NaturalParameter,
    Structure,
    Unstructured,
    cut,
    factors_of,
    near,
)
from mixjax.covariance.theta import (
    HIGHEST,
    LOWEST,
    diagonal_positions,
    lambda_of_theta,
    lambdas_of_theta,
    n_effects,
    n_theta,
    pairs_of,
    rank_tolerance,
    split_theta,
    stack_of,
    theta_of_lambda,
    theta_of_lambdas,
    triangle,
)

__all__ = [
    "BY_OPTION",
    "HIGHEST",
    "LOWEST",
    "STRUCTURES",
    "Covariance",
    "Diagonal",
    "HomogeneousCompoundSymmetry",
    "NaturalParameter",
    "Structure",
    "Unstructured",
    "by_natural",
    "canonical",
    "cut",
    "diagonal_positions",
    "factors_of",
    "lambda_of_theta",
    "lambdas_of_theta",
    "n_effects",
    "n_theta",
    "near",
    "pairs_of",
    "rank_tolerance",
    "split_theta",
    "stack_of",
    "structure_of",
    "theta_of_lambda",
    "theta_of_lambdas",
    "triangle",
]
