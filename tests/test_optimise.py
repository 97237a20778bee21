"""The trust-region Newton method on functions that have nothing to do with mixed models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixjax.optimise import newton
from mixjax.optimise.newton import Simplify, Solution, State, by_differentiation
from mixjax.optimise.results import Result
from mixjax.optimise.straight import straight

pytestmark = pytest.mark.usefixtures("x64")


def minimise(fun, x0, simplify=None, radius=1.0, **options):
    """One lane."""
    solution = newton.minimise(by_differentiation(fun), x0[:, None], simplify, radius=radius, **options)
    return jax.tree.map(lambda a: a[..., 0], solution)


def test_rosenbrock():
    solution = minimise(lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, jnp.array([-1.2, 1.0]))
    assert int(solution.result) == Result.CONVERGED
    # 1e-9 is the foretold distance in units of the curvature, whose smallest eigenvalue here is 0.4.
    np.testing.assert_allclose(solution.x, [1.0, 1.0], rtol=5e-9)
    assert int(solution.iterations) < 40


def test_a_quadratic_takes_one_step_once_the_region_is_large_enough():
    solution = minimise(lambda x: 0.5 * (x - 3.0) @ (x - 3.0), jnp.zeros(4), radius=100.0)
    np.testing.assert_allclose(solution.x, 3.0, rtol=1e-12)
    assert int(solution.iterations) == 2


def test_leaves_a_saddle_that_it_starts_on():
    solution = minimise(lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4, jnp.zeros(2))
    assert int(solution.result) == Result.CONVERGED
    np.testing.assert_allclose(jnp.abs(solution.x), [0.0, np.sqrt(2.0)], atol=1e-8)


def test_leaves_a_maximum():
    solution = minimise(lambda x: -jnp.exp(-((x - 2.0) ** 2).sum()) + 1e-3 * (x**2).sum(), jnp.array([-1.0]))
    assert int(solution.result) == Result.CONVERGED
    assert abs(float(solution.x[0]) - 2.0) < 0.01


def test_unbounded_function_hits_the_limit():
    solution = minimise(lambda x: -(x**3).sum(), jnp.ones(1), max_iterations=20)
    assert int(solution.result) in (Result.MAX_ITERATIONS, Result.NOT_FINITE)


def test_not_finite():
    solution = minimise(lambda x: jnp.log(x).sum() * jnp.nan, jnp.ones(2))
    assert int(solution.result) == Result.NOT_FINITE
    assert int(solution.iterations) == 1


def test_steps_into_infinity_are_taken_back():
    solution = minimise(lambda x: (x - jnp.log(x)).sum(), jnp.array([10.0]), radius=50.0)
    assert int(solution.result) == Result.CONVERGED
    np.testing.assert_allclose(solution.x, 1.0, rtol=1e-9)


def directly(fun, x0, steps, is_plain=lambda x: jnp.ones(x.shape[1:], bool), region=0.5):
    state = newton.begin_directly(jnp.asarray(x0, float))
    evaluate = jax.vmap(lambda x: jax.tree.map(lambda a: a[..., 0], by_differentiation(fun)(x[:, None])), -1, -1)
    for _ in range(steps):
        state = newton.advance_directly(state, evaluate, is_plain, region)
    return state


def test_direct_steps_converge_or_give_up():
    """Lanes: a convex start; a concave one; one that leaves what is plain; one that needs more steps than it has."""
    state = directly(lambda x: jnp.cosh(x - 2.0).sum() + 8.0 / (1.0 + (x**2).sum()), [[2.6, 0.1, 9.0, 40.0]], 8,
                     is_plain=lambda x: (x[0] < 4.0) | (x[0] > 8.2))  # fmt: skip
    at = float(state.x[0, 0])
    assert state.converged.tolist() == [True, False, False, False]
    assert state.going.tolist() == [False, False, False, True]
    gradient = np.sinh(at - 2.0) - 16 * at / (1 + at**2) ** 2
    assert abs(gradient) < 1e-8
    assert float(state.x[0, 1]) == 0.1, "where the Hessian is negative the search begins at the point itself"
    assert 4.0 < float(state.x[0, 2]) < 8.2
    assert int(state.iterations[0]) <= 6
    assert int(state.iterations[3]) == 8
    assert not np.isfinite(state.solution().value[1:]).any()


def test_direct_steps_stop_where_the_value_rises():
    state = directly(lambda x: jnp.sqrt(1.0 + (10.0 * x**2).sum()), [[0.5]], 3, region=100.0)
    assert not bool(state.converged[0])
    assert not bool(state.going[0])
    assert abs(float(state.x[0, 0])) <= 0.5, "back at the best point"


FUNCTIONS = {  # function, start, radius, whether that is the end of the search
    "quadratic": (lambda x: 0.5 * ((x - 3.0) ** 2).sum(), [0.0, 1.0], 100.0, True),
    "convex": (lambda x: jnp.cosh(x - 0.3).sum() + 0.1 * (x[0] * x[1]) ** 2, [0.9, -0.4], 3.0, True),
    "the region widens": (lambda x: (x - jnp.log(x)).sum(), [0.3], 0.22, True),
    "rounding": (lambda x: 1e9 + 0.5 * ((x - 1.0) ** 2).sum() + 0.1 * (x**4).sum(), [1.3, 0.7], 3.0, True),
    "beyond the region": (lambda x: jnp.cosh(x - 1.0).sum(), [2.5, 1.0], 0.1, False),
    "a valley": (lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, [-1.2, 1.0], 1.0, False),
    "a saddle": (lambda x: x[0] ** 2 - x[1] ** 2 + 0.25 * x[1] ** 4, [0.0, 0.0], 1.0, False),
    "the value rises": (lambda x: jnp.sqrt(1.0 + (10.0 * x**2).sum()), [0.5], 1e4, False),
    "into infinity": (lambda x: (x - jnp.log(x)).sum(), [10.0], 500.0, False),
    "not a number": (lambda x: jnp.log(x).sum() * jnp.nan, [1.0, 1.0], 1.0, True),
    "without end": (lambda x: jnp.exp(-x).sum(), [0.0], 9.0, False),
    "flat": (lambda x: (x**6).sum(), [1.0], 9.0, False),
    "a simpler point": (lambda x: ((x**2).sum() - 1e-5) ** 2, [0.01], 9.0, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_steps_are_those_of_the_search(name):
    """The same points by the same evaluations, each made once; the search goes on where they end."""
    fun, x0, radius, ends = FUNCTIONS[name]
    calls = []

    def evaluate(x):
        calls.append(x)
        return tuple(np.asarray(a) for a in by_differentiation(fun)(jnp.asarray(x)))

    zero = Simplify(1, lambda x: (np.abs(x) < 0.05)[:1], lambda x, c: (np.zeros_like(x), np.zeros(x.shape, bool)))
    x0, found = np.array(x0)[:, None], []
    for plain in (True, False):
        calls.clear()
        with np.errstate(all="ignore"):
            state = straight(x0, radius, evaluate, zero) if plain else newton.begin(x0, np.full(1, radius), zero)
            assert not plain or (isinstance(state, Solution) or bool(state.done[0])) == ends
            while isinstance(state, State) and not state.done[0]:
                state = newton.advance(state, evaluate, zero, 40)
        solution = newton.solution_of(state) if isinstance(state, State) else state
        assert len(calls) == solution.iterations[0]
        found.append((solution, np.concatenate(calls, axis=1)))
    (one, ways), (other, known_ways) = found
    for field in ("result", "iterations", "free", "kink"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    np.testing.assert_allclose(ways, known_ways, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.x, other.x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.value, other.value, rtol=1e-12)
    np.testing.assert_allclose(one.scaled_gradient, other.scaled_gradient, rtol=1e-3, atol=1e-11)


def test_the_last_evaluation_is_foretold(monkeypatch):
    """Errors square from step to step: the end is known one evaluation early, and is where it was said to be."""

    def evaluate(x):
        x = x[0]
        gradient, curvature = jnp.sinh(x - 0.3) + 0.3 * x**2, jnp.cosh(x - 0.3) + 0.6 * x
        return jnp.cosh(x - 0.3) + 0.1 * x**3, gradient[None], curvature[None, None]

    starts = jnp.linspace(-0.6, 0.9, 16)[None]
    early = newton.minimise(evaluate, starts, radius=10.0)
    monkeypatch.setattr(newton, "foretold_tolerance", lambda dtype: -1.0)
    late = newton.minimise(evaluate, starts, radius=10.0)
    assert (early.result == Result.CONVERGED).all()
    assert (late.result == Result.CONVERGED).all()
    assert int((late.iterations - early.iterations).sum()) >= 4
    np.testing.assert_allclose(early.x, late.x, atol=1e-9)
    # The step is at most 1e-3 long, and its third-order term is not in what it promises.
    np.testing.assert_allclose(early.value, late.value, atol=1e-10)
    assert (early.scaled_gradient <= 1e-6).all()


def zero_last():
    return Simplify(
        n_candidates=1,
        worthwhile=lambda x: jnp.abs(x[-1:]) < 0.1,
        candidate=lambda x, c: (x.at[-1].set(0.0), jnp.ones(x.shape, bool).at[-1].set(False)),
    )


def test_simplification_is_kept_when_the_value_does_not_rise():
    solution = minimise(lambda x: (x[0] - 1) ** 2 + x[1] ** 4, jnp.array([0.0, 0.05]), zero_last())
    np.testing.assert_array_equal(solution.x[1], 0.0)
    assert not bool(solution.free[1])


def test_simplification_is_refused_at_a_saddle():
    """Two minima at +-a, only a^4 = 8e-11 below the saddle between them: less than a simplification may cost."""
    a = 0.003
    solution = minimise(
        lambda x: (x[0] - 1) ** 2 + x[1] ** 4 - 2 * a**2 * x[1] ** 2, jnp.array([0.0, 0.05]), zero_last()
    )
    np.testing.assert_allclose(solution.x[1], a, rtol=1e-2)


def test_leaves_a_saddle_too_shallow_for_the_value_to_show():
    """Negative curvature of 1e-2 between two minima 1e-9 deep: steps down make the gradient grow before it vanishes."""
    c = 2500.0
    solution = minimise(lambda x: x[0] ** 2 - 5e-3 * x[1] ** 2 + c * x[1] ** 4 + 1678.0, jnp.array([0.3, 2e-5]))
    assert int(solution.result) == Result.CONVERGED
    np.testing.assert_allclose(jnp.abs(solution.x[1]), np.sqrt(5e-3 / (2 * c)), rtol=1e-3)


@pytest.mark.parametrize("result", list(Result))
def test_every_result_has_a_message(result):
    assert len(result.message) > 5
