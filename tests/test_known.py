"""Random effects whose levels have a known covariance: against R, against dense matrices, and in all that follows.

Nothing is compiled but where JAX's own road is what is tested.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
from dense import covariance, loglik
from dense import criterion as dense_criterion
from hypothesis import given, settings
from hypothesis import strategies as st
from refits import fit_at_once
from test_contract import METHODS, PROPERTIES
from test_contrasts import dense_kenward_roger

import mixjax as mj
from mixjax.covariance import lambdas_of_theta
from mixjax.engine.engine import AtOnce
from mixjax.engine.scalar_lanes import serves
from mixjax.estimation.batch import Batch
from mixjax.inference.fixed.contrasts import FixedEffects
from mixjax.inference.random.nesting import place_of
from mixjax.inference.random.spectral import spectrum
from mixjax.prediction.second_order import second_order
from mixjax.products.rows import rows_of
from mixjax.simulation import random_columns, root_of_effects

HERE = Path(__file__).parent
N, M = 100, 24  # rows and levels of the small data


def close(found, wanted, rtol=1e-8, atol=0.0):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


# --- data ------------------------------------------------------------------------------------------------------------


@cache
def oracle(name):
    return json.loads((HERE / "oracle" / f"structure_{name}.json").read_text())


@cache
def animals():
    pedigree = pd.read_csv(HERE / "data" / "pedigree.csv")
    return pd.read_csv(HERE / "data" / "animals.csv").assign(pe=lambda d: d["animal"]), pedigree


@cache
def relationships():
    """Of the oracles' tables: the pedigree, the genotypes as a data frame, the tree."""
    pedigree = animals()[1]
    K = pd.read_csv(HERE / "data" / "genomic_K.csv.gz")
    K.index = K.columns
    return {
        "A": mj.pedigree(pedigree["id"], pedigree["sire"], pedigree["dam"]),
        "K": K,
        "C": mj.phylogeny((HERE / "data" / "phylo.nwk").read_text(), correlation=True),
    }


# id of the oracle: formula, table, its names of our parameters in the order of the terms.
K, C = relationships()["K"], relationships()["C"]
ORACLES = {
    "c_animal": ("y ~ sex + propto(1 | animal, pedigree)", "animals", ["sd_animal"]),
    "c_animal_pe_herd": (
        "y ~ sex + propto(1 | animal, pedigree) + (1 | pe) + (1 | herd)", "animals", ["sd_animal", "sd_pe", "sd_herd"]
    ),
    "c_genomic": ("y ~ x + propto(1 | id, K)", "genomic", ["sd_id"]),
    "c_phylo": ("y ~ size + propto(1 | species, C) + (1 | species)", "phylo", ["sd_phylo", "sd_species"]),
}  # fmt: skip


@cache
def fit_of(name, reml=True):
    """A fit of R's data."""
    formula, data, _ = ORACLES[name]
    pedigree = relationships()["A"]  # noqa: F841
    data = animals()[0] if data == "animals" else pd.read_csv(HERE / "data" / f"{data}.csv")
    return mj.lmm(formula, data, reml=reml)


def small():
    """100 rows of 21 of 24 related levels, with inbreeding; crossed factors, a slope, weights. All fits are regular."""
    rng, n, m = np.random.default_rng(9), 100, 24
    ids = [f"a{i}" for i in range(m)]
    sire = [None] * 4 + [f"a{rng.integers(0, max(2, i - 4))}" for i in range(4, m)]
    dam = [None] * 4 + [f"a{rng.integers(max(0, i - 4), i)}" for i in range(4, m)]
    of_animals = mj.pedigree(ids, sire, dam)
    of_places = mj.Relationship(0.4 ** np.abs(np.subtract.outer(range(6), range(6))), list("pqrstu"))
    animal = rng.integers(0, m - 3, n)
    animal[: m - 3] = range(m - 3)
    place, herd, x = rng.integers(0, 6, n), rng.integers(0, 5, n), rng.normal(size=n)
    b = of_animals.factor @ rng.normal(size=(m, 2)) @ np.array([[1.5, 0.3], [0.0, 1.0]])
    y = 2 + x + b[animal, 0] + b[animal, 1] * x + rng.normal(size=5)[herd] + rng.normal(size=m)[animal]
    y = y + 0.7 * rng.normal(size=n) + (of_places.factor @ rng.normal(size=6))[place]
    frame = pd.DataFrame({
        "y": y, "x": x, "animal": np.array(ids)[animal], "herd": herd.astype(str),
        "place": np.array(list("pqrstu"))[place], "w": rng.uniform(0.5, 2.0, n),
    })  # fmt: skip
    return frame, of_animals, of_places


DATA, A, B = small()
SMALL = {
    "alone": "y ~ x + propto(1 | animal, A)",
    "slope alone": "y ~ x + propto(0 + x | animal, A)",
    "slopes": "y ~ x + propto(1 + x | animal, A)",
    "diag": "y ~ x + propto(diag(1 + x | animal), A)",
    "beside": "y ~ x + propto(1 | animal, A) + (1 | herd) + (1 | animal)",
    "two": "y ~ x + propto(1 | animal, A) + propto(1 | place, B)",
    "split": "y ~ x + propto(1 + x || animal, A) + (1 | herd)",
}


@cache
def small_fit(name, reml=True, weights=None):
    return mj.lmm(SMALL[name], DATA, reml=reml, weights=weights)


class Dense:
    """All of a fit by matrices of rows by rows: ``Z``, ``G`` of all effects, ``V``, absolute."""

    def __init__(self, fit):
        design, est = fit.design, fit.estimates
        n = len(design.y)
        Z, G = [], []
        for term, Sigma in zip(design.terms, est.Sigma, strict=True):
            one = np.zeros((n, term.n_groups, np.shape(term.Z)[1]))
            one[np.arange(n), term.group] = term.Z
            Z.append(one.reshape(n, -1))
            K = np.eye(term.n_groups) if term.levels is None else term.levels @ term.levels.T
            G.append(np.kron(K, Sigma))
        self.Z, self.G = np.hstack(Z), scipy.linalg.block_diag(*G)
        self.R = np.diag(est.sigma**2 / (np.ones(n) if design.weights is None else design.weights))
        self.V = self.R + self.Z @ self.G @ self.Z.T
        self.V_inverse = np.linalg.inv(self.V)
        self.X, self.y = np.asarray(design.X), np.asarray(design.y)
        self.vcov = np.linalg.inv(self.X.T @ self.V_inverse @ self.X)
        self.beta = self.vcov @ self.X.T @ self.V_inverse @ self.y
        self.P = self.V_inverse - self.V_inverse @ self.X @ self.vcov @ self.X.T @ self.V_inverse
        self.b = self.G @ self.Z.T @ self.P @ self.y
        self.conditional = self.G - self.G @ self.Z.T @ self.V_inverse @ self.Z @ self.G

    def prediction_variance(self, x, z):
        """Of the error of ``x'beta_hat + z'b_hat``: rows x, z."""
        ZG = self.Z @ self.G
        d = x - z @ ZG.T @ self.V_inverse @ self.X
        return np.einsum("ij,jk,ik->i", z, self.conditional, z) + np.einsum("ij,jk,ik->i", d, self.vcov, d)


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("name", list(ORACLES))
def test_fits_of_r(name, method):
    """Dense likelihoods in R, polished, which agree with lme4's modular functions given Z L in the place of Z.

    The tree's lengths are written with ten digits, so that its C and that of R differ by 6e-11.
    """
    fit, wanted = fit_of(name, method == "REML"), oracle(name)["fits"][method]
    assert fit.converged
    assert fit.npar == wanted["npar"]
    close(fit.criterion, wanted["criterion"], 0.0, 3e-9 if name == "c_phylo" else 1e-9)
    sds = [float(np.sqrt(Sigma[0, 0])) for Sigma in fit.estimates.Sigma]
    close(sds, [wanted["parameters"][parameter] for parameter in ORACLES[name][2]], 1e-6)
    close(fit.sigma, wanted["parameters"]["sigma"], 1e-7)
    close(fit.fixef, list(wanted["fixef"].values()), 1e-7)
    close(fit.se, list(wanted["fixef_se"].values()), 1e-7)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", list(SMALL))
