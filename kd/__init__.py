"""Knowledge distillation for computer vision: the modules that `train.py` calls.

They share two exceptions. `train.py` turns each into one line on stderr and an exit status.
"""

import errno

# Errors of the system that mean "no room": full disk, used-up quota, file too large, failing disk.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


# The label of a picture without one. It takes no part in the cross-entropy, and takes part in the KL like every other
# picture. Both terms are means over all rows of a batch.
NO_LABEL = -100


class BadInput(Exception):
    """A flag, file or dataset that cannot be used; the message names it and says what to do (exit status 2)."""

    status = 2


class TrainingFault(Exception):
    """Training cannot go on, such as a non-finite loss or a full disk; the message says where (exit status 1)."""

    status = 1


def one_line(error: BaseException) -> str:
    """The text of another library's error, on one line of at most 200 characters; without text, its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def first_error(error: BaseException) -> str:
    """The line of a compiler's output that says what is wrong, at most 200 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "error: " in line or "not found" in line]
    return (reasons or lines or [repr(error)])[0][:200]
