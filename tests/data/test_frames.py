"""kd/data/frames.py: a store of decoded pictures that never gives a wrong one."""

import errno
import io
import os
import threading
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd import BadInput, TrainingFault
from kd.data import decoding, frames
from kd.data.frames import decode, decode_splits
from kd.data.decoding import to_frame
from kd.data.samples import Dataset, Samples

BEANS = os.environ.get("KD_BEANS", "")
SETTINGS: dict[str, Any] = {"size": 28, "crop_pct": .875, "interpolation": "bilinear"}  # frames of 32 × 32


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough that JPEG and resampling keep something of it, and without any symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def dataset_of(count: int, identity: str = "same", read=None) -> Dataset:
    def samples(split: str, size: int) -> Samples:
        return Samples(np.arange(size) % 2, read or (lambda index: noise(40, 36, index)),
                       lambda index: f"{split}/{index}.png", str, f"somewhere {split}", identity)

    sizes = {"train": count, "validation": 2, "test": 2}
    return Dataset("toy", ("a", "b"), {split: samples(split, size) for split, size in sizes.items()})


def open_store(folder: Path, dataset: Dataset | None = None, **options):
    said: list[str] = []
    data = decode(dataset or dataset_of(10), cache_dir=folder, say=said.append, **{**SETTINGS, **options})
    return data, said


def frame(index: int) -> np.ndarray:
    return to_frame(noise(40, 36, index), 28, 32, "bilinear")


