"""Three splits for every dataset: labels are checked, and a missing split is carved from train."""

import hashlib
from collections.abc import Callable

import numpy as np

from kd import BadInput
from kd.data.samples import SPLITS, Dataset, Samples

CARVED = .1     # the share of each class of train that becomes a missing split

Say = Callable[[str], None]


def with_three_splits(dataset: Dataset, seed: int, say: Say) -> Dataset:
    """The same dataset with train, validation and test, all labelled with classes that train has.

    A split without any label counts as missing. `say` is told of what is missing and of what is
    carved. Raises BadInput for labels that cannot be used.
    """
    name, classes = dataset.name, dataset.classes
    splits = {}
    for split, samples in dataset.splits.items():
        if (samples.labels < 0).all():
            if len(samples):
                say(f"{name}: its {split} split has no labels; treated as missing")
        else:
            _check_range(split, samples, classes)
            splits[split] = samples
    if "train" not in splits:
        raise BadInput(f"--dataset {name}: its train split holds no labelled image")
    _check_classes(name, classes, splits)

    for split in ("test", "validation"):
        if split not in splits:
            splits["train"], splits[split] = _carve(name, splits["train"], split, seed)
            say(f"{name}: no {split} split; {len(splits[split])} images carved from train "
                f"(stratified, seed {seed})")
    return Dataset(name, classes, {split: splits[split] for split in SPLITS})


def _check_range(split: str, samples: Samples, classes: tuple[str, ...]) -> None:
    """Raise BadInput that names the first sample whose label is not the number of a class."""
    invalid = np.flatnonzero((samples.labels < 0) | (samples.labels >= len(classes)))
    if len(invalid):
        first = int(invalid[0])
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
            raise BadInput(f"--dataset {name}: {split} has {classes[unknown[0]]!r}, which train lacks; "
                           "add it to train, or remove it")


def _carve(name: str, train: Samples, split: str, seed: int) -> tuple[Samples, Samples]:
    """What stays in train, and the new split: a share CARVED of each class, at least one image.

    At least one image of each class stays. The choice depends only on (seed, split, class).
    """
    carved = np.zeros(len(train), bool)
    for label in np.unique(train.labels):
        rows = np.flatnonzero(train.labels == label)
        if len(rows) < 2:
            raise BadInput(f"--dataset {name}: no {split} split, and too few images for one: "
                           f"{train.name_of(int(rows[0]))} is alone in its class; add images or {split}")
        rng = np.random.default_rng([abs(seed), list(SPLITS).index(split), int(label)])
        carved[rng.permutation(rows)[:max(1, round(CARVED * len(rows)))]] = True

    def subset(rows: np.ndarray, title: str) -> Samples:
        return Samples(train.labels[rows], lambda index: train.read(int(rows[index])),
                       lambda index: train.name_of(int(rows[index])), f"{train.location} {title} {seed}",
                       hashlib.sha256(train.fingerprint.encode() + rows.tobytes()).hexdigest())

    return subset(np.flatnonzero(~carved), f"without {split}"), subset(np.flatnonzero(carved), split)
