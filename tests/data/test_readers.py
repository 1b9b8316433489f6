"""kd/data/readers.py: the same rows from every source, text stays text, and nothing in a data set is executed."""

import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd import BadInput
from kd.data import leaves
from kd.data.frames import decode
from kd.data.table import SPLITS, open_dataset
from tests.helpers import standin_hub, toy
from tests.helpers.opening import (FULL, hub_folder, image_folder, jpeg, labels, open_and_listen, open_quietly, parts,
                                   refused)

datasets = pytest.importorskip("datasets")

BEANS = os.environ.get("KD_BEANS", "")
ROOT = Path(__file__).resolve().parents[2]


# Folders of pictures

@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_image_folder(tmp_path, validation):
    splits = {validation if split == "validation" else split: classes for split, classes in FULL.items()}
    root = image_folder(tmp_path / "set", **splits)
    (root / "train" / "a" / ".hidden").write_text("x")
    (root / "train" / "a" / "Thumbs.db").write_text("x")
    (root / "labels.csv").write_text("x")
    dataset = open_quietly(root)
    assert (dataset.name, dataset.classes) == ("set", ("a", "b"))
    assert {split: samples.labels.tolist() for split, samples in parts(dataset).items()} == {
        "train": [0] * 6 + [1] * 4, "validation": [0, 1, 1], "test": [0, 0, 1]}
    train = parts(dataset)["train"]
    assert train.labels.dtype == np.int64
    assert train.name_of(6) == str(root / "train" / "b" / "00.jpg")
    assert train.read(6) == (root / "train" / "b" / "00.jpg").read_bytes()


def test_files_of_any_name_and_depth_are_samples(tmp_path):
    root = image_folder(tmp_path, **FULL)
    (root / "train" / "a" / "deeper" / "still").mkdir(parents=True)
    (root / "train" / "a" / "deeper" / "still" / "x.text").write_bytes(jpeg(9))
    assert len(open_and_listen(root)[0].splits["train"]) == 11


def test_fingerprint_changes_with_the_content_and_location_does_not(tmp_path):
    root = image_folder(tmp_path, **FULL)
    first, again = open_quietly(root), open_quietly(root)
    assert (first.fingerprint, first.location) == (again.fingerprint, again.location)
    path = root / "train" / "a" / "03.jpg"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = open_quietly(root)
    assert changed.fingerprint != first.fingerprint and changed.location == first.location


def test_folders_that_cannot_be_used(tmp_path):
    refused(image_folder(tmp_path / "1", train={"a": 3}), "one class only .a.")
    refused(image_folder(tmp_path / "2", train={"a": 3, "b": 0}), "one class only .a.")
    refused(image_folder(tmp_path / "3", train={"a": 3, "b": 2}, test={"c": 1}), "test has 'c', which train lacks")
    refused(image_folder(tmp_path / "4", train={"a": 3, "b": 2}, val={"c": 1}), "validation has 'c'")
    refused(image_folder(tmp_path / "5", train={"a": 0, "b": 0}), "no train split .found: nothing.")
    refused(image_folder(tmp_path / "6", val={"a": 1}, test={"a": 1}), "no train split .*found: validation, test")
    refused(image_folder(tmp_path / "7", **FULL, val={"a": 1}), "has both val and validation")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no pictures in a layout that can be read .found: nothing.; it needs train/CLASS/")
    (tmp_path / "file.pkl").write_bytes(pickle.dumps("x"))
    refused(tmp_path / "file.pkl", "is a file; give the folder")
    refused(tmp_path / "emty", "no such folder; choose leaves, beans, a Hub id such as owner/name, or a folder")


def test_odd_files_are_refused_by_name(tmp_path):
    root = image_folder(tmp_path, **FULL)
    os.mkfifo(root / "train" / "a" / "pipe.jpg")  # opening it would wait for ever
    refused(root, "pipe.jpg is neither a file nor a folder")
    (root / "train" / "a" / "pipe.jpg").unlink()
    (root / "train" / "a" / "circle").symlink_to("../..")
    refused(root, "circle is a link in a circle; remove it")


# What people have

@pytest.mark.parametrize("names", [
    ("Train", "Val", "Test"), ("TRAINING", "Validation", "TESTING"), ("train", "valid", "testing"),
    ("training_set", "dev-set", "Test Set"), ("Train", "eval", "test")])
