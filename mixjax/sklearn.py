"""scikit-learn estimators: mixed models as a regressor and a classifier, and categories replaced by random effects.

Imported only when asked: ``from mixjax.sklearn import MixedRegressor``; ``pip install "mixjax[sklearn]"``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, OneToOneFeatureMixin, RegressorMixin, TransformerMixin
from sklearn.model_selection import KFold, StratifiedKFold, check_cv
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from mixjax.checks import listed
from mixjax.face.generalized import GLMMFit, glmm
from mixjax.face.linear import LMMFit, lmm
from mixjax.formula.parse import ParsedFormula, parse
from mixjax.formula.reading import to_pandas

__all__ = ["MixedClassifier", "MixedEncoder", "MixedRegressor"]


class _OfFrames(BaseEstimator):
    """What the three share: reading frames, and arrays as frames with columns x0, x1, ..."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.input_tags.string = tags.input_tags.categorical = True
        return tags

    def _read(self, X: Any, y: Any = None, *, reset: bool, numeric_y: bool = False) -> tuple[pd.DataFrame, Any]:
        """X as a pandas table, and y as ``(n,)``; new columns are those of the fit, in its order."""
        is_frame = hasattr(X, "columns") and hasattr(X, "shape")
        options: dict[str, Any] = {"reset": reset, "skip_check_array": is_frame}
        if not is_frame and reset:
            options["y_numeric"] = numeric_y
        found = validate_data(self, X, y if reset else "no_validation", **options)
        X, y = found if reset else (found, None)
        if is_frame:
            if reset:
                y = column_or_1d(y, warn=True)
                check_consistent_length(X, y)
            frame = X if isinstance(X, pd.DataFrame) else to_pandas(X, X.columns)
            if frame.empty:
                raise ValueError(f"X has 0 samples or 0 features (shape={frame.shape}), and a minimum of 1 is required")
            if not hasattr(self, "feature_names_in_"):  # numbers for names
                frame = frame.set_axis([f"x{j}" for j in range(frame.shape[1])], axis=1)
        else:
            names = getattr(self, "feature_names_in_", [f"x{j}" for j in range(X.shape[1])])
            frame = pd.DataFrame(X, columns=[str(name) for name in names])
        if reset and len(frame) == 1:
            raise ValueError("X has one sample (n_samples = 1): nothing can be learned from it")
        return frame, _as_numbers(y) if reset and numeric_y else y


def _as_numbers(y: Any) -> np.ndarray:
    try:
        numbers = np.asarray(y, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the target must be numbers: {error} (classes are for MixedClassifier and MixedEncoder(family='binomial'))"
        ) from error
    if not np.isfinite(numbers).all():
        raise ValueError("Input y contains NaN or infinity: drop these rows first")
    return numbers


class _Mixed(_OfFrames):
    """A formula without its left-hand side, fitted and predicted."""

    fixed: str
    random: str | None

    def _formula(self, frame: pd.DataFrame) -> tuple[str, str]:
        """The name that the response takes, and the formula."""
        if not isinstance(self.fixed, str) or not isinstance(self.random, str):
            raise ValueError(
                f"fixed and random must be parts of a formula, such as fixed='1 + x' and random='(1 | g)'; got "
                f"fixed={self.fixed!r}, random={self.random!r}"
            )
        response = "y"
        while response in frame.columns:
            response += "_"
        return response, f"{response} ~ {self.fixed} + {self.random}"

    def _check_missing(self, frame: pd.DataFrame, parsed: ParsedFormula, groups: bool) -> None:
        """Raise for missing values: nothing is dropped here, for scores are taken of all rows."""
        parts = [*parsed.fixed.expressions, *(e for part in parsed.random for e in part.effects.expressions)]
        used = {name for part in parts for name in part.names}
        of_groups = {column for part in parsed.random for column in part.group.columns}
        wanted = used | of_groups if groups else used
        missing = [name for name in frame.columns if name in wanted and frame[name].isna().any()]
        if missing:
            raise ValueError(
                f"Input X contains NaN in {listed(missing)}: impute them, or drop these rows first; missing "
                "levels of grouping factors are for predict alone, which takes them as new ones"
            )

    def _prepare(self, frame: pd.DataFrame, y: np.ndarray) -> tuple[str, pd.DataFrame]:
        """The formula, checked, and the table with the response in it."""
        response, formula = self._formula(frame)
        self._check_missing(frame, parse(formula), groups=True)
        return formula, frame.assign(**{response: y})

    def _new(self, X: Any) -> pd.DataFrame:
        check_is_fitted(self)
        frame, _ = self._read(X, reset=False)
        self._check_missing(frame, parse(self._formula(frame)[1]), groups=False)
        return frame


