"""A run's folder: never lost by accident, never another run's; and its position, clock and checkpoint."""

import contextlib
import errno
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd import BadInput, run
from kd.machine import checkpoint, files
from kd.machine.signals import Stopped
from kd.run import Clock, Run

ROOT = Path(__file__).resolve().parents[1]
STATE = {"model": {"weight": torch.arange(300.0)}, "history": [{"role": "x"}]}


def names(folder: Path) -> list[str]:
    """What lies in a folder beside its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != run.LOCK)


def open_folder(out: Path, config: dict, resume: bool = False, overwrite: bool = False) -> run.Opened:
    with contextlib.ExitStack() as stack:
        opened = run.open_folder(out, config, {"out"}, resume, overwrite, stack)
    files.write_atomic(out / "config.json", json.dumps(config).encode())
    return opened


FACTS = {"dataset": "a", "teacher_weights": "b", "amp": "None"}


def begin(opened: Run, facts: dict[str, str] = FACTS, arithmetic: str = "cpu, fp32") -> Run:
    opened.begin(facts, {"data": {"classes": ["a", "b"]}}, arithmetic)
    return opened


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    out = tmp_path / "run"
    assert open_folder(out, {"lr": 1.0, "out": "a"}) == (None, None, False)
    with pytest.raises(BadInput, match="--resume.*--overwrite"):
        open_folder(out, {"lr": 1.0, "out": "a"})
    checkpoint.save(out / "last.ckpt", STATE)
    state = open_folder(out, {"lr": 1.0, "out": "b"}, resume=True).checkpoint
    assert state is not None and torch.equal(state["model"]["weight"], torch.arange(300.0))
    with pytest.raises(BadInput, match=r"--lr 2\.0 \(was 1\.0\)"):
        open_folder(out, {"lr": 2.0, "out": "a"}, resume=True)


@pytest.mark.parametrize("stranger", ["thesis.tex", "config.json, model.safetensors"])
def test_what_is_not_a_run_is_not_overwritten(tmp_path, stranger):
    for name in stranger.split(", "):
        (tmp_path / name).write_text("{}")
    before = digests(tmp_path)
    with pytest.raises(BadInput, match="not a run"):
        open_folder(tmp_path, {}, overwrite=True)
    assert digests(tmp_path) == before


def test_a_kill_inside_the_very_first_write_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.77.tmp").write_text("{")
    assert open_folder(tmp_path, {}, resume=True) == (None, None, False)
    assert names(tmp_path) == ["config.json"]


def test_a_saved_folder_is_put_back_where_a_kill_came_between_the_two_renames(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".student.old").mkdir()
    (tmp_path / ".student.old" / "model.safetensors").write_text("weights")
    open_folder(tmp_path, {}, resume=True)
    assert (tmp_path / "student" / "model.safetensors").read_text() == "weights"


def test_what_a_killed_process_was_writing_is_swept(tmp_path):
    open_folder(tmp_path / "run", {})
    (tmp_path / "run" / ".last.ckpt.7.tmp").write_bytes(b"half")
    open_folder(tmp_path / "run", {}, resume=True)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        open_folder(tmp_path / "file" / "run", {})


# ---- --overwrite -----------------------------------------------------------------------------------------------

def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but its lock, by its path."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file() and path.name != run.LOCK}


def finished_run(out: Path) -> Path:
    """A folder with everything that a run leaves, and a file of the user's own."""
    open_folder(out, {"lr": 1.0})
    for name in run.RUN_FOLDERS:
        (out / name).mkdir()
        (out / name / "weights").write_text(name)
    for name in run.RUN_FILES:
        (out / name).write_text("{}")
    checkpoint.save(out / "last.ckpt", STATE)
    (out / "notes.txt").write_text("mine")
    return out


