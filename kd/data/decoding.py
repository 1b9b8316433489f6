"""One picture: encoded bytes → upright RGB → a frame of R × R pixels.

A *frame* is the picture resized so that its shorter side has R = floor(size / crop_pct) pixels, cut to its central
R × R window. The crop of `size` pixels about its centre is, pixel for pixel, what timm's eval transform (Resize,
CenterCrop) makes of the file. Random crops use the rest as well.
"""

import io
import threading
import warnings
from contextlib import nullcontext, suppress

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, features

from kd import BadInput

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM") + (("AVIF",) if features.check("avif") else ())
MAX_RESIZED_PIXELS = 100_000_000

# A picture takes 4 bytes a pixel, and 8 while it is turned upright. Of large ones, only a few at a time are in memory,
# however many threads decode.
LARGE_PIXELS = 64_000_000
LARGE_AT_A_TIME = threading.Semaphore(4)

# Pillow warns of many pixels, which it refuses at twice as many, and of metadata, which is not used here.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow refuses a PNG whose colour profile or comment takes more than 1 MB. This is its limit for all of them together.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def frame_of(picture: bytes | Image.Image, name: str, size: int, side: int, interpolation: str) -> np.ndarray:
    """Encoded bytes, or a drawn RGB picture → a frame (`to_frame`). Raises BadInput as `open_picture` does."""
    if isinstance(picture, Image.Image):
        return to_frame(picture, size, side, interpolation)
    with LARGE_AT_A_TIME if _is_large(picture) else nullcontext():
        return to_frame(open_picture(picture, name), size, side, interpolation)


def _is_large(encoded: bytes) -> bool:
    if len(encoded) < 1 << 16:      # too few bytes for so many pixels, unless nearly all are equal
        return False
    with suppress(Exception):       # open_picture says what is wrong with the file
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        return image.width * image.height > LARGE_PIXELS
    return False


def open_picture(encoded: bytes, name: str) -> Image.Image:
    """Encoded bytes → upright RGB picture.

    Alpha is composited over white, 16-bit greyscale is scaled to 8 bits, CMYK is converted, and the EXIF orientation is
    applied. An animation gives its first picture. The format is found from the bytes, not from the file's extension.

    Raises BadInput, which begins with `name`, for anything else: truncated, empty, another format, too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        image.load()
        with suppress(Exception):   # the pixels may be fine although the EXIF block is unreadable
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Exception as error:      # given hostile bytes, Pillow's decoders raise nearly anything
        raise BadInput(f"{name}: {_reason(encoded, error)}") from error


# ---- why a file is no picture --------------------------------------------------------------------------------------

def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so is only Git LFS's pointer to the content, as a clone without Git LFS has it."""
    return beginning.startswith(b"version https://git-lfs.github.com/spec/")


def _reason(encoded: bytes, error: Exception) -> str:
    """What is wrong with the file, and what to do."""
    if not encoded:
        return "the image is empty; restore or remove it"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error}); scale or remove it"
    if not isinstance(error, Image.UnidentifiedImageError):
        return f"the image cannot be decoded ({error or type(error).__name__}); restore or remove it"
    if is_lfs_pointer(encoded):
        return "a Git LFS pointer, not the picture; run git lfs pull"
    if encoded[4:8] == b"ftyp":
        return "HEIC, AVIF or a video, which this Pillow cannot read; convert it to JPEG, or remove it"
    if encoded.lstrip().startswith(b"<"):
        return "a web page or SVG, not an image of pixels; download the image again, or remove it"
    return f"damaged, or not an image (formats: {', '.join(FORMATS)}); restore, convert or remove it"


# ---- pixels ----------------------------------------------------------------------------------------------------------

def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion would clip the values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.float32) * np.float32(255 / 65535) + np.float32(.5)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit greyscale; convert it to 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:     # an alpha channel, or one transparent colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_frame(image: Image.Image, size: int, side: int, interpolation: str) -> np.ndarray:
    """RGB picture → (side, side, 3) uint8: the shorter side resized to `side`, then the central window.

    `size` is that of the crop which is later taken from the centre of the window.

    On a side of L pixels, torchvision's CenterCrop starts at round((L - size) / 2). The window starts where the same
    rule, applied to the window, arrives at the same pixel. Python rounds halves to even, so this is not always
    round((L - side) / 2).
    """
    short = min(image.size)
    columns, rows = (side if length == short else int(side * length / short) for length in image.size)
    margin = round((side - size) / 2)
    left, top = (round((length - size) / 2) - margin for length in (columns, rows))
    resample = Image.Resampling[interpolation.upper()]
    if columns * rows <= MAX_RESIZED_PIXELS:
        frame = image.resize((columns, rows), resample).crop((left, top, left + side, top + side))
    else:   # a sliver such as 1 × 100000, which would not fit into memory when resized as a whole
        x_scale, y_scale = image.width / columns, image.height / rows
        box = left * x_scale, top * y_scale, (left + side) * x_scale, (top + side) * y_scale
        frame = image.resize((side, side), resample, box)
    return np.asarray(frame)
