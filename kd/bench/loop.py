"""How fast is the loop? `python -m kd bench` times the real `fit` and the real `train_step`, imported, never a copy.

    python -m kd bench [--json] [train.py's flags]            the loop, part by part, against the machine's limits
    python -m kd bench compare [--json] [train.py's flags]    interleaved with the tutorial's loop, in one process
    python -m kd bench loss [--json] [--help]                 the loss alone (see kd/bench/loss.py)
    torchrun --standalone --nproc-per-node=N -m kd.bench ...  the first, by N ranks, and what they say to each other

--rounds N (12) and --steps N (8, a round) say how long. Machines drift by a factor of two within minutes, so only what
is measured in turns, in one process, is compared; an A/A pair (the same thing timed twice in every round) says how far
such a ratio can be trusted.
"""

import contextlib
import dataclasses
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from kd import cli, losses, models
from kd.fast import blocks, compiled_teacher
from kd.machine import console, distributed, runtime
from kd.batches import Batch, Teacher, ask_teacher, load_batches
from kd.data.frames import Data, Split

DEFAULTS = {"dataset": "beans", "size": 224, "batch_size": 8, "teacher": "resnet50", "teacher_weights": "none",
            "student": "mobilenetv2_100"}


class Subset:
    """The first `samples` frames of a split, so that an epoch of `fit` is a block of a few steps."""

    def __init__(self, split: Split, samples: int) -> None:
        self.read, self.digest = split.frames.read, f"{split.frames.digest}/{samples}"


