"""Frames that are kept when a build fails because some pictures are bad, so that they are not decoded again.

The user removes or restores the bad pictures, which moves the others to other places and, where splits
are carved, to other splits. So a frame is found again by a hash of the encoded picture. Reading and
hashing a file takes a fraction of the time of decoding it.

Two files beside each NAME.frames, removed after the next build that is complete:

    NAME.partial    frames as in a .frames file, with gaps for the bad pictures; absent for a complete split
    NAME.hashes     N × (BLAKE2b of the encoded picture | SHA-256 of its frame) | magic, N, R, key | SHA-256

The key is a hash of everything but the pictures that decides the frames. A frame counts only if its
SHA-256 is right. So damage, and files that do not belong together, cost time and nothing else.
"""

import hashlib
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from kd.machine.files import MappedFiles

TAIL = struct.Struct("<8sQQ32s")        # magic, N, R, key
MAGIC = b"kdhashe1"                     # the last byte is the version of this format


def hash_of(encoded: bytes) -> bytes:
    """(32,) hash of an encoded picture."""
    return hashlib.blake2b(encoded, digest_size=32).digest()


def write_hashes(path: Path, key: bytes, side: int, hashes: np.ndarray) -> None:
    """Write the hashes that belong to the frames of `path`: (N, 2, 32) uint8, zeros where there is no frame."""
    content = hashes.tobytes() + TAIL.pack(MAGIC, len(hashes), side, key)
    path.with_suffix(".hashes").write_bytes(content + hashlib.sha256(content).digest())


class KeptFrames:
    """What earlier builds have kept of a dataset's splits, whose .frames files are `paths`."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._splits: list[KeptSplit] = []

    def load(self, key: bytes, side: int) -> None:
        """Look for files that now fit. Those found before stay open, whatever has become of their names."""
        for path in self._paths:
            with suppress(OSError, ValueError):     # absent, or not to be used
                split = KeptSplit(path, key, side)
                if split.digest not in [other.digest for other in self._splits]:
                    self._splits.append(split)

    def find(self, encoded_hash: bytes) -> bytes | None:
        """The frame of the encoded picture with this hash. Several threads may call this at once."""
        return next((frame for split in self._splits if (frame := split.find(encoded_hash))), None)

    def release(self) -> None:
        """Close the files. What they hold is not found any more."""
        self._splits.clear()

    def give_up(self) -> bool:
        """Remove the frames of incomplete splits, which are then decoded again. Whether there were any."""
        self.release()              # a mapped file keeps its room on the disk
        partial = [path.with_suffix(".partial") for path in self._paths]
        existing = [path for path in partial if path.exists()]
        for path in existing:
            path.unlink(missing_ok=True)
        return bool(existing)

    def remove(self) -> None:
        """Remove all that is kept, if it can be removed."""
        self.release()
        for path in self._paths:
            for suffix in (".hashes", ".partial"):
                with suppress(OSError):
                    path.with_suffix(suffix).unlink(missing_ok=True)


class KeptSplit:
    """The kept frames of one split. Raises OSError or ValueError where there are none that can be used."""

    def __init__(self, path: Path, key: bytes, side: int):
        content = path.with_suffix(".hashes").read_bytes()
        tail_start = len(content) - TAIL.size - 32
        if tail_start < 0 or hashlib.sha256(content[:-32]).digest() != content[-32:]:
            raise ValueError("is damaged")
        magic, count, its_side, its_key = TAIL.unpack(content[tail_start:-32])
        if (magic, its_side, its_key, count * 64) != (MAGIC, side, key, tail_start):
            raise ValueError("is of another version, or was made with other settings")

        partial = path.with_suffix(".partial")
        self._mapped = MappedFiles()
        with open(partial if partial.exists() else path, "rb") as file:
            self._frames = self._mapped.open(file, (count, side * side * 3), np.uint8)
        self.digest = content[-32:]
        hashes = np.frombuffer(content, np.uint8, count * 64).reshape(count, 2, 32)
        self._encoded, self._expected = hashes[:, 0], hashes[:, 1]
        beginnings = np.ascontiguousarray(self._encoded[:, :8]).view("<u8")[:, 0]
        self._order = np.argsort(beginnings)
        self._beginnings = beginnings[self._order]

    def find(self, encoded_hash: bytes) -> bytes | None:
        """The frame of the encoded picture with this hash, if it is here and undamaged."""
        place = np.searchsorted(self._beginnings, np.frombuffer(encoded_hash, "<u8", 1)[0])
        if place == len(self._order):
            return None
        index = self._order[place]
        if self._encoded[index].tobytes() != encoded_hash or not any(encoded_hash):
            return None
        frame = self._frames[index].tobytes()
        self._mapped.count(len(frame))
        return frame if hashlib.sha256(frame).digest() == self._expected[index].tobytes() else None
