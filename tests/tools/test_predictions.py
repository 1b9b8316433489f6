"""predictions.npz: what is written is read back, and anything else is refused."""

import io
from pathlib import Path

import numpy as np
import pytest

from kd import BadInput
from kd.tools.predictions import Predictions, read_predictions


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "predictions.npz"


def test_what_is_written_is_read_back(path):
    generator = np.random.default_rng(0)
    written = Predictions(["a", "b", "ü"], generator.integers(0, 3, 7), [f"{i}.jpg" for i in range(7)],
                          {role: generator.normal(size=(7, 3)).astype(np.float32) for role in ("teacher", "student")},
                          np.array([2, 5]), generator.integers(0, 255, (2, 8, 8, 3), np.uint8),
                          generator.integers(0, 255, (4, 2, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0]))
    path.write_bytes(written.to_bytes())
    read = read_predictions(path)
    assert (read.classes, read.names, list(read.logits)) == (written.classes, written.names, ["teacher", "student"])
    for name in ("labels", "shown", "pictures", "views", "view_labels"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    for role in read.logits:
        assert np.array_equal(read.logits[role], written.logits[role])
        assert read.correct(role).tolist() == (written.logits[role].argmax(1) == written.labels).tolist()


def archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut", archive(labels=np.zeros(3)),
                                     archive(teacher=np.array([{"an": "object"}], object))])
def test_predictions_that_are_none_are_refused_and_nothing_in_them_runs(path, content):
    path.write_bytes(content)
    with pytest.raises(BadInput, match="predictions.npz: not readable"):
        read_predictions(path)


def test_predictions_that_are_not_there_say_how_to_get_them(path):
    with pytest.raises(BadInput, match="predictions.npz: no such file; .* --resume"):
        read_predictions(path)
