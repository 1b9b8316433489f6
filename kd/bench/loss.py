"""How fast is the loss? Forward and backward of three implementations, in turns, in one process.

    python -m kd bench loss [--json] [--device auto|cpu|cuda] [--dtype fp32|bf16|fp16]
                            [--shapes 256x1000,32x3] [--rounds N]

eager     the tutorial's ops, as its Trainer runs them
compiled  torch.compile of the reference, `kd_loss`, compiled anew for each shape
fused     `fused_kd_loss`
floor     torch.add of student and teacher. It reads both and writes as much as the gradient takes:
          the least memory traffic that a loss and its gradient can do with, and no arithmetic

Times are medians over rounds. Every round times each of them once, in shuffled order. A ratio is the
median of the ratios within rounds, so a machine that gets slower or faster meanwhile cancels out.
`aa_ratio` is the fused loss against itself: it shows how far the ratios can be trusted. Memory is the
peak of what forward and backward allocate, gradient included, over the bytes of one logits tensor.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import BadInput, cli, losses
from kd.fast.fused_loss import fused_kd_loss
from kd.losses import kd_loss

TEMPERATURE, KD_WEIGHT = 5.0, 0.5
SHAPES = {"cpu": "256x1000,4096x1000,256x21841,32x3",
          "cuda": "32x3,256x1000,4096x1000,256x21841,4096x32000,1024x131072"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tutorial_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor,
                  temperature: float, kd_weight: float) -> Tensor:
    """The loss of the Hugging Face tutorial on distillation, op by op, as its Trainer computes it."""
    soft_teacher = F.softmax(teacher_logits / temperature, dim=-1)
    soft_student = F.log_softmax(student_logits / temperature, dim=-1)
    distillation_loss = F.kl_div(soft_student, soft_teacher, reduction="batchmean") * temperature ** 2
    return (1 - kd_weight) * F.cross_entropy(student_logits, labels) + kd_weight * distillation_loss


def timer(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """A function of (work, repeats) that returns the milliseconds of one repeat."""
    def on_cpu(work: Callable[[], Any], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - begin) * 1e3 / repeats

    def on_cuda(work: Callable[[], Any], repeats: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats

    return on_cuda if device.type == "cuda" else on_cpu


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `work` holds at one time, beyond those held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(B: int, C: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """One row of the table: milliseconds, ratios and memory for logits of shape (B, C)."""
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(B, C, generator=generator) * 3).to(device, dtype).requires_grad_()
    teacher = (torch.randn(B, C, generator=generator) * 3).to(device, dtype)
    labels = torch.randint(0, C, (B,), generator=generator).to(device)
    with torch.no_grad():
        out = torch.empty_like(student)
    torch.compiler.reset()

    def step(loss_fn: Callable[..., Tensor]) -> Callable[[], Any]:
        def work() -> None:
            student.grad = None
            loss_fn(student, teacher, labels, TEMPERATURE, KD_WEIGHT).backward()
        return work

    work: dict[str, Callable[[], Any]] = {
        "eager": step(tutorial_loss), "compiled": step(torch.compile(kd_loss, dynamic=False)),
        "fused": step(fused_kd_loss), "again": step(fused_kd_loss),
        "floor": lambda: torch.add(student.detach(), teacher, out=out)}

    # ---- memory; the first call compiles and builds ----
    logits_bytes = student.numel() * student.element_size()
    extra: dict[str, float] = {}
    for name in ("eager", "compiled", "fused"):
        work[name]()
        student.grad = None
        extra[name] = peak_bytes(work[name], device) / logits_bytes

    # ---- time ----
    # Short work is repeated for some 2 ms: reading a clock or an event costs nothing against that.
    milliseconds = timer(device)
    repeats = {}
    for name, run in work.items():
        fastest = min(milliseconds(run, 3) for _ in range(3))
        repeats[name] = max(1, min(100, int(2 / max(1e-3, fastest))))

    times: dict[str, list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for _ in range(rounds):
        # shuffled, because whatever ran before leaves its mark on the caches
        for name in order.sample(list(work), len(work)):
            times[name].append(milliseconds(work[name], repeats[name]))

    def ratio(over: str, under: str) -> float:
        return median(a / b for a, b in zip(times[over], times[under], strict=True))

    row: dict[str, Any] = {"shape": [B, C], "dtype": str(dtype).removeprefix("torch."),
                           "device": device.type}
    for name in ("eager", "compiled", "fused", "floor"):
        row[f"{name}_ms"] = median(times[name])
        fifths = quantiles(times[name], n=5, method="inclusive")  # never beyond what was measured
        row[f"{name}_ms_p20_p80"] = [fifths[0], fifths[3]]
    row |= {"vs_eager": ratio("eager", "fused"), "vs_compiled": ratio("compiled", "fused"),
            "aa_ratio": ratio("again", "fused"), "over_floor": ratio("fused", "floor"),
            "extra_bytes_over_logits": extra["fused"],
            "eager_extra_bytes_over_logits": extra["eager"],
            "compiled_extra_bytes_over_logits": extra["compiled"]}
    return row


def main(argv: list[str]) -> None:
    """Print one row for each shape. Raises BadInput for arguments that are wrong."""
    parser = cli.OneLineParser(prog="python -m kd bench loss", description=__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter,
                               allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, one for each shape")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--shapes", help="BxC, separated by commas")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)

    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise BadInput("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if args.rounds < 2:
        raise BadInput(f"--rounds {args.rounds}: must be at least 2")
    device = torch.device("cuda" if has_cuda and args.device != "cpu" else "cpu")
    shapes = []
    for word in (args.shapes or SHAPES[device.type]).split(","):
        B, _, C = word.partition("x")
        if not (B.isdecimal() and C.isdecimal() and int(B) and int(C)):
            raise BadInput(f"--shapes {word}: must be BxC, such as 256x1000")
        shapes.append((int(B), int(C)))

    name = losses.choose("fused", device, TEMPERATURE, KD_WEIGHT, shapes[0][1], soft_labels=False,
                         kernels=True)[1]
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{name} on {device.type} ({where}), torch {torch.__version__}", file=sys.stderr)

    if not args.json:
        print(f"{'shape':>12} {'eager':>9} {'compiled':>9} {'fused':>9} {'floor':>9}  ms   "
              f"{'vs eager':>8} {'vs compiled':>11} {'A/A':>5} {'over floor':>10} "
              f"{'extra memory':>12}")
    for B, C in shapes:
        row = measure(B, C, DTYPES[args.dtype], device, args.rounds)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(f"{f'{B}x{C}':>12} {row['eager_ms']:9.4f} {row['compiled_ms']:9.4f} "
              f"{row['fused_ms']:9.4f} {row['floor_ms']:9.4f}       {row['vs_eager']:7.2f}x "
              f"{row['vs_compiled']:10.2f}x {row['aa_ratio']:5.2f} {row['over_floor']:9.2f}x "
              f"{row['extra_bytes_over_logits']:11.2f}x", flush=True)
