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

import numpy as np
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from kd import BadInput
from kd.data import decoding
from kd.data.sources import open_dataset
from kd.data.frames import center_crop
from kd.data.decoding import FORMATS, MAX_PIXELS, encoded_frame, is_lfs_pointer, open_picture, to_frame
from tests.data.test_frames import encoded, noise

BEANS = os.environ.get("KD_BEANS", "")
WHITE = (255, 255, 255)
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL")


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    picture = open_picture(data, "x")
    assert picture.mode == "RGB"
    return tuple(np.asarray(picture)[at[::-1]].tolist())


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
    assert [pixel(data, at) for at in ((0, 0), (4, 4), (8, 8))] == [WHITE, (200, 0, 100), (244, 204, 224)]


def test_grey_with_alpha_and_transparent_colours():
    assert pixel(encoded(Image.new("LA", (9, 9), (100, 51)), "PNG")) == (224, 224, 224)
    assert pixel(encoded(Image.new("L", (9, 9), 100), "PNG", transparency=100)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == WHITE


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    """Pillow writes JPEG's CMYK as Adobe does, inverted, and TIFF's as it is."""
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 51)), format, quality=100)
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
        data = encoded(red, format, save_all=True, append_images=[blue])
        assert np.allclose(pixel(data), (255, 0, 0), atol=3)


# Damage that leaves every pixel whole

BAD_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 40


