"""The comparison times the real loop by turns. The loops of others are theirs, and its JSON has the promised keys."""

import copy
import json
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch

from kd import BadInput, bench
from kd.bench import compare, loop
from kd.losses import kd_loss
from kd.machine import runtime
from tests.helpers.runs import step


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--device", "cpu", "--rounds", "2", "--steps", "3"]


def test_compare_emits_every_key(flags, capsys):
    bench.main(["compare", "--json", "--compile", "off", *flags])
    result = json.loads(capsys.readouterr().out)
    for key in ("tutorial_img_s", "timm_task_img_s", "cold_img_s", "warm_img_s", "bare_img_s", "gemm_gflop_s",
                "memory_gb_s"):
        assert result[key] > 0
    for key in ("cold_ratio", "warm_ratio", "aa_ratio", "loop_over_bare_step", "cold_over_timm_task",
                "warm_over_timm_task"):
        low, high = result[f"{key}_95"]
        assert 0 < low <= result[key] <= high
    assert 0 < result["roofline_share"] < 1
    assert (result["rounds"], result["steps_a_round"], result["slow_steps_a_round"]) == (2, 3, 2)


def test_compare_prints_a_table_and_compiles_the_loops_of_others_where_that_is_asked(flags, capsys, monkeypatch):
    compiled = []

    def note(model, **options):     # a compilation would take half a minute
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", note)
    bench.main(["compare", "--compiled", "--minutes", "0.001", *flags[:-4], "--steps", "2"])
    assert sorted(compiled) == ["EfficientNet", "EfficientNet", "ResNet", "ResNet"]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["img/s"]
    rates = {line[:32].strip(): float(line[32:]) for line in lines[:lines.index("")]}
    assert list(rates) == list(compare.NAMES.values()) and min(rates.values()) > 0
    ratios = {line[:32].strip(): line[32:].count("×") for line in lines[lines.index("") + 2:-3]}
    assert ratios == {"the tutorial's loop": 2, "timm's task": 2, "the tutorial's loop, compiled": 2,
                      "timm's task, compiled": 2, "the bare step": 1, "itself (A/A)": 1}
    assert " 5 rounds;" in lines[-2]    # the least, as no time was given


def test_compiled_our_loop_and_the_bare_step_share_one_model_from_pixels(flags, capsys, monkeypatch):
    compiled = []

    def note(model, rows, parts):
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(loop, "compile_model", note)
    monkeypatch.setattr(runtime, "_refuse_without_compiler", lambda device: None)
    bench.main(["compare", "--json", "--compile", "on", *flags])
    result = json.loads(capsys.readouterr().out)
    assert min(result["warm_img_s"], result["bare_img_s"]) > 0 and result["line"].endswith("compiled")
    assert compiled == ["FromPixels"]


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon"])
def test_a_budget_is_a_positive_number_of_minutes(given, flags):
    with pytest.raises(BadInput, match="--minutes"):
        bench.main(["compare", "--minutes", given, *flags])


def test_switches_time_the_loop_with_and_without_each_fast_path(flags, capsys):
    bench.main(["switches", "--json", *flags])
    result = json.loads(capsys.readouterr().out)
    assert list(result["gain"]) == list(result["gain_95"]) == [
        "A/A", "stored logits", "the allocator", "all kernels and the allocator", "the fused loss", "mixed precision"]
    for path, (low, high) in result["gain_95"].items():
        assert 0 < low <= result["gain"][path] <= high


class Small(NamedTuple):
    """A student, a teacher that disagrees with it, and three batches."""

    student: torch.nn.Sequential
    teacher: torch.nn.Sequential
    x: list[torch.Tensor]
    labels: list[torch.Tensor]


def small() -> Small:
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher[1].weight.mul_(-2)  # type: ignore[union-attr, operator]
    return Small(student, teacher, [torch.randn(6, 3, 2, 2) for _ in range(3)],
                 [torch.randint(3, (6,)) for _ in range(3)])


def assert_made_the_steps_of_the_reference(trained: Small) -> None:
    start = small()
    twin, optimizer = start.student, torch.optim.AdamW(start.student.parameters(), lr=0.05)
    for one, label in zip(start.x, start.labels, strict=True):
        step(twin, optimizer, one, label, start.teacher(one).detach())
    for ours, theirs in zip(twin.parameters(), trained.student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_tutorials_loop_makes_the_step_of_the_reference():
    made = small()
    compare.tutorial_loop(made.student, made.teacher, torch.optim.AdamW(made.student.parameters(), lr=0.05), made.x,
                          made.labels, 5.0, 0.5)
    assert_made_the_steps_of_the_reference(made)


def test_the_interval_holds_the_median_and_narrows_to_it():
    assert compare.interval_of_median(np.full(8, 2.0)) == [2.0, 2.0]
    assert compare.interval_of_median(np.array([1.5, 2.5] * 4)) == [1.5, 2.5]
    # the same draws, each with its median taken by numpy
    ratios = np.random.default_rng(1).lognormal(size=7)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=10_000)
    medians = [np.median(np.repeat(ratios, drawn)) for drawn in counts]
    assert compare.interval_of_median(ratios) == pytest.approx(np.quantile(medians, [0.025, 0.975]).tolist())


