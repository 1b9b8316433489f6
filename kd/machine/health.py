"""Is every step finite? Noted on the device at each step. Read before a save, and at every READ_EVERY-th step."""

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
        self.role, self.model, self.fp16 = role, model, amp is torch.float16
        self.skipped = 0        # steps that were not finite, as of the last `check`
        self._in_a_row = 0      # of them, up to the last step
        # Loss and norm of the last steps, on the device until they are read; and which steps those are.
        self._recent = torch.zeros(READ_EVERY, 2, device=device)
        self._steps: list[int] = []

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note whether the loss and the norm of its gradient were finite at `step`.

        On the CPU, where reading costs nothing, a fault is raised at its step; on a GPU within READ_EVERY steps.
        """
        torch.stack([loss.float(), norm.float()], out=self._recent[len(self._steps)])
        self._steps.append(step)
        if self._recent.device.type == "cpu" or len(self._steps) == READ_EVERY:
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
        finite = self._recent[:len(self._steps)].isfinite().all(dim=1).tolist()
        for step, good in zip(self._steps, finite):
            self.skipped += not good
            self._in_a_row = 0 if good else self._in_a_row + 1
            if self.fp16 and self._in_a_row == SKIPPED_IN_A_ROW:
                raise TrainingFault(f"{self.role}: the gradient overflowed fp16 in {SKIPPED_IN_A_ROW} steps in a row; "
                                    f"try --amp off or a lower learning rate")
            if not self.fp16 and not good:
                raise TrainingFault(f"{self.role}: the loss or its gradient is not finite at step {step}; the last "
                                    f"checkpoint is from before it; try a lower learning rate")
        self._steps.clear()
