"""Distil a large image classifier (teacher) into a small one (student), in one explicit loop.

    python train.py                                  a demo of some minutes on two CPU cores
    python train.py --resume                         the same run, from where it was stopped
    python train.py --recipe tutorial --control      the Hugging Face tutorial, with a control
    torchrun --standalone --nproc-per-node=4 train.py ...      several GPUs, or several processes

The student learns from the labels and from the teacher's logits, by `kd_loss` below. With --control
the same student is also trained without the teacher, which shows what the teacher was worth. A run
ends with a table of their scores on the test split. It leaves the weights, a log and a page to look
at in --out.

Read `kd_loss` and `train_step` (one step), then `fit` (one training), then `main` (the whole run).
The same without flags, resume and ranks is kd/minimal.py, in some eighty lines.
"""

from kd.config import RECIPES, Config, check, parse_or_exit

# Flags are parsed before torch is loaded, which takes seconds. So --help and typos answer at once.
CONFIG = parse_or_exit(__doc__) if __name__ == "__main__" else None

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd import NO_LABEL, BadInput, cli, features, few_labels, losses, models
from kd.augmentations import AUGMENTATIONS
from kd.batches import Batch, count_batches, load_batches
from kd.data.duplicates import duplicates, new_pictures
from kd.data.frames import Data, Split, decode
from kd.data.table import Table, open_dataset
from kd.fast import blocks
from kd.losses import LossFunction
from kd.machine import console, distributed, files, hub, runtime
from kd.machine.health import Guard
from kd.machine.runtime import Runtime
from kd.models import Classifier
from kd.predict import predict
from kd.run import Position, Run, Saved
from kd.scores import compare_paired, confusions, refuse_weak, scores
from kd.teacher import StoreOptions, Teacher
from kd.tools import card
from kd.views import Views


# ---- one step -------------------------------------------------------------------------------------

def kd_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
            temperature: float, kd_weight: float, label_smoothing: float = 0.0) -> Tensor:
    """(1 − λ)·CE(student, labels) + λ·T²·KL(teacher‖student), the mean over the B rows; a scalar.

    student_logits  (B, C), any precision; the gradient flows only here
    teacher_logits  (B, C), any precision, without a gradient; may be None where λ is 0
    labels          (B,) int64 in [0, C), or NO_LABEL (−100) for a picture without a label. Its row
                    takes no part in the CE, and takes part in the KL like every other row
    temperature     T, softens both distributions of the KL; the CE is taken at T = 1
    kd_weight       λ, the teacher's share

    `--loss reference` trains with this function. By default a kernel computes the same, sooner
    (kd/fast/fused_loss.py). The algebra, and the losses of --method, are in kd/losses.py.
    """
    s = losses.upcast(student_logits)                         # bf16 is too coarse for a softmax
    loss = s.new_zeros(())
    if kd_weight < 1:
        ce = F.cross_entropy(s, labels, ignore_index=NO_LABEL, reduction="sum",
                             label_smoothing=label_smoothing)
        loss = loss + (1 - kd_weight) * ce
    if kd_weight > 0:
        assert teacher_logits is not None
        log_p = F.log_softmax(teacher_logits.to(s.dtype) / temperature, dim=1)
        log_q = F.log_softmax(s / temperature, dim=1)
        kl = losses.kl_of_rows(log_p, log_q).sum()            # Σ p·(log p − log q)
        loss = loss + kd_weight * temperature ** 2 * kl       # T² undoes what T takes from gradients
    return loss / len(s)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               batch: Batch, teacher_outputs: Tensor | None, loss_fn: LossFunction, clip: float,
               machine: Runtime) -> tuple[Tensor, Tensor]:
    """One training step: forward, loss, backward, update.

    model            uint8 `(B, 3, H, W)` to logits `(B, C)`, or with D features behind to `(B, C + D)`
    batch            this rank's share of a batch: pixels, labels, and its weight among the ranks
    teacher_outputs  what the teacher's model gives, float32, or None where there is no teacher
    loss_fn          (student_outputs, teacher_outputs, labels) to the mean loss, a scalar
    clip             the largest norm of the gradient

    Returns the loss and the norm of its gradient, two scalars. They stay on the device: on a GPU,
    nothing in here waits for it. With several ranks, the mean of their losses is that of the batch.
    """
    with machine.autocast():
        outputs = model(batch.pixels)
    loss = loss_fn(outputs, teacher_outputs, batch.labels) * batch.weight
    scaler.scale(loss).backward()                             # the scale is 1, except in fp16
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=True)
    scaler.step(optimizer)                                    # skipped if fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then decay to zero."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    progress = (step - rise) / max(steps - rise, 1)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress)


