"""``mixjax power``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixjax
from mixjax.cli.messages import keep_programs

OK = 0
# More rows are a slip, and would be made before anybody sees it.
MOST_ROWS = 10_000_000
PICTURES = (".png", ".pdf", ".svg")


def power_command(arguments: argparse.Namespace) -> int:
    """Simulate, and print the table; returns the exit status."""
    import numpy as np
    import pandas as pd

    from mixjax.formula.parse import parse
    from mixjax.studies.power import power_curve

    _check_power(arguments)
    parsed = parse(arguments.formula)
    factors = sorted({column for part in parsed.random for column in part.group.columns})
    if len(factors) != 1:
        raise ValueError(
            f"mixjax power simulates one grouping factor; {arguments.formula!r} has {', '.join(factors) or 'none'}: "
            "use mixjax.power_curve in Python for more"
        )
    names = dict.fromkeys(name for e in parsed.effects for name in (*e.columns, *e.names))
    kinds = _kinds(arguments.x or [], list(names))
    per_group, cor = arguments.per_group, arguments.cor

    def source(groups: int) -> Any:
        group = np.repeat(np.arange(groups), per_group)
        made: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
            "between": lambda rng: (group % 2).astype(float),
            "within": lambda rng: np.tile(np.arange(per_group, dtype=float), groups),
            "normal": lambda rng: rng.standard_normal(len(group)),
        }
        columns = {
            name: made[kind](np.random.default_rng([arguments.key, i])) for i, (name, kind) in enumerate(kinds.items())
        }
        table = pd.DataFrame({factors[0]: group, **columns})
        own = {name: getattr(arguments, name) for name in ("sigma", "family", "link", "dispersion")}
        return mixjax.scenario(
            arguments.formula, table, arguments.beta, sd=arguments.sd, cor=cor, size=arguments.trials, **own
        )

    keep_programs(arguments)
    found = power_curve(
        source, arguments.formula, arguments.test, {"groups": arguments.groups}, arguments.target,
        arguments.replicates, arguments.key, arguments.alpha, ddf=arguments.ddf,
    )  # fmt: skip
    print(found)
    if arguments.plot:
        save_picture(found, arguments.plot)
    return OK


def save_picture(found: Any, path: str) -> None:
    """The curve as a file."""
    from mixjax import plots

    figure = plots.power_curve(found).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, bbox_inches="tight")


def _check_power(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what no argument says by itself: before hours of simulation."""
    rows = max(arguments.groups) * arguments.per_group
    if rows > MOST_ROWS:
        raise ValueError(f"--groups and --per-group make {rows} rows, more than {MOST_ROWS}: take fewer")
    if arguments.family is None:
        if given := [f"--{name}" for name in ("link", "trials", "dispersion") if getattr(arguments, name) is not None]:
            raise ValueError(f"{', '.join(given)}: for generalised models; name the --family")
    elif given := [f"--{name}" for name in ("sigma", "ddf") if getattr(arguments, name) is not None]:
        raise ValueError(f"{', '.join(given)}: for linear models; generalised ones have z tests and no sigma")
    if arguments.sigma == 0:
        raise ValueError("--sigma 0 leaves no residual variance, and every fit would fail: take a small one")
    if arguments.cor and len(arguments.sd) < 2:
        raise ValueError("--cor is the correlation of two random effects, and --sd has one")
    if arguments.target is not None and arguments.target <= arguments.alpha:
        raise ValueError(f"--target {arguments.target:g} must be larger than --alpha {arguments.alpha:g}")
    check_picture(arguments.plot)


def check_picture(name: str | None) -> None:
    """Raise ValueError where a picture cannot be written, or ImportError where it cannot be drawn."""
    if name is None:
        return
    path = Path(name)
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path}: the name must end in {', '.join(PICTURES)}")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--plot {path}: no file can be written there")
    from mixjax import plots  # noqa: F401 (matplotlib may not be there)


def _kinds(given: list[str], names: list[str]) -> dict[str, str]:
    """The sources of every predictor."""
    known = ("between", "within", "normal")
    kinds: dict[str, str] = {}
    for text in given:
        name, equals, kind = text.rpartition("=")
        if kind not in known:
            raise ValueError(f"--x {text!r}: a predictor is made {', '.join(known[:-1])} or {known[-1]}")
        if equals and name not in names:
            raise ValueError(f"--x names {name!r}; the predictors are {', '.join(names)}")
        named = {name: kind} if equals else {other: kind for other in names if other not in kinds}
        if not named or name in kinds:
            raise ValueError(f"--x {text!r}: nothing is left to be made so: {', '.join(names) or 'no predictor'}")
        kinds |= named
    missing = [name for name in names if name not in kinds]
    if missing:
        raise ValueError(f"--x must say how {', '.join(missing)} is made: between, within or normal")
    return {name: kinds[name] for name in names}
