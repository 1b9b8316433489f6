"""The device: which one computes, and how numbers get there without anybody waiting."""

from typing import Callable

import numpy as np
import torch
from torch import Tensor

from kd import BadInput, first_error
from kd.machine import ranks


def choose(flag: str, say: Callable[[str], None] = print) -> torch.device:
    """The device for `--device auto|cpu|cuda|mps`; auto takes cuda or the CPU. Under torchrun, a GPU for each rank.

    Raises BadInput for a device that this machine has not, or on which torch cannot compute. Under `auto`, a process
    that is alone goes on on the CPU then, and `say` gets a line.
    """
    kind = flag
    if flag == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif not torch.get_device_module(flag).is_available():
        raise BadInput(f"--device {flag}: torch sees no {flag} here; use --device cpu or auto")
    device = torch.device(kind)
    if kind == "cuda" and ranks.ranks() > 1:
        device = torch.device(kind, ranks.local_rank())
        if device.index >= torch.cuda.device_count():
            raise BadInput(f"--nproc-per-node: more ranks than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(device)
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:       # a GPU too old or too new for this torch, for example
        if flag == "auto" and ranks.ranks() == 1:
            say(f"--device auto: goes on on the CPU ({first_error(error)})")
            return torch.device("cpu")
        raise BadInput(f"--device {flag}: {first_error(error)}; use --device cpu") from error
    return device


# ---- copies to it ---------------------------------------------------------------------------------------------

def to_device(data: np.ndarray | Tensor, device: torch.device) -> Tensor:
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
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "GPU"


def wait(device: torch.device) -> None:
    """Return once the device has done all that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
