"""A curve that must not move: the 20 losses of a tiny run, as they were recorded (tests/golden.json).

Silent numerical drift shows here: in the views, the stored logits, the loss, the optimizer or the schedule. The run is
float32 in plain PyTorch without random crops, whose pixels are rounded to whole numbers: so every processor gives the
same losses within 1e-6.

To record it again, after a change that is meant to change it: `python -m tests.test_golden`.
"""

import json
import tempfile
from pathlib import Path

import pytest

import train
from tests.conftest import make_photos

GOLDEN = Path(__file__).with_name("golden.json")


def losses_of(photos: Path, folder: Path) -> list[float]:
    """The student's loss at each of its 20 steps."""
    config = train.Config(
        recipe="tutorial", dataset=str(photos), size=32, epochs=4, batch_size=8, lr=5e-4, schedule="cosine", warmup=0.1,
        weight_decay=0.02, teacher="test_resnet", teacher_weights="none", teacher_epochs=1, teacher_lr=1e-4,
        teacher_augment="flip", allow_weak_teacher=True, student="test_convnext", augment="flip", views=2,
        temperature=3.0, out=str(folder / "run"), cache_dir=str(folder / "cache"), device="cpu", amp="off",
        kernels="off", compile="off")
    losses: list[float] = []
    real = train.train_step

    def noted(*arguments):
        loss, norm = real(*arguments)
        losses.append(loss.item())
        return loss, norm

    train.train_step = noted
    try:
        train.main(config)
    finally:
        train.train_step = real
    teacher_steps = len(losses) - 20
    assert teacher_steps == 5
    return losses[teacher_steps:]


def test_the_losses_are_those_that_were_recorded(photos, tmp_path):
    assert losses_of(photos, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-5, rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        made = losses_of(make_photos(Path(name) / "photos"), Path(name))
    GOLDEN.write_text(json.dumps(made, indent=0) + "\n")
