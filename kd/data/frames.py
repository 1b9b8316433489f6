"""The store of frames: every picture is decoded once, into a memory-mapped file under --cache-dir.

One file per split, valid or absent:

    N frames of R × R × 3 bytes | N CRC-32 | magic, N, R, digest of the pixels, fingerprint | SHA-256

The fingerprint hashes everything that decides the pixels: the data, the resize, the code that decodes,
the library versions. The SHA-256 is that of the index, which is everything between the frames and itself.

The index is verified when the file is opened, and a frame when a process first reads it. So opening
is instant, however large the file. A damaged frame is decoded again from its source.

A file is built under a temporary name and under a lock: of several processes one builds, and the
others wait. Pictures that cannot be decoded are named all at once, and the other ones' frames are
kept for the next build (`kd/data/kept.py`).
"""

import hashlib
import math
import os
import re
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, features

from kd import DISK_FULL, BadInput, TrainingFault
from kd.data import decoding, repair
from kd.data.decoding import INTERPOLATIONS, encoded_frame, to_frame
from kd.data.kept import KeptFrames, hash_of, write_hashes
from kd.data.samples import Dataset, Samples
from kd.machine import console
from kd.machine.cores import usable_cores
from kd.machine.files import MappedFiles, code_digest, sync_folder, write_at

TAIL = struct.Struct("<8sQQ32s32s")     # magic, N, R, digest of the pixels, fingerprint
MAGIC = b"kdframe1"                     # the last byte is the version of this format
FIRST_BAD = 20                          # so many bad pictures are named in the message

# Frames are valid only for the code that made them.
CODE = code_digest(decoding, repair)

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


# Decoded data

@dataclass(frozen=True)
class FrameSpec:
    """How the pictures of one split become frames; `kd/data/decoding.py` says what a frame is."""

    samples: Samples
    size: int               # of the centre crop, in pixels
    side: int               # of the frame, in pixels
    interpolation: str      # one of INTERPOLATIONS

    def frame(self, index: int) -> np.ndarray:
        """The frame of sample `index`: (side, side, 3) uint8. Raises BadInput that names the sample."""
        return self.frame_of(self.source(index), index)

    def source(self, index: int) -> bytes | Image.Image:
        """Sample `index`, encoded, or as a picture that never was. Raises BadInput that names the sample."""
        try:
            return self.samples.read(index)
        except OSError as error:
            raise BadInput(f"{self.samples.name_of(index)}: it cannot be read ({error.strerror})") from error

    def frame_of(self, source: bytes | Image.Image, index: int) -> np.ndarray:
        """The frame of what `source(index)` gave. Raises BadInput that names the sample."""
        if isinstance(source, bytes):
            return encoded_frame(source, self.samples.name_of(index), self.size, self.side, self.interpolation)
        return to_frame(source, self.size, self.side, self.interpolation)

    def fingerprint(self) -> bytes:
        """(32,) hash of everything that decides the frames."""
        return _digest(self.samples.fingerprint, len(self.samples), *self._settings())

    def key(self) -> bytes:
        """(32,) hash of everything but the pictures that decides a frame."""
        return _digest(*self._settings())

    def _settings(self) -> tuple[Any, ...]:
        return (self.size, self.side, self.interpolation, CODE,
                Image.__version__, features.version_codec("jpg"), np.__version__)


def _digest(*values: Any) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()


