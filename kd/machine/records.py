"""The log of a run: metrics.jsonl (one object an epoch) and TensorBoard events, both from the same history."""

import json
import time
from pathlib import Path
from typing import Any

from kd import one_line
from kd.machine import distributed
from kd.machine.files import write_atomic


class Records:
    """Writes the history of a run's epochs to `out`."""

    def __init__(self, out: Path) -> None:
        self.path, self.board = out / "metrics.jsonl", out / "tensorboard"
        self._events = self.board / f"events.out.tfevents.{time.time_ns()}.kd"      # of this process
        self._fault = ""        # why there are no more of them

    def write(self, history: list[dict[str, Any]]) -> None:
        """Write the history, whose last entry is new. Only rank 0 does. Raises TrainingFault where the disk is full.

        metrics.jsonl is written anew rather than appended to: after a crash it then holds what the checkpoint holds,
        no epoch twice and none lost. For the same reason each process begins TensorBoard's events again, in a file of
        its own. Where TensorBoard fails, a line says so, and the run goes on without.
        """
        if distributed.rank():
            return
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in history).encode())
        if not self._fault:
            try:
                self._write_events(history)
            except Exception as error:      # protobuf, for example, raises TypeErrors of its own
                self._fault = one_line(error)
                print(f"no more TensorBoard events: {self._fault}")

    def _write_events(self, history: list[dict[str, Any]]) -> None:
        """Each number of an epoch is a scalar, such as student/accuracy.

        torch's SummaryWriter would load TensorFlow where that is installed, and write in a thread of its own, which
        prints a traceback where it cannot.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        new, events = history[-1:], []
        if not self._events.exists():
            self.board.mkdir(exist_ok=True)
            for old in self.board.glob("events.*"):
                old.unlink()
            new, events = history, [Event(file_version="brain.Event:2")]
        for entry in new:
            scalars = [{"tag": f"{entry['role']}/{name}", "simple_value": value} for name, value in entry.items()
                       if name not in ("epoch", "time") and isinstance(value, (int, float))]
            events.append(Event(wall_time=entry["time"], step=entry["epoch"], summary={"value": scalars}))
        with open(self._events, "ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())
