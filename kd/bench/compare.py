"""The loop against others, by turns in one process.

Machines drift by a factor of two within minutes, so only what is measured by turns, in one process, is compared. An
A/A pair (the same thing timed twice in every round) says how far such a ratio can be trusted.

Two loops of others are timed: that of the Hugging Face tutorial, and a step of timm's train.py with its own
`LogitDistillationTask`. Both get their pictures decoded, resized, normalised and in memory.
"""

import contextlib
import dataclasses
import io
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import torch
from timm.task import LogitDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

import train
from kd import models
from kd.bench.limits import machine_limits, now_on, training_flops
from kd.bench.loop import Bench, note
from kd.bench.loss import tutorial_loss
from kd.machine import console, runtime
from kd.machine.runtime import Runtime
from kd.scores import bootstrap_interval

MINUTES = 4.5           # of `compare`, from its first line to its last round
LEAST_ROUNDS = 5        # even where they take longer
SAID_EVERY = 30         # seconds between two lines of progress, where there is no terminal


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


class Progress:
    """What is being timed, and how long it all still takes: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self.begin = self.said = time.monotonic()
        self.bar = console.progress(1, "")
        self.bar.bar_format = "{percentage:3.0f} %|{bar}| {elapsed}, {desc}"

    def show(self, what: str, seconds: float) -> None:
        """seconds: how long it is expected to take from begin to end; 0: not known yet."""
        now = time.monotonic()
        spent = now - self.begin
        left = f"about {max(seconds - spent, 0):.0f} s left" if seconds else "time left not known yet"
        if not self.bar.disable:
            self.bar.total, self.bar.n = max(seconds, spent, 1), spent if seconds else 0
            self.bar.set_description_str(f"{left}: {what}")
        elif now - self.said >= SAID_EVERY:
            self.said = now
            note(f"{what}: {spent:.0f} s, {left}")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


class Turns:
    """Images/s of several loops, each once a round, in an order that is shuffled from round to round."""

    def __init__(self, loops: dict[str, Callable[[], float]], rounds: int = 0, deadline: float = 0.0) -> None:
        """rounds: so many; 0: LEAST_ROUNDS, and as many more as end before `deadline`, a time of time.monotonic()."""
        self.names = list(loops)
        begin, progress = time.monotonic(), Progress()
        expected = 0.0 if rounds else deadline - begin      # seconds of it all

        def timed(name: str, part: str) -> float:
            progress.show(f"{part}, {name}", expected)
            with held_back():
                return loops[name]()

        for name in loops:      # the first time compiles, allocates and fills stores: not counted
            timed(name, "warming up")

        rows: list[list[float]] = []
        order = random.Random(0)        # shuffled, so that none always follows the same other one
        longest = 0.0                   # seconds of a round
        first = time.monotonic()
        expected = self._expected(first - begin, first - begin, rounds, deadline - begin)
        while len(rows) < (rounds or LEAST_ROUNDS) or (not rounds and time.monotonic() + longest < deadline):
            round_begin = time.monotonic()
            part = f"round {len(rows) + 1}" + (f" of {rounds}" if rounds else "")
            rates = {name: timed(name, part) for name in order.sample(self.names, len(self.names))}
            rows.append([rates[name] for name in self.names])

            longest = max(longest, time.monotonic() - round_begin)
            a_round = (time.monotonic() - first) / len(rows)
            expected = self._expected(first - begin, a_round, rounds, deadline - begin)
        progress.close()
        self.rates = np.array(rows)     # (rounds, loops)

    @staticmethod
    def _expected(warm_up: float, a_round: float, rounds: int, budget: float) -> float:
        """How long it will take from begin to end; all in seconds but `rounds`."""
        least = warm_up + (rounds or LEAST_ROUNDS) * a_round
        return least if rounds else max(budget, least)

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(self.rates)

    def median(self, name: str) -> float:
        """Images/s."""
        return float(np.median(self.rates[:, self.names.index(name)]))

    def ratio(self, over: str, under: str) -> tuple[float, list[float]]:
        """The median of the ratios within rounds, in which drift between rounds cancels, and its 95 % interval."""
        ratios = self.rates[:, self.names.index(over)] / self.rates[:, self.names.index(under)]
        return float(np.median(ratios)), interval_of_median(ratios)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keep the loops' own bars and lines from the bar of the comparison. What they say on stderr comes after them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
    finally:
        sys.stderr.write(said.getvalue())


def interval_of_median(ratios: np.ndarray) -> list[float]:
    """The 95 % interval of the median of `(rounds,)`, by drawing rounds again."""
    order, rounds = np.argsort(ratios), len(ratios)

    def medians(counts: np.ndarray) -> np.ndarray:
        """counts: `(draws, rounds)`, how often a draw has each round. The middle one, or the mean of two."""
        ends = counts[:, order].cumsum(axis=1)
        middle = [ratios[order][(ends > rank).argmax(axis=1)] for rank in ((rounds - 1) // 2, rounds // 2)]
        return (middle[0] + middle[1]) / 2

    return bootstrap_interval(medians, rounds)


def compare(cfg: train.Config, steps: int, rounds: int = 0, minutes: float = MINUTES,
            compiled: bool = False) -> dict[str, Any]:
    """The loops of others, ours with a cold and a warm store, ours again (A/A), and the bare step.

    steps: of a round; on a CPU the loops that ask the teacher make fewer.
    rounds: so many; 0: as many as end within `minutes`, at least LEAST_ROUNDS.
    compiled: also the loops of others with torch.compile.
    """
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(cfg, steps, Path(name))
        machine, classes = bench.machine, bench.data.classes
        device, student = machine.device, bench.student
        slow_steps = steps if device.type == "cuda" else max(2, 3 * steps // 8)

        batches = list(bench.batches())
        images = [models.normalize(batch.pixels, bench.prep).contiguous() for batch in batches[:slow_steps]]
        labels = [batch.labels for batch in batches[:slow_steps]]

        def plain_models() -> tuple[nn.Module, nn.Module]:
            """A student and the frozen teacher as timm makes them."""
            made = [models.create(role, model, classes, size=cfg.size, say=lambda line: None).to(device)
                    for role, model in (("student", cfg.student), ("teacher", cfg.teacher))]
            return made[0], models.freeze(made[1])

        def of_others(steps_of: Callable[[], None]) -> Callable[[], float]:
            """Images/s of their steps, with the allocator as it comes. It is the process's, so it is set each time."""
            def images_per_second() -> float:
                runtime.tune_allocator(False)
                begin = now_on(device)
                steps_of()
                rate = sum(map(len, images)) / (now_on(device) - begin)
                runtime.tune_allocator(machine.kernels)
                return rate
            return images_per_second

        # ---- the tutorial's loop: plain models in float32, pictures in torch's own layout -----------------------
        def tutorial(compiled: bool) -> Callable[[], float]:
            theirs, their_teacher = plain_models()
            optimizer = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)
            if compiled:
                theirs, their_teacher = torch.compile(theirs), torch.compile(their_teacher)  # type: ignore[assignment]
            return of_others(lambda: tutorial_loop(theirs, their_teacher, optimizer, images, labels, cfg.temperature,
                                                   cfg.kd_weight))

        # ---- timm's task: channels_last, and the precision of our loop ------------------------------------------
        last = [x.contiguous(memory_format=torch.channels_last) for x in images]

        def timm(compiled: bool) -> Callable[[], float]:
            theirs, their_teacher = (model.to(memory_format=torch.channels_last) for model in plain_models())
            optimizer = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)
            task = timm_task(theirs, their_teacher, cfg.temperature, cfg.kd_weight, device)
            if compiled:
                task.compile()
            scaler = NativeScaler(device.type) if machine.amp is torch.float16 else None
            return of_others(lambda: timm_loop(task, optimizer, scaler, last, labels, cfg.clip, machine))

        # ---- the bare step: forward, backward and update of tensors that lie ready, which no loop can beat ----------
        optimizer, scaler = bench.new_optimizer(student)
        rows = len(batches[0].samples)
        teacher_outputs = torch.randn(rows, bench.warm.classes, device=device)
        forward: nn.Module = models.FromPixels(student, bench.prep, bench.with_features)
        if machine.compile == "on":
            forward = bench.compiled(forward, cfg.batch_size, cfg.accumulate)

        def bare() -> float:
            student.train()
            begin = now_on(device)
            for _ in range(steps):
                train.train_step(forward, optimizer, scaler, batches[0], teacher_outputs, bench.loss_fn, cfg,
                                 machine)
            return steps * rows / (now_on(device) - begin)

        others = {"tutorial": tutorial(False), "timm_task": timm(False)}
        if compiled:
            others |= {"tutorial_compiled": tutorial(True), "timm_task_compiled": timm(True)}
        turns = Turns({**others, "cold": lambda: bench.fit(student, cold=True, steps=slow_steps),
                       "warm": lambda: bench.fit(student), "bare": bare, "again": lambda: bench.fit(student)},
                      rounds, deadline)

    result: dict[str, Any] = {f"{part}_img_s": turns.median(part) for part in (*others, "cold", "warm", "bare")}
    ratios = [("cold_ratio", "cold", "tutorial"), ("warm_ratio", "warm", "tutorial"), ("aa_ratio", "again", "warm"),
              ("loop_over_bare_step", "warm", "bare")]
    ratios += [(f"{ours}_over_{other}", ours, other) for other in others if other != "tutorial"
               for ours in ("cold", "warm")]
    for key, over, under in ratios:
        result[key], result[f"{key}_95"] = turns.ratio(over, under)
    limits = machine_limits(device, machine.amp)
    flops = training_flops(cfg.student, cfg.size, device)
    return {**result, **limits, "student_gflop_per_image": flops / 1e9,
            "roofline_share": result["warm_img_s"] * flops / (limits["gemm_gflop_s"] * 1e9), "rounds": turns.rounds,
            "steps_a_round": steps, "slow_steps_a_round": slow_steps, "batch_size": cfg.batch_size, "size": cfg.size,
            "line": machine.line, "environment": runtime.environment()}


