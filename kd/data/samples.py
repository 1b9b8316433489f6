"""What a sample is, and the sources that need no library: the built-in leaves and folders of pictures.

A source gives one `Samples` per split that it has; `kd/data/sources.py` checks them and carves what is missing.
Pictures stay encoded: `kd/data/frames.py` decodes them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd import BadInput
from kd.data import leaves

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
JUNK = ("Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Samples:
    """One split: the labels, and how to get each picture. Reading from several threads is safe."""

    labels: np.ndarray  # (N,) int64
    read: Callable[[int], bytes | Image.Image]  # encoded bytes, or an RGB picture that never was encoded
    where: Callable[[int], str]  # the sample's name, for messages
    place: str  # where the split lies: stays the same when its content changes
    identity: str  # changes with the content and its order

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]  # by the keys of SPLITS


def by_split(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Rename val, valid and dev to validation, and leave other splits out."""
    splits = {}
    for split, names in SPLITS.items():
        present = [other for other in names if other in found]
        if len(present) > 1:
            raise BadInput(f"--dataset {name} has both {present[0]} and {present[1]}; keep one of them")
        if present:
            splits[split] = found[present[0]]
    if "train" not in splits:
        raise BadInput(f"--dataset {name} has no train split (found: {', '.join(found) or 'nothing'})")
    return splits


def built_in() -> Dataset:
    """The drawing's own seed stays 0 whatever the run's: the leaves are one data set."""
    drawn_by = hashlib.sha256(Path(leaves.__file__).read_bytes()).hexdigest()

    def split(name: str, size: int) -> Samples:
        return Samples(np.arange(size) % len(leaves.CLASSES), lambda index: leaves.draw(name, index)[0],
                       lambda index: f"leaves {name} {index}", f"leaves {name}", drawn_by)

    return Dataset("leaves", leaves.CLASSES, {name: split(name, size) for name, size in leaves.SIZES.items()})


def is_image_folder(root: Path) -> bool:
    return (root / "train").is_dir() and any(path.is_dir() for path in _listing(root / "train"))


def image_folder(root: Path) -> Dataset:
    """SPLIT/CLASS/**: every visible file is a sample, whatever its name ends in. Raises BadInput."""
    inside = os.path.realpath(root)
    found = {}
    for split, folder in by_split(str(root), {path.name: path for path in _listing(root)}).items():
        stay_inside(inside, folder)
        found[split] = {path.name: list(_files(inside, path)) for path in _listing(folder) if path.is_dir()}
    if empty := [name for name, files in found["train"].items() if not files]:
        raise BadInput(f"--dataset {root}: no images in {root / 'train' / empty[0]}; add some, or remove it")
    classes = list(found["train"])
    classes += sorted(set().union(*found.values()) - set(classes))  # to be refused
    splits = {}
    for split, per_class in found.items():
        labels = [classes.index(name) for name, files in per_class.items() for _ in files]
        paths = [path for files in per_class.values() for path in files]
        if paths:
            splits[split] = _samples_from_files(inside, split, paths, np.array(labels, np.int64))
    return Dataset(root.resolve().name, tuple(classes), splits)


def _samples_from_files(root: str, split: str, files: list[Path], labels: np.ndarray) -> Samples:
    return Samples(labels, lambda index: files[index].read_bytes(), lambda index: str(files[index]),
                   f"{root} {split}", files_identity(root, files))


def files_identity(root: str, files: list[Path]) -> str:
    sha = hashlib.sha256()
    for path in files:
        status = path.stat()
        sha.update(os.fsencode(os.path.relpath(os.path.realpath(path), root)))
        sha.update(b"\0%d\0%d\n" % (status.st_size, status.st_mtime_ns))
    return sha.hexdigest()


def _listing(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name not in JUNK)


def _files(root: str, folder: Path) -> Iterator[Path]:
    stay_inside(root, folder)
    for path in _listing(folder):
        stay_inside(root, path)
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():  # a link to a folder might run in a circle
            yield from _files(root, path)
        else:
            raise BadInput(f"{path} is neither a file nor a folder; remove it")


def stay_inside(root: str, path: Path | str) -> None:
    """Raise BadInput where `path`, all links resolved, lies outside of `root`, a resolved path."""
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise BadInput(f"{path} leads out of the dataset's folder {root}; put a copy there instead")
