"""kd/data/tables.py: which column is which, labels of every kind, and tables of every writer."""

import os
from pathlib import Path

import numpy as np
import pytest

from kd import BadInput
from kd.data.frames import decode
from kd.data.samples import Reading
from tests.helpers import toy
from tests.helpers.opening import hub_folder, image_folder, jpeg, labels, open_and_listen, open_quietly, refused

datasets = pytest.importorskip("datasets")


# The Hub's layout

def test_hub_layout(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]})
    dataset = open_quietly(root)
    assert (dataset.name, dataset.classes) == ("toy", ("a", "b"))
    assert {split: samples.labels.tolist() for split, samples in dataset.splits.items()} == {
        "train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]}
    train = dataset.splits["train"]
    assert [train.read(index) for index in range(4)] == [jpeg(index) for index in range(4)]
    assert train.name_of(2) == f"{root} train row 2 (2.jpg)"


def test_hub_layout_notices_a_changed_file(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [0]})
    first = open_quietly(root).splits
    path = root / "data" / "train-00000.parquet"
    os.utime(path, (1, 1))
    second = open_quietly(root).splits
    assert first["train"].fingerprint != second["train"].fingerprint
    assert first["test"].fingerprint == second["test"].fingerprint


@pytest.mark.parametrize("feature, values, classes", [
    (datasets.Value("string"), ["rust", "healthy", "rust"], ("healthy", "rust")),
    (datasets.Value("int32"), [10, 9, 10], ("9", "10")),
])
def test_labels_of_text_and_whole_numbers_are_encoded_sorted(tmp_path, feature, values, classes):
    splits = {"train": values, "validation": values[:2], "test": values[1:]}
    dataset = open_quietly(hub_folder(tmp_path, splits, feature))
    assert dataset.classes == classes
    assert dataset.splits["train"].labels.tolist() == [1, 0, 1]
    assert dataset.splits["test"].labels.tolist() == [0, 1]


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
    refused(hub_folder(tmp_path / "3", {"train": [-1, -1]} | fine), "no labelled image")
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
    train = open_quietly(root).splits["train"]
    with pytest.raises(BadInput, match="/etc/passwd leads out of the dataset's folder"):
        train.read(0)
    with pytest.raises(BadInput, match="train row 1 has no image"):
        train.read(1)


@pytest.mark.parametrize("path", ["../secret/*.parquet", "/etc/*.parquet", "https://example.org/x.parquet",
                                  "hf://datasets/a/b/x.parquet", "zip://x.parquet::https://example.org/x.zip"])
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_card_may_not_lead_out_of_the_folder(tmp_path, path, card):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1]})
    hub_folder(tmp_path / "secret", {"train": [0, 1]})
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ['{path}']\n"
    (root / card).write_text(f"---\n{text}---\n" if card == "README.md" else text)
    assert path in refused(root, f"toy/{card}.* leads out of the dataset's folder")


def test_linked_parquet_may_not_lead_out_of_the_folder(tmp_path):
    root = hub_folder(tmp_path / "toy", {"train": [0, 1], "test": [0, 1]})
    (root / "data" / "test-00000.parquet").rename(tmp_path / "outside.parquet")
    (root / "data" / "test-00000.parquet").symlink_to(tmp_path / "outside.parquet")
    refused(root, "test-00000.parquet leads out of the dataset's folder")


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
        dataset = open_quietly(root, Reading(label=name))
        assert dataset.classes == tuple(f"{name}{i}" for i in range(int(kind[-1])))
        assert labels(dataset)["test"] == [row % int(kind[-1]) for row in range(24)]
    refused(root, "--label fine: not a column of classes, text or numbers", Reading(label="fine"))
    refused(root, "--label image: not a column", Reading(label="image"))


def test_a_choice_of_pictures_is_asked_for_and_made_with_image(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"photo": [{"bytes": jpeg(i), "path": None} for i in range(20)],
            "mask": [{"bytes": jpeg(100 + i), "path": None} for i in range(20)], "label": [0, 1] * 10}
    root = tmp_path / "set"
    root.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(root / "train.parquet")
    refused(root, "which column has the pictures. Choose with --image: photo, mask")
    train = open_and_listen(root, Reading(image="mask"))[0].splits["train"]
    first = int(train.key_of(0).removeprefix("row "))
    assert train.read(0) == jpeg(100 + first)
    refused(root, "--image label: not a column of pictures", Reading(image="label"))


def test_every_column_of_pictures_has_frames_of_its_own(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"photo": [{"bytes": jpeg(0), "path": None}] * 20, "mask": [{"bytes": jpeg(200), "path": None}] * 20,
            "label": [0, 1] * 10}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    for column, red in (("photo", 0), ("mask", 200), ("photo", 0)):
        dataset, _ = open_and_listen(tmp_path / "set", Reading(image=column))
        data = decode(dataset, size=8, crop_pct=1.0, interpolation="bilinear", cache_dir=tmp_path / "cache",
                      say=lambda line: None)
        assert abs(int(data.train.frames.read([0])[0, 4, 4, 0]) - red) <= 1
    assert len(list((tmp_path / "cache").glob("*-train-*.frames"))) == 2    # each is decoded once


