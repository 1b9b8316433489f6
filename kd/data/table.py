"""Every data set as one table of pictures, and what is decided about it once: splits, classes, checks, carving.

A reader (`kd/data/readers.py`) gives rows of (picture, label as text or None, split as text or None). Text stays text:
007 is a class of that name. From there on the same rules hold for folders, tables, the Hub and the drawn leaves.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd import NO_LABEL, BadInput
from kd.data import readers
from kd.data.readers import Rows, first_names, split_called

SPLITS = ("train", "validation", "test")
CARVED = .1     # the share of each class of train that becomes a missing split

Say = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """Encoded pictures from any source, a row each. Splits are rows."""

    name: str                               # of the data set, for messages
    classes: tuple[str, ...]                # () where labels are ignored
    labels: np.ndarray                      # (N,) int64, a place in `classes`, or NO_LABEL
    splits: dict[str, np.ndarray]           # int64 rows of those in SPLITS, and of "unlabelled"
    read: Callable[[int], bytes | Image.Image]      # encoded bytes, or a drawn picture; by several threads at once
    name_of: Callable[[int], str]           # for messages: the path of a row, or its number
    key_of: Callable[[int], str]            # the same wherever the data lie: a path below their folder, or a number
    location: str                           # stays the same when the content changes
    fingerprint: str                        # changes with the content and its order
    source: str                             # one line: which folders, columns and configuration were read
    whole: bool = False                     # the source has no splits: what is called train is all that there is
    carved: tuple[str, ...] = ()            # the splits that were taken from train

    def split_digest(self, split: str) -> str:
        """A hash (hex) of the keys and classes of a split's pictures, whatever their order and place on disk."""
        lines = sorted(f"{self.key_of(row)}\0{self.classes[self.labels[row]] if self.labels[row] >= 0 else ''}"
                       for row in self.splits[split].tolist())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What config.json keeps of the data that a run was trained on; ready for JSON."""
        splits = {split: {"pictures": len(rows), "carved": split in self.carved, "digest": self.split_digest(split)}
                  for split, rows in self.splits.items()}
        return {"name": self.name, "source": self.source, "classes": list(self.classes), "splits": splits}


# ---- opening ---------------------------------------------------------------------------------------------------

def open_dataset(name: str, *, config: str = "", image: str = "", label: str = "", unlabelled: str = "",
                 say: Say = print) -> Table:
    """Open `leaves`, a Hub id (or the alias `beans`), a folder of pictures, or one with tables.

    The table has train, validation and test, and every label is a class that train has. A missing split is carved from
    train. With `unlabelled`, the pictures of another source follow as a fourth split, their labels ignored. `say` is
    told of what was read, left out and carved.

    Raises BadInput where the data cannot be found, reached or used; TrainingFault for a full disk.
    """
    table = _with_three_splits(_table_of(readers.read(name, config, image, label, say), say), say)
    say(f"{table.name}: {table.source}; classes {first_names(table.classes)}")
    return _with_unlabelled(table, unlabelled, say) if unlabelled else table


def open_splits(name: str, splits: Sequence[str], classes: tuple[str, ...], *, config: str = "", image: str = "",
                label: str = "", carve: bool = False, say: Say = print) -> Table:
    """Open only these splits, their labels numbered by `classes`, which are those of a trained model.

    A split may lack some of the classes. carve: whether a missing split is carved from train, as `open_dataset` does.
    That is right only for the data that the model was trained on. A source without splits is otherwise taken as the
    split that is asked for.

    Raises BadInput as `open_dataset` does, for a split that is not there, and for another class.
    """
    table = _table_of(readers.read(name, config, image, label, say), say)
    if carve:
        table = _with_three_splits(table, say)
    elif table.whole and list(splits) != ["train"]:
        say(f"{table.name}: it has no splits, so that all of its pictures are {splits[0]}")
        table = replace(table, splits={splits[0]: table.splits["train"]})
    say(f"{table.name}: {table.source}")
    number = {label: number for number, label in enumerate(classes)}
    chosen = {}
    for split in splits:
        if split not in table.splits:
            raise BadInput(f"--dataset {name} has no {split} split (it has: {', '.join(table.splits) or 'nothing'}); "
                           "choose another with --split, or add it")
        chosen[split] = table.splits[split]
        _check_labelled(table, split)
        for label in sorted({table.classes[label] for label in np.unique(table.labels[chosen[split]])} - set(number)):
            raise BadInput(f"--dataset {name}: {split} has {label!r}, which the model does not know; its classes: "
                           f"{first_names(classes)}")
    renumbered = np.array([*(number.get(label, NO_LABEL) for label in table.classes), NO_LABEL])
    labels = renumbered[np.where(table.labels == NO_LABEL, len(table.classes), table.labels)]
    return replace(table, classes=classes, labels=labels, splits=chosen)


def hub_id(name: str) -> str | None:
    """The Hub's id of what `open_dataset(name)` opens; None for the drawn leaves and for local folders."""
    return None if name == "leaves" or Path(name).expanduser().exists() else readers.ALIASES.get(name, name)


