"""The null distribution of a (restricted) likelihood ratio statistic for one variance, from its spectrum.

Under the null the statistic is the largest value over lambda of a function of a few chi-square variables, one per
distinct eigenvalue (Crainiceanu & Ruppert 2004, J. R. Stat. Soc. B 66, 165). Drawing it needs no rows and no fits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg as dense
from scipy import optimize

from mixjax.distributions import f_tail
from mixjax.machine import n_cores, silently
from mixjax.products.sums import CrossProducts
from mixjax.simulation import key_words

# Eigenvalues that agree to this part of the largest are one with a multiplicity; those below it are zero.
SAME = 1e-10
# Points over lambda where every draw is evaluated before its best one is polished.
GRID = 128
# Numbers that one block of draws may hold in an array, and the most draws of a block.
BLOCK, MOST = 2**20, 2**13
# Draws that are worked on at once, so that arrays over the grid stay in the cache.
TILE = 2**11
STEPS = 60


class Spectrum(NamedTuple):
    """Eigenvalues on which the null distribution depends.

    Attributes:
        mu: ``(J,)`` distinct eigenvalues of ``Z'PZ``, P the projection that takes X out; the first is 0.
        df: ``(J,)`` how often each occurs among the ``n - p`` residual dimensions.
        xi: ``(L,)`` distinct eigenvalues in the log-determinant, and ``xi_df (L,)`` how often each occurs:
            mu for REML; for ML those of ``Z'Z``.
        total: degrees of freedom of the criterion, ``n - p`` for REML and ``n`` for ML.
        dropped: fixed effects that the null leaves out (ML only).
    """

    mu: np.ndarray
    df: np.ndarray
    xi: np.ndarray
    xi_df: np.ndarray
    total: float
    dropped: int


def spectrum(products: CrossProducts, reml: bool, dropped: int = 0) -> Spectrum:
    """The spectrum of a model with one random effect per level, from its cross-products.

    Levels with the same ``z'z`` share an eigenvalue up to p directions, so the matrix that is decomposed has at most p
    rows for every distinct ``z'z``; a balanced design costs next to nothing.

    Args:
        products: of one random term with one effect, or several of one variance. Their scale cancels: lambda is
            maximised over.
        reml: of the restricted likelihood.
        dropped: fixed effects that the null leaves out.

    Raises:
        ValueError: nothing of Z is left beside X.
    """
    p = products.XX.shape[0]
    d, U = _independent(products)
    if p:
        U = dense.solve_triangular(dense.cholesky(products.XX, lower=True), U, lower=True)
    largest = d.max()
    values, counts, rows, columns = [], [], [], []
    for own in _classes(d, 1e-12 * largest):
        mean = d[own].mean()
        block = U[:, own].T
        if len(own) > p:
            values.append(mean)
            counts.append(len(own) - p)
            block = dense.qr(block, mode="r")[0][:p] if p else block[:0]
        rows.append(np.full(len(block), mean))
        columns.append(block)
    reduced = np.concatenate(columns)
    rotated = dense.eigvalsh(np.diag(np.concatenate(rows)) - reduced @ reduced.T) if len(reduced) else np.zeros(0)
    mu, df = _merge(np.concatenate([values, rotated]), np.concatenate([counts, np.ones(len(rotated))]), largest)
    if not len(mu):
        raise ValueError(
            "the random effects lie in the span of the fixed effects: there is no variance to test; leave one of the "
            "two out of the model"
        )
    residual = float(products.n) - p
    mu, df = np.append(0.0, mu), np.append(residual - df.sum(), df)
    if reml:
        return Spectrum(mu, df, mu[1:], df[1:], residual, 0)
    xi, xi_df = _merge(d, np.ones(len(d)), largest)
    return Spectrum(mu, df, xi, xi_df, float(products.n), dropped)


def _independent(products: CrossProducts) -> tuple[np.ndarray, np.ndarray]:
    """``Z'Z (m,)`` and ``Z'X (p, m)`` of effects that meet no other: of one each level, or, where several of a level
    have one variance, of their principal axes."""
    factor = products.factors[0]
    ZZ, ZX = np.asarray(factor.ZZ, np.float64), np.asarray(factor.ZX, np.float64)
    if len(ZZ) == 1:
        return ZZ[0, 0], ZX[0]
    values, axes = np.linalg.eigh(np.moveaxis(ZZ, -1, 0))  # (m, q), (m, q, q)
    turned = np.einsum("mab,apm->pmb", axes, ZX)
    return np.maximum(values, 0.0).reshape(-1), turned.reshape(ZX.shape[1], -1)


def _classes(values: np.ndarray, gap: float) -> list[np.ndarray]:
    """Positions of values that lie no further than a gap apart."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order]) > gap) + 1)


