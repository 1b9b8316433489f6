"""kd/data/decoding.py: every kind of file to its right pixels, every frame to those of timm's transform."""

import io
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from kd import BadInput
from kd.data import decoding
from kd.data.decoding import FORMATS, frame_of, is_lfs_pointer, open_picture, to_frame
from kd.data.frames import center_crop
from tests.helpers.frames import smooth
from tests.helpers.toy import encoded

BEANS = os.environ.get("KD_BEANS", "")
WHITE = (255, 255, 255)
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL")


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    picture = open_picture(data, "x")
    assert picture.mode == "RGB"
    return tuple(np.asarray(picture)[at[::-1]].tolist())


# ---- one picture -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, value, options, wanted", [
    ("L", 77, {}, (77, 77, 77)), ("1", 1, {}, WHITE), ("LA", (100, 51), {}, (224, 224, 224)),
    ("L", 100, {"transparency": 100}, WHITE), ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, WHITE)])
def test_grey_and_transparent_colours(mode, value, options, wanted):
    assert pixel(encoded(Image.new(mode, (9, 9), value), "PNG", **options)) == wanted


@pytest.mark.parametrize("format, options, wanted", [
    *((format, {}, [(0, 0, 0), (10, 200, 30)]) for format in ("PNG", "GIF", "BMP", "TIFF")),
    *((format, {"transparency": 0}, [WHITE, (10, 200, 30)]) for format in ("PNG", "GIF")),
    ("PNG", {"transparency": bytes([0, 128])}, [WHITE, (132, 227, 142)])])      # 128/255 of the colour, the rest white
def test_palettes(format, options, wanted):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    data = encoded(image, format, **options)
    assert [pixel(data), pixel(data, (1, 1))] == wanted


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_alpha_is_composited_over_white(format):
    image = Image.new("RGBA", (16, 16), (200, 0, 100, 255))
    image.paste((200, 0, 100, 0), (0, 0, 8, 16))
    image.paste((200, 0, 100, 51), (8, 8, 16, 16))
    data = encoded(image, format, lossless=True, exact=True)    # the options of WEBP, which the others ignore
    found = [pixel(data, at) for at in ((2, 2), (13, 2), (13, 13))]
    assert np.allclose(found, [WHITE, (200, 0, 100), (244, 204, 224)], atol=4 if format == "AVIF" else 0)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Pillow writes JPEG's CMYK as Adobe does, inverted, and TIFF's as it is."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), format, quality=100)
    assert format == "TIFF" or b"Adobe" in data
    assert np.allclose(pixel(data, (8, 8)), (0, 204, 204), atol=3)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image, swapped = Image.fromarray(values), values.astype(">u2").tobytes()
    for data in (encoded(image, "PNG"), encoded(image, "TIFF"), b"P5 4 1 65535\n" + swapped,
                 encoded(Image.frombytes("I;16B", (4, 1), swapped), "TIFF")):
        assert [pixel(data, (x, 0)) for x in range(4)] == [(value,) * 3 for value in (0, 1, 128, 255)]
    assert pixel(b"P5 1 1 65535\n" + struct.pack(">H", 200)) == (1, 1, 1)   # does not look like 8 bits as it is dark
    assert pixel(b"P5 1 1 4095\n" + struct.pack(">H", 4095)) == WHITE


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_have_no_scale_and_are_refused(dtype):
    with pytest.raises(BadInput, match="^x: .*8 or 16 bits"):
        open_picture(encoded(Image.fromarray(np.ones((2, 2), dtype)), "TIFF"), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format, orientation):
    upright = smooth(48, 32)
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(encoded(stored, format, exif=exif), "x")
    assert picture.size == (48, 32)
    assert np.abs(np.asarray(picture, int) - np.asarray(upright, int)).mean() < 8


def test_exif_orientation_of_sixteen_bits():
    values = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 257)
    exif = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"       # orientation 6
    picture = open_picture(encoded(values, "PNG", exif=exif), "x")
    assert np.asarray(picture)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "MPO"])
