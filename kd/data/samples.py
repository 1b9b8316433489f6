"""What a sample and a dataset are, and folders of pictures.

Pictures stay encoded here. `kd/data/sources.py` opens a dataset by its name, `kd/data/splits.py`
checks its labels and adds missing splits, and `kd/data/frames.py` decodes the pictures.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kd import BadInput

Say = Callable[[str], None]


class Reading(NamedTuple):
    """How to read a data set that leaves a choice. Empty text: there is none, or it can be told."""

    config: str = ""            # of a Hub data set that has several
    image: str = ""             # the column that has the pictures
    label: str = ""             # the column that has the labels
    follow_links: bool = False  # also links that lead out of the data set's folder
    labelled: bool = True       # False: labels are ignored, and splits of any name are read


@dataclass(frozen=True)
class Samples:
    """One split: the labels, and how to get each picture. Several threads may read at once."""

    labels: np.ndarray                              # (N,) int64; -1: no label
    read: Callable[[int], bytes | Image.Image]      # encoded bytes, or an RGB picture that was never encoded
    name_of: Callable[[int], str]                   # for messages: a sample's path, or its row in a table
    key_of: Callable[[int], str]                    # the same wherever the dataset lies: a path below it, or a row
    location: str                                   # of the split; stays the same when its content changes
    fingerprint: str                                # changes with the content and its order

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """The splits that a source has, or all three of them (`kd/data/splits.py`)."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]      # by the keys of SPLITS; also `unlabelled`, and any name where labels are ignored
    source: str = ""                # one line: which folders, columns and configuration were read
    whole: bool = False             # the source has no splits: what is called train is all that there is
    carved: tuple[str, ...] = ()    # the splits that were taken from train


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of several parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    owner = [(part, index) for part in parts for index in range(len(part))]
    return Samples(np.concatenate([part.labels for part in parts]),
                   lambda index: owner[index][0].read(owner[index][1]),
                   lambda index: owner[index][0].name_of(owner[index][1]),
                   lambda index: owner[index][0].key_of(owner[index][1]),
                   " + ".join(part.location for part in parts),
                   hashlib.sha256(repr([part.fingerprint for part in parts]).encode()).hexdigest())


# Names

# The names that people, archives and libraries give to the splits. Case, and what joins the words, do not matter.
SPLITS = {"train": ("train", "training"),
          "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
          "test": ("test", "testing")}


def split_called(name: str) -> str | None:
    """The split that a folder or file of this name holds, such as test for `Testing` or `test_set`; else None."""
    word = "".join(filter(str.isalnum, str(name).lower())).removesuffix("set")
    return next((split for split, names in SPLITS.items() if word in names), None)