@pytest.mark.parametrize("temperature, kd_weight", [(5.0, 0.5), (1.0, 0.9), (2.0, 1.0), (4.0, 0.0)])
def test_timms_task_has_the_loss_of_kd_loss(temperature, kd_weight):
    torch.manual_seed(0)
    student, teacher = (timm.create_model("test_efficientnet", num_classes=3) for _ in range(2))
    for model in (student, teacher):
        model.eval()
        torch.nn.init.normal_(model.get_parameter("classifier.weight"), std=30)     # timm's leave all logits alike
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    task = compare.timm_task(student, teacher, temperature, kd_weight, torch.device("cpu"))
    loss = task(x, labels)["loss"]
    expected = kd_loss(student(x), teacher(x), labels, temperature, kd_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0.1


def test_timms_loop_makes_the_step_of_the_reference():
    made = small()
    student: Any = made.student
    # what timm's task asks of a student, which all of timm's models have
    student.num_classes, student.in_chans = 3, 3
    student.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    task = compare.timm_task(student, made.teacher, 5.0, 0.5, torch.device("cpu"))
    compare.timm_loop(task, torch.optim.AdamW(student.parameters(), lr=0.05), None, made.x, made.labels, 1.0,
                      runtime.start("cpu", "off", "off"))
    assert student.training and not made.teacher.training
    assert_made_the_steps_of_the_reference(made)


def test_a_budget_ends_after_the_least_rounds_or_before_its_end():
    calls = {"a": 0, "b": 0}

    def loop_of(name):
        def images_per_second():
            calls[name] += 1
            time.sleep(0.02)
            return 2.0 if name == "a" else 1.0
        return images_per_second

    loops = {name: loop_of(name) for name in calls}
    turns = compare.Turns(loops, deadline=time.monotonic())     # it is over before the first round
    assert turns.rounds == compare.LEAST_ROUNDS and calls == {"a": 6, "b": 6}   # one of them warms up
    assert turns.ratio("a", "b") == (2.0, [2.0, 2.0]) and turns.median("a") == 2.0

    deadline = time.monotonic() + 1.0
    turns = compare.Turns(loops, deadline=deadline)
    assert compare.LEAST_ROUNDS < turns.rounds <= 25 and time.monotonic() < deadline + 0.5
    assert compare.Turns(loops, rounds=3).rounds == 3


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = compare.Progress()
    for second in range(0, 100, 4):
        now[0] = float(second)
        progress.show("round 2, tutorial", 270)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "round 2, tutorial: 32 s, about 238 s left", "round 2, tutorial: 64 s, about 206 s left",
        "round 2, tutorial: 96 s, about 174 s left"]


def test_progress_on_a_terminal_says_what_is_timed_and_how_long_it_still_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda number: type("Size", (), {"columns": 0})())
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    progress = compare.Progress()
    progress.begin -= 27
    progress.show("round 2, timm_task", 270)
    progress.close()
    shown = capsys.readouterr().err
    assert "about 243 s left: round 2, timm_task" in shown and " 10 %|" in shown


def test_a_block_longer_than_the_data_begins_again(photos, tmp_path):
    data = loop.train.decode(loop.train.open_dataset(str(photos), say=lambda line: None), size=32, crop_pct=1.0,
                             interpolation="bicubic", cache_dir=str(tmp_path))
    longer = loop.block(data, 100)      # of 42 pictures
    assert len(longer.train) == 100 and len(longer.validation) == 1
    frames = longer.train.frames.read(np.array([41, 83, 99]))
    assert np.array_equal(frames, data.train.frames.read(np.array([41, 41, 15])))
    assert longer.train.labels[[41, 83, 99]].tolist() == data.train.labels[[41, 41, 15]].tolist()


def test_our_loop_is_compiled_once_however_often_it_is_timed(flags, tmp_path, monkeypatch):
    compilations = []

    def compile(model, rows, parts):
        compilations.append(model.model)
        return model

    monkeypatch.setattr(loop, "compile_model", compile)
    cfg = loop.train.Config(dataset=flags[1], size=32, teacher="test_resnet", teacher_weights="none",
                            student="test_efficientnet", cache_dir=str(tmp_path), device="cpu", amp="off")
    made = loop.Bench(cfg, 2, tmp_path)
    made.machine = made.machine._replace(compile="on")
    assert all(made.fit(made.student, cold=cold, steps=steps) > 0 for cold, steps in ((True, 1), (False, 0), (True, 2)))
    assert compilations == [made.student]
