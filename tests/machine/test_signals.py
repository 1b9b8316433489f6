"""A signal is heard once, and obeyed at once the second time."""

import os
import signal
import subprocess
import sys

import pytest

from kd.machine import signals


def test_a_signal_is_noted_and_the_loop_goes_on(capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = signals.Stop()
    try:
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and "saving" in capsys.readouterr().err
        with pytest.raises(signals.Stopped, match="stopped by SIGTERM; go on with --resume") as caught:
            stop.raise_if_requested()
        assert caught.value.status == 143
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_second_signal_stops_at_once():
    code = ("import os, signal; from kd.machine import signals; signals.Stop().install()\n"
            "for number in (signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), number)\n"
            "print('went on')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and "Press again to stop immediately" in done.stderr
