"""Several ranks against one: real processes under torchrun, on tiny data."""

import dataclasses
import json
import shutil
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from kd import BadInput
from kd.machine import checkpoint, distributed
from tests.helpers.processes import torchrun
from tests.helpers.ranks import watch
from tests.helpers.runs import command_line, identical

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def notes_of(path: str, ranks: int) -> list[dict]:
    """What `tests.helpers.ranks` left in each rank."""
    return [json.loads(Path(f"{path}.{rank}.json").read_text()) for rank in range(ranks)]


def alone(config: train.Config) -> tuple[dict, dict]:
    """The result of a run of one rank, and its notes."""
    notes: dict = {}
    undo = watch(notes)
    try:
        return train.main(config), notes
    finally:
        undo()


@pytest.mark.parametrize("method", ["kd", "simkd"])
def test_two_ranks_train_as_one_does(tiny, tmp_path, method):
    """Without BatchNorm, whose statistics are of each rank's own share."""
    config = dataclasses.replace(tiny, student="test_convnext", teacher_epochs=0, augment="crop", views=0, epochs=3,
                                 method=method, out=str(tmp_path / "one"))
    one, single = alone(config)
    both = dataclasses.replace(config, out=str(tmp_path / "two"), cache_dir=str(tmp_path / "cache2"))
    done = torchrun(tmp_path, 2, "tests.helpers.ranks", str(tmp_path / "notes"), *command_line(both))
    assert done.returncode == 0, done.stderr
    two, = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))      # by rank 0 alone
    notes = notes_of(str(tmp_path / "notes"), 2)
    assert not notes[0]["views"].keys() & notes[1]["views"].keys()
    assert {**notes[0]["views"], **notes[1]["views"]} == single["views"] and len(single["views"]) == 3 * 42
    assert notes[0]["losses"] == notes[1]["losses"] and len(single["losses"]) == 3 * 5
    assert np.allclose(notes[0]["losses"][:10], single["losses"][:10], rtol=1e-5, atol=0)
    assert np.allclose(notes[0]["losses"], single["losses"], rtol=1e-3, atol=0)
    assert abs(two["student"]["test_correct"] - one["student"]["test_correct"]) <= 1
    assert two["teacher_batches"] == 2 * one["teacher_batches"]  # each of half the samples


def test_a_rank_that_dies_or_is_stopped_ends_the_job_and_a_restart_goes_on_to_the_same_end(tiny, tmp_path):
    """An epoch has 5 steps. Killed (9) at the 8th: goes on from the 6th. Stopped (15) three later: from the 9th."""
    config = dataclasses.replace(tiny, teacher_epochs=0, epochs=3, views=0)
    whole, broken, other = (dataclasses.replace(config, out=str(tmp_path / name))
                            for name in ("whole", "broken", "other"))
    notes = str(tmp_path / "notes")

    def ranks(*flags: str, restarts: int = 0):
        return torchrun(tmp_path, 2, "tests.helpers.ranks", notes, *flags, restarts=restarts)

    assert ranks(*command_line(whole)).returncode == 0
    order = [list(each["views"]) for each in notes_of(notes, 2)]

    died = ranks("--kill", "9", "7", *command_line(broken))
    assert died.returncode == 1, died.stderr
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in died.stderr
    assert "train.py: error: another rank has ended" in died.stderr

    # another number of ranks, here one, goes on with the same samples in the same batches
    shutil.copytree(broken.out, other.out)
    _, single = alone(dataclasses.replace(other, resume=True))
    assert len(single["losses"]) == 10
    seen, left = list(single["views"]), [one[-2 * len(one) // 3:] for one in order]
    for size in (8, 8, 8, 8, 10) * 2:
        batch, seen = seen[:size], seen[size:]
        assert batch == left[0][:size // 2] + left[1][:size // 2]
        left = [one[size // 2:] for one in left]

    stopped = ranks("--kill", "15", "3", *command_line(broken, "--resume"))
    assert stopped.returncode == 1 and stopped.stderr.count("train.py: error:") == 1, stopped.stderr
    assert "exitcode  : 143" in stopped.stderr
    at = checkpoint.read(Path(broken.out) / "last.ckpt")["position"]
    assert (at["epoch"], at["step"]) == (1, 4)  # the step that rank 1 was in, and both made it
    again = ranks("--kill", "9", "3", *command_line(broken, "--resume"), restarts=1)
    assert again.returncode == 0, again.stderr
    identical(checkpoint.read(Path(whole.out) / "last.ckpt"), checkpoint.read(Path(broken.out) / "last.ckpt"))


@pytest.mark.parametrize("batch_size", [9, 6])
def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch, batch_size):
    distributed.check_batch_size(batch_size)
    monkeypatch.setattr(distributed.ranks, "ranks", lambda: 2)
    distributed.check_batch_size(8)
    with pytest.raises(BadInput, match=f"^--batch-size {batch_size}: 2 ranks need a multiple of 2, of at least 8$"):
        distributed.check_batch_size(batch_size)


@pytest.mark.parametrize("flags, line", [
    ("--lr 0.001", "error: --lr: rank 0 has 0.002, rank 1 has 0.001"),
    ("--teacher-weights /no.safetensors", "error: rank 1: --teacher-weights /no.safetensors: no such file")])
def test_what_the_ranks_do_not_agree_on_or_only_one_finds_wrong_is_one_line(tiny, tmp_path, flags, line):
    done = torchrun(tmp_path, 2, "tests.helpers.ranks", str(tmp_path / "notes"), "--rank-1", flags, *command_line(tiny))
    assert done.returncode == 1
    assert line in done.stderr and done.stderr.count("train.py: error:") == 1


@pytest.mark.parametrize("rank, listens", [("0", True), ("1", False)], ids=["a port in use", "nobody there"])
def test_ranks_that_cannot_meet_say_where(monkeypatch, rank, listens):
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(distributed.ranks, "ranks", lambda: 2)
        for name, value in dict(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=f"the 2 ranks cannot meet at 127.0.0.1:{port}.* a free port"):
            distributed.join(CPU)
    assert distributed.world_size() == 1


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_shares_of_three_ranks_are_put_back_in_order_also_where_one_has_none(monkeypatch, count):
    rows = np.arange(2 * count).reshape(count, 2)
    shares = [rows[rank::3] if rank < count else np.empty((0, 0), int) for rank in range(3)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "_of_all_ranks", lambda mine: shares)
    assert np.array_equal(distributed.gather(shares[0], count), rows)


def test_batchnorm_over_all_ranks_is_refused_on_a_cpu():
    with pytest.raises(BadInput, match="^--sync-bn: works on CUDA only, and the device is cpu; leave it out$"):
        distributed.synchronise_batchnorm(nn.BatchNorm1d(2), CPU)
    converted = distributed.synchronise_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), torch.device("cuda"))
    assert isinstance(converted[0], nn.SyncBatchNorm)      # type: ignore[index]


def test_a_run_that_succeeded_parts_from_the_other_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    distributed.leave()
    assert not dist.is_initialized()
    distributed.leave()         # alone, there is nobody to part from