def rename_splits(name: str, splits: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The splits under the names of SPLITS, and the names of those that are left out.

    The only split of a source is train, whatever it is called. Raises BadInput, which names the
    dataset, for two splits that mean the same.
    """
    renamed: dict[str, Any] = {}
    original: dict[str, str] = {}
    for given, content in splits.items():
        split = split_called(given) or ("train" if len(splits) == 1 else None)
        if split in original:
            raise BadInput(f"--dataset {name} has both {original[split]} and {given}; keep one of them")
        if split:
            renamed[split], original[split] = content, given
    return ({split: renamed[split] for split in SPLITS if split in renamed},
            [given for given in splits if given not in original.values()])


def printable(name: str) -> str:
    """`name` as text that every terminal and file can hold, in Unicode's normal form C.

    A byte that is not UTF-8 becomes `\\xe9`, and a control character an escape as well. macOS stores
    letters with accents in form D, other systems in form C.
    """
    text = unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def first_names(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c`, or the first ones and a count."""
    more = f", … {len(names):,} in all" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# What is no sample: names, in lower case, of what operating systems, archives, storage boxes and notebooks
# leave behind. What begins with a dot is left out as well: .DS_Store, ._x.jpg, .ipynb_checkpoints, .Trash-1000.
JUNK = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "system volume information",
        "__macosx", "icon\r", "picasa.ini", "lost+found", "__pycache__",
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"}


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or was left behind by a program."""
    return name.startswith((".", "~$")) or name.lower() in JUNK


# Links

class Links(NamedTuple):
    """Which links may be followed: those that stay inside of `roots`, all links resolved, or all of them."""

    roots: tuple[str, ...]
    follow: bool = False

    def check(self, path: Path | str) -> None:
        """Raise BadInput where `path` lies outside of every root. A dataset may name any file of this machine."""
        if self.follow:
            return
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in self.roots):
            raise BadInput(f"{printable(str(path))} leads out of the dataset's folder {printable(self.roots[0])}; put "
                           "a copy there instead, or allow it with --follow-links")


def links_of(root: Path | str, follow: bool = False) -> Links:
    """Inside of `root`. A snapshot in the Hub's cache also consists of links into the folder `blobs` beside it."""
    real = os.path.realpath(root)
    snapshots = os.path.dirname(real)
    blobs = [os.path.join(os.path.dirname(snapshots), "blobs")] if os.path.basename(snapshots) == "snapshots" else []
    return Links((real, *blobs), follow)


# Folders of pictures

def visible(folder: Path) -> list[Path]:
    """What lies in `folder`, sorted, without junk."""
    return sorted(path for path in folder.iterdir() if not is_junk(path.name))


def picture_files(folder: Path, links: Links) -> Iterator[Path]:
    """All visible files in `folder` and below, sorted. Every one is a picture, whatever its name says.

    links: which may be followed. Raises BadInput for other links, and for what is neither a file nor a folder.
    """
    links.check(folder)
    for path in visible(folder):
        links.check(path)
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from picture_files(path, links)
        elif path.is_dir() and links.follow:
            if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
                raise BadInput(f"{printable(str(path))} is a link in a circle; remove it")
            yield from picture_files(path, links)
        elif path.is_dir():
            raise BadInput(f"{printable(str(path))} is a link to a folder; put a copy there instead, or allow it with "
                           "--follow-links")
        else:
            raise BadInput(f"{printable(str(path))} is neither a file nor a folder; remove it")


@dataclass(frozen=True)
class Layout:
    """Where the pictures of a folder lie."""

    splits: dict[str, Path]     # by the keys of SPLITS; only train, where the classes lie at the root
    left_out: list[str]         # the names of other folders beside them
    whole: bool                 # the classes lie at the root


def folder_layout(root: Path) -> Layout | None:
    """SPLIT/CLASS/** or CLASS/**, below `root` or below the only folder in it; None for anything else.

    An archive often holds one folder, which holds the rest.
    """
    folders = [path for path in visible(root) if path.is_dir()]
    while len(folders) == 1 and not split_called(folders[0].name) and not folders[0].is_symlink():
        root = folders[0]
        folders = [path for path in visible(root) if path.is_dir()]

    others = [path.name for path in folders if not split_called(path.name)]
    split_folders = {path.name: path for path in folders if split_called(path.name)}
    if any(path.is_dir() for folder in split_folders.values() for path in visible(folder)):
        return Layout(rename_splits(str(root), split_folders)[0], others, whole=False)
    _refuse_hidden_splits(root, folders)
    # A class may also be called train, as among vehicles. Two others tell it from a split of loose pictures.
    if len(others) > 1 and any(_holds_a_file(folder) for folder in folders):
        return Layout({"train": root}, [], whole=True)
    return None


def _refuse_hidden_splits(root: Path, folders: list[Path]) -> None:
    """Raise BadInput where splits lie below the classes, or have names that only look like those of splits."""
    for folder in folders:
        below = [path.name for path in visible(folder) if path.is_dir() and split_called(path.name)]
        if len(below) > 1:
            raise BadInput(f"{printable(str(folder))} holds {' and '.join(below)}; splits come before classes: "
                           "train/CLASS/, test/CLASS/")
    like_splits = [path.name for path in folders if re.search(r"train|valid|test", path.name.lower())]
    if len(folders) > 1 and len(like_splits) == len(folders) and not all(map(split_called, like_splits)):
        raise BadInput(f"{printable(str(root))}: {first_names(like_splits)} look like splits; rename them to train, "
                       "validation and test")


def _holds_a_file(folder: Path) -> bool:
    return any(not is_junk(name) for _, _, names in os.walk(folder) for name in names)


def open_image_folder(root: Path, layout: Layout, follow_links: bool, say: Say) -> Dataset:
    """Open SPLIT/CLASS/**, where every visible file is a sample, whatever its extension. Raises BadInput.

    A folder without a file is no class. `say` is told of what is left out.
    """
    name, links = printable(root.resolve().name), links_of(root, follow_links)
    files = {}
    for split, folder in layout.splits.items():
        links.check(folder)
        files[split] = _files_by_class(name, folder, links, say)
    if layout.left_out:
        say(f"{name}: left out: {first_names([printable(each) for each in layout.left_out])} (no name of a split)")

    # Classes that only other splits have get a number as well, so that kd/data/splits.py can name them.
    classes = sorted(files.get("train", {}))
    classes += sorted(set().union(*files.values()) - set(classes))
    number = {label: index for index, label in enumerate(classes)}
    splits = {}
    for split, by_class in files.items():
        labels = [number[label] for label in sorted(by_class) for _ in by_class[label]]
        split_files = [path for label in sorted(by_class) for path in by_class[label]]
        if split_files:
            splits[split] = _samples_from_files(root, split, split_files, np.array(labels, np.int64))

    places = ("all pictures are train" if layout.whole else
              ", ".join(f"{split} from {printable(layout.splits[split].name)}" for split in splits))
    return Dataset(name, tuple(classes), splits, f"class folders; {places}", layout.whole)


def _files_by_class(name: str, folder: Path, links: Links, say: Say) -> dict[str, list[Path]]:
    """The files of a split by the name of their class."""
    files: dict[str, list[Path]] = {}
    empty, loose, below = [], [], []
    for path in visible(folder):
        if not path.is_dir():
            if path.suffix.lower() in Image.registered_extensions():    # and not a README or a licence
                loose.append(printable(path.name))
            continue
        found = list(picture_files(path, links))
        if found:
            # One name may have two spellings, in Unicode's forms C and D. They are one class.
            files.setdefault(printable(path.name), []).extend(found)
            below += [printable(f"{path.name}/{inner.name}") for inner in visible(path) if inner.is_dir()]
        else:
            empty.append(printable(path.name))
    if empty:
        say(f"{name}: folders of {printable(folder.name)} without a file, which are no class: {first_names(empty)}")
    if below:
        say(f"{name}: folders in a class of {printable(folder.name)} belong to that class: {first_names(below, 3)}")
    if loose:
        say(f"{name}: left out: {len(loose):,} pictures of {printable(folder.name)} in no class folder "
            f"({first_names(loose, 3)})")
    return files


def _samples_from_files(root: Path, split: str, files: list[Path], labels: np.ndarray) -> Samples:
    real = os.path.realpath(root)
    return Samples(labels, lambda index: files[index].read_bytes(), lambda index: printable(str(files[index])),
                   lambda index: printable(files[index].relative_to(root).as_posix()), f"{real} {split}",
                   files_fingerprint(real, files))


# What people and archives put beside pictures.
TEXTS = {".csv", ".html", ".json", ".jsonl", ".md", ".pdf", ".txt", ".xml", ".yaml", ".yml"}


def open_pictures(root: Path, follow_links: bool, say: Say) -> Samples:
    """All visible files below a folder but texts, at any depth, without labels. `say` is told of the texts.

    Raises BadInput for links that lead out of the folder.
    """
    files: list[Path] = []
    texts: list[Path] = []
    for path in picture_files(root, links_of(root, follow_links)):
        is_text = path.suffix.lower() in TEXTS or path.name.upper() in ("LICENSE", "LICENCE")
        (texts if is_text else files).append(path)
    if texts:
        say(f"{printable(root.resolve().name)}: left out: {len(texts):,} files that are no pictures "
            f"({first_names([printable(path.name) for path in texts], 3)})")
    return _samples_from_files(root, "pictures", files, np.full(len(files), -1))


def files_fingerprint(root: str, files: Sequence[Path]) -> str:
    """A hash of the files' paths below `root`, sizes and times of modification."""
    sha = hashlib.sha256()
    for path in files:
        status = path.stat()
        sha.update(os.fsencode(_below(os.path.realpath(path), root)))
        sha.update(b"\0%d\0%d\n" % (status.st_size, status.st_mtime_ns))
    return sha.hexdigest()


def _below(path: str, root: str) -> str:
    """The path from `root` to `path`; `path` itself where it lies on another drive of Windows."""
    try:
        return os.path.relpath(path, root)
    except ValueError:
        return path
