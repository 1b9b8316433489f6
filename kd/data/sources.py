"""Opening a dataset by its name: the drawn leaves, a Hub dataset, a local copy of one, or a folder of pictures.

Nothing in a dataset is executed. Parquet, Arrow and image files are read; loading scripts and
pickles are not. No path may lead out of the dataset's own folder.
"""

import difflib
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd import DISK_FULL, BadInput, TrainingFault, one_line
from kd.data import leaves
from kd.data.samples import (Dataset, Samples, files_fingerprint, is_image_folder, open_image_folder,
                             rename_splits, stay_inside)
from kd.data.splits import with_three_splits
from kd.machine import hub

ALIASES = {"beans": "AI-Lab-Makerere/beans"}
LABEL_NAMES = ("label", "labels", "class", "category", "target")
SAFE_READERS = ("parquet", "arrow", "imagefolder", "cache")     # of those that `datasets` has

Say = Callable[[str], None]


def open_dataset(name: str, seed: int = 0, say: Say = print) -> Dataset:
    """Open `leaves`, a Hub id (or the alias `beans`), a folder in the Hub's layout, or a folder of pictures.

    The dataset has the splits train, validation and test; every label is a class that train has. A
    missing split is carved from train, which is all that `seed` decides.

    Raises BadInput where the dataset cannot be found, reached or used; TrainingFault for a full disk.
    """
    folder = Path(name).expanduser()
    with _errors_in_one_line(name):
        if name == "leaves":
            dataset = _open_leaves()
        elif not folder.exists():
            dataset = _open_from_hub(name, say)
        elif not folder.is_dir():
            raise BadInput(f"--dataset {name} is a file; give the folder that holds the dataset")
        elif is_image_folder(folder):
            dataset = open_image_folder(folder)
        elif any(next(folder.rglob(pattern), None) for pattern in ("*.parquet", "*.arrow")):
            dataset = _open_hub_layout(folder)
        else:
            raise BadInput(f"--dataset {name}: no images; it needs train/CLASS/ folders of pictures (and "
                           "validation, test), or Parquet files as on the Hub")
    return with_three_splits(dataset, seed, say)


def hub_id(name: str) -> str | None:
    """The Hub's id of what `open_dataset(name)` opens; None for the drawn leaves and for local folders."""
    return None if name == "leaves" or Path(name).expanduser().exists() else ALIASES.get(name, name)


@contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turn whatever the file system, `datasets` and its libraries raise into a BadInput or a TrainingFault."""
    try:
        yield
    except (BadInput, TrainingFault):
        raise
    except ImportError as error:
        raise BadInput(f"--dataset {name} needs a package that is missing ({error}); pip install datasets, "
                       "or use --dataset leaves") from error
    except Exception as error:
        if getattr(error, "errno", None) in DISK_FULL or "disk space" in str(error):
            raise TrainingFault(f"--dataset {name}: the disk is full or failing ({one_line(error)}); free some "
                                "space, or set HF_HOME to another disk") from error
        cause = error.__cause__ or error    # the outer one may only say that "an error occurred"
        raise BadInput(f"--dataset {name} cannot be read: {one_line(cause)}") from error


# The drawn leaves

def _open_leaves() -> Dataset:
    """The seed of the drawing is 0, whatever the run's: the leaves are one dataset."""
    fingerprint = hashlib.sha256(Path(leaves.__file__).read_bytes()).hexdigest()

    def split(name: str, size: int) -> Samples:
        return Samples(np.arange(size) % len(leaves.CLASSES), lambda index: leaves.draw(name, index)[0],
                       lambda index: f"leaves {name} {index}", f"leaves {name}", fingerprint)

    return Dataset("leaves", leaves.CLASSES, {name: split(name, size) for name, size in leaves.SIZES.items()})


# A local copy of a Hub dataset

def _open_hub_layout(root: Path) -> Dataset:
    inside = os.path.realpath(root)
    _check_card(root)
    builder = _load_builder(inside)
    files = {split: list(map(Path, paths)) for split, paths in _data_files(builder).items()}
    for path in (path for paths in files.values() for path in paths):
        stay_inside(inside, path)
    files = rename_splits(str(root), files)
    dataset = _from_tables(str(root), _load_tables(builder), inside)
    return Dataset(root.resolve().name, dataset.classes, {
        split: replace(samples, location=f"{inside} {split}", fingerprint=files_fingerprint(inside, files[split]))
        for split, samples in dataset.splits.items()})


def _check_card(root: Path) -> None:
    """Refuse a dataset card whose `data_files` lead out of the folder, before `datasets` follows them."""
    import yaml
    for path in (root / "README.md", root / ".huggingface.yaml"):
        if not path.is_file():
            continue
        stay_inside(os.path.realpath(root), path)
        text = path.read_text("utf-8", "replace")
        if path.name == "README.md":    # the card is the block between the first two lines of `---`
            text = text.removeprefix("---").split("\n---", 1)[0] if text.startswith("---") else ""
        try:
            card = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"{path}: its YAML cannot be read ({one_line(error)})") from error
        for pattern in _strings(card.get("configs"), set()) if isinstance(card, dict) else ():
            if "://" in pattern or "::" in pattern or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
                raise BadInput(f"{path}: {pattern!r} leads out of the dataset's folder; refused")


