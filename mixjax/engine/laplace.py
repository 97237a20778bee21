"""The likelihood of a generalised linear mixed model by Laplace's approximation, as a function that JAX differentiates.

It is *the* likelihood: for every structure, in any parameter and in the data, to any order. The closed form of
:mod:`mixjax.engine.laplace_curvature`, which fits use, is held against it in the tests.

The modes are found by a search that is not differentiated; their derivatives follow from ``b = D g(b)``, which they
solve: ``db = (I - K A) d(D g)`` with b held on the right. (Implicit function theorem; the rule is made of
differentiable functions of the mode itself, and can be differentiated again.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import pairs_of, stack_of
from mixjax.design import AnyArray
from mixjax.engine.effects import factor_of
from mixjax.engine.laplace_curvature import Data
from mixjax.engine.laplace_fit import INNER_LAST, find_modes
from mixjax.engine.laplace_model import Model
from mixjax.engine.quadrature import check_nodes, log_sums, lower_root, product_rule, scales
from mixjax.forks import refuse_forked
from mixjax.machine import Array, jit
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout


class GLMMParams(NamedTuple):
    """Unconstrained parameters of a generalised linear mixed model.

    Attributes:
        beta: ``(p,)`` fixed effects.
        chol: per term ``(q (q + 1) / 2,)``: Cholesky factor of the absolute covariance of its effects, columns of the
            lower triangle, the diagonal as logarithms; of a covariance with a structure its own ``(k,)`` coordinates,
            as in :class:`mixjax.MarginalParams`.
        psi: ``(s,)`` logarithms of the family's parameters, or coefficients of their columns; empty for binomial and
            Poisson.
    """

    beta: AnyArray
    chol: tuple[AnyArray, ...]
    psi: AnyArray = ()


# --- effects of traced groups ----------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """``Z'WZ``: ``first (q, q, m)`` by level of the first factor, ``side (q, m, d)``, ``dense (d, d)``."""

    first: Array
    side: Array
    dense: Array


class Gain(NamedTuple):
    """See :class:`~mixjax.engine.effects.Crossed`, of which this is JAX's kind."""

    A: Blocks
    K1: Array
    H: Array
    Kd: Array
    logdet: Array

    def times_A(self, b: Array) -> Array:
        q, m, d = self.A.side.shape
        first, rest = b[: q * m, 0].reshape(q, m), b[q * m :, 0]
        top = linalg.matmul(self.A.first, first[:, None])[:, 0]
        if d:
            top = top + jnp.einsum("amd,d->am", self.A.side, rest)
        low = jnp.einsum("amd,am->d", self.A.side, first) + self.A.dense @ rest
        return jnp.concatenate([top.reshape(-1), low])[:, None]

    def solve(self, r: Array) -> Array:
        """``K r``."""
        q, m, d = self.A.side.shape
        first, rest = r[: q * m, 0].reshape(q, m), r[q * m :, 0]
        low = self.Kd @ (rest - jnp.einsum("amd,am->d", self.H, first))
        top = linalg.matmul(self.K1, first[:, None])[:, 0]
        if d:
            top = top - jnp.einsum("amd,d->am", self.H, low)
        return jnp.concatenate([top.reshape(-1), low])[:, None]


