"""kd/data/frames.py: a store of decoded pictures that never gives a wrong one."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd import BadInput, TrainingFault
from kd.data import frames
from kd.data.frames import decode
from kd.data.decoding import to_frame
from kd.data.samples import Dataset, Samples

BEANS = os.environ.get("KD_BEANS", "")
ROOT = str(Path(__file__).resolve().parents[2])
SETTINGS = {"size": 28, "crop_pct": .875, "interpolation": "bilinear"}  # frames of 32 × 32


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
                       lambda index: f"{split}/{index}.png", f"somewhere {split}", identity)

    sizes = {"train": count, "validation": 2, "test": 2}
    return Dataset("toy", ("a", "b"), {split: samples(split, size) for split, size in sizes.items()})


def open_store(folder: Path, dataset: Dataset | None = None, **options):
    said: list[str] = []
    data = decode(dataset or dataset_of(10), cache_dir=folder, say=said.append, **{**SETTINGS, **options})
    return data, said


def frame(index: int) -> np.ndarray:
    return to_frame(noise(40, 36, index), 28, 32, "bilinear")


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

    again, said = open_store(tmp_path / "new" / "folder", dataset_of(10, read=refuse))
    check_frames(again)
    assert said == [] and again.train.frames.digest == data.train.frames.digest


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
    monkeypatch.setattr(Image, "__version__", "0.0")
    third, said = open_store(tmp_path, dataset_of(10, "changed"))
    assert len(said) == 4 and all("other library versions" in line for line in said[:3])
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


@pytest.mark.parametrize("kept", [0, 1, 50, 3072 * 10, -1, -32])
def test_truncated_store_is_rebuilt(tmp_path, kept):
    data, _ = open_store(tmp_path)
    path = data.train.frames.path
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
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


def test_damaged_frame_that_cannot_be_repaired_is_right_all_the_same(tmp_path, monkeypatch):
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


def test_picture_that_cannot_be_decoded_leaves_no_file(tmp_path):
    whole = encoded(noise(40, 36), "JPEG")
    with pytest.raises(BadInput, match="(?i)^train/3.png: .*truncated"):
        open_store(tmp_path, dataset_of(10, read=lambda index: whole[:-300] if index in (3, 5) else whole))
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_and_can_stop_the_build(tmp_path):
    seen = []
    open_store(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert seen[:10] == [(done, 10) for done in range(1, 11)]

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path / "b", progress=stop)
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "rename"])
def test_full_disk_names_the_flag_and_leaves_no_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(TrainingFault, match="--cache-dir .*No space left"):
        open_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


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


CHILD = textwrap.dedent("""
    import sys, time
    from tests.data.test_frames import dataset_of, noise, open_store, check_frames
    def read(index):
        time.sleep(float(sys.argv[2]))
        return noise(40, 36, index)
    print("ready", flush=True)
    data, said = open_store(sys.argv[1], dataset_of(10, read=read))
    check_frames(data)
    print(data.train.frames.digest, sum("decoded images" in line for line in said), flush=True)
""")


def start_child(folder: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def test_processes_that_build_at_once_agree(tmp_path):
    children = [start_child(tmp_path, .05) for _ in range(3)]
    lines = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({digest for _, digest, _ in lines}) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".frames"] * 3


def test_killed_build_is_swept_away(tmp_path):
    child = start_child(tmp_path, 5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = list(tmp_path.iterdir())
    assert [path.suffix for path in left] == [".tmp"]
    left[0].rename(tmp_path / "other-train-64px-0123456789ab.tmp")  # of a store that nobody asks for again
    check_frames(open_store(tmp_path)[0])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".frames"] * 3


def test_waiting_process_takes_over_from_a_killed_one(tmp_path):
    child = start_child(tmp_path, 5)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(.01)
    threading.Timer(.5, child.kill).start()
    data, said = open_store(tmp_path)
    child.wait()
    check_frames(data)
    assert sum("another process is decoding" in line for line in said) == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_lock_is_on_the_file_that_has_the_name(tmp_path, monkeypatch, replaced):
    """Its last holder may rename it between another process's open and lock, and a third may make a new one."""
    path, real = tmp_path / "x.tmp", fcntl.flock
    calls: list[int] = []

    def late(descriptor, operation):
        if not calls:
            path.rename(tmp_path / "x.frames")
            if replaced:
                path.touch()
        calls.append(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    descriptor = frames._lock(path)
    assert descriptor is not None and len(calls) == 2
    assert os.fstat(descriptor).st_ino == path.stat().st_ino
    assert frames._lock(path) is None
    os.close(descriptor)


def test_resident_set_stays_bounded(tmp_path):
    """A store of 300 MB is read in full, twice, and the process grows by less than 110 MB."""
    child = textwrap.dedent("""
        import sys
        import numpy as np
        from tests.data.test_frames import dataset_of
        from kd.images import decode
        from PIL import Image
        def resident(key):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) >> 10 for line in file if line.startswith(key))
        picture = Image.new("RGB", (512, 512), (10, 20, 30))
        data = decode(dataset_of(400, read=lambda index: picture), cache_dir=sys.argv[1],
                      size=512, crop_pct=1.0, interpolation="bilinear")
        assert data.train.frames.nbytes > 300e6
        before, out = resident("VmRSS"), np.empty((8, 512, 512, 3), np.uint8)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        for _ in range(2):
            for index in range(0, 400, 8):
                data.train.frames.read(range(index, index + 8), out)
        print(resident("VmHWM") - before)
    """)
    output = subprocess.check_output([sys.executable, "-c", child, str(tmp_path)], cwd=ROOT, text=True)
    assert int(output.split()[-1]) < 110


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
def test_warm_photographs_open_at_once(tmp_path):
    from kd.data.sources import open_dataset
    dataset = open_dataset(BEANS, say=lambda _: None)
    args = {"size": 32, "crop_pct": 1.0, "interpolation": "bilinear", "cache_dir": tmp_path}
    cold = decode(dataset, say=lambda _: None, **args)
    assert [len(split) for split in (cold.train, cold.validation, cold.test)] == [1034, 133, 128]
    start = time.perf_counter()
    warm = decode(dataset, say=lambda line: pytest.fail(line), **args)
    assert time.perf_counter() - start < .5
    assert warm.test.frames.digest == cold.test.frames.digest
