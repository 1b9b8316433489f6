"""The scores of a saved model against those of the run that trained it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from kd import BadInput
from kd.scores import confusions
from kd.tools import evaluate, page
from kd.tools.predictions import read_predictions
from tests.conftest import draw, tiny_config


def scores_of(config: train.Config, capsys, *flags: str) -> tuple[dict, str, str]:
    """The result of the command, and what it said on stdout and stderr."""
    capsys.readouterr()
    found = evaluate.main([f"{config.out}/student", "--cache-dir", config.cache_dir, "--device", "cpu", "--amp", "off",
                           *flags])
    said = capsys.readouterr()
    return found, said.out, said.err


def test_the_command_gives_the_numbers_of_the_run(trained, capsys):
    config, result = trained
    found, printed, said = scores_of(config, capsys, "--json")
    assert json.loads(printed) == found and found["dataset"] == config.dataset
    assert (found["split_of_run"], "trained on" in said) == (True, False)
    row = result["student"]
    for name in ("accuracy", "correct", "total", "macro_f1"):
        assert found[name] == row[f"test_{name}"]
    for name in ("loss", "calibration_error"):
        assert found[name] == row[name]  # to the last bit

    history = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    best = max((entry for entry in history if entry["role"] == "student"), key=lambda entry: entry["accuracy"])
    found, printed, _ = scores_of(config, capsys, "--split", "validation")
    assert [found[name] for name in ("accuracy", "loss", "macro_f1")] == [
        best[name] for name in ("accuracy", "loss", "macro_f1")]
    assert f"{100 * found['accuracy']:.1f} % ({found['correct']}/12)" in printed and "true class" in printed
    assert scores_of(config, capsys, "--split", "train")[0]["total"] == 42


def test_bad_input_is_one_line(trained, tmp_path):
    config, _ = trained
    student = f"{config.out}/student"
    for arguments, message in (
            ([str(tmp_path / "none"), "--dataset", config.dataset], "no saved model"),
            ([student, "--dataset", "leaves"], "leaves: test has 'angular_leaf_spot', which the model does not know"),
            ([student, "--split", "tset"], "--split"),
            ([str(shutil.copytree(student, tmp_path / "alone"))], "--dataset: say which")):
        with pytest.raises(BadInput, match=message) as caught:
            evaluate.main([*arguments, "--cache-dir", config.cache_dir])
        assert "\n" not in str(caught.value)


def test_a_carved_test_split_is_that_of_the_run_also_in_a_copy_and_a_changed_one_is_told(tmp_path, capsys):
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    for kind in ("blob", "plain", "stripes"):
        (photos / "train" / kind).mkdir(parents=True)
        for number in range(30):
            draw(kind, generator).save(photos / "train" / kind / f"{number}.png")
    config = dataclasses.replace(tiny_config(photos, tmp_path), seed=3, epochs=1, teacher_epochs=0)
    row = train.main(config)["student"]
    copy = str(shutil.copytree(photos, tmp_path / "copy"))
    for flags in ([], ["--dataset", copy]):
        found, _, said = scores_of(config, capsys, *flags)
        assert found["loss"] == row["loss"]     # to the last bit
        assert found["split_of_run"] is True and "trained on" not in said

    shutil.copytree(photos / "train" / "blob", tmp_path / "field" / "test" / "blob")
    assert scores_of(config, capsys, "--dataset", str(tmp_path / "field"))[0]["total"] == 30    # new, as it is

    for number in range(30):    # a tenth of them comes into the test split
        shutil.copy(photos / "train/blob/0.png", photos / f"train/blob/new{number}.png")
    found, _, said = scores_of(config, capsys)
    assert found["split_of_run"] is False
    assert "these are not the test pictures of the run; the model may have been trained on some of them\n" in said


def test_a_folder_with_only_test_and_only_some_classes_is_scored(trained, photos, tmp_path, capsys):
    config, result = trained
    shutil.copytree(photos / "test" / "stripes", tmp_path / "field" / "test" / "stripes")
    found, *_ = scores_of(config, capsys, "--dataset", str(tmp_path / "field"))
    content = read_predictions(Path(config.out) / "predictions.npz")
    stripes = content.labels == 2       # numbered as the model's classes are
    assert (found["correct"], found["total"]) == (content.correct("student")[stripes].sum(), 4)
    assert found["split_of_run"] is False and {true for true, *_ in found["mistakes"]} <= {"stripes"}


def test_mistakes_are_named_the_most_frequent_first(trained, capsys):
    config, _ = trained
    found, printed, _ = scores_of(config, capsys)
    content = read_predictions(Path(config.out) / "predictions.npz")
    counts = page.matrix(confusions(content.labels, content.logits["student"].argmax(1)), 3)
    names = ("blob", "plain", "stripes")
    numbers = [count for _, _, count in found["mistakes"]]
    assert numbers == sorted(numbers, reverse=True) and sum(numbers) == 12 - found["correct"]
    assert len(numbers) == (counts * ~np.eye(3, dtype=bool) > 0).sum() > 0
    for true, predicted, count in found["mistakes"]:
        assert counts[names.index(true), names.index(predicted)] == count
    assert printed.startswith("true class  predicted as 1, 2, ...")


def test_the_data_set_of_the_run_is_read_as_the_run_read_it(trained, tmp_path, monkeypatch):
    """Columns of config.json count where no --dataset is given, and flags before them."""
    config, _ = trained
    out = Path(shutil.copytree(config.out, tmp_path / "run"))
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**record, "label": "fine"}))
    asked = []

    def opened(name, splits, classes, carve, say, **reading):
        asked.append(({key: value for key, value in reading.items() if value}, carve))
        raise BadInput("far enough")

    monkeypatch.setattr(evaluate, "open_splits", opened)
    for flags in ([], ["--label", "coarse"], ["--dataset", "leaves", "--config", "c"]):
        with pytest.raises(BadInput, match="far enough"):
            evaluate.main([str(out / "student"), *flags])
    assert asked == [({"label": "fine"}, False), ({"label": "coarse"}, False), ({"config": "c"}, False)]
