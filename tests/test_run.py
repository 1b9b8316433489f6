"""A run's folder: never lost by accident, never another run's; and its position, clock and checkpoint."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd import BadInput, run
from kd.machine import checkpoint, files
from kd.machine.health import Guard
from kd.machine.signals import Stopped
from kd.run import Clock, Run

STATE = {"model": {"weight": torch.arange(300.0)}, "history": [{"role": "x"}]}


def open_folder(out: Path, config: dict, resume: bool = False, overwrite: bool = False):
    opened = run.open_folder(out, config, {"out"}, resume, overwrite)
    files.write_atomic(out / "config.json", json.dumps(config).encode())
    return opened


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    out = tmp_path / "run"
    assert open_folder(out, {"lr": 1.0, "out": "a"}) is None
    with pytest.raises(BadInput, match="--resume.*--overwrite"):
        open_folder(out, {"lr": 1.0, "out": "a"})
    checkpoint.save(out / "last.ckpt", STATE)
    state = open_folder(out, {"lr": 1.0, "out": "b"}, resume=True)
    assert state is not None and torch.equal(state["model"]["weight"], torch.arange(300.0))
    with pytest.raises(BadInput, match=r"--lr 2\.0 \(was 1\.0\)"):
        open_folder(out, {"lr": 2.0, "out": "a"}, resume=True)


def test_overwrite_removes_the_run_but_nothing_else(tmp_path):
    open_folder(tmp_path / "run", {})
    checkpoint.save(tmp_path / "run" / "last.ckpt", STATE)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    open_folder(tmp_path / "run", {}, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "notes.txt"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match="not a run"):
        open_folder(tmp_path / "home", {}, overwrite=True)


def test_a_kill_inside_the_very_first_write_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.77.tmp").write_text("{")
    assert run.open_folder(tmp_path, {}, set(), resume=True, overwrite=False) is None
    assert not list(tmp_path.iterdir())


def test_a_saved_folder_is_put_back_where_a_kill_came_between_the_two_renames(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".student.old").mkdir()
    (tmp_path / ".student.old" / "model.safetensors").write_text("weights")
    run.open_folder(tmp_path, {}, set(), resume=True, overwrite=False)
    assert (tmp_path / "student" / "model.safetensors").read_text() == "weights"


def test_what_a_killed_process_was_writing_is_swept(tmp_path):
    open_folder(tmp_path / "run", {})
    (tmp_path / "run" / "teacher").mkdir()
    for stray in (".last.ckpt.7.tmp", "teacher/.README.md.7.tmp"):
        (tmp_path / "run" / stray).write_bytes(b"half")
    open_folder(tmp_path / "run", {}, resume=True)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        open_folder(tmp_path / "file" / "run", {})


# ---- is it the same run? ---------------------------------------------------------------------------------------

FACTS = {"dataset": "a", "teacher_weights": "b", "amp": "None"}


@pytest.mark.parametrize("name", FACTS)
def test_other_data_weights_or_precision_are_refused_by_name(tmp_path, name):
    first = Run(tmp_path / "run", {"lr": 1.0}, set())
    first.must_match(**FACTS)
    first.write_config()
    restore(first)
    first.save()
    Run(tmp_path / "run", {"lr": 1.0}, set(), resume=True).must_match(**FACTS)
    again = Run(tmp_path / "run", {"lr": 1.0}, set(), resume=True)
    with pytest.raises(BadInput, match=f"--resume: what --{name.replace('_', '-')} stands for has changed"):
        again.must_match(**{**FACTS, name: "other"})


def test_what_makes_a_folder_a_run_is_written_only_when_data_and_models_are_good(tmp_path):
    opened = Run(tmp_path / "run", {"lr": 1.0}, set())
    opened.must_match(**FACTS)
    assert not (tmp_path / "run" / "config.json").exists()
    opened.write_config()
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"lr": 1.0}


# ---- position, clock, checkpoint ---------------------------------------------------------------------------------

def restore(opened: Run, role: str = "student") -> tuple[run.Position, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    device = torch.device("cpu")
    saved: dict[str, run.Saved] = {"model": model, "optimizer": optimizer}
    position = opened.restore(role, saved, Guard(role, model, device, None), device)
    return position, model, optimizer


def test_a_training_goes_on_where_it_was_saved(tmp_path):
    opened = Run(tmp_path / "run", {}, set())
    opened.must_match(**FACTS)
    opened.write_config()
    opened.log({"role": "student", "epoch": 1})
    opened.roles_done.append("teacher")
    position, model, optimizer = restore(opened)
    assert (position.epoch, position.step, position.best) == (0, 0, -1.0)
    position.epoch, position.step, position.best, position.best_epoch = 1, 4, 0.75, 1
    position.loss_sum += 2.5
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    opened.save()

    again = Run(tmp_path / "run", {}, set(), resume=True)
    assert again.done("teacher") and not again.done("student") and again.facts == FACTS
    assert [(entry["role"], entry["epoch"]) for entry in again.history] == [("student", 1)]
    restored, other_model, other_optimizer = restore(again)
    assert (restored.role, restored.epoch, restored.step, restored.best, restored.best_epoch) == (
        "student", 1, 4, 0.75, 1)
    assert restored.loss_sum.item() == 2.5 and restored.loss_sum.dtype == torch.float64
    assert torch.equal(other_model.weight, model.weight)  # type: ignore[arg-type]
    assert other_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    # a second training of the same process begins at its start
    assert restore(again, "control")[0].epoch == 0


def test_a_signal_saves_before_it_stops(tmp_path):
    opened = Run(tmp_path / "run", {}, set())
    opened.must_match(**FACTS)
    opened.stop_if_requested()
    opened.stop.signal = 15
    with pytest.raises(Stopped):
        opened.stop_if_requested()      # between two trainings there is nothing to save
    assert not (tmp_path / "run" / "last.ckpt").exists()
    position, *_ = restore(opened)
    position.step = 3
    assert opened.save_is_due()
    with pytest.raises(Stopped):
        opened.stop_if_requested()
    assert checkpoint.read(tmp_path / "run" / "last.ckpt")["position"]["step"] == 3


def test_a_checkpoint_is_due_when_its_minutes_have_passed(tmp_path, monkeypatch):
    opened = Run(tmp_path / "run", {}, set(), save_minutes=10)
    opened.must_match(**FACTS)
    restore(opened)
    now = time.monotonic()
    for minutes, due in ((9.9, False), (10.1, True)):
        monkeypatch.setattr(time, "monotonic", lambda: now + 60 * minutes)
        assert opened.save_is_due() == due
    opened.save()
    assert not opened.save_is_due()


def test_stores_are_flushed_before_the_checkpoint(tmp_path):
    opened = Run(tmp_path / "run", {}, set())
    opened.must_match(**FACTS)
    restore(opened)
    seen: list[bool] = []

    class Store:
        def flush(self) -> None:
            seen.append((tmp_path / "run" / "last.ckpt").exists())

    opened.flush_before_save(Store())
    opened.save()
    assert seen == [False] and (tmp_path / "run" / "last.ckpt").exists()


def test_the_clock_counts_only_while_it_runs(monkeypatch):
    now: dict[str, Any] = {"seconds": 100.0}
    monkeypatch.setattr(time, "monotonic", lambda: now["seconds"])
    clock = Clock(7.0)
    now["seconds"] += 5
    assert clock.seconds == 7 and not clock.pause()
    clock.start()
    now["seconds"] += 2
    clock.start()
    now["seconds"] += 1
    assert clock.seconds == 10 and clock.pause()
    now["seconds"] += 50
    assert clock.seconds == 10
