"""Kill it anywhere, fill the disk, flip bits, feed it pickles: all of it, in minutes.

    python -m tests.stress.torture [--seed 0] [--only kills|bits|signals|full|pickles|pictures] [--short]

Every run is the real train.py in a process of its own (forked from one that has the libraries loaded, which spares the
seconds of importing them). Faults come from outside: signals, and tests/helpers/faults.c between process and disk.
Prints one line a table row, and leaves with status 1 unless every figure is full. pytest runs a short version.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import io
import json
import os
import pickle
import pty
import random
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from kd import BadInput, TrainingFault, logits, models
from kd.data import frames
from kd.machine import checkpoint
from kd.data.decoding import open_picture, to_frame
from tests.conftest import make_photos
from tests.helpers.runs import command_line, identical

ROOT = Path(__file__).resolve().parents[2]


def tiny_run(folder: Path, photos: Path, **changes: Any) -> train.Config:
    """A run of about two seconds with everything in it: fine-tuning, views, a store, checkpoints at every step."""
    config = train.Config(recipe="tutorial", dataset=str(photos), size=32, epochs=3, batch_size=8, lr=2e-3,
                          augment="crop", views=2, teacher="test_resnet", teacher_weights="none", teacher_epochs=1,
                          teacher_lr=2e-3, allow_weak_teacher=True, student="test_efficientnet",
                          out=str(folder / "run"), cache_dir=str(folder / "cache"), device="cpu", amp="off",
                          save_minutes=0.0)
    return dataclasses.replace(config, **changes)


def fork(config: train.Config, log: Path, fault: str = "") -> int:
    """Start `python train.py --resume` with `config`; returns the process's number."""
    faults().faults_reset()
    sys.stdout.flush()
    number = os.fork()
    if number:
        return number
    status = 98
    try:
        os.environ.update(KD_FAULT_UNDER=str(Path(config.out).parent), KD_FAULT=fault)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        sys.argv = ["train.py", *command_line(config, "--resume")]
        runpy.run_path("train.py", run_name="__main__")
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:  # never back into the parent's code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(number: int) -> int:
    """The exit status of a child; minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def faults() -> Any:
    """tests/helpers/faults.c, as it was preloaded into this process (see `preloaded`)."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    library.faults_seen.restype = ctypes.c_long
    return library


def preload(folder: Path) -> dict[str, str]:
    """Compile tests/helpers/faults.c; the environment that puts it in front of the C library."""
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-D_FILE_OFFSET_BITS=32", "-o", str(library),
                    str(ROOT / "tests" / "helpers" / "faults.c"), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def final(config: train.Config) -> tuple[Any, list[bytes], Any]:
    """All that a finished run has: the checkpoint, the saved weights, the scores."""
    out = Path(config.out)
    result = json.loads((out / "result.json").read_text())
    return (checkpoint.read(out / "last.ckpt"),
            [(out / role / "model.safetensors").read_bytes() for role in ("teacher", "student")],
            {role: result[role] for role in ("teacher", "student")})


def strays(folder: Path) -> list[str]:
    """Temporary files and folders that should not be there any more."""
    return [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".new", ".old"))]


def whole_run(folder: Path, photos: Path) -> tuple[Any, float, int]:
    """A run that nothing disturbs: what it ends with, its seconds, and how often it changed a file."""
    config = tiny_run(folder, photos)
    folder.mkdir()
    seconds = time.monotonic()
    log = folder.parent / "log"
    assert wait(fork(config, log)) == 0, log.read_text()
    return final(config), time.monotonic() - seconds, faults().faults_seen()


def kills(folder: Path, photos: Path, rng: random.Random, count: int) -> str:
    """kill -9 at random points, every third of them inside a change of a file, some runs killed twice or more."""
    expected, seconds, changes = whole_run(folder / "whole", photos)
    same = inside = runs = done = 0
    while done < count:
        runs += 1
        place = folder / f"kill-{runs}"
        place.mkdir()
        config = tiny_run(place, photos)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.4:
                child = fork(config, folder / "log", f"kill:{rng.randint(1, changes)}")
            else:
                child = fork(config, folder / "log")
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = wait(child)
            assert status in (0, -signal.SIGKILL), (folder / "log").read_text()
            if status:
                done += 1
                inside += bool(strays(place))
        assert wait(fork(config, folder / "log")) == 0, (folder / "log").read_text()
        identical(final(config), expected, str(place))
        assert not strays(place), strays(place)
        same += 1
        shutil.rmtree(place)
    return f"kill -9: {done} in {runs} runs, {inside} inside a save; {same} of {runs} runs end bit-identical"


