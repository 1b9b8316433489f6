"""The fused loss against float64, on the kernel the CPU has; on CUDA too, where there is one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd import NO_LABEL
from kd.fast import fused_loss
from kd.fast.fused_loss import fused_kd_loss
from tests.helpers.loss_cases import (DEVICES, DTYPES, EPS, INTERPRETED, KINDS, assert_no_worse, logits,
                                      loss_and_gradient)
from train import kd_loss

CLASSES = [2, 3, 7, 1000, 1271, 21841]
BATCHES = [1, 41, 256]
TEMPERATURES = [0.05, 0.5, 1.0, 4.0, 5.0, 100.0]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# --- the number and the gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("B", BATCHES)
def test_sizes_and_temperatures(B, C, device):
    temperatures = TEMPERATURES
    if INTERPRETED:
        B = min(B, 2)
        if C > 2000:
            B, temperatures = 1, [0.05, 5.0]
    s, t, labels = (x.to(device) for x in logits(B, C))
    # float64 of 256 × 21841 takes seconds: once, and a quarter of the rows at the other temperatures
    some = B // 4 if B * C > 2e6 and device == "cpu" else B
    for T in temperatures:
        rows = slice(B if T == 5 else some)
        result = loss_and_gradient(fused_kd_loss, s[rows], t[rows], labels[rows], T, 0.5, upstream=0.7)
        assert_no_worse(result, s[rows], t[rows], labels[rows], T, 0.5, upstream=0.7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_rows(kind, dtype, device):
    if INTERPRETED and dtype != torch.float32 and kind != "normal":
        pytest.skip("interpreted: the upcast is tested on one kind")
    for C in (7, 1271) if INTERPRETED else (2, 7, 1000, 9001):
        s, t, labels = (x.to(device) for x in logits(1 if INTERPRETED else 5, C, kind, dtype))
        for T in (0.05, 5.0) if INTERPRETED else (0.05, 1.0, 5.0):
            for weight in (0.0, 0.5, 1.0):
                result = loss_and_gradient(fused_kd_loss, s, t, labels, T, weight)
                assert_no_worse(result, s, t, labels, T, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_rows_without_a_label(weight, device):
    s, t, labels = (x.to(device) for x in logits(5 if INTERPRETED else 41, 100))
    labels[::3] = NO_LABEL
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, weight)
    assert_no_worse((loss, g), s, t, labels, 4.0, weight)
    unlabelled = labels.cpu() == NO_LABEL
    assert (g[~unlabelled] != 0).any() and (g[unlabelled] != 0).any() == (weight > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("student_dtype", DTYPES)
def test_mixed_precision(student_dtype, teacher_dtype, device):
    s, t, labels = logits(9, 130)
    s, t, labels = s.to(device, student_dtype), t.to(device, teacher_dtype), labels.to(device)
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 5.0, 0.5)
    assert_no_worse((loss, g), s, t, labels, 5.0, 0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_gradient_survives_under_a_gradient_scaler(device):
    """Gradients near 1e-8 are below what fp16 holds; scaled by 2¹⁶ they are not, if they were not lost before."""
    s, t, labels = (x.to(device) for x in logits(4 if INTERPRETED else 64, 5000, dtype=torch.float16))
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5, upstream=2.0 ** 16)
    assert_no_worse((loss, g), s, t, labels, 4.0, 0.5, upstream=2.0 ** 16)
    assert (g != 0).double().mean() > 0.99


@settings(deadline=None, derandomize=True, max_examples=10 if INTERPRETED else 100)
@given(B=st.integers(1, 9), C=st.integers(1, 200), pad=st.integers(0, 5), layout=st.sampled_from(["rows", "columns"]),
       T=st.floats(0.3, 20), weight=st.floats(0, 1), unlabelled=st.sets(st.integers(0, 8)), seed=st.integers(0, 99))
def test_any_shape_stride_and_labels(B, C, pad, layout, T, weight, unlabelled, seed):
    s, t, labels = logits(B, C, seed=seed)
    labels[[row for row in unlabelled if row < B]] = NO_LABEL
    if layout == "rows":
        s, t = F.pad(s, (0, pad))[:, :C], F.pad(t, (pad, 0))[:, pad:]
    else:
        s, t = s.t().contiguous().t(), t.repeat_interleave(2, 1)[:, ::2]
    result = loss_and_gradient(fused_kd_loss, s, t, labels, T, weight)
    assert_no_worse(result, s, t, labels, T, weight)


def test_exponential_is_within_one_ulp():
    """The CE of two classes at distance x has gradient σ(−x): it shows every bit of the kernel's exp(−x)."""
    x = torch.linspace(0, 70, 200_001)  # further down, over so many rows, is below fp32
    s = torch.stack([torch.zeros_like(x), -x], dim=1)
    _, g = loss_and_gradient(fused_kd_loss, s, None, torch.zeros(len(x), dtype=torch.int64), 1.0, 0.0)
    exact = torch.sigmoid(s[:, 1].double())
    error = (g[:, 1] * len(x) / exact - 1).abs().max()
    assert error < 4 * EPS  # exp, the sum, the weight and the product: half an ulp or one each


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_the_same_every_time(device):
    s, t, labels = (x.to(device) for x in logits(64, 1000))
    a, b = (loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_when_the_graph_is_kept(dtype, device):
    s, t, labels = (x.to(device) for x in logits(8, 33, dtype=dtype))
    s.requires_grad_()
    loss = fused_kd_loss(s, t, labels, 4.0, 0.5)
    first, = torch.autograd.grad(loss, s, torch.full_like(loss, 3.0), retain_graph=True)
    again, = torch.autograd.grad(loss, s, torch.full_like(loss, 3.0), retain_graph=True)
    last, = torch.autograd.grad(loss * 3, s)
    assert torch.equal(first, again) and torch.equal(first, last)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_accumulates_into_the_leaf(device):
    s, t, labels = (x.to(device) for x in logits(8, 33))
    _, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5)
    s.requires_grad_()
    for _ in range(2):
        (fused_kd_loss(s, t, labels, 4.0, 0.5) / 2).backward()
    assert s.grad is not None
    torch.testing.assert_close(s.grad.cpu().double(), g, rtol=1e-6, atol=0)


