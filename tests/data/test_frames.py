"""kd/data/frames.py: a file of decoded pictures that never gives a wrong one."""

import errno
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd import BadInput, TrainingFault
from kd.data import frames
from kd.data.decoding import to_frame
from kd.data.frames import Data, Split, decode
from tests.helpers.frames import smooth, table
from tests.helpers.toy import encoded

SETTINGS: dict[str, Any] = {"size": 28, "crop_pct": .875, "interpolation": "bilinear"}  # frames of 32 × 32
FRAME = 32 * 32 * 3


def picture(row: int) -> Image.Image:
    return smooth(40, 36, row)


def frame(row: int) -> np.ndarray:
    return to_frame(picture(row), 28, 32, "bilinear")


def opened(folder: Path, read: Callable = picture, splits: dict = {"train": range(10)}, fingerprint: str = "",
           **options: Any) -> tuple[Split, list[str]]:
    """The first split of a table, and what was said."""
    said: list[str] = []
    decoded = decode(table(read, splits, fingerprint), cache_dir=folder, say=said.append, **{**SETTINGS, **options})
    return next(iter(decoded.values())), said


def refuse(row: int) -> Image.Image:
    raise AssertionError("decoded again")


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: Path) -> list[str]:
    """All files but the locks, which stay: another process may be waiting for one."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def check_frames(split: Split) -> None:
    assert np.array_equal(split.read(range(len(split))), np.stack([frame(row) for row in range(len(split))]))


# ---- splits ----------------------------------------------------------------------------------------------------------

def test_a_file_is_made_once_and_read_ever_after(tmp_path):
    split, said = opened(tmp_path / "new" / "folder")
    check_frames(split)
    content = "10 pictures of toy, 32 × 32 pixels, 0 MB"
    assert said == [f"decoded images: {split.store.path} holds {content}; safe to delete"]
    assert str(split.store.path).startswith(f"{tmp_path}/new/folder/toy-32px-")
    assert split.labels.tolist() == [0, 1] * 5 and split.shape == (10, 32, 32, 3) and split.name_of(3) == "3.png"
    again, said = opened(tmp_path / "new" / "folder", refuse)
    check_frames(again)
    assert said == [] and again.digest == split.digest


def test_read_fills_the_array_it_is_given(tmp_path):
    split, _ = opened(tmp_path)
    out = np.zeros((3, 32, 32, 3), np.uint8)
    assert split.read([4, 4, -1], out) is out
    assert np.array_equal(out, np.stack([frame(4), frame(4), frame(9)]))
    with pytest.raises(IndexError):
        split.read([10])


def test_taken_pictures_are_those_of_their_rows_with_their_labels_or_others(tmp_path):
    split, _ = opened(tmp_path)
    taken = split.take(np.array([7, 0, 7])).take(np.array([2, 1, 0, 0]))
    assert taken.shape == (4, 32, 32, 3) and taken.labels.tolist() == [1, 0, 1, 1] and taken.name_of(1) == "0.png"
    assert np.array_equal(taken.read(range(4)), split.read([7, 0, 7, 7]))
    assert np.array_equal(taken.digests, split.digests[[7, 0, 7, 7]]) and len(set(map(bytes, split.digests))) == 10
    assert split.take(np.arange(2), np.array([5, 6])).labels.tolist() == [5, 6]


def test_pictures_of_no_split_are_not_decoded_and_splits_may_mix(tmp_path):
    splits = decode(table(lambda row: refuse(row) if row == 3 else picture(row), {"test": [5, 0], "train": [4, 1, 2]}),
                    cache_dir=tmp_path, say=lambda line: None, **SETTINGS)
    for name, rows in {"test": [5, 0], "train": [4, 1, 2]}.items():
        assert np.array_equal(splits[name].read(range(len(rows))), np.stack([frame(row) for row in rows]))
        assert splits[name].labels.tolist() == [row % 2 for row in rows] and splits[name].name_of(1) == f"{rows[1]}.png"


def test_digests_depend_on_the_pixels_and_that_of_data_on_labels_and_classes(tmp_path):
    split, _ = opened(tmp_path / "a")
    assert opened(tmp_path / "b", fingerprint="renamed")[0].digest == split.digest
    changed, _ = opened(tmp_path / "c", lambda row: picture(row if row != 7 else 8))
    assert len({split.digest, split.take(np.arange(10)[::-1]).digest, changed.digest}) == 3
    others = split.take(np.arange(10), np.zeros(10, int))
    digests = {Data(tuple(classes), train, split, split, more).digest() for classes, train, more in (
        ("ab", split, None), ("ac", split, None), ("ab", others, None), ("ab", split, split))}
    assert len(digests) == 4


# ---- the file --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    {"size": 29}, {"size": 14, "crop_pct": .4375}, {"interpolation": "bicubic"}, {"splits": {"test": range(10)}}],
    ids=str)
def test_other_settings_are_another_file(tmp_path, change):
    opened(tmp_path)
    opened(tmp_path, **change)
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("change", [
    {"fingerprint": "other"}, {"splits": {"train": range(9)}}, (Image, "__version__"), (frames, "CODE")], ids=str)
def test_other_data_or_versions_replace_the_file(tmp_path, monkeypatch, change):
    first, _ = opened(tmp_path)
    if isinstance(change, tuple):
        monkeypatch.setattr(*change, "0.0")
        change = {}
    split, said = opened(tmp_path, **change)
    check_frames(split)
    assert len(said) == 1 and names(tmp_path) == [split.store.path.name] == [first.store.path.name]
    check_frames(first)         # it still reads the file that it opened


def test_every_flipped_bit_is_noticed_and_mended_by_the_next_start(tmp_path):
    split, _ = opened(tmp_path)
    path = split.store.path
    whole, rng, pixels = path.read_bytes(), np.random.default_rng(0), 10 * FRAME
    places = [0, pixels, len(whole) - 1, *rng.integers(0, pixels, 20), *rng.integers(pixels, len(whole), 20)]
    for place in map(int, places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1:])
        damaged, said = opened(tmp_path)
        if place < pixels:
            assert said == []
            with pytest.raises(TrainingFault, match=f"the frame of {place // FRAME}.png is damaged; start again"):
                damaged.read(range(10))
            assert not path.exists()
            damaged, said = opened(tmp_path)
        assert len(said) == 1 and path.read_bytes() == whole
    for length in (0, 1, 50, pixels, -1, -64):
        path.write_bytes(whole[:length])
        assert len(opened(tmp_path)[1]) == 1 and path.read_bytes() == whole


def test_a_file_that_fails_under_a_running_process_ends_it_in_one_line(tmp_path, monkeypatch):
    split, _ = opened(tmp_path)
    check_frames(split)
    os.truncate(split.store.path, 5 * FRAME)
    assert np.array_equal(split.read([4])[0], frame(4))
    with pytest.raises(TrainingFault, match="the frame of 5.png is damaged"):
        split.read([5])

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(TrainingFault, match="the frame of 4.png is damaged.* another --cache-dir"):
        split.read([4])         # the file is gone already


# ---- bad pictures ----------------------------------------------------------------------------------------------------

def bad_at(rows: range) -> Callable[[int], bytes | Image.Image]:
    return lambda row: b"" if row in rows else picture(row)


def test_one_bad_picture_is_one_line_and_leaves_no_file(tmp_path):
    with pytest.raises(BadInput, match=r"^3\.png: the image is empty; restore or remove it$"):
        opened(tmp_path, bad_at(range(3, 4)))
    assert names(tmp_path) == []
    check_frames(opened(tmp_path)[0])


def test_all_bad_pictures_are_named_at_once(tmp_path):
    with pytest.raises(BadInput) as caught:
        opened(tmp_path, bad_at(range(2, 27)), {"train": range(20), "test": range(20, 30)})
    first, *lines = str(caught.value).split("\n")
    assert lines == [f"  {row}.png: the image is empty; restore or remove it" for row in range(2, 22)]
    [path] = tmp_path.glob("toy-*.txt")
    assert first == ("25 of 30 pictures cannot be decoded. Restore, convert or remove them, and start again. "
                     f"{path} names all of them.")
    assert [line.split(":")[0] for line in path.read_text().splitlines()] == [f"{row}.png" for row in range(2, 27)]


def test_a_picture_that_cannot_be_read_is_a_bad_one(tmp_path):
    def read(row: int) -> bytes:
        return encoded(picture(row), "PNG") if row != 4 else (tmp_path / "gone").read_bytes()

    with pytest.raises(BadInput, match=r"^4\.png: it cannot be read \(No such file or directory\)"):
        opened(tmp_path / "cache", read)


# ---- stopping, full disks, other processes ---------------------------------------------------------------------------

def test_progress_counts_and_can_stop_the_decoding_at_once(tmp_path):
    seen, read = [], []
    opened(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(1, 11)]

    def slowly(row: int) -> Image.Image:
        read.append(row)
        time.sleep(.01)
        return picture(0)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "b", slowly, {"train": range(200)}, progress=stop)
    assert names(tmp_path / "b") == [] and len(read) < 100


@pytest.mark.parametrize("call", [(os, "posix_fallocate"), (Path, "replace")])
def test_a_full_disk_names_the_flag_and_leaves_no_file(tmp_path, monkeypatch, call):
    monkeypatch.setattr(*call, full)
    with pytest.raises(TrainingFault, match="--cache-dir .*No space left.*free some room, or choose another"):
        opened(tmp_path)
    assert names(tmp_path) == []


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(BadInput, match="^--cache-dir .*choose another"):
            opened(folder)


def test_a_read_only_cache_folder_can_be_read(tmp_path, monkeypatch):
    opened(tmp_path)
    monkeypatch.setattr(frames, "_lock", lambda *_: pytest.fail("would write"))
    check_frames(opened(tmp_path, refuse)[0])


def start_child(folder: Path, seconds: float) -> Any:
    """A process that opens the file and checks it, with `seconds` for each picture that has to be decoded."""
    def read(row: int) -> Image.Image:
        time.sleep(seconds)
        return picture(row)

    child: Any = get_context("fork").Process(target=lambda: check_frames(opened(folder, read)[0]))
    child.start()
    return child


def start_slow_child(folder: Path) -> Any:
    child = start_child(folder, 5)
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(.01)
    return child


def test_processes_that_decode_at_once_agree(tmp_path):
    children = [start_child(tmp_path, .05) for _ in range(3)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0] and len(names(tmp_path)) == 1


def test_a_waiting_process_takes_over_from_a_killed_one(tmp_path):
    child = start_slow_child(tmp_path)
    threading.Timer(.5, child.kill).start()
    split, said = opened(tmp_path)
    child.join()
    check_frames(split)
    assert said[0] == f"another process is decoding into {split.store.path}; waiting for it" and len(said) == 2
    assert names(tmp_path) == [split.store.path.name]


def test_a_process_that_waits_calls_progress_which_can_stop_it(tmp_path):
    child = start_slow_child(tmp_path)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, progress=stop)
    assert calls == [(0, 10)] * 3 and child.is_alive() and names(tmp_path)[0].endswith(".tmp")
    child.kill()
    child.join()
