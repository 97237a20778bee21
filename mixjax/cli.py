"""``mixjax fit FORMULA DATA`` and ``mixjax power FORMULA ...``: the main jobs from a shell."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mixjax
from mixjax import datasets

OK, NOT_CONVERGED, BAD_INPUT = 0, 1, 2
# Coverage of the intervals.
LEVEL = 0.95
# What files named csv are separated by; looked for where a file seems to have one column.
SEPARATORS = (",", ";", "\t", "|")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fitted, 1 not converged, 2 bad input."""
    arguments = _parser().parse_args(argv)
    if not arguments.no_cache:
        try:
            mixjax.enable_compilation_cache(arguments.cache_dir)
        except OSError as error:
            print(f"mixjax: compiled programs are not kept: {error}", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _tell(message)
            return arguments.run(arguments)
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mixjax: {str(message).strip()}", file=sys.stderr)
        return BAD_INPUT


def _tell(message: Any) -> None:
    """A warning as one line on stderr, without the place in Python's code that means nothing in a shell."""
    print(f"mixjax: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixjax", description="Linear mixed models.")
    parser.add_argument("--version", action="version", version=f"mixjax {mixjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="fit a linear mixed model and print its summary",
        epilog="Exit status: 0 fitted, 1 not converged, 2 bad input.",
    )
    fit.add_argument("formula", help="for example 'Reaction ~ Days + (Days | Subject)'")
    fit.add_argument("data", help=f"a csv or parquet file, or one of: {', '.join(datasets.NAMES)}")
    fit.add_argument("--ml", action="store_true", help="maximum likelihood instead of REML")
    fit.add_argument("--weights", metavar="COLUMN", help="column with precision weights")
    fit.add_argument("--offset", metavar="COLUMN", help="column with a known part of the mean")
    fit.add_argument(
        "--ddf",
        choices=("satterthwaite", "kenward-roger", "wald"),
        help="p values of the fixed effects, with these degrees of freedom (wald: z tests)",
    )
    fit.add_argument(
        "--confint",
        choices=("profile", "wald"),
        help="95 %% intervals of all parameters: profile likelihood, or Wald (fixed effects by --ddf)",
    )
    fit.add_argument(
        "--sep", metavar="CHARACTER", default=",", help=r"separator of a csv file (default: comma; '\t' for tabs)"
    )
    fit.add_argument("--json", action="store_true", help="print estimates as JSON")
    fit.set_defaults(run=_fit)
    power = commands.add_parser(
        "power",
        help="simulate the power of a test for several numbers of groups",
        epilog="Every predictor is made by --x: between: 0 in one half of the groups, 1 in the other; within: 0, 1, 2, "
        "... along the rows of a group; normal: standard normal, row by row. Exit status: 0 done, 2 bad input.",
    )
    power.add_argument("formula", help="for example 'y ~ x + (x | g)', with one grouping factor")
    power.add_argument("--beta", required=True, type=_numbers, help="fixed effects, the intercept first: 0,0.3")
    power.add_argument("--sd", required=True, type=_numbers, help="standard deviations of the random effects: 1,0.5")
    power.add_argument("--cor", type=float, default=0.0, help="correlation of two random effects (default: 0)")
    power.add_argument("--sigma", type=float, default=1.0, help="residual standard deviation (default: 1)")
    power.add_argument(
        "--groups", required=True, type=_sizes, help="numbers of groups: 10:60:10 (both ends), or 10,20,40"
    )
    power.add_argument("--per-group", required=True, type=int, help="rows of every group")
    power.add_argument(
        "--x",
        action="append",
        metavar="KIND",
        help="between, within or normal; NAME=KIND for one of several predictors",
    )
    power.add_argument("--test", required=True, help="the fixed effect that is tested")
    power.add_argument("--ddf", default="satterthwaite", help="wald, satterthwaite (default) or kenward-roger")
    power.add_argument("--target", type=float, help="search the smallest number of groups with this power")
    power.add_argument("--alpha", type=float, default=0.05, help="level of the test (default: 0.05)")
    power.add_argument("--replicates", type=int, default=1000, help="data sets of every size (default: 1000)")
    power.add_argument("--key", type=int, default=0, help="random key (default: 0)")
    power.add_argument("--plot", metavar="FILE", help="write a picture, as png, pdf or svg")
    power.set_defaults(run=_power)
    for command in (fit, power):
        command.add_argument("--cache-dir", metavar="DIR", help="folder for compiled programs (default: user's cache)")
        command.add_argument("--no-cache", action="store_true", help="do not keep compiled programs")
    return parser


# --- mixjax fit ------------------------------------------------------------------------------------------------------


def _fit(arguments: argparse.Namespace) -> int:
    data = _read(arguments.data, arguments.sep)
    with _Held() as held:
        fit = mixjax.lmm(
            arguments.formula, data, reml=not arguments.ml, weights=arguments.weights, offset=arguments.offset
        )
        held.known = not arguments.json
    summary = fit.summary(arguments.ddf)
    intervals = None
    if arguments.confint is not None:
        intervals = fit.confint(level=LEVEL, method=arguments.confint, ddf=arguments.ddf or "wald")
    if arguments.json:
        found = _as_json(fit, arguments.ddf, summary.tests, arguments.confint, intervals)
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print(summary)
        if intervals is not None:
            print(f"\n{_interval_text(arguments.confint, intervals)}")
    return OK if fit.converged else NOT_CONVERGED


class _Held:
    """Warnings of rows and columns left out wait here: the summary says the same, but only where there is one.

    ``known``: they stand in the summary.
    """

    def __init__(self) -> None:
        self.known = False

    def __enter__(self) -> _Held:
        self.told: list[Any] = []
        self.catching = warnings.catch_warnings()
        self.catching.__enter__()
        warnings.showwarning = lambda message, *_, **__: self.told.append(message)
        return self

    def __exit__(self, *error: Any) -> None:
        self.catching.__exit__(*error)
        for message in self.told:
            if not (self.known and isinstance(message, mixjax.DataWarning) and "left out because" in str(message)):
                _tell(message)


def _read(name: str, separator: str) -> Any:
    import pandas as pd

    path = Path(name)
    if not path.exists():
        if name.lower() in (known.lower() for known in datasets.NAMES):
            return datasets.load(name)
        close = difflib.get_close_matches(name, datasets.NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise FileNotFoundError(f"there is no file {name!r} and no bundled data set of that name{hint}")
    try:
        if path.suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        # What a shell passes on when one types a tab's name instead of a tab.
        separator = "\t" if separator == r"\t" else separator
        # The header alone: rows of another separator may not even have one number of fields.
        header = [str(column) for column in pd.read_csv(path, sep=separator, nrows=0)]
        other = next((mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]), None)
        if other is None:
            return pd.read_csv(path, sep=separator)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    shown = r"\t" if other == "\t" else other
    kind = "tabs" if other == "\t" else f"{other!r}"
    raise ValueError(
        f"{name} has one column, {header[0]!r}: the file seems to be separated by {kind}: add --sep '{shown}'"
    )


def _as_json(fit: Any, ddf: str | None, tests: Any, method: str | None, intervals: Any) -> dict[str, Any]:
    """Estimates as plain numbers; what is not a number (the correlation of a zero variance) is null.

    With tests the standard errors are those of their method, as in the summary.
    """
    frame = fit.varcorr.to_frame()
    found = {
        "formula": fit.labels.formula,
        "method": "REML" if fit.reml else "ML",
        "criterion": fit.criterion,
        "loglik": fit.loglik,
        "aic": fit.aic,
        "bic": fit.bic,
        "nobs": fit.nobs,
        "npar": fit.npar,
        "groups": {term.group: len(term.levels) for term in fit.labels.terms},
        "fixef": fit.fixef.to_dict(),
        "se": fit.se.to_dict(),
    }
    if tests is not None:
        found |= {"ddf": ddf, "se": _plain(tests["std_error"])}
        found |= {name: _plain(tests[name]) for name in ("df", "statistic", "p_value")}
    found |= {
        "sigma": fit.sigma,
        "theta": fit.theta.tolist(),
        "varcorr": json.loads(frame.to_json(orient="records", double_precision=15)),
    }
    if intervals is not None:
        found["confint"] = {"method": method, "level": LEVEL}
        found["confint"] |= {name: _plain(intervals[name]) for name in ("lower", "upper")}
    return found | {"converged": fit.converged, "singular": fit.is_singular}


def _plain(column: Any) -> dict[str, float | None]:
    """Name -> number, or null where there is none: JSON has no infinite degrees of freedom of a z test."""
    return {str(name): float(value) if math.isfinite(value) else None for name, value in column.items()}


def _interval_text(method: str, intervals: Any) -> str:
    from mixjax.summary import text_table

    kind = "profile likelihood" if method == "profile" else "Wald"
    table = intervals.rename_axis("").reset_index()
    for name in ("lower", "upper"):
        table[name] = ["none" if math.isnan(x) else f"{x:#.5g}" for x in table[name]]
    return f"{100 * LEVEL:g} % confidence intervals ({kind}):\n{text_table(table, left=1)}"


# --- mixjax power ----------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _sizes(text: str) -> Sequence[int]:
    """``10:60:10``, both ends, or ``10,20,40``."""
    if ":" not in text:
        return [int(part) for part in text.split(",")]
    first, last, *step = (int(part) for part in text.split(":"))
    return range(first, last + 1, step[0] if step else 1)


def _power(arguments: argparse.Namespace) -> int:
    import numpy as np
    import pandas as pd

    from mixjax.formula.parse import parse
    from mixjax.studies.power import power_curve

    parsed = parse(arguments.formula)
    factors = sorted({column for part in parsed.random for column in part.group.columns})
    if len(factors) != 1:
        raise ValueError(
            f"mixjax power simulates one grouping factor; {arguments.formula!r} has {', '.join(factors) or 'none'}: "
            "use mixjax.power_curve in Python for more"
        )
    names = dict.fromkeys(name for e in parsed.effects for name in (*e.columns, *e.names))
    kinds = _kinds(arguments.x or [], list(names))
    per_group = arguments.per_group
    if per_group < 1 or min(arguments.groups) < 2:
        raise ValueError("--groups must be 2 or more and --per-group 1 or more")

    def source(groups: int) -> Any:
        group = np.repeat(np.arange(groups), per_group)
        made = {
            "between": lambda rng: (group % 2).astype(float),
            "within": lambda rng: np.tile(np.arange(per_group, dtype=float), groups),
            "normal": lambda rng: rng.standard_normal(len(group)),
        }
        columns = {
            name: made[kind](np.random.default_rng([arguments.key, i])) for i, (name, kind) in enumerate(kinds.items())
        }
        table = pd.DataFrame({factors[0]: group, **columns})
        cor = arguments.cor if arguments.cor else None
        return mixjax.scenario(arguments.formula, table, arguments.beta, arguments.sigma, arguments.sd, cor)

    found = power_curve(
        source, arguments.formula, arguments.test, {"groups": arguments.groups}, arguments.target,
        arguments.replicates, arguments.key, arguments.alpha, ddf=arguments.ddf, progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(found)
    if arguments.plot:
        from mixjax import plots

        figure = plots.power_curve(found).get_figure(root=True)
        assert figure is not None
        figure.savefig(arguments.plot, bbox_inches="tight")
    return OK


def _kinds(given: list[str], names: list[str]) -> dict[str, str]:
    """What every predictor is made of."""
    known = ("between", "within", "normal")
    kinds: dict[str, str] = {}
    for text in given:
        name, equals, kind = text.rpartition("=")
        if kind not in known:
            raise ValueError(f"--x {text!r}: a predictor is made {', '.join(known[:-1])} or {known[-1]}")
        if equals and name not in names:
            raise ValueError(f"--x names {name!r}; the predictors are {', '.join(names)}")
        kinds |= {name: kind} if equals else {other: kind for other in names if other not in kinds}
    missing = [name for name in names if name not in kinds]
    if missing:
        raise ValueError(f"--x must say how {', '.join(missing)} is made: between, within or normal")
    return {name: kinds[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
