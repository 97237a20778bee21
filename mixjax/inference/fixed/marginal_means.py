"""Marginal means and their contrasts: tables of estimates, tests, intervals and letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import check_level
from mixjax.inference.fixed.contrast_methods import (
    PAIRWISE,
    contrast_weights,
    default_adjustment,
    interaction_weights,
    method_named,
)
from mixjax.inference.fixed.contrasts import combinations, ddf_note
from mixjax.inference.fixed.effect_sizes import residual_deviation
from mixjax.inference.fixed.families import (
    COLUMNS,
    Combinations,
    FamilyTests,
    adjustment_named,
    family_note,
    family_tests,
)
from mixjax.inference.fixed.grid import as_text
from mixjax.inference.fixed.letters import letters_of
from mixjax.markup import Report, Reported
from mixjax.tables import NotedTable, frame_report

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

NOT_ESTIMABLE = "NaN: not estimable, because columns of X were left out of the fit"
SAME = "df NaN: the model makes these equal, whatever the data"


class Contrasts(NamedTuple):
    """Linear functions of marginal means.

    Attributes:
        labels: r rows, columns of ``by`` and of names. weights: ``(r, k)``. family: ``(r,)``, which cell of ``by``.
    """

    labels: pd.DataFrame
    weights: np.ndarray
    family: np.ndarray


@dataclass(frozen=True)
class MarginalMeans(Reported):
    """Marginal means, or slopes: linear functions of the fixed effects for the cells of some factors.

    Attributes:
        cells: the factors, one row per mean; those of ``by`` first, the last varies fastest.
        by: names of the factors whose levels are looked at one by one.
        W: ``(k, p)`` weights of the fixed effects. offset: ``(k,)`` known parts.
        open: ``(k, d)``, not zero where a mean depends on columns that were left out of the fit.
        title: what ``str()`` says above.
        ddf, level: method of the degrees of freedom, coverage of the intervals.
        cautions: notes on interactions that the means average over.
    """

    fitted: AnyRecord
    cells: pd.DataFrame
    by: tuple[str, ...]
    W: np.ndarray
    offset: np.ndarray
    open: np.ndarray
    title: str
    ddf: str
    level: float
    cautions: tuple[str, ...] = ()

    # --- tables -------------------------------------------------------------------------------------------------------

    def to_frame(self) -> pd.DataFrame:
        """The cells with estimate, std_error, df, lower, upper; printed with notes (``attrs["notes"]``)."""
        found = family_tests(self.combinations(np.eye(len(self.W))), level=self.level).table[COLUMNS[:5]]
        frame = pd.concat([self.cells, found], axis=1)
        return NotedTable(frame, (f"{ddf_note(self.ddf)}, {100 * self.level:g} % intervals", *self._notes(frame)))

    def contrasts(
        self,
        method: Any = "pairwise",
        adjust: str | None = None,
        *,
        level: float | None = None,
        ref: Any = None,
        interaction: Any = None,
        family: Literal["within", "all"] = "within",
    ) -> pd.DataFrame:
        """Compare the means within every cell of ``by``; p values and intervals are adjusted within it, too.

        Args:
            method: ``"pairwise"``: all differences, earlier minus later, ``"revpairwise"``: later minus earlier;
                ``"trt.vs.ctrl"``: each minus the control ``ref``, ``"trt.vs.ctrlk"``: minus the last; ``"consec"``:
                each minus the one before; ``"mean_chg"``: mean of those after a point minus mean of those before;
                ``"poly"``: orthogonal polynomials of up to degree 6, for equally spaced levels; ``"eff"``: each minus
                the average, ``"del.eff"``: minus the average of the others. Or weights of your own: a dict name ->
                ``(k,)``, an array ``(r, k)``, a data frame with a contrast in each row and the means as columns.
            adjust: ``"tukey"`` (pairwise only; studentized range of all means, also of those that cannot be
                estimated), ``"dunnett"`` or ``"mvt"`` (multivariate t with the contrasts' own correlations, the two
                are the same), ``"sidak"``, ``"scheffe"``, ``"bonferroni"``, ``"holm"``, ``"fdr"`` (Benjamini and
                Hochberg) or ``"none"``; R's ``"BH"``, ``"dunnettx"`` and ``"Tukey"`` are understood. None: as
                emmeans, tukey for pairwise, dunnett for a control, mvt for consec and mean_chg, fdr for eff and
                del.eff, none for poly, interactions and your own weights.
            level: joint coverage of the intervals of a family; None: that of the means.
            ref: the control of ``"trt.vs.ctrl"``: name of a mean, or its position counted from 0. None: the first.
            interaction: products of contrasts over several factors: True for ``method`` in each, or a method for all,
                a list with one for each factor, or a dict factor -> method.
            family: which tests are adjusted together: ``"within"``: those of one cell of ``by``; ``"all"``: those of
                all cells, as ``summary(contrasts, by = NULL)`` in emmeans. With ``adjust=None`` the multivariate t
                then takes the place of Tukey's and Dunnett's distributions, which are those of one cell.

        Returns:
            DataFrame: the columns of ``by``, contrast (with ``interaction`` one column for each factor, such as
            recipe_pairwise), estimate, std_error, df, lower, upper, statistic, p_value; of ratios ``odds_ratio`` or
            ``ratio`` in place of estimate, and ``null``, which is 1. When printed it says how its
            numbers came about (``attrs["notes"]``). Holm's and fdr's p values have no intervals: these are
            Bonferroni's.

        Raises:
            ValueError: no such method, adjustment, mean or factor, or weights that do not fit.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("angle ~ recipe + (1 | recipe:replicate)", mj.datasets.load("cake"))
            >>> print(fit.emmeans("recipe").contrasts()[["contrast", "estimate", "lower", "upper", "p_value"]].round(3))
              contrast  estimate  lower  upper  p_value
            0    A - B     1.478 -4.490  7.445     0.82
            1    A - C     1.522 -4.445  7.490     0.81
            2    B - C     0.044 -5.923  6.012     1.00
        """
        if family not in ("within", "all"):
            raise ValueError(f"family must be 'within' or 'all', got {family!r}")
        together = family == "all" and len(self._groups) > 1
        pairs = isinstance(method, str) and method_named(method) in PAIRWISE and not _given(interaction)
        if adjust is None:
            adjust = "none" if _given(interaction) else default_adjustment(method)
            if together and adjust in ("tukey", "dunnett"):
                adjust = "mvt"
        adjust = adjustment_named(adjust)
        if adjust == "tukey" and not pairs:
            raise ValueError("adjust='tukey' is for all pairwise differences; use 'mvt'")
        found = self.contrast_rows(method, ref, interaction)
        if together:
            if adjust == "tukey":
                raise ValueError("adjust='tukey' is for the differences within one cell; with family='all' use 'mvt'")
            found = found._replace(family=np.zeros_like(found.family))
        return self._table(found, self.combinations(found.weights), adjust, level)

    def letters(self, alpha: float = 0.05, adjust: str = "tukey", descending: bool = False) -> pd.DataFrame:
        """Means in order, with letters: two that share one are not significantly different.

        By insertion and absorption (Piepho 2004, J. Comput. Graph. Stat. 13, 456), within every cell of ``by``. Sharing
        a letter does not show that means are equal.

        Args:
            alpha: level of the tests. adjust: of the pairwise differences, as in :meth:`contrasts`.
            descending: the largest mean first; it has ``a`` then.

        Returns:
            DataFrame: as :meth:`to_frame`, sorted, with a column ``group``; empty for means that cannot be estimated,
            which come last.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("angle ~ temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
            >>> fit.emmeans("temperature").letters()[["temperature", "group"]].T
                           0    1    2    3    4    5
            temperature  175  185  195  205  225  215
            group          a   ab    b    b    c    c
        """
        check_level_named("alpha", alpha)
        adjust = adjustment_named(adjust)
        frame = pd.DataFrame(self.to_frame())
        pairs = self.contrast_rows("pairwise")
        p = family_tests(self.combinations(pairs.weights), adjust, 1 - alpha, 0.0, pairs.family, self._family_size)
        differ = np.zeros((len(frame), len(frame)), bool)
        for w, one in zip(pairs.weights, p.table["p_value"], strict=True):
            i, j = np.flatnonzero(w)
            differ[i, j] = differ[j, i] = one < alpha
        parts = []
        for rows in self._groups:
            estimate = frame["estimate"].to_numpy()[rows]
            order = np.argsort(-estimate if descending else estimate, kind="stable")  # NaN last
            there = rows[order[np.isfinite(estimate[order])]]
            groups = letters_of(differ[np.ix_(there, there)])
            parts.append(frame.iloc[rows[order]].assign(group=[*groups, *[""] * (len(rows) - len(there))]))
        how = f"means with a common letter are not significantly different at {alpha:g}"
        note = family_note(adjust, None, len(pairs.weights) // len(self._groups), self._family_size, self.by, p)
        first, *others = self.to_frame().attrs["notes"]
        return NotedTable(pd.concat(parts, ignore_index=True), (first, f"{how}, {note}", *others))

    def eff_size(
        self, sigma: float | None = None, edf: float | None = None, method: Any = "pairwise", level: float | None = None
    ) -> pd.DataFrame:
        """Contrasts in units of a standard deviation: Cohen's d of model means, as ``emmeans::eff_size``.

        Standard errors by the delta method, the estimates of means and sigma taken as independent: ``(se / sigma)^2 +
        d^2 / (2 edf)``. Intervals take the contrast's own t quantiles and are not adjusted.

        Args:
            sigma: the standard deviation; None: the residual one of the fit. With random effects there are others, such
                as that of all variance together, which make smaller effects: say which you mean.
            edf: degrees of freedom that sigma is estimated with. None: of the fit's own sigma those of a chi-square
                variable with the variance that the information gives sigma^2 (Satterthwaite); a sigma that is given is
                taken as known.
            method: as in :meth:`contrasts`. level: coverage; None: that of the means.

        Returns:
            DataFrame: the columns of ``by``, contrast, estimate, std_error, df, lower, upper. Notes say which sigma.

        Raises:
            ValueError: sigma or edf that are no positive numbers, or no information on sigma at a fit without a regular
                Hessian.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("distance ~ Sex + (1 | Subject)", mj.datasets.load("Orthodont"))
            >>> fit.emmeans("Sex").eff_size().round(2)["estimate"].tolist()
            [1.05]
        """
        check_level(self.level if level is None else level)
        given = sigma is not None
        for name, value in (("sigma", sigma), ("edf", edf)):
            if value is not None and (isinstance(value, bool | str) or not np.ndim(value) == 0 or not value > 0):
                raise ValueError(f"{name} must be a positive number or None, got {value!r}")
        scale, own_edf = (float(sigma), np.inf) if sigma is not None else residual_deviation(self.fitted, edf is None)
        edf = own_edf if edf is None else edf
        rows = self.contrast_rows(method)
        found = self.combinations(rows.weights)
        d, se = found.estimate / scale, found.std_error / scale
        found = found._replace(estimate=d, std_error=np.sqrt(se**2 + d**2 / (2.0 * edf)))
        table = self._table(rows, found, "none", level)
        which = "as given" if given else "the residual standard deviation of the fit"
        known = "taken as known" if np.isinf(edf) else f"with {edf:.4g} degrees of freedom"
        notes = (f"in units of sigma = {scale:.5g}, {which}, {known}", *table.attrs["notes"])
        notes = tuple(note.replace("p values and ", "") for note in notes)
        return NotedTable(pd.DataFrame(table).drop(columns=["statistic", "p_value"]), notes)

    def regrid(self, transform: str) -> MarginalMeans:
        """Of means of the response, see :meth:`mixjax.inference.fixed.generalized_means.ResponseMeans.regrid`.

        Raises:
            ValueError: these are means of a linear predictor, or of a linear model.
        """
        raise ValueError(
            "regrid() compares means of the response of a generalised model by ratios: take scale='response' or "
            "integrate=True"
        )

    # --- what they stand on -------------------------------------------------------------------------------------------

    def contrast_rows(self, method: Any = "pairwise", ref: Any = None, interaction: Any = None) -> Contrasts:
        """Contrasts as weights of the means, within every cell of ``by``; arguments as in :meth:`contrasts`."""
        others = self.cells.drop(columns=list(self.by))
        first = others.iloc[self._groups[0]]
        if _given(interaction):
            levels = {name: list(dict.fromkeys(map(as_text, first[name]))) for name in others.columns}
            labels, weights = interaction_weights(method, interaction, levels, ref, self._between)
        else:
            names = [" ".join(map(as_text, row)) for row in first.itertuples(index=False)]
            found = contrast_weights(method, names, ref, self._between)
            labels = pd.DataFrame({"contrast": list(found)}, dtype=object)
            weights = np.reshape(list(found.values()), (-1, len(names)))
        n, k = len(self._groups), len(self.W)
        table = np.zeros((n, len(weights), k))
        for g, rows in enumerate(self._groups):
            table[g][:, rows] = weights
        family = np.repeat(np.arange(n), len(weights))
        where = {name: self.cells[name].take(self._groups[family, 0]).reset_index(drop=True) for name in self.by}
        return Contrasts(
            pd.concat([pd.DataFrame(where), pd.concat([labels] * n, ignore_index=True)], axis=1),
            table.reshape(-1, k),
            family,
        )

    def combinations(self, weights: np.ndarray) -> Combinations:
        """Linear combinations ``(r, k)`` of the means."""
        L = weights @ self.W
        # Differences that cancel leave roundings, which no standard error should be made of.
        L = np.where(np.abs(L) <= 1e-13 * (np.abs(weights) @ np.abs(self.W)), 0.0, L)
        exists = self.estimable(weights)
        some = exists & L.any(axis=1)
        estimate, std_error, df = np.full((3, len(L)), np.nan)
        estimate[exists] = std_error[exists] = 0.0
        root = np.zeros_like(L)
        if some.any():
            estimate[some], std_error[some], df[some], root[some] = combinations(self.fitted, L[some], self.ddf)
        return Combinations(estimate + weights @ self.offset, std_error, df, root)

    def estimable(self, weights: np.ndarray) -> np.ndarray:
        """``(r,)``: do combinations depend on nothing that was left out of the fit?"""
        met: np.ndarray = (np.abs(weights @ self.open) <= 1e-8 * (np.abs(weights) @ np.abs(self.open))).all(axis=1)
        return met

    @property
    def ratio(self) -> str:
        """What contrasts are called where they are ratios; empty where they are differences."""
        return ""

    @property
    def _between(self) -> str:
        """What stands between the names of two means that are compared."""
        return " / " if self.ratio else " - "

    @property
    def _groups(self) -> np.ndarray:
        """``(g, m)`` rows of the cells of ``by``."""
        others = self.cells.drop(columns=list(self.by))
        return np.arange(len(self.cells)).reshape(-1, len(others.drop_duplicates()) if len(others.columns) else 1)

    @property
    def _family_size(self) -> int:
        """As in emmeans, the family is that of all means, also of those that cannot be estimated."""
        size: int = self._groups.shape[1]
        return size

    def _table(self, rows: Contrasts, found: Combinations, adjust: str, level: float | None) -> pd.DataFrame:
        level = self.level if level is None else level
        check_level(level)
        tests: FamilyTests = family_tests(found, adjust, level, 0.0, rows.family, self._family_size)
        families = len(np.unique(rows.family)) or 1
        within = self.by if adjust != "none" and families == len(self._groups) else ()
        note = family_note(adjust, level, len(rows.weights) // families, self._family_size, within, tests)
        table = pd.concat([rows.labels, tests.table], axis=1)
        return NotedTable(table, (f"{ddf_note(self.ddf)}, {note}", *self._notes(tests.table)))

    def _notes(self, frame: pd.DataFrame) -> tuple[str, ...]:
        notes = [NOT_ESTIMABLE] * bool(frame["estimate"].isna().any())
        return (*notes, *[SAME] * bool((frame["std_error"] == 0).any()), *self.cautions)

    def _report(self) -> Report:
        frame = self.to_frame()
        return frame_report(frame, [self.title], frame.attrs["notes"])

    def __str__(self) -> str:
        frame = self.to_frame()
        text = frame.to_string(index=False, float_format=lambda x: f"{x:.5g}")
        return "\n".join([self.title, text, *frame.attrs["notes"]])

    __repr__ = __str__


def _given(interaction: Any) -> bool:
    return interaction is not None and interaction is not False


def check_level_named(name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value < 1."""
    try:
        check_level(value)
    except ValueError:
        raise ValueError(f"{name} must be between 0 and 1, such as 0.05, got {value!r}") from None
