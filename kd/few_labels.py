"""Few labels: which pictures of train keep theirs, and how pictures without a label join them.

A teacher's logits need no label. So the student learns from all pictures, while the teacher and the
control know only the labelled ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kd import BadInput
from kd.data.duplicates import new_pictures
from kd.data.frames import Data, Frames, Split
from kd.data.samples import Say
from kd.losses import NO_LABEL


class ByRole(NamedTuple):
    """What each role of a run learns from. Validation and test are the same in all three."""

    teacher: Data       # the labelled pictures
    control: Data       # the same pictures, repeated until they are as many as the student's
    student: Data       # all pictures; those without a label have NO_LABEL


def by_role(data: Data, count: int, seed: int, unlabelled: np.ndarray | None = None) -> ByRole:
    """Keep only `count` labels of train (0: all), and let the student learn from the other pictures too.

    unlabelled: (U,) int64, the rows of `data.unlabelled` to learn from, as `usable_rows` gives them.
    All of train comes first in the student's data, in its own order. So the number of labels does not
    decide which logits of a teacher are in the store.

    The control takes as many steps as the student. A repeated picture counts as another sample, so it has other views.

    Raises BadInput as `keep_labels` does.
    """
    if not count and unlabelled is None:
        return ByRole(data, data, data)

    train = data.train
    labelled = keep_labels(train.labels, count, seed) if count else np.arange(len(train))
    known = np.full(len(train), NO_LABEL, np.int64)
    known[labelled] = train.labels[labelled]
    everything = Split(train.frames, known)
    if unlabelled is not None:
        assert data.unlabelled is not None
        rows = np.concatenate([np.arange(len(train)), len(train) + unlabelled])
        everything = _joined([train.frames, data.unlabelled.frames], rows,
                             np.append(known, np.full(len(unlabelled), NO_LABEL, np.int64)))

    again = rounds(labelled, len(everything), seed)
    return ByRole(replace(data, train=_joined([train.frames], labelled, train.labels[labelled])),
                  replace(data, train=_joined([train.frames], again, train.labels[again])),
                  replace(data, train=everything))


def _joined(parts: Sequence[Frames], rows: np.ndarray, labels: np.ndarray) -> Split:
    return Split(JoinedFrames(parts, rows), labels)     # type: ignore[arg-type]  # a loop only reads frames


def usable_rows(data: Data, say: Say = print) -> np.ndarray | None:
    """(U,) int64, the pictures without a label that are not in train, validation or test; None without --unlabelled.

    `say` is told how many are left out: the student must not learn the very pictures that it is
    tested on. Raises BadInput where none is left.
    """
    if data.unlabelled is None:
        return None
    rows = new_pictures(data)
    total = len(data.unlabelled)
    if not len(rows):
        raise BadInput(f"--unlabelled: all of its {total:,} pictures are in train, validation or test as well; give "
                       "others")
    if len(rows) < total:
        say(f"--unlabelled: {total - len(rows):,} of {total:,} pictures are left out, because they are in train, "
            "validation or test as well")
    return rows


def keep_labels(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) int64, sorted: the pictures that keep their label.

    The classes take turns, as long as they have any left: with 5 classes and 25 labels, 5 of each. So
    the choice for a smaller count is part of the one for a larger count. Which pictures of a class
    come first depends on `seed`.

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


class JoinedFrames:
    """Frames of one or several files, in any order, as if they were one file. Several threads may read at once."""

    def __init__(self, parts: Sequence[Frames], rows: np.ndarray) -> None:
        """rows: (N,) int64, which frames, counted through all of `parts`. A frame may occur several times."""
        self.parts, self.rows = parts, rows
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (len(rows), *parts[0].shape[1:])
        facts = repr([part.digest for part in parts]).encode() + rows.astype("<i8").tobytes()
        self.digest = hashlib.sha256(facts).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy frames into `out`, or into a new array: (B, R, R, 3) uint8, C-contiguous."""
        if out is None:
            out = np.empty((len(indices), *self.shape[1:]), np.uint8)
        rows = self.rows[np.asarray(indices)]
        owners = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(owners == number)
            if len(mine):
                out[mine] = part.read(rows[mine] - (self._ends[number] - len(part)))
        return out
