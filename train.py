"""Distil a large image classifier into a small one: one file, read from top to bottom.

    python train.py                                             the demo: drawn leaves, no network
    python train.py --recipe tutorial --dataset beans --control  the Hugging Face tutorial, with a control

On two CPU cores 7.4 × the images a second of the tutorial's loop (ResNet-50 → MobileNetV2, 224 px; 12 rounds by turns).
A teacher is loaded and, if asked, fine-tuned; a student learns from its logits and the labels by (1 - λ)·CE +
λ·T²·KL(teacher‖student), a control from the labels alone. All three are calls of `fit`.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from kd import BadInput, cli
from kd.cli import flag


@dataclass(frozen=True)
class Config:
    """Every flag, its default and its meaning. The defaults are those of the tutorial."""

    recipe: str = flag("demo", "settings to start from; flags override them", ("demo", "tutorial", "best"))
    dataset: str = flag("beans", "leaves (drawn, offline), a Hub dataset id, or a folder")
    size: int = flag(224, "side of the square input, in pixels", low=16)
    epochs: int = flag(30, "epochs of the student and of its control", low=1)
    batch_size: int = flag(8, "samples a step", low=2)
    lr: float = flag(5e-5, "peak learning rate of the student (AdamW)", above=0)
    schedule: str = flag("linear", "decay of the learning rate to zero", ("linear", "cosine"))
    warmup: float = flag(0.0, "share of the steps over which the learning rate rises from zero", low=0, high=1)
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay", low=0)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    accumulate: int = flag(1, "parts that a step takes its batch in, to need less memory", low=1)
    sync_bn: bool = flag(False, "BatchNorm over the whole batch of all ranks, not over each rank's part")
    seed: int = flag(0, "decides weights, order and views: the same seed gives the same run", low=0, high=2**32 - 1)
    out: str = flag("", "folder of the run (default: runs/RECIPE)")
    resume: bool = flag(False, "go on with the run in --out, exactly where it stopped")
    overwrite: bool = flag(False, "replace the run in --out")
    teacher: str = flag("resnet50", "timm model that teaches")
    teacher_weights: str = flag("imagenet", "imagenet (timm's), none, a .safetensors file, or a saved folder")
    teacher_epochs: int = flag(8, "epochs of fine-tuning before it teaches; 0: as loaded", low=0)
    teacher_lr: float = flag(1e-3, "peak learning rate of the teacher's fine-tuning", above=0)
    teacher_augment: str = flag("crop", "what a view may change in its fine-tuning", ("none", "flip", "crop", "mixup"))
    allow_weak_teacher: bool = flag(False, "teach even where the teacher is near chance")
    student: str = flag("mobilenetv2_100", "timm model that learns, from random weights")
    temperature: float = flag(5.0, "T, softens both distributions", above=0)
    kd_weight: float = flag(0.5, "λ, the teacher's share of the loss", low=0, high=1)
    loss: str = flag("auto", "implementation of the loss", ("auto", "reference", "fused"))
    control: bool = flag(False, "also train the same student without the teacher")
    augment: str = flag("none", "what a view may change", ("none", "flip", "crop", "mixup"))
    views: int = flag(1, "views a sample: epoch e uses view e mod K; 0: a fresh one every epoch", low=0)
    topk: int = flag(0, "keep the teacher's K largest logits alone, for many classes; 0: all of them", low=0)
    cache_dir: str = flag(cli.CACHE_DIR, "where decoded images and the teacher's logits are kept")
    amp: str = flag("auto", "mixed precision", ("auto", "off", "bf16", "fp16"))
    compile: str = flag("auto", "torch.compile the student (auto: on CUDA)", ("auto", "on", "off"))
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda"))
    save_minutes: float = flag(10.0, "a checkpoint at least this often, besides one an epoch", low=0)
    quiet: bool = flag(False, "print nothing but the closing line of JSON, and errors")
    push_to_hub: str = flag("", "upload the student's folder to this Hub repository, such as someone/student")
    push: str = flag("end", "upload it at the end, or each time that it improves as well", ("end", "every-epoch"))
    private: bool = flag(False, "make that repository, where it is new, a private one")


RECIPES: dict[str, dict[str, Any]] = {
    # a few minutes on two CPU cores, with nothing to download: both models start from random weights
    "demo": dict(dataset="leaves", size=96, epochs=10, batch_size=16, lr=3e-3, schedule="cosine", warmup=0.1,
                 weight_decay=0.02, teacher="resnet10t", teacher_weights="none", teacher_epochs=6, teacher_lr=3e-3,
                 teacher_augment="flip", augment="flip", views=0),
    "tutorial": dict(),
    # a good teacher is patient and consistent (Beyer et al. 2022): it alone teaches, on every view anew, for long
    "best": dict(size=96, epochs=200, batch_size=32, lr=3e-3, schedule="cosine", warmup=0.1, weight_decay=0.02,
                 teacher="tf_efficientnet_lite0", teacher_epochs=24, temperature=2.0, kd_weight=1.0, augment="crop",
                 views=0),
}

# what may differ between a run and its continuation; any other change would make it another run
FREE_ON_RESUME = {"out", "resume", "overwrite", "cache_dir", "save_minutes", "device", "quiet", "push_to_hub", "push",
                  "private"}

if __name__ == "__main__":  # --help and mistyped flags answer here, before the seconds that torch takes to load
    try:
        CONFIG = cli.parse_config(Config, RECIPES, sys.argv[1:], __doc__)
    except BadInput as error:
        cli.fail(error, error.status)

import numpy as np
import torch
from torch import Tensor, nn

from kd import losses, models
from kd.fast import blocks, compiled_teacher
from kd.machine import checkpoint, console, distributed, files, health, hub, runtime
from kd.tools import card
from kd.views import CODE, SPECS, Spec, epoch_batches
from kd.batches import Teacher, ask_once, ask_teacher, load_batches
from kd.data.sources import open_dataset
from kd.data.frames import Data, Split, decode
from kd.logits import LogitStore
from kd.predict import predict
from kd.machine.prefetch import prefetch
from kd.scores import refuse_weak, scores


def train_step(student: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               x: Tensor, labels: Tensor, teacher_logits: Tensor | None, *, loss_fn: Callable[..., Tensor],
               temperature: float, kd_weight: float, clip: float, run: runtime.Runtime, accumulate: int = 1,
               weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """A single training step: forward, loss, backward, update. Returns the loss and the gradient's norm, both still
    on the device: nothing in here waits for it. weight: of this rank's loss, 1 where all ranks have as many samples."""
    total = torch.zeros((), device=x.device)
    parts = distributed.split_batch(len(x), accumulate)
    for part in parts:
        with run.autocast(), distributed.sync_gradients(student, part is parts[-1]):
            logits = student(x[part])
        soft = teacher_logits if teacher_logits is None else teacher_logits[part]
        loss = loss_fn(logits, soft, labels[part], temperature, kd_weight)
        loss = loss * (weight * len(logits) / len(x))
        scaler.scale(loss).backward()   # the scale keeps fp16 gradients from underflow; it is 1 in other precisions
        total += loss.detach()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then decay to zero; a pure function of the step."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    done = (step - rise) / max(steps - rise, 1)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def fit(role: str, model: nn.Module, prep: models.Preprocessing, data: Data, cfg: Config, run: runtime.Runtime,
        out: Path, *, epochs: int, lr: float, kd_weight: float, teacher: Teacher | None, state: dict[str, Any],
        stop: runtime.Stop, records: console.Records, push: Callable[[str], None]) -> None:
    """Train `model`; its best weights by validation accuracy go to `out/role`.

    `state` is the run's checkpoint: what is in it is taken up again, and it is saved to `out/last.ckpt` every epoch,
    every few minutes and on a signal. Raises Stopped after a signal and TrainingFault where the loss or its gradient
    is not finite.
    """
    forward = distributed.wrap(model, run.device)
    forward = torch.compile(forward) if run.compile else forward  # type: ignore[assignment]
    loss_fn, _ = losses.choose_loss(cfg.loss, run.device, len(data.classes), SPECS[cfg.augment].mixup > 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.amp is torch.float16)
    samples, validation = len(data.train), data.validation
    views: dict[str, Any] = dict(seed=cfg.seed, size=cfg.size, spec=SPECS[cfg.augment])
    steps_an_epoch = len(epoch_batches(cfg.seed, 0, samples, cfg.batch_size))

    # everything that a resumed run needs: the rest follows from (seed, epoch, step)
    at: dict[str, Any] = {"role": role, "epoch": 0, "step": 0, "loss_sum": 0.0, "train_seconds": 0.0, "best": -1.0,
                          "best_epoch": 0}
    if "model" in state:
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        scaler.load_state_dict(state.pop("scaler"))
        at = state.pop("at")
    loss_sum = torch.tensor(at["loss_sum"], dtype=torch.float64, device=run.device)
    steps_health = health.start(run.device)
    last_save = clock = time.monotonic()

    def save() -> None:
        nonlocal last_save, clock
        health.check(steps_health, role, run.amp, model)  # a NaN must never reach the disk
        at["loss_sum"] = distributed.mean_over_ranks(loss_sum).item()
        at["train_seconds"] += time.monotonic() - clock
        if teacher:
            teacher.store.flush()
        checkpoint.save(out / "last.ckpt", {**state, "seconds": records.seconds(), "at": at,
                                            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                            "scaler": scaler.state_dict()})
        last_save = clock = time.monotonic()
        distributed.stop_if_requested(stop)  # which also waits until all ranks' logits are on the disk

    for epoch in range(at["epoch"], epochs):
        view = epoch % cfg.views if cfg.views else epoch
        batches = epoch_batches(cfg.seed, epoch, samples, cfg.batch_size)[at["step"]:]
        model.train()
        clock = time.monotonic()
        with console.progress(samples, f"{role} {epoch + 1}/{epochs}", initial=at["step"] * cfg.batch_size) as bar:
            for batch in prefetch(load_batches(data, batches, view, teacher, **views, device=run.device), run.device):
                step = epoch * steps_an_epoch + at["step"]
                torch.manual_seed(cfg.seed * 1_000_003 + step)  # dropout, where a model has any, is keyed as well
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, epochs * steps_an_epoch, lr, cfg.schedule, cfg.warmup)
                soft = None
                if teacher:
                    soft = teacher.store.logits(view, batch.samples, batch.teacher_logits,
                                                lambda: ask_teacher(teacher, batch, view, data, **views))
                # ---- a single training step ----
                loss, norm = train_step(forward, optimizer, scaler, models.normalize(batch.views, prep), batch.labels,
                                        soft, loss_fn=loss_fn, temperature=cfg.temperature, kd_weight=kd_weight,
                                        clip=cfg.clip, run=run, accumulate=cfg.accumulate,
                                        weight=len(batch.samples) * distributed.world_size() / batch.total)
                # --------------------------------
                at["step"] += 1
                loss_sum += loss * batch.total
                health.track(steps_health, loss, norm, step, role, run.amp)
                bar.update(batch.total)
                if at["step"] % 20 == 0 and not bar.disable:
                    bar.set_postfix(loss=f"{loss.item():.3f}")  # note: waits for the device
                if any(distributed.max_over_ranks(stop.signal, time.monotonic() - last_save > 60 * cfg.save_minutes)):
                    save()
        skipped = health.check(steps_health, role, run.amp, model)
        train_loss = distributed.mean_over_ranks(loss_sum).item() / samples
        distributed.broadcast_weights(model)  # BatchNorm's statistics, where each rank has its own
        seconds = at["train_seconds"] + time.monotonic() - clock
        logits = predict(model, validation.frames.read, len(validation), prep, cfg.size, run, f"{role} validation",
                         lambda: save() if distributed.max_over_ranks(stop.signal)[0] else None)
        result = scores(logits, validation.labels)
        entry = {"role": role, "epoch": epoch + 1, "time": time.time(), "train_loss": train_loss, "skipped": skipped,
                 **{key: result[key] for key in ("accuracy", "macro_f1", "loss", "calibration_error", "correct")},
                 "lr": lr, "images_per_second": samples / seconds, "seconds": seconds, "elapsed": records.seconds(),
                 "teacher_batches": distributed.sum_over_ranks(teacher.store.teacher_batches) if teacher else 0}
        if improved := (result["accuracy"] > at["best"]):
            at.update(best=result["accuracy"], best_epoch=epoch + 1)
            models.save(model, out / role, data.classes, prep, cfg.size,
                        model_card(cfg, role, {role: {**result, **at}}))
        print(console.epoch_line(entry, epochs, improved), flush=True)
        state["history"].append(entry)
        records.write(state["history"])
        at.update(epoch=epoch + 1, step=0, train_seconds=0.0)
        loss_sum.zero_()
        clock = time.monotonic()
        save()
        if improved and role == "student" and cfg.push == "every-epoch":
            push(f"kd: epoch {epoch + 1}")


