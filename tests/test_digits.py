"""Digits survive huge offsets, calendar years and columns of very different size."""

import numpy as np
import pytest
from conftest import fit_of, table

import mixjax as mj

FORMULA = "Reaction ~ Days + (Days | Subject)"


@pytest.mark.parametrize("shift", [1e6, 1e7, -1e9])
def test_large_number_added_to_the_response(shift):
    reference = fit_of("sleepstudy_slopes", "REML")
    data = table("sleepstudy").assign(Reaction=lambda d: d.Reaction + shift)
    fit = mj.lmm(FORMULA, data)
    # Adding rounds every response by half a unit in its last place: that moves the criterion by no more than this.
    rounding = np.spacing(abs(shift)) * np.abs(reference.residuals()).sum() / reference.sigma**2
    assert abs(fit.criterion - reference.criterion) < max(1e-6, 2 * rounding)
    np.testing.assert_allclose(
        fit.fixef["Intercept"] - shift, reference.fixef["Intercept"], atol=1e-6 + np.spacing(shift)
    )
    np.testing.assert_allclose(fit.fixef["Days"], reference.fixef["Days"], rtol=1e-8)
    np.testing.assert_allclose(fit.theta, reference.theta, rtol=1e-6, atol=1e-7)


def test_slopes_on_calendar_years():
    """``(year | Subject)`` is the same model as ``(Days | Subject)``: its intercept lies 2000 years before."""
    reference = fit_of("sleepstudy_slopes", "REML")
    data = table("sleepstudy").assign(year=lambda d: 2000 + d.Days)
    fit = mj.lmm("Reaction ~ year + (year | Subject)", data)
    assert abs(fit.criterion - reference.criterion) < 1e-6
    np.testing.assert_allclose(fit.fixef["year"], reference.fixef["Days"], rtol=1e-8)
    T = np.array([[1.0, -2000.0], [0.0, 1.0]])  # effects at year 0 from effects at year 2000
    np.testing.assert_allclose(fit.Sigma["Subject"], T @ reference.Sigma["Subject"] @ T.T, rtol=1e-6)
    np.testing.assert_allclose(fit.ranef()["Subject"].to_numpy(), reference.ranef()["Subject"] @ T.T, rtol=1e-5)
    assert not fit.is_singular


@pytest.mark.parametrize("reml", [True, False])
def test_raw_cubic_in_calendar_years(reml):
    data = table("sleepstudy").assign(year=lambda d: 2000 + d.Days)
    near = mj.lmm("Reaction ~ Days + I(Days^2) + I(Days^3) + (Days | Subject)", data, reml=reml)
    far = mj.lmm("Reaction ~ year + I(year^2) + I(year^3) + (year | Subject)", data, reml=reml)
    assert far.labels.dropped_columns == ()
    assert abs(far.criterion - near.criterion) < 1e-6
    b0, b1, b2, b3 = near.fixef
    c = 2000.0
    expanded = [b0 - b1 * c + b2 * c**2 - b3 * c**3, b1 - 2 * b2 * c + 3 * b3 * c**2, b2 - 3 * b3 * c, b3]
    np.testing.assert_allclose(far.fixef, expanded, rtol=1e-6)
    np.testing.assert_allclose(far.fitted, near.fitted, atol=1e-5)
    # A real redundancy is still found.
    with pytest.warns(mj.DataWarning, match=r"I\(3 \* year\)"):
        mj.lmm("Reaction ~ year + I(3 * year) + (1 | Subject)", data)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_columns_of_any_size(factor):
    reference = fit_of("sleepstudy_slopes", "REML")
    data = table("sleepstudy").assign(x=lambda d: d.Days * factor, y=lambda d: d.Reaction / factor)
    fit = mj.lmm("y ~ x + (x | Subject)", data)
    # y scaled by 1/f and the columns of X by (1, f): both enter the REML criterion.
    n, p = fit.X.shape
    expected = reference.criterion - 2 * (n - p) * np.log(factor) + 2 * np.log(factor)
    np.testing.assert_allclose(fit.criterion, expected, atol=1e-6)
    np.testing.assert_allclose(fit.sigma * factor, reference.sigma, rtol=1e-7)
    np.testing.assert_allclose(fit.theta * [1, 1 * factor, factor], reference.theta, rtol=1e-6)
    assert not fit.is_singular


def test_slopes_on_seconds_since_1970_are_not_singular():
    """The effects' own correlation rounds to -1, but the covariance has full rank."""
    reference = fit_of("sleepstudy_slopes", "REML")
    data = table("sleepstudy").assign(t=lambda d: 1.7e9 + d.Days)
    fit = mj.lmm("Reaction ~ t + (t | Subject)", data)
    assert abs(fit.criterion - reference.criterion) < 1e-6
    assert not fit.is_singular
    np.testing.assert_allclose(fit.Sigma["Subject"][1, 1], reference.Sigma["Subject"][1, 1], rtol=1e-6)
    np.testing.assert_allclose(fit.fitted, reference.fitted, atol=1e-5)
