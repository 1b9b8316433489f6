"""kd/data/duplicates.py: equal pictures in two splits, or with two labels, are counted and named."""

import numpy as np
import pytest

from kd import BadInput
from kd.data.duplicates import duplicates, new_pictures
from kd.data.frames import Data, Split
from tests.helpers.frames import noise, split_of

PICTURES = noise(10, 4).read(range(10))


def data_of(**pictures: list[tuple[int, int]]) -> Data:
    """Splits of (number of the picture, label)."""
    def split(name: str) -> Split:
        numbers, labels = np.array(pictures[name]).T
        return split_of(PICTURES[numbers], labels, name)

    return Data(("a", "b", "c"), **{name: split(name) for name in pictures})


def test_each_pair_of_splits_has_its_own_count():
    assert duplicates(data_of(train=[(0, 0), (1, 1), (2, 0), (2, 0), (3, 1)], validation=[(9, 0), (2, 1)],
                              test=[(1, 1), (2, 0), (9, 0), (0, 1), (2, 0)])) == [
        "1 of 2 pictures of validation are in train as well, 1 of them with another label "
        "(validation/1.png = train/2.png)",
        "4 of 5 pictures of test are in train as well, 1 of them with another label "
        "(test/0.png = train/1.png; test/1.png = train/2.png)",
        "3 of 5 pictures of test are in validation as well, 2 of them with another label "
        "(test/1.png = validation/1.png; test/2.png = validation/0.png)"]


def test_equal_pictures_of_train_with_other_labels_are_counted():
    data = data_of(train=[(0, 0), (1, 1), (0, 1), (2, 1), (2, 1), (0, 0), (3, 2), (3, 0)], validation=[(7, 0)],
                   test=[(8, 0)])
    assert duplicates(data) == ["5 pictures of train are equal to others with another label, so that not all can be "
                                "learned (train/0.png = train/2.png)"]


def test_equal_pictures_of_one_split_with_one_label_are_no_matter():
    assert duplicates(data_of(train=[(0, 0), (1, 1), (1, 1)], validation=[(3, 0), (3, 1)], test=[(5, 0)])) == []


def test_pictures_of_other_splits_are_left_out_and_counted():
    said: list[str] = []
    splits = {"train": [(0, 0), (1, 1)], "validation": [(3, 0)], "test": [(5, 0)]}
    rows = new_pictures(data_of(**splits, unlabelled=[(number, -100) for number in (7, 0, 8, 5, 3, 7)]), said.append)
    assert rows is not None and rows.tolist() == [0, 2, 5]
    assert said == ["--unlabelled: 3 of 6 pictures are left out, because they are in train, validation or test as well"]
    with pytest.raises(BadInput, match="^--unlabelled: all of its 2 pictures are in train, validation or test"):
        new_pictures(data_of(**splits, unlabelled=[(0, -100), (5, -100)]))
    assert new_pictures(data_of(**splits)) is None
