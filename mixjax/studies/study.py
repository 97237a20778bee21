"""Simulation studies: every cell of a grid, thousands of replicates each, and what they say of the estimators."""

from __future__ import annotations

import inspect
import itertools
import json
import platform
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import pandas as pd

from mixjax.checks import DataWarning, check_count, check_level, check_memory, some_of, warn
from mixjax.design import Labels
from mixjax.estimation.choice import EngineName, check_engine
from mixjax.families import family_of
from mixjax.fitted.names import Spellings
from mixjax.fitted.options import ddf_of
from mixjax.inference.fixed.contrasts import check_ddf
from mixjax.machine import float64
from mixjax.markup import Report, Reported
from mixjax.optimise.results import Result, failed
from mixjax.populations.sample import PopulationRows
from mixjax.sampling.priors import Priors
from mixjax.simulation import as_key
from mixjax.studies.describe import describe
from mixjax.studies.grid import cell_of, combinations, named, source_of, warn_of_ignored
from mixjax.studies.measures import MEASURES, OTHERS, TEST, split, summarise, untested
from mixjax.studies.outcomes import BLOCK, outcomes, tested_names
from mixjax.studies.scenario import design_of
from mixjax.studies.store import Store, missing
from mixjax.studies.task import Task
from mixjax.tables import frame_report
from mixjax.waiting import Waiting

# Numbers in the responses of one chunk, and its replicates at most.
NUMBERS, MOST = 2**22, 2**13
# Chunks that an executor has at the same time.
IN_FLIGHT = 64
# Bytes of a replicate's fit at least: codes, and numbers of one fixed effect and of sigma.
BYTES = 42
# Columns of the tables that a study gives: a name of the grid beside them must be another.
COLUMNS = ("model", "term", "measure", "value", "mcse", "replicates", "converged", "singular", "failed")


@dataclass(frozen=True)
class Cell:
    """One cell: its values in the grid, and what is computed of every replicate."""

    values: Mapping[str, Any]
    task: Task


