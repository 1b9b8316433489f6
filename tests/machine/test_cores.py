"""A CPU quota is found in the files of both versions of Linux's control groups."""

import os
from pathlib import Path

import pytest

from kd.machine.cores import cpu_quota, usable_cores

V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 32 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct"
V1_SETS = "34 32 0:30 /docker/abc /sys/fs/cgroup/cpuset ro,nosuid master:12 - cgroup cgroup rw,cpuset"


def system(root: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts), **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize("text, quota", [("150000 100000", 1.5), ("max 100000", None), ("50000 100000", .5),
                                         ("nonsense", None), ("1 0", None)])
def test_version_2_in_a_container(tmp_path, text, quota):
    assert cpu_quota(system(tmp_path, "0::/", [V2_MOUNT], {"sys/fs/cgroup/cpu.max": text})) == quota


def test_the_smallest_quota_of_a_group_and_those_above_it_counts(tmp_path):
    files = {"sys/fs/cgroup/user/job/cpu.max": "400000 100000", "sys/fs/cgroup/user/cpu.max": "300000 100000",
             "sys/fs/cgroup/other/cpu.max": "100000 100000"}
    assert cpu_quota(system(tmp_path, "0::/user/job", [V2_MOUNT], files)) == 3


@pytest.mark.parametrize("quota, expected", [("200000", 2), ("-1", None)])
def test_version_1_where_the_group_has_the_path_of_the_host(tmp_path, quota, expected):
    files = {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": quota,
             "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
             "sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1"}
    cgroup = "5:cpuset:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc"
    assert cpu_quota(system(tmp_path, cgroup, [V1_SETS, V1_MOUNT], files)) == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(system(tmp_path, "0::/", ["30 24"], {})) is None


@pytest.mark.parametrize("quota, cores", [(.5, 1), (1, 1), (1.5, 2), (8, 4), (None, 4)])
def test_usable_cores_are_those_of_the_affinity_within_the_quota(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    text = f"{quota * 100000:.0f} 100000" if quota else "max 100000"
    assert usable_cores(system(tmp_path, "0::/", [V2_MOUNT], {"sys/fs/cgroup/cpu.max": text})) == cores
