"""The fused distillation loss: `kd_loss` with loss and gradient out of one visit to each row.

Plain ops read and write the (B, C) logits again for every softmax, product and sum, and once more for
each in backward. Here each logit is read once, and the gradient is written once. The exponentials of
the loss are also those of its gradient, by the algebra at the top of kd/losses.py. So forward
computes the gradient as well, and backward only multiplies it by the upstream gradient.

The kernels behind it: fused_loss.cpp on the CPU, fused_loss_triton.py on CUDA. Where neither can be
had, torch.compile of `closed_form` takes their place.
"""

from collections.abc import Callable
from math import floor, log2
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import first_error
from kd.fast import build
from kd.losses import NO_LABEL, check_arguments, check_label_range


def fused_kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
                  temperature: float, kd_weight: float) -> Tensor:
    """`kd_loss` of kd/losses.py: the same arguments, number, gradient and errors.

    student_logits  (B, C), fp32, bf16 or fp16; rows may be strided. The gradient has this dtype
    teacher_logits  (B, C), fp32, bf16 or fp16, not necessarily the student's dtype
    labels          (B,) int64, or NO_LABEL. Class probabilities are a TypeError: use `kd_loss`

    All arithmetic is in fp32. Memory: one tensor like the student's logits, for the gradient.
    Memory traffic: read student, read teacher, write the gradient. Differentiable once.
    """
    check_arguments(student_logits, teacher_logits, labels, temperature, kd_weight)
    if labels.is_floating_point():
        raise TypeError(f"labels must be int64 for the fused loss, got {labels.dtype}: use kd_loss")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is not None and logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be fp32, bf16 or fp16 for the fused loss, "
                            f"got {logits.dtype}: use kd_loss")
    if student_logits.device.type not in _kernels:
        load_kernel(student_logits.device.type)
    if kd_weight == 0:
        teacher_logits = None
    return _FusedLoss.apply(student_logits, teacher_logits, labels, float(temperature),
                            float(kd_weight))


class _FusedLoss(torch.autograd.Function):
    """Forward computes the gradient beside the loss; backward scales it."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float,
                kd_weight: float) -> Tensor:
        # The kernels take strided rows, but the classes of a row must be neighbours.
        student = student.detach() if student.stride(1) == 1 else student.contiguous()
        if teacher is not None and teacher.stride(1) != 1:
            teacher = teacher.contiguous()

        # fp16 holds nothing below 6e-8, and the gradient is stored before a gradient scaler can lift
        # it. No element exceeds (1 − λ) + λT, so there is room to store it times a power of two.
        # Backward divides by that again.
        ctx.scale = 1.0
        if student.dtype == torch.float16:
            ctx.scale = 2.0 ** floor(log2(2 ** 14 / (1 - kd_weight + kd_weight * temperature)))

        loss, grad = torch.ops.kd.loss_and_grad(student, teacher, labels, temperature, kd_weight,
                                                ctx.scale)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        grad, = ctx.saved_tensors
        if ctx.scale != 1:
            upstream = upstream / ctx.scale
        if torch.compiler.is_compiling():
            return grad * upstream.to(grad.dtype), None, None, None, None

        # Scaled in place, unless the graph is kept: a second backward then needs it unscaled.
        if _graph_is_kept():
            grad = grad.clone()
        torch.ops.kd.scale_(grad, upstream)
        return grad, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether the running backward keeps its graph. True where a new torch lacks this private function."""
    try:
        return torch._C._autograd._get_current_graph_task_keep_graph()
    except AttributeError:
        return True


# ---- the operator, and what computes it where there is no kernel ------------------------------------
#
# One operator for every device, so that torch.compile sees a single node. The dispatcher finds the
# kernel: C++ registers one for the CPU, Triton one for CUDA. "default" is for all the others.

