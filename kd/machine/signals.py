"""Ctrl-C and SIGTERM: the run finishes its step, saves, and leaves."""

import os
import signal
import sys
from typing import Any


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
        """Take over both signals for the rest of the process (possible only in the main thread). Returns itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
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
