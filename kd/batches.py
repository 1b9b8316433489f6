"""What a step is fed: a batch of views with its labels, and the teacher's logits of the same views."""

from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd import models
from kd.machine import distributed
from kd.views import Spec, load_views, mixed_labels, partners
from kd.data.frames import Data
from kd.logits import LogitStore
from kd.machine.runtime import Runtime


class Teacher(NamedTuple):
    """A frozen model, and what it needs to be asked."""

    model: Callable[[Tensor], Tensor]
    prep: models.Preprocessing
    data: Data          # the same pictures as the student's, resized as this model's declared interpolation says
    store: LogitStore
    run: Runtime        # the precision that it answers in, whatever the student trains in


class Batch(NamedTuple):
    samples: np.ndarray           # (B,) their numbers in the train split: this rank's share
    total: int                    # samples of all ranks
    views: Tensor                 # (B, 3, H, W) uint8, channels_last, on the device
    labels: Tensor                # (B,) int64, or (B, C) probabilities under mixup
    teacher_logits: Tensor | None  # (B, C), where the store knows them


def load_batches(data: Data, batches: list[np.ndarray], view: int, teacher: Teacher | None, *, seed: int, size: int,
                 spec: Spec, device: torch.device) -> Iterator[Batch]:
    """This rank's share of the batches of these sample numbers under one view, in their order, on the device."""
    split = data.train
    for batch in batches:
        samples = distributed.rank_share(batch)
        views = load_views(split.frames.read, len(split), samples, seed=seed, view=view, size=size, spec=spec,
                           device=device)
        labels = split.labels[samples]
        if spec.mixup:
            others, share = partners(seed, samples, view, len(split), spec.mixup)
            labels = mixed_labels(labels, split.labels[others], share, len(data.classes))
        known = teacher.store.get(view, samples) if teacher else None
        yield Batch(samples, len(batch), views, torch.from_numpy(labels).to(device, non_blocking=True),
                    known.to(device, non_blocking=True) if known is not None else None)


def ask_teacher(teacher: Teacher, batch: Batch, view: int, data: Data, *, seed: int, size: int, spec: Spec) -> Tensor:
    """The teacher's logits of a batch, live: the same views, with the teacher's own mean, std and interpolation.

    data: the student's, whose views the batch holds; they are made again where the teacher's frames are others.
    """
    views = batch.views
    if teacher.data is not data:
        views = load_views(teacher.data.train.frames.read, len(data.train), batch.samples, seed=seed, view=view,
                           size=size, spec=spec, device=teacher.run.device)
    with torch.no_grad(), teacher.run.autocast():
        return teacher.model(models.normalize(views, teacher.prep)).float()


def ask_once(answers: LogitStore, samples: int, ask: Callable[[], np.ndarray]) -> np.ndarray:
    """A split's logits `(samples, C)` under its plain centre crops: what `answers` knows, or else `ask()`, kept.

    Either all ranks ask, or none.
    """
    everything = np.arange(samples)
    known = answers.get(0, everything)
    missing = distributed.max_over_ranks(known is None)[0]
    logits = answers.logits(0, everything, None if missing else known, lambda: torch.from_numpy(ask()))
    answers.flush()
    return logits.numpy()
