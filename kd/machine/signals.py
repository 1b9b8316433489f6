"""Ctrl-C and SIGTERM: the run finishes its step, saves, and leaves."""

import contextlib
import os
import signal
import sys
import threading
from typing import Any, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to stop, and has saved. `.status` is the process's exit status (130 or 143)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.status = 128 + number


class Stop:
    """Notes SIGTERM and SIGINT. The loop asks between two steps. A second signal ends the process immediately."""

    def __init__(self) -> None:
        self.signal = 0  # the number of the signal that came

    def install(self) -> "Stop":
        """Take over both signals until `handlers_restored` ends. Returns itself.

        Python lets only the main thread do so. In another one, as in a web app, the run goes on without.
        """
        if _in_main_thread():
            for number in SIGNALS:
                signal.signal(number, self._received)
        return self

    def raise_if_requested(self, *_: Any) -> None:
        """Raise Stopped if a signal came to this process. For work without anything to save, such as decoding.

        It does not ask the other ranks and saves nothing; `Run.stop_if_requested` does both.
        """
        if self.signal:
            raise Stopped(self.signal)

    def _received(self, number: int, frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)  # the user insists: no saving, no clean-up
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step and saving. Press again to stop immediately "
              "without saving.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Put the handlers of both signals back at the end, as a notebook needs that goes on. Also a decorator."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if _in_main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)    # None: C code's own, which Python cannot set


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
