"""Shared data and fits: every structure is compiled once and every model fitted once per session."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path

# Programs inside JAX's transformations cannot choose this themselves (mixjax/machine.py): half the time to compile. XLA
# ends a process that gives it a flag it does not know, as it does not know the first since jaxlib 0.11.2. Workers share
# the cores: threads of the compiler's own cost more than they bring.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * ([*map(int, version("jaxlib").split(".")[:3])] < [0, 11, 2]),
)
# LLVM at its least, as JAX's own tests have it: compiling is most of what a test costs, what is compiled is the same.
# tests/test_engines.py compiles as users do. JAX_DISABLE_MOST_OPTIMIZATIONS=0 has all tests do so.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Workers, the processes that they start and later runs share compiled programs: a program is found by what it computes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
os.environ.setdefault("MIXJAX_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pandas as pd
import pytest

import mixjax as mj

# What is traced is many small objects, and Python looks through all of them for circles, again and again: a tenth of
# the suite's CPU time. What has been imported stays.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

HERE = Path(__file__).parent
FLAGS = os.environ["XLA_FLAGS"]
# Pieces of a process's address space after which its programs are forgotten.
MOST_MAPS = 20_000
# Bytes of compiled programs that are kept for later runs.
MOST_PROGRAMS = 2**30
ORACLES = sorted(path.stem.removeprefix("lmm_") for path in (HERE / "oracle").glob("lmm_*.json"))


def pytest_configure(config):
    # Workers share the cores: threads of BLAS wait for each other by spinning, and where every worker has as many as
    # there are cores, small products take ten times the CPU time. Here, since a worker that gets so far as this file
    # may have loaded NumPy already: plugins of installed packages do.
    if workers := config.getoption("numprocesses", None):
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // workers)))
    own = HERE.parent / ".pytest_cache" / "programs"
    if "PYTEST_XDIST_WORKER" in os.environ or not own.exists():
        return
    if sum(path.stat().st_size for path in own.iterdir()) > MOST_PROGRAMS:
        shutil.rmtree(own)


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Every compiled program holds pieces of the address space, of which a process may have 65 530: a worker that ran
    half of the suite died while it compiled. Forgotten programs of shared structures come back from the cache."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@cache
def oracle(name: str) -> dict:
    return json.loads((HERE / "oracle" / f"lmm_{name}.json").read_text())


@cache
def table(name: str) -> pd.DataFrame:
    """A bundled data set, or one of the tests' own, factors with the levels of the oracle."""
    if name in mj.datasets.NAMES:
        return mj.datasets.load(name)
    levels = next(o["factor_levels"] for o in map(oracle, ORACLES) if o["data"] == name)
    frame = pd.read_csv(HERE / "data" / f"{name}.csv", dtype=dict.fromkeys(levels, str))
    for column, order in levels.items():
        frame[column] = pd.Categorical(frame[column], categories=order)
    return frame


@cache
def fit_of(name: str, method: str) -> mj.LMMFit:
    """mixjax's fit of an oracle model."""
    reference = oracle(name)
    return mj.lmm(reference["formula"], table(reference["data"]), reml=method == "REML", weights=reference["weights"])


def r_name(name: str) -> str:
    """formulaic's column name -> R's."""
    return name.replace("Intercept", "(Intercept)").replace("[T.", "").replace("]", "")


def processes_of(code: str, n: int = 1, **env: str) -> list[subprocess.Popen]:
    """n processes of Python that run the code in the tests' folder, each given its number."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    pipe = subprocess.PIPE
    return [subprocess.Popen([*command, str(i)], stdout=pipe, stderr=pipe, text=True, env=env) for i in range(n)]


def run_python(code: str, **env: str) -> str:
    """What the code prints in a process of its own."""
    (process,) = processes_of(code, **env)
    out, err = process.communicate()
    assert process.returncode == 0, err[-3_000:]
    return out


def over_loopback(code: str) -> list[str]:
    """What the code prints in two processes of two devices each, joined by ``jax.distributed``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = f"""
    import sys, jax
    jax.distributed.initialize("127.0.0.1:{port}", num_processes=2, process_id=int(sys.argv[1]))
    assert jax.process_count() == 2 and len(jax.devices()) == 4
    """
    flags = f"--xla_force_host_platform_device_count=2 {FLAGS}"
    printed = []
    for process in processes_of(textwrap.dedent(join) + textwrap.dedent(code), 2, XLA_FLAGS=flags):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3_000:]
        printed.append(out)
    return printed