def full_disk(folder: Path, photos: Path, rng: random.Random, count: int) -> str:
    """The disk is full from the n-th write on, for every n (or `count` of them); then there is room again."""
    expected, _, changes = whole_run(folder / "whole", photos)
    places = list(range(1, changes + 1)) if count == 0 else sorted(rng.sample(range(1, changes + 1), count))
    for n in places:
        place = folder / f"full-{n}"
        place.mkdir()
        config = tiny_run(place, photos)
        status = wait(fork(config, folder / "log", f"full:{n}"))
        said = (folder / "log").read_text()
        if status:  # 0: the last changes are no writes
            assert status == 1, said
            assert [line.startswith("train.py: error: ") for line in said.splitlines()].count(True) == 1, said
            assert "Traceback" not in said, said
            assert not strays(place), (n, strays(place))
            complaints: list[str] = []
            checkpoint.load(Path(config.out) / "last.ckpt", say=complaints.append)
            assert not complaints, complaints
            assert wait(fork(config, folder / "log")) == 0, (folder / "log").read_text()
        identical(final(config), expected, str(place))
        shutil.rmtree(place)
    return f"disk full: {len(places)} of {len(places)} places, one line and status 1, the old checkpoint loads"


def flipped_bits(folder: Path, photos: Path, rng: random.Random, count: int) -> str:
    """One bit, anywhere in the checkpoint, the decoded images or the stored logits: noticed, and never used."""
    expected, _, _ = whole_run(folder / "whole", photos)
    config = tiny_run(folder / "whole", photos)
    ckpt = Path(config.out) / "last.ckpt"
    stores = (Path(config.cache_dir) / "logits").iterdir()
    store = next(path for path in stores if len(list(path.glob("view-*.rows"))) == 2)  # the others hold evaluations
    table = train.open_dataset(config.dataset, say=lambda line: None)
    prep = models.preprocessing(models.create("student", config.student, table.classes))

    def decoded(say: Any = lambda line: None) -> frames.Split:
        return frames.decode(table, size=32, crop_pct=prep.crop_pct, interpolation=prep.interpolation,
                             cache_dir=config.cache_dir, say=say)["train"]

    def open_store() -> logits.LogitStore:
        return logits.LogitStore(store.parent, json.loads((store / "key.json").read_text()), 3)

    everything = np.arange(42)
    pixels = decoded().read(everything)
    stored = decoded().store.path
    known = open_store().get(0, everything)
    assert known is not None
    noticed = 0
    for turn in range(count):
        path = (ckpt, stored, store / "view-0.rows")[turn % 3]
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if path == ckpt:
            try:
                checkpoint.read(path)
            except ValueError:
                noticed += 1
        elif path == stored:
            lines: list[str] = []
            try:
                # A digest is damaged: all is made again, with a line. A frame is: noticed when it is read.
                split = decoded(lines.append)
                for place in range(split.store.count):      # those of validation and test are in the same file
                    split.store.read(place, np.empty(split.shape[1:], np.uint8))
                assert np.array_equal(split.read(everything), pixels)
                noticed += bool(lines)
            except TrainingFault:
                noticed += not stored.exists()
        else:
            opened = open_store()
            noticed += opened.get(0, everything) is None
            for sample in everything:
                row = opened.get(0, np.array([sample]))
                assert row is None or torch.equal(row[0], known[sample])
        path.write_bytes(whole)
    identical(final(config), expected)
    assert noticed == count, f"{noticed} of {count}"
    return f"flipped bits: {noticed} of {count} noticed, none used"


def signals(folder: Path) -> str:
    """SIGTERM in every phase of a real process on a terminal, when its progress bar names that phase."""
    slowest = 0.0
    for phase, shown in (("store building", "decoding"), ("fine-tuning", "teacher 1/"), ("training", "student 1/"),
                         ("evaluation", "student validation")):
        out = folder / "run"
        line = [sys.executable, "train.py", "--resume", "--size", "64", "--epochs", "2", "--teacher-epochs", "1",
                "--allow-weak-teacher", "--out", str(out), "--cache-dir", str(folder / "cache"), "--device", "cpu"]
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))  # a progress bar needs some room
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        said, deadline, sent = "", time.monotonic() + 240, 0.0
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{phase}: {said[-500:]}"
            if select.select([ours], [], [], 0.05)[0]:
                try:
                    said += os.read(ours, 65536).decode(errors="replace")
                except OSError:  # the other side has closed
                    pass
            if not sent and shown in said:
                process.send_signal(signal.SIGTERM)
                sent = time.monotonic()
        seconds = time.monotonic() - sent
        os.close(ours)
        assert process.returncode == 143 and sent and seconds < 30, f"{phase}: {process.returncode} {seconds} {said}"
        state = checkpoint.load(out / "last.ckpt") if (out / "last.ckpt").exists() else None
        assert (state is None) == (phase == "store building"), phase
        assert not strays(folder), strays(folder)
        slowest = max(slowest, seconds)
    return f"SIGTERM: 4 of 4 phases leave with 143 and a valid checkpoint, the slowest in {slowest:.1f} s"


