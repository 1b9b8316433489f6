"""A signal is heard once, and Ctrl-C is obeyed at once the second time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kd.machine.signals import SIGNALS, Stop, Stopped


@pytest.fixture
def before():
    """The handlers of before: Python's own, as in a notebook. A background job of a shell has SIGINT ignored."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGINT, found)


def test_a_signal_is_noted_and_the_handlers_of_before_come_back(before, capsys):
    stop = Stop()
    stop.install()
    for number in (signal.SIGTERM, signal.SIGTERM):     # a scheduler may send it to every process, and torchrun again
        os.kill(os.getpid(), number)
    assert stop.signal == signal.SIGTERM and capsys.readouterr().err.count("finishing this step and saving") == 1
    with pytest.raises(Stopped, match="stopped by SIGTERM; go on with --resume") as caught:
        stop.raise_if_requested()
    assert caught.value.status == 143
    stop.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):              # Ctrl-C interrupts a notebook's next cell, as ever
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_later_ctrl_c_stops_at_once(first):
    code = ("import os, signal; from kd.machine import signals; signals.Stop().install()\n"
            f"for number in (signal.{first}, signal.SIGINT): os.kill(os.getpid(), number)\n"
            "print('went on')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and "Ctrl-C from now on stops immediately" in done.stderr
