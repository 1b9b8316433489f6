"""Ranks on GPUs: two where there are two GPUs, else one that meets itself through NCCL."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import DEVICE, REHEARSAL
from tests.gpu.watch import losses_of
from tests.helpers.runs import command_line

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parents[2]
WARNINGS = ("destroy_process_group", "Grad strides do not match", "Traceback")


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "tests.gpu.rank", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_one_rank_over_nccl_parts_without_a_warning(tmp_path):
    said = torchrun(1, str(tmp_path)).stderr
    assert not any(warning in said for warning in WARNINGS), said


@pytest.mark.skipif(not REHEARSAL and torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_ranks_train_as_one_does_and_part_without_a_warning(tiny, tmp_path, monkeypatch):
    # without BatchNorm, whose statistics are of each rank's own share
    config = dataclasses.replace(tiny, student="test_convnext", teacher_epochs=0, lr=1e-4, views=0, epochs=2)
    one = losses_of(monkeypatch, config)
    both = dataclasses.replace(config, out=str(tmp_path / "two"), cache_dir=str(tmp_path / "cache2"))
    done = torchrun(2, str(tmp_path), *command_line(both))
    assert json.loads(done.stdout.splitlines()[-1])["student"]["test_total"] == 12
    assert not any(warning in done.stderr for warning in WARNINGS), done.stderr
    losses = [json.loads((tmp_path / f"losses.{rank}.json").read_text()) for rank in (0, 1)]
    assert losses[0] == losses[1] and len(one) == 2 * 5
    assert losses[0] == pytest.approx(one, rel=1e-3 if DEVICE.type == "cuda" else 1e-4)
