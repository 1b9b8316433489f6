"""Scores against values worked out by hand, and against torch where it has the same quantity."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd import BadInput
from kd import scores as module
from kd.scores import (bootstrap_interval, calibration_bins, calibration_error, chance_p, compare_paired,
                       confusions, format_points, gain_lines, log_softmax, macro_f1, mcnemar_p, scores, softmax)


# ---- scores of one classifier -----------------------------------------------------------------

def test_scores_of_a_small_case():
    logits = np.log(np.array([[.7, .2, .1], [.1, .8, .1], [.5, .3, .2], [.2, .2, .6]], np.float32))
    labels = np.array([0, 1, 1, 2])
    teacher = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    result = scores(logits, labels, teacher)
    assert result["correct"] == 3 and result["total"] == 4 and result["accuracy"] == 0.75
    assert confusions(labels, logits.argmax(1)) == [(0, 0, 1), (1, 0, 1), (1, 1, 1), (2, 2, 1)]
    assert np.isclose(result["macro_f1"], (2 / 3 + 2 / 3 + 1) / 3)
    assert np.isclose(result["loss"], -np.mean(np.log([.7, .8, .3, .6])))
    assert result["agreement_with_teacher"] == 0.75


def test_the_loss_is_the_cross_entropy_also_for_huge_logits():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(0, 300, (50, 7)).astype(np.float32), generator.integers(0, 7, 50)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert np.isclose(scores(logits, labels)["loss"], expected, rtol=1e-12)


def test_probabilities_are_those_of_torch_also_for_huge_logits():
    logits = np.random.default_rng(0).normal(0, 300, (50, 7)).astype(np.float32)
    expected = torch.from_numpy(logits).double()
    assert np.allclose(softmax(logits), expected.softmax(1).numpy(), rtol=1e-12, atol=0)
    assert np.allclose(log_softmax(logits), expected.log_softmax(1).numpy(), rtol=1e-12)
    assert softmax(logits).dtype == log_softmax(logits).dtype == np.float64


def test_a_class_that_is_neither_true_nor_predicted_has_no_f1():
    right = np.array([0, 0, 1])
    assert macro_f1(right, right) == 1      # sklearn.metrics.f1_score(..., average="macro") gives this as well
    assert np.isclose(macro_f1(right, np.array([0, 2, 1])), (2 / 3 + 1 + 0) / 3)
    assert confusions(right, np.array([0, 0, 2])) == [(0, 0, 2), (1, 2, 1)]


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert np.isclose(calibration_error(confidence, correct), 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1 - 0.55))
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_calibration_bins_by_hand():
    confidence, correct = np.array([0.95, 0.85, 0.1, 1.0]), np.array([True, False, True, True])
    low, high = calibration_bins(confidence, correct, bins=5)
    assert low == (0.1, 0.1, 1.0, 1)
    assert high == pytest.approx((0.9, (0.95 + 0.85 + 1) / 3, 2 / 3, 3))  # a confidence of 1 is in the last bin


def test_the_bins_of_the_diagram_are_those_of_the_calibration_error():
    generator = np.random.default_rng(0)
    confidence, correct = generator.uniform(0.2, 1, 60), generator.random(60) < 0.7
    bins = calibration_bins(confidence, correct)
    error = sum(one.samples * abs(one.accuracy - one.confidence) for one in bins) / 60
    assert error == pytest.approx(calibration_error(confidence, correct))
    assert sum(one.samples for one in bins) == 60


# ---- is the teacher good enough? --------------------------------------------------------------

def two_classes(common: tuple[int, int], rare: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of two classes, each given as (pictures of it, those that are right)."""
    labels = np.repeat([0, 1], [common[0], rare[0]])
    right = np.concatenate([np.arange(total) < correct for total, correct in (common, rare)])
    return np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)], labels


@pytest.mark.parametrize("common, rare", [
    ((40, 40), (40, 40)), ((4, 4), (4, 4)), ((297, 297), (3, 3)), ((95, 95), (5, 5)), ((99, 99), (1, 1)),   # perfect
    ((297, 297), (3, 1)), ((297, 290), (3, 2)),     # finds rare ones, even if a constant answer is right more often
    ((95, 95), (5, 2)), ((50, 40), (50, 40))])