def _strings(value: Any, visited: set[int]) -> Iterator[str]:
    """All text in nested lists and dictionaries. A node that YAML aliases repeat is visited once."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)) and id(value) not in visited:
        visited.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, visited)


# The Hub

def _open_from_hub(name: str, say: Say) -> Dataset:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip("/"):
        raise BadInput(f"--dataset {name}: no such folder{_did_you_mean(name)}")
    if name not in ALIASES and difflib.get_close_matches(name, ["leaves", *ALIASES]):
        raise BadInput(f"--dataset {name} is unknown{_did_you_mean(name)}; choose leaves, beans, a Hub id or a folder")

    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError
    repository, online = ALIASES.get(name, name), hub.reachable()
    if not online:
        datasets.config.HF_HUB_OFFLINE = True   # it then looks into its cache at once, without retries
    try:
        builder = _load_builder(repository)
    except DataFilesNotFoundError:
        raise
    except DatasetNotFoundError as error:
        raise BadInput(f"--dataset {name} is neither a folder here nor a dataset on the Hub that can be read "
                       f"without logging in{_did_you_mean(name)}; choose leaves, beans, a Hub id or a folder"
                       ) from error
    except (ConnectionError, TimeoutError, FileNotFoundError, HfHubHTTPError) as error:
        raise BadInput(f"--dataset {name}: the Hub cannot be reached, and neither a folder here nor its cache holds "
                       f"that dataset{_did_you_mean(name)}; offline, use `python train.py --dataset leaves` or the "
                       "folder of a local copy") from error
    if not online:
        say(f"{name}: the Hub cannot be reached; using the copy in its cache")

    for path in (path for paths in _data_files(builder).values() for path in paths):
        if not path.startswith("hf://datasets/"):
            raise BadInput(f"--dataset {name} points to {path}, which is not on the Hub; refused")
    dataset = _from_tables(name, _load_tables(builder), os.path.realpath(datasets.config.HF_CACHE_HOME))
    return replace(dataset, name=repository)


def _did_you_mean(name: str) -> str:
    """For a message about an unknown name: similar names of datasets, and of folders beside it."""
    similar = difflib.get_close_matches(name, ["leaves", *ALIASES, *ALIASES.values()])
    parent = Path(name).expanduser().parent
    if parent.is_dir():
        folders = {path.name: str(parent / path.name) for path in parent.iterdir() if path.is_dir()}
        similar += [folders[other] for other in difflib.get_close_matches(Path(name).name, folders)]
    return f" (did you mean {' or '.join(similar)}?)" if similar and name not in similar else ""


# What `datasets` reads: a table per split

def _load_builder(path: str) -> Any:
    """The first step of `datasets.load_dataset`. It tells which files will be read, and by which reader."""
    import datasets
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it also logs, over many lines, what it raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(path)
    reader = type(builder).__module__.split(".")[-1]
    if reader not in SAFE_READERS:
        raise BadInput(f"--dataset {path} holds {reader} files; only Parquet, Arrow and image files are read")
    return builder


def _data_files(builder: Any) -> dict[str, list[str]]:
    """Paths by split; empty where the dataset comes from the cache."""
    return builder.config.data_files or {}


def _load_tables(builder: Any) -> dict[str, Any]:
    """The other two steps of `datasets.load_dataset`: a memory-mapped table per split."""
    builder.download_and_prepare()
    return builder.as_dataset()


def _from_tables(name: str, tables: dict[str, Any], inside: str) -> Dataset:
    """Find the image column and the label column. Image files are read only from the folder `inside`."""
    import datasets
    tables = rename_splits(name, tables)
    features = tables["train"].features
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise BadInput(f"--dataset {name} has no column of type Image; its columns: {columns}")
    label = _label_column(name, features, columns)
    values = {split: table.select_columns([label])[:][label] for split, table in tables.items()}
    classes, labels = _encode_labels(features[label], values)
    return Dataset(name, classes, {
        split: _samples_from_table(name, split, table, images[0], labels[split], inside)
        for split, table in tables.items()})


def _label_column(name: str, features: dict[str, Any], columns: str) -> str:
    """The ClassLabel; else the column of text or whole numbers that is called label or is the only one."""
    import datasets
    typed = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [column for column, feature in features.items() if isinstance(feature, datasets.Value)
             and feature.dtype.startswith(("string", "large_string", "int", "uint"))]
    candidates = typed or plain
    named = [column for column in candidates if column.lower() in LABEL_NAMES]
    if len(named or candidates) != 1:
        raise BadInput(f"--dataset {name}: which column is the label? It has to be the only ClassLabel, or "
                       f"text or whole numbers called label; its columns: {columns}")
    return (named or candidates)[0]


def _encode_labels(feature: Any, values: dict[str, list]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Values of the label column, by split → names of classes, and (N,) int64 by split; -1: no label."""
    if hasattr(feature, "names"):
        names, number_of = feature.names, {None: -1}
    else:
        distinct = {split: set(column) - {None, -1} for split, column in values.items()}
        # Names that only other splits have come last, so that kd/data/splits.py can name them.
        names = sorted(distinct["train"])
        names += sorted(set().union(*distinct.values()) - distinct["train"])
        number_of = {value: number for number, value in enumerate(names)} | {None: -1, -1: -1}
    return tuple(map(str, names)), {split: np.array([number_of.get(value, value) for value in column], np.int64)
                                    for split, column in values.items()}


def _samples_from_table(name: str, split: str, table: Any, column: str, labels: np.ndarray,
                        inside: str) -> Samples:
    import datasets
    rows = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def name_of(index: int) -> str:
        path = (rows[index][column] or {}).get("path")
        return f"{name} {split} row {index}" + (f" ({path})" if path else "")

    def read(index: int) -> bytes:
        image = rows[index][column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            raise BadInput(f"{name} {split} row {index} has no image; restore or remove it")
        stay_inside(inside, image["path"])      # a table may name any file of this machine
        return Path(image["path"]).read_bytes()

    return Samples(labels, read, name_of, f"{name} {split}", table._fingerprint)
