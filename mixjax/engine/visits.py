"""The likelihood of repeated measures, with its derivatives in closed form, for one response or many.

A subject with visits v has errors of covariance ``V = Sigma[v, v]``, Sigma ``(T, T)`` that of its arm. With ``W`` the
inverse of V, zero at visits that are missing, in the direction of a symmetric E of Sigma

    ``d logdet V = tr(W E)``,  ``dW = -W E W``,  ``d(W E W) = -W E' W E W - W E W E' W``

so that with ``A_i = W [X_i y_i]``, ``J_j = sum_i A_i'E_j A_i``, C the inverse of ``X'V^{-1}X``, ``c = (-beta, 1)`` and
``Psi = C + c c'`` (for ML without C; of X's part)

    ``df/dE_j = sum_i tr(W E_j) - tr(A_i Psi A_i' E_j)``
    ``d2f/dE_j dE_l = sum_i tr(E_j W E_l (2 A_i Psi A_i' - W)) - tr(C J_j C J_l) - 2 (J_j c)'C (J_l c)``

where the last two C are of X alone, the first of them only for REML. W is that of the subject's pattern; what is summed
over its subjects are second moments of ``[X y]`` between visits. Sigma is absolute: there is no other variance. Lanes,
one for every response, stand in front of all arrays but coordinates, where they are last, as the optimiser has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import pairs_of
from mixjax.engine.first_factor import directions_and_places
from mixjax.products.visits import Patterns, Trials, VisitRows


class Contracted(NamedTuple):
    """``sum_i [X y]'W [X y]``, or of many W along an axis behind the lanes: ``XX (B, ..., p, p)``, ``Xy (B, ..., p)``,
    ``yy (B, ...)``."""

    XX: np.ndarray
    Xy: np.ndarray
    yy: np.ndarray


class Sums(Protocol):
    """What the likelihood asks of the rows. ``W (B, C, T, T)``; Psi by its parts, as :class:`Contracted`."""

    @property
    def patterns(self) -> Patterns: ...

    @property
    def count(self) -> np.ndarray:
        """``(B, C)`` subjects of every pattern; B is 1 where lanes share them."""
        ...

    @property
    def n(self) -> np.ndarray:
        """``(B,)`` rows. B as of ``count``."""
        ...

    @property
    def sum_log_weights(self) -> np.ndarray:
        """``(B,)``."""
        ...

    def contract(self, W: np.ndarray) -> Contracted: ...

    def directions(self, W: np.ndarray) -> Contracted:
        """``J`` of every entry (a, b), a <= b, of the covariance of every arm, arm by arm."""
        ...

    def pull_back(self, W: np.ndarray, Psi: Contracted) -> np.ndarray:
        """``sum_i A_i Psi A_i' (B, C, T, T)``."""
        ...


class _OfOneDesign:
    """What lanes share."""

    rows: VisitRows

    @property
    def patterns(self) -> Patterns:
        return self.rows.patterns

    @property
    def count(self) -> np.ndarray:
        return self.rows.count[None]

    @property
    def n(self) -> np.ndarray:
        return np.array([self.rows.n])

    @property
    def sum_log_weights(self) -> np.ndarray:
        return np.array([self.rows.sum_log_weights])


