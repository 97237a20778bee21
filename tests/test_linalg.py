"""NumPy's large matrices: inverses where they stand, and products by the BLAS of LAPACK."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixjax import linalg

EPS = {np.float64: 2e-16, np.float32: 1e-7}


def positive(n, dtype, seed=0):
    root = np.random.default_rng(seed).normal(size=(n, n + 5))
    return (root @ root.T / n + np.eye(n)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n", [2, 95, 96, 127, 128, 129, 256, 300])
def test_inverse_and_determinant(n, dtype):
    """Below, at and above the size that is inverted in place, and whole and broken pieces of it."""
    M = positive(n, dtype)
    before = M.copy()
    inverse, logdet = linalg.inverse_logdet(M)
    np.testing.assert_array_equal(M, before)
    assert inverse.dtype == dtype
    condition = np.linalg.cond(before.astype(float))
    error = np.abs(inverse @ before - np.eye(n)).max()
    assert error < 10 * n * EPS[dtype] * condition
    if n >= linalg.IN_PLACE:
        np.testing.assert_array_equal(inverse, inverse.T)
    assert logdet == pytest.approx(np.linalg.slogdet(before.astype(float))[1], rel=n * EPS[dtype] * 10)


@pytest.mark.parametrize("n", [3, 130])
def test_what_is_not_positive_definite_is_nan(n):
    M = positive(n, np.float64)
    M[1, 1] = -1.0
    inverse, logdet = linalg.inverse_logdet(M)
    assert np.isnan(inverse).all() or n < 7  # small ones are eliminated without a look
    assert np.isnan(logdet)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("turn_A", [False, True])
@pytest.mark.parametrize("turn_B", [False, True])
@pytest.mark.parametrize(("i", "j", "k"), [(3, 4, 5), (120, 80, 90), (200, 70, 1), (1, 9000, 2)])
def test_products_in_every_order_of_memory(dtype, turn_A, turn_B, i, j, k):
    rng = np.random.default_rng(i)
    A, B = rng.normal(size=(i, j)).astype(dtype), rng.normal(size=(j, k)).astype(dtype)
    own = [np.asfortranarray(A) if turn_A else A, np.asfortranarray(B) if turn_B else B]
    found = linalg.product(*own)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, A @ B, rtol=0, atol=4 * j * EPS[dtype] * np.abs(A).max() * np.abs(B).max())
    # A part of a larger array is neither one nor the other.
    wide = np.zeros((i + 2, j + 3), dtype)
    wide[1:-1, 2:-1] = A
    np.testing.assert_array_equal(linalg.product(wide[1:-1, 2:-1], B).shape, (i, k))
    np.testing.assert_allclose(linalg.product(wide[1:-1, 2:-1], B), found, rtol=0, atol=4 * j * EPS[dtype] * 30)


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("trailing", [((4,), (1,)), ((1, 4), (3, 1)), ((3, 1), (3, 4)), ((1, 1), (1, 1)), ((4,), ())])
def test_products_broadcast_also_where_there_is_nothing(xp, trailing):
    """A design without fixed effects has matrices of no rows, and as many lanes as any other."""
    for i, j, k in itertools.product((0, 1, 2, 9) if xp is np else (0, 2), repeat=3):
        rng = np.random.default_rng(i + 10 * j + 100 * k)
        A, B = rng.normal(size=(i, j, *trailing[0])), rng.normal(size=(j, k, *trailing[1]))
        wanted = np.einsum("ij...,jk...->ik...", A, B)
        with jax.enable_x64(True):
            found = linalg.matmul(xp.asarray(A), xp.asarray(B))
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=4 * j * EPS[np.float64] * 16)


def test_products_of_whole_numbers_stay_whole():
    A = np.arange(200 * 100).reshape(200, 100)
    found = linalg.product(A, A.T)
    assert found.dtype == A.dtype
    np.testing.assert_array_equal(found, A @ A.T)
