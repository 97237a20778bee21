"""The plan of the house: import direction, laziness, public names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixjax as mj

PACKAGE = Path(mj.__file__).parent

# From the ground up: a room may import only what is listed above it (docs/architecture.md).
ROOMS = [
    "mixjax.forks", "mixjax.checks", "mixjax.waiting", "mixjax.distributions", "mixjax.numerals", "mixjax.markup",
    "mixjax.tables", "mixjax.datasets",
    "mixjax.machine", "mixjax.families", "mixjax.linalg", "mixjax.decompositions",
    "mixjax.covariance", "mixjax.kernels", "mixjax.residual", "mixjax.relationship", "mixjax.design",
    "mixjax.bases", "mixjax.optimise",
    "mixjax.products", "mixjax.engine", "mixjax.formula", "mixjax.estimation", "mixjax.simulation",
    "mixjax.minibatches",
    "mixjax.fitted", "mixjax.resampling", "mixjax.inference.fixed", "mixjax.inference.random", "mixjax.inference",
    "mixjax.populations", "mixjax.prediction", "mixjax.diagnostics", "mixjax.sampling", "mixjax.studies",
    "mixjax.plots", "mixjax.lineups", "mixjax.streams", "mixjax.face", "mixjax.sklearn",
    "mixjax.cache", "mixjax.versions", "mixjax.cli", "mixjax.__main__",
]  # fmt: skip
# What rooms above ask of the engine, of the sums over rows and of the fits, and nothing else there.
ASKED = {
    "mixjax.engine": {
        "Engine", "AtOnce", "engine_of", "Lanes", "Equations", "EffectRows", "factors_in_bases",
        "Visits", "Place",
        "covariances_with_slopes", "conditional_covariances", "coordinates_in", "is_regular", "solve_where",
        "ResidualEngine", "KernelEngine", "Slopes",
        "FixedParts", "Integrated", "integrated", "in_bases", "warn_of_float32", "LevelProducts", "level_products",
        "split", "integrate_fixed", "family_loglik", "ResidualRows", "VisitSums",
        "FamilyTarget", "NODES", "PAIRS", "density_of_rows", "effects_at", "has_quadrature", "left_out",
        "log_densities_by_level",
    },
    "mixjax.products": {
        "CrossProducts", "Layout", "check_products", "pad", "stack", "cross_products", "Rows", "rows_of", "Responses",
        "ClusterProducts", "by_cluster", "Accumulator", "Dependent", "has_closed_form",
        "in_lanes_held", "is_small_held", "most_dense_held", "FamilyRows", "places_of", "rows_in", "VisitRows",
        "visit_rows", "MOST_DENSE_DRAWS", "MOST_DENSE_LANES", "sizes_of",
    },
    "mixjax.estimation": {
        "Estimates", "fit", "estimate_with", "estimate_many", "newton_steps", "KEEP", "EngineName", "check_engine",
        "fit_one", "check_likelihood", "LaplaceCheck", "laplace_check", "fit_each",
        "Plain", "fit_plain", "HeldSearch", "HeldQuadrature", "ConditionalFit", "Parameter", "unconditional",
        "cluster_scores",
        "chosen_engine", "has_lanes", "over_lanes", "Batch", "batch_axes", "one_lane", "own_factors",
        "GLMMEstimates", "glmm_estimate_many", "conditional_covariances", "mode_slopes",
        "fits_without", "predictors_at_modes",
        "RepeatedEstimates", "fit_repeated", "fit_repeated_many", "visits_of", "visits_in_parts",
        "fit_residual", "residual_engine", "start_at", "transformed_rows", "transform_of", "correlation_of",
        "fit_kernels", "fit_at", "kernel_engine", "KernelFit", "design_at", "AT_BOUND", "NEAR_ZERO",
    },
}  # fmt: skip
CORE = (
    "mixjax.forks",
    "mixjax.linalg",
    "mixjax.decompositions",
    "mixjax.design",
    "mixjax.machine",
    "mixjax.optimise",
    "mixjax.covariance",
    "mixjax.residual",
    "mixjax.kernels",
    "mixjax.families",
    "mixjax.products",
    "mixjax.engine",
    "mixjax.estimation",
    "mixjax.simulation",
)
OUTSIDE_THE_CORE = ("pandas", "formulaic", "matplotlib", "mixjax.formula", "mixjax.face", "mixjax.datasets")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["mixjax", *path.relative_to(PACKAGE).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def room_of(module):
    matching = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(matching, key=len) if matching else None


def imports_of(path):
    """Every import, also those inside functions: laziness must not hide a circle."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_module_does_not_hide_the_function_of_its_name():
    """Whichever module is imported first, ``mj.lmm`` is the function."""
    assert {module.split(".")[1] for module, _ in modules() if module.count(".") == 1} & set(mj.__all__) == {
        "datasets",
        "families",
    }


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_downwards(module, path):
    if module == "mixjax":
        return
    own = room_of(module)
    assert own is not None, f"{module} belongs to no room: add it to ROOMS in its place"
    for imported in imports_of(path):
        room = room_of(imported)
        if room and room != own:
            assert ROOMS.index(room) < ROOMS.index(own), f"{module} imports {imported}, which lies above it"
        if module.startswith(CORE):
            assert not imported.startswith(OUTSIDE_THE_CORE), f"the core's {module} imports {imported}"


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda x: x if isinstance(x, str) else "")
def test_rooms_above_ask_the_engine(module, path):
    """Whoever stands above the fits knows no algorithm: what serves which model is decided below."""
    own = room_of(module)
    if module == "mixjax" or ROOMS.index(own) <= ROOMS.index("mixjax.estimation"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        room = room_of(node.module) if isinstance(node, ast.ImportFrom) else None
        if room in ASKED:
            assert {alias.name for alias in node.names} <= ASKED[room], f"{module} reaches below {room}"


def test_no_circles_between_modules():
    known = {module for module, _ in modules()}
    graph = {module: {i for i in imports_of(path) if i in known and i != module} for module, path in modules()
             if module != "mixjax" and path.name != "__init__.py"}  # fmt: skip
    state = {}

    def visit(node, trail):
        assert state.get(node) != "open", f"import circle: {' -> '.join([*trail, node])}"
        if node not in state:
            state[node] = "open"
            for other in graph.get(node, ()):
                visit(other, [*trail, node])
            state[node] = "done"

    for node in graph:
        visit(node, [])


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("touch", "absent"),
    [
        ("", ["jax", "numpy", "pandas", "formulaic", "optax", "scipy", "matplotlib"]),
        ("mj.estimate; mj.criterion; mj.marginal_loglik; mj.Design", ["pandas", "formulaic", "optax", "matplotlib"]),
        ("mj.rows; mj.glmm_estimate; mj.glmm_loglik", ["pandas", "formulaic", "optax", "matplotlib", "scipy.optimize"]),
        ("mj.lmm", ["optax", "matplotlib", "formulaic", "scipy.interpolate", "scipy.optimize", "scipy.stats"]),
        ("mj.glmm", ["optax", "matplotlib", "formulaic", "scipy.interpolate", "scipy.optimize", "scipy.stats"]),
        ("mj.datasets.NAMES", ["jax", "pandas"]),
    ],
)
def test_a_name_loads_only_what_it_needs(touch, absent):
    loaded = fresh(f"import sys, mixjax as mj; {touch}\nprint(*sys.modules)")
    assert not set(absent) & set(loaded)


