"""Where samples come from: the built-in leaves, a Hub dataset, a local copy of one, or a folder of pictures.

Whatever the source, a `Dataset` has the three splits train, validation and test, every label is a class that
train has, and a split that is missing has been carved from train.

Nothing in a dataset is executed: Parquet, Arrow and image files are read, loading scripts and pickles are
not, and no path may lead out of the dataset's own folder.
"""

import difflib
import errno
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

from kd import BadInput, TrainingFault
from kd.machine import hub
from kd.data.samples import (SPLITS, Dataset, Samples, built_in, by_split, files_identity, image_folder,
                             is_image_folder, stay_inside)

ALIASES = {"beans": "AI-Lab-Makerere/beans"}
CARVED = .1  # share of train that becomes a missing split
LABEL_NAMES = ("label", "labels", "class", "category", "target")
SAFE_READERS = ("parquet", "arrow", "imagefolder", "cache")  # of those that `datasets` has

Say = Callable[[str], None]


def open_dataset(name: str, seed: int = 0, say: Say = print) -> Dataset:
    """Open `leaves`, a Hub id (or the alias `beans`), a folder in the Hub's layout, or a folder of pictures.

    `seed` decides only which samples of train make up a split that is missing. Raises BadInput where the
    dataset cannot be found, reached or used.
    """
    folder = Path(name).expanduser()
    with _readable(name):
        if name == "leaves":
            found = built_in()
        elif not folder.exists():
            found = _from_hub(name, say)
        elif not folder.is_dir():
            raise BadInput(f"--dataset {name} is a file; give the folder that holds the dataset")
        elif is_image_folder(folder):
            found = image_folder(folder)
        elif any(next(folder.rglob(pattern), None) for pattern in ("*.parquet", "*.arrow")):
            found = _from_hub_layout(folder)
        else:
            raise BadInput(f"--dataset {name}: no images; it needs train/CLASS/ folders of pictures (and "
                           "validation, test), or Parquet files as on the Hub")
    return _with_three_splits(found, seed, say)


def hub_id(name: str) -> str | None:
    """The Hub's id of what `open_dataset(name)` opens; None for the drawn leaves and for what is on this machine."""
    return None if name == "leaves" or Path(name).expanduser().exists() else ALIASES.get(name, name)


# Splits

def _with_three_splits(found: Dataset, seed: int, say: Say) -> Dataset:
    """Check the labels, set unlabelled splits aside and carve what is missing from train."""
    name, classes = found.name, found.classes
    splits = {}
    for split, samples in found.splits.items():
        if (samples.labels < 0).all():
            if len(samples):
                say(f"{name}: its {split} split has no labels; treated as missing")
            continue
        bad = np.flatnonzero((samples.labels < 0) | (samples.labels >= len(classes)))
        if len(bad):
            raise BadInput(f"{samples.where(int(bad[0]))}: label {samples.labels[bad[0]]} is outside of "
                           f"0…{len(classes) - 1} ({len(bad)} such in {split}); label or remove it")
        splits[split] = samples
    if "train" not in splits:
        raise BadInput(f"--dataset {name}: its train split holds no labelled image")
    taught = set(splits["train"].labels.tolist())
    if len(taught) < 2:
        raise BadInput(f"--dataset {name}: train holds one class only ({classes[taught.pop()]}); "
                       "at least two are needed")
    for split, samples in splits.items():
        if untaught := sorted(set(samples.labels.tolist()) - taught):
            raise BadInput(f"--dataset {name}: {split} has {classes[untaught[0]]!r}, which train lacks; "
                           "add it to train, or remove it")
    for split in ("test", "validation"):
        if split not in splits:
            splits["train"], splits[split] = _carve(name, splits["train"], split, seed)
            say(f"{name}: no {split} split; {len(splits[split])} images carved from train "
                f"(stratified, seed {seed})")
    return Dataset(name, classes, {split: splits[split] for split in SPLITS})