# More structures of what one test of the kind shows already, most of them minutes of compiling derivatives. They are
# marked slow, like those that say so themselves.
SLOW = (
    "test_sklearn.py::test_the_checks_of_estimators[[]encoder of a column]",
    "test_residual.py::test_a_thousand_data_sets",
    "test_glmm_formulas_of_psi.py::test_profiles_are_conditional_minima[[]nbinom*",
    "test_sharding.py::test_eight_devices*",
    "test_engines.py::test_estimates_agree[[]two*",
    "test_engines.py::test_estimates_agree[[]nested*",
    "test_engines.py::test_batches_agree[[]classes]",
    "test_engines.py::test_batches_agree[[]stacked]",
    "test_crossed.py::test_estimates_equal_those_of_the_elimination",
    "test_crossed.py::test_against_automatic_differentiation[[]three effects*",
    "test_crossed.py::test_against_automatic_differentiation[[]slopes on both*",
    "test_crossed.py::test_against_automatic_differentiation[[]with a parent*",
    "test_glmm_curvature.py::test_closed_form[[]q=1, binomial-probit*",
    "test_glmm_curvature.py::test_closed_form[[]q=2, weights, gamma*",
    "test_glmm_curvature.py::test_closed_form[[]q=3*",
    "test_glmm_curvature.py::test_closed_form[[]diag*",
    "test_glmm_curvature.py::test_closed_form[[]homcs*",
    "test_glmm_curvature.py::test_closed_form[[]crossed, binomial*",
    "test_glmm_curvature.py::test_closed_form[[]crossed, slopes*",
    "test_glmm_through.py::test_against_refits[[]nested*",
    "test_glmm_through.py::test_against_refits[[]crossed*",
    "test_derivatives.py::test_reference_data_against_refits[[]singular*",
    "test_derivatives.py::test_random_designs_against_refits",
    "test_derivatives.py::test_against_refits[[]crossed*",
    "test_covariance.py::test_the_fit_against_the_dense_likelihood[[]small*",
    "test_covariance.py::test_the_fit_against_the_dense_likelihood[[]weights*",
    "test_covariance.py::test_unconstrained_parameters_know_the_structure[[]us]",
    "test_covariance.py::test_unconstrained_parameters_know_the_structure[[]diag]",
    "test_covariance.py::test_by_formula_by_chunks_and_by_optax[[]diag]",
    "test_covariance.py::test_singular_in_single_precision_too[[]diag]",
    "test_likelihood.py::test_third_derivatives_exist_and_are_right",
    "test_many.py::test_several_threads_of_three_effects_a_level",
    "test_many.py::test_responses_in_float32",
    "test_quadrature.py::test_derivatives_in_closed_form[[]1-family0*",
    "test_quadrature.py::test_two_effects_against_automatic_differentiation",
    "test_equations.py::test_case_slopes_are_those_of_automatic_differentiation[[]nested*",
    "test_log_posterior.py::test_gradients_against_differences_within_structures[[]diag]",
    "test_log_posterior.py::test_gradients_against_differences_within_structures[[]toep]",
    "test_log_posterior.py::test_gradients_against_differences_within_structures[[]cs]",
    "test_log_posterior.py::test_gradients_against_differences_within_structures[[]adh]",
    "test_log_posterior.py::test_normal_priors_against_the_dense_integral[[]False-nested*",
    "test_log_posterior.py::test_normal_priors_against_the_dense_integral[[]False-crossed]",
    "test_bayes.py::test_a_structure_is_sampled_inside_itself",
    "test_bayes_glmm.py::test_the_no_u_turn_sampler_on_ticks",
    "test_bayes_glmm.py::test_crossed_effects_against_a_grid",
    "test_bayes_glmm.py::test_quadrature_in_place_of_laplace",
    "test_bayes_glmm.py::test_effects_and_levels_of_one_factor_against_integrals",
    "test_bayes_glmm.py::test_the_density_is_likelihood_and_priors*",
    "test_bayes_glmm.py::test_random_effects",
    "test_bayes_glmm.py::test_predictions",
    "test_bayes_glmm.py::test_left_out",
    "test_bayes_glmm.py::test_two_effects_a_level",
    "test_bayes_glmm.py::test_levels_left_out_against_refits",
    "test_bayes_glmm.py::test_inference_data",
    "test_bayes_glmm.py::test_parameters_of_families",
    "test_bayes_glmm.py::test_priors_of_family_parameters*",
    "test_bayes_glmm.py::test_separated_fixed_effects_need_priors",
    "test_bayes_glmm.py::test_laplace_is_far_off_with_few_binary_rows",
    "test_bayes_residual.py::test_a_posterior_with_correlated_residuals",
    "test_bayes_residual.py::test_flat_priors_are_the_restricted_likelihood[[]cs*",
    "test_bayes_residual.py::test_flat_priors_are_the_restricted_likelihood[[]ar1 and*",
    "test_bayes_residual.py::test_repeated_measures_against_dense_integrals*ar1h*",
    "test_bayes.py::test_crossed_factors_by_importance_and_by_density",
    "test_contrasts.py::test_tests_in_lanes_are_those_by_automatic_differentiation[[]nested*",
    "test_known.py::test_heritability_is_differentiable",
    "test_engines.py::test_batches_agree[[]crossed]",
    "test_derivatives.py::test_against_refits[[]nested-regular]",
    "test_likelihood.py::test_gradient_of_marginal_loglik[[]one factor, q=4]",
    "test_likelihood.py::test_gradient_of_marginal_loglik[[]nested chain of three]",
    "test_likelihood.py::test_gradient_of_marginal_loglik[[]crossed, three factors, weights]",
    "test_cuda_lowering.py::test_cuda_lowering[[]estimate: nested-float32]",
    "test_cuda_lowering.py::test_cuda_lowering[[]estimate: crossed-float32]",
    "test_cuda_lowering.py::test_cuda_lowering[[]estimate of many responses, from their rows-float32]",
    "test_cuda_lowering.py::test_cuda_lowering[[]derivative through estimate-float32]",
)


# What versions of other packages can break, in some minutes: tables, formulas and pictures, both roads of a fit,
# batches, derivatives, posteriors, stores, scikit-learn, every example of a docstring.
VERSIONS = {
    f"test_{name}.py"
    for name in (
        "formula", "coding", "columns", "expressions", "datasets", "streams", "fit", "oracle", "estimate", "many",
        "optimise", "means", "hypotheses", "tables", "model_table", "plots", "glmm", "glmm_estimate", "mmrm", "bayes",
        "store", "sklearn", "contract", "structure", "docstrings", "versions", "release",
    )
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    used = set()
    for item in items:
        if item.path.name in VERSIONS:
            item.add_marker(pytest.mark.versions)
        name = item.nodeid.rpartition("tests/")[2] or item.nodeid
        found = [pattern for pattern in SLOW if fnmatchcase(name, pattern)]
        if found:
            item.add_marker(pytest.mark.slow)
            used.update(found)
    whole = {item.path.name for item in items} >= {path.name for path in HERE.glob("test_*.py")}
    if whole and (stale := set(SLOW) - used):
        raise pytest.UsageError(f"tests/conftest.py: SLOW has patterns that no test has: {', '.join(sorted(stale))}")