def test_split_folders_under_the_names_that_people_use(tmp_path, names):
    classes = ({"a": 6, "b": 4}, {"a": 1, "b": 2}, {"a": 2, "b": 1})
    dataset = open_quietly(image_folder(tmp_path / "set", **dict(zip(names, classes, strict=True))))
    assert labels(dataset) == {"train": [0] * 6 + [1] * 4, "validation": [0, 1, 1], "test": [0, 0, 1]}
    assert dataset.source == (f"class folders; train from {names[0]}, validation from {names[1]}, "
                              f"test from {names[2]}")


def test_splits_in_the_wrong_place_or_under_strange_names_are_no_classes(tmp_path):
    per_class = image_folder(tmp_path / "1", **{"cat": {"train": 5, "test": 2}, "dog": {"train": 5, "test": 2}})
    refused(per_class, "1/cat holds test and train; splits come before classes: train/CLASS/")
    names = ("01_Train", "02_Validation", "03_TestSet")
    odd = image_folder(tmp_path / "2", **{name: {"a": 2, "b": 2} for name in names})
    refused(odd, "01_Train, 02_Validation, 03_TestSet look like splits; rename them to train, validation and test")


def test_folders_in_a_class_are_said(tmp_path):
    root = image_folder(tmp_path / "zoo", **FULL)
    (root / "train" / "a" / "young").mkdir()
    (root / "train" / "a" / "young" / "x.jpg").write_bytes(jpeg(1))
    dataset, said = open_and_listen(root)
    assert len(parts(dataset)["train"]) == 11
    assert said == ["zoo: folders in a class of train belong to that class: a/young"]


def test_a_class_may_be_called_train(tmp_path):
    root = image_folder(tmp_path / "vehicles", **{"": {"bus": 10, "car": 10, "train": 12}})
    dataset, _ = open_and_listen(root)
    assert dataset.classes == ("bus", "car", "train") and dataset.whole
    assert sum(map(len, dataset.splits.values())) == 32
    refused(image_folder(tmp_path / "loose", **{"": {"train": 3, "test": 3, "docs": 1}}), "no pictures in a layout")


def test_a_folder_that_is_no_split_is_left_out_and_named(tmp_path):
    root = image_folder(tmp_path / "fruits", **FULL, **{"test-multiple_fruits": {"a": 3, "b": 3}})
    dataset, said = open_and_listen(root)
    assert said == ["fruits: left out: test-multiple_fruits (no name of a split)"]
    assert {split: len(samples) for split, samples in parts(dataset).items()} == {
        "train": 10, "validation": 3, "test": 3}


def test_class_folders_at_the_root_are_train(tmp_path):
    root = image_folder(tmp_path / "flowers", **{"": {"daisy": 20, "rose": 30}})
    (root / "LICENSE.txt").write_text("x")
    dataset, said = open_and_listen(root)
    assert dataset.classes == ("daisy", "rose") and dataset.source == "class folders; all pictures are train"
    assert {split: np.bincount(samples.labels).tolist() for split, samples in parts(dataset).items()} == {
        "train": [16, 24], "validation": [2, 3], "test": [2, 3]}
    assert len(said) == 2 and all("carved from train" in line for line in said)


def test_a_folder_in_a_folder_as_archives_hold_it(tmp_path):
    image_folder(tmp_path / "download" / "archive" / "pets", **FULL)
    assert len(parts(open_quietly(tmp_path / "download"))["train"]) == 10


def test_folders_without_a_file_are_no_class(tmp_path):
    root = image_folder(tmp_path / "ph", **FULL)
    for split in ("train", "test"):
        (root / split / "unknown").mkdir()
    (root / "test" / "hidden").mkdir()
    (root / "test" / "hidden" / ".keep").write_text("")
    dataset, said = open_and_listen(root)
    assert dataset.classes == ("a", "b") and len(parts(dataset)["test"]) == 3
    assert said == ["ph: folders of train without a picture, which are no class: unknown",
                    "ph: folders of test without a picture, which are no class: hidden, unknown"]