# ---- one training ---------------------------------------------------------------------------------

@dataclass
class Job:
    """One training: all that differs between the teacher, the control and the student."""

    role: str                       # "teacher", "control" or "student"
    classifier: Classifier          # the model, its preprocessing, size, classes, and where it runs
    train: Split                    # what it learns from, resized for this model
    validation: Split
    views: Views                    # which pixels each epoch sees
    epochs: int
    lr: float                       # peak learning rate
    loss_fn: LossFunction           # of the student's outputs, the teacher's, and the labels
    teacher: Teacher | None = None


def fit(job: Job, cfg: Config, run: Run) -> None:
    """Train the model of `job`. Its weights of the best, or last, epoch go to `run.out / job.role`.

    The teacher, the control and the student all come through here. Only the student has a
    `job.teacher`. Under torchrun every rank runs this on its share of each batch.

    A resumed run continues exactly, on the same device. Batches, views, dropout and learning rate are
    functions of (seed, epoch, step), so a checkpoint needs only the position and `saved`, below.
    """
    model, machine = job.classifier.model, job.classifier.machine

    # ---- what the loop needs ---------------------------------------------------------------------
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=cfg.weight_decay,
                                  fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]                     # the peak; each group may have its own
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp is torch.float16)
    guard = Guard(job.role, model, machine.device, machine.amp)   # ends the run at NaN or infinity

    # A checkpoint holds these. Add whatever must survive a resume, such as an average of weights.
    saved: dict[str, Saved] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # Epoch 0, step 0; in a resumed run, the place where it stopped, with `saved` filled as it was.
    position = run.restore(job.role, saved, machine.device)

    def save() -> None:
        """Write last.ckpt. After a signal, this ends the run."""
        guard.check()                                         # a NaN must never reach the disk
        if job.teacher:
            job.teacher.store.flush()                         # its answers are on the disk first
        run.save(position, saved)

    forward = training_forward(job, cfg)
    steps_per_epoch = count_batches(len(job.train), cfg.batch_size)   # a short last batch counts
    total_steps = job.epochs * steps_per_epoch
    for epoch in range(position.epoch, job.epochs):

        # ---- train for one epoch -----------------------------------------------------------------
        model.train()
        position.clock.start()
        # The shuffle of (seed, epoch), from position.step on, with the teacher's stored answers.
        batches = load_batches(job.train, job.views, epoch, cfg.batch_size, position.step,
                               machine.device, *([job.teacher.store.get] if job.teacher else []))
        bar = console.progress(len(job.train), f"{job.role} {epoch + 1}/{job.epochs}",
                               initial=position.step * cfg.batch_size)
        with contextlib.closing(batches), bar:                # ends the thread that makes them ahead
            for batch in batches:
                step = epoch * steps_per_epoch + position.step
                seed_dropout(cfg.seed, step)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total_steps, group["initial_lr"], cfg.schedule,
                                                cfg.warmup)
                # For the view that the student sees: from disk where it was met before, else asked.
                teacher_outputs = job.teacher.outputs(batch) if job.teacher else None

                # ---- a single training step ----
                loss, norm = train_step(forward, optimizer, scaler, batch, teacher_outputs,
                                        job.loss_fn, cfg.clip, machine)
                # --------------------------------

                guard.note(step, loss, norm)                  # are both finite? raises if not
                position.count(loss, batch.total)
                bar.update(batch.total)
                console.show_loss(bar, position.step, loss)   # every 20th step, on a terminal
                if run.save_is_due():                         # after --save-minutes, or a signal
                    save()
        position.clock.pause()

        # ---- validate, keep the weights, write the log --------------------------------------------
        guard.check()
        distributed.broadcast_weights(model)                  # with rank 0's BatchNorm statistics
        logits = predict(job.classifier, job.validation, f"{job.role} validation",
                         lambda: run.stop_if_requested(save))
        result = scores(logits, job.validation.labels)
        keep = result["accuracy"] > position.kept_score or cfg.select == "last"
        if keep:
            position.kept_score, position.kept_epoch = result["accuracy"], epoch + 1
            row = {**result, "kept_epoch": position.kept_epoch}
            models.save(job.classifier, run.out / job.role, model_card(cfg, job.role, {job.role: row}))
        entry = epoch_entry(job, position, result, optimizer.param_groups[0]["lr"], guard.skipped)
        print(console.epoch_line(entry, job.epochs, keep), flush=True)
        run.log(entry)                                        # metrics.jsonl and TensorBoard
        position.next_epoch()
        save()


