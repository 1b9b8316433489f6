"""The teacher: a frozen model that is asked once for each view of each sample. Its answers are then read from disk.

A frozen model gives the same logits for the same pixels, yet a distillation loop asks it again in every epoch. That is
most of the arithmetic of a step. Views are functions of a key (`kd/views.py`), so their logits can be kept. Some
methods (`kd/methods.py`) also compare the pooled features. These are then kept behind the logits, in the same row.
"""

import inspect
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn

from kd import features, models
from kd.batches import Batch
from kd.data.frames import Data, Split
from kd.fast import folding
from kd.fast.folding import for_inference
from kd.features import logits_and_features, width
from kd.logits import LogitStore
from kd.machine import distributed
from kd.machine.devices import to_device
from kd.machine.files import code_digest
from kd.machine.runtime import Runtime
from kd.predict import predict
from kd.views import CODE, Augmentation, Views, load_views


# Answers are valid only for the code that made them. That of the views is in `kd/views.py`.
ANSWERS = [code_digest(features, folding), inspect.getsource(models.normalize)]


class StoreOptions(NamedTuple):
    """Where the answers are stored, and how much of them."""

    folder: Path
    topk: int = 0                   # only the K largest logits of a row; 0: all of them
    temperature: float = 1.0        # at which the rest of a row keeps its total probability
    with_features: bool = False     # the D pooled features too


class Teacher:
    """A frozen model that answers from disk what it has answered before."""

    def __init__(self, model: nn.Module, prep: models.Preprocessing, data: Data, views: Views, runtime: Runtime,
                 options: StoreOptions) -> None:
        """model: frozen, in eval mode; prep: what timm declares for it; data: pictures resized as `prep` says."""
        self.model, self.prep, self.data, self.views, self.runtime = model, prep, data, views, runtime
        self.options, self.weights, self.name = options, models.digest(model), models.architecture(model)
        self.form = ""                  # what was done to it, to answer sooner
        if runtime.kernels:
            self.model, self.form = for_inference(model, views.size)
        self.store = self._open_store(data.train, views.augmentation)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Tensor:
        """float32 `(B, C)` logits, or `(B, C + D)` with the pooled features behind them; on the device.

        Read from disk where this (view, sample) was met before, else computed and kept.
        """
        stored = self.store.get(batch.view, batch.samples)
        if stored is not None:
            return to_device(stored, self.runtime.device)

        pixels = batch.pixels
        size, frames = self.views.size, self.data.train.frames
        if pixels.shape[-1] != size or batch.split.frames.digest != frames.digest:
            # The teacher takes another size or interpolation: the same view, from frames resized its way.
            pixels = load_views(frames, batch.samples, batch.view, self.views, self.runtime.device)
        # Both see the same view, each normalised with the mean and std of its own weights.
        with self.runtime.autocast():
            x = models.normalize(pixels, self.prep)
            outputs = logits_and_features(self.model, x) if self.options.with_features else self.model(x)
        return self.store.put(batch.view, batch.samples, outputs.float())

    def predict(self, split: Split, label: str, stop: Callable[[], None] = lambda: None) -> np.ndarray:
        """float32 `(N, C)`: the logits of a whole split under the centre crop, computed once and kept as well.

        Collective: every rank must call it. `label` names the progress bar; `stop` is called before every batch.
        """
        store = self._open_store(split, None)
        everything = np.arange(len(split))
        stored = store.get(0, everything)
        if distributed.max_over_ranks(stored is None)[0]:  # either all ranks compute, or none
            computed = predict(self.model, split.frames, self.prep, self.views.size, self.runtime, label, stop)
            stored = store.put(0, everything, torch.from_numpy(computed))
            store.flush()
        assert stored is not None
        return stored.numpy()

    def _open_store(self, split: Split, augmentation: Augmentation | None) -> LogitStore:
        """The logits of one split's views; None: of its centre crops. Found by teacher, pictures, view and code.

        The last bits also depend on the processor, and on which pictures shared a batch.
        """
        key: dict[str, Any] = dict(
            teacher=self.weights, name=self.name, form=self.form, prep=self.prep,
            size=self.views.size, frames=split.frames.digest, answers=ANSWERS, amp=str(self.runtime.amp),
            device=self.runtime.device.type, torch=torch.__version__, timm=timm.__version__)
        if augmentation is None:
            return LogitStore(self.options.folder / "logits", key, len(split), len(self.data.classes))
        key.update(augment=augmentation, seed=self.views.seed, code=CODE)
        columns = len(self.data.classes)
        if self.options.with_features:
            key.update(with_features=True)
            columns += width(self.model)
        return LogitStore(self.options.folder / "logits", key, len(split), columns, self.options.topk,
                          self.options.temperature)
