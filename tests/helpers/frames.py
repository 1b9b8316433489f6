"""Decoded pictures without a file, smooth pictures to decode, and tables of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kd.data.frames import Split, Store
from kd.data.table import Table


class ArrayStore(Store):
    """The frames of an array, uint8 `(N, R, R, 3)`."""

    def __init__(self, frames: np.ndarray, name: str) -> None:
        super().__init__(Path(name), "", len(frames), frames.shape[1], lambda row: f"{name}/{row}.png")
        digests = b"".join(hashlib.blake2b(frame.tobytes(), digest_size=16).digest() for frame in frames)
        self.frames, self.digests = frames, np.frombuffer(digests, np.uint8).reshape(-1, 16)

    def read(self, row: int, out: np.ndarray) -> None:
        out[:] = self.frames[row]


def split_of(frames: np.ndarray, labels: Sequence[int] | np.ndarray, name: str = "picture") -> Split:
    """A split of these frames, uint8 `(N, R, R, 3)`."""
    return Split(ArrayStore(frames, name), np.arange(len(frames)), np.array(labels))


def noise(count: int, side: int = 36) -> Split:
    """`count` pictures of random pixels, always the same, with the labels 0, 1, 2, 0, 1, 2, ..."""
    frames = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return split_of(frames, np.arange(count) % 3)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough that JPEG and resampling keep something of it, and without any symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def table(read: Callable[[int], bytes | Image.Image], splits: Mapping[str, Sequence[int]] = {"train": range(10)},
          fingerprint: str = "") -> Table:
    """A table of two classes, whose pictures are called 0.png, 1.png, ..."""
    rows = {name: np.array(chosen, np.int64) for name, chosen in splits.items()}
    count = max(map(max, splits.values())) + 1
    return Table("toy", ("a", "b"), np.arange(count) % 2, rows, read, "{}.png".format, "{}.png".format, "somewhere",
                 fingerprint, "")