class Frames:
    """The frames of one split on disk: (N, R, R, 3) uint8. Several threads may read at once.

    `digest` is a hash of all the pixels, `checksums` the CRC-32 of each frame, (N,) uint32, and `nbytes`
    the size of the file.
    """

    def __init__(self, path: Path, spec: FrameSpec, say: Say):
        """Open an existing file; `say` is told of damaged frames, whenever one is read.

        Raises FileNotFoundError where there is none, ValueError (saying why) where it cannot be
        used.
        """
        self.path, self._spec, self._say = path, spec, say
        self._mapped = MappedFiles()
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            self.nbytes, self._inode = status.st_size, status.st_ino
            tail_start = self.nbytes - TAIL.size - 32
            if tail_start < 0:
                raise ValueError("is cut short")
            file.seek(tail_start)
            tail = file.read(TAIL.size)
            magic, count, side, digest, fingerprint = TAIL.unpack(tail)
            if magic != MAGIC or tail_start != count * (side * side * 3 + 4):
                raise ValueError("is cut short, damaged or of another version")

            file.seek(count * side * side * 3)
            index = file.read(4 * count) + tail
            file.seek(-32, os.SEEK_END)
            if hashlib.sha256(index).digest() != file.read(32):
                raise ValueError("has a damaged index")
            if fingerprint != spec.fingerprint():
                raise ValueError("was made from other data, or by another version of kd or of a library")

            self.digest, self.shape = digest.hex(), (count, side, side, 3)
            self._frames = self._mapped.open(file, self.shape, np.uint8)
        self.checksums = np.frombuffer(index, "<u4", count)
        self._verified = np.zeros(count, bool)

    def __len__(self) -> int:
        return self.shape[0]

    def name_of(self, index: int) -> str:
        """The sample's name for messages."""
        return self._spec.samples.name_of(index)

    def read(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy frames into `out`, or into a new array: (B, R, R, 3) uint8, C-contiguous.

        Raises TrainingFault where a frame is damaged and its source has changed, so that nothing
        can restore it.
        """
        if out is None:
            out = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for frame, index in zip(out, indices, strict=True):
            np.copyto(frame, self._frames[index])
            if not self._verified[index]:
                self._verify(int(index) % len(self), frame)
        self._mapped.count(out.nbytes)
        return out

    def _verify(self, index: int, frame: np.ndarray) -> None:
        """Check the copy, since that is what will be used. If it is damaged, restore it and the file."""
        if zlib.crc32(frame.data) == self.checksums[index]:
            self._verified[index] = True
            return

        name = self.name_of(index)
        np.copyto(frame, self._spec.frame(index))
        if zlib.crc32(frame.data) != self.checksums[index]:
            raise TrainingFault(f"{self.path}: frame {index} is damaged, and {name} has changed since; "
                                "delete the file and start again")
        try:
            with open(self.path, "r+b") as file:
                # Otherwise another process has built the file anew.
                if os.fstat(file.fileno()).st_ino == self._inode:
                    write_at(file.fileno(), frame.data, index * frame.nbytes)
            self._verified[index] = True
            self._say(f"{self.path}: frame {index} did not match its checksum; decoded {name} again")
        except OSError as error:
            # It stays unverified: each read decodes it again, which is slow, and correct.
            self._say(f"{self.path}: frame {index} does not match its checksum and cannot be repaired "
                      f"({error.strerror}); decoded {name} again")


def center_crop(frames: Any, size: int) -> Any:
    """(B, R, R, 3), array or tensor → (B, size, size, 3), a view: the pixels of timm's eval transform."""
    start = round((frames.shape[1] - size) / 2)
    return frames[:, start:start + size, start:start + size]


@dataclass(frozen=True)
class Split:
    """Decoded pictures and their labels."""

    frames: Frames
    labels: np.ndarray      # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A decoded dataset."""

    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    unlabelled: Split | None = None     # pictures without labels, from another source

    def digest(self) -> str:
        """A hash of all pixels, labels and names of classes."""
        total = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.validation, self.test, *([self.unlabelled] if self.unlabelled else [])):
            total.update(split.frames.digest.encode() + split.labels.tobytes())
        return total.hexdigest()


# Finding and building the files

def decode(dataset: Dataset, **options: Any) -> Data:
    """The frames of train, validation and test, and those of pictures without labels if there are any.

    Options and errors are those of `decode_splits`.
    """
    return Data(dataset.classes, **decode_splits(dataset, **options))


