"""The arrays of a mixed model, and the names that belong to them.

``Design`` holds arrays only and is a JAX pytree. ``Labels`` holds names (of columns, levels, the formula) and never
enters a compiled program: a new set of names compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.covariance import Covariance, FactorAnalytic, ReducedRank, Structure, structure_of
from mixjax.kernels import Kernel
from mixjax.machine import is_concrete
from mixjax.relationship import MOST_LEVELS

# A numpy array outside JAX's transformations, a JAX array or tracer inside.
AnyArray = Any


@dataclass(frozen=True)
class RandomTerm:
    """One random term ``(effects | group)``.

    Attributes:
        Z: ``(n, q)``, one column per effect.
        group: ``(n,)`` integers ``0 .. n_groups - 1``, the level of every row.
        n_groups: number of levels; static, because it is a shape.
        structure: covariance structure of a level's effects, by name or itself; static. "us": unstructured. "diag":
            uncorrelated. "homcs": one variance and one correlation. "cs", "ar1", "hetar1", "toep", "homtoep", "adh",
            "homdiag": see docs/structures.md and :mod:`mixjax.covariance.names`. "rr(d=2)": of reduced rank, "fa(d=1)":
            factor-analytic, d dimensions. One's own: :class:`mixjax.Covariance`.
        levels: ``(n_groups, n_groups)`` a factor L of the known covariance ``K = L L'`` of the levels: effect a of
            level i and effect b of level j have covariance ``K_ij Sigma_ab``. None: levels are independent.
        kernel: the correlation of levels by the distance of their places, whose parameters are estimated, of a term
            with one effect; static. None: it has none. coordinates: ``(n_groups, d)`` the places. within:
            ``(n_groups,)`` codes: levels of different ones are independent.
    """

    Z: AnyArray
    group: AnyArray
    n_groups: int
    structure: str | Structure | Covariance = "us"
    levels: AnyArray | None = None
    kernel: Kernel | None = None
    coordinates: AnyArray | None = None
    within: AnyArray | None = None


@dataclass(frozen=True)
class ResidualTerm:
    """Correlation of the residuals within groups, ``ar1(time | group)``.

    Attributes:
        structure: ``"ar1"``: ``rho ** distance`` in whole steps; ``"car1"``: the same at any times, rho not negative;
            ``"cs"``: one correlation; ``"exp"``, ``"gau"``, ``"mat"``: by distance (:class:`mixjax.Kernel`). Static.
        group: ``(n,)`` codes ``0 .. m - 1``. time: ``(n,)``, no two alike in a group; ``(n, d)`` places of those by
            distance; None for "cs".
        smoothness: of "mat"; static.
    """

    structure: str
    group: AnyArray
    time: AnyArray | None = None
    smoothness: float | None = None


@dataclass(frozen=True)
class Design:
    """A mixed model's data as arrays.

    Linear: ``y = offset + X beta + sum_t Z_t b_t + e``, ``e ~ N(0, sigma^2 / weights)``. Generalised linear: the same
    sum without e is the linear predictor of a row, on which the distribution of its y depends.

    Attributes:
        y: ``(n,)`` response; of a binomial response counts of successes.
        X: ``(n, p)`` fixed-effects columns of full rank; ``p`` may be 0.
        terms: random terms, at least one unless residuals have a dispersion or a correlation. Terms that share a
            grouping factor are recognised and eliminated together.
        weights: ``(n,)``, positive, or None. Of a linear mixed model precisions. Of a generalised one case weights:
            they multiply the log density of a row, as if there were so many of it.
        offset: ``(n,)`` known part of the mean, of the linear predictor in a generalised model, or None.
        size: ``(n,)`` numbers of trials of a binomial response, positive; None for one each. A linear mixed model has
            none and refuses it.
        dispersion: of a linear mixed model ``(n, d)`` columns W, none of them constant, or None: residual standard
            deviations are ``sigma exp(W gamma) / sqrt(weights)``. residual: :class:`ResidualTerm` or None. What has no
            parameters for these refuses them.
        psi_columns: of a generalised model, for each of the family's parameters psi the ``(n, r)`` columns of a linear
            predictor of its own, of full rank, or None where psi is one number for all rows; ``()``: all are.
        present: of a linear mixed model ``(n,)`` booleans, False for rows that only fill up a shape: they add nothing,
            whatever stands in them, and do not count. None: all are there.
        nested: static. Per term the number of its grouping factor, where each factor is nested in the next: 0 the
            finest. Needed only where groups are traced, in which nesting cannot be seen; of numbers it is checked.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> group = np.repeat(np.arange(4), 3)
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=group, n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
    """

    y: AnyArray
    X: AnyArray
    terms: tuple[RandomTerm, ...]
    weights: AnyArray | None = None
    offset: AnyArray | None = None
    size: AnyArray | None = None
    psi_columns: tuple[AnyArray | None, ...] = ()
    dispersion: AnyArray | None = None
    residual: ResidualTerm | None = None
    present: AnyArray | None = None
    nested: tuple[int, ...] | None = None

    @property
    def has_residual_side(self) -> bool:
        """Residuals have parameters beside sigma."""
        return self.dispersion is not None or self.residual is not None

    @property
    def has_kernels(self) -> bool:
        """Some levels are correlated by distance."""
        terms = (self.terms,) if isinstance(self.terms, RandomTerm) else self.terms
        return any(term.kernel is not None for term in terms)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The covariance structure of every term."""
        return tuple(structure_of(term.structure, np.shape(term.Z)[1]) for term in self.terms)


