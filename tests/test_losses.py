"""The reference loss and the methods against the mathematics of their papers, in float64; and which one a run takes."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train
from kd import NO_LABEL, BadInput, config, losses
from kd.config import NEED_LABELS, ON_FEATURES
from kd.fast import fused_loss
from kd.fast.fused_loss import fused_kd_loss
from kd.losses import METHODS, method_loss, standardise
from kd.machine import checkpoint
from tests.helpers.loss_cases import DEVICES, INF, logits, loss_and_gradient
from tests.helpers.runs import identical, stop_at_step
from train import kd_loss

CPU = torch.device("cpu")


# ---- the reference, which stands in train.py ------------------------------------------------------------

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


def test_reference_gradient():
    s, t, labels = logits(3, 5)
    labels[1] = NO_LABEL
    s, t = s.double().requires_grad_(), t.double()
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, labels, 2.0, 0.6), s)


def test_reference_weight_0_is_cross_entropy():
    s, _, labels = logits(6, 5)
    assert torch.equal(kd_loss(s, None, labels, 4.0, 0.0), F.cross_entropy(s, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_upcasts_before_it_divides(dtype):
    s, t, labels = logits(7, 11, dtype=dtype)
    assert torch.equal(kd_loss(s, t, labels, 3.0, 0.5), kd_loss(s.float(), t.float(), labels, 3.0, 0.5))


def test_the_gradients_scale_does_not_change_with_a_high_temperature():
    """T² makes up for the 1/T² of the soft term's gradient (Hinton et al. 2015); without it, 100 gives a 4th of 50."""
    s, t, labels = logits(16, 10)
    norms = [loss_and_gradient(kd_loss, s, t, labels, T, 1.0)[1].norm().item() for T in (50.0, 100.0)]
    assert norms[0] == pytest.approx(norms[1], rel=0.03) and norms[0] > 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
