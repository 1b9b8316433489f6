"""results/: what is kept of a run, the differences between arms, and the pictures that the arms learn from."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kd.data.sources import open_dataset
from results import arms, few_labels
from results.arms import Arm
from tests.helpers import toy


def kept(folder: Path, seed: int, right: list[int]) -> None:
    """A kept run whose student had these test pictures right."""
    total = len(right)
    result = {"config": {"seed": seed}, "validation_total": 0, "student": {"test_total": total},
              "right": {"student": {"test": arms._as_digits(np.array(right, bool), [f"p{i}.x" for i in range(total)])}}}
    path = folder / f"seed-{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))


def test_arms_are_compared_within_each_seed_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "HERE", tmp_path)
    generator = np.random.default_rng(0)
    for seed in range(3):
        first = (generator.random(200) < 0.8).tolist()
        kept(tmp_path / "first", seed, first)
        kept(tmp_path / "second", seed, [int(one and i % 4 > 0) for i, one in enumerate(first)])
    assert len(arms.accuracies(Arm("first"))) == 3
    found = arms.difference(Arm("first"), Arm("second"))
    shares = [a - b for a, b in zip(arms.accuracies(Arm("first")), arms.accuracies(Arm("second")))]
    assert found is not None and found["n"] == 3 and found["mean"] == pytest.approx(np.mean(shares))
    low, high = found["interval"]
    assert 0.1 < low < found["mean"] < high < 0.3
    assert arms.difference(Arm("first"), Arm("absent")) is None


def test_pictures_of_a_written_folder_count_in_the_order_of_the_data_set():
    right = np.array([True, False, False, True, True])
    names = ["test/a/00004.jpg", "test/a/00001.jpg", "test/b/00000.jpg", "test/b/00002.jpg", "test/b/00003.jpg"]
    digits = arms._as_digits(right, names)
    assert np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=5).tolist() == [0, 0, 1, 1, 1]
    assert arms._as_digits(right, ["leaf.3", "leaf.1", "leaf.2", "x", "y"]) == np.packbits(right).tobytes().hex()


def test_the_asked_for_share_of_labels_is_wrong_and_nothing_else(tmp_path):
    root = toy.class_folders(tmp_path / "set", classes={"a": 10, "b": 10, "c": 20})
    dataset = open_dataset(str(root), say=lambda line: None)
    folder = few_labels.wrong_folder(dataset, 40, 0, tmp_path / "wrong")
    given = {int(path.stem): path.parent.name for path in (folder / "train").rglob("*.jpg")}
    true = [dataset.classes[label] for label in dataset.splits["train"].labels]
    assert sorted(given) == list(range(40))
    assert sum(given[row] != true[row] for row in given) == 16
    counts = Counter(path.parent.name for path in (folder / "test").rglob("*.jpg"))
    assert counts == {"a": 10, "b": 10, "c": 20}
