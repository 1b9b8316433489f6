"""A step, a weight or a statistic that is not finite ends the run, by name, before anything is saved."""

import pytest
import torch
from torch import nn

from kd import TrainingFault
from kd.machine.health import READ_EVERY, Guard
from tests.helpers.fake_cuda import CUDA, fake_cuda

INF, NAN = float("inf"), float("nan")


def guard(amp: torch.dtype | None = None, model: nn.Module | None = None) -> Guard:
    return Guard("student", model or nn.Linear(2, 2), torch.device("cpu"), amp)


def note(watching: Guard, norms: list[float], start: int = 0, loss: float = 1) -> Guard:
    for step, norm in enumerate(norms, start):
        watching.note(step, *torch.tensor([loss, norm]))
    return watching


@pytest.mark.parametrize("loss, norm", [(NAN, 1), (INF, 1), (1, NAN), (1, INF)])
def test_the_first_step_that_is_not_finite_is_named(loss, norm):
    watching = note(guard(), [1, 2])
    watching.check()
    for call in (lambda: note(watching, [norm], 2, loss), watching.check):  # at that step, and at the next check
        with pytest.raises(TrainingFault, match="student: the loss or its gradient is not finite at step 2;"):
            call()


def test_under_fp16_only_twenty_bad_steps_in_a_row_stop_the_run():
    watching = note(guard(torch.float16), ([INF] * 19 + [1]) * 3)
    watching.check()
    assert watching.skipped == 57
    with pytest.raises(TrainingFault, match="20 steps in a row"):
        note(guard(torch.float16), [1] + [INF] * 20)


def test_weights_and_statistics_that_are_not_finite_are_named_even_where_the_step_was_skipped():
    norm = nn.BatchNorm2d(4)
    watching = note(guard(torch.float16, nn.Sequential(nn.Conv2d(3, 4, 1), norm)), [1, INF, 1])
    watching.check()
    assert watching.skipped == 1 and norm.running_var is not None   # and the run goes on
    norm.running_var[2] = NAN
    with pytest.raises(TrainingFault, match="student: 1.running_var is not finite"):
        watching.check()


def test_on_a_gpu_a_step_is_noted_by_one_launch_and_read_after_twenty(monkeypatch):
    with fake_cuda(monkeypatch) as log:
        watching = Guard("student", nn.Linear(2, 2), CUDA, None)
        value = torch.zeros((), device=CUDA)
        log.operators.clear()
        for step in range(READ_EVERY - 1):
            watching.note(step, value, value)
        launches = [name for name in log.operators if name not in ("aten.select.int", "prim.device.default")]
        assert launches == ["aten.stack.out"] * (READ_EVERY - 1) and log.reads == log.blocking == 0


def test_a_step_that_is_read_later_is_named_by_its_own_number(monkeypatch):
    """As on a GPU, where READ_EVERY steps are read at once."""
    watching = guard()
    with monkeypatch.context() as patch:
        patch.setattr(watching, "_check_steps", lambda: None)
        note(watching, [1, 1, INF, 1], start=100)
    with pytest.raises(TrainingFault, match="not finite at step 102;"):
        watching.check()
