"""Profiles of structures of correlated effects: against an independent minimisation of a dense likelihood, against the
same models in other words, at the ends of ranges."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from test_structures_fits import fit_of, three
from test_structures_own import named, own

import mixjax as mj
from mixjax import covariance as cov
from mixjax.covariance import sections
from mixjax.covariance.natural import natural_derivatives

Z = 1.959963984540054
LAG = abs(np.subtract.outer(range(3), range(3)))


def correlations(name, c):
    """``(3, 3)`` from the correlations that are reported."""
    if name in ("ar1", "hetar1"):
        return c[0] ** LAG
    if name in ("cs", "homcs"):
        return np.where(LAG == 0, 1.0, c[0])
    if name in ("toep", "homtoep"):
        return np.array([1.0, c[0], c[1]])[LAG]
    if name == "adh":
        return np.array([[1, c[0], c[0] * c[1]], [c[0], 1, c[1]], [c[0] * c[1], c[1], 1]])
    return np.eye(3)


@cache
def dense_data():
    data = three()
    visit = data["visit"].str[1:].astype(int).to_numpy() - 1
    alike = data["subject"].to_numpy()[:, None] == data["subject"].to_numpy()
    X = np.column_stack([np.ones(len(data)), data["t"]])
    return data["y"].to_numpy(), X, visit, alike


def least_deviance(name, n_sds, n_cors, held, value, start):
    """-2 log-likelihood, minimised by SciPy over what is not held: sds and sigma as logarithms, correlations from
    unconstrained numbers between the ends of their ranges, which for the first of Toeplitz follow from the second."""
    y, X, visit, alike = dense_data()
    k = n_sds + n_cors + 1

    def ends(j, cors):
        if name in ("cs", "homcs"):
            return -0.5, 1.0
        if name in ("toep", "homtoep"):
            if j == 1 and held != n_sds + 1:
                return 2 * cors[0] ** 2 - 1, 1.0
            if j == 0 and held == n_sds + 1:
                most = np.sqrt((1 + value) / 2)
                return -most, most
        return -1.0, 1.0

    def natural(u):
        p, cors = np.empty(k), []
        u = list(u)
        p[:n_sds] = [value if i == held else np.exp(u.pop(0)) for i in range(n_sds)]
        for j in range(n_cors):
            if held == n_sds + j:
                p[n_sds + j] = value
            else:
                low, high = ends(j, cors)
                p[n_sds + j] = low + (high - low) * (1 + np.sin(u.pop(0))) / 2
            cors.append(p[n_sds + j])
        p[-1] = value if held == k - 1 else np.exp(u.pop(0))
        return p

    def deviance(u):
        p = natural(u)
        sd = np.broadcast_to(p[:n_sds], 3)
        Sigma = sd[:, None] * correlations(name, p[n_sds:-1]) * sd
        V = alike * Sigma[visit[:, None], visit] + p[-1] ** 2 * np.eye(len(y))
        C = np.linalg.cholesky(V)
        yX = np.linalg.solve(C, np.column_stack([y, X]))
        free = yX[:, 1:] if held < k else np.delete(yX[:, 1:], held - k, 1)
        own = yX[:, 0] - (value * yX[:, 1 + held - k] if held >= k else 0.0)
        r = own - free @ np.linalg.lstsq(free, own, rcond=None)[0]
        return len(y) * np.log(2 * np.pi) + 2 * np.log(C.diagonal()).sum() + r @ r

    u0 = []
    for i in range(k):
        if i == held:
            continue
        if i < n_sds or i == k - 1:
            u0.append(np.log(start[i]))
        else:
            u0.append(np.arcsin(0.5))
    found = [
        scipy.optimize.minimize(deviance, np.array(u0) + 0.1 * shift, method="BFGS", options={"gtol": 1e-6})
        for shift in (0.0, 1.0)
    ]
    return min(one.fun for one in found)


@pytest.mark.parametrize("name", ["ar1", "hetar1", "cs", "homcs", "adh", "toep", "homdiag"])
def test_at_the_ends_of_intervals_the_deviance_has_risen_as_it_should(name):
    """By 1.96^2, as a dense likelihood minimised by SciPy says, whose gradients are differences; less where an interval
    ends with the range. Of every correlation, and of what else there is in the smallest model."""
    fit = fit_of(name, reml=False)
    frame = fit.confint()
    estimates = fit.variance_parameters()["estimate"]
    names = list(frame.index)
    n_sds, n_cors = (sum(row.startswith(kind) for row in names) for kind in ("sd", "cor"))
    looked_at = [row for row in names if name == "ar1" or row.startswith("cor") or row == names[0]]
    for row in looked_at:
        i = names.index(row)
        for side in ("lower", "upper"):
            value = frame.loc[row, side]
            on_bound = row in frame.attrs["boundary"] and abs(value) == 1.0
            if on_bound:
                value = np.sign(value) * (1 - 1e-7)
            least = least_deviance(name, n_sds, n_cors, i, value, estimates.to_numpy())
            rise = least - fit.criterion
            if on_bound:
                assert rise < Z**2
            else:
                assert rise == pytest.approx(Z**2, abs=2e-5), (row, side)
    inside = frame.loc[estimates.index]
    assert ((inside["lower"] < estimates) & (estimates < inside["upper"])).all()


# What is the same model of two effects: standard deviations and a correlation, or one of each.
TWO = {"hetar1": "us", "cs": "us", "toep": "us", "adh": "us", "ar1": "homcs", "homtoep": "homcs"}


@cache
def two():
    return three()[three()["visit"] != "v2"]


@cache
def intervals(structure, kind):
    formula = f"{'y' if kind == 'lmm' else 'count'} ~ t + {structure}(0 + visit | subject)"
    fit = mj.lmm(formula, two(), reml=False) if kind == "lmm" else mj.glmm(formula, two(), family="poisson")
    frame = fit.confint()
    return frame.iloc[np.argsort([row[:2] for row in frame.index], kind="stable")]


@pytest.mark.parametrize(("name", "kind"), [*((name, "lmm") for name in TWO), ("cs", "glmm"), ("homtoep", "glmm")])
def test_of_two_effects_they_are_those_of_the_same_model(name, kind):
    """To 1e-5: limits are where zeta is as wanted to 1e-7, and near an end of a range zeta is nearly level."""

    mine, theirs = intervals(name, kind), intervals(TWO[name], kind)
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert len(mine.attrs["boundary"]) == len(theirs.attrs["boundary"])


def test_zeta_of_a_row_and_its_conditional_estimates():
    fit = fit_of("homtoep", reml=False)
    profile = fit.profile("cor_lag2|subject")
    table = profile.to_frame(largest=2.0, points=5)
    assert list(table.columns[:3]) == ["parameter", "value", "zeta"]
    for _, row in table.iterrows():
        lag1, lag2 = row["cor_lag1|subject"], row["value"]
        assert row["cor_lag2|subject"] == lag2
        assert np.linalg.eigvalsh(np.array([1.0, lag1, lag2])[LAG])[0] > -1e-8
    assert profile.zeta("cor_lag2|subject", [table["value"].iloc[1]])[0] == pytest.approx(table["zeta"].iloc[1])


@pytest.mark.parametrize("kind", ["lmm", "glmm"])
def test_a_structure_of_ones_own_has_those_of_the_built_in_one(kind):
    """Of a generalised model the interval ends with the range, of which the limit is all that is known."""

    def fitted(structure):
        if kind == "lmm":
            return mj.lmm(f"y ~ t + {structure}(0 + visit | subject)", three(), reml=False)
        return mj.glmm(f"count ~ t + {structure}(0 + visit | subject)", three(), family="poisson")

    wanted = fitted("ar1").confint(["sd|subject", "cor_lag1|subject"])
    np.testing.assert_allclose(fitted("named").confint(["sd|subject", "rho|subject"]), wanted, atol=1e-6)
    if kind == "lmm":
        np.testing.assert_allclose(np.tanh(fitted("own").confint("z|subject")), wanted.iloc[1:], rtol=1e-6)


def test_beside_other_terms():
    """Also with a parameter of these held: of two effects hetar1 is us, and diag is two terms."""
    rng, data = np.random.default_rng(5), two()
    rater, first = rng.integers(8, size=len(data)), (data["t"] == 1).to_numpy() * 1.0
    effects = rng.normal(size=(8, 2)) * [1.0, 1.5]
    shift = np.where(first > 0, effects[rater, 0], effects[rater, 1])
    data = data.assign(y=data["y"] + shift, rater=rater.astype(str), first=first, last=1.0 - first)
    mine = mj.lmm("y ~ t + ar1(0 + visit | subject) + diag(0 + first + last | rater)", data, reml=False)
    theirs = mj.lmm("y ~ t + homcs(0 + visit | subject) + (0 + first | rater) + (0 + last | rater)", data, reml=False)
    a, b = mine.confint(), theirs.confint()
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert list(a.index[2:4]) == ["sd_first|rater", "sd_last|rater"]


@pytest.mark.parametrize("name", ["ar1", "hetar1", "cs", "homcs", "adh", "toep", "homtoep", "homdiag"])
@pytest.mark.parametrize("seed", range(3))
def test_sections(name, seed):
    """Every point of one has the value; derivatives by differences."""
    rng = np.random.default_rng(seed)
    s = cov.structure_of(name, 4)
    x = s.exponentials(0.5 * rng.normal(size=s.k))
    F, R = s.factor(x), 1.7 * np.eye(4)
    values = natural_derivatives(s, x[:, None])[0][0]
    for place, parameter in enumerate(s.natural):
        value = np.sqrt(values[place]) * 0.9 if parameter.kind == "sd" else 0.8 * values[place] + 0.05
        held = sections.at_value(s, parameter, value, R, F)
        section, k = held.structure, held.structure.k
        assert k == s.k - 1
        y = held.start[:, None] + 0.02 * rng.normal(size=(k, 2))
        a, b = np.array(cov.pairs_of(4)).T

        def entries(y, section=section, a=a, b=b):
            G = section.factor(y)
            return np.einsum("abl,cbl->acl", G, G)[a, b]

        D = np.zeros((4, 4))
        D[a, b] = D[b, a] = entries(y)[:, 0]
        if parameter.kind == "sd":
            assert np.sqrt(D[parameter.i, parameter.i]) / 1.7 == pytest.approx(value, rel=1e-10)
        else:
            i, j = parameter.i, parameter.j
            assert D[i, j] / np.sqrt(D[i, i] * D[j, j]) == pytest.approx(value, abs=1e-10)
        g, h = rng.normal(size=(len(a), 2)), 1e-6
        for i in range(k):
            step = h * np.eye(k)[i][:, None]
            slope = (entries(y + step) - entries(y - step)) / (2 * h)
            np.testing.assert_allclose(section.jacobian(y)[:, i], slope, rtol=1e-6, atol=1e-7)
            bent = [np.einsum("pb,pkb->kb", g, section.jacobian(y + sign * step)) for sign in (1, -1)]
            np.testing.assert_allclose(section.curvature(y, g)[i], (bent[0] - bent[1]) / (2 * h), rtol=1e-5, atol=1e-6)


def test_ranges():
    assert sections.range_of(cov.structure_of("cs", 5).natural[-1], cov.structure_of("cs", 5)) == (-0.25, 1.0)
    assert sections.range_of(cov.structure_of("ar1", 5).natural[-1], cov.structure_of("ar1", 5)) == (-1.0, 1.0)
    assert sections.range_of(named.of(3).natural[-1], named.of(3)) == (-1.0, 1.0)
    assert sections.range_of(own.of(3).natural[-1], own.of(3)) == (-np.inf, np.inf)
    positive = mj.Covariance(named.fun, k=1, natural=jnp.exp)
    assert sections.range_of(positive.of(3).natural[-1], positive.of(3)) == (0.0, np.inf)
    R, F = np.eye(3), np.linalg.cholesky(0.5 * np.eye(3) + 0.5)
    assert sections.at_value(named.of(3), named.of(3).natural[-1], 0.9, R, F) is not None
    assert sections.at_value(positive.of(3), positive.of(3).natural[-1], -3.0, R, F) is not None  # come near to
