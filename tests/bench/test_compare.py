"""The comparison times the real loop by turns. The loops of others are theirs, and its JSON has the promised keys."""

import copy
import json
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch

from kd import BadInput, bench
from kd.bench import compare, loop, turns
from kd.config import Config
from kd.machine import runtime
from tests.helpers.runs import step
from train import kd_loss


@pytest.fixture
def flags(photos, tmp_path):
    return ["--dataset", str(photos), "--size", "32", "--teacher", "test_resnet", "--student", "test_efficientnet",
            "--cache-dir", str(tmp_path), "--device", "cpu", "--rounds", "2", "--steps", "3"]


def test_compare_emits_every_key(flags, capsys):
    bench.main(["compare", "--json", *flags])
    result = json.loads(capsys.readouterr().out)
    for key in ("tutorial_img_s", "timm_task_img_s", "cold_img_s", "warm_img_s", "bare_img_s", "gemm_gflop_s"):
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


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon"])
def test_a_budget_is_a_positive_number_of_minutes(given, flags):
    with pytest.raises(BadInput, match="--minutes"):
        bench.main(["compare", "--minutes", given, *flags])


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
    loop.tutorial_loop(made.student, made.teacher, torch.optim.AdamW(made.student.parameters(), lr=0.05), made.x,
                       made.labels, 5.0, 0.5)
    assert_made_the_steps_of_the_reference(made)


def test_the_interval_holds_the_median_and_narrows_to_it():
    assert turns.interval_of_median(np.full(8, 2.0)) == [2.0, 2.0]
    assert turns.interval_of_median(np.array([1.5, 2.5] * 4)) == [1.5, 2.5]
    # the same draws, each with its median taken by numpy
    ratios = np.random.default_rng(1).lognormal(size=7)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=10_000)
    medians = [np.median(np.repeat(ratios, drawn)) for drawn in counts]
    assert turns.interval_of_median(ratios) == pytest.approx(np.quantile(medians, [0.025, 0.975]).tolist())


@pytest.mark.parametrize("temperature, kd_weight", [(5.0, 0.5), (1.0, 0.9), (2.0, 1.0), (4.0, 0.0)])
def test_timms_task_has_the_loss_of_kd_loss(temperature, kd_weight):
    torch.manual_seed(0)
    student, teacher = (timm.create_model("test_efficientnet", num_classes=3) for _ in range(2))
    for model in (student, teacher):
        model.eval()
        torch.nn.init.normal_(model.get_parameter("classifier.weight"), std=30)     # timm's leave all logits alike
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    task = loop.timm_task(student, teacher, temperature, kd_weight, torch.device("cpu"))
    loss = task(x, labels)["loss"]
    expected = kd_loss(student(x), teacher(x), labels, temperature, kd_weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and expected > 0.1


def test_timms_loop_makes_the_step_of_the_reference():
    made = small()
    student: Any = made.student
    # what timm's task asks of a student, which all of timm's models have
    student.num_classes, student.in_chans = 3, 3
    student.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    task = loop.timm_task(student, made.teacher, 5.0, 0.5, torch.device("cpu"))
    loop.timm_loop(task, torch.optim.AdamW(student.parameters(), lr=0.05), None, made.x, made.labels, 1.0,
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
    timed = turns.Turns(loops, deadline=time.monotonic())     # it is over before the first round
    assert len(timed.rates) == turns.LEAST_ROUNDS and calls == {"a": 6, "b": 6}   # one of them warms up
    assert timed.ratio("a", "b") == (2.0, [2.0, 2.0]) and timed.median("a") == 2.0

    deadline = time.monotonic() + 1.0
    timed = turns.Turns(loops, deadline=deadline)
    assert turns.LEAST_ROUNDS < len(timed.rates) <= 25 and time.monotonic() < deadline + 0.5
    assert len(turns.Turns(loops, rounds=3).rates) == 3


def test_our_loop_is_compiled_once_on_a_block_that_may_be_longer_than_the_data(flags, tmp_path, monkeypatch):
    compilations = []

    def compile(model, rows):
        compilations.append(type(model).__name__)
        return model

    monkeypatch.setattr(runtime, "compiled", compile)
    monkeypatch.setattr(runtime, "compile_pays", lambda machine, steps: True)
    cfg = Config(dataset=flags[1], size=32, teacher="test_resnet", teacher_weights="none", student="test_efficientnet",
                 cache_dir=str(tmp_path), device="cpu", amp="off")
    made = loop.Bench(cfg, 12, tmp_path)        # of 96 pictures, of which train has 42
    assert all(made.fit(cold=cold, steps=steps) > 0 for cold, steps in ((True, 1), (False, 0), (True, 2)))
    assert made.bare_steps()() > 0 and compilations == ["FromPixels"]
    assert np.array_equal(made.train.read([41, 83]), made.train.read([41, 41])) and len(made.train) == 96


@pytest.mark.parametrize("method", [["--method", "simkd", "--kd-weight", "1"], ["--kd-weight", "0"]])
def test_a_method_on_features_and_a_control_are_timed_as_they_train(method, flags, capsys):
    bench.main(["compare", "--json", *flags, *method])
    assert json.loads(capsys.readouterr().out)["warm_img_s"] > 0


@pytest.mark.parametrize("arguments, said", [
    (["compare", "--rounds", "x"], "--rounds"), (["compare", "--rounds", "1"], "at least 2"), (["switches"], "ladder"),
    (["ladder", "--teacher", "resnet5O"], "did you mean"), (["ladder", "--sice", "3"], "--size"),
    (["compare", "--topk", "2"], "not part of what is timed"), (["ladder", "--compiled"], "--compile"),
    (["compare", "--method", "pkt", "--kd-weight", "1"], "features only")])
def test_bad_arguments_are_refused(arguments, said, photos, tmp_path):
    with pytest.raises(BadInput, match=said):
        bench.main([*arguments, "--dataset", str(photos), "--cache-dir", str(tmp_path)])
