"""Keep compiled programs between processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax


def enable_compilation_cache(path: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs on disk, so that a later process starts in a fraction of a second.

    Changes JAX's global configuration (``jax_compilation_cache_dir`` and its thresholds) for this process; mixjax
    never does so unasked, except in its command line.

    Args:
        path: folder; by default ``$MIXJAX_CACHE_DIR``, else ``mixjax`` under the user's cache directory.

    Returns:
        the folder.
    """
    folder = Path(path or os.environ.get("MIXJAX_CACHE_DIR") or _user_cache() / "mixjax")
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