@dataclass(frozen=True)
class RepeatedDesign:
    """The arrays of a model for repeated measures, without random effects: ``y = offset + X beta + e``, and the errors
    of a subject's visits have a covariance of their own, those of different subjects none.

    Attributes:
        y: ``(n,)`` response. X: ``(n, p)`` fixed-effects columns of full rank.
        subject: ``(n,)`` integers ``0 .. n_subjects - 1``. visit: ``(n,)`` integers ``0 .. n_visits - 1``, each once a
            subject at most. Visits that a subject has no row of are missing, and nothing is assumed about them.
        n_subjects, n_visits: static.
        structure: of the covariance of a subject's visits; static. A name ("us", "ar1", ...) or a structure, see
            :mod:`mixjax.covariance.names`.
        arm: ``(n_subjects,)`` integers ``0 .. n_arms - 1``: every arm has a covariance of its own; None for one of all.
        n_arms: static.
        weights: ``(n,)``, positive, or None: the standard deviation of a row is divided by the root of its weight.
        offset: ``(n,)`` known part of the mean, or None.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> design = mj.RepeatedDesign(
        ...     y=np.arange(12.0) % 5, X=np.ones((12, 1)), subject=np.repeat(np.arange(4), 3), visit=np.arange(12) % 3,
        ...     n_subjects=4, n_visits=3, structure="ar1",
        ... )
    """

    y: AnyArray
    X: AnyArray
    subject: AnyArray
    visit: AnyArray
    n_subjects: int
    n_visits: int
    structure: str | Structure | Covariance = "us"
    arm: AnyArray | None = None
    n_arms: int = 1
    weights: AnyArray | None = None
    offset: AnyArray | None = None


class Chunk(NamedTuple):
    """A chunk of rows of a larger table.

    Attributes:
        columns: ``(n, c)``, all columns of X and of the Z of every term, each once. y: ``(n,)``, less the offset.
        sqrt_w: ``(n,)`` square roots of the weights, or None. codes: per grouping factor ``(n,)`` levels.
    """

    columns: np.ndarray
    y: np.ndarray
    sqrt_w: np.ndarray | None
    codes: list[np.ndarray]


