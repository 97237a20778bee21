"""Lanes of many generalised fits of one design, tile by tile: direct steps, what is singular, what is left, and what is
kept of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_effects import filled
from mixjax.estimation import glmm_edges as edges
from mixjax.estimation import search
from mixjax.estimation.glmm import (
    GLMMEstimates,
    fit_rows,
    in_order,
    modes_by_term,
)
from mixjax.estimation.glmm_lanes import INSIDE, ROUNDS, Direct, begin_directly, go_on, probe, probe_by_quadrature
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature, zero_roots
from mixjax.estimation.glmm_quadrature_lanes import falls_to_zero, joint_of
from mixjax.estimation.glmm_search import SOLUTIONS, Ends, endless, search_lanes, solve_free
from mixjax.estimation.search import own_factors, result_code
from mixjax.machine import LANES_OF_ROWS, Array, float64, jit, lanes_of, n_workers, on_device, silently
from mixjax.optimise.newton import gradient_tolerance, is_semidefinite
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows, constant_of

# Of these the Hessian at the minimum itself is needed.
FROM_HESSIAN = ("vcov", "vcov_all")
# Numbers of a row function of a tile of lanes, in programs and for NumPy, and lanes at most; twice as many where there
# are few parameters, and with them few such functions that should stay in the cache; half as many by quadrature.
TILE_NUMBERS, TILE_NUMBERS_AT_ONCE, MOST_LANES, FEW = 2**16, 2**17, 512, 4
# A device has no cache to stay in, and takes long vectors: 128 MB for each row function.
TILE_NUMBERS_ON_DEVICE, MOST_LANES_ON_DEVICE = 2**24, 2**15
LEAST_LANES = 16
# Distance from the minimum, in standard errors, from which one exact Newton step is enough.
NEAR = 1e-4
# Lanes of the full search, whose own work by NumPy costs the same for few, and of one call of a program in it; on a
# device as many as a tile has.
SEARCHED, PROBED = 1024, 64


class Tiles:
    """The fits of one call, filled part by part."""

    def __init__(self, rows: FamilyRows, model: Model, Y: np.ndarray, keep: Sequence[str], compiled_: bool,
                 nagq: int):  # fmt: skip
        # Terms of the responses alone come to the values last.
        model = replace(model, family=replace(model.family, normalised=False))
        self.rows, self.model, self.Y, self.keep, self.compiled, self.nagq = rows, model, Y, keep, compiled_, nagq
        self.size = None if rows.size is None else np.asarray(rows.size)
        self.B, self.exact = len(Y), any(name in keep for name in FROM_HESSIAN)
        self.arrays: dict[str, Any] = {}
        self.index = filled(np.asarray(model.effects.index))  # type: ignore[attr-defined]
        device = compiled_ and on_device()
        in_programs = TILE_NUMBERS * (2 if model.n_fixed + model.layout.k <= FEW else 1) // (2 if nagq > 1 else 1)
        numbers = TILE_NUMBERS_ON_DEVICE if device else in_programs if compiled_ else TILE_NUMBERS_AT_ONCE
        most = MOST_LANES_ON_DEVICE if device else MOST_LANES
        lanes = int(max(LEAST_LANES, min(most, numbers // self.index.size)))
        self.lanes = 1 << (lanes.bit_length() - 1)
        self.searched, self.probed = (self.lanes, self.lanes) if device else (SEARCHED, PROBED)
        self.lock = Lock()
        self.compiled_once: set[Callable[..., Any]] = set()

    def of(self, at: np.ndarray) -> Model:
        """The model of replicates ``at``, in lanes."""
        y = np.moveaxis(self.Y[at][:, self.index], 0, -1)
        return replace(self.model, data=self.model.data._replace(y=np.ascontiguousarray(y)))

    def fits(self) -> GLMMEstimates:
        reducible = self.nagq == 1 and any(s.n_reductions > 0 for s in self.model.layout.structures)
        doubtful: list[tuple[np.ndarray, Direct]] = []

        def put(at: np.ndarray, state: Direct) -> None:
            with silently():
                doubt = edges.is_doubtful(self.model, state) if reducible else np.zeros(len(at), bool)
            for some, do in ((np.flatnonzero(~doubt), self._put_direct), (np.flatnonzero(doubt), later)):
                if len(some):
                    do(at[some], lanes_of(state, some))

        def later(*found: Any) -> None:
            doubtful.append(found)

        left = self._steps(np.arange(self.B), None, put)
        with silently():
            if doubtful:
                self._settle_doubt(*_side_by_side(doubtful))
            if left is not None and reducible:
                left = self._edges(*left)
        if left is not None:
            at, state = left
            queue = list(lanes_of((at, state.x, state.fixed, state.v, state.iterations), np.argsort(at)))
            size = min(self.searched, max(self.probed, -(-len(at) // n_workers())))

            def look(first: int) -> None:
                self._search(*(part[..., first : first + size] for part in queue))

            self._over(look, range(0, len(at), size))
        return GLMMEstimates._make(self.arrays.get(name) for name in GLMMEstimates._fields)

    def _steps(
        self, at: np.ndarray, state: Direct | None, put: Callable[[np.ndarray, Direct], None], least: float = INSIDE
    ) -> tuple[np.ndarray, Direct] | None:
        """Direct steps of replicates ``at``, from their states or from the beginning, tile by tile: what converges is
        put, the others come back."""
        left: list[tuple[np.ndarray, Direct]] = []
        going = np.arange(len(at))
        rest: tuple[np.ndarray, Direct] | None = None

        def work(first: int, steps: int) -> None:
            own = going[first : first + self.lanes]
            found = self._directly(at[own], None if state is None else lanes_of(state, own), None, steps, least)
            done, others = np.flatnonzero(found.converged), np.flatnonzero(~found.converged)
            if len(done):
                put(at[own][done], lanes_of(found, done))
            if len(others):
                left.append((at[own][others], lanes_of(found, others)))

        # NumPy need not wait for the slowest lane of a tile.
        for steps in ROUNDS if self.compiled else (1,) * sum(ROUNDS):
            self._over(partial(work, steps=steps), range(0, len(going), self.lanes))
            if not left:
                return None
            rest = at, state = _side_by_side(left)
            going, stopped = np.flatnonzero(state.going), np.flatnonzero(~state.going)
            left = [(at[stopped], lanes_of(state, stopped))] if len(stopped) else []
            if not len(going):
                break
        return rest

    def _steps_of_all(self, at: np.ndarray, state: Direct, least: float = INSIDE) -> Direct:
        """Every replicate's state after direct steps, in the order of ``at``."""
        if not len(at):
            return state
        found: list[tuple[np.ndarray, Direct]] = []
        rest = self._steps(at, state, lambda *done: found.append(done), least)
        return edges.matched(at, _side_by_side(found if rest is None else [*found, rest]))

    def _ends(self, at: np.ndarray, state: Direct) -> Direct:
        """After as many reductions of rank as it takes; what is then no minimum has an infinite value."""
        model, structures = self.model, self.model.layout.structures
        state = jax.tree.map(np.array, state)
        for i in range(sum(s.n_reductions for s in structures)):
            falls = ~state.converged if i == 0 else state.converged & edges.has_small(model, state)
            some = np.flatnonzero(falls & ~search.is_plain(state.x, structures, least=INSIDE))
            if not len(some):
                break
            own = self._steps_of_all(at[some], edges.of_less_rank(model, lanes_of(state, some)))
            for whole, part in zip(jax.tree.leaves(state), jax.tree.leaves(own), strict=True):
                whole[..., some] = part
        settled = edges.is_settled(model, state)
        return state._replace(value=np.where(settled, state.value, np.inf), converged=settled)

    def _settle_doubt(self, at: np.ndarray, state: Direct) -> None:
        """Regular ends are stored, or the minima beside them of less rank, where these are lower."""
        there = self._steps_of_all(at, edges.of_less_rank(self.model, state))
        settled = edges.is_settled(self.model, there)
        there = there._replace(value=np.where(settled, there.value, np.inf))
        self._put_either(at, edges.better_of(state, there))

    def _put_either(self, at: np.ndarray, state: Direct) -> None:
        for regular, put in ((True, self._put_direct), (False, self._put_edges)):
            some = np.flatnonzero(state.free.all(0) == regular)
            if len(some):
                put(at[some], lanes_of(state, some))

    def _edges(self, at: np.ndarray, state: Direct) -> tuple[np.ndarray, Direct] | None:
        """Singular fits among those left by direct steps are stored, and the others come back: see
        :mod:`mixjax.estimation.glmm_edges`."""
        model, structures = self.model, self.model.layout.structures

        one = self._ends(at, state)
        singular = np.flatnonzero(one.converged)
        if len(singular):
            own = lanes_of(one, singular)
            other = self._ends(at[singular], self._steps_of_all(at[singular], edges.from_far(model, own)))
            own = edges.better_of(own, other)
            done = np.flatnonzero(other.converged)
            self._put_either(at[singular][done], lanes_of(own, done))
            one.converged[singular] = other.converged
        rest = np.flatnonzero(~one.converged)
        # Near an edge, but not on it.
        near = rest[~search.is_plain(state.x[:, rest], structures, least=INSIDE)]
        if len(near):
            own = self._steps_of_all(at[near], edges.resumed(lanes_of(state, near)), search.NEAR_ZERO)
            done = np.flatnonzero(own.converged)
            if len(done):
                self._put_direct(at[near][done], lanes_of(own, done))
                rest = np.setdiff1d(rest, near[done])
        return (at[rest], lanes_of(state, rest)) if len(rest) else None

    def _directly(self, at: np.ndarray, state: Direct | None, start: Any, steps: int, least: float = INSIDE) -> Direct:
        """Direct steps of replicates ``at``, from a state or from the beginning."""
        # A single lane would be summed in another order than several are.
        lanes = self.lanes if self.compiled else max(len(at), 2)
        padded = np.resize(np.arange(len(at)), lanes)
        model = self.of(at[padded])
        if state is None:
            begun = None if start is None else lanes_of(start, padded)
            state = self._run(begin_directly, model, lanes, self.nagq, begun)
        else:
            state = lanes_of(state, padded)
        found = jax.tree.map(np.asarray, self._run(go_on, model, state, steps, self.exact, self.nagq, least))
        return lanes_of(found, np.arange(len(at)))  # type: ignore[no-any-return]

    def _run(self, fun: Callable[..., Any], *args: Any) -> Any:
        if not self.compiled:
            with silently():
                return fun(*args)
        with float64():
            if fun in self.compiled_once:
                return _PROGRAMS[fun](*args)
            with self.lock:  # other threads wait for what the first one compiles
                found = _PROGRAMS[fun](*args)
            self.compiled_once.add(fun)
            return found

    def _over(self, work: Callable[[int], None], firsts: range) -> None:
        workers = min(n_workers(), len(firsts))
        if workers < 2:
            for first in firsts:
                work(first)
            return
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, firsts))

    # --- the full search

    def _search(self, at: np.ndarray, x: np.ndarray, fixed: np.ndarray, v: np.ndarray, before: np.ndarray) -> None:
        several = self.nagq > 1 and len(x) > 1
        fun, more = (probe_by_quadrature, (self.nagq,)) if several else (probe, ())

        def prober(x: Array, fixed: Array, v: Array, longest: Array, lanes: np.ndarray) -> Any:
            if not self.compiled:
                return fun(self.of(at[lanes]), x, fixed, v, longest, *more)
            parts = []
            for first in range(0, len(lanes), self.probed):
                part = np.minimum(np.arange(first, first + self.probed), len(lanes) - 1)
                mine = (a[..., part] for a in (x, fixed, v, longest))
                own = self._run(fun, self.of(at[lanes[part]]), *mine, *more)
                parts.append(jax.tree.map(np.asarray, own))
            found = jax.tree.map(lambda *a: np.concatenate(a, -1), *parts)
            return lanes_of(found, np.arange(len(lanes)))

        with silently():
            fixed = np.where(np.isfinite(fixed).all(0), fixed, 0.0)
            # A search that begins at zero finds a stationary point there.
            x = np.where(np.isfinite(x), np.where(np.abs(x) < search.NEAR_ZERO, search.NEAR_ZERO, x), 0.5)
            v = np.where(np.isfinite(v).all(tuple(range(v.ndim - 1))), v, 0.0)
            ends = search_lanes(self.model, x, fixed, v, before, prober, several)
            if several:
                ends = self._confirmed(at, ends)
            lost = self._by_quadrature(at, ends) if self.nagq > 1 and not several else ends.lost
            stays = self.nagq == 1 or several
            fine = np.flatnonzero(~lost if stays else ~lost & (ends.solution.x == 0).all(0))
            if len(fine):
                self._put_searched(at[fine], lanes_of(ends, fine))
        for i in at[lost]:
            self._put_single(int(i))

    def _confirmed(self, at: np.ndarray, ends: Ends) -> Ends:
        """Ends of searches by secants, with the Hessian and a last step by it; lost where these say otherwise."""
        solution, n = ends.solution, self.model.n_fixed
        lost = ends.lost | (solution.result != int(Result.CONVERGED))
        g, H = self._joint(at, ends.fixed, solution.x, ends.v)
        even = np.concatenate([np.zeros((n, len(at)), bool), zero_roots(solution.x, self.model.layout)])
        g, H = np.where(even, 0.0, g), np.where(even[:, None] != even[None], 0.0, H)
        step = -solve_free(H, g[:, None], solution.free, n)[:, 0]
        squared = -(g * step).sum(0)
        finite = np.isfinite(H).all((0, 1)) & np.isfinite(step).all(0)
        eigenvalues = np.linalg.eigvalsh(np.moveaxis(np.where(finite, H, 0.0), -1, 0)).T
        structures = self.model.layout.structures
        parts = zip(structures, cov.cut(solution.x, structures), strict=True)
        sizes = np.concatenate([s.sizes(part) for s, part in parts])
        small = ((sizes > 0) & (sizes < search.NEAR_ZERO)).any(0)
        # One step by the exact Hessian squares what is left.
        lost = lost | ~finite | ~is_semidefinite(eigenvalues) | ~(np.abs(squared) <= NEAR**2) | small
        distance = np.sqrt(np.abs(squared))
        distance = np.where(distance <= gradient_tolerance(float), distance, squared)
        moved = np.where(lost, 0.0, step)
        solution = solution._replace(x=solution.x + moved[n:], scaled_gradient=distance)
        value = ends.value - 0.5 * np.where(lost, 0.0, squared)
        return ends._replace(
            solution=solution, fixed=ends.fixed + moved[:n], value=value, Hessian=H, step=step, lost=lost
        )

    def _by_quadrature(self, at: np.ndarray, ends: Ends) -> np.ndarray:
        """From Laplace's ends of models with one standard deviation: regular ends are stored, zeros left as they are;
        ``(L,)`` replicates that need a search by themselves."""
        lost: np.ndarray = ends.lost | (ends.solution.result != int(Result.CONVERGED))
        zero = (ends.solution.x == 0).all(0)
        for some, singular in ((np.flatnonzero(~lost & ~zero), False), (np.flatnonzero(~lost & zero), True)):
            # Those of long responses are fewer in a tile of direct steps.
            size = min(self.probed, self.lanes) if self.compiled else self.probed
            for first in range(0, len(some), size):
                part = some[first : first + size]
                padded = np.resize(part, size) if self.compiled else part
                model, fixed = self.of(at[padded]), ends.fixed[:, padded]
                if singular:
                    lost[part] = ~np.asarray(self._run(falls_to_zero, model, fixed, self.nagq))[: len(part)]
                    continue
                begun = np.abs(ends.solution.x[:, part]), ends.fixed[:, part]
                state = self._directly(at[part], None, begun, sum(ROUNDS), search.NEAR_ZERO)
                done = np.flatnonzero(state.converged)
                lost[part[~state.converged]] = True
                if len(done):
                    iterations = state.iterations + ends.solution.iterations[part]
                    self._put_direct(at[part[done]], lanes_of(state._replace(iterations=iterations), done))
        return lost

    # --- what is kept

    def _put_direct(self, at: np.ndarray, state: Direct) -> None:
        if self.nagq > 1 and self.exact:
            state = state._replace(Hessian=self._joint(at, state.fixed, state.x, state.v)[1])
        code = np.full(len(at), int(Result.CONVERGED))
        code = endless(self.model, self.rows.Q, state.step, state.x, np.ones(state.x.shape, bool), code, state.Hessian)
        self._put(at, state.x, state.fixed, state.value, state.iterations, state.distance, code, state.Hessian,
                  np.ones(state.x.shape, bool), state.v)  # fmt: skip

    def _joint(self, at: np.ndarray, *end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients and Hessians at ends by quadrature: fixed, x, v."""
        found = []
        for first in range(0, len(at), self.probed):
            part = np.arange(first, min(first + self.probed, len(at)))
            padded = np.resize(part, self.probed) if self.compiled else part
            model, own = self.of(at[padded]), lanes_of(end, padded)
            both = self._run(joint_of, model, *own, self.nagq)
            found.append(tuple(np.asarray(one)[..., : len(part)] for one in both))
        gradient, H = (np.concatenate(parts, -1) for parts in zip(*found, strict=True))
        return gradient, H

    def _put_edges(self, at: np.ndarray, state: Direct) -> None:
        self._put_searched(at, edges.ends_of(self.model, state))

    def _put_searched(self, at: np.ndarray, ends: Ends) -> None:
        solution = ends.solution
        own = own_factors(solution.x, _wide(self.rows.Z_bases), self.rows.layout)
        code = endless(
            self.model,
            self.rows.Q,
            ends.step,
            solution.x,
            solution.free,
            np.asarray(result_code(solution, own)),
            ends.Hessian,
        )
        self._put(at, solution.x, ends.fixed, ends.value, solution.iterations, solution.scaled_gradient, code,
                  ends.Hessian, solution.free, ends.v)  # fmt: skip

    def _put_single(self, i: int) -> None:
        """A replicate that lanes do not serve, by the search of a single fit."""
        rows = replace(self.rows, y=self.Y[i])
        one = fit_rows(rows) if self.nagq == 1 else fit_rows_by_quadrature(rows, self.nagq)
        self._store(np.array([i]), {name: jax.tree.map(lambda a: np.asarray(a)[..., None], getattr(one, name))
                                    for name in self.keep})  # fmt: skip

    def _put(
        self, at: np.ndarray, x: np.ndarray, fixed: np.ndarray, value: np.ndarray, iterations: np.ndarray,
        distance: np.ndarray, code: np.ndarray, H: np.ndarray, free: np.ndarray, v: np.ndarray,
    ) -> None:  # fmt: skip
        rows, n, p = self.rows, self.model.n_fixed, self.model.p
        own = own_factors(x, _wide(rows.Z_bases), rows.layout)
        values: dict[str, Any] = {
            "theta": cov.theta_of_lambdas(own.lambdas),
            "beta": rows.X_basis.R_inv @ fixed[:p],
            "psi": rows.psi_of_bases(fixed[p:]),
            "criterion": value + 2.0 * constant_of(rows.family, self.Y[at], self.size, rows.weights),
            "converged": np.isin(code, SOLUTIONS),
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
            to_user[:n, :n] = rows.fixed_change
            # Signs of the search's coordinates are free, so the covariance is that of those which theta has.
            own_x, _ = coordinates_in(values["theta"], rows.layout, [np.asarray(Z.R)[..., None] for Z in rows.Z_bases])
            sign = np.concatenate([np.ones((n, len(at))), np.where(own_x * x < 0, -1.0, 1.0)])
            H = H * sign[:, None] * sign[None]
            inverse = solve_free(H, np.broadcast_to(np.eye(len(H))[..., None], H.shape), free, n)
            covariance = 2.0 * np.einsum("ij,jkl,mk->iml", to_user, inverse, to_user)
            values |= {"vcov": covariance[:p, :p], "vcov_all": covariance}
        if {"b", "eta"} & set(self.keep):
            b = self.model.effects.times_D(cov.factors_of(x, self.model.layout.structures), v)
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
            with self.lock:
                if name not in self.arrays:
                    self.arrays[name] = jax.tree.map(lambda a: np.empty((self.B, *a.shape[1:]), a.dtype), value_)
            for whole, part in zip(jax.tree.leaves(self.arrays[name]), jax.tree.leaves(value_), strict=True):
                whole[at] = part


_PROGRAMS: dict[Callable[..., Any], Callable[..., Any]] = {
    begin_directly: partial(jit, compiler_options=LANES_OF_ROWS, static_argnums=(1, 2))(begin_directly),
    go_on: partial(jit, compiler_options=LANES_OF_ROWS, static_argnums=(3, 4))(go_on),
    probe: partial(jit, compiler_options=LANES_OF_ROWS)(probe),
    probe_by_quadrature: partial(jit, compiler_options=LANES_OF_ROWS, static_argnums=(5,))(probe_by_quadrature),
    joint_of: partial(jit, compiler_options=LANES_OF_ROWS, static_argnums=(4,))(joint_of),
    falls_to_zero: partial(jit, compiler_options=LANES_OF_ROWS, static_argnums=(2,))(falls_to_zero),
}


def _side_by_side(parts: list[tuple[np.ndarray, Direct]]) -> tuple[np.ndarray, Direct]:
    """Replicates and their states, joined."""
    at, states = zip(*parts, strict=True)
    joined: Direct = jax.tree.map(lambda *a: np.concatenate(a, -1), *states)
    return np.concatenate(at), joined


def _wide(bases: tuple[Any, ...]) -> tuple[Any, ...]:
    """With an axis for lanes that share them."""
    return tuple(type(basis)(*(np.asarray(part)[..., None] for part in basis)) for basis in bases)