class Bench:
    """The pieces of a run, as `train.main` puts them together, on a block of `steps` steps."""

    def __init__(self, cfg: train.Config, steps: int, folder: Path) -> None:
        begin = time.perf_counter()
        self.cfg, self.folder = dataclasses.replace(cfg, epochs=1), folder
        self.run = runtime.start(cfg.device, cfg.amp, cfg.compile)
        distributed.join(self.run.device, cfg.batch_size, cfg.accumulate)
        dataset = train.open_dataset(cfg.dataset, 0, say=note)
        torch.manual_seed(0)
        self.student = self.place(models.create("student", cfg.student, dataset.classes, say=note))
        self.prep = models.preprocessing(self.student)
        data = train.decode(dataset, size=cfg.size, crop_pct=self.prep.crop_pct, interpolation=self.prep.interpolation,
                            cache_dir=cfg.cache_dir, say=note)
        samples = min(steps * cfg.batch_size, len(data.train.labels))
        cut = Split(Subset(data.train, samples), data.train.labels[:samples])  # type: ignore[arg-type]
        one = Split(Subset(data.validation, 1), data.validation.labels[:1])    # type: ignore[arg-type]
        self.data = Data(data.classes, cut, one, one)
        self.samples = samples
        self.views: dict[str, Any] = dict(seed=0, size=cfg.size, spec=train.SPECS[cfg.augment])
        self.teacher_model = models.freeze(self.place(models.create("teacher", cfg.teacher, dataset.classes,
                                                                    cfg.teacher_weights, note)))
        pays = compiled_teacher.worth_compiling(self.teacher_model, len(data.train), cfg.size, cfg.compile)
        self.fast_teacher = compiled_teacher.compile_frozen(self.teacher_model, cfg.batch_size, pays)
        self.teacher_prep = models.preprocessing(self.teacher_model)
        self.loss_fn, self.loss_name = losses.choose_loss(cfg.loss, self.run.device, len(data.classes),
                                                          train.SPECS[cfg.augment].mixup > 0)
        self.setup_seconds = time.perf_counter() - begin

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.run.device).to(memory_format=torch.channels_last)

    def store(self, name: str) -> train.LogitStore:
        return train.LogitStore(self.folder / name, {"bench": name}, self.samples, len(self.data.classes))

    def teacher(self, store: train.LogitStore) -> Teacher:
        return Teacher(self.fast_teacher, self.teacher_prep, self.data, store, self.run)

    def fit(self, student: nn.Module, store: train.LogitStore) -> float:
        """Images/s of one epoch of the real `fit` over the block, waiting for data and logging included."""
        state: dict[str, Any] = {"history": [], "done": []}
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else None):
            train.fit("student", student, self.prep, self.data, self.cfg, self.run, self.folder, epochs=1,
                      lr=self.cfg.lr, kd_weight=self.cfg.kd_weight, teacher=self.teacher(store), state=state,
                      stop=runtime.Stop(), records=console.Records(self.folder), push=note)
        return state["history"][0]["images_per_second"]

    def batches(self, store: train.LogitStore) -> Iterator[Batch]:
        """Those of `fit`'s epoch, so that of several ranks each has asked for the logits of its share."""
        numbers = train.epoch_batches(0, 0, self.samples, self.cfg.batch_size)
        return load_batches(self.data, numbers, 0, self.teacher(store), **self.views, device=self.run.device)

    def wait(self) -> float:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare(self, student: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor,
             soft: Tensor) -> float:
        """Images/s of forward, backward and optimizer on tensors that lie ready: what the loop cannot beat."""
        forward = torch.compile(student) if self.run.compile else student
        scaler = torch.amp.GradScaler(self.run.device.type, enabled=self.run.amp is torch.float16)
        student.train()
        begin = self.wait()
        for _ in range(self.samples // self.cfg.batch_size):
            train.train_step(forward, optimizer, scaler, x, labels, soft, loss_fn=self.loss_fn,
                             temperature=self.cfg.temperature, kd_weight=self.cfg.kd_weight, clip=self.cfg.clip,
                             run=self.run)
        return self.samples // self.cfg.batch_size * self.cfg.batch_size / (self.wait() - begin)


def note(line: str) -> None:
    print(line, file=sys.stderr)


def tutorial_loop(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor],
                  labels: list[Tensor], temperature: float, kd_weight: float) -> None:
    """What the Hugging Face tutorial's Trainer does in its steps: the teacher at every one, plain ops, `.item()`.

    The images are decoded, resized and normalised beforehand, as the tutorial's `dataset.map` does, and lie in
    memory; both models are plain eager float32 in the default memory format.
    """
    kl = nn.KLDivLoss(reduction="batchmean")
    student.train()
    for x, y in zip(images, labels, strict=True):
        logits = student(x)
        with torch.no_grad():
            soft_logits = teacher(x)
        soft = F.softmax(soft_logits / temperature, dim=-1)
        distillation = kl(F.log_softmax(logits / temperature, dim=-1), soft) * temperature ** 2
        loss = (1 - kd_weight) * F.cross_entropy(logits, y) + kd_weight * distillation
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        loss.item()


def bootstrap(rounds: np.ndarray, ratio: Callable[[np.ndarray], float], draws: int = 2000) -> list[float]:
    """The 95 % interval of a ratio of medians, by drawing whole rounds (rows) again."""
    generator = np.random.default_rng(0)
    values = [ratio(rounds[generator.integers(len(rounds), size=len(rounds))]) for _ in range(draws)]
    return [float(q) for q in np.quantile(values, [0.025, 0.975])]