jax.tree_util.register_dataclass(
    RandomTerm,
    data_fields=["Z", "group", "levels", "coordinates", "within"],
    meta_fields=["n_groups", "structure", "kernel"],
)
jax.tree_util.register_dataclass(ResidualTerm, data_fields=["group", "time"], meta_fields=["structure", "smoothness"])
jax.tree_util.register_dataclass(
    RepeatedDesign,
    data_fields=["y", "X", "subject", "visit", "arm", "weights", "offset"],
    meta_fields=["n_subjects", "n_visits", "structure", "n_arms"],
)
jax.tree_util.register_dataclass(
    Design,
    data_fields=["y", "X", "terms", "weights", "offset", "size", "psi_columns", "dispersion", "residual", "present"],
    meta_fields=["nested"],
)


@dataclass(frozen=True)
class TermLabels:
    """Names of one random term: its grouping factor, its effects (q), its levels (n_groups); whether it is the
    penalised part of a smooth, which has one level, ``""``."""

    group: str
    effects: tuple[str, ...]
    levels: tuple[str, ...]
    smooth: bool = False


@dataclass(frozen=True)
class Labels:
    """Names beside a :class:`Design`.

    Attributes:
        formula: the formula as given.
        response: name of the response, as written.
        fixed: names of the columns of X.
        terms: names of the random terms, in the order of ``Design.terms``.
        frame: the used columns of the table, used rows only (pandas); its index labels the rows.
        dropped_columns: fixed-effects columns left out because others determine them.
        n_missing: rows left out because of missing values.
        used: ``(rows of the table,)`` booleans, which rows are in the fit; None where all are, or where rows came in
            chunks.
        state: the formula as a function of new rows (:class:`mixjax.formula.state.FormulaState`).
        success: what counts as success in a binomial response, as a phrase: ``'cured' is yes (failure: no)``. Empty for
            any other.
        psi: names of the columns that each of the family's parameters has, ``()`` where it is one number; ``()``
            alone: all are.
        dispersion: names of the columns of the dispersion of residuals. residual: their correlation as written,
            ``ar1(Days | Subject)``, and ``residual_group`` its grouping factor; empty where they have none.
    """

    formula: str
    response: str
    fixed: tuple[str, ...]
    terms: tuple[TermLabels, ...]
    frame: Any
    dropped_columns: tuple[str, ...] = ()
    n_missing: int = 0
    used: Any = field(default=None, compare=False)
    state: Any = field(default=None, compare=False, repr=False)
    success: str = ""
    psi: tuple[tuple[str, ...], ...] = ()
    dispersion: tuple[str, ...] = ()
    residual: str = ""
    residual_group: str = ""