def _with_unlabelled(table: Table, source: str, say: Say) -> Table:
    try:
        more = readers.read_unlabelled(source, say)
    except BadInput as error:
        raise BadInput(str(error).replace("--dataset", "--unlabelled", 1)) from error
    count = len(table.labels)

    def of_row(own: Callable, theirs: Callable) -> Callable:
        return lambda row: own(row) if row < count else theirs(row - count)

    return replace(
        table, labels=np.concatenate([table.labels, np.full(len(more.labels), NO_LABEL)]),
        splits={**table.splits, "unlabelled": np.arange(count, count + len(more.labels))},
        read=of_row(table.read, more.read), name_of=of_row(table.name_of, more.name_of),
        key_of=of_row(table.key_of, more.key_of), location=f"{table.location} + {more.location}",
        fingerprint=f"{table.fingerprint} + {more.fingerprint}")


# ---- numbers of classes and names of splits ----------------------------------------------------------------------

def _table_of(rows: Rows, say: Say) -> Table:
    """The rows with classes as numbers, and with their splits under the names of SPLITS."""
    splits, left_out = _rows_by_split(rows)
    if left_out:
        say(f"{rows.name}: left out: {first_names(left_out)} (no name of a split)")
    of_train, of_all = ({label for row in numbers if (label := rows.labels[row])} for numbers in
                        (splits.get("train", []), [row for numbers in splits.values() for row in numbers]))
    # Names that only other splits have come last, so that they can be named. Whole numbers count as numbers.
    as_numbers = all(map(str.isdecimal, of_all))
    classes = rows.classes or tuple(label for names in (of_train, of_all - of_train) for label in
                                    sorted(names, key=lambda name: (int(name) if as_numbers else 0, name)))
    number = {label: number for number, label in enumerate(classes)}
    labels = np.array([number[label] if label in number else NO_LABEL for label in rows.labels], np.int64)
    return Table(rows.name, classes, labels,
                 {split: np.array(numbers, np.int64) for split, numbers in splits.items()}, rows.read, rows.name_of,
                 rows.key_of, rows.location, rows.fingerprint, rows.source, whole=set(rows.splits) == {None})


def _rows_by_split(rows: Rows) -> tuple[dict[str, list[int]], list[str]]:
    """The rows of each split in SPLITS, and the names of the source's splits that are left out.

    The only split of a source is train, whatever it is called. Raises BadInput for two splits that mean the same, and
    where a column of splits has a row that names none: it may be meant for test.
    """
    numbers: dict[str | None, list[int]] = {}
    for row, name in enumerate(rows.splits):
        numbers.setdefault(name, []).append(row)
    if not numbers:
        return {}, []
    if len(numbers) == 1 and not split_called(next(iter(numbers))):
        return {"train": next(iter(numbers.values()))}, []
    splits: dict[str, list[int]] = {}
    original: dict[str, str] = {}
    for name, found in numbers.items():
        split = split_called(name)
        if split is None and rows.split_column:
            raise BadInput(f"{rows.name_of(found[0])}: its {rows.split_column} is {name!r}, which names no split "
                           f"({len(found):,} such); write train, validation or test, or remove the row")
        if split in original:
            raise BadInput(f"--dataset {rows.name} has both {original[split]} and {name}; keep one of them")
        if split:
            splits[split], original[split] = found, str(name)
    left_out = [str(name) for name in numbers if name not in original.values()]
    if not splits:
        raise BadInput(f"--dataset {rows.name} has no split called train, validation or test (found: "
                       f"{first_names(left_out)})")
    return {split: splits[split] for split in SPLITS if split in splits}, left_out


