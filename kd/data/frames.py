"""Pictures decoded once: the frames of a split lie in a memory-mapped file, found again by what decides them.

One file per split, valid or absent:

    N frames of R × R × 3 bytes | N CRC-32 | magic, N, R, content digest, stamp | SHA-256 of these last two

The stamp hashes everything that decides the pixels: the data's identity, the resize, the library versions.
The index is verified when the file is opened and a frame when a process first reads it, so that opening is
instant however large the file; a frame that fails is decoded again from its source. A build writes into a
temporary file under a lock: of several processes one builds and the others wait.
"""

import errno
import fcntl
import hashlib
import math
import mmap
import os
import re
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd import BadInput, TrainingFault
from kd.machine import console
from kd.data.decoding import INTERPOLATIONS, FrameSpec

TAIL = struct.Struct("<8sQQ32s32s")  # magic, N, R, content digest, stamp
MAGIC = b"kdframe1"  # its last byte is the version of this format
RESIDENT = 64 << 20  # bytes of the mapped file that a process keeps resident at most
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


class Frames:
    """The frames of one split on disk: (N, R, R, 3) uint8. Reading from several threads is safe.

    `digest` is a hash of all the pixels, `nbytes` the size of the file.
    """

    def __init__(self, path: Path, spec: FrameSpec, say: Say):
        """Raises FileNotFoundError where there is none, ValueError (saying why) where it cannot be used."""
        self.path, self._spec, self._say = path, spec, say
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            self.nbytes, self._inode = status.st_size, status.st_ino
            tail_at = self.nbytes - TAIL.size - 32
            if tail_at < 0:
                raise ValueError("is cut short")
            file.seek(tail_at)
            tail = file.read(TAIL.size)
            magic, count, side, digest, stamp = TAIL.unpack(tail)
            row = side * side * 3
            if magic != MAGIC or tail_at != count * (row + 4):
                raise ValueError("is cut short, damaged or of another version")
            file.seek(count * row)
            index = file.read(4 * count) + tail
            file.seek(-32, os.SEEK_END)
            if hashlib.sha256(index).digest() != file.read(32):
                raise ValueError("has a damaged index")
            if stamp != spec.stamp():
                raise ValueError("was made from other data or by other library versions")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.digest, self.shape = digest.hex(), (count, side, side, 3)
        self._rows = np.frombuffer(self._map, np.uint8, count * row).reshape(self.shape)
        self._checksums = np.frombuffer(index, "<u4", count)
        self._verified = np.zeros(count, bool)
        self._touched = 0  # bytes, since the mapping was last trimmed

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy frames into `out`, or into a new array: (B, R, R, 3) uint8, C-contiguous.

        Raises TrainingFault where a frame is damaged and its source has changed, so that nothing can restore
        it.
        """
        if out is None:
            out = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for row, index in zip(out, indices, strict=True):
            np.copyto(row, self._rows[index])
            if not self._verified[index]:
                self._verify(int(index) % len(self), row)
        self._touched += out.nbytes
        if self._touched > RESIDENT:
            self._map.madvise(mmap.MADV_DONTNEED)  # unmaps them here; they stay in the kernel's page cache
            self._touched = 0
        return out

    def _verify(self, index: int, row: np.ndarray) -> None:
        """Check the copy, since that is what will be used; where it is damaged, restore it and the file."""
        if zlib.crc32(row.data) == self._checksums[index]:
            self._verified[index] = True
            return
        where = self._spec.samples.where(index)
        np.copyto(row, self._spec.frame(index))
        if zlib.crc32(row.data) != self._checksums[index]:
            raise TrainingFault(f"{self.path}: frame {index} is damaged, and {where} has changed since; "
                                "delete the file and start again")
        try:
            with open(self.path, "r+b") as file:
                if os.fstat(file.fileno()).st_ino == self._inode:  # else another process has rebuilt it since
                    _write(file.fileno(), row.data, index * row.nbytes)
            self._verified[index] = True
            self._say(f"{self.path}: frame {index} did not match its checksum; decoded {where} again")
        except OSError as error:  # stays unverified: decoded at every read, slow and right
            self._say(f"{self.path}: frame {index} does not match its checksum and cannot be repaired "
                      f"({error.strerror}); decoded {where} again")


def center_crop(frames: Any, size: int) -> Any:
    """(B, R, R, 3), array or tensor → (B, size, size, 3), a view: the pixels of timm's eval transform."""
    start = round((frames.shape[1] - size) / 2)
    return frames[:, start:start + size, start:start + size]


@dataclass(frozen=True)
class Split:
    """Decoded pictures and their labels, (N,) int64."""

    frames: Frames
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def digest(self) -> str:
        """A hash of all pixels, labels and names of classes."""
        total = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.validation, self.test):
            total.update(split.frames.digest.encode() + split.labels.tobytes())
        return total.hexdigest()