def test_a_teacher_that_knows_something_of_the_labels_is_taken_without_a_word(common, rare):
    module.refuse_weak("t", *two_classes(common, rare), say=pytest.fail)


@pytest.mark.parametrize("common, rare, percent, constant", [
    ((297, 297), (3, 0), "99.0", "99.0"), ((50, 26), (50, 25), "51.0", "50.0"), ((8, 5), (8, 5), "62.5", "50.0"),
    ((4, 4), (4, 0), "50.0", "50.0"), ((60, 0), (40, 0), "0.0", "60.0")])
def test_a_teacher_that_may_as_well_guess_is_refused(common, rare, percent, constant):
    with pytest.raises(BadInput, match=rf"--teacher t: {percent} % on validation is near chance \(the largest class "
                                       rf"alone is {constant} %\).*go on all the same with --resume"):
        module.refuse_weak("t", *two_classes(common, rare), say=pytest.fail)


@pytest.mark.parametrize("common, rare", [
    ((2, 2), (2, 2)), ((2, 1), (2, 1)), ((5, 5), (0, 0)), ((5, 0), (1, 0)),     # a perfect teacher would not pass
    ((8, 6), (8, 6)), ((3, 3), (3, 2))])                                        # nearer to perfect than to chance
def test_too_few_pictures_refuse_nobody_but_say_so(common, rare):
    said: list[str] = []
    module.refuse_weak("t", *two_classes(common, rare), say=said.append)
    assert said == [f"teacher: {common[1] + rare[1]} of {common[0] + rare[0]} right on validation, which is too small "
                    f"or too uneven to tell a good teacher from chance"]


def test_a_teacher_of_many_classes_is_tested_against_all_of_them():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, 1000)
    guesses = generator.integers(0, 100, 1000)
    with pytest.raises(BadInput, match="near chance"):
        module.refuse_weak("t", np.eye(100)[guesses], labels, say=pytest.fail)
    guesses[:50] = labels[:50]      # six in a hundred, where one is chance
    module.refuse_weak("t", np.eye(100)[guesses], labels, say=pytest.fail)


@pytest.mark.parametrize("size, right", [(3, 3), (4, 3), (8, 6), (20, 12), (20, 14)])
def test_chance_of_two_classes_is_fishers_exact_test(size, right):
    logits, labels = two_classes((size, right), (size, right))
    ways = sum(math.comb(size, i) ** 2 for i in range(right, size + 1))
    exact = ways / math.comb(2 * size, size)
    p = chance_p(logits.argmax(1), labels, shuffles=4000)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4000


def test_a_constant_answer_is_chance_itself():
    assert chance_p(np.zeros(100, np.int64), np.repeat([0, 1], [99, 1])) == 1


# ---- what was the teacher worth? --------------------------------------------------------------

def test_mcnemar_by_hand():
    assert mcnemar_p(0, 5) == 2 / 32 and mcnemar_p(5, 0) == 2 / 32 and mcnemar_p(4, 4) == 1
    assert mcnemar_p(1, 6) == 2 * (1 + 7) / 128 and mcnemar_p(0, 0) == 1


def test_mcnemar_is_the_tail_of_a_binomial_also_for_many_images():
    for first, second in ((3, 18), (18, 3), (90, 110), (2400, 2600)):
        total = first + second
        tail = math.fsum(math.exp(math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
                                  - total * math.log(2)) for i in range(min(first, second) + 1))
        assert mcnemar_p(first, second) == pytest.approx(2 * tail, rel=1e-9)


def one_hot(correct: list[int], total: int) -> np.ndarray:
    """Logits of two classes that are right, for labels of 1, on these samples."""
    return np.eye(2, dtype=np.float32)[np.isin(np.arange(total), correct).astype(int)]