def test_fits_are_minima_of_the_dense_criterion(name, reml):
    fit = small_fit(name, reml)
    assert fit.converged

    def dense(theta):
        return dense_criterion(fit.design, lambdas_of_theta(theta, fit.record.layout.qs), reml)

    close(fit.criterion, dense(fit.theta), 0.0, 1e-9)
    for j in np.flatnonzero(fit.theta):  # zero: no parameter of the structure, or a bound
        h = 1e-4 * np.eye(len(fit.theta))[j]
        assert abs(dense(fit.theta + h) - dense(fit.theta - h)) / 2e-4 < 1e-5
    own = Dense(fit)
    close(fit.fixef, own.beta, 1e-9)
    close(fit.vcov, own.vcov, 1e-9)
    close(np.concatenate([np.ravel(b) for b in fit.estimates.b]), own.b, 1e-8, 1e-10)


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("name", ["alone", "slope alone"])
def test_both_roads_are_one(name, weights):
    """The eigenvectors of K alone, and independent effects that all rows share, are the same model to rounding."""
    fit = small_fit(name, True, weights)
    rows = rows_of(fit.design)
    assert rows.stats.layout.dense == ()
    assert rows.sums().layout.is_led_by_none
    for reml in (True, False):
        one, other = (fit_at_once(stats, None, reml) for stats in (rows.stats, rows.sums()))
        close(one.criterion, other.criterion, 0.0, 1e-9)
        for attribute in ("theta", "beta", "sigma", "vcov", "b"):
            for a, b in zip(*(jax.tree.leaves(getattr(est, attribute)) for est in (one, other)), strict=True):
                close(a, b, 1e-8, 1e-9)
        x = np.array([[0.7]])
        for a, b in zip(*(AtOnce(stats, reml).evaluate(x) for stats in (rows.stats, rows.sums())), strict=True):
            close(a, b, 1e-9, 1e-9)


def test_no_eigenvector_is_lost_where_k_has_little_rank():
    """Levels without rows, a K without full rank, and repeated rows."""
    rng = np.random.default_rng(2)
    W = rng.normal(size=(20, 4))
    group = rng.integers(0, 15, 60)
    term = mj.RandomTerm(np.ones((60, 1)), group, 20, levels=mj.Relationship(W @ W.T, range(20)).factor)
    y = W[group] @ rng.normal(size=4) + rng.normal(size=60)
    design = mj.Design(y=y, X=np.column_stack([np.ones(60), rng.normal(size=60)]), terms=(term,))
    rows = rows_of(design)
    assert rows.stats.factors[0].ZZ.shape == (1, 1, 4)
    found = fit_at_once(rows.stats, None, True)
    close(found.criterion, dense_criterion(design, [found.theta[None]], True), 0.0, 1e-9)
    close(found.b[0], fit_at_once(rows.sums(), None, True).b[0], 1e-8, 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_random_designs_against_dense_matrices(seed, alone, reml):
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(3, 9)), int(rng.integers(20, 40))
    W = rng.normal(size=(m, int(rng.integers(1, 2 * m))))
    L = mj.Relationship(W @ W.T, range(m)).factor
    terms = [mj.RandomTerm(rng.normal(size=(n, int(rng.integers(1, 3)))), rng.integers(0, m, n), m, levels=L)]
    if not alone:
        terms.append(mj.RandomTerm(np.ones((n, 1)), rng.integers(0, 4, n), 4))
    design = mj.Design(
        y=rng.normal(size=n), X=rng.normal(size=(n, 2)), terms=tuple(terms), weights=rng.uniform(0.5, 2, n)
    )
    found = fit_at_once(mj.cross_products(design), None, reml)
    lambdas = lambdas_of_theta(found.theta, tuple(term.Z.shape[1] for term in terms))
    wanted = dense_criterion(design, lambdas, reml)
    close(found.criterion, wanted, 0.0, 1e-7)


# --- invariance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alone", "slopes", "beside"])
def test_order_of_levels_and_rows_and_scales(name):
    fit = small_fit(name)
    order = np.random.default_rng(0).permutation(M)
    turned = mj.Relationship(4.0 * A.matrix[np.ix_(order, order)], [A.levels[i] for i in order])
    assert turned.levels != A.levels
    other = mj.lmm(
        SMALL[name].replace(", A", ", turned"),
        DATA.sample(frac=1, random_state=3).assign(y=lambda d: 10 * d["y"], x=lambda d: 2 * d["x"]),
    )
    df = N - 2 if fit.reml else N
    jacobian = 2 * df * np.log(10) + 2 * np.log(2)  # of y, and of X'X
    close(other.criterion, fit.criterion + jacobian, 0.0, 1e-8)
    close(other.sigma, 10 * fit.sigma, 1e-7)
    group, of_other = next(iter(fit.ranef())), next(iter(other.ranef()))
    a, b = fit.ranef()[group], other.ranef()[of_other].loc[list(A.levels)]
    close(b["Intercept"], 10 * a["Intercept"], 1e-6, 1e-7)
    close(other.Sigma[of_other][0, 0], 100 / 4 * fit.Sigma[group][0, 0], 1e-6)


def test_the_identity_is_independent_levels():
    identity = mj.Relationship(np.eye(M), A.levels)  # noqa: F841
    one = mj.lmm("y ~ x + propto(1 + x | animal, identity)", DATA)
    other = mj.lmm("y ~ x + (1 + x | animal)", DATA)
    close(one.criterion, other.criterion, 0.0, 1e-9)
    close(one.ranef()["animal"].loc[other.ranef()["animal"].index], other.ranef()["animal"], 1e-6, 1e-7)
    place = place_of(one.record, other.record)
    assert place.nested