def _carve(name: str, train: Samples, split: str, seed: int) -> tuple[Samples, Samples]:
    """Take CARVED of each class out of train, at least one image, and leave at least one."""
    taken = np.zeros(len(train), bool)
    for label in np.unique(train.labels):
        rows = np.flatnonzero(train.labels == label)
        if len(rows) < 2:
            raise BadInput(f"--dataset {name}: no {split} split, and too few images for one: "
                           f"{train.where(int(rows[0]))} is alone in its class; add images or {split}")
        rng = np.random.default_rng([abs(seed), list(SPLITS).index(split), int(label)])
        taken[rng.permutation(rows)[:max(1, round(CARVED * len(rows)))]] = True

    def part(rows: np.ndarray, title: str) -> Samples:
        return Samples(train.labels[rows], lambda index: train.read(int(rows[index])),
                       lambda index: train.where(int(rows[index])), f"{train.place} {title} {seed}",
                       hashlib.sha256(train.identity.encode() + rows.tobytes()).hexdigest())

    return part(np.flatnonzero(~taken), f"without {split}"), part(np.flatnonzero(taken), split)


# The Hub, and local copies of its datasets

def _from_hub_layout(root: Path) -> Dataset:
    inside = os.path.realpath(root)
    _check_card(root)
    builder = _builder(inside)
    files = {split: list(map(Path, paths)) for split, paths in _data_files(builder).items()}
    for path in (path for paths in files.values() for path in paths):
        stay_inside(inside, path)
    files = by_split(str(root), files)
    found = _from_tables(str(root), _tables(builder), inside)
    return Dataset(root.resolve().name, found.classes, {
        split: replace(samples, place=f"{inside} {split}", identity=files_identity(inside, files[split]))
        for split, samples in found.splits.items()})


def _from_hub(name: str, say: Say) -> Dataset:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip("/"):
        raise BadInput(f"--dataset {name}: no such folder{_near(name)}")
    if name not in ALIASES and difflib.get_close_matches(name, ["leaves", *ALIASES]):
        raise BadInput(f"--dataset {name} is unknown{_near(name)}; choose leaves, beans, a Hub id or a folder")
    import datasets
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError
    repository, online = ALIASES.get(name, name), hub.reachable()
    if not online:
        datasets.config.HF_HUB_OFFLINE = True  # it then looks into its cache, without more waiting
    try:
        builder = _builder(repository)
    except DataFilesNotFoundError:
        raise
    except DatasetNotFoundError as error:
        raise BadInput(f"--dataset {name} is neither a folder here nor a dataset on the Hub that can be read "
                       f"without logging in{_near(name)}; choose leaves, beans, a Hub id or a folder") from error
    except (ConnectionError, TimeoutError, FileNotFoundError, HfHubHTTPError) as error:
        raise BadInput(f"--dataset {name}: the Hub cannot be reached, and neither a folder here nor its cache holds "
                       f"that dataset{_near(name)}; offline, use `python train.py --dataset leaves` or the folder "
                       "of a local copy") from error
    if not online:
        say(f"{name}: the Hub cannot be reached; using the copy in its cache")
    for path in (path for paths in _data_files(builder).values() for path in paths):
        if not path.startswith("hf://datasets/"):
            raise BadInput(f"--dataset {name} points to {path}, which is not on the Hub; refused")
    found = _from_tables(name, _tables(builder), os.path.realpath(datasets.config.HF_CACHE_HOME))
    return replace(found, name=repository)


def _near(name: str) -> str:
    """For a message about a name that is unknown: the nearest known datasets, and folders beside it."""
    near = difflib.get_close_matches(name, ["leaves", *ALIASES, *ALIASES.values()])
    parent = Path(name).expanduser().parent
    if parent.is_dir():
        beside = {path.name: str(parent / path.name) for path in parent.iterdir() if path.is_dir()}
        near += [beside[other] for other in difflib.get_close_matches(Path(name).name, beside)]
    return f" (did you mean {' or '.join(near)}?)" if near and name not in near else ""


