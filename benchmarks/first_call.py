"""Claim: an analyst's first hour is no slower than in R: no call compiles a program, except those of many fits.

One fresh process goes through the steps below; every call is the first of its kind. Beside it R with lme4, lmerTest,
pbkrtest and emmeans does the same steps in one process, where ``Rscript`` with these packages is found. Targets:

  * programs compiled by steps that are not of many fits: 0;
  * the sum of first calls without the two bootstraps at most a third of R's, with them at most a twentieth;
  * process start to a printed summary not slower than R's;
  * ``lmm`` again below 5 ms, ``refit(y)`` below 2 ms, Kenward-Roger again below 50 ms.

    python benchmarks/first_call.py
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from typing import Any

SLOPES = "Reaction ~ Days + (Days | Subject)"
# Name of the step, and what it is in R; "" where R has nothing alike.
R_STEPS = {
    "lmm": "m <- lmer(Reaction ~ Days + (Days | Subject), sleepstudy)",
    "summary, Satterthwaite": "print(summary(m))",
    "summary, Kenward-Roger": 'print(summary(m, ddf = "Kenward-Roger"))',
    "anova": "print(anova(m))",
    "confint, profile": "print(confint(m, quiet = TRUE))",
    "refit(y)": "r <- refit(m, sleepstudy$Reaction + 1)",
    "ranef with variances": "print(head(as.data.frame(ranef(m, condVar = TRUE))))",
    "predict": "print(head(predict(m)))",
    "influence by Subject": 'i <- influence(m, "Subject"); print(head(cooks.distance(i)))',
    "second formula": "m1 <- lmer(Reaction ~ Days + (1 | Subject), sleepstudy)",
    "compare, chi-square": "print(anova(m1, m, refit = FALSE))",
    "cake": "c1 <- lmer(angle ~ recipe * temperature + (1 | recipe:replicate), cake)",
    "cake, anova, Kenward-Roger": 'print(anova(c1, ddf = "Kenward-Roger"))',
    "cake, emmeans": "print(emmeans(c1, ~ recipe))",
    "Penicillin": "p1 <- lmer(diameter ~ 1 + (1 | plate) + (1 | sample), Penicillin)",
    "Penicillin, confint": "print(confint(p1, quiet = TRUE))",
    "Machines": "k1 <- lmer(score ~ Machine + (Machine | Worker), Machines)",
    "Machines, Kenward-Roger": 'print(summary(k1, ddf = "Kenward-Roger"))',
    "compare, bootstrap of 1 000": "b <- PBmodcomp(m, m1, nsim = 1000)",
    "bootstrap of 1 000, intervals": "b <- bootMer(m, fixef, nsim = 1000)",
}
MANY = ("compare, bootstrap of 1 000", "bootstrap of 1 000, intervals")


def steps(mj: Any) -> dict[str, Callable[[], Any]]:
    """The same in mixjax; what a step makes, the later ones use."""
    made: dict[str, Any] = {}
    load = mj.datasets.load
    tables = {name: load(name) for name in ("sleepstudy", "cake", "Penicillin", "Machines")}

    def fit(name: str, formula: str, table: str) -> Callable[[], Any]:
        return lambda: made.__setitem__(name, mj.lmm(formula, tables[table]))

    return {
        "lmm": fit("m", SLOPES, "sleepstudy"),
        "summary, Satterthwaite": lambda: str(made["m"].summary("satterthwaite")),
        "summary, Kenward-Roger": lambda: str(made["m"].summary("kenward-roger")),
        "anova": lambda: str(made["m"].anova()),
        "confint, profile": lambda: str(made["m"].confint()),
        "refit(y)": lambda: made["m"].refit(tables["sleepstudy"]["Reaction"].to_numpy() + 1.0),
        "ranef with variances": lambda: str(made["m"].ranef(condvar=True)),
        "predict": lambda: str(made["m"].predict(interval="prediction").head()),
        "influence by Subject": lambda: str(made["m"].influence(by="Subject")),
        "second formula": fit("m1", "Reaction ~ Days + (1 | Subject)", "sleepstudy"),
        "compare, chi-square": lambda: str(mj.compare(made["m1"], made["m"], refit=False)),
        "cake": fit("c1", "angle ~ recipe * temperature + (1 | recipe:replicate)", "cake"),
        "cake, anova, Kenward-Roger": lambda: str(made["c1"].anova(ddf="kenward-roger")),
        "cake, emmeans": lambda: str(made["c1"].emmeans("recipe")),
        "Penicillin": fit("p1", "diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin"),
        "Penicillin, confint": lambda: str(made["p1"].confint()),
        "Machines": fit("k1", "score ~ Machine + (Machine | Worker)", "Machines"),
        "Machines, Kenward-Roger": lambda: str(made["k1"].summary("kenward-roger")),
        "compare, bootstrap of 1 000": lambda: str(
            mj.compare(made["m1"], made["m"], refit=False, method="bootstrap", n=1_000, key=1)
        ),
        "bootstrap of 1 000, intervals": lambda: str(made["m"].bootstrap(key=1, n=1_000).confint(kind="bca")),
    }


def child() -> None:
    """All steps, one after the other; prints their times and the number of programs that each compiled."""
    begin = time.perf_counter()
    import jax

    import mixjax as mj

    programs = [0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: programs.__setitem__(0, programs[0] + ("backend_compile" in event))
    )
    found = {"import": (time.perf_counter() - begin, None, 0)}
    import warnings

    warnings.simplefilter("ignore")
    for name, step in steps(mj).items():
        programs[0], start = 0, time.perf_counter()
        step()
        first, compiled = time.perf_counter() - start, programs[0]
        again = []
        for _ in range(3 if first > 0.5 else 10):
            start = time.perf_counter()
            step()
            again.append(time.perf_counter() - start)
        found[name] = (first, min(again), compiled)
    print("\n" + json.dumps(found))


R_SCRIPT = """
suppressPackageStartupMessages({library(lme4); library(lmerTest); library(pbkrtest); library(emmeans)})
data(Machines, package = "nlme")
Machines <- as.data.frame(Machines)
Machines$Worker <- factor(Machines$Worker, ordered = FALSE)
times <- list()
step <- function(name, expression) {
  t <- system.time(capture.output(suppressMessages(suppressWarnings(eval(expression, globalenv())))))[["elapsed"]]
  times[[name]] <<- t
}
%s
entries <- paste(sprintf('"%%s": %%f', names(times), unlist(times)), collapse = ", ")
cat("\\n", paste0("{", entries, "}"), "\\n", sep = "")
"""


def in_r() -> dict[str, float] | None:
    """Seconds of every step in R, or None where there is no R with the packages."""
    lines = [f"step({json.dumps(name)}, expression({{{code}}}))" for name, code in R_STEPS.items() if code]
    with tempfile.NamedTemporaryFile("w", suffix=".R") as script:
        script.write(R_SCRIPT % "\n".join(lines))
        script.flush()
        try:
            done = subprocess.run(["Rscript", script.name], capture_output=True, text=True, timeout=1_200)
        except FileNotFoundError:
            return None
    if done.returncode:
        print(done.stderr[-2_000:])
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def from_start(command: list[str], env: dict[str, str]) -> float:
    """Seconds of a process, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        if subprocess.run(command, capture_output=True, env=env).returncode:
            return float("nan")
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory() as bytecode:
        run(bytecode)


