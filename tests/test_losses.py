"""The loss against float64, on every path the CPU has; on CUDA too, where there is one."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd import BadInput, losses
from kd.losses import choose_loss, closed_form, fused_kd_loss, kd_loss

EPS = torch.finfo(torch.float32).eps
INF = float("inf")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", CUDA]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by tests/fast/test_loss_triton.py; 10 ms a row: fewer rows
CLASSES = [2, 3, 7, 1000, 1271, 21841]
BATCHES = [1, 41, 256]
TEMPERATURES = [0.05, 0.5, 1.0, 4.0, 5.0, 100.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(B, C, kind="normal", dtype=torch.float32, seed=0):
    """(student, teacher, labels) of one kind; the values are exactly what `dtype` holds."""
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(B, C, generator=g) * 3, torch.randn(B, C, generator=g) * 3
    labels = torch.randint(0, C, (B,), generator=g)
    if kind == "confident":
        s[torch.arange(B), labels] += 30
        t[torch.arange(B), labels] += 30
    elif kind == "constant":
        s, t = torch.full_like(s, 2.5), torch.full_like(t, -1.0)
    elif kind == "huge":
        s, t = s.sign() * 1e4, t.sign() * 1e4
    elif kind == "close":  # a KL far below the rounding of its terms
        t = s + 1e-3 * t
    elif kind == "masked":  # both leave out the same class, the teacher one more
        out = (labels + 1) % C
        s[torch.arange(B), out] = t[torch.arange(B), out] = -INF
        if C > 2:
            t[torch.arange(B), (labels + 2) % C] = -INF
    elif kind == "student masked":  # infinite loss: the teacher believes in what the student excludes
        s[torch.arange(B), (labels + 1) % C] = -INF
    else:
        assert kind == "normal"
    return s.to(dtype), t.to(dtype), labels


KINDS = ["normal", "confident", "constant", "huge", "close", "masked", "student masked"]


def loss_and_gradient(f, s, t, labels, *args, upstream=1.0, **kwargs):
    s = s.detach().requires_grad_()
    loss = f(s, t, labels, *args, **kwargs)
    gradient, = torch.autograd.grad(loss, s, torch.full_like(loss, upstream))
    return loss.detach().cpu().double(), gradient.cpu().double()


def assert_no_worse(result, s, t, labels, T, weight, upstream=1.0, slack=4, **kwargs):
    """The error against float64 is no larger than that of the fp32 reference on upcast inputs, give or take the last
    bits: of fp32 in the loss and in the largest term of a gradient, and of the logits' precision, in which the
    gradient is delivered."""
    dtype = s.dtype
    s, t, labels = s.cpu(), t.cpu(), labels.cpu()
    exact, exact_g = loss_and_gradient(kd_loss, s.double(), t.double(), labels, T, weight, upstream=upstream, **kwargs)
    ref, ref_g = loss_and_gradient(kd_loss, s.float(), t.float(), labels, T, weight, upstream=upstream, **kwargs)
    loss, g = result
    if exact.isfinite():
        assert abs(loss - exact) <= abs(ref - exact) + slack * EPS * (abs(exact) + weight * T * T)
    elif loss.isfinite():  # +∞ in mathematics, but what the student excludes has a probability that fp32 rounds to 0
        assert (torch.softmax(t.double() / T, dim=1)[s == -INF] < torch.finfo(torch.float32).smallest_normal).all()
    else:
        assert torch.equal(loss, exact)
    n = max(1, int((labels != kwargs.get("ignore_index", -100)).sum()))
    largest_term = abs(upstream) * ((1 - weight) + weight * T) / n
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the step of the denormals
    bound = (ref_g - exact_g).abs().max() + slack * EPS * largest_term + torch.finfo(dtype).eps * exact_g.abs() + tiny
    assert ((g - exact_g).abs() <= bound).all(), ((g - exact_g).abs() / bound).max()


# --- the reference itself, against the formula written out -----------------------------------------------------------


def test_reference_is_the_formula():
    s, t, labels = logits(5, 4)
    s, t, T, w = s.double(), t.double(), 3.0, 0.3
    p, q = torch.softmax(t / T, 1), torch.softmax(s / T, 1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        expected = expected - (1 - w) * torch.log_softmax(s[i], 0)[labels[i]] / 5
        expected = expected + w * T * T * sum(p[i, j] * (p[i, j].log() - q[i, j].log()) for j in range(4)) / 5
    assert kd_loss(s, t, labels, T, w).item() == pytest.approx(float(expected), rel=1e-12)


def test_reference_gradient():
    s, t, labels = logits(3, 5)
    labels[1] = -100
    s, t = s.double().requires_grad_(), t.double()
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, labels, 2.0, 0.6, label_smoothing=0.1), s)


def test_reference_takes_class_probabilities():
    s, t, labels = logits(6, 5)
    hard = kd_loss(s, t, labels, 4.0, 0.5)
    assert kd_loss(s, t, F.one_hot(labels, 5).float(), 4.0, 0.5).item() == pytest.approx(hard.item(), rel=1e-6)


def test_reference_weight_0_is_cross_entropy():
    s, _, labels = logits(6, 5)
    assert torch.equal(kd_loss(s, None, labels, 4.0, 0.0), F.cross_entropy(s, labels))
    smooth = F.cross_entropy(s, labels, label_smoothing=0.2)
    assert kd_loss(s, None, labels, 4.0, 0.0, label_smoothing=0.2).item() == pytest.approx(smooth.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_upcasts_before_it_divides(dtype):
    s, t, labels = logits(7, 11, dtype=dtype)
    assert torch.equal(kd_loss(s, t, labels, 3.0, 0.5), kd_loss(s.float(), t.float(), labels, 3.0, 0.5))


# --- the fused loss against float64 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("B", BATCHES)
def test_sizes_and_temperatures(B, C, device):
    if INTERPRETED:
        B = min(B, 2)
    s, t, labels = (x.to(device) for x in logits(B, C))
    # float64 of 256 × 21841 takes seconds: once, and a quarter of the rows at the other temperatures
    some = B // 4 if B * C > 2e6 and device == "cpu" else B
    for T in TEMPERATURES:
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
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_ignored_rows_and_smoothing(smoothing, device):
    s, t, labels = (x.to(device) for x in logits(41, 100))
    labels[::3] = 7
    kwargs = dict(ignore_index=7, label_smoothing=smoothing)
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5, **kwargs)
    assert_no_worse((loss, g), s, t, labels, 4.0, 0.5, **kwargs)
    kept = labels.cpu() != 7
    assert (g[~kept] == 0).all() and (g[kept] != 0).any()
    rest = fused_kd_loss(s[kept], t[kept], labels[kept], 4.0, 0.5, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(rest.item(), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
def test_nothing_kept(f, device):
    s, t, labels = (x.to(device) for x in logits(4, 9))
    for labels in (torch.full_like(labels, -100), labels[:0]):
        loss, g = loss_and_gradient(f, s[:len(labels)], t[:len(labels)], labels, 4.0, 0.5, label_smoothing=0.1)
        assert loss == 0 and (g == 0).all() and g.shape == (len(labels), 9)


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
    s, t, labels = (x.to(device) for x in logits(64, 5000, dtype=torch.float16))
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5, upstream=2.0 ** 16)
    assert_no_worse((loss, g), s, t, labels, 4.0, 0.5, upstream=2.0 ** 16)
    assert (g != 0).double().mean() > 0.99


@settings(deadline=None, derandomize=True, max_examples=10 if INTERPRETED else 100)
@given(B=st.integers(1, 9), C=st.integers(1, 200), pad=st.integers(0, 5), layout=st.sampled_from(["rows", "columns"]),
       T=st.floats(0.3, 20), weight=st.floats(0, 1), smoothing=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_shape_and_stride(B, C, pad, layout, T, weight, smoothing, seed):
    s, t, labels = logits(B, C, seed=seed)
    if layout == "rows":
        s, t = F.pad(s, (0, pad))[:, :C], F.pad(t, (pad, 0))[:, pad:]
    else:
        s, t = s.t().contiguous().t(), t.repeat_interleave(2, 1)[:, ::2]
    result = loss_and_gradient(fused_kd_loss, s, t, labels, T, weight, label_smoothing=smoothing)
    assert_no_worse(result, s, t, labels, T, weight, label_smoothing=smoothing)


def test_exponential_is_within_one_ulp():
    """The CE of two classes at distance x has gradient σ(−x): it shows every bit of the kernel's exp(−x)."""
    x = torch.linspace(0, 70, 200_001)  # further down, over so many rows, is below fp32
    s = torch.stack([torch.zeros_like(x), -x], dim=1)
    _, g = loss_and_gradient(fused_kd_loss, s, None, torch.zeros(len(x), dtype=torch.int64), 1.0, 0.0)
    exact = torch.sigmoid(s[:, 1].double())
    error = (g[:, 1] * len(x) / exact - 1).abs().max()
    assert error < 4 * EPS  # exp, the sum, the weight and the product: half an ulp or one each


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
    torch.testing.assert_close(s.grad.cpu().double(), g, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [33, 9001])
