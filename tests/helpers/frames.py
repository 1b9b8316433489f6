"""Frames in memory, which stand in for the files of kd/data/frames.py."""

import numpy as np


class ArrayFrames:
    """The rows of an array, uint8 `(N, R, R, 3)`, as the frames of a split."""

    def __init__(self, rows: np.ndarray, digest: str = "an array") -> None:
        self.rows, self.shape, self.digest = rows, rows.shape, digest

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        chosen = self.rows[numbers]
        if out is None:
            return chosen
        out[:] = chosen
        return out


def noise(count: int, side: int = 36) -> ArrayFrames:
    """`count` frames of random pixels, always the same."""
    return ArrayFrames(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))