# --- random effects and predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("name", list(SMALL))
def test_conditional_covariances(name, weights):
    fit = small_fit(name, True, weights)
    own, start = Dense(fit), 0
    modes, covariances = fit.ranef(condvar=True)
    found = {}
    for term, label in zip(fit.design.terms, fit.labels.terms, strict=True):
        q, m = term.Z.shape[1], term.n_groups
        blocks = own.conditional[start : start + m * q, start : start + m * q].reshape(m, q, m, q)
        found.setdefault(label.group, []).append(blocks[np.arange(m), :, np.arange(m)])
        start += m * q
    for group, blocks in found.items():
        at = 0
        for block in blocks:  # terms side by side
            q = block.shape[1]
            close(covariances[group][:, at : at + q, at : at + q], block, 1e-8, 1e-10)
            at += q
        assert len(modes[group]) == len(block)
    assert fit.ranef_frame()["condsd"].notna().all()


@pytest.mark.parametrize("name", list(SMALL))
def test_levels_without_rows_are_predicted_from_their_relatives(name):
    """Genomic prediction: a new animal of the pedigree, in the mean and in its errors."""
    fit, own = small_fit(name), Dense(small_fit(name))
    assert {"a21", "a22", "a23"}.isdisjoint(DATA["animal"])
    table = pd.DataFrame({"x": [0.3, -1.0, 0.0], "animal": ["a21", "a23", "a1"], "herd": "0", "place": "r", "y": 0.0})
    levels = {"animal": list(A.levels), "herd": sorted(set(DATA["herd"])), "place": list(B.levels)}
    if name == "beside":  # the animals of the independent term are those with rows
        table = table.iloc[2:]
    X, Z = np.column_stack([np.ones(len(table)), table["x"]]), []
    for term, label in zip(fit.design.terms, fit.labels.terms, strict=True):
        known = label.levels
        assert term.levels is None or list(known) == levels[label.group.split()[0]]
        columns = np.column_stack([table["x"] if effect == "x" else np.ones(len(table)) for effect in label.effects])
        one = np.zeros((len(table), term.n_groups, columns.shape[1]))
        one[np.arange(len(table)), [known.index(v) for v in table[label.group.split()[0]]]] = columns
        Z.append(one.reshape(len(table), -1))
    Z = np.hstack(Z)
    found = fit.predict(table, interval="confidence")
    close(found["estimate"], X @ own.beta + Z @ own.b, 1e-8)
    close(found["std_error"], np.sqrt(own.prediction_variance(X, Z)), 1e-8)
    new = fit.predict(table, interval="prediction")
    close(new["std_error"], np.sqrt(own.prediction_variance(X, Z) + fit.sigma**2), 1e-8)
    population = fit.predict(table, random=False, interval="prediction")
    prior = np.einsum("ij,jk,ik->i", Z, own.G, Z)
    close(population["std_error"], np.sqrt(np.einsum("ij,jk,ik->i", X, own.vcov, X) + prior + fit.sigma**2), 1e-8)
    close(fit.predict(), fit.X @ own.beta + own.Z @ own.b, 1e-8)
    rows = fit.predict(random=False, interval="prediction")
    prior = np.einsum("ij,jk,ik->i", own.Z, own.G, own.Z)
    close(rows["std_error"], np.sqrt(np.einsum("ij,jk,ik->i", fit.X, own.vcov, fit.X) + prior + fit.sigma**2), 1e-8)


def test_a_level_that_k_lacks_has_no_prediction():
    table = pd.DataFrame({"x": [0.0], "animal": ["stranger"]})
    fit = small_fit("alone")
    for allow in (False, True):
        with pytest.raises(mj.DataError, match="'stranger' of grouping factor 'animal', not among the levels of 'A'"):
            fit.predict(table, allow_new_levels=allow)
    assert np.isfinite(fit.predict(table, random=False)[0])
    with pytest.raises(mj.DataError, match="missing values of grouping factor 'animal'"), pytest.warns(mj.DataWarning):
        fit.predict(table.assign(animal=None), allow_new_levels=True)


@pytest.mark.parametrize("name", list(SMALL))
def test_second_order_errors(name):
    """The naive part is Henderson's; of both roads all parts are the same; against derivatives of dense predictors."""
    fit = small_fit(name)
    record, info = fit.record, fit.record.information
    from mixjax.prediction.asked import rows_asked

    effects = [np.ones(len(term.effects), bool) for term in fit.labels.terms]
    targets = rows_asked(record, None, effects, False, None).targets
    sigma = np.asarray(fit.sigma)
    done = second_order(fit.stats, targets, info.x, sigma, info.covariance)
    other = second_order(rows_of(fit.design).sums(), targets, info.x, sigma, info.covariance)
    for a, b in zip(done, other, strict=True):
        close(a, b, 1e-7)
    own = Dense(fit)
    close(done.naive, own.prediction_variance(own.X, own.Z), 1e-8)
    # Derivatives of the predictor c'y by the coordinates, from dense matrices.
    structures, starts = record.layout.structures, np.cumsum([0, *(s.k for s in record.layout.structures)])

    def predictor(x):
        G = []
        for term, basis, structure, a, b in zip(
            fit.design.terms, fit.stats.Z_bases, structures, starts[:-1], starts[1:], strict=True
        ):
            F = basis.R_inv @ structure.factor(x[a:b])
            K = np.eye(term.n_groups) if term.levels is None else term.levels @ term.levels.T
            G.append(np.kron(K, F @ F.T))
        G = scipy.linalg.block_diag(*G)
        W_inverse = own.R / fit.sigma**2
        H_inverse = np.linalg.inv(W_inverse + own.Z @ G @ own.Z.T)
        pull = np.linalg.solve(own.X.T @ H_inverse @ own.X, own.X.T @ H_inverse)
        return own.X @ pull + own.Z @ G @ own.Z.T @ H_inverse @ (np.eye(len(pull.T)) - own.X @ pull)

    h = 1e-5
    moved = [(predictor(info.x + h * e) - predictor(info.x - h * e)) / (2 * h) for e in np.eye(len(info.x))]
    B = np.einsum("kij,jl,mil->ikm", moved, own.V, moved)
    close(done.correction, np.einsum("ikm,km->i", B, info.covariance[:-1, :-1]), 1e-5, 1e-8)
    assert np.isfinite(fit.predict(interval="confidence", method="second-order").to_numpy()).all()


def test_bootstrap_of_predictions():
    fit = small_fit("alone")
    table = pd.DataFrame({"x": [0.3, -1.0], "animal": ["a21", "a1"]})
    found = fit.predict(table, interval="confidence", method="bootstrap", key=1, n=400)
    wanted = fit.predict(table, interval="confidence")
    close(found["std_error"], wanted["std_error"], 0.2)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SMALL))
