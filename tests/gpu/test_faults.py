"""On a GPU too, a step that is not finite is named, and a stopped run goes on to the same end."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from kd import TrainingFault
from kd.machine import checkpoint, runtime
from kd.machine.health import READ_EVERY, Guard
from tests.gpu import DEVICE
from tests.gpu.watch import around_steps
from tests.helpers.runs import identical, stop_at_step

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("where", ["loss", "norm"])
def test_a_step_that_is_not_finite_is_named_within_some_steps(where):
    guard = Guard("student", nn.Linear(2, 2).to(DEVICE), DEVICE, None)
    noted = 0
    with pytest.raises(TrainingFault, match="student: .* not finite at step 7;"):
        for step in range(7 + READ_EVERY + 1):
            values = {"loss": torch.ones((), device=DEVICE), "norm": torch.ones((), device=DEVICE)}
            if step >= 7:
                values[where].fill_(float("nan"))
            noted += 1
            guard.note(step, values["loss"], values["norm"])
    assert 8 <= noted <= 7 + READ_EVERY
    with pytest.raises(TrainingFault, match="at step 7;"):
        guard.check()


def test_a_run_with_a_nan_ends_at_its_step_and_saves_nothing_of_it(tiny, monkeypatch):
    steps = []

    def around(step, arguments):
        loss, norm = step()
        steps.append(loss)
        return (loss * float("nan") if len(steps) == 8 else loss), norm     # of the second epoch

    around_steps(monkeypatch, around)
    with pytest.raises(TrainingFault, match="student: .* at step 7;"):
        train.main(dataclasses.replace(tiny, teacher_epochs=0))
    saved = checkpoint.read(Path(tiny.out) / "last.ckpt")
    assert (saved["position"]["epoch"], saved["position"]["step"]) == (1, 0)


def test_a_stopped_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    """To the bit under deterministic algorithms, and where cuDNN does not choose them by the clock."""
    start = runtime.start

    def deterministic_start(*arguments):
        machine = start(*arguments)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        return machine

    monkeypatch.setattr(runtime, "start", deterministic_start)
    config = dataclasses.replace(tiny, augment="crop", views=2, epochs=3)
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    train.main(whole)

    stop_at_step(broken, 13)    # after 5 of the teacher, amid the student's second epoch
    saved = checkpoint.read(Path(broken.out) / "last.ckpt")
    assert (saved["position"]["role"], saved["position"]["epoch"], saved["position"]["step"]) == ("student", 1, 3)

    train.main(dataclasses.replace(broken, resume=True))
    one, other = (checkpoint.read(Path(each.out) / "last.ckpt") for each in (whole, broken))
    identical(one, other)
