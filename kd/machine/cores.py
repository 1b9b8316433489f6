"""How many processor cores this process may use: fewer than the machine has, in a container with a CPU quota."""

import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may run on, at most as many as its quota allows, rounded up; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time per time that Linux's control groups allow, such as 1.5; None where nothing limits it.

    `docker run --cpus` and Kubernetes set such quotas. A group may use no more than the groups above it.
    `root` is the folder that holds proc and sys.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text("utf-8").splitlines()]
        quotas = []
        for mount in mounts:
            # ID, parent, device, root, place, options, optional fields, -, type, source, options
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            place = root / mount[4].lstrip("/")
            for _, controllers, group in groups:
                if kind == "cgroup2" and controllers == "":
                    quotas += [_quota_v2(folder) for folder in _folders(place, group)]
                elif kind == "cgroup" and "cpu" in options and "cpu" in controllers.split(","):
                    quotas += [_quota_v1(folder) for folder in _folders(place, group)]
    except (OSError, ValueError, IndexError):   # not Linux, or not readable
        return None
    return min((quota for quota in quotas if quota), default=None)


def _folders(place: Path, group: str) -> list[Path]:
    """The folders of a group and of those above it.

    In a container, `group` may be its path on the host, which does not exist here. `place` is then the
    group's own folder.
    """
    folder = place / group.lstrip("/")
    return [each for each in (folder, *folder.parents) if each.is_relative_to(place)]


def _quota_v2(folder: Path) -> float | None:
    """cpu.max holds `QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    try:
        quota, period = (folder / "cpu.max").read_text("utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    """Two files hold quota and period in microseconds; a quota of -1 is none."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text("utf-8"))
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text("utf-8"))
    except (OSError, ValueError, ZeroDivisionError):
        return None
