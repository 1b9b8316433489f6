"""kd/pictures.py and kd/images.py: every kind of file to its right pixels, and a store that never gives a wrong one."""

import errno
import io
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from kd import BadInput, TrainingFault, images
from kd.data import open_dataset
from kd.images import center_crop, decode
from kd.pictures import open_picture, to_frame
from kd.samples import Dataset, Samples

BEANS = os.environ.get("KD_BEANS")


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(data: bytes, at=(0, 0)) -> tuple[int, ...]:
    picture = open_picture(data, "x")
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough that JPEG and resampling keep something of it, and without any symmetry."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# One picture

def test_greyscale():
    assert pixel(encoded(Image.new("L", (9, 9), 77), "PNG")) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (9, 9), 1), "PNG")) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette(format):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(encoded(image, format)) == (10, 200, 30)


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    for format in ("PNG", "GIF"):
        data = encoded(image, format, transparency=0)
        assert (pixel(data), pixel(data, (1, 1))) == ((255, 255, 255), (10, 200, 30))
    half = encoded(image, "PNG", transparency=bytes([0, 128]))
    assert pixel(half, (1, 1)) == (132, 227, 142)  # 128/255 of the colour, the rest white


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_over_white(format):
    image = Image.new("RGBA", (9, 9), (200, 0, 100, 255))
    image.putpixel((0, 0), (200, 0, 100, 0))
    image.putpixel((8, 8), (200, 0, 100, 51))
    data = encoded(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    assert [pixel(data, at) for at in ((0, 0), (4, 4), (8, 8))] == [(255,) * 3, (200, 0, 100), (244, 204, 224)]


def test_grey_with_alpha_and_transparent_colours():
    assert pixel(encoded(Image.new("LA", (9, 9), (100, 51)), "PNG")) == (224, 224, 224)
    assert pixel(encoded(Image.new("L", (9, 9), 100), "PNG", transparency=100)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Pillow writes JPEG's CMYK as Adobe does, inverted, and TIFF's as it is."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), format, **({"quality": 100} if format == "JPEG" else {}))
    assert format == "TIFF" or b"Adobe" in data
    assert np.allclose(pixel(data, (8, 8)), (0, 204, 204), atol=3)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    wanted = [0, 1, 128, 255]
    for format in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(values), format)
        assert [pixel(data, (x, 0))[0] for x in range(4)] == wanted
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert [pixel(encoded(big_endian, "TIFF"), (x, 0))[0] for x in range(4)] == wanted
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    assert [pixel(pgm, (x, 0)) for x in range(4)] == [(value,) * 3 for value in wanted]
    dark = b"P5 1 1 65535\n" + struct.pack(">H", 200)  # does not look like 8 bits because it is dark
    assert pixel(dark) == (1, 1, 1)
    twelve = b"P5 1 1 4095\n" + struct.pack(">H", 4095)
    assert pixel(twelve) == (255, 255, 255)


@pytest.mark.parametrize("dtype, values, wanted", [
    (np.int32, [0, 100, 255], [0, 100, 255]),
    (np.int32, [0, 32896, 65535], [0, 128, 255]),
    (np.float32, [0, .5, 1], [0, 128, 255]),
    (np.float32, [0, 100.4, 255], [0, 100, 255]),
    (np.float32, [0, 32896, 65535], [0, 128, 255]),
])
def test_thirty_two_bits(dtype, values, wanted):
    data = encoded(Image.fromarray(np.array([values], dtype)), "TIFF")
    assert [pixel(data, (x, 0))[0] for x in range(3)] == wanted


@pytest.mark.parametrize("bad", [np.nan, -1.0, 1e9])
def test_thirty_two_bits_without_a_scale_are_refused(bad):
    with pytest.raises(BadInput, match="^x: .*8 or 16 bits"):
        open_picture(encoded(Image.fromarray(np.full((2, 2), bad, np.float32)), "TIFF"), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    upright = noise(48, 32)
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(encoded(stored, format, exif=exif), "x")
    assert picture.size == (48, 32)
    assert np.abs(np.asarray(picture, int) - np.asarray(upright, int)).mean() < 8


def test_exif_orientation_of_sixteen_bits():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_picture(encoded(Image.fromarray(values), "PNG", exif=exif), "x")
    assert np.asarray(picture)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encoded(Image.new("RGB", (16, 16), (9, 99, 9)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff junk")
    assert pixel(data) == (9, 99, 9)


def test_animations_and_phone_jpegs_give_their_first_picture():
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    for format in ("GIF", "WEBP", "TIFF", "MPO"):
        assert np.allclose(pixel(encoded(red, format, save_all=True, append_images=[blue])), (255, 0, 0), atol=3)


def broken_files() -> dict[str, bytes]:
    image = noise(64, 48)
    whole = {format: encoded(image, format) for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}
    whole["deflated TIFF"] = encoded(image, "TIFF", compression="tiff_deflate")
    broken = {f"{format} cut to {part:.0%}": data[:int(len(data) * part)]
              for format, data in whole.items() for part in (.1, .5, .9)}
    return broken | {
        "empty": b"", "text": b"not an image at all", "zeros": bytes(2000), "JPEG magic only": b"\xff\xd8\xff",
        "pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n showpage\n",
        "ICO": encoded(image, "ICO"), "PDF": encoded(image, "PDF"),
    }


@pytest.mark.parametrize("kind, data", broken_files().items(), ids=list(broken_files()))
def test_what_cannot_be_decoded_is_refused_by_name(kind, data):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(BadInput, match="^train/a/7.jpg: ") as caught:
        open_picture(data, "train/a/7.jpg")
    assert "\n" not in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding():
    """A child's peak memory, in MB over what it has before: a 200-megapixel RGB picture is 600 MB decoded."""
    child = textwrap.dedent("""
        import io, resource, struct, zlib
        from PIL import Image
        from kd import BadInput
        from kd.pictures import open_picture
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        header = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
        bomb = header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
        small = io.BytesIO()
        Image.new("RGB", (16, 16)).save(small, "JPEG")
        jpeg = small.getvalue()
        at = jpeg.index(b"\\xff\\xc0") + 5
        jpeg = jpeg[:at] + struct.pack(">HH", 10000, 20000) + jpeg[at + 4:]
        small = io.BytesIO()
        Image.new("RGB", (16, 16)).save(small, "WEBP", lossless=True)
        webp = bytearray(small.getvalue())
        webp[21:25] = struct.pack("<I", 16000 - 1 | 13000 - 1 << 14)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, data in ("png", bomb), ("jpeg", jpeg), ("webp", bytes(webp)):
            try:
                open_picture(data, kind)
                raise SystemExit(f"{kind} was opened")
            except BadInput as error:
                assert str(error).startswith(kind + ": too many pixels"), error
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """)
    assert int(subprocess.check_output([sys.executable, "-W", "error::RuntimeWarning", "-c", child])) < 60


# The frame, against timm's own transform

def timm_eval(picture: Image.Image, size: int, crop_pct: float, interpolation: str) -> np.ndarray:
    config = timm.data.resolve_data_config({"input_size": (3, size, size), "crop_pct": crop_pct,
                                            "interpolation": interpolation, "mean": (0, 0, 0), "std": (1, 1, 1)})
    tensor = timm.data.create_transform(**config, is_training=False)(picture)
    return (tensor.permute(1, 2, 0).numpy() * 255).round().astype(int)


def ours(picture: Image.Image, size: int, crop_pct: float, interpolation: str) -> np.ndarray:
    side = int(size / crop_pct)
    frame = to_frame(picture, size, side, interpolation)
    assert frame.shape == (side, side, 3)
    return center_crop(frame[None], size)[0].astype(int)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(16, 49),
       crop_pct=st.sampled_from([1.0, .95, .9, .875, .8, .5, .96]),
       interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos", "nearest"]))
def test_centre_crop_of_the_frame_is_timms_eval_transform(width, height, size, crop_pct, interpolation):
    picture = noise(width, height, seed=width * 91 + height)
    args = picture, size, crop_pct, interpolation
    assert np.array_equal(ours(*args), timm_eval(*args))


@settings(deadline=None, derandomize=True)
@given(length=st.integers(16, 4000), side=st.integers(16, 600), size=st.integers(16, 600))
def test_window_lies_inside_and_composes(length, side, size):
    if size <= side <= length:
        margin = round((side - size) / 2)
        start = round((length - size) / 2) - margin
        assert 0 <= start <= length - side


def test_sliver_is_resized_without_its_whole():
    """1 × 100,000 pixels would be 256 × 25,600,000 after the resize; the window alone is the same picture."""
    sliver = Image.fromarray(np.repeat(np.arange(100_000, dtype=np.uint32) // 400, 3).astype(np.uint8)
                             .reshape(1, 100_000, 3))
    frame = to_frame(sliver, 224, 256, "bilinear")
    assert frame.shape == (256, 256, 3)
    assert set(np.unique(frame)) <= {124, 125}  # the middle of the sliver is at 50,000 / 400
    tall = to_frame(sliver.transpose(Image.Transpose.ROTATE_270), 224, 256, "bilinear")
    assert set(np.unique(tall)) <= {124, 125}


def test_sliver_equals_the_whole(monkeypatch):
    picture = noise(40, 300)
    whole = to_frame(picture, 20, 25, "bicubic").astype(int)
    monkeypatch.setattr("kd.pictures.MAX_PIXELS", 1)
    assert np.abs(to_frame(picture, 20, 25, "bicubic") - whole).max() <= 1


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
@pytest.mark.parametrize("model, size", [("mobilenetv2_100", 224), ("tf_efficientnet_lite0", 128), ("resnet50", 97)])
def test_real_photographs_equal_timms_eval_transform(model, size):
    declared = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    samples = open_dataset(BEANS, say=lambda _: None).splits["test"]
    for index in range(0, 128, 32):
        data = samples.read(index)
        args = size, declared["crop_pct"], declared["interpolation"]
        theirs = timm_eval(Image.open(io.BytesIO(data)).convert("RGB"), *args)
        assert np.abs(ours(open_picture(data, "x"), *args) - theirs).max() <= 0


# The store

SETTINGS = {"size": 28, "crop_pct": .875, "interpolation": "bilinear"}  # frames of 32 × 32


def dataset_of(count: int, identity: str = "same", read=None) -> Dataset:
    def samples(split: str, size: int) -> Samples:
        return Samples(np.arange(size) % 2, read or (lambda index: noise(40, 36, index)),
                       lambda index: f"{split}/{index}.png", f"somewhere {split}", identity)

    return Dataset("toy", ("a", "b"), {"train": samples("train", count), "validation": samples("validation", 2),
                                       "test": samples("test", 2)})


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
    swapped = dataset_of(10, read=lambda index: noise(40, 36, {0: 1, 1: 0}.get(index, index)))
    assert open_store(tmp_path / "d", swapped)[0].train.frames.digest != digest


@pytest.mark.parametrize("change", [{"size": 29}, {"size": 14, "crop_pct": .4375}, {"interpolation": "bicubic"}])
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
    places = [*rng.integers(0, index_at, 40), *rng.integers(index_at, len(whole), 60), len(whole) - 1, index_at]
    for place in map(int, places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1:])
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
    with pytest.raises(BadInput, match="^train/3.png: .*truncated"):
        open_store(tmp_path, dataset_of(10, read=lambda index: whole[:len(whole) // 2] if index in (3, 5) else whole))
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
    monkeypatch.setattr(images, "_build_or_wait", lambda *_: pytest.fail("would write"))
    tmp_path.chmod(0o500)
    check_frames(open_store(tmp_path)[0])
    tmp_path.chmod(0o700)


CHILD = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, sys.argv[3])
    from tests.test_images import dataset_of, noise, open_store, check_frames
    def read(index):
        time.sleep(float(sys.argv[2]))
        return noise(40, 36, index)
    print("ready", flush=True)
    data, said = open_store(sys.argv[1], dataset_of(10, read=read))
    check_frames(data)
    print(data.train.frames.digest, sum("decoded images" in line for line in said), flush=True)
""")


def start_child(folder: Path, seconds: float) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(seconds), root], text=True, stdout=subprocess.PIPE)


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
    assert sum("waiting" in line for line in said) == 1


def test_resident_set_stays_bounded(tmp_path):
    """A store of 300 MB is read in full, twice, and the process grows by less than 110 MB."""
    child = textwrap.dedent("""
        import sys
        import numpy as np
        sys.path.insert(0, sys.argv[2])
        from tests.test_images import dataset_of
        from kd.images import decode
        from PIL import Image
        def resident(key):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) >> 10 for line in file if line.startswith(key))
        picture = Image.new("RGB", (512, 512), (10, 20, 30))
        data = decode(dataset_of(400, read=lambda index: picture), size=512, crop_pct=1.0, interpolation="bilinear",
                      cache_dir=sys.argv[1])
        assert data.train.frames.nbytes > 300e6
        before, out = resident("VmRSS"), np.empty((8, 512, 512, 3), np.uint8)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        for _ in range(2):
            for index in range(0, 400, 8):
                data.train.frames.read(range(index, index + 8), out)
        print(resident("VmHWM") - before)
    """)
    root = str(Path(__file__).resolve().parents[1])
    output = subprocess.check_output([sys.executable, "-c", child, str(tmp_path), root], text=True)
    assert int(output.split()[-1]) < 110


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
def test_warm_photographs_open_at_once(tmp_path):
    dataset = open_dataset(BEANS, say=lambda _: None)
    args = {"size": 32, "crop_pct": 1.0, "interpolation": "bilinear", "cache_dir": tmp_path}
    cold = decode(dataset, say=lambda _: None, **args)
    assert [len(split) for split in (cold.train, cold.validation, cold.test)] == [1034, 133, 128]
    start = time.perf_counter()
    warm = decode(dataset, say=lambda line: pytest.fail(line), **args)
    assert time.perf_counter() - start < .5
    assert warm.test.frames.digest == cold.test.frames.digest
