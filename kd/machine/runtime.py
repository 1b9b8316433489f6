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

from kd import BadInput, cli, first_error
from kd.machine import devices
from kd.machine.cores import cpu_quota, usable_cores


class Runtime(NamedTuple):
    """Where and in which precision a run computes."""

    device: torch.device
    amp: torch.dtype | None  # of autocast; None: float32 throughout
    compile: str             # torch.compile the training step: "on", "off", or "auto" (`compile_pays`)
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
    chosen = devices.choose(device)
    precision = _choose_precision(amp, chosen)
    if compile == "on":
        _refuse_without_compiler(chosen)
    if kernels != "off":
        tune_allocator()        # on a GPU as well: every batch passes through the host's memory
    if chosen.type == "cuda":
        torch.backends.cudnn.benchmark = True       # shapes are fixed, so the search pays once
        # TF32 has fp32's range and 10 bits of mantissa. `--amp off` means float32 throughout, so it is off there too.
        tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    ranks = f" × {cli.ranks()} ranks" if cli.ranks() > 1 else ""
    line = f"{chosen.type} ({devices.name(chosen)}){ranks}, {precision}" + (", compiled" if compile == "on" else "")
    return Runtime(chosen, DTYPES[precision], compile, kernels != "off", line)


DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _choose_precision(amp: str, device: torch.device) -> str:
    if amp == "fp16" and device.type != "cuda":
        raise BadInput(f"--amp fp16: {device.type} has no fast half precision here; use bf16, off or auto")
    if amp != "auto":
        return "fp32" if amp == "off" else amp
    # bf16 needs no gradient scaler, so it is preferred to fp16. It pays where tensor cores (Ampere and later) or the
    # CPU's own instructions multiply it. Other CPUs lose more in conversions than they gain. So do GPUs older than
    # 7.0 in fp16: most of them multiply it 64 times more slowly than float32.
    if device.type == "cpu":
        return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    if device.type != "cuda":
        return "fp32"
    generation = torch.cuda.get_device_capability(device)[0]
    return "bf16" if generation >= 8 else "fp16" if generation == 7 else "fp32"


# ---- torch.compile --------------------------------------------------------------------------------------------

PAYS_AFTER = 20_000     # steps: compiling takes minutes, and spares some milliseconds a step
GRAPH_ROWS = 64         # up to so many rows a batch, a GPU waits for its host to launch the kernels


def compile_pays(machine: Runtime, steps: int) -> bool:
    """Whether a training of so many steps is compiled: as --compile says, or where it saves more time than it takes.

    On CPUs it did not pay with any model tried. Tracing alone takes 13 to 20 s for each of the two batch shapes.
    """
    if machine.compile == "auto":
        return machine.device.type == "cuda" and steps >= PAYS_AFTER
    return machine.compile == "on"


def _refuse_without_compiler(device: torch.device) -> None:
    """Even the smallest function needs a compiler, Python's headers and, on a GPU, Triton. This takes a few seconds:
    most of them load what the model's compilation needs as well."""
    number = torch.ones(1, device=device)
    try:
        torch.compile(torch.neg)(number)
    except Exception as error:
        raise BadInput(f"--compile on: torch.compile does not work here ({first_error(error)}); mend that, or use "
                       f"--compile off") from error


def compiled(model: nn.Module, rows: int, parts: int = 1) -> nn.Module:
    """`torch.compile(model)`. Where its compiler fails on this model, a line says why, and the model runs uncompiled.

    Each batch size gets a graph of its own (`dynamic=False`). Otherwise the short last batch of the first epoch would
    make a slower graph for all sizes, which then serves every batch.

    rows: the size of a batch. On CUDA, small ones are replayed as CUDA graphs, in which the GPU does not wait for the
    host. Not so where ranks exchange gradients or those of several `parts` of a batch add up: a graph's next replay
    overwrites its results.

    Only a failure of the compiler itself at the forward pass is met so. It comes before anything is computed, so no
    batch counts twice in BatchNorm or in the random state.
    """
    failed = False
    replayed = rows <= GRAPH_ROWS and parts == 1 and cli.ranks() == 1
    graphs = {"triton.cudagraphs": True} if replayed else None

    def inductor_or_nothing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        nonlocal failed
        if not failed:
            try:
                inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
                return inductor(graph, inputs, config_patches=graphs)
            except Exception as error:
                print(f"goes on uncompiled: torch.compile fails on this model ({first_error(error)})")
                failed = True
        return graph.forward                # the same operations, as they are

    return torch.compile(model, backend=inductor_or_nothing, dynamic=False)     # type: ignore[return-value]


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
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu.get_capabilities().get("amx_bf16", False), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty",
               "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
