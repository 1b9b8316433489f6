"""The distillation loss and its gradient in one visit to each row, on CUDA, in Triton.

The algebra is at the top of kd/losses.py.  For one row, with ds = s − max s and dt = t − max t, five sums are all
that ties the classes together:

    z₁ = Σ exp(ds)    z = Σ exp(ds/T)    zₜ = Σ exp(dt/T)    Σ u·(dt − ds), u = exp(dt/T)    s at the label

    CE = log z₁ − ds[label]
    KL = Σ p·(log p − log q) = Σ u·(dt − ds) / (T·zₜ) + log(z/zₜ)        since log p = dt/T − log zₜ, log q likewise
    gradient = (1 − λ)·(exp(ds)/z₁ − y) + λ·T·(exp(ds/T)/z − u/zₜ)

Subtracting the maxima first makes every exponent ≤ 0 (no overflow) and the differences nearly exact.  One ratio in
the logarithm, not a difference of two, because the two are nearly equal whenever the KL is small.

One program computes one row.  `row_kernel` holds the row in registers: each logit is read once and the gradient
written once, 3·B·C elements of traffic, the least there can be.  A longer row does not fit; `block_kernel` goes
through it twice in blocks: first the three sums, by the online softmax (Milakov & Gimelshein, arXiv:1805.02867), then
the gradient and the rest: 5·B·C elements, of which the second reading may come from the L2 cache.

A label out of range cannot raise without waiting for the device; it makes the loss and its row's gradient NaN.
"""
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

# A thread holds 8 classes, of which three exponentials each are alive at once, and a program has at most 1,024
# threads, of 64 registers each. 16 classes a thread spill.
CLASSES_PER_THREAD = 8
MAX_ROW = CLASSES_PER_THREAD * 1024
BLOCK = 4096  # of the kernel for longer rows


