"""Many fits of one model, which know the model that they are fits of: tests of their fixed effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from mixjax.fitted.batch import BatchFit
from mixjax.fitted.options import ddf_of
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed import hypotheses
from mixjax.inference.fixed.contrasts import basis_of_rows, check_ddf, satterthwaite, two_sided
from mixjax.inference.fixed.repeated_many import f_tests_of_many, t_tests_of_many
from mixjax.products.responses import Responses
from mixjax.waiting import Waiting


@dataclass(frozen=True, repr=False)
class ModelBatch(BatchFit):
    """Many fits of one model, linear or generalised; see :class:`~mixjax.fitted.batch.BatchFit`.

    Attributes:
        fit: the model. Y: ``(B, nobs)`` its responses. reml: of linear models.
    """

    fit: Any = None
    Y: np.ndarray | None = None
    reml: bool = True

    def test(self, L: Any, ddf: str | None = None, joint: bool | None = None) -> pd.DataFrame:
        """The tests of :meth:`LMMFit.test` or :meth:`GLMMFit.test` in every fit.

        t tests with Satterthwaite's degrees of freedom take as long as the fits themselves, z and chi-square tests
        nothing; F tests and Kenward-Roger's are made fit by fit, some 10 ms each.

        Args:
            L: as there.
            ddf: ``"satterthwaite"`` (None, the default), ``"kenward-roger"`` or ``"wald"`` of linear models;
                generalised ones have Wald's tests only.
            joint: True for one test of all rows together, False for one of each; None: together where there are
                several.

        Returns:
            DataFrame with one row per response: of one hypothesis estimate, std_error, df, statistic, p_value; of
            several together num_df, den_df, statistic, p_value (linear) or statistic, df, p_value (generalised); of
            several one by one columns (hypothesis, ...). NaN where a fit failed.

        Raises:
            ValueError: hypotheses that cannot be read, or degrees of freedom that the model has not.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.refit_many(fit.simulate(key=0, n=20)).test("Days = 10")["p_value"].shape
            (20,)
        """
        method = self._method(ddf)
        weights, rhs, names = hypotheses.contrast_matrix(self.fit.record, L)
        together = joint if joint is not None else len(weights) > 1
        if together and self.family is not None:
            return self._failed_apart(self._chi_square(weights, rhs))
        if together or method.startswith("kenward-roger") or (method != "wald" and type(self.fit.record) is not Fitted):
            return self._one_by_one(L, method, together, names)
        estimate = np.asarray(self.estimates.beta) @ weights.T
        if method == "wald":
            se = np.sqrt(np.einsum("rp,bpq,rq->br", weights, self.estimates.vcov, weights))
            df = np.full(se.shape, np.inf)
        else:
            products = Responses(self.fit.record.rows).products(np.asarray(self.Y))
            found = satterthwaite(self.estimates, products, weights, self.reml)  # type: ignore[arg-type]
            se, df = found.se, found.df
        with np.errstate(invalid="ignore", divide="ignore"):
            t = (estimate - rhs) / se
        tests = {"estimate": estimate, "std_error": se, "df": df, "statistic": t, "p_value": two_sided(t, df)}
        return self._failed_apart(_by_hypothesis(tests, names))

    def _method(self, ddf: str | None) -> str:
        if self.family is not None:
            if ddf not in (None, "wald"):
                raise ValueError(f"generalised models have Wald's tests only: leave ddf={ddf!r} out")
            return "wald"
        method: str = ddf_of(ddf or "satterthwaite")
        check_ddf(method)
        if method.startswith("kenward-roger") and not self.reml:
            raise ValueError("Kenward-Roger needs REML estimates: make the fits with reml=True")
        return method

    def _chi_square(self, weights: np.ndarray, rhs: Any) -> pd.DataFrame:
        basis, values = basis_of_rows(weights, np.broadcast_to(np.asarray(rhs, np.float64), len(weights)))
        r, statistic = len(basis), np.full(len(self), np.nan)
        difference = np.asarray(self.estimates.beta)[self.ok] @ basis.T - values
        vcov = basis @ np.asarray(self.estimates.vcov)[self.ok] @ basis.T
        statistic[self.ok] = (difference * np.linalg.solve(vcov, difference[..., None])[..., 0]).sum(1)
        return pd.DataFrame({"statistic": statistic, "df": float(r), "p_value": special.chdtrc(r, statistic)})

    def _one_by_one(self, L: Any, method: str, joint: bool, names: Sequence[str]) -> pd.DataFrame:
        """By the tests of single fits."""
        assert self.Y is not None
        tests: dict[int, pd.DataFrame] = {}
        with Waiting(f"testing {len(self)} fits one by one"):
            for i in map(int, self.ok):
                tests[i] = self.fit.refit(self.Y[i], self.reml).test(L, method, joint)
        if not tests:
            raise ValueError(f"none of the {len(self)} fits has converged: there is nothing to test; see .counts")
        columns = ["num_df", "den_df", "statistic", "p_value"] if joint else list(TESTS)
        shape = (len(self), 1 if joint else len(names))
        values = {name: np.full(shape, np.nan) for name in columns}
        for i, table in tests.items():
            for name in columns:
                values[name][i] = table[name]
        return _by_hypothesis(values, names[:1] if joint else names)

    def _failed_apart(self, frame: pd.DataFrame) -> pd.DataFrame:
        failed = ~np.asarray(self.estimates.converged)
        return frame.set_axis(_replicates(len(self))).mask(np.broadcast_to(failed[:, None], frame.shape))


@dataclass(frozen=True, repr=False)
class RepeatedBatch(BatchFit):
    """Many fits of one model for repeated measures; see :class:`~mixjax.fitted.batch.BatchFit`.

    Attributes:
        fit: the model. Y: ``(B, nobs)`` its responses.
    """

    fit: Any = None
    Y: np.ndarray | None = None

    def _family_parameters(self) -> dict[str, np.ndarray]:
        return {}

    @property
    def sigma(self) -> pd.Series:
        """Not there; see ``sdcor``."""
        raise AttributeError("repeated measures have no single sigma: sdcor has the standard deviations")

    def test(self, L: Any, ddf: str | None = None, joint: bool | None = None) -> pd.DataFrame:
        """The tests of :meth:`MMRMFit.test` in every fit, batch by batch.

        Args:
            L: as there. ddf: None for the fit's own.
            joint: one F test of all rows; None: of several rows.

        Returns:
            DataFrame with one row per response: of one hypothesis estimate, std_error, df, statistic, p_value; of
            several together num_df, den_df, statistic, p_value; of several one by one columns (hypothesis, ...). NaN
            where a fit failed.
        """
        assert self.Y is not None
        record, method = self.fit.record, self.fit._method(ddf)
        weights, rhs, names = hypotheses.contrast_matrix(record, L)
        est: Any = self.estimates
        if joint if joint is not None else len(weights) > 1:
            return f_tests_of_many(record.rows, record.reml, self.Y, est, weights, rhs, method)
        return _by_hypothesis(t_tests_of_many(record.rows, record.reml, self.Y, est, weights, rhs, method), names)


TESTS = ("estimate", "std_error", "df", "statistic", "p_value")


def _by_hypothesis(tests: Mapping[str, np.ndarray], names: Sequence[str]) -> pd.DataFrame:
    """From arrays ``(B, r)``: a row for each response; of several hypotheses columns (hypothesis, ...)."""
    index = _replicates(len(next(iter(tests.values()))))
    frames = [pd.DataFrame({name: a[:, i] for name, a in tests.items()}, index) for i in range(len(names))]
    return frames[0] if len(frames) == 1 else pd.concat(frames, axis=1, keys=names)


def _replicates(B: int) -> pd.RangeIndex:
    return pd.RangeIndex(B, name="replicate")
