"""Ctrl-C and SIGTERM: the run finishes its step, saves, and leaves."""

import os
import signal
import sys
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved. `.status` is the process's exit status (130 or 143)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.status = 128 + number


class Stop:
    """Notes the first of SIGNALS that comes. The loop asks for it between two steps.

    It does so from `install` to `restore`. A later Ctrl-C ends the process immediately.
    """

    def __init__(self) -> None:
        self.signal = 0                         # the number of the signal that came
        self._before: dict[int, Any] = {}       # the handlers that `restore` puts back

    def install(self) -> None:
        """Take over the signals.

        Python lets only the main thread do so. In another one, as in a web app, the run goes on without.
        """
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in SIGNALS}

    def restore(self) -> None:
        """Put the handlers back, as a notebook needs that goes on."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)    # None: C code's own, which Python cannot set
        self._before = {}

    def raise_if_requested(self, *_: Any) -> None:
        """Raise Stopped if a signal came to this process. For work without anything to save, such as decoding.

        It does not ask the other ranks and saves nothing; `Run.stop_if_requested` does both.
        """
        if self.signal:
            raise Stopped(self.signal)

    def _received(self, number: int, frame: Any) -> None:
        if not self.signal:
            self.signal = number
            print(f"\n{signal.Signals(number).name}: finishing this step and saving. Ctrl-C from now on stops "
                  f"immediately, without saving.", file=sys.stderr, flush=True)
        elif number == signal.SIGINT:
            os._exit(128 + number)              # the user insists: no saving, no clean-up