@pytest.mark.parametrize("name", ["set[12]", "what?", "a*"])
def test_a_table_in_a_folder_whose_name_would_be_a_pattern_is_refused(tmp_path, name):
    hub_folder(tmp_path / "set1", {"train": [0, 1] * 10})
    root = hub_folder(tmp_path / name, {"train": [0, 1] * 10})
    refused(root, "has one of the characters .*; rename the folder")


def test_labels_with_fractions_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float64")})
    rows = {"image": [{"bytes": jpeg(i), "path": None} for i in range(4)], "label": [0.5, 1.0, 2.0, 3.0]}
    tmp_path.joinpath("set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    refused(tmp_path / "set", "--label label: .* numbers with fractions there")


# Writers

@pytest.mark.parametrize("writer", ["pandas", "polars", "pyarrow"])
@pytest.mark.parametrize("raw", [False, True])
def test_tables_of_other_libraries(tmp_path, writer, raw):
    """They do not know the type Image: a picture is bytes, or a struct of bytes and path."""
    root = toy.table(tmp_path / writer, {"label": "str:3"}, writer=writer, raw=raw)
    dataset = open_quietly(root)
    assert dataset.classes == ("label0", "label1", "label2")
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 24, "validation": 24, "test": 24}
    assert labels(dataset)["train"] == [0, 1, 2] * 8
    assert dataset.splits["test"].read(5) == toy.encoded(toy.picture("test/5"), "PNG")


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
    refused(root, "has no configuration 'digits'; choose one with --config: cropped_digits", Reading(config="digits"))
    dataset, said = open_and_listen(root, Reading(config="full_numbers"))
    assert len(dataset.classes) == 5 and len(dataset.splits["test"]) == 24
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
    assert dataset.source == "metadata.csv: images from column image, labels from column label (large_string)"
    train = dataset.splits["train"]
    assert labels(dataset) == {"train": [0, 1] * 5, "validation": [1, 0], "test": [0, 1]}
    assert [train.read(i) for i in range(10)] == [jpeg(i) for i in range(10)]


def test_one_table_at_the_root_without_splits(tmp_path):
    with_metadata(tmp_path / "kg", {".": [0, 1] * 20}, "target")
    dataset, said = open_and_listen(tmp_path / "kg", Reading(label="target"))
    assert dataset.classes == ("0", "1") and len(said) == 2
    assert {split: np.bincount(samples.labels).tolist() for split, samples in dataset.splits.items()} == {
        "train": [16, 16], "validation": [2, 2], "test": [2, 2]}
    for samples in dataset.splits.values():
        for index in range(len(samples)):
            row = int(samples.name_of(index).rpartition("/")[2].removesuffix(".jpg)"))
            assert samples.read(index) == jpeg(row) and samples.labels[index] == row % 2


def test_pictures_that_the_table_leaves_out_are_counted(tmp_path):
    root = with_metadata(tmp_path / "kg", {"train": ["x", "y"] * 5, "test": ["x", "y"], "val": ["x", "y"]})
    (root / "train" / "extra.jpg").write_bytes(jpeg(99))
    dataset, said = open_and_listen(root)
    assert len(dataset.splits["train"]) == 10
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
    assert "/test/" in dataset.splits["test"].name_of(0)


def test_a_column_that_names_the_splits_is_heeded(tmp_path):
    root = with_metadata(tmp_path / "kg", {".": ["x", "y"] * 12})
    lines = (root / "metadata.csv").read_text().splitlines()
    splits = ["split", *("Train" if row < 16 else "val" if row < 18 else "test" for row in range(24))]
    (root / "metadata.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits)) + "\n")
    dataset = open_quietly(root)
    assert labels(dataset) == {"train": [0, 1] * 8, "validation": [0, 1], "test": [0, 1] * 3}
    assert [dataset.splits["test"].read(i) for i in range(6)] == [jpeg(i) for i in range(18, 24)]


def test_a_table_of_which_a_file_is_missing_is_refused(tmp_path):
    root = toy.table(tmp_path / "set", splits=("train",))
    (root / "data" / "train-00000-of-00001.parquet").rename(root / "data" / "train-00000-of-00002.parquet")
    refused(root, r"train-\*-of-00002.parquet: 1 of 2 files are there; get the others")


def test_a_row_without_a_label_is_said_to_have_none(tmp_path):
    root = with_metadata(tmp_path / "kg", {".": ["x", "y", "", "NA"] * 6})
    refused(root, r"no label .12 such in train; -1 and empty cells count as none")


def test_class_folders_beside_a_table_without_labels_are_read(tmp_path):
    root = image_folder(tmp_path / "set", train={"a": 6, "b": 4}, val={"a": 1, "b": 2}, test={"a": 2, "b": 1})
    (root / "metadata.csv").write_text("file_name,licence\ntrain/a/00.jpg,free\n")
    dataset, said = open_and_listen(root)
    assert len(dataset.splits["train"]) == 10
    assert said == ["set: metadata.csv has no column called label; the class folders are read"]


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
