"""The methods of a generalised linear mixed model that look for what is wrong: a thin face over ``diagnostics``."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mixjax.face.diagnosing import Examining
from mixjax.fitted.generalized import GeneralizedFitted


class GeneralizedDiagnosing(Examining):
    """Methods of an object with a ``record``."""

    record: GeneralizedFitted

    def overdispersion(self, key: Any = 0, n: int = 250) -> pd.DataFrame:
        """Is there more variance given the random effects than the family says?

        The statistic is Pearson's: the sum of squared residuals at the modes of the random effects, over the standard
        deviations that the family gives there.

        * ``pearson``: that over the residual degrees of freedom, ``nobs - npar``, and the p value of the chi-square
          distribution, as is done everywhere. It is wrong where means are small, and where random effects take up part
          of the variance: with many levels of few rows the ratio is below 1 in a correct model.
        * ``simulation``: that over its mean in ``n`` responses simulated from the fit, each with its own random
          effects and their modes given the parameters of the fit. **This is the one to trust**: it knows what small
          means and shrinkage do. Parameters are taken as known, which makes it a little conservative.

        Args:
            key: int or JAX key. n: simulated responses.

        Returns:
            DataFrame, rows ``pearson`` and ``simulation``: ``statistic`` (a ratio: 1 where the family is right, above
            where there is more variance), ``df``, ``p_value`` (of as large a ratio; small: overdispersed).

        Raises:
            ValueError: the responses are single outcomes, 0 or 1, which have no variance of their own.

        Example:
            >>> import mixjax as mj, numpy as np
            >>> data = {"y": np.random.default_rng(0).negative_binomial(1, 0.2, 200), "g": np.arange(200) // 10}
            >>> mj.glmm("y ~ 1 + (1 | g)", data, "poisson").overdispersion()["statistic"].round(1).to_dict()
            {'pearson': 3.9, 'simulation': 4.3}
        """
        from mixjax.diagnostics.dispersion import overdispersion

        return overdispersion(self.record, key, n)

    def zero_inflation(self, key: Any = 0, n: int = 250) -> pd.Series:
        """Are there more zeros than the fit gives?

        Args:
            key: int or JAX key. n: responses simulated from the fit, random effects anew.

        Returns:
            Series: ``observed`` zeros, ``expected``, their mean number in simulated responses, ``ratio`` of the two,
            ``p_value``, two-sided, from the simulated numbers.

        Raises:
            ValueError: responses of the family are never zero, or are single outcomes.

        Example:
            >>> import mixjax as mj, numpy as np
            >>> rng = np.random.default_rng(0)
            >>> data = {"y": rng.poisson(3, 200) * (rng.random(200) < 0.7), "g": np.arange(200) // 10}
            >>> fit = mj.glmm("y ~ 1 + (1 | g)", data, "poisson")
            >>> bool(fit.zero_inflation()["p_value"] < 0.01)
            True
        """
        from mixjax.diagnostics.dispersion import zero_inflation

        return zero_inflation(self.record, key, n)