class MixedRegressor(RegressorMixin, _Mixed):
    """A linear mixed model as a scikit-learn regressor.

    Predictions of rows whose levels were in the fit include their random effects; of new and of missing levels they are
    the population's mean. So ``GroupKFold`` scores new groups, ``KFold`` new rows of known ones.

    Parameters:
        fixed: right-hand side of the formula, fixed effects; see :func:`mixjax.lmm`.
        random: its random terms, ``"(1 + x | g)"``.
        reml: restricted maximum likelihood.

    Attributes:
        fit_: :class:`mixjax.LMMFit`, with standard errors, tests and all else.

    X is a pandas or polars frame with the columns of the formula, others are not looked at; or an array of numbers,
    whose columns are called ``x0``, ``x1``, ... Missing values are refused.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.sklearn import MixedRegressor
        >>> data = mj.datasets.load("sleepstudy")
        >>> model = MixedRegressor(fixed="Days", random="(Days | Subject)").fit(data, data["Reaction"])
        >>> model.predict(data.iloc[:2]).round(2)
        array([253.66, 273.33])
        >>> model.fit_.fixef.round(2).to_dict()
        {'Intercept': 251.41, 'Days': 10.47}
    """

    fit_: LMMFit

    def __init__(self, fixed: str = "1", random: str | None = None, reml: bool = True):
        self.fixed = fixed
        self.random = random
        self.reml = reml

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the model.

        Args:
            X: frame. y: ``(n,)`` numbers.

        Raises:
            ValueError: missing values, columns that are not there, a model that the data cannot tell.
        """
        frame, y = self._read(X, y, reset=True, numeric_y=True)
        formula, table = self._prepare(frame, y)
        self.fit_ = lmm(formula, table, reml=self.reml)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """``(n,)`` conditional means; the population's for levels that the fit has not seen."""
        frame = self._new(X)
        return np.asarray(self.fit_.predict(frame, allow_new_levels=True), np.float64)


class MixedClassifier(ClassifierMixin, _Mixed):
    """A binomial generalised linear mixed model as a scikit-learn classifier of two classes.

    Parameters:
        fixed, random: as of :class:`MixedRegressor`.
        link: ``"logit"``, ``"probit"``, ``"cloglog"``; None: the logit.
        nagq: nodes of adaptive quadrature, see :func:`mixjax.glmm`.
        integrate: probabilities of new levels: True, averaged over the random effects, the population's; False, at
            random effects of zero, the median level's.

    Attributes:
        fit_: :class:`mixjax.GLMMFit`, of the probability of ``classes_[1]``.
        classes_: ``(2,)`` labels, sorted.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.sklearn import MixedClassifier
        >>> data = mj.datasets.load("sleepstudy")
        >>> slow = (data["Reaction"] > 300).map({True: "slow", False: "quick"})
        >>> model = MixedClassifier(fixed="Days", random="(1 | Subject)").fit(data, slow)
        >>> model.classes_.tolist(), model.predict(data.iloc[[0, 9]]).tolist()
        (['quick', 'slow'], ['quick', 'slow'])
        >>> model.predict_proba(data.iloc[[0, 9]]).round(2)
        array([[0.9 , 0.1 ],
               [0.04, 0.96]])
    """

    fit_: GLMMFit

    def __init__(
        self,
        fixed: str = "1",
        random: str | None = None,
        link: str | None = None,
        nagq: int = 1,
        integrate: bool = True,
    ):
        self.fixed = fixed
        self.random = random
        self.link = link
        self.nagq = nagq
        self.integrate = integrate

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the model.

        Args:
            X: frame. y: ``(n,)`` labels of two classes.

        Raises:
            ValueError: as of :meth:`MixedRegressor.fit`; other than two classes.
        """
        frame, y = self._read(X, y, reset=True)
        self.classes_, success = _two_classes(y)
        formula, table = self._prepare(frame, success)
        self.fit_ = glmm(formula, table, "binomial", link=self.link, nagq=self.nagq)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """``(n, 2)`` probabilities of the classes."""
        frame = self._new(X)
        p = self.fit_.predict(frame, random=True, integrate=bool(self.integrate), allow_new_levels=True).to_numpy()
        return np.column_stack([1.0 - p, p])

    def predict(self, X: Any) -> np.ndarray:
        """``(n,)`` labels of the more probable class."""
        p = self.predict_proba(X)[:, 1]
        labels: np.ndarray = self.classes_[(p > 0.5).astype(int)]
        return labels


def _two_classes(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels, sorted, and 1.0 where a row has the second."""
    check_classification_targets(y)
    classes, code = np.unique(np.asarray(y), return_inverse=True)
    if len(classes) > 2:
        raise ValueError(
            f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
            f"{len(classes)} classes, {listed(classes)}"
        )
    if len(classes) < 2:
        raise ValueError(f"the target has one class, {classes[0]!r}: two classes are needed")
    return classes, code.reshape(-1).astype(np.float64)


