"""Random trees of folders and files end in a usable data set or in one line, and never in another number of samples."""

import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kd import BadInput
from kd.data.frames import decode
from kd.data.table import open_dataset
from tests.helpers import toy

SPLIT_NAMES = {"train": ["train", "Train", "TRAINING", "train_set"],
               "validation": ["validation", "val", "Valid", "dev", "eval"],
               "test": ["test", "Test", "testing"]}
OTHER_FOLDERS = ["docs", "test-multiple", "training2"]
CLASS_NAMES = [b"cat", b"dog", b"a b", b"1,2", b"Cat", "Café".encode(), "Café".encode(), b"caf\xe9", b"(x)[y]"]
FILE_NAMES = [b"0.jpg", b"1.JPEG", b"2.jfif", b"no suffix", b"x.text", b"\xff.png", b"caf\xc3\xa9.jpg", b"'quote\".jpg"]
JUNK_NAMES = [b".DS_Store", b"._0.jpg", b"Thumbs.db", b"desktop.ini", b".gitkeep", b"Icon\r"]
JUNK_FOLDERS = [b"__MACOSX", b".ipynb_checkpoints", b"@eaDir"]

PICTURE = toy.encoded(toy.picture("tree", side=8))
OTHER_PICTURE = toy.encoded(toy.picture("another", side=8), "PNG")
BROKEN = {"empty": b"", "cut": PICTURE[:len(PICTURE) // 2], "text": b"not a picture"}
FILES = st.sampled_from(["picture", "picture", "picture", "picture", "picture", "link", *BROKEN])


@dataclass
class Folder:
    """A class folder: its files by name and kind, files one folder deeper, and what lies beside them."""

    files: dict[bytes, str]
    deeper: dict[bytes, str]
    junk: list[bytes]
    junk_folders: list[bytes]
    odd: str    # "", or something that is neither a file nor a folder inside

    def samples(self) -> list[str]:
        return [*self.files.values(), *self.deeper.values()]


@dataclass
class Tree:
    """At most one folder for each split, or the classes at the root."""

    splits: dict[str, dict[bytes, Folder]]      # by the name on disk
    others: list[str] = field(default_factory=list)


FOLDERS = st.builds(
    Folder, st.dictionaries(st.sampled_from(FILE_NAMES), FILES, max_size=6),
    st.dictionaries(st.sampled_from(FILE_NAMES), FILES, max_size=1),
    st.lists(st.sampled_from(JUNK_NAMES), max_size=2, unique=True),
    st.lists(st.sampled_from(JUNK_FOLDERS), max_size=1),
    st.sampled_from([""] * 30 + ["broken link", "link in a circle", "fifo"]))
CLASSES = st.dictionaries(st.sampled_from(CLASS_NAMES), FOLDERS, min_size=1, max_size=3)


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    if draw(st.integers(0, 3)) == 0:
        return Tree({"": draw(CLASSES)})
    classes = draw(CLASSES)
    splits = {draw(st.sampled_from(SPLIT_NAMES["train"])): classes}
    for split in ("validation", "test"):
        if draw(st.booleans()):
            names = draw(st.lists(st.sampled_from(sorted(classes)), min_size=1, unique=True))
            splits[draw(st.sampled_from(SPLIT_NAMES[split]))] = {name: draw(FOLDERS) for name in names}
    return Tree(splits, draw(st.lists(st.sampled_from(OTHER_FOLDERS), max_size=1)))


def write(tree: Tree, root: bytes) -> None:
    """Put the tree on disk."""
    for other in tree.others:
        os.makedirs(os.path.join(root, os.fsencode(other), b"some"))
    for split, classes in tree.splits.items():
        for name, folder in classes.items():
            place = os.path.join(root, os.fsencode(split), name)
            _write_files(place, folder.files)
            if folder.deeper:
                _write_files(os.path.join(place, b"deeper"), folder.deeper)
            for junk in folder.junk:
                _write_file(os.path.join(place, junk), PICTURE)
            for junk in folder.junk_folders:
                _write_files(os.path.join(place, junk), {b"0.jpg": "picture"})
            odd = os.path.join(place, b"odd")
            if folder.odd == "broken link":
                os.symlink(b"nowhere", odd)
            elif folder.odd == "link in a circle":
                os.symlink(b"..", odd)
            elif folder.odd == "fifo":
                os.mkfifo(odd)


def _write_files(place: bytes, files: dict[bytes, str]) -> None:
    os.makedirs(place)
    for name, kind in files.items():
        path = os.path.join(place, name)
        if kind == "link":      # to a file that no sample is, so that it lies inside of the tree
            _write_file(os.path.join(place, b".kept"), OTHER_PICTURE)
            os.symlink(b".kept", path)
        else:
            _write_file(path, BROKEN.get(kind, PICTURE))


def _write_file(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def shown(name: bytes) -> str:
    return unicodedata.normalize("NFC", name.decode("utf-8", "backslashreplace"))


def expected(tree: Tree) -> Counter[str]:
    """How many samples each class has, over all splits: every visible file of a class folder is one."""
    counts: Counter[str] = Counter()
    for classes in tree.splits.values():
        for name, folder in classes.items():
            counts[shown(name)] += len(folder.samples())
    return +counts


def is_usable(tree: Tree) -> bool:
    """Nothing odd, two classes in train with enough for the missing splits, and the other splits know no more."""
    by_split = [{shown(name): 0 for name in classes} for classes in tree.splits.values()]
    for counts, classes in zip(by_split, tree.splits.values(), strict=True):
        for name, folder in classes.items():
            counts[shown(name)] += len(folder.samples())
            if folder.odd:
                return False
    train, *others = by_split
    present = {name for name, count in train.items() if count}
    at_root = "" in tree.splits and len(tree.splits[""]) == 1      # one folder alone is no class
    return (len(present) > 1 and max(train.values()) > 2 and not at_root
            and all({name for name, count in counts.items() if count} <= present for counts in others))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(tree=trees())
def test_a_random_tree_is_read_right_or_refused_in_one_line(tree):
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "set")
        root.mkdir()
        write(tree, os.fsencode(root))
        said: list[str] = []
        try:
            dataset = open_dataset(str(root), say=said.append)
        except BadInput as error:
            assert not is_usable(tree), error
            assert str(error).isprintable() and "\n" not in str(error)
            return

        assert all(line.isprintable() for line in said)
        counts = Counter(dataset.classes[label] for rows in dataset.splits.values() for label in dataset.labels[rows])
        assert counts == expected(tree)
        names = [dataset.name_of(int(row)) for rows in dataset.splits.values() for row in rows]
        assert len(set(names)) == len(names) and all(name.isprintable() for name in names)

        kinds = [kind for classes in tree.splits.values() for folder in classes.values() for kind in folder.samples()]
        broken = sum(kind in BROKEN for kind in kinds)
        try:
            data = decode(dataset, size=16, crop_pct=1.0, interpolation="bilinear",
                          cache_dir=Path(temporary, "cache"), say=said.append)
        except BadInput as error:
            assert broken
            named = str(error).splitlines()[1:] if broken > 1 else [str(error)]
            assert len(named) == min(broken, 20)
        else:
            assert not broken
            assert sum(map(len, data.values())) == len(kinds)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(tree=trees())
def test_links_are_followed_to_the_same_number_of_samples(tree):
    """A class folder that is a link to a folder elsewhere has the samples of that folder."""
    for classes in tree.splits.values():
        for folder in classes.values():
            folder.odd = ""
    with tempfile.TemporaryDirectory() as temporary:
        elsewhere, root = Path(temporary, "elsewhere"), Path(temporary, "set")
        elsewhere.mkdir()
        write(tree, os.fsencode(elsewhere))
        for split in tree.splits:
            (root / split).mkdir(parents=True)
            for path in (elsewhere / split).iterdir():
                (root / split / path.name).symlink_to(path)
        try:
            plain = open_dataset(str(elsewhere), say=lambda line: None)
        except BadInput:
            return
        shutil.rmtree(Path(temporary, "cache"), ignore_errors=True)
        linked = open_dataset(str(root), say=lambda line: None)
        for split, rows in plain.splits.items():
            others = linked.splits[split]
            assert plain.labels[rows].tolist() == linked.labels[others].tolist()
            assert [plain.key_of(int(row)) for row in rows] == [linked.key_of(int(row)) for row in others]
