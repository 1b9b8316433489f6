"""A frozen model, as fast as its device runs it.

Inductor's freezing takes the weights for constants: BatchNorm is folded into the convolutions before it, and weights
are laid out once as the kernels want them. On some CPUs it doubles a ResNet-50, on others it gives 6 %, and it takes
some 20 s: worth it only for a teacher with work enough. That is decided by counted operations and never by the clock: a
run that is resumed must decide alike.
"""

import sys
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

WORTH = 2e13  # operations: some two minutes of two cores


def work(model: nn.Module, images: int, size: int) -> float:
    """Floating-point operations of `model` on that many square RGB images, a multiply-add counted as two."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    return float(counter.get_total_flops() * images)


def worth_compiling(model: nn.Module, images: int, size: int, compile: str) -> bool:
    """Whether to compile a frozen model for that many images; compile: auto, on or off."""
    return compile == "on" or (compile == "auto" and work(model, images, size) > WORTH)


def compile_frozen(model: nn.Module, batch_size: int, compile: bool) -> Callable[[Tensor], Tensor]:
    """`model` (frozen, in eval mode) as a function of `(B, 3, H, W)`, compiled on its first call where `compile`.

    Equal to the model within 1e-4 of the largest logit; under bf16 autocast within 2e-2, the rounding of that. It is
    compiled for `batch_size` alone: other batches are cut and padded to it, since each new shape would be compiled
    again. Without a compiler it is the model itself.
    """
    if not compile:
        return model
    compiled = torch.compile(model, dynamic=False, options={"freezing": True})

    def answer(x: Tensor) -> Tensor:
        nonlocal compiled
        parts = []
        for part in x.split(batch_size):
            padded = F.pad(part, (0, 0, 0, 0, 0, 0, 0, batch_size - len(part)))
            try:
                logits = compiled(padded.contiguous(memory_format=torch.channels_last))
            except torch._dynamo.exc.BackendCompilerFailed as error:
                print(f"teacher: not compiled ({str(error).splitlines()[0]})", file=sys.stderr)
                compiled = model  # type: ignore[assignment]
                logits = model(padded)
            parts.append(logits[:len(part)])
        return torch.cat(parts)

    return answer