def test_a_row_without_a_label_has_the_kl_but_no_cross_entropy(f, device):
    s, t, labels = (x.to(device) for x in logits(6, 5))
    partly = labels.clone()
    partly[[1, 4]] = NO_LABEL
    loss, g = loss_and_gradient(f, s, t, partly, 4.0, 0.5)
    ce = F.cross_entropy(s[partly != NO_LABEL], labels[partly != NO_LABEL], reduction="sum").item()
    kl, kl_g = loss_and_gradient(f, s, t, labels, 4.0, 1.0)
    assert loss.item() == pytest.approx(0.5 * ce / 6 + 0.5 * kl.item(), rel=1e-6)  # over all 6 rows, not over 4
    torch.testing.assert_close(g[[1, 4]], 0.5 * kl_g[[1, 4]], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(g[0], loss_and_gradient(f, s, t, labels, 4.0, 0.5)[1][0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
@settings(deadline=None, derandomize=True, max_examples=50)
@given(cut=st.integers(1, 8), unlabelled=st.lists(st.booleans(), min_size=9, max_size=9),
       weight=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_parts_of_a_batch_add_up_by_their_number_of_rows(f, cut, unlabelled, weight, seed):
    """As ranks count them."""
    s, t, labels = logits(9, 6, seed=seed)
    labels[torch.tensor(unlabelled)] = NO_LABEL
    loss, g = loss_and_gradient(f, s, t, labels, 4.0, weight)
    parts = [loss_and_gradient(f, s[rows], t[rows], labels[rows], 4.0, weight) for rows in (slice(cut), slice(cut, 9))]
    shares = cut / 9, 1 - cut / 9
    assert loss.item() == pytest.approx(sum(share * part[0].item() for share, part in zip(shares, parts)), rel=1e-5)
    torch.testing.assert_close(g, torch.cat([share * part[1] for share, part in zip(shares, parts)]),
                               rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
def test_no_label_is_read_where_only_the_teacher_counts(f):
    s, t, labels = logits(6, 5)
    loss, g = loss_and_gradient(f, s, t, labels, 4.0, 1.0)
    for other in (torch.full_like(labels, NO_LABEL), torch.full_like(labels, 999)):
        again = loss_and_gradient(f, s, t, other, 4.0, 1.0)
        assert torch.equal(again[0], loss) and torch.equal(again[1], g)


# ---- the choice ----------------------------------------------------------------------------------------

def chosen(loss: str, kernels: bool = True, **settings: Any) -> str:
    """The name of the chosen loss, which is checked to compute the loss with its T and λ."""
    loss_fn, name = losses.choose(kd_loss, loss, CPU, 4.0, 0.3, 3, kernels, **settings)
    s, t, labels = logits(6, 3)
    f: Any = fused_kd_loss if name.startswith("fused") else partial(kd_loss, **settings)
    assert torch.equal(loss_fn(s, t, labels), f(s, t, labels, 4.0, 0.3))
    return name


def test_the_reference_is_chosen_where_it_was_ordered_or_nothing_else_will_do(monkeypatch):
    assert chosen("reference") == chosen("auto", kernels=False) == chosen("auto", label_smoothing=0.2) == "reference"
    monkeypatch.setattr(fused_loss, "load_kernel", lambda device: ("", "no compiler"))
    assert chosen("auto") == "reference"
    with pytest.raises(BadInput, match=r"^--loss fused: there is no kernel \(no compiler\); use --loss auto"):
        chosen("fused")


def test_auto_is_the_fused_loss_where_there_is_a_kernel():
    """Where a compiler is, the build must not fail silently."""
    if not (shutil.which("g++") or shutil.which("c++")) or not shutil.which("ninja"):
        pytest.skip("no C++ compiler or no ninja")
    assert chosen("auto") == chosen("fused") == "fused (C++)"


def test_label_smoothing_gives_a_share_of_each_label_to_all_classes_alike():
    """Szegedy et al. 2016, section 7: the label is (1 − ε)·one-hot + ε / C. Rows without a label stay out."""
    generator = torch.Generator().manual_seed(5)
    student, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 3, NO_LABEL, 1, 1, NO_LABEL])
    smoothed = 0.7 * F.one_hot(labels.clamp(min=0), 4) + 0.3 / 4
    expected = -(smoothed * F.log_softmax(student, 1))[labels != NO_LABEL].sum() / 6
    assert torch.allclose(kd_loss(student, None, labels, 1.0, 0.0, label_smoothing=0.3), expected)


def test_the_flag_names_every_method():
    assert config.METHODS == tuple(METHODS)


# ---- the methods ---------------------------------------------------------------------------------------

ROWS_MEET = {"dist", "pkt", "rkd"}
EVERY_FLAG = [*((name, False) for name in METHODS), ("kd", True), ("dkd", True), ("dist", True)]


def case(rows: int = 6, columns: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, labels), float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student, teacher, torch.randint(0, columns, (rows,), generator=generator)


# ---- values, against independent NumPy -----------------------------------------------------------------

def softmax(z):
    e = np.exp(z)
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def without_label(z, labels):
    """Each row without the column of its label, `(B, C − 1)`."""
    return np.array([np.delete(row, label) for row, label in zip(z, labels)])


def numpy_hard(s, t, y, T):
    return -np.log(softmax(s))[np.arange(len(s)), t.argmax(1)].mean()


def numpy_dkd(s, t, y, T):
    rows = np.arange(len(s))
    p, q = softmax(t / T)[rows, y], softmax(s / T)[rows, y]
    tckd = kl(np.stack([p, 1 - p], 1), np.stack([q, 1 - q], 1))
    nckd = kl(softmax(without_label(t, y) / T), softmax(without_label(s, y) / T))
    return T * T * (tckd + 8 * nckd).mean()


def numpy_nkd(s, t, y, T):
    rows = np.arange(len(s))
    target = -softmax(t)[rows, y] * np.log(softmax(s)[rows, y])
    others = -(softmax(without_label(t, y) / T) * np.log(softmax(without_label(s, y) / T))).sum(1)
    return (target + 1.5 * T * T * others).mean()


def numpy_dist(s, t, y, T):
    p, q = softmax(t / T), softmax(s / T)
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))])
    columns = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])])
    return 2 * rows + 2 * columns


def numpy_pkt(s, t, y, T):
    total = 0.0
    for i in range(len(s)):
        others = [j for j in range(len(s)) if j != i]

        def near(h):
            kernel = np.array([(1 + h[i] @ h[j] / np.linalg.norm(h[i]) / np.linalg.norm(h[j])) / 2 for j in others])
            return kernel / kernel.sum()

        total += kl(near(t), near(s))
    return 30_000 / 64 * total / len(s)


def numpy_rkd(s, t, y, T):
    def huber(x):
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    rows = range(len(s))
    pairs = [(i, j) for i in rows for j in rows if i < j]
    triples = [(i, j, k) for i in rows for j in rows for k in rows if len({i, j, k}) == 3]

    def distances(h):
        d = np.array([np.linalg.norm(h[i] - h[j]) for i, j in pairs])
        return d / d.mean()

    def angle(h, i, j, k):
        a, b = h[i] - h[j], h[k] - h[j]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    distance = np.mean([huber(x) for x in distances(s) - distances(t)])
    angles = np.mean([huber(angle(s, *triple) - angle(t, *triple)) for triple in triples])
    return 25 * distance + 50 * angles


