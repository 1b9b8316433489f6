"""Checkpoints: whole or noticed, the old one kept until the new one stands, and nothing in them can run."""

import errno
import hashlib
import json
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from kd import BadInput, TrainingFault
from kd.machine import checkpoint, files

STATE = {"model": {"weight": torch.arange(300.0)}, "at": {"epoch": 3, "loss_sum": 0.1}, "history": [{"role": "x"}]}


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["model"]["weight"], b["model"]["weight"]) and a["at"] == b["at"]


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {**STATE, "at": {"epoch": 2}})
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert loaded is not None and same(loaded, STATE)
    assert checkpoint.read(tmp_path / "last.ckpt.previous")["at"] == {"epoch": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous"]


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load(tmp_path / "last.ckpt") is None


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * len(whole), (100,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read(path)
    for length in (0, 7, 39, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read(path)


def test_a_damaged_last_falls_back_says_so_and_is_kept(tmp_path):
    said: list[str] = []
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    checkpoint.save(path, {**STATE, "at": {"epoch": 9}})
    path.write_bytes(b"x" * 100)
    loaded = checkpoint.load(path, said.append)
    assert loaded is not None and same(loaded, STATE)
    assert len(said) == 1 and "last.ckpt.damaged" in said[0]
    assert (tmp_path / "last.ckpt.damaged").read_bytes() == b"x" * 100


def test_two_damaged_checkpoints_are_refused(tmp_path):
    for name in ("last.ckpt", "last.ckpt.previous"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match="no checkpoint is whole"):
        checkpoint.load(tmp_path / "last.ckpt", lambda line: None)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_a_valid_checksum_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"model": Payload()}, buffer)
    for payload in (buffer.getvalue(), pickle.dumps(Payload())):
        path = tmp_path / "last.ckpt"
        path.write_bytes(checkpoint.MAGIC + hashlib.sha256(payload).digest() + payload)
        with pytest.raises(ValueError, match="not opened"):
            checkpoint.read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_stray_file(tmp_path, monkeypatch, call):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(TrainingFault, match=r"last\.ckpt: No space left on device"):
        checkpoint.save(path, {**STATE, "at": {}})
    monkeypatch.undo()
    loaded = checkpoint.load(path)
    assert loaded is not None and same(loaded, STATE)
    assert {p.name for p in tmp_path.iterdir()} <= {"last.ckpt", "last.ckpt.previous"}


def open_run(out: Path, config: dict, resume: bool = False, overwrite: bool = False):
    opened = checkpoint.open_run(out, config, {"out"}, resume, overwrite)
    files.write_atomic(out / "config.json", json.dumps(config).encode())
    return opened


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    out = tmp_path / "run"
    assert open_run(out, {"lr": 1.0, "out": "a"}) is None
    with pytest.raises(BadInput, match="--resume.*--overwrite"):
        open_run(out, {"lr": 1.0, "out": "a"})
    checkpoint.save(out / "last.ckpt", STATE)
    state = open_run(out, {"lr": 1.0, "out": "b"}, resume=True)
    assert state is not None and same(state, STATE)
    with pytest.raises(BadInput, match=r"--lr 2\.0 \(was 1\.0\)"):
        open_run(out, {"lr": 2.0, "out": "a"}, resume=True)


def test_overwrite_removes_the_run_but_nothing_else(tmp_path):
    open_run(tmp_path / "run", {})
    checkpoint.save(tmp_path / "run" / "last.ckpt", STATE)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    open_run(tmp_path / "run", {}, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "notes.txt"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match="not a run"):
        open_run(tmp_path / "home", {}, overwrite=True)


def test_a_kill_inside_the_very_first_write_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.77.tmp").write_text("{")
    assert checkpoint.open_run(tmp_path, {}, set(), resume=True, overwrite=False) is None
    assert not list(tmp_path.iterdir())


def test_a_saved_folder_is_put_back_where_a_kill_came_between_the_two_renames(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".student.old").mkdir()
    (tmp_path / ".student.old" / "model.safetensors").write_text("weights")
    checkpoint.open_run(tmp_path, {}, set(), resume=True, overwrite=False)
    assert (tmp_path / "student" / "model.safetensors").read_text() == "weights"


def test_other_data_weights_or_precision_are_refused_by_name():
    state: dict = {}
    checkpoint.check_facts(state, {"dataset": "a", "teacher_weights": "b", "amp": "None"})
    checkpoint.check_facts(state, {"dataset": "a", "teacher_weights": "b", "amp": "None"})
    for name in ("dataset", "teacher_weights", "amp"):
        with pytest.raises(BadInput, match=f"--resume: what --{name.replace('_', '-')} stands for has changed"):
            checkpoint.check_facts(state, {**state["facts"], name: "other"})


def test_a_disk_that_gives_back_something_else_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.ckpt", {"a": 1})
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"something else")
    with pytest.raises(TrainingFault, match="gives back something else"):
        checkpoint.save(tmp_path / "last.ckpt", {"a": 2})
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / "last.ckpt") == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_without_hard_links_the_previous_one_is_a_copy(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for value in (1, 2, 3):
        checkpoint.save(tmp_path / "last.ckpt", {"a": value})
    assert checkpoint.read(tmp_path / "last.ckpt") == {"a": 3}
    assert checkpoint.read(tmp_path / "last.ckpt.previous") == {"a": 2}


def test_what_a_killed_process_was_writing_is_swept(tmp_path):
    open_run(tmp_path / "run", {})
    (tmp_path / "run" / "teacher").mkdir()
    for stray in (".last.ckpt.7.tmp", "teacher/.README.md.7.tmp"):
        (tmp_path / "run" / stray).write_bytes(b"half")
    open_run(tmp_path / "run", {}, resume=True)
    assert not list((tmp_path / "run").rglob(".*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        open_run(tmp_path / "file" / "run", {})
