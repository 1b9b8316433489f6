"""What is timed: the real `fit` and the real `train_step`, and the loops of others."""

import contextlib
import dataclasses
import io
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

import train
from kd import features, models
from kd.batches import Batch, load_batches
from kd.bench.turns import note, now_on
from kd.config import Config
from kd.logits import LogitStore
from kd.machine import runtime
from kd.machine.runtime import Runtime
from kd.models import Classifier
from kd.run import Run
from kd.teacher import StoreOptions, Teacher
from kd.views import Views


# ---- the loops of others --------------------------------------------------------------------------------------

def tutorial_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor,
                  temperature: float, kd_weight: float) -> Tensor:
    """The loss of the Hugging Face tutorial on distillation, op by op, as its Trainer computes it."""
    soft_teacher = F.softmax(teacher_logits / temperature, dim=-1)
    soft_student = F.log_softmax(student_logits / temperature, dim=-1)
    distillation_loss = F.kl_div(soft_student, soft_teacher, reduction="batchmean") * temperature ** 2
    return (1 - kd_weight) * F.cross_entropy(student_logits, labels) + kd_weight * distillation_loss


def tutorial_loop(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor],
                  labels: list[Tensor], temperature: float, kd_weight: float) -> None:
    """What the Hugging Face tutorial's Trainer does in its steps: the teacher at every one, plain ops, `.item()`.

    The images are decoded, resized and normalised beforehand, as the tutorial's `dataset.map` does, and lie in
    memory. Both models are plain eager float32 in the default memory format.
    """
    student.train()
    for x, y in zip(images, labels, strict=True):
        logits = student(x)
        with torch.no_grad():
            teacher_logits = teacher(x)
        loss = tutorial_loss(logits, teacher_logits, y, temperature, kd_weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        loss.item()


def timm_task(student: nn.Module, teacher: nn.Module, temperature: float, kd_weight: float,
              device: torch.device) -> LogitDistillationTask:
    """timm's distillation with the loss of `kd_loss`: (1 - λ)·CE + λ·T²·KL. Both models are on `device` already."""
    return LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), task_loss_weight=1 - kd_weight,
                                 distill_loss_weight=kd_weight, temperature=temperature, device=device, verbose=False)


def timm_loop(task: LogitDistillationTask, optimizer: torch.optim.Optimizer, scaler: NativeScaler | None,
              images: list[Tensor], labels: list[Tensor], clip: float, machine: Runtime) -> None:
    """What timm's train.py does in its steps with a task, under --channels-last, --amp as ours and --clip-grad.

    scaler: where the precision is fp16, timm's own; otherwise None, as in timm.
    """
    task.train()
    student = task.trainable_module
    for x, y in zip(images, labels, strict=True):
        with machine.autocast():
            loss = task(x, y)["loss"]
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=clip, parameters=student.parameters())
        else:
            loss.backward()
            dispatch_clip_grad(student.parameters(), value=clip)
            optimizer.step()
        loss.item()             # timm keeps its running mean of the loss by it
        optimizer.zero_grad()


# ---- ours ------------------------------------------------------------------------------------------------------

