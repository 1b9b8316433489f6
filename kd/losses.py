"""The distillation loss in plain PyTorch, and the choice between it and the fused one.

    loss = (1 − λ)·CE(student, labels) + λ·T²·KL(teacher‖student), the mean over the batch

The cross-entropy compares the student with the labels. The KL divergence compares it with the
teacher, after a temperature T has softened both distributions. λ is `kd_weight`.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2:
the gradients of the soft term shrink as 1/T², so the factor T² keeps the two terms in proportion
when T changes.

The algebra of the gradient. Let s and t be one row of student and teacher logits, y the label as a
distribution (one-hot), and

    q1 = softmax(s)      q = softmax(s/T)      p = softmax(t/T)

    CE = −Σ y·log q1           ∂CE/∂s     = q1 − y
    KL = Σ p·(log p − log q)   ∂T²KL/∂s   = T·(q − p)       (T² times the 1/T of the chain rule)

    ∂loss/∂s = (1 − λ)·(q1 − y) + λ·T·(q − p)

The gradient is made of the same exponentials as the loss. One pass over the row can therefore compute
both, and kd/fast/fused_loss.py does so. To change the loss, change `kd_loss` and run with
`--loss reference`. The losses of other papers are in kd/methods.py.
"""

from collections.abc import Callable
from functools import partial
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import BadInput

# A row with this label has no label. It takes no part in the cross-entropy, and takes part in the KL
# like every other row. Both terms are means over all B rows of the batch, so parts of a batch and
# shares of several ranks, weighted by their number of rows, add up exactly to the whole.
NO_LABEL = -100


def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
            temperature: float, kd_weight: float, label_smoothing: float = 0.0) -> Tensor:
    """(1 − λ)·CE + λ·T²·KL(teacher‖student), the mean over the B rows; a scalar.

    student_logits  (B, C), floating point; the gradient flows only here
    teacher_logits  (B, C), floating point, any precision; may be None where kd_weight is 0
    labels          (B,) int64 in [0, C) or NO_LABEL; or (B, C) class probabilities, where a row of
                    zeros has no label. They are not read where kd_weight is 1
    temperature     T > 0. It softens both distributions of the KL; the CE is taken at T = 1
    kd_weight       λ in [0, 1]
    label_smoothing the share of each label that goes to all classes alike (Szegedy et al. 2016,
                    arXiv:1512.00567, section 7)

    Computed in fp32 whatever the logits' precision; float64 stays float64. A logit may be −inf, for a
    class that is ruled out: 0·log 0 counts as 0. The loss is +inf where the student rules out a class
    that the teacher gives a probability.

    Raises ValueError or TypeError, naming the argument and its value. A label out of range is a
    ValueError on the CPU. On CUDA a look at the labels would wait for the device, so it is the
    device-side assertion of PyTorch's nll_loss here, and a loss of NaN in the fused kernel.
    """
    check_arguments(student_logits, teacher_logits, labels, temperature, kd_weight)
    # bf16 and fp16 are too coarse for a softmax. Upcast first, divide by T afterwards.
    s = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    loss = s.new_zeros(())

    if kd_weight < 1:
        check_label_range(labels, s.shape[1])
        if labels.is_floating_point():      # PyTorch would smooth a row of zeros, too
            share = label_smoothing / s.shape[1]
            labels = (1 - label_smoothing) * labels + share * labels.sum(dim=1, keepdim=True)
            label_smoothing = 0.0
        ce = F.cross_entropy(s, labels, ignore_index=NO_LABEL, reduction="sum",
                             label_smoothing=label_smoothing)
        loss = loss + (1 - kd_weight) * ce

    if kd_weight > 0:
        assert teacher_logits is not None
        t = teacher_logits.detach().to(s.dtype)
        kl = kl_of_rows(F.log_softmax(t / temperature, dim=1), F.log_softmax(s / temperature, dim=1))
        loss = loss + kd_weight * temperature ** 2 * kl.sum()

    return loss / max(len(s), 1)


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row of log-probabilities `(B, C)`, `(B,)`; 0·log 0 counts as 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)


# ---- which loss a run trains with -------------------------------------------------------------------

LossFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def choose(loss: str, device: torch.device, temperature: float, kd_weight: float, num_classes: int,
           soft_labels: bool, kernels: bool, label_smoothing: float = 0.0, method: str = "kd",
           standardised: bool = False) -> tuple[LossFunction, str]:
    """The loss as a function of (student_outputs, teacher_outputs, labels), and its name to print.

    loss          "reference" is `kd_loss`, "fused" is `fused_kd_loss`, "auto" is the fused one
                  where it applies and pays, else the reference
    soft_labels   whether labels are (B, C) probabilities, as mixup makes them
    kernels       False for --kernels off: "auto" is then the reference
    method        another than "kd" is computed in plain operations (`kd/methods.py`)
    standardised  whether --standardise is given; also in plain operations

    Raises BadInput where "fused" cannot be had, `loss` is unknown, or the method says nothing about so
    few classes.
    """
    if loss not in ("auto", "reference", "fused"):
        raise BadInput(f"--loss {loss}: must be auto, reference or fused")
    if kd_weight and (standardised or method != "kd"):
        from kd import methods              # here and not at the top, because that file imports `kd_loss`
        methods.check_classes(method, standardised, num_classes)
        name = f"{method}, standardised" if standardised else method
        return partial(methods.method_loss, method=method, classes=num_classes, temperature=temperature,
                       kd_weight=kd_weight, label_smoothing=label_smoothing, standardised=standardised), name
    if loss == "fused" and soft_labels:
        raise BadInput("--loss fused: takes class labels only, not the probabilities of mixup; "
                       "use --loss auto or reference")
    if loss == "fused" and not kernels:
        raise BadInput("--loss fused: needs the kernels that --kernels off forbids; "
                       "use --loss auto or --kernels auto")
    if loss == "fused" and label_smoothing:
        raise BadInput("--loss fused: knows no --label-smoothing; use --loss auto or reference")
    reference = partial(kd_loss, temperature=temperature, kd_weight=kd_weight, label_smoothing=label_smoothing)
    if loss == "reference" or soft_labels or label_smoothing or not kernels:
        return reference, "reference"

    # Imported here and not at the top, because that file imports the checks below.
    from kd.fast import fused_loss
    kernel, missing = fused_loss.load_kernel(device.type)
    # A kernel is faster at every size measured, 3 classes included. Without one the closed form has
    # to be compiled first, and with fewer than 256 classes that costs more than it saves.
    if loss == "auto" and missing and num_classes < 256:
        return reference, "reference"
    name = f"fused ({kernel})"
    if loss == "fused" and missing:
        name = f"fused ({kernel}, since there is no kernel: {missing})"
    return partial(fused_loss.fused_kd_loss, temperature=temperature, kd_weight=kd_weight), name


# ---- checks of the arguments ------------------------------------------------------------------------

def check_arguments(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
                    temperature: float, kd_weight: float) -> None:
    """Check all that can be checked without reading a tensor's values.

    Raises ValueError or TypeError, naming the argument and its value.
    """
    shape = student_logits.shape
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"student_logits must be (B, C) with C ≥ 1, got {tuple(shape)}")
    if not student_logits.is_floating_point():
        raise TypeError(f"student_logits must be floating point, got {student_logits.dtype}")
    if not 0 <= kd_weight <= 1:
        raise ValueError(f"kd_weight must be in [0, 1], got {kd_weight}")
    if not (temperature > 0 and isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")

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
        raise ValueError(f"labels must be on {student_logits.device} like student_logits, "
                         f"got {labels.device}")
    if labels.is_floating_point():
        if labels.shape != shape:
            raise ValueError(f"labels, as class probabilities, must be {tuple(shape)} like "
                             f"student_logits, got {tuple(labels.shape)}")
    elif labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 or class probabilities, got {labels.dtype}")
    elif labels.shape != shape[:1]:
        raise ValueError(f"labels must be ({shape[0]},), one for each row of student_logits, "
                         f"got {tuple(labels.shape)}")


def check_label_range(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError for a class label that is neither in [0, num_classes) nor NO_LABEL.

    Only on the CPU: on another device, reading the labels would wait for all work queued before.
    """
    if labels.is_floating_point() or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != NO_LABEL)]
    if len(wrong):
        raise ValueError(f"labels must be in [0, {num_classes}) or {NO_LABEL}, got {wrong[0].item()}")
