"""Mixed models as scikit-learn estimators: its own checks, its tools, and the numbers of the fits below."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table

pytest.importorskip("sklearn", reason='pip install "mixjax[sklearn]"')

from sklearn import __version__
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, ShuffleSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_classifiers_train, check_estimator, check_regressors_train

import mixjax as mj
from mixjax.sklearn import MixedClassifier, MixedEncoder, MixedRegressor

SLEEP = table("sleepstudy").assign(Subject=lambda d: d["Subject"].astype(str))
SLOPES = {"fixed": "Days", "random": "(Days | Subject)"}
INTERCEPT_ONLY = "a model of an intercept and one random intercept explains little of these data"


# --- scikit-learn's own checks ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("estimator", "cannot"),
    [
        (MixedRegressor(random="(1 | x0)"), {"check_regressors_train": INTERCEPT_ONLY}),
        (MixedClassifier(random="(1 | x0)"), {"check_classifiers_train": INTERCEPT_ONLY}),
        (MixedEncoder(), {}),
        (
            MixedEncoder([0], cv=2),
            dict.fromkeys(
                ["check_transformer_general", "check_transformer_data_not_an_array"],
                "fit_transform is out of fold, fit and transform are not",
            ),
        ),
    ],
    ids=["regressor", "classifier", "encoder", "encoder of a column"],
)
def test_the_checks_of_estimators(estimator, cannot):
    """All that are not named here hold, and those that are do not."""
    if __version__.startswith(("1.6.", "1.7.")):  # their check takes a mean from whole numbers in their place
        cannot = {**cannot, "check_positive_only_tag_during_fit": "fails before the estimator is asked"}
    found = check_estimator(estimator, expected_failed_checks=cannot, on_skip=None)
    assert {check["check_name"] for check in found if check["status"] == "xfail"} == set(cannot)
    assert sum(check["status"] == "passed" for check in found) >= 40


@pytest.mark.filterwarnings("ignore")
def test_the_checks_that_need_a_model_which_explains_something():
    ten = " + ".join(f"x{j}" for j in range(10))
    check_regressors_train("MixedRegressor", MixedRegressor(ten, "(1 | x0)"))
    check_classifiers_train("MixedClassifier", MixedClassifier("x1", "(1 | x0)"))


# --- the regressor ------------------------------------------------------------------------------------------------


def test_the_regressor_is_the_fit():
    reference = fit_of("sleepstudy_slopes", "REML")
    model = MixedRegressor(**SLOPES).fit(SLEEP[["Days", "Subject"]], SLEEP["Reaction"])
    assert model.fit_.criterion == pytest.approx(reference.criterion, rel=1e-10)
    np.testing.assert_allclose(model.predict(SLEEP[["Days", "Subject"]]), reference.fitted, rtol=1e-8)
    assert model.score(SLEEP[["Days", "Subject"]], SLEEP["Reaction"]) == pytest.approx(
        r2_score(SLEEP["Reaction"], reference.fitted), rel=1e-8
    )
    new = pd.DataFrame({"Days": [3.0, 4.0], "Subject": ["new", "308"]})
    own = reference.coef()["Subject"].loc["308"]
    b0, b1 = reference.fixef
    np.testing.assert_allclose(model.predict(new), [b0 + 3 * b1, own["Intercept"] + 4 * own["Days"]], rtol=1e-8)
    with pytest.warns(mj.DataWarning, match="taken as new levels"):
        assert model.predict(new.assign(Subject=[None, "308"]))[0] == pytest.approx(b0 + 3 * b1, rel=1e-8)
    ml = MixedRegressor(**SLOPES, reml=False).fit(SLEEP, SLEEP["Reaction"].tolist())
    assert ml.fit_.criterion == pytest.approx(fit_of("sleepstudy_slopes", "ML").criterion, rel=1e-10)


def test_frames_of_other_kinds_arrays_and_names_that_are_taken():
    pl = pytest.importorskip("polars")
    reference = fit_of("sleepstudy_slopes", "REML").fitted.to_numpy()
    frame = pl.from_pandas(SLEEP)
    np.testing.assert_allclose(MixedRegressor(**SLOPES).fit(frame, frame["Reaction"]).predict(frame), reference, 1e-8)
    array = np.column_stack([SLEEP["Days"], SLEEP["Subject"].astype(int)])
    by_number = MixedRegressor("x0", "(x0 | x1)").fit(array, SLEEP["Reaction"])
    np.testing.assert_allclose(by_number.predict(array), reference, rtol=1e-8)
    renamed = SLEEP.rename(columns={"Days": "y"})
    taken = MixedRegressor("y", "(y | Subject)").fit(renamed, SLEEP["Reaction"])
    np.testing.assert_allclose(taken.predict(renamed), reference, rtol=1e-8)


def test_scores_of_new_groups_are_the_population_s():
    found = cross_val_score(
        MixedRegressor(**SLOPES), SLEEP, SLEEP["Reaction"], groups=SLEEP["Subject"], cv=GroupKFold(3)
    )
    expected = []
    for train, test in GroupKFold(3).split(SLEEP, groups=SLEEP["Subject"]):
        fixef = mj.lmm("Reaction ~ Days + (Days | Subject)", SLEEP.iloc[train]).fixef
        mean = fixef["Intercept"] + fixef["Days"] * SLEEP["Days"].iloc[test]
        expected.append(r2_score(SLEEP["Reaction"].iloc[test], mean))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_grid_search_clones_and_pickles():
    grid = GridSearchCV(
        MixedRegressor("Days"),
        {"random": ["(1 | Subject)", "(Days | Subject)"]},
        cv=KFold(5, shuffle=True, random_state=0),
    ).fit(SLEEP, SLEEP["Reaction"])
    assert grid.best_params_ == {"random": "(Days | Subject)"}
    model = grid.best_estimator_
    again = clone(model)
    assert again.get_params() == {"fixed": "Days", "random": "(Days | Subject)", "reml": True}
    assert not hasattr(again, "fit_")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(SLEEP), model.predict(SLEEP))
    assert again.set_params(reml=False).reml is False


# --- the classifier -----------------------------------------------------------------------------------------------


def test_the_classifier_is_the_fit_and_new_levels_are_averaged():
    slow = np.where(SLEEP["Reaction"] > 300, "slow", "quick")
    model = MixedClassifier("Days", "(1 | Subject)").fit(SLEEP, slow)
    fit = mj.glmm("slow ~ Days + (1 | Subject)", SLEEP.assign(slow=slow == "slow"), "binomial")
    assert model.classes_.tolist() == ["quick", "slow"]
    found = model.predict_proba(SLEEP)
    np.testing.assert_allclose(found[:, 1], fit.predict(SLEEP), rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-14)
    np.testing.assert_array_equal(model.predict(SLEEP), np.where(found[:, 1] > 0.5, "slow", "quick"))
    assert model.score(SLEEP, slow) == np.mean(model.predict(SLEEP) == slow)
    new = pd.DataFrame({"Days": [2.0, 7.0], "Subject": ["new", "newer"]})
    eta = fit.fixef["Intercept"] + fit.fixef["Days"] * new["Days"].to_numpy()
    z, w = np.polynomial.hermite_e.hermegauss(80)
    sd = np.sqrt(fit.Sigma["Subject"][0, 0])
    averaged = (1 / (1 + np.exp(-(eta[:, None] + sd * z)))) @ w / w.sum()
    columns = SLEEP.assign(Subject="new").iloc[:2].assign(Days=[2.0, 7.0])
    np.testing.assert_allclose(model.predict_proba(columns)[:, 1], averaged, rtol=1e-5)
    median = model.set_params(integrate=False).predict_proba(columns)[:, 1]
    np.testing.assert_allclose(median, 1 / (1 + np.exp(-eta)), rtol=1e-6)


def test_other_targets_than_two_classes_are_refused():
    with pytest.raises(ValueError, match=r"Only binary classification is supported.*3 classes"):
        MixedClassifier("Days", "(1 | Subject)").fit(SLEEP, np.arange(len(SLEEP)) % 3)
    with pytest.raises(ValueError, match="one class"):
        MixedClassifier("Days", "(1 | Subject)").fit(SLEEP, np.ones(len(SLEEP), int))
    with pytest.raises(ValueError, match="must be numbers"):
        MixedRegressor("Days", "(1 | Subject)").fit(SLEEP, ["a"] * len(SLEEP))


def test_bad_input_is_named():
    y = SLEEP["Reaction"]
    with pytest.raises(ValueError, match=r"random='\(1 \| g\)'.*random=None"):
        MixedRegressor("Days").fit(SLEEP, y)
    gaps = SLEEP.assign(Days=SLEEP["Days"].where(SLEEP["Days"] > 0))
    with pytest.raises(ValueError, match="NaN in 'Days'"):
        MixedRegressor(**SLOPES).fit(gaps, y)
    model = MixedRegressor(**SLOPES).fit(SLEEP, y)
    with pytest.raises(ValueError, match="NaN in 'Days'"):
        model.predict(gaps)
    with pytest.raises(ValueError, match="NaN in 'Subject'"):
        MixedRegressor(**SLOPES).fit(SLEEP.assign(Subject=SLEEP["Subject"].where(SLEEP["Days"] > 0)), y)
    MixedRegressor(**SLOPES).fit(SLEEP.assign(other=np.nan), y)  # a column that is not looked at
    with pytest.raises(ValueError, match="no column 'Hours'"):
        MixedRegressor("Hours", "(1 | Subject)").fit(SLEEP, y)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(SLEEP[["Subject", "Days"]])


# --- the encoder --------------------------------------------------------------------------------------------------


def noise(n=400, levels=80, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"city": rng.integers(0, levels, n).astype(str), "x": rng.normal(size=n)})
    return frame, rng.normal(size=n)


def test_encodings_are_shrunken_means():
    """Balanced: variances by the analysis of variance, ``b = k (mean of the level - mean)`` in closed form."""
    X, y = SLEEP[["Subject"]], SLEEP["Reaction"].to_numpy()
    encoder = MixedEncoder(["Subject"]).fit(X, y)
    means = SLEEP.groupby("Subject")["Reaction"].mean()
    between = 10 * means.var()
    within = SLEEP.groupby("Subject")["Reaction"].var().mean()
    expected = (1 - within / between) * (means - means.mean())
    found = encoder.encodings_["Subject"]
    np.testing.assert_allclose(found.loc[expected.index].astype(float), expected, rtol=1e-6)
    assert encoder.means_["Subject"] == pytest.approx(y.mean(), rel=1e-10)
    np.testing.assert_allclose(encoder.transform(X)["Subject"], expected.loc[SLEEP["Subject"]], rtol=1e-6)
    shifted = clone(encoder).set_params(add_mean=True).fit(X, y)
    new = pd.DataFrame({"Subject": ["unseen", None]})
    assert encoder.transform(new)["Subject"].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(shifted.transform(new)["Subject"], y.mean(), rtol=1e-10)


def test_fit_transform_is_out_of_fold():
    X, y = noise()
    encoder = MixedEncoder(["city"], cv=KFold(4))
    found = encoder.fit_transform(X, y)
    pd.testing.assert_series_equal(found["x"], X["x"])
    for train, test in KFold(4).split(X):
        own = clone(encoder).fit(X.iloc[train], y[train]).transform(X.iloc[test])
        np.testing.assert_array_equal(found["city"].iloc[test], own["city"])
    # Of categories without any effect nothing is to be learned; a model that saw the rows' own target would have.
    effects = np.random.default_rng(1).normal(size=80)[X["city"].astype(int)]
    for target in (y, y + effects):
        seen = clone(encoder).fit(X, target).transform(X)["city"]
        unseen = clone(encoder).fit_transform(X, target)["city"]
        assert np.mean((target - unseen) ** 2) >= np.mean((target - seen) ** 2) - 1e-12
    assert np.corrcoef(unseen, effects)[0, 1] > 0.7


def test_encodings_do_not_depend_on_names_order_or_scale():
    X, y = noise(seed=3)
    y = y + np.random.default_rng(3).normal(size=80)[X["city"].astype(int)]
    plain = MixedEncoder(["city"]).fit(X, y).transform(X)["city"].to_numpy()
    scaled = MixedEncoder(["city"]).fit(X, 1000 * y + 5).transform(X)["city"]
    np.testing.assert_allclose(scaled, 1000 * plain, rtol=1e-5, atol=1e-5)
    renamed = X.assign(city=pd.Categorical("city " + X["city"]))
    np.testing.assert_allclose(MixedEncoder().fit(renamed, y).transform(renamed)["city"], plain, rtol=1e-6)
    order = np.random.default_rng(0).permutation(len(X))
    mixed = MixedEncoder(["city"]).fit(X.iloc[order], y[order]).transform(X)["city"]
    np.testing.assert_allclose(mixed, plain, rtol=1e-6)


def test_missing_is_a_level_of_its_own_and_two_classes_have_logits():
    X, y = noise(seed=5)
    city = X["city"].mask(X["city"].astype(int) < 10)
    y = y + 3.0 * city.isna()
    encoder = MixedEncoder().fit(X.assign(city=city), y)
    for missing in (None, np.nan, pd.NA):
        new = pd.DataFrame({"city": pd.Series([missing, "new"], dtype=object), "x": 0.0})
        found = encoder.transform(new)["city"].tolist()
        assert found[0] > 2.0
        assert found[1] == 0.0
    grade = np.where(y > 0, "high", "low")
    logits = MixedEncoder(family="binomial").fit(X.assign(city=city), grade)
    assert logits.classes_.tolist() == ["high", "low"]
    fit = mj.glmm("low ~ 1 + (1 | city)", {"low": grade == "low", "city": city.fillna("missing")}, "binomial")
    own = fit.ranef()["city"]["Intercept"]
    found = logits.encodings_["city"]
    found.index = pd.Index(["missing" if pd.isna(level) else level for level in found.index])
    np.testing.assert_allclose(found.loc[own.index].astype(float), own, rtol=1e-5, atol=1e-7)


def test_the_encoder_in_pipelines():
    X, y = noise(seed=7)
    y = y + np.random.default_rng(2).normal(size=80)[X["city"].astype(int)] + X["x"]
    pipeline = make_pipeline(MixedEncoder(["city"]), StandardScaler(), LinearRegression())
    found = cross_val_score(pipeline, X, y, cv=KFold(4, shuffle=True, random_state=0))
    alone = cross_val_score(LinearRegression(), X[["x"]], y, cv=KFold(4, shuffle=True, random_state=0))
    assert (found > alone).all()
    both = make_column_transformer((MixedEncoder(), ["city"]), remainder="passthrough").set_output(transform="pandas")
    assert both.fit_transform(X, y).shape == (400, 2)
    assert pipeline[0].fit(X, y).get_feature_names_out().tolist() == ["city", "x"]
    mixed = make_pipeline(MixedEncoder(["city"]), MixedRegressor("x + city", "(1 | g)"))
    mixed.fit(X.assign(g=np.arange(400) % 20), y)
    assert mixed[-1].fit_.fixef["city"] == pytest.approx(1.0, abs=0.35)


def test_encoders_refuse_by_name():
    X, y = noise()
    with pytest.raises(ValueError, match="no column 'town' to encode; columns: 'city', 'x'"):
        MixedEncoder(["town"]).fit(X, y)
    with pytest.raises(ValueError, match=r"columns=\['city'\]"):
        MixedEncoder("city").fit(X, y)
    with pytest.raises(ValueError, match=r"column 'city' cannot be encoded.*400 random effects"):
        MixedEncoder(["city"]).fit(X.assign(city=np.arange(400).astype(str)), y)
    with pytest.raises(ValueError, match=r"column 'city' cannot be encoded.*one level"):
        MixedEncoder(["city"]).fit(X.assign(city="a"), y)
    with pytest.raises(ValueError, match="family must be"):
        MixedEncoder(["city"], family="poisson").fit(X, y)
    with pytest.raises(ValueError, match="every row in one test fold"):
        MixedEncoder(["city"], cv=ShuffleSplit(2, random_state=0)).fit_transform(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixedEncoder(["city"]).fit_transform(X, y)
