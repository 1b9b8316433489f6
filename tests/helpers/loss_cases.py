"""Logits of many kinds, and the error that a loss may have, for the tests of the reference and of the fused loss."""

import os

import pytest
import torch
from torch import Tensor

from train import kd_loss

EPS = torch.finfo(torch.float32).eps
INF = float("inf")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "confident", "constant", "huge", "close", "masked", "student masked"]

# Set by tests/fast/test_fused_loss_triton.py: the Triton kernels, interpreted, take the place of the C++ ones.
# A row then takes 10 ms, so there are fewer and shorter rows.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def logits(B: int, C: int, kind: str = "normal", dtype: torch.dtype = torch.float32,
           seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
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
    elif kind == "masked":  # both rule out the same class, the teacher one more
        out = (labels + 1) % C
        s[torch.arange(B), out] = t[torch.arange(B), out] = -INF
        if C > 2:
            t[torch.arange(B), (labels + 2) % C] = -INF
    elif kind == "student masked":  # infinite loss: the student rules out what the teacher believes in
        s[torch.arange(B), (labels + 1) % C] = -INF
    else:
        assert kind == "normal"
    return s.to(dtype), t.to(dtype), labels


def loss_and_gradient(f, s, t, labels, *args, upstream=1.0) -> tuple[Tensor, Tensor]:
    """Both in float64 on the CPU."""
    s = s.detach().requires_grad_()
    loss = f(s, t, labels, *args)
    gradient, = torch.autograd.grad(loss, s, torch.full_like(loss, upstream))
    return loss.detach().cpu().double(), gradient.cpu().double()


def assert_no_worse(result, s, t, labels, T, weight, upstream=1.0, slack=4) -> None:
    """The error against float64 is no larger than that of the fp32 reference on upcast inputs, give or take the last
    bits: of fp32 in the loss and in the largest term of a gradient, and of the logits' precision, in which the
    gradient is delivered."""
    dtype = s.dtype
    s, t, labels = s.cpu(), t.cpu(), labels.cpu()
    exact, exact_g = loss_and_gradient(kd_loss, s.double(), t.double(), labels, T, weight, upstream=upstream)
    ref, ref_g = loss_and_gradient(kd_loss, s.float(), t.float(), labels, T, weight, upstream=upstream)
    loss, g = result
    if exact.isfinite():
        assert abs(loss - exact) <= abs(ref - exact) + slack * EPS * (abs(exact) + weight * T * T)
    elif loss.isfinite():  # +∞ in mathematics, but what the student rules out has a probability that fp32 rounds to 0
        assert (torch.softmax(t.double() / T, dim=1)[s == -INF] < torch.finfo(torch.float32).smallest_normal).all()
    else:
        assert torch.equal(loss, exact)
    largest_term = abs(upstream) * ((1 - weight) + weight * T) / len(s)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the step of the denormals
    bound = (ref_g - exact_g).abs().max() + slack * EPS * largest_term + torch.finfo(dtype).eps * exact_g.abs() + tiny
    assert ((g - exact_g).abs() <= bound).all(), ((g - exact_g).abs() / bound).max()