def training_forward(job: Job, cfg: Config) -> nn.Module:
    """The model from uint8 pixels to what the loss takes: over the ranks, and compiled if that pays."""
    model, prep, *_, machine = job.classifier
    with_features = job.teacher is not None and job.teacher.options.with_features
    forward: nn.Module = models.FromPixels(model, prep, with_features)
    forward = distributed.wrap(forward)                       # DistributedDataParallel under torchrun
    steps = job.epochs * count_batches(len(job.train), cfg.batch_size)
    if runtime.compile_pays(machine, steps):
        print(f"{job.role}: compiled, for {steps:,} steps")
        forward = runtime.compiled(forward, cfg.batch_size)
    return forward


def seed_dropout(seed: int, step: int) -> None:
    """For dropout, if there is any: other numbers in every step and in every rank."""
    torch.manual_seed((seed * 1_000_003 + step) * distributed.world_size() + distributed.rank())


def epoch_entry(job: Job, position: Position, result: dict[str, Any], lr: float,
                skipped: int) -> dict[str, Any]:
    """One line of metrics.jsonl. Collective: under torchrun every rank must call it.

    result: scores on validation; lr: of the last step; skipped: steps that overflowed fp16, since
    this process began with the role.
    """
    samples, seconds = len(job.train), position.clock.seconds
    # batches whose logits the teacher computed, in all ranks, since the run began or was resumed
    computed = distributed.sum_over_ranks(job.teacher.store.teacher_batches) if job.teacher else 0
    shown = ("accuracy", "macro_f1", "loss", "calibration_error", "correct")
    return {
        "role": job.role, "epoch": position.epoch + 1,
        "train_loss": distributed.mean_over_ranks(position.loss_sum).item() / samples,
        **{key: result[key] for key in shown},
        "lr": lr, "skipped": skipped, "images_per_second": samples / seconds, "seconds": seconds,
        "teacher_batches": computed}


# ---- the whole run --------------------------------------------------------------------------------

def main(cfg: Config) -> dict[str, Any]:
    """The whole run. Returns what result.json holds. Raises BadInput, TrainingFault or Stopped."""
    check(cfg)
    machine = runtime.start(cfg.device, cfg.amp, cfg.compile, cfg.kernels)
    check_without_loading(cfg, machine)
    distributed.join(machine.device)                          # meet the other ranks, if any
    # Refuses a folder that holds another run, unless --resume or --overwrite says what to do.
    # Ctrl-C then makes `fit` finish its step, save and leave.
    with Run.open(cfg.folder(), dataclasses.asdict(cfg), cli.free_flags(Config), cfg.save_minutes,
                  cfg.resume, cfg.overwrite) as run:
        if run.finished:
            print(f"{run.out} is finished: nothing to do")
            push(run, cfg)
            return run.finished

        # ---- 1. Data and models. From here on the folder is a run. ----------------------------------
        table = open_dataset(cfg.dataset, config=cfg.config, image=cfg.image, label=cfg.label,
                             unlabelled=cfg.unlabelled)
        task = prepare(table, cfg, machine, run)

        # ---- 2. The teacher is fine-tuned, by the same loop, on fresh views. ------------------------
        if cfg.teacher_epochs:
            train_once(teacher_job(task, cfg), cfg, run)
        else:
            models.save(task.teacher, run.out / "teacher", model_card(cfg, "teacher", {}))

        # ---- 3. It is frozen. From here on it only answers, and each answer is kept. ----------------
        teacher = freeze(task, cfg)
        tests = {"teacher": test("teacher", task.teacher, task.data_for_teacher, cfg, run, teacher.predict)}
        print(console.teacher_line(tests["teacher"].row))
        if not cfg.allow_weak_teacher:                        # BadInput near chance
            refuse_weak(cfg.teacher, tests["teacher"].validation, task.data.validation.labels)

        for role in ("control", "student") if cfg.control else ("student",):

            # ---- 4. The control, then the student: the same initial weights, as many steps. ---------
            job = student_job(role, task, teacher, cfg)
            train_once(job, cfg, run)                         # the kept weights are now in its model

            # ---- 5. These weights, once, on test. Not in the precision of training, but in that of
            # `python -m kd evaluate`. -----------------------------------------------------------------
            classifier = job.classifier._replace(machine=machine)
            tests[role] = test(role, classifier, task.data, cfg, run, partial(predict, classifier),
                               tests["teacher"].test)

        # ---- 6. The tables, result.json, the model cards, the page, the Hub. -------------------------
        result = finish(tests, teacher, task, cfg, run)
    distributed.leave()
    return result


