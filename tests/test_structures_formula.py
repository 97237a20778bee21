"""Structures in formulas: names and options of other packages, and effects that they have no meaning for."""

import warnings

import numpy as np
import pandas as pd
import pytest
from test_structures_fits import three, visits

import mixjax as mj
from mixjax.checks import DataError, DataWarning, FormulaError
from mixjax.covariance import STRUCTURES, canonical
from mixjax.formula.parse import parse


def structure_of(term):
    (part,) = parse(f"y ~ x + {term}").random
    return part.structure


@pytest.mark.parametrize(
    ("written", "structure"),
    [
        *((f"{name}(0 + f | g)", canonical(name)) for name in STRUCTURES),
        ("rr(0 + f | g)", "rr(d=2)"),
        ("rr(0 + f | g, d = 3)", "rr(d=3)"),
        ("rr(0 + f | g, 1)", "rr(d=1)"),
        ("fa(0 + f | g)", "fa(d=1)"),
        ("cs(0 + f | g, hom = TRUE)", "homcs"),
        ("cs(0 + f | g, hom = FALSE)", "cs"),
        ("csh(0 + f | g)", "cs"),
        ("ar1(0 + f | g, hom = TRUE)", "ar1"),
        ("ar1(0 + f | g, hom = FALSE)", "hetar1"),
        ("ar1h(0 + f | g)", "hetar1"),
        ("homar1(0 + f | g)", "ar1"),
        ("toep(0 + f | g, hom = T)", "homtoep"),
        ("toep(0 + f | g, hom = F)", "toep"),
        ("toeph(0 + f | g)", "toep"),
        ("diag(0 + f | g, hom = TRUE)", "homdiag"),
        ("homdiag(0 + f | g, hom = TRUE)", "homdiag"),
        ("hetar1(0 + f | g, hom = FALSE)", "hetar1"),
    ],
)
def test_names_and_options(written, structure):
    assert structure_of(written) == structure


@pytest.mark.parametrize(
    ("formula", "error", "message"),
    [
        ("ar1(0 + visit || subject)", FormulaError, "exclude each other"),
        ("us(0 + visit | subject, hom = TRUE)", FormulaError, "an option of cs, diag, ar1, toep"),
        ("hetar1(0 + visit | subject, hom = TRUE)", FormulaError, "'hom = TRUE'.*not understood"),
        ("adh(0 + visit | subject, hom = TRUE)", FormulaError, "not understood"),
        ("ar1(0 + visit | subject, rho = 1)", FormulaError, "only hom"),
        ("car1(0 + visit | subject)", FormulaError, "there are us, diag, homdiag, homcs, cs, ar1, hetar1"),
        ("ar1(1 + t | subject)", DataError, r"effects in an order: write 'ar1\(0 \+ f \| g\)'.*C\(t\) makes a factor"),
        ("ar1(0 + t | subject)", DataError, r"'t' holds numbers, of which C\(t\)"),
        ("toep(visit | subject)", DataError, "effects in an order"),
        ("adh(0 + visit:arm | subject)", DataError, "effects in an order"),
        ("hetar1(1 | subject)", DataError, "effects in an order"),
        ("cs(1 | subject)", DataError, r"one effect has no correlations: write '\(1 \| subject\)'"),
    ],
)
def test_what_has_no_meaning_is_refused(formula, error, message):
    for data in (three(), [three()[:90], three()[90:]]):
        with pytest.raises(error, match=message):
            mj.lmm(f"y ~ t + {formula}", data)


def test_a_residual_variance_that_cannot_be_told():
    """One row at every visit: structures that hold D + c I are refused, those whose correlations fall are not."""
    one = visits()[visits()["rep"] == 1]
    for name in ("us", "diag", "homdiag", "homcs", "cs", "homtoep", "toep"):
        hint = "" if name in ("us", "diag") else ", which ar1, hetar1 and adh can"
        with pytest.raises(DataError, match=f"residual variance cannot be told from the random effects{hint}"):
            mj.lmm(f"y ~ t + {name}(0 + visit | subject)", one)
    for name in ("ar1", "hetar1", "adh"):
        fit = mj.lmm(f"y ~ t + {name}(0 + visit | subject)", one)
        assert fit.converged
        assert fit.sigma > 0
    # Two visits have one correlation, three or more tell.
    with pytest.raises(DataError, match="cannot be told"):
        mj.lmm("y ~ 1 + ar1(0 + visit | subject)", one[one["visit"].isin(["v1", "v2"])])
    pairs = one[[int(v[1:]) % 3 == int(s[1:]) % 3 for v, s in zip(one["visit"], one["subject"], strict=True)]]
    with pytest.raises(DataError, match="no level of 'subject' has rows at three of the effects"):
        mj.lmm("y ~ 1 + ar1(0 + visit | subject)", pairs)
    assert mj.lmm("y ~ 1 + ar1(0 + visit | subject)", pairs, check_identifiable=False).nobs == len(pairs)
    # Few levels with two rows at a visit are enough for a structure.
    few = visits()[(visits()["rep"] == 1) | (visits()["subject"] < "S03")]
    assert len(few) < 180
    assert mj.lmm("y ~ 1 + homcs(0 + visit | subject)", few).converged