torch.library.define("kd::loss_and_grad", "(Tensor student, Tensor? teacher, Tensor labels, "
                     "float temperature, float kd_weight, float gradient_scale) -> (Tensor, Tensor)")
torch.library.define("kd::scale_", "(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.register_fake("kd::loss_and_grad")
def _(student, teacher, labels, temperature, kd_weight, gradient_scale):
    loss = student.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(student, memory_format=torch.contiguous_format)


@torch.library.register_fake("kd::scale_")
def _(grad, factor):
    return None


def closed_form(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float,
                kd_weight: float) -> tuple[Tensor, Tensor]:
    """Loss and ∂loss/∂student in plain ops and fp32, by the algebra at the top of kd/losses.py."""
    s, T = student.float(), temperature
    B, C = s.shape
    loss, grad = s.new_zeros(B), torch.zeros_like(s)
    if kd_weight < 1:
        y = labels[:, None] == torch.arange(C, device=s.device)  # one-hot
        log_q1 = F.log_softmax(s, dim=1)
        unlabelled = labels[:, None] == NO_LABEL
        loss = loss - (1 - kd_weight) * log_q1.masked_fill(~y, 0).sum(dim=1)
        grad = grad + (1 - kd_weight) * (log_q1.exp() - y.float()).masked_fill(unlabelled, 0)
    if teacher is not None:
        log_p, log_q = F.log_softmax(teacher.float() / T, dim=1), F.log_softmax(s / T, dim=1)
        p = log_p.exp()
        loss = loss + kd_weight * T ** 2 * (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)
        grad = grad + kd_weight * T * (log_q.exp() - p)
    n = max(B, 1)
    return loss.sum() / n, grad / n


_compiled: list[Callable[..., tuple[Tensor, Tensor]]] = []  # closed_form, compiled at its first use


@torch.library.impl("kd::loss_and_grad", "default")
def _(student, teacher, labels, temperature, kd_weight, gradient_scale):
    if kd_weight < 1:
        check_label_range(labels, student.shape[1])
    if not _compiled:
        _compiled.append(torch.compile(closed_form))
    try:
        loss, grad = _compiled[0](student, teacher, labels, temperature, kd_weight)
    except Exception:   # torch.compile needs a C++ compiler, too; any other fault shows again below
        _compiled[0] = closed_form
        loss, grad = closed_form(student, teacher, labels, temperature, kd_weight)
    return loss, (grad * gradient_scale).to(student.dtype)


@torch.library.impl("kd::scale_", "default")
def _(grad, factor):
    grad.mul_(factor)


# ---- the kernels ------------------------------------------------------------------------------------

_kernels: dict[str, tuple[str, str]] = {}  # device type → what load_kernel returned


@torch.compiler.disable
def load_kernel(device_type: str) -> tuple[str, str]:
    """Build or import the kernel for "cpu", "cuda", …; a second call returns the first one's answer.

    Returns ("C++", "") or ("Triton", ""), or ("closed form", why there is no kernel, in one line).
    """
    if device_type not in _kernels:
        _kernels[device_type] = _load_kernel(device_type)
    return _kernels[device_type]


def _load_kernel(device_type: str) -> tuple[str, str]:
    if device_type == "cpu":
        flags = ["-fno-trapping-math", "-ffp-contract=off"]
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            flags += ["-mprefer-vector-width=512"]
        try:
            build.load(Path(__file__).with_suffix(".cpp"), flags, seconds=12)
            return "C++", ""
        except build.BuildError as error:
            return "closed form", str(error)
    if device_type == "cuda":
        try:
            from kd.fast import fused_loss_triton
            # One row of two classes, now: a launch needs a C compiler and a GPU that Triton supports.
            row, label = torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
            fused_loss_triton.loss_and_grad(row, row, label, 1.0, 0.5, 1.0)
        except Exception as error:
            return "closed form", first_error(error)
        fused_loss_triton.register()
        return "Triton", ""
    return "closed form", f"there is none for {device_type}"
