"""Knowledge distillation for computer vision: the leaves that `train.py` calls.

Two exceptions are shared by all of them; `train.py` turns each into one line on stderr and an exit status.
"""


class BadInput(Exception):
    """A flag, file or dataset that cannot be used; the message names it and says what to do (exit status 2)."""

    status = 2


class TrainingFault(Exception):
    """Training cannot go on, such as a non-finite loss or a full disk; the message says where (exit status 1)."""

    status = 1
