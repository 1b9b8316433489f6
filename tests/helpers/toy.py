"""Small data sets of the kinds that people have: class folders, Parquet tables, and what lies between the pictures.

Everything follows from names: a picture from its key, a table from its row numbers.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")
Counts = Mapping[str, int]                              # pictures of each class


# ---- pictures ----------------------------------------------------------------------------------------

def picture(key: str, colour: tuple[int, int, int] | None = None, side: int = 48) -> Image.Image:
    """An RGB picture of noise, side × side. It is nearly one colour if `colour` is given."""
    digest = hashlib.sha256(os.fsencode(key)).digest()  # a key may hold a file name that is not UTF-8
    noise = np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(0, 256, (side, side, 3))
    if colour is not None:
        noise = noise // 8 + np.array(colour)
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a file of that kind; `options` are those of Image.save."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- class folders -----------------------------------------------------------------------------------

def class_folders(root: Path, splits: Iterable[str] | Mapping[str, Counts] = SPLITS,
                  classes: Counts = {"cat": 8, "dog": 8}, easy: bool = False) -> Path:
    """Write root/SPLIT/CLASS/0.jpg and so on; no two pictures are the same. Returns `root`.

    splits  names, each with `classes`; or a mapping that gives each split classes of its own.
            The name "" puts the class folders at the root
    easy    give each class a colour, so that any model can tell them apart
    """
    by_split = splits if isinstance(splits, Mapping) else {split: classes for split in splits}
    names = sorted({name for counts in by_split.values() for name in counts})
    for split, counts in by_split.items():
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = class_colour(names.index(name)) if easy else None
                (folder / f"{i}.jpg").write_bytes(encoded(picture(f"{split}/{name}/{i}", colour)))
    return root


def class_colour(number: int) -> tuple[int, int, int]:
    """A colour for each class. The first nine are far apart."""
    return number * 67 % 200, number * 131 % 200, number * 29 % 200


# ---- tables ------------------------------------------------------------------------------------------

def table(root: Path, columns: Mapping[str, str] = {"label": "class:3"}, splits: Iterable[str] = SPLITS,
          config: str = "data", rows: int = 24, writer: str = "datasets", raw: bool = False,
          image: str = "image") -> Path:
    """Write root/CONFIG/SPLIT-00000-of-00001.parquet with a column of PNGs and `columns`. Returns `root`.

    columns  name to kind. "class:K", "int:K" and "str:K" have K values in turn, "bool" and "float"
             two. The values of "str:K" are the column's name and a number, as are the class names
    writer   "datasets" writes the schema of the Hub, with types Image and ClassLabel. "pandas",
             "polars" and "pyarrow" know neither: a class is a whole number there
    raw      the picture is plain bytes, not a struct of bytes and path; not with "datasets"
    """
    (root / config).mkdir(parents=True, exist_ok=True)
    for split in splits:
        pictures = [encoded(picture(f"{split}/{i}"), "PNG") for i in range(rows)]
        content: dict[str, list] = {image: pictures}
        if not raw:
            content[image] = [{"bytes": one, "path": None} for one in pictures]
        for name, kind in columns.items():
            content[name] = [_cell(name, kind, i) for i in range(rows)]
        _write(root / config / f"{split}-00000-of-00001.parquet", content, columns, writer, image, raw)
    return root


def _cell(name: str, kind: str, row: int) -> Any:
    kind, _, count = kind.partition(":")
    value = row % int(count or 2)
    return {"class": value, "int": value, "str": f"{name}{value}", "bool": bool(value), "float": float(value)}[kind]


def _write(path: Path, content: dict[str, list], columns: Mapping[str, str], writer: str, image: str,
           raw: bool) -> None:
    import pyarrow
    import pyarrow.parquet
    if writer == "datasets":
        assert not raw, "the library `datasets` writes pictures as its own type"
        _write_with_datasets(path, content, columns, image)
    elif writer == "pandas":
        import pandas                                   # it comes with `datasets`
        pandas.DataFrame(content).to_parquet(path)
    elif writer == "pyarrow":
        pyarrow.parquet.write_table(pyarrow.table(content), path)
    else:
        # polars is not among the requirements. DataFrame.write_parquet of polars 2.1 gives every text
        # and byte string its large type, and a struct field that is always None the type null.
        assert writer == "polars", writer
        large = {pyarrow.binary(): pyarrow.large_binary(), pyarrow.string(): pyarrow.large_string()}
        plain = pyarrow.table(content)
        types = [field.type for field in plain.schema]
        if not raw:
            types[0] = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.null())])
        schema = pyarrow.schema([(field.name, large.get(kind, kind))
                                 for field, kind in zip(plain.schema, types, strict=True)])
        pyarrow.parquet.write_table(plain.cast(schema), path)


def _write_with_datasets(path: Path, content: dict[str, list], columns: Mapping[str, str], image: str) -> None:
    import datasets
    features: dict[str, Any] = {image: datasets.Image()}
    for name, kind in columns.items():
        kind, _, count = kind.partition(":")
        if kind == "class":
            features[name] = datasets.ClassLabel(names=[f"{name}{i}" for i in range(int(count or 2))])
        else:
            dtype = {"int": "int64", "str": "string", "bool": "bool", "float": "float32"}[kind]
            features[name] = datasets.Value(dtype)
    datasets.Dataset.from_dict(content, datasets.Features(features)).to_parquet(path)


def card(root: Path, configs: Iterable[str], splits: Iterable[str] = SPLITS) -> Path:
    """Write the README.md of a Hub data set with several configs, each a folder of `table`. Returns its path."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    path = root / "README.md"
    path.write_text("\n".join([*lines, "---", "# Toy", ""]))
    return path


