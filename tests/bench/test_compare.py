"""The comparison times the real loop by turns. Its tutorial is the tutorial, its JSON has the promised keys."""

import copy
import json

import numpy as np
import pytest
import torch

from kd import bench
from kd.bench import compare
from tests.helpers.runs import step


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--device", "cpu", "--rounds", "2", "--steps", "3"]


def test_compare_emits_every_key(flags, capsys):
    bench.main(["compare", "--json", "--compile", "off", *flags])
    result = json.loads(capsys.readouterr().out)
    for key in ("tutorial_img_s", "cold_img_s", "warm_img_s", "bare_img_s", "gemm_gflop_s", "memory_gb_s"):
        assert result[key] > 0
    for key in ("cold_ratio", "warm_ratio", "aa_ratio", "loop_over_bare_step"):
        low, high = result[f"{key}_95"]
        assert 0 < low <= result[key] <= high
    assert 0 < result["roofline_share"] < 1


def test_switches_time_the_loop_with_and_without_each_fast_path(flags, capsys):
    bench.main(["switches", "--json", *flags])
    result = json.loads(capsys.readouterr().out)
    assert list(result["gain"]) == list(result["gain_95"]) == [
        "A/A", "stored logits", "the allocator", "all kernels and the allocator", "the fused loss", "mixed precision"]
    for path, (low, high) in result["gain_95"].items():
        assert 0 < low <= result["gain"][path] <= high


def test_the_tutorials_loop_makes_the_step_of_the_reference():
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    teacher, twin = copy.deepcopy(student), copy.deepcopy(student)
    with torch.no_grad():
        teacher[1].weight.mul_(-2)  # type: ignore[union-attr, operator]
    x, labels = [torch.randn(6, 3, 2, 2) for _ in range(3)], [torch.randint(3, (6,)) for _ in range(3)]
    compare.tutorial_loop(student, teacher, torch.optim.AdamW(student.parameters(), lr=0.05), x, labels, 5.0, 0.5)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
    for one, label in zip(x, labels, strict=True):
        step(twin, optimizer, one, label, teacher(one).detach())
    for ours, theirs in zip(twin.parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_interval_holds_the_median_and_narrows_to_it():
    assert compare.interval_of_median(np.full(8, 2.0)) == [2.0, 2.0]
    assert compare.interval_of_median(np.array([1.5, 2.5] * 4)) == [1.5, 2.5]
    # the same draws, each with its median taken by numpy
    ratios = np.random.default_rng(1).lognormal(size=7)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=10_000)
    medians = [np.median(np.repeat(ratios, drawn)) for drawn in counts]
    assert compare.interval_of_median(ratios) == pytest.approx(np.quantile(medians, [0.025, 0.975]).tolist())