@dataclass(frozen=True)
class OneResponse(_OfOneDesign):
    """Rows themselves: ``U (S, T, p + 1)``, the columns of X's basis and the response."""

    rows: VisitRows
    U: np.ndarray

    @staticmethod
    def of(rows: VisitRows, residual: np.ndarray) -> OneResponse:
        """Of a response ``(n,)`` that is orthogonal to X."""
        return OneResponse(rows, np.concatenate([rows.X_by_visit, rows.by_visit(residual)[..., None]], axis=2))

    def _weighted(self, W: np.ndarray) -> np.ndarray:
        weighted: np.ndarray = W[0][self.rows.pattern] @ self.U
        return weighted

    def contract(self, W: np.ndarray) -> Contracted:
        r = self.U.shape[2]
        return _parts((self.U.reshape(-1, r).T @ self._weighted(W).reshape(-1, r))[None])

    def directions(self, W: np.ndarray) -> Contracted:
        T, r = self.U.shape[1:]
        A = self._weighted(W)
        a, b = np.triu_indices(T)
        found = []
        for own in self.rows.subjects_of_arms:
            flat = A[own].reshape(-1, T * r)
            products = (flat.T @ flat).reshape(T, r, T, r).swapaxes(1, 2)
            both = products[a, b] + products[b, a]
            both[a == b] *= 0.5
            found.append(both)
        return _parts(np.concatenate(found)[None])

    def pull_back(self, W: np.ndarray, Psi: Contracted) -> np.ndarray:
        A, full = self._weighted(W), np.empty((self.U.shape[2],) * 2)
        full[:-1, :-1], full[-1, -1] = Psi.XX[0], Psi.yy[0]
        full[:-1, -1] = full[-1, :-1] = Psi.Xy[0]
        return self.rows.sum_by_pattern((A @ full) @ A.swapaxes(1, 2))[None]


class _OfSomePatterns(Protocol):
    @property
    def patterns(self) -> Patterns: ...

    def _contract(self, W: np.ndarray, own: slice) -> Contracted:
        """Of symmetric ``W (B, J, C, T, T)``, of the patterns ``own``."""
        ...


