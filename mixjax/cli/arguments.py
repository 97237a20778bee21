"""The options of the commands. What can be wrong with one by itself is said before anything is loaded."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence

import mixjax
from mixjax import datasets
from mixjax.cli.fit import fit_command
from mixjax.cli.power import PICTURES, power_command
from mixjax.cli.trial import trial_command
from mixjax.fitted.options import INTERVALS, ddf_of, option

# More sizes to simulate are a slip.
MOST_SIZES = 10_000


def parser_of_commands() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mixjax", description="Linear and generalised linear mixed models.")
    parser.add_argument("--version", action="version", version=f"mixjax {mixjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="fit a linear or generalised linear mixed model and print its summary",
        epilog="A csv file has a header, which is row 1 in messages, and as many cells in every row. Cells that are "
        "empty, NA, NaN or nan are missing, and their rows are left out if the formula uses the column. Names of "
        "columns and levels are those of the file: also of levels that look like numbers, in grouping factors and in "
        "columns of --ref; TRUE and FALSE are levels. Exit status: 0 fitted, 1 not converged, 2 no fit.",
    )
    fit.add_argument("formula", help="for example 'Reaction ~ Days + (Days | Subject)'")
    fit.add_argument("data", help=f"a csv or parquet file, or one of: {', '.join(datasets.NAMES)}")
    fit.add_argument("--ml", action="store_true", help="maximum likelihood instead of REML")
    fit.add_argument(
        "--repeated",
        action="store_true",
        help="repeated measures without random effects: 'y ~ arm * visit + us(visit | subject)'; names of visits "
        "in the order of the numbers in them",
    )
    _add_family(fit)
    fit.add_argument("--size", metavar="COLUMN", help="column with numbers of trials of a binomial response")
    fit.add_argument(
        "--nagq",
        type=_integer(1, 99),
        metavar="N",
        help="with --family: quadrature nodes an effect (default: 1, Laplace)",
    )
    fit.add_argument("--ziformula", metavar="FORMULA", help="with --family: extra zeros, such as '~ 1' or '~ x'")
    fit.add_argument("--dispformula", metavar="FORMULA", help="with --family: its parameter by columns, such as '~ x'")
    fit.add_argument(
        "--dispersion", metavar="FORMULA", help="linear models: residual sds by columns, log scale, such as '~ arm'"
    )
    fit.add_argument(
        "--residual",
        metavar="STRUCTURE",
        help="linear models: correlation of residuals within groups, such as 'ar1(Days | Subject)'",
    )
    fit.add_argument(
        "--exponentiate", action="store_true", help="with --family: also odds or rate ratios with 95 %% intervals"
    )
    fit.add_argument(
        "--weights", metavar="COLUMN", help="column with precision weights; with --family case weights, or trials"
    )
    fit.add_argument("--offset", metavar="COLUMN", help="column with a known part of the mean")
    fit.add_argument(
        "--ddf",
        type=ddf_of,
        choices=("satterthwaite", "kenward-roger", "kenward-roger-linear", "wald"),
        help="p values of the fixed effects, with these degrees of freedom (wald: z tests)",
    )
    fit.add_argument(
        "--confint",
        type=lambda text: option(text, INTERVALS),
        choices=("profile", "wald"),
        help="95 %% intervals of all parameters: profile likelihood, or Wald (fixed effects by --ddf)",
    )
    fit.add_argument(
        "--ref",
        action="append",
        default=[],
        type=_reference,
        metavar="COLUMN=LEVEL",
        help="reference level of a factor; the column is a factor then, whatever its values look like (repeatable)",
    )
    fit.add_argument(
        "--contrasts",
        action="append",
        default=[],
        type=_contrast,
        metavar="COLUMN=KIND",
        help="sum, helmert, poly, diff, SAS or treatment coding of a factor, also in random terms (repeatable)",
    )
    fit.add_argument(
        "--sep",
        metavar="CHARACTER",
        type=_separator,
        help=r"separator of a csv file (default: comma; '\t' for tabs)",
    )
    fit.add_argument("--decimal", choices=(".", ","), help="decimal mark of a csv file (default: point)")
    fit.add_argument("--encoding", type=_encoding, help="of a csv file, such as cp1252 or latin-1 (default: utf-8)")
    fit.add_argument("--json", action="store_true", help="print estimates as JSON")
    fit.set_defaults(run=fit_command)
    power = commands.add_parser(
        "power",
        help="simulate the power of a test for several numbers of groups",
        epilog="Every predictor is made by --x: between: 0 in one half of the groups, 1 in the other; within: 0, 1, 2, "
        "... along the rows of a group; normal: standard normal, row by row. Exit status: 0 done, 2 no result.",
    )
    power.add_argument("formula", help="for example 'y ~ x + (x | g)', with one grouping factor")
    power.add_argument(
        "--beta",
        required=True,
        type=_coefficients,
        help="fixed effects, the intercept first: 0,0.3; or by name: '(Intercept)=0,x=0.3'",
    )
    power.add_argument("--sd", required=True, type=_numbers(0), help="standard deviations of the random effects: 1,0.5")
    power.add_argument("--cor", type=_number(-1, 1), help="correlation of two random effects (default: 0)")
    power.add_argument("--sigma", type=_number(0), help="residual standard deviation of a linear model (default: 1)")
    _add_family(power)
    power.add_argument("--trials", type=_integer(1), help="trials of every binomial row (default: 1)")
    power.add_argument("--dispersion", type=_number(0), help="the family's parameter, such as the size of nbinom")
    power.add_argument(
        "--groups", required=True, type=_sizes, help="numbers of groups: 10:60:10 (both ends), or 10,20,40"
    )
    power.add_argument("--per-group", required=True, type=_integer(1), help="rows of every group")
    power.add_argument(
        "--x",
        action="append",
        metavar="KIND",
        help="between, within or normal; NAME=KIND for one of several predictors",
    )
    power.add_argument("--test", required=True, help="the fixed effect that is tested")
    trial = commands.add_parser(
        "trial",
        help="simulate the power of a trial with repeated measures and drop-out",
        epilog="Two arms of equal size; the difference at the last visit is tested in a mixed model for repeated "
        "measures. Exit status: 0 done, 2 no result.",
    )
    trial.add_argument(
        "--effect", required=True, type=_numbers(), help="difference of the arms at every visit: 0,0.2,0.4"
    )
    trial.add_argument(
        "--subjects", required=True, type=_sizes, help="numbers of subjects: 100:300:20 (both ends), or 100,200"
    )
    trial.add_argument("--sd", type=_numbers(0), default=[1.0], help="standard deviation, or one for each visit")
    trial.add_argument(
        "--cor",
        type=_correlation,
        default="0.5",
        help="correlation of all visits, or ar1:0.6, of neighbours, falling with distance (default: 0.5)",
    )
    trial.add_argument(
        "--dropout",
        type=_numbers(0),
        default=[0.0],
        help="probability of not coming back, for each visit after the first; or one number each (default: 0)",
    )
    trial.add_argument(
        "--dropout-slope",
        type=_number(),
        default=0.0,
        help="log odds of dropping out for each standard deviation of the response before (default: 0)",
    )
    trial.add_argument(
        "--structure",
        choices=("us", "csh", "homcs", "ar1", "ar1h", "homtoep", "toeph", "adh"),
        default="us",
        help="covariance of the visits in the fits (default: us)",
    )
    for command in (power, trial):
        _add_simulation(command)
    power.set_defaults(run=power_command)
    trial.set_defaults(run=trial_command)
    for command in (fit, power, trial):
        command.add_argument("--cache-dir", metavar="DIR", help="folder for compiled programs (default: user's cache)")
        command.add_argument("--no-cache", action="store_true", help="do not keep compiled programs")
        command.add_argument(
            "--untrusted", action="store_true", help="the formula comes from a stranger: refuse all that could be code"
        )
        command.add_argument("--debug", action="store_true", help="show where in the program an error came up")
    return parser


def _add_simulation(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ddf",
        type=ddf_of,
        choices=("satterthwaite", "kenward-roger", "kenward-roger-linear", "wald"),
        help="degrees of freedom of linear models (default: satterthwaite)",
    )
    command.add_argument("--target", type=_share, help="search the smallest number with this power")
    command.add_argument("--alpha", type=_share, default=0.05, help="level of the test (default: 0.05)")
    command.add_argument("--replicates", type=_integer(1), default=1000, help="data sets of every size (default: 1000)")
    command.add_argument("--key", type=_integer(0, 2**63 - 1), default=0, help="random key (default: 0)")
    command.add_argument("--plot", metavar="FILE", help=f"write a picture, whose name ends in {', '.join(PICTURES)}")


def _add_family(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--family",
        metavar="NAME",
        help="a generalised linear mixed model: binomial, poisson, nbinom, gamma, inverse_gaussian or beta",
    )
    command.add_argument("--link", metavar="NAME", help="with --family: its link (default: the family's own)")


# --- their types -----------------------------------------------------------------------------------------------------


def _number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low <= value <= high and math.isfinite(value)):
            wanted = (
                "finite" if low == -math.inf else f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            )
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return read


def _numbers(low: float = -math.inf) -> Callable[[str], list[float]]:
    return lambda text: [_number(low)(part) for part in text.split(",")]


def _coefficients(text: str) -> list[float] | dict[str, float]:
    """``0,0.3``, or ``(Intercept)=0,x=0.3``: commas and equal signs inside brackets belong to names."""
    parts = re.split(r",(?![^(\[]*[)\]])", text)
    named = [re.fullmatch(r"(.*[^=<>!])=([^=()\[\]]*)", part) for part in parts]
    if not any(named):
        return _numbers()(text)
    found: dict[str, float] = {}
    for part, match in zip(parts, named, strict=True):
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=NUMBER, as the others are")
        name = match[1].strip()
        if name in found:
            raise argparse.ArgumentTypeError(f"{name!r} is there twice")
        found[name] = _number()(match[2])
    return found


def _correlation(text: str) -> str:
    """``0.5``, or ``ar1:0.6``."""
    kind, _, number = text.rpartition(":")
    if kind not in ("", "ar1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor ar1:NUMBER")
    _number(-1, 1)(number)
    return text


def _contrast(text: str) -> tuple[str, str]:
    column, equals, kind = text.rpartition("=")
    if not (column and equals and kind):
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=KIND, as in recipe=sum")
    return column, kind


def _share(text: str) -> float:
    value = _number(0, 1)(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {low} or more{f', up to {high}' * (value > high)}, got {text}")
        return value

    return read


def _sizes(text: str) -> Sequence[int]:
    """``10:60:10``, both ends, or ``10,20,40``."""
    if ":" not in text:
        listed = [_integer(2)(part) for part in text.split(",")]
        if len(set(listed)) < len(listed):
            raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
        return listed
    parts = text.split(":")
    if len(parts) > 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not first:last or first:last:step")
    first, last = map(_integer(2), parts[:2])
    sizes = range(first, last + 1, *map(_integer(1), parts[2:]))
    if not sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is empty: it ends before it begins")
    if (last - first) // sizes.step >= MOST_SIZES:  # len() of a range has a limit of its own
        raise argparse.ArgumentTypeError(f"{text!r} has more than {MOST_SIZES} numbers: take a larger step")
    return sizes


def _reference(text: str) -> tuple[str, str]:
    column, equals, level = text.partition("=")
    if not (column and equals and level):
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=LEVEL")
    return column, level


def _separator(text: str) -> str:
    # What a shell passes on when one types a tab's name instead of a tab.
    text = "\t" if text == r"\t" else text
    if len(text) != 1 or text.isalnum() or text in '"\r\n.':
        raise argparse.ArgumentTypeError(f"{text!r} is not one character such as ';' or '\\t'")
    return text


def _encoding(text: str) -> str:
    try:
        "".encode(text)
    except LookupError:
        raise argparse.ArgumentTypeError(f"there is no encoding {text!r}; try utf-8, cp1252 or latin-1") from None
    return text