def test_what_programs_leave_behind_is_no_picture_and_no_class(tmp_path):
    clean, littered = (toy.class_folders(tmp_path / name / "set") for name in ("clean", "littered"))
    folders = [littered, *(path for path in littered.rglob("*") if path.is_dir())]
    for folder in folders:
        toy.junk(folder)
    expected, dataset = open_quietly(clean), open_quietly(littered)
    assert dataset.classes == expected.classes and labels(dataset) == labels(expected)
    for split, samples in parts(dataset).items():
        assert [samples.read(i) for i in range(16)] == [parts(expected)[split].read(i) for i in range(16)]


def test_pictures_outside_of_class_folders_are_counted(tmp_path):
    root = image_folder(tmp_path / "kaggle", train={"a": 20, "b": 20})
    (root / "test").mkdir()
    for number in range(7):
        (root / "test" / f"{number}.jpg").write_bytes(jpeg(number))
    dataset, said = open_and_listen(root)
    assert said[0] == "kaggle: left out: 7 pictures of test in no class folder (0.jpg, 1.jpg, 2.jpg, … 7 in all)"
    assert "no test split; 4 images carved from train" in said[1]


@pytest.mark.parametrize("name, shown", [
    (b"caf\xe9", "caf\\xe9"),                                    # Latin-1
    (b"\xcf\xe3", "\\xcf\\xe3"),                                 # GBK
    ("Cafe\u0301".encode(), "Caf\u00e9"),                        # form D, as macOS has it
    (b"two\nlines\x1b[31m", "two\\nlines\\x1b[31m"),
    ("\u732b".encode(), "\u732b")])
def test_names_in_any_encoding_can_be_printed(tmp_path, name, shown):
    root = image_folder(tmp_path, **FULL)
    for split in FULL:
        os.rename(root / split / "b", os.fsencode(root / split) + b"/" + name)
    dataset = open_quietly(root)
    assert sorted(dataset.classes) == sorted(["a", shown])
    train = parts(dataset)["train"]
    index = next(i for i in range(10) if dataset.classes[train.labels[i]] == shown)
    assert train.key_of(index) == f"train/{shown}/00.jpg"
    assert (train.name_of(index) + train.key_of(index)).isprintable()
    (train.name_of(index) + dataset.classes[1]).encode("utf-8", "strict")


def test_one_name_in_two_normal_forms_is_one_class(tmp_path):
    root = image_folder(tmp_path, train={"a": 6, "Caf\u00e9": 4}, validation={"a": 1, "Cafe\u0301": 2},
                        test={"a": 1, "Cafe\u0301": 1})
    dataset = open_quietly(root)
    assert dataset.classes == ("Caf\u00e9", "a")
    assert labels(dataset) == {"train": [0] * 4 + [1] * 6, "validation": [0, 0, 1], "test": [0, 1]}


def test_a_folder_in_no_layout_is_described(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "train.csv").write_text("file,label\n")
    refused(tmp_path, r"found: 8 .jpg, 1 .csv\); it needs train/CLASS/ or CLASS/ folders of pictures, or pictures "
            "with a metadata.csv")


def test_a_folder_that_hides_a_dataset_of_the_hub_is_named(tmp_path, monkeypatch):
    (tmp_path / "beans").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("beans", f"this is the folder {tmp_path}/beans, which hides any data set of the Hub that has its name")


# The Hub's layout

