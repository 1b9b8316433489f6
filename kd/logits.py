"""The teacher's logits on disk, by (view, sample).

A frozen teacher gives the same logits for the same view of a sample. A distillation loop that asks
it again in every epoch spends most of its arithmetic on that. So the logits of each view of each
sample are computed once and stored, and the next run with the same teacher, data and views reads
all of them.

Each view has two files: a float32 row for each sample, and a checksum for each row. A row is used
only if its checksum matches. A row that was never written, that a crash tore, or that the disk
damaged counts as absent and is computed again. So there are no locks and no order of writes, and
two runs may fill the same store.

A row is the sample's C logits, and for some methods the teacher's features behind them. With `topk` = k,
it is the k largest logits, their classes, and a fill value for the other C − k classes. The fill value
keeps their total probability at temperature T and spreads it evenly over them.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd import DISK_FULL, BadInput, TrainingFault
from kd.machine.devices import widest_float
from kd.machine.files import MappedFiles, write_at

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


def outside_probability(rows: Tensor, classes: int, temperature: float) -> Tensor:
    """Rows of `pack` to `(B,)`: the total probability at T of the classes outside the stored top k."""
    topk = rows.shape[1] // 2
    outside = rows[:, -1] / temperature + math.log(classes - topk)
    return torch.exp(outside - torch.logaddexp(outside, torch.logsumexp(rows[:, :topk] / temperature, dim=1)))


class LogitStore:
    """The logits of one teacher for one split, in a folder of their own under `folder`."""

    def __init__(self, folder: Path, key: dict[str, Any], samples: int, classes: int, topk: int = 0,
                 temperature: float = 1.0) -> None:
        """Open the store, or create it.

        key           everything that determines the logits; another key is another store
        samples       N, the size of the split
        classes       C, or with features behind the logits their number as well
        topk          how many of the C logits are stored; 0, or C and more: all of them
        temperature   T, at which the others keep their total probability

        Raises BadInput for a folder that cannot be written, TrainingFault for a full disk.
        """
        self.topk = topk if topk < classes else 0
        self.classes, self.temperature = classes, temperature
        if self.topk:
            key = {**key, "topk": topk, "temperature": temperature}
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.shape = (samples, 2 * self.topk + 1 if self.topk else classes)
        self.teacher_batches = 0    # batches whose logits were computed, not read
        self.used = 0                       # rows that were asked for
        self._dropped: Tensor | None = None     # of all of them, summed: the probability outside the top k
        self._views: dict[int, tuple[np.ndarray, np.ndarray]] = {}      # rows and checksums
        self._mapped = MappedFiles()
        self._pending: list[tuple[int, np.ndarray, Tensor]] = []        # view, samples, rows
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
        rows, checksums = self._open(view)
        for sample in samples:
            if int(checksums[sample]) != _checksum(view, sample, rows[sample]):
                return None
        stored = torch.from_numpy(rows[samples])
        self._mapped.count(stored.nbytes)
        return self._to_logits(stored)

    def put(self, view: int, samples: np.ndarray, logits: Tensor) -> Tensor:
        """Store a batch of the teacher's logits `(B, C)`; returns them float32 as `get` will.

        They stay on their device until `flush` copies many batches at once. `put` itself does not
        wait for the device, unless more than PENDING bytes have come together. Raises TrainingFault
        as `flush` does.
        """
        self.teacher_batches += 1
        rows = pack(logits, self.topk, self.temperature) if self.topk else logits.float()
        self._pending.append((view, samples, rows))
        self._pending_bytes += rows.nbytes
        if self._pending_bytes > PENDING:
            self.flush()
        return self._to_logits(rows)

    def flush(self) -> None:
        """Write what `put` collected; called where the loop waits anyway.

        Raises TrainingFault for a full disk.
        """
        if not self._pending:
            return
        # One copy to the host for all batches, so that the device is waited for only once.
        content = iter(torch.cat([rows for _, _, rows in self._pending]).cpu().numpy())
        try:
            for view, samples, _ in self._pending:
                self._open(view)
                rows, checksums = self._paths(view)
                # Not written through the mapping: on a full disk, that would kill the process (SIGBUS).
                with open(rows, "r+b") as row_file, open(checksums, "r+b") as checksum_file:
                    for sample, row in zip(samples.tolist(), content):
                        if np.isnan(row[:self.topk or self.classes]).any():
                            continue    # not stored, so that a fault of this run is not repeated
                        checksum = _checksum(view, sample, row).to_bytes(8, "little")
                        write_at(row_file.fileno(), row.tobytes(), sample * row.nbytes)
                        write_at(checksum_file.fileno(), checksum, sample * 8)
        except OSError as error:
            raise TrainingFault(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}; "
                                f"free some space, then --resume") from error
        self._pending.clear()
        self._pending_bytes = 0

    def dropped_share(self) -> float | None:
        """The mean probability at T outside the top k, over all logits used; None where all are stored."""
        return None if self._dropped is None else self._dropped.item() / self.used

    def _to_logits(self, rows: Tensor) -> Tensor:
        if not self.topk:
            return rows
        outside = outside_probability(rows, self.classes, self.temperature).sum(dtype=widest_float(rows.device))
        self.used += len(rows)
        self._dropped = outside if self._dropped is None else self._dropped.to(rows.device) + outside
        return unpack(rows, self.classes)

    def _paths(self, view: int) -> tuple[Path, Path]:
        return self.folder / f"view-{view}.f32", self.folder / f"view-{view}.sum"

    def _open(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """The mapped rows, `self.shape` float32, and checksums, `(N,)` uint64, of a view."""
        if view not in self._views:
            rows, checksums = self._paths(view)
            self._views[view] = (self._map(rows, self.shape, np.float32),
                                 self._map(checksums, self.shape[:1], np.uint64))
        return self._views[view]

    def _map(self, path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        with open(path, "a+b") as file:
            # Creates the file, or corrects its length. New bytes are zeros, which are no valid checksum.
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return self._mapped.open(file, shape, dtype)


def _checksum(view: int, sample: int, row: np.ndarray) -> int:
    """CRC-32 of a row and its place, so that no row passes for another's; never 0, which means absent."""
    return zlib.crc32(row.tobytes(), zlib.crc32(f"{view}/{sample}".encode())) | 1 << 32