def test_overwrite_removes_the_old_run_where_the_new_one_begins_and_nothing_else(tmp_path):
    out = finished_run(tmp_path / "run")
    before = digests(out)
    with Run.open(out, {"lr": 2.0}, set(), overwrite=True) as opened:
        assert digests(out) == before                   # data and models may still be refused
        assert opened.finished is None and opened.history == [] and not opened.done("student")
        begin(opened)
        assert names(out) == ["config.json", "notes.txt"]
        assert json.loads((out / "config.json").read_text()) == {"lr": 2.0, "data": {"classes": ["a", "b"]}}
        assert opened.write_result({"new": True}) == {"new": True}


def test_a_resumed_run_keeps_its_files_when_it_begins_again(tmp_path):
    out = finished_run(tmp_path / "run")
    before = digests(out)
    with Run.open(out, {"lr": 1.0}, set(), resume=True, overwrite=True) as opened:
        begin(opened)
    assert digests(out).keys() == before.keys()


def test_a_link_to_a_folder_goes_but_not_what_it_leads_to(tmp_path):
    out = finished_run(tmp_path / "run")
    (out / "teacher").rename(tmp_path / "elsewhere")
    (out / "teacher").symlink_to(tmp_path / "elsewhere")
    with Run.open(out, {"lr": 2.0}, set(), overwrite=True) as opened:
        begin(opened)
    assert not (out / "teacher").is_symlink() and (tmp_path / "elsewhere" / "weights").read_text() == "teacher"


@pytest.mark.parametrize("removals", range(len(run.RUN_FILES + run.RUN_FOLDERS)))
def test_a_kill_while_the_old_run_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch, removals):
    out = finished_run(tmp_path / "run")

    class Killed(BaseException):
        pass

    count = itertools.count()
    unlink, rmtree = Path.unlink, shutil.rmtree

    def last_moments(remove):
        def removing(path, **options):
            if next(count) == removals:
                raise Killed
            remove(path, **options)
        return removing

    with Run.open(out, {"lr": 2.0}, set(), overwrite=True) as opened:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", last_moments(unlink))
            patch.setattr(shutil, "rmtree", last_moments(rmtree))
            begin(opened)

    left = set(digests(out))
    weights = {f"{name}/weights" for name in run.RUN_FOLDERS}
    if removals == 0:
        assert open_folder(out, {"lr": 1.0}, resume=True).finished == {}
    else:       # neither a result nor a checkpoint stands for what is gone
        assert "result.json" not in left
        assert "last.ckpt" not in left or weights <= left
    assert "config.json" in left and "notes.txt" in left
    with Run.open(out, {"lr": 2.0}, set(), overwrite=True) as opened:
        begin(opened)
    assert set(digests(out)) == {"config.json", "notes.txt"}


