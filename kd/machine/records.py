"""The log of a run: metrics.jsonl (one object an epoch) and TensorBoard events, both from the same history."""

import json
import time
from pathlib import Path
from typing import Any

from kd import TrainingFault, one_line
from kd.machine import distributed
from kd.machine.files import write_atomic

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
    MISSING = ""
except Exception as error:  # another version may have moved them, and protobuf raises TypeErrors of its own
    MISSING = one_line(error)


class Records:
    """Writes the history of a run's epochs to `out`."""

    def __init__(self, out: Path) -> None:
        self.path, self.board = out / "metrics.jsonl", out / "tensorboard"
        self._events: Path | None = None        # the file of this process; closed in between, so that it can be removed

    def write(self, history: list[dict[str, Any]]) -> None:
        """Write the history, whose last entry is new. Only rank 0 does. Raises TrainingFault where the disk is full.

        metrics.jsonl is written anew rather than appended to: after a crash it then holds what the checkpoint holds,
        no epoch twice and none lost. For the same reason each process begins TensorBoard's events again, in a file of
        its own.
        """
        if distributed.rank():
            return
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in history).encode())
        if MISSING:
            if len(history) == 1:
                print(f"no TensorBoard events: {MISSING}")
            return
        new = [_event(entry) for entry in history[-1:]]
        try:
            if self._events is None:
                self._events = self._begin_events()
                new = [Event(file_version="brain.Event:2"), *map(_event, history)]
            with open(self._events, "ab") as file:
                for event in new:
                    RecordWriter(file).write(event.SerializeToString())
        except OSError as error:
            raise TrainingFault(f"cannot write {self.board}: {error.strerror}; free some space, then --resume"
                                ) from error

    def _begin_events(self) -> Path:
        self.board.mkdir(exist_ok=True)
        for old in self.board.glob("events.*"):
            old.unlink()
        return self.board / f"events.out.tfevents.{time.time_ns()}.kd"


def _event(entry: dict[str, Any]) -> "Event":
    """The numbers of one epoch as TensorBoard scalars, such as student/accuracy."""
    values = [Summary.Value(tag=f"{entry['role']}/{name}", simple_value=value) for name, value in entry.items()
              if name not in ("role", "epoch", "time") and isinstance(value, (int, float))]
    return Event(wall_time=entry["time"], step=entry["epoch"], summary=Summary(value=values))