def test_import_changes_no_setting_of_jax():
    code = "import jax; a = dict(jax.config.values); import mixjax as mj; mj.lmm, mj.estimate"
    assert fresh(f"{code}; print(a == jax.config.values)") == ["True"]


def test_public_names():
    assert {"lmm", "Design", "RandomTerm", "build_design", "cross_products", "criterion", "marginal_loglik",
            "MarginalParams", "estimate", "to_params", "from_params", "enable_compilation_cache", "datasets"} <= set(
        mj.__all__)  # fmt: skip
    for name in mj.__all__:
        assert getattr(mj, name) is not None
    assert set(mj.__all__) <= set(dir(mj))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mj.nothing  # noqa: B018


@pytest.mark.parametrize("name", [n for n in mj.__all__ if n not in ("datasets", "families", "__version__")])
def test_public_names_have_docstrings(name):
    assert len(getattr(mj, name).__doc__ or "") > 20


def test_public_names_stand_in_the_api_pages():
    pages = "\n".join(path.read_text() for path in (Path(__file__).parents[1] / "docs" / "api").glob("*.rst"))
    from mixjax import plots

    names = {f"mixjax.{name}" for name in mj.__all__ if name != "__version__"}
    names |= {f"mixjax.plots.{name}" for name in plots.__all__}
    assert not names - set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, flags=re.MULTILINE))


def test_a_fit_orthonormalises_its_fixed_effects_once(monkeypatch):
    """Two thirds of the time of a fit of many rows, where it was done three times."""
    import numpy as np

    from mixjax import bases
    from mixjax.formula import build

    seen, orthonormal = [], bases.orthonormal_columns

    def counted(X, sqrt_w):
        seen.append(X.shape)
        return orthonormal(X, sqrt_w)

    for module in (bases, build):
        monkeypatch.setattr(module, "orthonormal_columns", counted)
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=300) for name in ("y", "a", "b", "c", "w")} | {"g": np.repeat(np.arange(30), 10)}
    fit = mj.lmm("y ~ a + b + c + (1 | g)", data | {"w": np.exp(data["w"])}, weights="w")
    assert seen.count((300, 4)) == 1
    seen.clear()
    fit.refit(data["y"][::-1].copy())
    assert seen.count((300, 4)) == 1
    seen.clear()
    fit.refit_many(rng.normal(size=(5, 300)))
    fit.refit(data["y"])
    assert not seen  # the record keeps its rows
