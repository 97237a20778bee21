"""Predicted random effects, by two identities that hold for every structure.

The penalised residual sum of squares is a minimum over the random effects, so by the envelope theorem its derivative
with respect to ``Z'y`` is ``-2 b`` at the conditional modes b. The log-determinant ``log det(I + Lambda' Z'Z Lambda)``
has derivative ``Lambda (I + Lambda' Z'Z Lambda)^{-1} Lambda'`` with respect to ``Z'Z``: the conditional covariance of
b, relative to sigma^2. Reverse-mode differentiation of the one elimination gives both, level by level. Of NumPy's
arrays the covariances are those of :class:`~mixjax.engine.equations.Equations`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mixjax import linalg
from mixjax.engine.criterion import in_bases
from mixjax.engine.elimination import arrange, eliminate
from mixjax.engine.equations import Equations, by_factor
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts


def conditional_modes(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Conditional modes of the effects of Z's basis, per term ``(q, m)``, at the profiled fixed effects.

    Args:
        lambdas: per term ``(q, q)``, any factor of its relative covariance, in the bases of the products.
        stats: cross-products.
    """

    def rss(Zy: list[Array]) -> Array:
        factors = tuple(f._replace(Zy=new) for f, new in zip(stats.factors, Zy, strict=True))
        reduced = eliminate(lambdas, arrange(replace(stats, factors=factors)))
        if not reduced.Xy.shape[0]:
            return reduced.yy
        return reduced.yy - linalg.quadratic_form(reduced.XX, reduced.Xy[:, None])[0, 0]

    gradients = jax.grad(rss)([jnp.asarray(f.Zy) for f in stats.factors])
    return [-0.5 * gradients[place.factor][place.start : place.start + place.q] for place in stats.layout.terms]


def conditional_covariances(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Conditional covariance of every level's effects given y, relative to sigma^2, per grouping factor ``(q, q, m)``.

    theta and beta are taken as known, as in lme4's ``condVar``.

    Args:
        lambdas: per term ``(q, q)``, of the effects of Z's own columns, as the result is.
    """
    lambdas = in_bases(lambdas, stats)
    if namespace(*lambdas, *jax.tree.leaves(stats)) is np:
        blocks = [np.moveaxis(own, 0, -1) for own in Equations(stats, by_factor(lambdas, stats.layout)).covariances()]
    else:
        blocks = _by_differentiation(lambdas, stats)
    covariances = []
    for f, block in enumerate(blocks):
        bases = [
            basis.R_inv for place, basis in zip(stats.layout.terms, stats.Z_bases, strict=True) if place.factor == f
        ]
        if not bases:  # the empty factor
            covariances.append(block)
            continue
        if isinstance(block, np.ndarray):
            T: Any = scipy.linalg.block_diag(*bases)
            covariances.append(np.moveaxis(T @ np.moveaxis(block, -1, 0) @ T.T, 0, -1))
        else:
            T = jax.scipy.linalg.block_diag(*bases)
            covariances.append(jnp.einsum("ia,abm,jb->ijm", T, block, T))
    return covariances


def _by_differentiation(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Per grouping factor ``(q, q, m)``, in the bases of the products."""

    def logdet(ZZ: list[Array]) -> Array:
        factors = tuple(f._replace(ZZ=new) for f, new in zip(stats.factors, ZZ, strict=True))
        return eliminate(lambdas, arrange(replace(stats, factors=factors))).logdet

    gradients = jax.grad(logdet)([jnp.asarray(f.ZZ) for f in stats.factors])
    return [0.5 * (gradient + linalg.transpose(gradient)) for gradient in gradients]
