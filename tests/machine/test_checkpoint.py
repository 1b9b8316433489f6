"""Checkpoints: whole or noticed, the old one kept until the new one stands, and nothing in them can run."""

import hashlib
import io
import os
import pickle

import pytest
import torch

from kd import BadInput
from kd.machine import checkpoint

STATE = {"model": {"weight": torch.arange(300.0)}, "position": {"epoch": 3, "loss_sum": 0.1},
         "history": [{"role": "x"}]}


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["model"]["weight"], b["model"]["weight"]) and a["position"] == b["position"]


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {**STATE, "position": {"epoch": 2}})
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert loaded is not None and same(loaded, STATE)
    assert checkpoint.read(tmp_path / "last.ckpt.previous")["position"] == {"epoch": 2}
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
    checkpoint.save(path, {**STATE, "position": {"epoch": 9}})
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
