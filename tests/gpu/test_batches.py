"""Batches on the GPU are those of the CPU, in the same order, made by a thread that ends with them."""

import threading

import numpy as np
import pytest
import torch

import train
from kd.augmentations import AUGMENTATIONS
from kd.batches import load_batches
from kd.data.frames import Split
from kd.views import Views
from tests.gpu import DEVICE, REHEARSAL

pytestmark = pytest.mark.cuda


@pytest.fixture
def data(photos, tmp_path) -> Split:
    return train.decode(train.open_dataset(str(photos)), size=32, crop_pct=0.875, interpolation="bicubic",
                        cache_dir=str(tmp_path))["train"]


def batches(data: Split, augment: str, device: torch.device, epoch: int = 0) -> list:
    return list(load_batches(data, Views(3, 32, AUGMENTATIONS[augment], 0), epoch, 8, 0, device))


@pytest.mark.parametrize("augment", list(AUGMENTATIONS))
def test_views_are_those_of_the_cpu(data, augment):
    """Without a crop to the bit. A crop resamples: of 1000 values, one may be rounded the other way."""
    for epoch in (0, 1):
        made = batches(data, augment, DEVICE, epoch)
        expected = batches(data, augment, torch.device("cpu"), epoch)
        assert [batch.samples.tolist() for batch in made] == [batch.samples.tolist() for batch in expected]
        pixels, on_cpu = (torch.cat([batch.pixels.cpu() for batch in each]).int() for each in (made, expected))
        difference = (pixels - on_cpu).abs()
        if AUGMENTATIONS[augment].crop:
            assert (difference == 0).double().mean() >= 0.999 and (difference <= 1).double().mean() >= 0.9999
        else:
            assert difference.max() == 0
        for batch, other in zip(made, expected, strict=True):
            assert batch.pixels.device.type == batch.labels.device.type == DEVICE.type
            assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(batch.labels.cpu(), other.labels)


@pytest.mark.skipif(REHEARSAL, reason="on a CPU no thread works ahead")
def test_a_thread_works_ahead_and_ends_when_the_loop_leaves_early(data):
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    stream = load_batches(data, Views(3, 32, AUGMENTATIONS["crop"], 0), 0, 8, 0, DEVICE)
    next(stream)
    assert threads() == ["prefetch_0"]
    stream.close()      # type: ignore[attr-defined]
    assert threads() == []


def test_an_error_of_the_thread_comes_in_its_turn(data, monkeypatch):
    reads: list[int] = []
    real = Split.read

    def read(split: Split, numbers: np.ndarray, *rest, **named) -> np.ndarray:
        reads.append(len(numbers))
        if len(reads) == 3:
            raise OSError("the disk is gone")
        return real(split, numbers, *rest, **named)

    monkeypatch.setattr(Split, "read", read)
    seen = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in load_batches(data, Views(3, 32, AUGMENTATIONS["none"], 0), 0, 8, 0, DEVICE):
            seen += 1
    assert seen == 2