@triton.jit
def _load(ptr, j, mask):
    """Logits as fp32; −inf past the end of the row, which is a class of probability 0."""
    return tl.load(ptr + j, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _loss(z1, z, zt, dot, ds_label, sum_ds, C, T, kd_weight, smoothing, HARD: tl.constexpr, SOFT: tl.constexpr):
    """A row's loss. A term of weight 0 is left out, not multiplied by 0: it may be infinite."""
    loss = 0.0
    if HARD:
        log_z1 = tl.log(z1)
        ce = log_z1 - (1 - smoothing) * ds_label
        ce -= tl.where(smoothing > 0, smoothing * sum_ds / C, 0.0)
        loss += (1 - kd_weight) * ce
    if SOFT:
        loss += kd_weight * T * T * (dot / (T * zt) + tl.log(z / zt))
    return loss


@triton.jit
def _gradient(e1, e, u, j, label, z1, z, zt, C, T, kd_weight, smoothing, scale, HARD: tl.constexpr,
              SOFT: tl.constexpr):
    """scale · ∂loss/∂s, from exponentials and sums: differences first, the common factor last."""
    g = tl.zeros_like(e1 if HARD else e)
    if HARD:
        y = tl.where(j == label, 1 - smoothing, 0.0) + smoothing / C
        g += (1 - kd_weight) * (e1 * (1 / z1) - y)
    if SOFT:
        g += kd_weight * T * (e * (1 / z) - u * (1 / zt))
    return g * scale


@triton.jit
def _row_scale(label, kept_ptr, C, ignored, gradient_scale):
    """1/n, as everything of a row is multiplied by; NaN for a label that is neither ignored nor a class."""
    n = tl.maximum(tl.load(kept_ptr), 1)
    scale = gradient_scale / n.to(tl.float32)
    return tl.where(ignored | ((label >= 0) & (label < C)), scale, float("nan"))


@triton.jit
def row_kernel(s_ptr, t_ptr, label_ptr, kept_ptr, grad_ptr, loss_ptr, C, s_stride, t_stride, grad_stride, T,
               kd_weight, smoothing, gradient_scale, ignore_index, HARD: tl.constexpr, SOFT: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One row in registers; BLOCK ≥ C. Sizes come divided by ALIGN, so that the compiler knows what they are
    multiples of and moves 16 bytes at a time."""
    C = C * ALIGN
    inverse_t = 1 / T
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    ignored = label == ignore_index
    j = tl.arange(0, BLOCK)
    inside = j < C
    s = _load(s_ptr + row * (s_stride * ALIGN), j, inside)
    ds = s - tl.max(s, axis=0)
    e1, e, u = ds, ds, ds
    z1, z, zt, dot, ds_label, sum_ds = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if HARD:
        e1 = tl.exp(ds)
        z1 = tl.sum(e1, axis=0)
        ds_label = tl.sum(tl.where(j == label, ds, 0.0), axis=0)
        sum_ds = tl.sum(tl.where(inside, ds, 0.0), axis=0)
    if SOFT:
        t = _load(t_ptr + row * (t_stride * ALIGN), j, inside)
        dt = t - tl.max(t, axis=0)
        e = tl.exp(ds * inverse_t)
        u = tl.exp(dt * inverse_t)
        z = tl.sum(e, axis=0)
        zt = tl.sum(u, axis=0)
        dot = tl.sum(tl.where(u > 0, u * (dt - ds), 0.0), axis=0)  # 0·(−∞) is 0 here

    scale = _row_scale(label, kept_ptr, C, ignored, gradient_scale)
    loss = _loss(z1, z, zt, dot, ds_label, sum_ds, C, T, kd_weight, smoothing, HARD, SOFT)
    loss *= scale / gradient_scale
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    grad = _gradient(e1, e, u, j, label, z1, z, zt, C, T, kd_weight, smoothing, scale, HARD, SOFT)
    tl.store(grad_ptr + row * (grad_stride * ALIGN) + j, tl.where(ignored, 0.0, grad), mask=inside)


@triton.jit
def _online(m, x):
    """The new maximum, and 0 in its place while all is −inf, so that −inf − (−inf) never comes up."""
    new = tl.maximum(m, tl.max(x, axis=0))
    return new, tl.where(new == float("-inf"), 0.0, new)


@triton.jit
def block_kernel(s_ptr, t_ptr, label_ptr, kept_ptr, grad_ptr, loss_ptr, C, s_stride, t_stride, grad_stride, T,
                 kd_weight, smoothing, gradient_scale, ignore_index, HARD: tl.constexpr, SOFT: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One row in blocks, for any C. The gradient may lie over the student's logits: a block is read before it is
    written, and never read again."""
    C = C * ALIGN
    inverse_t = 1 / T
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    ignored = label == ignore_index
    s_ptr += row * (s_stride * ALIGN)
    t_ptr += row * (t_stride * ALIGN)
    grad_ptr += row * (grad_stride * ALIGN)
    offsets = tl.arange(0, BLOCK)

    # Sweep 1: the maxima and the sums together. When a block raises the maximum from m to m', what was summed
    # relative to m is brought to m' by exp(m − m').
    max_s, max_t = float("-inf"), float("-inf")
    z1, z, zt = 0.0, 0.0, 0.0
    for start in range(0, C, BLOCK):
        j = start + offsets
        s = _load(s_ptr, j, j < C)
        new_s, shift = _online(max_s, s)
        if HARD:
            z1 = z1 * tl.exp(max_s - shift) + tl.sum(tl.exp(s - shift), axis=0)
        if SOFT:
            z = z * tl.exp((max_s - shift) * inverse_t) + tl.sum(tl.exp((s - shift) * inverse_t), axis=0)
            t = _load(t_ptr, j, j < C)
            new_t, shift = _online(max_t, t)
            zt = zt * tl.exp((max_t - shift) * inverse_t) + tl.sum(tl.exp((t - shift) * inverse_t), axis=0)
            max_t = new_t
        max_s = new_s

    # Sweep 2: the gradient, and the sums that need the final maxima.
    scale = _row_scale(label, kept_ptr, C, ignored, gradient_scale)
    dot, ds_label, sum_ds = 0.0, 0.0, 0.0
    for start in range(0, C, BLOCK):
        j = start + offsets
        ds = _load(s_ptr, j, j < C) - max_s
        e1, e, u = ds, ds, ds
        if HARD:
            e1 = tl.exp(ds)
            ds_label += tl.sum(tl.where(j == label, ds, 0.0), axis=0)
            sum_ds += tl.sum(tl.where(j < C, ds, 0.0), axis=0)
        if SOFT:
            dt = _load(t_ptr, j, j < C) - max_t
            e = tl.exp(ds * inverse_t)
            u = tl.exp(dt * inverse_t)
            dot += tl.sum(tl.where(u > 0, u * (dt - ds), 0.0), axis=0)
        grad = _gradient(e1, e, u, j, label, z1, z, zt, C, T, kd_weight, smoothing, scale, HARD, SOFT)
        tl.store(grad_ptr + j, tl.where(ignored, 0.0, grad), mask=j < C)
    loss = _loss(z1, z, zt, dot, ds_label, sum_ds, C, T, kd_weight, smoothing, HARD, SOFT)
    loss *= scale / gradient_scale
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))