def test_marginal_covariance_and_shares_of_variance(name):
    fit, own = small_fit(name, True, "w"), Dense(small_fit(name, True, "w"))
    close(fit.marginal_cov(), own.V, 1e-10, 1e-12)
    close(fit.marginal_cov([3, 1]), own.V[np.ix_([3, 1], [3, 1])], 1e-10, 1e-12)
    close(covariance(fit.design, fit.estimates.Sigma, fit.sigma), own.V, 1e-10, 1e-12)
    assert np.abs(fit.Z.toarray() - own.Z).max() == 0.0
    fixed = np.var(fit.X @ own.beta, ddof=1)
    between, residual = np.diagonal(own.Z @ own.G @ own.Z.T).mean(), fit.sigma**2
    close(fit.icc()["adjusted"], between / (between + residual))
    close(fit.icc(by_group=True).sum(), between / (between + residual))
    close(fit.r2(), [fixed / (fixed + between + residual), (fixed + between) / (fixed + between + residual)])
    components = fit.pca()
    if len(fit.labels.terms) == 1:
        squares = components["animal"]["row_std_dev"] ** 2
        plain = Dense(small_fit(name))  # without weights the mean over rows of what effects give
        close((small_fit(name).pca()["animal"]["row_std_dev"] ** 2).sum() * small_fit(name).sigma ** 2,
              np.diagonal(plain.Z @ plain.G @ plain.Z.T).mean(), 1e-7)  # fmt: skip
        assert (squares > 0).all()


@pytest.mark.parametrize("name", list(SMALL))
def test_leverages_and_residuals(name):
    fit, own = small_fit(name, True, "w"), Dense(small_fit(name, True, "w"))
    H1 = own.X @ own.vcov @ own.X.T @ own.V_inverse
    ZGZ = own.Z @ own.G @ own.Z.T
    H2 = ZGZ @ own.V_inverse @ (np.eye(len(H1)) - H1)
    found = fit.leverage()
    close(found["overall"], np.diagonal(H1 + H2), 1e-8)
    close(found["fixed"], np.diagonal(H1), 1e-8)
    close(found["random"], np.diagonal(H2), 1e-8)
    raw = own.y - own.X @ own.beta
    conditional = raw - own.Z @ own.b
    variances = {
        ("marginal", "standardized"): (raw, np.diagonal(own.V)),
        ("marginal", "studentized"): (raw, np.diagonal(own.V - own.X @ own.vcov @ own.X.T)),
        ("conditional", "studentized"): (conditional, np.diagonal(own.R) * (1 - np.diagonal(H1 + H2))),
        ("random", "standardized"): (own.Z @ own.b, np.diagonal(ZGZ)),
        ("random", "studentized"): (own.Z @ own.b, np.diagonal(ZGZ @ own.P @ ZGZ)),
    }
    for (kind, scale), (values, variance) in variances.items():
        close(fit.residuals(kind, scale), values / np.sqrt(variance), 1e-7)
    close(fit.residuals("marginal", "cholesky"), np.linalg.solve(np.linalg.cholesky(own.V), raw), 1e-7, 1e-9)
    share = np.diagonal(own.P @ own.R @ own.P) / np.diagonal(own.P)
    from mixjax.diagnostics.leverage import confounding

    close(confounding(fit), 1 - share, 1e-7)


@pytest.mark.parametrize("name", ["alone", "slopes", "beside", "two"])
def test_influence(name):
    fit = small_fit(name)
    exact, held = fit.influence(by="animal"), fit.influence(by="animal", method="fixed-theta")
    step = fit.influence(by="animal", method="one-step")
    own = Dense(fit)
    for unit in exact.units[:4]:
        left = (DATA["animal"] != unit).to_numpy()
        refit = mj.lmm(SMALL[name], DATA[left])
        close(exact.beta.loc[unit], refit.fixef, 1e-6)
        close(exact.sigma[unit], refit.sigma, 1e-6)
        V_inverse = np.linalg.inv(own.V[np.ix_(left, left)])
        X, y = own.X[left], own.y[left]
        close(held.beta.loc[unit], np.linalg.solve(X.T @ V_inverse @ X, X.T @ V_inverse @ y), 1e-8)
    assert step.converged.all()
    close(step.beta, exact.beta, 0.2, 0.1)
    rows = fit.influence(method="fixed-theta")
    left = np.arange(N) != 7
    V_inverse, X, y = np.linalg.inv(own.V[np.ix_(left, left)]), own.X[left], own.y[left]
    close(rows.beta.iloc[7], np.linalg.solve(X.T @ V_inverse @ X, X.T @ V_inverse @ y), 1e-8)


@pytest.mark.parametrize("name", ["alone", "slopes", "beside", "two"])
def test_sensitivity_is_the_derivative_by_case_weights(name):
    fit = small_fit(name)
    found, rows = fit.sensitivity(scale="theta"), fit.record.rows
    for row in (0, 20):
        ends = []
        for h in (1e-4, -1e-4):
            weights = np.ones(N)
            weights[row] += h
            ends.append(fit_at_once(rows.sums(weights), None, True))
        free = fit.theta != 0
        slope = (ends[0].theta - ends[1].theta)[free] / 2e-4
        wanted = np.concatenate([slope, [(ends[0].sigma - ends[1].sigma) / 2e-4], (ends[0].beta - ends[1].beta) / 2e-4])
        close(found.iloc[row], wanted, 1e-4, 1e-5)


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SMALL if name != "diag"])  # of all covariances of a term
def test_kenward_roger_is_the_dense_formula(name):
    fit = small_fit(name)
    close(FixedEffects.of(fit.record, "kenward-roger").vcov, dense_kenward_roger(fit), 1e-7)


@pytest.mark.parametrize("name", list(SMALL))
def test_satterthwaite_by_differences_of_dense_matrices(name):
    fit = small_fit(name)
    structures, design = fit.record.layout.structures, fit.design
    starts = np.cumsum([0, *(s.k for s in structures)])
    x = fit.record.information.x
    assert fit.record.information.free.all()

    def parts(x, log_sigma):
        Sigma = [
            np.exp(2 * log_sigma) * (basis.R_inv @ s.factor(x[a:b])) @ (basis.R_inv @ s.factor(x[a:b])).T
            for s, basis, a, b in zip(structures, fit.stats.Z_bases, starts[:-1], starts[1:], strict=True)
        ]
        V_inverse = np.linalg.inv(covariance(design, Sigma, np.exp(log_sigma)))
        C = np.linalg.inv(design.X.T @ V_inverse @ design.X)
        r = design.y - design.X @ (C @ design.X.T @ V_inverse @ design.y)
        return -np.linalg.slogdet(V_inverse)[1] - np.linalg.slogdet(C)[1] + r @ V_inverse @ r, C[1, 1]

    at, k = np.append(x, np.log(fit.sigma)), len(x) + 1
    h, one = 1e-3, np.eye(k)

    def of(j, point):
        return parts(point[:-1], point[-1])[j]

    def mixed(i, j):
        corners = [s * t * of(0, at + h * (s * one[i] + t * one[j])) for s in (1, -1) for t in (1, -1)]
        return sum(corners) / (4 * h * h)

    H = np.array([[mixed(i, j) for j in range(k)] for i in range(k)])
    g = np.array([(of(1, at + 1e-4 * e) - of(1, at - 1e-4 * e)) / 2e-4 for e in one])
    df = 2 * of(1, at) ** 2 / (g @ (2 * np.linalg.inv(H)) @ g)
    close(fit.test("x")["df"].iloc[0], df, 2e-3)