class Task(NamedTuple):
    """What a run has before anything is trained. Control and student see `data`, the teacher its own."""

    machine: Runtime
    views: Views
    teacher: Classifier                     # with the weights that it starts from
    prep: models.Preprocessing              # of the student
    data: Data                              # decoded for the student
    data_for_teacher: Data                  # the same pictures, resized for the teacher
    roles: few_labels.ByRole                # what each role learns from
    roles_for_teacher: few_labels.ByRole


def check_without_loading(cfg: Config, machine: Runtime) -> None:
    """Raise BadInput for what can be found wrong before data or weights are loaded."""
    distributed.check_batch_size(cfg.batch_size)
    models.check("teacher", cfg.teacher, cfg.teacher_weights)
    models.check("student", cfg.student, cfg.student_weights)
    hub.check(cfg.push_to_hub)
    if cfg.kernels == "on" and (missing := blocks.kernels_missing(machine.device.type)):
        raise BadInput(f"--kernels on: {missing}; use --kernels auto")


def prepare(table: Table, cfg: Config, machine: Runtime, run: Run) -> Task:
    """Decode the pictures, load the models, and compare all of it with what the run began with."""
    student = build("student", table.classes, cfg, machine)   # only looked at; each role gets its own
    teacher = build("teacher", table.classes, cfg, machine)
    if cfg.compares_features:
        features.refuse_without("teacher", teacher, cfg.method, cfg.size_of("teacher"))
        features.refuse_without("student", student, cfg.method, cfg.size)

    # One crop for all; mean, std and interpolation are each model's own.
    prep = models.preprocessing(student)
    teacher_prep = models.preprocessing(teacher)._replace(crop_pct=prep.crop_pct)
    data = data_for_teacher = decode_for(prep, cfg.size, table, cfg, run)
    teacher_size = cfg.size_of("teacher")
    if (teacher_prep.interpolation, teacher_size) != (prep.interpolation, cfg.size):
        data_for_teacher = decode_for(teacher_prep, teacher_size, table, cfg, run)

    # Teacher and control learn from the labelled pictures, the student from all of them.
    usable = new_pictures(data)                               # of --unlabelled
    roles = few_labels.by_role(data, cfg.labels, cfg.seed, usable)
    roles_for_teacher = few_labels.by_role(data_for_teacher, cfg.labels, cfg.seed, usable)
    views = Views(cfg.seed, cfg.size, AUGMENTATIONS[cfg.augment], cfg.views)

    # Random weights come from the seed, and another processor may round them differently.
    starts = {f"{role}_weights": "none" if weights == "none" else models.digest(model)
              for role, weights, model in (("teacher", cfg.teacher_weights, teacher),
                                           ("student", cfg.student_weights, student))}
    loss_name = choose_loss("student", cfg, machine, len(table.classes))[1]
    run.begin({"dataset": data.digest(), **starts, "amp": str(machine.amp)}, {"data": table.record()},
              f"{machine.line}, {blocks.instructions()}, {type(student).__name__}, loss {loss_name}")
    print(headline(table.name, data, roles, teacher, student, loss_name, cfg, machine),
          *duplicates(data), sep="\n")                        # equal pictures in two splits
    classifier = Classifier(teacher, teacher_prep, teacher_size, table.classes, machine)
    return Task(machine, views, classifier, prep, data, data_for_teacher, roles, roles_for_teacher)