@pytest.mark.parametrize("C", [33, 9001])
def test_the_logits_are_left_as_they_were(C):
    s, t, labels = logits(8, C)
    before = s.clone(), t.clone(), labels.clone()
    loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5, upstream=3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (s, t, labels), strict=True))


def test_no_second_derivative():
    s, t, labels = logits(8, 33)
    s.requires_grad_()
    g, = torch.autograd.grad(fused_kd_loss(s, t, labels, 4.0, 0.5), s, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):  # an error, not a wrong number
        torch.autograd.grad(g.sum(), s)


@pytest.mark.parametrize("device", DEVICES)
def test_one_node_under_torch_compile_and_autocast(device):
    s, t, labels = (x.to(device) for x in logits(8, 33))
    weight = torch.eye(33, device=device)
    nodes: list = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for g in graph.modules() if hasattr(g, "graph") for node in g.graph.nodes)
        return graph

    def step(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return fused_kd_loss(x @ weight, t, labels, 4.0, 0.5)

    fused_loss.load_kernel(device)
    expected = loss_and_gradient(lambda x, *_: step(x), s, t, labels)
    result = loss_and_gradient(lambda x, *_: torch.compile(step, backend=backend, fullgraph=True)(x), s, t, labels)
    assert sum("loss_and_grad" in name for name in nodes) == 1
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-5)
    torch._dynamo.reset()
    result = loss_and_gradient(lambda x, *_: torch.compile(step, backend="aot_eager", fullgraph=True)(x), s, t, labels)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-5)


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_fused_refuses_what_only_the_reference_takes():
    s, t, labels = logits(4, 5)
    with pytest.raises(TypeError, match="labels must be .*int64.* got torch.float32"):
        fused_kd_loss(s, t, labels.float(), 4.0, 0.5)
    with pytest.raises(ValueError, match=r"labels must be \(4,\) on cpu, got \(4, 5\)"):
        fused_kd_loss(s, t, F.one_hot(labels, 5), 4.0, 0.5)
    with pytest.raises(TypeError, match="student_logits must be .* got torch.float64"):
        fused_kd_loss(s.double(), t, labels, 4.0, 0.5)


@needs_cuda
def test_label_out_of_range_is_nan_on_cuda():
    s, t, labels = (x.cuda() for x in logits(4, 5))
    labels[2] = 5
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5)
    assert loss.isnan() and g[2].isnan().all() and g[[0, 1, 3]].isfinite().all()


@needs_cuda
def test_no_synchronisation_on_cuda():
    s, t, labels = (x.cuda() for x in logits(64, 1000))
    loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5)
    s.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for f in (kd_loss, fused_kd_loss):
            f(s, t, labels, 4.0, 0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- where there is no kernel ----------------------------------------------------------------------------------------


def test_without_a_compiler_there_is_a_reason_in_one_line_and_nothing_is_printed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    kernel, reason = fused_loss.load_kernel.__wrapped__("cpu")
    assert kernel == "" and "/nowhere/c++" in reason and "\n" not in reason
    assert capsys.readouterr() == ("", "")


def test_a_gpu_on_which_triton_cannot_launch_has_no_kernel(monkeypatch):
    triton = pytest.importorskip("kd.fast.fused_loss_triton", exc_type=ImportError)
    compiler, registered, zeros = False, [], torch.zeros
    message = "Failed to find C compiler. Please specify via CC environment variable."

    def launch(student, *arguments):
        if not compiler:
            raise RuntimeError(message)

    monkeypatch.setattr(torch, "zeros", lambda *size, device, **kind: zeros(*size, **kind))
    monkeypatch.setattr(triton, "loss_and_grad", launch)
    monkeypatch.setattr(triton, "register", lambda: registered.append(True))
    assert fused_loss.load_kernel.__wrapped__("cuda") == ("", message) and registered == []
    compiler = True
    assert fused_loss.load_kernel.__wrapped__("cuda") == ("Triton", "") and registered == [True]
