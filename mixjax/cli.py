"""``mixjax fit FORMULA DATA``: the main job from a shell."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import mixjax
from mixjax import datasets

OK, NOT_CONVERGED, BAD_INPUT = 0, 1, 2


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
            warnings.showwarning = lambda message, *_, **__: print(f"mixjax: {message}", file=sys.stderr)
            data = _read(arguments.data, arguments.sep)
            fit = mixjax.lmm(
                arguments.formula, data, reml=not arguments.ml, weights=arguments.weights, offset=arguments.offset
            )
            print(json.dumps(_as_json(fit), indent=2, allow_nan=False) if arguments.json else fit.summary())
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"mixjax: {str(message).strip()}", file=sys.stderr)
        return BAD_INPUT
    return OK if fit.converged else NOT_CONVERGED


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
    fit.add_argument("--sep", metavar="CHARACTER", default=",", help="separator of a csv file (default: comma)")
    fit.add_argument("--json", action="store_true", help="print estimates as JSON")
    fit.add_argument("--cache-dir", metavar="DIR", help="folder for compiled programs (default: user's cache)")
    fit.add_argument("--no-cache", action="store_true", help="do not keep compiled programs")
    return parser


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
        return pd.read_parquet(path) if path.suffix in (".parquet", ".pq") else pd.read_csv(path, sep=separator)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _as_json(fit: Any) -> dict[str, Any]:
    """Estimates as plain numbers; what is not a number (the correlation of a zero variance) is null."""
    frame = fit.varcorr.to_frame()
    return {
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
        "sigma": fit.sigma,
        "theta": fit.theta.tolist(),
        "varcorr": json.loads(frame.to_json(orient="records", double_precision=15)),
        "converged": fit.converged,
        "singular": fit.is_singular,
    }


if __name__ == "__main__":
    sys.exit(main())