def test_effects_of_single_rows_in_generalised_models():
    """Counts have a variance of their own, beside which any structure stands; single trials say nothing."""
    one = visits()[visits()["rep"] == 1].assign(late=lambda d: (d["y"] > 12) * 1)
    for name in ("homcs", "toep", "ar1"):
        assert mj.glmm(f"count ~ t + {name}(0 + visit | subject)", one, family="poisson").converged
    with pytest.raises(DataError, match="single trials, each 0 or 1, say nothing of effects of single rows"):
        mj.glmm("late ~ t + ar1(0 + visit | subject)", one, family="binomial")


def test_order_and_gaps_of_levels():
    data = visits().assign(w=visits()["t"].map(dict(enumerate(["w1", "w2", "w4", "w8", "w16", "w32"], 1))))
    with pytest.warns(DataWarning, match="takes the levels in the order w1, w16, w2, w32, w4 and 1 more: make a categ"):
        mj.lmm("y ~ 1 + toep(0 + w | subject)", data)
    data["w"] = pd.Categorical(data["w"], ["w1", "w2", "w4", "w8", "w16", "w32"])
    with pytest.warns(DataWarning, match="counts distance in levels: w2 and w4 are taken as neighbours"):
        mj.lmm("y ~ 1 + ar1(0 + w | subject)", data)
    names = ["base", "early", "mid", "late", "end", "post"]
    data["w"] = pd.Categorical(data["t"].map(dict(enumerate(names, 1))), names)
    with pytest.warns(DataWarning, match="mid of 'w' has none: the levels on both sides are taken as neighbours"):
        mj.lmm("y ~ 1 + hetar1(0 + w | subject)", data[data["w"] != "mid"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mj.lmm("y ~ 1 + ar1(0 + w | subject)", data[~data["w"].isin(["base", "post"])])  # what is not between
        mj.lmm("y ~ 1 + adh(0 + w | subject)", data)  # no distances
        wanted = mj.lmm("y ~ 1 + ar1(0 + visit | subject)", visits())
        by_number = mj.lmm("y ~ 1 + ar1(0 + C(t) | subject)", visits())
    assert by_number.criterion == pytest.approx(wanted.criterion, rel=1e-13)


def test_two_terms_of_different_structure():
    """Factors are sorted by levels; each term keeps its own structure, names and number of parameters."""
    rng = np.random.default_rng(1)
    data = visits().assign(site=rng.integers(0, 8, len(visits())))
    data["y"] = data["y"] + rng.normal(size=8)[data["site"]]
    a = mj.lmm("y ~ t + homcs(0 + arm | site) + hetar1(0 + visit | subject)", data)
    b = mj.lmm("y ~ t + ar1(0 + visit | subject, hom = FALSE) + cs(0 + arm | site, hom = TRUE)", data)
    assert a.criterion == pytest.approx(b.criterion, abs=1e-8)
    assert a.npar == b.npar == 2 + 7 + 2 + 1
    names = list(a.variance_parameters().index)
    assert names == list(b.variance_parameters().index)
    assert names[:2] == ["sd_visit[v1]|subject", "sd_visit[v2]|subject"]
    assert names[6:] == ["cor_lag1|subject", "sd|site", "cor|site", "sigma"]


def test_a_structure_goes_into_the_labels_of_other_models():
    fit = mj.lmm("y ~ t + ar1h(0 + visit | subject)", three())
    assert any("hetar1(0 + visit | subject)" in str(name) for name in fit.ranova().index)
    assert "cor lag 1 | subject" in str(mj.table(fit))
