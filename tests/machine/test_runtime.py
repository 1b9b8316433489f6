"""The small leaves: health, prefetch, runtime, report."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from kd import BadInput, TrainingFault
from kd.machine import console, health, runtime
from kd.machine.prefetch import prefetch

CPU = torch.device("cpu")


def run_steps(values: list[float], amp: torch.dtype | None = None) -> torch.Tensor:
    state = health.start(CPU)
    for step, value in enumerate(values):
        health.track(state, torch.tensor(1.0), torch.tensor(value), step, "student", amp)
    return state


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(bad):
    state = run_steps([1, 2])
    assert health.check(state, "student", None) == 0
    with pytest.raises(TrainingFault, match="student: .* at step 2;"):  # at that step, not at the next check
        health.track(state, torch.tensor(1.0), torch.tensor(bad), 2, "student", None)
    with pytest.raises(TrainingFault, match="student: .* at step 2;"):  # and at every later check
        health.check(state, "student", None)


def test_under_fp16_only_twenty_bad_steps_in_a_row_stop_the_run():
    health.check(run_steps(([float("inf")] * 19 + [1]) * 3, torch.float16), "student", torch.float16)
    with pytest.raises(TrainingFault, match="20 steps in a row"):
        run_steps([1] + [float("inf")] * 20 + [1], torch.float16)


def test_weights_and_statistics_that_are_not_finite_are_named_also_where_the_step_was_skipped():
    norm = torch.nn.BatchNorm2d(4)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), norm)
    state = run_steps([1, float("inf"), 1], torch.float16)
    assert health.check(state, "student", torch.float16, model) == 1  # skipped, and counted
    assert norm.running_var is not None
    norm.running_var[2] = float("nan")
    with pytest.raises(TrainingFault, match="student: 1.running_var is not finite"):
        health.check(run_steps([1]), "student", torch.float16, model)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta stands for a device that has a thread working ahead
def test_prefetch_keeps_the_order_and_passes_errors_on(device):
    def items():
        yield from range(5)
        raise KeyError("made too late")

    got = []
    with pytest.raises(KeyError, match="made too late"):
        for item in prefetch(items(), torch.device(device)):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]


def test_a_consumer_that_leaves_early_leaves_no_thread():
    def endless():
        while True:
            yield 0

    before = threading.active_count()
    made = prefetch(endless(), torch.device("meta"))
    assert next(made) == 0
    made.close()
    assert threading.active_count() == before


def test_prefetch_works_ahead_of_its_consumer():
    made = []

    def items():
        for i in range(3):
            made.append(i)
            yield i

    stream = prefetch(items(), torch.device("meta"))
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2]
    stream.close()


def test_a_device_or_precision_that_is_not_there_is_refused(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda"):
            runtime.start("cuda", "auto", "auto")
    with pytest.raises(BadInput, match="--amp fp16"):
        runtime.start("cpu", "fp16", "auto")
    for fast, amp in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert runtime.start("cpu", "auto", "auto")[1:3] == (amp, False)
    assert runtime.start("cpu", "bf16", "on")[1:3] == (torch.bfloat16, True)


def test_a_signal_is_noted_and_the_loop_goes_on(capsys):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = runtime.Stop()
    try:
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM and "saving" in capsys.readouterr().err
        assert runtime.Stopped(stop.signal).status == 143
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_second_signal_stops_at_once():
    code = ("import os, signal; from kd import runtime; runtime.Stop().install()\n"
            "for number in (signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), number)\n"
            "print('went on')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == "" and "once more stops at once" in done.stderr


def test_metrics_are_one_object_an_epoch(tmp_path):
    records = console.Records(tmp_path)
    history = [{"role": "student", "epoch": 1, "time": 1.0, "accuracy": 0.5}]
    records.write(history)
    history.append({"role": "student", "epoch": 2, "time": 2.0, "accuracy": 0.75})
    records.write(history)
    history.append({"role": "student", "epoch": 3, "time": 3.0, "accuracy": 0.25})
    console.Records(tmp_path).write(history)  # another process goes on
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("student/accuracy")] == [
        (1, 0.5), (2, 0.75), (3, 0.25)]


def test_the_table_states_counts_and_the_gain():
    row = {"model": "m", "test_accuracy": 0.75, "test_correct": 96, "test_total": 128, "test_macro_f1": 0.7,
           "params": 1234567}
    text = console.table({"teacher": row, "control": {**row, "test_accuracy": 93 / 128, "test_correct": 93},
                         "student": row})
    assert "75.0 %  (96/128)     0.700   1,234,567" in text
    assert text.endswith("the teacher's gift: +2.3 points (+3 images of 128)")
