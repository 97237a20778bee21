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
from mixjax.design import AnyArray, Design
from mixjax.engine.elimination import arrange, eliminate
from mixjax.engine.equations import Equations, by_factor
from mixjax.forks import refuse_forked
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts


def conditional_modes(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Conditional modes of the effects of Z's basis, per term ``(q, m)``, at the profiled fixed effects.

    Args:
        lambdas: per term ``(q, q)``, any factor of its relative covariance, in the bases of the products.
        stats: cross-products.
    """

    def rss(Zy):
        factors = tuple(f._replace(Zy=new) for f, new in zip(stats.factors, Zy, strict=True))
        reduced = eliminate(lambdas, arrange(replace(stats, factors=factors)))
        if not reduced.Xy.shape[0]:
            return reduced.yy
        return reduced.yy - linalg.quadratic_form(reduced.XX, reduced.Xy[:, None])[0, 0]

    gradients = jax.grad(rss)([jnp.asarray(f.Zy) for f in stats.factors])
    return [-0.5 * gradients[place.factor][place.start : place.start + place.q] for place in stats.layout.terms]


def conditional_covariances(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Conditional covariance of every level's effects given y, relative to sigma^2, per grouping factor ``(q, q, m)``.

    theta and beta are taken as known, as in lme4's ``condVar``. Of the effects of Z's own columns. Args as in
    :func:`conditional_modes`.
    """
    if namespace(*lambdas, *jax.tree.leaves(stats)) is np:
        blocks = [np.moveaxis(own, 0, -1) for own in Equations(stats, by_factor(lambdas, stats.layout)).covariances()]
    else:
        blocks = _by_differentiation(lambdas, stats)
    covariances = []
    for f, block in enumerate(blocks):
        bases = [
            basis.R_inv for place, basis in zip(stats.layout.terms, stats.Z_bases, strict=True) if place.factor == f
        ]
        if isinstance(block, np.ndarray):
            T: Any = scipy.linalg.block_diag(*bases)
            covariances.append(np.moveaxis(T @ np.moveaxis(block, -1, 0) @ T.T, 0, -1))
        else:
            T = jax.scipy.linalg.block_diag(*bases)
            covariances.append(jnp.einsum("ia,abm,jb->ijm", T, block, T))
    return covariances


def _by_differentiation(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Per grouping factor ``(q, q, m)``, in the bases of the products."""

    def logdet(ZZ):
        factors = tuple(f._replace(ZZ=new) for f, new in zip(stats.factors, ZZ, strict=True))
        return eliminate(lambdas, arrange(replace(stats, factors=factors))).logdet

    gradients = jax.grad(logdet)([jnp.asarray(f.ZZ) for f in stats.factors])
    return [0.5 * (gradient + linalg.transpose(gradient)) for gradient in gradients]


def predict(est: Any, design: Design) -> AnyArray:
    """Conditional means ``offset + X beta + sum_t Z_t b_t`` of the rows of a design.

    A pure function: ``jit``, ``grad`` and ``vmap`` work. numpy arrays give numpy, in their own precision; anything else
    is JAX's, float64 inside ``with jax.enable_x64():``.

    Args:
        est: :class:`~mixjax.Estimates`, of which ``beta (p,)`` and ``b`` (per term ``(n_groups, q)``) are read. Many
            fits: ``jax.vmap(mj.predict, in_axes=(0, None))``.
        design: rows in the columns and levels of the fit; its y and weights are not looked at.

    Returns:
        ``(n,)`` means.

    Raises:
        ValueError: columns, levels or effects of the design are not those of the estimates.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> from mixjax.estimation.blup import predict
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> predict(fit.estimates, fit.design)[:3].round(2)
        array([253.66, 273.33, 293.  ])
    """
    if np.shape(design.X)[1:] != np.shape(est.beta) or len(est.b) != len(design.terms):
        raise ValueError(
            f"estimates of {np.shape(est.beta)[0]} fixed effects and {len(est.b)} random terms do not fit a design "
            f"with {np.shape(design.X)[1]} columns of X and {len(design.terms)} terms"
        )
    for t, (term, b) in enumerate(zip(design.terms, est.b, strict=True)):
        if np.shape(b) != (term.n_groups, np.shape(term.Z)[1]):
            raise ValueError(
                f"est.b[{t}] has shape {np.shape(b)}, but terms[{t}] has {term.n_groups} levels of "
                f"{np.shape(term.Z)[1]} effects"
            )
    read = (design.X, design.offset, est.beta, est.b, design.terms)
    xp = np if all(isinstance(a, np.ndarray | np.generic) for a in jax.tree.leaves(read)) else jnp
    if xp is jnp:
        refuse_forked()
    mean = xp.asarray(design.X) @ xp.asarray(est.beta)
    if design.offset is not None:
        mean = mean + xp.asarray(design.offset)
    for term, b in zip(design.terms, est.b, strict=True):
        mean = mean + (xp.asarray(term.Z) * xp.asarray(b)[xp.asarray(term.group)]).sum(axis=-1)
    return mean
