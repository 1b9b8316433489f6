"""Logits come in the order of the samples."""

import numpy as np
import torch

from kd import models, predict
from kd.machine import runtime


class Frames:
    """Seven frames, each filled with its number."""

    shape = (7, 4, 4, 3)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        return 7

    def read(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        self.batches.append(numbers.tolist())
        return np.ones((len(numbers), 4, 4, 3), np.uint8) * numbers.astype(np.uint8)[:, None, None, None]


class Mean(torch.nn.Module):
    """Two logits: the mean of a picture, and its negative."""

    def forward(self, x):
        assert not self.training and x.shape[2:] == (2, 2)
        return torch.stack([x.mean((1, 2, 3)) * 255, -x.mean((1, 2, 3)) * 255], 1)


def test_logits_come_in_the_order_of_the_samples_with_a_ragged_last_batch(monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    frames, prep = Frames(), models.Preprocessing((0., 0., 0.), (1., 1., 1.), "bicubic", 0.5)
    classifier = models.Classifier(Mean().train(), prep, 2, ("a", "b"), runtime.start("cpu", "off", "off"))
    logits = predict.predict(classifier, frames, "test")  # type: ignore[arg-type]
    assert frames.batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert np.allclose(logits, [[i, -i] for i in range(7)], atol=1e-5) and logits.dtype == np.float32