def check_design(design: Design) -> None:
    """Raise ValueError, naming the culprit, when shapes or values do not make a model.

    Values are looked at only where they are concrete: inside ``jit`` there is nothing to see.
    """
    check_is_design(design)
    if isinstance(design.terms, RandomTerm):
        raise ValueError("terms must be a tuple of RandomTerm: write terms=(term,)")
    if not design.terms and not design.has_residual_side:
        raise ValueError("Design has no random term: give terms=(RandomTerm(...), ...), or use ordinary regression")
    X_shape = np.shape(design.X)
    if len(X_shape) != 2:
        raise ValueError(f"X must be (n, p), got shape {X_shape}")
    n = X_shape[0]
    if n == 0:
        raise ValueError("the design has no rows")
    columns = {"y": design.y, "weights": design.weights, "offset": design.offset, "size": design.size}
    columns["present"] = design.present
    vectors = {*columns, *(f"terms[{t}].group" for t in range(len(design.terms)))}
    for t, term in enumerate(design.terms):
        if len(np.shape(term.Z)) != 2:
            raise ValueError(f"terms[{t}].Z must be (n, q), got shape {np.shape(term.Z)}")
        if np.shape(term.Z)[1] == 0:
            raise ValueError(f"terms[{t}].Z has no columns: leave the term out, or give it a column of ones")
        structure_of(term.structure, np.shape(term.Z)[1])
        columns[f"terms[{t}].Z"] = term.Z
        columns[f"terms[{t}].group"] = term.group
    if design.dispersion is not None:
        if len(np.shape(design.dispersion)) != 2:
            raise ValueError(f"dispersion must be (n, d), got shape {np.shape(design.dispersion)}")
        columns["dispersion"] = design.dispersion
    if design.residual is not None:
        columns |= {"residual.group": design.residual.group, "residual.time": design.residual.time}
        own, vectors = design.residual.time, vectors | {"residual.group"}
        if own is None or len(np.shape(own)) != 2:  # those by distance have places
            vectors |= {"residual.time"}
    for j, own in enumerate(design.psi_columns):
        if own is not None and len(np.shape(own)) != 2:
            raise ValueError(f"psi_columns[{j}] must be (n, r), got shape {np.shape(own)}")
        columns[f"psi_columns[{j}]"] = own
    for name, column in columns.items():
        if column is None:
            continue
        if len(np.shape(column)) == 0 or np.shape(column)[0] != n:
            raise ValueError(f"{name} has shape {np.shape(column)}, but X has {n} rows")
        if name in vectors and len(np.shape(column)) != 1:
            raise ValueError(f"{name} has shape {np.shape(column)}; it must be one-dimensional, ({n},)")
        if np.issubdtype(getattr(column, "dtype", np.dtype(float)), np.complexfloating):
            raise ValueError(f"{name} is complex; mixed models here are real")
    for name, column in {"X": design.X, **columns}.items():
        if column is not None and is_concrete(column) and not np.isfinite(np.asarray(column)).all():
            raise ValueError(f"{name} has missing or infinite values; drop or replace those rows first")
    if design.weights is not None and is_concrete(design.weights) and not (np.asarray(design.weights) > 0).all():
        raise ValueError("weights must be positive: they are precisions; drop rows that should not count")
    if design.size is not None and is_concrete(design.size) and not (np.asarray(design.size) > 0).all():
        raise ValueError("size must be positive: it is the number of trials of a row; drop rows without trials")
    if design.present is not None and np.dtype(getattr(design.present, "dtype", object)) != np.bool_:
        raise ValueError("present must be booleans, False for rows that only fill up a shape")
    for t, term in enumerate(design.terms):
        _check_levels(t, term)
        _check_kernel(t, term)
    if design.dispersion is not None or design.residual is not None:
        if design.has_kernels:
            raise ValueError(
                "a term with a kernel does not go together with a dispersion or a correlation of the residuals; leave "
                "out one of the two (weights= go with both)"
            )
        refuse_known(
            design,
            "a dispersion or a correlation of the residuals",
            "its products would be others at every value of their parameters; leave out one of the two (weights= go "
            "with both)",
        )
    for t, term in enumerate(design.terms):
        if not is_concrete(term.group):
            continue
        group = np.asarray(term.group)
        if group.dtype.kind not in "iu":
            raise ValueError(f"terms[{t}].group must be integers 0 .. n_groups - 1, got dtype {group.dtype}")
        if group.min() < 0 or group.max() >= term.n_groups:
            raise ValueError(
                f"terms[{t}].group runs from {group.min()} to {group.max()}; with n_groups={term.n_groups} it must lie "
                f"in 0 .. {term.n_groups - 1}"
            )


def _check_levels(t: int, term: RandomTerm) -> None:
    """Raise ValueError for a factor of the covariance of levels that is none."""
    if term.levels is None:
        return
    shape, m = np.shape(term.levels), term.n_groups
    if shape != (m, m):
        raise ValueError(
            f"terms[{t}].levels must be a factor of the covariance of the levels, ({m}, {m}), got shape {shape}"
        )
    if m > MOST_LEVELS:
        raise ValueError(
            f"terms[{t}] has {m} levels with a known covariance; its factor is a dense matrix, and the work grows with "
            f"the cube: {MOST_LEVELS} at most. Leave out levels that no row and no relative of a row needs; larger "
            "pedigrees are for programs that work with the sparse inverse, such as blupf90, ASReml or sommer"
        )
    if is_concrete(term.levels) and not np.isfinite(np.asarray(term.levels)).all():
        raise ValueError(f"terms[{t}].levels has missing or infinite values")


