"""One picture: encoded bytes → upright RGB → a frame of R × R pixels.

A *frame* is the picture resized so that its shorter side has R = floor(size / crop_pct) pixels, cut
to its central R × R window. The crop of `size` pixels about its centre is, pixel for pixel, what
timm's eval transform (Resize, CenterCrop) makes of the file. Random crops use the rest as well.
"""

import io
import threading
import warnings
from contextlib import nullcontext, suppress

import numpy as np
from PIL import Image, ImageOps, features

from kd import BadInput
from kd.data.repair import without_damage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM") + (("AVIF",) if features.check("avif") else ())
MAX_PIXELS = 178_956_970        # Pillow's own limit, unless somebody changes it
MAX_RESIZED_PIXELS = 100_000_000
INTERPOLATIONS = tuple(name.lower() for name in Image.Resampling.__members__)

# A picture takes 4 bytes a pixel, and 8 while it is turned upright. Of large ones, only a few at a time are in memory,
# however many threads decode.
LARGE_PIXELS = 64_000_000
LARGE_AT_A_TIME = threading.Semaphore(4)

# Pillow warns of many pixels, which open_picture refuses at its own limit, and of metadata, which is not used here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def encoded_frame(encoded: bytes, name: str, size: int, side: int, interpolation: str) -> np.ndarray:
    """Encoded bytes → a frame: `to_frame` of `open_picture`, with a bound on the memory of many threads."""
    with LARGE_AT_A_TIME if _is_large(encoded) else nullcontext():
        return to_frame(open_picture(encoded, name), size, side, interpolation)


def _is_large(encoded: bytes) -> bool:
    if len(encoded) < 1 << 16:      # too few bytes for so many pixels, unless nearly all are equal
        return False
    with suppress(Exception):       # open_picture says what is wrong with the file
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        return image.width * image.height > LARGE_PIXELS
    return False


def open_picture(encoded: bytes, name: str) -> Image.Image:
    """Encoded bytes → upright RGB picture.

    Alpha is composited over white, 16-bit greyscale is scaled to 8 bits, CMYK is converted, and the
    EXIF orientation is applied. An animation gives its first picture. The format is found from the
    bytes, not from the file's extension. Damage that leaves every pixel whole does not matter, such
    as that of metadata.

    Raises BadInput, which begins with `name`, for anything else: truncated, empty, another format,
    too many pixels.
    """
    if not encoded:
        raise BadInput(f"{name}: the image is empty; restore or remove it")
    try:
        return _decode(encoded)
    except Image.DecompressionBombError as error:
        raise BadInput(f"{name}: too many pixels ({error}; the limit is {MAX_PIXELS:,}); scale or remove it"
                       ) from error
    except Exception as error:      # given hostile bytes, Pillow's decoders raise nearly anything
        with suppress(Exception):
            for repaired in without_damage(encoded):
                with suppress(Exception):
                    return _decode(repaired)
        raise BadInput(f"{name}: {_reason(encoded, error)}") from error


def _decode(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:     # from the header: nothing has been decoded yet
        raise Image.DecompressionBombError(f"{image.width} × {image.height}")
    image.load()
    with suppress(Exception):   # the pixels may be fine although the EXIF block is unreadable
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


# Why a file is no picture

OTHER_FILES = {     # how they begin
    b"\0\0\0\x0cJXL ": "JPEG XL; convert it to JPEG or PNG",
    b"\xff\x0a": "JPEG XL; convert it to JPEG or PNG",
    b"\0\0\0\x0cjP  ": "JPEG 2000; convert it to JPEG or PNG",
    b"\xff\x4f\xff\x51": "JPEG 2000; convert it to JPEG or PNG",
    b"8BPS": "a Photoshop document; convert it to JPEG or PNG",
    b"%PDF": "a PDF document; remove it, or convert its pages to PNG",
    b"\x93NUMPY": "a NumPy array; convert it to PNG",
    b"\x1aE\xdf\xa3": "a video (Matroska or WebM); remove it",
    b"PK\3\4": "a ZIP archive; unpack or remove it",
    b"\x1f\x8b": "a gzip archive; unpack or remove it",
}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
FORMATS_THAT_BEGIN = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so is only Git LFS's pointer to the content, as a clone without Git LFS has it."""
    return beginning.startswith(b"version https://git-lfs.github.com/spec/")


def _reason(encoded: bytes, error: Exception) -> str:
    """What the file is, or what is wrong with it; and what to do."""
    if not isinstance(error, Image.UnidentifiedImageError):
        return f"the image cannot be decoded ({error or type(error).__name__}); restore or remove it"
    if is_lfs_pointer(encoded):
        return "a Git LFS pointer, not the picture; run git lfs pull"
    for beginning, kind in OTHER_FILES.items():
        if encoded.startswith(beginning):
            return f"not an image but {kind}"
    for beginning, format in FORMATS_THAT_BEGIN.items():
        if encoded.startswith(beginning):
            return f"{format} that is damaged, or of a kind that cannot be read; restore, convert or remove it"
    if encoded[4:8] == b"ftyp":
        return _reason_of_boxes(encoded)
    if encoded.startswith(b"RIFF"):
        return ("a damaged WEBP image; restore or remove it" if encoded[8:12] == b"WEBP" else
                "a video or a sound (RIFF); remove it")
    if encoded[128:132] == b"DICM":
        return "DICOM; convert it to PNG"
    return _reason_of_text(encoded)


def _reason_of_boxes(encoded: bytes) -> str:
    """Of a file whose first box names its brand and the brands that it is compatible with (ISO 14496-12)."""
    end = int.from_bytes(encoded[:4], "big")
    brands = {encoded[place:place + 4] for place in range(8, min(end, len(encoded), 256), 4)}
    if brands & HEIC_BRANDS:
        return "HEIC; convert it to JPEG"
    if brands & {b"avif", b"avis"}:
        return ("a damaged AVIF image; restore or remove it" if "AVIF" in FORMATS else
                "AVIF, which this Pillow cannot read; install a newer one, or convert it to JPEG")
    if brands & {b"mif1", b"msf1"}:
        return "HEIF; convert it to JPEG"
    if b"crx " in brands:
        return "a camera's raw file; convert it to JPEG"
    return "a video (MP4 or MOV); remove it"


def _reason_of_text(encoded: bytes) -> str:
    start = encoded[:1000].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        return "not an image of pixels but SVG; convert it to PNG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image; download the image again, or remove it"
    with suppress(UnicodeDecodeError):
        if encoded[:1000].decode("ascii").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
            return "a text file, not an image; remove it"
    return f"not an image (formats: {', '.join(FORMATS)}); remove it"


# Pixels

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
    return image if image.mode == "RGB" else image.convert("RGB")


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
    if columns * rows <= MAX_RESIZED_PIXELS:
        frame = image.resize((columns, rows), resample).crop((left, top, left + side, top + side))
    else:   # a sliver such as 1 × 100000, which would not fit into memory when resized as a whole
        x_scale, y_scale = image.width / columns, image.height / rows
        box = left * x_scale, top * y_scale, (left + side) * x_scale, (top + side) * y_scale
        frame = image.resize((side, side), resample, box)
    return np.asarray(frame)
