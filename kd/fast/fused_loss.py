"""The fused distillation loss: `kd_loss` with loss and gradient out of one visit to each row.

Plain ops read and write the (B, C) logits again for every softmax, product and sum, and once more for
each in backward. Here each logit is read once, and the gradient is written once. The exponentials of
the loss are also those of its gradient, by the algebra at the top of kd/losses.py. So forward
computes the gradient as well, and backward only multiplies it by the upstream gradient.

The kernels behind it: fused_loss.cpp on the CPU, fused_loss_triton.py on CUDA.
"""

import functools
from math import floor, log2
from pathlib import Path

import torch
from torch import Tensor

from kd import first_error
from kd.fast import build


def fused_kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
                  temperature: float, kd_weight: float) -> Tensor:
    """`kd_loss` of kd/losses.py: the same number and gradient, where `load_kernel` gives a kernel.

    student_logits  (B, C), fp32, bf16 or fp16; rows may be strided. The gradient has this dtype
    teacher_logits  the same, not necessarily in the student's dtype; may be None where kd_weight is 0
    labels          (B,) int64 in [0, C) or NO_LABEL. They are not read where kd_weight is 1

    All arithmetic is in fp32. Memory: one tensor like the student's logits, for the gradient.
    Memory traffic: read student, read teacher, write the gradient. Differentiable once.

    Raises ValueError or TypeError, naming the argument. A label out of range is a ValueError on the CPU.
    On CUDA a look at the labels would wait for the device, so the loss is NaN there.
    """
    check_arguments(student_logits, teacher_logits, labels, temperature, kd_weight)
    if not torch.compiler.is_compiling():       # what is compiled finds the kernel that was loaded before
        load_kernel(student_logits.device.type)
    if kd_weight == 0:
        teacher_logits = None
    return _FusedLoss.apply(student_logits, teacher_logits, labels, float(temperature), float(kd_weight))


def check_arguments(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
                    temperature: float, kd_weight: float) -> None:
    """Raise ValueError or TypeError, naming the argument, for what shows without reading a tensor."""
    if not (0 <= kd_weight <= 1 and 0 < temperature < float("inf")):
        raise ValueError(f"kd_weight must be in [0, 1] and temperature positive, got {kd_weight} and {temperature}")
    if teacher_logits is None and kd_weight > 0:
        raise ValueError(f"teacher_logits is None, which needs kd_weight 0, got {kd_weight}")
    (B, C), device, floats = student_logits.shape, student_logits.device, (torch.float32, torch.bfloat16, torch.float16)
    for name, tensor, shape, dtypes in (("student_logits", student_logits, (B, C), floats),
                                        ("teacher_logits", teacher_logits, (B, C), floats),
                                        ("labels", labels, (B,), (torch.int64,))):
        if tensor is not None and (tensor.shape != shape or tensor.device != device):
            raise ValueError(f"{name} must be {shape} on {device}, got {tuple(tensor.shape)} on {tensor.device}")
        if tensor is not None and tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be one of {dtypes}, got {tensor.dtype}")


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


# ---- the operators and their kernels ----------------------------------------------------------------
#
# One operator for every device, so that torch.compile sees a single node. The dispatcher finds the
# kernel: C++ registers one for the CPU, Triton one for CUDA.

torch.library.define("kd::loss_and_grad", "(Tensor student, Tensor? teacher, Tensor labels, "
                     "float temperature, float kd_weight, float gradient_scale) -> (Tensor, Tensor)")
torch.library.define("kd::scale_", "(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.register_fake("kd::loss_and_grad")
def _(student, teacher, labels, temperature, kd_weight, gradient_scale):
    loss = student.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(student, memory_format=torch.contiguous_format)


@functools.cache
def load_kernel(device_type: str) -> tuple[str, str]:
    """Build or import the kernel for "cpu" or "cuda", at the first call.

    Returns ("C++", "") or ("Triton", ""), or ("", why there is no kernel, in one line).
    """
    try:
        if device_type == "cpu":
            flags = ["-fno-trapping-math", "-ffp-contract=off"]
            if torch.backends.cpu.get_cpu_capability() == "AVX512":
                flags += ["-mprefer-vector-width=512"]
            build.load(Path(__file__).with_suffix(".cpp"), flags, seconds=12)
            return "C++", ""
        if device_type == "cuda":
            from kd.fast import fused_loss_triton
            # One row of two classes, now: a launch needs a C compiler and a GPU that Triton supports.
            row, label = torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
            fused_loss_triton.loss_and_grad(row, row, label, 1.0, 0.5, 1.0)
            fused_loss_triton.register()
            return "Triton", ""
    except Exception as error:
        return "", first_error(error)
    return "", f"there is no fused loss for {device_type}"
