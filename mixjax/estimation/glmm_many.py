"""Many fits of one generalised linear mixed model: responses of one design."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.laplace_model import Model, columns_of
from mixjax.engine.level_effects import filled
from mixjax.estimation import search
from mixjax.estimation.choice import EngineName, check_engine
from mixjax.estimation.glmm import ENDLESS, GLMMEstimates, fit_rows, in_order, is_flat, model_of, modes_by_term
from mixjax.estimation.glmm_lanes import Direct, Ends, directly, probe, search_lanes, solve_free
from mixjax.estimation.search import own_factors, result_code
from mixjax.machine import LANES, Array, float64, is_concrete, jit, lanes_of, n_cores, silently
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows, cells
from mixjax.waiting import Waiting

KEEP = ("theta", "beta", "psi", "criterion", "converged", "singular", "iterations", "grad_norm", "result")
# Of these the Hessian at the minimum itself is needed.
FROM_HESSIAN = ("vcov", "vcov_all")
# Numbers of a row function of a tile of lanes, in programs and for NumPy, and lanes at most.
TILE_NUMBERS, TILE_NUMBERS_AT_ONCE, MOST_LANES = 2**15, 2**16, 512
LEAST_LANES = 16
# Lanes of the full search, and of one call of a program in it.
SEARCHED, PROBED = 256, 64
# Seconds for which NumPy may work before a program, which takes 10 to 40 to compile, is worth it.
COMPILING = 2.0


def glmm_estimate_many(
    data: FamilyRows,
    curvature: str = "observed",
    keep: Sequence[str] = KEEP,
    engine: EngineName = "auto",
    fits: int | None = None,
) -> GLMMEstimates:
    """Fit many responses of one design by Laplace's approximation.

    The same optima as :func:`mixjax.glmm_estimate` finds, to rounding. Models with one grouping factor are fitted side
    by side; others one after the other.

    Args:
        data: ``mj.rows(design, family, Y)`` with ``Y (B, n)``. curvature: as in :func:`mixjax.glmm_estimate`.
        keep: names of the fields of :class:`~mixjax.GLMMEstimates` to return; the others are None.
        engine: ``"numpy"`` compiles nothing; ``"jax"`` compiles programs for the structure, which then are several
            times as fast, and uses all cores. ``"auto"`` compiles where the fits would take longer than compiling does,
            by the sizes of the model and of the batch alone.
        fits: number of fits that ``"auto"`` goes by, where a batch comes in parts; None for those of this one.

    Returns:
        :class:`~mixjax.GLMMEstimates` of numpy arrays with a leading axis B. A fit that fails carries its code in
        ``result`` (:class:`mixjax.Result`; ``SEPARATED``, ``UNBOUNDED`` among them) and touches no other.

    Raises:
        ValueError: the rows are of one response; a name in ``keep`` or the engine is unknown.

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
            found = _one_by_one(data, Y, curvature, keep)
        else:
            compiled_ = engine == "jax" or (engine == "auto" and pays_to_compile(fits or len(Y), model))
            found = _Lanes(one, model, Y, keep, compiled_).fits()
    if data is not whole and together is not None and found.criterion is not None:
        found = found._replace(criterion=found.criterion + 2.0 * together.constant)
    return found


def pays_to_compile(fits: int, model: Model) -> bool:
    """Whether so many fits take NumPy longer than :data:`COMPILING`.

    Microseconds of a fit, measured on one core: ``500 + 3 n T`` for n rows and T directions, within a factor of three.
    """
    if model.family.n_psi:  # their functions are slower compiled than by SciPy: 236 and 70 ms for 4 000 rows of nbinom
        return False
    n = int(np.prod(model.data.X.shape[1:])) if model.p else int(np.prod(np.shape(model.data.y)))
    T = model.n_fixed + model.layout.k
    return fits * (500.0 + 3.0 * n * T) > 1e6 * COMPILING


def _one_by_one(data: FamilyRows, Y: np.ndarray, curvature: str, keep: Sequence[str]) -> GLMMEstimates:
    found = [fit_rows(replace(data, y=y), curvature=curvature) for y in Y]

    def together(name: str) -> Any:
        return jax.tree.map(lambda *a: np.stack(a), *(getattr(one, name) for one in found)) if name in keep else None

    return GLMMEstimates._make(map(together, GLMMEstimates._fields))


