"""Random unbalanced designs of a few structures; many data sets, few compiled programs."""

from dataclasses import dataclass

import numpy as np

import mixjax as mj

N, P = 40, 2


@dataclass(frozen=True)
class Structure:
    """Terms as (q, levels, relation): relation "free" crosses what came before, "parent" holds the factor before it,
    "same" shares its factor."""

    terms: tuple[tuple[int, int, str], ...]
    weights: bool = False


STRUCTURES = {
    "one factor, q=1": Structure(((1, 7, "free"),)),
    "one factor, q=2, weights": Structure(((2, 7, "free"),), weights=True),
    "one factor, q=4": Structure(((4, 6, "free"),)),
    "two terms on a factor": Structure(((1, 7, "free"), (2, 7, "same"))),
    "nested": Structure(((1, 12, "free"), (2, 5, "parent"))),
    "nested chain of three": Structure(((2, 12, "free"), (1, 6, "parent"), (1, 3, "parent"))),
    "crossed": Structure(((2, 9, "free"), (1, 5, "free"))),
    "crossed, three factors, weights": Structure(((1, 9, "free"), (2, 5, "free"), (1, 4, "free")), weights=True),
    "nested and crossed": Structure(((1, 12, "free"), (1, 5, "free"), (1, 4, "grandparent"))),
}


def random_design(structure: Structure, seed: int, n: int = N, p: int = P) -> mj.Design:
    """A design with unequal groups (some possibly empty), an offset, and weights where the structure says so."""
    rng = np.random.default_rng(seed)
    groups: list[np.ndarray] = []
    terms = []
    for q, m, relation in structure.terms:
        if relation == "same":
            group = groups[-1]
        elif relation in ("parent", "grandparent"):
            child = groups[-1] if relation == "parent" else groups[0]
            group = rng.integers(0, m, child.max() + 1)[child]
        else:
            group = rng.integers(0, m, n)
        groups.append(group)
        Z = rng.normal(size=(n, q)) * rng.uniform(0.5, 2.0, q)
        if relation != "same":
            Z[:, 0] = 1.0
        terms.append(mj.RandomTerm(Z=Z, group=group, n_groups=m))
    X = np.column_stack([np.ones(n), rng.normal(size=(n, max(p - 1, 0)))])[:, :p]
    return mj.Design(
        y=rng.normal(size=n) + 0.7 * groups[0] % 3,
        X=X,
        terms=tuple(terms),
        weights=rng.uniform(0.5, 2.0, n) if structure.weights else None,
        offset=rng.normal(size=n),
    )


def random_theta(structure: Structure, seed: int) -> np.ndarray:
    """Signed Cholesky entries, anywhere."""
    k = sum(q * (q + 1) // 2 for q, _, _ in structure.terms)
    return np.random.default_rng(seed + 10_000).normal(size=k)


def random_lambdas(design, seed, singular):
    """A triangle per term; singular ones lose their last column, or are zero."""
    rng = np.random.default_rng(seed)
    lambdas = [np.tril(rng.normal(size=(term.Z.shape[1],) * 2)) for term in design.terms]
    if singular:
        for Lambda in lambdas:
            Lambda[:, -1] = 0.0
    return lambdas
