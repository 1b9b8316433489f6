"""Which of the processes that torchrun started this one is, as the environment says. Nothing here loads torch."""

import os


def rank() -> int:
    """The number of this process among all, from 0."""
    return _of_torchrun()[0]


def ranks() -> int:
    """How many processes torchrun started, on all machines; 1 without it."""
    return _of_torchrun()[1]


def local_rank() -> int:
    """The number of this process among those of its machine, from 0."""
    return _of_torchrun()[2]


def _of_torchrun() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK.

    A scheduler or an old shell may leave some of them behind, or all of them empty. Such a set starts no ranks.
    """
    try:
        number, count, local = (int(os.environ.get(name, "")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        return 0, 1, 0
    return (number, count, local) if 0 <= number < count else (0, 1, 0)