# ---- what lies between the pictures ------------------------------------------------------------------

# The first bytes of the files in which macOS keeps what other file systems cannot.
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "

# Some are real pictures: thumbnails, deleted files, and copies that an editor keeps.
JUNK_PICTURES = (
    ".ipynb_checkpoints/0-checkpoint.jpg",              # Jupyter
    "@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg",                # Synology
    ".@__thumb/0.jpg",                                  # QNAP
    "#recycle/0.jpg",                                   # Synology
    "@Recycle/0.jpg",                                   # QNAP
    "$RECYCLE.BIN/S-1-5-21/$R0.jpg",                    # Windows
    ".Trash-1000/files/0.jpg",                          # Linux desktops
    ".Trashes/501/0.jpg",                               # macOS
    ".thumbnails/0.jpg",                                # Android
)
JUNK_FILES = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._0.jpg": APPLE_DOUBLE,
    ".AppleDouble/0.jpg": APPLE_DOUBLE,
    "__MACOSX/._0.jpg": APPLE_DOUBLE,                   # archives that macOS made
    "__MACOSX/cat/._0.jpg": APPLE_DOUBLE,
    "Icon\r": b"",                                      # the icon of a folder on macOS
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",   # Windows, as are the next five
    "ehthumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "desktop.ini": b"[.ShellClassInfo]\r\n",
    "Desktop.ini": b"[.ShellClassInfo]\r\n",
    "$RECYCLE.BIN/desktop.ini": b"[.ShellClassInfo]\r\n",
    "System Volume Information/IndexerVolumeGuid": b"{\0",
    ".Trash-1000/info/0.jpg.trashinfo": b"[Trash Info]\nPath=0.jpg\n",
    ".directory": b"[Dolphin]\n",                       # KDE
    ".git/config": b"[core]\n",
    ".gitkeep": b"",
    ".nfs000000000123456700000001": b"",                # a file that was removed while it was open
    ".~lock.labels.csv#": b",me,laptop;",               # LibreOffice
    "~$labels.xlsx": b"\2me",                           # Excel
}
JUNK_FOLDERS = ("lost+found",)                          # always empty, in the root of a disk


def junk(folder: Path) -> int:
    """Leave in `folder` what operating systems, archives, storage boxes and notebooks leave. Returns how many files."""
    files = {**JUNK_FILES, **{name: encoded(picture(name)) for name in JUNK_PICTURES}}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in JUNK_FOLDERS:
        (folder / name).mkdir()
    return len(files)