def numpy_simkd(s, t, y, T):
    return ((s - t) ** 2).mean()


def numpy_kd(s, t, y, T):
    return T * T * kl(softmax(t / T), softmax(s / T)).mean()


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_its_formula(name, T):
    student, teacher, labels = case()
    expected = globals()[f"numpy_{name}"](student.numpy(), teacher.numpy(), labels.numpy(), T)
    assert expected > 0.01
    # the 1e-8 beside dist's norms
    assert METHODS[name](student, teacher, labels, T).item() == pytest.approx(expected, rel=1e-6 if name == "dist"
                                                                              else 1e-10)


@pytest.mark.parametrize("name", METHODS)
def test_each_gradient_is_that_of_its_value(name):
    student, teacher, labels = case()
    assert torch.autograd.gradcheck(lambda s: METHODS[name](s, teacher, labels, 2.0), student.requires_grad_())


# ---- what the formulas imply ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "pkt", "rkd", "simkd"])
def test_the_minimum_is_0_where_student_and_teacher_are_equal(name):
    _, teacher, labels = case()
    loss, gradient = loss_and_gradient(METHODS[name], teacher.clone(), teacher, labels, 2.0)
    assert abs(loss) < 1e-6 and gradient.abs().max() < 1e-6
    nearby = teacher + 1e-2 * case(seed=1)[0]
    assert METHODS[name](nearby, teacher, labels, 2.0) > 1e-7


def test_the_second_term_of_nkd_is_least_where_the_other_classes_are_equal():
    """There it is γ·T² times their entropy. The first term has its infimum elsewhere: at certainty."""
    _, teacher, labels = case()
    p = softmax(without_label(teacher.numpy(), labels.numpy()) / 2.0)
    equal = losses.nkd(teacher, teacher, labels, 2.0)
    first = (teacher.softmax(1) * -teacher.log_softmax(1)).gather(1, labels[:, None]).mean()
    assert (equal - first).item() == pytest.approx(-1.5 * 4 * (p * np.log(p)).sum(1).mean(), rel=1e-12)
    others = partial(losses.nkd, gamma=1.0)
    certain = teacher.scatter(1, labels[:, None], 40.0)     # the same among the others, and q_y = 1
    _, gradient = loss_and_gradient(others, certain, teacher, labels, 2.0)
    assert gradient.abs().max() < 1e-6


def test_the_infimum_of_hard_is_0_where_the_student_is_certain_of_the_teachers_class():
    _, teacher, labels = case()
    certain = 1e3 * F.one_hot(teacher.argmax(1), 5).double()
    loss, gradient = loss_and_gradient(losses.hard, certain, teacher, labels, 1.0)
    assert loss == 0 and gradient.abs().max() == 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 999), T=st.sampled_from([0.5, 1.0, 4.0]), columns=st.integers(3, 12))
def test_the_two_parts_of_dkd_make_up_the_kl(seed, T, columns):
    """KL(p‖q) = TCKD + (1 − p_y)·NCKD, one row at a time."""
    student, teacher, labels = case(5, columns, seed)
    for row in range(5):
        s, t, y = student[row:row + 1], teacher[row:row + 1], labels[row:row + 1]
        tckd, nckd = losses.dkd(s, t, y, T, alpha=1, beta=0), losses.dkd(s, t, y, T, alpha=0, beta=1)
        p_label = (t / T).softmax(1)[0, y]
        assert (tckd + (1 - p_label) * nckd).item() == pytest.approx(losses.kd(s, t, y, T).item(), rel=1e-6, abs=1e-12)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_correlations_do_not_see_the_scale_and_the_shift_of_a_row_of_probabilities(seed, scale, shift):
    p, q = (z.softmax(1) for z in case(seed=seed)[:2])
    expected = losses._correlation(p, q)
    torch.testing.assert_close(losses._correlation(p, scale * q + shift), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses._correlation(scale * p + shift, q), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_standardisation_does_not_see_the_scale_and_the_shift_of_a_row(seed, scale, shift):
    z = case(seed=seed)[0]
    torch.testing.assert_close(standardise(scale * z + shift), standardise(z), rtol=1e-7, atol=1e-9)
    assert standardise(z).mean(1).abs().max() < 1e-12
    torch.testing.assert_close(standardise(z).square().mean(1), torch.ones(len(z), dtype=z.dtype))


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_that_is_given_twice_has_the_same_loss_where_rows_do_not_meet(name):
    student, teacher, labels = case()
    once = METHODS[name](student, teacher, labels, 2.0).item()
    twice = METHODS[name](torch.cat([student] * 2), torch.cat([teacher] * 2), torch.cat([labels] * 2), 2.0).item()
    same = twice == pytest.approx(once, rel=1e-6)
    assert same == (name not in ("pkt", "rkd"))     # a column of `dist` given twice has the same correlation


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_have_the_loss_of_one_where_rows_do_not_meet(name):
    student, teacher, labels = case(8)
    halves = [METHODS[name](student[rows], teacher[rows], labels[rows], 2.0).item() for rows in (slice(4), slice(4, 8))]
    whole = METHODS[name](student, teacher, labels, 2.0).item()
    assert (np.mean(halves) == pytest.approx(whole, rel=1e-9)) == (name not in ROWS_MEET)


@pytest.mark.parametrize("name", ["pkt", "rkd"])
def test_relations_may_be_compared_between_features_of_different_widths(name):
    student, teacher, labels = case(6, 5)
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0][:5]
    assert METHODS[name](student @ rotation, student, labels, 1.0).item() == pytest.approx(0, abs=1e-9)
    assert METHODS[name](student @ rotation, teacher, labels, 1.0) > 0.01


