"""The distillation loss: a reference in plain ops, and the fused one that computes the same number.

    loss = (1 − λ)·CE(student, labels) + λ·T²·KL(softmax(teacher/T) ‖ softmax(student/T))

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2: the
gradients of the soft term shrink as 1/T², so T² keeps the two terms in proportion when T changes.

The algebra that the fused loss rests on.  Let s, t be one row of student and teacher logits, y the labels as
a distribution (one-hot, or smoothed), and

    q₁ = softmax(s)     q = softmax(s/T)     p = softmax(t/T)

    CE = −Σ y·log q₁          ∂CE/∂s    = q₁ − y
    KL = Σ p·(log p − log q)  ∂T²KL/∂s = T·(q − p)          (T², times 1/T of the chain rule)

    ∂loss/∂s = (1 − λ)·(q₁ − y) + λ·T·(q − p)

So the gradient is made of the very exponentials that the loss needs: one pass over the row gives both, and
backward has nothing left to do but multiply by the upstream gradient.  `kd/fast/loss_triton.py` (CUDA) and
`kd/fast/loss_cpu.cpp` (CPU) do that; `closed_form` below is the same in plain ops.
"""
import sys
from collections.abc import Callable
from math import floor, isfinite, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import BadInput


def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float,
            kd_weight: float, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """(1 − λ)·CE + λ·T²·KL(teacher‖student), the mean over the rows that are kept; a scalar.

    student_logits  (B, C), floating; the gradient flows here only
    teacher_logits  (B, C), floating, any precision; None (or whatever) where kd_weight is 0
    labels          (B,) int64 in [0, C), or (B, C) class probabilities, as `F.cross_entropy` takes them
    temperature     T > 0, softens both distributions of the KL; the CE is taken at 1
    kd_weight       λ in [0, 1]
    ignore_index    a row with this label is out of *both* terms, and out of the mean: a batch of ignored
                    rows only has loss 0 and gradient 0
    label_smoothing in [0, 1], of the CE, as in `F.cross_entropy`

    Computed in fp32 whatever the logits' precision (float64 stays float64): upcast, then divide by T.
    A logit may be −inf (a masked class): 0·log 0 counts as 0.  A class that the teacher believes in and the
    student excludes gives +inf, as it must.

    Raises ValueError or TypeError, naming the argument and its value.  A label out of range is a ValueError
    on the CPU; on CUDA, where looking would stop the queue, it is the device-side assertion of PyTorch's own
    nll_loss here, and a loss of NaN in the fused kernel.
    """
    _check(student_logits, teacher_logits, labels, temperature, kd_weight, label_smoothing)
    s = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    if labels.is_floating_point():
        kept = torch.ones(len(s), dtype=torch.bool, device=s.device)
    else:
        _check_range(labels, s.shape[1], ignore_index)
        kept = labels != ignore_index
    loss = s.new_zeros(())
    if kd_weight < 1:
        ce = F.cross_entropy(s, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
                             reduction="sum")
        loss = loss + (1 - kd_weight) * ce
    if kd_weight > 0:
        assert teacher_logits is not None
        t = teacher_logits.detach().to(s.dtype)
        log_p = F.log_softmax(t / temperature, dim=1)
        log_q = F.log_softmax(s / temperature, dim=1)
        p = log_p.exp()
        kl = (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)
        loss = loss + kd_weight * temperature ** 2 * kl.masked_fill(~kept, 0).sum()
    return loss / kept.sum().clamp(min=1)


