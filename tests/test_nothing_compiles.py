"""What one fit and the inference on it do without XLA compiling a program.

To add a call, add a row to :data:`CALLS`; it runs for all models that it is not excluded from.
"""

import contextlib
import warnings
from functools import cache

import jax
import numpy as np
import pytest

import mixjax as mj
from mixjax.inference.random.exact_lrt import exact_lrt, exact_rlrt

# Name -> formula, data set, a factor of the fixed effects, and a smaller model of the random effects.
MODELS = {
    "slopes": ("Reaction ~ Days + (Days | Subject)", "sleepstudy", None, "Reaction ~ Days + (1 | Subject)"),
    "no correlation": ("Reaction ~ Days + (Days || Subject)", "sleepstudy", None, "Reaction ~ Days + (1 | Subject)"),
    "diag": ("Reaction ~ Days + diag(Days | Subject)", "sleepstudy", None, "Reaction ~ Days + (1 | Subject)"),
    "homcs": ("score ~ Machine + homcs(Machine | Worker)", "Machines", "Machine", "score ~ Machine + (1 | Worker)"),
    "q = 3": ("score ~ Machine + (Machine | Worker)", "Machines", "Machine", "score ~ Machine + (1 | Worker)"),
    "18 columns": ("angle ~ recipe * temperature + (1 | recipe:replicate)", "cake", "recipe", None),
    "crossed": ("diameter ~ 1 + (1 | plate) + (1 | sample)", "Penicillin", None, "diameter ~ 1 + (1 | plate)"),
    "nested": ("strength ~ 1 + (1 | batch/cask)", "Pastes", None, "strength ~ 1 + (1 | batch)"),
    "singular": ("Yield ~ 1 + (1 | Batch)", "Dyestuff2", None, None),
}


@contextlib.contextmanager
def compiled():
    """A list that grows by a name for every program that XLA compiles, or would without its cache on disk."""
    names: list[str] = []

    def note(name, *_, **__):
        names.extend([name] * ("backend_compile" in name))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@cache
def fit_of(model, reml=True):
    formula, data, _, _ = MODELS[model]
    return mj.lmm(formula, mj.datasets.load(data), reml=reml)


def everything(fit):
    return np.eye(len(fit.fixef))


def alone(model):
    """The same data with one random effect."""
    formula, data, _, smaller = MODELS[model]
    return mj.lmm(smaller or formula, mj.datasets.load(data))


def robust(model):
    found = fit_of(model).robust()
    return found.to_frame(), found.test(everything(fit_of(model)), joint=True), found.confint()


def means(model, **options):
    found = fit_of(model).emmeans(MODELS[model][2], **options)
    return found.to_frame(), found.contrasts()


def compared(model, method):
    return mj.compare(alone(model), fit_of(model), method=method)


HAVE_FACTOR = {model for model, (_, _, factor, _) in MODELS.items() if factor}
HAVE_SMALLER = {model for model, (*_, smaller) in MODELS.items() if smaller}
HAVE_SLOPE = {model for model, (formula, *_) in MODELS.items() if "Days" in formula}
DDF = ("satterthwaite", "kenward-roger", "wald")

# Name -> call of a model's name, and the models that it is for.
CALLS = {
    "lmm": (lambda m: mj.lmm(MODELS[m][0], mj.datasets.load(MODELS[m][1])), MODELS),
    **{f"summary, {ddf}": (lambda m, ddf=ddf: str(fit_of(m).summary(ddf)), MODELS) for ddf in DDF},
    **{f"tidy, {ddf}": (lambda m, ddf=ddf: fit_of(m).tidy(ddf), MODELS) for ddf in DDF},
    **{f"test, {ddf}": (lambda m, ddf=ddf: fit_of(m).test(everything(fit_of(m)), ddf), MODELS) for ddf in DDF},
    **{f"t tests, {ddf}": (lambda m, ddf=ddf: fit_of(m).test("Intercept", ddf), MODELS) for ddf in DDF},
    **{
        f"anova {kind}, {ddf}": (lambda m, kind=kind, ddf=ddf: fit_of(m).anova(kind, ddf), MODELS)
        for kind in ("I", "II", "III")
        for ddf in DDF
    },
    **{
        f"confint by Wald, {ddf}": (lambda m, ddf=ddf: fit_of(m).confint(method="wald", ddf=ddf), MODELS) for ddf in DDF
    },
    "ML: summary, Kenward-Roger": (lambda m: str(fit_of(m, False).summary("kenward-roger")), MODELS),
    "ML: confint": (lambda m: fit_of(m, False).confint(method="wald", ddf="satterthwaite"), MODELS),
    "mj.wald": (lambda m: mj.wald(fit_of(m).estimates, fit_of(m).stats, everything(fit_of(m))), MODELS),
    "mj.satterthwaite": (
        lambda m: mj.satterthwaite(fit_of(m).estimates, fit_of(m).stats, everything(fit_of(m))),
        MODELS,
    ),
    "mj.kenward_roger": (
        lambda m: mj.kenward_roger(fit_of(m).estimates, fit_of(m).stats, everything(fit_of(m))),
        MODELS,
    ),
    **{f"emmeans, {ddf}": (lambda m, ddf=ddf: means(m, ddf=ddf), HAVE_FACTOR) for ddf in DDF},
    "emtrends": (lambda m: fit_of(m).emtrends("1", "Days").to_frame(), HAVE_SLOPE),
    "robust": (robust, set(MODELS) - {"crossed"}),
    "icc, r2": (lambda m: (fit_of(m).icc(), fit_of(m).icc(by_group=True), fit_of(m).r2()), MODELS),
    "compare": (lambda m: compared(m, "chi2"), HAVE_SMALLER),
    "compare, mixture": (lambda m: compared(m, "mixture"), HAVE_SMALLER),
    "exact_rlrt": (lambda m: exact_rlrt(alone(m), n=100), MODELS),
    "exact_lrt": (lambda m: exact_lrt(alone(m), n=100), MODELS),
}


@pytest.mark.parametrize("model", MODELS)
def test_inference_on_one_fit_compiles_nothing(model):
    jax.clear_caches()  # what an earlier test compiled would be compiled here
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (call, models) in CALLS.items():
            if model in models:
                with compiled() as names:
                    call(model)
                found[name] = len(names)
    assert not {name: count for name, count in found.items() if count}


def test_compiling_is_noticed():
    """Also where the program comes from JAX's cache on disk."""
    counts = []
    for _ in range(2):
        jax.clear_caches()
        with compiled() as names:
            jax.jit(lambda x: 3.0 * x + 1.0)(np.ones(3))
        counts.append(len(names))
    assert counts == [1, 1]
    with compiled() as names:
        np.linalg.inv(np.eye(3))
    assert not names
