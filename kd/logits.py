"""The teacher's logits on disk, by (view, sample).

A frozen teacher gives the same logits for the same view of a sample. A distillation loop that asks it again in every
epoch spends most of its arithmetic on that. So the logits of each view of each sample are computed once and stored, and
the next run with the same teacher, data and views reads all of them.

Each view has a file of rows, one for each sample: float32 numbers, and a checksum of them and their place. A row counts
only if its checksum matches. A row that was never written, that a crash tore, or that the disk damaged is absent, and
is computed again. So there are no locks and no order of writes, and two runs may fill the same store.

A row is the sample's C logits, and for some methods the teacher's features behind them. With `topk` = k, it is the k
largest logits, their classes, and a fill value for the other C − k classes. The fill value keeps their total
probability at temperature T and spreads it evenly over them.
"""

import hashlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd import DISK_FULL, BadInput, TrainingFault
from kd.machine.files import write_at

PENDING = 64 << 20      # bytes of rows that may wait for `flush`


def pack(logits: Tensor, topk: int, temperature: float) -> Tensor:
    """Logits `(B, C)` to float32 rows `(B, 2·topk + 1)`: values, classes (bits of int32), fill value."""
    values, classes = logits.float().topk(topk, dim=1)
    others = logits.float().scatter(1, classes, -math.inf)
    # C − k classes with this logit are as probable as the others: (C − k)·exp(fill/T) = Σ exp(others/T)
    fill = temperature * (torch.logsumexp(others / temperature, dim=1) - math.log(logits.shape[1] - topk))
    return torch.cat([values, classes.int().view(torch.float32), fill[:, None]], dim=1)


def unpack(rows: Tensor, classes: int) -> Tensor:
    """Rows of `pack` to logits `(B, classes)` float32."""
    topk = rows.shape[1] // 2
    logits = rows[:, -1:].repeat(1, classes)
    return logits.scatter_(1, rows[:, topk:2 * topk].contiguous().view(torch.int32).long(), rows[:, :topk])


class LogitStore:
    """The logits of one teacher for one split, in a folder of their own under `folder`."""

    def __init__(self, folder: Path, key: dict[str, Any], columns: int, topk: int = 0,
                 temperature: float = 1.0) -> None:
        """Open the store, or create it.

        key           everything that determines the logits; another key is another store
        columns       C, or with D features behind the logits C + D
        topk          how many of the C logits are stored; 0, or C and more: all of them
        temperature   T, at which the others keep their total probability

        Raises BadInput for a folder that cannot be written, TrainingFault for a full disk.
        """
        self.columns, self.temperature = columns, temperature
        self.topk = topk if topk < columns else 0
        if self.topk:
            key = {**key, "topk": topk, "temperature": temperature}
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.width = 2 * self.topk + 1 if self.topk else columns    # numbers of a row
        self.row_bytes = 4 * self.width + 4                         # and its checksum
        self.teacher_batches = 0    # batches whose logits were computed, not read
        self._files: dict[int, int] = {}                            # descriptors by view
        self._pending: list[tuple[int, np.ndarray, Tensor]] = []    # view, samples, rows
        self._pending_bytes = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "key.json").write_text(text, encoding="utf-8")
        except OSError as error:
            kind = TrainingFault if error.errno in DISK_FULL else BadInput
            raise kind(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}; "
                       f"free some space or choose another") from error

    def get(self, view: int, samples: np.ndarray) -> Tensor | None:
        """The stored logits, float32 `(B, C)` on the host; None if the row of any sample is absent."""
        file = self._file(view)
        rows = np.zeros((len(samples), self.row_bytes), np.uint8)
        for sample, row in zip(samples.tolist(), rows):
            # Read, not mapped into memory: a mapping would end the process where the disk fails.
            os.preadv(file, [row.data], sample * self.row_bytes)
            if row[-4:].tobytes() != _checksum(view, sample, row[:-4].tobytes()):
                return None
        return self._to_logits(torch.from_numpy(rows[:, :-4].copy().view(np.float32)))

    def put(self, view: int, samples: np.ndarray, logits: Tensor) -> Tensor:
        """Store a batch of the teacher's logits `(B, C)`; returns them float32 as `get` will.

        They stay on their device until `flush` copies many batches at once. `put` itself does not wait for the device,
        unless more than PENDING bytes have come together. Raises TrainingFault as `flush` does.
        """
        self.teacher_batches += 1
        rows = pack(logits, self.topk, self.temperature) if self.topk else logits.float()
        self._pending.append((view, samples, rows))
        self._pending_bytes += rows.nbytes
        if self._pending_bytes > PENDING:
            self.flush()
        return self._to_logits(rows)

    def flush(self) -> None:
        """Write what `put` collected; called where the loop waits anyway. Raises TrainingFault for a full disk."""
        if not self._pending:
            return
        # One copy to the host for all batches, so that the device is waited for only once.
        content = iter(torch.cat([rows for _, _, rows in self._pending]).cpu().numpy())
        try:
            for view, samples, _ in self._pending:
                file = self._file(view)
                for sample, row in zip(samples.tolist(), content):
                    # A NaN is not stored, so that a fault of this run is not repeated.
                    if not np.isnan(row[:self.topk or self.columns]).any():
                        numbers = row.tobytes()
                        write_at(file, numbers + _checksum(view, sample, numbers), sample * self.row_bytes)
        except OSError as error:
            raise TrainingFault(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}; "
                                f"free some space, then --resume") from error
        self._pending.clear()
        self._pending_bytes = 0

    def _to_logits(self, rows: Tensor) -> Tensor:
        return unpack(rows, self.columns) if self.topk else rows

    def _file(self, view: int) -> int:
        """The descriptor of a view's file, which is created if need be. It stays open as long as the store."""
        if view not in self._files:
            self._files[view] = os.open(self.folder / f"view-{view}.rows", os.O_RDWR | os.O_CREAT, 0o666)
        return self._files[view]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def _checksum(view: int, sample: int, row: bytes) -> bytes:
    """CRC-32 of a row and its place, so that no row passes for another's; 4 bytes. Never 0, which means absent."""
    return (zlib.crc32(row, zlib.crc32(f"{view}/{sample}".encode())) or 1).to_bytes(4, "little")