def segment(marker: int, data: bytes) -> bytes:
    """Of a JPEG file."""
    return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    """Of a PNG file; `damage` is that of its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def harmless_damage() -> dict[str, tuple[bytes, bytes]]:
    """(damaged file, intact file)"""
    image = noise(64, 48)
    jpeg, progressive, png = (encoded(image, "JPEG"), encoded(image, "JPEG", progressive=True), encoded(image, "PNG"))
    restarts = encoded(image, "JPEG", restart_marker_rows=1)
    grey = encoded(image.convert("L"), "JPEG", quality=100, optimize=True)
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    transparent = encoded(alpha, "PNG")
    bomb = zlib.compress(bytes(3 << 20))
    damaged = {
        **{f"JPEG with a bad {name}": (jpeg[:2] + segment(marker, data) + jpeg[2:], jpeg) for name, marker, data in (
            ("EXIF", 0xE1, BAD_EXIF), ("ICC", 0xE2, b"ICC_PROFILE\0"), ("ICC count", 0xE2, b"ICC_PROFILE\0\x05\x09x"),
            ("MPO index", 0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"), ("JFIF", 0xE0, b"JFIF"), ("Adobe", 0xEE, b"Adobe"),
            ("Photoshop block", 0xED, b"Photoshop 3.0\0008BIM\x04\x04"), ("comment", 0xFE, b""))},
        **{f"{kind} without {name}": (whole[:-cut] + tail, whole)
           for kind, whole in (("JPEG", jpeg), ("progressive JPEG", progressive), ("JPEG with restarts", restarts),
                               ("grey JPEG", grey))
           for name, cut, tail in (("its end marker", 2, b""), ("half of its end marker", 1, b""),
                                   ("its end marker, then zeros", 2, bytes(500)),
                                   ("its end marker, then an erased block", 2, b"\xff" * 500))},
        "JPEG with a bad ICC and without its end": (
            jpeg[:2] + segment(0xE2, b"ICC_PROFILE\0") + jpeg[2:-2], jpeg),
        "JPEG with a tail": (jpeg + b"garbage" * 99, jpeg),
        **{f"PNG with {name}": (png[:33] + chunk(kind, data, damage) + png[33:], png) for name, kind, data, damage in (
            ("a large zTXt", b"zTXt", b"k\0\0" + bomb, 0), ("a large iTXt", b"iTXt", b"k\0\1\0\0\0" + bomb, 0),
            ("a large ICC", b"iCCP", b"k\0\0" + bomb, 0), ("an empty ICC", b"iCCP", b"", 0),
            ("an ICC of another compression", b"iCCP", b"k\0\7abc", 0), ("a damaged text", b"tEXt", b"k\0v", 1),
            ("a damaged time", b"tIME", b"1234567", 1), ("a damaged EXIF", b"eXIf", BAD_EXIF[6:], 1),
            ("a short pHYs", b"pHYs", b"\0", 0), ("a bad name of a chunk", b"a\xff\0b", b"", 0))},
        "PNG with a large text at its end": (png[:-12] + chunk(b"zTXt", b"k\0\0" + bomb) + png[-12:], png),
        "PNG cut within a text at its end": (png[:-12] + chunk(b"tEXt", b"k\0" + bytes(30))[:-20], png),
        "PNG without its end": (png[:-12], png), "PNG with a tail": (png + b"garbage" * 99, png),
        "transparent PNG with a damaged text": (transparent[:33] + chunk(b"tEXt", b"k\0v", 1) + transparent[33:],
                                                transparent),
        "TIFF with unknown tags": (encoded(image, "TIFF", tiffinfo={65000: "mine" * 9, 700: b"\xff\xfe"}), png),
    }
    return damaged | {f"{format} with a tail": (encoded(image, format) + b"garbage" * 99, encoded(image, format))
                      for format in ("GIF", "BMP", "TIFF", "WEBP")}


@pytest.mark.parametrize("damaged, intact", harmless_damage().values(), ids=list(harmless_damage()))
def test_damage_that_leaves_every_pixel_whole_does_not_matter(damaged, intact):
    assert damaged != intact
    assert np.array_equal(np.asarray(open_picture(damaged, "x")), np.asarray(open_picture(intact, "x")))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_orientation_survives_damage_elsewhere(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = noise(48, 32)
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), format, exif=exif)
    bad = segment(0xE2, b"ICC_PROFILE\0") if format == "JPEG" else chunk(b"tEXt", b"k\0v", 1)
    start = 2 if format == "JPEG" else 33
    damaged = open_picture(data[:start] + bad + data[start:], "x")
    assert damaged.size == (48, 32) and np.array_equal(np.asarray(damaged), np.asarray(open_picture(data, "x")))


@pytest.mark.parametrize("options", [
    {}, {"quality": 100, "subsampling": 0}, {"progressive": True}, {"progressive": True, "quality": 100},
    {"restart_marker_rows": 1}, {"restart_marker_blocks": 2, "progressive": True}], ids=str)
def test_a_jpeg_that_lacks_pixels_is_refused_wherever_it_ends(options):
    """Also at a restart marker, or between the scans of a progressive one."""
    whole = encoded(noise(96, 72), "JPEG", **options)
    markers = [match.start() + shift for match in re.finditer(rb"\xff[^\x00\xff]", whole[:-2]) for shift in (0, 2)]
    for cut in {len(whole) - lacking for lacking in (4, 5, 10, 40)} | set(markers[1:]):
        with pytest.raises(BadInput, match="^x: "):
            open_picture(whole[:cut], "x")


@pytest.mark.parametrize("data, reason", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
     "a Git LFS pointer, not the picture; run git lfs pull"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC; convert it to JPEG"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC; convert it to JPEG"),
    (b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(99), "a video (MP4 or MOV); remove it"),
    (b"RIFF\0\0\0\0AVI LIST" + bytes(99), "a video or a sound (RIFF); remove it"),
    (b"<!DOCTYPE html><title>404</title>",
     "a web page, not an image; download the image again, or remove it"),
    (b"cats on a mat\n", "a text file, not an image; remove it"),
    (b"%PDF-1.7\n", "not an image but a PDF document; remove it, or convert its pages to PNG"),
    (b"\xff\xd8\xff", "JPEG that is damaged, or of a kind that cannot be read; restore, convert or remove it"),
    (bytes(128) + b"DICM" + bytes(99), "DICOM; convert it to PNG"),
    (bytes(2000), f"not an image (formats: {', '.join(FORMATS)}); remove it")])
def test_what_is_no_picture_is_called_what_it_is(data, reason):
    with pytest.raises(BadInput) as caught:
        open_picture(data, "train/a/7.jpg")
    assert str(caught.value) == f"train/a/7.jpg: {reason}"


def test_a_pointer_of_git_lfs_is_recognised_by_its_beginning():
    assert is_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid")
    assert not is_lfs_pointer(b"version 1") and not is_lfs_pointer(b"")


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow was built without AVIF")
def test_avif():
    image = Image.new("RGBA", (16, 16), (200, 0, 100, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    data = encoded(image, "AVIF", quality=100)
    assert np.allclose([pixel(data, at) for at in ((2, 8), (13, 8))], [WHITE, (200, 0, 100)], atol=4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_photographs_of_phones_are_read():
    """108 megapixels, and more than Pillow's warning allows; 4 bytes a pixel are in memory."""
    assert MAX_PIXELS == 2 * 89_478_485
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 9000, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1501 * 9000))) + chunk(b"IEND", b"")
    assert encoded_frame(data, "x", 4, 4, "nearest").tolist() == np.zeros((4, 4, 3)).tolist()


