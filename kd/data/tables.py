"""Tables of pictures and labels, as `datasets` reads them: which column is which, and the samples.

`datasets` is a library that reads nearly anything, and some of its readers run code. Only those
that read Parquet, Arrow and image files are used.
"""

import csv
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kd import BadInput
from kd.data.samples import (Dataset, Links, Reading, Samples, files_fingerprint, first_names, printable,
                             rename_splits, split_called)

SAFE_READERS = ("parquet", "arrow", "imagefolder", "cache")     # of those that `datasets` has
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels")
LIKE_LABELS = ("class", "category", "target")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")   # the names that `datasets` looks for


# Reading

@contextmanager
def _muted() -> Iterator[None]:
    """`datasets` without its log, and without bars where nobody watches. Afterwards it is as it was. Also a decorator.

    It logs, over many lines, the errors that it raises.
    """
    import datasets
    log = datasets.utils.logging
    verbosity, had_bars = log.get_verbosity(), not datasets.are_progress_bars_disabled()
    log.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


@_muted()
def load_builder(name: str, path: str, config: str = "", **files: Any) -> Any:
    """The first step of `datasets.load_dataset`. It tells which files will be read, and by which reader.

    Raises BadInput for a reader that is not safe, and where the dataset has several configurations
    and `config` names none of them.
    """
    import datasets
    try:
        builder = datasets.load_dataset_builder(path, config or None, **files)
    except ValueError as error:
        if "onfig" not in str(error):       # "Config name is missing", "BuilderConfig 'x' not found"
            raise
        configs = datasets.get_dataset_config_names(path)
        problem = f"has no configuration {config!r}" if config else "has several configurations"
        raise BadInput(f"--dataset {name} {problem}; choose one with --config: {', '.join(configs)}") from error
    reader = type(builder).__module__.split(".")[-1]
    if reader not in SAFE_READERS:
        raise BadInput(f"--dataset {name} holds {reader} files; only Parquet, Arrow and image files are read")
    return builder


def data_files(builder: Any) -> dict[str, list[str]]:
    """Paths by split; empty where the dataset comes from the cache."""
    return builder.config.data_files or {}


@_muted()
def load_tables(builder: Any) -> dict[str, Any]:
    """The other two steps of `datasets.load_dataset`: a memory-mapped table per split."""
    builder.download_and_prepare()
    return builder.as_dataset()


def metadata_columns(path: Path) -> list[str]:
    """The names of the columns of a metadata table, of which only the beginning is read."""
    if path.suffix == ".parquet":
        import pyarrow.parquet
        return pyarrow.parquet.read_schema(path).names
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return next(csv.reader(file), [])
        return list(json.loads(file.readline() or "{}"))


def check_metadata(path: Path) -> None:
    """Raise BadInput for a metadata table without the column `file_name`, without rows, or in another encoding."""
    try:
        columns = metadata_columns(path)
        if path.suffix == ".csv" and len(path.read_text("utf-8-sig").splitlines()) < 2:
            raise BadInput(f"{path}: has no rows; it needs one for each picture")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8; save it as UTF-8") from error
    if not any(column.endswith(("file_name", "file_names")) for column in columns):
        raise BadInput(f"{path}: has no column file_name; its columns: {', '.join(columns)} (they are separated by "
                       "commas, and capital letters matter)")


# Columns

def from_tables(name: str, tables: dict[str, Any], reading: Reading, links: Links) -> Dataset:
    """The samples of a table per split. Image files are read only where `links` allows it.

    Raises BadInput where the column of the pictures or that of the labels cannot be told.
    """
    left_out: list[str] = []
    if reading.labelled:
        tables = _by_split(tables, links.roots[0])
        tables, left_out = rename_splits(name, tables)
    if not tables:
        raise BadInput(f"--dataset {name} has no split called train, validation or test (found: "
                       f"{first_names(left_out)})")
    features = next(iter(tables.values())).features
    columns = ", ".join(f"{column} ({_type_name(feature)})" for column, feature in features.items())
    image = _image_column(name, features, columns, reading.image)
    if not reading.labelled:
        return Dataset(name, (), {
            str(split): _samples_from_table(name, str(split), table, image, np.full(len(table), -1), links)
            for split, table in tables.items()}, f"images from column {image}")
    label = _label_column(name, {key: value for key, value in features.items() if key != image}, columns, reading.label)

    values = {split: _values(name, table, label) for split, table in tables.items()}
    classes, labels = _encode_labels(features[label], values)
    source = f"images from column {image}, labels from column {label} ({_type_name(features[label])})"
    if reading.config:
        source += f" of configuration {reading.config}"
    if left_out:
        source += f"; left out: {first_names(left_out)} (no name of a split)"
    return Dataset(name, classes, {
        split: _samples_from_table(name, split, table, image, labels[split], links)
        for split, table in tables.items()}, source)