def names(folder: Path) -> list[str]:
    """All files but the locks, which stay: another process may be waiting for one."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def suffixes(folder: Path) -> list[str]:
    return [Path(name).suffix for name in names(folder)]


def check_frames(data) -> None:
    order = np.random.default_rng(0).permutation(len(data.train))
    assert np.array_equal(data.train.frames.read(order), np.stack([frame(int(index)) for index in order]))


def test_store_is_built_once_and_read_ever_after(tmp_path):
    data, said = open_store(tmp_path / "new" / "folder")
    check_frames(data)
    assert len(said) == 1 and str(tmp_path / "new" / "folder") in said[0] and "MB" in said[0]
    assert data.classes == ("a", "b") and data.train.labels.tolist() == [0, 1] * 5
    assert data.train.frames.shape == (10, 32, 32, 3)
    assert data.train.frames.nbytes == data.train.frames.path.stat().st_size

    def refuse(index):
        raise AssertionError("decoded again")

    reopened, said = open_store(tmp_path / "new" / "folder", dataset_of(10, read=refuse))
    check_frames(reopened)
    assert said == [] and reopened.train.frames.digest == data.train.frames.digest


def test_read_fills_the_array_it_is_given(tmp_path):
    data, _ = open_store(tmp_path)
    out = np.zeros((3, 32, 32, 3), np.uint8)
    assert data.train.frames.read([4, 4, -1], out) is out
    assert np.array_equal(out, np.stack([frame(4), frame(4), frame(9)]))
    with pytest.raises(IndexError):
        data.train.frames.read([10])


def test_digest_depends_on_the_pixels_alone(tmp_path):
    digest = open_store(tmp_path / "a")[0].train.frames.digest
    assert open_store(tmp_path / "b", dataset_of(10, "renamed"))[0].train.frames.digest == digest
    changed = dataset_of(10, read=lambda index: noise(40, 36, index if index != 7 else 8))
    assert open_store(tmp_path / "c", changed)[0].train.frames.digest != digest
    swapped = dataset_of(10, read=lambda index: noise(40, 36, index ^ 1 if index < 2 else index))
    assert open_store(tmp_path / "d", swapped)[0].train.frames.digest != digest


@pytest.mark.parametrize("change", [
    {"size": 29}, {"size": 14, "crop_pct": .4375}, {"interpolation": "bicubic"}])
def test_other_settings_are_another_store(tmp_path, change):
    first, _ = open_store(tmp_path)
    second, _ = open_store(tmp_path, **change)
    assert second.train.frames.path != first.train.frames.path and first.train.frames.path.exists()


def test_other_data_or_versions_rebuild_with_one_line_each(tmp_path, monkeypatch):
    first, _ = open_store(tmp_path)
    second, said = open_store(tmp_path, dataset_of(10, "changed"))
    assert second.train.frames.path == first.train.frames.path
    assert len(said) == 4 and all("other data" in line for line in said[:3])
    for place, name in ((Image, "__version__"), (frames, "CODE")):
        monkeypatch.setattr(place, name, "0.0")
        third, said = open_store(tmp_path, dataset_of(10, "changed"))
        assert len(said) == 4 and all("another version of kd or of a library" in line for line in said[:3])
        check_frames(third)


def test_every_flipped_bit_is_noticed(tmp_path):
    data, _ = open_store(tmp_path)
    path = data.train.frames.path
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    index_at = 10 * 32 * 32 * 3
    places = [index_at, len(whole) - 1, *rng.integers(0, index_at, 40), *rng.integers(index_at, len(whole), 60)]
    for place, bit in zip(map(int, places), rng.integers(0, 8, len(places)).tolist()):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        data, said = open_store(tmp_path)
        check_frames(data)
        assert len([line for line in said if str(path) in line]) == 1
        assert path.read_bytes() == whole  # repaired in place or built again


@pytest.mark.parametrize("length", [0, 1, 50, 3072 * 10, -1, -32])
def test_truncated_store_is_rebuilt(tmp_path, length):
    data, _ = open_store(tmp_path)
    path = data.train.frames.path
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    data, said = open_store(tmp_path)
    assert len(said) == 2 and said[0].startswith(str(path))
    check_frames(data)
    assert path.read_bytes() == whole


def test_damaged_frame_of_a_changed_source_is_never_used(tmp_path):
    data, _ = open_store(tmp_path)
    path = data.train.frames.path
    whole = bytearray(path.read_bytes())
    whole[5 * 3072] ^= 4
    path.write_bytes(whole)
    data, _ = open_store(tmp_path, dataset_of(10, read=lambda index: noise(40, 36, index + 1)))
    with pytest.raises(TrainingFault, match="frame 5 is damaged"):
        data.train.frames.read([5])


def test_damaged_frame_that_cannot_be_repaired_is_decoded_at_every_read(tmp_path, monkeypatch):
    data, _ = open_store(tmp_path)
    path = data.train.frames.path
    whole = bytearray(path.read_bytes())
    whole[5 * 3072] ^= 4
    path.write_bytes(whole)
    data, said = open_store(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        assert np.array_equal(data.train.frames.read([5])[0], frame(5))
    assert len(said) == 2 and "cannot be repaired" in said[0]


# Bad pictures

GOOD = [encoded(noise(40, 36, number), "PNG") for number in range(40)]


def files_dataset(seed: int, **files: dict[str, bytes]) -> Dataset:
    """Splits of (name: content); the fingerprint changes with the seed."""
    def samples(split: str) -> Samples:
        names, contents = list(files[split]), list(files[split].values())
        return Samples(np.zeros(len(names), np.int64), lambda index: contents[index], lambda index: names[index],
                       lambda index: names[index], f"somewhere {split}", f"{seed}")

    return Dataset("toy", ("a",), {split: samples(split) for split in files})


def pictures(first: int, count: int, bad: dict[int, bytes] = {}) -> dict[str, bytes]:
    return {f"{number}.png": bad.get(number, GOOD[number]) for number in range(first, first + count)}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of all pictures that are decoded."""
    seen: list[str] = []
    original = decoding.open_picture

    def watch(content: bytes, name: str) -> Image.Image:
        picture = original(content, name)
        seen.append(name)
        return picture

    monkeypatch.setattr(decoding, "open_picture", watch)
    return seen


def check_against_fresh_build(data, dataset: Dataset, folder: Path) -> None:
    fresh, _ = open_store(folder, dataset)
    for split in ("train", "validation", "test"):
        ours, theirs = getattr(data, split), getattr(fresh, split)
        assert ours.frames.path.read_bytes() == theirs.frames.path.read_bytes()
        everything = range(len(ours))
        assert np.array_equal(ours.frames.read(everything), theirs.frames.read(everything))


