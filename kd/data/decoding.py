"""One picture: encoded bytes → upright RGB → a frame of R × R pixels.

A *frame* is the picture resized so that its shorter side has R = floor(size / crop_pct) pixels, cut
to its central R × R window. The crop of `size` pixels about its centre is, pixel for pixel, what
timm's eval transform (Resize, CenterCrop) makes of the file. Random crops use the rest as well.
"""

import io
import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from kd import BadInput

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)

# Pillow warns of many pixels, which open_picture refuses at its own limit, and of metadata, which is not used here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_picture(encoded: bytes, name: str) -> Image.Image:
    """Encoded bytes → upright RGB picture.

    Alpha is composited over white, 16-bit greyscale is scaled to 8 bits, CMYK is converted, and the
    EXIF orientation is applied. An animation gives its first picture. The format is found from the
    bytes, not from the file's extension.

    Raises BadInput, which begins with `name`, for anything else: truncated, empty, another format,
    too many pixels.
    """
    if not encoded:
        raise BadInput(f"{name}: the image is empty; restore or remove it")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:     # from the header: nothing has been decoded yet
            raise Image.DecompressionBombError(f"{image.width} × {image.height}")
        image.load()
        with suppress(Exception):   # the pixels may be fine although the EXIF block is unreadable
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadInput(f"{name}: too many pixels ({error}; the limit is {MAX_PIXELS:,}); scale or remove it"
                       ) from error
    except Image.UnidentifiedImageError as error:
        raise BadInput(f"{name}: not an image (formats: {', '.join(FORMATS)}); remove it") from error
    except Exception as error:      # given hostile bytes, Pillow's decoders raise nearly anything
        raise BadInput(f"{name}: the image cannot be decoded ({error or type(error).__name__}); "
                       "restore or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    # 16 and 32 bits: Pillow's own conversion would clip the values at 255 instead of scaling them.
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_8_bits(np.asarray(image), 65535)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        return Image.fromarray(_scale_to_8_bits(values, _white_level(image, values))).convert("RGB")

    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:     # an alpha channel, or one transparent colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_to_8_bits(values: np.ndarray, white: float) -> np.ndarray:
    return (values.astype(np.float32) * np.float32(255 / white) + np.float32(.5)).astype(np.uint8)


def _white_level(image: Image.Image, values: np.ndarray) -> float:
    """The value that means white in 32-bit greyscale.

    The file does not say. We take the smallest of the usual levels that no pixel exceeds.
    """
    if image.mode == "I" and image.format == "PPM":     # Pillow scales these to 16 bits, whatever their maximum
        return 65535
    if not (values.min() >= 0 and values.max() <= 65535):   # true for NaN as well
        raise ValueError(f"{values.dtype} greyscale outside of 0 to 65535; convert it to 8 or 16 bits")
    levels = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return next(level for level in levels if values.max() <= level)


def to_frame(image: Image.Image, size: int, side: int, interpolation: str) -> np.ndarray:
    """RGB picture → (side, side, 3) uint8: the shorter side resized to `side`, then the central window.

    `size` is that of the crop which is later taken from the centre of the window.

    On a side of L pixels, torchvision's CenterCrop starts at round((L - size) / 2). The window
    starts where the same rule, applied to the window, arrives at the same pixel. Python rounds
    halves to even, so this is not always round((L - side) / 2).
    """
    short = min(image.size)
    columns, rows = (side if length == short else int(side * length / short) for length in image.size)
    margin = round((side - size) / 2)
    left, top = (round((length - size) / 2) - margin for length in (columns, rows))
    resample = Image.Resampling[interpolation.upper()]
    if columns * rows <= MAX_PIXELS:
        frame = image.resize((columns, rows), resample).crop((left, top, left + side, top + side))
    else:   # a sliver such as 1 × 100000, which would not fit into memory when resized as a whole
        x_scale, y_scale = image.width / columns, image.height / rows
        box = left * x_scale, top * y_scale, (left + side) * x_scale, (top + side) * y_scale
        frame = image.resize((side, side), resample, box)
    return np.asarray(frame)