def test_animations_and_phone_jpegs_give_their_first_picture(format):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    assert np.allclose(pixel(encoded(red, format, save_all=True, append_images=[blue])), (255, 0, 0), atol=3)


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LARGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize("kind, data", [
    (b"iCCP", b"k\0\0" + LARGE), (b"zTXt", b"k\0\0" + LARGE), (b"iTXt", b"k\0\1\0\0\0" + LARGE),
    (b"eXIf", b"MM\0*\xff\xff\xff\xff junk")])
def test_large_profiles_and_texts_and_a_broken_exif_block_do_not_cost_the_picture(kind, data):
    png = encoded(smooth(64, 48), "PNG")
    found = open_picture(png[:33] + chunk(kind, data) + png[33:] + b"garbage", "x")
    assert np.array_equal(np.asarray(found), np.asarray(open_picture(png, "x")))


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"quality": 100, "subsampling": 0}, {"progressive": True},
    {"restart_marker_blocks": 2, "progressive": True}], ids=str)
def test_a_jpeg_that_lacks_pixels_is_refused_wherever_it_ends(options):
    """Also at a restart marker, or between the scans of a progressive one."""
    whole = encoded(smooth(96, 72), "JPEG", **options)
    markers = [match.start() + shift for match in re.finditer(rb"\xff[^\x00\xff]", whole[:-2]) for shift in (0, 2)]
    for cut in {len(whole) - lacking for lacking in (4, 5, 10, 40)} | set(markers[1:]):
        with pytest.raises(BadInput, match="^x: "):
            open_picture(whole[:cut], "x")


NO_IMAGE = f"damaged, or not an image (formats: {', '.join(FORMATS)}); restore, convert or remove it"


@pytest.mark.parametrize("data, reason", [
    (b"", "the image is empty; restore or remove it"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
     "a Git LFS pointer, not the picture; run git lfs pull"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
     "HEIC, AVIF or a video, which this Pillow cannot read; convert it to JPEG, or remove it"),
    (b"<!DOCTYPE html><title>404</title>",
     "a web page or SVG, not an image of pixels; download the image again, or remove it"),
    (b"cats on a mat\n", NO_IMAGE), (bytes(2000), NO_IMAGE), (b"\xff\xd8\xff", NO_IMAGE),
    (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", NO_IMAGE),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n showpage\n", NO_IMAGE),
    *((encoded(smooth(64, 48), format), NO_IMAGE) for format in ("ICO", "PDF"))])
def test_what_is_no_picture_is_called_what_it_is(data, reason):
    with pytest.raises(BadInput) as caught:
        open_picture(data, "train/a/7.jpg")
    assert str(caught.value) == f"train/a/7.jpg: {reason}"


def test_a_pointer_of_git_lfs_is_recognised_by_its_beginning():
    assert is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid") and not is_lfs_pointer(b"version 1")


@pytest.mark.parametrize("part", [.1, .5, .9])
@pytest.mark.parametrize("format, options", [
    *((format, {}) for format in FORMATS), ("TIFF", {"compression": "tiff_deflate"})], ids=str)
