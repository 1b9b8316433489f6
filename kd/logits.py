"""The teacher's logits, kept by (view, sample) and never computed twice.

A frozen teacher gives the same logits for the same view, yet a distillation loop asks it again in every epoch: it is
most of the arithmetic of the step. Here each view of each sample is asked for once; the answer is kept in a file, so
that the next run with the same teacher, data and views does not ask at all.

One file a view holds a float32 row for each sample, and a second one a checksum for each row. A row counts only if its
checksum matches, so a row that is absent, torn by a crash, or damaged on the disk is simply not known, and is
computed again. No locks and no order of writes are needed for that, and two runs may fill the same store.

A row is the sample's C logits; or, where C is large, the k largest of them, their classes, and one value that stands
for all the others: such that they have, evenly spread, the very probability at temperature T that they had.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import zlib
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from kd import BadInput, TrainingFault

PENDING = 64 << 20  # bytes of rows that wait for `flush` at the most: what a step adds must not add up
RESIDENT = 64 << 20  # bytes of the mapped files that a process keeps resident at most


def pack(logits: Tensor, keep: int, temperature: float) -> Tensor:
    """`(B, C)` to rows `(B, 2·keep + 1)` float32: values, classes (int32, as their bits), the value of the others."""
    values, classes = logits.float().topk(keep, dim=1)
    rest = logits.float().scatter(1, classes, -math.inf)
    fill = temperature * (torch.logsumexp(rest / temperature, dim=1) - math.log(logits.shape[1] - keep))
    return torch.cat([values, classes.int().view(torch.float32), fill[:, None]], dim=1)


def spread(rows: Tensor, classes: int, temperature: float) -> Tensor:
    """`(B,)`: the probability at T of the classes that have no value of their own in what `pack` made."""
    keep = rows.shape[1] // 2
    others = rows[:, -1] / temperature + math.log(classes - keep)
    return torch.exp(others - torch.logaddexp(others, torch.logsumexp(rows[:, :keep] / temperature, dim=1)))


def unpack(rows: Tensor, classes: int) -> Tensor:
    """What `pack` made, as `(B, classes)` float32 logits."""
    keep = rows.shape[1] // 2
    full = rows[:, -1:].repeat(1, classes)
    return full.scatter_(1, rows[:, keep:2 * keep].contiguous().view(torch.int32).long(), rows[:, :keep])


class LogitStore:
    """Teacher logits by (view, sample) under `folder`, for one `key`: all that decides what they are.

    keep: how many of the C logits have their own value, the k above; 0, or C and more: all of them.
    """

    def __init__(self, folder: Path, key: dict[str, Any], samples: int, classes: int, keep: int = 0,
                 temperature: float = 1.0) -> None:
        self.classes, self.keep, self.temperature = classes, keep if keep < classes else 0, temperature
        if self.keep:
            key = {**key, "keep": keep, "temperature": temperature}
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.shape = (samples, 2 * self.keep + 1 if self.keep else classes)
        self.teacher_batches = 0  # how often the teacher was really called
        self.dropped: list[Tensor] = []  # the probability that `keep` spread, of every sample that was used
        self._views: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pending: list[tuple[int, np.ndarray, Tensor]] = []
        self._waiting = 0  # bytes of these
        self._mappings: list[mmap.mmap] = []
        self._touched = 0  # bytes, since the mappings were last trimmed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "key.json").write_text(text)
        except OSError as error:
            kind = TrainingFault if error.errno in (errno.ENOSPC, errno.EDQUOT) else BadInput
            raise kind(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}; free some space "
                       f"or choose another") from error

    def _paths(self, view: int) -> tuple[Path, Path]:
        return self.folder / f"view-{view}.f32", self.folder / f"view-{view}.sum"

    def _open(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        if view not in self._views:
            rows, sums = self._paths(view)
            self._views[view] = (self._map(rows, self.shape, np.float32), self._map(sums, self.shape[:1], np.uint64))
        return self._views[view]

    def _map(self, path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        with open(path, "a+b") as file:
            # makes a new file, mends one of another length; new bytes are zeros: not known
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            self._mappings.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return np.frombuffer(self._mappings[-1], dtype).reshape(shape)

    @staticmethod
    def _checksum(view: int, sample: int, row: np.ndarray) -> int:
        # the place is part of the sum, so a row cannot pass for another's; the top bit tells it from "never written"
        return zlib.crc32(row.tobytes(), zlib.crc32(f"{view}/{sample}".encode())) | 1 << 32

    def get(self, view: int, samples: np.ndarray) -> Tensor | None:
        """Logits `(B, C)` float32 on the host, or None unless every row is known and whole."""
        rows, sums = self._open(view)
        for sample in samples:
            if int(sums[sample]) != self._checksum(view, sample, rows[sample]):
                return None
        found = torch.from_numpy(rows[samples])
        self._touched += found.nbytes
        if self._touched > RESIDENT:
            for mapping in self._mappings:
                mapping.madvise(mmap.MADV_DONTNEED)  # unmaps them here; they stay in the kernel's page cache
            self._touched = 0
        return self._full(found) if self.keep else found

    def _full(self, rows: Tensor) -> Tensor:
        self.dropped.append(spread(rows, self.classes, self.temperature))
        return unpack(rows, self.classes)

    def put(self, view: int, samples: np.ndarray, logits: Tensor) -> Tensor:
        """Remember what the teacher gave, and return it as `get` will; copied to the host by `flush`, many at once."""
        rows = logits.float()
        if self.keep:
            rows = pack(rows, self.keep, self.temperature)
        self._pending.append((view, samples, rows))
        self._waiting += rows.nbytes
        if self._waiting > PENDING:
            self.flush()
        return self._full(rows) if self.keep else rows

    def flush(self) -> None:
        """Write what `put` remembered; called where the loop waits anyway. Raises TrainingFault: full disk."""
        if not self._pending:
            return
        everything = iter(torch.cat([rows for _, _, rows in self._pending]).cpu().numpy())  # the device waits once
        try:
            for view, samples, _ in self._pending:
                self._open(view)
                content, sums = self._paths(view)
                # written, not stored through the mapping, where a full disk would be a SIGBUS
                with open(content, "r+b", buffering=0) as rows, open(sums, "r+b", buffering=0) as checks:
                    for sample, row in zip(samples.tolist(), everything):
                        if np.isnan(row[:self.keep or self.classes]).any():
                            continue  # a fault of this moment must not be remembered
                        os.pwrite(rows.fileno(), row.tobytes(), sample * row.nbytes)
                        os.pwrite(checks.fileno(), self._checksum(view, sample, row).to_bytes(8, "little"), sample * 8)
        except OSError as error:
            raise TrainingFault(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}; free "
                                f"some space, then --resume") from error
        self._pending.clear()
        self._waiting = 0

    def dropped_share(self) -> float | None:
        """The mean probability at T of the classes without a value of their own, over all that was used."""
        return torch.cat([one.cpu() for one in self.dropped]).mean().item() if self.dropped else None

    def logits(self, view: int, samples: np.ndarray, known: Tensor | None,
               teacher: Callable[[], Tensor]) -> Tensor:
        """`known` (what `get` said, perhaps moved to the device), or else the live teacher's answer, remembered."""
        if known is not None:
            return known
        self.teacher_batches += 1
        return self.put(view, samples, teacher())