def test_large_pictures_are_decoded_a_few_at_a_time(monkeypatch):
    held, most = 0, 0

    def watch(encoded, name):
        nonlocal held, most
        held += 1
        most = max(most, held)
        time.sleep(.02)
        held -= 1
        return noise(40, 30)

    monkeypatch.setattr(decoding, "open_picture", watch)
    noisy = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)), "PNG")
    for limit, expected in ((100, 4), (decoding.LARGE_PIXELS, 8)):
        most = 0
        monkeypatch.setattr(decoding, "LARGE_PIXELS", limit)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: encoded_frame(noisy, "x", 8, 8, "nearest"), range(16)))
        assert most == expected


# What is refused

def broken_files() -> dict[str, bytes]:
    image = noise(64, 48)
    whole = {format: encoded(image, format) for format in FORMATS}
    whole["deflated TIFF"] = encoded(image, "TIFF", compression="tiff_deflate")
    broken = {f"{format} cut to {part:.0%}": data[:int(len(data) * part)]
              for format, data in whole.items() for part in (.1, .5, .9)}
    return broken | {
        "empty": b"", "text": b"not an image at all", "zeros": bytes(2000), "JPEG magic": b"\xff\xd8\xff",
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
    """A child's peak memory, in MB over what it had: a 200-megapixel RGB picture is 600 MB when decoded."""
    child = textwrap.dedent("""
        import io, resource, struct, zlib
        from PIL import Image
        from kd import BadInput
        from kd.data.decoding import open_picture
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0))
        bomb = b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
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
    config = timm.data.resolve_data_config({
        "input_size": (3, size, size), "crop_pct": crop_pct, "interpolation": interpolation,
        "mean": (0, 0, 0), "std": (1, 1, 1)})
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
    monkeypatch.setattr("kd.data.decoding.MAX_RESIZED_PIXELS", 1)
    assert np.abs(to_frame(picture, 20, 25, "bicubic") - whole).max() <= 1


@pytest.mark.skipif(not BEANS, reason="KD_BEANS does not name the folder of the real photographs")
@pytest.mark.parametrize("model, size", [
    ("mobilenetv2_100", 224), ("tf_efficientnet_lite0", 128), ("resnet50", 97)])
def test_real_photographs_equal_timms_eval_transform(model, size):
    pretrained = timm.get_pretrained_cfg(model)
    assert pretrained is not None
    declared = timm.data.resolve_data_config(pretrained_cfg=pretrained.to_dict())
    samples = open_dataset(BEANS, say=lambda _: None).splits["test"]
    for index in range(0, 128, 32):
        data = samples.read(index)
        assert isinstance(data, bytes)
        args = size, declared["crop_pct"], declared["interpolation"]
        theirs = timm_eval(Image.open(io.BytesIO(data)).convert("RGB"), *args)
        assert np.abs(ours(open_picture(data, "x"), *args) - theirs).max() == 0
