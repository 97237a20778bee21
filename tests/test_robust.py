"""Cluster-robust covariances: a dense textbook form, closed forms, exact expectations, invariances."""

from dataclasses import replace

import dense
import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table
from designs import STRUCTURES, Structure, random_design, random_theta
from scipy import stats as distributions

import mixjax as mj
from mixjax.checks import InferenceWarning
from mixjax.covariance import split_theta, triangle
from mixjax.design import Labels, TermLabels
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.record import Fitted, OptimizerInfo
from mixjax.inference.fixed import clusters as room
from mixjax.inference.fixed.robust import KINDS, robust

SIGMA = 1.3
NESTED = ["one factor, q=1", "one factor, q=2, weights", "two terms on a factor", "nested", "nested chain of three"]
# One more cluster-level column, unequal arms.
SMALL = Structure(((2, 6, "free"),))


# --- fits without fitting: any design, any theta, beta by generalised least squares --------------------------------


def record(design, theta, sigma=SIGMA):
    p = design.X.shape[1]
    names: list[str] = []
    for t, term in enumerate(design.terms):
        same = [s for s in range(t) if np.array_equal(design.terms[s].group, term.group)]
        names.append(names[same[0]] if same else f"g{t}")
    terms = tuple(
        TermLabels(name, tuple(f"e{t}{j}" for j in range(term.Z.shape[1])), tuple(map(str, range(term.n_groups))))
        for t, (name, term) in enumerate(zip(names, design.terms, strict=True))
    )
    frame = pd.DataFrame({"row": np.arange(len(design.y)) // 1.0})
    labels = Labels("y ~ ...", "y", tuple(f"x{j}" for j in range(p)), terms, frame)
    stats = mj.cross_products(design)
    Sigmas = sigmas_of(theta, stats.layout.qs, sigma)
    W = np.linalg.inv(dense.covariance(design, Sigmas, sigma))
    y = design.y - (0.0 if design.offset is None else design.offset)
    vcov = np.linalg.inv(design.X.T @ W @ design.X)
    beta = vcov @ design.X.T @ W @ y
    est = Estimates(theta, beta, np.float64(sigma), Sigmas, vcov, (), 0.0, True, False, 0, 0.0, 0)
    return Fitted(labels, stats, est, True, OptimizerInfo("", 0, 0.0, ""), design)


def sigmas_of(theta, qs, sigma):
    result = []
    for part, q in zip(split_theta(theta, qs), qs, strict=True):
        Lambda = np.zeros((q, q))
        Lambda[triangle(q)] = part
        result.append(sigma**2 * Lambda @ Lambda.T)
    return tuple(result)


def random_record(name, seed=0, **options):
    structure = STRUCTURES[name] if isinstance(name, str) else name
    return record(random_design(structure, seed, **options), random_theta(structure, seed))


def outermost(fitted):
    return min((term.group for term in fitted.design.terms), key=lambda group: len(np.unique(group)))


def with_response(fitted, y):
    """The same working model; y without the offset."""
    offset = 0.0 if fitted.design.offset is None else fitted.design.offset
    return record(replace(fitted.design, y=y + offset), fitted.estimates.theta, fitted.estimates.sigma)


def covariance_of(fitted):
    return dense.covariance(fitted.design, fitted.estimates.Sigma, fitted.estimates.sigma)


# --- the textbook ----------------------------------------------------------------------------------------------------


def textbook(fitted, cluster, kind):
    """Dense: (vcov, P) with ``P[s, t, i, j] = p_si' V p_tj`` of the unit contrasts (Pustejovsky & Tipton 2018)."""
    X = fitted.design.X
    offset = 0.0 if fitted.design.offset is None else fitted.design.offset
    V = covariance_of(fitted)
    W = np.linalg.inv(V)
    M = np.linalg.inv(X.T @ W @ X)
    residual_maker = np.eye(len(V)) - X @ M @ X.T @ W
    clusters = np.unique(cluster)
    # p_sj: the estimated variance of s is sum_j (p_sj' y)^2.
    p = np.zeros((X.shape[1], len(clusters), len(V)))
    for j, level in enumerate(clusters):
        rows = np.flatnonzero(cluster == level)
        D = np.linalg.cholesky(V[np.ix_(rows, rows)]).T
        A = np.eye(len(rows))
        if kind == "CR2":
            maker = residual_maker[rows]
            B = D @ maker @ V @ maker.T @ D.T
            values, vectors = np.linalg.eigh(B)
            root = np.where(values > 1e-9 * values.max(), 1 / np.sqrt(np.abs(values)), 0.0)
            A = D.T @ (vectors * root) @ vectors.T @ D
        W_j = np.linalg.inv(V[np.ix_(rows, rows)])
        p[:, j] = M @ X[rows].T @ W_j @ A @ residual_maker[rows]
    if kind == "CR1":
        p *= np.sqrt(len(clusters) / (len(clusters) - 1))
    scores = p @ (fitted.design.y - offset)
    return scores @ scores.T, np.einsum("sin,nk,tjk->stij", p, V, p)


def textbook_df(P, c):
    of_c = np.einsum("s,stij,t->ij", c, P, c)
    return np.trace(of_c) ** 2 / (of_c**2).sum()


def textbook_eta(P, C):
    P = np.einsum("as,stij,bt->abij", C, P, C)
    values, vectors = np.linalg.eigh(np.einsum("stii->st", P))
    scale = (vectors / np.sqrt(values)) @ vectors.T
    P = np.einsum("as,stij,bt->abij", scale, P, scale)
    q = len(C)
    pairs = [(s, t) for s in range(q) for t in range(q)]
    return q * (q + 1) / sum((P[s, t] * P[t, s]).sum() + (P[s, s] * P[t, t]).sum() for s, t in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NESTED)
def test_against_the_textbook(name, kind):
    fitted = random_record(name, p=3)
    vcov, P = textbook(fitted, outermost(fitted), kind)
    result = robust(fitted, kind=kind)
    np.testing.assert_allclose(result.vcov, vcov, rtol=1e-8, atol=1e-10 * vcov.max())
    C = np.vstack([np.eye(3), [[0.5, -1.0, 2.0]]])
    frame = result.test(C, joint=False)
    np.testing.assert_allclose(frame["df"], [textbook_df(P, c) for c in C], rtol=1e-7)
    np.testing.assert_allclose(frame["std_error"], np.sqrt(np.diag(C @ vcov @ C.T)), rtol=1e-8)
    np.testing.assert_allclose(frame["estimate"], C @ fitted.estimates.beta, rtol=1e-12)
    np.testing.assert_allclose(frame["statistic"], frame["estimate"] / frame["std_error"], rtol=1e-12)
    np.testing.assert_allclose(frame["p_value"], 2 * distributions.t.sf(abs(frame["statistic"]), frame["df"]))
    C = C[1:3]
    eta = textbook_eta(P, C)
    value = C @ fitted.estimates.beta
    spread = C @ vcov @ C.T
    if eta > 1 and np.linalg.cond(spread) < 1e8:
        F = (eta - 1) / (2 * eta) * value @ np.linalg.solve(spread, value)
        joint = result.test(C).iloc[0]
        np.testing.assert_allclose(joint[["den_df", "statistic"]].astype(float), [eta - 1, F], rtol=1e-6)
        np.testing.assert_allclose(joint["p_value"], distributions.f.sf(F, 2, eta - 1), rtol=1e-5)
    else:  # of two clusters, whose scores add up to zero
        with pytest.warns(InferenceWarning, match="no joint robust test"):
            assert np.isnan(result.test(C)["p_value"].iloc[0])
    assert result.n_clusters == len(np.unique(outermost(fitted)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sleepstudy_weighted_offset", "machines_nested", "orthodont"])
def test_fits_against_the_textbook(name, kind):
    fitted = fit_of(name, "REML").record
    vcov, P = textbook(fitted, outermost(fitted), kind)
    result = robust(fitted, kind=kind)
    np.testing.assert_allclose(result.vcov, vcov, rtol=1e-6, atol=1e-8 * np.abs(vcov).max())
    units = np.eye(len(vcov))
    np.testing.assert_allclose(result.to_frame()["df"], [textbook_df(P, c) for c in units], rtol=1e-6)


def test_published_numbers():
    """clubSandwich, help page of vcovCR.lmerMod: ``vcovCR(sleep_fit, type = "CR2")``, 6 decimals."""
    result = robust(fit_of("sleepstudy_slopes", "REML"))
    np.testing.assert_allclose(result.vcov, [[46.574572, -1.451096], [-1.451096, 2.389463]], atol=2e-6)


# --- exact moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nested", "one factor, q=2, weights"])
def test_cr2_is_unbiased_under_the_working_model(name):
    """A quadratic form y'Qy has mean tr(QV) = sum_k l_k' Q l_k over the columns of a root of V."""
    fitted = random_record(name, n=24)
    points = np.linalg.cholesky(covariance_of(fitted)).T
    mean = {
        kind: sum(robust(with_response(fitted, y), kind=kind).vcov.to_numpy() for y in points)
        for kind in ("CR2", "CR0")
    }
    model = fitted.estimates.vcov
    np.testing.assert_allclose(mean["CR2"], model, rtol=1e-8, atol=1e-9 * np.abs(model).max())
    assert (np.diag(mean["CR0"]) < 0.95 * np.diag(model)).all()


@pytest.mark.parametrize("kind", ["CR2", "CR0"])
def test_df_are_those_of_the_estimated_variance(kind):
    """``2 E^2 / Var`` with ``E = tr(QV)``, ``Var = 2 tr(QVQV)``, Q from the estimator itself by polarisation."""
    fitted = random_record(SMALL, n=16)
    root = np.linalg.cholesky(covariance_of(fitted)).T
    variance = lambda y: np.diag(robust(with_response(fitted, y), kind=kind).vcov)  # noqa: E731
    form = np.zeros((16, 16, 2))
    for k in range(16):
        form[k, k] = variance(root[k])
    for k in range(16):
        for i in range(k):
            form[i, k] = form[k, i] = (variance(root[i] + root[k]) - form[i, i] - form[k, k]) / 2
    expected = np.einsum("kkp->p", form) ** 2 / (form**2).sum((0, 1))
    np.testing.assert_allclose(robust(fitted, kind=kind).to_frame()["df"], expected, rtol=1e-6)


# --- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dyestuff", "dyestuff2"])  # the second with variance 0
def test_balanced_one_way(name):
    fit = fit_of(name, "REML")
    data = table(name.capitalize())
    means = data.groupby("Batch", observed=True)["Yield"].mean()
    m = len(means)
    for kind, factor in (("CR2", 1.0), ("CR1", 1.0), ("CR0", (m - 1) / m)):
        result = robust(fit, kind=kind)
        assert result.vcov.iloc[0, 0] == pytest.approx(factor * means.var() / m, rel=1e-9)
        assert result.to_frame()["df"].iloc[0] == pytest.approx(m - 1, rel=1e-9)


def test_two_arms_are_compared_as_by_welch():
    """Cluster-level treatment, equal clusters: variance s_1^2 / m_1 + s_2^2 / m_2 of the clusters' means."""
    rng = np.random.default_rng(1)
    m1, m2, n = 3, 5, 4
    group = np.repeat(np.arange(m1 + m2), n)
    arm = (group < m1).astype(float)
    term = mj.RandomTerm(np.ones((len(group), 1)), group, m1 + m2)
    design = mj.Design(rng.normal(size=len(group)), np.column_stack([np.ones(len(group)), arm]), (term,))
    result = robust(record(design, np.array([0.8])))
    means = design.y.reshape(-1, n).mean(1)
    s1, s2 = means[:m1].var(ddof=1), means[m1:].var(ddof=1)
    row = result.to_frame().loc["x1"]
    assert row["std_error"] == pytest.approx(np.sqrt(s1 / m1 + s2 / m2), rel=1e-10)
    # Welch's df with equal variances, which is what the working model says.
    df = (1 / m1 + 1 / m2) ** 2 / (1 / (m1**2 * (m1 - 1)) + 1 / (m2**2 * (m2 - 1)))
    assert row["df"] == pytest.approx(df, rel=1e-10)


def test_equal_clusters_give_hotelling():
    """With the same X and Z in every cluster, least squares cluster by cluster is all there is."""
    result = robust(fit_of("sleepstudy_slopes", "REML"))
    data = table("sleepstudy")
    coefficients = np.stack(
        [np.polyfit(d.Days, d.Reaction, 1)[::-1] for _, d in data.groupby("Subject", observed=True)]
    )
    m, q = coefficients.shape
    covariance = np.cov(coefficients.T) / m
    np.testing.assert_allclose(result.vcov, covariance, rtol=1e-9)
    row = result.test([{"Intercept": 1}, "Days = 10"]).iloc[0]
    difference = coefficients.mean(0) - [0, 10]
    T2 = difference @ np.linalg.solve(covariance, difference)
    F = (m - q) / (q * (m - 1)) * T2
    np.testing.assert_allclose(row.astype(float), [q, m - q, F, distributions.f.sf(F, q, m - q)], rtol=1e-8)
    one = result.test("Days = 10")
    again = result.test("Days = 10", joint=True)
    assert again["statistic"].iloc[0] == pytest.approx(one["statistic"].iloc[0] ** 2, rel=1e-9)
    assert again["p_value"].iloc[0] == pytest.approx(one["p_value"].iloc[0], rel=1e-9)
    assert again["den_df"].iloc[0] == pytest.approx(m - 1, rel=1e-9)


# --- invariances ---------------------------------------------------------------------------------------------------


def same(a, b, scale=1.0, rtol=1e-8):
    np.testing.assert_allclose(b.vcov, a.vcov * scale, rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(b.to_frame()["df"], a.to_frame()["df"], rtol=rtol)


def test_rows_and_names_do_not_matter():
    fitted = random_record("nested")
    design, rng = fitted.design, np.random.default_rng(0)
    rows = rng.permutation(len(design.y))
    terms = []
    for term in design.terms:
        name = rng.permutation(term.n_groups)
        terms.append(replace(term, Z=term.Z[rows], group=name[term.group[rows]]))
    shuffled = mj.Design(design.y[rows], design.X[rows], tuple(terms), offset=design.offset[rows])
    same(robust(fitted), robust(record(shuffled, fitted.estimates.theta)))


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_not_matter(kind):
    fitted = random_record("one factor, q=2, weights")
    design, unit = fitted.design, np.array([1.0, 1e4])
    rescaled = replace(design, X=design.X * unit, y=100 * design.y, offset=100 * design.offset)
    scale = np.outer(100 / unit, 100 / unit)
    same(robust(fitted, kind=kind), robust(record(rescaled, fitted.estimates.theta, 100 * SIGMA), kind=kind), scale)
    joint = [
        robust(f, kind=kind).test(np.eye(2)).to_numpy() for f in (fitted, record(rescaled, fitted.estimates.theta))
    ]
    np.testing.assert_allclose(joint[0][0, :2], joint[1][0, :2], rtol=1e-7)


def test_a_column_far_from_zero():
    """Years instead of years since 2000."""
    fitted = random_record("nested", p=3)
    design = fitted.design
    shift = np.array([[1.0, 2000.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    result = robust(record(replace(design, X=design.X @ shift), fitted.estimates.theta))
    np.testing.assert_allclose(result.vcov.iloc[1:, 1:], robust(fitted).vcov.iloc[1:, 1:], rtol=1e-7)


@pytest.mark.parametrize("theta", [0.7, 0.0, 1000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_coordinates_say_the_same(kind, theta):
    """Without weights, clusters are reduced to the span of X and Z; weights of 1 prevent that.

    With theta = 1000 eigenvalues of V range over seven decades, those of B over fourteen.
    """
    fitted = record(random_design(STRUCTURES["one factor, q=1"], 0, p=3), np.array([theta]))
    assert np.bincount(fitted.design.terms[0].group).max() > 4
    ones = record(replace(fitted.design, weights=np.ones(len(fitted.design.y))), fitted.estimates.theta)
    same(robust(fitted, kind=kind), robust(ones, kind=kind), rtol=1e-7)


def test_stacks_do_not_matter(monkeypatch):
    fit = fit_of("sleepstudy_slopes", "REML")
    whole = robust(fit)
    monkeypatch.setattr(room, "STACK", 700)
    same(whole, robust(fit))


# --- clusters ------------------------------------------------------------------------------------------------------


def test_clusters_by_name_array_and_series():
    fit = fit_of("sleepstudy_slopes", "REML")
    data = table("sleepstudy")
    default = robust(fit)
    assert (default.cluster, default.n_clusters, default.kind) == ("Subject", 18, "CR2")
    for cluster in ("Subject", data["Subject"], data["Subject"].to_numpy(), data["Subject"].sample(frac=1.0)):
        same(default, robust(fit, cluster))
    longer = pd.concat([data["Subject"], pd.Series(["x", None], index=[1000, 1001])])
    same(default, robust(fit, longer))
    pairs = (data["Subject"].cat.codes // 2).rename("pair")
    paired = robust(fit, pairs)
    assert (paired.cluster, paired.n_clusters) == ("pair", 9)
    vcov, _ = textbook(fit.record, pairs.to_numpy(), "CR2")
    np.testing.assert_allclose(paired.vcov, vcov, rtol=1e-7)


def test_nested_factors_give_the_outermost():
    result = robust(fit_of("pastes_nested", "REML"))
    assert (result.cluster, result.n_clusters) == ("batch", 10)


REFUSED = {
    "crossed": ("penicillin", {}, "'plate', 'sample' cross"),
    "shared levels": ("sleepstudy_slopes", {"cluster": np.arange(180) % 9}, "'Subject' have rows in several clusters"),
    "inner factor": (
        "pastes_nested",
        {"cluster": "cask:batch"},
        "'batch' have rows in several clusters of 'cask:batch'",
    ),
    "one cluster": ("sleepstudy_slopes", {"cluster": np.zeros(180)}, "'cluster' has one cluster"),
    "unknown column": ("sleepstudy_slopes", {"cluster": "subject"}, "no column 'subject'.*did you mean 'Subject'"),
    "wrong length": ("sleepstudy_slopes", {"cluster": np.zeros(7)}, r"\(7,\)"),
    "missing": ("sleepstudy_slopes", {"cluster": [None] * 10 + ["a"] * 90 + ["b"] * 80}, "missing in 10"),
    "kind": ("sleepstudy_slopes", {"kind": "CR4"}, "kind must be one of 'CR2', 'CR1', 'CR0', got 'CR4'"),
    "contrast": ("sleepstudy_slopes", {"L": "days"}, "days"),
}


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        robust(fit_of(name, "REML"), **arguments)


def test_no_fixed_effects():
    fitted = random_record("one factor, q=1")
    with pytest.raises(ValueError, match="no fixed effects"):
        robust(replace(fitted, labels=replace(fitted.labels, fixed=())))


# --- where robust inference ends -------------------------------------------------------------------------------------


def test_a_column_of_one_cluster_has_no_robust_standard_error():
    fitted = random_record("one factor, q=2, weights", p=2)
    design = fitted.design
    X = np.column_stack([design.X, design.terms[0].group == 3])
    fitted = record(replace(design, X=X), fitted.estimates.theta)
    vcov, P = textbook(fitted, outermost(fitted), "CR2")
    result = robust(fitted)
    np.testing.assert_allclose(result.vcov.iloc[:2, :2], vcov[:2, :2], rtol=1e-7)
    with pytest.warns(InferenceWarning, match="no robust standard error of 'x2'"):
        frame = result.to_frame()
    assert np.isnan(frame.loc["x2", ["std_error", "df", "statistic", "p_value"]].astype(float)).all()
    np.testing.assert_allclose(frame["df"].iloc[:2], [textbook_df(P, c) for c in np.eye(3)[:2]], rtol=1e-6)
    with pytest.warns(InferenceWarning, match="no joint robust test of 2 hypotheses"):
        assert np.isnan(result.test(np.eye(3)[1:])["p_value"].iloc[0])
    one = result.test([1.0, -1.0, 0.0])
    assert one["df"].iloc[0] == pytest.approx(textbook_df(P, np.array([1.0, -1.0, 0.0])), rel=1e-6)


def test_too_few_clusters_for_a_joint_test():
    result = robust(random_record(Structure(((1, 3, "free"),)), p=5))
    with pytest.warns(InferenceWarning, match="no joint robust test of 4 hypotheses: 3 clusters"):
        row = result.test(np.eye(5)[1:]).iloc[0]
    assert np.isnan(row["p_value"])
    assert row["num_df"] == 4


def test_redundant_and_contradicting_hypotheses():
    result = robust(random_record("one factor, q=1", p=3))
    L = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
    two, three = result.test(L[:2]), result.test(L)
    np.testing.assert_allclose(three.to_numpy(), two.to_numpy(), rtol=1e-9)
    with pytest.raises(ValueError, match="contradict"):
        result.test([*L[:2], "x1 - x2 = 1"])


def test_frames():
    fit = fit_of("sleepstudy_slopes", "REML")
    result = robust(fit)
    frame = result.to_frame()
    assert list(frame.index) == ["Intercept", "Days"]
    assert frame.index.name == "term"
    assert list(frame.columns) == ["estimate", "std_error", "df", "statistic", "p_value"]
    assert (frame.dtypes == np.float64).all()
    reach = distributions.t.ppf(0.95, 17) * frame["std_error"]
    np.testing.assert_allclose(result.confint(0.9), np.stack([frame["estimate"] - reach, frame["estimate"] + reach], 1))
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        result.confint(95)
    shown = robust(fit, L=[{"Intercept": 1, "Days": 5}, "Days = 10"]).to_frame()
    np.testing.assert_allclose(shown["estimate"], [[1, 5], [0, 1]] @ fit.fixef.to_numpy())
    assert shown["statistic"].iloc[1] == pytest.approx((fit.fixef["Days"] - 10) / frame.loc["Days", "std_error"])
    assert "CR2, 18 clusters: Subject" in repr(result)