def test_one_bad_picture_is_one_line(tmp_path):
    with pytest.raises(BadInput) as caught:
        open_store(tmp_path, files_dataset(0, train=pictures(0, 5, {3: b""}), validation=pictures(5, 2),
                                           test=pictures(7, 2)))
    assert str(caught.value) == "3.png: the image is empty; restore or remove it"


def test_all_bad_pictures_of_all_splits_are_named_at_once(tmp_path):
    files = {"train": pictures(0, 25, dict.fromkeys(range(2, 24), b"")),
             "validation": pictures(25, 3, {26: GOOD[26][:200]}),
             "test": pictures(28, 2, {28: b"", 29: b""})}
    with pytest.raises(BadInput) as caught:
        open_store(tmp_path, files_dataset(0, **files))
    first, *lines = str(caught.value).split("\n")
    assert first.startswith("25 of 30 pictures of toy cannot be decoded. ")
    assert lines[:20] == [f"  {number}.png: the image is empty; restore or remove it" for number in range(2, 22)]
    assert lines[20:] == ["  … and 5 more"]

    [path] = tmp_path.glob("toy-*-bad-pictures.txt")
    assert f"{path} names all of them." in first
    listed = path.read_text().splitlines()
    assert [line.split(":")[0] for line in listed] == [f"{number}.png" for number in [*range(2, 24), 26, 28, 29]]
    assert "26.png: the image cannot be decoded (" in listed[22]


def test_after_bad_pictures_are_removed_the_others_are_not_decoded_again(tmp_path, decoded):
    bad = {2: GOOD[2][:300], 5: b"", 11: b"text"}
    dataset = files_dataset(0, train=pictures(0, 8, bad), validation=pictures(8, 2), test=pictures(10, 3, bad))
    for _ in range(2):      # without a change, the same ones are bad again
        with pytest.raises(BadInput, match="^3 of 13 pictures"):
            open_store(tmp_path / "cache", dataset)
        assert sorted(decoded) == sorted(f"{number}.png" for number in (0, 1, 3, 4, 6, 7, 8, 9, 10, 12))

    # One is restored, one removed. A new picture comes first, and another changes its split, as carved ones do.
    decoded.clear()
    train = {"new.png": GOOD[20], **pictures(0, 8, bad)}
    train["2.png"] = GOOD[2]
    test = pictures(10, 3)
    del train["5.png"], test["11.png"]
    test["4.png"] = train.pop("4.png")
    mended = files_dataset(1, train=train, validation=pictures(8, 2), test=test)
    data, said = open_store(tmp_path / "cache", mended)
    assert sorted(decoded) == ["2.png", "new.png"]
    assert suffixes(tmp_path / "cache") == [".frames"] * 3 and "decoded images" in said[-1]
    check_against_fresh_build(data, mended, tmp_path / "fresh")


@pytest.mark.parametrize("change", [{"size": 29}, {"interpolation": "bicubic"}, "version"], ids=str)
def test_frames_that_were_kept_for_other_settings_are_not_used(tmp_path, decoded, monkeypatch, change):
    dataset = files_dataset(0, train=pictures(0, 4, {3: b""}), validation=pictures(4, 1), test=pictures(5, 1))
    with pytest.raises(BadInput):
        open_store(tmp_path, dataset)
    decoded.clear()
    if change == "version":
        monkeypatch.setattr(Image, "__version__", "0.0")
    with pytest.raises(BadInput):
        open_store(tmp_path, dataset, **({} if change == "version" else change))
    assert len(decoded) == 5


