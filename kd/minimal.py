"""The idea alone: a teacher is trained, then a control, then a student that learns from the teacher.

    python -m kd minimal

It has no flags, no resume, no ranks and no kernels. Everything else is as in train.py, which adds these. The data are
the drawn leaves, and all models start from random weights.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import cli, models
from kd.augmentations import AUGMENTATIONS
from kd.batches import count_batches, load_batches
from kd.data.frames import Data, Split, decode
from kd.data.table import open_dataset
from kd.machine import runtime
from kd.models import Classifier
from kd.predict import predict
from kd.scores import scores
from kd.teacher import StoreOptions, Teacher
from kd.views import Views

SIZE, BATCH_SIZE, LEARNING_RATE, WARMUP, SEED = 96, 16, 3e-3, 0.1, 0
TEMPERATURE, KD_WEIGHT = 5.0, 0.5                   # T, and λ: the teacher's share of the loss


def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
    """(1 − λ)·CE(student, labels) + λ·T²·KL(teacher‖student); without a teacher CE alone. Logits are `(B, C)`."""
    cross_entropy = F.cross_entropy(student_logits, labels, reduction="sum")
    if teacher_logits is None:
        return cross_entropy / len(labels)
    log_p = F.log_softmax(teacher_logits / TEMPERATURE, dim=1)
    log_q = F.log_softmax(student_logits / TEMPERATURE, dim=1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).sum()
    return ((1 - KD_WEIGHT) * cross_entropy + KD_WEIGHT * TEMPERATURE ** 2 * kl) / len(labels)


def fit(role: str, classifier: Classifier, train: Split, validation: Split, views: Views, epochs: int,
        teacher: Teacher | None = None) -> None:
    """Train a model in place. It keeps the weights of its best epoch on validation."""
    model, device = classifier.model, classifier.machine.device
    forward = models.FromPixels(model, classifier.prep)             # uint8 pixels to logits
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02, fused=True)
    steps = epochs * count_batches(len(train), BATCH_SIZE)
    step, best, kept = 0, -1.0, model.state_dict()
    for epoch in range(epochs):
        model.train()
        loss_sum = 0.0
        for batch in load_batches(train, views, epoch, BATCH_SIZE, 0, device):
            rise = WARMUP * steps                                   # the rate rises, then follows a cosine to 0
            progress = (step - rise) / (steps - rise)
            rate = (step + 1) / (rise + 1) if step < rise else 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
            teacher_logits = teacher.outputs(batch) if teacher else None
            loss = kd_loss(forward(batch.pixels), teacher_logits, batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.item() * batch.total
            step += 1
        accuracy = scores(predict(classifier, validation, role), validation.labels)["accuracy"]
        print(f"{role} {epoch + 1}/{epochs}  train loss {loss_sum / len(train):.4f}  validation {100 * accuracy:.1f} %")
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def main(argv: list[str]) -> None:
    """Train teacher, control and student, and test each once."""
    cli.OneLineParser(prog="python -m kd minimal", description=__doc__).parse_args(argv)
    machine = runtime.start("auto", "off", "off", "off")            # the device; float32
    table = open_dataset("leaves")
    classifiers: dict[str, Classifier] = {}
    for role, name in (("teacher", "resnet10t"), ("control", "mobilenetv2_100"), ("student", "mobilenetv2_100")):
        torch.manual_seed(SEED)                                     # control and student start from the same weights
        model = models.create(role, name, table.classes, size=SIZE)
        model = model.to(machine.device).to(memory_format=torch.channels_last)
        classifiers[role] = Classifier(model, models.preprocessing(model), SIZE, table.classes, machine)
    prep, cache = classifiers["student"].prep, Path(cli.CACHE_DIR).expanduser()
    data = Data(table.classes, **decode(table, size=SIZE, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                                        cache_dir=cache))
    views = Views(SEED, SIZE, AUGMENTATIONS["flip"], count=0)       # a fresh view of every picture in every epoch

    fit("teacher", classifiers["teacher"], data.train, data.validation, views, epochs=4)
    models.freeze(classifiers["teacher"].model)
    teacher = Teacher(classifiers["teacher"], data.train, views, StoreOptions(cache / "logits"))
    fit("control", classifiers["control"], data.train, data.validation, views, epochs=8)
    fit("student", classifiers["student"], data.train, data.validation, views, epochs=8, teacher=teacher)
    for role, classifier in classifiers.items():
        result = scores(predict(classifier, data.test, role), data.test.labels)
        print(f"{role:8} {100 * result['accuracy']:5.1f} % on test ({result['correct']}/{result['total']})")
