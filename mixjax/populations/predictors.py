"""Predictors of a population: numbers drawn for rows, or for the levels of a factor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.families import sampling
from mixjax.populations.expressions import Kind, Scope
from mixjax.populations.variables import Spec, Variable, bind_parameters, shown, values_of
from mixjax.simulation import symmetric_root


@dataclass(frozen=True, eq=False)
class Predictor(Spec):
    """One number per row or level, drawn from parameters.

    Attributes:
        title: the distribution. parameters: name -> expression and rule. draw: ``(key, count, **values)`` -> array.
        by: factor, or None. dtype: in a table.
    """

    title: str
    parameters: Mapping[str, tuple[Any, str]]
    draw: Callable[..., Any]
    by: str | None = None
    dtype: Any = None

    @property
    def sources(self) -> tuple[Any, ...]:
        return tuple(source for source, _ in self.parameters.values())

    def bind(self, name: str, scope: Scope) -> Variable:
        bound = bind_parameters(name, self.parameters, scope)
        low, high = (bound.bounds[p].constant if p in bound.bounds else None for p in ("low", "high"))
        if self.title == "uniform" and low is not None and high is not None and low >= high:
            raise ValueError(f"{name}: low must be below high, got {low:g} and {high:g}")
        static = (bound.static, self.draw, name)
        kinds = {name: Kind(dtype=self.dtype)}
        return Variable(name, self.by, kinds, _predictor, static, bound.leaves, bound.failures, bound.needs)

    def describe(self) -> str:
        return f"{self.title}({', '.join(f'{name} {shown(value)}' for name, (value, _) in self.parameters.items())})"


def _predictor(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    parameters, draw, name = static
    values, flags = values_of(parameters, leaves, count, column)
    drawn = jnp.asarray(draw(key, count, **values), jnp.float64)
    if drawn.shape != (count,):
        raise ValueError(f"{name}: the function returned an array of shape {drawn.shape}; ({count},) is needed")
    return (drawn,), flags


def normal(mean: Any = 0.0, sd: Any = 1.0, by: str | None = None) -> Predictor:
    """A normally distributed predictor.

    Args:
        mean, sd: numbers, or expressions of variables that are defined before, as text or a function.
        by: a factor whose levels get one value each: a covariate of the level. Expressions may then use what is
            constant within its levels.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     school=mj.factor(3), size=mj.normal(500, 100, by="school"), score=mj.normal("size / 10", 5))
        >>> pop.sample_x(9, key=1).to_frame()["size"].nunique() <= 3
        True
    """
    return Predictor("normal", {"mean": (mean, "any"), "sd": (sd, "scale")}, _normal, by)


def uniform(low: Any = 0.0, high: Any = 1.0, by: str | None = None) -> Predictor:
    """A uniformly distributed predictor; arguments as for :func:`normal`."""
    return Predictor("uniform", {"low": (low, "any"), "high": (high, "any")}, _uniform, by)


def bernoulli(p: Any = 0.5, by: str | None = None) -> Predictor:
    """A predictor that is 1 with probability p, else 0; arguments as for :func:`normal`."""
    return Predictor("bernoulli", {"p": (p, "probability")}, _bernoulli, by, np.int64)


def poisson(mean: Any, by: str | None = None) -> Predictor:
    """A Poisson-distributed predictor; arguments as for :func:`normal`."""
    return Predictor("poisson", {"mean": (mean, "mean of counts")}, _poisson, by, np.int64)


def derived(expression: Any, by: str | None = None) -> Predictor:
    """A predictor that others determine, such as ``derived("age + 2 * wave")``.

    Args:
        expression: of variables defined before. by: as for :func:`normal`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(x=mj.uniform(), square=mj.derived("x**2"))
        >>> table = pop.sample_x(5, key=1).to_frame()
        >>> bool((table["square"] == table["x"] ** 2).all())
        True
    """
    return Predictor("derived", {"value": (expression, "any")}, _derived, by)


def custom(function: Callable[..., Any], by: str | None = None, **parameters: Any) -> Predictor:
    """A predictor with a distribution of your own.

    Args:
        function: ``(key, n) -> (n,)``, written in JAX; it gets what is in ``parameters`` by name, as ``(n,)`` arrays.
        by: as for :func:`normal`; n is then the number of levels. parameters: numbers or expressions.

    Example:
        >>> import jax, mixjax as mj
        >>> def gamma(key, n, mean):
        ...     return mean * jax.random.exponential(key, (n,))
        >>> pop = mj.population(x=mj.uniform(), income=mj.custom(gamma, mean="1 + x"))
        >>> pop.sample_x(5, key=1).to_frame().shape
        (5, 2)
    """
    if not callable(function):
        raise ValueError(f"custom needs a function (key, n) -> (n,), got {function!r}")
    title = getattr(function, "__name__", "custom")
    return Predictor(title, {name: (source, "any") for name, source in parameters.items()}, function, by)


def _normal(key: Any, count: int, mean: Any, sd: Any) -> Any:
    return mean + sd * sampling.standard_normal(key, (count,))


def _uniform(key: Any, count: int, low: Any, high: Any) -> Any:
    return low + (high - low) * sampling.standard_uniform(key, (count,))


def _bernoulli(key: Any, count: int, p: Any) -> Any:
    return sampling.bernoulli(key, p)


def _poisson(key: Any, count: int, mean: Any) -> Any:
    return sampling.poisson(key, mean)


def _derived(key: Any, count: int, value: Any) -> Any:
    return value


# --- several columns -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MultivariateNormal(Spec):
    """Several correlated columns; see :func:`multivariate_normal`."""

    mean: Any
    cov: Any
    names: Sequence[str] | None = None
    by: str | None = None

    @property
    def sources(self) -> tuple[Any, ...]:
        return tuple(self.mean)

    def bind(self, name: str, scope: Scope) -> Variable:
        means = list(self.mean)
        q = len(means)
        parts = [f"{name}_{j}" for j in range(q)] if self.names is None else [str(part) for part in self.names]
        if not q or len(parts) != q:
            raise ValueError(f"{name}: {len(parts)} names for {q} means")
        root = covariance_root(self.cov, q, name)
        sources = {f"mean[{j}]": (mean, "any") for j, mean in enumerate(means)}
        bound = bind_parameters(name, sources, scope)
        leaves = {**bound.leaves, "root": root}
        kinds = {part: Kind() for part in parts}
        return Variable(name, self.by, kinds, _correlated, bound.static, leaves, bound.failures, bound.needs)

    def describe(self) -> str:
        return f"multivariate_normal(mean {shown(self.mean)}, cov {shown(np.asarray(self.cov).tolist())})"


def multivariate_normal(
    mean: Sequence[Any], cov: Any, names: Sequence[str] | None = None, by: str | None = None
) -> MultivariateNormal:
    """Correlated normal predictors.

    Args:
        mean: one number or expression per column. cov: ``(q, q)`` covariances; singular ones are allowed.
        names: of the columns; None: ``x_0``, ``x_1``, ... of a variable ``x``. In expressions also ``x[0]``, ``x[1]``.
        by: as for :func:`normal`.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     body=mj.multivariate_normal([175, 70], [[49, 42], [42, 100]], names=["height", "weight"]))
        >>> pop.sample_x(3, key=1).to_frame().columns.tolist()
        ['height', 'weight']
    """
    return MultivariateNormal(mean, cov, names, by)


def _correlated(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    means, flags = values_of(static, leaves, count, column)
    z = sampling.standard_normal(key, (count, len(means)))
    return tuple(mean + row for mean, row in zip(means.values(), columns_of(z, leaves["root"]), strict=True)), flags


def columns_of(z: Any, root: Any) -> list[Any]:
    """Columns of ``z R'``, without a product of matrices: there are few."""
    return [sum(root[i, j] * z[:, j] for j in range(z.shape[1])) for i in range(z.shape[1])]


