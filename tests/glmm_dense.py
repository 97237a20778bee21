"""-2 log-likelihood of generalised mixed models by dense matrices, straight from the definitions. NumPy and SciPy only.

    y_j | b ~ f(eta_j), eta = offset + X beta + Z Lambda u, u ~ N(0, 1)

Laplace's approximation is ``2 sum c(eta) + u'u + log det(I + Lambda'Z'W Z Lambda)`` at the mode of u, where ``c`` is
the negative log density of a row with all its constants, and W its second derivative by eta (observed) or the mean of
that (expected, lme4's). Every random effect is a row of one dense matrix: for some hundreds of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

import mixjax as mj

NONE = np.zeros(0)


class Row(NamedTuple):
    """Of every row: ``c`` its negative log density, ``c1`` and ``c2`` the derivatives by eta, ``expected`` the mean of
    ``c2`` over y."""

    c: np.ndarray
    c1: np.ndarray
    c2: np.ndarray
    expected: np.ndarray


def _logit(eta: np.ndarray) -> tuple[np.ndarray, ...]:
    p = special.expit(eta)
    return special.log_expit(eta), 1 - p, -p * (1 - p)


def _probit(eta: np.ndarray) -> tuple[np.ndarray, ...]:
    log_p = special.log_ndtr(eta)
    mills = np.exp(-(eta**2) / 2 - np.log(2 * np.pi) / 2 - log_p)
    return log_p, mills, -mills * (mills + eta)


def _cloglog(eta: np.ndarray) -> tuple[np.ndarray, ...]:
    hazard = np.exp(eta)
    ratio = hazard / np.expm1(hazard)
    return np.log(-np.expm1(-hazard)), ratio, ratio * (1 - hazard - ratio)


def _no_event(eta: np.ndarray) -> tuple[np.ndarray, ...]:
    return (-np.exp(eta),) * 3


def _mirrored(link: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    def log_failure(eta: np.ndarray) -> tuple[np.ndarray, ...]:
        value, first, second = link(-eta)
        return value, -first, second

    return log_failure


# Log probabilities of success and of failure with their first and second derivatives.
LINKS = {
    "logit": (_logit, _mirrored(_logit)),
    "probit": (_probit, _mirrored(_probit)),
    "cloglog": (_cloglog, _no_event),
}


def row(family: str, link: str, y: np.ndarray, size: np.ndarray, eta: np.ndarray, psi: np.ndarray) -> Row:
    """All rows at once: ``y``, ``size`` and ``eta`` ``(n,)``; ``psi`` ``(1,)`` or empty, on the log scale."""
    if family == "binomial":
        success, failure = (log_p(eta) for log_p in LINKS[link])
        choices = special.gammaln(size + 1) - special.gammaln(y + 1) - special.gammaln(size - y + 1)
        c, c1, c2 = (-y * s - (size - y) * f for s, f in zip(success, failure, strict=True))
        expected = -size * (np.exp(success[0]) * success[2] + np.exp(failure[0]) * failure[2])
        return Row(c - choices, c1, c2, expected)
    if (family, link) == ("poisson", "log"):
        mu = np.exp(eta)
        return Row(mu - y * eta + special.gammaln(y + 1), mu - y, mu, mu)
    if (family, link) == ("nbinom", "log"):  # variance mu + mu^2 / k
        k, mu = np.exp(psi[0]), np.exp(eta)
        counts = special.gammaln(k) + special.gammaln(y + 1) - special.gammaln(y + k)
        c = counts - k * psi[0] - y * eta + (y + k) * np.log(k + mu)
        share = mu / (k + mu)
        return Row(c, (y + k) * share - y, (y + k) * share * (1 - share), k * share)
    if (family, link) == ("gamma", "log"):  # variance phi mu^2
        shape = np.exp(-psi[0])
        ratio = y * np.exp(-eta)
        c = special.gammaln(shape) - shape * np.log(shape) + np.log(y) + shape * (ratio - np.log(ratio))
        return Row(c, shape * (1 - ratio), shape * ratio, np.full_like(eta, shape))
    if (family, link) == ("beta", "logit"):  # variance mu (1 - mu) / (1 + phi)
        phi, mu = np.exp(psi[0]), special.expit(eta)
        a, b, v = mu * phi, (1 - mu) * phi, mu * (1 - mu)
        c = special.betaln(a, b) - (a - 1) * np.log(y) - (b - 1) * np.log1p(-y)
        by_mu = phi * (special.digamma(a) - special.digamma(b) - special.logit(y))
        expected = phi**2 * (special.polygamma(1, a) + special.polygamma(1, b)) * v**2
        return Row(c, by_mu * v, expected + by_mu * v * (1 - 2 * mu), expected)
    raise ValueError(f"no {family} with link {link} here")


class Modes(NamedTuple):
    """``u`` ``(Q,)`` and ``b = Lambda u`` of all levels, term by term, level by level; ``ZL`` ``(n, Q)``; ``eta``
    ``(n,)``; ``row`` there."""

    u: np.ndarray
    b: np.ndarray
    ZL: np.ndarray
    eta: np.ndarray
    row: Row


def random_columns(design: mj.Design) -> np.ndarray:
    """The Z of all terms side by side, ``(n, Q)``: term by term, level by level, effects of a level together."""
    blocks = []
    for term in design.terms:
        Z = np.asarray(term.Z, float)
        (n, q), group = Z.shape, np.asarray(term.group)
        block = np.zeros((n, term.n_groups, q))
        block[np.arange(n), group] = Z
        blocks.append(block.reshape(n, -1))
    return np.hstack(blocks)


def modes(
    design: mj.Design,
    size: np.ndarray,
    family: str,
    link: str,
    beta: np.ndarray,
    lambdas: Sequence[np.ndarray],
    psi: np.ndarray = NONE,
) -> Modes:
    """The modes of u by Newton's method, to rounding.

    Steps are halved while the penalised log-likelihood falls, and where the observed weights are not positive definite
    the expected ones give the step.

    Args:
        design: ``y`` counts where binomial. size: ``(n,)`` trials.
        beta: ``(p,)``. lambdas: a factor ``(q, q)`` of the covariance of every term, any square root. psi: log
            dispersion (gamma), log size (nbinom) or log precision (beta), else empty.
    """
    y = np.asarray(design.y, float)
    fixed = np.asarray(design.X) @ beta + (0 if design.offset is None else np.asarray(design.offset))
    Lambda = _block_diagonal([L for term, L in zip(design.terms, lambdas, strict=True) for _ in range(term.n_groups)])
    ZL = random_columns(design) @ Lambda
    identity = np.eye(ZL.shape[1])
    u, last = np.zeros(ZL.shape[1]), np.inf

    def at(u: np.ndarray) -> tuple[float, Row]:
        with np.errstate(over="ignore", invalid="ignore"):
            found = row(family, link, y, size, fixed + ZL @ u, psi)
        return found.c.sum() + u @ u / 2, found

    value, found = at(u)
    for _ in range(200):
        gradient = ZL.T @ found.c1 + u
        H = identity + (ZL.T * found.c2) @ ZL
        if np.linalg.eigvalsh(H)[0] <= 0:
            H = identity + (ZL.T * found.expected) @ ZL
        step = -np.linalg.solve(H, gradient)
        length = np.abs(step).max()
        # Newton's steps square until rounding holds them up.
        if length <= 1e-13 or (length < 1e-8 and length >= last / 2):
            return Modes(u, Lambda @ u, ZL, fixed + ZL @ u, found)
        share = 1.0
        new, there = at(u + step)
        while not new <= value + 1e-12 * abs(value):
            share /= 2
            new, there = at(u + share * step)
        u, value, found, last = u + share * step, new, there, length
    raise RuntimeError("no mode in 200 steps")


def laplace_dense(
    design: mj.Design,
    size: np.ndarray,
    family: str,
    link: str,
    beta: np.ndarray,
    lambdas: Sequence[np.ndarray],
    psi: np.ndarray = NONE,
    curvature: str = "observed",
) -> float:
    """-2 log of Laplace's approximation with all constants; ``curvature`` is of the determinant only. Arguments as in
    :func:`modes`."""
    at = modes(design, size, family, link, beta, lambdas, psi)
    weights = {"observed": at.row.c2, "expected": at.row.expected}[curvature]
    sign, logdet = np.linalg.slogdet(np.eye(len(at.u)) + (at.ZL.T * weights) @ at.ZL)
    assert sign > 0
    return 2 * at.row.c.sum() + at.u @ at.u + logdet


def agq_dense(
    design: mj.Design,
    size: np.ndarray,
    family: str,
    link: str,
    beta: np.ndarray,
    lambdas: Sequence[np.ndarray],
    psi: np.ndarray = NONE,
    nagq: int = 25,
) -> float:
    """-2 log of adaptive Gauss-Hermite quadrature around the modes, of one term with one effect. Arguments as in
    :func:`modes`."""
    (term,) = design.terms
    assert np.shape(term.Z)[1] == 1
    at = modes(design, size, family, link, beta, lambdas, psi)
    sd = 1 / np.sqrt(1 + (at.ZL**2).T @ at.row.c2)  # of every level
    nodes, weights = np.polynomial.hermite_e.hermegauss(nagq)
    weights = weights / np.sqrt(2 * np.pi)
    y, group = np.asarray(design.y, float), np.asarray(term.group)
    logs = np.zeros((nagq, term.n_groups))
    for k, z in enumerate(nodes):
        u = at.u + z * sd
        c = row(family, link, y, size, at.eta + at.ZL @ (z * sd), psi).c
        logs[k] = -np.bincount(group, c, term.n_groups) - u**2 / 2 + z**2 / 2 + np.log(sd)
    return -2 * special.logsumexp(logs, axis=0, b=weights[:, None]).sum()


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    whole = np.zeros((sum(map(len, blocks)),) * 2)
    start = 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole
