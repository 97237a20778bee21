"""The Hessian of models with very many variance parameters, held against the exact one and the dense formulas."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import fit_of, table
from dense import covariance
from designs import STRUCTURES, random_design, random_theta

import mixjax as mj
from mixjax.engine import average_information, curvature
from mixjax.engine.engine import AtOnce
from mixjax.fitted.information import information
from mixjax.products import sizes
from mixjax.products.rows import rows_of

ALL = pytest.mark.parametrize("name", [name for name in STRUCTURES if "q=4" not in name])


@ALL
@pytest.mark.parametrize("reml", [True, False])
def test_all_but_the_hessian_is_exact(name, reml):
    engine = AtOnce(rows_of(random_design(STRUCTURES[name], 5)).stats, reml)
    x = engine.coordinates(random_theta(STRUCTURES[name], 6))[0][:, None]
    value, gradient, _ = average_information.evaluate(x, engine.moments, reml)
    exact = curvature.value_gradient_hessian(x, engine.moments, reml)
    np.testing.assert_allclose(value, exact[0], rtol=1e-14)
    np.testing.assert_allclose(gradient, exact[1], rtol=1e-9, atol=1e-11 * np.abs(exact[2]).max())
    ours, theirs = (of(x, engine.moments, reml) for of in (average_information.slopes, curvature.slopes_of))
    for a, b in ((ours.XX_inverse, theirs.XX_inverse), (ours.log_rss, theirs.log_rss)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max(initial=1.0))


@ALL
@pytest.mark.parametrize("reml", [True, False])
def test_the_information_is_that_of_the_quadratic_forms(name, reml):
    """``s y'P V_j P V_l P y - s / rss (y'P V_j P y)(y'P V_l P y)`` from dense matrices of rows by rows."""
    design = random_design(STRUCTURES[name], 5)
    engine = AtOnce(rows_of(design).stats, reml)
    x = engine.coordinates(random_theta(STRUCTURES[name], 6))[0][:, None]
    found = average_information._by_entries(x, engine.moments, reml)
    stats = engine.stats
    factors = [s.factor(p) for s, p in zip(stats.layout.structures, np.split(x[:, 0], np.cumsum(
        [s.k for s in stats.layout.structures])[:-1]), strict=True)]  # fmt: skip
    in_bases = [replace(t, Z=np.asarray(t.Z) @ b.R_inv) for t, b in zip(design.terms, stats.Z_bases, strict=True)]
    design = replace(design, terms=tuple(in_bases))
    H = covariance(design, [F @ F.T for F in factors], 1.0)
    H_inverse = np.linalg.inv(H)
    HX = H_inverse @ design.X
    P = H_inverse - HX @ np.linalg.solve(design.X.T @ HX, HX.T)
    y = design.y - (0.0 if design.offset is None else design.offset)
    Py, n, p = P @ y, *design.X.shape
    s = (n - p if reml else n) / (y @ Py)
    moved = []
    for f, (a, b) in found.spots:
        (t,) = [t for t, place in enumerate(stats.layout.terms)
                if place.factor == f and place.start <= a < place.start + place.q]  # fmt: skip
        start, term = stats.layout.terms[t].start, design.terms[t]
        E = np.zeros((term.Z.shape[1],) * 2)
        E[a - start, b - start] = E[b - start, a - start] = 1.0
        moved.append((term.Z @ E @ term.Z.T * (term.group[:, None] == term.group[None])) @ Py)
    moved = np.array(moved)
    wanted = s * moved @ P @ moved.T - s / (y @ Py) * np.outer(moved @ Py, moved @ Py)
    np.testing.assert_allclose(found.information, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["sleepstudy_slopes", "machines_slopes", "penicillin", "singular_rank_two",
                                  "singular_crossed_zero"])  # fmt: skip
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_fits_end_where_the_exact_hessian_ends_them(name, method, monkeypatch):
    exact = fit_of(name, method).record
    monkeypatch.setattr(sizes, "MOST_SLOPES", -1)
    engine = AtOnce(exact.stats, exact.reml)
    assert engine.is_vast
    found = exact.refitted(not exact.reml).refitted(exact.reml).estimates
    assert bool(found.converged)
    assert bool(found.singular) == bool(exact.estimates.singular)
    assert float(found.criterion) == pytest.approx(float(exact.estimates.criterion), abs=1e-8)
    np.testing.assert_allclose(found.theta, exact.estimates.theta, rtol=1e-5, atol=1e-6)


def test_degrees_of_freedom_by_average_information(monkeypatch):
    """Of a balanced design with random intercepts alone the average is the expected information, nearly."""
    data = table("Machines")
    exact = mj.lmm("score ~ Machine + (1 | Worker)", data).record
    df = exact.engine.run(information, exact.estimates.theta, exact.estimates.sigma)
    monkeypatch.setattr(sizes, "MOST_SLOPES", -1)
    other = AtOnce(exact.stats, True).run(information, exact.estimates.theta, exact.estimates.sigma)
    np.testing.assert_allclose(other.slopes, df.slopes, rtol=1e-9)
    np.testing.assert_allclose(other.covariance, df.covariance, rtol=0.3)


def test_the_gradient_of_many_effects_on_both_sides(monkeypatch):
    """12 effects a level of two crossed factors, 156 variance parameters, by differences of the criterion."""
    rng = np.random.default_rng(0)
    n_effects, levels = 12, (30, 20)
    group = [np.repeat(np.arange(levels[0]), levels[1] * 3), np.tile(np.repeat(np.arange(levels[1]), 3), levels[0])]
    Z = rng.normal(size=(len(group[0]), n_effects))
    y = rng.normal(size=len(Z)) + sum((Z * rng.normal(size=(m, n_effects))[g]).sum(1) for m, g in zip(
        levels, group, strict=True))  # fmt: skip
    terms = tuple(mj.RandomTerm(Z=Z, group=g, n_groups=m) for g, m in zip(group, levels, strict=True))
    stats = rows_of(mj.Design(y=y, X=np.ones((len(y), 1)), terms=terms)).stats
    engine = AtOnce(stats, True)
    assert not sizes.has_many_directions(stats)  # 78 matrices of 241 x 241
    monkeypatch.setattr(sizes, "MOST_SLOPES", 78 * 241**2 - 1)
    assert sizes.has_many_directions(stats)
    x = np.concatenate([s.near(0.5 * np.eye(s.q)) for s in stats.layout.structures])[:, None]
    value, gradient, H = average_information.evaluate(x, engine.moments, True)
    direction = rng.normal(size=x.shape)
    h = 1e-5
    rise = [average_information.evaluate(x + side * h * direction, engine.moments, True)[0][0] for side in (1, -1)]
    assert (rise[0] - rise[1]) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
    assert H.shape == (156, 156, 1)
    assert np.isfinite(value).all()