def _check_kernel(t: int, term: RandomTerm) -> None:
    """Raise ValueError for a kernel without places, or for more than it can be."""
    if term.kernel is None:
        if term.coordinates is not None or term.within is not None:
            raise ValueError(f"terms[{t}] has coordinates or within, which a kernel needs, but no kernel")
        return
    m = term.n_groups
    if not isinstance(term.kernel, Kernel):
        raise ValueError(f"terms[{t}].kernel must be a mixjax.Kernel, got {term.kernel!r}")
    if np.shape(term.Z)[1] != 1 or term.levels is not None:
        raise ValueError(f"terms[{t}] has a kernel: it is of one effect, whose levels have no other known covariance")
    for name, own, shape in (
        ("coordinates", term.coordinates, "(n_groups, d)"),
        ("within", term.within, "(n_groups,)"),
    ):
        if own is None or np.ndim(own) != 1 + (name == "coordinates") or len(own) != m:
            found = None if own is None else np.shape(own)
            raise ValueError(f"terms[{t}].{name} must be {shape} with n_groups = {m}, got shape {found}")
        if not is_concrete(own) or not np.isfinite(np.asarray(own, np.float64)).all():
            raise ValueError(f"terms[{t}].{name} must be finite numbers, not traced ones")
    if m > MOST_LEVELS:
        raise ValueError(
            f"terms[{t}] has {m} places; their covariance is a dense matrix, and the work grows with the cube: "
            f"{MOST_LEVELS} at most. Round coordinates, or average places that are close; larger maps are for programs "
            "that approximate the covariance, such as GPBoost, spaMM or sdmTMB"
        )


def refuse_known(design: Design, what: str, instead: str) -> None:
    """Raise ValueError for what levels with a known covariance have no meaning for, or no way to."""
    if any(term.levels is not None for term in design.terms):
        raise ValueError(f"{what} is not for random effects whose levels have a known covariance: {instead}")


def refuse_smooths(labels: Labels, what: str, instead: str) -> None:
    """Raise ValueError for what has no meaning, or another, where curves are random effects of one level."""
    own = [term.group for term in labels.terms if term.smooth]
    if own:
        raise ValueError(f"{what} of a model with a smooth, {own[0]}: not there, because {instead}")


def check_repeated_design(design: RepeatedDesign) -> None:
    """Raise ValueError, naming the culprit, when arrays of repeated measures do not make a model.

    Values are looked at only where they are concrete.
    """
    if not isinstance(design, RepeatedDesign):
        raise TypeError(f"a mixjax.RepeatedDesign is needed, got {type(design).__name__}")
    if len(np.shape(design.X)) != 2:
        raise ValueError(f"X must be (n, p), got shape {np.shape(design.X)}")
    n, S, T = np.shape(design.X)[0], design.n_subjects, design.n_visits
    if isinstance(structure_of(design.structure, T), ReducedRank | FactorAnalytic):
        raise ValueError("'rr' and 'fa' are structures of random effects; errors of repeated measures have 'us'")
    if n == 0:
        raise ValueError("the design has no rows")
    if design.arm is None and design.n_arms != 1:
        raise ValueError(f"n_arms is {design.n_arms}, but arm is None: it says the arm of every subject")
    of_rows = {"y": design.y, "subject": design.subject, "visit": design.visit}
    of_rows |= {"weights": design.weights, "offset": design.offset}
    for name, values in of_rows.items():
        if values is not None and np.shape(values) != (n,):
            raise ValueError(f"{name} must be ({n},), a number for each row of X, got shape {np.shape(values)}")
    if design.arm is not None and np.shape(design.arm) != (S,):
        raise ValueError(f"arm must be ({S},), one for each subject, got shape {np.shape(design.arm)}")
    for name, values, size in (("subject", design.subject, S), ("visit", design.visit, T),
                               ("arm", design.arm, design.n_arms)):  # fmt: skip
        if values is None or not is_concrete(values):
            continue
        own = np.asarray(values)
        if own.dtype.kind not in "iu" or own.min() < 0 or own.max() >= size:
            raise ValueError(f"{name} must be integers 0 .. {size - 1} (n_{name}s = {size})")
    if is_concrete(design.subject) and is_concrete(design.visit):
        cell = np.asarray(design.subject, np.int64) * T + np.asarray(design.visit)
        found, counts = np.unique(cell, return_counts=True)
        if (counts > 1).any():
            subject, visit = divmod(int(found[counts > 1][0]), T)
            raise ValueError(f"subject {subject} has {int(counts.max())} rows at visit {visit}: one a visit")
    if design.weights is not None and is_concrete(design.weights) and not (np.asarray(design.weights) > 0).all():
        raise ValueError("weights must be positive: they are precisions; drop rows that should not count")


