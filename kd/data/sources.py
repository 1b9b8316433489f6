"""Opening a dataset by its name: the drawn leaves, a Hub dataset, a local copy of one, or a folder of pictures.

Nothing in a dataset is executed. Parquet, Arrow and image files are read; loading scripts and
pickles are not. No path may lead out of the dataset's own folder, unless `--follow-links` allows it.
"""

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd import DISK_FULL, BadInput, TrainingFault, one_line
from kd.data import leaves, tables
from kd.data.decoding import is_lfs_pointer
from kd.data.samples import (Dataset, Links, Reading, Samples, Say, files_fingerprint, first_names, folder_layout,
                             is_junk, joined, links_of, open_image_folder, open_pictures, printable, rename_splits,
                             split_called, visible)
from kd.data.splits import numbered_as, with_three_splits
from kd.machine import hub
from kd.machine.files import code_digest

ALIASES = {"beans": "AI-Lab-Makerere/beans"}


def open_dataset(name: str, reading: Reading = Reading(), say: Say = print) -> Dataset:
    """Open `leaves`, a Hub id (or the alias `beans`), a folder in the Hub's layout, or a folder of pictures.

    The dataset has the splits train, validation and test; every label is a class that train has. A
    missing split is carved from train. `say` is told of what was read, left out and carved.

    Raises BadInput where the dataset cannot be found, reached or used; TrainingFault for a full disk.
    """
    dataset = with_three_splits(_open(name, reading, say), say)
    if dataset.source:
        say(f"{dataset.name}: {dataset.source}; classes {first_names(dataset.classes)}")
    return dataset


def open_splits(name: str, splits: Sequence[str], classes: tuple[str, ...], reading: Reading = Reading(),
                carve: bool = False, say: Say = print) -> Dataset:
    """Open only these splits, their labels numbered by `classes`, which are those of a trained model.

    A split may lack some of the classes. carve: whether a missing split is carved from train, as
    `open_dataset` does. That is right only for the dataset that the model was trained on. A source
    without splits is otherwise taken as the split that is asked for.

    Raises BadInput as `open_dataset` does, for a split that is not there, and for another class.
    """
    dataset = _open(name, reading, say)
    if carve:
        dataset = with_three_splits(dataset, say)
    elif dataset.whole and list(splits) != ["train"]:
        say(f"{dataset.name}: it has no splits, so that all of its pictures are {splits[0]}")
        dataset = replace(dataset, splits={splits[0]: dataset.splits["train"]}, source="")
    if dataset.source:
        say(f"{dataset.name}: {dataset.source}")
    for split in splits:
        if split not in dataset.splits:
            raise BadInput(f"--dataset {name} has no {split} split (it has: {', '.join(dataset.splits) or 'nothing'}); "
                           "choose another with --split, or add it")
    return numbered_as(classes, replace(dataset, splits={split: dataset.splits[split] for split in splits}))


def with_unlabelled(dataset: Dataset, source: str, follow_links: bool = False, say: Say = print) -> Dataset:
    """The same dataset with a fourth split, `unlabelled`: all pictures of another source, its labels ignored.

    source: a folder of pictures at any depth, or whatever `open_dataset` opens. Raises BadInput where it
    cannot be read or holds no picture.
    """
    folder, reading = Path(source).expanduser(), Reading(follow_links=follow_links, labelled=False)
    try:
        if folder.is_dir() and not _has_tables(folder):
            with _errors_in_one_line(source):
                samples = open_pictures(folder, follow_links, say)
        else:
            parts = _open(source, reading, say).splits.values()
            samples = joined([replace(part, labels=np.full(len(part), -1)) for part in parts])
    except BadInput as error:
        raise BadInput(str(error).replace("--dataset", "--unlabelled", 1)) from error
    if not len(samples):
        raise BadInput(f"--unlabelled {source}: holds no picture")
    return replace(dataset, splits={**dataset.splits, "unlabelled": samples})


def hub_id(name: str) -> str | None:
    """The Hub's id of what `open_dataset(name)` opens; None for the drawn leaves and for local folders."""
    return None if name == "leaves" or Path(name).expanduser().exists() else ALIASES.get(name, name)


def _open(name: str, reading: Reading, say: Say) -> Dataset:
    """The dataset with the splits that its source has."""
    if not name.strip():
        raise BadInput("--dataset is empty; give leaves, beans, a Hub id or a folder")
    folder = Path(name).expanduser()
    with _errors_in_one_line(name):
        if name == "leaves":
            return _open_leaves()
        if not folder.exists():
            return _open_from_hub(name, reading, say)
        if not folder.is_dir():
            raise BadInput(f"--dataset {name} is a file; give the folder that holds the dataset")
        return _open_folder(name, folder, reading, say)


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
    fingerprint = code_digest(leaves)

    def split(name: str, size: int) -> Samples:
        return Samples(np.arange(size) % len(leaves.CLASSES), lambda index: leaves.draw(name, index)[0],
                       lambda index: f"leaves {name} {index}", lambda index: f"{name} {index}", f"leaves {name}",
                       fingerprint)

    return Dataset("leaves", leaves.CLASSES, {name: split(name, size) for name, size in leaves.SIZES.items()})


