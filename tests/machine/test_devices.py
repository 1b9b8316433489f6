"""The device that --device names, or one line that says why not."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd import BadInput
from kd.machine import devices

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A function that lets torch see an accelerator: `gpu("cuda", (9, 0))`; `gpu(None)` is a machine without."""
    def see(kind: str | None, capability: tuple[int, int] = (9, 0),
            code: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90")) -> None:
        found = torch.device(kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(code))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    return see


def test_auto_takes_cuda_where_it_is_and_the_cpu_elsewhere(gpu, capsys):
    gpu("cuda")
    assert devices.choose("auto") == devices.choose("cuda") == torch.device("cuda")
    assert devices.choose("cpu") == CPU
    gpu(None)
    assert devices.choose("auto") == CPU
    assert capsys.readouterr().out == ""
    with pytest.raises(BadInput, match="^--device cuda: torch sees no cuda here; use --device cpu or auto$"):
        devices.choose("cuda")


def test_an_untried_device_is_taken_when_asked_for_and_called_untried(gpu, capsys):
    gpu("mps")
    assert devices.choose("mps") == torch.device("mps")
    assert capsys.readouterr().out == "--device mps: this code has never been tried there\n"
    assert devices.choose("auto") == CPU
    assert capsys.readouterr().out == "--device auto: goes on on the CPU (--device mps is untried; ask for it)\n"
    with pytest.raises(BadInput, match="^--device xpu: torch sees no xpu here, but mps; use --device mps, cpu or auto"):
        devices.choose("xpu")


@pytest.mark.parametrize("capability, usable", [
    ((6, 0), False), ((7, 0), False), ((7, 5), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_a_gpu_that_torch_has_no_code_for_is_passed_over_or_refused(gpu, capsys, capability, usable):
    gpu("cuda", capability)
    assert devices.choose("auto") == torch.device("cuda" if usable else "cpu")
    said = capsys.readouterr().out
    if usable:
        assert said == ""
        return
    name = f"sm_{capability[0]}{capability[1]}"
    assert said == (f"--device auto: goes on on the CPU (this torch has no code for a GPU, which is {name}; it has "
                    "compute_90, sm_75, sm_80, sm_90)\n")
    with pytest.raises(BadInput, match=f"^--device cuda: this torch has no code for a GPU, which is {name}; "):
        devices.choose("cuda")


def test_code_for_a_later_gpu_of_another_generation_does_not_count(gpu):
    gpu("cuda", (8, 0), ("sm_75", "sm_86", "sm_100a"))
    assert devices.choose("auto") == CPU


def test_a_driver_that_is_too_old_is_named(gpu, monkeypatch, capsys):
    gpu(None)
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    listed = SimpleNamespace(stdout="GPU 0: Tesla T4 (UUID: GPU-1)\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: listed)
    reason = "the driver of Tesla T4 is too old for CUDA 13.0, which this torch needs"
    assert devices.choose("auto") == CPU
    assert capsys.readouterr().out == f"--device auto: goes on on the CPU ({reason})\n"
    with pytest.raises(BadInput, match=f"^--device cuda: {reason}; use --device cpu or auto$"):
        devices.choose("cuda")
    listed.stdout = "No devices found\n"        # the tool without a card
    assert devices.choose("auto") == CPU and capsys.readouterr().out == ""


def test_each_rank_has_a_gpu_of_its_own(gpu, monkeypatch):
    gpu("cuda")
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.choose("auto") == torch.device("cuda", 1) and chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match="^--nproc-per-node: more ranks than the 2 GPUs of this machine$"):
        devices.choose("auto")


def test_on_a_cpu_an_array_is_not_copied():
    array = np.arange(4)
    assert devices.to_device(array, CPU).data_ptr() == array.ctypes.data
    tensor = torch.ones(3)
    assert devices.to_device(tensor, CPU) is tensor
    assert devices.host_array((2, 3), CPU).shape == (2, 3)


def test_the_widest_float_is_float64_but_on_mps():
    assert devices.widest_float(CPU) == devices.widest_float(torch.device("cuda")) == torch.float64
    assert devices.widest_float(torch.device("mps")) == torch.float32