def compare(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """The tutorial's loop, ours with a cold and a warm store, ours again (A/A), and the bare step, in turns."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(cfg, steps, Path(name))
        ours = bench.place(models.create("student", cfg.student, bench.data.classes))
        if bench.run.device.type == "cpu":
            blocks.accelerate(ours, note)
        device = bench.run.device
        theirs = models.create("student", cfg.student, bench.data.classes).to(device)
        their_teacher = models.freeze(models.create("teacher", cfg.teacher, bench.data.classes).to(device))
        warm = bench.store("warm")
        first = list(bench.batches(warm))
        images = [models.normalize(batch.views, bench.prep).contiguous() for batch in first]
        labels = [batch.labels for batch in first]
        plain = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)
        tuned = torch.optim.AdamW(ours.parameters(), lr=cfg.lr, fused=True)
        x = images[0].contiguous(memory_format=torch.channels_last)
        soft = torch.randn(len(x), len(bench.data.classes), device=device)

        def tutorial() -> float:
            runtime.tune_allocator(False)  # the allocator is the process's; the tutorial has it as it comes
            begin = bench.wait()
            tutorial_loop(theirs, their_teacher, plain, images, labels, cfg.temperature, cfg.kd_weight)
            rate = bench.samples / (bench.wait() - begin)
            runtime.tune_allocator(bench.run.device.type == "cpu")
            return rate

        parts: dict[str, Callable[[], float]] = {
            "tutorial": tutorial,
            "cold": lambda: bench.fit(ours, bench.store(f"cold-{time.monotonic_ns()}")),
            "warm": lambda: bench.fit(ours, warm),
            "bare": lambda: bench.bare(ours, tuned, x, labels[0], soft),
            "again": lambda: bench.fit(ours, warm),
        }
        for part in parts.values():  # the first round compiles, allocates and fills the warm store: not counted
            part()
        table, names = [], list(parts)
        with console.progress(rounds, "rounds", "round") as bar:
            order = random.Random(0)
            for _ in range(rounds):
                row = {part: parts[part]() for part in order.sample(names, len(names))}  # none always follows the same
                table.append([row[part] for part in names])
                bar.update()
    rates = np.array(table)
    column = {part: i for i, part in enumerate(names)}

    def ratio(over: str, under: str) -> tuple[float, list[float]]:
        def of(rows: np.ndarray) -> float:
            # the median of the ratios within rounds: drift between rounds cancels
            return float(np.median(rows[:, column[over]] / rows[:, column[under]]))
        return of(rates), bootstrap(rates, of)

    result: dict[str, Any] = {f"{part}_img_s": float(np.median(rates[:, i])) for part, i in column.items()
                              if part != "again"}
    for key, over, under in (("cold_ratio", "cold", "tutorial"), ("warm_ratio", "warm", "tutorial"),
                             ("aa_ratio", "again", "warm"), ("loop_over_bare_step", "warm", "bare")):
        result[key], result[f"{key}_95"] = ratio(over, under)
    limits = machine_limits(bench.run.device, bench.run.amp)
    flops = training_flops(cfg.student, cfg.size, device)
    result.update(limits, student_gflop_per_image=flops / 1e9,
                  roofline_share=result["warm_img_s"] * flops / (limits["gemm_gflop_s"] * 1e9), rounds=rounds,
                  steps_a_round=steps, batch_size=cfg.batch_size, size=cfg.size, line=bench.run.line)
    return result


def communication(student: nn.Module, device: torch.device, repeats: int = 20) -> float:
    """Milliseconds that ranks take to add up gradients of this many parameters, when nothing else goes on.

    Within a step much of it passes while the backward still computes: it is at most what a step waits for.
    """
    gradients = torch.zeros(models.parameters(student), device=device)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        distributed.mean_over_ranks(gradients)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times) * 1e3)


def training_flops(student: str, size: int, device: torch.device) -> float:
    """Floating-point operations of forward and backward for one image: three forwards, twice a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode
    twin = models.create("student", student, ("a", "b")).to(device)
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(2, 3, size, size, device=device))  # torch counts the backward of grouped convolutions wrongly
    return 3 * counter.get_total_flops() / 2