# A folder

def _open_folder(name: str, root: Path, reading: Reading, say: Say) -> Dataset:
    """Whatever layout it has. A choice of columns or of a configuration asks for tables."""
    layout, metadata = folder_layout(root), _metadata_tables(root)
    asks_for_tables = bool(reading.config or reading.image or reading.label)

    if metadata and not reading.config and (layout is None or reading.label or _has_label_column(metadata)):
        return _open_pictures_with_metadata(root, metadata, reading, say)
    if layout and not layout.whole and not asks_for_tables:
        if metadata:
            say(f"{root.name}: {metadata[0].name} has no column called label; the class folders are read")
        return open_image_folder(root, layout, reading.follow_links, say)
    # After the class folders: looking for tables visits every file.
    if _has_tables(root):
        return _open_hub_layout(root, reading)
    if layout and not asks_for_tables:
        return open_image_folder(root, layout, reading.follow_links, say)
    if layout:
        raise BadInput(f"--dataset {name} has class folders and no tables; leave out --config, --image and --label")
    # A name without a slash may have been meant for the Hub's dataset.
    hidden = f"; this is the folder {root.resolve()}, which hides any dataset of the Hub that has its name"
    raise BadInput(f"--dataset {name}: no images in a layout that can be read (found: {_found(root)}); it needs "
                   "train/CLASS/ or CLASS/ folders of pictures, or pictures with a metadata.csv, or Parquet files as "
                   f"on the Hub{hidden if Path(name).name == name else ''}")


def _table_files(root: Path) -> Iterator[Path]:
    """The Parquet and Arrow files below a folder. Looking for them visits every file."""
    for pattern in ("*.parquet", "*.arrow"):
        yield from root.rglob(pattern)


def _has_tables(root: Path) -> bool:
    return next(_table_files(root), None) is not None


def _found(root: Path) -> str:
    """What lies in a folder that cannot be read, by ending: `8 .jpg, 1 .csv`."""
    endings: Counter[str] = Counter()
    for _, _, names in os.walk(root):
        endings.update(Path(name).suffix.lower() or "files without ending" for name in names if not is_junk(name))
    return first_names([f"{count:,} {ending}" for ending, count in endings.most_common()]) or "nothing"


# Pictures beside a table of their labels

def _metadata_tables(root: Path) -> list[Path]:
    """The metadata tables of the root, else those of its split folders."""
    folders = [path for path in visible(root) if path.is_dir() and split_called(path.name)]
    for places in ([root], folders):
        found = [folder / table for folder in places for table in tables.METADATA if (folder / table).is_file()]
        if found:
            return found
    return []


def _has_label_column(metadata: list[Path]) -> bool:
    return any(column.lower() in tables.LABEL_NAMES for column in tables.metadata_columns(metadata[0]))


def _open_pictures_with_metadata(root: Path, metadata: list[Path], reading: Reading, say: Say) -> Dataset:
    """The layout of https://huggingface.co/docs/datasets/image_dataset, read by `datasets` itself."""
    links, table = links_of(root, reading.follow_links), metadata[0].name
    for path in metadata:
        links.check(path)
        tables.check_metadata(path)
    if metadata[0].parent == root:
        builder = tables.load_builder(str(root), "imagefolder", data_files={
            "train": f"{glob.escape(os.path.realpath(root))}/**"})
    else:
        folders, _ = rename_splits(str(root), {path.parent.name: path.parent for path in metadata})
        builder = tables.load_builder(str(root), "imagefolder", data_files={
            split: f"{glob.escape(os.path.realpath(folder))}/**" for split, folder in folders.items()})
    dataset = _from_local_tables(root, builder, reading, links)

    pictures = sum(Path(path).suffix.lower() in Image.registered_extensions() and not is_junk(Path(path).name)
                   for paths in tables.data_files(builder).values() for path in paths)
    rows = sum(map(len, dataset.splits.values()))
    if pictures > rows:
        say(f"{dataset.name}: {pictures:,} pictures and {rows:,} rows in {table}; pictures without a row are left out")
    return replace(dataset, source=f"{table}: {dataset.source}")


# A local copy of a Hub dataset