NAMES = {"tutorial": "the tutorial's loop", "timm_task": "timm's task",
         "tutorial_compiled": "the tutorial's loop, compiled", "timm_task_compiled": "timm's task, compiled",
         "cold": "ours, the teacher is asked", "warm": "ours, its logits are stored", "bare": "bare step"}


def table(result: dict[str, Any]) -> str:
    """What `compare` returned, for people: images/s, and the ratios with their 95 % intervals."""
    def ratio(key: str) -> str:
        low, high = result[f"{key}_95"]
        return f"{result[key]:5.2f} × ({low:.2f} to {high:.2f})"

    others = [other for other in NAMES if f"cold_over_{other}" in result]
    lines = [f"{'':32} {'img/s':>8}"]
    lines += [f"{name:32} {result[f'{part}_img_s']:8.1f}" for part, name in NAMES.items() if f"{part}_img_s" in result]
    lines += ["", f"{'ours against':32} {'the teacher is asked':26} its logits are stored"]
    lines += [f"{NAMES[other]:32} {ratio(cold):26} {ratio(warm)}" for other, cold, warm in
              [("tutorial", "cold_ratio", "warm_ratio"),
               *((other, f"cold_over_{other}", f"warm_over_{other}") for other in others)]]
    lines += [f"{'the bare step':32} {'':26} {ratio('loop_over_bare_step')}",
              f"{'itself (A/A)':32} {'':26} {ratio('aa_ratio')}", "",
              f"{result['line']}; {result['size']} px, batches of {result['batch_size']}; {result['rounds']} rounds; "
              "in brackets: 95 % interval",
              f"{100 * result['roofline_share']:.0f} % of what a matrix product reaches "
              f"({result['gemm_gflop_s']:.0f} GFLOP/s); memory {result['memory_gb_s']:.1f} GB/s"]
    return "\n".join(lines)