@dataclass(frozen=True)
class Gathered:
    """Random effects as one vector ``(N, 1)``, factor after factor in the order of elimination; groups may be traced. A
    JAX pytree.

    Attributes:
        Z: per factor ``(n, q)``. groups: per factor ``(n,)``. levels, layout: static.
    """

    Z: tuple[Array, ...]
    groups: tuple[Array, ...]
    levels: tuple[int, ...]
    layout: Layout

    @property
    def effect_shape(self) -> tuple[int, ...]:
        return (self.n_effects,)

    row_axes = 1

    @property
    def order(self) -> list[int]:
        return [*self.layout.chain, *self.layout.dense]

    @property
    def n_effects(self) -> int:
        return sum(self.Z[f].shape[1] * self.levels[f] for f in self.order)

    @property
    def _others(self) -> tuple[list[Array], list[Array], int]:
        """All columns of the other factors, ``(n,)`` each; where in the dense block each stands; its size."""
        columns, at, start = [], [], 0
        for f in self.order[1:]:
            for a in range(self.Z[f].shape[1]):
                columns.append(self.Z[f][:, a])
                at.append(start + a * self.levels[f] + self.groups[f])
            start += self.Z[f].shape[1] * self.levels[f]
        return columns, at, start

    def rows(self, b: Array) -> Array:
        found, start = jnp.zeros(self.Z[0].shape[0], b.dtype), 0
        for f in self.order:
            q, m = self.Z[f].shape[1], self.levels[f]
            own = b[start : start + q * m, 0].reshape(q, m)
            found = found + (self.Z[f].T * own[:, self.groups[f]]).sum(0)
            start += q * m
        return found[:, None]

    def effects(self, w: Array) -> Array:
        parts = [jax.ops.segment_sum(w * self.Z[f], self.groups[f], self.levels[f]).T.reshape(-1) for f in self.order]
        return jnp.concatenate(parts)[:, None]

    def normal(self, w: Array) -> Blocks:
        f = self.order[0]
        Z, group, m = self.Z[f], self.groups[f], self.levels[f]
        q, w = Z.shape[1], w[:, 0]

        def by_level(values: Array) -> Array:
            return jax.ops.segment_sum(values, group, m)

        sums = {(a, b): by_level(w * Z[:, a] * Z[:, b]) for a, b in pairs_of(q)}
        first = stack_of([[sums[min(a, b), max(a, b)] for b in range(q)] for a in range(q)])
        columns, at, d = self._others
        side = jnp.zeros((q, m, d), first.dtype)
        dense = jnp.zeros((d, d), first.dtype)
        for column, own in zip(columns, at, strict=True):
            for a in range(q):
                side = side.at[a, group, own].add(w * Z[:, a] * column)
            for e in range(len(columns)):
                dense = dense.at[own, at[e]].add(w * column * columns[e])
        return Blocks(first, side, dense)

    def units(self, w: Array) -> Array:
        if len(self.levels) == 1:
            return jax.ops.segment_sum(w, self.groups[0], self.levels[0])
        return w.sum(0, keepdims=True)

    def unit_dots(self, a: Array, b: Array) -> Array:
        if len(self.levels) == 1:
            return (a * b).reshape(-1, self.levels[0], 1).sum(0)
        return (a * b).sum(0, keepdims=True)

    def of_units(self, values: Array) -> Array:
        return jnp.tile(values, (self.Z[0].shape[1], 1)) if len(self.levels) == 1 else values

    def _dense_times(self, lambdas: list[Array], V: Array, transpose: bool = False) -> Array:
        parts, start = [], 0
        for f in self.order[1:]:
            q, m = self.Z[f].shape[1], self.levels[f]
            Lambda = factor_of(lambdas, self.layout, f)[..., 0]
            own = V[start : start + q * m].reshape(q, -1)
            parts.append(((Lambda.T if transpose else Lambda) @ own).reshape(q * m, *V.shape[1:]))
            start += q * m
        return jnp.concatenate(parts) if parts else V

    def times_D(self, lambdas: list[Array], v: Array) -> Array:
        f = self.order[0]
        q, m = self.Z[f].shape[1], self.levels[f]
        Lambda = factor_of(lambdas, self.layout, f)[..., 0]
        top = (Lambda @ (Lambda.T @ v[: q * m, 0].reshape(q, m))).reshape(-1, 1)
        low = self._dense_times(lambdas, self._dense_times(lambdas, v[q * m :], transpose=True))
        return jnp.concatenate([top, low])

    def gain(self, lambdas: list[Array], A: Blocks) -> Gain:
        d = len(A.dense)
        K1, logdets = linalg.gain(factor_of(lambdas, self.layout, self.order[0])[..., 0], A.first)
        logdet = logdets.sum()
        if not d:
            return Gain(A, K1, A.side, A.dense, logdet[None])
        H = jnp.einsum("abm,bmd->amd", K1, A.side)
        S = A.dense - jnp.einsum("amd,ame->de", A.side, H)
        half = self._dense_times(lambdas, S, transpose=True)
        M = jnp.eye(d, dtype=S.dtype) + self._dense_times(lambdas, half.T, transpose=True)
        inverse, more = linalg.inverse_logdet(M)
        Kd = self._dense_times(lambdas, self._dense_times(lambdas, inverse).T)
        return Gain(A, K1, H, Kd, (logdet + more)[None])


jax.tree_util.register_dataclass(Gathered, data_fields=["Z", "groups"], meta_fields=["levels", "layout"])


# --- the objective ---------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Parameters in the bases of the rows: ``fixed (p + s,)``, and per term a factor ``(q, q)`` of its covariance."""

    fixed: Array
    lambdas: list[Array]


