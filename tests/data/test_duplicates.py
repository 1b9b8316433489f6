"""kd/data/duplicates.py: equal pictures in two splits, or with two labels, are counted and named."""

from types import SimpleNamespace

import numpy as np
import pytest

from kd.data import duplicates as module
from kd.data.duplicates import duplicates
from kd.data.frames import Data, Split, decode
from kd.data.samples import Dataset, Samples
from tests.data.test_frames import SETTINGS, noise


def decoded(folder, **pictures: list[tuple[int, int]]) -> Data:
    """Splits of (number of the picture, label)."""
    def samples(split: str) -> Samples:
        rows = pictures[split]
        return Samples(np.array([label for _, label in rows]), lambda index: noise(40, 36, rows[index][0]),
                       lambda index: f"{split}/{index}.png", str, f"somewhere {split}", repr(rows))

    dataset = Dataset("toy", ("a", "b", "c"), {split: samples(split) for split in ("train", "validation", "test")})
    return decode(dataset, cache_dir=folder, say=lambda _: None, **SETTINGS)


def test_pictures_without_an_equal_one_are_not_even_read(tmp_path, monkeypatch):
    data = decoded(tmp_path, train=[(0, 0), (1, 1), (2, 0), (2, 0)], validation=[(3, 0), (4, 1)], test=[(5, 0)])
    monkeypatch.setattr(module, "_pixel_digest", lambda split, index: pytest.fail("read"))
    assert duplicates(data) == []


def test_each_pair_of_splits_has_its_own_count(tmp_path):
    pictures = {"train": [(0, 0), (1, 1), (2, 0), (2, 0), (3, 1)], "validation": [(9, 0), (2, 1)],
                "test": [(1, 1), (2, 0), (9, 0), (0, 1), (2, 0)]}
    for _ in range(2):      # the second time from the cache
        assert duplicates(decoded(tmp_path, **pictures)) == [
            "1 of 2 pictures of validation are in train as well, 1 of them with another label "
            "(validation/1.png = train/2.png)",
            "4 of 5 pictures of test are in train as well, 1 of them with another label "
            "(test/0.png = train/1.png; test/1.png = train/2.png)",
            "3 of 5 pictures of test are in validation as well, 2 of them with another label "
            "(test/1.png = validation/1.png; test/2.png = validation/0.png)"]


def test_equal_pictures_of_train_with_other_labels_are_counted(tmp_path):
    data = decoded(tmp_path, train=[(0, 0), (1, 1), (0, 1), (2, 1), (2, 1), (0, 0), (3, 2), (3, 0)],
                   validation=[(7, 0)], test=[(8, 0)])
    assert duplicates(data) == ["5 pictures of train are equal to others with another label, so that not all can be "
                                "learned (train/0.png = train/2.png)"]


def test_equal_checksums_of_other_pixels_do_not_count(tmp_path):
    data = decoded(tmp_path, train=[(0, 0), (1, 1)], validation=[(2, 0)], test=[(3, 0)])
    for split in (data.train, data.validation, data.test):
        split.frames.checksums = np.zeros(len(split), np.uint32)
        split.frames._verified[:] = True
    assert duplicates(data) == []


def test_of_a_million_frames_only_those_with_equal_checksums_are_read():
    read: list[int] = []

    def split(count: int, start: int) -> Split:
        rng = np.random.default_rng(start)
        checksums = rng.integers(0, 1 << 32, count, dtype=np.uint32)

        def read_frame(indices: list[int]) -> np.ndarray:
            read.append(start + indices[0])
            return np.array(read[-1:])

        frames = SimpleNamespace(checksums=checksums, __len__=lambda: count, read=read_frame)
        return Split(frames, rng.integers(0, 1000, count))      # type: ignore[arg-type]

    data = Data((), split(1_200_000, 0), split(50_000, 2_000_000), split(50_000, 4_000_000))
    assert duplicates(data) == []
    assert 0 < len(read) < 1000     # pairs of equal checksums by chance: some 200
