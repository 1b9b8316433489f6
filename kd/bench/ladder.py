"""From the tutorial's loop to ours, one idea a rung: what each is worth, and all so far.

A rung keeps the ideas of those below it and adds its own. All rungs are timed by turns, on the same pictures, with the
same student and teacher. Up to the last, the pictures lie in memory, decoded and normalised. The last rung is the real
`fit`, which also makes the views, normalises them, logs and saves.
"""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import nn

from kd import models
from kd.bench.loop import Bench, images_per_second, tutorial_loop
from kd.bench.turns import Turns
from kd.config import Config
from kd.fast import blocks, folding
from kd.machine import runtime


class Rung(NamedTuple):
    """One idea. `read` names the lines that have it."""

    name: str
    read: str


TUTORIAL = Rung("the tutorial's loop", "kd/bench/loop.py, tutorial_loop")
CHANNELS_LAST = Rung("channels last in memory", "train.py, build")
NO_WAIT = Rung("no wait for the loss", "train.py, train_step")
PRECISION = Rung("mixed precision", "kd/machine/runtime.py, _choose_precision")
FOLDED = Rung("the frozen teacher folded", "kd/fast/folding.py, for_inference")
LOSS = Rung("the loss fused", "kd/fast/fused_loss.py")
BLOCKS = Rung("the blocks fused", "kd/fast/blocks.py, accelerate")
ALLOCATOR = Rung("memory kept by the allocator", "kd/machine/runtime.py, tune_allocator")
STORED = Rung("the teacher's logits stored", "kd/teacher.py, kd/logits.py")
FIT = Rung("the whole loop, views made in it", "train.py, fit")


def rungs_of(bench: Bench) -> list[Rung]:
    """Those that apply on this machine, from the tutorial's loop up."""
    machine, cpu = bench.machine, bench.machine.device.type == "cpu"
    return [rung for rung, applies in (
        (TUTORIAL, True), (CHANNELS_LAST, True), (NO_WAIT, True), (PRECISION, machine.amp is not None),
        (FOLDED, machine.kernels), (LOSS, bench.loss_name.startswith("fused")),
        (BLOCKS, cpu and machine.kernels and not blocks.unavailable()), (ALLOCATOR, machine.kernels),
        (STORED, True), (FIT, True)) if applies]


