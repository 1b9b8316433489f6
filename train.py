"""Distil a large image classifier (teacher) into a small one (student), in one explicit loop.

    python train.py                                  a demo of some minutes on two CPU cores
    python train.py --resume                         the same run, from where it was stopped
    python train.py --recipe tutorial --control      the Hugging Face tutorial, with a control
    torchrun --standalone --nproc-per-node=4 train.py ...      several GPUs, or several processes

The student learns from the labels and from the teacher's logits:

    loss = (1 - λ)·CE(student, labels) + λ·T²·KL(softmax(teacher / T) ‖ softmax(student / T))

With --control the same student is also trained without the teacher, which shows what the teacher
was worth. A run ends with a table of their scores on the test split. It leaves the weights, a log
and a page to look at in --out.

Read `train_step` (one step), then `fit` (one training), then `main` (the whole run).
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd import cli
from kd.augmentations import AUGMENTATIONS
from kd.cli import flag


@dataclass(frozen=True)
class Config:
    """Every flag, its default and its meaning.

    These defaults equal the recipe "tutorial". Without --recipe, the recipe "demo" overrides some.
    """

    # The run
    recipe: str = flag("demo", "settings to start from; flags override them",
                       ("demo", "tutorial", "best", "few"))
    seed: int = flag(0, "decides weights, order and views: the same seed gives the same run",
                     low=0, high=2**32 - 1)
    out: str = flag("", "folder of the run (default: runs/RECIPE, or runs/RECIPE-DATASET where the "
                        "data are not the recipe's own)")
    resume: bool = flag(False, "go on with the run in --out, exactly where it stopped")
    overwrite: bool = flag(False, "replace the run in --out")
    control: bool = flag(False, "also train the same student without the teacher, to compare")

    # Data
    dataset: str = flag("beans", "leaves (drawn, offline), a Hub dataset id, or a folder")
    config: str = flag("", "configuration of --dataset, where it has several")
    image: str = flag("", "column of --dataset with the pictures, where that cannot be told")
    label: str = flag("", "column of --dataset with the labels, where that cannot be told")
    follow_links: bool = flag(False, "follow links that lead out of the folder of --dataset or "
                              "--unlabelled")
    labels: int = flag(0, "keep that many labels of train, drawn by --seed, equally many of each class; "
                       "the student learns the other pictures from its teacher only; 0: all labels",
                       low=0)
    unlabelled: str = flag("", "more pictures for the student, without labels: a folder or a data set")
    size: int = flag(224, "side of the square input, in pixels", low=16)
    teacher_size: int = flag(0, "side of the teacher's input, if it is another one: it then sees the "
                             "same view with more or fewer pixels", low=0)
    augment: str = flag("none", "what a view may change (flip, crop, mixup: also upside down; "
                        "flip-x, crop-x: mirrored only; crop-only: neither)", tuple(AUGMENTATIONS))
    views: int = flag(1, "K, views of a sample: epoch e uses view e mod K; 0: a fresh one each epoch",
                      low=0)
    cache_dir: str = flag(cli.CACHE_DIR, "where decoded pictures and the teacher's logits are kept")

    # The teacher, fine-tuned before it teaches, with the optimizer settings below
    teacher: str = flag("resnet50", "timm model that teaches; or hf-hub:OWNER/NAME, local-dir:FOLDER")
    teacher_weights: str = flag("imagenet", "imagenet (timm's, or those of that repository or folder), "
                                "none (random), a weights file, or a saved folder")
    teacher_epochs: int = flag(8, "epochs of fine-tuning before it teaches; 0: as loaded", low=0)
    teacher_lr: float = flag(1e-3, "peak learning rate of the teacher's fine-tuning", above=0)
    teacher_augment: str = flag("crop-x", "what a view may change in its fine-tuning",
                                tuple(AUGMENTATIONS))
    allow_weak_teacher: bool = flag(False, "go on even if the teacher is near chance")
    topk: int = flag(0, "keep only that many of the teacher's largest logits; 0: all of them", low=0)

    # The student and its loss
    student: str = flag("mobilenetv2_100", "timm model that learns")
    student_weights: str = flag("none", "what it and its control start from: none (random), or as for "
                                "the teacher")
    temperature: float = flag(5.0, "T, softens the outputs of teacher and student (kd, dkd, nkd, dist)",
                              above=0, high=1000)
    kd_weight: float = flag(0.5, "λ, the teacher's share of the loss", low=0, high=1)
    method: str = flag("kd", "what the student learns from its teacher (kd/methods.py has the formulas)",
                       ("kd", "hard", "dkd", "dist", "nkd", "pkt", "rkd", "simkd"))
    standardise: bool = flag(False, "standardise each row of logits before the method compares them")
    label_smoothing: float = flag(0.0, "share of a label that goes to all classes; not the teacher's", low=0, high=1)
    select: str = flag("best", "keep the weights of the best epoch by validation, or of the last one",
                       ("best", "last"))

    # The optimizer, AdamW. All but --epochs and --lr also hold for the teacher's fine-tuning.
    epochs: int = flag(30, "epochs of the student and of its control", low=1)
    batch_size: int = flag(8, "samples a step, over all ranks and parts", low=2)
    lr: float = flag(5e-5, "peak learning rate of the student and of its control", above=0)
    schedule: str = flag("linear", "decay of the learning rate to zero, also the teacher's",
                         ("linear", "cosine"))
    warmup: float = flag(0.0, "share of the steps over which the rate rises, also the teacher's",
                         low=0, high=1)
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay, also the teacher's", low=0)
    clip: float = flag(1.0, "largest norm of the gradient, also the teacher's", above=0)
    accumulate: int = flag(1, "take a batch in that many parts, to need less memory", low=1)
    sync_bn: bool = flag(False, "BatchNorm over the batch of all ranks, not over each rank's share")

    # Speed. `--kernels off --compile off --amp off` runs the plain loop that you read here.
    device: str = flag("auto", "where to compute; mps and xpu have not been tried",
                       ("auto", "cpu", "cuda", "mps", "xpu"))
    amp: str = flag("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    compile: str = flag("auto", "torch.compile the training (auto: on CUDA, from 20,000 steps on)",
                        ("auto", "on", "off"))
    kernels: str = flag("auto", "fused kernels (kd/fast) and a tuned allocator where they run; on: or "
                        "refuse; off: plain PyTorch", ("auto", "on", "off"))
    loss: str = flag("auto", "implementation of the loss", ("auto", "reference", "fused"))

    # Output
    save_minutes: float = flag(10.0, "a checkpoint this often, and after every epoch", low=0)
    quiet: bool = flag(False, "print nothing but the closing line of JSON, and errors")
    push_to_hub: str = flag("", "upload the student to this Hub repository, such as someone/student")
    push: str = flag("end", "upload it at the end, or also whenever an epoch's weights are kept",
                     ("end", "every-epoch"))
    private: bool = flag(False, "if --push-to-hub makes a new repository, make it private")

    def size_of(self, role: str) -> int:
        """Side of the input of "teacher", "control" or "student", in pixels."""
        if role == "teacher" and self.teacher_size:
            return self.teacher_size
        return self.size

    @classmethod
    def of(cls, recipe: str = "demo", **flags: Any) -> "Config":
        """A recipe and flags, as on the command line: Config.of("demo", epochs=3). Raises BadInput."""
        return cli.build_config(cls, RECIPES, {**flags, "recipe": recipe})


RECIPES: dict[str, dict[str, Any]] = {
    # Some minutes on two CPU cores and nothing to download: both models start from random weights.
    "demo": dict(
        dataset="leaves", size=96, epochs=8, batch_size=16, lr=3e-3, schedule="cosine", warmup=0.1,
        weight_decay=0.02, teacher="resnet10t", teacher_weights="none", teacher_epochs=4,
        teacher_lr=3e-3, teacher_augment="flip", augment="flip", views=0),
    "tutorial": dict(),
    # "A good teacher is patient and consistent" (Beyer et al. 2022): no labels, only the teacher's
    # logits, on fresh views of every sample, for a long time.
    "best": dict(
        size=96, epochs=200, batch_size=32, lr=3e-3, schedule="cosine", warmup=0.1,
        weight_decay=0.02, teacher="tf_efficientnet_lite0", teacher_epochs=24, temperature=2.0,
        kd_weight=1.0, augment="crop", views=0),
    # Few labelled pictures and many others: a teacher from ImageNet weights answers for all of them.
    "few": dict(
        size=96, epochs=60, batch_size=32, lr=3e-3, schedule="cosine", warmup=0.1, weight_decay=0.02,
        teacher="tf_efficientnet_lite0", teacher_epochs=60, temperature=2.0, kd_weight=1.0,
        augment="crop-x", views=0, select="last"),
}

# What may differ between a run and its continuation. Any other change would make it another run.
FREE_ON_RESUME = {"out", "resume", "overwrite", "cache_dir", "save_minutes", "device", "quiet",
                  "push_to_hub", "push", "private", "allow_weak_teacher", "follow_links"}

# Flags are parsed before torch is loaded, which takes seconds. So --help and typos answer at once.
CONFIG = cli.parse_or_exit(Config, RECIPES, __doc__) if __name__ == "__main__" else None

import numpy as np
import torch
from torch import Tensor, nn

from kd import BadInput, features, few_labels, losses, methods, models
from kd.batches import Batch, count_batches, load_batches
from kd.data.duplicates import duplicates
from kd.data.frames import Data, decode
from kd.data.samples import Dataset, Reading
from kd.data.sources import open_dataset, with_unlabelled
from kd.data.splits import record
from kd.fast import blocks
from kd.losses import LossFunction
from kd.machine import console, distributed, files, hub, runtime, signals
from kd.machine.health import Guard
from kd.machine.runtime import Runtime
from kd.predict import predict
from kd.run import Position, Run, Saved, default_folder, refuse_inside, unlocked
from kd.scores import compare_paired, refuse_weak, scores, test_row
from kd.teacher import StoreOptions, Teacher
from kd.tools import card
from kd.views import Views


@dataclass
class Job:
    """One training: all that differs between the teacher, the control and the student."""

    role: str                       # "teacher", "control" or "student"
    model: nn.Module
    prep: models.Preprocessing      # mean, std and interpolation that timm declares for it
    data: Data                      # pictures, resized as `prep` says
    views: Views                    # which pixels each epoch sees
    machine: Runtime                # device and precision
    epochs: int
    lr: float                       # peak learning rate
    kd_weight: float = 0.0          # λ; 0 where there is no teacher
    teacher: Teacher | None = None


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               batch: Batch, teacher_outputs: Tensor | None, loss_fn: LossFunction, cfg: Config,
               machine: Runtime) -> tuple[Tensor, Tensor]:
    """One training step: forward, loss, backward, update.

    model            uint8 `(B, 3, H, W)` to logits `(B, C)`, or with D features behind to `(B, C + D)`
    batch            this rank's share of a batch: pixels, labels, and its weight among the ranks
    teacher_outputs  the same of the teacher, float32, or None where there is no teacher
    loss_fn          (student_outputs, teacher_outputs, labels) to the mean loss, a scalar

    Returns the loss and the norm of its gradient, two scalars. They stay on the device: on a GPU,
    nothing in here waits for it. With several ranks, the mean of their losses is that of the batch.
    Methods that compare the pictures of a batch are the exception (`kd/methods.py`).
    """
    rows = len(batch.pixels)
    total = torch.zeros((), device=batch.pixels.device)
    parts = distributed.split_batch(rows, cfg.accumulate)     # slices; by default one, of all rows
    for part in parts:
        # DistributedDataParallel averages the gradients over the ranks in `backward`. Once is enough,
        # so only the last part does it. Which part that is must be known in the forward.
        with machine.autocast(), distributed.sync_gradients(model, part is parts[-1]):
            outputs = model(batch.pixels[part])
        teacher_part = None if teacher_outputs is None else teacher_outputs[part]
        loss = loss_fn(outputs, teacher_part, batch.labels[part])
        # A mean over fewer rows counts less, both among the parts and among the ranks.
        loss = loss * (batch.weight * len(outputs) / rows)
        scaler.scale(loss).backward()                         # the scale is 1, except in fp16
        total += loss.detach()

    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
    scaler.step(optimizer)                                    # skipped if fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then decay to zero."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    progress = (step - rise) / max(steps - rise, 1)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress)


def fit(job: Job, cfg: Config, run: Run) -> None:
    """Train `job.model`. The weights of its best epoch, or its last, are saved to `run.out / job.role`.

    The teacher, the control and the student all come through here. Only the student has a
    `job.teacher`.

    A resumed run continues exactly, on the same device. Batches, views, dropout and learning rate are
    functions of (seed, epoch, step), so a checkpoint needs only the position and `saved`, below.

    Under torchrun every rank runs this on its share of each batch. Only rank 0 prints and writes.
    """
    model, train, validation, machine = job.model, job.data.train, job.data.validation, job.machine

    # ---- what the loop needs ---------------------------------------------------------------------
    loss_fn, _ = choose_loss(job.data, job.views, job.kd_weight, cfg, machine, job.role)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=cfg.weight_decay,
                                  fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]                     # the peak; each group may have its own
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp is torch.float16)
    guard = Guard(job.role, model, machine.device, machine.amp)   # ends the run at NaN or infinity

    # What else a checkpoint holds. Add whatever must survive a resume, such as an average of weights.
    saved: dict[str, Saved] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # Epoch 0, step 0; in a resumed run, the place where it stopped, with `saved` filled as it was.
    # The run remembers all of it: from now on `run.save()` asks `guard`, then writes last.ckpt.
    position = run.restore(job.role, saved, guard, machine.device)

    # Teacher and student see the same pixels, each normalised as its own weights expect.
    with_features = job.teacher is not None and job.teacher.options.with_features
    forward: nn.Module = models.FromPixels(model, job.prep, with_features)
    forward = distributed.wrap(forward, machine.device)       # DistributedDataParallel under torchrun
    steps_per_epoch = count_batches(len(train), cfg.batch_size)   # a short last batch counts
    total_steps = job.epochs * steps_per_epoch
    if runtime.compile_pays(machine, total_steps):
        print(f"{job.role}: compiled, for {total_steps:,} steps")
        # Where the compiler fails, at the first batch, the plain operations run.
        forward = runtime.compiled(forward, cfg.batch_size, cfg.accumulate)

    for epoch in range(position.epoch, job.epochs):

        # ---- train for one epoch -----------------------------------------------------------------
        model.train()
        position.clock.start()
        # the shuffle of (views.seed, epoch), starting at position.step
        batches = load_batches(job.data, job.views, epoch, cfg.batch_size, position.step,
                               machine.device)
        label = f"{job.role} {epoch + 1}/{job.epochs}"
        bar = console.progress(len(train), label, initial=position.step * cfg.batch_size)
        with contextlib.closing(batches), bar:                # ends the thread that makes them ahead
            for batch in batches:
                step = epoch * steps_per_epoch + position.step
                # For dropout, if there is any: other numbers in every step and in every rank.
                torch.manual_seed((cfg.seed * 1_000_003 + step) * distributed.world_size()
                                  + distributed.rank())
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total_steps, group["initial_lr"], cfg.schedule,
                                                cfg.warmup)

                # The teacher's outputs for the view that the student sees: read from disk where this
                # (view, sample) was met before, else computed and kept.
                teacher_outputs = job.teacher.outputs(batch) if job.teacher else None

                # ---- a single training step ----
                loss, norm = train_step(forward, optimizer, scaler, batch, teacher_outputs, loss_fn,
                                        cfg, machine)
                # --------------------------------

                position.step += 1
                position.loss_sum += loss * batch.total       # samples of all ranks
                guard.note(step, loss, norm)                  # are loss and gradient finite?
                bar.update(batch.total)
                console.show_loss(bar, position.step, loss)
                if run.save_is_due():                         # after --save-minutes, or a signal
                    run.save()                                # after a signal, raises Stopped
        position.clock.pause()

        # ---- validate ----------------------------------------------------------------------------
        guard.check()
        distributed.broadcast_weights(model)                  # with rank 0's BatchNorm statistics
        logits = predict(model, validation.frames, job.prep, job.views.size, machine,
                         f"{job.role} validation", run.stop_if_requested)
        result = scores(logits, validation.labels)

        # ---- keep the weights, write the log ----------------------------------------------------
        keep = result["accuracy"] > position.kept_accuracy or cfg.select == "last"
        if keep:
            position.kept_accuracy, position.kept_epoch = result["accuracy"], epoch + 1
            row = {**result, "kept_epoch": position.kept_epoch}
            models.save(model, run.out / job.role, job.data.classes, job.prep, job.views.size,
                        model_card(cfg, job.role, {job.role: row}))
        entry = epoch_entry(job, position, result, optimizer.param_groups[0]["lr"], guard.skipped)
        print(console.epoch_line(entry, job.epochs, keep), flush=True)
        run.log(entry)                                        # metrics.jsonl and TensorBoard
        position.next_epoch()
        run.save()
        if keep and job.role == "student" and cfg.push == "every-epoch":
            push(run, cfg, f"kd: epoch {epoch + 1}")


def epoch_entry(job: Job, position: Position, result: dict[str, Any], lr: float,
                skipped: int) -> dict[str, Any]:
    """One line of metrics.jsonl.

    result: scores on validation; lr: of the last step; skipped: steps that overflowed fp16, since this process
    began with the role.
    Collective: under torchrun every rank must call it.
    """
    samples, seconds = len(job.data.train), position.clock.seconds
    # batches whose logits the teacher computed, in all ranks, since the run began or was resumed
    computed = distributed.sum_over_ranks(job.teacher.store.teacher_batches) if job.teacher else 0
    shown = ("accuracy", "macro_f1", "loss", "calibration_error", "correct")
    return {
        "role": job.role, "epoch": position.epoch + 1,
        "train_loss": distributed.mean_over_ranks(position.loss_sum).item() / samples,
        **{key: result[key] for key in shown},
        "lr": lr, "skipped": skipped, "images_per_second": samples / seconds, "seconds": seconds,
        "teacher_batches": computed}


@signals.handlers_restored()                                  # a notebook goes on after main
@unlocked()
@hub.online_again()
def main(cfg: Config, control_only: bool = False) -> dict[str, Any]:
    """The whole run. Returns what result.json holds. Raises BadInput, TrainingFault or Stopped.

    control_only: the student is trained as the control of this run would be, for `python -m kd probe`.
    """
    check(cfg)                                                # what can be found wrong right now
    if control_only:
        cfg = dataclasses.replace(cfg, kd_weight=0.0, control=False)
    machine = runtime.start(cfg.device, cfg.amp, cfg.compile, cfg.kernels)
    distributed.join(machine.device)                          # meet the other ranks, if any
    # Refuses a folder that holds another run, unless --resume or --overwrite says what to do.
    run = Run(folder_of(cfg), dataclasses.asdict(cfg), FREE_ON_RESUME, cfg.save_minutes, cfg.resume,
              cfg.overwrite, defaults=dataclasses.asdict(Config()))
    run.stop.install()                                        # Ctrl-C: finish the step, save, leave
    if run.finished:                                          # the result of a run with nothing left to do
        print(f"{run.out} is finished: nothing to do")
        push(run, cfg)
        return run.finished

    # ---- 1. Data and models. One crop for all; mean, std, interpolation are each model's own. ----
    dataset = open_dataset(cfg.dataset, reading_of(cfg))
    if cfg.unlabelled:
        dataset = with_unlabelled(dataset, cfg.unlabelled, cfg.follow_links)
    student = build("student", dataset.classes, cfg, machine)     # only looked at: section 4 builds anew
    prep = models.preprocessing(student)
    teacher_model = build("teacher", dataset.classes, cfg, machine)
    teacher_prep = models.preprocessing(teacher_model)._replace(crop_pct=prep.crop_pct)
    methods.check_models(cfg, teacher_model, student)

    data = data_for_teacher = decode_for(prep, cfg.size, dataset, cfg, run)
    teacher_size = cfg.size_of("teacher")
    if (teacher_prep.interpolation, teacher_size) != (prep.interpolation, cfg.size):
        data_for_teacher = decode_for(teacher_prep, teacher_size, dataset, cfg, run)
    # Teacher and control learn from the labelled pictures, the student from all of them.
    usable = few_labels.usable_rows(data)                     # of --unlabelled
    by_role, by_role_for_teacher = (few_labels.by_role(each, cfg.labels, cfg.seed, usable)
                                    for each in (data, data_for_teacher))
    # These must be the same in every rank, and the same as before a resume.
    # Random weights come from the seed, and another processor may round them differently.
    starts = {f"{role}_weights": "none" if getattr(cfg, f"{role}_weights") == "none" else models.digest(model)
              for role, model in (("teacher", teacher_model), ("student", student))}
    run.must_match(dataset=data.digest(), **starts, amp=str(machine.amp))
    run.write_config(data=record(dataset))                    # from here on, the folder is a run
    views = Views(cfg.seed, cfg.size, AUGMENTATIONS[cfg.augment], cfg.views)
    loss_name = choose_loss(data, views, cfg.kd_weight, cfg, machine)[1]
    # Other kernels and other processors round differently: a resumed run says so.
    run.computes_with(f"{machine.line}, {blocks.instructions()}, {type(student).__name__}, loss {loss_name}")
    print(headline(dataset.name, by_role, teacher_model, student, loss_name, cfg, machine),
          *duplicates(data), sep="\n")                        # equal pictures in two splits

    # ---- 2. The teacher is fine-tuned, by the same loop, on fresh views. --------------------------
    if cfg.teacher_epochs:
        teacher_views = Views(cfg.seed, teacher_size, AUGMENTATIONS[cfg.teacher_augment], count=0)
        job = Job("teacher", teacher_model, teacher_prep, by_role_for_teacher.teacher, teacher_views,
                  precision_for(teacher_model, cfg, machine), cfg.teacher_epochs, cfg.teacher_lr)
        train_once(job, cfg, run)
    else:
        models.save(teacher_model, run.out / "teacher", data.classes, teacher_prep, teacher_size,
                    model_card(cfg, "teacher", {}))

    # ---- 3. It is frozen. From here on it only answers, and each answer is kept. ------------------
    options = StoreOptions(Path(cfg.cache_dir).expanduser(), cfg.topk, cfg.temperature,
                           with_features=methods.compares_features(cfg))
    teacher = Teacher(models.freeze(teacher_model), teacher_prep, by_role_for_teacher.student,
                      dataclasses.replace(views, size=teacher_size), machine, options)
    run.flush_before_save(teacher.store)      # a checkpoint finds all its answers on the disk
    validation_logits = teacher.predict(data_for_teacher.validation, "teacher validation",
                                        run.stop_if_requested)
    accuracy = scores(validation_logits, data.validation.labels)["accuracy"]
    test_logits = {"teacher": teacher.predict(data_for_teacher.test, "teacher test",
                                              run.stop_if_requested)}
    rows = {"teacher": test_row(cfg.teacher, models.parameters(teacher_model),
                                scores(test_logits["teacher"], data.test.labels), accuracy)}
    print(console.teacher_line(rows["teacher"]))
    if not cfg.allow_weak_teacher:
        refuse_weak(cfg.teacher, validation_logits, data.validation.labels)     # BadInput near chance

    for role in ("control", "student") if cfg.control else ("student",):

        # ---- 4. The control, then the student: the same initial weights, as many steps. -----------
        model = build("student", data.classes, cfg, machine)
        if role == "student" and cfg.kd_weight:
            if cfg.method == "simkd":
                features.reuse_head(model, teacher_model)     # the exception: its head is not the control's
            job = Job(role, model, prep, by_role.student, views, precision_for(model, cfg, machine),
                      cfg.epochs, cfg.lr, cfg.kd_weight, teacher)
        else:
            # At λ = 0 nothing is learned from a picture without a label, so the student is a control.
            job = Job(role, model, prep, by_role.control, views, precision_for(model, cfg, machine),
                      cfg.epochs, cfg.lr)
        train_once(job, cfg, run)                             # the kept weights are now in `model`

        # ---- 5. These weights, once, on test, in the precision in which they will be used. ---------
        test_logits[role] = predict(model, data.test.frames, prep, cfg.size, machine,
                                    f"{role} test", run.stop_if_requested)
        rows[role] = test_row(cfg.student, models.parameters(model),
                              scores(test_logits[role], data.test.labels, test_logits["teacher"]),
                              run.kept_accuracy(role, cfg.select))

    # ---- 6. The tables, result.json, the model cards, the page, the Hub. --------------------------
    result = summarise(rows, test_logits, data, teacher, run, cfg)
    if distributed.rank() == 0:
        result = run.write_result(result)         # one that is there already stays
        for role in rows:
            text = model_card(cfg, role, rows)
            files.write_atomic(run.out / role / "README.md", text.encode())
        # The page comes last: if plotting fails, the result is safe, and the run is not finished:
        # --resume comes back here.
        from kd.tools import page                 # here, because its plotting library loads slowly
        print("report:", page.write_report(run.out, test_logits, data,
                                           dataset.splits["test"].name_of, views, cfg.epochs))
        push(run, cfg)
    return result


# ---- what main calls ------------------------------------------------------------------------------

def check(cfg: Config) -> None:
    """Raise BadInput for what can be found wrong without loading anything."""
    cli.check(cfg)
    distributed.check_batch_size(cfg.batch_size, cfg.accumulate)
    methods.check_flags(cfg)
    models.check("teacher", cfg.teacher, cfg.teacher_weights)
    models.check("student", cfg.student, cfg.student_weights)
    if cfg.kernels == "on" and blocks.unavailable():
        raise BadInput(f"--kernels on: {blocks.unavailable()}; use --kernels auto")
    if cfg.unlabelled and not cfg.kd_weight:
        raise BadInput("--unlabelled: nothing learns from pictures without labels at --kd-weight 0; give "
                       "the teacher a share, or leave it out")
    hub.check(cfg.push_to_hub)
    if cfg.overwrite and not cfg.resume:
        for role in ("teacher", "student"):
            refuse_inside(folder_of(cfg), f"--{role}", getattr(cfg, role).removeprefix("local-dir:"))
            refuse_inside(folder_of(cfg), f"--{role}-weights", getattr(cfg, f"{role}_weights"))


def folder_of(cfg: Config) -> Path:
    """The folder of the run: --out, or the default one."""
    own_dataset = RECIPES[cfg.recipe].get("dataset", Config.dataset)
    return Path(cfg.out or default_folder(cfg.recipe, cfg.dataset, cfg.config, own_dataset)).expanduser()


def reading_of(cfg: Config) -> Reading:
    """What the flags say about how to read the data set."""
    return Reading(config=cfg.config, image=cfg.image, label=cfg.label, follow_links=cfg.follow_links)


def build(role: str, classes: tuple[str, ...], cfg: Config, machine: Runtime) -> nn.Module:
    """A new "teacher" or "student", on its device. Random weights come from the seed."""
    torch.manual_seed(cfg.seed)
    size = cfg.size_of(role)
    option = "--teacher-size" if role == "teacher" and cfg.teacher_size else "--size"
    name, weights = getattr(cfg, role), getattr(cfg, f"{role}_weights")
    model = models.create(role, name, classes, weights, size, option=option)
    model = model.to(machine.device).to(memory_format=torch.channels_last)
    models.check_size(model, size, option)
    if cfg.sync_bn:
        return distributed.synchronise_batchnorm(model, machine.device)
    return blocks.accelerate(model) if machine.kernels else model


def decode_for(prep: models.Preprocessing, size: int, dataset: Dataset, cfg: Config, run: Run) -> Data:
    """Every picture, resized as `prep` and `size` say: read from --cache-dir, or decoded now."""
    return decode(dataset, size=size, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                  cache_dir=cfg.cache_dir, progress=run.stop.raise_if_requested)


def precision_for(model: nn.Module, cfg: Config, machine: Runtime) -> Runtime:
    """`machine`, but float32 under `--amp auto` for a model that CPUs train more slowly in bf16."""
    slow = cfg.amp == "auto" and blocks.slow_in_bf16(model)
    return machine._replace(amp=None) if slow else machine


def choose_loss(data: Data, views: Views, kd_weight: float, cfg: Config, machine: Runtime,
                role: str = "student") -> tuple[LossFunction, str]:
    """loss_fn(student_outputs, teacher_outputs, labels), with T and λ bound, and its name.

    A teacher learns from the labels as they are: it distils worse where they were smoothed (Müller,
    Kornblith and Hinton 2019, arXiv:1906.02629).
    """
    smoothing = 0.0 if role == "teacher" else cfg.label_smoothing
    return losses.choose(cfg.loss, machine.device, cfg.temperature, kd_weight, len(data.classes),
                         soft_labels=views.augmentation.mixup > 0, kernels=machine.kernels,
                         label_smoothing=smoothing, method=cfg.method,
                         standardised=cfg.standardise)


def train_once(job: Job, cfg: Config, run: Run) -> None:
    """`fit`, unless a resumed run has done so already. Then the kept weights are in `job.model`."""
    if not run.done(job.role):
        fit(job, cfg, run)
        run.mark_done(job.role)
    run.load_kept(job.role, job.model)


def headline(name: str, pictures: few_labels.ByRole, teacher: nn.Module, student: nn.Module,
             loss_name: str, cfg: Config, machine: Runtime) -> str:
    """The first line of a run: machine, data, models, loss."""
    data = pictures.student
    counts = " + ".join(str(len(split)) for split in (data.train, data.validation, data.test))
    if pictures.teacher is not data:
        counts += f" ({len(pictures.teacher.train)} labels in train)"
    return (f"{machine.line} | {name}: {counts} pictures, {len(data.classes)} classes, "
            f"{cfg.size} px{f', teacher {cfg.teacher_size} px' if cfg.teacher_size else ''} | "
            f"teacher {cfg.teacher} ({models.parameters(teacher):,}) | "
            f"student {cfg.student} ({models.parameters(student):,}) | "
            f"loss {loss_name}")


def model_card(cfg: Config, role: str, rows: dict[str, dict[str, Any]]) -> str:
    """README.md of a saved folder. rows: its own scores on validation, or at the end all on test."""
    # the command that makes this run again, with what its data and its teacher need
    command = cli.command(cfg, RECIPES, FREE_ON_RESUME - {"allow_weak_teacher", "follow_links"})
    return card.render_card(role, rows, dataclasses.asdict(cfg), command)


def summarise(rows: dict[str, dict[str, Any]], test_logits: dict[str, np.ndarray], data: Data,
              teacher: Teacher, run: Run, cfg: Config) -> dict[str, Any]:
    """Print the closing tables. Returns what result.json will hold."""
    dropped = teacher.store.dropped_share()                   # None unless --topk
    if dropped is not None:
        print(f"--topk {cfg.topk}: the other classes have {dropped:.2e} of the teacher's probability")
    gain = None                                               # of the student over the control
    if cfg.control:
        gain = compare_paired(test_logits["student"], test_logits["control"], data.test.labels)
    print(console.confusion_table(rows["student"]["confusion"], data.classes))
    print(console.results_table(rows, gain))
    rates = [entry["images_per_second"] for entry in run.history if entry["role"] == "student"]
    return {**rows, **({"gain": gain} if gain else {}),
            "images_per_second": float(np.median(rates)), "seconds": run.seconds,
            "teacher_batches": distributed.sum_over_ranks(teacher.store.teacher_batches),
            "topk_dropped": dropped, "config": dataclasses.asdict(cfg),
            "environment": runtime.environment(), "commit": run.commit}


def push(run: Run, cfg: Config, message: str = "kd: the student of a finished run") -> None:
    """Upload the student, if --push-to-hub says so. A failure is one line and harms nothing."""
    if cfg.push_to_hub and distributed.rank() == 0:
        print(hub.push_folder(str(run.out / "student"), cfg.push_to_hub, message, cfg.private,
                              lambda: run.stop.signal))


if __name__ == "__main__":
    cli.run(main, CONFIG)
