"""Readers of data sets: the drawn leaves, folders of pictures, tables beside pictures, Parquet, the Hub.

Each gives `Rows`. Cells are text, as the file has them, without blanks around them. Nothing in a data set is executed:
Parquet, Arrow and image files are read; loading scripts and pickles are not.
"""

import csv
import glob
import hashlib
import json
import logging
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from kd import DISK_FULL, BadInput, TrainingFault, one_line
from kd.data import leaves
from kd.data.decoding import is_lfs_pointer
from kd.machine import hub
from kd.machine.files import code_digest

ALIASES = {"beans": "AI-Lab-Makerere/beans"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels")
LIKE_LABELS = ("class", "category", "target")
SAFE_READERS = ("parquet", "arrow", "imagefolder", "cache")     # of those that `datasets` has

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """What a reader gives: a row for each picture."""

    name: str                               # of the data set
    source: str                             # one line: which folders, columns and configuration were read
    labels: list[str | None]
    splits: list[str | None]
    read: Callable[[int], bytes | Image.Image]      # encoded bytes, or a picture that was never encoded
    name_of: Callable[[int], str]           # for messages
    key_of: Callable[[int], str]            # the same wherever the data lie
    location: str
    fingerprint: str
    classes: tuple[str, ...] = ()           # in the source's own order, where it has one
    split_column: str = ""                  # the column that has the splits, where each row names its own


def read(name: str, config: str, image: str, label: str, say: Say) -> Rows:
    """The rows of what --dataset names. Raises BadInput, and TrainingFault for a full disk."""
    if not name.strip():
        raise BadInput("--dataset is empty; give leaves, beans, a Hub id or a folder")
    folder = Path(name).expanduser()
    with _errors_in_one_line(name):
        if name == "leaves":
            return _leaves()
        if not folder.exists():
            return _from_hub(name, config, image, label)
        if not folder.is_dir():
            raise BadInput(f"--dataset {name} is a file; give the folder that holds the data set")
        return _from_folder(name, folder, config, image, label, say)


def read_unlabelled(name: str, say: Say) -> Rows:
    """The pictures of a folder, at any depth, or of whatever `read` reads. Labels and splits are ignored."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or _tables_below(folder):
        rows = read(name, "", "", "", say)
    else:
        with _errors_in_one_line(name):
            files, texts = _pictures_below(folder)
            _say_left_out(texts, folder.name, say)
            rows = _of_files(folder, files, [None] * len(files), [None] * len(files), "pictures")
    if not rows.labels:
        raise BadInput(f"--dataset {name}: holds no picture")
    return replace(rows, labels=[None] * len(rows.labels))


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


# ---- names ------------------------------------------------------------------------------------------------------

# The names that people, archives and libraries give to the splits. Case, and what joins the words, do not matter.
SPLIT_NAMES = {"train": ("train", "training"),
               "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
               "test": ("test", "testing")}


def split_called(name: str | None) -> str | None:
    """The split that is meant by a name, such as test for `Testing` or `test_set`; else None."""
    word = "".join(filter(str.isalnum, str(name).lower())).removesuffix("set")
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def printable(name: str) -> str:
    """`name` as text that every terminal and file can hold, in Unicode's normal form C.

    A byte that is not UTF-8 becomes `\\xe9`, and a control character an escape as well. macOS stores letters with
    accents in form D, other systems in form C.
    """
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def first_names(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c`, or the first ones and a count."""
    more = f", … {len(names):,} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# What is no picture: names, in lower case, of what operating systems, archives, storage boxes and notebooks leave
# behind. What begins with a dot is left out as well: .DS_Store, ._x.jpg, .ipynb_checkpoints, .Trash-1000.
JUNK = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information",
        "__macosx", "icon\r", "picasa.ini", "lost+found", "__pycache__",
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"}
# What people and archives put beside pictures.
TEXTS = {".csv", ".html", ".json", ".jsonl", ".md", ".pdf", ".txt", ".xml", ".yaml", ".yml"}


# ---- the drawn leaves -------------------------------------------------------------------------------------------

def _leaves() -> Rows:
    """The seed of the drawing is 0, whatever the run's: the leaves are one data set."""
    places = [(split, index) for split, size in leaves.SIZES.items() for index in range(size)]
    return Rows("leaves", "drawn", [leaves.CLASSES[index % len(leaves.CLASSES)] for _, index in places],
                [split for split, _ in places], lambda row: leaves.draw(*places[row])[0],
                lambda row: "leaves {} {}".format(*places[row]), lambda row: "{} {}".format(*places[row]), "leaves",
                code_digest(leaves), leaves.CLASSES)


# ---- files ------------------------------------------------------------------------------------------------------

class File(NamedTuple):
    """A file, and what tells its content: size, and times of the last change of content and of place, in ns."""

    path: str
    stamp: tuple[int, int, int]


def visible(folder: Path | str) -> list[os.DirEntry]:
    """What lies in a folder, sorted by name, without what programs leave behind."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith((".", "~$"))
                       and entry.name.lower() not in JUNK), key=lambda entry: entry.name)


def _files_below(folder: Path | str) -> Iterator[File]:
    """All visible files in a folder and below, sorted; links are followed. Raises BadInput for a link in a circle."""
    for entry in visible(folder):
        if entry.is_dir():
            if entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(entry.path)):
                raise BadInput(f"{printable(entry.path)} is a link in a circle; remove it")
            yield from _files_below(entry.path)
        elif entry.is_file():
            yield _stamped(entry.path, entry.stat())
        else:
            raise BadInput(f"{printable(entry.path)} is neither a file nor a folder; remove it")


def _stamped(path: str, status: os.stat_result) -> File:
    return File(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns))


def _pictures_below(folder: Path | str) -> tuple[list[File], list[str]]:
    """All files below a folder, but for those whose names say that they are texts; and these."""
    files: list[File] = []
    texts: list[str] = []
    for file in _files_below(folder):
        stem, ending = os.path.splitext(os.path.basename(file.path))
        if ending.lower() in TEXTS or stem.upper() in ("LICENSE", "LICENCE"):
            texts.append(stem + ending)
        else:
            files.append(file)
    return files, texts


def _say_left_out(texts: list[str], place: str, say: Say) -> None:
    if texts:
        say(f"{printable(place)}: left out: {len(texts):,} files that are no pictures "
            f"({first_names([printable(text) for text in texts], 3)})")


def _of_files(root: Path, files: list[File], labels: Sequence[str | None], splits: Sequence[str | None], source: str,
              split_column: str = "") -> Rows:
    """Rows of picture files below a folder."""
    start = len(os.path.join(root, ""))
    sha = hashlib.sha256()
    for file in files:
        sha.update(os.fsencode(file.path[start:]) + b"\0%d\0%d\0%d\n" % file.stamp)
    return Rows(printable(root.resolve().name), source, list(labels), list(splits),
                lambda row: Path(files[row].path).read_bytes(), lambda row: printable(files[row].path),
                lambda row: printable(files[row].path[start:]), os.path.realpath(root), sha.hexdigest(),
                split_column=split_column)


# ---- a folder: class folders, a table beside pictures, or Parquet ------------------------------------------------

def _from_folder(name: str, root: Path, config: str, image: str, label: str, say: Say) -> Rows:
    """Whatever layout it has. A choice of columns or of a configuration asks for tables."""
    top, splits = _layout(root)
    metadata = [] if config else _metadata_tables(root)
    if metadata and (label or splits is None or any(column.lower() in LABEL_NAMES for column in
                                                    _read_metadata(metadata[0])[0])):
        return _from_metadata(root, metadata, image, label, say)
    if splits and splits != {"": top} and not (config or image or label):
        return _from_class_folders(root, splits, say)
    # After the folders of splits: looking for tables visits every file.
    if tables := _tables_below(root):
        return _from_tables(root, tables, config, image, label)
    if splits and not (config or image or label):
        return _from_class_folders(root, splits, say)
    if splits:
        raise BadInput(f"--dataset {name} has class folders and no tables; leave out --config, --image and --label")
    found = Counter(os.path.splitext(file.path)[1].lower() or "files without ending" for file in _files_below(root))
    # A name without a slash may have been meant for the Hub's data set.
    hidden = f"; this is the folder {root.resolve()}, which hides any data set of the Hub that has its name"
    raise BadInput(f"--dataset {name}: no pictures in a layout that can be read (found: "
                   f"{first_names([f'{count:,} {ending}' for ending, count in found.most_common()]) or 'nothing'}); it "
                   "needs train/CLASS/ or CLASS/ folders of pictures, or pictures with a metadata.csv, or Parquet "
                   f"files as on the Hub{hidden if Path(name).name == name else ''}")


def _layout(root: Path) -> tuple[Path, dict[str, Path] | None]:
    """Where the class folders lie: {split: folder}, {"": root} without splits, or None; and the root of it all.

    An archive often holds one folder, which holds the rest.
    """
    folders = {entry.name: Path(entry.path) for entry in visible(root) if entry.is_dir()}
    while len(folders) == 1 and not split_called(next(iter(folders))):
        root, = folders.values()
        folders = {entry.name: Path(entry.path) for entry in visible(root) if entry.is_dir()}
    splits = {name: folder for name, folder in folders.items() if split_called(name)}
    if any(entry.is_dir() for folder in splits.values() for entry in visible(folder)):
        order = [*SPLIT_NAMES, None]
        return root, dict(sorted(folders.items(), key=lambda item: order.index(split_called(item[0]))))
    for folder in folders.values():
        below = [entry.name for entry in visible(folder) if entry.is_dir() and split_called(entry.name)]
        if len(below) > 1:
            raise BadInput(f"{printable(str(folder))} holds {' and '.join(below)}; splits come before classes: "
                           "train/CLASS/, test/CLASS/")
    if len(folders) > 1 and len(splits) < len(folders) and all(re.search("train|valid|test", name.lower())
                                                               for name in folders):
        raise BadInput(f"{printable(str(root))}: {first_names(list(map(printable, folders)))} look like splits; rename "
                       "them to train, validation and test")
    # Such as color/CLASS/ beside grayscale/CLASS/: the classes are one level deeper.
    inner = [{entry.name for entry in visible(folder) if entry.is_dir()} for folder in folders.values()]
    if len(inner) > 1 and len(inner[0]) > 1 and all(names == inner[0] for names in inner):
        raise BadInput(f"{printable(str(root))}: {first_names(list(map(printable, folders)))} hold the same folders; "
                       f"give one of them, such as {printable(str(next(iter(folders.values()))))}")
    # A class may also be called train, as among vehicles. Two others tell it from a split of loose pictures.
    if len(folders) - len(splits) > 1 and any(next(_files_below(folder), None) for folder in folders.values()):
        return root, {"": root}
    return root, None


def _from_class_folders(root: Path, splits: dict[str, Path], say: Say) -> Rows:
    """SPLIT/CLASS/** or CLASS/**: every visible file that is no text is a picture, whatever its ending."""
    name = printable(root.resolve().name)
    files: list[File] = []
    labels: list[str | None] = []
    of_split: list[str | None] = []
    if left_out := [printable(split) for split in splits if split and not split_called(split)]:
        say(f"{name}: left out: {first_names(left_out)} (no name of a split)")
    for split, folder in splits.items():
        if split and not split_called(split):
            continue
        by_class: dict[str, list[File]] = {}
        loose, below, texts = [], [], []
        for entry in visible(folder):
            if not entry.is_dir():
                if os.path.splitext(entry.name)[1].lower() in Image.registered_extensions():
                    loose.append(printable(entry.name))     # and not a README
                continue
            pictures, beside = _pictures_below(entry.path)
            texts += beside
            # One name may have two spellings, in Unicode's forms C and D. They are one class.
            by_class.setdefault(printable(entry.name), []).extend(pictures)
            below += [printable(f"{entry.name}/{inner.name}") for inner in visible(entry.path) if inner.is_dir()]
        for label in sorted(by_class):
            files += by_class[label]
            labels += [label] * len(by_class[label])
            of_split += [split or None] * len(by_class[label])
        place = printable(folder.name)
        if empty := [label for label, pictures in by_class.items() if not pictures]:
            say(f"{name}: folders of {place} without a picture, which are no class: {first_names(empty)}")
        if below:
            say(f"{name}: folders in a class of {place} belong to that class: {first_names(below, 3)}")
        if loose:
            say(f"{name}: left out: {len(loose):,} pictures of {place} in no class folder ({first_names(loose, 3)})")
        _say_left_out(texts, f"{name}/{place}", say)
    places = ", ".join(f"{split_called(split)} from {printable(split)}" for split in splits if split_called(split))
    return _of_files(root, files, labels, of_split, f"class folders; {places or 'all pictures are train'}")


# ---- pictures beside a table ------------------------------------------------------------------------------------

def _metadata_tables(root: Path) -> list[Path]:
    """The metadata tables of the root, else those of its split folders."""
    folders = [Path(entry.path) for entry in visible(root) if entry.is_dir() and split_called(entry.name)]
    for places in ([root], folders):
        if found := [folder / table for folder in places for table in METADATA if (folder / table).is_file()]:
            return found
    return []


def _read_metadata(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns of a metadata table, and its rows. Raises BadInput where it cannot be used."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            table = pyarrow.parquet.read_table(path)
            columns, rows = table.column_names, table.to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            columns = list(dict.fromkeys(column for row in rows for column in row))
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                columns = [column.strip() for column in reader.fieldnames or ()]
                rows = [dict(zip(columns, row.values())) for row in reader]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not in UTF-8; save it as UTF-8") from error
    if "file_name" not in columns:
        raise BadInput(f"{path}: has no column file_name; its columns: {', '.join(columns)} (they are separated by "
                       "commas, and capital letters matter)")
    if not rows:
        raise BadInput(f"{path}: has no rows; it needs one for each picture")
    return columns, rows


def _from_metadata(root: Path, tables: list[Path], image: str, label: str, say: Say) -> Rows:
    """The layout of https://huggingface.co/docs/datasets/image_dataset; every cell is text."""
    files: list[File] = []
    labels: list[str | None] = []
    splits: list[str | None] = []
    missing: list[str] = []
    name, split_column, label_name = printable(root.resolve().name), "", ""
    if image not in ("", "file_name"):
        raise BadInput(f"--image {image}: the pictures of {name} are those of its column file_name; leave it out")
    for table in tables:
        columns, rows = _read_metadata(table)
        others = {column: "text" for column in columns if column not in ("file_name", "split")}
        label_name = _label_column(name, others, ", ".join(columns), label)
        split_column = "split" if "split" in columns else ""
        for number, row in enumerate(rows, start=1):
            path = _text(row["file_name"]) or ""
            place = os.path.normpath(path.replace("\\", "/"))
            if not path or os.path.isabs(place) or place.split("/")[0] == "..":
                raise BadInput(f"{table}: row {number} names {path!r}, which is no file in its folder; correct it")
            full = os.path.join(table.parent, place)
            try:
                files.append(_stamped(full, os.stat(full)))
            except (OSError, ValueError):
                missing.append(place)
            labels.append(_text(row.get(label_name)))
            splits.append(_text(row.get("split")) or "" if split_column else
                          place.split("/")[0] if table.parent == root else table.parent.name)
    if missing:
        raise BadInput(f"{tables[0]}: {len(missing):,} of its pictures are not there ({first_names(missing)}); restore "
                       "them, or remove their rows")
    if not split_column and not all(map(split_called, splits)):
        splits = [None] * len(files)
    pictures = sum(os.path.splitext(file.path)[1].lower() in Image.registered_extensions()
                   for table in tables for file in _files_below(table.parent))
    if pictures > len(files):
        say(f"{name}: {pictures:,} pictures and {len(files):,} rows in {tables[0].name}; pictures without a row are "
            "left out")
    return _of_files(root, files, labels, splits, f"{tables[0].name}: labels from column {label_name}", split_column)


def _text(value: Any) -> str | None:
    """A cell as text; None for an empty one. pandas stores whole numbers as floats where one is missing, as NaN."""
    if value is None or value != value:
        return None
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
    return printable(text) or None


def _label_column(name: str, columns: dict[str, str], shown: str, given: str) -> str:
    """The given column; else the one that is called label, or the only one that can hold classes.

    columns: those that may be given, and what kind of column each is. Those of kind "classes", or with the name of
    one, are preferred to "text", which may also be identifiers, ages and the like. A "number" must be given.
    """
    if given:
        if given not in columns:
            raise BadInput(f"--label {given}: not a column of classes, text or numbers of {name}; its columns: {shown}")
        return given
    for candidates in ([column for column in columns if column.lower() == "label"],
                       [column for column in columns if column.lower() in LABEL_NAMES],
                       [column for column, kind in columns.items()
                        if kind == "classes" or column.lower() in LIKE_LABELS],
                       [column for column, kind in columns.items() if kind == "text"]):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            break
    raise BadInput(f"--dataset {name}: which column is the label? Choose with --label; its columns: {shown}")


# ---- Parquet and Arrow, by `datasets` ---------------------------------------------------------------------------

def _tables_below(root: Path) -> list[File]:
    """The Parquet and Arrow files below a folder, but for metadata. Looking for them visits every file."""
    return [file for file in _files_below(root) if file.path.endswith((".parquet", ".arrow"))
            and os.path.basename(file.path) not in METADATA]


def _from_tables(root: Path, files: list[File], config: str, image: str, label: str) -> Rows:
    """A local copy of a data set of the Hub."""
    shards: Counter[tuple[str, str]] = Counter()
    for file in files:
        with open(file.path, "rb") as opened:
            if is_lfs_pointer(opened.read(100)):
                raise BadInput(f"{file.path} is a Git LFS pointer, not the table; run git lfs pull")
        if match := re.fullmatch(r"(.*-)\d{5}-of-(\d{5})\..*", file.path):
            shards[match[1], match[2]] += 1
    for (stem, total), count in shards.items():
        if count < int(total):
            raise BadInput(f"{stem}*-of-{total}.*: {count} of {int(total)} files are there; get the others")
    real = os.path.realpath(root)
    if glob.has_magic(real):        # `datasets` would look for it as a pattern, and might read another folder
        raise BadInput(f"--dataset {root}: its path {real} has one of the characters * ? [, with which Parquet files "
                       "cannot be read; rename the folder")
    builder = _builder(str(root), real, config)
    for path in (path for paths in (builder.config.data_files or {}).values() for path in paths):
        if not os.path.abspath(path).startswith(os.path.join(real, "")):
            raise BadInput(f"--dataset {root}: its card points to {path}, which is not in its folder; refused")
    rows = _from_builder(str(root), builder, image, label, Path(real))
    if config:
        rows = replace(rows, source=f"{rows.source} of configuration {config}")
    stamps = hashlib.sha256(repr([(file.path[len(str(root)):], file.stamp) for file in files]).encode()).hexdigest()
    return replace(rows, name=printable(root.resolve().name), location=f"{real} {config} {image}", fingerprint=stamps)


@contextmanager
def _muted() -> Iterator[None]:
    """`datasets` without its log, and without bars where nobody watches. It logs, over many lines, what it raises."""
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
def _builder(name: str, path: str, config: str) -> Any:
    """The first step of `datasets.load_dataset`. It tells which files will be read, and by which reader.

    Raises BadInput for a reader that is not safe, and where the data set has several configurations and `config` names
    none of them.
    """
    import datasets
    try:
        builder = datasets.load_dataset_builder(path, config or None)
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


@_muted()
def _from_builder(name: str, builder: Any, image: str, label: str, folder: Path | None) -> Rows:
    """The rows of all tables of a data set, one after the other.

    folder: where the pictures must lie that a table names by a path; None: anywhere, as the reader itself found them.
    """
    import datasets
    builder.download_and_prepare()
    tables = {_split_of(str(split), builder): table for split, table in builder.as_dataset().items()}
    features = next(iter(tables.values())).features
    shown = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    image = _image_column(name, features, shown, image)
    split_column = "split" if len(tables) == 1 and "split" in features and label != "split" else ""
    columns = {column: "classes" if hasattr(feature, "names") else "number" if feature.dtype.startswith("float")
               else "text" for column, feature in features.items()
               if column not in (image, split_column) and hasattr(feature, "dtype")
               and re.match(r"string|large_string|u?int|bool|float", feature.dtype)}
    label = _label_column(name, columns, shown, label)
    classes = getattr(features[label], "names", None)

    labels: list[str | None] = []
    splits: list[str | None] = []
    places: list[tuple[Any, str, int]] = []
    for split, table in tables.items():
        values = table.select_columns([label])[:][label]
        labels += [None if value is None or value < 0 else printable(classes[value]) for value in values] if classes \
            else map(_text, values)
        splits += [_text(value) or "" for value in table.select_columns([split_column])[:][split_column]] \
            if split_column else [split] * len(table)
        encoded = table.cast_column(image, datasets.Image(decode=False)).select_columns([image])
        places += [(encoded, split, number) for number in range(len(table))]

    def picture(row: int) -> dict[str, Any]:
        table, _, number = places[row]
        return table[number][image] or {}

    def name_of(row: int) -> str:
        path = picture(row).get("path")
        return f"{name} {places[row][1]} row {places[row][2]}" + (f" ({printable(path)})" if path else "")

    def read(row: int) -> bytes:
        found = picture(row)
        if found.get("bytes") is not None:
            return found["bytes"]
        path = found.get("path")
        if not path:
            raise BadInput(f"{name_of(row)} has no image; restore or remove it")
        # A table may name any file of this machine.
        if folder and not Path(os.path.realpath(path)).is_relative_to(folder):
            raise BadInput(f"{name_of(row)}: {path} is not in the data set's folder; put a copy there")
        return Path(path).read_bytes()

    source = f"images from column {image}, labels from column {label} ({_kind(features[label])})"
    digest = "".join(getattr(table, "_fingerprint", "") for table in tables.values())
    return Rows(name, source, labels, splits, read, name_of, lambda row: f"row {places[row][2]}", f"{name} {image}",
                f"{digest} {image}", tuple(map(printable, classes or ())), split_column)


def _split_of(split: str, builder: Any) -> str:
    """`datasets` calls files of the name eval test. Here they are validation, as in folders."""
    paths: Iterable[str] = (builder.config.data_files or {}).get(split, ())
    words = [set(re.split(r"[^a-z]+", os.path.relpath(path, builder.base_path or "/").lower())) for path in paths]
    if split == "test" and words and all(found & {"eval", "evaluation"} and "test" not in found for found in words):
        return "validation"
    return split


def _kind(feature: Any) -> str:
    """`ClassLabel`, `Image`, `string`, `List`, …"""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _image_column(name: str, features: dict[str, Any], shown: str, given: str) -> str:
    """The given column; else the only one that can hold pictures, or the one that is called image."""
    candidates = [column for column, feature in features.items() if _may_hold_images(feature)]
    if given and given not in candidates:
        raise BadInput(f"--image {given}: not a column of pictures of {name}; its columns: {shown}")
    if not candidates:
        raise BadInput(f"--dataset {name} has no column of type Image; its columns: {shown}")
    named = [given] if given else [column for column in candidates if column.lower() in IMAGE_NAMES]
    if len(candidates) > 1 and len(named) != 1:
        raise BadInput(f"--dataset {name}: which column has the pictures? Choose with --image: {', '.join(candidates)}")
    return (named or candidates)[0]


def _may_hold_images(feature: Any) -> bool:
    """An Image; or encoded bytes, with or without a path, as pandas, polars and pyarrow write them."""
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") in ("binary", "large_binary")


# ---- the Hub -----------------------------------------------------------------------------------------------------

def _from_hub(name: str, config: str, image: str, label: str) -> Rows:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" not in name and name not in ALIASES):
        raise BadInput(f"--dataset {name}: no such folder; choose leaves, beans, a Hub id such as owner/name, or a "
                       "folder")
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError
    repository = ALIASES.get(name, name)
    try:
        with hub.cache_if_unreachable():
            builder = _builder(name, repository, config)
            pictures_are_files = type(builder).__module__.endswith("imagefolder")
            paths = [path for paths in (builder.config.data_files or {}).values() for path in paths]
            if wrong := [path for path in paths if not path.startswith("hf://datasets/")]:
                raise BadInput(f"--dataset {name} points to {wrong[0]}, which is not on the Hub; refused")
            return _from_builder(repository, builder, image, label,
                                 None if pictures_are_files else Path("/nowhere"))
    except DataFilesNotFoundError:
        raise
    except DatasetNotFoundError as error:
        raise BadInput(f"--dataset {name} is neither a folder here nor a data set on the Hub that can be read without "
                       "logging in; choose leaves, beans, a Hub id or a folder") from error
    except (ConnectionError, TimeoutError, FileNotFoundError, HfHubHTTPError) as error:
        raise BadInput(f"--dataset {name}: the Hub cannot be reached, and neither a folder here nor its cache holds "
                       "that data set; offline, use `python train.py --dataset leaves` or the folder of a local copy"
                       ) from error
