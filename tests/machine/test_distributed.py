"""Several ranks against one: real processes under torchrun, on tiny data."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import train
from kd import BadInput
from kd.machine import checkpoint, distributed
from tests.helpers.processes import torchrun
from tests.helpers.ranks import watch
from tests.helpers.runs import command_line, identical, step

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("student, sync_bn, lr, accumulate, method", [
    ("test_convnext", False, 2e-3, 2, "kd"), ("test_efficientnet", True, 5e-5, 1, "kd"),
    ("test_convnext", False, 2e-3, 1, "simkd")])
def test_two_ranks_train_as_one_does(tiny, tmp_path, student, sync_bn, lr, accumulate, method):
    """Under a high rate AdamW, whose first steps are as long for a small gradient as for a large one, makes the
    rounding of BatchNorm's sums grow: hence the tutorial's rate there."""
    config = dataclasses.replace(tiny, student=student, sync_bn=sync_bn, lr=lr, teacher_epochs=0, augment="mixup",
                                 views=0, epochs=3, method=method, out=str(tmp_path / "one"))
    steps = 5
    if accumulate > 1:
        config, steps = dataclasses.replace(config, batch_size=16, accumulate=accumulate), 3
    alone: dict = {}
    undo = watch(alone)
    try:
        one = train.main(config)
    finally:
        undo()
    both = dataclasses.replace(config, out=str(tmp_path / "two"), cache_dir=str(tmp_path / "cache2"))
    done = torchrun(tmp_path, 2, "tests.helpers.ranks", str(tmp_path / "notes"), *command_line(both))
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout.splitlines()[-1])  # by rank 0 alone
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1
    notes = [json.loads((tmp_path / f"notes.{rank}.json").read_text()) for rank in (0, 1)]
    assert not notes[0]["views"].keys() & notes[1]["views"].keys()
    assert {**notes[0]["views"], **notes[1]["views"]} == alone["views"] and len(alone["views"]) == 3 * 42
    assert notes[0]["losses"] == notes[1]["losses"] and len(alone["losses"]) == 3 * steps
    assert np.allclose(notes[0]["losses"][:10], alone["losses"][:10], rtol=1e-5, atol=0)
    assert np.allclose(notes[0]["losses"], alone["losses"], rtol=1e-3, atol=0)
    assert abs(two["student"]["test_correct"] - one["student"]["test_correct"]) <= 1
    assert two["teacher_batches"] == 2 * one["teacher_batches"]  # each of half the samples
    first, second = ([json.loads(line)["train_loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
                     for name in ("one", "two"))
    assert np.allclose(first, second, rtol=1e-3, atol=0)


def test_a_rank_that_dies_or_is_stopped_ends_the_job_and_a_restart_goes_on_to_the_same_end(tiny, tmp_path):
    """An epoch has 5 steps. Killed at the 8th: goes on from the 6th. Stopped three steps later: from the 9th."""
    config = dataclasses.replace(tiny, teacher_epochs=0, epochs=3, views=0)
    whole, broken, other = (dataclasses.replace(config, out=str(tmp_path / name))
                            for name in ("whole", "broken", "other"))
    notes = str(tmp_path / "notes")
    assert torchrun(tmp_path, 2, "tests.helpers.ranks", notes, *command_line(whole)).returncode == 0
    order = [list(json.loads(Path(f"{notes}.{rank}.json").read_text())["views"]) for rank in (0, 1)]

    died = torchrun(tmp_path, 2, "tests.helpers.ranks", notes, "--kill", str(signal.SIGKILL.value), "7",
                    *command_line(broken))
    assert died.returncode == 1, died.stderr
    assert "Traceback (most recent call last):\n  File \"" + str(ROOT) not in died.stderr
    assert "train.py: error: another rank has ended" in died.stderr

    # another number of ranks, here one, goes on with the same samples in the same batches
    shutil.copytree(broken.out, other.out)
    alone: dict = {}
    undo = watch(alone)
    try:
        train.main(dataclasses.replace(other, resume=True))
    finally:
        undo()
    assert len(alone["losses"]) == 10
    seen, left = list(alone["views"]), [one[-2 * len(one) // 3:] for one in order]
    for size in (8, 8, 8, 8, 10) * 2:
        batch, seen = seen[:size], seen[size:]
        assert batch == left[0][:size // 2] + left[1][:size // 2]
        left = [one[size // 2:] for one in left]

    stopped = torchrun(tmp_path, 2, "tests.helpers.ranks", notes, "--kill", str(signal.SIGTERM.value), "3",
                       *command_line(broken, "--resume"))
    assert stopped.returncode == 1 and stopped.stderr.count("train.py: error:") == 1, stopped.stderr
    assert "exitcode  : 143" in stopped.stderr
    at = checkpoint.read(Path(broken.out) / "last.ckpt")["position"]
    assert (at["epoch"], at["step"]) == (1, 4)  # the step that rank 1 was in, and both made it
    again = torchrun(tmp_path, 2, "tests.helpers.ranks", notes, "--kill", str(signal.SIGKILL.value), "3",
                     *command_line(broken, "--resume"), restarts=1)
    assert again.returncode == 0, again.stderr
    identical(checkpoint.read(Path(whole.out) / "last.ckpt"), checkpoint.read(Path(broken.out) / "last.ckpt"))


def test_four_ranks_of_two_agents_are_one_run(tiny, tmp_path):
    """Two torchrun agents, as on two machines, which meet on loopback: each sample is one rank's, in every epoch."""
    config = dataclasses.replace(tiny, teacher_epochs=0, epochs=2, views=0, batch_size=16, out=str(tmp_path / "out"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d",
               f"--rdzv-endpoint={endpoint}", "-m", "tests.helpers.ranks", str(tmp_path / "notes"),
               *command_line(config)]
    agents = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    outputs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    results = [json.loads(line) for stdout, _ in outputs for line in stdout.splitlines() if line.startswith("{")]
    assert len(results) == 1 and results[0]["student"]["test_total"] == 12
    notes = [json.loads((tmp_path / f"notes.{rank}.json").read_text()) for rank in range(4)]
    assert sorted(key for one in notes for key in one["views"]) == sorted(f"{v}/{s}" for v in (0, 1) for s in range(42))
    assert all(one["losses"] == notes[0]["losses"] for one in notes) and len(notes[0]["losses"]) == 2 * 3


@pytest.mark.parametrize("batch_size, accumulate, least", [(9, 1, 8), (6, 1, 8), (8, 2, 16)])
def test_a_batch_that_the_ranks_cannot_share_is_refused(monkeypatch, batch_size, accumulate, least):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=f"--batch-size {batch_size}: 2 ranks with --accumulate {accumulate} need a "
                                       f"multiple of 2, of at least {least}"):
        distributed.check_batch_size(batch_size, accumulate)


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
        for name, value in dict(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadInput, match=f"the 2 ranks cannot meet at 127.0.0.1:{port}.* a free port"):
            distributed.join(torch.device("cpu"))
    assert distributed.world_size() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_of_three_ranks_are_put_back_in_order_also_where_one_has_none(monkeypatch, count):
    rows = np.arange(2 * count).reshape(count, 2)
    shares = [rows[rank::3] if rank < count else np.empty((0, 0), rows.dtype) for rank in range(3)]
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_gather_object", lambda told, mine: told.__setitem__(slice(0, 3), shares))
    for mine in shares:
        assert np.array_equal(distributed.gather(mine, count), rows)


