"""Device, precision and kernels, as the flags and the machine say."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from kd import BadInput
from kd.machine import runtime
from tests.helpers import processes
from tests.helpers.runs import command_line


def test_a_device_or_precision_that_is_not_there_is_refused(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda"):
            runtime.start("cuda", "auto", "auto")
    with pytest.raises(BadInput, match="--amp fp16"):
        runtime.start("cpu", "fp16", "auto")
    for fast, amp in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert runtime.start("cpu", "auto", "auto")[1:3] == (amp, False)
    assert runtime.start("cpu", "bf16", "off")[1:3] == (torch.bfloat16, False)


def test_the_switch_for_kernels_reaches_the_allocator(monkeypatch):
    tuned = []
    monkeypatch.setattr(runtime, "tune_allocator", lambda: tuned.append(True))
    assert not runtime.start("cpu", "off", "off", "off").kernels and tuned == []
    assert runtime.start("cpu", "off", "off", "auto").kernels and tuned == [True]


# torch.compile

NO_COMPILER = RuntimeError("CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\n"
                           "x.cpp:1:10: fatal error: Python.h: No such file or directory\n")


@pytest.fixture
def compilations(monkeypatch) -> list:
    """The functions that were compiled; they run as they are. Tensors of the GPU are on the CPU."""
    seen: list = []
    ones = torch.ones

    def compile(function):
        seen.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    return seen


def test_whether_to_compile_is_found_out_by_compiling(compilations, capsys):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not runtime._choose_compile("off", cpu) and not runtime._choose_compile("off", cuda)
    assert not runtime._choose_compile("auto", cpu) and compilations == []
    assert runtime._choose_compile("on", cpu) and len(compilations) == 1
    assert runtime._choose_compile("auto", cuda) and runtime._choose_compile("on", cuda) and len(compilations) == 3
    assert runtime.start("cpu", "off", "on").line.endswith("fp32, compiled")
    assert capsys.readouterr().out == ""


def test_without_a_compiler_auto_goes_on_after_one_line_and_on_is_refused(compilations, monkeypatch, capsys):
    def compile(function):
        raise NO_COMPILER

    monkeypatch.setattr(torch, "compile", compile)
    assert not runtime._choose_compile("auto", torch.device("cuda"))
    assert capsys.readouterr().out == (
        "--compile auto: goes on uncompiled, since torch.compile does not work here "
        "(x.cpp:1:10: fatal error: Python.h: No such file or directory)\n")
    for device in ("cpu", "cuda"):
        with pytest.raises(BadInput, match=r"^--compile on: .*Python.h: No such file.*\); .*--compile off$"):
            runtime._choose_compile("on", torch.device(device))


def test_a_run_that_cannot_be_compiled_is_refused_before_anything_is_loaded(tiny, tmp_path):
    """By the real torch.compile, which finds no compiler."""
    flags = command_line(dataclasses.replace(tiny, compile="on"))
    process = processes.FORKS.Process(target=_run_without_compiler, args=(flags, str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == 2 and (tmp_path / "stdout").read_text() == ""
    line, = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith("train.py: error: --compile on: torch.compile does not work here (")
    assert "/nonexistent/g++" in line and line.endswith("use --compile off")
    assert not Path(tiny.out).exists()


def _run_without_compiler(flags: list[str], folder: str) -> None:
    from torch._inductor import config
    config.cpp.cxx = (None, "/nonexistent/g++")     # as CXX=/nonexistent/g++ in a process that starts from nothing
    processes._run(flags, f"{folder}/stdout", f"{folder}/stderr")


def test_a_model_that_cannot_be_compiled_computes_the_same_and_a_line_says_why(monkeypatch, capsys):
    """Logits, gradients, BatchNorm's statistics and the random state, to the bit; the last batch is short."""
    called: list = []
    lookup = torch._dynamo.lookup_backend

    def inductor(graph, inputs):
        called.append(graph)
        raise RuntimeError("LoweringException: no such kernel\n  while executing %conv2d")

    monkeypatch.setattr(torch._dynamo, "lookup_backend",
                        lambda name: inductor if name == "inductor" else lookup(name))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                          nn.Linear(4 * 36, 3))
    model = copy.deepcopy(plain)
    x = torch.randn(6, 3, 8, 8)
    found = []
    for one, forward in ((plain, plain), (model, runtime.compiled(model))):
        torch.manual_seed(1)
        logits = [forward(x), forward(x[:5])]
        sum(each.square().sum() for each in logits).backward()
        found.append([*logits, torch.get_rng_state(), *one.buffers(), *(p.grad for p in one.parameters())])
    assert model[1].num_batches_tracked == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(called) == 1
    assert capsys.readouterr().out == ("goes on uncompiled: torch.compile fails on this model "
                                       "(LoweringException: no such kernel)\n")


@pytest.mark.parametrize("quota, variable, threads", [(1.0, None, 1), (1.0, "4", 4), (None, None, 4), (8.0, None, 4)])
def test_threads_are_lowered_to_a_quota_that_the_user_did_not_override(monkeypatch, quota, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(runtime, "cpu_quota", lambda: quota)
    monkeypatch.setattr(runtime, "usable_cores", lambda: int(quota or 8))
    torch.set_num_threads(4)
    runtime.limit_threads()
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
