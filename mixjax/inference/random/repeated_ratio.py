"""Likelihood ratio tests between fits of repeated measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixjax import linalg
from mixjax.checks import DataError, InferenceWarning, warn
from mixjax.covariance import Structure
from mixjax.distributions import chi2_tail
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.inference.random.comparison import Comparison, names_of
from mixjax.products.visits import VisitRows

# A covariance is that of a structure where the nearest of it differs by less, relative to its largest entry.
ALIKE = 1e-6


def compare_repeated(fits: Sequence[Any], refit: Any, method: str, names: Sequence[str] | None) -> Comparison:
    """Args as of :func:`mixjax.compare`."""
    records = [getattr(fit, "record", fit) for fit in fits]
    names = names_of(fits, names)
    if not all(isinstance(record, RepeatedFitted) for record in records):
        raise ValueError(
            "fits of repeated measures (mixjax.mmrm) and of models with random effects are not nested, so there is no "
            "test; compare their fit.aic, with reml=False or where the fixed effects are the same"
        )
    if method != "chi2":
        raise ValueError(f"method={method!r} is not there for repeated measures, whose tests are at no bound: 'chi2'")
    first = records[0]
    for record, name in zip(records[1:], names[1:], strict=True):
        if record.nobs != first.nobs or not np.array_equal(record.design.y, first.design.y):
            raise DataError(f"{names[0]} and {name} are fits of different data: of {first.nobs} and {record.nobs} rows")
    notes = []
    if refit == "ml":
        restricted = [name for name, fit in zip(names, records, strict=True) if fit.reml]
        records = [record.refitted(False) for record in records]
        if restricted:
            notes.append(f"{', '.join(restricted)} fitted by REML: refitted by maximum likelihood")
    elif len({record.reml for record in records}) > 1:
        raise ValueError("these are fits by REML and by maximum likelihood: use refit='ml'")
    elif first.reml and not all(is_beside(first.rows, own.rows) for own in records):
        raise ValueError("fits by REML with different weights or offsets cannot be compared: use refit='ml'")
    elif first.reml and not all(is_in_span(a.rows, b.rows) for a in records for b in records):
        raise ValueError("REML criteria of different fixed effects cannot be compared: use refit='ml'")
    if failed := [name for name, fit in zip(names, records, strict=True) if not fit.estimates.converged]:
        notes.append(f"NOT CONVERGED: {', '.join(failed)}; no test with such a fit holds")
    order = sorted(range(len(fits)), key=lambda i: records[i].npar)
    records, names = [records[i] for i in order], [names[i] for i in order]
    criteria = np.array([float(record.estimates.criterion) for record in records])
    if records[0].reml:  # of one coding of the fixed effects
        logdets = np.array([float(record.rows.X_basis.logdet) for record in records])
        criteria = criteria + 2.0 * (logdets[0] - logdets)
    npar = np.array([record.npar for record in records])
    columns: dict[str, Any] = {"npar": npar, "aic": criteria + 2 * npar}
    columns |= {"bic": criteria + np.log(first.nobs) * npar, "loglik": -criteria / 2, "deviance": criteria}
    tests = []
    for i in range(1, len(records)):
        small, large, df = records[i - 1], records[i], int(npar[i] - npar[i - 1])
        statistic = max(float(criteria[i - 1] - criteria[i]), 0.0)
        faults = [] if df > 0 else ["one has no parameter more than the other"]
        if not is_beside(small.rows, large.rows):
            faults.append("weights or offset")
        elif not is_in_span(small.rows, large.rows):
            faults.append("fixed effects")
        faults += [] if is_special_covariance(small.rows, large.rows) else ["covariances of visits"]
        p = float(chi2_tail(statistic, df)) if not faults else np.nan
        if faults:
            warn(
                f"{names[i - 1]} is not a special case of {names[i]} ({', '.join(faults)}): a likelihood ratio test "
                "does not apply; compare by aic or bic",
                InferenceWarning,
            )
            notes.append(
                f"{names[i]} against {names[i - 1]}: not nested ({', '.join(faults)}): the test does not apply"
            )
        blank = np.nan
        tests.append({"chisq": blank if faults else statistic, "df": blank if faults else float(df), "p_value": p})
    table = pd.DataFrame(columns, index=names)
    table = table.join(pd.DataFrame(tests, index=names[1:], columns=["chisq", "df", "p_value"]))
    kind = "REML criteria" if records[0].reml else "maximum likelihood"
    title = f"Data: {first.nobs} rows, response {first.labels.response}; {kind}"
    formulas = {name: record.labels.formula for name, record in zip(names, records, strict=True)}
    return Comparison(title, formulas, table, tuple(notes))


def is_beside(a: VisitRows, b: VisitRows) -> bool:
    """Whether two models have the same weights and offsets."""
    return all(
        np.array_equal(nothing if own is None else own, nothing if other is None else other)
        for own, other, nothing in (
            (a.design.offset, b.design.offset, np.zeros(a.n)),
            (a.design.weights, b.design.weights, np.ones(a.n)),
        )
    )


def is_in_span(small: VisitRows, large: VisitRows) -> bool:
    """Whether the smaller model's fixed effects are combinations of the larger one's, of the same weights."""
    Q = large.Q
    rest = small.Q - Q @ (Q.T @ small.Q)
    return bool(np.abs(rest).max(initial=0.0) < ALIKE)


def is_special_covariance(small: VisitRows, large: VisitRows) -> bool:
    """Whether the larger model has all covariances of the smaller one, of the same subjects and visits."""
    a, b = small.design, large.design
    same = np.array_equal(a.subject, b.subject) and a.n_visits == b.n_visits and np.array_equal(a.visit, b.visit)
    arms = a.arm is None or (b.arm is not None and np.array_equal(a.arm, b.arm))
    return same and arms and contains(large.structures[0], small.structures[0])


def contains(large: Structure, small: Structure) -> bool:
    """Whether the larger structure has all covariances of the smaller one: of some at random, the nearest ones."""
    if large == small:
        return True
    rng = np.random.default_rng(1)
    x = small.exponentials(0.4 * rng.standard_normal((small.k, 8)))
    F = small.factor(x)
    other = large.factor(large.near(F))
    D, nearest = (linalg.matmul(A, linalg.transpose(A)) for A in (F, other))
    return bool(np.abs(D - nearest).max() < ALIKE * np.abs(D).max())
