"""kd/machine/files.py: a file is whole or absent."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd import TrainingFault
from kd.machine import distributed
from kd.machine.files import write_at, write_atomic


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_and_the_previous_one_stays_where_it_is_wanted(tmp_path):
    for content in (b"1", b"2"):
        write_atomic(tmp_path / "file", content)
    assert contents(tmp_path) == {"file": b"2"}
    write_atomic(tmp_path / "file", b"3", memoryview(b"4"), keep_previous=True)
    assert contents(tmp_path) == {"file": b"34", "file.previous": b"2"}


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    write_atomic(tmp_path / "file", b"1")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_stray_one(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(Path, "replace", lambda path, target: os.replace(path, target))
    with pytest.raises(TrainingFault, match="file: No space left on device; free some space .* then --resume"):
        write_atomic(tmp_path / "file", b"new", keep_previous=True)
    assert contents(tmp_path) == {"file": b"old"}


def test_a_folder_whose_disk_knows_no_such_call_is_no_error(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "file", b"1")
    assert contents(tmp_path) == {"file": b"1"}


def test_threads_may_write_at_their_places_in_one_file(tmp_path):
    with open(tmp_path / "file", "wb") as file, ThreadPoolExecutor(4) as pool:
        for i in reversed(range(200)):
            pool.submit(write_at, file.fileno(), bytes([i] * 16), 16 * i)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([i] * 16) for i in range(200))
