"""The algebra of the loss, the losses of the literature, and which of them a run trains with.

    loss = (1 − λ)·CE(student, labels) + λ·T²·KL(teacher‖student), the mean over the batch

`kd_loss` in train.py computes it in plain operations. The cross-entropy compares the student with the labels. The KL
divergence compares it with the teacher, after a temperature T has softened both distributions. λ is `kd_weight`.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2: the gradients of
the soft term shrink as 1/T², so the factor T² keeps the two terms in proportion when T changes.

The algebra of the gradient. Let s and t be one row of student and teacher logits, y the label as a distribution
(one-hot), and

    q1 = softmax(s)      q = softmax(s/T)      p = softmax(t/T)

    CE = −Σ y·log q1           ∂CE/∂s     = q1 − y
    KL = Σ p·(log p − log q)   ∂T²KL/∂s   = T·(q − p)       (T² times the 1/T of the chain rule)

    ∂loss/∂s = (1 − λ)·(q1 − y) + λ·T·(q − p)

The gradient is made of the same exponentials as the loss. One pass over the row can therefore compute both, and
kd/fast/fused_loss.py does so.

The other methods of --method take the place of T²·KL: loss = (1 − λ)·CE + λ·method(student, teacher, labels, T). A
method is a function of these four. It returns a scalar: a mean over the rows of the batch, or over their entries, pairs
or triples, as its docstring says.

    student, teacher    logits `(B, C)`, or for the methods in ON_FEATURES pooled features `(B, D)`; float32 or
                        float64. The teacher's have no gradient
    labels              `(B,)` int64; only the methods in NEED_LABELS read them
    temperature         T > 0; only the methods in TEMPERED read it

The papers of dkd, nkd, dist and rkd add the method to a whole CE: CE + w·method. At λ = 0.5 the loss is half of that.
AdamW does not see a factor of the whole loss. --clip, which limits the gradient's norm, does. A default below is the
paper's w. To try another, change the default and give a new --out: a run does not record these defaults, so --resume
would go on with a run of the old ones.

Three methods compare the pictures of a batch with each other: `dist` in its columns, `pkt` and `rkd`. They see the
pictures of one rank. So only these three give another loss on two ranks than on one.

A new method is a function here, its name in METHODS, and its name in METHODS of kd/config.py. It belongs in the sets
there if it compares features, or reads every label.
"""

import math
from functools import partial
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import NO_LABEL, BadInput
from kd.config import NEED_LABELS, ON_FEATURES
from kd.fast import fused_loss

LossFunction = Callable[[Tensor, Tensor | None, Tensor], Tensor]
Method = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def upcast(logits: Tensor) -> Tensor:
    """float32 of bf16 and fp16, which are too coarse for a softmax; float32 and float64 stay as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row of log-probabilities `(B, C)`, `(B,)`; 0·log 0 counts as 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=1)


# ---- on logits ----------------------------------------------------------------------------------------

def kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T²·KL(p‖q), where p = softmax(teacher / T) and q = softmax(student / T).

    Hinton, Vinyals & Dean 2015, arXiv:1503.02531. Its minimum is 0, at equal logits. This function serves
    --standardise. Without it, `choose` takes the fused loss or `kd_loss`.
    """
    log_p, log_q = (F.log_softmax(logits / temperature, dim=1) for logits in (teacher, student))
    return temperature ** 2 * kl_of_rows(log_p, log_q).sum() / len(student)