class _ByPatterns:
    """Contractions with W of all patterns, and with the derivatives of W by an arm's entries of those of the arm."""

    def contract(self: _OfSomePatterns, W: np.ndarray) -> Contracted:
        found = self._contract(W[:, None], slice(0, len(self.patterns.seen)))
        return Contracted(found.XX[:, 0], found.Xy[:, 0], found.yy[:, 0])

    def directions(self: _OfSomePatterns, W: np.ndarray) -> Contracted:
        found = [self._contract(_directions(W[:, own]), own) for own in self.patterns.of_arms]
        return Contracted(*(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class ManyResponses(_OfOneDesign, _ByPatterns):
    """Second moments between visits, by pattern: ``Xy (B, C, T, T, p)`` of columns at one visit and responses at
    another, ``yy (B, C, T, T)``; those of X all lanes share."""

    rows: VisitRows
    Xy: np.ndarray
    yy: np.ndarray

    @staticmethod
    def of(rows: VisitRows, residuals: np.ndarray) -> ManyResponses:
        """Of responses ``(B, n)`` that are orthogonal to X."""
        B, (_, T, p), C = len(residuals), rows.X_by_visit.shape, len(rows.patterns.seen)
        Y = rows.by_visit(residuals.T)  # (S, T, B)
        Xy, yy = np.empty((C, T, p, T, B)), np.empty((B, C, T, T))
        for c, (first, count) in enumerate(zip(rows.starts, rows.count, strict=True)):
            own = slice(first, first + count)
            X = rows.X_by_visit[own].reshape(count, T * p)
            Xy[c] = (X.T @ Y[own].reshape(count, T * B)).reshape(T, p, T, B)
            by_lane = np.ascontiguousarray(Y[own].transpose(2, 1, 0))
            yy[:, c] = by_lane @ by_lane.swapaxes(1, 2)
        return ManyResponses(rows, np.ascontiguousarray(Xy.transpose(4, 0, 1, 3, 2)), yy)

    def take(self, at: np.ndarray) -> ManyResponses:
        """Some of the lanes."""
        return ManyResponses(self.rows, self.Xy[at], self.yy[at])

    def _contract(self, W: np.ndarray, own: slice) -> Contracted:
        B, J, _, T, _ = W.shape
        p = self.rows.p
        moments = self.rows.moments[:, own].swapaxes(0, 1)
        moments = moments.reshape(moments.shape[0] * moments.shape[1], -1 if p else 0)
        upper = W[..., *np.triu_indices(T)].reshape(B * J, len(moments))
        XX = linalg.symmetric_of(upper @ moments, p).reshape(B, J, p, p)
        return Contracted(XX, *_with_response(W, self.Xy[:, own], self.yy[:, own]))

    def pull_back(self, W: np.ndarray, Psi: Contracted) -> np.ndarray:
        r, s = np.triu_indices(self.rows.p)
        moments = self.rows.moments
        upper = Psi.XX[:, r, s] * np.where(r == s, 1.0, 2.0)
        each, C, t = moments.shape
        pairs = (upper @ moments.reshape(each * C, t).T).reshape(len(W), each, C)
        return _pulled(W, pairs.swapaxes(1, 2), Psi, self.Xy, self.yy)


@dataclass(frozen=True)
class ManyTrials(_ByPatterns):
    """As :class:`ManyResponses`, of lanes whose subjects miss visits of their own: moments of X differ too.

    Attributes:
        rows: of the design. patterns, count: as of :class:`Sums`. n, sum_log_weights: ``(B,)``.
        XX: ``(B, C, pairs, t)``. Xy: ``(B, C, T, T, p)``. yy: ``(B, C, T, T)``.
    """

    rows: VisitRows
    patterns: Patterns
    count: np.ndarray
    n: np.ndarray
    sum_log_weights: np.ndarray
    XX: np.ndarray
    Xy: np.ndarray
    yy: np.ndarray

    @staticmethod
    def of(trials: Trials, residuals: np.ndarray) -> ManyTrials:
        """Of responses ``(B, n)``, zero where there is none."""
        rows, patterns = trials.rows, trials.patterns
        B, C, S = trials.members.shape
        (_, T, p), seen = rows.X_by_visit.shape, patterns.seen * 1.0
        a, b = np.triu_indices(T)
        flat, X = trials.members.reshape(B * C, S), rows.X_by_visit
        XX = np.empty((B, C, len(a), p * (p + 1) // 2))
        for v, products in enumerate(rows.products_of_visits()):
            XX[:, :, v] = (flat @ products).reshape(XX[:, :, v].shape) * (seen[:, a[v]] * seen[:, b[v]])[:, None]
        Y = rows.by_visit(residuals.T).transpose(2, 0, 1)  # (B, S, T)
        own = trials.members[:, :, :, None] * Y[:, None]  # (B, C, S, T)
        Xy = X.reshape(S, T * p).T @ own.transpose(2, 0, 1, 3).reshape(S, -1)
        Xy = Xy.reshape(T, p, B, C, T).transpose(2, 3, 0, 4, 1) * seen[:, :, None, None]
        yy = own.swapaxes(2, 3) @ Y[:, None]
        return ManyTrials(
            rows, patterns, trials.members.sum(2), trials.n, trials.sum_log_weights,
            XX, np.ascontiguousarray(Xy), yy,
        )  # fmt: skip

    def take(self, at: np.ndarray) -> ManyTrials:
        """Some of the lanes."""
        names = ("count", "n", "sum_log_weights", "XX", "Xy", "yy")
        return replace(self, **{name: getattr(self, name)[at] for name in names})

    def _contract(self, W: np.ndarray, own: slice) -> Contracted:
        B, J, _, T, _ = W.shape
        p = self.rows.p
        own_XX = self.XX[:, own]
        _, C, pairs, t = own_XX.shape
        upper = W[..., *np.triu_indices(T)].reshape(B, J, C * pairs)
        XX = linalg.symmetric_of((upper @ own_XX.reshape(B, C * pairs, t)).reshape(B * J, t), p)
        return Contracted(XX.reshape(B, J, p, p), *_with_response(W, self.Xy[:, own], self.yy[:, own]))

    def pull_back(self, W: np.ndarray, Psi: Contracted) -> np.ndarray:
        r, s = np.triu_indices(self.rows.p)
        upper = Psi.XX[:, r, s] * np.where(r == s, 1.0, 2.0)
        return _pulled(W, (self.XX @ upper[:, None, :, None])[..., 0], Psi, self.Xy, self.yy)


def _directions(V: np.ndarray) -> np.ndarray:
    """``W E W (B, J, C, T, T)`` of the unit symmetric matrices E of all entries, of ``W (B, C, T, T)``."""
    a, b = np.triu_indices(V.shape[-1])
    columns, rows = V[:, :, :, a], V[:, :, b]  # (B, C, T, J), (B, C, J, T)
    EW = columns.swapaxes(2, 3)[..., None] * rows[:, :, :, None]  # W e_a e_b' W
    EW = np.where((a == b)[:, None, None], EW, EW + EW.swapaxes(3, 4))
    directions: np.ndarray = EW.swapaxes(1, 2)
    return directions


def _with_response(W: np.ndarray, Xy: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Contractions ``(B, J, p), (B, J)`` of moments with symmetric ``W (B, J, C, T, T)``."""
    B, J = W.shape[:2]
    flat = W.reshape(B, J, -1)
    return flat @ Xy.reshape(B, flat.shape[2], Xy.shape[-1]), (flat @ yy.reshape(B, -1, 1))[..., 0]


def _pulled(W: np.ndarray, pairs: np.ndarray, Psi: Contracted, Xy: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """``W (sum_i u_i Psi u_i') W``, from its part of X by pairs of visits ``(B, C, pairs)``, both orders together."""
    B, C, T, _ = W.shape
    a, b = np.triu_indices(T)
    Q = np.empty((B, C, T, T))
    Q[..., a, b] = Q[..., b, a] = pairs * np.where(a == b, 1.0, 0.5)
    crossed = (Xy.reshape(B, C * T * T, Xy.shape[-1]) @ Psi.Xy[:, :, None]).reshape(B, C, T, T)
    Q += crossed + crossed.swapaxes(2, 3) + yy * Psi.yy[:, None, None, None]
    pulled: np.ndarray = W @ Q @ W
    return pulled


def _parts(G: np.ndarray) -> Contracted:
    """Of sums with the response behind X's columns."""
    return Contracted(G[..., :-1, :-1], G[..., :-1, -1], G[..., -1, -1])


class At(NamedTuple):
    """The likelihood at covariances, and its derivatives by their entries, arm by arm, pairs a <= b row by row.

    Attributes:
        value: ``(B,)``. XX_inverse: ``(B, p, p)``, of X's basis. delta: ``(B, p)``, generalised least squares.
        gradient: ``(B, J)``. Hessian: ``(B, J, J)``. J_XX: ``(B, J, p, p)``: X'V^{-1}X falls by it along an entry.
    """

    value: np.ndarray
    XX_inverse: np.ndarray
    delta: np.ndarray
    gradient: np.ndarray
    Hessian: np.ndarray
    J_XX: np.ndarray


@dataclass(frozen=True)
class Visits:
    """The criterion of one response, or of B, as functions of coordinates of all arms' covariances.

    Attributes:
        rows: of the design. sums: of the responses. reml: restricted likelihood.
    """

    rows: VisitRows
    sums: OneResponse | ManyResponses | ManyTrials
    reml: bool

    def covariances(self, x: np.ndarray) -> list[np.ndarray]:
        """Sigma ``(B, T, T)`` of every arm at coordinates ``x (k, B)``."""
        factors = cov.factors_of(x, self.rows.structures)
        return [np.moveaxis(linalg.matmul(F, linalg.transpose(F)), -1, 0) for F in factors]

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value ``(B,)``, gradient ``(k, B)`` and Hessian ``(k, k, B)`` at ``x (k, B)``; infinite where a covariance is
        not positive definite."""
        at = self.at(self.covariances(x))
        g, H, _ = self.by_coordinates(x, at)
        return at.value, g, H

    def by_coordinates(self, x: np.ndarray, at: At) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradient ``(k, B)``, Hessian ``(k, k, B)``, and ``(J, k, B)`` derivatives of the entries."""
        structures, pairs = self.rows.structures, len(pairs_of(self.rows.n_visits))
        k, B = x.shape
        jacobian, curvature = np.zeros((len(structures) * pairs, k, B)), np.zeros((k, k, B))
        start = 0
        for i, (s, part) in enumerate(zip(structures, cov.cut(x, structures), strict=True)):
            entries, own = slice(i * pairs, (i + 1) * pairs), slice(start, start + s.k)
            jacobian[entries, own] = s.jacobian(part)
            curvature[own, own] = s.curvature(part, at.gradient[:, entries].T)
            start += s.k
        by_lane = np.ascontiguousarray(np.moveaxis(jacobian, -1, 0))  # (B, J, k)
        back = by_lane.swapaxes(1, 2)
        gradient = (back @ at.gradient[:, :, None])[..., 0].T
        H = np.moveaxis(back @ at.Hessian @ by_lane, 0, -1) + curvature
        return gradient, H, jacobian

    def inverses(self, covariances: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """``W (B, C, T, T)`` of every pattern, and ``logdet V (B, C)``; NaN where V is not positive definite."""
        seen = self.sums.patterns.seen
        both = (seen[:, :, None] & seen[:, None]) * 1.0
        B, T, C = len(covariances[0]), seen.shape[1], len(seen)
        V = np.empty((B, C, T, T))
        for arm, own in enumerate(self.sums.patterns.of_arms):
            V[:, own] = covariances[arm][:, None] * both[own]
        V += np.eye(T) * ~seen[:, :, None]
        stack = np.ascontiguousarray(np.moveaxis(V, (2, 3), (0, 1))).reshape(T, T, B * C)
        inverse, logdet = linalg.inverse_logdet(stack)
        W = np.ascontiguousarray(np.moveaxis(inverse.reshape(T, T, B, C), (0, 1), (2, 3))) * both
        return W, logdet.reshape(B, C)

    def solve(self, W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Inverse of ``X'V^{-1}X (B, p, p)``, its log-determinant ``(B,)``, ``delta (B, p)``, residual sum of squares
        ``(B,)``."""
        XX, Xy, yy = self.sums.contract(W)
        B, p = Xy.shape
        if not p:
            return XX, np.zeros(B), Xy, yy
        inverse, logdet = linalg.inverse_logdet(np.ascontiguousarray(np.moveaxis(XX, 0, -1)))
        C = np.moveaxis(inverse, -1, 0)
        delta = (C @ Xy[:, :, None])[..., 0]
        return C, logdet, delta, yy - (Xy * delta).sum(1)

    @property
    def df(self) -> np.ndarray:
        """``(B,)`` rows, for REML less the fixed effects; B is 1 where lanes share them."""
        return self.sums.n - self.rows.p * self.reml

    def value(self, logdet: np.ndarray, logdet_XX: np.ndarray, rss: np.ndarray) -> np.ndarray:
        """The criterion ``(B,)``, all constants kept; infinite where it is not defined."""
        f = (logdet * self.sums.count).sum(1) + rss + self.df * np.log(2.0 * np.pi) - self.sums.sum_log_weights
        if self.reml:
            f = f + logdet_XX + 2.0 * self.rows.X_basis.logdet
        return np.where(np.isfinite(f) & (rss > 0), f, np.inf)

    def at(self, covariances: Sequence[np.ndarray]) -> At:
        """Args: covariances: ``(B, T, T)`` of every arm."""
        T, reml = self.rows.n_visits, float(self.reml)
        W, logdet = self.inverses(covariances)
        C, logdet_XX, delta, rss = self.solve(W)
        f = self.value(logdet, logdet_XX, rss)
        B, p = delta.shape
        ones = np.ones(B)
        M = self.sums.pull_back(W, Contracted(reml * C + delta[:, :, None] * delta[:, None], -delta, ones))
        count = self.sums.count[:, :, None, None]
        of_value = count * W - M  # (B, C, T, T)
        a, b = np.triu_indices(T)
        J = self.sums.directions(W)
        Jc = J.Xy - (J.XX @ delta[:, None, :, None])[..., 0]  # (B, J, p)
        H = -2.0 * (Jc @ C) @ Jc.swapaxes(1, 2)
        if reml and p:
            CJ = C[:, None] @ J.XX
            flat = CJ.reshape(B, -1, p * p)
            H = H - flat @ CJ.swapaxes(2, 3).reshape(B, -1, p * p).swapaxes(1, 2)
        self._add_traces(H, W, 2.0 * M - count * W)
        twice = np.where(a == b, 1.0, 2.0)
        gradient = [of_value[:, own].sum(1)[:, a, b] * twice for own in self.sums.patterns.of_arms]
        return At(f, C, delta, np.concatenate(gradient, axis=1), 0.5 * (H + H.swapaxes(1, 2)), J.XX)

    def _add_traces(self, H: np.ndarray, W: np.ndarray, Y: np.ndarray) -> None:
        """Add ``sum_c tr(E_j W_c E_l Y_c)`` of every arm's entries to ``H (B, J, J)``."""
        T = self.rows.n_visits
        a, b = np.triu_indices(T)
        pairs = len(a)
        for i, own in enumerate(self.sums.patterns.of_arms):
            sums = np.ascontiguousarray(W[:, own][..., a, b].swapaxes(1, 2)) @ Y[:, own][..., a, b]
            here = slice(i * pairs, (i + 1) * pairs)
            H[:, here, here] += sum(
                sums[:, row, column] * weight for row, column, weight in directions_and_places(pairs_of(T))[2]
            )

    def slopes_of_inverse(self, at: At, jacobian: np.ndarray) -> np.ndarray:
        """``(B, k, p, p)`` derivatives of the inverse of ``X'V^{-1}X`` by coordinates, from those of the entries
        ``(J, k, B)``."""
        moves = at.XX_inverse[:, None] @ at.J_XX @ at.XX_inverse[:, None]
        B, J, p, _ = moves.shape
        back = np.moveaxis(jacobian, -1, 0).swapaxes(1, 2)
        slopes: np.ndarray = (back @ moves.reshape(B, J, p * p)).reshape(B, back.shape[1], p, p)
        return slopes

    @cached_property
    def is_told(self) -> np.ndarray:
        """``(B,)`` whether the pairs of visits that are seen tell every parameter of every arm's covariance; B is 1
        where lanes share them."""
        seen = self.sums.patterns.seen * 1.0
        a, b = np.triu_indices(self.rows.n_visits)
        both = seen[:, a] * seen[:, b]
        told = np.ones(len(self.sums.count), bool)
        for own, structure in zip(self.sums.patterns.of_arms, self.rows.structures, strict=True):
            pairs, which = np.unique(self.sums.count[:, own] @ both[own] > 0, axis=0, return_inverse=True)
            told &= np.array([structure.is_told_by(each) for each in pairs])[which.reshape(-1)]
        return told

    @cached_property
    def start(self) -> np.ndarray:
        """Coordinates ``(k, B)`` near the covariances of least-squares residuals between the visits of every arm, over
        the subjects that have both."""
        rows, T = self.rows, self.rows.n_visits
        if isinstance(self.sums, OneResponse):
            e = self.sums.U[:, :, -1]
            yy = rows.sum_by_pattern(e[:, :, None] * e[:, None])[None]
        else:
            yy = self.sums.yy
        seen = self.sums.patterns.seen * 1.0
        both = self.sums.count[:, :, None, None] * seen[:, :, None] * seen[:, None]
        factors = []
        for own in self.sums.patterns.of_arms:
            S = yy[:, own].sum(1) / np.maximum(both[:, own].sum(1), 1.0)
            # Of a response with missing values there is no start.
            S = np.where(np.isfinite(S).all((1, 2), keepdims=True), S, np.eye(T))
            values, vectors = np.linalg.eigh(S)
            values = np.maximum(values, LEAST * values[:, -1:])
            factors.append(np.moveaxis(vectors * np.sqrt(values)[:, None], 0, -1))
        start: np.ndarray = cov.near(factors, rows.structures)
        return start


# Eigenvalues of a first covariance are at least this share of the largest.
LEAST = 0.02