def _open_hub_layout(root: Path, reading: Reading) -> Dataset:
    links = links_of(root, reading.follow_links)
    files = list(_table_files(root))
    for path in files:
        links.check(path)
        if path.is_file():
            _refuse_lfs_pointer(path)
    _refuse_missing_shards(files)
    _check_card(root, links)
    if glob.has_magic(os.path.realpath(root)):
        # `datasets` would look for it as a pattern, and might read the files of another folder
        raise BadInput(f"--dataset {root}: its path {os.path.realpath(root)} has one of the characters * ? [, with "
                       "which Parquet files cannot be read; rename the folder")
    builder = tables.load_builder(str(root), os.path.realpath(root), reading.config)
    return _from_local_tables(root, builder, reading, links)


def _refuse_missing_shards(files: Sequence[Path]) -> None:
    """A table may be several files, such as train-00000-of-00002.parquet; all of them must be there."""
    present: Counter[tuple[Path, str]] = Counter()
    for path in files:
        if match := re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\..*)", path.name):
            present[path.parent, f"{match[1]}*{match[2]}"] += 1
    for (folder, pattern), count in present.items():
        total = int(re.findall(r"-of-(\d{5})", pattern)[-1])
        if count < total:
            raise BadInput(f"{folder / pattern}: {count} of {total} files are there; get the others")


def _refuse_lfs_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        beginning = file.read(100)
    if is_lfs_pointer(beginning):
        raise BadInput(f"{path} is a Git LFS pointer, not the table; run git lfs pull")


def _from_local_tables(root: Path, builder: Any, reading: Reading, links: Links) -> Dataset:
    real = links.roots[0]
    files = {str(split): list(map(Path, paths)) for split, paths in tables.data_files(builder).items()}
    for path in (path for paths in files.values() for path in paths):
        links.check(path)
    if reading.labelled:
        files, _ = rename_splits(str(root), files)
    # archives are unpacked into the cache of `datasets`
    dataset = tables.from_tables(str(root), tables.load_tables(builder), reading,
                                 links._replace(roots=(*links.roots, *_cache_roots())))
    # A table that holds several splits depends, with all of them, on all files.
    everything = [path for paths in files.values() for path in paths]
    return Dataset(printable(root.resolve().name), dataset.classes, {
        split: replace(samples, location=f"{real} {split} {reading.image}".rstrip(),
                       fingerprint=f"{files_fingerprint(real, files.get(split, everything))} {reading.image}")
        for split, samples in dataset.splits.items()}, dataset.source)


def _cache_roots() -> tuple[str, ...]:
    """Where `datasets` and the Hub's client keep files. Each place can be moved by a variable of its own."""
    import datasets
    from huggingface_hub import constants
    config = datasets.config
    return tuple(os.path.realpath(path) for path in (
        config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH,
        config.EXTRACTED_DATASETS_PATH, constants.HF_HUB_CACHE))


def _check_card(root: Path, links: Links) -> None:
    """Refuse a dataset card whose `data_files` lead out of the folder, before `datasets` follows them."""
    import yaml
    for path in (root / "README.md", root / ".huggingface.yaml"):
        if not path.is_file():
            continue
        links.check(path)
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

def _open_from_hub(name: str, reading: Reading, say: Say) -> Dataset:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip("/"):
        raise BadInput(f"--dataset {name}: no such folder{_did_you_mean(name)}")
    if name not in ALIASES and "/" not in name and difflib.get_close_matches(name, ["leaves", *ALIASES]):
        raise BadInput(f"--dataset {name} is unknown{_did_you_mean(name)}; choose leaves, beans, a Hub id or a folder")

    # Before `reachable`, which switches it to its cache where the Hub cannot be reached.
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError
    repository, online = ALIASES.get(name, name), hub.reachable()
    try:
        builder = tables.load_builder(name, repository, reading.config)
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

    for path in (path for paths in tables.data_files(builder).values() for path in paths):
        if not path.startswith("hf://datasets/"):
            raise BadInput(f"--dataset {name} points to {path}, which is not on the Hub; refused")
    dataset = tables.from_tables(name, tables.load_tables(builder), reading, Links(_cache_roots()))
    return replace(dataset, name=repository)


def _did_you_mean(name: str) -> str:
    """For a message about an unknown name: similar names of datasets, and of folders beside it."""
    similar = difflib.get_close_matches(name, ["leaves", *ALIASES, *ALIASES.values()])
    parent = Path(name).expanduser().parent
    if parent.is_dir():
        folders = {path.name: str(parent / path.name) for path in parent.iterdir() if path.is_dir()}
        similar += [folders[other] for other in difflib.get_close_matches(Path(name).name, folders)]
    return f" (did you mean {' or '.join(similar)}?)" if similar and name not in similar else ""