def test_inplace_writes_the_gradient_over_the_logits(C, device):
    s, t, labels = (x.to(device) for x in logits(8, C))
    expected = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5)
    w = s.clone().requires_grad_()
    z = w * 1
    loss = fused_kd_loss(z, t, labels, 4.0, 0.5, inplace=True)
    assert torch.equal(z.detach().cpu().double(), expected[1]) and loss.item() == expected[0]
    loss.backward()
    assert torch.equal(w.grad.cpu().double(), expected[1])


def test_inplace_is_seen_by_whoever_saved_the_logits():
    s, t, labels = logits(8, 33)
    z = s.requires_grad_() * 1
    other = z.exp().sum() + (z * z).sum()
    loss = fused_kd_loss(z, t, labels, 4.0, 0.5, inplace=True) + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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

    losses.prepare(device)
    expected = loss_and_gradient(lambda x, *_: step(x), s, t, labels)
    result = loss_and_gradient(lambda x, *_: torch.compile(step, backend=backend, fullgraph=True)(x), s, t, labels)
    assert sum("loss_and_grad_" in name for name in nodes) == 1
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-5)
    torch._dynamo.reset()
    result = loss_and_gradient(lambda x, *_: torch.compile(step, backend="aot_eager", fullgraph=True)(x), s, t, labels)
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_is_the_same_every_time(device):
    s, t, labels = (x.to(device) for x in logits(64, 1000))
    a, b = (loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = dict(zip(("student_logits", "teacher_logits", "labels"), logits(4, 5)), temperature=4.0, kd_weight=0.5)


@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
@pytest.mark.parametrize("error, name, value, shown", [
    (ValueError, "student_logits", torch.zeros(5), "(5,)"),
    (TypeError, "student_logits", torch.zeros(4, 5, dtype=torch.int64), "int64"),
    (ValueError, "teacher_logits", torch.zeros(4, 6), "(4, 6)"),
    (TypeError, "teacher_logits", torch.zeros(4, 5, dtype=torch.int32), "int32"),
    (ValueError, "teacher_logits", None, "0.5"),
    (ValueError, "labels", torch.zeros(3, dtype=torch.int64), "(3,)"),
    (TypeError, "labels", torch.zeros(4, dtype=torch.int32), "int32"),
    (ValueError, "labels", torch.zeros(4, 6), "(4, 6)"),
    (ValueError, "labels", torch.tensor([0, 1, 5, 2]), "5"),
    (ValueError, "labels", torch.tensor([0, 1, -1, 2]), "-1"),
    (ValueError, "labels", torch.zeros(4, dtype=torch.int64, device="meta"), "meta"),
    (ValueError, "teacher_logits", torch.zeros(4, 5, device="meta"), "meta"),
    (ValueError, "temperature", 0.0, "0.0"),
    (ValueError, "temperature", -1.0, "-1.0"),
    (ValueError, "temperature", float("nan"), "nan"),
    (ValueError, "temperature", INF, "inf"),
    (ValueError, "kd_weight", 1.5, "1.5"),
    (ValueError, "kd_weight", -0.1, "-0.1"),
    (ValueError, "kd_weight", float("nan"), "nan"),
    (ValueError, "label_smoothing", 1.1, "1.1"),
])
def test_bad_input_names_argument_and_value(f, error, name, value, shown):
    with pytest.raises(error) as caught:
        f(**{**GOOD, name: value})
    assert str(caught.value).startswith(name) and shown in str(caught.value) and "\n" not in str(caught.value)


def test_fused_refuses_what_only_the_reference_takes():
    s, t, labels = logits(4, 5)
    with pytest.raises(TypeError, match="labels must be int64 .* got torch.float32"):
        fused_kd_loss(s, t, F.one_hot(labels, 5).float(), 4.0, 0.5)
    with pytest.raises(TypeError, match="student_logits must be .* got torch.float64"):
        fused_kd_loss(s.double(), t, labels, 4.0, 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_label_out_of_range_is_nan_on_cuda():
    s, t, labels = (x.cuda() for x in logits(4, 5))
    labels[2] = 5
    loss, g = loss_and_gradient(fused_kd_loss, s, t, labels, 4.0, 0.5)
    assert loss.isnan() and g[2].isnan().all() and g[[0, 1, 3]].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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


# --- which one runs, and what runs where there is no kernel ----------------------------------------------------------


def test_choose_loss():
    cpu = torch.device("cpu")
    assert choose_loss("reference", cpu, 3) == (kd_loss, "reference")
    assert choose_loss("auto", cpu, 3, soft_labels=True) == (kd_loss, "reference")
    assert choose_loss("auto", cpu, 3) == choose_loss("fused", cpu, 3)
    assert choose_loss("fused", cpu, 3)[0] is fused_kd_loss
    with pytest.raises(BadInput, match="--loss fast"):
        choose_loss("fast", cpu, 3)
    with pytest.raises(BadInput, match="--loss fused"):
        choose_loss("fused", cpu, 3, soft_labels=True)


def test_the_operator_computes_without_a_compiler_too(tmp_path):
    """In a process where neither the C++ loss nor torch.compile finds one."""
    code = """
import torch
from kd.losses import fused_kd_loss, kd_loss, prepare
assert prepare("cpu") == "closed form"
s, t, labels = torch.randn(9, 7), torch.randn(9, 7), torch.arange(9) % 7
labels[3] = -100
found = []
for f in (kd_loss, fused_kd_loss):
    x = s.clone().requires_grad_()
    loss = f(x, t, labels, 4.0, 0.5, label_smoothing=0.1)
    (3 * loss).backward()
    found.append((loss.detach(), x.grad))
assert torch.allclose(found[0][0], found[1][0], rtol=1e-6) and torch.allclose(found[0][1], found[1][1], atol=1e-7)
assert found[0][1].abs().max() > 0.1
"""
    environment = {**os.environ, "CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path),
                   "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_reference_is_the_formula_in_numpy(T, weight):
    generator = np.random.default_rng(5)
    s, t, labels = generator.normal(0, 3, (6, 4)), generator.normal(0, 3, (6, 4)), generator.integers(0, 4, 6)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    log_p, log_q = log_softmax(t / T), log_softmax(s / T)
    ce = -log_softmax(s)[np.arange(6), labels].mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()  # a sum over classes, a mean over samples
    ours = kd_loss(torch.tensor(s), torch.tensor(t), torch.tensor(labels), T, weight)
    assert ours.item() == pytest.approx((1 - weight) * ce + weight * T ** 2 * kl, rel=1e-12)


def test_the_gradients_scale_does_not_change_with_a_high_temperature():
    """T² makes up for the 1/T² of the soft term's gradient (Hinton et al. 2015); without it, 100 gives a 4th of 50."""
    s, t, labels = logits(16, 10)
    norms = [loss_and_gradient(kd_loss, s, t, labels, T, 1.0)[1].norm().item() for T in (50.0, 100.0)]
    assert norms[0] == pytest.approx(norms[1], rel=0.03) and norms[0] > 0.01


def test_the_kernel_is_there():
    """Where a compiler is, the build must not fail silently."""
    import shutil
    if not (shutil.which("g++") or shutil.which("c++")) or not shutil.which("ninja"):
        pytest.skip("no C++ compiler or no ninja")
    assert choose_loss("auto", torch.device("cpu"), 3)[1] == "fused (C++)"


def test_without_a_compiler_one_line_and_the_closed_form(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(losses, "_kernels", {})
    assert choose_loss("fused", torch.device("cpu"), 3)[1] == "fused (closed form)"
    assert choose_loss("auto", torch.device("cpu"), 3)[1] == "reference"
    assert choose_loss("auto", torch.device("cpu"), 1000)[1] == "fused (closed form)"
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no kernel" in err


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form(kind):
    s, t, labels = logits(5, 50, kind)
    labels[2] = -100
    for weight in (0.0, 0.5, 1.0):
        result = closed_form(s, t if weight else None, labels, 4.0, weight, -100, 0.1)
        assert_no_worse([x.double() for x in result], s, t, labels, 4.0, weight, slack=8,
                        label_smoothing=0.1)