def covariance_root(cov: Any, q: int, name: str) -> np.ndarray:
    """``R`` with ``R R' = cov``, or ValueError that says why there is none."""
    cov = np.asarray(cov, np.float64)
    if cov.shape != (q, q):
        raise ValueError(f"{name}: the covariance has shape {cov.shape}; ({q}, {q}) is needed")
    try:
        return symmetric_root(cov)
    except ValueError:
        why = "is not finite"
        if np.isfinite(cov).all():
            smallest = np.linalg.eigvalsh((cov + cov.T) / 2)[0]
            why = f"is not positive semidefinite (smallest eigenvalue {smallest:.3g})"
            if not np.allclose(cov, cov.T):
                why = "is not symmetric"
        raise ValueError(f"{name}: the covariance {cov.tolist()} {why}") from None


@dataclass(frozen=True, eq=False)
class Empirical(Spec):
    """Rows of a table; see :func:`empirical`."""

    frame: Any
    columns: Sequence[str] | None = None
    by: str | None = None

    def bind(self, name: str, scope: Scope) -> Variable:
        frame = self.frame
        if isinstance(frame, pd.Series):
            frame = frame.to_frame(name)
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"{name}: empirical needs a pandas DataFrame or Series, got {type(frame).__name__}")
        wanted = list(frame.columns) if self.columns is None else list(self.columns)
        missing = [str(column) for column in wanted if column not in frame]
        if missing:
            raise DataError(f"{name}: the table has no column {missing[0]!r}; columns: {', '.join(map(str, frame))}")
        if not len(frame) or not wanted:
            raise DataError(f"{name}: the table has no {'columns' if len(frame) else 'rows'} to draw from")
        if len(set(map(str, wanted))) < len(wanted) or not frame.columns.is_unique:
            raise DataError(f"{name}: the table has two columns of one name")
        kinds, leaves = {}, {}
        for column in wanted:
            kinds[str(column)], leaves[str(column)] = _values(frame[column], name)
        return Variable(name, self.by, kinds, _rows, tuple(kinds), leaves)

    def describe(self) -> str:
        shape = np.shape(self.frame)
        names = self.columns if self.columns is not None else getattr(self.frame, "columns", [])
        return f"rows of a table of {shape[0]}" + (f": {', '.join(map(str, names))}" if len(names) else "")


