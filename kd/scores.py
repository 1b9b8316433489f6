"""Scores of a classifier from its logits, and whether the difference between two classifiers may be chance.

Logits are collected once (`kd/predict.py`) and scored on the host in float64. Nothing is averaged over
batches, so that a short last batch has the weight of its samples.
"""

import functools
from typing import Any, Callable, NamedTuple

import numpy as np

from kd import BadInput

BINS = 15            # of confidence, as in Guo et al. 2017
SIGNIFICANCE = 0.05  # a difference with a larger p is called chance


# ---- probabilities ----------------------------------------------------------------------------

def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise log-probabilities of `(N, C)`, float64, stable for logits of any size."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise probabilities of `(N, C)`, float64, stable for logits of any size."""
    unnormalized = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return unnormalized / unnormalized.sum(axis=1, keepdims=True)


# ---- scores of one classifier -----------------------------------------------------------------

def scores(logits: np.ndarray, labels: np.ndarray,
           teacher_logits: np.ndarray | None = None) -> dict[str, Any]:
    """All scores of logits `(N, C)` against labels `(N,)`, as plain numbers, ready for JSON.

    `loss` is the cross-entropy, in nats. `agreement_with_teacher` is the share of samples on which student and teacher
    predict the same class, and is there only if `teacher_logits` are given.
    """
    log_probabilities = log_softmax(logits)
    predicted = logits.argmax(axis=1)
    correct = int((predicted == labels).sum())
    result = {
        "accuracy": correct / len(labels), "correct": correct, "total": len(labels),
        "macro_f1": macro_f1(labels, predicted),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "calibration_error": calibration_error(np.exp(log_probabilities.max(axis=1)),
                                               predicted == labels),
    }
    if teacher_logits is not None:
        result["agreement_with_teacher"] = float(np.mean(teacher_logits.argmax(axis=1) == predicted))
    return result


def confusions(labels: np.ndarray, predicted: np.ndarray) -> list[tuple[int, int, int]]:
    """(true class, predicted class, count) of every pair that occurs, the most frequent first. Both `(N,)` int64."""
    pairs, counts = np.unique(np.stack([labels, predicted], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(true), int(other), int(count)) for (true, other), count in zip(pairs[order], counts[order])]


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """The mean of F1 = 2·TP / (2·TP + FP + FN) over the classes that are true or predicted somewhere.

    Other classes have no F1, and scikit-learn leaves them out as well.
    """
    classes = int(max(labels.max(), predicted.max())) + 1
    true_positives = np.bincount(labels[labels == predicted], minlength=classes)
    true_and_predicted = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    present = true_and_predicted > 0
    return float(np.mean(2 * true_positives[present] / true_and_predicted[present]))


class Bin(NamedTuple):
    """The samples whose confidence lies in one interval."""

    middle: float      # of the interval
    confidence: float  # mean
    accuracy: float
    samples: int


def calibration_bins(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> list[Bin]:
    """The samples by confidence, in equal intervals of [0, 1], without the empty ones.

    confidence: the top probability, `(N,)`; correct: whether the top class is the true one, `(N,)`.
    """
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    inside = ((b, number == b) for b in range(bins))
    return [Bin((b + 0.5) / bins, float(confidence[here].mean()), float(correct[here].mean()), int(here.sum()))
            for b, here in inside if here.any()]


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): the mean gap of accuracy and confidence.

    confidence: the top probability, `(N,)`; correct: whether the top class is the true one, `(N,)`.
    """
    gaps = [abs(each.accuracy - each.confidence) * (each.samples / len(confidence))
            for each in calibration_bins(confidence, correct, bins)]
    return float(sum(gaps))


# ---- is the teacher good enough? --------------------------------------------------------------

def refuse_weak(teacher: str, logits: np.ndarray, labels: np.ndarray, say: Callable[[str], None] = print) -> None:
    """Raise BadInput for a teacher whose answers on validation are near chance.

    logits: `(N, C)`; labels: `(N,)`. `say` gets a line where the pictures are too few to tell.
    """
    predicted, total = logits.argmax(axis=1), len(labels)
    if chance_p(predicted, labels) <= SIGNIFICANCE:
        return

    # A few pictures cannot tell a good teacher from chance. A perfect one must pass, and so must one that is nearer to
    # perfect than to chance: whose kappa (Cohen 1960) is at least 1/2.
    true, answers = np.bincount(labels), np.bincount(predicted, minlength=logits.shape[1])
    correct = int((predicted == labels).sum())
    by_chance = float(true @ answers[:len(true)]) / total
    if chance_p(labels, labels) > SIGNIFICANCE or correct >= (by_chance + total) / 2:
        say(f"teacher: {correct} of {total} right on validation, which is too small or too uneven to tell a good "
            f"teacher from chance")
        return
    constant = true.max()                       # right answers of a teacher that always names the largest class
    raise BadInput(f"--teacher {teacher}: {100 * correct / total:.1f} % on validation is near chance (the largest "
                   f"class alone is {100 * constant / total:.1f} %): its soft targets would be noise; go on all the "
                   f"same with --resume --allow-weak-teacher, or start again with more --teacher-epochs or trained "
                   f"--teacher-weights")


def chance_p(predicted: np.ndarray, labels: np.ndarray, shuffles: int = 999) -> float:
    """The probability that answers which do not depend on the labels are right as often as `predicted`, `(N,)` each.

    A permutation test (Ojala and Garriga 2010): the same answers beside shuffled labels, from a fixed seed. The answers
    themselves count among the shuffles, so that p is never too small (Phipson and Smyth 2010). A constant answer has
    p = 1. Accuracy alone would not do: where 99 % are of one class, a constant answer has 99 %, and three rare pictures
    of three found are far from chance.
    """
    generator = np.random.default_rng(0)
    correct = (predicted == labels).sum()
    as_good = sum(bool((predicted == generator.permutation(labels)).sum() >= correct) for _ in range(shuffles))
    return (as_good + 1) / (shuffles + 1)


# ---- what was the teacher worth? --------------------------------------------------------------

def compare_paired(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Two classifiers on the same samples, such as student and control; ready for JSON.

    first, second: logits `(N, C)`; labels: `(N,)`. The result has `gain`, the accuracy of the first
    minus that of the second; `images`, the same as a count; `only_first` and `only_second`, the
    samples that only one of them has right; and `p`, see `mcnemar_p`.
    """
    first_correct, second_correct = first.argmax(axis=1) == labels, second.argmax(axis=1) == labels
    only_first = int((first_correct & ~second_correct).sum())
    only_second = int((second_correct & ~first_correct).sum())
    images = only_first - only_second
    return {"gain": images / len(labels), "images": images, "only_first": only_first,
            "only_second": only_second, "p": mcnemar_p(only_first, only_second)}


