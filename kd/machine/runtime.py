"""The machine: device, precision, allocator, threads; signals; and what a result must say about where it was made."""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
from typing import Any, ContextManager, NamedTuple

import torch

from kd import BadInput


class Runtime(NamedTuple):
    """Where and in which precision a run computes."""

    device: torch.device
    amp: torch.dtype | None  # None: float32 throughout
    compile: bool            # torch.compile the student's step
    line: str                # all of it in one line, for people

    def autocast(self) -> ContextManager:
        """The autocast context of forward passes; nothing at all where `amp` is None."""
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)


def start(device: str, amp: str, compile: str) -> Runtime:
    """Resolve `auto`, tune the allocator and set what has to be set before the first tensor.

    Raises BadInput where a device or precision is asked for that the machine does not have.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise BadInput("--device cuda: torch sees no GPU here; use --device cpu or auto")
    chosen = torch.device("cuda" if device == "cuda" or (device == "auto" and cuda) else "cpu")
    if chosen.type == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU a rank
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if chosen.index >= torch.cuda.device_count():
            raise BadInput(f"--nproc-per-node: more ranks than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(chosen)
    if amp == "fp16" and chosen.type == "cpu":
        raise BadInput("--amp fp16: the CPU has no fast half precision; use bf16, off or auto")
    if amp == "auto":
        # bf16 needs no gradient scaler, so it is preferred to fp16 where tensor cores (Ampere on) or the CPU's own
        # instructions multiply it; other CPUs lose more in conversions than they gain
        if chosen.type == "cpu":
            amp = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "off"
        else:
            amp = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    compiled = compile == "on" or (compile == "auto" and chosen.type == "cuda")
    if chosen.type == "cuda":
        torch.backends.cudnn.benchmark = True             # shapes are fixed, so the search pays once
        torch.backends.cuda.matmul.allow_tf32 = True
        name = torch.cuda.get_device_name()
    else:
        tune_allocator()
        name = f"{torch.get_num_threads()} threads"
    ranks = f" × {os.environ['WORLD_SIZE']} ranks" if "WORLD_SIZE" in os.environ else ""
    line = f"{chosen.type} ({name}){ranks}, {amp if dtype else 'fp32'}" + (", compiled" if compiled else "")
    return Runtime(chosen, dtype, compiled, line)


def tune_allocator(keep: bool = True) -> bool:
    """Tells glibc to keep large blocks. Otherwise every activation is mapped, faulted in page by page, and unmapped
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


class Stopped(Exception):
    """The run was asked to stop, and has saved; `.status` is the process's exit status (130 or 143)."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; go on with --resume")
        self.status = 128 + number


class Stop:
    """Set by SIGTERM or SIGINT: the loop asks at every step, saves, and leaves. A second signal stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def install(self) -> "Stop":
        """Take over both signals for the rest of the process (the main thread's business only); returns itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)
        return self

    def heed(self, *_: Any) -> None:
        """Raise Stopped if a signal came; what the work at hand calls when nothing needs saving (or has been)."""
        if self.signal:
            raise Stopped(self.signal)

    def _received(self, number: int, frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)  # the user insists: no saving, no clean-up
        self.signal = number
        print(f"\n{signal.Signals(number).name}: finishing this step and saving; once more stops at once",
              file=sys.stderr, flush=True)


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
