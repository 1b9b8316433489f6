"""Scores of a classifier from its logits: accuracy, macro-F1, NLL, calibration, agreement with the teacher.

Logits are collected once (kd/predict.py) and scored on the host in float64; nothing is averaged over batches, so a
ragged last batch weighs what it should.
"""

from typing import Any

import numpy as np

from kd import BadInput


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise, float64, stable for logits of any size."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """`(C, C)` int64: row is the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(confusion: np.ndarray) -> float:
    """The mean over classes of F1 = 2·TP / (2·TP + FP + FN); a class that is neither true nor predicted counts 0."""
    hits = np.diag(confusion)
    return float(np.mean(2 * hits / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) with `bins` equal-width bins of the top probability."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(correct[place == b].mean() - confidence[place == b].mean()) * (place == b).mean()
            for b in range(bins) if (place == b).any()]
    return float(sum(gaps))


def scores(logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None) -> dict[str, Any]:
    """All scores of logits `(N, C)` against labels `(N,)`; plain floats and lists, ready for JSON."""
    logp = log_softmax(logits)
    predicted = logits.argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, logits.shape[1])
    correct = int(np.trace(confusion))
    result = {
        "accuracy": correct / len(labels), "correct": correct, "total": len(labels),
        "macro_f1": macro_f1(confusion),
        "loss": float(-logp[np.arange(len(labels)), labels].mean()),
        "calibration_error": calibration_error(np.exp(logp.max(axis=1)), predicted == labels),
        "confusion": confusion.tolist(),
    }
    if teacher_logits is not None:
        result["agreement_with_teacher"] = float(np.mean(teacher_logits.argmax(axis=1) == predicted))
    return result


def chance_level(labels: np.ndarray) -> float:
    """The accuracy that a constant answer reaches within two standard errors: below it a teacher knows nothing."""
    share = np.bincount(labels).max() / len(labels)
    return float(share + 2 * np.sqrt(share * (1 - share) / len(labels)))


def refuse_weak(teacher: str, accuracy: float, labels: np.ndarray) -> None:
    """Raise BadInput for a teacher whose accuracy on these labels is near chance."""
    if accuracy <= chance_level(labels):
        raise BadInput(f"--teacher {teacher}: {100 * accuracy:.1f} % on validation is near chance: its soft targets "
                       f"would be noise; fine-tune it with --teacher-epochs, give trained --teacher-weights, or insist "
                       f"with --allow-weak-teacher")
