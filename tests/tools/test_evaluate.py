"""Scores against values worked out by hand, and against torch where it has the same quantity; the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from kd import BadInput
from kd.tools import evaluate
from kd.scores import calibration_error, chance_level, confusion_matrix, macro_f1, scores

ROOT = Path(__file__).resolve().parents[2]


def test_scores_of_a_small_case():
    logits = np.log(np.array([[.7, .2, .1], [.1, .8, .1], [.5, .3, .2], [.2, .2, .6]], np.float32))
    labels = np.array([0, 1, 1, 2])
    teacher = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    result = scores(logits, labels, teacher)
    assert result["correct"] == 3 and result["total"] == 4 and result["accuracy"] == 0.75
    assert result["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]  # row: the true class
    assert np.isclose(result["macro_f1"], (2 / 3 + 2 / 3 + 1) / 3)
    assert np.isclose(result["loss"], -np.mean(np.log([.7, .8, .3, .6])))
    assert result["agreement_with_teacher"] == 0.75


def test_the_loss_is_the_cross_entropy_also_for_huge_logits():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(0, 300, (50, 7)).astype(np.float32), generator.integers(0, 7, 50)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert np.isclose(scores(logits, labels)["loss"], expected, rtol=1e-12)


def test_a_class_that_is_never_met_or_predicted_counts_zero():
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    assert confusion.tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert np.isclose(macro_f1(confusion), 2 / 3)


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert np.isclose(calibration_error(confidence, correct), 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1 - 0.55))
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_chance_is_the_largest_class_and_two_standard_errors():
    assert np.isclose(chance_level(np.array([0] * 50 + [1] * 50)), 0.5 + 2 * 0.05)
    assert chance_level(np.array([0] * 90 + [1] * 10)) > 0.9


@pytest.fixture
def trained(tiny):
    return tiny, train.main(tiny)


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
    said = capsys.readouterr().out
    assert f"{100 * found['accuracy']:.1f} % ({found['correct']}/12)" in said and "true class" in said
    assert evaluate.main([student, "--dataset", config.dataset, "--split", "train", *flags])["total"] == 42


def test_bad_input_is_one_line_and_status_2(trained, tmp_path):
    config, _ = trained
    student = f"{config.out}/student"
    for arguments, said in (([str(tmp_path / "none"), "--dataset", config.dataset], "no saved model"),
                            ([student, "--dataset", "leaves"], r"its classes \(angular_leaf_spot, .* are not those of"),
                            ([student, "--dataset", config.dataset, "--split", "tset"], "--split"),
                            ([str(shutil.copytree(student, tmp_path / "alone"))], "--dataset: say which")):
        with pytest.raises(BadInput, match=said):
            evaluate.main([*arguments, "--cache-dir", config.cache_dir])
    assert evaluate.main([student, "--cache-dir", config.cache_dir])["dataset"] == config.dataset  # the run's own
    done = subprocess.run([sys.executable, "-m", "kd", "evaluate", student, "--dataset", "leaves"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert done.stderr.startswith("kd evaluate: error: --dataset leaves: its classes")