def model_card(cfg: Config, role: str, rows: dict[str, dict[str, Any]]) -> str:
    """The README.md of a saved folder. rows: its own scores on validation, or in the end everybody's on test."""
    return card.render_card(role, rows, teacher=cfg.teacher, student=cfg.student, pretrained=cfg.teacher_weights == "imagenet",
                     dataset=cfg.dataset, size=cfg.size, epochs=cfg.epochs, teacher_epochs=cfg.teacher_epochs,
                     temperature=cfg.temperature, kd_weight=cfg.kd_weight, seed=cfg.seed, repo=cfg.push_to_hub,
                     command=cli.command(cfg, RECIPES, FREE_ON_RESUME))


def main(cfg: Config) -> dict[str, Any]:
    """The whole run; returns what result.json holds. Raises BadInput, TrainingFault or Stopped."""
    cli.check(cfg)
    models.check("teacher", cfg.teacher, cfg.teacher_weights)
    models.check("student", cfg.student)
    hub.check(cfg.push_to_hub)

    # 1 runtime
    commit = runtime.commit()  # of the code that runs, asked before anybody can change it
    run, environment = runtime.start(cfg.device, cfg.amp, cfg.compile), runtime.environment()
    distributed.join(run.device, cfg.batch_size, cfg.accumulate)
    settings, out = dataclasses.asdict(cfg), Path(cfg.out or f"runs/{cfg.recipe}")
    again = cfg.resume or bool(distributed.max_over_ranks(distributed.restarted())[0])
    state = distributed.broadcast_from_rank0(lambda: checkpoint.open_run(out, settings, FREE_ON_RESUME, again, cfg.overwrite))
    finished = distributed.broadcast_from_rank0(lambda: checkpoint.finished(out, state))
    state = state or {"history": [], "done": [], "seconds": 0.0}
    stop = runtime.Stop().install()

    def push(message: str = "kd: the best student by validation accuracy") -> None:
        if cfg.push_to_hub and not distributed.rank():
            print(hub.push_folder(str(out / "student"), cfg.push_to_hub, message, cfg.private, lambda: stop.signal))

    if finished:
        print(f"{out} is finished: nothing to do")
        push()
        return finished
    records = console.Records(out, state["seconds"])

    def placed(model: nn.Module) -> nn.Module:
        model = models.check_size(model.to(run.device).to(memory_format=torch.channels_last), cfg.size)
        return distributed.synchronise_batchnorm(model, run.device) if cfg.sync_bn else blocks.accelerate(model)

    # 2 data, as the student declares its input
    dataset = open_dataset(cfg.dataset, cfg.seed)
    torch.manual_seed(cfg.seed)
    student = placed(models.create("student", cfg.student, dataset.classes))
    prep = models.preprocessing(student)
    cache = Path(cfg.cache_dir).expanduser()

    def decoded(interpolation: str) -> Data:
        return decode(dataset, size=cfg.size, crop_pct=prep.crop_pct, interpolation=interpolation, cache_dir=cache,
                      progress=stop.heed)

    # 3 teacher: load it, and fine-tune it by the same loop
    torch.manual_seed(cfg.seed)
    teacher_model = placed(models.create("teacher", cfg.teacher, dataset.classes, cfg.teacher_weights))
    # one crop for both, the student's; mean, std and interpolation are each model's own
    teacher_prep = models.preprocessing(teacher_model)._replace(crop_pct=prep.crop_pct)
    data = decoded(prep.interpolation)  # not before all that can be wrong with the models would have shown
    teacher_data = data if teacher_prep.interpolation == prep.interpolation else decoded(teacher_prep.interpolation)
    facts = {"dataset": data.digest(), "teacher_weights": models.digest(teacher_model), "amp": str(run.amp)}
    distributed.check_same_on_all_ranks({**settings, **facts}, FREE_ON_RESUME)
    checkpoint.check_facts(state, facts)
    files.write_atomic(out / "config.json", json.dumps(settings, indent=2).encode())
    print(f"{run.line} | {dataset.name}: {len(data.train)} + {len(data.validation)} + "
          f"{len(data.test)} pictures, {len(data.classes)} classes, {cfg.size} px | teacher {cfg.teacher} "
          f"({models.parameters(teacher_model):,}) | student {cfg.student} ({models.parameters(student):,}) | "
          f"loss {losses.choose_loss(cfg.loss, run.device, len(data.classes), SPECS[cfg.augment].mixup > 0)[1]}")

    def trained(role: str, model: nn.Module, cfg: Config, prep: models.Preprocessing, on: Data, epochs: int, lr: float,
                kd_weight: float, teacher: Teacher | None = None) -> nn.Module:
        if role not in state["done"]:
            fp32 = cfg.amp == "auto" and blocks.slow_in_bf16(model)
            fit(role, model, prep, on, cfg, run._replace(amp=None) if fp32 else run, out, epochs=epochs, lr=lr,
                kd_weight=kd_weight, teacher=teacher, state=state, stop=stop, records=records, push=push)
            state["done"].append(role)
        if distributed.rank() == 0:
            models.load_saved(out / role, model)
        return distributed.broadcast_weights(model)

    if cfg.teacher_epochs:
        own = dataclasses.replace(cfg, augment=cfg.teacher_augment, views=0)
        trained("teacher", teacher_model, own, teacher_prep, teacher_data, cfg.teacher_epochs, cfg.teacher_lr, 0.0)
    else:
        models.save(teacher_model, out / "teacher", data.classes, teacher_prep, cfg.size,
                    model_card(cfg, "teacher", {}))
    models.freeze(teacher_model)

    # 4 its logits: asked for once, then kept for good under all that decides them
    weights = models.digest(teacher_model)
    rounds = min(cfg.views or cfg.epochs, cfg.epochs)
    compiled = compiled_teacher.worth_compiling(teacher_model, rounds * len(data.train), cfg.size, cfg.compile)

    def store(split: Split, augment: Spec | None, keep: int) -> LogitStore:
        decides = dict(teacher=weights, name=cfg.teacher, prep=teacher_prep, size=cfg.size, augment=augment,
                       seed=augment and cfg.seed, frames=split.frames.digest, amp=str(run.amp), device=run.device.type,
                       compiled=augment and compiled, code=augment and CODE, torch=environment["torch"],
                       timm=environment["timm"])
        return LogitStore(cache / "logits", decides, len(split), len(data.classes), keep, cfg.temperature)

    def asked(split: Split, label: str) -> np.ndarray:
        return ask_once(store(split, None, 0), len(split), lambda: predict(
            teacher_model, split.frames.read, len(split), teacher_prep, cfg.size, run, label,
            lambda: distributed.stop_if_requested(stop)))

    on_validation = scores(asked(teacher_data.validation, "teacher validation"), data.validation.labels)
    teacher_test_logits = asked(teacher_data.test, "teacher test")
    on_test = scores(teacher_test_logits, data.test.labels)
    print(f"teacher: validation {100 * on_validation['accuracy']:.1f} %, test {100 * on_test['accuracy']:.1f} % "
          f"({on_test['correct']}/{on_test['total']})")
    if not cfg.allow_weak_teacher:
        refuse_weak(cfg.teacher, on_validation["accuracy"], data.validation.labels)
    known = store(teacher_data.train, SPECS[cfg.augment], cfg.topk)
    teacher = Teacher(compiled_teacher.compile_frozen(teacher_model, cfg.batch_size, compiled), teacher_prep, teacher_data, known, run)

    # 5 the control (the same student, the same recipe, no teacher), then the student
    rows = {"teacher": console.test_row(cfg.teacher, models.parameters(teacher_model), on_test,
                                       on_validation["accuracy"])}
    test_logits = {"teacher": teacher_test_logits}
    for role in ("control", "student") if cfg.control else ("student",):
        torch.manual_seed(cfg.seed)  # both start from the very same weights
        model = placed(models.create("student", cfg.student, data.classes))
        by = teacher if role == "student" and cfg.kd_weight else None
        trained(role, model, cfg, prep, data, cfg.epochs, cfg.lr, cfg.kd_weight if by else 0.0, by)

        # 6 the best-by-validation weights, once, on test
        test_logits[role] = logits = predict(model, data.test.frames.read, len(data.test), prep, cfg.size, run,
                                             f"{role} test", lambda: distributed.stop_if_requested(stop))
        best = max(entry["accuracy"] for entry in state["history"] if entry["role"] == role)
        on_test = scores(logits, data.test.labels, teacher_test_logits)
        rows[role] = console.test_row(cfg.student, models.parameters(model), on_test, best)

    # 7 report
    if known.dropped:
        print(f"--topk {cfg.topk}: the other classes have {known.dropped_share():.2e} of the teacher's probability")
    print(console.confusion_table(rows["student"]["confusion"], data.classes), console.table(rows), sep="\n")
    rates = [entry["images_per_second"] for entry in state["history"] if entry["role"] == "student"]
    result = {**rows, "images_per_second": float(np.median(rates)), "seconds": records.seconds(),
              "teacher_batches": distributed.sum_over_ranks(known.teacher_batches), "topk_dropped": known.dropped_share(),
              "config": settings, "environment": environment, "commit": commit}
    if distributed.rank():
        return result
    for role in rows:
        if (out / role).exists():
            files.write_atomic(out / role / "README.md", model_card(cfg, role, rows).encode())
    if (out / "result.json").exists():  # the run had ended, but for its page
        result = json.loads((out / "result.json").read_text())
    files.write_atomic(out / "result.json", json.dumps(result, indent=2).encode())
    # after result.json, which a fault in drawing must not cost; --resume comes back here until the page stands
    from kd.tools import page  # not at the top: its plotting library takes half a second to load
    print("report:", page.draw(out, test_logits, data, dataset.splits["test"].where, rounds, cfg.seed, cfg.size,
                               SPECS[cfg.augment]))
    push()
    return result


if __name__ == "__main__":
    cli.run(main, CONFIG)
