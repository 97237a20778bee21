"""Marginal means, contrasts and slopes against closed forms."""

import numpy as np
import pytest
import scipy.stats
from conftest import fit_of, table

import mixjax as mj
from mixjax.inference.contrasts import t_tests


@pytest.fixture(scope="module")
def cake():
    return fit_of("cake_factor", "REML")


def test_means_of_a_balanced_design_are_means_of_the_data(cake):
    data = table("cake")
    for spec in ("recipe", "temperature", ["recipe", "temperature"]):
        frame = cake.emmeans(spec).to_frame()
        wanted = data.groupby(spec, observed=True)["angle"].mean()
        np.testing.assert_allclose(frame["estimate"], wanted, rtol=1e-9)
    # Of a mean over temperatures only the replicates and the residuals vary.
    frame = cake.emmeans("recipe").to_frame()
    variance = cake.Sigma["recipe:replicate"][0, 0] / 15 + cake.sigma**2 / 90
    np.testing.assert_allclose(frame["std_error"], np.sqrt(variance), rtol=1e-8)
    np.testing.assert_allclose(frame["df"], 42.0, rtol=1e-6)
    width = scipy.stats.t.ppf(0.975, 42.0) * frame["std_error"]
    np.testing.assert_allclose(frame["upper"] - frame["estimate"], width, rtol=1e-6)


def test_pairwise_contrasts_and_their_adjustments(cake):
    means = cake.emmeans("recipe")
    plain, tukey, holm = (means.contrasts(adjust=adjust) for adjust in ("none", "tukey", "holm"))
    estimates = means.to_frame()["estimate"].to_numpy()
    np.testing.assert_allclose(plain["estimate"], estimates[[0, 0, 1]] - estimates[[1, 2, 2]], atol=1e-9)
    t = np.abs(plain["statistic"].to_numpy())
    np.testing.assert_allclose(plain["p_value"], 2 * scipy.stats.t.sf(t, 42.0), rtol=1e-6)
    wanted = scipy.stats.studentized_range.sf(np.sqrt(2) * t, 3, 42.0)
    np.testing.assert_allclose(tukey["p_value"], wanted, rtol=1e-6)
    order = np.argsort(plain["p_value"].to_numpy())
    steps = np.maximum.accumulate(plain["p_value"].to_numpy()[order] * [3, 2, 1]).clip(max=1.0)
    np.testing.assert_allclose(holm["p_value"].to_numpy()[order], steps, rtol=1e-12)


def test_coding_does_not_matter(cake):
    formula = "angle ~ recipe * temperature + (1 | recipe:replicate)"
    coded = mj.lmm(formula, table("cake"), contrasts={"recipe": "sum", "temperature": "helmert"})
    a, b = (fit.emmeans("recipe", by="temperature").contrasts() for fit in (cake, coded))
    for column in ("estimate", "std_error", "df", "p_value"):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-5, atol=1e-7)


def test_slopes_by_group():
    fit = fit_of("orthodont", "REML")
    found = fit.emtrends("Sex", "age")
    slope = [name for name in fit.labels.fixed if name.startswith("age:") or name.endswith(":age")]
    L = np.zeros((2, 4))
    L[:, list(fit.labels.fixed).index("age")] = 1.0
    L[1, list(fit.labels.fixed).index(slope[0])] = 1.0
    wanted = t_tests(fit.record, L)
    for column in ("estimate", "std_error", "df"):
        np.testing.assert_allclose(found.to_frame()[column], wanted[column], rtol=1e-6)
    pair = found.contrasts(adjust="tukey")  # of two means Tukey's is the t test
    alone = t_tests(fit.record, [L[0] - L[1]])
    np.testing.assert_allclose(pair["p_value"], alone["p_value"], rtol=1e-5)


def test_a_transformed_covariate_is_held_at_its_own_mean():
    data = table("sleepstudy")
    fit = mj.lmm("Reaction ~ np.log(Days + 1) + (1 | Subject)", data)
    found = fit.emmeans("1").to_frame()["estimate"].iloc[0]
    beta = fit.fixef.to_numpy()
    assert found == pytest.approx(beta[0] + beta[1] * np.log(data["Days"].mean() + 1), rel=1e-9)
    at = fit.emmeans("1", at={"Days": 0.0}).to_frame()["estimate"].iloc[0]
    assert at == pytest.approx(beta[0], rel=1e-9)


def test_what_is_refused(cake):
    for spec, text in (("recpie", "recpie"), ("angle", "angle")):
        with pytest.raises(ValueError, match=text):
            cake.emmeans(spec)
    with pytest.raises(ValueError, match="level"):
        cake.emmeans("recipe", level=2.0)
    with pytest.raises(ValueError, match="adjust"):
        cake.emmeans("recipe").contrasts(adjust="magic")
