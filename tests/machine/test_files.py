"""kd/machine/files.py: a file is whole or absent, and mapped files do not fill the memory."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from kd import TrainingFault
from kd.machine import distributed
from kd.machine.files import RESIDENT, MappedFiles, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_the_previous_one_stays_where_it_is_wanted(tmp_path):
    path = tmp_path / "file"
    for content in (b"1", b"2"):
        write_atomic(path, content)
    assert path.read_bytes() == b"2" and names(tmp_path) == ["file"]
    write_atomic(path, b"3", keep_previous=True)
    assert path.read_bytes() == b"3" and (tmp_path / "file.previous").read_bytes() == b"2"
    assert names(tmp_path) == ["file", "file.previous"]


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    write_atomic(tmp_path / "file", b"1")
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_a_full_disk_leaves_the_old_file_and_no_stray_one(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomic(path, b"old", keep_previous=True)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(TrainingFault, match="file: No space left on device; free some space .* then --resume"):
        write_atomic(path, b"new", keep_previous=True)
    assert path.read_bytes() == b"old" and set(names(tmp_path)) <= {"file", "file.previous"}


def test_a_disk_that_gives_back_something_else_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old", keep_previous=True)
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"something else")
    with pytest.raises(TrainingFault, match="gives back something else"):
        write_atomic(path, b"new", keep_previous=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_without_hard_links_the_previous_file_is_a_copy(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for content in (b"1", b"2", b"3"):
        write_atomic(tmp_path / "file", content, keep_previous=True)
    assert (tmp_path / "file").read_bytes() == b"3" and (tmp_path / "file.previous").read_bytes() == b"2"


def test_mapped_files_give_their_pages_back_together(tmp_path):
    """Two files, each below the limit and both above it."""
    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) << 10

    mapped, size = MappedFiles(), int(.7 * RESIDENT)
    arrays = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(size))
        with open(tmp_path / name, "rb") as file:
            arrays.append(mapped.open(file, (size // 2,), np.uint16))
    before = resident()
    for array, expected in zip(arrays, (.7, 0), strict=True):
        assert array.shape == (size // 2,) and not array.any()
        mapped.count(array.nbytes)
        assert abs((resident() - before) / RESIDENT - expected) < .1