def decode_splits(dataset: Dataset, *, size: int, crop_pct: float, interpolation: str, cache_dir: str | Path,
                  say: Say = print, progress: Progress | None = None) -> dict[str, Split]:
    """Open the frames of every split of `dataset` under `cache_dir`; build those that are not there.

    `size` (pixels), `crop_pct` and `interpolation` are those of timm's data config.

    While building, `progress(done, total)` is called in this thread after every picture. While
    another process builds, it is called with done = 0 every 0.1 s. An exception from it stops the
    build, which leaves no incomplete file behind. Any number of processes may call this at once.

    Raises BadInput for pictures that cannot be decoded, all of them at once by their names, and for a
    cache folder that cannot be written; TrainingFault for a full disk.
    """
    if not 0 < crop_pct <= 1:
        raise BadInput(f"crop_pct {crop_pct} is not a share of the picture; choose more than 0 and at most 1")
    if interpolation not in INTERPOLATIONS:
        raise BadInput(f"interpolation {interpolation!r} is unknown; choose of {', '.join(INTERPOLATIONS)}")

    folder = Path(cache_dir).expanduser()
    side = math.floor(size / crop_pct)
    specs = {name: FrameSpec(samples, size, side, interpolation) for name, samples in dataset.splits.items()}
    paths = {name: _path(folder, dataset.name, name, spec) for name, spec in specs.items()}
    kept = KeptFrames(list(paths.values()))
    splits: dict[str, Split] = {}
    bad: list[str] = []
    built, start = False, time.perf_counter()
    for name, spec in specs.items():
        frames = _open_if_valid(paths[name], spec, say)
        if frames is None:
            built = True
            try:
                frames = _build_or_wait(paths[name], spec, kept, say, progress)
            except BadPictures as error:
                bad += error.messages
                continue
        splits[name] = Split(frames, spec.samples.labels)

    list_path = _list_path(folder, dataset.name, specs)
    if bad:
        raise _all_in_one(bad, sum(map(len, dataset.splits.values())), dataset.name, list_path)
    kept.remove()
    if built:
        with suppress(OSError):
            list_path.unlink(missing_ok=True)
        count = sum(len(split) for split in splits.values())
        nbytes = sum(split.frames.nbytes for split in splits.values())
        say(f"decoded images: {folder} holds {count:,} of {dataset.name}, {side} × {side} pixels, "
            f"{nbytes / 1e6:,.0f} MB ({time.perf_counter() - start:.1f} s); safe to delete")
    return splits


class BadPictures(Exception):
    """The pictures of a split that cannot be decoded, each with its name, the reason, and what to do."""

    def __init__(self, messages: list[str]):
        super().__init__("\n".join(messages))
        self.messages = messages


def _all_in_one(bad: list[str], total: int, dataset_name: str, list_path: Path) -> BadInput:
    """One bad picture is one line. Of several, the first ones follow a first line, and a file has all."""
    if len(bad) == 1:
        return BadInput(bad[0])
    try:
        list_path.write_text("\n".join(bad) + "\n", "utf-8", "backslashreplace")
        written = f" {list_path} names all of them."
    except OSError:     # the names below are more important
        written = ""
    lines = bad[:FIRST_BAD] + ([f"… and {len(bad) - FIRST_BAD:,} more"] if len(bad) > FIRST_BAD else [])
    return BadInput("\n  ".join([
        f"{len(bad):,} of {total:,} pictures of {dataset_name} cannot be decoded. Restore, convert or remove them, and "
        f"start again; the others need not be decoded again.{written}", *lines]))


def _list_path(folder: Path, dataset_name: str, specs: dict[str, FrameSpec]) -> Path:
    """The file that names the bad pictures: one for each dataset, whatever the size of its frames."""
    digest = _digest(*(spec.samples.location for spec in specs.values())).hex()[:12]
    return folder / f"{_title(dataset_name)}-{digest}-bad-pictures.txt"