class Bench:
    """The pieces of a run, as `train.main` puts them together, on a block of `steps` steps."""

    def __init__(self, cfg: Config, steps: int, folder: Path) -> None:
        self.cfg, self.folder, self._runs = dataclasses.replace(cfg, epochs=1), folder, count()
        self.machine = runtime.start(cfg.device, cfg.amp, cfg.compile, cfg.kernels)
        with contextlib.redirect_stdout(sys.stderr):
            table = train.open_dataset(cfg.dataset, config=cfg.config, image=cfg.image, label=cfg.label)
            student, teacher = (train.build(role, table.classes, cfg, self.machine) for role in ("student", "teacher"))
            prep = models.preprocessing(student)
            splits = train.decode(table, size=cfg.size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                                  cache_dir=cfg.cache_dir)
        models.freeze(teacher)
        if cfg.compares_features:
            features.refuse_without("teacher", teacher, cfg.method, cfg.size)
            features.refuse_without("student", student, cfg.method, cfg.size)
            if cfg.method == "simkd":
                features.reuse_head(student, teacher)

        self.steps, self.classes = steps, table.classes
        # A split that has fewer pictures begins again.
        self.train = splits["train"].take(np.arange(steps * cfg.batch_size) % len(splits["train"]))
        self.validation = splits["validation"].take(np.arange(1))
        self.views = Views(0, cfg.size, train.AUGMENTATIONS[cfg.augment], 1)
        self.student = Classifier(student, prep, cfg.size, table.classes, self.machine)
        self.teacher = Teacher(Classifier(teacher, models.preprocessing(teacher), cfg.size, table.classes,
                                          self.machine), self.train, self.views,
                               StoreOptions(folder, with_features=cfg.compares_features))
        self.warm = self.teacher.store
        self.loss_fn, self.loss_name = train.choose_loss("student", cfg, self.machine, len(table.classes))
        self.plain_loss = partial(tutorial_loss, temperature=cfg.temperature, kd_weight=cfg.kd_weight)
        # Compiled once, as in a run of many epochs.
        self.forward = train.training_forward(self.job(steps), self.cfg)

    def job(self, steps: int) -> train.Job:
        """The student's training of one epoch of so many steps."""
        block = self.train.take(np.arange(steps * self.cfg.batch_size))
        return train.Job("student", self.student, block, self.validation, self.views, 1, self.cfg.lr, self.loss_fn,
                         self.teacher if self.cfg.kd_weight else None)

    def fit(self, cold: bool = False, steps: int = 0) -> float:
        """Images/s of one epoch of the real `fit` over the block, waiting for data and logging included.

        cold: with an empty store of logits, so that the teacher is asked for all.
        steps: only so many of the block; 0: all.
        """
        number = next(self._runs)
        if cold:
            self.teacher.store = LogitStore(self.folder / f"cold-{number}", {}, self.warm.columns)
        with (contextlib.redirect_stdout(io.StringIO()) as said,
              mock.patch.object(train, "training_forward", lambda job, cfg: self.forward),
              Run.open(self.folder / f"run-{number}", {}, set()) as run):
            train.fit(self.job(steps or self.steps), self.cfg, run)
        if "uncompiled" in said.getvalue():
            note(said.getvalue())
        self.teacher.store = self.warm
        return run.history[0]["images_per_second"]

    def batches(self, steps: int) -> list[Batch]:
        """Those of `fit`'s epoch."""
        block = self.train.take(np.arange(steps * self.cfg.batch_size))
        return list(load_batches(block, self.views, 0, self.cfg.batch_size, 0, self.machine.device))

    def bare_steps(self) -> Callable[[], float]:
        """Images/s of forward, backward and update of tensors that lie ready, which no loop can beat."""
        model, machine = self.student.model, self.machine
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.cfg.lr, fused=True)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp is torch.float16)
        batch = self.batches(1)[0]
        teacher_outputs = torch.randn(len(batch.samples), self.warm.columns, device=machine.device)

        def images_per_second() -> float:
            model.train()
            begin = now_on(machine.device)
            for _ in range(self.steps):
                train.train_step(self.forward, optimizer, scaler, batch, teacher_outputs, self.loss_fn, self.cfg.clip,
                                 machine)
            return self.steps * len(batch.samples) / (now_on(machine.device) - begin)

        return images_per_second

    def plain_models(self) -> tuple[nn.Module, nn.Module]:
        """A student and the frozen teacher as timm makes them."""
        student, teacher = (models.create(role, name, self.classes, size=self.cfg.size,
                                          say=lambda line: None).to(self.machine.device)
                            for role, name in (("student", self.cfg.student), ("teacher", self.cfg.teacher)))
        return student, models.freeze(teacher)


def images_per_second(steps_of: Callable[[], None], images: int, machine: Runtime,
                      tuned: bool = False) -> Callable[[], float]:
    """A loop to be timed. tuned: with our allocator, else as it comes. It is the process's, so it is set each time."""
    def timed() -> float:
        runtime.tune_allocator(tuned)
        begin = now_on(machine.device)
        steps_of()
        rate = images / (now_on(machine.device) - begin)
        runtime.tune_allocator(machine.kernels)
        return rate
    return timed
