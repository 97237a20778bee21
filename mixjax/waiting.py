"""One line for whoever waits: what takes long, and how far it is."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any

# Seconds after which one wonders.
AFTER = 2.0
VARIABLE = "MIXJAX_PROGRESS"
_chosen: bool | None = None
_outermost: Waiting | None = None


def show_progress(on: bool | None = None) -> None:
    """Say whether calls that take longer than two seconds tell what they are doing, in one line on standard error.

    Args:
        on: True always, False never, None (as at the start) where somebody can see it: in a terminal and in a notebook.
            The environment variable ``MIXJAX_PROGRESS=0`` or ``1`` says the same for a whole process.

    With tqdm installed (extra ``progress``) work that has an end to count to gets a bar.

    Example:
        >>> import mixjax as mj
        >>> mj.show_progress(False)
        >>> mj.show_progress()
    """
    global _chosen
    if on is not None and not isinstance(on, bool):
        raise ValueError(f"on must be True, False or None, got {on!r}")
    _chosen = on


def is_shown(own: bool | None = None) -> bool:
    """Whether a call shows its progress: as it was asked for itself, else as :func:`show_progress` says."""
    for choice in (own, _chosen, {"0": False, "1": True}.get(os.environ.get(VARIABLE, ""))):
        if choice is not None:
            return choice
    # Jupyter's own stream is no terminal.
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


class Waiting:
    """A scope that says what it does if it takes longer than two seconds; scopes inside it stay silent.

    Args:
        what: ``"refitting 100 000 data sets"``. total: units of work; None where that is not known.
        show: what the user asked for, True at once; None for :func:`show_progress`'s choice.
        unit: name of a unit of work, of which :meth:`update` tells; None where nothing tells.
    """

    def __init__(self, what: str, total: int | None = None, show: bool | None = None, unit: str | None = None):
        self._what, self._total, self._show, self._unit = what, total, show, unit
        self._bar: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Waiting:
        global _outermost
        if _outermost is not None or not is_shown(self._show):
            return self
        _outermost = self
        after = 0.0 if self._show else AFTER
        if self._unit is not None:
            try:
                from tqdm.auto import tqdm

                self._bar = tqdm(total=self._total, desc=self._what, unit=self._unit, unit_scale=True, delay=after)
                return self
            except ImportError:
                pass
        self._timer = threading.Timer(after, print, [f"mixjax: {self._what} ..."], {"file": sys.stderr, "flush": True})
        self._timer.daemon = True
        self._timer.start()
        return self

    def update(self, count: int) -> None:
        """So many units more are done."""
        if self._bar is not None:
            self._bar.update(count)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _outermost
        if _outermost is self:
            _outermost = None
        if self._timer is not None:
            self._timer.cancel()
        if self._bar is not None:
            self._bar.close()