class MixedEncoder(OneToOneFeatureMixin, TransformerMixin, _OfFrames):
    """Replaces categories of many levels by random intercepts, means of the target shrunk as far as the data say.

    Each column has a model of its own, ``y ~ 1 + (1 | column)``, by REML or, of two classes, by maximum likelihood. A
    level with few rows is drawn to the mean, and all are where the levels hardly differ. :meth:`fit_transform` gives
    every row the value of a model that has not seen its fold: otherwise a column that knows the target would leak into
    what is fitted next. ``fit(X, y).transform(X)`` has no such folds.

    Parameters:
        columns: names, or positions in an array; None: all columns of a frame that are not numbers. Others pass.
        family: ``"gaussian"``, or ``"binomial"`` for a target of two classes: effects on its logit.
        add_mean: add the mean over levels, the model's intercept. Levels that were not seen have 0, or with
            ``add_mean`` that mean. Missing values are a level of their own.
        cv: folds of :meth:`fit_transform`: how many, a splitter, or an iterable of them. shuffle, random_state: of the
            folds where ``cv`` is a number; ``random_state`` is an int, for the same folds in every call.

    Attributes:
        encodings_: per column a Series, level -> random effect.
        means_: per column the mean over levels, on the scale of the link.
        classes_: ``(2,)`` labels of a binomial target.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.sklearn import MixedEncoder
        >>> data = mj.datasets.load("sleepstudy")
        >>> encoder = MixedEncoder(["Subject"]).fit(data[["Days", "Subject"]], data["Reaction"])
        >>> encoder.transform(data[["Days", "Subject"]].iloc[:2].assign(Subject=["308", "new"])).round(2)
           Days  Subject
        0     0    37.83
        1     1     0.00
    """

    encodings_: dict[str, pd.Series]
    means_: dict[str, float]

    def __init__(
        self,
        columns: Any = None,
        family: Literal["gaussian", "binomial"] = "gaussian",
        add_mean: bool = False,
        cv: Any = 5,
        shuffle: bool = True,
        random_state: Any = 0,
    ):
        self.columns = columns
        self.family = family
        self.add_mean = add_mean
        self.cv = cv
        self.shuffle = shuffle
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Encodings of all rows."""
        frame, target = self._check(X, y)
        self.encodings_, self.means_ = self._encodings(frame, target)
        return self

    def fit_transform(self, X: Any, y: Any) -> Any:
        """Encodings of all rows are kept, and every row of X gets that of the folds it is not in."""
        self.fit(X, y)
        frame, target = self._check(X, y)
        found = {name: np.full(len(frame), np.nan) for name in self.encodings_}
        times = np.zeros(len(frame), int)
        for train, test in self._folds(target).split(frame, target):
            encodings, means = self._encodings(frame.iloc[train], target[train])
            times[test] += 1
            for name, values in self._encoded(frame.iloc[test], encodings, means).items():
                found[name][test] = values
        if found and (times != 1).any():
            raise ValueError("cv must put every row in one test fold: a partition, as KFold makes")
        return self._replaced(X, frame, found)

    def transform(self, X: Any) -> Any:
        """X with columns replaced by numbers: a frame of pandas for a frame, an array for an array."""
        check_is_fitted(self)
        frame, _ = self._read(X, reset=False)
        return self._replaced(X, frame, self._encoded(frame, self.encodings_, self.means_))

    # --- the parts of it ----------------------------------------------------------------------------------------------

    def _check(self, X: Any, y: Any) -> tuple[pd.DataFrame, np.ndarray]:
        if self.family not in ("gaussian", "binomial"):
            raise ValueError(f"family must be 'gaussian' or 'binomial', got {self.family!r}")
        frame, y = self._read(X, y, reset=True, numeric_y=self.family == "gaussian")
        if self.family == "binomial":
            self.classes_, y = _two_classes(y)
        return frame, np.asarray(y)

    def _folds(self, target: np.ndarray) -> Any:
        if isinstance(self.cv, int | np.integer):
            kind = StratifiedKFold if self.family == "binomial" else KFold
            return kind(self.cv, shuffle=self.shuffle, random_state=self.random_state if self.shuffle else None)
        return check_cv(self.cv, target)

    def _names(self, frame: pd.DataFrame) -> list[str]:
        if self.columns is None:
            return [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
        if isinstance(self.columns, str):
            raise ValueError(f"columns must be a list: columns=[{self.columns!r}]")
        names = [frame.columns[int(c)] if isinstance(c, int | np.integer) else c for c in self.columns]
        absent = [name for name in names if name not in frame.columns]
        if absent:
            raise ValueError(f"there is no column {absent[0]!r} to encode; columns: {listed(frame.columns)}")
        return names

    def _encodings(self, frame: pd.DataFrame, target: np.ndarray) -> tuple[dict[str, pd.Series], dict[str, float]]:
        encodings, means = {}, {}
        for name in self._names(frame):
            code, levels = pd.factorize(_objects(frame[name]), use_na_sentinel=False)
            try:
                effects, means[name] = _intercepts(code, target, self.family)
            except ValueError as error:
                raise ValueError(f"column {name!r} cannot be encoded (level: its categories): {error}") from error
            encodings[name] = pd.Series(effects, index=pd.Index(levels, dtype=object), name=name)
        return encodings, means

    def _encoded(
        self, frame: pd.DataFrame, encodings: dict[str, pd.Series], means: dict[str, float]
    ) -> dict[str, np.ndarray]:
        found = {}
        for name, own in encodings.items():
            at = own.index.get_indexer(pd.Index(_objects(frame[name]), dtype=object))
            values = np.where(at < 0, 0.0, own.to_numpy()[at])
            found[name] = values + means[name] if self.add_mean else values
        return found

    def _replaced(self, X: Any, frame: pd.DataFrame, values: dict[str, np.ndarray]) -> Any:
        found = frame.assign(**values)
        return found if hasattr(X, "columns") else found.to_numpy()


def _objects(column: pd.Series) -> np.ndarray:
    """Categories as Python's values, all that are missing as one."""
    values = column.astype(object).to_numpy(copy=True)
    values[column.isna().to_numpy()] = np.nan
    return values


def _intercepts(code: np.ndarray, target: np.ndarray, family: str) -> tuple[np.ndarray, float]:
    """Random intercepts ``(m,)`` of levels 0 .. m - 1, and the mean over levels."""
    table = {"target": target, "level": code}
    fit: LMMFit | GLMMFit
    if family == "binomial":
        fit = glmm("target ~ 1 + (1 | level)", table, "binomial")
    else:
        fit = lmm("target ~ 1 + (1 | level)", table)
    own = fit.ranef()["level"]["Intercept"]
    effects = np.zeros(int(code.max()) + 1)
    effects[own.index.astype(int)] = own.to_numpy()
    return effects, float(fit.fixef.iloc[0])
