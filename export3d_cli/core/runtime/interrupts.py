"""Re-raise a KeyboardInterrupt that Python dropped because it occurred inside a finalizer (`__del__`)."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable

RERAISE_DELAY_S = 0.05


def reraise_dropped_interrupts(before: Callable[[], None] = lambda: None) -> None:
    """Install a hook that re-raises a dropped KeyboardInterrupt in the main thread, after calling `before`."""

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        before()
        timer = threading.Timer(RERAISE_DELAY_S, _interrupt_main_thread)
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook


def _interrupt_main_thread() -> None:
    ident = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and ident is not None:
        signal.pthread_kill(ident, signal.SIGINT)  # also ends a sleep or a wait
    else:
        _thread.interrupt_main()
