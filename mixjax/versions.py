"""What a report of an error has to say of the machine that it was seen on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import jax

from mixjax.machine import n_cores

# What pyproject.toml asks for, and the optional packages that a call may use.
NEEDED = ("jax", "jaxlib", "optax", "numpy", "pandas", "formulaic", "ml_dtypes", "scipy")
OPTIONAL = (
    "pyarrow", "polars", "dask", "distributed", "tqdm", "matplotlib", "blackjax", "arviz", "scikit-learn",
    "equinox", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
# The environment decides precision, platform and threads. Others may hold secrets, and are not read.
SETTINGS = (
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "MIXJAX_CACHE_DIR",
    "XLA_FLAGS",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def show_versions() -> None:
    """Print the versions of mixjax, Python and all packages that it uses, the devices of JAX, and settings that matter.

    For reports of errors: paste what it prints. Nothing of the data or of the user is in it, and of caches only whether
    they are on; ``XLA_FLAGS`` stands as it is set. Looking for devices starts JAX, as the first computation would.

    Example:
        >>> import mixjax as mj
        >>> mj.show_versions()  # doctest: +ELLIPSIS
        mixjax: ...
        Python: ...
    """
    for name, value in versions().items():
        print(f"{name}: {value}")


def versions() -> dict[str, str]:
    """The lines of :func:`show_versions`, name -> what is printed."""
    import mixjax  # its version is known once all of it is loaded

    found = {
        "mixjax": mixjax.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
    }
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}, {n_cores()} cores"
    for name in (*NEEDED, *OPTIONAL):
        found[name] = _version(name)
    found["devices"] = _devices()
    found["64 bits"] = "on" if jax.config.read("jax_enable_x64") else "off"  # JAX's default; fits by formula have them
    for name in SETTINGS:
        if name in os.environ:
            found[name] = "set" if name.endswith("_DIR") else os.environ[name]
    return found


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    """A broken driver is what a report may be about: then this says what JAX says."""
    try:
        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:
        return f"none ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    counted = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    return f"{jax.default_backend()}, {', '.join(counted)}"
