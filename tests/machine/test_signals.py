"""A signal is heard once, and obeyed at once the second time."""

import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from kd.machine import signals


@signals.handlers_restored()
def test_a_signal_is_noted_and_the_loop_goes_on(capsys):
    stop = signals.Stop().install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM and "saving" in capsys.readouterr().err
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM; go on with --resume") as caught:
        stop.raise_if_requested()
    assert caught.value.status == 143


def test_a_second_signal_stops_at_once():
    code = ("import os, signal; from kd.machine import signals; signals.Stop().install()\n"
            "for number in (signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), number)\n"
            "print('went on')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and "Press again to stop immediately" in done.stderr


@pytest.mark.parametrize("failing", [False, True])
def test_the_handlers_are_those_of_before_once_the_run_is_over(failing, request):
    # Python's own, as in a notebook. A shell starts what it puts into the background with SIGINT ignored.
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    stop = signals.Stop()

    @signals.handlers_restored()
    def run():
        stop.install()
        assert [signal.getsignal(number) for number in signals.SIGNALS] == [stop._received] * 2
        if failing:
            raise KeyError("a bug")

    with pytest.raises(KeyError) if failing else contextlib.nullcontext():
        run()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):      # Ctrl-C interrupts a notebook's next cell, as ever
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert stop.signal == 0


def test_a_run_in_another_thread_takes_no_signals():
    before = [signal.getsignal(number) for number in signals.SIGNALS]

    @signals.handlers_restored()
    def run() -> int:
        return signals.Stop().install().signal

    with concurrent.futures.ThreadPoolExecutor() as threads:
        assert threads.submit(run).result() == 0
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
