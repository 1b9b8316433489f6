"""The machine: device, precision, kernels, allocator; and what a result must say about where it was made."""

import contextlib
import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from typing import Any, ContextManager, NamedTuple

import torch
from torch import nn

from kd import BadInput, cli
from kd.machine.cores import cpu_quota, usable_cores


class Runtime(NamedTuple):
    """Where and in which precision a run computes."""

    device: torch.device
    amp: torch.dtype | None  # of autocast; None: float32 throughout
    compile: bool            # torch.compile the training step
    kernels: bool            # use the kernels of kd/fast; False: plain modules, the loop that one reads
    line: str                # all of it in one line, for people

    def autocast(self) -> ContextManager:
        """The autocast context of forward passes; nothing at all where `amp` is None."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)


def start(device: str, amp: str, compile: str, kernels: str = "auto") -> Runtime:
    """Resolve each `auto`, and set what has to be set before the first tensor.

    Raises BadInput where a device, a precision or a compilation is asked for that the machine cannot give.
    """
    limit_threads()
    chosen = _choose_device(device)
    precision = _choose_precision(amp, chosen)
    compiled = _choose_compile(compile, chosen)

    if chosen.type == "cuda":
        torch.backends.cudnn.benchmark = True             # shapes are fixed, so the search pays once
        torch.backends.cuda.matmul.allow_tf32 = True
        name = torch.cuda.get_device_name()
    else:
        if kernels != "off":
            tune_allocator()
        name = f"{torch.get_num_threads()} threads"

    ranks = f" × {cli.ranks()} ranks" if cli.ranks() > 1 else ""
    line = f"{chosen.type} ({name}){ranks}, {precision}" + (", compiled" if compiled else "")
    return Runtime(chosen, DTYPES[precision], compiled, kernels != "off", line)


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _choose_device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise BadInput("--device cuda: torch sees no GPU here; use --device cpu or auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")

    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun: a GPU a rank
    if chosen.index >= torch.cuda.device_count():
        raise BadInput(f"--nproc-per-node: more ranks than the {torch.cuda.device_count()} GPUs of this machine")
    torch.cuda.set_device(chosen)
    return chosen


def _choose_precision(amp: str, device: torch.device) -> str:
    if amp == "fp16" and device.type == "cpu":
        raise BadInput("--amp fp16: the CPU has no fast half precision; use bf16, off or auto")
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    # bf16 needs no gradient scaler, so it is preferred to fp16. It pays where tensor cores (Ampere and later) or the
    # CPU's own instructions multiply it. Other CPUs lose more in conversions than they gain.
    if device.type == "cpu":
        return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def _choose_compile(compile: str, device: torch.device) -> bool:
    if compile == "off" or (compile == "auto" and device.type == "cpu"):
        return False
    number = torch.ones(1, device=device)
    try:
        # Even the smallest function needs a compiler, Python's headers and, on a GPU, Triton. This takes a few seconds:
        # most of them load what the model's compilation needs as well.
        torch.compile(torch.neg)(number)
    except Exception as error:
        if compile == "on":
            raise BadInput(f"--compile on: torch.compile does not work here ({_first_error(error)}); mend that, or use "
                           f"--compile off") from error
        print(f"--compile auto: goes on uncompiled, since torch.compile does not work here ({_first_error(error)})")
        return False
    return True


def compiled(model: nn.Module) -> nn.Module:
    """`torch.compile(model)`. Where its compiler fails on this model, a line says why, and the model runs uncompiled.

    The compiler fails before anything is computed, so no batch counts twice in BatchNorm or in the random state.
    """
    failed = False

    def inductor_or_nothing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal failed
        if not failed:
            try:
                return torch._dynamo.lookup_backend("inductor")(graph, inputs)
            except Exception as error:
                print(f"goes on uncompiled: torch.compile fails on this model ({_first_error(error)})")
                failed = True
        return graph.forward                # the same operations, as they are

    return torch.compile(model, backend=inductor_or_nothing)    # type: ignore[return-value]


def _first_error(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong, at most 200 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ([line for line in lines if "error: " in line] or lines or [repr(error)])[0][:200]


def limit_threads() -> None:
    """Lower torch's threads to the cores of a CPU quota, which torch does not know; OMP_NUM_THREADS has priority."""
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())


def tune_allocator(keep: bool = True) -> bool:
    """Tell glibc to keep large blocks. Otherwise every activation is mapped, faulted in page by page, and unmapped
    again, at every step: millions of page faults. Call it before the first large tensor. False where not glibc.

    keep=False takes it back, to where glibc's own adaptive thresholds end up after some steps (32 and 64 MB).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    if not keep:
        settings = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 64 << 20, M_MMAP_THRESHOLD: 32 << 20}
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(name, value) for name, value in settings.items()])


def environment() -> dict[str, Any]:
    """What a number in a result depends on: versions, processor, threads, GPU."""
    import numpy
    import PIL
    import timm
    import torchvision
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
                "torchvision": torchvision.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__}
    return {**versions, "system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
