"""Logits of a split: the way of validation and test, the same in every rank."""

from typing import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kd import models
from kd.data.frames import center_crop
from kd.machine import console, distributed, runtime

BATCH = 64


@torch.no_grad()
def predict(model: nn.Module, read: Callable[[np.ndarray], np.ndarray], total: int, prep: models.Preprocessing,
            size: int, run: runtime.Runtime, label: str, stop: Callable[[], None] = lambda: None) -> np.ndarray:
    """Logits `(total, C)` float32 under timm's eval transform (resize, centre crop, normalise), in eval mode.

    read: sample numbers to resized uint8 frames `(B, R, R, 3)`; stop: called before every batch, to leave by raising.
    Every rank computes its share, and has all of them in the end.
    """
    model.eval()
    batches: list[Tensor] = []
    mine = np.arange(distributed.rank(), total, distributed.world_size())
    with console.progress(len(mine), label) as bar, run.autocast():
        for start in range(0, -(-total // distributed.world_size()), BATCH):
            stop()  # as often in every rank, for it may ask them all
            if start >= len(mine):
                break
            frames = read(mine[start:start + BATCH])
            pixels = torch.from_numpy(center_crop(frames, size)).to(run.device).permute(0, 3, 1, 2)
            batches.append(model(models.normalize(pixels, prep)).float())
            bar.update(len(frames))
    # one host-device synchronisation for the whole split; a rank may have nothing of a small one
    rows = torch.cat(batches).cpu().numpy() if batches else np.empty((0, 0), np.float32)
    return distributed.gather(rows, total)