def test_two_classifiers_are_compared_on_the_same_samples():
    labels = np.ones(10, np.int64)
    first, second = one_hot([0, 1, 2, 3, 4, 5, 6], 10), one_hot([0, 1, 9], 10)
    assert compare_paired(first, second, labels) == {"gain": 0.4, "images": 4, "only_first": 5, "only_second": 1,
                                                     "p": mcnemar_p(5, 1)}
    assert compare_paired(second, first, labels)["gain"] == -0.4
    assert compare_paired(first, first, labels) == {"gain": 0, "images": 0, "only_first": 0, "only_second": 0, "p": 1}


def rows(teacher: int, control: int, student: int, total: int = 128) -> dict:
    return {role: {"test_accuracy": correct / total, "test_correct": correct, "test_total": total}
            for role, correct in (("teacher", teacher), ("control", control), ("student", student))}


def paired(only_student: int, only_control: int, total: int = 128) -> dict:
    images = only_student - only_control
    return {"gain": images / total, "images": images, "only_first": only_student, "only_second": only_control,
            "p": mcnemar_p(only_student, only_control)}


@pytest.mark.parametrize("result, pair, gain, headroom", [
    (rows(124, 107, 122), paired(18, 3),
     "gain from the teacher (student − control): +11.7 points, +15 images of 128, exact McNemar p = 0.0015",
     "headroom (teacher − control): +13.3 points: the gain can hardly be larger"),
    (rows(124, 107, 106), paired(3, 4),
     "gain from the teacher (student − control): −0.8 points, −1 image of 128, exact McNemar p = 1: within chance",
     "headroom (teacher − control): +13.3 points: the gain can hardly be larger"),
    (rows(107, 107, 107), paired(2, 2),
     "gain from the teacher (student − control): +0.0 points, +0 images of 128, exact McNemar p = 1: within chance",
     "headroom (teacher − control): +0.0 points: this teacher is no better than the control"),
    (rows(110, 100, 112), paired(12, 0),
     "gain from the teacher (student − control): +9.4 points, +12 images of 128, exact McNemar p = 0.00049",
     "headroom (teacher − control): +7.8 points: the student is better than its teacher"),
])
def test_gain_and_headroom_are_two_lines(result, pair, gain, headroom):
    assert gain_lines(result, pair) == [gain, headroom]


def test_a_difference_has_a_sign_and_no_negative_zero():
    assert [format_points(share) for share in (0.117, -0.008, 0.0, -1e-17)] == ["+11.7", "−0.8", "+0.0", "+0.0"]


def test_the_bootstrap_draws_every_axis_with_replacement():
    seen: list[np.ndarray] = []

    def statistic(*counts: np.ndarray) -> np.ndarray:
        seen.extend(counts)
        return counts[0][:, 0] / counts[0].shape[1]

    low, high = bootstrap_interval(statistic, 4, 9, draws=500)
    assert [one.shape for one in seen] == [(500, 4), (500, 9)]
    assert all((one.sum(axis=1) == one.shape[1]).all() for one in seen)
    assert low == 0 and high > 0.25  # the first of four items is drawn 0 to 4 times
    assert bootstrap_interval(statistic, 4, 9, draws=500) == [low, high]  # the same draws each time


def test_an_interval_holds_the_share_of_the_draws_that_is_its_level():
    values = np.arange(50.0) ** 2
    means: list[np.ndarray] = []

    def note(counts: np.ndarray) -> np.ndarray:
        means.append(counts @ values / 50)
        return means[-1]

    for level in (0.5, 0.95, 0.995):
        low, high = bootstrap_interval(note, 50, level=level)
        drawn = np.concatenate(means)
        assert len(drawn) % 10_000 == 0 and ((low <= drawn) & (drawn <= high)).mean() == pytest.approx(level, abs=1e-3)
        assert (drawn < low).mean() == pytest.approx((1 - level) / 2, abs=1e-3)


def test_the_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    values = np.repeat([1.0, 0.0], [100, 300])
    low, high = bootstrap_interval(lambda counts: counts @ values / 400, 400)
    deviation = (0.25 * 0.75 / 400) ** 0.5
    assert abs(low - (0.25 - 1.96 * deviation)) < 0.005 and abs(high - (0.25 + 1.96 * deviation)) < 0.005
