"""The distillation loss and its gradient on CUDA, in one visit to each row, in Triton.

The algebra is at the top of kd/losses.py. For one row, with ds = s − max s and dt = t − max t, only
five numbers tie the classes together:

    z1 = Σ exp(ds)    z = Σ exp(ds/T)    zt = Σ exp(dt/T)    dot = Σ u·(dt − ds), u = exp(dt/T)
    ds at the label

    CE = log z1 − ds[label]
    KL = Σ p·(log p − log q) = dot / (T·zt) + log(z/zt)
         since log p = dt/T − log zt, and log q = ds/T − log z
    gradient = (1 − λ)·(exp(ds)/z1 − y) + λ·T·(exp(ds/T)/z − u/zt)

Subtracting the maxima first makes every exponent ≤ 0, so nothing overflows, and makes the differences
nearly exact. The KL has one logarithm of a ratio, not a difference of two logarithms: they are nearly
equal whenever the KL is small.

One program computes one row. `row_kernel` holds the row in registers: each logit is read once and the
gradient written once. That is 3·B·C elements of memory traffic, the least there can be. A longer row
does not fit, so `block_kernel` goes through it twice in blocks. The first sweep takes the three sums,
by the online softmax (Milakov & Gimelshein, arXiv:1805.02867); the second takes the gradient and the
rest. That is 5·B·C elements, of which the second reading may come from the L2 cache.

A label out of range cannot raise an error without waiting for the device. It makes the loss and the
gradient of its row NaN.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd import NO_LABEL as UNLABELLED

NO_LABEL = tl.constexpr(UNLABELLED)  # a kernel can read a global only if it is a constexpr

# A thread holds 8 classes, and three exponentials of each are alive at the same time. A program has
# at most 1,024 threads, of 64 registers each. With 16 classes a thread, registers spill to memory.
CLASSES_PER_THREAD = 8
MAX_ROW = CLASSES_PER_THREAD * 1024
BLOCK = 4096  # of block_kernel, for longer rows


@triton.jit
def _load(ptr, j, mask):
    """Logits in fp32; −inf past the end of the row, which is a class of probability 0."""
    return tl.load(ptr + j, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _ce_weight(label, C, kd_weight):
    """The weight of a row's CE: 1 − λ, 0 for a row without a label, NaN for a label out of range."""
    no_class = tl.where(label == NO_LABEL, 0.0, float("nan"))
    return tl.where((label >= 0) & (label < C), 1 - kd_weight, no_class)


@triton.jit
def _loss(z1, z, zt, dot, ds_label, ce_weight, T, kd_weight, CE: tl.constexpr, KL: tl.constexpr):
    """A row's loss. A term of weight λ = 0 or 1 − λ = 0 is left out, because 0·∞ is not 0."""
    loss = 0.0
    if CE:
        loss += ce_weight * (tl.log(z1) - ds_label)
    if KL:
        loss += kd_weight * T * T * (dot / (T * zt) + tl.log(z / zt))
    return loss


@triton.jit
def _gradient(e1, e, u, j, label, z1, z, zt, ce_weight, T, kd_weight, scale, CE: tl.constexpr,
              KL: tl.constexpr):
    """scale · ∂loss/∂s, from exponentials and sums: differences first, the common factor last."""
    g = tl.zeros_like(e1 if CE else e)
    if CE:
        y = tl.where(j == label, 1.0, 0.0)
        g += ce_weight * (e1 * (1 / z1) - y)
    if KL:
        g += kd_weight * T * (e * (1 / z) - u * (1 / zt))
    return g * scale


