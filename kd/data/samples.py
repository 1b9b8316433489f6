"""What a sample and a dataset are, and folders of pictures.

Pictures stay encoded here. `kd/data/sources.py` opens a dataset by its name, `kd/data/splits.py`
checks its labels and adds missing splits, and `kd/data/frames.py` decodes the pictures.
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

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
JUNK = ("Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Samples:
    """One split: the labels, and how to get each picture. Several threads may read at once."""

    labels: np.ndarray                              # (N,) int64; -1: no label
    read: Callable[[int], bytes | Image.Image]      # encoded bytes, or an RGB picture that was never encoded
    name_of: Callable[[int], str]                   # for messages: a sample's path, or its row in a table
    location: str                                   # of the split; stays the same when its content changes
    fingerprint: str                                # changes with the content and its order

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]      # by the keys of SPLITS


def rename_splits(name: str, splits: dict[str, Any]) -> dict[str, Any]:
    """Rename val, valid and dev to validation, and drop all other splits.

    Raises BadInput, which names the dataset, for two splits that mean the same and where train is
    absent.
    """
    renamed = {}
    for split, aliases in SPLITS.items():
        present = [alias for alias in aliases if alias in splits]
        if len(present) > 1:
            raise BadInput(f"--dataset {name} has both {present[0]} and {present[1]}; keep one of them")
        if present:
            renamed[split] = splits[present[0]]
    if "train" not in renamed:
        raise BadInput(f"--dataset {name} has no train split (found: {', '.join(splits) or 'nothing'})")
    return renamed


# Folders of pictures

def is_image_folder(root: Path) -> bool:
    return (root / "train").is_dir() and any(path.is_dir() for path in _visible(root / "train"))


def open_image_folder(root: Path) -> Dataset:
    """Open SPLIT/CLASS/**, where every visible file is a sample, whatever its extension. Raises BadInput."""
    inside = os.path.realpath(root)
    files: dict[str, dict[str, list[Path]]] = {}    # by split, then by class
    for split, folder in rename_splits(str(root), {path.name: path for path in _visible(root)}).items():
        stay_inside(inside, folder)
        files[split] = {path.name: list(_files(inside, path)) for path in _visible(folder) if path.is_dir()}
    if empty := [name for name, paths in files["train"].items() if not paths]:
        raise BadInput(f"--dataset {root}: no images in {root / 'train' / empty[0]}; add some, or remove it")

    # Classes that only other splits have get a number as well, so that kd/data/splits.py can name them.
    classes = list(files["train"])
    classes += sorted(set().union(*files.values()) - set(classes))
    splits = {}
    for split, by_class in files.items():
        labels = [classes.index(name) for name, paths in by_class.items() for _ in paths]
        split_files = [path for paths in by_class.values() for path in paths]
        if split_files:
            splits[split] = _samples_from_files(inside, split, split_files, np.array(labels, np.int64))
    return Dataset(root.resolve().name, tuple(classes), splits)


def _samples_from_files(root: str, split: str, files: list[Path], labels: np.ndarray) -> Samples:
    return Samples(labels, lambda index: files[index].read_bytes(), lambda index: str(files[index]),
                   f"{root} {split}", files_fingerprint(root, files))


def files_fingerprint(root: str, files: list[Path]) -> str:
    """A hash of the files' paths below `root`, sizes and times of modification."""
    sha = hashlib.sha256()
    for path in files:
        status = path.stat()
        sha.update(os.fsencode(os.path.relpath(os.path.realpath(path), root)))
        sha.update(b"\0%d\0%d\n" % (status.st_size, status.st_mtime_ns))
    return sha.hexdigest()


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name not in JUNK)


def _files(root: str, folder: Path) -> Iterator[Path]:
    """All visible files in `folder` and below, each checked to lie inside of `root`."""
    stay_inside(root, folder)
    for path in _visible(folder):
        stay_inside(root, path)
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():   # a link to a folder could lead in a circle
            yield from _files(root, path)
        else:
            raise BadInput(f"{path} is neither a file nor a folder; remove it")


def stay_inside(root: str, path: Path | str) -> None:
    """Raise BadInput where `path`, all links resolved, lies outside of `root`, a resolved path."""
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise BadInput(f"{path} leads out of the dataset's folder {root}; put a copy there instead")
