"""The device: which one computes, and how numbers get there without anybody waiting.

torch calls a GPU of any maker an accelerator: cuda (NVIDIA; AMD under ROCm), mps (Apple), xpu (Intel). `--device auto`
takes cuda or the CPU. The other two have never been tried with this code, and must be asked for.
"""

import os
import shutil
import subprocess
from typing import Callable, TypeVar

import numpy as np
import torch
from torch import Tensor

from kd import BadInput

UNTRIED = ("mps", "xpu")

Host = TypeVar("Host", np.ndarray, Tensor)      # in the host's memory


# ---- which device -------------------------------------------------------------------------------------------

def choose(flag: str, say: Callable[[str], None] = print) -> torch.device:
    """The device for `--device auto|cpu|cuda|mps|xpu`. Under torchrun, a GPU for each rank.

    `say` gets one line where `auto` passes over a GPU that is there.
    Raises BadInput for a device that this machine has not, or that this torch cannot use.
    """
    if flag == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = found.type if found else "cpu"
    device = torch.device("cpu")

    if kind == "cpu":
        reason = _driver_too_old()
        if flag != "auto":
            raise BadInput(f"--device {flag}: {reason or f'torch sees no {flag} here'}; use --device cpu or auto")
    elif flag == "auto" and kind in UNTRIED:
        reason = f"--device {kind} is untried; ask for it"
    elif flag not in ("auto", kind):
        raise BadInput(f"--device {flag}: torch sees no {flag} here, but {kind}; use --device {kind}, cpu or auto")
    else:
        device = _of_this_rank(kind)
        reason = _no_code_for(device) if kind == "cuda" else ""
        if reason and flag != "auto":
            raise BadInput(f"--device {flag}: {reason}; use --device cpu or auto")

    if reason:
        say(f"--device auto: goes on on the CPU ({reason})")
        return torch.device("cpu")
    if device.type in UNTRIED:
        say(f"--device {kind}: this code has never been tried there")
    return device


def _of_this_rank(kind: str) -> torch.device:
    if "LOCAL_RANK" not in os.environ:
        return torch.device(kind)
    device, count = torch.device(kind, int(os.environ["LOCAL_RANK"])), torch.accelerator.device_count()
    if device.index >= count:
        raise BadInput(f"--nproc-per-node: more ranks than the {count} GPUs of this machine")
    torch.accelerator.set_device_index(device.index)
    return device


def _driver_too_old() -> str:
    """Why torch sees no GPU on a machine that has one; "" where it has none, as far as can be told."""
    if torch.version.cuda is None or not shutil.which("nvidia-smi"):
        return ""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    name = listed.partition(":")[2].partition("(")[0].strip()      # GPU 0: Tesla T4 (UUID: …)
    return f"the driver of {name} is too old for CUDA {torch.version.cuda}, which this torch needs" if name else ""


def _no_code_for(gpu: torch.device) -> str:
    """Why this torch cannot compute on a GPU: its files hold no code for a GPU so old or so new. "" where it can."""
    if torch.version.hip is not None:       # ROCm's lists name other things
        return ""
    major, minor = torch.cuda.get_device_capability(gpu)
    names = torch.cuda.get_arch_list()
    # sm_86 is code for 8.6 and later ones of generation 8. compute_90 is translated for 9.0 and all later GPUs.
    compiled = {divmod(int(name[3:].rstrip("af")), 10) for name in names if name.startswith("sm_")}
    translated = {divmod(int(name[8:].rstrip("af")), 10) for name in names if name.startswith("compute_")}
    if (any(m == major and n <= minor for m, n in compiled) or any(each <= (major, minor) for each in translated)):
        return ""
    return (f"this torch has no code for {torch.cuda.get_device_name(gpu)}, which is sm_{major}{minor}; it has "
            f"{', '.join(sorted(names))}")


# ---- copies to it ---------------------------------------------------------------------------------------------

def to_device(data: Host, device: torch.device) -> Tensor:
    """An array or tensor of the host, on the device. On a CPU it shares memory with `data`.

    On CUDA it goes through pinned memory. From there the GPU fetches it by itself, when its turn has come. From
    other memory, the host would wait for all the work that was queued before.
    """
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def host_array(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An empty uint8 tensor of the host, to be filled and given to `to_device`. Pinned where that needs it, which
    spares a copy."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


# ---- what differs between devices -----------------------------------------------------------------------------

def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def name(device: torch.device) -> str:
    """For people: the GPU's name, or the CPU's threads."""
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "untried"


def wait(device: torch.device) -> None:
    """Return once the device has done all that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
