"""What other programs take for generalised mixed models: CPU time per fit, and the -2 log-likelihood where they stop.

Workloads are many responses of one design, one small fit, and one large crossed one. Every program fits the first of
the same simulated responses, as many as its speed allows, in a process of its own: the first fit after importing stands
beside the mean of those after it. CPU time, of all threads. "above" is the largest -2 log-likelihood above the least
that any program found for the same response: 0 is the optimum, where the programs mean the same by it. Not comparable:
lme4's negative binomial (determinant by the expected curvature, the size by alternating), and mixedlm's, which holds
the size.

Peers: ``glmm`` and ``mixedlm`` from the Python package index; lme4 and glmmTMB where ``Rscript`` has them. A program
that is not there, cannot fit a case or takes longer than the limit has no entry.

    pip install glmm mixedlm
    python benchmarks/glmm_peers.py [--case intercepts] [--program glmm] [--limit 300] [--json figures.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
PYTHON = ("glmm", "mixedlm")
R = ("lme4", "glmmTMB")
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Case:
    """Responses of one design.

    Attributes:
        formula: with the response ``y``.
        family: "binomial", "poisson" or "negative binomial"; canonical links, log for the last.
        make: number of responses -> table without y, responses ``(B, n)``. The first are the same whatever B.
        fits: program -> number of responses.
        nagq: nodes of quadrature; 1 is Laplace.
        one_response: every fit is of the same response, from the beginning.
    """

    formula: str
    family: str
    make: Callable[[int], tuple[pd.DataFrame, np.ndarray]]
    fits: dict[str, int] = field(default_factory=lambda: {"glmm": 200, "mixedlm": 20, "lme4": 10, "glmmTMB": 10})
    nagq: int = 1
    one_response: bool = False


def bernoulli(eta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)


def groups(B: int, slopes: bool) -> tuple[pd.DataFrame, np.ndarray]:
    """40 groups of 10 rows, beta (-0.5, 0.8), sd of intercepts 1, of slopes 0.5 with correlation 0.3 or none."""
    group = np.repeat(np.arange(40), 10)
    x = np.random.default_rng(1).normal(size=400)
    factor = np.array([[1.0, 0.0], [0.15, np.sqrt(0.25 - 0.15**2)]]) if slopes else np.diag([1.0, 0.0])
    Y = []
    for replicate in range(B):
        rng = np.random.default_rng([2, replicate])
        b = rng.normal(size=(40, 2)) @ factor.T
        Y.append(bernoulli(-0.5 + b[group, 0] + (0.8 + b[group, 1]) * x, rng))
    return pd.DataFrame({"x": x, "g": np.char.add("g", group.astype(str))}), np.array(Y)


def factorial(B: int) -> tuple[pd.DataFrame, np.ndarray]:
    """40 subjects in 2 arms, 5 items 4 times each, sd 1: 800 rows of 200 cells."""
    subject, item = np.repeat(np.arange(40), 20), np.tile(np.repeat(np.arange(5), 4), 40)
    arm = subject % 2
    Y = []
    for replicate in range(B):
        rng = np.random.default_rng([3, replicate])
        Y.append(bernoulli(-0.5 + 0.5 * arm + 0.3 * (item - 2) + rng.normal(size=40)[subject], rng))
    named = {name: np.char.add(name, v.astype(str)) for name, v in (("arm", arm), ("item", item), ("subject", subject))}
    return pd.DataFrame(named), np.array(Y)


def genes(B: int, overdispersed: bool) -> tuple[pd.DataFrame, np.ndarray]:
    """Counts of 200 cells of each of 20 subjects in 2 arms: 4 000 rows, means of 0.1 to 10 a gene, an offset."""
    subject = np.repeat(np.arange(20), 200)
    arm, depth = (subject % 2).astype(float), 0.4 * np.random.default_rng(4).normal(size=4_000)
    Y = []
    for gene in range(B):
        rng = np.random.default_rng([5, gene])
        level, effect, size = rng.normal(-0.3, 0.9), rng.normal(0, 0.3), np.exp(rng.normal(0.7, 0.5))
        mu = np.exp(level + effect * arm + depth + 0.5 * rng.normal(size=20)[subject])
        Y.append(rng.poisson(mu * rng.gamma(size, 1 / size, mu.shape) if overdispersed else mu).astype(float))
    return pd.DataFrame({"arm": arm, "depth": depth, "subject": np.char.add("s", subject.astype(str))}), np.array(Y)


def bacteria(B: int) -> tuple[pd.DataFrame, np.ndarray]:
    """220 tests for H. influenzae of 50 children (MASS): the same response again and again."""
    table = pd.read_csv(ROOT / "mixjax" / "datasets" / "bacteria.csv")
    y = (table["y"] == "y").to_numpy(float)
    return table[["trt", "late", "ID"]], np.tile(y, (B, 1))


def insteval(B: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Ratings of 4 or 5 among 73 421."""
    table = pd.read_csv(ROOT / "mixjax" / "datasets" / "InstEval.csv.gz", dtype=dict.fromkeys(("s", "d", "dept"), str))
    table = table.assign(cell=table["dept"] + ":" + table["service"].astype(str))
    table = table.assign(s="s" + table["s"], d="d" + table["d"])
    return table[["service", "s", "d", "cell"]], np.tile((table["y"] >= 4).to_numpy(float), (B, 1))


