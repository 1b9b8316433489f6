"""The teacher's logits, kept by (view, sample) and never computed twice.

A frozen teacher gives the same logits for the same view, yet a distillation loop asks it again in every epoch: it is
most of the arithmetic of the step. Here each view of each sample is asked for once; the answer is kept in a file, so
that the next run with the same teacher, data and views does not ask at all.

One file a view holds `(samples, C)` float32 rows, and a second one a checksum for each row. A row counts only if its
checksum matches, so a row that is absent, torn by a crash, or damaged on the disk is simply not known, and is
computed again. No locks and no order of writes are needed for that, and two runs may fill the same store.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from kd import BadInput


class LogitStore:
    """Rows of teacher logits by (view, sample) under `folder`, for one `key`: all that decides what they are."""

    def __init__(self, folder: Path, key: dict[str, Any], samples: int, classes: int) -> None:
        text = json.dumps(key, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.shape = (samples, classes)
        self.teacher_batches = 0  # how often the teacher was really called
        self._views: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pending: list[tuple[int, np.ndarray, Tensor]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "key.json").write_text(text)
        except OSError as error:
            raise BadInput(f"--cache-dir: cannot write the logit store {self.folder}: {error.strerror}") from error

    def _open(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        if view not in self._views:
            rows = self._map(self.folder / f"view-{view}.f32", self.shape, np.float32)
            sums = self._map(self.folder / f"view-{view}.sum", self.shape[:1], np.uint64)
            self._views[view] = rows, sums
        return self._views[view]

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with open(path, "ab") as file:
            file.truncate(size)  # makes a new file, mends one of another length; new bytes are zeros: not known
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

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
        return torch.from_numpy(rows[samples])

    def put(self, view: int, samples: np.ndarray, logits: Tensor) -> None:
        """Remember what the teacher gave; nothing is copied to the host (no synchronisation) until `flush`."""
        self._pending.append((view, samples, logits))

    def flush(self) -> None:
        """Write what `put` remembered. Called where the loop synchronises anyway."""
        for view, samples, logits in self._pending:
            rows, sums = self._open(view)
            for sample, row in zip(samples, logits.float().cpu().numpy(), strict=True):
                rows[sample] = row
                sums[sample] = self._checksum(view, sample, row)
        self._pending.clear()

    def logits(self, view: int, samples: np.ndarray, known: Tensor | None,
               teacher: Callable[[], Tensor]) -> Tensor:
        """`known` (what `get` said, perhaps moved to the device), or else the live teacher's answer, remembered."""
        if known is not None:
            return known
        self.teacher_batches += 1
        answer = teacher()
        self.put(view, samples, answer)
        return answer