def loop_of(ideas: set[Rung], bench: Bench, steps: int) -> Callable[[], float]:
    """Images/s of the tutorial's steps with some ideas."""
    cfg, machine, batches = bench.cfg, bench.machine, bench.batches(steps)
    student, teacher = (copy.deepcopy(model) for model in bench.plain_models())
    layout = torch.channels_last if CHANNELS_LAST in ideas else torch.contiguous_format
    if CHANNELS_LAST in ideas:
        student, teacher = (model.to(memory_format=layout) for model in (student, teacher))
    if FOLDED in ideas:
        teacher = folding.for_inference(teacher, cfg.size)[0]
    if BLOCKS in ideas:
        student = blocks.accelerate(student)
    normalise = models.FromPixels(nn.Identity(), bench.student.prep).to(machine.device)
    images = [normalise(batch.pixels).contiguous(memory_format=layout) for batch in batches]
    labels = [batch.labels for batch in batches]
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, fused=NO_WAIT in ideas)
    total = sum(map(len, images))
    if ideas == {TUTORIAL}:
        return images_per_second(lambda: tutorial_loop(student, teacher, optimizer, images, labels, cfg.temperature,
                                                       cfg.kd_weight), total, machine)

    loss_fn = bench.loss_fn if LOSS in ideas else bench.plain_loss
    precision = machine if PRECISION in ideas else machine._replace(amp=None)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=precision.amp is torch.float16)
    stored = [torch.randn(len(y), bench.warm.columns, device=machine.device) for y in labels]

    def steps_of() -> None:
        student.train()
        for x, y, known in zip(images, labels, stored, strict=True):
            with precision.autocast():
                logits = student(x)
                with torch.no_grad():
                    teacher_logits = known if STORED in ideas else teacher(x)
            loss = loss_fn(logits, teacher_logits, y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            if NO_WAIT not in ideas:
                loss.item()

    return images_per_second(steps_of, total, machine, tuned=ALLOCATOR in ideas)


def ladder(cfg: Config, steps: int, rounds: int = 0, minutes: float = 4.5) -> dict[str, Any]:
    """Images/s of each rung, over the first and over the one before; A/A, and the bare step.

    steps: of a round; on a CPU the loops that ask the teacher make fewer.
    """
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(cfg, steps, Path(name))
        slow_steps = steps if bench.machine.device.type == "cuda" else max(2, 3 * steps // 8)
        rungs, loops = rungs_of(bench), {}
        for place, rung in enumerate(rungs[:-1]):
            loops[rung.name] = loop_of(set(rungs[:place + 1]), bench, steps if rung is STORED else slow_steps)
        turns = Turns({**loops, FIT.name: bench.fit, "again": bench.fit, "bare": bench.bare_steps()}, rounds, deadline)

    rows = []
    for rung, before in zip(rungs, [rungs[0], *rungs]):
        over_first, over_first_95 = turns.ratio(rung.name, rungs[0].name)
        over_previous, over_previous_95 = turns.ratio(rung.name, before.name)
        rows.append({"name": rung.name, "img_s": turns.median(rung.name), "over_first": over_first,
                     "over_first_95": over_first_95, "over_previous": over_previous,
                     "over_previous_95": over_previous_95, "read": rung.read})
    aa_ratio, aa_ratio_95 = turns.ratio("again", FIT.name)
    return {"rungs": rows, "aa_ratio": aa_ratio, "aa_ratio_95": aa_ratio_95, "bare_img_s": turns.median("bare"),
            "rounds": len(turns.rates), "steps_a_round": steps, "slow_steps_a_round": slow_steps,
            "batch_size": cfg.batch_size, "size": cfg.size, "teacher": cfg.teacher, "student": cfg.student,
            "line": bench.machine.line, "environment": runtime.environment()}


def table(result: dict[str, Any]) -> str:
    """What `ladder` returned, for people, with 95 % intervals."""
    def ratio(row: dict[str, Any], key: str) -> str:
        low, high = row[f"{key}_95"]
        return f"{row[key]:5.2f} × ({low:.2f} to {high:.2f})"

    lines = [f"{'':34} {'img/s':>7}  {'over the one before':25} {'over the first':25} to read"]
    lines += [f"{row['name']:34} {row['img_s']:7.1f}  {ratio(row, 'over_previous'):25} {ratio(row, 'over_first'):25} "
              f"{row['read']}" for row in result["rungs"]]
    lines += [f"{'the bare step':34} {result['bare_img_s']:7.1f}",
              f"{'the last rung over itself (A/A)':43} {ratio(result, 'aa_ratio')}",
              f"{result['line']}; {result['teacher']} to {result['student']}, {result['size']} px, batches of "
              f"{result['batch_size']}; {result['rounds']} rounds; in brackets: 95 % interval"]
    return "\n".join(lines)


def draw(result: dict[str, Any], file: str) -> None:
    """The rungs as bars of images/s, with the factor of each, as an SVG or PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = result["rungs"][::-1]
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kd", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(rows) + 0.8), layout="constrained")
        axes.barh([row["name"] for row in rows], [row["img_s"] for row in rows], color="#4c78a8")
        for place, row in enumerate(rows):
            factor = f"  {row['img_s']:.0f}   × {row['over_previous']:.2f}" if place < len(rows) - 1 else \
                f"  {row['img_s']:.0f}"
            axes.text(row["img_s"], place, factor, va="center")
        axes.set_xlim(0, 1.15 * max(row["img_s"] for row in rows))
        axes.set_xlabel(f"images/s ({result['line']}; {result['size']} px, batches of {result['batch_size']})")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None} if file.endswith("svg") else {})
        pyplot.close(figure)