FEW = {"glmm": 100, "mixedlm": 10, "lme4": 3, "glmmTMB": 5}
ONCE = {"glmm": 2, "mixedlm": 1, "lme4": 1, "glmmTMB": 1}
CASES = {
    "intercepts": Case("y ~ x + (1 | g)", "binomial", lambda B: groups(B, False)),
    "slopes": Case("y ~ x + (x | g)", "binomial", lambda B: groups(B, True)),
    "factorial": Case("y ~ arm + item + (1 | subject)", "binomial", factorial),
    "genes, Poisson": Case("y ~ arm + offset(depth) + (1 | subject)", "poisson", lambda B: genes(B, False), FEW),
    "genes, NB2": Case("y ~ arm + offset(depth) + (1 | subject)", "negative binomial", lambda B: genes(B, True), FEW),
    "intercepts, 9 nodes": Case("y ~ x + (1 | g)", "binomial", lambda B: groups(B, False), nagq=9),
    "bacteria": Case("y ~ trt + late + (1 | ID)", "binomial", bacteria, one_response=True),
    "InstEval": Case("y ~ service + (1 | s) + (1 | d) + (1 | cell)", "binomial", insteval, ONCE, one_response=True),
}


def fit_with_glmm(case: Case, table: pd.DataFrame) -> Callable[[np.ndarray], float]:
    import glmm

    columns = {name: column.tolist() for name, column in table.items()}
    family = case.family.replace(" ", "")

    def fit(y: np.ndarray) -> float:
        columns["y"] = y.tolist()
        return -2 * glmm.fit(columns, case.formula, family, nagq=case.nagq).loglik

    return fit


def fit_with_mixedlm(case: Case, table: pd.DataFrame) -> Callable[[np.ndarray], float]:
    import mixedlm
    from mixedlm import families

    family = {"binomial": families.Binomial, "poisson": families.Poisson}.get(case.family)
    if family is None:
        raise ValueError("mixedlm holds the size of a negative binomial")

    offset = table["depth"].to_numpy() if "offset(depth)" in case.formula else None
    formula = case.formula.replace(" + offset(depth)", "")
    fitted: list[Any] = []

    # Where responses differ refit() takes a tenth of the time, and stops some 1e-7 to 1e-5 above the minimum.
    def fit(y: np.ndarray) -> float:
        if fitted and not case.one_response:
            return -2 * float(fitted[0].refit(y).logLik().value)
        model = mixedlm.glmer(formula, table.assign(y=y), family=family(), nAGQ=case.nagq, offset=offset)
        fitted.append(model)
        return -2 * float(model.logLik().value)

    return fit


FITS = {"glmm": fit_with_glmm, "mixedlm": fit_with_mixedlm}


def by_python(program: str, case: Case, n: int) -> dict[str, Any]:
    """CPU seconds and -2 log-likelihood of every fit, in this process."""
    warnings.simplefilter("ignore")
    table, Y = case.make(n)
    fit = FITS[program](case, table)
    seconds, criteria = [], []
    for y in Y:
        start = time.process_time()
        criteria.append(fit(y))
        seconds.append(time.process_time() - start)
    return {"seconds": seconds, "criteria": criteria}


CALLS = {
    ("lme4", "binomial"): "glmer({formula}, d, family = binomial(), nAGQ = {nagq})",
    ("lme4", "poisson"): "glmer({formula}, d, family = poisson(), nAGQ = {nagq})",
    ("lme4", "negative binomial"): "glmer.nb({formula}, d)",
    ("glmmTMB", "binomial"): "glmmTMB({formula}, d, family = binomial())",
    ("glmmTMB", "poisson"): "glmmTMB({formula}, d, family = poisson())",
    ("glmmTMB", "negative binomial"): "glmmTMB({formula}, d, family = nbinom2())",
}
# logLik() of glmmTMB is NA where the Hessian at its end is not positive definite: at most singular fits.
CRITERIA = {"lme4": "-2 * as.numeric(logLik(m))", "glmmTMB": "2 * m$fit$objective"}
SCRIPT = """
suppressPackageStartupMessages(library({package}))
d <- read.csv("table.csv", stringsAsFactors = TRUE)
Y <- as.matrix(read.csv("responses.csv", header = FALSE))
for (i in seq_len(nrow(Y))) {{
  d$y <- unname(Y[i, ])
  start <- proc.time()
  m <- suppressMessages(suppressWarnings({call}))
  taken <- proc.time() - start
  cat(sprintf("fit %.6f %.17g\\n", sum(taken[c(1, 2, 4, 5)], na.rm = TRUE), {criterion}))
}}
"""


