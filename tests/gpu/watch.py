"""What the steps of a run do, noted from outside."""

from typing import Any, Callable

import pytest

import train


def around_steps(monkeypatch: pytest.MonkeyPatch, around: Callable[[Callable[[], Any], tuple], Any]) -> None:
    """Have `around(step, arguments)` make each step of `fit`: it calls step() and returns what that returned."""
    real = train.train_step
    monkeypatch.setattr(train, "train_step",
                        lambda *arguments: around(lambda: real(*arguments), arguments))


def losses_of(monkeypatch: pytest.MonkeyPatch, config: train.Config) -> list[float]:
    """The loss of each step of a run: first the teacher's, if it is fine-tuned, then the student's."""
    losses: list[float] = []

    def around(step: Callable[[], Any], arguments: tuple) -> Any:
        loss, norm = step()
        losses.append(loss.item())
        return loss, norm

    with monkeypatch.context() as patch:
        around_steps(patch, around)
        train.main(config)
    return losses
