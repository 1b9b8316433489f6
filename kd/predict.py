"""Logits of a whole split, the way of validation and test."""

import contextlib
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from kd.data.frames import Split, center_crop
from kd.machine import console, distributed
from kd.machine.devices import to_device
from kd.machine.prefetch import prefetch
from kd.models import Classifier, FromPixels

BATCH = 64


@torch.no_grad()
def predict(classifier: Classifier, split: Split, label: str, stop: Callable[[], None] = lambda: None) -> np.ndarray:
    """Logits `(N, C)` float32 under timm's eval transform (resize, centre crop, normalise), in eval mode.

    label  names the progress bar
    stop   called before every batch; leaves by raising
    Collective: each rank computes every n-th row, and all ranks return all rows.
    """
    model, prep, size, _, machine = classifier
    forward = FromPixels(model, prep).eval()
    total, ranks = len(split), distributed.world_size()
    mine = np.arange(distributed.rank(), total, ranks)
    rows: list[Tensor] = []
    starts = range(0, -(-total // ranks), BATCH)
    # On a GPU the next batch is read and copied while the model works on this one.
    batches = prefetch((pixels_of(split.read(mine[start:start + BATCH]), size, machine.device)
                        for start in starts if start < len(mine)), machine.device)
    # autocast around all of them, so that it casts the weights once
    with console.progress(len(mine), label) as bar, contextlib.closing(batches), machine.autocast():
        for _ in starts:
            stop()  # may ask all ranks, so each calls it equally often, also one that has no rows left
            pixels = next(batches, None)
            if pixels is not None:
                rows.append(forward(pixels).float())
                bar.update(len(pixels))

    # The host waits for the device once a split. A rank may have no row of a small split.
    logits = torch.cat(rows).cpu().numpy() if rows else np.empty((0, 0), np.float32)
    return distributed.gather(logits, total)


@torch.no_grad()
def predict_batch(classifier: Classifier, frames: np.ndarray) -> Tensor:
    """Logits `(B, C)` float32, on the device, of resized pictures, uint8 `(B, R, R, 3)`."""
    model, prep, size, _, machine = classifier
    with machine.autocast():
        return FromPixels(model, prep).eval()(pixels_of(frames, size, machine.device)).float()


def pixels_of(frames: np.ndarray, size: int, device: torch.device) -> Tensor:
    """The centre crops, uint8 `(B, 3, size, size)`, channels_last, on the device."""
    return to_device(np.ascontiguousarray(center_crop(frames, size)), device).permute(0, 3, 1, 2)