def mcnemar_p(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided (McNemar 1947).

    The probability that two equally good classifiers, of which exactly one is right on
    `only_first + only_second` samples, split them at least as unevenly.
    """
    fewer, total = min(only_first, only_second), only_first + only_second
    # the lower tail of a binomial in whole numbers: `ways` is "total choose count"
    ways = tail = 1
    for count in range(fewer):
        ways = ways * (total - count) // (count + 1)
        tail += ways
    return min(1.0, 2 * tail / 2 ** total)


def gain_lines(rows: dict[str, dict[str, Any]], paired: dict[str, Any]) -> list[str]:
    """Two lines of plain text: the gain from the teacher, and the headroom that there was.

    rows: by role, as in result.json; paired: `compare_paired` of student and control.
    """
    images, total = paired["images"], rows["student"]["test_total"]
    gain = (f"gain from the teacher (student − control): {format_points(paired['gain'])} points, "
            f"{minus(f'{images:+d}')} {'image' if abs(images) == 1 else 'images'} of {total}, "
            f"exact McNemar p = {paired['p']:.2g}")
    if paired["p"] > SIGNIFICANCE:
        gain += ": within chance"

    headroom = rows["teacher"]["test_accuracy"] - rows["control"]["test_accuracy"]
    teacher, control, student = (rows[role]["test_correct"] for role in ("teacher", "control", "student"))
    if teacher <= control:
        meaning = "this teacher is no better than the control"
    elif student > teacher:
        meaning = "the student is better than its teacher"
    else:
        meaning = "the gain can hardly be larger"
    return [gain, f"headroom (teacher − control): {format_points(headroom)} points: {meaning}"]


def format_points(difference: float) -> str:
    """`+11.7`, in points, from a difference of two shares."""
    rounded = round(100 * difference, 1) + 0.0  # adding zero makes -0.0 positive
    return minus(f"{rounded:+.1f}")


def minus(number: str) -> str:
    """A number with the minus sign that is as wide as a plus."""
    return number.replace("-", "−")


AT_A_TIME = 500     # draws: all of them, as int64 or float64, would take gigabytes with tens of thousands of pictures


def bootstrap_interval(statistic: Callable[..., np.ndarray], *sizes: int, draws: int = 10_000,
                       level: float = 0.95) -> list[float]:
    """The percentile interval of a statistic, by drawing its items again (Efron 1979).

    sizes: how many items there are along each axis, such as runs and images. Each axis is drawn
    with replacement, independently of the others, from a generator with a fixed seed.
    statistic: takes one uint16 array `(some, size)` for each axis, which says how often some of the
    draws have each item, and returns the value in each of them, `(some,)`.
    level: the share of the draws within the interval.
    """
    drawn = _drawn(sizes, draws)
    values = [statistic(*(axis[first:first + AT_A_TIME] for axis in drawn)) for first in range(0, draws, AT_A_TIME)]
    limits = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return [float(limit) for limit in limits]


@functools.lru_cache(maxsize=6)     # drawing takes far longer than a statistic, and tables have many of equal sizes
def _drawn(sizes: tuple[int, ...], draws: int) -> list[np.ndarray]:
    """How often each draw has each item, `(draws, size)` uint16 for every axis."""
    generator = np.random.default_rng(0)
    drawn = [np.empty((draws, size), np.uint16) for size in sizes]
    for axis, size in zip(drawn, sizes, strict=True):
        for first in range(0, draws, AT_A_TIME):
            some = axis[first:first + AT_A_TIME]
            some[:] = generator.multinomial(size, np.full(size, 1 / size), size=len(some))
    return drawn