def hard(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """CE(student, argmax teacher): the teacher's answer without its doubts. T is not read.

    Touvron et al. 2021 (DeiT), arXiv:2012.12877, equation 3: λ = 0.5. Its infimum is 0, where the
    student is certain of the teacher's class. DeiT gives this loss to a second classifier, on a token of its
    own; here there is one. The authors' code divides the *soft* loss, with which the paper compares this
    one, by the number of classes as well.
    """
    return F.cross_entropy(student, teacher.argmax(dim=1))


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float = 1.0,
        beta: float = 8.0) -> Tensor:
    """T²·(α·TCKD + β·NCKD): the KL in two parts, each with a weight of its own.

        TCKD = KL([p_y, 1 − p_y] ‖ [q_y, 1 − q_y])      the label's class y against all others
        NCKD = KL(p̂ ‖ q̂)                                the others among themselves, summing to 1
        KL(p‖q) = TCKD + (1 − p_y)·NCKD

    Zhao et al. 2022, arXiv:2203.08679, equation 7. Its minimum is 0, at equal logits. α = 1 and β = 8 are
    theirs for CIFAR-100; they choose β for each pair of models. Their code also multiplies by
    min(epoch / 20, 1), and subtracts 1000 from the logit of the class that is left out: here it is −inf.
    """
    t, s = teacher / temperature, student / temperature
    tckd = kl_of_rows(_label_against_others(t, labels), _label_against_others(s, labels))
    nckd = kl_of_rows(_among_others(t, labels), _among_others(s, labels))
    return temperature ** 2 * (alpha * tckd + beta * nckd).mean()


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, gamma: float = 1.5) -> Tensor:
    """−p_y·log q_y − γ·T²·Σ_{c≠y} p̂_c·log q̂_c; p_y and q_y are taken at T = 1, p̂ and q̂ (see `dkd`) at T.

    Yang et al. 2023, arXiv:2303.13005, without its CE. Both terms are cross-entropies. The second is least
    where p̂ = q̂: it is then γ·T² times the entropy of p̂. The first only falls as q_y rises, so the gradient
    is not 0 at equal logits. γ = 1.5 and T = 1 are theirs for ImageNet. Their first code took softmax and
    log one after the other, which gives −inf where a probability underflows.
    """
    p_label = teacher.softmax(dim=1).gather(1, labels[:, None])
    target = (p_label * student.log_softmax(dim=1).gather(1, labels[:, None])).sum(dim=1)
    p_others = _among_others(teacher / temperature, labels).exp()
    log_q_others = _among_others(student / temperature, labels)
    others = (p_others * log_q_others.masked_fill(p_others == 0, 0)).sum(dim=1)
    return -(target + gamma * temperature ** 2 * others).mean()


def dist(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, beta: float = 2.0,
         gamma: float = 2.0) -> Tensor:
    """β·mean_rows(1 − ρ(p_i, q_i)) + γ·mean_columns(1 − ρ(p_{:c}, q_{:c})), ρ is Pearson's correlation.

    Huang et al. 2022, arXiv:2205.10536. A row is one picture over the classes, a column one class over the
    pictures of the batch. Its minimum is 0, at equal logits, but for rows and columns that are nearly
    constant: their ρ counts as 0, by the 1e-8 that the authors' code adds to the product of the norms. With
    two classes ρ of a row is ±1, so only the columns teach. T = 1 is theirs for ImageNet, 4 for CIFAR.
    Their code multiplies by T². The paper does not, and a correlation does not shrink as T grows. So at
    T = 4 this is 16 times weaker than in their code.
    """
    p, q = (teacher / temperature).softmax(dim=1), (student / temperature).softmax(dim=1)
    rows, columns = _correlation(p, q), _correlation(p.T, q.T)
    return beta * (1 - rows).mean() + gamma * (1 - columns).mean()


# ---- on pooled features -------------------------------------------------------------------------------


def pkt(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float,
        weight: float = 30_000 / 64) -> Tensor:
    """w·mean_i KL(p_{·|i} ‖ q_{·|i}): who is near whom in the batch.

        K_ij = (1 + cos(h_i, h_j)) / 2          p_{j|i} = K_ij / Σ_{k≠i} K_ik,  j ≠ i

    Passalis & Tefas 2018, arXiv:1803.10837. Its minimum is 0, at equal features. The width of the student's
    features may differ. The weight is RepDistiller's, which adds the method to a whole CE: it multiplies a
    mean over all B² pairs by 30,000, which for its batch of 64 is 469 times this mean over rows. The
    authors' code counts a picture among its own neighbours. So it sees the mean similarity of all pairs,
    which this does not.
    """
    p, q = _neighbours(teacher), _neighbours(student)
    return weight * kl_of_rows(p.log(), q.clamp(min=1e-7).log()).mean()


def rkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, distance_weight: float = 25.0,
        angle_weight: float = 50.0) -> Tensor:
    """w_d·mean_{i<j} huber(d_ij − d′_ij) + w_a·mean_{ijk} huber(a_ijk − a′_ijk), a prime marks the teacher's.

        d_ij = ‖h_i − h_j‖ / their mean over all pairs      a_ijk = cosine of the angle at h_j

    Park et al. 2019, arXiv:1904.05068, with their weights for classification, 25 and 50. Its minimum is 0, at equal
    features. The width of the student's features may differ. The paper sums; the means here are over pairs
    and triples of different pictures, and those of the authors' code over all B² and B³. It keeps about
    2·B²·D + 2·B³ numbers for its gradient: 11 MB for 32 pictures of 1280 features, 19 GB for 1024.
    Their script for classification first divides each row of features by its norm, and adds 16·KL at
    T = 4. Neither is done here.
    """
    rows = len(student)
    pairs, triples = max(math.comb(rows, 2), 1), max(rows * (rows - 1) * (rows - 2), 1)
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="sum") / pairs
    angle = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="sum") / triples
    return distance_weight * distance + angle_weight * angle


def simkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """mean (P(h_s) − h_t)²: the student learns the teacher's features and takes over its classifier.

    Chen et al. 2022 (SimKD), arXiv:2203.14001, where λ = 1. Its minimum is 0, at equal features. Theirs
    compares feature maps before the pooling, and P is three convolutions with BatchNorm and ReLU, which
    stay in the student. Here the features are pooled and P is linear. So P and the teacher's classifier
    become one layer (`kd/features.py`), and the student is no larger than without a teacher.
    """
    return F.mse_loss(student, teacher)


METHODS: dict[str, Method] = {method.__name__: method for method in (kd, hard, dkd, dist, nkd, pkt, rkd, simkd)}
TEMPERED = {"kd", "dkd", "dist", "nkd"}


# ---- a pre-process of logits --------------------------------------------------------------------------