def switches(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """What each fast path gains: images/s of the whole loop, over those of the same loop without that path."""
    with tempfile.TemporaryDirectory() as name:

        def bench_with(**changes: Any) -> Bench:
            folder = "-".join(f"{flag}-{value}" for flag, value in changes.items()) or "unchanged"
            return Bench(dataclasses.replace(cfg, **changes), steps, Path(name) / folder)

        whole = bench_with()
        tuned = whole.machine.kernels

        def loop(bench: Bench, cold: bool = False, allocator: bool = tuned) -> Callable[[], float]:
            def images_per_second() -> float:
                runtime.tune_allocator(allocator)   # it is the process's, so each loop sets it
                return bench.fit(bench.student, cold)
            return images_per_second

        # ---- the loop as it is, and without each path ----------------------------------------------------------
        on = loop(whole)
        without = {"A/A": on, "stored logits": loop(whole, cold=True),
                   "the allocator": loop(whole, allocator=False),
                   "all kernels and the allocator": loop(bench_with(kernels="off"), allocator=False),
                   "the fused loss": loop(bench_with(loss="reference")),
                   "mixed precision": loop(bench_with(amp="off"))}
        turns = Turns({"on": on, **without}, rounds)

    ratios = {path: turns.ratio("on", path) for path in without}
    return {"images_per_second": turns.median("on"), "gain": {path: ratio for path, (ratio, _) in ratios.items()},
            "gain_95": {path: interval for path, (_, interval) in ratios.items()}, "rounds": rounds,
            "steps_a_round": steps, "batch_size": cfg.batch_size, "size": cfg.size, "loss": whole.loss_name,
            "line": whole.machine.line, "environment": runtime.environment()}
