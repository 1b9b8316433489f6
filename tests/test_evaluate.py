"""Scores against values worked out by hand, and against torch where it has the same quantity."""

import numpy as np
import torch
import torch.nn.functional as F

from kd.scores import calibration_error, chance_level, confusion_matrix, macro_f1, scores


def test_scores_of_a_small_case():
    logits = np.log(np.array([[.7, .2, .1], [.1, .8, .1], [.5, .3, .2], [.2, .2, .6]], np.float32))
    labels = np.array([0, 1, 1, 2])
    teacher = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    result = scores(logits, labels, teacher)
    assert result["correct"] == 3 and result["total"] == 4 and result["accuracy"] == 0.75
    assert result["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]  # row: the true class
    assert np.isclose(result["macro_f1"], (2 / 3 + 2 / 3 + 1) / 3)
    assert np.isclose(result["loss"], -np.mean(np.log([.7, .8, .3, .6])))
    assert result["agreement_with_teacher"] == 0.75


def test_the_loss_is_the_cross_entropy_also_for_huge_logits():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(0, 300, (50, 7)).astype(np.float32), generator.integers(0, 7, 50)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    assert np.isclose(scores(logits, labels)["loss"], expected, rtol=1e-12)


def test_a_class_that_is_never_met_or_predicted_counts_zero():
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 0, 1]), 3)
    assert confusion.tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert np.isclose(macro_f1(confusion), 2 / 3)


def test_calibration_error_by_hand():
    confidence, correct = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert np.isclose(calibration_error(confidence, correct), 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1 - 0.55))
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_chance_is_the_largest_class_and_two_standard_errors():
    assert np.isclose(chance_level(np.array([0] * 50 + [1] * 50)), 0.5 + 2 * 0.05)
    assert chance_level(np.array([0] * 90 + [1] * 10)) > 0.9