@pytest.mark.parametrize("suffix", [".hashes", ".partial"])
def test_damage_of_what_was_kept_costs_time_and_nothing_else(tmp_path, decoded, suffix):
    files = {"train": pictures(0, 8, {5: b""}), "validation": pictures(8, 2), "test": pictures(10, 2)}
    mended = files_dataset(1, **{**files, "train": pictures(0, 8)})
    check = open_store(tmp_path / "fresh", mended)[0].train.frames.path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(12):
        folder = tmp_path / str(trial)
        with pytest.raises(BadInput):
            open_store(folder, files_dataset(0, **files))
        [path] = folder.glob(f"*train*{suffix}")
        content = bytearray(path.read_bytes())
        if trial < 4:
            content = content[:len(content) * trial // 4]
        else:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        decoded.clear()
        data, _ = open_store(folder, mended)
        assert data.train.frames.path.read_bytes() == check
        assert "5.png" in decoded and (suffix == ".partial" or len(decoded) == 8)
        assert suffixes(folder) == [".frames"] * 3


def test_a_stopped_build_leaves_what_was_kept(tmp_path, decoded):
    files = {"train": pictures(0, 8, {5: b""}), "validation": pictures(8, 2), "test": pictures(10, 2)}
    with pytest.raises(BadInput):
        open_store(tmp_path, files_dataset(0, **files))
    decoded.clear()

    def stop(done, total):
        if done == 7:
            raise KeyboardInterrupt

    mended = files_dataset(1, **{**files, "train": pictures(0, 8)})
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path, mended, progress=stop)
    assert not list(tmp_path.glob("*.tmp"))
    decoded.clear()
    open_store(tmp_path, mended)
    assert decoded == ["5.png"]


def test_what_was_kept_makes_room_on_a_full_disk(tmp_path, decoded, monkeypatch):
    files = {"train": pictures(0, 8, {5: b""}), "validation": pictures(8, 2), "test": pictures(10, 2)}
    with pytest.raises(BadInput):
        open_store(tmp_path, files_dataset(0, **files))
    decoded.clear()
    allocate = os.posix_fallocate

    def full_while_frames_are_kept(*args):
        if list(tmp_path.glob("*.partial")):
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(*args)

    monkeypatch.setattr(os, "posix_fallocate", full_while_frames_are_kept)
    data, _ = open_store(tmp_path, files_dataset(1, **{**files, "train": pictures(0, 8)}))
    assert [len(data.train), len(data.test)] == [8, 2] and suffixes(tmp_path) == [".frames"] * 3


def test_pictures_that_were_never_encoded_are_decoded_again(tmp_path):
    bad = True

    def read(index: int) -> bytes | Image.Image:
        return b"" if bad and index == 3 else noise(40, 36, index)

    with pytest.raises(BadInput, match="train/3.png: the image is empty"):
        open_store(tmp_path, dataset_of(10, read=read))
    bad = False
    check_frames(open_store(tmp_path, dataset_of(10, read=read))[0])


def test_a_list_that_cannot_be_written_does_not_hide_the_names(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadInput, match=r"again\.\n  1.png: .*\n  2.png: .*$"):
        open_store(tmp_path, files_dataset(0, train=pictures(0, 4, {1: b"", 2: b""}), validation=pictures(4, 1),
                                           test=pictures(5, 1)))


def test_only_some_splits_can_be_decoded(tmp_path):
    splits = decode_splits(files_dataset(0, test=pictures(0, 3)), cache_dir=tmp_path, say=lambda _: None, **SETTINGS)
    assert list(splits) == ["test"] and np.array_equal(splits["test"].frames.read([2])[0], frame(2))


# Stopping, full disks, other processes

def test_progress_counts_and_can_stop_the_build(tmp_path):
    seen = []
    open_store(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert seen[:10] == [(done, 10) for done in range(1, 11)]

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path / "b", progress=stop)
    assert names(tmp_path / "b") == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_full_disk_names_the_flag_and_leaves_no_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(TrainingFault, match="--cache-dir .*No space left"):
        open_store(tmp_path)
    assert names(tmp_path) == []


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(BadInput, match="^--cache-dir .*choose another"):
            open_store(folder)


def test_read_only_cache_folder_can_be_read(tmp_path, monkeypatch):
    open_store(tmp_path)
    monkeypatch.setattr(frames, "_build_or_wait", lambda *_: pytest.fail("would write"))
    tmp_path.chmod(0o500)
    check_frames(open_store(tmp_path)[0])
    tmp_path.chmod(0o700)