# ---- edges ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "hard"])
def test_a_class_that_both_rule_out_counts_for_nothing(name):
    student, teacher, labels = case(6, 5)
    labels %= 4
    student[:, 4] = teacher[:, 4] = -INF
    loss, gradient = loss_and_gradient(METHODS[name], student, teacher, labels, 2.0)
    expected, inner = loss_and_gradient(METHODS[name], student[:, :4], teacher[:, :4], labels, 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient[:, :4], inner)
    assert (gradient[:, 4] == 0).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("student", ["random", "constant"])
def test_constant_rows_and_columns_give_finite_losses_and_gradients(name, student):
    s, _, labels = case()
    s = s if student == "random" else torch.ones_like(s)
    for t in (torch.ones_like(s), torch.arange(5.0, dtype=s.dtype).expand(6, 5), torch.zeros_like(s)):
        loss, gradient = loss_and_gradient(METHODS[name], s, t, labels, 2.0)
        assert loss.isfinite() and gradient.isfinite().all()
    assert standardise(torch.ones(2, 5)).eq(0).all()


def test_two_pictures_with_the_same_features_do_not_blow_up_the_gradient_of_rkd():
    student, teacher, labels = case(8, 5)
    student[1] = student[0]
    for twin in (teacher, torch.cat([teacher[:1], teacher[:1] + 1e-7, teacher[2:]])):
        loss, gradient = loss_and_gradient(losses.rkd, student, twin, labels, 1.0)
        assert gradient.norm() < 1e3


