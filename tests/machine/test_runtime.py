"""Device, precision and kernels, as the flags and the machine say."""

import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd import BadInput
from kd.machine import devices, runtime

CUDA = torch.device("cuda")


def test_a_cpu_gets_bf16_where_it_multiplies_it_and_never_fp16(monkeypatch):
    with pytest.raises(BadInput, match="^--amp fp16: cpu has no fast half precision here; use bf16, off or auto$"):
        runtime.start("cpu", "fp16", "auto", "off")
    for fast, amp in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert runtime.start("cpu", "auto", "auto", "off").amp == amp


@pytest.mark.parametrize("generation, amp", [(6, None), (7, torch.float16), (8, torch.bfloat16), (10, torch.bfloat16)])
def test_a_gpu_gets_the_precision_that_its_generation_multiplies_fast(monkeypatch, generation, amp):
    matmul, cudnn = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(devices, "choose", lambda flag: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert runtime.start("auto", "auto", "off", "off").amp == amp
    assert matmul.allow_tf32 == cudnn.allow_tf32 == (amp is not None) and cudnn.benchmark
    machine = runtime.start("auto", "off", "off", "off")    # float32 throughout: not TF32 either
    assert machine.amp is None and machine.line == "cuda (a GPU), fp32"
    assert not matmul.allow_tf32 and not cudnn.allow_tf32


@pytest.mark.parametrize("usable, variable, lowered", [(1, "", [1]), (1, "4", []), (8, "", [])])
def test_threads_are_lowered_to_a_quota_that_the_user_did_not_override(monkeypatch, usable, variable, lowered):
    calls: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(runtime, "usable_cores", lambda: usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    runtime.start("cpu", "off", "off", "off")
    assert calls == lowered


def test_the_switch_for_kernels_reaches_the_allocator_which_can_be_restored(monkeypatch):
    settings: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=settings.__setitem__))
    assert not runtime.start("cpu", "off", "off", "off").kernels and settings == {}
    assert runtime.start("cpu", "off", "off", "auto").kernels and settings == {-4: 0, -1: -1}
    runtime.tune_allocator(keep=False)
    assert settings == {-4: 65536, -1: 64 << 20, -3: 32 << 20}      # M_MMAP_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


# ---- torch.compile ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, device, steps, compiled", [
    ("on", "cpu", 1, True), ("off", "cuda", 10**9, False), ("auto", "cpu", 10**9, False),
    ("auto", "cuda", runtime.PAYS_AFTER, True), ("auto", "cuda", runtime.PAYS_AFTER - 1, False)])
def test_whether_it_is_compiled_follows_the_flag_the_device_and_the_steps(monkeypatch, flag, device, steps, compiled):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    machine = runtime.start("cpu", "off", flag, "off")
    assert machine.line.endswith(", compiled") == (flag == "on")
    assert runtime.compile_pays(machine._replace(device=torch.device(device)), steps) == compiled


def test_without_a_compiler_on_is_refused_before_anything_is_loaded(monkeypatch):
    def compile(function):
        raise RuntimeError("CppCompileError: C++ compile error\n\nx.cpp:1:10: fatal error: Python.h: No such file")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(BadInput, match=r"^--compile on: .*Python.h: No such file\); .*use --compile off$"):
        runtime.start("cpu", "off", "on", "off")


@pytest.fixture
def graphs(monkeypatch) -> list:
    """Shape and options of what was given to the compiler; it runs as it is. An error in this list is raised."""
    given: list = []

    def inductor(graph, inputs, config_patches):
        if given and isinstance(given[0], Exception):
            raise given[0]
        given.append((tuple(inputs[0].shape), config_patches))
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor)
    torch.compiler.reset()      # the graphs of other tests count, and only so many are made
    return given


@pytest.mark.parametrize("rows, ranks, replayed", [(64, 1, True), (65, 1, False), (64, 2, False)])
def test_each_batch_size_has_a_graph_of_its_own_and_small_ones_are_replayed(monkeypatch, graphs, rows, ranks, replayed):
    monkeypatch.setattr(runtime, "ranks", lambda: ranks)
    forward = runtime.compiled(nn.Flatten(), rows)
    for count in (4, 4, 6, 4, 6):
        assert forward(torch.zeros(count, 2, 3)).shape == (count, 6)
    # fixed numbers, and the first graph serves again
    assert graphs == [(shape, {"triton.cudagraphs": replayed}) for shape in ((4, 2, 3), (6, 2, 3))]


def test_a_model_that_cannot_be_compiled_computes_the_same_and_a_line_says_why(graphs, capsys):
    """Logits, gradients, BatchNorm's statistics and the random state, to the bit; the last batch is short."""
    graphs.append(RuntimeError("LoweringException: no such kernel\n  while executing %conv2d"))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model, x, found = copy.deepcopy(plain), torch.randn(6, 3, 8, 8), []
    for one, forward in ((plain, plain), (model, runtime.compiled(model, 6))):
        torch.manual_seed(1)
        logits = [forward(x), forward(x[:5])]
        sum(each.square().sum() for each in logits).backward()
        found.append([*logits, torch.get_rng_state(), *one.buffers(), *(p.grad for p in one.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and model[1].num_batches_tracked == 2
    assert capsys.readouterr().out == ("goes on uncompiled: torch.compile fails on this model "
                                       "(LoweringException: no such kernel)\n")
