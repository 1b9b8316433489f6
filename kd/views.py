"""Views: the augmentation of a sample, fixed by `(seed, sample, view)` and by nothing else.

A view must be made again, bit for bit, by any worker, in any batch order, after a resume, and once for the teacher
and once for the student ("a good teacher is patient and consistent", Beyer et al. 2022: both must see the same
crop). So every random number here is a hash of a key (counter-based, after Salmon et al. 2011), never a draw from a
generator with state; and every pixel is computed by elementwise operations, whose rounding does not depend on which
other samples share the batch.

The random numbers are made on the host (some ten a sample); the pixels are made in one batch on the device.
"""

import hashlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# what is kept under a view's key is good only for the code that made it
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class Spec(NamedTuple):
    """What a view may do. All zero is the identity: the centre crop of evaluation."""

    crop: float = 0.0     # smallest area of the random resized crop, as a share of the frame; 0: the centre crop
    flip: float = 0.0     # probability of a left-right flip, and of an up-down flip
    colour: float = 0.0   # brightness, contrast and saturation each move by a factor in [1 - colour, 1 + colour]
    mixup: float = 0.0    # samples are mixed with a partner at a share uniform in [0, mixup / 2]; 0: none


SPECS = {
    "none": Spec(),
    "flip": Spec(flip=0.5),
    "crop": Spec(crop=0.35, flip=0.5, colour=0.2),
    "mixup": Spec(crop=0.35, flip=0.5, colour=0.2, mixup=1.0),
}


