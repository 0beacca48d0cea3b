"""Ctrl-C that falls into a finaliser: Python drops what is raised there, so it is made to come again."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable

RERAISE_DELAY_S = 0.05  # seconds until then


def _do_nothing() -> None:
    pass


def reraise_dropped_interrupts(before: Callable[[], None] = _do_nothing) -> None:
    """Have a dropped KeyboardInterrupt raised anew in the main thread, after `before`, without a traceback."""

    def dropped(told: sys.UnraisableHookArgs) -> None:
        if not issubclass(told.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(told)
            return
        before()
        again = threading.Timer(RERAISE_DELAY_S, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = dropped