def _title(dataset_name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", dataset_name)[-40:]


def _path(folder: Path, dataset_name: str, split_name: str, spec: FrameSpec) -> Path:
    """A readable name that is the same for the same folder and settings, whatever the content.

    So frames of changed data replace the old ones.
    """
    key = repr((spec.samples.location, spec.size, spec.interpolation))
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return folder / f"{_title(dataset_name)}-{split_name}-{spec.side}px-{digest}.frames"


def _open_if_valid(path: Path, spec: FrameSpec, say: Say) -> Frames | None:
    try:
        return Frames(path, spec, say)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        say(f"{path} {error}; decoding again")
        return None
    except OSError as error:
        raise BadInput(f"--cache-dir: {path} cannot be read ({error.strerror}); choose another") from error


def _build_or_wait(path: Path, spec: FrameSpec, kept: KeptFrames, say: Say, progress: Progress | None) -> Frames:
    """Build the file at `path`, or wait for the process that is building it. Raises BadPictures."""
    temporary, lock = path.with_suffix(".tmp"), _lock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        _wait_for(lock, path, spec, say, progress)
        try:
            # Another process may have built the file while this one waited.
            if _open_if_valid(path, spec, say=lambda line: None) is None:
                kept.load(spec.key(), spec.side)
                try:
                    _build(temporary, path, spec, kept, progress)
                except OSError as error:
                    # They may take the room that the new file needs, and can be decoded again.
                    if error.errno not in DISK_FULL or not kept.give_up():
                        raise
                    _build(temporary, path, spec, kept, progress)
            return Frames(path, spec, say)
        finally:
            temporary.unlink(missing_ok=True)
            lock.release()
    except OSError as error:
        if error.errno in DISK_FULL:
            needed = len(spec.samples) * (spec.side ** 2 * 3 + 4) / 1e6
            raise TrainingFault(f"--cache-dir {path.parent}: no room for {needed:,.0f} MB of decoded images "
                                f"({error.strerror}); free some, or choose another --cache-dir") from error
        raise BadInput(f"--cache-dir {path.parent} cannot be written ({error.strerror}); choose another"
                       ) from error


def _lock(path: Path) -> FileLock:
    """The lock of the file at `path`, an empty file beside it.

    The lock file stays, since a process may wait for it. The kernel releases the lock of a process
    that dies.
    """
    return FileLock(path.with_suffix(".lock"))


def _wait_for(lock: FileLock, path: Path, spec: FrameSpec, say: Say, progress: Progress | None) -> None:
    """Acquire the lock. Calls `progress` every 0.1 s, because it raises where a signal has come."""
    waiting = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=.1 if waiting else 0)
        except Timeout:
            if not waiting:
                say(f"another process is decoding into {path}; waiting for it")
            waiting = True
            if progress:
                progress(0, len(spec.samples))


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of builds that were killed: those whose lock is free."""
    for temporary in folder.glob("*px-*.tmp"):
        try:
            with _lock(temporary).acquire(timeout=0):
                temporary.unlink(missing_ok=True)
        except Timeout:
            pass


def _build(temporary: Path, path: Path, spec: FrameSpec, kept: KeptFrames, progress: Progress | None) -> None:
    """Decode every picture, in threads (Pillow releases the GIL), and write the whole file to the disk.

    It is written as `temporary` and then renamed: to `path`, or where pictures are bad to the place
    where frames are kept. Raises BadPictures.
    """
    count, frame_bytes = len(spec.samples), spec.side ** 2 * 3
    checksums = np.zeros(count, "<u4")
    hashes = np.zeros((count, 2, 32), np.uint8)     # of the encoded picture, and of its frame
    content = hashlib.sha256(repr((count, spec.side)).encode())
    bad: list[str] = []

    with open(temporary, "wb") as file:
        descriptor = file.fileno()
        if hasattr(os, "posix_fallocate"):  # so that a full disk shows now, and not at the last picture
            os.posix_fallocate(descriptor, 0, count * (frame_bytes + 4) + TAIL.size + 32)

        def decode_one(index: int) -> tuple[int, bytes, bytes]:
            source = spec.source(index)
            encoded_hash = hash_of(source) if isinstance(source, bytes) else bytes(32)
            frame = kept.find(encoded_hash) or spec.frame_of(source, index).tobytes()
            write_at(descriptor, frame, index * frame_bytes)
            return zlib.crc32(frame), encoded_hash, hashlib.sha256(frame).digest()

        threads = usable_cores()
        ahead: deque[Future] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            with console.progress(count, f"decoding {path.name.rsplit('-', 2)[0]}") as bar:
                for done in range(count):
                    while len(ahead) < 4 * threads and done + len(ahead) < count:
                        ahead.append(pool.submit(decode_one, done + len(ahead)))
                    try:
                        checksums[done], encoded_hash, frame_hash = ahead.popleft().result()
                        hashes[done] = np.frombuffer(encoded_hash + frame_hash, np.uint8).reshape(2, 32)
                        content.update(frame_hash)
                    except BadInput as error:
                        bad.append(str(error))
                    bar.update()
                    if progress:
                        progress(done + 1, count)
        finally:
            pool.shutdown(cancel_futures=True)

        if not bad:
            index = checksums.tobytes()
            index += TAIL.pack(MAGIC, count, spec.side, content.digest(), spec.fingerprint())
            write_at(descriptor, index + hashlib.sha256(index).digest(), count * frame_bytes)
            os.fsync(descriptor)

    # Complete files need the hashes as well, in case that another split has bad pictures: a picture that is removed
    # changes what is carved from train.
    _put_in_place(temporary, path.with_suffix(".partial") if bad else path, kept)
    with suppress(OSError):     # without them, the frames are decoded again
        write_hashes(path, spec.key(), spec.side, hashes)
    if bad:
        raise BadPictures(bad)
    path.with_suffix(".partial").unlink(missing_ok=True)
    sync_folder(path.parent)


def _put_in_place(temporary: Path, path: Path, kept: KeptFrames) -> None:
    """Rename a file. Windows replaces none that is mapped, so there the kept frames are let go of first."""
    try:
        os.replace(temporary, path)
    except PermissionError:
        kept.release()
        os.replace(temporary, path)