TRAINING = """import sys
from pathlib import Path
from kd.run import Run
with Run.open(Path(sys.argv[1]), {"lr": 1.0}, set(), resume=True):
    print("trains", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_two_processes_never_train_in_one_folder(tmp_path, end):
    out = finished_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", TRAINING, str(out)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == "trains\n"
        (out / ".last.ckpt.7.tmp").write_bytes(b"half")
        for resume, overwrite in ((False, False), (False, True), (True, False)):
            with pytest.raises(BadInput, match="^--out .*: another process is training there; wait for it"):
                open_folder(out, {"lr": 1.0}, resume, overwrite)
        assert (out / ".last.ckpt.7.tmp").exists()      # what the other one is writing
        if end:
            other.send_signal(end)
    open_folder(out, {"lr": 1.0}, resume=True)
    assert not list(out.glob(".*"))


def test_a_disk_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def acquire(lock, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run.FileLock, "acquire", acquire)
    assert open_folder(tmp_path / "run", {"lr": 1.0}).finished is None


def test_an_old_run_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def busy(path, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    with Run.open(finished_run(tmp_path / "run"), {"lr": 2.0}, set(), overwrite=True) as opened:
        monkeypatch.setattr(shutil, "rmtree", busy)
        with pytest.raises(BadInput, match="--overwrite: .*student cannot be removed .Device or resource busy.; give"):
            begin(opened)


# ---- is it the same run? ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FACTS)
def test_other_data_weights_or_precision_are_refused_by_name(tmp_path, name):
    with Run.open(tmp_path / "run", {"lr": 1.0}, set()) as opened:
        assert not (tmp_path / "run" / "config.json").exists()      # until data and models are found to be good
        begin(opened)
        opened.save(restore(opened)[0], {})
    with Run.open(tmp_path / "run", {"lr": 1.0}, set(), resume=True) as opened:
        begin(opened)
        with pytest.raises(BadInput, match=f"--resume: what --{name.replace('_', '-')} stands for has changed"):
            begin(opened, {**FACTS, name: "other"})


def test_a_run_that_goes_on_with_other_kernels_says_that_the_bits_differ(tmp_path, capsys):
    with Run.open(tmp_path / "run", {"lr": 1.0}, set()) as opened:
        begin(opened)
        begin(opened)
        assert capsys.readouterr().out == ""
        begin(opened, arithmetic="cuda, bf16")
    assert capsys.readouterr().out == ("--resume: computed with cpu, fp32 until here, and with cuda, bf16 from here "
                                       "on: the result is not the same to the bit\n")


# ---- position, clock, checkpoint ---------------------------------------------------------------------------------

def restore(opened: Run, role: str = "student") -> tuple[run.Position, dict[str, Any]]:
    model = nn.Linear(3, 2)
    saved: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.5)}
    return opened.restore(role, saved, torch.device("cpu")), saved


def test_a_training_goes_on_where_it_was_saved(tmp_path):
    with Run.open(tmp_path / "run", {}, set()) as opened:
        begin(opened)
        opened.log({"role": "student", "epoch": 1})
        opened.mark_done("teacher")
        position, saved = restore(opened)
        assert (position.epoch, position.step, position.kept_score) == (0, 0, -1.0)
        position.epoch, position.kept_score, position.kept_epoch = 1, 0.75, 1
        position.count(torch.tensor(1.25), 2)
        saved["model"](torch.ones(1, 3)).sum().backward()
        saved["optimizer"].step()
        opened.save(position, saved)

    with Run.open(tmp_path / "run", {}, set(), resume=True) as again:
        assert again.done("teacher") and not again.done("student") and again.facts == FACTS
        assert [(entry["role"], entry["epoch"]) for entry in again.history] == [("student", 1)]
        restored, filled = restore(again)
        assert (restored.role, restored.epoch, restored.step, restored.kept_score, restored.kept_epoch) == (
            "student", 1, 1, 0.75, 1)
        assert restored.loss_sum.item() == 2.5 and restored.loss_sum.dtype == torch.float64
        assert torch.equal(filled["model"].weight, saved["model"].weight)
        assert filled["optimizer"].state_dict()["state"].keys() == saved["optimizer"].state_dict()["state"].keys()
        # a second training of the same process begins at its start
        assert restore(again, "control")[0].epoch == 0


def test_a_signal_saves_before_it_stops(tmp_path):
    with Run.open(tmp_path / "run", {}, set()) as opened:
        begin(opened)
        opened.stop_if_requested()
        position, saved = restore(opened)
        position.step = 3
        signal.raise_signal(signal.SIGTERM)
        assert opened.save_is_due()
        with pytest.raises(Stopped):
            opened.stop_if_requested()      # between two trainings there is nothing to save
        assert not (tmp_path / "run" / "last.ckpt").exists()
        with pytest.raises(Stopped):
            opened.stop_if_requested(lambda: opened.save(position, saved))
    assert checkpoint.read(tmp_path / "run" / "last.ckpt")["position"]["step"] == 3


def test_a_checkpoint_is_due_when_its_minutes_have_passed(tmp_path, monkeypatch):
    with Run.open(tmp_path / "run", {}, set(), save_minutes=10) as opened:
        begin(opened)
        position, saved = restore(opened)
        now = time.monotonic()
        for minutes, due in ((9.9, False), (10.1, True)):
            monkeypatch.setattr(time, "monotonic", lambda: now + 60 * minutes)
            assert opened.save_is_due() == due
        opened.save(position, saved)
        assert not opened.save_is_due()


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