def _check(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float,
           kd_weight: float, label_smoothing: float) -> None:
    """Everything that can be checked without reading a tensor's values."""
    shape = student_logits.shape
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"student_logits must be (B, C) with C ≥ 1, got {tuple(shape)}")
    if not student_logits.is_floating_point():
        raise TypeError(f"student_logits must be floating point, got {student_logits.dtype}")
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must be in [0, 1], got {kd_weight}")
    if not (temperature > 0 and isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if teacher_logits is None:
        if kd_weight > 0:
            raise ValueError(f"teacher_logits is None, which needs kd_weight 0, got {kd_weight}")
    else:
        if teacher_logits.shape != shape:
            raise ValueError(f"teacher_logits must be {tuple(shape)} like student_logits, "
                             f"got {tuple(teacher_logits.shape)}")
        if not teacher_logits.is_floating_point():
            raise TypeError(f"teacher_logits must be floating point, got {teacher_logits.dtype}")
        if teacher_logits.device != student_logits.device:
            raise ValueError(f"teacher_logits must be on {student_logits.device} like student_logits, "
                             f"got {teacher_logits.device}")
    if labels.device != student_logits.device:
        raise ValueError(f"labels must be on {student_logits.device} like student_logits, got {labels.device}")
    if labels.is_floating_point():
        if labels.shape != shape:
            raise ValueError(f"labels, as class probabilities, must be {tuple(shape)} like student_logits, "
                             f"got {tuple(labels.shape)}")
    elif labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 or class probabilities, got {labels.dtype}")
    elif labels.shape != shape[:1]:
        raise ValueError(f"labels must be ({shape[0]},), one a row of student_logits, got {tuple(labels.shape)}")


def _check_range(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """On the CPU only: on a device, reading the labels would wait for everything queued before them."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if len(bad):
        raise ValueError(f"labels must be in [0, {num_classes}) or {ignore_index}, got {bad[0].item()}")


def fused_kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float,
                  kd_weight: float, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  inplace: bool = False) -> Tensor:
    """`kd_loss`, the same arguments, number and errors; loss and gradient come out of one visit to each row.

    student_logits  (B, C) fp32, bf16 or fp16; rows may be strided. Arithmetic is fp32, the gradient has this dtype
    teacher_logits  (B, C) fp32, bf16 or fp16, not necessarily the student's
    labels          (B,) int64 only: class probabilities are a TypeError, `kd_loss` takes them
    inplace         write the gradient over student_logits: no memory at all beyond the logits, but their
                    values are gone after the call. Where rows overlap or are not contiguous, it is ignored

    Memory: one tensor like the student's logits, for the gradient; traffic: read student, read teacher, write
    gradient, the least there can be.  Differentiable once.
    """
    _check(student_logits, teacher_logits, labels, temperature, kd_weight, label_smoothing)
    if labels.is_floating_point():
        raise TypeError(f"labels must be int64 for the fused loss, got {labels.dtype}: use kd_loss")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is not None and logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be fp32, bf16 or fp16 for the fused loss, got {logits.dtype}: use kd_loss")
    if student_logits.device.type not in _kernels:
        prepare(student_logits.device.type)
    return _LossWithGradient.apply(student_logits, teacher_logits if kd_weight > 0 else None, labels,
                                   float(temperature), float(kd_weight), ignore_index, float(label_smoothing), inplace)


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, kd_weight: float,
                ignore_index: int, label_smoothing: float, inplace: bool) -> Tensor:
        student = student.detach() if student.stride(1) == 1 else student.contiguous()
        if teacher is not None and teacher.stride(1) != 1:
            teacher = teacher.contiguous()
        inplace = inplace and student.stride(0) >= student.shape[1]
        grad = student if inplace else torch.empty_like(student, memory_format=torch.contiguous_format)
        # fp16 holds nothing below 6e-8, and this gradient is stored before a gradient scaler can lift it. Its rows
        # are bounded by (1 − λ) + λT, so there is room to store it times a power of two, taken back in backward.
        ctx.scale = 1.0
        if student.dtype == torch.float16:
            ctx.scale = 2.0 ** floor(log2(2 ** 14 / (1 - kd_weight + kd_weight * temperature)))
        loss = torch.ops.kd.loss_and_grad_(student, teacher, labels, temperature, kd_weight, ignore_index,
                                           label_smoothing, ctx.scale, grad)
        if inplace and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(student)  # autograd then refuses whoever saved the logits
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        grad, = ctx.saved_tensors
        if ctx.scale != 1:
            upstream = upstream / ctx.scale
        if torch.compiler.is_compiling():
            return grad * upstream.to(grad.dtype), *[None] * 7
        # Scaled where it lies, unless the graph is kept and a second backward will want it again.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            grad = grad.clone()
        torch.ops.kd.scale_(grad, upstream)
        return grad, *[None] * 7


def closed_form(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, kd_weight: float,
                ignore_index: int, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Loss and ∂loss/∂student (fp32) by the algebra above, in plain ops and without autograd."""
    s = student.float()
    C = s.shape[1]
    kept = labels != ignore_index
    loss, grad = s.new_zeros(len(s)), torch.zeros_like(s)
    if kd_weight < 1:
        on_label = torch.arange(C, device=s.device) == labels[:, None]
        y = on_label * (1 - label_smoothing) + label_smoothing / C
        log_q = F.log_softmax(s, dim=1)
        loss = loss - (1 - kd_weight) * (y * log_q.masked_fill(y == 0, 0)).sum(dim=1)
        grad = grad + (1 - kd_weight) * (log_q.exp() - y)
    if teacher is not None:
        T = temperature
        log_p, log_q = F.log_softmax(teacher.float() / T, dim=1), F.log_softmax(s / T, dim=1)
        p = log_p.exp()
        loss = loss + kd_weight * T ** 2 * (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)
        grad = grad + kd_weight * T * (log_q.exp() - p)
    n = kept.sum().clamp(min=1)
    return loss.masked_fill(~kept, 0).sum() / n, (grad / n).masked_fill(~kept[:, None], 0)


# One operator for every device, so that torch.compile sees one node; the dispatcher finds the kernel: C++ on the CPU,
# Triton on CUDA, and where neither can be had the closed form under torch.compile.
torch.library.define("kd::loss_and_grad_", "(Tensor student, Tensor? teacher, Tensor labels, float temperature, "
                     "float kd_weight, int ignore_index, float label_smoothing, float gradient_scale, "
                     "Tensor(a!) grad) -> Tensor")
torch.library.define("kd::scale_", "(Tensor(a!) grad, Tensor factor) -> ()")
_kernels: dict[str, str] = {}  # device type → what computes there, once prepared
_compiled: list[Callable[..., tuple[Tensor, Tensor]]] = []


@torch.library.register_fake("kd::loss_and_grad_")
def _(student, teacher, labels, temperature, kd_weight, ignore_index, label_smoothing, gradient_scale, grad):
    return student.new_empty((), dtype=torch.float32)


@torch.library.register_fake("kd::scale_")
def _(grad, factor):
    return None


@torch.library.impl("kd::loss_and_grad_", "default")
def _(student, teacher, labels, temperature, kd_weight, ignore_index, label_smoothing, gradient_scale, grad):
    _check_range(labels, student.shape[1], ignore_index)
    if not _compiled:
        _compiled.append(torch.compile(closed_form))
    args = student, teacher, labels, temperature, kd_weight, ignore_index, label_smoothing
    try:
        loss, g = _compiled[0](*args)
    except torch._dynamo.exc.BackendCompilerFailed:  # torch.compile wants a compiler too
        _compiled[0] = closed_form
        loss, g = closed_form(*args)
    grad.copy_(g * gradient_scale)
    return loss


@torch.library.impl("kd::scale_", "default")
def _(grad, factor):
    grad.mul_(factor)


@torch.compiler.disable
def prepare(device_type: str) -> str:
    """Builds or imports the kernel for this kind of device, once; says which it is."""
    if device_type in _kernels:
        return _kernels[device_type]
    kernel, why = "closed form", f"there is none for {device_type}"
    if device_type == "cpu":
        from kd.fast import loss_cpu
        kernel, why = "C++", loss_cpu.load()
    elif device_type == "cuda":
        try:
            from kd.fast import loss_triton
            loss_triton.register()
            kernel, why = "Triton", ""
        except ImportError as error:
            why = str(error)
    if why:
        kernel = "closed form"
        print(f"fused loss: no kernel ({why}); torch.compile of the closed form instead", file=sys.stderr)
    _kernels[device_type] = kernel
    return kernel


def choose_loss(loss: str, device: torch.device, num_classes: int,
                soft_labels: bool = False) -> tuple[Callable[..., Tensor], str]:
    """The loss to train with, and what to print about it.

    "reference" and "fused" are orders.  "auto" takes the fused loss wherever there is a kernel for the device, for
    it is faster at every size measured, 3 classes included; without a kernel it takes the closed form from 256
    classes on, below which compiling it costs more than it ever saves.  Soft labels (mixup) need the reference.
    """
    if loss not in ("auto", "reference", "fused"):
        raise BadInput(f"--loss {loss}: must be auto, reference or fused")
    if soft_labels and loss == "fused":
        raise BadInput("--loss fused: takes class labels only, not probabilities; use auto or reference")
    if loss == "reference" or soft_labels:
        return kd_loss, "reference"
    kernel = prepare(device.type)
    if loss == "auto" and kernel == "closed form" and num_classes < 256:
        return kd_loss, "reference"
    return fused_kd_loss, f"fused ({kernel})"