def test_a_file_that_is_cut_short_is_refused_by_name(format, options, part):
    data = encoded(smooth(64, 48), format, **options)
    with pytest.raises(BadInput, match="^train/a/7.jpg: ") as caught:
        open_picture(data[:int(len(data) * part)], "train/a/7.jpg")
    assert "\n" not in str(caught.value) and not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_photographs_of_phones_are_read():
    """108 megapixels, and more than Pillow's warning allows; 4 bytes a pixel are in memory."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 9000, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1501 * 9000))) + chunk(b"IEND", b"")
    assert frame_of(data, "x", 4, 4, "nearest").tolist() == np.zeros((4, 4, 3)).tolist()


def test_large_pictures_are_decoded_a_few_at_a_time(monkeypatch):
    held, most = 0, 0

    def watch(encoded, name):
        nonlocal held, most
        held += 1
        most = max(most, held)
        time.sleep(.02)
        held -= 1
        return smooth(40, 30)

    monkeypatch.setattr(decoding, "open_picture", watch)
    noisy = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)), "PNG")
    for limit, expected in ((100, 4), (decoding.LARGE_PIXELS, 8)):
        most = 0
        monkeypatch.setattr(decoding, "LARGE_PIXELS", limit)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: frame_of(noisy, "x", 8, 8, "nearest"), range(16)))
        assert most == expected


def test_too_many_pixels_are_refused_before_decoding():
    """A child's peak memory, in MB over what it had: a 200-megapixel RGB picture is 600 MB when decoded."""
    child = textwrap.dedent("""
        import io, resource, struct, zlib
        from PIL import Image
        from kd import BadInput
        from kd.data.decoding import open_picture
        from tests.data.test_decoding import chunk
        from tests.helpers.toy import encoded
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
        bomb = b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
        jpeg = encoded(Image.new("RGB", (16, 16)), "JPEG")
        at = jpeg.index(b"\\xff\\xc0") + 5
        jpeg = jpeg[:at] + struct.pack(">HH", 10000, 20000) + jpeg[at + 4:]
        webp = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
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


# ---- the frame, against timm's own transform -------------------------------------------------------------------------

def timm_eval(picture: Image.Image, size: int, crop_pct: float, interpolation: str) -> np.ndarray:
    transform = timm.data.create_transform((3, size, size), crop_pct=crop_pct, interpolation=interpolation,
                                           mean=(0, 0, 0), std=(1, 1, 1))
    return (transform(picture).permute(1, 2, 0).numpy() * 255).round().astype(int)


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
    args = smooth(width, height, seed=width * 91 + height), size, crop_pct, interpolation
    assert np.array_equal(ours(*args), timm_eval(*args))


@settings(deadline=None, derandomize=True)
@given(length=st.integers(16, 4000), side=st.integers(16, 600), size=st.integers(16, 600))
def test_window_lies_inside_and_composes(length, side, size):
    if size <= side <= length:
        start = round((length - size) / 2) - round((side - size) / 2)
        assert 0 <= start <= length - side


@pytest.mark.parametrize("tall", [False, True])
def test_sliver_is_resized_without_its_whole(tall):
    """1 × 100,000 pixels would be 256 × 25,600,000 after the resize; the window alone is the same picture."""
    columns = (np.arange(100_000) // 400).astype(np.uint8)[None, :, None].repeat(3, axis=2)
    frame = to_frame(Image.fromarray(columns.transpose(1, 0, 2) if tall else columns), 224, 256, "bilinear")
    assert frame.shape == (256, 256, 3)
    assert set(np.unique(frame)) <= {124, 125}  # the middle of the sliver is at 50,000 / 400


def test_sliver_equals_the_whole(monkeypatch):
    picture = smooth(40, 300)
    whole = to_frame(picture, 20, 25, "bicubic").astype(int)
    monkeypatch.setattr("kd.data.decoding.MAX_RESIZED_PIXELS", 1)
    assert np.abs(to_frame(picture, 20, 25, "bicubic") - whole).max() <= 1


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
@pytest.mark.parametrize("args", [(224, .875, "bicubic"), (128, .875, "bilinear"), (97, .95, "bicubic")], ids=str)
def test_real_photographs_equal_timms_eval_transform(args):
    [path] = Path(BEANS).glob("data/test-*.parquet")
    for photograph in pyarrow.parquet.read_table(path)["image"].to_pylist()[::32]:
        theirs = timm_eval(Image.open(io.BytesIO(photograph["bytes"])).convert("RGB"), *args)
        assert np.array_equal(ours(open_picture(photograph["bytes"], "x"), *args), theirs)