def gathered_model(rows: FamilyRows, expected: bool = False) -> Model:
    """The objective's parts, of rows that may be traced."""

    def column(values: Any) -> Any:
        return None if values is None else jnp.asarray(values)[:, None]

    effects: Any = Gathered(
        tuple(map(jnp.asarray, rows.Z)), tuple(map(jnp.asarray, rows.groups)), rows.levels, rows.layout
    )
    psi = tuple(None if Q is None else jnp.asarray(Q).T[..., None] for Q in rows.psi_columns)
    data = Data(
        column(rows.y), column(rows.size), column(rows.weights), column(rows.offset), jnp.asarray(rows.Q).T[..., None],
        psi,
    )  # fmt: skip
    return Model(effects, data, rows.family, expected, unit=rows.unit)


@jax.custom_jvp
def modes_at(point: Point, rows: FamilyRows) -> Array:
    """Modes ``(N, 1)`` of the random effects in the bases of Z, factor after factor in the order of elimination."""
    model = gathered_model(rows)
    fixed, lambdas = point.fixed[:, None], [L[..., None] for L in point.lambdas]
    start = jnp.zeros((*model.effects.effect_shape, 1), fixed.dtype)
    return find_modes(model, lambdas, fixed, start, INNER_LAST).b


@modes_at.defjvp
def _modes_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    point, rows = primals
    b = modes_at(point, rows)

    def moved(point: Point, rows: FamilyRows) -> Array:
        """``D g`` with b held."""
        model = gathered_model(rows)
        at = _derivatives(model, point, b)
        return model.effects.times_D([L[..., None] for L in point.lambdas], -model.effects.effects(at.by_eta[1]))

    _, v = jax.jvp(moved, primals, tangents)
    model = gathered_model(rows)
    A = model.effects.normal(_derivatives(model, point, b).by_eta[2])
    gain = model.effects.gain([L[..., None] for L in point.lambdas], A)
    return b, v - gain.solve(gain.times_A(v))


def _derivatives(model: Model, point: Point, b: Array) -> Any:
    fixed = point.fixed[:, None]
    return model.derivatives(model.predictor(fixed, b), fixed[model.p :])


def objective(point: Point, rows: FamilyRows, expected: bool = False, nagq: int = 1) -> Array:
    """-2 log-likelihood by Laplace's approximation, or by quadrature of ``nagq`` nodes, all constants kept: scalar,
    differentiable to any order.

    By quadrature of several effects and where a covariance is singular, second derivatives lack what its factor's zero
    columns would add; first derivatives are right.
    """
    model = gathered_model(rows, expected)
    b = modes_at(point, rows)
    fixed, lambdas = point.fixed[:, None], [L[..., None] for L in point.lambdas]
    eta = model.predictor(fixed, b)
    at = model.derivatives(eta, fixed[model.p :])
    g = -model.effects.effects(at.by_eta[1])
    penalty = (g * model.effects.times_D(lambdas, g)).sum()
    w = model.expected_curvature(eta, fixed[model.p :]).w if expected else at.by_eta[2]
    gain = model.effects.gain(lambdas, model.effects.normal(w))
    laplace: Array = 2.0 * at.by_eta[0].sum() + penalty + gain.logdet[0]
    if nagq == 1:
        return laplace
    Lambda = factor_of([lower_root(L[..., None]) for L in point.lambdas], model.layout, 0)
    C = scales(Lambda, model.effects.normal(at.by_eta[2]).first[..., None]).C
    rule = product_rule(nagq, len(Lambda))
    found: Array = laplace - 2.0 * log_sums(model, rule, C, eta, at, fixed[model.p :]).sum()
    return found


def in_bases(beta: Array, psi: Array, lambdas: list[Array], rows: FamilyRows) -> Point:
    """Parameters of the user's columns -> of the bases."""
    own = [jnp.asarray(Z.R) @ Lambda for Z, Lambda in zip(rows.Z_bases, lambdas, strict=True)]
    return Point(rows.fixed_in_bases(beta, jnp.asarray(psi, beta.dtype).reshape(-1)), own)


def family_loglik(factors: list[Array], beta: Array, psi: Array, data: FamilyRows, nagq: int = 1) -> Array:
    """Log-likelihood by Laplace's approximation, inside programs.

    Args:
        factors: per term ``(q, q)``, any factor of its covariance, of Z's own columns. beta: ``(p,)``. psi: ``(s,)``.
        nagq: quadrature nodes an effect, where :func:`glmm_loglik` has it.
    """
    found: Array = -0.5 * objective(in_bases(beta, psi, factors, data), data, nagq=nagq)
    return found