class Bomb:
    """Unpickling it makes a file: what a malicious pickle would do, and worse."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.marker}'",))


def pickles(folder: Path, photos: Path) -> str:
    """Pickles through every option that takes a file: refused by name with status 2 (or ignored), and not executed."""
    marker, tried = folder / "executed", 0
    bomb = pickle.dumps(Bomb(marker))
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(marker)}, buffer)
    zipped = buffer.getvalue()

    def refused(config: train.Config, names: str) -> None:
        nonlocal tried
        tried += 1
        status, said = wait(fork(config, folder / "log")), (folder / "log").read_text()
        assert status == 2 and "Traceback" not in said and names in said, (names, status, said)
        shutil.rmtree(config.out, ignore_errors=True)

    for suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors"):
        for content in (bomb, zipped):
            path = folder / f"weights{suffix}"
            path.write_bytes(content)
            refused(tiny_run(folder, photos, teacher_weights=str(path)), path.name)
    saved = folder / "saved"
    saved.mkdir()
    for name in ("pytorch_model.bin", "model.safetensors"):
        (saved / name).write_bytes(zipped)
        refused(tiny_run(folder, photos, teacher_weights=str(saved)), "saved")
    for name, content in (("train/blob/x.png", bomb), ("train/blob/x.pkl", zipped), ("test/plain/y.pt", zipped)):
        broken = folder / "photos"
        shutil.copytree(photos, broken)
        (broken / name).write_bytes(content)
        refused(tiny_run(folder, broken), Path(name).name)
        shutil.rmtree(broken)
    hub = folder / "hub"
    for name in ("data/train-00000-of-00001.parquet", "photos.py"):
        (hub / "data").mkdir(parents=True)
        script = f"import os; os.system('touch {marker}')".encode()
        (hub / name).write_bytes(bomb if name.endswith("parquet") else script)
        refused(tiny_run(folder, hub), "hub")
        shutil.rmtree(hub)
    for content in (bomb, zipped, checkpoint.MAGIC + hashlib.sha256(zipped).digest() + zipped):
        config = tiny_run(folder, photos)
        out = Path(config.out)
        out.mkdir(parents=True)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        (out / "last.ckpt").write_bytes(content)
        refused(config, "last.ckpt")
    assert not marker.exists(), "a pickle was executed"
    return f"pickles: 0 of {tried} executed, every one refused by name with status 2"


def odd_pictures(generator: np.random.Generator) -> list[tuple[str, bytes, bool]]:
    """Name, encoded bytes, and whether it is a picture (40 of them; huge ones by their header alone)."""
    pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)

    def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **how)
        return buffer.getvalue()

    jpeg, png = encoded(picture, "JPEG"), encoded(picture, "PNG")
    deep = Image.fromarray(generator.integers(0, 65536, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    found = []
    for name, content in (
            ("grey.png", encoded(picture.convert("L"), "PNG")), ("palette.png", encoded(picture.convert("P"), "PNG")),
            ("bilevel.png", encoded(picture.convert("1"), "PNG")),
            ("alpha.png", encoded(picture.convert("RGBA"), "PNG")),
            ("grey-alpha.png", encoded(picture.convert("LA"), "PNG")), ("sixteen.png", encoded(deep, "PNG")),
            ("sixteen.tif", encoded(deep, "TIFF")), ("cmyk.jpg", encoded(picture.convert("CMYK"), "JPEG")),
            ("cmyk.tif", encoded(picture.convert("CMYK"), "TIFF")), ("grey.jpg", encoded(picture.convert("L"), "JPEG")),
            ("animated.gif", encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)])),
            ("lossless.webp", encoded(picture, "WEBP", lossless=True)), ("plain.bmp", encoded(picture, "BMP")),
            ("progressive.jpg", encoded(picture, "JPEG", progressive=True)), ("jpeg-inside.png", jpeg),
            ("png-inside.jpg", png), ("one-pixel.png", encoded(Image.new("RGB", (1, 1)), "PNG")),
            ("sliver.png", encoded(Image.new("RGB", (1, 3000)), "PNG")), ("no-suffix", jpeg)):
        found.append((name, content, True))
    for turn in range(2, 9):
        exif[0x0112] = turn
        found.append((f"turned-{turn}.jpg", encoded(picture, "JPEG", exif=exif), True))
    huge = bytearray(png)
    huge[16:24] = (20000).to_bytes(4, "big") + (10000).to_bytes(4, "big")  # 200 megapixels, it says
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    for name, content in (
            ("empty.jpg", b""), ("cut.jpg", jpeg[:len(jpeg) // 2]), ("cut.png", png[:len(png) // 2]),
            ("head-only.jpg", jpeg[:20]), ("head-only.png", png[:8]), ("text.jpg", b"not a picture"),
            ("zeros.png", bytes(1000)), ("page.jpg", b"<html><body>404</body></html>"),
            ("vector.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("document.png", b"%PDF-1.7 " + bytes(99)),
            ("archive.png", b"PK" + bytes(99)), ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            ("huge.png", bytes(huge)), ("random.jpg", jpeg[:2] + generator.bytes(500))):
        found.append((name, content, False))
    return found


def pictures(folder: Path, photos: Path) -> str:
    """Each odd picture by itself, then all that are pictures in one data set: none takes another's place."""
    found = odd_pictures(np.random.default_rng(0))
    root = folder / "odd"
    shutil.copytree(photos, root)
    read = {}
    for name, content, good in found:
        path = root / "train" / "blob" / name
        path.write_bytes(content)
        try:
            picture = open_picture(content, str(path))
            assert good and picture.mode == "RGB", name
            read[str(path)] = np.asarray(picture)
        except BadInput as error:
            assert not good and str(error).startswith(str(path)), (name, error)
            table = train.open_dataset(str(root))
            try:
                frames.decode(table, size=24, crop_pct=1.0, interpolation="bicubic", cache_dir=folder / "cache",
                              say=lambda line: None)
                raise AssertionError(f"{name} was replaced by something")
            except BadInput as error:
                assert str(path) in str(error), (name, error)
            path.unlink()
    train_split = frames.decode(train.open_dataset(str(root)), size=24, crop_pct=1.0, interpolation="bicubic",
                                cache_dir=folder / "cache", say=lambda line: None)["train"]
    count = len(train_split)
    decoded, names = train_split.read(np.arange(count)), [train_split.name_of(i) for i in range(count)]
    for frame, name in zip(decoded, names, strict=True):
        expected = open_picture(Path(name).read_bytes(), "x")
        assert np.array_equal(frame, to_frame(expected, 24, 24, "bicubic")), name
    assert set(read) <= set(names)
    return f"odd pictures: {len(found)} of {len(found)} named or read right; 0 of {count} in another's place"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "bits", "signals", "full", "pickles", "pictures"))
    parser.add_argument("--short", action="store_true", help="16 bits, 2 writes; no signals, no kills")
    args = parser.parse_args(argv)
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as name:
            line = [sys.executable, "-m", "tests.stress.torture", *argv]
            return subprocess.run(line, env=preload(Path(name)), cwd=ROOT).returncode
    torch.set_num_threads(1)  # a process whose OpenMP threads have run must not fork
    failed = 0
    for name in ("pictures", "bits", "pickles", "signals", "full", "kills"):
        if args.only not in (None, name) or (args.short and name in ("signals", "kills")):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder, rng = Path(temporary), random.Random(args.seed)
            photos = make_photos(folder / "photos")
            (folder / "work").mkdir()
            work, began = folder / "work", time.monotonic()
            rows = {"pictures": lambda: pictures(work, photos), "pickles": lambda: pickles(work, photos),
                    "signals": lambda: signals(work),
                    "bits": lambda: flipped_bits(work, photos, rng, 16 if args.short else 200),
                    "full": lambda: full_disk(work, photos, rng, 2 if args.short else 0),
                    "kills": lambda: kills(work, photos, rng, 50)}
            try:
                print(f"{rows[name]()} ({time.monotonic() - began:.0f} s)", flush=True)
            except (AssertionError, BadInput, TrainingFault) as error:
                failed += 1
                print(f"{name}: FAILED: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
