"""What tests of whole runs share."""

import dataclasses
import signal
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train
from kd.batches import Batch
from kd.machine import runtime
from kd.machine.signals import Stopped


def identical(a: Any, b: Any, place: str = "") -> None:
    """Assert that two checkpoints are the same at tolerance 0, naming the first place where they are not."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            # clocks, and what is counted by process
            if key not in ("seconds", "train_seconds", "images_per_second", "teacher_batches", "time", "elapsed"):
                identical(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            identical(one, other, f"{place}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


def command_line(config: train.Config, *more: str) -> list[str]:
    """The flags that give `config`."""
    line = list(more)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        option = "--" + field.name.replace("_", "-")
        if value is True:
            line.append(option)
        elif not isinstance(value, bool) and value != "":
            line += [option, str(value)]
    return line


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, teacher_logits: Tensor | None,
         temperature: float = 5.0, kd_weight: float = 0.5, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """`train.train_step` in float32 on the CPU with the reference loss; returns the loss and the gradient's norm."""
    batch = Batch(None, np.arange(len(x)), 0, x, labels, len(x))  # type: ignore[arg-type]

    def loss_fn(student: Tensor, teacher: Tensor | None, y: Tensor) -> Tensor:
        return train.kd_loss(student, teacher, y, temperature, kd_weight)

    return train.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch, teacher_logits,
                            loss_fn, clip, runtime.start("cpu", "off", "off"))


def watch_teacher(monkeypatch: Any, note: Callable[[Any], None]) -> None:
    """Call `note(teacher)` before and after each batch that the teacher computes."""
    answer = train.Teacher.outputs

    def watched(teacher: train.Teacher, batch: Batch) -> Tensor:
        note(teacher)
        outputs = answer(teacher, batch)
        note(teacher)
        return outputs

    monkeypatch.setattr(train.Teacher, "outputs", watched)


def stop_at_step(config: train.Config, number: int) -> None:
    """`train.main(config)`, stopped by SIGTERM at the `number`-th training step, counted over all roles from 1."""
    step, steps = train.train_step, 0

    def stopping(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        if steps == number:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stopping)
        with pytest.raises(Stopped):
            train.main(config)
