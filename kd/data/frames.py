"""Decoded pictures: every picture is decoded once, into a file of frames under --cache-dir.

A table has one file, with the pictures of all its splits:

    N frames of R × R × 3 bytes | N digests of them (BLAKE2b, 16 bytes each) | stamp (SHA-256)

The stamp is a hash of the digests and of all that decides the frames: the data, the resize, the code and the libraries
that decode. A file with another stamp is made again, whole. So is one of which a frame does not have its digest. Each
frame is checked when a process first reads it.

A file is made under a temporary name and under a lock: of several processes one decodes, and the others wait. Its name
is the same for the same place and settings, so that frames of changed pictures replace the old ones.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from PIL import Image, features

from kd import DISK_FULL, BadInput, TrainingFault
from kd.data import decoding
from kd.data.table import Table
from kd.machine import console, cores, files

AHEAD = 256                     # pictures that are decoded before the next ones are begun; their frames are in memory
FIRST_BAD = 20                  # so many bad pictures are named in the message
CODE = files.code_digest(decoding)  # frames are valid only for the code that made them

Progress = Callable[[int, int], None]


# ---- decoded data ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Split:
    """Decoded pictures and their labels: some frames of a store, in any order. A frame may occur several times."""

    store: "Store"
    rows: np.ndarray        # (N,) int64, their places in the store
    labels: np.ndarray      # (N,) int64; NO_LABEL for a picture without one

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, R, R, 3)"""
        return len(self), self.store.side, self.store.side, 3

    @property
    def digests(self) -> np.ndarray:
        """(N, 16) uint8: a hash of each frame's pixels. Equal pictures have equal ones."""
        return self.store.digests[self.rows]

    @cached_property
    def digest(self) -> str:
        """A hash of all pixels in their order, and of nothing else."""
        return _hash(self.shape, self.digests.tobytes())

    def name_of(self, row: int) -> str:
        """The picture's name for messages: its path, or its row in a table."""
        return self.store.name_of(self.rows[row])

    def read(self, rows: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy frames into `out`, or into a new array: (B, R, R, 3) uint8, C-contiguous.

        Raises TrainingFault where a frame is damaged. The file is then gone, so that the next start makes it again.
        """
        if out is None:
            out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for frame, row in zip(out, self.rows[np.asarray(rows)].tolist(), strict=True):
            self.store.read(row, frame)
        return out

    def take(self, rows: np.ndarray, labels: np.ndarray | None = None) -> "Split":
        """The pictures `rows`, int64 `(M,)`, of this split; with their labels, or with others."""
        return Split(self.store, self.rows[rows], self.labels[rows] if labels is None else labels)


@dataclass(frozen=True)
class Data:
    """A decoded data set."""

    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    unlabelled: Split | None = None     # pictures without labels, from another source

    def digest(self) -> str:
        """A hash of all pixels, labels and names of classes."""
        splits = (self.train, self.validation, self.test, self.unlabelled)
        return _hash(self.classes, [(split.digest, split.labels.tolist()) for split in splits if split])


def center_crop(frames: Any, size: int) -> Any:
    """(B, R, R, 3), array or tensor → (B, size, size, 3), a view: the pixels of timm's eval transform."""
    start = round((frames.shape[1] - size) / 2)
    return frames[:, start:start + size, start:start + size]


def decode(table: Table, *, size: int, crop_pct: float, interpolation: str, cache_dir: str | Path,
           say: Callable[[str], None] = print, progress: Progress = lambda done, total: None) -> dict[str, Split]:
    """The frames of every split of `table`, from a file under `cache_dir`, which is made if it is not there.

    `size` (pixels), `crop_pct` and `interpolation` are those of timm's data config.

    `progress(done, total)` is called in this thread after every picture that is decoded, and with done = 0 every 0.1 s
    while another process decodes. An exception from it leaves no incomplete file behind. Any number of processes may
    call this at once.

    Raises BadInput for pictures that cannot be decoded, all of them at once by their names, and for a cache folder that
    cannot be used; TrainingFault for a full disk.
    """
    side, folder = math.floor(size / crop_pct), Path(cache_dir).expanduser()
    rows = np.unique(np.concatenate(list(table.splits.values())))   # those of no split are not decoded
    settings = size, side, interpolation
    place = _hash(table.location, list(table.splits), settings)
    path = folder / f"{table.name.replace('/', '-')[-40:]}-{side}px-{place[:12]}.frames"
    key = _hash(table.fingerprint, rows.tolist(), settings, CODE, Image.__version__, features.version_codec("jpg"))
    store = Store(path, key, len(rows), side, lambda row: table.name_of(int(rows[row])))

    def frame_of(row: int) -> np.ndarray | BadInput:
        try:
            return decoding.frame_of(table.read(int(rows[row])), store.name_of(row), *settings)
        except BadInput as error:
            return error
        except OSError as error:
            return BadInput(f"{store.name_of(row)}: it cannot be read ({error.strerror})")

    content = (f"{len(rows):,} pictures of {table.name}, {side} × {side} pixels, "
               f"{len(rows) * side ** 2 * 3 / 1e6:,.0f} MB")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not store.open():
            with _lock(path, lambda: progress(0, len(rows)), say):
                if not store.open():    # another process may have made it meanwhile
                    store.build(frame_of, progress)
                    store.open()
                    say(f"decoded images: {path} holds {content}; safe to delete")
    except OSError as error:
        kind = TrainingFault if error.errno in DISK_FULL else BadInput
        raise kind(f"--cache-dir {folder} cannot hold {content} ({error.strerror}); free some room, or choose another"
                   ) from error
    return {name: Split(store, np.searchsorted(rows, chosen), table.labels[chosen])
            for name, chosen in table.splits.items()}


# ---- the file --------------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class Store:
    """The file of a table's frames; it is closed when the last split of it is gone."""

    path: Path
    key: str                            # a hash of all that decides the frames
    count: int                          # N
    side: int                           # R, in pixels
    name_of: Callable[[int], str]

    def open(self) -> bool:
        """Whether the file is there, complete, and made from these pictures with these settings and versions."""
        try:
            self.file = open(self.path, "rb")
        except FileNotFoundError:
            return False
        index = os.pread(self.file.fileno(), 16 * self.count + 64, self.count * self.side ** 2 * 3)
        digests, stamp = index[:-64], index[-64:]
        if stamp != _hash(self.key, digests).encode():
            return False
        self.digests = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        self.checked = np.zeros(self.count, bool)
        return True

    def read(self, row: int, out: np.ndarray) -> None:
        """Copy a frame into `out`, uint8 `(R, R, 3)`. Several threads may do so at once."""
        try:
            # Not mapped into memory: a mapping would end the process where the disk fails.
            whole = os.preadv(self.file.fileno(), [out.data], row * out.nbytes) == out.nbytes
        except OSError:
            whole = False
        if not whole or not (self.checked[row] or _digest_of(out) == self.digests[row].tobytes()):
            with suppress(OSError):
                self.path.unlink()
            raise TrainingFault(f"{self.path}: the frame of {self.name_of(row)} is damaged; start again (a run with "
                                "--resume), and with another --cache-dir if you may not delete this file")
        self.checked[row] = True

    def build(self, frame_of: Callable[[int], np.ndarray | BadInput], progress: Progress) -> None:
        """Decode every picture, in threads (Pillow releases the GIL), and write the whole file."""
        temporary, digests, bad = self.path.with_suffix(".tmp"), [], []
        try:
            with (open(temporary, "wb") as file, ThreadPoolExecutor(cores.usable_cores()) as pool,
                  console.progress(self.count, f"decoding {self.path.name}") as bar):
                if hasattr(os, "posix_fallocate"):      # so that a full disk shows now, and not at the last picture
                    os.posix_fallocate(file.fileno(), 0, self.count * (self.side ** 2 * 3 + 16) + 64)
                for start in range(0, self.count, AHEAD):
                    for frame in pool.map(frame_of, range(start, min(start + AHEAD, self.count))):
                        if isinstance(frame, BadInput):
                            bad.append(str(frame))
                        else:
                            file.write(frame.data)
                            digests.append(_digest_of(frame))
                        bar.update()
                        progress(len(digests) + len(bad), self.count)
                index = b"".join(digests)
                file.write(index + _hash(self.key, index).encode())
            if bad:
                raise _all_in_one(bad, self.count, self.path.with_suffix(".txt"))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _lock(path: Path, wait: Callable[[], None], say: Callable[[str], None]) -> AcquireReturnProxy:
    """The lock of a file, an empty file beside it. While another process has it, `wait` is called, which may raise."""
    lock, waiting = FileLock(path.with_suffix(".lock")), False
    while True:
        try:
            return lock.acquire(timeout=0.1)
        except Timeout:
            if not waiting:
                say(f"another process is decoding into {path}; waiting for it")
            waiting = True
            wait()


def _all_in_one(bad: list[str], total: int, path: Path) -> BadInput:
    """One bad picture is one line. Of several, the first ones follow a first line, and the file `path` has all."""
    if len(bad) == 1:
        return BadInput(bad[0])
    path.write_text("\n".join(bad), "utf-8")
    return BadInput("\n  ".join([f"{len(bad):,} of {total:,} pictures cannot be decoded. Restore, convert or remove "
                                 f"them, and start again. {path} names all of them.", *bad[:FIRST_BAD]]))


def _digest_of(frame: np.ndarray) -> bytes:
    return hashlib.blake2b(frame.data, digest_size=16).digest()


def _hash(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()