def mix_bits(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that looks random."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, samples: np.ndarray, view: int, count: int) -> np.ndarray:
    """`(B, count)` float64 in [0, 1): number j of sample i is a hash of (seed, samples[i], view, j)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        key = mix_bits(np.array([seed], np.uint64) * golden + np.uint64(1))
        key = mix_bits(key ^ (np.array([view], np.uint64) * golden + np.uint64(2)))
        key = mix_bits(key ^ (samples.astype(np.uint64)[:, None] * golden + np.uint64(3)))
        bits = mix_bits(key + golden * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def epoch_batches(seed: int, epoch: int, samples: int, batch_size: int) -> list[np.ndarray]:
    """The batches of an epoch, each int64 `(B,)` of sample numbers: a shuffle that depends on (seed, epoch) alone.

    The last may be short, down to half a batch; a shorter one joins the batch before it. So every batch can be shared
    by as many ranks as half a batch has samples, and BatchNorm never meets one sample alone.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
    cuts = list(range(batch_size, samples, batch_size))
    if cuts and samples - cuts[-1] < max(2, batch_size / 2):
        cuts.pop()
    return np.split(order, cuts)


def partners(seed: int, samples: np.ndarray, view: int, total: int, mixup: float) -> tuple[np.ndarray, np.ndarray]:
    """Mixup's other half: for each sample a partner among all `total`, and its share, uniform in [0, mixup / 2]."""
    draw = uniforms(seed, samples, view, 12)[:, 10:]
    return np.minimum((draw[:, 0] * total).astype(np.int64), total - 1), draw[:, 1] * mixup / 2


def make_views(frames: Tensor, samples: np.ndarray, *, seed: int, view: int, size: int, spec: Spec) -> Tensor:
    """One view of each sample.

    frames: uint8 `(B, R, R, 3)`, the decoded samples; samples: int64 `(B,)`, their numbers in the split.
    Returns uint8 `(B, 3, size, size)`, channels_last, on the device of `frames`. Mixup is not done here: it takes
    two views (`mix`).
    """
    side = frames.shape[1]
    if spec.crop == 0:  # the very pixels of the evaluation transform; a flip only reorders them
        offset = round((side - size) / 2)
        views = frames[:, offset:offset + size, offset:offset + size].permute(0, 3, 1, 2)
        if spec.flip:
            draw = uniforms(seed, samples, view, 10)
            for column, dim in ((4, 3), (5, 2)):
                chosen = torch.from_numpy(draw[:, column] < spec.flip).to(frames.device)
                views = torch.where(chosen[:, None, None, None], views.flip(dim), views)
        return views.contiguous(memory_format=torch.channels_last)
    draw = uniforms(seed, samples, view, 10)
    left, top, width, height = crop_boxes(draw[:, :4], spec.crop)
    flip_x, flip_y = draw[:, 4] < spec.flip, draw[:, 5] < spec.flip
    # output pixel i looks at left + (i + 1/2) / size * width, in units of the frame; a flip runs the other way
    start = np.stack([np.where(flip_x, left + width, left), np.where(flip_y, top + height, top)], 1)
    extent = np.stack([np.where(flip_x, -width, width), np.where(flip_y, -height, height)], 1)
    jitter = 1 + spec.colour * (2 * draw[:, 6:9] - 1)
    numbers = torch.from_numpy(np.concatenate([start, extent, jitter], 1).astype(np.float32)).to(frames.device)

    steps = (torch.arange(size, device=frames.device, dtype=torch.float32) + 0.5) / size
    at = numbers[:, :2, None] + steps * numbers[:, 2:4, None]           # (B, 2, size), in [0, 1]
    at = at * 2 - 1                                                     # grid_sample's coordinates
    grid = torch.stack([at[:, 0, None, :].expand(-1, size, -1), at[:, 1, :, None].expand(-1, -1, size)], dim=-1)
    pixels = frames.permute(0, 3, 1, 2).float()                         # channels_last float, 0 .. 255
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if spec.colour:
        brightness, contrast, saturation = (numbers[:, j, None, None, None] for j in (4, 5, 6))
        # weights of Rec. 601 luma; contrast turns about mid-grey, not about the picture's mean, whose sum would be
        # rounded differently in another batch
        grey = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
        pixels = ((pixels - grey) * saturation + grey) * brightness
        pixels = (pixels - 127.5) * contrast + 127.5
    return pixels.round_().clamp_(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def crop_boxes(draw: np.ndarray, smallest: float) -> tuple[np.ndarray, ...]:
    """Random resized crop (Szegedy et al. 2015): area uniform in [smallest, 1], aspect log-uniform in [3/4, 4/3].

    draw: `(B, 4)` uniforms. Returns left, top, width, height, each `(B,)`, as shares of the frame. A box that would
    stick out is narrowed to the frame instead of drawn again: every view takes the same count of random numbers.
    """
    area = smallest + (1 - smallest) * draw[:, 0]
    aspect = np.exp((2 * draw[:, 1] - 1) * np.log(4 / 3))
    width, height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    return draw[:, 2] * (1 - width), draw[:, 3] * (1 - height), width, height


def mix(views: Tensor, others: Tensor, share: np.ndarray) -> Tensor:
    """Mixup (Zhang et al. 2018) of two uint8 batches `(B, 3, H, W)`: `others` enters with `share` `(B,)` in [0, 1]."""
    weight = torch.from_numpy(share.astype(np.float32)).to(views.device)[:, None, None, None]
    mixed = views.float() * (1 - weight) + others.float() * weight
    return mixed.round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)


def load_views(read: Callable[[np.ndarray], np.ndarray], total: int, samples: np.ndarray, *, seed: int, view: int,
               size: int, spec: Spec, device: torch.device) -> Tensor:
    """Read the frames of `samples` and make one view of each, mixed with its partner's where `spec` says so.

    read: sample numbers to uint8 frames `(B, R, R, 3)`; total: how many samples there are to take partners from.
    Returns uint8 `(B, 3, size, size)`, channels_last, on `device`.
    """
    def views_of(numbers: np.ndarray) -> Tensor:
        frames = torch.from_numpy(read(numbers))
        if device.type == "cuda":  # from a pinned source the host need not wait for the copy
            frames = frames.pin_memory().to(device, non_blocking=True)
        return make_views(frames, numbers, seed=seed, view=view, size=size, spec=spec)

    if not spec.mixup:
        return views_of(samples)
    others, share = partners(seed, samples, view, total, spec.mixup)
    return mix(views_of(samples), views_of(others), share)


def mixed_labels(labels: np.ndarray, others: np.ndarray, share: np.ndarray, classes: int) -> np.ndarray:
    """Class probabilities float32 `(B, C)`: one-hot labels, mixed as the pictures were."""
    eye = np.eye(classes, dtype=np.float32)
    weight = share.astype(np.float32)[:, None]
    return eye[labels] * (1 - weight) + eye[others] * weight
