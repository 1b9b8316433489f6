"""One picture: encoded bytes → upright RGB → a frame of R × R pixels.

A *frame* is the picture resized so that its shorter side has R = floor(size / crop_pct) pixels, cut to its
central R × R window. The crop of `size` pixels about its centre is, pixel for pixel, what timm's eval
transform (Resize, CenterCrop) makes of the file; the rest of the frame is what random crops draw from.
"""

import hashlib
import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, features

from kd import BadInput

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)

# Pillow warns of many pixels, which open_picture refuses at its own limit, and of metadata, which it ignores.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_picture(encoded: bytes, where: str) -> Image.Image:
    """Encoded bytes → upright RGB picture.

    Alpha is composited over white, 16-bit greyscale scaled to 8 bits, CMYK converted, EXIF orientation
    applied, and of an animation the first picture taken. The format is found from the bytes, not from the
    name. Raises BadInput that begins with `where` for anything else: truncated, empty, another format, too
    many pixels.
    """
    if not encoded:
        raise BadInput(f"{where}: the image is empty; restore or remove it")
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:  # by the header: nothing has been decoded yet
            raise Image.DecompressionBombError(f"{image.width} × {image.height}")
        image.load()
        with suppress(Exception):  # an unreadable EXIF block says nothing against the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return _rgb(image)
    except Image.DecompressionBombError as error:
        raise BadInput(f"{where}: too many pixels ({error}; the limit is {MAX_PIXELS:,}); scale or remove it"
                       ) from error
    except Image.UnidentifiedImageError as error:
        raise BadInput(f"{where}: not an image (formats: {', '.join(FORMATS)}); remove it") from error
    except Exception as error:  # given hostile bytes, Pillow's decoders raise nearly anything
        raise BadInput(f"{where}: the image cannot be decoded ({error or type(error).__name__}); "
                       "restore or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), 65535)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        return Image.fromarray(_eight_bits(values, _white(image, values))).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:  # an alpha channel, or one transparent colour
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, white: float) -> np.ndarray:
    return (values.astype(np.float32) * np.float32(255 / white) + np.float32(.5)).astype(np.uint8)


def _white(image: Image.Image, values: np.ndarray) -> float:
    """The value that means white in 32-bit greyscale. No file says: the least of the usual ones that fits."""
    if image.mode == "I" and image.format == "PPM":  # Pillow scales these to 16 bits, whatever their maximum
        return 65535
    if not (values.min() >= 0 and values.max() <= 65535):  # also NaN
        raise ValueError(f"{values.dtype} greyscale outside of 0 to 65535; convert it to 8 or 16 bits")
    return next(white for white in ((1, 255, 65535) if image.mode == "F" else (255, 65535))
                if values.max() <= white)


def to_frame(image: Image.Image, size: int, side: int, interpolation: str) -> np.ndarray:
    """RGB picture → (side, side, 3) uint8: shorter side resized to `side`, then the window about the centre.

    Of a side of L pixels torchvision's CenterCrop starts at round((L - size) / 2). The window starts where
    the same rule, applied to the window, arrives at the same pixel; Python rounds halves to even, so that
    this is not round((L - side) / 2).
    """
    short = min(image.size)
    columns, rows = (side if length == short else int(side * length / short) for length in image.size)
    margin = round((side - size) / 2)
    left, top = (round((length - size) / 2) - margin for length in (columns, rows))
    resample = Image.Resampling[interpolation.upper()]
    if columns * rows <= MAX_PIXELS:
        frame = image.resize((columns, rows), resample).crop((left, top, left + side, top + side))
    else:  # a sliver such as 1 × 100000: the whole of it would not fit into memory at this scale
        across, down = image.width / columns, image.height / rows
        box = left * across, top * down, (left + side) * across, (top + side) * down
        frame = image.resize((side, side), resample, box)
    return np.asarray(frame)


@dataclass(frozen=True)
class FrameSpec:
    """How the pictures of one split become frames."""

    samples: Any  # a kd.samples.Samples
    size: int
    side: int
    interpolation: str

    def frame(self, index: int) -> np.ndarray:
        """Sample `index` → (side, side, 3) uint8. Raises BadInput that names the sample."""
        try:
            source = self.samples.read(index)
        except OSError as error:
            raise BadInput(f"{self.samples.where(index)}: it cannot be read ({error.strerror})") from error
        image = open_picture(source, self.samples.where(index)) if isinstance(source, bytes) else source
        return to_frame(image, self.size, self.side, self.interpolation)

    def stamp(self) -> bytes:
        """(32,) hash of everything that decides the frames."""
        decides = (self.samples.identity, len(self.samples), self.size, self.side, self.interpolation,
                   Image.__version__, features.version_codec("jpg"), np.__version__)
        return hashlib.sha256(repr(decides).encode()).digest()