def test_a_constant_row_or_column_has_no_correlation():
    _, teacher, labels = case()
    assert losses.dist(torch.zeros_like(teacher), teacher, labels, 1.0).item() == pytest.approx(4, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_short_last_batch_gives_a_finite_loss(name, rows):
    """Of two pictures, pkt and rkd have nothing to compare: the loss is 0."""
    student, teacher, labels = case(rows)
    loss, gradient = loss_and_gradient(METHODS[name], student, teacher, labels, 2.0)
    assert loss.isfinite() and gradient.isfinite().all() and loss >= -1e-9
    if name in ("pkt", "rkd"):
        assert loss < 1e-20 and gradient.abs().max() < 1e-10


def test_with_two_classes_dist_is_exact_and_dkd_nkd_and_standardise_are_refused():
    student, teacher, labels = case(6, 2)
    expected = numpy_dist(student.numpy(), teacher.numpy(), labels.numpy(), 1.0)
    assert losses.dist(student, teacher, labels, 1.0).item() == pytest.approx(expected, rel=1e-6)
    choose = partial(losses.choose, kd_loss, "auto", CPU, 1.0, 0.5, 2, True)
    for name in sorted(NEED_LABELS):
        with pytest.raises(BadInput, match=f"^--method {name}: compares the classes that are not the label's"):
            choose(method=name)
    with pytest.raises(BadInput, match="^--standardise: of 2 standardised logits only their order is left"):
        choose(standardised=True)


# ---- the loss of a run ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, standardised", EVERY_FLAG)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast_before_anything_else(name, standardised, dtype):
    student, teacher, labels = case(6, 9)
    s, t = student.to(dtype), teacher.to(dtype)
    loss = partial(method_loss, labels=labels % 5, method=name, classes=5, temperature=2.0, kd_weight=0.5,
                   standardised=standardised)
    assert torch.equal(loss(s, t), loss(s.float(), t.float())) and loss(s, t).dtype == torch.float32


@pytest.mark.parametrize("name, standardised", EVERY_FLAG)
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_weight_is_the_methods_share_and_label_smoothing_is_of_the_cross_entropy(name, standardised, weight):
    outputs, teacher, labels = case(6, 9)
    labels %= 5
    s, t = (outputs[:, 5:], teacher[:, 5:]) if name in ON_FEATURES else (outputs, teacher)
    if name not in ON_FEATURES:
        outputs, teacher, s, t = (x[:, :5] for x in (outputs, teacher, s, t))
    if standardised:
        s, t = standardise(s), standardise(t)
    ce = F.cross_entropy(outputs[:, :5], labels, label_smoothing=0.1)
    loss = method_loss(outputs, teacher, labels, method=name, classes=5, temperature=2.0, kd_weight=weight,
                       label_smoothing=0.1, standardised=standardised)
    expected = (1 - weight) * ce + weight * METHODS[name](s, t, labels, 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["kd", "hard", "dist", "pkt", "rkd", "simkd"])
def test_a_row_without_a_label_has_the_method_but_no_cross_entropy(name):
    outputs, teacher, labels = case(6, 9)
    labels %= 5
    partly = labels.clone()
    partly[[1, 4]] = NO_LABEL
    loss = partial(method_loss, outputs, teacher, method=name, classes=5, temperature=2.0)
    if name not in ON_FEATURES:
        loss = partial(method_loss, outputs[:, :5], teacher[:, :5], method=name, classes=5, temperature=2.0)
    ce = F.cross_entropy(outputs[:, :5], partly, ignore_index=NO_LABEL, reduction="sum") / 6
    expected = 0.5 * ce + 0.5 * loss(labels, kd_weight=1.0)
    assert loss(partly, kd_weight=0.5).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("flags, line", [
    (dict(method="dkdd"), "--method dkdd: not one of its values; did you mean dkd"),
    (dict(temperature=1e200), r"--temperature 1e\+200: must be at most 1000 and above 0"),
    (dict(method="pkt", standardise=True), "--standardise: does not go with --method pkt, only with kd, dkd and dist"),
    (dict(method="nkd", standardise=True), "--standardise: does not go with --method nkd, only with kd, dkd and dist"),
    (dict(method="pkt", batch_size=2), "--batch-size 2: --method pkt compares the pictures"),
    (dict(method="dist", topk=2), "--topk 2: --method dist needs all of the teacher's outputs"),
    (dict(standardise=True, topk=2), "--topk 2: --standardise needs all of the teacher's outputs"),
    (dict(method="simkd", loss="fused"), "--loss fused: --method simkd has no fused loss; use --loss auto"),
    (dict(method="dkd", labels=9), "--method dkd: needs the label of every picture"),
    (dict(method="nkd", unlabelled="others"), "--method nkd: needs the label of every picture"),
    (dict(method="rkd", kd_weight=1.0), "--kd-weight 1: --method rkd compares features only"),
])
def test_flags_that_do_not_go_together_are_refused_before_anything_is_loaded(tiny, flags, line):
    with pytest.raises(BadInput, match=f"^{line}"):
        train.main(dataclasses.replace(tiny, dataset="/nowhere", **flags))


# ---- whole runs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, standardised", [("kd", True), ("dkd", False), ("rkd", False), ("simkd", False)])
def test_a_stopped_run_with_a_method_ends_with_the_same_bits(tiny, name, standardised):
    """And its second run asks the teacher nothing: features, too, are read from disk."""
    config = dataclasses.replace(tiny, method=name, standardise=standardised, teacher_epochs=0, views=0)
    whole = dataclasses.replace(config, out=config.out + "-whole")
    result = train.main(whole)
    assert result["teacher_batches"] == 10

    stop_at_step(config, 8)                     # in the second epoch
    again = train.main(dataclasses.replace(config, resume=True))
    one, other = (checkpoint.read(Path(each.out) / "last.ckpt") for each in (whole, config))
    identical(one, other)
    assert again["student"] == result["student"] and again["teacher_batches"] == 0


def test_the_other_methods_on_logits_train_each_in_its_own_way(tiny):
    """They share their teacher's stored answers, and differ in what the student makes of them."""
    trained = {}
    for name in ("kd", "hard", "nkd", "dist"):
        out = Path(f"{tiny.out}-{name}")
        result = train.main(dataclasses.replace(tiny, method=name, teacher_epochs=0, views=1, epochs=1, out=str(out)))
        assert result["teacher_batches"] == (5 if name == "kd" else 0)
        trained[name] = json.loads((out / "metrics.jsonl").read_text())["train_loss"]
    assert len(set(trained.values())) == 4
