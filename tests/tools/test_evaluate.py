"""The scores of a saved model against those of the run that trained it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from kd import BadInput
from kd.data.samples import Reading
from kd.tools import evaluate
from tests.conftest import draw, tiny_config


def test_the_command_gives_the_numbers_of_the_run(trained, capsys):
    config, result = trained
    student, flags = f"{config.out}/student", ["--cache-dir", config.cache_dir, "--device", "cpu", "--amp", "off"]
    capsys.readouterr()
    found = evaluate.main([student, "--dataset", config.dataset, "--json", *flags])
    assert json.loads(capsys.readouterr().out) == found
    row = result["student"]
    for name in ("accuracy", "correct", "total", "macro_f1"):
        assert found[name] == row[f"test_{name}"]
    for name in ("loss", "calibration_error", "confusion"):
        assert found[name] == row[name]  # to the last bit

    history = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    best = max((entry for entry in history if entry["role"] == "student"), key=lambda entry: entry["accuracy"])
    found = evaluate.main([student, "--dataset", config.dataset, "--split", "validation", *flags])
    assert {name: found[name] for name in ("accuracy", "loss", "macro_f1")} == {
        name: best[name] for name in ("accuracy", "loss", "macro_f1")}
    printed = capsys.readouterr().out
    assert f"{100 * found['accuracy']:.1f} % ({found['correct']}/12)" in printed and "true class" in printed
    assert evaluate.main([student, "--dataset", config.dataset, "--split", "train", *flags])["total"] == 42


def test_the_data_set_is_that_of_the_run_where_none_is_named(trained):
    config, _ = trained
    assert evaluate.main([f"{config.out}/student", "--cache-dir", config.cache_dir])["dataset"] == config.dataset


def test_bad_input_is_one_line(trained, tmp_path):
    config, _ = trained
    student = f"{config.out}/student"
    for arguments, message in (
            ([str(tmp_path / "none"), "--dataset", config.dataset], "no saved model"),
            ([student, "--dataset", "leaves"], "leaves: test has 'angular_leaf_spot', which the model does not know"),
            ([student, "--dataset", config.dataset, "--split", "tset"], "--split"),
            ([str(shutil.copytree(student, tmp_path / "alone"))], "--dataset: say which")):
        with pytest.raises(BadInput, match=message) as caught:
            evaluate.main([*arguments, "--cache-dir", config.cache_dir])
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def carved(tmp_path_factory) -> tuple[train.Config, dict]:
    """A finished run on a data set without test and validation, under a seed that is not 0; and its result."""
    folder, generator = tmp_path_factory.mktemp("carved"), np.random.default_rng(0)
    for kind in ("blob", "plain", "stripes"):
        (folder / "photos" / "train" / kind).mkdir(parents=True)
        for number in range(30):
            draw(kind, generator).save(folder / "photos" / "train" / kind / f"{number}.png")
    config = dataclasses.replace(tiny_config(folder / "photos", folder), seed=3, epochs=1, teacher_epochs=0)
    return config, train.main(config)


def scores_of(config: train.Config, capsys, *flags: str) -> tuple[dict, str]:
    """The result of the command, and what it said on stderr."""
    capsys.readouterr()
    found = evaluate.main([f"{config.out}/student", "--cache-dir", config.cache_dir, "--device", "cpu", "--amp", "off",
                           *flags])
    return found, capsys.readouterr().err


def test_a_carved_test_split_is_that_of_the_run_whatever_its_seed(carved, tmp_path, capsys):
    config, result = carved
    found, said = scores_of(config, capsys)
    row = result["student"]
    assert (found["confusion"], found["loss"]) == (row["confusion"], row["loss"])     # to the last bit
    assert found["split_of_run"] is True and "trained on" not in said
    # and so in a copy that lies elsewhere, which would otherwise be taken for new pictures
    found, said = scores_of(config, capsys, "--dataset", str(shutil.copytree(config.dataset, tmp_path / "copy")))
    assert (found["loss"], found["split_of_run"]) == (row["loss"], True) and "trained on" not in said


def test_a_test_split_that_is_not_the_run_s_is_told(carved, tmp_path, capsys):
    config, _ = carved
    root = Path(shutil.copytree(Path(config.out).parent, tmp_path / "all"))
    moved = dataclasses.replace(config, out=str(root / "run"), dataset=str(root / "photos"))
    record = json.loads((root / "run" / "config.json").read_text())

    def rewrite(**changes) -> None:
        (root / "run" / "config.json").write_text(json.dumps({**record, "dataset": moved.dataset, **changes}))

    rewrite()
    for number in range(30):    # a tenth of them comes into the test split
        shutil.copy(root / "photos/train/blob/0.png", root / f"photos/train/blob/new{number}.png")
    found, said = scores_of(moved, capsys)
    assert found["split_of_run"] is False
    assert "this is not the test split that the run had" in said and "may have been trained on some" in said

    rewrite(data={})            # an older version's, which carved by the seed
    found, said = scores_of(moved, capsys)
    assert found["split_of_run"] is None
    assert "this test split may not be the one that the run kept aside" in said and "may have been trained on" in said


def test_a_folder_with_only_test_and_only_some_classes_is_scored(trained, photos, tmp_path, capsys):
    config, result = trained
    shutil.copytree(photos / "test" / "stripes", tmp_path / "field" / "test" / "stripes")
    found, said = scores_of(config, capsys, "--dataset", str(tmp_path / "field"))
    whole = result["student"]["confusion"]
    assert found["confusion"] == [[0, 0, 0], [0, 0, 0], whole[2]]      # numbered as the model's classes are
    assert (found["correct"], found["total"]) == (whole[2][2], 4) and found["split_of_run"] is None
    assert found["classes_without_pictures"] == ["blob", "plain"] and "trained on" not in said

    scores_of(config, capsys, "--dataset", str(tmp_path / "field"))
    evaluate.main([f"{config.out}/student", "--cache-dir", config.cache_dir, "--dataset", str(tmp_path / "field")])
    assert "without a picture in test: 2 of 3 classes (blob, plain); macro-F1 is over" in capsys.readouterr().out


def test_the_data_set_is_read_as_the_run_read_it(trained, tmp_path, monkeypatch):
    """Columns and links of config.json count for the run's own data set, flags before them, and nothing elsewhere."""
    config, _ = trained
    out = Path(shutil.copytree(config.out, tmp_path / "run"))
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**record, "label": "fine", "follow_links": True}))
    asked = []

    def opened(name, splits, classes, reading, carve, say):
        asked.append((reading, carve))
        raise BadInput("far enough")

    monkeypatch.setattr(evaluate, "open_splits", opened)
    for flags in ([], ["--dataset", f"{config.dataset}/../{Path(config.dataset).name}"], ["--label", "coarse"],
                  ["--dataset", "leaves", "--config", "c"]):
        with pytest.raises(BadInput, match="far enough"):
            evaluate.main([str(out / "student"), *flags])
    assert [reading for reading, _ in asked] == [
        Reading(label="fine", follow_links=True), Reading(label="fine", follow_links=True),
        Reading(label="coarse", follow_links=True), Reading(config="c")]
    assert not any(carve for _, carve in asked)     # nothing was carved in the run
