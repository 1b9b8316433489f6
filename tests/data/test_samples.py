"""kd/data/samples.py: folders of pictures, whatever lies in them and whatever they are called."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kd.data.samples import Reading
from tests.helpers import toy
from tests.helpers.opening import FULL, image_folder, jpeg, labels, open_and_listen, open_quietly, refused


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
    assert {split: samples.labels.tolist() for split, samples in dataset.splits.items()} == {
        "train": [0] * 6 + [1] * 4, "validation": [0, 1, 1], "test": [0, 0, 1]}
    train = dataset.splits["train"]
    assert train.labels.dtype == np.int64
    assert train.name_of(6) == str(root / "train" / "b" / "00.jpg")
    assert train.read(6) == (root / "train" / "b" / "00.jpg").read_bytes()


def test_files_of_any_name_and_depth_are_samples(tmp_path):
    root = image_folder(tmp_path, **FULL)
    (root / "train" / "a" / "deeper" / "still").mkdir(parents=True)
    (root / "train" / "a" / "deeper" / "still" / "x.txt").write_bytes(jpeg(9))
    assert len(open_and_listen(root)[0].splits["train"]) == 11


def test_fingerprint_changes_with_the_content_and_location_does_not(tmp_path):
    root = image_folder(tmp_path, **FULL)
    first, again = open_quietly(root).splits["train"], open_quietly(root).splits["train"]
    assert (first.fingerprint, first.location) == (again.fingerprint, again.location)
    path = root / "train" / "a" / "03.jpg"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = open_quietly(root).splits["train"]
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
    refused(tmp_path / "empty", "no images in a layout that can be read .found: nothing.; it needs train/CLASS/")
    (tmp_path / "file.pkl").write_bytes(pickle.dumps("x"))
    refused(tmp_path / "file.pkl", "is a file; give the folder")
    refused(tmp_path / "emty", f"no such folder .did you mean {tmp_path / 'empty'}")


def test_links_may_not_leave_the_folder(tmp_path):
    outside = image_folder(tmp_path / "outside", **FULL)
    for number, (link, to) in enumerate({
            "train/a/link.jpg": outside / "train" / "a" / "00.jpg", "train/a/link": outside / "train" / "a",
            "train/c": outside / "train" / "a", "test": outside / "test", "train/b/x.jpg": Path("/etc/passwd"),
            "train/a/up.jpg": Path("../../../outside/train/a/01.jpg")}.items()):
        root = image_folder(tmp_path / str(number), train=FULL["train"])
        (root / link).symlink_to(to)
        refused(root, f"{link.replace('.', '[.]')}.* leads out of the dataset's folder")
    within = image_folder(tmp_path / "within", train=FULL["train"], test=FULL["test"])
    (within / "validation").symlink_to("test")
    (within / "train" / "a" / "link.jpg").symlink_to("00.jpg")
    assert len(open_quietly(within).splits["train"]) == 11


def test_odd_files_are_refused_by_name(tmp_path):
    root = image_folder(tmp_path, **FULL)
    os.mkfifo(root / "train" / "a" / "pipe.jpg")  # opening it would wait for ever
    refused(root, "pipe.jpg is neither a file nor a folder")
    (root / "train" / "a" / "pipe.jpg").unlink()
    (root / "train" / "a" / "circle").symlink_to("../..")
    refused(root, "circle is a link to a folder; .* or allow it with --follow-links")


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
    assert len(dataset.splits["train"]) == 11
    assert said == ["zoo: folders in a class of train belong to that class: a/young"]


def test_a_class_may_be_called_train(tmp_path):
    root = image_folder(tmp_path / "vehicles", **{"": {"bus": 10, "car": 10, "train": 12}})
    dataset, _ = open_and_listen(root)
    assert dataset.classes == ("bus", "car", "train") and dataset.whole
    assert sum(map(len, dataset.splits.values())) == 32
    refused(image_folder(tmp_path / "loose", **{"": {"train": 3, "test": 3, "docs": 1}}), "no images in a layout")


def test_classes_that_look_alike_are_named(tmp_path):
    dataset, said = open_and_listen(image_folder(tmp_path / "set", train={"Dog": 9, "cat": 9, "dog": 9}, val={"cat": 1},
                                                 test={"cat": 1}))
    assert dataset.classes == ("Dog", "cat", "dog")
    assert said == ["set: 'Dog' and 'dog' are different classes; rename them if that is wrong"]


def test_a_folder_that_is_no_split_is_left_out_and_named(tmp_path):
    root = image_folder(tmp_path / "fruits", **FULL, **{"test-multiple_fruits": {"a": 3, "b": 3}})
    dataset, said = open_and_listen(root)
    assert said == ["fruits: left out: test-multiple_fruits (no name of a split)"]
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 10, "validation": 3, "test": 3}


def test_class_folders_at_the_root_are_train(tmp_path):
    root = image_folder(tmp_path / "flowers", **{"": {"daisy": 20, "rose": 30}})
    (root / "LICENSE.txt").write_text("x")
    dataset, said = open_and_listen(root)
    assert dataset.classes == ("daisy", "rose") and dataset.source == "class folders; all pictures are train"
    assert {split: np.bincount(samples.labels).tolist() for split, samples in dataset.splits.items()} == {
        "train": [16, 24], "validation": [2, 3], "test": [2, 3]}
    assert len(said) == 2 and all("carved from train" in line for line in said)


def test_a_folder_in_a_folder_as_archives_hold_it(tmp_path):
    image_folder(tmp_path / "download" / "archive" / "pets", **FULL)
    assert len(open_quietly(tmp_path / "download").splits["train"]) == 10


def test_folders_without_a_file_are_no_class(tmp_path):
    root = image_folder(tmp_path / "ph", **FULL)
    for split in ("train", "test"):
        (root / split / "unknown").mkdir()
    (root / "test" / "hidden").mkdir()
    (root / "test" / "hidden" / ".keep").write_text("")
    dataset, said = open_and_listen(root)
    assert dataset.classes == ("a", "b") and len(dataset.splits["test"]) == 3
    assert said == ["ph: folders of train without a file, which are no class: unknown",
                    "ph: folders of test without a file, which are no class: hidden, unknown"]


def test_what_programs_leave_behind_is_no_picture_and_no_class(tmp_path):
    clean, littered = (toy.class_folders(tmp_path / name / "set") for name in ("clean", "littered"))
    folders = [littered, *(path for path in littered.rglob("*") if path.is_dir())]
    for folder in folders:
        toy.junk(folder)
    expected, dataset = open_quietly(clean), open_quietly(littered)
    assert dataset.classes == expected.classes and labels(dataset) == labels(expected)
    for split, samples in dataset.splits.items():
        assert [samples.read(i) for i in range(16)] == [expected.splits[split].read(i) for i in range(16)]


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
    train = dataset.splits["train"]
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


def test_a_class_that_differs_in_case_is_named(tmp_path):
    refused(image_folder(tmp_path, train={"Cat": 3, "dog": 3}, test={"cat": 1}),
            "test has 'cat', which train lacks .it has 'Cat': if that is the same class, rename one.")


def test_links_out_of_the_folder_are_followed_by_consent(tmp_path):
    """Subsets of ImageNet are, as a rule, folders of links."""
    outside = image_folder(tmp_path / "imagenet", train={"n01": 5, "n02": 4, "n03": 3})
    root = tmp_path / "subset"
    (root / "train").mkdir(parents=True)
    for name in ("n01", "n03"):
        (root / "train" / name).symlink_to(outside / "train" / name)
    (root / "test" / "n01").mkdir(parents=True)
    (root / "test" / "n01" / "x.jpg").symlink_to(outside / "train" / "n01" / "00.jpg")
    refused(root, "leads out of the dataset's folder .*or allow it with --follow-links")
    dataset, _ = open_and_listen(root, Reading(follow_links=True))
    assert dataset.classes == ("n01", "n03")
    assert {split: len(samples) for split, samples in dataset.splits.items()} == {
        "train": 6, "validation": 2, "test": 1}
    assert dataset.splits["test"].read(0) == (outside / "train" / "n01" / "00.jpg").read_bytes()
    (root / "train" / "n01").unlink()
    (root / "train" / "n01").mkdir()
    (root / "train" / "n01" / "deeper").symlink_to(root / "train")
    refused(root, "deeper is a link in a circle", Reading(follow_links=True))


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path):
    """The Hub's client keeps a repository's files in `blobs`, and links to them in `snapshots`."""
    plain = image_folder(tmp_path / "plain", **FULL)
    snapshot = tmp_path / "hub" / "datasets--me--pets" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "datasets--me--pets" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.rglob("*.jpg"))):
        (blobs / str(number)).write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    dataset = open_quietly(snapshot)
    assert labels(dataset) == labels(open_quietly(plain))
    assert dataset.splits["train"].read(3) == open_quietly(plain).splits["train"].read(3)
    (tmp_path / "secret").write_text("x")
    (snapshot / "train" / "a" / "x.jpg").symlink_to(tmp_path / "secret")
    refused(snapshot, "x.jpg leads out of the dataset's folder")


def test_a_folder_in_no_layout_is_described(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "train.csv").write_text("file,label\n")
    refused(tmp_path, r"found: 8 .jpg, 1 .csv\); it needs train/CLASS/ or CLASS/ folders of pictures, or pictures "
            "with a metadata.csv")


def test_a_folder_that_hides_a_dataset_of_the_hub_is_named(tmp_path, monkeypatch):
    (tmp_path / "beans").mkdir()
    monkeypatch.chdir(tmp_path)
    refused("beans", f"this is the folder {tmp_path}/beans, which hides any dataset of the Hub that has its name")
