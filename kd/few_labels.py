"""Few labels: which pictures of train keep theirs, and how pictures without a label join them.

A teacher's logits need no label. So the student learns from all pictures, while the teacher and the control know only
the labelled ones.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kd import NO_LABEL, BadInput
from kd.data.frames import Data, Split


class ByRole(NamedTuple):
    """What each role of a run learns from. Validation and test are the same for all three."""

    teacher: Split      # the labelled pictures
    control: Split      # the same pictures, repeated until they are as many as the student's
    student: Split      # all pictures; those without a label have NO_LABEL


def by_role(data: Data, count: int, seed: int, unlabelled: np.ndarray | None = None) -> ByRole:
    """Keep only `count` labels of train (0: all), and let the student learn from the other pictures too.

    unlabelled: (U,) int64, the rows of `data.unlabelled` to learn from, as `new_pictures` gives them.
    All of train comes first in the student's data, in its own order. So the number of labels does not decide which
    logits of a teacher are in the store.

    The control takes as many steps as the student. A repeated picture counts as another sample, so it has other views.

    Raises BadInput as `keep_labels` does.
    """
    train = data.train
    if not count and unlabelled is None:
        return ByRole(train, train, train)

    labelled = keep_labels(train.labels, count, seed) if count else np.arange(len(train))
    rows = train.rows
    if unlabelled is not None:
        assert data.unlabelled is not None
        rows = np.append(rows, data.unlabelled.rows[unlabelled])
    labels = np.full(len(rows), NO_LABEL)
    labels[labelled] = train.labels[labelled]
    student = replace(train, rows=rows, labels=labels)
    return ByRole(train.take(labelled), train.take(rounds(labelled, len(student), seed)), student)


def keep_labels(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) int64, sorted: the pictures that keep their label.

    The classes take turns, as long as they have any left: with 5 classes and 25 labels, 5 of each. So the choice for a
    smaller count is part of the one for a larger count. Which pictures of a class come first depends on `seed`.

    Raises BadInput for a count below the number of classes or above the number of labels.
    """
    classes = np.unique(labels)
    if not len(classes) <= count <= len(labels):
        raise BadInput(f"--labels {count}: must be at least {len(classes)}, one for each class, and at most "
                       f"{len(labels)}, which is what train has")
    turn = np.empty(len(labels), np.int64)      # 0 for the first picture of each class, 1 for the second, ...
    for label in classes:
        rows = np.flatnonzero(labels == label)
        turn[np.random.default_rng([seed, int(label)]).permutation(rows)] = np.arange(len(rows))
    in_turn = np.lexsort((labels, turn))        # the first picture of every class, then the second, ...
    return np.sort(in_turn[:count])


def rounds(labelled: np.ndarray, length: int, seed: int) -> np.ndarray:
    """(length,) int64: the labelled pictures, shuffled once and then repeated. The last round may be cut short.

    `seed` decides the order. The first ones would not do: in a data set that is sorted by class, they are of the first
    classes only.
    """
    return np.resize(np.random.default_rng(seed).permutation(labelled), length)