class _Lanes:
    """The fits of one call, filled part by part."""

    def __init__(self, rows: FamilyRows, model: Model, Y: np.ndarray, keep: Sequence[str], compiled_: bool):
        self.rows, self.model, self.Y, self.keep, self.compiled = rows, model, Y, keep, compiled_
        self.B, self.exact = len(Y), any(name in keep for name in FROM_HESSIAN)
        self.arrays: dict[str, Any] = {}
        self.index = filled(np.asarray(model.effects.index))  # type: ignore[attr-defined]
        numbers = TILE_NUMBERS if compiled_ else TILE_NUMBERS_AT_ONCE
        lanes = int(max(LEAST_LANES, min(MOST_LANES, numbers // self.index.size)))
        self.lanes = 1 << (lanes.bit_length() - 1)

    def of(self, at: np.ndarray) -> Model:
        """The model of replicates ``at``, in lanes."""
        y = np.moveaxis(self.Y[at][:, self.index], 0, -1)
        return replace(self.model, data=self.model.data._replace(y=np.ascontiguousarray(y)))

    def fits(self) -> GLMMEstimates:
        left: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

        def work(first: int) -> None:
            at = np.arange(first, min(first + self.lanes, self.B))
            padded = np.concatenate([at, np.full(self.lanes - len(at), at[-1])]) if self.compiled else at
            state: Direct = jax.tree.map(np.asarray, self._run(directly, self.of(padded), len(padded), self.exact))
            state = lanes_of(state, np.arange(len(at)))
            done = np.flatnonzero(state.converged)
            if len(done):
                self._put_direct(at[done], lanes_of(state, done))
            rest = np.flatnonzero(~state.converged)
            left.append((at[rest], state.x[:, rest], state.fixed[:, rest], state.iterations[rest]))

        self._over(work, range(0, self.B, self.lanes))
        queue = [np.concatenate(parts, axis=-1) for parts in zip(*left, strict=True)]

        def look(first: int) -> None:
            self._search(*(part[..., first : first + SEARCHED] for part in queue))

        self._over(look, range(0, len(queue[0]), SEARCHED))
        return GLMMEstimates._make(self.arrays.get(name) for name in GLMMEstimates._fields)

    def _run(self, fun: Callable[..., Any], *args: Any) -> Any:
        if self.compiled:
            with float64():
                return _program(fun)(*args)
        with silently():
            return fun(*args)

    def _over(self, work: Callable[[int], None], firsts: range) -> None:
        """The first one alone: it compiles."""
        if not self.compiled:
            for first in firsts:
                work(first)
            return
        for first in firsts[:1]:
            work(first)
        with ThreadPoolExecutor(n_cores()) as pool:
            list(pool.map(work, firsts[1:]))

    # --- the full search

    def _search(self, at: np.ndarray, x: np.ndarray, fixed: np.ndarray, before: np.ndarray) -> None:
        def prober(x: Array, fixed: Array, v: Array, longest: Array, lanes: np.ndarray) -> Any:
            if not self.compiled:
                return probe(self.of(at[lanes]), x, fixed, v, longest)
            parts = []
            for first in range(0, len(lanes), PROBED):
                part = np.minimum(np.arange(first, first + PROBED), len(lanes) - 1)
                mine = (a[..., part] for a in (x, fixed, v, longest))
                own = self._run(probe, self.of(at[lanes[part]]), *mine)
                parts.append(jax.tree.map(np.asarray, own))
            found = jax.tree.map(lambda *a: np.concatenate(a, -1), *parts)
            return lanes_of(found, np.arange(len(lanes)))

        with silently():
            fixed = np.where(np.isfinite(fixed).all(0), fixed, 0.0)
            # A search that begins at zero finds a stationary point there.
            x = np.where(np.isfinite(x), np.where(np.abs(x) < search.NEAR_ZERO, search.NEAR_ZERO, x), 0.5)
            ends = search_lanes(self.model, x, fixed, before, prober)
            fine = np.flatnonzero(~ends.lost)
            if len(fine):
                self._put_searched(at[fine], lanes_of(ends, fine))
        for i in at[ends.lost]:
            self._put_single(int(i))

    # --- what is kept

    def _put_direct(self, at: np.ndarray, state: Direct) -> None:
        code = np.full(len(at), int(Result.CONVERGED))
        code = self._endless(state.step, state.x, np.ones(state.x.shape, bool), code, state.Hessian)
        modes = None
        if "b" in self.keep or "eta" in self.keep:
            lambdas = cov.factors_of(state.x, self.model.layout.structures)
            modes = self.model.effects.times_D(lambdas, state.v)
        self._put(at, state.x, state.fixed, state.value, state.iterations, state.distance, code, state.Hessian,
                  np.ones(state.x.shape, bool), modes)  # fmt: skip

    def _put_searched(self, at: np.ndarray, ends: Ends) -> None:
        solution = ends.solution
        own = own_factors(solution.x, _wide(self.rows.Z_bases), self.rows.layout)
        code = self._endless(ends.step, solution.x, solution.free, np.asarray(result_code(solution, own)), ends.Hessian)
        b = self.model.effects.times_D(cov.factors_of(solution.x, self.model.layout.structures), ends.v)
        self._put(at, solution.x, ends.fixed, ends.value, solution.iterations, solution.scaled_gradient, code,
                  ends.Hessian, solution.free, b)  # fmt: skip

    def _put_single(self, i: int) -> None:
        """A replicate that lanes do not serve, by the search of a single fit."""
        one = fit_rows(replace(self.rows, y=self.Y[i]))
        self._store(np.array([i]), {name: jax.tree.map(lambda a: np.asarray(a)[..., None], getattr(one, name))
                                    for name in self.keep})  # fmt: skip

    def _endless(
        self, step: np.ndarray, x: np.ndarray, free: np.ndarray, code: np.ndarray, H: np.ndarray
    ) -> np.ndarray:
        """See :func:`mixjax.estimation.glmm._endless`."""
        n, p = self.model.n_fixed, self.model.p
        eta = np.abs(self.rows.Q @ step[:p]).max(0, initial=0.0)
        psi = np.abs(step[p:n]).max(0, initial=0.0)
        far = ((np.abs(step[n:]) > ENDLESS * np.maximum(1.0, np.abs(x))) & free).any(0)
        solved = np.isin(code, [int(one) for one in Result if one.is_solution])
        code = np.where(solved & ((psi > ENDLESS) | far), int(Result.UNBOUNDED), code)
        inverse = solve_free(H, np.broadcast_to(np.eye(len(H))[..., None], H.shape), free, n)
        return np.where(
            solved & ((eta > ENDLESS * self.model.unit) | is_flat(self.model, inverse)), int(Result.SEPARATED), code
        )

    def _put(
        self, at: np.ndarray, x: np.ndarray, fixed: np.ndarray, value: np.ndarray, iterations: np.ndarray,
        distance: np.ndarray, code: np.ndarray, H: np.ndarray, free: np.ndarray, b: np.ndarray | None,
    ) -> None:  # fmt: skip
        rows, n, p = self.rows, self.model.n_fixed, self.model.p
        own = own_factors(x, _wide(rows.Z_bases), rows.layout)
        values: dict[str, Any] = {
            "theta": cov.theta_of_lambdas(own.lambdas),
            "beta": rows.X_basis.R_inv @ fixed[:p],
            "psi": fixed[p:],
            "criterion": value,
            "converged": np.isin(code, [int(one) for one in Result if one.is_solution]),
            "singular": own.deficient,
            "iterations": iterations,
            "grad_norm": distance,
            "mode_error": np.zeros(len(at)),
            "result": code,
        }
        if "Sigma" in self.keep:
            values["Sigma"] = tuple(linalg.matmul(L, linalg.transpose(L)) for L in own.lambdas)
        if self.exact:
            to_user = np.eye(len(H))
            to_user[:p, :p] = rows.X_basis.R_inv
            # Signs of the search's coordinates are free, so the covariance is that of those which theta has.
            own_x, _ = coordinates_in(values["theta"], rows.layout, [np.asarray(Z.R)[..., None] for Z in rows.Z_bases])
            sign = np.concatenate([np.ones((n, len(at))), np.where(own_x * x < 0, -1.0, 1.0)])
            H = H * sign[:, None] * sign[None]
            inverse = solve_free(H, np.broadcast_to(np.eye(len(H))[..., None], H.shape), free, n)
            covariance = 2.0 * np.einsum("ij,jkl,mk->iml", to_user, inverse, to_user)
            values |= {"vcov": covariance[:p, :p], "vcov_all": covariance}
        if b is not None:
            lanes = range(len(at))
            terms = [modes_by_term(rows, self.model, b[..., i : i + 1]) for i in lanes]
            values["b"] = tuple(np.stack(part, -1) for part in zip(*terms, strict=True))
            eta = self.model.predictor(fixed, b)
            values["eta"] = np.stack([in_order(self.model, eta[..., i : i + 1], rows.n) for i in lanes], -1)
        self._store(at, values)

    def _store(self, at: np.ndarray, values: dict[str, Any]) -> None:
        """Values of replicates ``at``, lanes last."""
        for name in self.keep:
            value_ = jax.tree.map(lambda a: np.moveaxis(np.asarray(a), -1, 0), values[name])
            if name not in self.arrays:
                self.arrays[name] = jax.tree.map(lambda a: np.empty((self.B, *a.shape[1:]), a.dtype), value_)
            for whole, part in zip(jax.tree.leaves(self.arrays[name]), jax.tree.leaves(value_), strict=True):
                whole[at] = part


def _program(fun: Callable[..., Any]) -> Callable[..., Any]:
    return _directly if fun is directly else _probe


_directly = partial(jit, compiler_options=LANES, static_argnums=(1, 2))(directly)
_probe = partial(jit, compiler_options=LANES)(probe)


def _wide(bases: tuple[Any, ...]) -> tuple[Any, ...]:
    """With an axis for lanes that share them."""
    return tuple(type(basis)(*(np.asarray(part)[..., None] for part in basis)) for basis in bases)