def run(bytecode: str) -> None:
    # Modules are compiled to bytecode when a package is installed; where that is switched off they would be now.
    without = ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in without}
    env["PYTHONPYCACHEPREFIX"] = bytecode
    subprocess.run([sys.executable, __file__, "--child"], capture_output=True, env=env)
    done = subprocess.run([sys.executable, __file__, "--child"], capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(done.stderr[-3_000:])
    ours, r = json.loads(done.stdout.strip().splitlines()[-1]), in_r()
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("mixjax", "jax", "numpy"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{date.today()}, {machine}, {packages}\n")
    print("| step | first, s | again, ms | compiled | R, s |\n|---|---|---|---|---|")
    for name, (first, again, compiled) in ours.items():
        beside = "" if r is None or name not in r else f"{r[name]:.2f}"
        print(f"| {name} | {first:.3f} | {'' if again is None else f'{1e3 * again:.1f}'} | {compiled} | {beside} |")
    single = [name for name in R_STEPS if name not in MANY]
    print(f"\nsum of first calls without bootstraps: {sum(ours[n][0] for n in single):.2f} s", end="")
    print("" if r is None else f"; R {sum(r[n] for n in single):.2f} s")
    print(f"sum of first calls with them: {sum(ours[n][0] for n in R_STEPS):.2f} s", end="")
    print("" if r is None else f"; R {sum(r[n] for n in R_STEPS):.2f} s")
    command = [sys.executable, "-m", "mixjax", "fit", SLOPES, "sleepstudy", "--no-cache"]
    print(f"process start to printed summary: {from_start(command, env):.2f} s", end="")
    code = f"suppressPackageStartupMessages(library(lmerTest)); print(summary(lmer({SLOPES}, sleepstudy)))"
    print("" if r is None else f"; R {from_start(['Rscript', '-e', code], env):.2f} s")


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
