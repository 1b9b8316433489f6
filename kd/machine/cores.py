"""How many processor cores this process may use: fewer than the machine has, in a container with a CPU quota."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")      # of this container, as Linux's control groups (version 2) show it


def usable_cores() -> int:
    """The cores that this process may run on, at most as many as its quota allows, rounded up; at least 1.

    `docker run --cpus` and Kubernetes set such quotas.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, QUOTA.read_text("utf-8").split())      # microseconds; "max 100000" is no quota
        return min(cores, math.ceil(quota / period))
    except (OSError, ValueError):
        return cores
