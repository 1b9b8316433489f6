"""The scores of a saved model against those of the run that trained it."""

import json
import shutil
from pathlib import Path

import pytest

from kd import BadInput
from kd.tools import evaluate


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
            ([student, "--dataset", "leaves"], r"its classes \(angular_leaf_spot, .* are not those of"),
            ([student, "--dataset", config.dataset, "--split", "tset"], "--split"),
            ([str(shutil.copytree(student, tmp_path / "alone"))], "--dataset: say which")):
        with pytest.raises(BadInput, match=message) as caught:
            evaluate.main([*arguments, "--cache-dir", config.cache_dir])
        assert "\n" not in str(caught.value)
