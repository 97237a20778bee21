"""Processes forked from one where XLA ran: its threads are not there, and every computation would wait for them.

Loaded with the package itself, and so without JAX: the fork may come before anything else of it is.
"""

from __future__ import annotations

import os
import sys

_forked = False
# Whether mixjax came near XLA in this process. JAX also knows of other code that did, but says so in private only.
_used = False


def refuse_forked() -> None:
    """Raise RuntimeError in a process that was forked from one where XLA ran. For all that is about to use XLA."""
    global _used
    if _forked:
        raise RuntimeError(
            "this process was forked from one that had used JAX, whose threads do not survive a fork, and would wait "
            "for them forever: start workers by multiprocessing.get_context('spawn') or 'forkserver', or fork before "
            "anything is computed (docs/troubleshooting.md)"
        )
    _used = True


def _after_fork() -> None:
    global _forked
    started = getattr(sys.modules.get("jax._src.xla_bridge"), "backends_are_initialized", None)
    _forked = _forked or (_used if started is None else started())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
