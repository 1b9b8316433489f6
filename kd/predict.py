"""Logits of a whole split, the way of validation and test."""

import contextlib
from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kd import models
from kd.data.frames import center_crop
from kd.machine import console, distributed
from kd.machine.devices import to_device
from kd.machine.prefetch import prefetch
from kd.machine.runtime import Runtime
from kd.views import Readable

BATCH = 64


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
    starts = range(0, -(-total // ranks), BATCH)
    # On a GPU the next batch is read and copied while the model works on this one.
    batches = prefetch((_pixels(frames.read(mine[start:start + BATCH]), size, runtime.device)
                        for start in starts if start < len(mine)), runtime.device)
    # autocast around all of them, so that it casts the weights once
    with console.progress(len(mine), label) as bar, contextlib.closing(batches), runtime.autocast():
        for _ in starts:
            stop()  # may ask all ranks, so each calls it equally often, also one that has no rows left
            pixels = next(batches, None)
            if pixels is not None:
                rows.append(model(models.normalize(pixels, prep)).float())
                bar.update(len(pixels))

    # The host waits for the device once a split. A rank may have no row of a small split.
    logits = torch.cat(rows).cpu().numpy() if rows else np.empty((0, 0), np.float32)
    return distributed.gather(logits, total)


@torch.no_grad()
def predict_batch(model: nn.Module, frames: np.ndarray, prep: models.Preprocessing, size: int,
                  runtime: Runtime) -> Tensor:
    """Logits `(B, C)` float32, on the device, of resized pictures, uint8 `(B, R, R, 3)`. The model is in eval mode."""
    with runtime.autocast():
        return model(models.normalize(_pixels(frames, size, runtime.device), prep)).float()


def _pixels(frames: np.ndarray, size: int, device: torch.device) -> Tensor:
    """The centre crops, uint8 `(B, 3, size, size)`, channels_last, on the device."""
    return to_device(np.ascontiguousarray(center_crop(frames, size)), device).permute(0, 3, 1, 2)
