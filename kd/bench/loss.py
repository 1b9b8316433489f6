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
`aa_ratio` is the fused loss against itself: it shows how far the ratios can be trusted.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from kd import BadInput, cli
from kd.bench.loop import tutorial_loss
from kd.fast.fused_loss import fused_kd_loss, load_kernel
from train import kd_loss

TEMPERATURE, KD_WEIGHT = 5.0, 0.5
SHAPES = {"cpu": "256x1000,4096x1000,256x21841,32x3",
          "cuda": "32x3,256x1000,4096x1000,256x21841,4096x32000,1024x131072"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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

    # ---- time; the first call compiles and builds ----
    # Short work is repeated for some 2 ms: reading a clock or an event costs nothing against that.
    timers = {name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
              for name, run in work.items()}
    repeats = {name: max(1, min(100, int(2e-3 / max(1e-6, timer.timeit(3).mean)))) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    order = random.Random(0)
    for _ in range(rounds):
        # shuffled, because whatever ran before leaves its mark on the caches
        for name in order.sample(list(work), len(work)):
            times[name].append(1e3 * timers[name].timeit(repeats[name]).mean)

    def ratio(over: str, under: str) -> float:
        return median(a / b for a, b in zip(times[over], times[under], strict=True))

    row: dict[str, Any] = {"shape": [B, C], "dtype": str(dtype).removeprefix("torch."), "device": device.type}
    for name in ("eager", "compiled", "fused", "floor"):
        row[f"{name}_ms"] = median(times[name])
        fifths = quantiles(times[name], n=5, method="inclusive")  # never beyond what was measured
        row[f"{name}_ms_p20_p80"] = [fifths[0], fifths[3]]
    return row | {"vs_eager": ratio("eager", "fused"), "vs_compiled": ratio("compiled", "fused"),
                  "aa_ratio": ratio("again", "fused"), "over_floor": ratio("fused", "floor")}


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

    kernel, missing = load_kernel(device.type)
    if missing:
        raise BadInput(f"bench loss: there is no kernel ({missing}); mend that first")
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"fused loss ({kernel}) on {device.type} ({where}), torch {torch.__version__}", file=sys.stderr)

    if not args.json:
        print(f"{'shape':>12} {'eager':>9} {'compiled':>9} {'fused':>9} {'floor':>9}  ms   "
              f"{'vs eager':>8} {'vs compiled':>11} {'A/A':>5} {'over floor':>10}")
    for B, C in shapes:
        row = measure(B, C, DTYPES[args.dtype], device, args.rounds)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(f"{f'{B}x{C}':>12} {row['eager_ms']:9.4f} {row['compiled_ms']:9.4f} "
              f"{row['fused_ms']:9.4f} {row['floor_ms']:9.4f}       {row['vs_eager']:7.2f}x "
              f"{row['vs_compiled']:10.2f}x {row['aa_ratio']:5.2f} {row['over_floor']:9.2f}x", flush=True)
