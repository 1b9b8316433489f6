"""A container's CPU quota, within the cores that the process may run on."""

import os

import pytest

from kd.machine import cores


@pytest.mark.parametrize("quota, expected", [
    ("150000 100000", 2), ("50000 100000", 1), ("800000 100000", 4), ("max 100000", 4), ("nonsense", 4), (None, 4)])
def test_a_quota_lowers_the_cores_rounded_up(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    if quota:
        cores.QUOTA.write_text(quota + "\n")
    assert cores.usable_cores() == expected