# ---- checks, and carving -------------------------------------------------------------------------------------------

def _with_three_splits(table: Table, say: Say) -> Table:
    """The same table with train, validation and test, all labelled with classes that train has.

    A split without any label counts as missing. Raises BadInput for labels that cannot be used.
    """
    name, folded = table.name, [label.casefold() for label in table.classes]
    for label, same in zip(table.classes, folded):
        if folded.count(same) > 1:
            say(f"{name}: {label!r} and another class differ in capital letters only; rename them if that is wrong")
            break
    splits = {}
    for split, rows in table.splits.items():
        if (table.labels[rows] == NO_LABEL).all():
            say(f"{name}: its {split} split has no labels; treated as missing")
        else:
            _check_labelled(table, split)
            splits[split] = rows
    if "train" not in splits:
        reason = "its train split holds no labelled picture" if "train" in table.splits else (
            f"it has no train split (found: {', '.join(table.splits) or 'nothing'})")
        raise BadInput(f"--dataset {name}: {reason}")
    known = set(table.labels[splits["train"]].tolist())
    if len(known) < 2:
        raise BadInput(f"--dataset {name}: train holds one class only ({table.classes[known.pop()]}); at least two are "
                       "needed")
    for split, rows in splits.items():
        if unknown := sorted(set(table.labels[rows].tolist()) - known):
            raise BadInput(f"--dataset {name}: {split} has {table.classes[unknown[0]]!r}, which train lacks; add it to "
                           "train, or remove it")

    carved = tuple(split for split in ("test", "validation") if split not in splits)
    for split in carved:
        chosen = _carve(table, splits["train"], split)
        splits[split], splits["train"] = splits["train"][chosen], splits["train"][~chosen]
        say(f"{name}: no {split} split; {len(splits[split]):,} images carved from train ({100 * CARVED:.0f} % of each "
            "class, the same ones for every --seed)")
    return replace(table, splits={split: splits[split] for split in SPLITS}, carved=carved)


def _check_labelled(table: Table, split: str) -> None:
    """Raise BadInput that names the first picture without a label."""
    missing = table.splits[split][table.labels[table.splits[split]] == NO_LABEL]
    if len(missing):
        raise BadInput(f"{table.name_of(int(missing[0]))}: no label ({len(missing):,} such in {split}); label or "
                       "remove it")


def _carve(table: Table, train: np.ndarray, split: str) -> np.ndarray:
    """Which of the rows of train become the new split, bool: a share CARVED of each class, at least one picture.

    At least one picture of each class stays, so that a class of one is in train only. A picture's turn is a hash of its
    key. So the choice is the same for every seed and on every machine, and pictures that are added later do not move
    the others much.
    """
    carved, labels = np.zeros(len(train), bool), table.labels[train]
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) > 1:
            turns = [hashlib.sha256(f"{split} {table.key_of(int(train[place]))}".encode()).digest()
                     for place in places]
            order = sorted(range(len(places)), key=turns.__getitem__)
            carved[places[order[:max(1, round(CARVED * len(places)))]]] = True
    if not carved.any():
        raise BadInput(f"--dataset {table.name}: no {split} split, and too few pictures for one: a class needs two, or "
                       f"three where validation and test are missing; add pictures or {split}")
    return carved