def standardise(logits: Tensor) -> Tensor:
    """Each row minus its mean, divided by its standard deviation; `(B, C)`, finite.

    Sun et al. 2024, arXiv:2403.01427: only the relations of the logits are learned, not their size. A row
    a·z + b with a > 0 gives what z gives. A constant row gives zeros. As in the paper, the deviation is
    that of the population; their code divides by C − 1. Their λ is 0.99: 0.1·CE + 9·T²·KL. Of three
    logits only the ratio of the gaps between them is left.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).clamp(min=1e-14).sqrt()


# ---- the loss of a run --------------------------------------------------------------------------------

def method_loss(student_outputs: Tensor, teacher_outputs: Tensor, labels: Tensor, *, method: str, classes: int,
                temperature: float, kd_weight: float, label_smoothing: float = 0.0,
                standardised: bool = False) -> Tensor:
    """(1 − λ)·CE + λ·method, a scalar.

    student_outputs     `(B, C)` logits; for the methods in ON_FEATURES `(B, C + D)`, logits and features
    teacher_outputs     the teacher's, in the same form
    labels              `(B,)` int64, or NO_LABEL
    classes             C

    Outputs in half precision are upcast to float32 first; float64 stays float64.
    """
    s = upcast(student_outputs)
    t = teacher_outputs.detach().to(s.dtype)
    loss = s.new_zeros(())
    if kd_weight < 1:
        ce = F.cross_entropy(s[:, :classes], labels, ignore_index=NO_LABEL, reduction="sum",
                             label_smoothing=label_smoothing)
        loss = (1 - kd_weight) * (ce / len(s))
    if method in ON_FEATURES:
        s, t = s[:, classes:], t[:, classes:]
    if standardised:
        s, t = standardise(s), standardise(t)
    return loss + kd_weight * METHODS[method](s, t, labels, temperature)


def choose(reference: Callable[..., Tensor], loss: str, device: torch.device, temperature: float, kd_weight: float,
           classes: int, kernels: bool, label_smoothing: float = 0.0, method: str = "kd",
           standardised: bool = False) -> tuple[LossFunction, str]:
    """The loss as a function of (student_outputs, teacher_outputs, labels), and its name to print.

    reference     `kd_loss` of train.py
    loss          "reference", "fused", or "auto": the fused one where it can be had
    kernels       False for --kernels off: "auto" is then the reference
    method        another than "kd" is computed in plain operations, and so is kd with `standardised`

    Raises BadInput where "fused" cannot be had, or the method says nothing about so few classes.
    """
    settings: dict[str, Any] = dict(temperature=temperature, kd_weight=kd_weight)
    if kd_weight and (standardised or method != "kd"):
        _check_classes(method, standardised, classes)
        name = f"{method}, standardised" if standardised else method
        return partial(method_loss, method=method, classes=classes, label_smoothing=label_smoothing,
                       standardised=standardised, **settings), name
    if loss == "reference" or label_smoothing or not kernels:
        return partial(reference, label_smoothing=label_smoothing, **settings), "reference"
    kernel, missing = fused_loss.load_kernel(device.type)
    if not missing:
        return partial(fused_loss.fused_kd_loss, **settings), f"fused ({kernel})"
    if loss == "fused":
        raise BadInput(f"--loss fused: there is no kernel ({missing}); use --loss auto")
    return partial(reference, **settings), "reference"


def _check_classes(method: str, standardised: bool, classes: int) -> None:
    if classes < 3 and method in NEED_LABELS:
        raise BadInput(f"--method {method}: compares the classes that are not the label's, and of {classes} classes "
                       f"only one is left; use --method kd")
    if classes < 3 and standardised:
        raise BadInput(f"--standardise: of {classes} standardised logits only their order is left; leave it out")


# ---- what the methods share ---------------------------------------------------------------------------


def _label_against_others(logits: Tensor, labels: Tensor) -> Tensor:
    """log [p_y, 1 − p_y] of each row, `(B, 2)`."""
    log_p = logits.log_softmax(dim=1)
    label = F.one_hot(labels, logits.shape[1]).bool()
    of_label = log_p.gather(1, labels[:, None]).squeeze(1)
    return torch.stack([of_label, log_p.masked_fill(label, -math.inf).logsumexp(dim=1)], dim=1)


def _among_others(logits: Tensor, labels: Tensor) -> Tensor:
    """log-softmax over the classes that are not the label's, `(B, C)`; −inf for the label's."""
    label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(label, -math.inf).log_softmax(dim=1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of `a` with that of `b`, `(rows,)`; nearly 0 for a nearly constant row."""
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def _neighbours(h: Tensor) -> Tensor:
    """p_{j|i} of `pkt`, `(B, B)`, whose rows sum to 1 and whose diagonal is 0."""
    unit = F.normalize(h, dim=1)
    kernel = ((1 + unit @ unit.T) / 2).clamp(min=1e-7).fill_diagonal_(0)
    return kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-7)


def _distances(h: Tensor) -> Tensor:
    """Euclidean distances of all pairs i < j, divided by their mean."""
    distances = F.pdist(h)
    return distances / (distances.sum() / max(len(distances), 1)).clamp(min=1e-12)


def _angles(h: Tensor) -> Tensor:
    """Cosines of the angles at j between the rows i and k, `(B, B, B)` by [j, i, k]; 0 where i or k is j."""
    towards = h[None] - h[:, None]                  # [j, i]: from j to i
    lengths = towards.norm(dim=2, keepdim=True)
    # Two pictures with almost the same features have no direction. A unit vector's gradient would be huge.
    towards = towards / lengths.clamp(min=1e-3 * lengths.detach().mean() + 1e-12)
    return towards @ towards.transpose(1, 2)
