"""The loop against others, by turns in one process.

Two loops of others are timed: that of the Hugging Face tutorial, and a step of timm's train.py with its own
`LogitDistillationTask`. Both get their pictures decoded, resized, normalised and in memory. An A/A pair (the same thing
timed twice in every round) says how far a ratio can be trusted.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import torch
from timm.utils import NativeScaler
from torch.utils.flop_counter import FlopCounterMode

from kd import models
from kd.bench.loop import Bench, images_per_second, timm_loop, timm_task, tutorial_loop
from kd.bench.turns import Turns, now_on
from kd.config import Config
from kd.machine import runtime


def matrix_product_rate(device: torch.device, amp: torch.dtype | None) -> float:
    """GFLOP/s of a matrix product in the step's precision: the best of nine."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=amp or torch.float32) for _ in range(2))
    times = []
    for _ in range(9):
        begin = now_on(device)
        a @ b
        times.append(now_on(device) - begin)
    return 2 * side ** 3 / min(times) / 1e9


def training_flops(student: str, size: int, device: torch.device) -> float:
    """Floating-point operations of forward and backward for one image, a multiply-add counted as two.

    Taken as three forwards, because torch counts the backward of grouped convolutions wrongly.
    """
    twin = models.create("student", student, ("a", "b"), size=size, say=lambda line: None).to(device)
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(2, 3, size, size, device=device))
    return 3 * counter.get_total_flops() / 2


def compare(cfg: Config, steps: int, rounds: int = 0, minutes: float = 4.5, compiled: bool = False) -> dict[str, Any]:
    """The loops of others, ours with a cold and a warm store, ours again (A/A), and the bare step.

    steps: of a round; on a CPU the loops that ask the teacher make fewer.
    rounds: so many; 0: as many as end within `minutes`.
    compiled: also the loops of others with torch.compile.
    """
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(cfg, steps, Path(name))
        machine, device = bench.machine, bench.machine.device
        slow_steps = steps if device.type == "cuda" else max(2, 3 * steps // 8)
        batches = bench.batches(slow_steps)
        forward = models.FromPixels(torch.nn.Identity(), bench.student.prep).to(device)    # normalises only
        images = [forward(batch.pixels).contiguous() for batch in batches]
        labels = [batch.labels for batch in batches]
        total = sum(map(len, images))

        def tutorial(compiled: bool = False) -> Callable[[], float]:
            theirs, teacher = bench.plain_models()
            optimizer = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)
            if compiled:
                theirs, teacher = torch.compile(theirs), torch.compile(teacher)  # type: ignore[assignment]
            return images_per_second(lambda: tutorial_loop(theirs, teacher, optimizer, images, labels,
                                                           cfg.temperature, cfg.kd_weight), total, machine)

        # timm's: channels_last, and the precision of our loop
        last = [x.contiguous(memory_format=torch.channels_last) for x in images]

        def timm(compiled: bool = False) -> Callable[[], float]:
            theirs, teacher = (model.to(memory_format=torch.channels_last) for model in bench.plain_models())
            optimizer = torch.optim.AdamW(theirs.parameters(), lr=cfg.lr)
            task = timm_task(theirs, teacher, cfg.temperature, cfg.kd_weight, device)
            if compiled:
                task.compile()
            scaler = NativeScaler(device.type) if machine.amp is torch.float16 else None
            return images_per_second(lambda: timm_loop(task, optimizer, scaler, last, labels, cfg.clip, machine), total,
                                     machine)

        others = {"tutorial": tutorial(), "timm_task": timm()}
        if compiled:
            others |= {"tutorial_compiled": tutorial(True), "timm_task_compiled": timm(True)}
        turns = Turns({**others, "cold": lambda: bench.fit(cold=True, steps=slow_steps), "warm": bench.fit,
                       "bare": bench.bare_steps(), "again": bench.fit}, rounds, deadline)

    result: dict[str, Any] = {f"{part}_img_s": turns.median(part) for part in (*others, "cold", "warm", "bare")}
    ratios = [("cold_ratio", "cold", "tutorial"), ("warm_ratio", "warm", "tutorial"), ("aa_ratio", "again", "warm"),
              ("loop_over_bare_step", "warm", "bare")]
    ratios += [(f"{ours}_over_{other}", ours, other) for other in others if other != "tutorial"
               for ours in ("cold", "warm")]
    for key, over, under in ratios:
        result[key], result[f"{key}_95"] = turns.ratio(over, under)
    limit, flops = matrix_product_rate(device, machine.amp), training_flops(cfg.student, cfg.size, device)
    return {**result, "gemm_gflop_s": limit, "student_gflop_per_image": flops / 1e9,
            "roofline_share": result["warm_img_s"] * flops / (limit * 1e9), "rounds": len(turns.rates),
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
              f"({result['gemm_gflop_s']:.0f} GFLOP/s)"]
    return "\n".join(lines)