@pytest.mark.parametrize("name", ["alone", "slope alone"])
@pytest.mark.parametrize("weights", [None, "w"])
def test_the_exact_null_distribution(name, weights):
    fit = small_fit(name, True, weights)
    term = fit.design.terms[0]
    wide = np.zeros((N, M))
    wide[np.arange(N), term.group] = term.Z[:, 0]
    root = np.ones(N) if weights is None else np.sqrt(fit.design.weights)
    X = root[:, None] * fit.X
    K = np.linalg.svd(X)[0][:, 2:]
    ZL = root[:, None] * wide @ term.levels
    wanted = np.sort(np.linalg.eigvalsh(K.T @ ZL @ ZL.T @ K))[::-1]
    of = spectrum(fit.stats, True)
    found = np.sort(np.repeat(of.mu, of.df.astype(int)))[::-1] / fit.stats.Z_bases[0].R[0, 0] ** -2
    scale = wanted[0] / found[0]
    close(scale * found[: len(wanted)], wanted, 1e-7, 1e-9 * wanted[0])
    assert mj.exact_rlrt(fit, n=200).p_value <= 1.0


def test_likelihood_ratios_and_terms_left_out():
    full, null = small_fit("beside", False), mj.lmm("y ~ x + (1 | herd) + (1 | animal)", DATA, reml=False)
    table = mj.compare(null, full).to_frame()
    close(table["aic"].diff().iloc[1], full.criterion - null.criterion + 2.0, 1e-6)
    assert place_of(null.record, full.record).nested
    assert not place_of(full.record, null.record).nested
    other = mj.Relationship(A.matrix**2, A.levels)  # noqa: F841
    assert not place_of(small_fit("alone").record, mj.lmm("y ~ x + propto(1 | animal, other)", DATA).record).nested
    found = small_fit("beside").ranova()
    assert list(found.index) == ["<none>", "propto(1 | animal, A)", "(1 | animal)", "(1 | herd)"]
    close(-2 * found["loglik"].iloc[1], mj.lmm("y ~ x + (1 | herd) + (1 | animal)", DATA).criterion, 1e-9)
    without = small_fit("slopes").without("x in propto(1 + x | animal, A)")
    assert without.labels.formula == "y ~ x + propto(1 | animal, A)"
    close(without.criterion, small_fit("alone").criterion, 0.0, 1e-8)
    left = small_fit("beside").without("(1 | herd)")
    close(left.criterion, mj.lmm("y ~ x + propto(1 | animal, A) + (1 | animal)", DATA).criterion, 0.0, 1e-8)


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_intervals(name):
    fit = small_fit(name)
    found = fit.confint(["sigma", "x"])
    assert (found["lower"] < found["upper"]).all()
    ml = small_fit(name, False)
    end = ml.confint(["sigma"]).loc["sigma", "upper"]

    def deviance(parameters):
        Sigma = [np.exp(2 * s) * np.eye(1) for s in parameters]
        V_inverse = np.linalg.inv(covariance(ml.design, Sigma, end))
        beta = np.linalg.solve(ml.X.T @ V_inverse @ ml.X, ml.X.T @ V_inverse @ ml.design.y)
        return -2 * loglik(ml.design, beta, Sigma, end)

    start = [0.5 * np.log(S[0, 0] + 1e-3) for S in ml.estimates.Sigma]
    best = scipy.optimize.minimize(deviance, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    close(best.fun - ml.criterion, 3.841458820694124, 1e-4)


def test_profiles_beside_other_terms():
    """90 levels of the pedigree beside those of herds and of the animals themselves, without compiling."""
    fit = fit_of("c_animal_pe_herd", False)
    found = fit.confint(["sd_Intercept|herd"])
    end = found.loc["sd_Intercept|herd", "upper"]

    def deviance(logs):
        Sigma = [np.exp(2 * logs[:1, None]), np.exp(2 * logs[1:2, None]), np.array([[end**2]])]
        V_inverse = np.linalg.inv(covariance(fit.design, Sigma, np.exp(logs[2])))
        beta = np.linalg.solve(fit.X.T @ V_inverse @ fit.X, fit.X.T @ V_inverse @ fit.design.y)
        return -2 * loglik(fit.design, beta, Sigma, np.exp(logs[2]))

    start = np.log([0.8, 0.9, fit.sigma])
    best = scipy.optimize.minimize(deviance, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8})
    close(best.fun - fit.criterion, 3.841458820694124, 1e-4)


# --- drawn and refitted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alone", "slopes", "two"])
def test_draws_have_the_covariance_of_the_model(name):
    fit, own = small_fit(name), Dense(small_fit(name))
    roots = [np.linalg.cholesky(Sigma) for Sigma in fit.estimates.Sigma]
    shares = (random_columns(fit.design) @ root_of_effects(fit.design, roots)).toarray()
    close(shares @ shares.T, own.Z @ own.G @ own.Z.T, 1e-8, 1e-10)
    Y = fit.simulate(3, 4000)
    empirical = np.cov(Y.T)
    size = np.sqrt(np.outer(np.diagonal(own.V), np.diagonal(own.V)))
    assert np.abs((empirical - own.V) / size).max() < 0.12
    fixed = fit.simulate(3, 2, random="fitted")
    assert fixed.shape == (2, N)


@pytest.mark.parametrize("name", ["alone", "slopes", "beside"])
def test_many_responses_are_fits_of_each(name):
    fit = small_fit(name)
    Y = np.concatenate([fit.simulate(1, 5), np.random.default_rng(0).normal(size=(4, N)), fit.design.y[None]])
    batch = fit.refit_many(Y, ranef=True)
    modes = batch.ranef()
    for i, y in enumerate(Y):
        one = fit.refit(y)
        close(batch.estimates.criterion[i], one.criterion, 0.0, 1e-8)
        close(batch.estimates.theta[i], one.theta, 1e-6, 1e-7)
        for group, frame in one.ranef().items():
            close(np.asarray(modes[group])[i * len(frame) : (i + 1) * len(frame)], frame, 1e-5, 1e-6)
    assert batch.estimates.converged.all()
    found = fit.bootstrap(key=1, n=20)
    assert len(found.replicates) == 20
    assert np.isfinite(found.replicates.to_numpy()).all()


