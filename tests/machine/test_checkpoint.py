"""Checkpoints: whole or noticed, the old one kept until the new one stands, and nothing in them can run."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from kd import BadInput
from kd.machine import checkpoint


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of epoch 3, and the one before it."""
    path = tmp_path / "last.ckpt"
    for epoch in (2, 3):
        checkpoint.save(path, {"weight": torch.full((300,), epoch), "history": [{"epoch": epoch}]})
    return path


def epoch(loaded: dict | None) -> int:
    assert loaded is not None and loaded["weight"].tolist() == [loaded["history"][0]["epoch"]] * 300
    return loaded["history"][0]["epoch"]


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(path):
    assert epoch(checkpoint.load(path)) == 3 and epoch(checkpoint.read(Path(f"{path}.previous"))) == 2
    assert sorted(each.name for each in path.parent.iterdir()) == ["last.ckpt", "last.ckpt.previous"]
    assert checkpoint.load(path.parent / "another.ckpt") is None


def test_every_flipped_bit_and_every_cut_is_noticed(path):
    whole = path.read_bytes()
    files = [whole[:length] for length in (0, 7, 39, 40, len(whole) - 1)]
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=100):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        files.append(damaged)
    for content in files:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.read(path)


@pytest.mark.parametrize("content, lines", [(b"x" * 100, 1), (None, 0)])
def test_where_the_last_is_damaged_or_gone_the_one_before_takes_its_place(path, content, lines):
    """A kill between two renames leaves the one before alone."""
    said: list[str] = []
    path.write_bytes(content) if content else path.unlink()
    assert epoch(checkpoint.load(path, said.append)) == 2
    assert said == [f"{path} is damaged: its checksum does not match; goes on from the checkpoint before it"] * lines
    checkpoint.save(path, {})           # never with a damaged one beside it
    assert epoch(checkpoint.read(Path(f"{path}.previous"))) == 2


def test_two_damaged_checkpoints_are_refused(path):
    for each in path.parent.iterdir():
        each.write_bytes(b"x")
    with pytest.raises(BadInput, match="last.ckpt is damaged: .*, and no other is whole; start again with --overwrite"):
        checkpoint.load(path, lambda line: None)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_a_valid_checksum_is_not_executed(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save(Payload(), path)
    for payload in (path.read_bytes(), pickle.dumps(Payload())):
        path.write_bytes(checkpoint.MAGIC + hashlib.sha256(payload).digest() + payload)
        with pytest.raises(ValueError, match="not opened"):
            checkpoint.read(path)
    assert not Path("executed").exists()
