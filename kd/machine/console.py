"""What a run prints: progress bars, a line an epoch, and the closing tables."""

import shutil
from typing import Any, Sequence

from torch import Tensor
from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from kd.scores import gain_lines

TABLE_CLASSES = 20  # of a confusion matrix on a terminal, or lines in its place
TABLE_COLUMNS = 40  # of a class name in it
LOSS_EVERY = 20  # steps between two losses on the bar, since reading one waits for the device


def progress(total: int, label: str, unit: str = "img", initial: int = 0) -> tqdm:
    """A bar with rate and time left on stderr. Silent where that is no terminal, and gone when it is closed."""
    # 80 × 24 for a terminal that does not know its size (of `docker exec -t`, of CI), on which tqdm draws nothing
    columns, rows = shutil.get_terminal_size()
    return tqdm(total=total, initial=initial, desc=label, unit=unit, leave=False, ncols=columns, nrows=rows,
                smoothing=0.1, disable=None)


def show_loss(bar: tqdm, step: int, loss: Tensor) -> None:
    """Every LOSS_EVERY steps, where somebody watches, put the loss on the bar."""
    if step % LOSS_EVERY == 0 and not bar.disable:
        bar.set_postfix(loss=f"{loss.item():.3f}")


def epoch_line(entry: dict[str, Any], epochs: int, kept: bool) -> str:
    """One epoch in one line. The star marks weights that are kept."""
    return (f"{entry['role']:>7} {entry['epoch']:>{len(str(epochs))}}/{epochs}  train loss {entry['train_loss']:.4f}  "
            f"validation {100 * entry['accuracy']:5.1f} % "
            f"(macro-F1 {entry['macro_f1']:.3f}, loss {entry['loss']:.3f})  "
            f"{entry['images_per_second']:6.1f} img/s{'  *' if kept else ''}")


def teacher_line(row: dict[str, Any]) -> str:
    """How good the teacher is, before it teaches."""
    return (f"teacher: validation {100 * row['validation_accuracy']:.1f} %, test {100 * row['test_accuracy']:.1f} % "
            f"({row['test_correct']}/{row['test_total']})")


def results_table(rows: dict[str, dict[str, Any]], paired: dict[str, Any] | None) -> str:
    """Teacher, control and student on the test split, and what the teacher was worth.

    paired: what `kd.scores.compare_paired` says of student and control; None without a control.
    """
    lines = [f"{'':8} {'model':24} {'test accuracy':>19} {'macro-F1':>9} {'parameters':>11}"]
    for role, row in rows.items():
        counts = f"({row['test_correct']}/{row['test_total']})"
        lines.append(f"{role:8} {row['model']:24} {100 * row['test_accuracy']:7.1f} % {counts:>9} "
                     f"{row['test_macro_f1']:9.3f} {row['params']:11,}")
    return "\n".join(lines + (gain_lines(rows, paired) if paired else []))


def confusion_table(confusions: list[tuple[int, int, int]], classes: Sequence[str]) -> str:
    """The confusion matrix, as `kd.scores.confusions` gives it: a row is the true class, a column the predicted one.

    With more than TABLE_CLASSES classes, the most frequent mistakes, a line each.
    """
    if len(classes) > TABLE_CLASSES:
        mistakes = [each for each in confusions if each[0] != each[1]]
        return "\n".join([f"{sum(count for *_, count in mistakes):,} pictures are taken for another class (true → "
                          "predicted, count; the most frequent):",
                          *(f"{shortened(classes[true])} → {shortened(classes[predicted])}, {count}"
                            for true, predicted, count in mistakes[:TABLE_CLASSES])])
    counts = {(true, predicted): count for true, predicted, count in confusions}
    names = [shortened(name) for name in classes]
    width = max(disp_len(name) for name in [*names, "true class"])
    lines = [f"{'true class':{width}}  predicted as 1, 2, ..."]
    for true, name in enumerate(names):
        padding = " " * (width - disp_len(name))    # Chinese letters, for example, are two columns wide
        lines.append(f"{name}{padding}  " + " ".join(f"{counts.get((true, other), 0):5d}"
                                                     for other in range(len(names))))
    return "\n".join(lines)


def shortened(name: str) -> str:
    """A class name that fits into a table."""
    return disp_trim(name, TABLE_COLUMNS - 1) + "…" if disp_len(name) > TABLE_COLUMNS else name