def glmm_loglik(params: GLMMParams, data: FamilyRows, nagq: int = 1) -> Array:
    """Log-likelihood of a generalised linear mixed model by Laplace's approximation or quadrature, all constants kept.

    A pure function of unconstrained parameters: ``jit``, ``grad``, ``hessian`` and ``vmap`` work, with respect to
    ``params`` and to the floating arrays of ``data``, y (as numbers) among them.

    Args:
        params: :class:`GLMMParams`. data: of :func:`mixjax.rows`.
        nagq: nodes of adaptive Gauss-Hermite quadrature, for one grouping factor with up to three effects a level; 1
            is Laplace's approximation.

    Returns:
        scalar.

    Raises:
        ValueError: parameters of another model, or no quadrature for this one.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> data = mj.rows(mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,)), mj.families.poisson())
        >>> p = mj.GLMMParams(beta=np.array([1.5]), chol=(np.array([-1.0]),))
        >>> bool(mj.glmm_loglik(p, data) < 0)
        True
    """
    refuse_forked()
    _check(params, data)
    check_nodes(nagq, data)
    found: Array = _program(int(nagq))(params, data)
    return found


@cache
def _program(nagq: int) -> Callable[..., Array]:
    return jit(partial(_loglik, nagq=nagq))


def _loglik(params: GLMMParams, data: FamilyRows, nagq: int) -> Array:
    lambdas = [
        structure.factor(structure.exponentials(jnp.asarray(chol)))
        for chol, structure in zip(params.chol, data.layout.structures, strict=True)
    ]
    return -0.5 * objective(in_bases(jnp.asarray(params.beta), params.psi, lambdas, data), data, nagq=nagq)


def _check(params: GLMMParams, data: FamilyRows) -> None:
    """Raise ValueError for parameters that would broadcast to something else than the model's."""
    wanted = ((data.p,), tuple((s.k,) for s in data.layout.structures), (data.n_psi,))
    found = (np.shape(params.beta), tuple(map(np.shape, params.chol)), np.shape(params.psi))
    for name, a, b in zip(GLMMParams._fields, found, wanted, strict=True):
        if a != b:
            raise ValueError(f"{name} has shape {a}; this model needs {b}")


@partial(jax.jit, static_argnames=("curvature", "nagq"))
def _criterion(theta: Array, beta: Array, data: FamilyRows, psi: Array, curvature: str, nagq: int) -> Array:
    lambdas = cov.lambdas_of_theta(theta, data.layout.qs)
    return objective(in_bases(beta, psi, lambdas, data), data, curvature == "expected", nagq)


def glmm_criterion(
    theta: AnyArray, beta: AnyArray, data: FamilyRows, psi: AnyArray = (), curvature: str = "observed", nagq: int = 1
) -> Array:
    """-2 log-likelihood by Laplace's approximation or quadrature at lme4's parameters, all constants kept: what a fit
    minimises.

    Args:
        theta: ``(k,)`` Cholesky factors of the absolute covariances, the lower triangle column by column, term by term.
        beta: ``(p,)``. data: of :func:`mixjax.rows`. psi: ``(s,)`` logarithms of the family's parameters.
        curvature: ``"observed"``, or ``"expected"`` for lme4's numbers where the link is not canonical.
        nagq: nodes of adaptive Gauss-Hermite quadrature, as in :func:`mixjax.glmm_loglik`; around the observed
            curvature.

    Returns:
        scalar; ``jit``, ``grad``, ``hessian`` and ``vmap`` work.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> data = mj.rows(mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,)), mj.families.poisson())
        >>> bool(mj.glmm_criterion(np.array([0.5]), np.array([1.5]), data) > 0)
        True
    """
    refuse_forked()
    if curvature not in ("observed", "expected"):
        raise ValueError(f"curvature must be 'observed' or 'expected', got {curvature!r}")
    check_nodes(nagq, data)
    if nagq > 1 and curvature != "observed":
        raise ValueError("quadrature has the observed curvature; curvature='expected' is for nagq = 1")
    found: Array = _criterion(jnp.asarray(theta), jnp.asarray(beta), data, jnp.asarray(psi), curvature, int(nagq))
    return found
