"""kd/data/decoding.py: every kind of file to its right pixels, every frame to those of timm's transform."""

import io
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from kd import BadInput
from kd.data.sources import open_dataset
from kd.data.frames import center_crop
from kd.data.decoding import FORMATS, open_picture, to_frame
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
    monkeypatch.setattr("kd.data.decoding.MAX_PIXELS", 1)
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
