"""The loop against others, by turns in one process.

Machines drift by a factor of two within minutes, so only what is measured by turns, in one process, is compared. An
A/A pair (the same thing timed twice in every round) says how far such a ratio can be trusted.
"""

import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor, nn

import train
from kd import models
from kd.bench.limits import machine_limits, training_flops, wait
from kd.bench.loop import Bench
from kd.bench.loss import tutorial_loss
from kd.machine import console, runtime
from kd.scores import bootstrap_interval


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


class Turns:
    """Images/s of several loops, each once a round, in an order that is shuffled from round to round."""

    def __init__(self, loops: dict[str, Callable[[], float]], rounds: int) -> None:
        self.names = list(loops)
        for loop in loops.values():     # the first time compiles, allocates and fills stores: not counted
            loop()
        rows = []
        order = random.Random(0)        # shuffled, so that none always follows the same other one
        with console.progress(rounds, "rounds", "round") as bar:
            for _ in range(rounds):
                rates = {name: loops[name]() for name in order.sample(self.names, len(self.names))}
                rows.append([rates[name] for name in self.names])
                bar.update()
        self.rates = np.array(rows)     # (rounds, loops)

    def median(self, name: str) -> float:
        """Images/s."""
        return float(np.median(self.rates[:, self.names.index(name)]))

    def ratio(self, over: str, under: str) -> tuple[float, list[float]]:
        """The median of the ratios within rounds, in which drift between rounds cancels, and its 95 % interval."""
        ratios = self.rates[:, self.names.index(over)] / self.rates[:, self.names.index(under)]
        return float(np.median(ratios)), interval_of_median(ratios)


def interval_of_median(ratios: np.ndarray) -> list[float]:
    """The 95 % interval of the median of `(rounds,)`, by drawing rounds again."""
    order, rounds = np.argsort(ratios), len(ratios)

    def medians(counts: np.ndarray) -> np.ndarray:
        """counts: `(draws, rounds)`, how often a draw has each round. The middle one, or the mean of two."""
        ends = counts[:, order].cumsum(axis=1)
        middle = [ratios[order][(ends > rank).argmax(axis=1)] for rank in ((rounds - 1) // 2, rounds // 2)]
        return (middle[0] + middle[1]) / 2

    return bootstrap_interval(medians, rounds)


def compare(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """The tutorial's loop, ours with a cold and a warm store, ours again (A/A), and the bare step."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(cfg, steps, Path(name))
        device, classes = bench.machine.device, bench.data.classes
        student = bench.student

        # ---- the tutorial's side: plain models, pictures ready in memory -----------------------------------------
        theirs, their_teacher = (models.create(role, name, classes, size=cfg.size, say=lambda line: None).to(device)
                                 for role, name in (("student", cfg.student), ("teacher", cfg.teacher)))
        models.freeze(their_teacher)
        batches = list(bench.batches())
        images = [models.normalize(batch.pixels, bench.prep).contiguous() for batch in batches]
        labels = [batch.labels for batch in batches]
        plain = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)

        def tutorial() -> float:
            runtime.tune_allocator(False)   # the allocator is the process's; the tutorial has it as it comes
            begin = wait(device)
            tutorial_loop(theirs, their_teacher, plain, images, labels, cfg.temperature, cfg.kd_weight)
            rate = bench.samples / (wait(device) - begin)
            runtime.tune_allocator(device.type == "cpu" and bench.machine.kernels)
            return rate

        # ---- the bare step: forward, backward and update of tensors that lie ready, which no loop can beat ----------
        optimizer, scaler = bench.new_optimizer(student)
        x = images[0].contiguous(memory_format=torch.channels_last)
        teacher_logits = torch.randn(len(x), len(classes), device=device)
        forward: nn.Module = torch.compile(student) if bench.machine.compile else student  # type: ignore

        def bare() -> float:
            student.train()
            begin = wait(device)
            for _ in batches:
                train.train_step(forward, optimizer, scaler, batches[0], x, teacher_logits, bench.loss_fn, cfg,
                                 bench.machine)
            return len(batches) * len(x) / (wait(device) - begin)

        turns = Turns({"tutorial": tutorial, "cold": lambda: bench.fit(student, cold=True),
                       "warm": lambda: bench.fit(student), "bare": bare, "again": lambda: bench.fit(student)}, rounds)

    result: dict[str, Any] = {f"{part}_img_s": turns.median(part) for part in ("tutorial", "cold", "warm", "bare")}
    for key, over, under in (("cold_ratio", "cold", "tutorial"), ("warm_ratio", "warm", "tutorial"),
                             ("aa_ratio", "again", "warm"), ("loop_over_bare_step", "warm", "bare")):
        result[key], result[f"{key}_95"] = turns.ratio(over, under)
    limits = machine_limits(device, bench.machine.amp)
    flops = training_flops(cfg.student, cfg.size, device)
    return {**result, **limits, "student_gflop_per_image": flops / 1e9,
            "roofline_share": result["warm_img_s"] * flops / (limits["gemm_gflop_s"] * 1e9), "rounds": rounds,
            "steps_a_round": steps, "batch_size": cfg.batch_size, "size": cfg.size, "line": bench.machine.line,
            "environment": runtime.environment()}


def switches(cfg: train.Config, rounds: int, steps: int) -> dict[str, Any]:
    """What each fast path gains: images/s of the whole loop, over those of the same loop without that path."""
    with tempfile.TemporaryDirectory() as name:

        def bench_with(**changes: Any) -> Bench:
            folder = "-".join(f"{flag}-{value}" for flag, value in changes.items()) or "unchanged"
            return Bench(dataclasses.replace(cfg, **changes), steps, Path(name) / folder)

        whole = bench_with()
        tuned = whole.machine.device.type == "cpu" and whole.machine.kernels

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