def machine_limits(device: torch.device, amp: torch.dtype | None) -> dict[str, float]:
    """What this machine does at best: GFLOP/s of a matrix product in the step's precision, GB/s of a copy."""
    def best(work: Callable[[], Any], repeats: int = 9) -> float:
        times = []
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=amp or torch.float32) for _ in range(2))
    source = torch.randn(1 << 26, device=device)  # 256 MB: well past any cache
    target = torch.empty_like(source)
    return {"gemm_gflop_s": 2 * side ** 3 / best(lambda: a @ b) / 1e9,
            "memory_gb_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9}


def parts(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """The loop by its parts, each closed by a synchronisation, and their sum against the wall of the same steps."""
    with tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        bench = Bench(cfg, steps, Path(name))
        student = bench.student
        if bench.run.device.type == "cpu":
            blocks.accelerate(student, note)
        store = bench.store("parts")
        whole = [bench.fit(student, store)]  # compiles, and fills the store
        startup = time.perf_counter() - begin
        whole += [bench.fit(student, store) for _ in range(rounds)]
        model = distributed.wrap(student, bench.run.device)
        optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, fused=True)
        scaler = torch.amp.GradScaler(bench.run.device.type, enabled=bench.run.amp is torch.float16)
        spent: dict[str, float] = {}
        last = 0.0

        def lap(part: str) -> None:
            nonlocal last
            now = bench.wait()
            spent[part] = spent.get(part, 0.0) + now - last
            last = now

        def read(samples: np.ndarray) -> np.ndarray:
            lap("view")
            frames = whole_read(samples)
            lap("data")
            return frames

        whole_read, bench.data.train.frames.read = bench.data.train.frames.read, read  # type: ignore

        def forward(x: Tensor) -> Tensor:
            logits = model(x)
            lap("student forward")
            return logits

        def loss_fn(*arguments: Any) -> Tensor:
            loss = bench.loss_fn(*arguments)
            lap("loss")
            return loss

        optimizer.register_step_pre_hook(lambda *_: lap("backward and clipping"))
        student.train()
        walls = []
        for _ in range(3):
            stream = bench.batches(store)
            while True:
                start = last = bench.wait()
                batch = next(stream, None)
                if batch is None:
                    break
                lap("view")
                x = models.normalize(batch.views, bench.prep)
                lap("normalise")
                train.train_step(forward, optimizer, scaler, x, batch.labels, batch.teacher_logits, loss_fn=loss_fn,
                                 temperature=cfg.temperature, kd_weight=cfg.kd_weight, clip=cfg.clip, run=bench.run)
                lap("optimizer")
                walls.append(bench.wait() - start)
        milliseconds = {part: 1e3 * seconds / len(walls) for part, seconds in spent.items()}
        asked = []  # apart from the steps, for it would leave them a cold cache
        for batch in bench.batches(store):
            begin = bench.wait()
            ask_teacher(bench.teacher(store), batch, 0, bench.data, **bench.views)
            asked.append(bench.wait() - begin)
        wall = float(np.mean(walls) * 1e3)
        limits = machine_limits(bench.run.device, bench.run.amp)
        flops = training_flops(cfg.student, cfg.size, bench.run.device)
        p20, p50, p80 = (float(q) for q in np.quantile(whole[1:], [0.2, 0.5, 0.8]))
        peak = (torch.cuda.max_memory_allocated() if bench.run.device.type == "cuda"
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        between = {"communication_milliseconds": communication(student, bench.run.device)} if cli.RANKS > 1 else {}
        return {"images_per_second": {"p20": p20, "p50": p50, "p80": p80},
                "fit_milliseconds": 1e3 * cfg.batch_size / p50, "milliseconds": milliseconds, **between,
                "teacher_milliseconds": float(np.median(asked) * 1e3),  # of a first epoch alone
                "sum_over_wall": sum(milliseconds.values()) / wall, "wall_milliseconds": wall,
                "peak_memory_mb": peak / 2**20, "startup_seconds": startup, **limits,
                "roofline_share": p50 * flops / (limits["gemm_gflop_s"] * 1e9), "loss": bench.loss_name,
                "line": bench.run.line, "batch_size": cfg.batch_size, "size": cfg.size,
                "environment": runtime.environment()}


def show(result: dict[str, Any], indent: str = "") -> None:
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            show(value, indent + "  ")
        else:
            text = f"{value:.3f}" if isinstance(value, float) else value
            print(f"{indent}{key:24} {text}")