def empirical(frame: Any, columns: Sequence[str] | None = None, by: str | None = None) -> Empirical:
    """Predictors as they are in a table: whole rows, drawn with replacement, so that they stay correlated.

    Args:
        frame: pandas DataFrame, whose columns keep their names and types, or a Series. Text and categories are factors
            of the population. columns: which; None: all. by: a factor, each level of which gets a row.

    Returns:
        A variable for :func:`mixjax.population`; its own name is that of a Series' column.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(people=mj.empirical(mj.datasets.load("Orthodont"), ["age", "Sex"]))
        >>> pop.sample_x(3, key=1).to_frame().columns.tolist()
        ['age', 'Sex']
    """
    return Empirical(frame, columns, by)


def _values(column: pd.Series, name: str) -> tuple[Kind, np.ndarray]:
    """The kind of a column of a table, and its values as numbers or codes."""
    if column.isna().any():
        missing = int(column.isna().sum())
        raise DataError(f"{name}: the column {column.name!r} has {missing} missing values; drop or fill them first")
    if pd.api.types.is_numeric_dtype(column):
        numbers = column.to_numpy(np.float64)
        if not np.isfinite(numbers).all():
            raise DataError(f"{name}: the column {column.name!r} has infinite values")
        return Kind(dtype=column.dtype), numbers
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, categories = column.cat.codes.to_numpy(), column.cat.categories
        kind = Kind(labels=tuple(map(str, categories)), values=column.dtype)
    else:
        codes, categories = pd.factorize(column, sort=True)
        kind = Kind(labels=tuple(map(str, categories)), values=categories)
    return kind, codes.astype(np.int32)


def _rows(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    available = leaves[static[0]].shape[0]
    at = jnp.floor(sampling.standard_uniform(key, (count,)) * available).astype(jnp.int32)
    return tuple(jnp.asarray(leaves[name])[at] for name in static), ()