def test_hub_layout(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]})
    dataset = open_quietly(root)
    assert (dataset.name, dataset.classes) == ("toy", ("a", "b"))
    assert {split: samples.labels.tolist() for split, samples in parts(dataset).items()} == {
        "train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]}
    train = parts(dataset)["train"]
    assert [train.read(index) for index in range(4)] == [jpeg(index) for index in range(4)]
    assert train.name_of(2) == f"{root} train row 2 (2.jpg)"


@pytest.mark.parametrize("feature, values, classes", [
    (datasets.Value("string"), ["rust", "healthy", "rust"], ("healthy", "rust")),
    (datasets.Value("int32"), [10, 9, 10], ("9", "10")),
])
def test_labels_of_text_and_whole_numbers_are_encoded_sorted(tmp_path, feature, values, classes):
    splits = {"train": values, "validation": values[:2], "test": values[1:]}
    dataset = open_quietly(hub_folder(tmp_path, splits, feature))
    assert dataset.classes == classes
    assert parts(dataset)["train"].labels.tolist() == [1, 0, 1]
    assert parts(dataset)["test"].labels.tolist() == [0, 1]


def test_text_label_that_train_lacks(tmp_path):
    refused(hub_folder(tmp_path, {"train": ["x", "y"], "test": ["x", "z"], "validation": ["x"]},
                       datasets.Value("string")), "test has 'z', which train lacks")


@pytest.mark.parametrize("unlabelled", [[-1, -1], [None, None]])
def test_split_without_labels_counts_as_missing(tmp_path, unlabelled):
    root = hub_folder(tmp_path, {"train": [0, 1] * 20, "validation": [1, 0], "test": unlabelled})
    dataset, said = open_and_listen(root)
    splits = dataset.splits
    assert said[0].endswith("its test split has no labels; treated as missing") and "carved" in said[1]
    assert len(said) == 2 and len(splits["test"]) == 4 and len(splits["train"]) == 36


def test_tables_that_cannot_be_used(tmp_path):
    fine = {"validation": [0, 1], "test": [0, 1]}
    refused(hub_folder(tmp_path / "1", {"train": [0, 1, -1, 0]} | fine),
            r"train row 2 \(2.jpg\): no label .1 such in train")
    refused(hub_folder(tmp_path / "2", {"train": [1, 1, 1]} | fine), "one class only .b.")
    refused(hub_folder(tmp_path / "3", {"train": [-1, -1]} | fine), "no labelled picture")
    refused(hub_folder(tmp_path / "4", {"test": [0, 1]}), "no train split .found: test.")
    three = datasets.ClassLabel(names=["a", "b", "c"])
    refused(hub_folder(tmp_path / "5", {"train": [0, 1], "test": [2]} | {"validation": [0]}, three), "test has 'c'")
    columns = {"id": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    message = refused(hub_folder(tmp_path / "6", {"train": [0, 1]} | fine, features=datasets.Features(columns)),
                      "no column of type Image")
    assert "id (string), label (ClassLabel)" in message
    columns = {"picture": datasets.Image(), "score": datasets.Value("float32")}
    message = refused(hub_folder(tmp_path / "7", {"train": [0, 1]} | fine, features=datasets.Features(columns)),
                      "which column is the label")
    assert "picture (Image), score (float32)" in message
    root = hub_folder(tmp_path / "8", {"train": [0, 1]} | fine)
    (root / "data" / "train-00000.parquet").write_bytes(b"PAR1 and no more")
    refused(root, f"--dataset {root} cannot be read: ")


def test_table_that_names_files_gets_none(tmp_path):
    """A path in place of bytes could name any file of the machine."""
    root = hub_folder(tmp_path / "toy", {"train": [0, 1], "validation": [0, 1], "test": [0, 1]})
    features = datasets.Features({"id": datasets.Value("string"),
                                  "picture": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"id": ["0", "1"], "picture": [{"bytes": None, "path": "/etc/passwd"}, {"bytes": None, "path": None}],
            "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features)
    table.cast_column("picture", datasets.Image(decode=False)).to_parquet(root / "data" / "train-00000.parquet")
    train = parts(open_quietly(root))["train"]
    with pytest.raises(BadInput, match="/etc/passwd is not in the data set's folder; put a copy there"):
        train.read(0)
    with pytest.raises(BadInput, match="train row 1 has no image"):
        train.read(1)


# Columns

def kinds(*columns: str) -> dict[str, str]:
    """`name=kind` → what toy.table takes."""
    return dict(column.split("=") for column in columns)


@pytest.mark.parametrize("columns, read", [
    (kinds("label=str:3", "source=class:2"), ("label (string)", ("label0", "label1", "label2"))),
    (kinds("Label=int:3", "source=class:2"), ("Label (int64)", ("0", "1", "2"))),
    (kinds("label=bool"), ("label (bool)", ("False", "True"))),
    (kinds("label=float"), ("label (float32)", ("0", "1"))),
    (kinds("path=str:5", "species=class:2"), ("species (ClassLabel)", ("species0", "species1"))),
    (kinds("path=str:5", "category=str:2"), ("category (string)", ("category0", "category1"))),
    (kinds("breed=str:2"), ("breed (string)", ("breed0", "breed1"))),
])
def test_the_column_of_labels(tmp_path, columns, read):
    dataset = open_quietly(toy.table(tmp_path / "set", columns))
    column, classes = read
    assert dataset.source == f"images from column image, labels from column {column}"
    assert dataset.classes == classes
    assert labels(dataset)["train"] == [row % len(classes) for row in range(24)]


@pytest.mark.parametrize("columns", [
    kinds("fine_label=class:4", "coarse_label=class:2"),                    # CIFAR-100
    kinds("age=class:4", "gender=class:2", "race=class:3"),                 # FairFace
    kinds("image_id=str:9", "lesion_id=str:9", "dx=str:3", "sex=str:2"),    # HAM10000
])
def test_a_choice_of_columns_is_asked_for_and_made_with_label(tmp_path, columns):
    root = toy.table(tmp_path / "set", columns)
    message = refused(root, "which column is the label. Choose with --label; its columns: ")
    assert all(name in message for name in columns)
    for name, kind in columns.items():
        dataset = open_quietly(root, label=name)
        assert dataset.classes == tuple(f"{name}{i}" for i in range(int(kind[-1])))
        assert labels(dataset)["test"] == [row % int(kind[-1]) for row in range(24)]
    refused(root, "--label fine: not a column of classes, text or numbers", label="fine")
    refused(root, "--label image: not a column", label="image")


def test_a_choice_of_pictures_is_asked_for_and_made_with_image(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"photo": [{"bytes": jpeg(i), "path": None} for i in range(20)],
            "mask": [{"bytes": jpeg(100 + i), "path": None} for i in range(20)], "label": [0, 1] * 10}
    root = tmp_path / "set"
    root.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(root / "train.parquet")
    refused(root, "which column has the pictures. Choose with --image: photo, mask")
    train = parts(open_and_listen(root, image="mask")[0])["train"]
    first = int(train.key_of(0).removeprefix("row "))
    assert train.read(0) == jpeg(100 + first)
    refused(root, "--image label: not a column of pictures", image="label")


def test_every_column_of_pictures_has_frames_of_its_own(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"photo": [{"bytes": jpeg(0), "path": None}] * 20, "mask": [{"bytes": jpeg(200), "path": None}] * 20,
            "label": [0, 1] * 10}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    for column, red in (("photo", 0), ("mask", 200), ("photo", 0)):
        dataset, _ = open_and_listen(tmp_path / "set", image=column)
        train = decode(dataset, size=8, crop_pct=1.0, interpolation="bilinear", cache_dir=tmp_path / "cache",
                       say=lambda line: None)["train"]
        assert abs(int(train.read([0])[0, 4, 4, 0]) - red) <= 1
    assert len(list((tmp_path / "cache").glob("*.frames"))) == 2    # each is decoded once


@pytest.mark.parametrize("name", ["set[12]", "what?", "a*"])
def test_a_table_in_a_folder_whose_name_would_be_a_pattern_is_refused(tmp_path, name):
    hub_folder(tmp_path / "set1", {"train": [0, 1] * 10})
    root = hub_folder(tmp_path / name, {"train": [0, 1] * 10})
    refused(root, "has one of the characters .*; rename the folder")


# Writers

@pytest.mark.parametrize("writer", ["pandas", "polars", "pyarrow"])
@pytest.mark.parametrize("raw", [False, True])
def test_tables_of_other_libraries(tmp_path, writer, raw):
    """They do not know the type Image: a picture is bytes, or a struct of bytes and path."""
    root = toy.table(tmp_path / writer, {"label": "str:3"}, writer=writer, raw=raw)
    dataset = open_quietly(root)
    assert dataset.classes == ("label0", "label1", "label2")
    assert {split: len(samples) for split, samples in parts(dataset).items()} == {
        "train": 24, "validation": 24, "test": 24}
    assert labels(dataset)["train"] == [0, 1, 2] * 8
    assert parts(dataset)["test"].read(5) == toy.encoded(toy.picture("test/5"), "PNG")


def test_a_category_of_pandas_with_a_missing_value(tmp_path):
    import pandas
    (tmp_path / "set").mkdir()
    splits: dict[str, list] = {"train": ["b", "a"] * 10, "test": ["a", "b"], "validation": [None, None]}
    for split, values in splits.items():
        pictures = [{"bytes": jpeg(i), "path": None} for i in range(len(values))]
        table = pandas.DataFrame({"image": pictures, "label": pandas.Categorical(values, ["a", "b"])})
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    dataset, said = open_and_listen(tmp_path / "set")
    assert dataset.classes == ("a", "b") and labels(dataset)["test"] == [0, 1]
    assert said[0] == "set: its validation split has no labels; treated as missing"


# Configurations

def test_a_choice_of_configurations_is_asked_for_and_made_with_config(tmp_path):
    root = tmp_path / "svhn"
    for config, kind in {"cropped_digits": "class:3", "full_numbers": "class:5"}.items():
        toy.table(root, {"label": kind}, ("train", "test"), config)
    toy.card(root, ["cropped_digits", "full_numbers"], ("train", "test"))
    refused(root, "has several configurations; choose one with --config: cropped_digits, full_numbers")
    refused(root, "has no configuration 'digits'; choose one with --config: cropped_digits", config="digits")
    dataset, said = open_and_listen(root, config="full_numbers")
    assert len(dataset.classes) == 5 and len(parts(dataset)["test"]) == 24
    assert dataset.source.endswith("labels from column label (ClassLabel) of configuration full_numbers")


# Pictures beside a table

def with_metadata(root: Path, splits: dict[str, list], column: str = "label") -> Path:
    for split, values in splits.items():
        (root / split).mkdir(parents=True)
        for number in range(len(values)):
            (root / split / f"{number}.jpg").write_bytes(jpeg(number))
        lines = [f"file_name,id,{column}", *(f"{number}.jpg,{number},{value}" for number, value in enumerate(values))]
        (root / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def test_pictures_beside_a_table_of_their_labels(tmp_path):
    root = with_metadata(tmp_path / "kg [1]", {"train": ["x", "y"] * 5, "Val": ["y", "x"], "test": ["x", "y"]})
    dataset = open_quietly(root)
    assert dataset.classes == ("x", "y")
    assert dataset.source == "metadata.csv: labels from column label"
    train = parts(dataset)["train"]
    assert labels(dataset) == {"train": [0, 1] * 5, "validation": [1, 0], "test": [0, 1]}
    assert [train.read(i) for i in range(10)] == [jpeg(i) for i in range(10)]


def test_one_table_at_the_root_without_splits(tmp_path):
    with_metadata(tmp_path / "kg", {".": [0, 1] * 20}, "target")
    dataset, said = open_and_listen(tmp_path / "kg", label="target")
    assert dataset.classes == ("0", "1") and len(said) == 2
    assert {split: np.bincount(samples.labels).tolist() for split, samples in parts(dataset).items()} == {
        "train": [16, 16], "validation": [2, 2], "test": [2, 2]}
    for samples in parts(dataset).values():
        for index in range(len(samples)):
            row = int(samples.name_of(index).rpartition("/")[2].removesuffix(".jpg"))
            assert samples.read(index) == jpeg(row) and samples.labels[index] == row % 2


def test_pictures_that_the_table_leaves_out_are_counted(tmp_path):
    root = with_metadata(tmp_path / "kg", {"train": ["x", "y"] * 5, "test": ["x", "y"], "val": ["x", "y"]})
    (root / "train" / "extra.jpg").write_bytes(jpeg(99))
    dataset, said = open_and_listen(root)
    assert len(parts(dataset)["train"]) == 10
    assert said == ["kg: 15 pictures and 14 rows in metadata.csv; pictures without a row are left out"]


@pytest.mark.parametrize("deeper", ["", "a/"])
def test_one_table_at_the_root_for_several_split_folders(tmp_path, deeper):
    """Its own labels count, not the names of folders between the splits and the pictures."""
    lines = ["file_name,label"]
    for split, count in (("train", 10), ("Val", 4), ("test", 6)):
        (tmp_path / "set" / split / deeper).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "set" / split / deeper / f"{number}.jpg").write_bytes(jpeg(number))
            lines.append(f"{split}/{deeper}{number}.jpg,{'xy'[number % 2]}")
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(lines) + "\n")
    dataset = open_quietly(tmp_path / "set")
    assert dataset.classes == ("x", "y")
    assert labels(dataset) == {"train": [0, 1] * 5, "validation": [0, 1] * 2, "test": [0, 1] * 3}
    assert "/test/" in parts(dataset)["test"].name_of(0)


def test_a_column_that_names_the_splits_is_heeded(tmp_path):
    root = with_metadata(tmp_path / "kg", {".": ["x", "y"] * 12})
    lines = (root / "metadata.csv").read_text().splitlines()
    splits = ["split", *("Train" if row < 16 else "val" if row < 18 else "test" for row in range(24))]
    (root / "metadata.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits)) + "\n")
    dataset = open_quietly(root)
    assert labels(dataset) == {"train": [0, 1] * 8, "validation": [0, 1], "test": [0, 1] * 3}
    assert [parts(dataset)["test"].read(i) for i in range(6)] == [jpeg(i) for i in range(18, 24)]


def test_a_table_of_which_a_file_is_missing_is_refused(tmp_path):
    root = toy.table(tmp_path / "set", splits=("train",))
    (root / "data" / "train-00000-of-00001.parquet").rename(root / "data" / "train-00000-of-00002.parquet")
    refused(root, r"train-\*-of-00002.\*: 1 of 2 files are there; get the others")


def test_a_row_without_a_label_is_said_to_have_none(tmp_path):
    root = with_metadata(tmp_path / "kg", {".": ["x", "y", "", "NA"] * 6})
    refused(root, r"2.jpg: no label .6 such in train.; label or remove it")


def test_class_folders_beside_a_table_without_labels_are_read(tmp_path):
    root = image_folder(tmp_path / "set", train={"a": 6, "b": 4}, val={"a": 1, "b": 2}, test={"a": 2, "b": 1})
    (root / "metadata.csv").write_text("file_name,licence\ntrain/a/00.jpg,free\n")
    dataset, said = open_and_listen(root)
    assert len(parts(dataset)["train"]) == 10
    assert said == []


@pytest.mark.parametrize("content, message", [
    (b"file_name,label\n", "has no rows; it needs one for each picture"),
    (b"file_name;label\n0.jpg;x\n", "has no column file_name; its columns: file_name;label .they are separated by"),
    (b"FILE_NAME,label\n0.jpg,x\n", "has no column file_name; its columns: FILE_NAME, label"),
    ("file_name,label\n0.jpg,caf\xe9\n".encode("latin-1"), "not in UTF-8; save it as UTF-8"),
    ("file_name,label\n0.jpg,x\n".encode("utf-16"), "not in UTF-8; save it as UTF-8"),
])
def test_metadata_that_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    refused(tmp_path, f"{tmp_path}/metadata.csv: {message}")


# Storage

def test_a_table_that_was_cloned_without_git_lfs(tmp_path):
    root = toy.table(tmp_path / "set")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    (root / "data" / "test-00000-of-00001.parquet").write_bytes(pointer)
    refused(root, "test-00000-of-00001.parquet is a Git LFS pointer, not the table; run git lfs pull")


def test_a_snapshot_of_tables_links_to_its_blobs(tmp_path):
    plain = toy.table(tmp_path / "plain")
    blobs = tmp_path / "hub" / "datasets--me--x" / "blobs"
    snapshot = tmp_path / "hub" / "datasets--me--x" / "snapshots" / "abc" / "data"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (plain / "data").iterdir():
        path.rename(blobs / path.name[:4])
        (snapshot / path.name).symlink_to(f"../../../blobs/{path.name[:4]}")
    dataset = open_quietly(snapshot.parent)
    assert labels(dataset)["validation"] == [0, 1, 2] * 8


# The built-in set

def test_leaves_are_drawn():
    dataset = open_quietly("leaves")
    assert dataset.classes == leaves.CLASSES and list(dataset.splits) == list(SPLITS)
    for split, samples in parts(dataset).items():
        assert len(samples) == leaves.SIZES[split]
        for index in (0, 1, len(samples) - 1):
            picture, label = leaves.draw(split, index)
            drawn = samples.read(index)
            assert isinstance(drawn, Image.Image) and drawn.tobytes() == picture.tobytes()
            assert samples.labels[index] == label


def test_leaves_need_no_datasets_library():
    code = ("import sys; sys.modules['datasets'] = None\n"
            "from kd.data.table import open_dataset; open_dataset('leaves')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = code.replace("'leaves'", "'beans'")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert "pip install datasets" in result.stderr.splitlines()[-1]


class Bomb:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def test_nothing_in_a_dataset_is_executed(tmp_path):
    """A pickle under every name that some loader unpickles, and a loading script: refused or not even opened."""
    flag = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(flag))
    root = hub_folder(tmp_path / "script", {"train": [0, 1] * 9, "validation": [0, 1], "test": [0, 1]})
    (root / "script.py").write_text(f"open({str(flag)!r}, 'w')")
    refused(root, "script.py")
    for name in ("train-0.pkl", "train-0.parquet", "train-0.arrow", "dataset_info.json", "state.json", "train-0.npy"):
        root = hub_folder(tmp_path / name.replace(".", "_"), {"train": [0, 1] * 9, "validation": [0], "test": [0]})
        (root / "data" / name).write_bytes(bomb)
        try:
            open_dataset(str(root), say=lambda _: None)
        except BadInput:
            pass
    root = image_folder(tmp_path / "pictures", **FULL)
    (root / "train" / "a" / "x.pkl").write_bytes(bomb)
    open_dataset(str(root), say=lambda _: None).read(6)  # kd/data/decoding.py refuses it by name
    assert not flag.exists()


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
def test_real_photographs():
    dataset = open_quietly(BEANS)
    assert dataset.classes == ("angular_leaf_spot", "bean_rust", "healthy")
    assert {split: len(samples) for split, samples in parts(dataset).items()} == {
        "train": 1034, "validation": 133, "test": 128}
    last = parts(dataset)["test"].read(127)
    assert isinstance(last, bytes) and Image.open(io.BytesIO(last)).size == (500, 500)


def test_an_empty_name_is_not_the_folder_that_one_works_in():
    refused("", "^--dataset is empty; give leaves, beans, a Hub id or a folder")


OPEN = textwrap.dedent("""
    import json, sys
    from kd import BadInput
    from kd.data.table import open_dataset
    for name in sys.argv[1:]:
        lines = []
        try:
            dataset = open_dataset(name, say=lines.append)
            print(json.dumps([dataset.name, dataset.classes,
                              {split: dataset.labels[rows].tolist() for split, rows in dataset.splits.items()},
                              dataset.fingerprint, dataset.read(int(dataset.splits["train"][1])).hex(), lines]))
        except BadInput as error:
            print(json.dumps(str(error)))
""")


def open_in_process(names: list[str], home: Path, endpoint: str, **variables: Path) -> list[Any]:
    """open_dataset in a process of its own, because the Hub's client reads its settings when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment |= {name: str(value) for name, value in variables.items()}
    result = subprocess.run([sys.executable, "-c", OPEN, *names], cwd=ROOT, env=environment, text=True,
                            capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub_answers(tmp_path_factory) -> dict[str, Any]:
    """What a stand-in Hub, which has only someone/toy, leads to: first online, then offline with the same cache."""
    folder = tmp_path_factory.mktemp("hub")
    served = hub_folder(folder / "served", {"train": [0, 1] * 9, "validation": [0, 1], "test": [1, 0]})
    server = standin_hub.serve(served, "someone/toy")
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    online = open_in_process(["someone/toy", "AI-Lab-Makerere/bean"], folder / "home", standin_hub.address_of(server))
    server.shutdown()
    server.server_close()
    offline = open_in_process(["someone/toy", "beans", "acme/leaves"], folder / "home", "http://127.0.0.1:9")
    return dict(zip(("online", "unknown", "offline", "unreachable", "acme/leaves"), online + offline, strict=True))


def test_hub_that_cannot_be_reached(hub_answers):
    message = hub_answers["unreachable"]
    assert isinstance(message, str) and "the Hub cannot be reached" in message
    assert "`python train.py --dataset leaves`" in message


def test_hub_dataset_by_its_id_and_then_offline_from_the_cache(hub_answers):
    online, offline = hub_answers["online"], hub_answers["offline"]
    assert online[:3] == ["someone/toy", ["a", "b"], {"train": [0, 1] * 9, "validation": [0, 1], "test": [1, 0]}]
    read = "someone/toy: images from column picture, labels from column label (ClassLabel); classes a, b"
    assert online[4:] == [jpeg(1).hex(), [read]]
    assert offline[:5] == online[:5]  # with the same fingerprint, so that its decoded pictures are dataset again
    assert offline[5] == [read]


def test_hub_id_that_does_not_exist(hub_answers):
    message = hub_answers["unknown"]
    assert "neither a folder here nor a data set on the Hub" in message
