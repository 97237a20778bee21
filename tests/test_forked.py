"""A forked child of a process that has used JAX gets an error instead of waiting for threads that are not there."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# Every call in the child ends as expected, or the child is killed and the name of the call is what it printed last.
CHILD = """
    import os, time, warnings
    import numpy as np
    import mixjax as mj

    def in_child(calls, seconds=60):
        warnings.simplefilter("ignore")  # JAX and Python warn of forks
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for name, call in calls.items():
                    print(name, end=" ", flush=True)
                    try:
                        call()
                        print("done", flush=True)
                    except RuntimeError as error:
                        print("refused" if "'spawn'" in str(error) else error, flush=True)
                status = 0
            finally:
                os._exit(status)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return
            time.sleep(0.05)
        os.kill(child, 9)
        os.waitpid(child, 0)
        print("hangs", flush=True)

    data = mj.datasets.load("sleepstudy")
    formula = "Reaction ~ Days + (Days | Subject)"
    design, labels = mj.build_design(formula, data)
    stats = mj.cross_products(design)
"""


def outcomes(code):
    """Call -> how it ended in the child: done, refused, hangs."""
    program = textwrap.dedent(CHILD) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


CALLS = """
    fit = mj.lmm(formula, data)
    params = mj.MarginalParams(np.zeros(2), np.array(0.0), (np.zeros(3),))
    trial = mj.scenario(formula, data, beta=[250, 5], sd=[25, 6], sigma=25)
    by_numpy = {
        "lmm": lambda: mj.lmm(formula, data),
        "Lambda": lambda: fit.Lambda,
        "ranef": lambda: fit.ranef(condvar=True),
        "confint": lambda: fit.confint(),
        "test": lambda: fit.summary("satterthwaite"),
        "influence": lambda: fit.influence("Subject"),
        "refit_many": lambda: fit.refit_many(np.tile(fit.design.y, (3, 1))),
        "estimate_many": lambda: mj.estimate_many(mj.cross_products(design, design.y[None])),
    }
    by_jax = {
        "compiled": lambda: mj.estimate_many(mj.cross_products(design, design.y[None]), engine="jax"),
        "simulate": lambda: fit.simulate(1, 3),
        "estimate": lambda: mj.estimate(stats),
        "criterion": lambda: mj.criterion(np.ones(3), stats),
        "marginal_loglik": lambda: mj.marginal_loglik(params, stats),
        "from_params": lambda: mj.from_params(params),
        "study": lambda: mj.study(trial, formula, replicates=1, progress=False),
        "power": lambda: mj.power(trial, formula, "Days", replicates=1, progress=False),
    }
"""


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("mj.estimate(stats)", id="fit"),
        pytest.param("fit.simulate(1, 3)", id="draws", marks=pytest.mark.slow),
        pytest.param("import jax; jax.numpy.ones(3)", id="own"),
    ],
)
def test_what_needs_jax_is_refused_after_jax_was_used(before):
    """Whoever used it; what NumPy does needs no threads of XLA's."""
    found = outcomes(textwrap.dedent(CALLS) + before + "\nin_child({**by_numpy, **by_jax})")
    assert len(found) == 16
    numpys = {"lmm", "Lambda", "ranef", "confint", "test", "influence", "refit_many", "estimate_many"}
    assert found == {name: "done" if name in numpys else "refused" for name in found}


def test_after_fits_by_numpy_a_child_may_do_everything():
    found = outcomes(textwrap.dedent(CALLS) + "in_child({**by_numpy, **by_jax}, 200)")
    assert len(found) == 16
    assert set(found.values()) == {"done"}, found


def test_a_child_forked_before_anything_is_computed_may_compute():
    assert outcomes("in_child({'lmm': lambda: mj.lmm(formula, data)})") == {"lmm": "done"}


def test_a_spawned_worker_of_a_process_that_has_used_jax_may_compute():
    import concurrent.futures
    import multiprocessing

    fit_here()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(fit_here).result(timeout=120) == pytest.approx(1743.6283, abs=1e-3)


def fit_here():
    import mixjax as mj

    return mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy")).criterion