@triton.jit
def row_kernel(s_ptr, t_ptr, label_ptr, grad_ptr, loss_ptr, C, s_stride, t_stride, grad_stride, T,
               kd_weight, row_weight, gradient_scale, CE: tl.constexpr, KL: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One row in registers; BLOCK ≥ C. row_weight is the 1/B of the mean.

    Sizes and strides come divided by ALIGN. The compiler then knows what they are multiples of, and
    moves 16 bytes at a time.
    """
    C = C * ALIGN
    inverse_t = 1 / T
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < C
    label, ce_weight = NO_LABEL, 0.0
    if CE:  # at λ = 1 no label is read
        label = tl.load(label_ptr + row)
        ce_weight = _ce_weight(label, C, kd_weight)

    s = _load(s_ptr + row * (s_stride * ALIGN), j, inside)
    ds = s - tl.max(s, axis=0)
    e1, e, u = ds, ds, ds
    z1, z, zt, dot, ds_label = 0.0, 0.0, 0.0, 0.0, 0.0
    if CE:
        e1 = tl.exp(ds)
        z1 = tl.sum(e1, axis=0)
        ds_label = tl.sum(tl.where(j == label, ds, 0.0), axis=0)
    if KL:
        t = _load(t_ptr + row * (t_stride * ALIGN), j, inside)
        dt = t - tl.max(t, axis=0)
        e = tl.exp(ds * inverse_t)
        u = tl.exp(dt * inverse_t)
        z = tl.sum(e, axis=0)
        zt = tl.sum(u, axis=0)
        dot = tl.sum(tl.where(u > 0, u * (dt - ds), 0.0), axis=0)  # 0·(−∞) counts as 0

    loss = _loss(z1, z, zt, dot, ds_label, ce_weight, T, kd_weight, CE, KL)
    tl.store(loss_ptr + row, loss * row_weight)
    grad = _gradient(e1, e, u, j, label, z1, z, zt, ce_weight, T, kd_weight,
                     row_weight * gradient_scale, CE, KL)
    tl.store(grad_ptr + row * (grad_stride * ALIGN) + j, grad, mask=inside)


@triton.jit
def _online(m, x):
    """The new maximum, and what to subtract from the logits.

    That is the maximum, or 0 as long as all logits are −inf, because −inf − (−inf) is NaN.
    """
    new = tl.maximum(m, tl.max(x, axis=0))
    return new, tl.where(new == float("-inf"), 0.0, new)


@triton.jit
def block_kernel(s_ptr, t_ptr, label_ptr, grad_ptr, loss_ptr, C, s_stride, t_stride, grad_stride, T,
                 kd_weight, row_weight, gradient_scale, CE: tl.constexpr, KL: tl.constexpr,
                 ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """One row in blocks, for any C. The arguments are those of row_kernel."""
    C = C * ALIGN
    inverse_t = 1 / T
    row = tl.program_id(0).to(tl.int64)
    label, ce_weight = NO_LABEL, 0.0
    if CE:
        label = tl.load(label_ptr + row)
        ce_weight = _ce_weight(label, C, kd_weight)
    s_ptr += row * (s_stride * ALIGN)
    t_ptr += row * (t_stride * ALIGN)
    grad_ptr += row * (grad_stride * ALIGN)
    offsets = tl.arange(0, BLOCK)

    # Sweep 1: the maxima and the sums together. When a block raises the maximum from m to m', a sum
    # relative to m becomes one relative to m' by the factor exp(m − m').
    max_s, max_t = float("-inf"), float("-inf")
    z1, z, zt = 0.0, 0.0, 0.0
    for start in range(0, C, BLOCK):
        j = start + offsets
        s = _load(s_ptr, j, j < C)
        new_s, shift = _online(max_s, s)
        if CE:
            z1 *= tl.exp(max_s - shift)
            z1 += tl.sum(tl.exp(s - shift), axis=0)
        if KL:
            z *= tl.exp((max_s - shift) * inverse_t)
            z += tl.sum(tl.exp((s - shift) * inverse_t), axis=0)
            t = _load(t_ptr, j, j < C)
            new_t, shift = _online(max_t, t)
            zt *= tl.exp((max_t - shift) * inverse_t)
            zt += tl.sum(tl.exp((t - shift) * inverse_t), axis=0)
            max_t = new_t
        max_s = new_s

    # Sweep 2: the gradient, and the sums that need the final maxima.
    dot, ds_label = 0.0, 0.0
    for start in range(0, C, BLOCK):
        j = start + offsets
        ds = _load(s_ptr, j, j < C) - max_s
        e1, e, u = ds, ds, ds
        if CE:
            e1 = tl.exp(ds)
            ds_label += tl.sum(tl.where(j == label, ds, 0.0), axis=0)
        if KL:
            dt = _load(t_ptr, j, j < C) - max_t
            e = tl.exp(ds * inverse_t)
            u = tl.exp(dt * inverse_t)
            dot += tl.sum(tl.where(u > 0, u * (dt - ds), 0.0), axis=0)
        grad = _gradient(e1, e, u, j, label, z1, z, zt, ce_weight, T, kd_weight,
                         row_weight * gradient_scale, CE, KL)
        tl.store(grad_ptr + j, grad, mask=j < C)
    loss = _loss(z1, z, zt, dot, ds_label, ce_weight, T, kd_weight, CE, KL)
    tl.store(loss_ptr + row, loss * row_weight)


@triton.jit
def scale_kernel(grad_ptr, factor_ptr, C, stride, BLOCK: tl.constexpr):
    """grad *= factor, decided on the device, so that the host need not wait for the factor.

    Where the factor is 1, as it is without a gradient scaler, nothing is read or written.
    """
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


def loss_and_grad(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float,
                  kd_weight: float, gradient_scale: float) -> tuple[Tensor, Tensor]:
    """The loss in fp32, and gradient_scale · ∂loss/∂student in the student's dtype.

    student, teacher  (B, C) fp32, bf16 or fp16, contiguous within a row
    labels            (B,) int64

    kd/fast/fused_loss.py has checked all of it.
    """
    B, C = student.shape
    if teacher is None or kd_weight == 0:
        teacher = student  # never read
    labels = labels.contiguous()
    kernel, block, warps = layout(C)
    if torch.version.hip:
        warps = max(1, warps // 2)      # a warp of AMD has up to 64 lanes, not 32, and a program at most 1024
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    row_losses = torch.empty(B, dtype=torch.float32, device=student.device)
    strides = student.stride(0), teacher.stride(0), grad.stride(0)
    align = gcd(C, *strides, 8)
    if B:
        with torch.cuda.device_of(student):
            kernel[(B,)](student, teacher, labels, grad, row_losses,
                         C // align, *(stride // align for stride in strides),
                         temperature, kd_weight, 1 / B, gradient_scale,
                         CE=kd_weight < 1, KL=kd_weight > 0, ALIGN=align, BLOCK=block, num_warps=warps)
    return row_losses.sum(), grad


def scale_(grad: Tensor, factor: Tensor) -> None:
    B, C = grad.shape
    if B:
        with torch.cuda.device_of(grad):
            scale_kernel[(B, triton.cdiv(C, 1024))](grad, factor, C, grad.stride(0), BLOCK=1024)


def register(device: str = "CUDA") -> None:
    """Make these the kernels of `kd::loss_and_grad` and `kd::scale_` on the device, a dispatch key."""
    torch.library.impl("kd::loss_and_grad", device, loss_and_grad)
    torch.library.impl("kd::scale_", device, scale_)