def _merge(values: np.ndarray, counts: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values with their counts, zeros left out."""
    kept = values > SAME * largest
    values, counts = values[kept], counts[kept]
    if not len(values):
        return values, counts
    classes = _classes(values, SAME * largest)
    total = np.array([counts[own].sum() for own in classes])
    return np.array([values[own] @ counts[own] for own in classes]) / total, total


def exact_p(of: Spectrum, statistic: float) -> float | None:
    """The p-value in closed form where there is one, else None.

    With one eigenvalue of multiplicity k the statistic is an increasing function of ``x = A / B``, A chi-square with k
    and B with ``n - p - k`` degrees of freedom: with k' eigenvalues in the log-determinant and N degrees of freedom of
    the criterion it is ``N log((1 + x) (N - k') / N) - k' log(x (N - k') / k')`` above ``x = k' / (N - k')``, and 0
    below. So the test is the F test of the analysis of variance.
    """
    r, k = of.df[0], of.df[1]
    one = len(of.mu) == 2 and len(of.xi) == 1 and abs(of.xi[0] / of.mu[1] - 1.0) < SAME
    slack = of.total - of.xi_df[0]
    if not one or of.dropped or r <= 0 or slack <= 0:
        return None
    edge = np.log(of.xi_df[0] / slack)

    def excess(log_x: float) -> float:
        growth = of.total * np.log1p((np.expm1(log_x - edge)) * of.xi_df[0] / of.total)
        excess: float = growth - of.xi_df[0] * (log_x - edge) - statistic
        return excess

    far = edge + 1.0
    while excess(far) < 0.0:
        far += far - edge
    log_x = optimize.brentq(excess, edge, far, xtol=1e-14, rtol=1e-14)
    return float(f_tail(np.exp(log_x) * r / k, k, r))


# --- draws -----------------------------------------------------------------------------------------------------------


def draw(of: Spectrum, key: Any, n: int) -> np.ndarray:
    """n draws of the statistic under the null, ``(n,)`` float64; zero where the variance is estimated as zero.

    Each is found on a grid over lambda and polished by Newton steps; the value is good to about 1e-9. Blocks of draws
    have one size and stand at fixed places: draw i depends on the spectrum, the key and i alone.

    Args:
        of: the spectrum. key: int or JAX key. n: how many.

    Raises:
        ValueError: the key is none.
    """
    words = key_words(key)
    single = of.df == 1
    size = min(MOST, max(2**6, BLOCK // max(GRID, _power_of_two(len(of.mu)), _power_of_two(len(of.xi)))))
    t = _log_grid(of.mu)

    def work(block: int) -> np.ndarray:
        generator = np.random.default_rng([*words, block])
        squares = np.empty((len(single), size))
        squares[~single] = 2.0 * generator.standard_gamma(of.df[~single, None] / 2, (np.sum(~single), size))
        squares[single] = generator.standard_normal((single.sum(), size)) ** 2
        left_out = 2.0 * generator.standard_gamma(of.dropped / 2, size)
        tiles = [slice(i, i + TILE) for i in range(0, size, TILE)]
        with silently():
            found = [_suprema(squares[:, i], left_out[i], of.mu, of.xi, of.xi_df, of.total, t) for i in tiles]
        return np.concatenate(found)

    blocks = range(-(-n // size))
    with ThreadPoolExecutor(n_cores()) as pool:
        return np.concatenate(list(pool.map(work, blocks)))[:n]


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _log_grid(mu: np.ndarray) -> np.ndarray:
    """Points of ``t = log(c + lambda)``, ``c = 1 / max mu``, from lambda = 0 to where every term has its limit."""
    c = 1.0 / mu.max()
    return np.linspace(np.log(c), np.log(c + 1e8 / mu[1:].min()), GRID)


def _suprema(
    squares: np.ndarray,
    left_out: np.ndarray,
    mu: np.ndarray,
    xi: np.ndarray,
    xi_df: np.ndarray,
    total: float,
    t: np.ndarray,
) -> np.ndarray:
    """The statistic ``(B,)`` from its chi-square variables.

    ``total log(1 + left_out / sum squares) + sup_lambda total log(sum squares / D) - sum xi_df log(1 + lambda xi)``
    with ``D = sum squares / (1 + lambda mu)`` (Crainiceanu & Ruppert 2004, Theorem 1).

    Args:
        squares: ``(J, B)`` by eigenvalue. left_out: ``(B,)``, of the fixed effects that the null leaves out.
        mu, xi, xi_df, total: as in :class:`Spectrum`. t: the grid.
    """
    c = np.exp(t[0])
    mu, xi = mu[:, None], xi[:, None]
    sum_of_squares = squares.sum(0)

    def derivatives(t: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slope and curvature over t."""
        ahead = np.exp(t)
        shrink = 1.0 / (1.0 + mu * (ahead - c))
        moved, rate = squares * shrink, mu * shrink
        D = moved.sum(0)
        moved *= rate
        slope_D = moved.sum(0) / D
        moved *= rate
        bend_D = 2.0 * moved.sum(0) / D
        part = xi / (1.0 + xi * (ahead - c))
        slope = (total * slope_D - xi_df @ part) * ahead
        bend = (total * (slope_D**2 - bend_D) + xi_df @ part**2) * ahead**2
        return slope, bend + slope

    lam = np.append(0.0, (np.exp(t) - c)[1:])
    on_grid = (1.0 / (1.0 + lam[:, None] * mu[:, 0])) @ squares
    np.divide(sum_of_squares, on_grid, out=on_grid)
    np.log(on_grid, out=on_grid)
    on_grid *= total
    on_grid -= (xi_df @ np.log1p(xi * lam))[:, None]
    best = on_grid.argmax(0)
    before, after = np.maximum(best - 1, 0), np.minimum(best + 1, len(t) - 1)
    left, at, right = (np.take_along_axis(on_grid, i[None], 0)[0] for i in (before, best, after))
    fall = left - 2.0 * at + right
    vertex = t[best] + np.where(fall < 0, 0.5 * (left - right) / fall, 0.0) * (t[1] - t[0])
    # At the edge there is one neighbour only; the slope says whether the variance is zero.
    edge = np.flatnonzero(best == 0)
    zero = np.zeros(len(best), bool)
    zero[edge] = derivatives(np.full(len(edge), t[0]), squares[:, edge])[0] <= 0
    low, high = t[before], t[after]
    found = np.where(best == 0, 0.5 * (low + high), vertex)
    left_to_do = np.flatnonzero(~zero)
    for _ in range(STEPS):
        own = found[left_to_do]
        slope, bend = derivatives(own, squares[:, left_to_do])
        below, above = np.where(slope > 0, own, low[left_to_do]), np.where(slope > 0, high[left_to_do], own)
        newton = own - slope / bend
        inside = (bend < 0) & (newton >= below) & (newton <= above)
        found[left_to_do] = np.where(inside, newton, 0.5 * (below + above))
        low[left_to_do], high[left_to_do] = below, above
        # The step was still taken; it gains half of slope^2 / |bend| and leaves the square of that or so.
        done = (inside & (slope**2 < 1e-6 * np.abs(bend))) | (above - below < 1e-12)
        left_to_do = left_to_do[~done]
        if not len(left_to_do):
            break
    lam = np.exp(found) - c
    polished = total * np.log(sum_of_squares / (squares / (1.0 + mu * lam)).sum(0)) - xi_df @ np.log1p(xi * lam)
    supremum = np.where(zero, 0.0, np.maximum(np.maximum(at, polished), 0.0))
    statistics: np.ndarray = supremum + total * np.log1p(left_out / sum_of_squares)
    return statistics
