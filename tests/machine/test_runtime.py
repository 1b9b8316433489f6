"""Device, precision and kernels, as the flags and the machine say."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd import BadInput
from kd.machine import devices, runtime
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
        assert runtime.start("cpu", "auto", "auto").amp == amp
    assert runtime.start("cpu", "bf16", "off").amp == torch.bfloat16


@pytest.mark.parametrize("generation, amp", [(6, None), (7, torch.float16), (8, torch.bfloat16), (10, torch.bfloat16)])
def test_a_gpu_gets_the_precision_that_its_generation_multiplies_fast(monkeypatch, generation, amp):
    gpu = torch.device("cuda")
    monkeypatch.setattr(devices, "choose", lambda flag: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    switches: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in switches], torch.backends.cudnn.benchmark
    try:
        assert runtime.start("auto", "auto", "off").amp == amp
        assert [part.allow_tf32 for part in switches] == [amp is not None] * 2
        # float32 throughout: not TF32 either
        machine = runtime.start("auto", "off", "off")
        assert machine.amp is None and machine.line == "cuda (a GPU), fp32"
        assert [part.allow_tf32 for part in switches] == [False] * 2
    finally:
        for part, value in zip(switches, before[0]):
            part.allow_tf32 = value
        torch.backends.cudnn.benchmark = before[1]


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


def test_whether_it_is_compiled_follows_the_flag_the_device_and_the_steps(compilations, capsys):
    machine = runtime.start("cpu", "off", "on")
    assert machine.line.endswith("fp32, compiled") and len(compilations) == 1      # tried, before anything is loaded
    cuda = machine._replace(device=torch.device("cuda"))
    assert runtime.compile_pays(machine, 1) and runtime.compile_pays(cuda, 1)
    for flag, many in (("auto", True), ("off", False)):
        assert not runtime.compile_pays(machine._replace(compile=flag), 10**9)
        assert runtime.compile_pays(cuda._replace(compile=flag), runtime.PAYS_AFTER) == many
        assert not runtime.compile_pays(cuda._replace(compile=flag), runtime.PAYS_AFTER - 1)
    assert runtime.start("cpu", "off", "auto").line.endswith("fp32") and len(compilations) == 1
    assert capsys.readouterr().out == ""


def test_without_a_compiler_on_is_refused(compilations, monkeypatch):
    def compile(function):
        raise NO_COMPILER

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(BadInput, match=r"^--compile on: .*Python.h: No such file.*\); .*--compile off$"):
        runtime.start("cpu", "off", "on")


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

    def inductor(graph, inputs, config_patches=None):
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
    for one, forward in ((plain, plain), (model, runtime.compiled(model, 6))):
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


@pytest.mark.parametrize("rows, parts, ranks, replayed", [(64, 1, 1, True), (65, 1, 1, False), (64, 2, 1, False),
                                                          (64, 1, 2, False)])
def test_each_batch_size_has_a_graph_of_its_own_and_small_ones_are_replayed(monkeypatch, rows, parts, ranks, replayed):
    options: list = []
    shapes: list = []

    def inductor(graph, inputs, config_patches):
        options.append(config_patches)
        shapes.append(tuple(inputs[0].shape))
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    torch.compiler.reset()      # the graphs of other tests count, and only so many are made
    forward = runtime.compiled(nn.Flatten(), rows, parts)
    for count in (4, 4, 6, 4, 6):
        assert forward(torch.zeros(count, 2, 3)).shape == (count, 6)
    assert shapes == [(4, 2, 3), (6, 2, 3)]         # fixed numbers, and the first graph serves again
    assert options == [{"triton.cudagraphs": True} if replayed else None] * 2