def by_r(program: str, case: Case, n: int, limit: float) -> dict[str, Any]:
    """The same in a process of R's."""
    if case.nagq > 1 and program == "glmmTMB":
        raise ValueError("glmmTMB has no quadrature")
    table, Y = case.make(n)
    call = CALLS[program, case.family].format(formula=case.formula, nagq=case.nagq)
    with tempfile.TemporaryDirectory() as folder:
        table.to_csv(Path(folder) / "table.csv", index=False)
        np.savetxt(Path(folder) / "responses.csv", Y, fmt="%d", delimiter=",")
        script = SCRIPT.format(package=program, call=call, criterion=CRITERIA[program])
        (Path(folder) / "fits.R").write_text(script)
        done = subprocess.run(
            ["Rscript", "fits.R"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=limit,
            env=os.environ | ONE_THREAD,
        )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("fit ")]
    if len(lines) < n:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return {"seconds": [float(line[1]) for line in lines], "criteria": [float(line[2]) for line in lines]}


def figures_of(program: str, name: str, limit: float) -> dict[str, Any]:
    """Fits of one program in a process of its own; ``{"error": ...}`` where there are none."""
    try:
        if program in R:
            return by_r(program, CASES[name], CASES[name].fits[program], limit)
        command = [sys.executable, __file__, "--case", name, "--program", program, "--here"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | ONE_THREAD)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1].removeprefix("ValueError: ")}
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    except ValueError as error:
        return {"error": str(error)}


def is_comparable(program: str, case: Case) -> bool:
    return (program, case.family) != ("lme4", "negative binomial")


def cells(case: Case, found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Per program: mean of the later fits (the first), how far the worst of all ends above the best."""
    comparable = [f["criteria"] for p, f in found.items() if "criteria" in f and is_comparable(p, case)]
    least = [min(c[i] for c in comparable if len(c) > i) for i in range(max(map(len, comparable), default=0))]
    texts = {}
    for program, figures in found.items():
        if "error" in figures:
            texts[program] = figures["error"]
            continue
        first, *later = figures["seconds"]
        text = f"{in_words(np.mean(later or [first]))}{f' ({in_words(first)})' if later else ''}"
        if is_comparable(program, case):
            above = max(c - m for c, m in zip(figures["criteria"], least, strict=False))
            text += f", above {above:.0e}"
        else:
            text += ", not comparable"
        texts[program] = f"{text}, n = {len(figures['seconds'])}"
    return texts


def in_words(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def versions(programs: list[str]) -> dict[str, str]:
    found = {p: importlib.metadata.version(p) for p in programs if p in PYTHON}
    for p in programs:
        if p in R:
            call = f'cat(as.character(packageVersion("{p}")))'
            found[p] = subprocess.run(["Rscript", "-e", call], capture_output=True, text=True, check=True).stdout
    return found


def installed(program: str) -> bool:
    if program in PYTHON:
        return importlib.util.find_spec(program) is not None
    call = ["Rscript", "-e", f"library({program})"]
    return shutil.which("Rscript") is not None and subprocess.run(call, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case only")
    parser.add_argument("--program", choices=(*PYTHON, *R), help="one program only")
    parser.add_argument("--limit", type=float, default=300, help="seconds for the fits of a case by a program")
    parser.add_argument("--json", help="also write every figure to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        case = CASES[arguments.case]
        print(json.dumps(by_python(arguments.program, case, case.fits[arguments.program])))
        return
    programs = [p for p in (*PYTHON, *R) if arguments.program in (None, p) and installed(p)]
    named = versions(programs)
    shown = ", ".join(f"{name} {version}" for name, version in named.items())
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {shown}\n")
    print(f"CPU time of a fit (of the first)\n\n| | {' | '.join(programs)} |\n|---|{'---|' * len(programs)}")
    everything: dict[str, Any] = {"date": str(date.today()), "versions": named, "cases": {}}
    for name in [arguments.case] if arguments.case else CASES:
        found = {program: figures_of(program, name, arguments.limit) for program in programs}
        texts = cells(CASES[name], found)
        print(f"| {name} | {' | '.join(texts[p] for p in programs)} |", flush=True)
        everything["cases"][name] = found
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
