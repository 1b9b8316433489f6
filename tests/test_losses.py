"""The reference loss against its formula, its arguments' checks, and the choice between it and the fused loss."""
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd import BadInput
from kd.fast import fused_loss
from kd.fast.fused_loss import fused_kd_loss
from kd.losses import NO_LABEL, choose, kd_loss
from tests.helpers.loss_cases import DEVICES, INF, logits, loss_and_gradient

CPU = torch.device("cpu")


# --- the formula -----------------------------------------------------------------------------------------------------


def test_reference_is_the_formula():
    s, t, labels = logits(5, 4)
    s, t, T, w = s.double(), t.double(), 3.0, 0.3
    p, q = torch.softmax(t / T, 1), torch.softmax(s / T, 1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        expected = expected - (1 - w) * torch.log_softmax(s[i], 0)[labels[i]] / 5
        expected = expected + w * T * T * sum(p[i, j] * (p[i, j].log() - q[i, j].log()) for j in range(4)) / 5
    assert kd_loss(s, t, labels, T, w).item() == pytest.approx(float(expected), rel=1e-12)


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


def test_reference_takes_class_probabilities():
    s, t, labels = logits(6, 5)
    hard = kd_loss(s, t, labels, 4.0, 0.5)
    assert kd_loss(s, t, F.one_hot(labels, 5).float(), 4.0, 0.5).item() == pytest.approx(hard.item(), rel=1e-6)


def test_a_row_of_zero_probabilities_has_no_label():
    s, t, labels = logits(6, 5)
    probabilities = F.one_hot(labels, 5).float()
    labels[2], probabilities[2] = NO_LABEL, 0
    (a, ga), (b, gb) = (loss_and_gradient(kd_loss, s, t, y, 4.0, 0.5) for y in (labels, probabilities))
    torch.testing.assert_close((a, ga), (b, gb), rtol=1e-6, atol=1e-8)


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


# --- rows without a label, of both losses ----------------------------------------------------------------------------


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
    """As ranks and --accumulate count them."""
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [kd_loss, fused_kd_loss])
def test_without_labels_and_without_a_teacher_loss_and_gradient_are_0(f, device):
    s, t, labels = (x.to(device) for x in logits(4, 9))
    loss, g = loss_and_gradient(f, s, None, torch.full_like(labels, NO_LABEL), 4.0, 0.0)
    assert loss == 0 and (g == 0).all() and g.shape == (4, 9)
    for weight in (0.0, 0.5, 1.0):  # and so they are of a batch of no rows
        loss, g = loss_and_gradient(f, s[:0], t[:0], labels[:0], 4.0, weight)
        assert loss == 0 and g.shape == (0, 9)


# --- bad input, of both losses ---------------------------------------------------------------------------------------

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
])
def test_bad_input_names_argument_and_value(f, error, name, value, shown):
    with pytest.raises(error) as caught:
        f(**{**GOOD, name: value})
    assert str(caught.value).startswith(name) and shown in str(caught.value) and "\n" not in str(caught.value)


# --- the choice ------------------------------------------------------------------------------------------------------


def chosen(loss: str, num_classes: int = 3, soft_labels: bool = False, kernels: bool = True) -> str:
    """The name of the chosen loss, which is checked to compute the loss with its T and λ."""
    loss_fn, name = choose(loss, CPU, 4.0, 0.3, num_classes, soft_labels, kernels)
    s, t, labels = logits(6, num_classes)
    f = fused_kd_loss if name.startswith("fused") else kd_loss
    assert torch.equal(loss_fn(s, t, labels), f(s, t, labels, 4.0, 0.3))
    return name


def test_the_reference_is_chosen_where_it_was_ordered_or_nothing_else_will_do():
    assert chosen("reference") == "reference"
    assert chosen("auto", soft_labels=True) == "reference"
    assert chosen("auto", kernels=False) == "reference"


def test_auto_is_the_fused_loss_where_there_is_a_kernel():
    """Where a compiler is, the build must not fail silently."""
    if not (shutil.which("g++") or shutil.which("c++")) or not shutil.which("ninja"):
        pytest.skip("no C++ compiler or no ninja")
    assert chosen("auto") == chosen("fused") == "fused (C++)"


def test_without_a_kernel_auto_takes_the_closed_form_only_for_many_classes_and_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(fused_loss, "_kernels", {"cpu": ("closed form", "no compiler")})
    assert chosen("auto", 3) == "reference"
    assert chosen("auto", 1000) == "fused (closed form)"
    assert chosen("fused", 3) == "fused (closed form, since there is no kernel: no compiler)"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("loss, soft_labels, kernels, message", [
    ("fast", False, True, "--loss fast: must be auto, reference or fused"),
    ("fused", True, True, "--loss fused: takes class labels only"),
    ("fused", False, False, "--loss fused: .*--kernels off"),
])
def test_an_order_that_cannot_be_met_is_bad_input(loss, soft_labels, kernels, message):
    with pytest.raises(BadInput, match=message):
        choose(loss, CPU, 4.0, 0.5, 3, soft_labels, kernels)


def test_label_smoothing_gives_a_share_of_each_label_to_all_classes_alike():
    """Szegedy et al. 2016, section 7: the label is (1 − ε)·one-hot + ε / C. Rows without a label stay out."""
    generator = torch.Generator().manual_seed(5)
    student, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 3, NO_LABEL, 1, 1, NO_LABEL])
    smoothed = 0.7 * F.one_hot(labels.clamp(min=0), 4) + 0.3 / 4
    expected = -(smoothed * F.log_softmax(student, 1))[labels != NO_LABEL].sum() / 6
    assert torch.allclose(kd_loss(student, None, labels, 1.0, 0.0, label_smoothing=0.3), expected)
    # the same as probabilities, which mixup gives; a row of zeros has no label
    probabilities = F.one_hot(labels.clamp(min=0), 4) * (labels != NO_LABEL)[:, None].float()
    assert torch.allclose(kd_loss(student, None, probabilities, 1.0, 0.0, label_smoothing=0.3), expected)
    loss_fn, name = choose("auto", CPU, 1.0, 0.0, 4, soft_labels=False, kernels=True, label_smoothing=0.3)
    assert name == "reference" and torch.allclose(loss_fn(student, None, labels), expected)
    with pytest.raises(BadInput, match="--loss fused: knows no --label-smoothing"):
        choose("fused", CPU, 1.0, 0.0, 4, soft_labels=False, kernels=True, label_smoothing=0.3)