def test_no_heritability_is_exactly_zero_and_says_so():
    """Phenotypes whose relatives are less alike than strangers: the bound, in a batch and alone."""
    rng = np.random.default_rng(1)
    fit = fit_of("c_genomic")
    Y = rng.normal(size=(40, 120))
    batch = fit.refit_many(Y)
    zero = batch.estimates.theta[:, 0] == 0.0
    assert 5 < zero.sum() < 35
    assert (zero == batch.estimates.singular).all()
    assert batch.estimates.converged.all()
    assert (batch.estimates.result[zero] == int(mj.Result.CONVERGED)).all()
    for i in (np.flatnonzero(zero)[0], np.flatnonzero(~zero)[0]):
        one = fit.refit(Y[i])
        assert one.is_singular == zero[i]
        design = replace(fit.design, y=Y[i])
        at = [dense_criterion(design, [np.array([[theta]])], True) for theta in (one.theta[0], 0.02, 0.05)]
        close(one.criterion, at[0], 0.0, 1e-8)
        assert not zero[i] or min(at[1:]) > at[0]


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("p", [2, 3])
def test_lanes_of_one_ratio_are_the_closed_form(p, reml):
    """Value, gradient and Hessian of many responses at once, and where ratios are zero or huge, against those of each;
    whoever the neighbours are."""
    rng = np.random.default_rng(p)
    term = mj.RandomTerm(rng.normal(size=(70, 1)), rng.integers(0, 21, 70), 21)
    X = np.column_stack([np.ones(70), rng.normal(size=(70, 2))])[:, :p]
    design = mj.Design(y=np.zeros(70), X=X, terms=(term,), weights=rng.uniform(0.5, 2, 70))
    Y = rng.normal(size=(32, 70))
    lanes = Batch(mj.cross_products(design, Y), at_once=True).lanes(np.arange(32), reml)
    assert serves(lanes.moments)
    x = np.exp(rng.normal(size=(1, 32)))
    x[0, :4] = 0.0, 1e-4, 1e4, -0.5
    found = lanes.evaluate(x)
    for i in (0, 1, 2, 3, 17):
        one = AtOnce(mj.cross_products(replace(design, y=Y[i])), reml)
        for a, b in zip(found, one.evaluate(x[:, i : i + 1]), strict=True):
            close(a[..., i], b[..., 0], 1e-9, 1e-9)
        close(lanes.profiled(x).delta[:, i], one.profiled(x[:, i]).delta, 1e-9, 1e-12)
    half = Batch(mj.cross_products(design, Y[16:]), at_once=True).lanes(np.arange(16), reml)
    for a, b in zip(found, half.evaluate(x[:, 16:]), strict=True):
        assert (a[..., 16:] == b).all()


# --- JAX's road ------------------------------------------------------------------------------------------------------


def test_heritability_is_differentiable(x64):
    """Through the fit, by the response."""
    fit = small_fit("alone")
    design = fit.design

    def h2(y):
        est = mj.estimate(mj.cross_products(replace(design, y=y)), True)
        return est.Sigma[0][0, 0] / (est.Sigma[0][0, 0] + est.sigma**2)

    value, gradient = jax.value_and_grad(h2)(jnp.asarray(design.y))
    Sigma, sigma2 = fit.Sigma["animal"][0, 0], fit.sigma**2
    close(value, Sigma / (Sigma + sigma2), 1e-7)
    for i in (0, 30):
        h = 1e-4 * np.eye(N)[i]
        ends = [fit.refit(design.y + s * h) for s in (1, -1)]
        shares = [f.Sigma["animal"][0, 0] / (f.Sigma["animal"][0, 0] + f.sigma**2) for f in ends]
        close(gradient[i], (shares[0] - shares[1]) / 2e-4, 1e-4, 1e-7)


def test_the_criterion_is_differentiable_by_k(x64):
    design, theta = small_fit("alone").design, jnp.array([0.8])
    close(mj.criterion(theta, mj.cross_products(design)), dense_criterion(design, [np.array([[0.8]])], True), 1e-10)

    def with_K(L):
        terms = (replace(design.terms[0], levels=L),)
        return mj.criterion(theta, mj.cross_products(replace(design, terms=terms)))

    L = np.asarray(design.terms[0].levels)
    slope = jax.grad(with_K)(jnp.asarray(L))
    E = 1e-5 * np.outer(np.eye(M)[6], np.eye(M)[2])
    ends = [
        dense_criterion(replace(design, terms=(replace(design.terms[0], levels=L + s * E),)), [np.array([[0.8]])], True)
        for s in (1, -1)
    ]
    close(slope[6, 2], (ends[0] - ends[1]) / 2e-5, 1e-5, 1e-7)
    close(with_K(jnp.asarray(L)), dense_criterion(design, [np.array([[0.8]])], True), 1e-10)


def test_the_marginal_likelihood_is_the_dense_one(x64):
    for name in ("alone", "beside"):
        fit = small_fit(name, False, "w")
        p = mj.to_params(fit.estimates, fit.design)
        close(mj.marginal_loglik(p, fit.design), -0.5 * fit.criterion, 1e-9)
        other = p._replace(log_sigma=p.log_sigma + 0.2, beta=p.beta + 0.1)
        Sigma = fit.estimates.Sigma
        wanted = loglik(fit.design, fit.estimates.beta + 0.1, Sigma, fit.sigma * np.exp(0.2))
        close(mj.marginal_loglik(other, fit.design), wanted, 1e-9)


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED = "known covariance"


def test_what_needs_independent_levels_is_refused_by_name():
    for name in ("alone", "beside"):
        fit = small_fit(name)
        for kind in ("cases", "residual", "wild"):
            with pytest.raises(ValueError, match=f"kind='{kind}' is not for .*{REFUSED}.*parametric"):
                fit.bootstrap(key=1, n=5, kind=kind)
        with pytest.raises(ValueError, match=REFUSED):
            fit.robust()
        with pytest.raises(ValueError, match=REFUSED):
            fit.robust(cluster="herd")
        with pytest.raises(ValueError, match=REFUSED):
            fit.stats + fit.stats
        with pytest.raises(ValueError, match=REFUSED):
            mj.stack([fit.stats, fit.stats])
        with pytest.raises(ValueError, match=REFUSED):
            mj.shard(fit.stats, jax.make_mesh((1,), ("d",)))
        with pytest.raises(ValueError, match=REFUSED):
            mj.rows(fit.design, "gaussian")
        with pytest.raises(ValueError, match=REFUSED):
            fit.confint("x", method="bootstrap", kind="bca", key=1, n=20)
    with pytest.raises(ValueError, match=REFUSED):
        mj.glmm("z ~ x + propto(1 | animal, A)", DATA.assign(z=lambda d: d["y"] > 2), family="binomial")
    for options in ({"dispersion": "~ herd"}, {"residual": "ar1(t | animal)"}):
        with pytest.raises(ValueError, match=f"a correlation of the residuals is not for .*{REFUSED}"):
            mj.lmm(SMALL["alone"], DATA.assign(t=range(N)), **options)
    with pytest.raises(mj.FormulaError, match="subjects of mmrm\\(\\) are independent"):
        mj.mmrm("y ~ x + propto(us(place | animal), A)", DATA)
    with pytest.raises(mj.FormulaError, match=REFUSED):
        mj.lmm(SMALL["alone"], iter([DATA[:20], DATA[20:]]))


