"""What a run prints: progress bars, a line an epoch, and the closing tables."""

import os
import sys
from typing import Any, Iterable

from torch import Tensor
from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from kd.scores import gain_lines

GREEN = "32"  # of ECMA-48's "select graphic rendition"
TABLE_CLASSES = 20  # of a confusion matrix on a terminal
TABLE_COLUMNS = 40  # of a class name in it
LOSS_EVERY = 20  # steps between two losses on the bar, since reading one waits for the device


def paint(text: str, colour: str) -> str:
    """`text` in a colour on a terminal; unchanged elsewhere and under NO_COLOR (https://no-color.org)."""
    if not (sys.stdout and sys.stdout.isatty()) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def progress(total: int, label: str, unit: str = "img", initial: int = 0) -> tqdm:
    """A bar with rate and time left on stderr. Silent where that is no terminal, and gone when it is closed."""
    terminal = sys.stderr.isatty()
    # a terminal that does not know its size (of `docker exec -t`, of CI) says 0 × 0, on which tqdm draws nothing
    sized = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(total=total, initial=initial, desc=label, unit=unit, leave=False, dynamic_ncols=sized,
                ncols=None if sized else 80, nrows=None if sized else 24, smoothing=0.1, disable=not terminal)


def show_loss(bar: tqdm, step: int, loss: Tensor) -> None:
    """Every LOSS_EVERY steps, where somebody watches, put the loss on the bar."""
    if step % LOSS_EVERY == 0 and not bar.disable:
        bar.set_postfix(loss=f"{loss.item():.3f}")


def epoch_line(entry: dict[str, Any], epochs: int, kept: bool) -> str:
    """One epoch in one line. The star marks weights that are kept."""
    return (f"{entry['role']:>7} {entry['epoch']:>{len(str(epochs))}}/{epochs}  train loss {entry['train_loss']:.4f}  "
            f"validation {100 * entry['accuracy']:5.1f} % "
            f"(macro-F1 {entry['macro_f1']:.3f}, loss {entry['loss']:.3f})  "
            f"{entry['images_per_second']:6.1f} img/s{paint('  *', GREEN) if kept else ''}")


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


def confusion_table(confusion: list[list[int]], classes: Iterable[str]) -> str:
    """The confusion matrix: a row is the true class, a column the predicted one.

    A terminal has room for the first TABLE_CLASSES of them. A last line says how many are left out.
    """
    names = list(classes)
    shown = [disp_trim(name, TABLE_COLUMNS - 1) + "…" if disp_len(name) > TABLE_COLUMNS else name
             for name in names[:TABLE_CLASSES]]
    width = max(disp_len(name) for name in [*shown, "true class"])
    lines = [f"{'true class':{width}}  predicted as 1, 2, ..."]
    for name, row in zip(shown, confusion[:TABLE_CLASSES], strict=True):
        padding = " " * (width - disp_len(name))    # Chinese letters, for example, are two columns wide
        lines.append(f"{name}{padding}  " + " ".join(f"{count:5d}" for count in row[:TABLE_CLASSES]))
    if len(names) > TABLE_CLASSES:
        lines.append(f"... and {len(names) - TABLE_CLASSES:,} more classes: the whole matrix is `confusion` in "
                     "result.json, and in what python -m kd evaluate --json prints")
    return "\n".join(lines)