def _builder(path: str) -> Any:
    """The first step of `datasets.load_dataset`: it says which files will be read, and by what."""
    import datasets
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs, over many lines, what it also raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(path)
    reader = type(builder).__module__.split(".")[-1]
    if reader not in SAFE_READERS:
        raise BadInput(f"--dataset {path} holds {reader} files; only Parquet, Arrow and image files are read")
    return builder


def _data_files(builder: Any) -> dict[str, list[str]]:
    return builder.config.data_files or {}  # none where the dataset comes from the cache


def _tables(builder: Any) -> dict[str, Any]:
    """The other two steps of `datasets.load_dataset`: a memory-mapped table per split."""
    builder.download_and_prepare()
    return builder.as_dataset()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Make one line of whatever the file system, `datasets` and what lies under it raise."""
    try:
        yield
    except (BadInput, TrainingFault):
        raise
    except ImportError as error:
        raise BadInput(f"--dataset {name} needs a package that is missing ({error}); pip install datasets, "
                       "or use --dataset leaves") from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk space" in str(error):
            raise TrainingFault(f"--dataset {name}: the disk is full ({_one_line(error)}); free some, or "
                                "set HF_HOME to another disk") from error
        cause = error.__cause__ or error  # the outer one may only say that "an error occurred"
        raise BadInput(f"--dataset {name} cannot be read: {_one_line(cause)}") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else text[:199] + "…") or type(error).__name__


def _from_tables(name: str, tables: dict[str, Any], inside: str) -> Dataset:
    """Find the image and the label column. Image files are read only from the folder `inside`."""
    import datasets
    tables = by_split(name, tables)
    features = tables["train"].features
    columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise BadInput(f"--dataset {name} has no column of type Image; its columns: {columns}")
    label = _label_column(name, features, columns)
    values = {split: table.select_columns([label])[:][label] for split, table in tables.items()}
    classes, labels = _encode(features[label], values)
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


def _encode(feature: Any, values: dict[str, list]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Values of the label column → class names, and (N,) int64 per split in which -1 says "no label"."""
    if hasattr(feature, "names"):
        names, code = feature.names, {None: -1}
    else:
        known = {split: set(column) - {None, -1} for split, column in values.items()}
        names = sorted(known["train"])
        names += sorted(set().union(*known.values()) - known["train"])  # to be refused
        code = {value: number for number, value in enumerate(names)} | {None: -1, -1: -1}
    return tuple(map(str, names)), {split: np.array([code.get(value, value) for value in column], np.int64)
                                    for split, column in values.items()}


def _samples_from_table(name: str, split: str, table: Any, column: str, labels: np.ndarray,
                        inside: str) -> Samples:
    import datasets
    rows = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def where(index: int) -> str:
        path = (rows[index][column] or {}).get("path")
        return f"{name} {split} row {index}" + (f" ({path})" if path else "")

    def read(index: int) -> bytes:
        image = rows[index][column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            raise BadInput(f"{name} {split} row {index} has no image; restore or remove it")
        stay_inside(inside, image["path"])  # a table may name any file of this machine
        return Path(image["path"]).read_bytes()

    return Samples(labels, read, where, f"{name} {split}", table._fingerprint)


def _check_card(root: Path) -> None:
    """Refuse a card whose `data_files` lead out of the folder, before `datasets` follows them."""
    import yaml
    for path in (root / "README.md", root / ".huggingface.yaml"):
        if not path.is_file():
            continue
        stay_inside(os.path.realpath(root), path)
        text = path.read_text("utf-8", "replace")
        if path.name == "README.md":
            text = text.removeprefix("---").split("\n---", 1)[0] if text.startswith("---") else ""
        try:
            card = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"{path}: its YAML cannot be read ({_one_line(error)})") from error
        for named in _strings(card.get("configs"), set()) if isinstance(card, dict) else ():
            if "://" in named or "::" in named or named.startswith(("/", "~")) or ".." in Path(named).parts:
                raise BadInput(f"{path}: {named!r} leads out of the dataset's folder; refused")


def _strings(value: Any, seen: set[int]) -> Iterator[str]:
    """All text in nested lists and dictionaries; a node that YAML aliases repeat is visited once."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, seen)
