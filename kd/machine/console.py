"""What a run says: a progress bar, a line an epoch, metrics.jsonl, TensorBoard and the closing table."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Iterable

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from kd import TrainingFault
from kd.machine import distributed
from kd.machine.files import write_atomic

GREEN, RED = "32", "31"  # of ECMA-48's "select graphic rendition"


def paint(text: str, colour: str) -> str:
    """`text` in a colour, for a terminal; as it is elsewhere and under NO_COLOR (https://no-color.org)."""
    if not (sys.stdout and sys.stdout.isatty()) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


def progress(total: int, label: str, unit: str = "img", initial: int = 0) -> tqdm:
    """A bar with rate and time left on stderr; silent when that is not a terminal, gone when it is closed."""
    terminal = sys.stderr.isatty()
    # a terminal that does not know its size (of `docker exec -t`, of CI) says 0 × 0, on which tqdm draws nothing
    sized = terminal and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(total=total, initial=initial, desc=label, unit=unit, leave=False, dynamic_ncols=sized,
                ncols=None if sized else 80, nrows=None if sized else 24, smoothing=0.1, disable=not terminal)


class Records:
    """The files of a run: metrics.jsonl (one object an epoch) and TensorBoard events, from the same history."""

    def __init__(self, out: Path, earlier_seconds: float = 0.0) -> None:
        self.began = time.monotonic() - earlier_seconds
        self.path, self.board = out / "metrics.jsonl", out / "tensorboard"
        self._events: BinaryIO | None = None

    def seconds(self) -> float:
        """Wall time of the run, that of the processes before a resume included."""
        return time.monotonic() - self.began

    def write(self, history: list[dict[str, Any]]) -> None:
        """Put down the history, of which the last entry is new. Raises TrainingFault where the disk is full.

        metrics.jsonl is written anew rather than appended to: after a crash it then holds what the checkpoint holds,
        no epoch twice and none lost. For the same reason a process begins TensorBoard's events again, in its own file.
        """
        if distributed.rank():
            return
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in history).encode())
        try:
            new = history[-1:]
            if self._events is None:
                new = history
                self.board.mkdir(exist_ok=True)
                for old in self.board.glob("events.*"):
                    old.unlink()
                self._events = open(self.board / f"events.out.tfevents.{time.time_ns()}.kd", "wb")
                RecordWriter(self._events).write(Event(file_version="brain.Event:2").SerializeToString())
            for entry in new:
                values = [Summary.Value(tag=f"{entry['role']}/{name}", simple_value=value)
                          for name, value in entry.items()
                          if name not in ("role", "epoch", "time") and isinstance(value, (int, float))]
                event = Event(wall_time=entry["time"], step=entry["epoch"], summary=Summary(value=values))
                RecordWriter(self._events).write(event.SerializeToString())
            self._events.flush()
        except OSError as error:
            raise TrainingFault(f"cannot write {self.board}: {error.strerror}; free some space, then --resume"
                                ) from error


def epoch_line(entry: dict[str, Any], epochs: int, best: bool) -> str:
    """One epoch in one line; the star marks the best so far by validation accuracy."""
    return (f"{entry['role']:>7} {entry['epoch']:>{len(str(epochs))}}/{epochs}  train loss {entry['train_loss']:.4f}  "
            f"validation {100 * entry['accuracy']:5.1f} % "
            f"(macro-F1 {entry['macro_f1']:.3f}, loss {entry['loss']:.3f})  "
            f"{entry['images_per_second']:6.1f} img/s{paint('  *', GREEN) if best else ''}")


def test_row(name: str, params: int, result: dict[str, Any], validation: float) -> dict[str, Any]:
    """One model in result.json: its test scores, and the validation accuracy that its weights were chosen by."""
    row = {"model": name, "params": params, "validation_accuracy": validation}
    for key in ("accuracy", "macro_f1", "correct", "total"):
        row[f"test_{key}"] = result[key]
    return {**row, **{key: value for key, value in result.items() if f"test_{key}" not in row}}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Teacher, control and student on the test split, and what the teacher was worth."""
    lines = [f"{'':8} {'model':24} {'test accuracy':>19} {'macro-F1':>9} {'parameters':>11}"]
    for role, row in rows.items():
        counts = f"({row['test_correct']}/{row['test_total']})"
        lines.append(f"{role:8} {row['model']:24} {100 * row['test_accuracy']:7.1f} % {counts:>9} "
                     f"{row['test_macro_f1']:9.3f} {row['params']:11,}")
    if "control" in rows:
        gain = rows["student"]["test_correct"] - rows["control"]["test_correct"]
        points = 100 * (rows["student"]["test_accuracy"] - rows["control"]["test_accuracy"])
        told = paint(f"{points:+.1f} points", GREEN if gain > 0 else RED) if gain else f"{points:+.1f} points"
        lines.append(f"the teacher's gift: {told} ({gain:+d} images of {rows['student']['test_total']})")
    return "\n".join(lines)


def confusion_table(confusion: list[list[int]], classes: Iterable[str]) -> str:
    """The confusion matrix for people: a row is the true class, a column the predicted one."""
    names = list(classes)
    width = max(len(name) for name in names)
    lines = [f"{'true class':{width}}  predicted as 1, 2, ..."]
    for name, row in list(zip(names, confusion, strict=True))[:20]:
        lines.append(f"{name:{width}}  " + " ".join(f"{count:5d}" for count in row[:20]))
    return "\n".join(lines)
