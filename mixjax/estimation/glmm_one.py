"""One generalised linear mixed model fitted: who fits it, and the public way."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mixjax.checks import check_start
from mixjax.design import AnyArray
from mixjax.estimation.glmm import GLMMEstimates, check_curvature, fit_rows
from mixjax.estimation.glmm_joint import fit_rows_jointly
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature
from mixjax.estimation.glmm_traced import estimate_traced
from mixjax.forks import refuse_forked
from mixjax.machine import is_concrete
from mixjax.products.family_rows import FamilyRows


def fit_one(
    rows: FamilyRows, start: np.ndarray | None = None, curvature: str = "observed", nagq: int = 1, reml: bool = False
) -> GLMMEstimates:
    """Estimates by NumPy, by the likelihood that the options name.

    Args:
        rows: of one response. start: ``(k,)`` theta, or None.
        curvature, nagq, reml: as of :func:`mixjax.glmm`.

    Raises:
        ValueError: options that are none, or do not go together.
    """
    check_likelihood(curvature, nagq, reml)
    if reml or nagq == 0:
        return fit_rows_jointly(rows, bool(reml), start, curvature)
    if nagq == 1 and not isinstance(nagq, bool):
        return fit_rows(rows, start, curvature)
    return fit_rows_by_quadrature(rows, nagq, start)


def check_likelihood(curvature: Any, nagq: Any, reml: Any) -> None:
    """Raise ValueError for options that are none or do not go together, whatever the model."""
    check_curvature(curvature)
    if not isinstance(reml, bool | np.bool_):
        raise ValueError(f"reml must be True or False, got {reml!r}")
    if isinstance(nagq, bool | np.bool_) or not isinstance(nagq, int | np.integer) or nagq < 0:
        raise ValueError(
            "nagq must be a whole number from 1 (Laplace), or 0 (fixed effects found with the random ones); got "
            f"{nagq!r}"
        )
    if reml and nagq != 1:
        raise ValueError(
            "the restricted likelihood is Laplace's approximation of an integral over fixed and random effects: "
            f"reml=True goes with nagq=1, got nagq={nagq}"
        )
    if reml and curvature != "observed":
        raise ValueError(
            "the restricted likelihood has the observed curvature: reml=True goes with curvature='observed'"
        )
    if nagq > 1 and curvature != "observed":
        raise ValueError(
            "quadrature has its nodes by the observed curvature: curvature='expected' goes with nagq=1 or nagq=0"
        )


def glmm_estimate(
    data: FamilyRows,
    start: AnyArray | None = None,
    curvature: str = "observed",
    nagq: int = 1,
    reml: bool = False,
) -> GLMMEstimates:
    """Estimates of a generalised linear mixed model, in float64, without names.

    Fixed effects, parameters of the family and covariances are searched together, with exact second derivatives (of
    quadrature nearly); nothing is compiled.

    Args:
        data: of :func:`mixjax.rows`. Its ``y`` is one response ``(n,)``.
        start: ``(k,)`` theta to start from, or None.
        curvature: of the rows in the approximation's determinant: ``"observed"``, as the approximation is defined, or
            ``"expected"``, which lme4 takes; they differ where the link is not canonical.
        nagq: 1 for Laplace's approximation; more are nodes of adaptive Gauss-Hermite quadrature for each effect of a
            level, of one grouping factor; 0 finds the fixed effects with the random ones. See :func:`mixjax.glmm`.
        reml: by the restricted likelihood, with ``nagq=1``.

    Returns:
        :class:`GLMMEstimates`, arrays of NumPy; ``result`` says how the search ended.

    Raises:
        ValueError: many responses, a start of another length or that is not finite, no such curvature, options that do
            not go together, traced arrays while 64 bits are off, or with another likelihood than Laplace's.

    Inside ``jit``, ``vmap``, ``grad`` and ``jvp``, where arrays of ``data`` are traced, the program calls NumPy for the
    optimum, lane by lane, and needs ``jax.enable_x64``; results are JAX's arrays, of ``nagq=1`` without ``reml`` only.
    Derivatives of any order with respect to y (taken as real numbers), X, Z, weights and offset, in forward and reverse
    mode, follow from the implicit function theorem (:mod:`mixjax.estimation.implicit`); those of ``vcov`` are third
    derivatives of the likelihood, which inside ``jit`` are compiled only where they are asked for. At a singular fit
    the entries of theta that are zero have derivative zero and everything else moves. Where ``result`` is not
    ``CONVERGED`` there are no derivatives: on the very edge of singularity (``NONDIFFERENTIABLE``), of separated data,
    of a search that failed; they are NaN.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> est = mj.glmm_estimate(mj.rows(design, mj.families.poisson()))
        >>> print(bool(est.converged), est.beta.round(3), est.theta.round(3))
        True [1.48] [0.734]
        >>> print(mj.glmm_estimate(mj.rows(design, mj.families.poisson()), reml=True).theta.round(3))
        [0.902]
    """
    refuse_forked()
    check_likelihood(curvature, nagq, reml)
    if np.ndim(data.y) != 1:
        raise ValueError(
            f"y has shape {np.shape(data.y)}: glmm_estimate fits one response (n,); many of one design are for "
            "glmm_estimate_many"
        )
    x0 = check_start(start)
    if all(map(is_concrete, jax.tree.leaves(data))):
        return fit_one(jax.tree.map(_numbers, data), x0, curvature, nagq, reml)
    if reml or nagq != 1:
        raise ValueError(
            "of traced arrays (inside jit, vmap or grad) glmm_estimate is by Laplace's approximation only: leave out "
            "nagq= and reml=, or call it outside"
        )
    return GLMMEstimates(**estimate_traced(data, lambda rows: fit_rows(rows, x0, curvature), curvature))


def _numbers(values: Any) -> np.ndarray:
    """As NumPy's array, floating numbers as float64."""
    array = np.asarray(values)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array
