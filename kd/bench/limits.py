"""What the machine can do at best, and what a training step asks of it."""

import sys
import time
from typing import Any, Callable

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd import models
from kd.machine import devices, distributed


def now_on(device: torch.device) -> float:
    """The time in seconds, once the device has done all that was queued."""
    devices.wait(device)
    return time.perf_counter()


def peak_memory() -> int | None:
    """The most memory that this process has had, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:     # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_limits(device: torch.device, amp: torch.dtype | None) -> dict[str, float]:
    """GFLOP/s of a matrix product in the step's precision, and GB/s of a copy: the best of nine."""
    def shortest(work: Callable[[], Any], repeats: int = 9) -> float:
        times = []
        for _ in range(repeats):
            begin = now_on(device)
            work()
            times.append(now_on(device) - begin)
        return min(times)

    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=amp or torch.float32) for _ in range(2))
    source = torch.randn(1 << 26, device=device)  # 256 MB: more than any cache holds
    target = torch.empty_like(source)
    return {"gemm_gflop_s": 2 * side ** 3 / shortest(lambda: a @ b) / 1e9,
            "memory_gb_s": 2 * source.numel() * 4 / shortest(lambda: target.copy_(source)) / 1e9}


def training_flops(student: str, size: int, device: torch.device) -> float:
    """Floating-point operations of forward and backward for one image, a multiply-add counted as two.

    Taken as three forwards, because torch counts the backward of grouped convolutions wrongly.
    """
    twin = models.create("student", student, ("a", "b"), size=size, say=lambda line: None).to(device)
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(2, 3, size, size, device=device))
    return 3 * counter.get_total_flops() / 2


def communication(student: nn.Module, device: torch.device, repeats: int = 20) -> float:
    """Milliseconds that ranks take to add up gradients of this many parameters, when nothing else goes on.

    Within a step much of that passes while the backward still computes: it is the most that a step waits for.
    """
    gradients = torch.zeros(models.parameters(student), device=device)
    times = []
    for _ in range(repeats):
        begin = now_on(device)
        distributed.mean_over_ranks(gradients)
        times.append(now_on(device) - begin)
    return float(np.median(times) * 1e3)