ARGUMENTS = {
    "test": ("x",), "emmeans": ("1",), "emtrends": ("1", "x"), "bootstrap": (1, 5), "simulate": (1, 2),
    "without": None, "refit_many": (np.zeros((0, N)),), "joint_tests": (), "profile": ("sigma",),
}  # fmt: skip


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_every_method_of_a_fit_works_or_refuses(name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    fit = small_fit(name)
    refused = set()
    for method in METHODS:
        arguments = ARGUMENTS.get(method, ())
        if arguments is None or method in ("refit_many", "smooth", "smooths"):  # a curve is none of these formulas'
            continue
        try:
            found = getattr(fit, method)(*arguments)
        except ValueError as error:
            refused.add(method if REFUSED in str(error) else f"{method}: {error}")
            continue
        assert found is not None
        str(found)
    assert refused == {"robust"}
    for attribute in PROPERTIES:
        assert getattr(fit, attribute) is not None


# --- pedigrees and trees ---------------------------------------------------------------------------------------------


def test_relationship_of_a_pedigree():
    """nadiv's A of the same pedigree, in the oracle's DATA; and coefficients by hand (Mrode 2014, example 2.1)."""
    A = relationships()["A"]
    assert A.levels == tuple(animals()[1]["id"])
    mrode = mj.pedigree([1, 2, 3, 4, 5, 6], [None, None, 1, 1, 4, 5], [None, None, 2, None, 3, 2])
    wanted = np.array([
        [1.0, 0.0, 0.5, 0.5, 0.5, 0.25], [0.0, 1.0, 0.5, 0.0, 0.25, 0.625], [0.5, 0.5, 1.0, 0.25, 0.625, 0.5625],
        [0.5, 0.0, 0.25, 1.0, 0.625, 0.3125], [0.5, 0.25, 0.625, 0.625, 1.125, 0.6875],
        [0.25, 0.625, 0.5625, 0.3125, 0.6875, 1.125],
    ])  # fmt: skip
    close(mrode.matrix, wanted, 0.0, 0.0)
    assert mrode.levels == tuple("123456")
    order = [5, 2, 0, 4, 1, 3]  # offspring in front of their parents
    sire, dam = np.array([None, None, 1, 1, 4, 5], object), np.array([np.nan, np.nan, 2, np.nan, 3, 2])
    turned = mj.pedigree(np.arange(1, 7)[order], sire[order], dam[order])
    close(turned.matrix, wanted[np.ix_(order, order)], 0.0, 0.0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_pedigrees_by_dropped_genes(seed):
    """A is twice the probability that genes drawn from two animals are copies of one: exactly, from all paths."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(3, 9))
    sire = [None if rng.random() < 0.3 or i == 0 else int(rng.integers(0, i)) for i in range(m)]
    dam = [None if rng.random() < 0.3 or i == 0 else int(rng.integers(0, i)) for i in range(m)]

    @cache
    def kinship(i, j):
        if i is None or j is None:
            return 0.0
        if i == j:
            return 0.5 * (1.0 + kinship(sire[i], dam[i]))
        i, j = max(i, j), min(i, j)
        return 0.5 * (kinship(sire[i], j) + kinship(dam[i], j))

    wanted = np.array([[2 * kinship(i, j) for j in range(m)] for i in range(m)])
    close(mj.pedigree(range(m), sire, dam).matrix, wanted, 0.0, 1e-15)


def test_covariance_of_a_tree():
    """ape's vcv, of the oracle's tree; comments, quotes, exponents and blanks of Newick text."""
    tree = mj.phylogeny("[a tree] ((a:1, 'b c':2e0)x:0.5,\n(d:1,e:1,f:0.5):.25)root:7;")
    assert tree.levels == ("a", "b c", "d", "e", "f")
    wanted = np.diag([1.5, 2.5, 1.25, 1.25, 0.75])
    wanted[0, 1] = wanted[1, 0] = 0.5
    wanted[2:, 2:] += 0.25 * (1 - np.eye(3))
    close(tree.matrix, wanted, 1e-14)
    scaled = mj.phylogeny("((a:1,b:3):1,c:2);", correlation=True)
    close(scaled.matrix, [[1, 1 / np.sqrt(8), 0], [1 / np.sqrt(8), 1, 0], [0, 0, 1]], 1e-14)
    deep = "(" * 3000 + "t0:1" + "".join(f",t{i}:1):1" for i in range(1, 3001)) + ";"
    assert mj.phylogeny(deep.replace("):1;", ");")).matrix[0, 1] == 2999.0


BAD_TREES = {
    "(a:1,b:1": "a '\\)' is missing", "(a:1,b:1));": "too many", "(a:1,b);": "above 'b' has no length",
    "((a:1,b:1),c:2);": "above an inner node has no length", "(a:1,b:-1);": "length -1", "(a:1,a:2);": "twice: a",
    "(a:1,:2);": "has no name", "a;": "no brackets", "(a:x,b:1);": "'x' is no length",
    "(a]:1,b:1);": r"'\]' belongs to nothing, at character 3: \(a >>> \]:1,b:1\);", "(a:1,b:1)[x;": "a comment that no",
    "('a:1,b:1);": "a quoted name that no", "(a:1:2,b:1);": "a second length of the branch above 'a', at character 5",
    "(a:1,b:1):1:2;": "a second length of the branch above an inner node", "(a:,b:1);": "no length stands behind",
    "(a:1,b:1):;": "no length stands behind", "(a:1_0,b:1);": "'1_0' is no length",
    "(a:1,b:1);(c:1,d:1);": "one tree at a time", "(a b:1,c:1);": "'b' stands behind 'a'",
}  # fmt: skip


@pytest.mark.parametrize("text", list(BAD_TREES))
def test_text_that_is_no_tree(text):
    with pytest.raises(ValueError, match=BAD_TREES[text]):
        mj.phylogeny(text)


def test_pedigrees_that_cannot_be():
    with pytest.raises(ValueError, match=r"loop: '[abc]' is an ancestor of itself"):
        mj.pedigree(["a", "b", "c"], ["b", "c", "a"], [None] * 3)
    with pytest.raises(ValueError, match="loop: 'a'"):
        mj.pedigree(["a"], ["a"], [None])
    with pytest.raises(ValueError, match="twice: b"):
        mj.pedigree(["a", "b", "b"], [None] * 3, [None] * 3)
    with pytest.raises(ValueError, match="a dam that is not among the animals: z"):
        mj.pedigree(["a", "b"], [None, "a"], [None, "z"])
    for missing in (None, np.nan, pd.NA, ""):
        with pytest.raises(ValueError, match=r"missing names, first in row 1 \(1 in all\)"):
            mj.pedigree(["a", missing, "b"], [None] * 3, [None] * 3)
    with pytest.raises(ValueError, match="equally long"):
        mj.pedigree(["a", "b"], [None], [None, None])


@pytest.mark.parametrize("name", ["NA", "nan", "None", "NaT", "<NA>"])
def test_a_name_that_is_listed_is_a_name(name):
    """Words for what is missing are that only where no animal is called so."""
    A = mj.pedigree([name, "b"], [None, name], [np.nan, pd.NA])
    assert A.levels == (name, "b")
    assert A.matrix.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert mj.pedigree(["a", "b"], [name, "a"], ["", name]).matrix.tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_levels_beside_a_data_frame_say_its_order():
    frame = pd.DataFrame([[2.0, 0.5], [0.5, 1.0]], ["a", "b"], ["a", "b"])
    turned = mj.Relationship(frame, levels=["b", "a"])
    assert turned.levels == ("b", "a")
    assert turned.matrix.tolist() == [[1.0, 0.5], [0.5, 2.0]]
    for levels, odd in {("x", "b"): "x, a", ("a",): "b", ("a", "b", "c"): "c"}.items():
        with pytest.raises(ValueError, match=f"labels of the data frame differ; in one of the two only: {odd}\\."):
            mj.Relationship(frame, levels=levels)
    assert mj.Relationship(frame.to_numpy(), ["x", "y"]).levels == ("x", "y")


def test_matrices_that_are_no_covariances():
    for matrix, message in {
        ((1.0, 0.9), (0.9, 0.5)): "least eigenvalue is -0.1841",
        ((1.0, 0.2), (0.3, 1.0)): r"not symmetric: \(a, b\) is 0.2",
        ((1.0, np.nan), (np.nan, 1.0)): "missing or infinite entries, first in row 'a'",
        ((0.0, 0.0), (0.0, 0.0)): "zeros",
        ((1.0, 0.0),): "must be square",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mj.Relationship(matrix, ["a", "b"])
    with pytest.raises(ValueError, match="twice: a"):
        mj.Relationship(np.eye(2), ["a", "a"])
    with pytest.raises(ValueError, match="as many names, got 3"):
        mj.Relationship(np.eye(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="needs levels"):
        mj.Relationship(np.eye(2))
    with pytest.raises(ValueError, match="same labels; in one of the two only: b, c"):
        mj.Relationship(pd.DataFrame(np.eye(2), ["a", "b"], ["a", "c"]))
    rounded = np.array([[1.0, 1.0], [1.0, 1.0 - 1e-10]])  # an eigenvalue of -5e-11
    close(mj.Relationship(rounded, ["a", "b"]).factor @ mj.Relationship(rounded, ["a", "b"]).factor.T, rounded, 0, 1e-9)
    frame = pd.DataFrame([[2.0, 0.5], [1.0, 0.5]], ["b", "a"], ["b", "a"]).iloc[[1, 0]]
    with pytest.raises(ValueError, match="not symmetric"):
        mj.Relationship(frame)
    ordered = mj.Relationship(pd.DataFrame([[2.0, 0.5], [0.5, 1.0]], ["b", "a"], ["b", "a"]).iloc[[1, 0]])
    assert ordered.levels == ("b", "a")
    assert ordered.matrix.tolist() == [[2.0, 0.5], [0.5, 1.0]]


def test_formulas_that_cannot_be_read():
    few = mj.Relationship(A.matrix[:10, :10], A.levels[:10])  # noqa: F841
    with pytest.raises(mj.DataError, match=r"'few' has no row for 11 of the 21 levels of 'animal'.*'a10'"):
        mj.lmm("y ~ x + propto(1 | animal, few)", DATA)
    for formula, message in {
        "y ~ x + propto(1 | animal, nothing)": "there is no 'nothing' where the formula is written",
        "y ~ x + propto(1 | animal)": "must read propto", "y ~ x + propto(1 | animal, A, B)": "must read propto",
        "y ~ x + propto(1 | animal, A + B)": "must read propto", "y ~ propto(x, A)": "one random term before the comma",
        "y ~ x + propto(1 | animal/herd, A)": "those of one column", "y ~ x + propto(1 | animal:herd, A)": "one column",
        "y ~ x + propto(propto(1 | animal, A), A)": "one random term",
        "y ~ x + propto(1 | animal, DATA)": None, "y ~ x + propto(1 | animal, np)": "'np' is a module",
        "y ~ x + propto(1 | animal, A) + propto(x | animal, A)": "stands in two random terms",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mj.lmm(formula, DATA)
    with pytest.raises(mj.FormulaError, match="not trusted"):
        mj.lmm("y ~ x + propto(1 | animal, A)", DATA, trusted=False)
    indefinite = pd.DataFrame(A.matrix - 1.5 * np.eye(M), A.levels, A.levels)  # noqa: F841
    with pytest.raises(
        mj.DataError, match=r"propto\(1 \| animal, indefinite\)': the matrix .* not positive semidefinite"
    ):
        mj.lmm("y ~ x + propto(1 | animal, indefinite)", DATA)
    identity, one = mj.Relationship(np.eye(M), A.levels), DATA.drop_duplicates("animal")  # noqa: F841
    with pytest.raises(mj.DataError, match="the residual variance cannot be told"):
        mj.lmm("y ~ x + propto(1 | animal, identity)", one)
    assert mj.lmm("y ~ x + propto(1 | animal, A)", one).converged  # relatives tell


def test_arrays_that_cannot_be():
    term = mj.RandomTerm(np.ones((6, 1)), np.arange(6) % 3, 3)
    design = mj.Design(y=np.arange(6.0), X=np.ones((6, 1)), terms=(term,))
    for levels, message in (
        (np.eye(2), r"\(3, 3\), got shape \(2, 2\)"),
        (np.full((3, 3), np.nan), "missing or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            mj.cross_products(replace(design, terms=(replace(term, levels=levels),)))
    large = replace(term, n_groups=5001, levels=np.broadcast_to(0.0, (5001, 5001)))
    with pytest.raises(ValueError, match=r"5001 levels with a known covariance.*5000 at most"):
        mj.cross_products(replace(design, terms=(large,)))


def test_spellings_of_one_model():
    """A DATA frame, a name in the context, glmmTMB's dummy group."""
    frame = pd.DataFrame(A.matrix, A.levels, A.levels)  # noqa: F841
    fit = small_fit("alone")
    close(mj.lmm("y ~ x + propto(1 | animal, frame)", DATA).criterion, fit.criterion, 1e-12)
    design, _ = mj.build_design("y ~ x + propto(1 | animal, G)", DATA, context={"G": A})
    close(design.terms[0].levels, A.factor, 1e-15)
    dummy = mj.lmm("y ~ x + propto(0 + animal | dummy, A)", DATA.assign(dummy=1))
    close(dummy.criterion, fit.criterion, 1e-12)
    close(dummy.ranef()["animal"], fit.ranef()["animal"], 1e-10)
    numbers = DATA.assign(animal=DATA["animal"].str[1:].astype(int))
    numbered = mj.Relationship(A.matrix, range(M))
    assert numbered.levels[1] == "1"
    close(mj.lmm("y ~ x + propto(1 | animal, numbered)", numbers).criterion, fit.criterion, 1e-12)


def test_scenarios_and_copies():
    import pickle

    fit = small_fit("alone")
    back = pickle.loads(pickle.dumps(fit))
    close(back.predict(DATA.iloc[:3]), fit.predict(DATA.iloc[:3]), 1e-12)
    again = mj.scenario_of(fit)
    assert again.simulate(1, 2).shape == (2, N)
    Y = mj.simulate("y ~ x + propto(1 | animal, A)", DATA, beta=[1, 1], sigma=0.5, sd=2.0, key=1, n=3)
    assert np.shape(Y) == (3, N)
    assert again.on(DATA.iloc[:50]).nobs == 50
    study = mj.study(again, {"m": "y ~ x + propto(1 | animal, A)"}, replicates=20, key=1)
    assert len(study.to_frame()) > 0
