"""kd/data/table.py: always three splits, each labelled, the carved ones the same for everybody."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd import BadInput
from kd.data import table as module
from kd.data.table import Table, open_splits
from tests.helpers.opening import FULL, image_folder, labels, open_and_listen, parts, refused


# Missing splits

def test_missing_splits_are_carved_from_train_and_said(tmp_path):
    root = image_folder(tmp_path, train={"a": 40, "b": 20})
    dataset, said = open_and_listen(root)
    splits = parts(dataset)
    names = {split: [samples.name_of(index) for index in range(len(samples))] for split, samples in splits.items()}
    assert sum(map(len, names.values())) == 60 == len(set().union(*names.values()))
    assert {split: sorted(Counter(samples.labels.tolist()).values()) for split, samples in splits.items()} == {
        "train": [16, 32], "validation": [2, 4], "test": [2, 4]}
    for samples in splits.values():
        for index in range(len(samples)):
            assert Path(samples.name_of(index)).parent.name == "ab"[samples.labels[index]]
            assert samples.read(index) == Path(samples.name_of(index)).read_bytes()
    assert len(said) == 2 and "no test split; 6 images carved from train" in said[0]
    assert "no validation split; 6 images" in said[1]


def test_the_same_pictures_are_carved_wherever_the_data_set_lies(tmp_path):
    splits = {"train": {"a": 40, "b": 20}, "test": {"a": 1, "b": 1}}

    def held_out(root):
        samples = parts(open_and_listen(root)[0])["validation"]
        return [samples.key_of(index) for index in range(len(samples))]

    first = held_out(image_folder(tmp_path / "here", **splits))
    assert first == held_out(image_folder(tmp_path / "there" / "copy", **splits))
    assert len(first) == 6 and all(key.startswith("train/") for key in first)


def test_more_pictures_move_few_of_those_that_are_carved(tmp_path):
    def held_out(root):
        samples = parts(open_and_listen(root)[0])["validation"]
        return {samples.key_of(index) for index in range(len(samples))}

    few = image_folder(tmp_path / "few", train={"a": 40, "b": 40}, test={"a": 1, "b": 1})
    more = image_folder(tmp_path / "more", train={"a": 50, "b": 50}, test={"a": 1, "b": 1})
    assert len(held_out(few)) == 8 and len(held_out(more)) == 10
    assert len(held_out(few) & held_out(more)) >= 4


def test_a_class_of_one_picture_stays_in_train(tmp_path):
    dataset, _ = open_and_listen(image_folder(tmp_path, train={"a": 20, "b": 20, "c": 1}))
    assert {split: Counter(samples.labels.tolist()) for split, samples in parts(dataset).items()} == {
        "train": {0: 16, 1: 16, 2: 1}, "validation": {0: 2, 1: 2}, "test": {0: 2, 1: 2}}


def test_the_digest_of_a_split_changes_with_its_pictures_and_classes_only(tmp_path):
    def digests(root):
        dataset = open_and_listen(root)[0]
        return {split: each["digest"] for split, each in dataset.record()["splits"].items()}

    first = digests(image_folder(tmp_path / "first", **FULL))
    assert first == digests(image_folder(tmp_path / "second", **FULL))
    one_more = digests(image_folder(tmp_path / "third", **{**FULL, "test": {"a": 3, "b": 1}}))
    assert one_more["test"] != first["test"] and one_more["train"] == first["train"]
    other_class = image_folder(tmp_path / "fourth", **FULL)
    (other_class / "test" / "a" / "00.jpg").rename(other_class / "test" / "b" / "09.jpg")
    assert digests(other_class)["test"] != first["test"]


def test_what_a_run_keeps_of_its_data(tmp_path):
    kept = open_and_listen(image_folder(tmp_path / "set", train={"a": 10, "b": 10}, val={"a": 1, "b": 1}))[0].record()
    assert kept["name"] == "set" and kept["classes"] == ["a", "b"]
    assert kept["source"] == "class folders; train from train, validation from val"
    assert {split: (each["pictures"], each["carved"]) for split, each in kept["splits"].items()} == {
        "train": (18, False), "validation": (2, False), "test": (2, True)}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(counts=st.lists(st.integers(3, 60), min_size=2, max_size=5))
def test_every_part_has_every_class(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    table = Table("x", tuple(map(str, range(len(counts)))), labels, {"train": np.arange(len(labels))},
                  lambda row: bytes([row % 256]), str, str, "p", "i", "s")
    splits = module._with_three_splits(table, lambda _: None).splits
    assert sorted(np.concatenate(list(splits.values()))) == list(range(sum(counts)))
    for rows in splits.values():
        assert set(labels[rows].tolist()) == set(range(len(counts)))


def test_too_few_images_to_carve(tmp_path):
    refused(image_folder(tmp_path, train={"a": 2, "b": 2}), "no validation split, and too few pictures for one")


# The splits of a trained model

def test_labels_are_numbered_as_the_model_numbers_them(tmp_path):
    root = image_folder(tmp_path / "field", test={"wasp": 2, "bee": 3})
    dataset = open_splits(str(root), ["test"], ("ant", "bee", "wasp"), say=lambda line: None)
    assert dataset.classes == ("ant", "bee", "wasp")
    assert labels(dataset) == {"test": [1, 1, 1, 2, 2]}


def test_pictures_without_splits_are_the_split_that_is_asked_for(tmp_path):
    said: list[str] = []
    root = image_folder(tmp_path / "field", **{"": {"wasp": 2, "bee": 3}})
    dataset = open_splits(str(root), ["test"], ("bee", "wasp"), say=said.append)
    assert labels(dataset) == {"test": [0, 0, 0, 1, 1]}
    assert said[0] == "field: it has no splits, so that all of its pictures are test"


def test_a_split_that_is_not_there_and_a_class_that_the_model_does_not_know(tmp_path):
    def refusal(root, classes):
        with pytest.raises(BadInput) as caught:
            open_splits(str(root), ["test"], classes, say=lambda line: None)
        return str(caught.value)

    assert "has no test split (it has: train); choose another with --split, or add it" in refusal(
        image_folder(tmp_path / "1", train={"a": 2, "b": 2}), ("a", "b"))
    message = refusal(image_folder(tmp_path / "2", test={"a": 2, "B": 2}), ("a", "b"))
    assert "test has 'B', which the model does not know; its classes: a, b" in message


def test_the_data_set_of_the_run_is_carved_as_in_training(tmp_path):
    root = image_folder(tmp_path / "set", train={"a": 30, "b": 30})
    trained = parts(open_and_listen(root)[0])["test"]
    again = parts(open_splits(str(root), ["test"], ("a", "b"), carve=True, say=lambda line: None))["test"]
    assert [trained.name_of(i) for i in range(6)] == [again.name_of(i) for i in range(6)]
    assert again.labels.tolist() == trained.labels.tolist()
