"""The benchmark times the real loop; its tutorial is the tutorial; its JSON has the keys that are promised."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from kd import BadInput, bench, losses
from kd.bench import loop
from kd.machine import runtime


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--compile", "off", "--device", "cpu", "--rounds", "2", "--steps", "3"]


def test_compare_emits_every_key(flags, capsys):
    bench.main(["compare", "--json", *flags])
    result = json.loads(capsys.readouterr().out)
    for key in ("tutorial_img_s", "cold_img_s", "warm_img_s", "bare_img_s", "gemm_gflop_s", "memory_gb_s"):
        assert result[key] > 0
    for key in ("cold_ratio", "warm_ratio", "aa_ratio", "loop_over_bare_step"):
        low, high = result[f"{key}_95"]
        assert 0 < low <= result[key] <= high
    assert 0 < result["roofline_share"] < 1


def test_the_parts_are_the_whole(flags, capsys):
    bench.main(["--json", *flags])
    result = json.loads(capsys.readouterr().out)
    assert list(result["milliseconds"]) == ["view", "data", "normalise", "student forward", "loss",
                                            "backward and clipping", "optimizer"]
    assert result["teacher_milliseconds"] > 0
    assert abs(result["sum_over_wall"] - 1) < 0.03
    assert result["images_per_second"]["p20"] <= result["images_per_second"]["p80"]
    assert result["startup_seconds"] > 0 and result["peak_memory_mb"] > 50


def test_ranks_are_timed_together_and_what_they_say_to_each_other(flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kd", "bench"]
    done = subprocess.run([*command, "--json", *flags], cwd=ROOT, capture_output=True, text=True, timeout=150,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result, = map(json.loads, done.stdout.splitlines())  # one of them speaks
    assert "× 2 ranks" in result["line"] and result["communication_milliseconds"] > 0
    assert result["images_per_second"]["p50"] > 0 and abs(result["sum_over_wall"] - 1) < 0.03


def test_the_tutorials_loop_makes_the_step_of_the_reference():
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    teacher, twin = copy.deepcopy(student), copy.deepcopy(student)
    with torch.no_grad():
        teacher[1].weight.mul_(-2)  # type: ignore[union-attr, operator]
    x, labels = [torch.randn(6, 3, 2, 2) for _ in range(3)], [torch.randint(3, (6,)) for _ in range(3)]
    loop.tutorial_loop(student, teacher, torch.optim.AdamW(student.parameters(), lr=0.05), x, labels, 5.0, 0.5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
    for one, label in zip(x, labels, strict=True):
        train.train_step(twin, optimizer, torch.amp.GradScaler("cpu", enabled=False), one, label, teacher(one).detach(),
                         loss_fn=losses.kd_loss, temperature=5.0, kd_weight=0.5, clip=1.0,
                         run=runtime.start("cpu", "off", "off"))
    for ours, theirs in zip(twin.parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_interval_holds_the_ratio_and_narrows_to_it():
    rows = np.array([[2.0 * i, i] for i in range(1, 9)])

    def ratio(drawn: np.ndarray) -> float:
        return float(np.median(drawn[:, 0] / drawn[:, 1]))

    assert loop.bootstrap(rows, ratio) == [2.0, 2.0]
    rows[:, 0] += np.array([-1, 1] * 4) * rows[:, 1] * 0.5
    assert loop.bootstrap(rows, ratio) == [1.5, 2.5]


@pytest.mark.parametrize("arguments, said", [
    (["--rounds", "x"], "--rounds"), (["compare", "--rounds", "1"], "at least 2"),
    (["--teacher", "resnet5O"], "did you mean"), (["--sice", "3"], "--size")])
def test_bad_arguments_are_refused(arguments, said, photos, tmp_path):
    with pytest.raises(BadInput, match=said):
        bench.main([*arguments, "--dataset", str(photos), "--cache-dir", str(tmp_path)])