@triton.jit
def count_kernel(label_ptr, kept_ptr, B, ignore_index, BLOCK: tl.constexpr):
    """How many rows are kept; the row kernels need it before the first gradient is written, and it stays on the
    device."""
    n = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, B, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n += tl.load(label_ptr + i, mask=i < B, other=ignore_index) != ignore_index
    tl.store(kept_ptr, tl.sum(n, axis=0))


@triton.jit
def scale_kernel(grad_ptr, factor_ptr, C, stride, BLOCK: tl.constexpr):
    """grad *= factor. Decided on the device: where the factor is 1 (no gradient scaler, no accumulation) nothing is
    read or written, and the host need not know."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ptr = grad_ptr + tl.program_id(0).to(tl.int64) * stride + j
        g = tl.load(ptr, mask=j < C).to(tl.float32)
        tl.store(ptr, g * factor, mask=j < C)


def layout(C: int) -> tuple[triton.JITFunction, int, int]:
    """(kernel, BLOCK, warps) for rows of C classes."""
    if C > MAX_ROW:
        return block_kernel, BLOCK, BLOCK // CLASSES_PER_THREAD // 32
    block = triton.next_power_of_2(C)
    return row_kernel, block, max(1, block // CLASSES_PER_THREAD // 32)


def loss_and_grad_(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, kd_weight: float,
                   ignore_index: int, label_smoothing: float, gradient_scale: float, grad: Tensor) -> Tensor:
    """Writes gradient_scale · ∂loss/∂student over `grad` (which may be `student`); returns the loss, fp32.

    student, teacher (B, C) fp32, bf16 or fp16, contiguous within a row; labels (B,) int64. kd/losses.py has checked.
    """
    B, C = student.shape
    if teacher is None or kd_weight == 0:
        teacher = student  # never read
    labels = labels.contiguous()
    kernel, block, warps = layout(C)
    losses = torch.empty(B, dtype=torch.float32, device=student.device)
    kept = torch.empty((), dtype=torch.int32, device=student.device)
    strides = student.stride(0), teacher.stride(0), grad.stride(0)
    align = gcd(C, *strides, 8)
    with torch.cuda.device_of(student):
        count_kernel[(1,)](labels, kept, B, ignore_index, BLOCK=1024)
        if B:
            kernel[(B,)](student, teacher, labels, kept, grad, losses, C // align, *(n // align for n in strides),
                         temperature, kd_weight, label_smoothing, gradient_scale, ignore_index, HARD=kd_weight < 1,
                         SOFT=kd_weight > 0, ALIGN=align, BLOCK=block, num_warps=warps)
    return losses.sum()


def scale_(grad: Tensor, factor: Tensor) -> None:
    B, C = grad.shape
    with torch.cuda.device_of(grad):
        if B:
            scale_kernel[(B, triton.cdiv(C, 1024))](grad, factor, C, grad.stride(0), BLOCK=1024)


def register() -> None:
    """Makes these the CUDA kernels of `kd::loss_and_grad_` and `kd::scale_`, which kd/losses.py declares."""
    torch.library.impl("kd::loss_and_grad_", "CUDA", loss_and_grad_)
    torch.library.impl("kd::scale_", "CUDA", scale_)
