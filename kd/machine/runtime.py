"""The machine: device, precision, compilation, allocator; and what a result says about where it was made."""

import ctypes
import os
import platform
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, NamedTuple

import torch
from torch import nn

from kd import BadInput, first_error
from kd.machine import devices
from kd.machine.cores import usable_cores
from kd.machine.ranks import ranks


class Runtime(NamedTuple):
    """Where and in which precision a run computes."""

    device: torch.device
    amp: torch.dtype | None  # of autocast; None: float32 throughout
    compile: str             # torch.compile the training step: "on", "off", or "auto" (`compile_pays`)
    kernels: bool            # use the kernels of kd/fast; False: plain modules, the loop that one reads
    line: str                # all of it in one line, for people

    def autocast(self) -> ContextManager:
        """The autocast context of forward passes; nothing at all where `amp` is None."""
        return torch.autocast(self.device.type, dtype=self.amp) if self.amp else nullcontext()


def start(device: str, amp: str, compile: str, kernels: str = "auto") -> Runtime:
    """Resolve each `auto`, and set what has to be set before the first tensor.

    Raises BadInput where a device, a precision or a compilation is asked for that the machine cannot give.
    """
    if not os.environ.get("OMP_NUM_THREADS") and usable_cores() < torch.get_num_threads():
        torch.set_num_threads(usable_cores())       # torch does not know the CPU quota of a container
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

    many = f" × {ranks()} ranks" if ranks() > 1 else ""
    line = f"{chosen.type} ({devices.name(chosen)}){many}, {precision}" + (", compiled" if compile == "on" else "")
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


def compiled(model: nn.Module, rows: int) -> nn.Module:
    """`torch.compile(model)`. Where its compiler fails on this model, a line says why, and the model runs uncompiled.

    Each batch size gets a graph of its own (`dynamic=False`). Otherwise the short last batch of the first epoch would
    make a slower graph for all sizes, which then serves every batch.

    rows: the size of a batch. On CUDA, small ones are replayed as CUDA graphs, in which the GPU does not wait for the
    host. Not so where ranks exchange gradients: a graph's next replay overwrites its results.

    The compiler fails at the first forward pass, before anything is computed. So no batch counts twice in BatchNorm or
    in the random state.
    """
    graphs = {"triton.cudagraphs": rows <= GRAPH_ROWS and ranks() == 1}
    failed = False

    def inductor_or_nothing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal failed
        if not failed:
            try:
                inductor: Any = torch._dynamo.lookup_backend("inductor")
                return inductor(graph, inputs, config_patches=graphs)
            except Exception as error:
                print(f"goes on uncompiled: torch.compile fails on this model ({first_error(error)})")
                failed = True
        return graph.forward                # the same operations, as they are

    return torch.compile(model, backend=inductor_or_nothing, dynamic=False)     # type: ignore[return-value]


# ---- the allocator, and what a result says about its machine ------------------------------------------------

def tune_allocator(keep: bool = True) -> None:
    """Tell glibc to keep large blocks. Otherwise every activation is mapped, faulted in page by page, and unmapped
    again, at every step: millions of page faults. Call it before the first large tensor.

    keep=False takes it back, to where glibc's own adaptive thresholds end up after some steps (32 and 64 MB): at the
    end of a run, since a notebook goes on in this process.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    if not keep:
        settings = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 64 << 20, M_MMAP_THRESHOLD: 32 << 20}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):        # macOS and musl have none
        for name, value in settings.items():
            libc.mallopt(name, value)


def environment() -> dict[str, Any]:
    """What a number in a result depends on: versions, processor, threads, GPU."""
    import numpy
    import PIL
    import timm
    import torchvision
    libraries = {each.__name__: each.__version__ for each in (torch, timm, torchvision, numpy, PIL)}
    return {"python": platform.python_version(), **libraries,
            "system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "amx": torch.cpu.get_capabilities().get("amx_bf16", False), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5,
                              check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
