"""A run's folder: never lost by accident, never another run's; and its position, clock and checkpoint."""

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
import timm
import torch
from torch import nn

from kd import BadInput, run
from kd.machine import checkpoint, files
from kd.machine.health import Guard
from kd.machine.signals import Stopped
from kd.run import Clock, Run

ROOT = Path(__file__).resolve().parents[1]
STATE = {"model": {"weight": torch.arange(300.0)}, "history": [{"role": "x"}]}


@pytest.fixture(autouse=True)
def unlocked():
    with run.unlocked():
        yield


def names(folder: Path) -> list[str]:
    """What lies in a folder beside its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != run.LOCK)


def open_folder(out: Path, config: dict, resume: bool = False, overwrite: bool = False) -> run.Opened:
    opened = run.open_folder(out, config, {"out"}, resume, overwrite)
    files.write_atomic(out / "config.json", json.dumps(config).encode())
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
    assert run.open_folder(tmp_path, {}, set(), resume=True, overwrite=False) == (None, None, False)
    assert names(tmp_path) == []


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


# ---- the default folder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, config, folder", [
    ("beans", "", "tutorial"), ("leaves", "", "tutorial-leaves"), ("beans", "small", "tutorial-beans@small"),
    ("someone/beans", "", "tutorial-someone--beans"), ("someone/beans", "a b/c", "tutorial-someone--beans@a-b--c"),
    ("photos", "", "tutorial-photos"), ("./photos/", "", "tutorial-photos"), ("HERE/photos", "", "tutorial-photos"),
    ("photos/côte d'azur", "", "tutorial-photos--côte-d-azur"), ("/data/photos", "", "tutorial---data--photos"),
    ("~/photos", "", "tutorial---home--me--photos")])
def test_every_data_set_has_a_default_folder_of_its_own(tmp_path, monkeypatch, dataset, config, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "photos").mkdir()
    made = run.default_folder("tutorial", dataset.replace("HERE", str(tmp_path)), config, own_dataset="beans")
    assert made == Path("runs", folder)


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
    opened = Run(out, {"lr": 2.0}, set(), overwrite=True)
    opened.must_match(**FACTS)
    assert digests(out) == before                   # data and models may still be refused
    assert opened.finished is None and opened.history == [] and not opened.done("student")
    opened.write_config(data={"classes": ["a", "b"]})
    assert names(out) == ["config.json", "notes.txt"]
    assert json.loads((out / "config.json").read_text()) == {"lr": 2.0, "data": {"classes": ["a", "b"]}}
    assert opened.write_result({"new": True}) == {"new": True}
    opened.write_config()                           # a second call finds nothing of an old run


def test_a_resumed_run_keeps_its_files_when_it_writes_its_config(tmp_path):
    out = finished_run(tmp_path / "run")
    before = digests(out)
    Run(out, {"lr": 1.0}, set(), resume=True, overwrite=True).write_config()
    assert digests(out).keys() == before.keys()


def test_a_link_to_a_folder_goes_but_not_what_it_leads_to(tmp_path):
    out = finished_run(tmp_path / "run")
    (out / "teacher").rename(tmp_path / "elsewhere")
    (out / "teacher").symlink_to(tmp_path / "elsewhere")
    Run(out, {"lr": 2.0}, set(), overwrite=True).write_config()
    assert not (out / "teacher").is_symlink() and (tmp_path / "elsewhere" / "weights").read_text() == "teacher"


@pytest.mark.parametrize("removals", range(len(run.RUN_FILES + run.RUN_FOLDERS) + 1))
def test_a_kill_while_the_old_run_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch, removals):
    out = finished_run(tmp_path / "run")
    opened = Run(out, {"lr": 2.0}, set(), overwrite=True)

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

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", last_moments(unlink))
        patch.setattr(shutil, "rmtree", last_moments(rmtree))
        opened.write_config()

    left = set(digests(out))
    weights = {f"{name}/weights" for name in run.RUN_FOLDERS}
    if removals == 0:
        assert Run(out, {"lr": 1.0}, set(), resume=True).finished == {}
    else:       # neither a result nor a checkpoint stands for what is gone
        assert "result.json" not in left
        assert "last.ckpt" not in left or weights <= left
    assert "config.json" in left and "notes.txt" in left
    Run(out, {"lr": 2.0}, set(), overwrite=True).write_config()
    assert set(digests(out)) == {"config.json", "notes.txt"}


def test_a_flag_that_is_newer_than_the_run_had_its_default(tmp_path):
    Run(tmp_path / "run", {"lr": 1.0}, set()).write_config()
    newer = {"lr": 1.0, "method": "kd"}
    Run(tmp_path / "run", newer, set(), resume=True, defaults={"lr": 2.0, "method": "kd"})
    with pytest.raises(BadInput, match=r"--method dkd \(was kd\)"):
        Run(tmp_path / "run", {**newer, "method": "dkd"}, set(), resume=True, defaults=newer)


def test_ranks_that_are_restarted_resume_the_new_run_never_the_old_one(tmp_path, monkeypatch):
    out = finished_run(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    Run(out, {"lr": 1.0}, set(), overwrite=True)            # a rank dies before data and models are loaded
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Run(out, {"lr": 1.0}, set(), overwrite=True)
    assert again.finished is None and again.history == []
    again.write_config()
    assert names(out) == ["config.json", "notes.txt"]
    checkpoint.save(out / "last.ckpt", {"history": [{"role": "teacher"}]})
    assert Run(out, {"lr": 1.0}, set(), overwrite=True).history == [{"role": "teacher"}]

    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")        # and what a start under torchrun leaves ends there
    Run(out, {"lr": 1.0}, set(), overwrite=True)
    assert Run(out, {"lr": 1.0}, set(), resume=True).history == [{"role": "teacher"}]
    assert names(out) == ["config.json", "last.ckpt", "notes.txt"]


def test_a_start_that_was_refused_is_not_resumed_by_a_restart(tmp_path, monkeypatch):
    out = finished_run(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        with pytest.raises(BadInput, match="holds another run"):
            Run(out, {"lr": 1.0}, set())
    assert Run(out, {"lr": 1.0}, set(), resume=True).finished == {}


TRAINING = """import sys
from pathlib import Path
from kd.run import Run
Run(Path(sys.argv[1]), {"lr": 1.0}, set(), resume=True)
print("trains", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_two_processes_never_train_in_one_folder(tmp_path, monkeypatch, end):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with run.unlocked():
        out = finished_run(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", TRAINING, str(out)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == "trains\n"
        (out / ".last.ckpt.7.tmp").write_bytes(b"half")
        for resume, overwrite in ((False, False), (False, True), (True, False)):
            with pytest.raises(BadInput, match="^--out .*: another process is training there; wait for it"):
                Run(out, {"lr": 1.0}, set(), resume=resume, overwrite=overwrite)
        assert (out / ".last.ckpt.7.tmp").exists()      # what the other one is writing
        assert not (out / run.NOT_BEGUN).exists()       # its restarts go on
        if end:
            other.send_signal(end)
    with run.unlocked():
        Run(out, {"lr": 1.0}, set(), resume=True)
        Run(out, {"lr": 1.0}, set(), resume=True)       # the process itself may open it again
    assert not list(out.glob(".*"))


def test_a_disk_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def acquire(lock, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(run.FileLock, "acquire", acquire)
    assert Run(tmp_path / "run", {"lr": 1.0}, set()).finished is None


def test_weights_that_are_gone_are_named(tmp_path):
    opened = Run(finished_run(tmp_path / "run"), {"lr": 1.0}, set(), resume=True)
    with pytest.raises(BadInput, match="teacher: its weights cannot be read .*; put them back, or start again with"):
        opened.load_kept("teacher", timm.create_model("test_efficientnet"))


def test_an_old_run_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    opened = Run(finished_run(tmp_path / "run"), {"lr": 2.0}, set(), overwrite=True)

    def busy(path, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    with pytest.raises(BadInput, match="--overwrite: .*student cannot be removed .Device or resource busy.; give"):
        opened.write_config()


def test_a_teacher_inside_the_run_that_overwrite_removes_is_refused(tmp_path, monkeypatch):
    out = finished_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(out)
    (out / "copy").mkdir()
    monkeypatch.chdir(out / "teacher")
    inside = (str(out / "teacher"), str(out / "teacher" / "weights"), str(tmp_path / "link" / "teacher"), ".",
              "../control")
    for folder in (out, tmp_path / "link"):
        for path in inside:
            with pytest.raises(BadInput, match="^--teacher-weights .*copy it to another place first") as caught:
                run.refuse_inside(folder, "--teacher-weights", path)
            assert "\n" not in str(caught.value)
        for path in (str(out / "copy"), str(tmp_path / "teacher"), "imagenet", str(out) + "-other/teacher"):
            run.refuse_inside(folder, "--teacher-weights", path)


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
    again.must_match(**{**FACTS, "teacher_weights": "none"})    # an older run recorded random weights


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
    assert (position.epoch, position.step, position.kept_accuracy) == (0, 0, -1.0)
    position.epoch, position.step, position.kept_accuracy, position.kept_epoch = 1, 4, 0.75, 1
    position.loss_sum += 2.5
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    opened.save()

    again = Run(tmp_path / "run", {}, set(), resume=True)
    assert again.done("teacher") and not again.done("student") and again.facts == FACTS
    assert [(entry["role"], entry["epoch"]) for entry in again.history] == [("student", 1)]
    restored, other_model, other_optimizer = restore(again)
    assert (restored.role, restored.epoch, restored.step, restored.kept_accuracy, restored.kept_epoch) == (
        "student", 1, 4, 0.75, 1)
    assert restored.loss_sum.item() == 2.5 and restored.loss_sum.dtype == torch.float64
    assert torch.equal(other_model.weight, model.weight)  # type: ignore[arg-type]
    assert other_optimizer.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    # a checkpoint from before these two fields had their names
    content = checkpoint.load(tmp_path / "run" / "last.ckpt")
    assert content is not None
    for new, old in (("kept_accuracy", "best"), ("kept_epoch", "best_epoch")):
        content["position"][old] = content["position"].pop(new)
    checkpoint.save(tmp_path / "run" / "last.ckpt", content)
    older = restore(Run(tmp_path / "run", {}, set(), resume=True))[0]
    assert (older.kept_accuracy, older.kept_epoch) == (0.75, 1)
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


def test_a_run_that_goes_on_with_other_kernels_says_that_the_bits_differ(tmp_path, capsys):
    begun = Run(tmp_path / "run", {"lr": 1.0}, set())
    begun.write_config()
    begun.computes_with("cpu, fp32, loss fused (C++)")
    checkpoint.save(tmp_path / "run" / "last.ckpt", {"arithmetic": begun.arithmetic})

    resumed = Run(tmp_path / "run", {"lr": 1.0}, set(), resume=True)
    resumed.computes_with("cpu, fp32, loss fused (C++)")
    assert capsys.readouterr().out == ""
    resumed.computes_with("cpu, fp32, loss closed form")
    assert capsys.readouterr().out == (
        "--resume: computed with cpu, fp32, loss fused (C++) until here, and with cpu, fp32, loss closed form from "
        "here on: the result is not the same to the bit\n")
