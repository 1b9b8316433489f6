"""Equal pictures in two splits: a model may know the answer to a test picture by heart.

Pictures are equal where all their decoded pixels are. Their digests tell, so that no picture is read.
"""

from collections.abc import Callable

import numpy as np

from kd import BadInput
from kd.data.frames import Data, Split


def duplicates(data: Data) -> list[str]:
    """A line for each pair of splits that share pictures, and one for equal pictures with other labels in train."""
    lines = [_shared("train", data.train, "validation", data.validation),
             _shared("train", data.train, "test", data.test),
             _shared("validation", data.validation, "test", data.test), _contradictions(data.train)]
    return [line for line in lines if line]


def new_pictures(data: Data, say: Callable[[str], None] = print) -> np.ndarray | None:
    """(U,) int64, sorted: the pictures of `data.unlabelled` that are in no other split; None without --unlabelled.

    `say` is told how many are left out: the student must not learn the very pictures that it is tested on. Raises
    BadInput where none is left.
    """
    if data.unlabelled is None:
        return None
    known = set().union(*map(_names, (data.train, data.validation, data.test)))
    rows = [row for row, name in enumerate(_names(data.unlabelled)) if name not in known]
    total = len(data.unlabelled)
    if not rows:
        raise BadInput(f"--unlabelled: all of its {total:,} pictures are in train, validation or test as well; give "
                       "others")
    if len(rows) < total:
        say(f"--unlabelled: {total - len(rows):,} of {total:,} pictures are left out, because they are in train, "
            "validation or test as well")
    return np.array(rows)


def _names(split: Split) -> list[bytes]:
    """The digest of each picture; as bytes, of which a set of a million is made in a second."""
    return split.digests.view("S16")[:, 0].tolist()


def _rows_by_name(split: Split, chosen: set[bytes]) -> dict[bytes, list[int]]:
    """The rows of the chosen pictures."""
    rows: dict[bytes, list[int]] = {}
    for row, name in enumerate(_names(split)):
        if name in chosen:
            rows.setdefault(name, []).append(row)
    return rows


def _shared(first: str, one: Split, second: str, other: Split) -> str:
    """The line for the pictures of `other` that `one` has as well; empty without any."""
    known = _rows_by_name(one, set(_names(other)))
    pairs = [(row, known[name]) for row, name in enumerate(_names(other)) if name in known]
    if not pairs:
        return ""
    other_label = sum((one.labels[equals] != other.labels[row]).any() for row, equals in pairs)
    contradicted = f", {other_label:,} of them with another label" if other_label else ""
    examples = "; ".join(f"{other.name_of(row)} = {one.name_of(equals[0])}" for row, equals in pairs[:2])
    return f"{len(pairs):,} of {len(other):,} pictures of {second} are in {first} as well{contradicted} ({examples})"


def _contradictions(train: Split) -> str:
    """The line for pictures of train that have other labels although they are equal; empty without any."""
    labels: dict[bytes, int] = {}
    found = _rows_by_name(train, {name for name, label in zip(_names(train), train.labels.tolist())
                                  if labels.setdefault(name, label) != label})
    if not found:
        return ""
    first, *others = next(iter(found.values()))
    other = next(row for row in others if train.labels[row] != train.labels[first])
    return (f"{sum(map(len, found.values())):,} pictures of train are equal to others with another label, so that not "
            f"all can be learned ({train.name_of(first)} = {train.name_of(other)})")
