"""``mixjax trial``: the power of a trial with repeated measures and drop-out."""

from __future__ import annotations

import argparse
from typing import Any

import mixjax
from mixjax.cli.messages import keep_programs
from mixjax.cli.power import check_picture, save_picture

OK = 0
# Subjects are seen at so many visits at most.
MOST_VISITS = 20


def trial_command(arguments: argparse.Namespace) -> int:
    """Simulate, and print the table; returns the exit status."""
    import numpy as np
    import pandas as pd

    from mixjax.studies.power import power_curve

    effect = arguments.effect
    T = len(effect)
    _check(arguments, T)
    visits = [f"v{t + 1:02d}" if T > 9 else f"v{t + 1}" for t in range(T)]
    model = f"y ~ 0 + visit + visit:arm + {arguments.structure}(visit | subject)"
    kind, _, rho = arguments.cor.rpartition(":")

    def source(subjects: int) -> Any:
        who = pd.DataFrame({"subject": np.arange(subjects), "arm": np.where(np.arange(subjects) % 2, "b", "a")})
        table = who.merge(pd.DataFrame({"visit": visits}), how="cross")
        dropout = arguments.dropout[0] if len(arguments.dropout) == 1 else arguments.dropout
        sd = arguments.sd[0] if len(arguments.sd) == 1 else arguments.sd
        cor = ("ar1", float(rho)) if kind == "ar1" else float(rho)
        # How the fits' covariance is structured says nothing of the truth.
        return mixjax.trial(
            "y ~ 0 + visit + visit:arm + us(visit | subject)", table, [0.0] * T + effect, sd=sd, cor=cor,
            dropout=dropout, dropout_slope=arguments.dropout_slope,
        )  # fmt: skip

    keep_programs(arguments)
    found = power_curve(
        source, model, f"visit[{visits[-1]}]:arm[T.b]", {"subjects": arguments.subjects}, arguments.target,
        arguments.replicates, arguments.key, arguments.alpha, ddf=arguments.ddf or "satterthwaite",
    )  # fmt: skip
    print(f"difference of two arms at the last of {T} visits; mmrm with {arguments.structure}")
    print(found)
    if arguments.plot:
        save_picture(found, arguments.plot)
    return OK


def _check(arguments: argparse.Namespace, T: int) -> None:
    """Raise ValueError for what no argument says by itself: before hours of simulation."""
    if not 2 <= T <= MOST_VISITS:
        raise ValueError(f"--effect has a number for every visit, 2 to {MOST_VISITS} of them; got {T}")
    for name, wanted in (("sd", T), ("dropout", T - 1)):
        given = getattr(arguments, name)
        if len(given) not in (1, wanted):
            raise ValueError(f"--{name} has {len(given)} numbers; one, or {wanted}, are wanted for {T} visits")
    if max(arguments.dropout) >= 1:
        raise ValueError("--dropout: a probability below 1")
    if arguments.target is not None and arguments.target <= arguments.alpha:
        raise ValueError(f"--target {arguments.target:g} must be larger than --alpha {arguments.alpha:g}")
    check_picture(arguments.plot)
