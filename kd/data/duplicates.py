"""Equal pictures in two splits: a model may know the answer to a test picture by heart."""

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kd.data.frames import Data, Split
from kd.machine.cores import usable_cores


class Picture(NamedTuple):
    """One of several equal pictures."""

    split: str
    number: int     # its index in the split
    label: int


def duplicates(data: Data) -> list[str]:
    """A line for each pair of splits that share pictures, and one for equal pictures with other labels in train.

    Pictures are equal where all their decoded pixels are. Checksums find the candidates. So only
    these are read, and a dataset without equal pictures costs next to nothing.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    groups = _groups_of_equal_pictures(splits)
    lines = [_shared(splits, groups, *pair)
             for pair in (("train", "validation"), ("train", "test"), ("validation", "test"))]
    return [line for line in [*lines, _contradictions(data.train, groups)] if line]


def new_pictures(data: Data) -> np.ndarray:
    """(U,) int64, sorted: the pictures of `data.unlabelled` that are in no other split."""
    assert data.unlabelled is not None
    own = data.unlabelled.frames.checksums
    others = (data.train, data.validation, data.test)
    candidates = np.flatnonzero(np.isin(own, np.concatenate([split.frames.checksums for split in others])))
    known = {_pixel_digest(split, int(index)) for split in others
             for index in np.flatnonzero(np.isin(split.frames.checksums, own))}
    known_rows = [index for index in candidates if _pixel_digest(data.unlabelled, int(index)) in known]
    return np.setdiff1d(np.arange(len(own)), known_rows)


def _groups_of_equal_pictures(splits: dict[str, Split]) -> list[list[Picture]]:
    """Those that lie in several splits or have several labels."""
    candidates = _candidates(splits)
    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = pool.map(lambda picture: _pixel_digest(splits[picture.split], picture.number), candidates)
        groups = defaultdict(list)
        for picture, digest in zip(candidates, digests, strict=True):
            groups[digest].append(picture)
    return [group for group in groups.values() if len(group) > 1]


def _candidates(splits: dict[str, Split]) -> list[Picture]:
    """Pictures whose checksum another one has, in another split or with another label."""
    checksums = np.concatenate([split.frames.checksums for split in splits.values()])
    labels = np.concatenate([split.labels for split in splits.values()])
    names = list(splits)
    numbers = np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()])
    indices = np.concatenate([np.arange(len(split)) for split in splits.values()])

    order = np.argsort(checksums, kind="stable")
    starts = np.flatnonzero(np.diff(checksums[order], prepend=checksums[order[0]] ^ 1))     # of equal checksums
    differ = [np.minimum.reduceat(values[order], starts) != np.maximum.reduceat(values[order], starts)
              for values in (numbers, labels)]
    chosen = np.repeat(differ[0] | differ[1], np.diff(starts, append=len(order)))
    return [Picture(names[numbers[place]], int(indices[place]), int(labels[place]))
            for place in np.sort(order[chosen])]


def _pixel_digest(split: Split, index: int) -> bytes:
    return hashlib.blake2b(split.frames.read([index]).data).digest()


def _shared(splits: dict[str, Split], groups: list[list[Picture]], first: str, second: str) -> str:
    """The line for the pictures of `second` that `first` has as well; empty without any."""
    pairs = []      # of each such picture, and the ones that are equal to it
    for group in groups:
        equals = [picture for picture in group if picture.split == first]
        pairs += [(picture, equals) for picture in group if picture.split == second and equals]
    pairs.sort()
    if not pairs:
        return ""
    other_label = sum(any(equal.label != picture.label for equal in equals) for picture, equals in pairs)
    examples = "; ".join(f"{splits[second].frames.name_of(picture.number)} = "
                         f"{splits[first].frames.name_of(equals[0].number)}" for picture, equals in pairs[:2])
    contradicted = f", {other_label:,} of them with another label" if other_label else ""
    return (f"{len(pairs):,} of {len(splits[second]):,} pictures of {second} are in {first} as well{contradicted} "
            f"({examples})")


def _contradictions(train: Split, groups: list[list[Picture]]) -> str:
    """The line for pictures of train that have other labels although they are equal; empty without any."""
    in_train = [[picture for picture in group if picture.split == "train"] for group in groups]
    found = [group for group in in_train if len({picture.label for picture in group}) > 1]
    if not found:
        return ""
    first = found[0]
    other = next(picture for picture in first if picture.label != first[0].label)
    return (f"{sum(map(len, found)):,} pictures of train are equal to others with another label, so that not all "
            f"can be learned ({train.frames.name_of(first[0].number)} = {train.frames.name_of(other.number)})")