def _by_split(tables: dict[str, Any], root: str) -> dict[str, Any]:
    """The only table as one for each split, if its column `split` tells them, or the folders of its pictures do."""
    if len(tables) != 1:
        return tables
    table = next(iter(tables.values()))
    names: list[str] = []
    if "split" in table.column_names:
        names = [str(value) for value in table.select_columns(["split"])[:]["split"]]
        table = table.remove_columns(["split"])
    elif table.info.builder_name == "imagefolder":
        import datasets
        rows = table.cast_column("image", datasets.Image(decode=False)).select_columns(["image"])
        names = [os.path.relpath(row["image"]["path"], root).split(os.sep)[0] for row in rows]
    if not names or not all(map(split_called, names)):
        return tables
    return {name: table.select(np.flatnonzero(np.array(names) == name)) for name in dict.fromkeys(names)}


def _type_name(feature: Any) -> str:
    """`ClassLabel`, `Image`, `string`, `List`, …"""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _image_column(name: str, features: dict[str, Any], columns: str, given: str) -> str:
    """The given column; else the only one that can hold pictures, or the one that is called image."""
    candidates = [column for column, feature in features.items() if _may_hold_images(feature)]
    if given:
        if given not in candidates:
            raise BadInput(f"--image {given}: not a column of pictures of {name}; its columns: {columns}")
        return given
    if not candidates:
        raise BadInput(f"--dataset {name} has no column of type Image; its columns: {columns}")
    named = [column for column in candidates if column.lower() in IMAGE_NAMES]
    if len(candidates) > 1 and len(named) != 1:
        raise BadInput(f"--dataset {name}: which column has the pictures? Choose with --image: {', '.join(candidates)}")
    return (named or candidates)[0]


def _may_hold_images(feature: Any) -> bool:
    """An Image; or encoded bytes, with or without a path, as pandas, polars and pyarrow write them."""
    import datasets
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    is_bytes = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    return is_bytes or isinstance(feature, datasets.Image)


def _label_column(name: str, features: dict[str, Any], columns: str, given: str) -> str:
    """The given column; else the one that is called label, or the only one that can hold classes.

    A ClassLabel, or a column with the name of a class, is preferred to plain text and numbers, which
    may also be identifiers, ages and the like.
    """
    import datasets
    plain = [column for column, feature in features.items() if isinstance(feature, datasets.Value)
             and feature.dtype.startswith(("string", "large_string", "int", "uint", "bool", "float"))]
    typed = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if given:
        if given not in plain + typed:
            raise BadInput(f"--label {given}: not a column of classes, text or numbers of {name}; its columns: "
                           f"{columns}")
        return given

    for candidates in ([column for column in features if column.lower() == "label"],
                       [column for column in features if column.lower() in LABEL_NAMES],
                       [*typed, *(column for column in plain if column.lower() in LIKE_LABELS)],
                       [column for column in plain if not features[column].dtype.startswith("float")]):
        if len(candidates) == 1 and candidates[0] in plain + typed:
            return candidates[0]
        if candidates:
            break
    raise BadInput(f"--dataset {name}: which column is the label? Choose with --label; its columns: {columns}")


# Values

def _values(name: str, table: Any, label: str) -> list[Any]:
    """The column as text, whole numbers or None for no label. Raises BadInput for numbers with fractions."""
    values = table.select_columns([label])[:][label]
    if table.features[label].dtype.startswith("float"):
        # pandas stores whole numbers as floats where one is missing, and the missing one as NaN
        whole = [None if value is None or value != value else value for value in values]
        if any(value is not None and value % 1 for value in whole):
            raise BadInput(f"--label {label}: {name} has numbers with fractions there; a class is text or a whole "
                           "number")
        return [None if value is None else int(value) for value in whole]
    return [None if value == "" else value for value in values]


def _encode_labels(feature: Any, values: dict[str, list]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Values of the label column, by split → names of classes, and (N,) int64 by split; -1: no label."""
    if hasattr(feature, "names"):
        names, number_of = feature.names, {None: -1}
    else:
        distinct = {split: set(column) - {None, -1} for split, column in values.items()}
        # Names that only other splits have come last, so that kd/data/splits.py can name them.
        train = distinct.get("train", set())
        names = sorted(train)
        names += sorted(set().union(*distinct.values()) - train)
        number_of = {value: number for number, value in enumerate(names)} | {None: -1, -1: -1}
    return (tuple(printable(str(name)) for name in names),
            {split: np.array([number_of.get(value, value) for value in column], np.int64)
             for split, column in values.items()})


def _fingerprint(table: Any) -> str:
    """What `datasets` hashes of a table and of how it was made. That is private, so its files may stand for it."""
    files = [Path(file["filename"]) for file in table.cache_files]
    return getattr(table, "_fingerprint", "") or files_fingerprint("/", files)


def _samples_from_table(name: str, split: str, table: Any, column: str, labels: np.ndarray,
                        links: Links) -> Samples:
    import datasets
    rows = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def name_of(index: int) -> str:
        path = (rows[index][column] or {}).get("path")
        return f"{name} {split} row {index}" + (f" ({printable(path)})" if path else "")

    def read(index: int) -> bytes:
        image = rows[index][column] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            raise BadInput(f"{name} {split} row {index} has no image; restore or remove it")
        links.check(image["path"])      # a table may name any file of this machine
        return Path(image["path"]).read_bytes()

    # Another column has other pictures.
    return Samples(labels, read, name_of, lambda index: f"row {index}", f"{name} {split} {column}",
                   f"{_fingerprint(table)} {column}")
