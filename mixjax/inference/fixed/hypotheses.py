"""Hypotheses about the fixed effects: what ``L beta = rhs`` a user writes, and tests of them and of whole terms."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.design import Labels
from mixjax.fitted.names import known_names
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed.contrast_methods import written
from mixjax.inference.fixed.contrasts import FixedEffects, check_ddf, combinations, ddf_note, f_test
from mixjax.inference.fixed.families import adjustment_named, family_note, family_tests
from mixjax.inference.fixed.terms import TYPES, type_contrasts
from mixjax.tables import NotedTable

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

# --- what a user writes -------------------------------------------------------------------------------------------


class Hypotheses(NamedTuple):
    """``L beta = rhs``.

    Attributes:
        L: ``(r, p)`` weights of the fixed effects, one hypothesis per row.
        rhs: ``(r,)`` values under the hypothesis.
        names: ``r`` names.
    """

    L: np.ndarray
    rhs: np.ndarray
    names: list[str]


def contrast_matrix(fitted: AnyRecord, spec: Any) -> Hypotheses:
    """Read hypotheses about the fixed effects.

    Args:
        fitted: the fit.
        spec: one of

            * a string: ``"Days = 10"``, ``"2*Days - Intercept"``, ``"recipe[T.B] = recipe[T.C]"``; without ``=`` the
              hypothesis is that it is zero. Numbers, ``+ - * /``, parentheses and names of columns of X, as formulaic
              writes them or as lme4 does: ``(Intercept)``, ``recipeB``, ``recipeB:temperature185``;
            * a dict column -> weight;
            * an array ``(p,)`` or ``(r, p)`` of weights, or a data frame with columns of X as its columns;
            * a list of strings, dicts and arrays ``(p,)``: one hypothesis each.

    Raises:
        ValueError: a name that is no column of X (with the nearest that is), a wrong number of weights, an expression
            that is not linear, or nothing at all.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.hypotheses import contrast_matrix
        >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
        >>> contrast_matrix(fit.record, "2*Days - Intercept = 5")
        Hypotheses(L=array([[-1.,  2.]]), rhs=array([5.]), names=['2*Days - Intercept = 5'])
    """
    fixed = list(fitted.labels.fixed)
    if not fixed:
        raise ValueError("the model has no fixed effects: there are no hypotheses about them")
    if isinstance(spec, pd.DataFrame):
        spec = [{str(k): v for k, v in row.items() if v != 0} for row in spec.to_dict("records")]
    if (
        isinstance(spec, Sequence)
        and not isinstance(spec, str)
        and any(isinstance(s, str) or not np.isscalar(s) for s in spec)
    ):
        rows = [_one_hypothesis(fitted.labels, one) for one in spec]
    elif isinstance(spec, str | Mapping) or np.ndim(spec) < 2:
        rows = [_one_hypothesis(fitted.labels, spec)]
    elif np.ndim(spec) == 2:
        rows = [_one_hypothesis(fitted.labels, one) for one in np.asarray(spec)]
    else:
        raise ValueError(f"weights must be ({len(fixed)},) or (r, {len(fixed)}), got shape {np.shape(spec)}")
    if not rows:
        raise ValueError("there is no hypothesis: give at least one row, dict or string")
    return Hypotheses(np.stack([row[0] for row in rows]), np.array([row[1] for row in rows]), [row[2] for row in rows])


def _one_hypothesis(labels: Labels, spec: Any) -> tuple[np.ndarray, float, str]:
    fixed = list(labels.fixed)
    if isinstance(spec, str):
        weights, rhs = _Expression(spec, labels).hypothesis()
        return weights, rhs, spec.strip()
    if isinstance(spec, Mapping):
        names = known_names(labels)
        weights = np.zeros(len(fixed))
        for name, weight in spec.items():
            weights[names[name] if name in names else _unknown(str(name), labels)] += _number(weight, name)
    else:
        weights = np.array([_number(w, "a weight") for w in spec]) if np.ndim(spec) == 1 else np.zeros(0)
        if weights.shape != (len(fixed),):
            raise ValueError(
                f"weights have shape {np.shape(spec)}, but there are {len(fixed)} fixed effects: {', '.join(fixed)}"
            )
    if not weights.any():
        raise ValueError("a hypothesis has no weight other than zero: it is about no fixed effect")
    return weights, 0.0, written(weights, fixed)


def _number(value: Any, what: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"the weight of '{what}' must be a finite number, got {value!r}")
    return number


def _unknown(name: str, labels: Labels) -> NoReturn:
    if name in labels.dropped_columns:
        raise ValueError(f"'{name}' was left out of the fit because other columns determine it: it has no estimate")
    own = [effect for effect in labels.fixed if effect.startswith(f"{name}[")]
    if own:
        raise ValueError(
            f"'{name}' is a factor, with the fixed effects {', '.join(own)}: name one of them; for all at once see "
            f"anova(), for its means and their differences emmeans({name!r}).contrasts()"
        )
    factor, bracket, level = name.partition("[T.")
    others = [effect for effect in labels.fixed if effect.startswith(f"{factor}[T.")] if bracket else []
    if others:
        raise ValueError(
            f"there is no fixed effect '{name}': '{level.rstrip(']')}' is the base level of '{factor}', which the "
            f"others are differences from, or none of its levels; there are {', '.join(others)}"
        )
    straight = [effect for effect in labels.fixed if effect.startswith(f"{name}.fx")]
    if straight:
        raise ValueError(
            f"'{name}' is a smooth: {', '.join(straight)} is its straight part, and its curve is a random term. "
            "ranova() and mixjax.exact_rlrt test the curve against the straight line, mixjax.compare the whole term"
        )
    known = known_names(labels)
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    suggested = dict.fromkeys(repr(labels.fixed[known[spelling]]) for spelling in close)
    hint = f"did you mean {' or '.join(suggested)}?" if close else f"there are {', '.join(labels.fixed)}"
    raise ValueError(f"there is no fixed effect '{name}'; {hint}")


def _pattern(name: str) -> re.Pattern[str]:
    """A name wherever spaces stand in it, up to where no name could go on."""
    tokens = re.findall(r"\w+|[^\w\s]", name)
    text = re.escape(tokens[0])
    for before, token in itertools.pairwise(tokens):
        text += (r"\s+" if re.match(r"\w", before) and re.match(r"\w", token) else r"\s*") + re.escape(token)
    return re.compile(text + r"(?=\s|[-+*/=)]|$)")


class _Expression:
    """A linear equation, read from left to right. Values are ``(p + 1,)``: weights and, last, the constant."""

    def __init__(self, text: str, labels: Labels):
        self.text, self.labels, self.at = text, labels, 0
        self.p = len(labels.fixed)
        self.names = [(_pattern(name), j) for name, j in known_names(labels).items()]

    def hypothesis(self) -> tuple[np.ndarray, float]:
        if not self.text.strip():
            self._fail("it is empty")
        value = self._sum()
        if self._take("="):
            value = value - self._sum()
        if self.at < len(self.text):
            if self._take("="):
                self._fail("it has more than one '='; write a list of equations")
            self._fail(f"expected +, -, *, / or = before '{self._rest()}'")
        if not np.isfinite(value).all():
            self._fail("it holds a number that is not finite")
        if not value[:-1].any():
            self._fail("no fixed effect is left in it")
        return value[:-1], 0.0 - value[-1]

    def _sum(self) -> np.ndarray:
        value = self._product()
        while sign := self._take("+") or self._take("-"):
            value = value + (1 if sign == "+" else -1) * self._product()
        return value

    def _product(self) -> np.ndarray:
        value = self._signed()
        while sign := self._take("*") or self._take("/"):
            other = self._signed()
            if sign == "*" and value[:-1].any():
                value, other = other, value
            if (other if sign == "/" else value)[:-1].any():
                self._fail("it is not linear: a fixed effect can only be multiplied with or divided by a number")
            if sign == "/" and other[-1] == 0:
                self._fail("it divides by zero")
            value = value[-1] * other if sign == "*" else value / other[-1]
        return value

    def _signed(self) -> np.ndarray:
        if sign := self._take("+") or self._take("-"):
            return (1 if sign == "+" else -1) * self._signed()
        return self._operand()

    def _operand(self) -> np.ndarray:
        self._skip()
        value = np.zeros(self.p + 1)
        end = self.at
        number = re.compile(r"(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(?![\w.\[])").match(self.text, self.at)
        if number:
            value[-1], end = float(number[0]), number.end()
        for pattern, j in self.names:
            name = pattern.match(self.text, self.at)
            if name and name.end() > end:
                value, end = np.eye(self.p + 1)[j], name.end()
        if end > self.at:
            self.at = end
            return value
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                self._fail("a parenthesis is not closed")
            return value
        word = re.match(r"[^\s+*/=]+", self._rest())
        if word is None:
            self._fail(
                f"expected a fixed effect or a number before '{self._rest()}'" if self._rest() else "it breaks off"
            )
        for dropped in self.labels.dropped_columns:
            if _pattern(dropped).match(self.text, self.at):
                _unknown(dropped, self.labels)
        _unknown(word[0], self.labels)

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _take(self, sign: str) -> str:
        self._skip()
        if not self.text.startswith(sign, self.at):
            return ""
        self.at += 1
        return sign

    def _rest(self) -> str:
        return self.text[self.at :]

    def _fail(self, why: str) -> NoReturn:
        raise ValueError(f"the hypothesis '{self.text}' cannot be read: {why}")


# --- tests --------------------------------------------------------------------------------------------------------


def anova(fitted: AnyRecord, type: str = "III", ddf: str = "satterthwaite") -> pd.DataFrame:
    """F tests of the terms of the fixed effects, as ``lmerTest::anova``; of a generalised model chi-square tests, as
    ``car::Anova``.

    Args:
        fitted: the fit.
        type: ``"I"``, ``"II"`` or ``"III"``, see :func:`type_contrasts`.
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``.

    Returns:
        DataFrame, one row per term (none for the intercept): sum_sq = F x num_df x sigma^2, mean_sq, num_df, den_df,
        statistic, p_value. F is the statistic, with Kenward-Roger before it is scaled, as in lmerTest. A term that
        others determine has num_df 0 and no numbers. When printed it says which tests these are (``attrs["notes"]``).

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.hypotheses import anova
        >>> fit = mj.lmm("angle ~ recipe * temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> anova(fit.record)[["num_df", "den_df", "statistic"]].round(2)
                            num_df  den_df  statistic
        recipe                   2    42.0       0.25
        temperature              5   210.0      20.52
        recipe:temperature      10   210.0       1.01
    """
    check_ddf(ddf)
    found = type_contrasts(fitted, type)
    table = _f_table(fitted, {name: (L, 0.0) for name, L in found.items()}, ddf)
    notes = [f"type {'I' * TYPES[str(type).upper()]} tests, {ddf_note(ddf)}"]
    df = "num_df" if "num_df" in table else "df"
    notes += [f"{df} 0: other terms determine this one, so there is nothing to test"] * bool((table[df] == 0).any())
    return NotedTable(table, notes)


def test(
    fitted: AnyRecord,
    L: Any,
    ddf: str = "satterthwaite",  # noqa: PT028
    joint: bool | None = None,  # noqa: PT028
    adjust: str = "none",  # noqa: PT028
    level: float = 0.95,  # noqa: PT028
) -> pd.DataFrame:
    """Test hypotheses about the fixed effects.

    Args:
        fitted: the fit.
        L: whatever :func:`contrast_matrix` reads.
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``.
        joint: True for one F test of all hypotheses together, False for a t test of each. None: an F test of several,
            as ``lmerTest::contest`` makes, and a t test of a single one, which says the same and gives the estimate;
            t tests wherever they are adjusted.
        adjust: of several t tests: ``"mvt"`` (multivariate t, single-step, as ``multcomp::glht``), ``"sidak"``,
            ``"scheffe"``, ``"bonferroni"``, ``"holm"``, ``"fdr"`` or ``"none"``.
        level: coverage of the intervals, jointly where tests are adjusted.

    Returns:
        DataFrame. t tests: a row per hypothesis, columns estimate (of the left-hand side), std_error, df, lower, upper,
        statistic, p_value. F test: one row, columns as in :func:`anova`. Notes (``attrs["notes"]``) say how the
        numbers came about.

    Raises:
        ValueError: hypotheses that cannot be read, an adjustment that there is not, or one of a joint test.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.hypotheses import test
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> test(fit.record, "Days = 10").round(3)
                   estimate  std_error    df  lower   upper  statistic  p_value
        Days = 10    10.467      1.546  17.0  7.206  13.729      0.302    0.766
    """
    if joint is not None and not isinstance(joint, bool | np.bool_):
        raise ValueError(f"joint must be True, False or None, got {joint!r}")
    adjust = adjustment_named(adjust)
    check_level(level)
    if adjust == "tukey":
        raise ValueError("adjust='tukey' is for all pairwise differences of means, emmeans(); use 'mvt' here")
    weights, rhs, names = contrast_matrix(fitted, L)
    if joint if joint is not None else len(weights) > 1 and adjust == "none":
        if adjust != "none":
            raise ValueError(f"adjust={adjust!r} is for tests one by one, joint=False; joint=True is a single F test")
        return NotedTable(_f_table(fitted, {", ".join(names): (weights, rhs)}, ddf), [ddf_note(ddf)])
    found = family_tests(combinations(fitted, weights, ddf), adjust, level, rhs)
    notes = (ddf_note(ddf), family_note(adjust, level, len(weights), found=found))
    return NotedTable(found.table.set_axis(names, axis=0), notes)


def _f_table(fitted: AnyRecord, hypotheses: Mapping[str, tuple[np.ndarray, Any]], ddf: str) -> pd.DataFrame:
    if not fitted.has_df:
        return _chi_square_table(fitted, hypotheses, ddf)
    columns = ["sum_sq", "mean_sq", "num_df", "den_df", "statistic", "p_value"]
    if ddf.startswith("kenward-roger") and not fitted.reml:  # once, not for every term; and sigma is REML's as well
        warn("Kenward-Roger needs REML estimates: the ML fit was refitted by REML", InferenceWarning)
        fitted = fitted.refitted(True)
    sigma2 = float(fitted.estimates.sigma) ** 2 if isinstance(fitted, Fitted) else np.nan
    method = FixedEffects.of(fitted, ddf) if any(len(L) for L, _ in hypotheses.values()) else None
    rows = []
    for L, rhs in hypotheses.values():
        F = f_test(fitted, L, ddf, rhs, method)
        mean_sq = F.statistic / F.scale * sigma2
        numbers = (float(F.den_df), float(F.statistic), float(F.p_value))
        rows.append((mean_sq * F.num_df, mean_sq, int(F.num_df), *numbers))
    frame = pd.DataFrame(rows, index=list(hypotheses), columns=columns)
    if not isinstance(fitted, Fitted):  # no residual variance, to which sums of squares would belong
        columns = columns[2:]
        frame = frame[columns]
    return frame.astype(dict.fromkeys(columns, float) | {"num_df": int})


def _chi_square_table(fitted: AnyRecord, hypotheses: Mapping[str, tuple[np.ndarray, Any]], ddf: str) -> pd.DataFrame:
    """Of models without a residual variance, to which sums of squares would belong."""
    method = FixedEffects.of(fitted, ddf) if any(len(L) for L, _ in hypotheses.values()) else None
    found = [f_test(fitted, L, ddf, rhs, method) for L, rhs in hypotheses.values()]
    rows = [(F.statistic * F.num_df, int(F.num_df), float(F.p_value)) for F in found]
    return pd.DataFrame(rows, index=list(hypotheses), columns=["statistic", "df", "p_value"])
