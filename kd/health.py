"""Was every step finite? Noted on the device at each step, read only where the loop waits for the device anyway."""

import torch
from torch import Tensor

from kd import TrainingFault


def start(device: torch.device) -> Tensor:
    """`(3,)` int64: the first bad step + 1 (0: none yet), bad steps in a row just now, the longest such row."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def track(health: Tensor, loss: Tensor, norm: Tensor, step: int) -> None:
    """Note whether the loss and the norm of its gradient were finite at `step`; no synchronisation."""
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    health[0] = torch.where(bad & (health[0] == 0), step + 1, health[0])
    health[1] = torch.where(bad, health[1] + 1, 0)
    health[2] = torch.maximum(health[1], health[2])


def check(health: Tensor, role: str, amp: torch.dtype | None) -> None:
    """Raise TrainingFault after a non-finite step; under fp16 the scaler skips such steps, up to twenty in a row.

    Called before anything is saved, so that no NaN reaches the disk. Waits for the device.
    """
    first, _, most = health.tolist()
    if amp is torch.float16:
        if most >= 20:
            raise TrainingFault(f"{role}: the gradient overflowed fp16 in {most} steps in a row; try --amp off or a "
                                f"lower learning rate")
    elif first:
        raise TrainingFault(f"{role}: the loss or its gradient is not finite at step {first - 1}; the last checkpoint "
                            f"is from before it; try a lower learning rate")
