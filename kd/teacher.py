"""The teacher: a frozen model that is asked once for each view of each sample. Its answers are then read from disk.

A frozen model gives the same logits for the same pixels, yet a distillation loop asks it again in every epoch. That is
most of the arithmetic of a step. Views are functions of a key (`kd/views.py`), so their logits can be kept. Some
methods (`kd/losses.py`) also compare the pooled features. These are then kept behind the logits, in the same row.
"""

from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor

from kd import features, models
from kd import predict as prediction
from kd.batches import Batch
from kd.data import frames
from kd.data.frames import Split
from kd.fast import folding
from kd.logits import LogitStore
from kd.machine import distributed
from kd.machine.files import code_digest
from kd.models import Classifier
from kd.predict import predict
from kd.views import CODE, Augmentation, Views, load_views

# Answers are valid only for the code that made them. That of the views is in `kd/views.py`.
ANSWERS = code_digest(features, folding, models, prediction, frames)


class StoreOptions(NamedTuple):
    """Where the answers are stored, and how much of them."""

    folder: Path
    topk: int = 0                   # only the K largest logits of a row; 0: all of them
    temperature: float = 1.0        # at which the rest of a row keeps its total probability
    with_features: bool = False     # the D pooled features too


class Teacher:
    """A frozen classifier that answers from disk what it has answered before."""

    def __init__(self, classifier: Classifier, train: Split, views: Views, options: StoreOptions) -> None:
        """classifier: frozen, in eval mode; train: what the student learns from, resized for this model."""
        self.train, self.views, self.options = train, views, options
        self.weights, self.name = models.digest(classifier.model), models.architecture(classifier.model)
        self.form = ""                  # what was done to it, to answer sooner
        if classifier.machine.kernels:
            model, self.form = folding.for_inference(classifier.model, classifier.size)
            classifier = classifier._replace(model=model)
        self.classifier = classifier
        self.forward = models.FromPixels(classifier.model, classifier.prep, options.with_features)
        self.store = self._open_store(train, views.augmentation)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Tensor:
        """float32 `(B, C)` logits, or `(B, C + D)` with the pooled features behind them; on the device.

        Those that came with the batch from disk, where its view of all samples was met before. Else they are computed
        now, and kept.
        """
        if batch.stored is not None:
            return batch.stored
        pixels, machine = batch.pixels, self.classifier.machine
        if pixels.shape[-1] != self.views.size or batch.split.digest != self.train.digest:
            # The teacher takes another size or interpolation: the same view, of pictures that were resized its way.
            pixels = load_views(self.train, batch.samples, batch.view, self.views, machine.device)
        # Both see the same view, each normalised with the mean and std of its own weights.
        with machine.autocast():
            outputs = self.forward(pixels)
        return self.store.put(batch.view, batch.samples, outputs.float())

    def predict(self, split: Split, label: str, stop: Callable[[], None] = lambda: None) -> np.ndarray:
        """float32 `(N, C)`: the logits of a whole split under the centre crop, computed once and kept as well.

        Collective: every rank must call it. `label` names the progress bar; `stop` is called before every batch.
        """
        store = self._open_store(split, None)
        everything = np.arange(len(split))
        stored = store.get(0, everything)
        if distributed.max_over_ranks(stored is None)[0]:  # either all ranks compute, or none
            stored = store.put(0, everything, torch.from_numpy(predict(self.classifier, split, label, stop)))
            store.flush()
        assert stored is not None
        return stored.numpy()

    def _open_store(self, split: Split, augmentation: Augmentation | None) -> LogitStore:
        """The logits of one split's views; None: of its centre crops. Found by teacher, pictures, view and code.

        The last bits also depend on the processor, and on which pictures shared a batch.
        """
        machine, columns = self.classifier.machine, len(self.classifier.classes)
        key: dict[str, Any] = dict(
            teacher=self.weights, name=self.name, form=self.form, prep=self.classifier.prep, size=self.views.size,
            frames=split.digest, answers=ANSWERS, amp=str(machine.amp), device=machine.device.type,
            torch=torch.__version__, timm=timm.__version__)
        if augmentation is None:
            return LogitStore(self.options.folder, key, columns)
        key.update(augment=augmentation, seed=self.views.seed, code=CODE, with_features=self.options.with_features)
        if self.options.with_features:
            columns += features.width(self.classifier.model)
        return LogitStore(self.options.folder, key, columns, self.options.topk, self.options.temperature)
