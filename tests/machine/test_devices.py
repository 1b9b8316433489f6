"""The device that --device names, or one line that says why not."""

from unittest import mock

import numpy as np
import pytest
import torch

from kd import BadInput
from kd.machine import devices

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_CODE = RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be reported elsewhere")


@pytest.fixture
def first_operation(monkeypatch) -> mock.Mock:
    """torch sees two GPUs. What `choose` computes there is up to the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "ones", mock.Mock())
    return torch.ones       # type: ignore[return-value]


def as_rank(monkeypatch, rank: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "4"), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)


def test_auto_takes_cuda_where_it_is_and_the_cpu_elsewhere(first_operation, monkeypatch, capsys):
    assert devices.choose("auto") == devices.choose("cuda") == GPU and devices.choose("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.choose("auto") == CPU and capsys.readouterr().out == ""
    for other in ("cuda", "mps"):
        with pytest.raises(BadInput, match=f"^--device {other}: torch sees no {other} here; use --device cpu or auto$"):
            devices.choose(other)


def test_a_gpu_that_cannot_compute_is_passed_over_or_refused(first_operation, monkeypatch, capsys):
    first_operation.side_effect = NO_CODE
    assert devices.choose("auto") == CPU
    assert capsys.readouterr().out == "--device auto: goes on on the CPU (CUDA error: no kernel image is available)\n"
    with pytest.raises(BadInput, match="^--device cuda: CUDA error: no kernel image is available; use --device cpu$"):
        devices.choose("cuda")
    as_rank(monkeypatch, "1")       # the other ranks may be on GPUs
    with pytest.raises(BadInput, match="^--device auto: CUDA error"):
        devices.choose("auto")


def test_each_rank_has_a_gpu_of_its_own(first_operation, monkeypatch):
    as_rank(monkeypatch, "1")
    assert devices.choose("auto") == torch.device("cuda", 1)
    as_rank(monkeypatch, "2")
    with pytest.raises(BadInput, match="^--nproc-per-node: more ranks than the 2 GPUs of this machine$"):
        devices.choose("auto")


def test_on_a_cpu_an_array_is_not_copied():
    array = np.arange(4)
    assert devices.to_device(array, CPU).data_ptr() == array.ctypes.data
