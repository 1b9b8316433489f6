"""Is every step finite? Noted on the device at each step, and read only where the loop waits for the device anyway."""

import torch
from torch import Tensor, nn

from kd import TrainingFault

SKIPPED_IN_A_ROW = 20   # that many fp16 steps with an overflow, one after the other, end the run
READ_EVERY = 20         # steps, on a GPU, where reading waits for the device


class Guard:
    """Stops a training whose loss, gradient, weights or statistics are not finite.

    Under fp16 the gradient scaler skips a step whose gradient overflowed. That is normal now and then, so only
    SKIPPED_IN_A_ROW of them in a row stop the run.
    """

    def __init__(self, role: str, model: nn.Module, device: torch.device, amp: torch.dtype | None) -> None:
        self.role, self.model, self.amp = role, model, amp
        self.skipped = 0    # steps that were not finite, as of the last `check`
        # int64: the first bad step + 1 (0: none yet); bad steps in a row just now; the longest such row; all of them
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note whether the loss and the norm of its gradient were finite at `step`.

        On the CPU, where reading costs nothing, a fault is raised at its step; on a GPU within READ_EVERY steps.
        """
        first, in_a_row, longest, total = self._counts
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self._counts[0] = torch.where(bad & (first == 0), step + 1, first)
        self._counts[1] = torch.where(bad, in_a_row + 1, 0)
        self._counts[2] = torch.maximum(self._counts[1], longest)
        self._counts[3] = total + bad
        if self._counts.device.type == "cpu" or (step + 1) % READ_EVERY == 0:
            self._check_steps()

    def check(self) -> None:
        """Raise TrainingFault where a step, a weight or a buffer was not finite. Waits for the device.

        Called before anything is saved, so that no NaN reaches the disk. Weights and buffers are looked at too:
        an activation that overflows spoils BatchNorm's statistics even in a step that is skipped.
        """
        self._check_steps()
        state = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
        if not all(finite):
            raise TrainingFault(f"{self.role}: {list(state)[finite.index(False)]} is not finite; the last checkpoint "
                                f"is from before that; try --amp off or a lower learning rate")

    def _check_steps(self) -> None:
        first, _, longest, self.skipped = self._counts.tolist()
        if self.amp is torch.float16:
            if longest >= SKIPPED_IN_A_ROW:
                raise TrainingFault(f"{self.role}: the gradient overflowed fp16 in {longest} steps in a row; "
                                    f"try --amp off or a lower learning rate")
        elif first:
            raise TrainingFault(f"{self.role}: the loss or its gradient is not finite at step {first - 1}; the last "
                                f"checkpoint is from before it; try a lower learning rate")
