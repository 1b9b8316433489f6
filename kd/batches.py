"""What a step is fed: a batch of views with its labels, and with the teacher's answers that are on disk."""

from typing import Callable, Generator, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd.data.frames import Split
from kd.machine import distributed
from kd.machine.devices import to_device
from kd.machine.prefetch import prefetch
from kd.views import Views, load_views

Stored = Callable[[int, np.ndarray], Tensor | None]     # (view, samples) to the teacher's answers on disk, if any


class Batch(NamedTuple):
    """This rank's share of a batch; without torchrun, the whole of it."""

    split: Split            # where the samples are from
    samples: np.ndarray     # (B,) int64, their numbers in that split
    view: int               # which view of each
    pixels: Tensor          # (B, 3, H, W) uint8, channels_last, on the device
    labels: Tensor          # (B,) int64, on the device; NO_LABEL for a picture without one
    total: int              # samples of all ranks together
    weight: float = 1.0     # B · ranks / total: of this rank's mean loss, where ranks have unequal shares
    stored: Tensor | None = None    # the teacher's answers, float32 on the device, where all of them are on disk


def epoch_batches(seed: int, epoch: int, samples: int, batch_size: int) -> list[np.ndarray]:
    """The batches of an epoch, each int64 `(B,)` of sample numbers: a shuffle that depends only on (seed, epoch).

    The last batch may be short, down to half a batch. A shorter one joins the batch before it, which then has up to
    1.5 times as many samples as the others. So BatchNorm never meets a single sample, in any rank.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    return np.split(order, _cuts(samples, batch_size))


def count_batches(samples: int, batch_size: int) -> int:
    """Steps an epoch; the same in every epoch."""
    return len(_cuts(samples, batch_size)) + 1


def _cuts(samples: int, batch_size: int) -> list[int]:
    """Where one batch of an epoch ends and the next begins."""
    cuts = list(range(batch_size, samples, batch_size))
    if cuts and samples - cuts[-1] < max(2, batch_size / 2):
        cuts.pop()
    return cuts


def load_batches(split: Split, views: Views, epoch: int, batch_size: int, start: int, device: torch.device,
                 stored: Stored = lambda view, samples: None) -> Generator[Batch, None, None]:
    """This rank's share of the batches of an epoch, from step `start` on. On a GPU, two are made ahead in a thread."""
    return prefetch(_load_batches(split, views, epoch, batch_size, start, device, stored), device)


def _load_batches(split: Split, views: Views, epoch: int, batch_size: int, start: int, device: torch.device,
                  stored: Stored) -> Iterator[Batch]:
    view = views.index(epoch)
    for everyones in epoch_batches(views.seed, epoch, len(split), batch_size)[start:]:
        samples = distributed.rank_share(everyones)
        answers = stored(view, samples)
        yield Batch(split, samples, view, load_views(split, samples, view, views, device),
                    to_device(split.labels[samples], device), total=len(everyones),
                    weight=len(samples) * distributed.world_size() / len(everyones),
                    stored=None if answers is None else to_device(answers, device))
