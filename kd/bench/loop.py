"""The real `fit` and the real `train_step`, imported and timed: as a whole, and part by part."""

import contextlib
import dataclasses
import io
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import train
from kd import features, methods, models
from kd.batches import Batch, load_batches
from kd.bench.limits import communication, machine_limits, now_on, peak_memory, training_flops
from kd.data.frames import Data, Split
from kd.logits import LogitStore
from kd.machine import devices, distributed, runtime
from kd.run import Clock, Run
from kd.teacher import StoreOptions, Teacher
from kd.views import Views

DEFAULTS = {"dataset": "beans", "size": 224, "batch_size": 8, "teacher": "resnet50", "teacher_weights": "none",
            "student": "mobilenetv2_100"}


compile_model = runtime.compiled    # the real one: `Bench.fit` puts its own in the place of runtime.compiled


def note(line: str) -> None:
    """Standard output is for the result."""
    print(line, file=sys.stderr)


class Subset:
    """The first `samples` frames of a split, so that an epoch of `fit` is a block of a few steps.

    A split that has fewer begins again.
    """

    def __init__(self, split: Split, samples: int) -> None:
        self.frames, self.digest = split.frames, f"{split.frames.digest}/{samples}"
        self.shape = (samples, *split.frames.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, numbers: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 `(B, R, R, 3)`, written into `out` where that is given."""
        return self.frames.read(numbers % len(self.frames), out)


def block(data: Data, samples: int) -> Data:
    """`data` with so many samples to train on, and one to validate on."""
    train, validation = (Split(Subset(split, count), np.resize(split.labels, count))  # type: ignore[arg-type]
                         for split, count in ((data.train, samples), (data.validation, 1)))
    return Data(data.classes, train, validation, validation)


class Bench:
    """The pieces of a run, as `train.main` puts them together, on a block of `steps` steps."""

    def __init__(self, cfg: train.Config, steps: int, folder: Path) -> None:
        self.cfg, self.folder, self._runs = dataclasses.replace(cfg, epochs=1), folder, count()
        self.machine = runtime.start(cfg.device, cfg.amp, cfg.compile, cfg.kernels)
        distributed.check_batch_size(cfg.batch_size, cfg.accumulate)
        distributed.join(self.machine.device)

        with contextlib.redirect_stdout(sys.stderr):
            dataset = train.open_dataset(cfg.dataset, train.reading_of(cfg))
            self.student = self.new_student(dataset.classes)
            self.prep = models.preprocessing(self.student)
            data = train.decode(dataset, size=cfg.size, crop_pct=self.prep.crop_pct,
                                interpolation=self.prep.interpolation, cache_dir=cfg.cache_dir)
            teacher = models.freeze(train.build("teacher", dataset.classes, cfg, self.machine))
        methods.check_models(cfg, teacher, self.student)
        self.with_features = methods.compares_features(cfg)
        if self.with_features and cfg.method == "simkd":
            features.reuse_head(self.student, teacher)

        self.samples = steps * cfg.batch_size
        self.data = block(data, self.samples)
        self.views = Views(0, cfg.size, train.AUGMENTATIONS[cfg.augment], 1)

        self.teacher = Teacher(teacher, models.preprocessing(teacher), self.data, self.views, self.machine,
                               StoreOptions(folder, with_features=self.with_features))
        self.warm = self.teacher.store
        self.loss_fn, self.loss_name = train.choose_loss(self.data, self.views, cfg.kd_weight, cfg,
                                                         self.machine)
        self._compiled: dict[nn.Module, nn.Module] = {}

    def new_student(self, classes: tuple[str, ...]) -> nn.Module:
        """Random weights, with the kernels of kd/fast unless `--kernels off`."""
        return train.build("student", classes, self.cfg, self.machine)

    def compiled(self, model: Any, *settings: Any, **more: Any) -> nn.Module:
        """What `fit` trains: `runtime.compiled(model)`, but once a model, as in a run of many epochs."""
        # `fit` wraps the student anew each time: in FromPixels, and with several ranks in DistributedDataParallel
        student = getattr(model, "module", model).model
        if student not in self._compiled:
            self._compiled[student] = compile_model(model, *settings, **more)
        return self._compiled[student]

    def fit(self, student: nn.Module, cold: bool = False, steps: int = 0) -> float:
        """Images/s of one epoch of the real `fit` over the block, waiting for data and logging included.

        cold: with an empty store of logits, so that the teacher is asked for all.
        steps: only so many of the block; 0: all.
        """
        number, whole = next(self._runs), self.data
        data = block(whole, steps * self.cfg.batch_size) if steps else whole
        self.teacher.data, self.teacher.store = data, self.warm
        if cold:
            self.teacher.store = LogitStore(self.folder / f"cold-{number}", {}, len(data.train), self.warm.classes)
        run = Run(self.folder / f"run-{number}", {}, set())
        run.flush_before_save(self.teacher.store)
        job = train.Job("student", student, self.prep, data, self.views, self.machine, 1, self.cfg.lr,
                        self.cfg.kd_weight, self.teacher if self.cfg.kd_weight else None)

        pause = Clock.pause

        def pause_after_the_device(clock: Clock) -> bool:
            # A short epoch is queued on a GPU long before it is computed.
            devices.wait(self.machine.device)
            return pause(clock)

        devices.wait(self.machine.device)
        with (contextlib.redirect_stdout(io.StringIO()) as said,
              mock.patch.object(runtime, "compiled", self.compiled),
              mock.patch.object(Clock, "pause", pause_after_the_device)):
            train.fit(job, self.cfg, run)
        for line in said.getvalue().splitlines():
            if sys.stderr.isatty() or "uncompiled" in line:
                note(line)
        self.teacher.data, self.teacher.store = whole, self.warm
        return run.history[0]["images_per_second"]

    def batches(self) -> Iterator[Batch]:
        """Those of `fit`'s epoch."""
        return load_batches(self.data, self.views, 0, self.cfg.batch_size, 0, self.machine.device)

    def new_optimizer(self, student: nn.Module) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
        """As in `fit`."""
        scaler = torch.amp.GradScaler(self.machine.device.type, enabled=self.machine.amp is torch.float16)
        return torch.optim.AdamW(student.parameters(), lr=self.cfg.lr, fused=True), scaler


class Timed(nn.Module):
    """A model whose forward is a part of its own."""

    def __init__(self, model: nn.Module, with_features: bool, lap: Any) -> None:
        super().__init__()
        self.model, self.with_features, self.lap = model, with_features, lap

    def forward(self, x: Tensor) -> Tensor:
        outputs = features.logits_and_features(self.model, x) if self.with_features else self.model(x)
        self.lap("student forward")
        return outputs


def parts(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """The loop by its parts, each closed by a synchronisation, and their sum against the wall of the same steps."""
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        bench = Bench(cfg, steps, Path(name))
        student, device = bench.student, bench.machine.device
        whole = [bench.fit(student)]        # compiles, and fills the store
        startup = time.perf_counter() - begin
        whole += [bench.fit(student) for _ in range(rounds)]

        milliseconds, walls = _step_by_parts(bench, student)
        asked = []                          # apart from the steps, which would then find a cold cache
        for batch in bench.batches():
            begin = now_on(device)
            with torch.no_grad(), bench.machine.autocast():
                bench.teacher.model(models.normalize(batch.pixels, bench.teacher.prep))
            asked.append(now_on(device) - begin)

    wall = float(np.mean(walls) * 1e3)
    limits = machine_limits(device, bench.machine.amp)
    flops = training_flops(cfg.student, cfg.size, device)
    p20, p50, p80 = (float(q) for q in np.quantile(whole[1:], [0.2, 0.5, 0.8]))
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else peak_memory())
    between = {"communication_milliseconds": communication(student, device)} if distributed.world_size() > 1 else {}
    return {"images_per_second": {"p20": p20, "p50": p50, "p80": p80},
            "fit_milliseconds": 1e3 * cfg.batch_size / p50, "milliseconds": milliseconds, **between,
            "teacher_milliseconds": float(np.median(asked) * 1e3),  # of a step in the first epoch only
            "sum_over_wall": sum(milliseconds.values()) / wall, "wall_milliseconds": wall,
            "peak_memory_mb": None if peak is None else peak / 2**20, "startup_seconds": startup, **limits,
            "roofline_share": p50 * flops / (limits["gemm_gflop_s"] * 1e9), "loss": bench.loss_name,
            "line": bench.machine.line, "batch_size": cfg.batch_size, "size": cfg.size,
            "environment": runtime.environment()}


def _step_by_parts(bench: Bench, student: nn.Module) -> tuple[dict[str, float], list[float]]:
    """Mean milliseconds of each part of a step, and the wall time in seconds of each step."""
    device = bench.machine.device
    spent: dict[str, float] = {}
    last = 0.0

    def lap(part: str) -> None:
        nonlocal last
        now = now_on(device)
        spent[part] = spent.get(part, 0.0) + now - last
        last = now

    # ---- every piece reports when it is over ----------------------------------------------------------------
    real_read = bench.data.train.frames.read

    def read(samples: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        lap("view")
        frames = real_read(samples, out)
        lap("data")
        return frames

    def loss_fn(*arguments: Any) -> Tensor:
        loss = bench.loss_fn(*arguments)
        lap("loss")
        return loss

    bench.data.train.frames.read = read  # type: ignore[assignment, method-assign]
    model = distributed.wrap(Timed(student, bench.with_features, lap), device)
    optimizer, scaler = bench.new_optimizer(student)
    optimizer.register_step_pre_hook(lambda *_: lap("backward and clipping"))

    # ---- three times over the block ---------------------------------------------------------------------------
    student.train()
    walls = []
    for _ in range(3):
        stream = bench.batches()
        while True:
            start = last = now_on(device)
            batch = next(stream, None)
            if batch is None:
                break
            lap("view")
            batch = batch._replace(pixels=models.normalize(batch.pixels, bench.prep))
            lap("normalise")
            teacher_outputs = None
            if bench.cfg.kd_weight:
                teacher_outputs = bench.warm.get(batch.view, batch.samples)
                assert teacher_outputs is not None
                teacher_outputs = teacher_outputs.to(device)
                lap("stored logits")
            train.train_step(model, optimizer, scaler, batch, teacher_outputs, loss_fn, bench.cfg, bench.machine)
            lap("optimizer")
            walls.append(now_on(device) - start)

    bench.data.train.frames.read = real_read  # type: ignore[assignment, method-assign]
    return {part: 1e3 * seconds / len(walls) for part, seconds in spent.items()}, walls
