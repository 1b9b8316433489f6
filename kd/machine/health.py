"""Was every step finite? Noted on the device at each step, read only where the loop waits for the device anyway."""

import torch
from torch import Tensor, nn

from kd import TrainingFault


def start(device: torch.device) -> Tensor:
    """`(4,)` int64: the first bad step + 1 (0: none yet), bad steps in a row just now, the longest row, all of them."""
    return torch.zeros(4, dtype=torch.int64, device=device)


def track(health: Tensor, loss: Tensor, norm: Tensor, step: int, role: str, amp: torch.dtype | None) -> None:
    """Note whether the loss and the norm of its gradient were finite at `step`, and `check` that now and then.

    On the CPU, where there is nothing to wait for, at every step; on a GPU at every twentieth, which waits for it.
    """
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    health[0] = torch.where(bad & (health[0] == 0), step + 1, health[0])
    health[1] = torch.where(bad, health[1] + 1, 0)
    health[2] = torch.maximum(health[1], health[2])
    health[3] += bad
    if health.device.type == "cpu" or (step + 1) % 20 == 0:
        check(health, role, amp)


def check(health: Tensor, role: str, amp: torch.dtype | None, model: nn.Module | None = None) -> int:
    """Raise TrainingFault after a non-finite step; under fp16 the scaler skips such steps, up to twenty in a row.

    Returns how many were skipped. With `model`, its weights and buffers must be finite too: an activation that
    overflows spoils BatchNorm's statistics also in a step that is skipped. Called before anything is saved, so that no
    NaN reaches the disk. Waits for the device.
    """
    first, _, most, skipped = health.tolist()
    if amp is torch.float16:
        if most >= 20:
            raise TrainingFault(f"{role}: the gradient overflowed fp16 in {most} steps in a row; try --amp off or a "
                                f"lower learning rate")
    elif first:
        raise TrainingFault(f"{role}: the loss or its gradient is not finite at step {first - 1}; the last checkpoint "
                            f"is from before it; try a lower learning rate")
    if model is not None:
        state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
        if not all(finite):
            raise TrainingFault(f"{role}: {list(state)[finite.index(False)]} is not finite; the last checkpoint is "
                                f"from before that; try --amp off or a lower learning rate")
    return skipped
