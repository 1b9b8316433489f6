"""Three splits for every dataset: labels are checked, and a missing split is carved from train."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from kd import BadInput
from kd.data.samples import SPLITS, Dataset, Samples, Say, first_names

CARVED = .1     # the share of each class of train that becomes a missing split


def with_three_splits(dataset: Dataset, say: Say) -> Dataset:
    """The same dataset with train, validation and test, all labelled with classes that train has.

    A split without any label counts as missing. `say` is told of what is missing and of what is
    carved. Raises BadInput for labels that cannot be used.
    """
    name, classes = dataset.name, dataset.classes
    for alike in _look_alikes(classes):
        say(f"{name}: {' and '.join(map(repr, alike))} are different classes; rename them if that is wrong")
    splits = {}
    for split, samples in dataset.splits.items():
        if (samples.labels < 0).all():
            if len(samples):
                say(f"{name}: its {split} split has no labels; treated as missing")
        else:
            _check_range(split, samples, classes)
            splits[split] = samples
    if "train" in dataset.splits and "train" not in splits:
        raise BadInput(f"--dataset {name}: its train split holds no labelled image")
    if "train" not in splits:
        raise BadInput(f"--dataset {name} has no train split (found: {', '.join(dataset.splits) or 'nothing'})")
    _check_classes(name, classes, splits)

    carved = tuple(split for split in ("test", "validation") if split not in splits)
    for split in carved:
        splits["train"], splits[split] = _carve(name, splits["train"], split)
        say(f"{name}: no {split} split; {len(splits[split]):,} images carved from train ({100 * CARVED:.0f} % of each "
            "class, the same ones for every --seed)")
    return replace(dataset, splits={split: splits[split] for split in SPLITS}, carved=carved)


def numbered_as(classes: tuple[str, ...], dataset: Dataset) -> Dataset:
    """The same samples, their labels numbered by `classes`, which are those of a trained model.

    Raises BadInput for a sample without a label, and for one of another class.
    """
    number_of = {label: number for number, label in enumerate(classes)}
    splits = {}
    for split, samples in dataset.splits.items():
        _check_range(split, samples, dataset.classes)
        present = [dataset.classes[number] for number in np.unique(samples.labels)]
        if unknown := [label for label in present if label not in number_of]:
            raise BadInput(f"--dataset {dataset.name}: {split} has {unknown[0]!r}, which the model does not know"
                           f"{_look_alike(unknown[0], classes)}; its classes: {first_names(classes)}")
        number = np.array([number_of.get(label, -1) for label in dataset.classes])
        splits[split] = replace(samples, labels=number[samples.labels])
    return replace(dataset, classes=classes, splits=splits)


# Which pictures a split has

def split_digest(samples: Samples, classes: tuple[str, ...]) -> str:
    """A hash (hex) of the samples' keys and the names of their classes, whatever their order and place on disk."""
    names = (*classes, "")      # -1, no label, is the last one
    lines = sorted(f"{samples.key_of(index)}\0{names[label]}" for index, label in enumerate(samples.labels))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record(dataset: Dataset) -> dict[str, Any]:
    """What config.json keeps of the data that a run was trained on; ready for JSON."""
    splits = {split: {"pictures": len(samples), "carved": split in dataset.carved,
                      "digest": split_digest(samples, dataset.classes)}
              for split, samples in dataset.splits.items()}
    return {"name": dataset.name, "source": dataset.source, "classes": list(dataset.classes), "splits": splits}


# Checks

def _check_range(split: str, samples: Samples, classes: tuple[str, ...]) -> None:
    """Raise BadInput that names the first sample whose label is not the number of a class."""
    invalid = np.flatnonzero((samples.labels < 0) | (samples.labels >= len(classes)))
    if len(invalid):
        first = int(invalid[0])
        if samples.labels[first] < 0:
            raise BadInput(f"{samples.name_of(first)}: no label ({len(invalid)} such in {split}; -1 and empty cells "
                           "count as none, and NA and None too in a CSV file); label or remove it")
        raise BadInput(f"{samples.name_of(first)}: label {samples.labels[first]} is outside of "
                       f"0…{len(classes) - 1} ({len(invalid)} such in {split}); label or remove it")


def _check_classes(name: str, classes: tuple[str, ...], splits: dict[str, Samples]) -> None:
    """Raise BadInput where train has fewer than two classes, or another split has one that train lacks."""
    train_labels = set(splits["train"].labels.tolist())
    if len(train_labels) < 2:
        raise BadInput(f"--dataset {name}: train holds one class only ({classes[train_labels.pop()]}); "
                       "at least two are needed")
    for split, samples in splits.items():
        if unknown := sorted(set(samples.labels.tolist()) - train_labels):
            known = tuple(classes[label] for label in sorted(train_labels))
            raise BadInput(f"--dataset {name}: {split} has {classes[unknown[0]]!r}, which train lacks"
                           f"{_look_alike(classes[unknown[0]], known)}; add it to train, or remove it")


def _look_alike(name: str, others: tuple[str, ...]) -> str:
    """A class that differs only in case or in spaces around it, in brackets; else nothing."""
    similar = [other for other in others if _plain(other) == _plain(name)]
    return f" (it has {similar[0]!r}: if that is the same class, rename one)" if similar else ""


def _look_alikes(classes: tuple[str, ...]) -> list[list[str]]:
    """Groups of classes that differ only in case or in spaces around them."""
    groups: dict[str, list[str]] = {}
    for label in classes:
        groups.setdefault(_plain(label), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _plain(name: str) -> str:
    return name.casefold().strip()


# Carving

def _carve(name: str, train: Samples, split: str) -> tuple[Samples, Samples]:
    """What stays in train, and the new split: a share CARVED of each class, at least one image.

    At least one image of each class stays, so that a class of one image is in train only. Each
    image's turn is a hash of its key. So the choice is the same for every seed and on every
    machine, and images that are added later do not move the others much.
    """
    carved = np.zeros(len(train), bool)
    for label in np.unique(train.labels):
        rows = np.flatnonzero(train.labels == label)
        if len(rows) > 1:
            turns = [hashlib.sha256(f"{split} {train.key_of(int(row))}".encode()).digest() for row in rows]
            order = sorted(range(len(rows)), key=turns.__getitem__)
            carved[rows[order[:max(1, round(CARVED * len(rows)))]]] = True
    if not carved.any():
        raise BadInput(f"--dataset {name}: no {split} split, and too few images for one: a class needs two, or "
                       f"three where validation and test are missing; add images or {split}")

    def subset(rows: np.ndarray, title: str) -> Samples:
        return Samples(train.labels[rows], lambda index: train.read(int(rows[index])),
                       lambda index: train.name_of(int(rows[index])), lambda index: train.key_of(int(rows[index])),
                       f"{train.location} {title}",
                       hashlib.sha256(train.fingerprint.encode() + rows.tobytes()).hexdigest())

    return subset(np.flatnonzero(~carved), f"without {split}"), subset(np.flatnonzero(carved), split)