def build(folder: Path, seconds: float, output: SimpleQueue) -> None:
    """Open the store and check it, with `seconds` for each picture that has to be decoded."""
    def read(index: int) -> Image.Image:
        time.sleep(seconds)
        return noise(40, 36, index)

    data, said = open_store(folder, dataset_of(10, read=read))
    check_frames(data)
    output.put((data.train.frames.digest, said))


def start_child(folder: Path, seconds: float) -> tuple[BaseProcess, SimpleQueue]:
    """`build` in a process of its own: forked, so that it need not import everything anew."""
    fork = get_context("fork")
    output = fork.SimpleQueue()
    child = fork.Process(target=build, args=(folder, seconds, output))
    child.start()
    return child, output


def wait_for_temporary_file(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(.01)


def test_processes_that_build_at_once_agree(tmp_path):
    children = [start_child(tmp_path, .05) for _ in range(3)]
    for child, _ in children:
        child.join(60)
    assert [child.exitcode for child, _ in children] == [0, 0, 0]
    assert len({output.get()[0] for _, output in children}) == 1
    assert suffixes(tmp_path) == [".frames"] * 3


def test_killed_build_is_swept_away(tmp_path):
    child, _ = start_child(tmp_path, 5)
    wait_for_temporary_file(tmp_path)
    child.kill()
    child.join()
    assert suffixes(tmp_path) == [".tmp"]
    # as if it were of a dataset that is never opened again
    (tmp_path / names(tmp_path)[0]).rename(tmp_path / "other-train-64px-0123456789ab.tmp")
    check_frames(open_store(tmp_path)[0])
    assert suffixes(tmp_path) == [".frames"] * 3


def test_running_build_is_not_swept_away(tmp_path):
    child, output = start_child(tmp_path, .1)
    wait_for_temporary_file(tmp_path)
    open_store(tmp_path, size=20)  # another store in the same folder
    child.join(60)
    assert child.exitcode == 0 and len(output.get()[1]) == 1
    assert suffixes(tmp_path) == [".frames"] * 6


def test_waiting_process_takes_over_from_a_killed_one(tmp_path):
    child, _ = start_child(tmp_path, 5)
    wait_for_temporary_file(tmp_path)
    threading.Timer(.5, child.kill).start()
    data, said = open_store(tmp_path)
    child.join()
    check_frames(data)
    assert sum("another process is decoding" in line for line in said) == 1


def test_a_process_that_waits_calls_progress_which_can_stop_it(tmp_path):
    child, _ = start_child(tmp_path, 5)
    wait_for_temporary_file(tmp_path)
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path, progress=stop)
    assert calls == [(0, 10)] * 3 and child.is_alive() and suffixes(tmp_path) == [".tmp"]
    child.kill()
    child.join()


def test_resident_set_stays_bounded(tmp_path):
    """A store of 126 MB is read in full, twice, and must never be in memory as a whole."""
    def resident() -> float:
        return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0]) / 1024

    picture = Image.new("RGB", (512, 512), (10, 20, 30))
    data = decode(dataset_of(160, read=lambda index: picture), cache_dir=tmp_path, say=lambda line: None,
                  size=512, crop_pct=1.0, interpolation="bilinear")
    assert data.train.frames.nbytes > 125e6
    out = np.empty((4, 512, 512, 3), np.uint8)
    before = most = resident()
    for _ in range(2):
        for index in range(0, 160, 4):
            data.train.frames.read(range(index, index + 4), out)
            most = max(most, resident())
    assert 30 < most - before < 80


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
def test_warm_photographs_open_at_once(tmp_path):
    from kd.data.sources import open_dataset
    dataset = open_dataset(BEANS, say=lambda _: None)
    args = {"size": 32, "crop_pct": 1.0, "interpolation": "bilinear", "cache_dir": tmp_path}
    start = time.perf_counter()
    cold = decode(dataset, say=lambda _: None, **args)
    decoded = time.perf_counter()
    assert [len(split) for split in (cold.train, cold.validation, cold.test)] == [1034, 133, 128]
    warm = decode(dataset, say=lambda line: pytest.fail(line), **args)
    assert time.perf_counter() - decoded < .1 * (decoded - start)
    assert warm.test.frames.digest == cold.test.frames.digest