def check_is_design(design: Design) -> None:
    """Raise TypeError for what is none, such as arrays of repeated measures."""
    if not isinstance(design, Design):
        repeated = isinstance(design, RepeatedDesign)
        more = ": repeated measures have mixjax.repeated_estimate and mixjax.repeated_loglik" if repeated else ""
        raise TypeError(f"a mixjax.Design is needed, got {type(design).__name__}{more}")


def refuse_trials(design: Design) -> None:
    """Raise ValueError for numbers of trials, which a linear mixed model has no use for."""
    check_is_design(design)
    if design.size is not None:
        raise ValueError(
            "the design has numbers of trials (size), and a linear mixed model has none: size belongs to the binomial "
            "responses of generalised linear mixed models; leave it out, or give precisions as weights"
        )
    if any(own is not None for own in design.psi_columns):
        raise ValueError("the design has psi_columns, which belong to the families of generalised linear mixed models")


def refuse_residual_side(design: Design, what: str) -> None:
    """Raise ValueError for parameters beside covariances and sigma, of residuals or of kernels, where there is no room
    for them."""
    check_is_design(design)
    refuse_kernels(design, what)
    if design.has_residual_side:
        raise ValueError(
            f"the design has a dispersion or a correlation of residuals, which {what} cannot have: fit it with "
            "mixjax.lmm"
        )


def refuse_kernels(design: Design, what: str) -> None:
    """Raise ValueError for correlations by distance, where there is no room for their parameters."""
    if design.has_kernels:
        raise ValueError(
            f"the design has a term with a kernel, whose parameters {what} cannot have: fit it with mixjax.lmm; at "
            "known parameters the term is one with a known covariance, RandomTerm(levels=L), L L' = K"
        )


def refuse_padding(design: Design, what: str) -> None:
    """Raise ValueError for rows that only fill up a shape, where they would count."""
    if design.present is not None:
        raise ValueError(
            f"the design has rows that are not there (present), which {what} cannot have: pass the design that the "
            "batches were made of"
        )


# What the plain model has: independent levels, errors of one variance but for weights. Padded rows are asked apart.
_PLAIN = {"y", "X", "terms", "weights", "offset", "size", "psi_columns", "present", "nested"}
_PLAIN |= {"Z", "group", "n_groups", "structure"}


def refuse_beyond(design: Design, what: str, padded: bool = False, known: frozenset[str] = frozenset()) -> None:
    """Raise ValueError for parts of a design or a term that ``what`` knows nothing of, whoever added them.

    Args:
        padded: it knows rows that only fill up a shape. known: other parts that it knows.
    """
    check_is_design(design)
    if not padded:
        refuse_padding(design, what)
    parts: list[Design | RandomTerm] = [design, *design.terms]
    for part in parts:
        for own in fields(part):
            value = getattr(part, own.name)
            if own.name not in _PLAIN | known and value is not None and not (isinstance(value, tuple) and not value):
                raise ValueError(
                    f"{what} does not know {type(part).__name__}.{own.name}: it is for linear mixed models with "
                    "independent levels and independent errors; mixjax.lmm fits the model"
                )