def build(role: str, classes: tuple[str, ...], cfg: Config, machine: Runtime) -> nn.Module:
    """A new "teacher" or "student", on its device. Random weights come from the seed."""
    torch.manual_seed(cfg.seed)
    name, weights = getattr(cfg, role), getattr(cfg, f"{role}_weights")
    model = models.create(role, name, classes, weights, cfg.size_of(role))
    model = model.to(machine.device).to(memory_format=torch.channels_last)
    if cfg.sync_bn:
        return distributed.synchronise_batchnorm(model, machine.device)
    return blocks.accelerate(model) if machine.kernels else model


def decode_for(prep: models.Preprocessing, size: int, table: Table, cfg: Config, run: Run) -> Data:
    """Every picture, resized as `prep` and `size` say: read from --cache-dir, or decoded now."""
    splits = decode(table, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                    cache_dir=cfg.cache_dir, progress=run.stop.raise_if_requested)
    return Data(table.classes, **splits)


def teacher_job(task: Task, cfg: Config) -> Job:
    """The teacher's fine-tuning, on fresh views.

    It learns from the labels as they are: a teacher distils worse where they were smoothed (Müller,
    Kornblith and Hinton 2019, arXiv:1906.02629).
    """
    views = Views(cfg.seed, task.teacher.size, AUGMENTATIONS[cfg.teacher_augment], count=0)
    loss_fn, _ = choose_loss("teacher", cfg, task.machine, len(task.data.classes))
    classifier = task.teacher._replace(machine=precision_for(task.teacher.model, cfg, task.machine))
    return Job("teacher", classifier, task.roles_for_teacher.teacher, task.data_for_teacher.validation,
               views, cfg.teacher_epochs, cfg.teacher_lr, loss_fn)


def student_job(role: str, task: Task, teacher: Teacher, cfg: Config) -> Job:
    """The training of the control or of the student. Both start from the same weights.

    At λ = 0 nothing is learned from a picture without a label, so the student is a control.
    """
    model = build("student", task.data.classes, cfg, task.machine)
    classifier = Classifier(model, task.prep, cfg.size, task.data.classes,
                            precision_for(model, cfg, task.machine))
    learns = role == "student" and cfg.kd_weight > 0
    if learns and cfg.method == "simkd":
        features.reuse_head(model, teacher.classifier.model)  # a head that the control has not
    loss_fn, _ = choose_loss("student" if learns else "control", cfg, task.machine,
                             len(task.data.classes))
    return Job(role, classifier, task.roles.student if learns else task.roles.control,
               task.data.validation, task.views, cfg.epochs, cfg.lr, loss_fn,
               teacher if learns else None)


def choose_loss(role: str, cfg: Config, machine: Runtime, classes: int) -> tuple[LossFunction, str]:
    """loss_fn(student_outputs, teacher_outputs, labels) of a role, with T and λ bound, and its name."""
    return losses.choose(kd_loss, cfg.loss, machine.device, cfg.temperature,
                         cfg.kd_weight if role == "student" else 0.0, classes, machine.kernels,
                         0.0 if role == "teacher" else cfg.label_smoothing, cfg.method, cfg.standardise)


def precision_for(model: nn.Module, cfg: Config, machine: Runtime) -> Runtime:
    """`machine`, but float32 under `--amp auto` for a model that CPUs train more slowly in bf16."""
    slow = cfg.amp == "auto" and blocks.slow_in_bf16(model)
    return machine._replace(amp=None) if slow else machine


def train_once(job: Job, cfg: Config, run: Run) -> None:
    """`fit`, unless a resumed run has done so already. Then the kept weights are in the job's model."""
    if not run.done(job.role):
        fit(job, cfg, run)
        run.mark_done(job.role)
    model = job.classifier.model
    features.merge_head(model)                                # as in the folder
    distributed.broadcast_from_rank0(lambda: models.load_saved(run.out / job.role, model))
    distributed.broadcast_weights(model)


def freeze(task: Task, cfg: Config) -> Teacher:
    """The teacher as it teaches: it sees the student's views, in its own size."""
    models.freeze(task.teacher.model)
    options = StoreOptions(Path(cfg.cache_dir).expanduser() / "logits", cfg.topk, cfg.temperature,
                           cfg.compares_features)
    views = dataclasses.replace(task.views, size=task.teacher.size)
    return Teacher(task.teacher, task.roles_for_teacher.student, views, options)