@dataclass(frozen=True, eq=False)
class Study(Reported):
    """Results of a study. ``str()`` shows the measures and what went wrong.

    Attributes:
        cells: the grid, one row per cell. replicates: their number in every cell.
        truths: parameter -> value, per cell. notes: what there is to say.
    """

    cells: pd.DataFrame
    replicates: int
    truths: list[dict[str, float]] = field(repr=False)
    notes: tuple[str, ...]
    _read: Callable[[int, list[str] | None], dict[str, np.ndarray]] = field(repr=False)
    _tasks: list[Task] = field(repr=False)

    def raw(self, cell: int = 0, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Replicates of one cell, by its row in ``cells``: see :func:`mixjax.studies.outcomes.outcomes`.

        NaN where a fit failed.
        """
        names = [columns] if isinstance(columns, str) else columns
        frame = pd.DataFrame(self._read(self._row(cell), None if names is None else list(names)))
        return frame.rename_axis("replicate")

    def data(self, cell: int = 0, replicate: int = 0) -> pd.DataFrame:
        """The data set of one replicate, simulated again: to look at one that failed, or to fit it by other means.

        Args:
            cell: row of ``cells``. replicate: its number, the row of :meth:`raw`.

        Returns:
            The predictors, and the response in a column named as the left side of the formula: on the scale of the
            model, of ``successes / size`` the successes, NaN where a trial has no visit.

        Example:
            >>> import mixjax as mj, numpy as np, pandas as pd
            >>> table = pd.DataFrame({"x": np.tile(np.arange(4.0), 6), "g": np.repeat(np.arange(6), 4)})
            >>> formula = "y ~ x + (1 | g)"
            >>> truth = mj.scenario(formula, table, beta=[1, 0.5], sd=1, sigma=1)
            >>> found = mj.study(truth, formula, replicates=20, key=1, progress=False)
            >>> again = mj.lmm(formula, found.data(0, 7))
            >>> bool(np.isclose(again.fixef["x"], found.raw()["x"][7]))
            True
        """
        task = self._tasks[self._row(cell)]
        if (
            isinstance(replicate, bool)
            or not isinstance(replicate, int | np.integer)
            or not 0 <= replicate < self.replicates
        ):
            raise ValueError(f"replicate is a number from 0 to {self.replicates - 1}, got {replicate!r}")
        place = int(replicate) % BLOCK
        with float64():
            tables, Y = task.source.tables(task.key, int(replicate) - place, place + 1)
        left = next(iter(task.models.values())).partition("~")[0].strip()
        data: pd.DataFrame = tables[-1].assign(**{left.partition("/")[0].strip(): np.asarray(Y[-1])})
        return data

    def _row(self, cell: Any) -> int:
        if isinstance(cell, bool) or not isinstance(cell, int | np.integer) or not 0 <= cell < len(self.cells):
            raise ValueError(f"cell is a row of .cells, 0 to {len(self.cells) - 1}, got {cell!r}")
        return int(cell)

    @cached_property
    def counts(self) -> pd.DataFrame:
        """Per cell and model: replicates, those that converged, are singular (of those), and failed, by code."""
        rows = []
        for i in range(len(self.cells)):
            columns = self._read(i, None)
            for column in columns:
                model, name = split(column)
                if name != "result":
                    continue
                codes = columns[column]
                lost = failed(codes)
                row: dict[Any, Any] = cell_of(self.cells, i)
                row |= {"model": model, "replicates": len(codes)}
                singular = columns[f"{model}::singular" if model else "singular"]
                row |= {"converged": int((~lost).sum()), "singular": int(singular.sum()), "failed": int(lost.sum())}
                for code in Result:
                    if not code.is_solution and (codes == int(code)).any():
                        row[f"failed: {code.name}"] = int((codes == int(code)).sum())
                rows.append(row)
        frame = pd.DataFrame(rows)
        counted = [str(name) for name in frame if str(name).startswith("failed: ")]
        frame[counted] = frame[counted].fillna(0).astype(int)
        return frame

    def to_frame(self, measures: Sequence[str] = MEASURES, level: float = 0.95, alpha: float = 0.05) -> pd.DataFrame:
        """Measures, one row each: the cell's values, ``model``, ``term``, ``measure``, ``value``, ``mcse``,
        ``replicates``.

        Args:
            measures: of ``"mean"``, ``"bias"``, ``"empirical_se"``, ``"model_se"``, ``"relative_error_se"``,
                ``"rmse"``, ``"coverage"``, ``"rejection"``; those that a quantity does not have are left out: without a
                known truth there is no bias.
            level: of the intervals whose coverage is counted. alpha: of the tests whose rejections are counted.

        ``mcse`` is the Monte Carlo standard error (Morris, White & Crowther 2019, Stat. Med. 38, 2074). ``replicates``
        counts those a value rests on: fits that failed are not among them, and ``counts`` says how many.
        """
        measures = [measures] if isinstance(measures, str) else list(measures)
        check_measures(measures)
        check_level(level)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
        parts = []
        for i in range(len(self.cells)):
            part = summarise(self._read(i, None), self.truths[i], measures, level, alpha)
            for j, name in enumerate(self.cells.columns):
                part.insert(j, name, [self.cells[name].iloc[i]] * len(part))
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def __str__(self) -> str:
        head, wide, below = self._summary()
        return "\n".join([head, wide.to_string(float_format=lambda x: f"{x:.4g}", na_rep=""), "", *below])

    def _report(self) -> Report:
        head, wide, below = self._summary()
        formats = dict.fromkeys(map(str, wide.columns), "{:.4g}")
        return frame_report(wide, [head], below, index=True, formats=formats)

    def _summary(self) -> tuple[str, pd.DataFrame, list[str]]:
        """The line above, measures by cell, model and term, and the lines below."""
        frame = self.to_frame(("mean", "bias", "empirical_se", "model_se", "coverage", "rejection"))
        # As text where a value is none, or cannot be compared: a row of the table must not be lost.
        for name in self.cells.columns:
            frame[name] = [v if isinstance(v, str | int | float) and v == v else str(v) for v in frame[name]]
        missing = untested(frame)
        index = [*self.cells.columns, *(["model"] if (frame["model"] != "").any() else []), "term"]
        wide = frame.pivot_table(index=index, columns="measure", values="value", sort=False)
        if "bias" in wide and "mean" in wide:  # where there is a truth the mean says nothing more
            wide["mean"] = wide["mean"].where(wide["bias"].isna())
            wide = wide.dropna(axis=1, how="all")
        columns = [m for m in MEASURES if m in wide]
        error = frame["mcse"].groupby(frame["measure"]).max()
        head = f"{self.replicates} replicates of {len(self.cells)} cell{'s' * (len(self.cells) > 1)}"
        lines = ["largest Monte Carlo standard errors: " + ", ".join(f"{m} {error[m]:.2g}" for m in columns)]
        counts = self.counts
        lines += [
            f"{int(counts['failed'].sum())} fits failed, {int(counts['singular'].sum())} are singular (see .counts)"
        ]
        return head, wide[columns], [*lines, *missing, *self.notes]

    __repr__ = __str__


def study(
    source: Any,
    models: str | Mapping[str, str],
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | None = None,
    replicates: int = 1000,
    key: Any = 0,
    *,
    truth: Mapping[str, float] | Callable[..., Mapping[str, float]] | None = None,
    reml: bool = True,
    ddf: str | None = None,
    null: Mapping[str, float] | None = None,
    compared: Sequence[tuple[str, str]] = (),
    statistic: Callable[..., Any] | None = None,
    common: bool = False,
    store: Any = None,
    executor: Any = None,
    mesh: Any = None,
    chunk: int | None = None,
    progress: bool | None = None,
    engine: EngineName = "auto",
    family: Any = None,
    link: str | None = None,
    size: Any = None,
    nagq: int = 1,
    estimator: str = "likelihood",
    priors: Priors | None = None,
) -> Study:
    """Simulate data again and again, fit them, and see how estimators and tests do.

    Args:
        source: where data come from: a :func:`mixjax.scenario`, a population with a number of rows
            (``population.rows(500)``), a fit, whose estimates are then the truth
            (:func:`mixjax.scenario_of`), or a function of the grid's names that returns one of these.
        models: formula to fit, or dict name -> formula.
        grid: name -> values, all combinations of which are cells; or a list of dicts; None for one cell. Names are
            those of the source's arguments, and of no column that the results have.
        replicates: in every cell.
        key: int or JAX key. A replicate depends on the key, the values of its cell and its number, and on nothing else.
        truth: parameter -> value, for bias and coverage; or a function of the cell's values. None: what the source
            knows.
        reml: criterion of linear fits; generalised ones are by maximum likelihood.
        ddf: of the tests and intervals of the fixed effects: ``"wald"``, ``"satterthwaite"`` or ``"kenward-roger"``.
            None: Satterthwaite's, of generalised models Wald's.
        null: fixed effect, or coefficient of ``dispformula=`` or ``ziformula=``, -> value under the tested hypothesis,
            0 where not named.
        compared: pairs ``(smaller, larger)`` of models, tested by likelihood ratio: chi-square, and the mixture of
            chi-squares where its weights are known.
        statistic: JAX function of one :class:`~mixjax.Estimates` (of generalised models :class:`~mixjax.GLMMEstimates`)
            -> number, array or dict of those, for measures of your own.
        common: the same random numbers in every cell.
        store: directory where finished chunks are kept as parquet files. Called again with the same arguments, the
            study does what is missing; with more replicates it goes on.
        executor: ``concurrent.futures`` executor, as ``dask.distributed.Client().get_executor()``; None for this
            process, with all its cores.
        mesh: devices to spread the fits of a chunk over, as for :func:`mixjax.estimate_many`; without an executor.
        chunk: replicates of one piece of work, a multiple of 1024. Results do not depend on it.
        progress: whether to show it; None for :func:`mixjax.show_progress`'s choice.
        engine: ``"numpy"`` or ``"jax"``, as for :func:`mixjax.estimate_many`; ``"auto"`` goes by the sizes of the model
            and the number of replicates. A store goes on by what it began with.
        family, link: of the response, as for :func:`mixjax.glmm`, where the models are generalised linear ones. None:
            what the source says, as a scenario or a fit of such a model does; otherwise models are linear.
        size: trials of a binomial response: a number, or the name of a column; with ``family``.
        nagq: of generalised models, as for :func:`mixjax.glmm`; 1 is Laplace's approximation.
        estimator: ``"likelihood"``, or ``"bayes"`` for posteriors of linear mixed models under ``priors``
            (:func:`mixjax.priors`; None for :func:`mixjax.default_priors` of every data set): estimates are posterior
            means, ``se()`` posterior standard deviations, ``p()`` twice the smaller tail probability beside the null,
            so that ``"rejection"`` counts central intervals that leave it out, and ``above()`` the probability of a
            fixed effect above it. Without ``compared``, ``statistic``, ``ddf``, ``mesh``; there is no coverage.

    Returns:
        :class:`Study`. Fits that failed, separated responses among them, are counted and never taken for acceptances.

    Raises:
        ValueError: an argument makes no sense, or a name of the grid would be read by nothing, or twice.
        mixjax.studies.store.StoreError: the directory cannot be used.

    Warns:
        DataWarning: the data do not depend on a name of the grid; a chunk of the store is damaged, and computed again;
            a name in ``truth`` is that of no estimate.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy")
        >>> formula = "Reaction ~ Days + (Days | Subject)"
        >>> def truth(slope):
        ...     return mj.scenario(formula, data, beta=[250, slope], sd=[25, 6], sigma=25)
        >>> result = mj.study(truth, formula, grid={"slope": [0, 5]}, replicates=200, key=1, progress=False)
        >>> result.to_frame("rejection").query("term == 'Days'")["value"].round(1).tolist()
        [0.1, 0.9]
    """
    replicates = check_count("replicates", replicates, 1)
    if ddf is not None:
        ddf = ddf_of(ddf)
        check_ddf(ddf)
    check_engine(engine)
    if family is None and (link is not None or size is not None):
        raise ValueError("link= and size= belong to a family: name it, family='binomial'")
    own_family = None if family is None else family_of(family, link)
    _check_estimator(estimator, priors)
    common_to_all = Task(
        None, {}, None, (), reml, ddf, dict(null or {}), statistic, engine, 0, own_family, size, nagq, estimator, priors
    )
    cells = _cells(source, models, grid, key, truth, compared, common, common_to_all)
    if mesh is not None and executor is not None:
        raise ValueError("give either an executor, whose workers use their own devices, or a mesh of this process's")
    if store is None:
        number = len(cells) * len(cells[0][0].task.models) * replicates
        advice = "keep them on disk by store=, or ask for fewer"
        check_memory(f"results of {number} fits", BYTES * number, advice)
    work_size = _chunk(chunk, cells)
    unseen: list[str] = []
    tasks = [describe(cell.task, unseen) for cell, _ in cells]
    values_of = [dict(cell.values) for cell, _ in cells]
    warn_of_ignored(values_of, [(task["source"], known) for task, (_, known) in zip(tasks, cells, strict=True)], unseen)
    if store is not None and unseen:
        warn(
            f"{store} cannot tell in full whether it holds this study, because "
            f"{some_of(list(dict.fromkeys(unseen)), '; ')}: when that changes, use another directory"
        )
    python = ".".join(platform.python_version_tuple()[:2])  # which a function's code depends on
    manifest = {
        "cells": [{"values": describe(own), "task": task} for own, task in zip(values_of, tasks, strict=True)],
        "block": BLOCK,
        "began_with": replicates,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "machine": platform.machine(), "python": python},
    }
    kept = Store(store, manifest) if store is not None else None
    fits = replicates if kept is None else kept.began_with
    cells = [(replace(cell, task=replace(cell.task, fits=fits)), known) for cell, known in cells]
    memory: list[dict[int, dict[str, np.ndarray]]] = [{} for _ in cells]
    done = kept.done() if kept is not None else {}
    work = [
        (i, first, count)
        for i in range(len(cells))
        for first, count in missing(done.get(i, []), replicates, work_size, BLOCK)
    ]

    if kept is not None and work:
        kept.prepare()

    def keep(i: int, first: int, columns: dict[str, np.ndarray]) -> None:
        if kept is not None:
            kept.write(i, first, columns)
        else:
            memory[i][first] = columns

    total = sum(count for *_, count in work)
    with Waiting(f"study: {total} replicates in {len(cells)} cells", total, progress, "fit") as bar:
        for i, first, columns in _computed(cells, work, executor, mesh):
            keep(i, first, columns)
            bar.update(len(next(iter(columns.values()))))

    def read(i: int, names: list[str] | None) -> dict[str, np.ndarray]:
        if kept is not None:
            return kept.read(i, replicates, names)
        parts = [memory[i][first] for first in sorted(memory[i])]
        if lacking := [name for name in names or [] if name not in parts[0]]:
            raise ValueError(f"there is no column {', '.join(map(repr, lacking))}; there are {', '.join(parts[0])}")
        return {name: np.concatenate([p[name] for p in parts]) for name in (parts[0] if names is None else names)}

    # A scenario knows more than a smaller model estimates; what the user says is meant to be read.
    said = {
        name
        for cell, known in cells
        if truth is not None or isinstance(cell.task.source, PopulationRows)
        for name in known
    }
    truths = [known for _, known in cells]
    if said:
        names = kept.columns(0) if kept is not None else list(next(iter(memory[0].values())))
        there = {split(column)[1] for column in names}
        estimates = _estimates(there)
        spelled = Spellings(estimates, in_order=False)
        truths = [{estimates[spelled[k]] if k in spelled else k: v for k, v in each.items()} for each in truths]
        said = {name for name in said if name not in spelled}
        if nothing := sorted(said - there):
            warn(
                f"truth names {some_of(nothing)}, which no model estimates; estimates are {some_of(_estimates(there))}"
            )
    frame = pd.DataFrame(values_of, index=pd.RangeIndex(len(cells)))
    return Study(frame, replicates, truths, tuple(kept.notes) if kept else (), read, [cell.task for cell, _ in cells])


def _check_estimator(estimator: Any, priors: Any) -> None:
    if estimator not in ("likelihood", "bayes"):
        raise ValueError(f"estimator must be 'likelihood' or 'bayes', got {estimator!r}")
    if priors is not None and (estimator != "bayes" or not isinstance(priors, Priors)):
        raise ValueError(f"priors must be mixjax.priors(...), with estimator='bayes'; got {priors!r}")


# Names of the study's own arguments, which no name of a grid stands for.
OPTIONS = tuple(inspect.signature(study).parameters)


def check_measures(measures: Sequence[str]) -> None:
    """Raise ValueError for measures that are none."""
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise ValueError(
            f"unknown measure {', '.join(map(repr, unknown))}; there are {', '.join(MEASURES)}; for your own pass "
            "statistic= a function of the estimates"
        )


# --- cells -----------------------------------------------------------------------------------------------------------


def _cells(
    source: Any,
    models: str | Mapping[str, str],
    grid: Any,
    key: Any,
    truth: Any,
    compared: Sequence[tuple[str, str]],
    common: bool,
    task: Task,
) -> list[tuple[Cell, dict[str, float]]]:
    models = {"": models} if isinstance(models, str) else dict(models)
    if not models:
        raise ValueError("models is empty: name a formula to fit")
    if any("::" in name or "|" in name for name in models):
        raise ValueError(f"names of models must be without '::' and '|', got {', '.join(models)}")
    for pair in compared:
        if len(pair) != 2 or any(name not in models for name in pair):
            raise ValueError(f"compared= takes pairs of the models {', '.join(models)}, got {pair!r}")
    with float64():
        root = as_key(key)
        cells: list[tuple[Cell, dict[str, float]]] = []
        for values in combinations(grid, COLUMNS):
            own = source_of(source, values, OPTIONS)
            if not cells:
                _refuse_names_of_formulas(models, replace(task, source=own), values)
            code = np.uint32(zlib.crc32(json.dumps(describe(values), sort_keys=True).encode()))
            cell_key = np.asarray(jax.random.key_data(root if common else jax.random.fold_in(root, code)))
            pairs = tuple((smaller, larger) for smaller, larger in compared)
            mine = replace(task, source=own, models=models, key=cell_key, compared=pairs)
            known = truth(**values) if callable(truth) else own.truth if truth is None else truth
            cells.append((Cell(values, mine), {str(name): float(value) for name, value in known.items()}))
    return cells


def _refuse_names_of_formulas(models: Mapping[str, str], own: Task, values: Mapping[str, Any]) -> None:
    """A formula that is fitted reads columns and the caller's variables; a grid's value does not get there."""
    for formula in models.values():
        if not any(name in formula for name in values):
            continue
        read = [name for name in values if name in _labels_of(formula, own).state.context.own]
        if read:
            raise ValueError(
                f"the formula {formula!r} reads {', '.join(read)}, which is a name of the grid and no column: it would "
                "have the value of your own variable in every cell. Make a column of it in the source's table"
            )


def _estimates(names: set[str]) -> list[str]:
    return sorted(name for name in names if name not in OTHERS and not TEST.fullmatch(name))


def names_of_effects(
    source: Any, formula: str, grid: Any, family: Any = None, link: str | None = None, size: Any = None
) -> tuple[str, ...]:
    """What a model in the first cell of a grid has tests of, from its predictors alone: nothing is fitted."""
    values = combinations(grid)[0]
    own_family = None if family is None else family_of(family, link)
    own = Task(source_of(source, values, OPTIONS), {}, None, family=own_family, size=size)
    with _Named(values):
        return tested_names(_labels_of(formula, own), own.options.get("family"))


def _labels_of(formula: str, task: Task) -> Labels:
    own = task.source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # the study itself tells of columns left out
        table = own.table if hasattr(own, "table") else own.tables(0, 0, 1)[0][0]
        return design_of(formula, table, **task.options, may_be_plain=True)[1]


def _chunk(chunk: int | None, cells: list[tuple[Cell, dict[str, float]]]) -> int:
    if chunk is not None:
        chunk = check_count("chunk", chunk, 1)
        if chunk % BLOCK:
            raise ValueError(f"chunk must be a multiple of {BLOCK}, got {chunk}")
        return chunk
    rows = max(cell.task.source.nobs for cell, _ in cells)
    return int(np.clip(NUMBERS // rows // BLOCK * BLOCK, BLOCK, MOST))


# --- computing -------------------------------------------------------------------------------------------------------


def _computed(
    cells: list[tuple[Cell, dict[str, float]]], work: Sequence[tuple[int, int, int]], executor: Any, mesh: Any
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Chunks as they are finished."""
    if executor is None:
        for i, first, count in work:
            with _Named(cells[i][0].values):
                columns = outcomes(cells[i][0].task, first, count, mesh)
            yield i, first, columns
        return
    waiting = iter(work)
    running: dict[Future[Any], tuple[int, int]] = {}
    try:
        while True:
            for i, first, count in itertools.islice(waiting, IN_FLIGHT - len(running)):
                running[executor.submit(outcomes, cells[i][0].task, first, count)] = (i, first)
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                i, first = running.pop(future)
                with _Named(cells[i][0].values):
                    columns = future.result()
                yield i, first, columns
    finally:
        for future in running:
            future.cancel()


@dataclass
class _Named:
    """Errors say in which cell they happened."""

    values: Mapping[str, Any]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self.values:
            error.add_note(f"in cell {named(self.values)}")
