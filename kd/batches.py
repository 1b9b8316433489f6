"""What a step is fed: a batch of views with its labels."""

from typing import Generator, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd.data.frames import Data, Split
from kd.machine import distributed
from kd.machine.devices import to_device
from kd.machine.prefetch import prefetch
from kd.views import Views, load_views, mixed_labels, mixup_partners


class Batch(NamedTuple):
    """This rank's share of a batch; without torchrun, the whole of it."""

    split: Split            # where the samples are from
    samples: np.ndarray     # (B,) int64, their numbers in that split
    view: int               # which view of each
    pixels: Tensor          # (B, 3, H, W) uint8, channels_last, on the device
    labels: Tensor          # (B,) int64, or (B, C) probabilities under mixup
    total: int              # samples of all ranks together
    weight: float = 1.0     # of this rank's mean loss, where ranks have unequal shares; averages to 1 over the ranks


def epoch_batches(seed: int, epoch: int, samples: int, batch_size: int) -> list[np.ndarray]:
    """The batches of an epoch, each int64 `(B,)` of sample numbers: a shuffle that depends only on (seed, epoch).

    The last batch may be short, down to half a batch. A shorter one joins the batch before it, which then has up to
    1.5 times as many samples as the others. So BatchNorm never meets a single sample, in any rank.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    cuts = list(range(batch_size, samples, batch_size))
    if cuts and samples - cuts[-1] < max(2, batch_size / 2):
        cuts.pop()
    return np.split(order, cuts)


def count_batches(samples: int, batch_size: int) -> int:
    """Steps an epoch; the same in every epoch."""
    return len(epoch_batches(0, 0, samples, batch_size))


def load_batches(data: Data, views: Views, epoch: int, batch_size: int, start: int,
                 device: torch.device) -> Generator[Batch, None, None]:
    """This rank's share of the batches of an epoch, from step `start` on. On a GPU, two are made ahead in a thread."""
    return prefetch(_load_batches(data, views, epoch, batch_size, start, device), device)


def _load_batches(data: Data, views: Views, epoch: int, batch_size: int, start: int,
                  device: torch.device) -> Iterator[Batch]:
    split, view = data.train, views.index(epoch)
    for everyones in epoch_batches(views.seed, epoch, len(split), batch_size)[start:]:
        samples = distributed.rank_share(everyones)
        pixels = load_views(split.frames, samples, view, views, device)

        labels = split.labels[samples]
        if views.augmentation.mixup:
            partners, share = mixup_partners(samples, view, views, len(split))
            labels = mixed_labels(labels, split.labels[partners], share, len(data.classes))

        yield Batch(split, samples, view, pixels, to_device(labels, device), total=len(everyones),
                    weight=len(samples) * distributed.world_size() / len(everyones))