def decode(dataset: Any, *, size: int, crop_pct: float, interpolation: str, cache_dir: str | Path,
           say: Say = print, progress: Progress | None = None) -> Data:
    """Find the decoded frames of every split of a `kd.data.Dataset` under `cache_dir`, or build them.

    `size`, `crop_pct` and `interpolation` are those of timm's data config. While building, `progress(done,
    total)` is called in this thread after every picture; whatever it raises stops the build, which leaves no
    file behind. Any number of processes may call this at once.

    Raises BadInput for a picture that cannot be decoded (by its name) and for a cache folder that cannot be
    written, TrainingFault for a full disk.
    """
    if not 0 < crop_pct <= 1:
        raise BadInput(f"crop_pct {crop_pct} is not a share of the picture; choose more than 0 and at most 1")
    if interpolation not in INTERPOLATIONS:
        raise BadInput(f"interpolation {interpolation!r} is unknown; choose of {', '.join(INTERPOLATIONS)}")
    folder = Path(cache_dir).expanduser()
    side = math.floor(size / crop_pct)
    splits, built, start = {}, False, time.perf_counter()
    for name, samples in dataset.splits.items():
        spec = FrameSpec(samples, size, side, interpolation)
        place = hashlib.sha256(repr((samples.place, size, interpolation)).encode()).hexdigest()
        title = re.sub(r"[^A-Za-z0-9.]+", "-", dataset.name)[-40:]
        path = folder / f"{title}-{name}-{side}px-{place[:12]}.frames"
        frames = _find(path, spec, say)
        if frames is None:
            frames, built = _build_or_wait(path, spec, say, progress), True
        splits[name] = Split(frames, samples.labels)
    if built:
        count, nbytes = sum(map(len, splits.values())), sum(split.frames.nbytes for split in splits.values())
        say(f"decoded images: {folder} holds {count:,} of {dataset.name}, {side} × {side} pixels, "
            f"{nbytes / 1e6:,.0f} MB ({time.perf_counter() - start:.1f} s); safe to delete")
    return Data(dataset.classes, **splits)


def _find(path: Path, spec: FrameSpec, say: Say) -> Frames | None:
    try:
        return Frames(path, spec, say)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        say(f"{path} {error}; decoding again")
        return None
    except OSError as error:
        raise BadInput(f"--cache-dir: {path} cannot be read ({error.strerror}); choose another") from error


def _build_or_wait(path: Path, spec: FrameSpec, say: Say, progress: Progress | None) -> Frames:
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        waiting = False
        while (lock := _lock(temporary)) is None:
            if not waiting:
                say(f"another process is decoding into {path}; waiting for it")
            waiting = True
            if progress:
                progress(0, len(spec.samples))
            time.sleep(.1)
        try:
            frames = _find(path, spec, lambda _: None)  # has it been built while this process waited?
            if frames is None:
                _build(lock, spec, path.name.rsplit("-", 2)[0], progress)
                os.rename(temporary, path)
            else:
                temporary.unlink()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return frames or Frames(path, spec, say)
    except OSError as error:
        if error.errno in FULL:
            need = len(spec.samples) * (spec.side ** 2 * 3 + 4) / 1e6
            raise TrainingFault(f"--cache-dir {path.parent}: no room for {need:,.0f} MB of decoded images "
                                f"({error.strerror}); free some, or choose another --cache-dir") from error
        raise BadInput(f"--cache-dir {path.parent} cannot be written ({error.strerror}); choose another"
                       ) from error


def _lock(temporary: Path) -> int | None:
    """Descriptor of the temporary file, locked; None while another process holds it.

    The kernel drops the lock of a process that dies, so that a file that can be locked is nobody's.
    """
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(temporary).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder renamed or removed it before our lock: take the next one


def _sweep(folder: Path) -> None:
    """Remove what killed builds left."""
    for temporary in folder.glob("*px-*.tmp"):
        lock = _lock(temporary)
        if lock is not None:
            temporary.unlink()
            os.close(lock)


def _build(descriptor: int, spec: FrameSpec, name: str, progress: Progress | None) -> None:
    """Decode every picture, in threads (Pillow lets go of the GIL), and write the whole file to the disk."""
    count, row = len(spec.samples), spec.side ** 2 * 3
    os.ftruncate(descriptor, 0)
    if hasattr(os, "posix_fallocate"):  # so that a full disk shows now, and not at the last picture
        os.posix_fallocate(descriptor, 0, count * (row + 4) + TAIL.size + 32)

    def work(index: int) -> tuple[int, bytes]:
        frame = spec.frame(index).tobytes()
        _write(descriptor, memoryview(frame), index * row)
        return zlib.crc32(frame), hashlib.sha256(frame).digest()

    checksums, content = np.zeros(count, "<u4"), hashlib.sha256(repr((count, spec.side)).encode())
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ahead: deque[Future] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        with console.progress(count, f"decoding {name}") as bar:
            for done in range(count):
                while len(ahead) < 4 * workers and done + len(ahead) < count:
                    ahead.append(pool.submit(work, done + len(ahead)))
                checksums[done], digest = ahead.popleft().result()
                content.update(digest)
                bar.update()
                if progress:
                    progress(done + 1, count)
    finally:
        pool.shutdown(cancel_futures=True)
    index = checksums.tobytes() + TAIL.pack(MAGIC, count, spec.side, content.digest(), spec.stamp())
    _write(descriptor, memoryview(index + hashlib.sha256(index).digest()), count * row)
    os.fsync(descriptor)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