class Test(NamedTuple):
    """One model's logits, and its scores as a row of result.json."""

    validation: np.ndarray          # (N, C) float32
    test: np.ndarray                # (N, C) float32
    row: dict[str, Any]


def test(role: str, classifier: Classifier, data: Data, cfg: Config, run: Run,
         logits_of: Callable[..., np.ndarray], teacher_logits: np.ndarray | None = None) -> Test:
    """The kept weights on validation and test; `logits_of` is given a split, its name and `stop`."""
    validation, test = (logits_of(split, f"{role} {name}", run.stop_if_requested)
                        for name, split in (("validation", data.validation), ("test", data.test)))
    row = {"model": cfg.teacher if role == "teacher" else cfg.student,
           "params": models.parameters(classifier.model),
           "validation_accuracy": scores(validation, data.validation.labels)["accuracy"]}
    for key, value in scores(test, data.test.labels, teacher_logits).items():
        shown = key in ("accuracy", "macro_f1", "correct", "total")
        row[f"test_{key}" if shown else key] = value
    return Test(validation, test, row)


def finish(tests: dict[str, Test], teacher: Teacher, task: Task, cfg: Config,
           run: Run) -> dict[str, Any]:
    """Print the closing tables, and write what a run leaves behind. Returns what result.json holds."""
    data, rows = task.data, {role: tested.row for role, tested in tests.items()}
    gain = None                                               # of the student over the control
    if cfg.control:
        gain = compare_paired(tests["student"].test, tests["control"].test, data.test.labels)
    student = tests["student"].test.argmax(axis=1)
    print(console.confusion_table(confusions(data.test.labels, student), data.classes))
    print(console.results_table(rows, gain))
    rates = [entry["images_per_second"] for entry in run.history if entry["role"] == "student"]
    result = {**rows, **({"gain": gain} if gain else {}),
              "images_per_second": float(np.median(rates)), "seconds": run.seconds,
              "teacher_batches": distributed.sum_over_ranks(teacher.store.teacher_batches),
              "config": dataclasses.asdict(cfg), "environment": runtime.environment(),
              "commit": run.commit}
    if distributed.rank() == 0:
        result = run.write_result(result)                     # one that is there already stays
        for role in rows:
            files.write_atomic(run.out / role / "README.md", model_card(cfg, role, rows).encode())
        # The page comes last: if plotting fails, the result is safe, and --resume comes back here.
        from kd.tools import page                             # here, because matplotlib loads slowly
        print("report:", page.write_report(run.out, {role: each.test for role, each in tests.items()},
                                           data, task.views, cfg.epochs))
        push(run, cfg)
    return result


def model_card(cfg: Config, role: str, rows: dict[str, dict[str, Any]]) -> str:
    """README.md of a saved folder. rows: its own scores on validation, or at the end all on test."""
    return card.render_card(role, rows, dataclasses.asdict(cfg), cli.command(cfg, RECIPES))


def push(run: Run, cfg: Config) -> None:
    """Upload the student, if --push-to-hub says so. A failure is one line and harms nothing."""
    if cfg.push_to_hub and distributed.rank() == 0:
        print(hub.push_folder(str(run.out / "student"), cfg.push_to_hub, "kd: the student of a finished run"))


def headline(name: str, data: Data, roles: few_labels.ByRole, teacher: nn.Module, student: nn.Module,
             loss_name: str, cfg: Config, machine: Runtime) -> str:
    """The first line of a run: machine, data, models, loss."""
    counts = " + ".join(str(len(split)) for split in (roles.student, data.validation, data.test))
    if roles.teacher is not roles.student:
        counts += f" ({len(roles.teacher)} labels in train)"
    return (f"{machine.line} | {name}: {counts} pictures, {len(data.classes)} classes, "
            f"{cfg.size} px{f', teacher {cfg.teacher_size} px' if cfg.teacher_size else ''} | "
            f"teacher {cfg.teacher} ({models.parameters(teacher):,}) | "
            f"student {cfg.student} ({models.parameters(student):,}) | "
            f"loss {loss_name}")


if __name__ == "__main__":
    cli.run(main, CONFIG)
