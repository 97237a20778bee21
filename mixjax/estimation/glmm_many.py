"""Many fits of one generalised linear mixed model: responses of one design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mixjax.engine.laplace_model import Model, columns_of
from mixjax.engine.quadrature import check_nodes
from mixjax.estimation.choice import EngineName, check_engine
from mixjax.estimation.glmm import (
    GLMMEstimates,
    check_curvature,
    fit_rows,
    model_of,
)
from mixjax.estimation.glmm_chords import fit_by_chords, reference_of
from mixjax.estimation.glmm_tiles import Tiles
from mixjax.machine import is_concrete, silently
from mixjax.products.family_rows import FamilyRows, cells
from mixjax.waiting import Waiting

KEEP = ("theta", "beta", "psi", "criterion", "converged", "singular", "iterations", "grad_norm", "result")
# Seconds for which NumPy may work before a program, which takes 1.5 to 5 to compile, is worth it.
COMPILING = 2.0


def glmm_estimate_many(
    data: FamilyRows,
    curvature: str = "observed",
    keep: Sequence[str] = KEEP,
    engine: EngineName = "auto",
    fits: int | None = None,
    nagq: int = 1,
) -> GLMMEstimates:
    """Fit many responses of one design by Laplace's approximation, or by adaptive Gauss-Hermite quadrature.

    The same optima as :func:`mixjax.glmm_estimate` finds, to 1e-6 standard errors, but where one of both ends in a
    minimum that is not the least: here some of those are noticed that lie beside a singular one. Models with one
    grouping factor are fitted side by side; others one after the other, from the first one's covariances and Hessian:
    which response comes first moves their estimates within that.

    Args:
        data: ``mj.rows(design, family, Y)`` with ``Y (B, n)``. curvature: as in :func:`mixjax.glmm_estimate`.
        keep: names of the fields of :class:`~mixjax.GLMMEstimates` to return; the others are None.
        engine: ``"numpy"`` compiles nothing; ``"jax"`` compiles programs for the structure, which then are several
            times as fast, and uses all cores. ``"auto"`` compiles where the fits would take longer than compiling does,
            by the sizes of the model and of the batch alone.
        fits: number of fits that ``"auto"`` goes by, where a batch comes in parts; None for those of this one.
        nagq: nodes of quadrature an effect, of models with one grouping factor and up to three effects a level; 1 is
            Laplace's approximation.

    Returns:
        :class:`~mixjax.GLMMEstimates` of numpy arrays with a leading axis B. A fit that fails carries its code in
        ``result`` (:class:`mixjax.Result`; ``SEPARATED``, ``UNBOUNDED`` among them) and touches no other.

    Raises:
        ValueError: the rows are of one response; a name in ``keep`` or the engine is unknown; there is no quadrature of
            so many nodes for the model, or none with that curvature.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((40, 1)), group=np.repeat(np.arange(8), 5), n_groups=8)
        >>> design = mj.Design(y=np.zeros(40), X=np.ones((40, 1)), terms=(term,))
        >>> Y = np.random.default_rng(0).poisson(3.0, size=(20, 40))
        >>> found = mj.glmm_estimate_many(mj.rows(design, "poisson", Y))
        >>> found.beta.shape, bool(found.converged.all())
        ((20, 1), True)
    """
    unknown = set(keep) - set(GLMMEstimates._fields)
    if unknown:
        raise ValueError(f"keep names {sorted(unknown)}; there are {list(GLMMEstimates._fields)}")
    check_engine(engine)
    check_curvature(curvature)
    _check_nagq(nagq, curvature, data)
    if not all(map(is_concrete, jax.tree.leaves(data))):
        raise TypeError("glmm_estimate_many runs outside jit, on arrays of numbers")
    Y = np.asarray(data.y, np.float64)
    if Y.ndim != 2:
        raise ValueError(
            "these are the rows of one response: use mixjax.glmm_estimate, or mixjax.rows(design, family, Y)"
        )
    if len(Y) == 0:
        raise ValueError("there are no responses to fit")
    whole, together = data, cells(replace(data, y=Y))
    if together is not None and not {"b", "eta"} & set(keep):
        data, Y = together.rows, together.rows.y
    one = replace(data, y=Y[0])
    model = model_of(one, curvature)
    model = replace(model, columns=columns_of(model.effects, model.data))
    with Waiting(f"fitting {len(Y)} data sets"):
        if len(data.levels) > 1:
            found = _one_by_one(data, model, Y, curvature, keep)
        else:
            compiled_ = engine == "jax" or (engine == "auto" and pays_to_compile(fits or len(Y), model, nagq))
            found = Tiles(one, model, Y, keep, compiled_, int(nagq)).fits()
    if data is not whole and together is not None and found.criterion is not None:
        found = found._replace(criterion=found.criterion + 2.0 * together.constant)
    return found


def _check_nagq(nagq: Any, curvature: str, data: FamilyRows) -> None:
    """Raise ValueError where many fits have no such quadrature."""
    if isinstance(nagq, int | np.integer) and not isinstance(nagq, bool) and nagq == 0:
        raise ValueError(
            "many responses are fitted with nagq = 1, Laplace's approximation, or more nodes, not with nagq = 0: "
            "mixjax.glmm_estimate fits each"
        )
    check_nodes(nagq, data)
    if nagq > 1 and curvature != "observed":
        raise ValueError("quadrature has its nodes by the observed curvature: curvature='expected' goes with nagq=1")


def pays_to_compile(fits: int, model: Model, nagq: int = 1) -> bool:
    """Whether so many fits take NumPy longer than :data:`COMPILING`.

    Microseconds of a fit, measured on one core: ``100 + 0.1 n T`` for n rows and T directions, with several effects a
    level ``300 + 0.25 n T``, within a factor of two; of quadrature 0.15 for every row and node.
    """
    if model.family.n_psi:  # their functions are slower compiled than by SciPy: 236 and 70 ms for 4 000 rows of nbinom
        return False
    n = int(np.prod(model.data.X.shape[1:])) if model.p else int(np.prod(np.shape(model.data.y)))
    T = model.n_fixed + model.layout.k
    nodes = nagq ** len(model.effects.Z) if nagq > 1 else 0  # type: ignore[attr-defined]
    own = 100.0 + 0.1 * n * T if len(model.effects.Z) == 1 else 300.0 + 0.25 * n * T  # type: ignore[attr-defined]
    return fits * (own + 0.15 * n * nodes) > 1e6 * COMPILING


def _one_by_one(data: FamilyRows, model: Model, Y: np.ndarray, curvature: str, keep: Sequence[str]) -> GLMMEstimates:
    """The first by itself; the others begin at its covariances and its Hessian, and share what the design alone tells:
    who meets whom, bases, where sums go. None depends on which others there are, but for the first."""
    found = [fit_rows(replace(data, y=Y[0]), curvature=curvature)]
    with silently():
        reference = reference_of(data, replace(model, data=model.data._replace(y=Y[0][:, None])), found[0])
        for y in Y[1:]:
            rows, one = replace(data, y=y), replace(model, data=model.data._replace(y=y[:, None]))
            fit = fit_by_chords(rows, one, reference) if reference is not None else None
            found.append(fit_rows(rows, curvature=curvature) if fit is None else fit)

    def together(name: str) -> Any:
        return jax.tree.map(lambda *a: np.stack(a), *(getattr(one, name) for one in found)) if name in keep else None

    return GLMMEstimates._make(map(together, GLMMEstimates._fields))