@given(st.integers(1, 200), st.integers(1, 50))
def test_parts_cover_the_batch_once_with_two_rows_at_least(size, accumulate):
    parts = distributed.split_batch(size, accumulate)
    assert [i for part in parts for i in range(size)[part]] == list(range(size))
    lengths = [part.stop - part.start for part in parts]
    assert len(parts) == max(1, min(size // 2, accumulate)) and max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(2, size)


def test_gradients_are_averaged_once_a_step(monkeypatch):
    """In the last part's forward; before it, in DDP's `no_sync`."""
    class Ranked(nn.Linear):
        within = False
        seen: tuple[bool, ...] = ()

        @contextlib.contextmanager
        def no_sync(self):
            self.within = True
            yield
            self.within = False

        def forward(self, x):
            self.seen = *self.seen, self.within
            return super().forward(x)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = Ranked(4, 3)
    step(model, torch.optim.SGD(model.parameters()), torch.randn(6, 4), torch.arange(6) % 3, None, kd_weight=0.0,
         accumulate=3)
    assert model.seen == (True, True, False)


def test_accumulated_parts_are_the_whole_batch(tiny):
    gradients, losses = [], []
    x, labels, soft = torch.randn(10, 3, 8, 8), torch.randint(0, 3, (10,)), torch.randn(10, 3)
    for accumulate in (1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        loss, norm = step(model, optimizer, x, labels, soft, clip=1e9, accumulate=accumulate)
        losses.append(loss.item())
        gradients.append(torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]))
    assert np.isclose(losses[0], losses[1], rtol=1e-6)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_a_run_that_succeeded_parts_from_the_other_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        monkeypatch.setattr(distributed, "world_size", lambda: 2)       # so that the weights are really sent
        before = {name: value.clone() for name, value in model.state_dict().items()}
        distributed.broadcast_weights(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        train.cli.run(lambda config: {"fine": True}, train.Config())
        assert not torch.distributed.is_initialized()
        assert capsys.readouterr().out == '{"fine": true}\n'
    finally:
        distributed.leave()
    distributed.leave()         # alone, there is nobody to part from
