"""Logits of a whole split, the way of validation and test."""

from typing import Callable, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kd import models
from kd.data.frames import center_crop
from kd.machine import console, distributed
from kd.machine.runtime import Runtime

BATCH = 64


class Readable(Protocol):
    """Resized pictures by number, such as `kd.data.frames.Frames`."""

    def __len__(self) -> int: ...

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 `(B, R, R, 3)`."""


@torch.no_grad()
def predict(model: nn.Module, frames: Readable, prep: models.Preprocessing, size: int, runtime: Runtime, label: str,
            stop: Callable[[], None] = lambda: None) -> np.ndarray:
    """Logits `(N, C)` float32 under timm's eval transform (resize, centre crop, normalise), in eval mode.

    label  names the progress bar
    stop   called before every batch; leaves by raising
    Collective: each rank computes every n-th row, and all ranks return all rows.
    """
    model.eval()
    total, ranks = len(frames), distributed.world_size()
    mine = np.arange(distributed.rank(), total, ranks)
    rows: list[Tensor] = []
    with console.progress(len(mine), label) as bar, runtime.autocast():     # around all, so that it casts weights once
        for start in range(0, -(-total // ranks), BATCH):
            stop()  # may ask all ranks, so each calls it equally often, also one that has no rows left
            if start >= len(mine):
                break
            some = frames.read(mine[start:start + BATCH])
            rows.append(predict_batch(model, some, prep, size, runtime))
            bar.update(len(some))

    # The host waits for the device once a split. A rank may have no row of a small split.
    logits = torch.cat(rows).cpu().numpy() if rows else np.empty((0, 0), np.float32)
    return distributed.gather(logits, total)


@torch.no_grad()
def predict_batch(model: nn.Module, frames: np.ndarray, prep: models.Preprocessing, size: int,
                  runtime: Runtime) -> Tensor:
    """Logits `(B, C)` float32, on the device, of resized pictures, uint8 `(B, R, R, 3)`. The model is in eval mode."""
    pixels = torch.from_numpy(center_crop(frames, size)).to(runtime.device).permute(0, 3, 1, 2)
    with runtime.autocast():
        return model(models.normalize(pixels, prep)).float()
