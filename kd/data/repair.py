"""Pictures whose pixels are whole, although Pillow refuses their files for damage elsewhere.

Pillow's own switch for such files, `ImageFile.LOAD_TRUNCATED_IMAGES`, also fills missing pixels with
grey, and counts for all threads of the process. Here the damaged part is taken out of the bytes.
"""

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
END = b"\xff\xd9"       # JPEG's last marker


def without_damage(encoded: bytes) -> Iterator[bytes]:
    """The same picture without its damaged parts, in the order in which to try them. None of them may help.

    In PNG: parts with a wrong checksum, then all but the pixels, palette, transparency and EXIF. In
    JPEG: all metadata but EXIF, XMP and what decides the colours, then those two as well; each of them
    also with the end marker, where only that is missing.
    """
    if encoded.startswith(PNG):
        yield _png(encoded, lambda kind, intact: intact or kind == b"eXIf")
        yield _png(encoded, lambda kind, intact: kind in (b"tRNS", b"eXIf"))
    elif encoded.startswith(JPEG):
        for with_exif in (True, False):
            jpeg = _jpeg_without_metadata(encoded, with_exif)
            yield jpeg
            if complete := with_end_marker(jpeg):
                yield complete


# PNG: https://www.w3.org/TR/png-3/#5Chunk-layout

def _png(encoded: bytes, keep: Callable[[bytes, bool], bool]) -> bytes:
    """The critical chunks, and the ancillary ones for which `keep(kind, intact)` is true.

    A critical chunk stays as it is, with its checksum, so that Pillow refuses a damaged one. A chunk
    that the file's end cuts off is left out; if it holds pixels, Pillow finds that they are too few.
    """
    parts, position = [PNG], len(PNG)
    while position + 12 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        chunk = encoded[position:position + length + 12]
        if len(chunk) < length + 12:
            break
        checksum = struct.pack(">I", zlib.crc32(chunk[4:-4]))
        ancillary = kind[0] & 0x20      # a small first letter
        if not ancillary:
            parts.append(chunk)
        elif keep(kind, chunk[-4:] == checksum):
            parts.append(chunk[:-4] + checksum)
        position += len(chunk)
        if kind == b"IEND":
            break
    return b"".join(parts)


# JPEG: https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annex B

APP0, APP1, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
SCAN, RESTARTS, PICTURE_END = 0xDA, 0xDD, 0xD9
FRAMES = (0xC0, 0xC1, 0xC2)     # baseline, extended sequential and progressive, all with Huffman codes
MARKER, MARKER_AFTER_PIXELS = re.compile(rb"\xff([^\x00\xff])"), re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment; a scan's includes its pixels. Ends where none can be read."""
    position = 2
    while match := MARKER.search(jpeg, position):
        marker, start = match[1][0], match.end() - 2
        if marker == PICTURE_END or len(jpeg) < start + 4:
            return
        end = start + 2 + int.from_bytes(jpeg[start + 2:start + 4], "big")
        if end > len(jpeg):
            return
        if marker == SCAN:      # its pixels reach to the next marker that is no restart
            following = MARKER_AFTER_PIXELS.search(jpeg, end)
            end = following.start() if following else len(jpeg)
        yield marker, start, end
        position = end


def _jpeg_without_metadata(jpeg: bytes, with_exif: bool) -> bytes:
    """Without comments and application data up to the first scan, but for what the decoder itself reads."""
    parts, copied = [], 0
    for marker, start, end in _segments(jpeg):
        if marker == SCAN:
            break
        decides_colours = (marker == APP0 and end - start >= 18) or (marker == APP14 and end - start >= 16)
        if (APP0 <= marker <= APP15 or marker == COMMENT) and not decides_colours and not (
                with_exif and marker == APP1):
            parts.append(jpeg[copied:start])
            copied = end
    return b"".join([*parts, jpeg[copied:]])


def with_end_marker(jpeg: bytes) -> bytes | None:
    """The picture with its end marker, where it lacks only that; None where pixels are missing as well.

    We put other bytes in front of a new end marker. If a pixel lacks a single bit, then it takes that
    bit from them, and the picture changes.
    """
    jpeg = jpeg.rstrip(b"\xff")     # half a marker, or an erased block of a memory card
    if not _all_scans_are_there(jpeg):
        return None
    # Five bits, in all ways, and then others without an order.
    fillings = [bytes([number << 3 | 2]) + hashlib.sha512(bytes([number])).digest().replace(b"\xff", b"\x5a")
                for number in range(32)]
    picture = _pixels(jpeg + END)
    same = picture and all(_pixels(jpeg + filling + END) == picture for filling in fillings)
    return jpeg + END if same else None


def _all_scans_are_there(jpeg: bytes) -> bool:
    """Whether the file ends within a scan that has all its parts, and all scans together give all bits.

    A progressive file has several scans: coarse ones first, then ones that refine them.
    """
    sampling: dict[int, tuple[int, int]] = {}   # of each component, horizontal and vertical
    missing: dict[int, np.ndarray] = {}         # of each component, the lowest bits still missing of 64 coefficients
    height = width = interval = end = 0
    whole = False                               # the last segment is a scan with all its restart markers
    for marker, start, end in _segments(jpeg):
        header, whole = jpeg[start + 4:end], False
        if marker in FRAMES:
            height, width, count = struct.unpack_from(">xHHB", header)
            for number, factors, _ in struct.iter_unpack("3B", header[6:6 + 3 * count]):
                sampling[number] = factors >> 4, factors & 15
                missing[number] = np.full(64, 99)
        elif marker == RESTARTS:
            interval = struct.unpack_from(">H", header)[0]
        elif marker == SCAN:
            count = header[0]
            first, last, bits = header[1 + 2 * count:4 + 2 * count]
            components = header[1:1 + 2 * count:2]
            for number in components:
                missing[number][first:last + 1] = bits & 15
            blocks = _blocks(width, height, sampling, components)
            restarts = len(re.findall(rb"\xff[\xd0-\xd7]", header))
            whole = not interval or restarts == -(-blocks // interval) - 1
    return whole and end == len(jpeg) and not any(map(np.any, missing.values()))


def _blocks(width: int, height: int, sampling: dict[int, tuple[int, int]], components: bytes) -> int:
    """How many units (MCU) a scan has: blocks of its only component, or groups of blocks of several."""
    across, down = (max(factors) for factors in zip(*sampling.values()))
    if len(components) == 1:
        horizontal, vertical = sampling[components[0]]
        return -(-width * horizontal // (8 * across)) * -(-height * vertical // (8 * down))
    return -(-width // (8 * across)) * -(-height // (8 * down))


def _pixels(jpeg: bytes) -> bytes | None:
    """A hash of the pixels; None where they cannot be decoded."""
    try:
        return hashlib.blake2b(Image.open(io.BytesIO(jpeg), formats=("JPEG",)).tobytes()).digest()
    except Exception:       # given hostile bytes, Pillow's decoders raise nearly anything
        return None
