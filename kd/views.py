"""Views: the augmentation of a sample, fixed by `(seed, sample, view)` and by nothing else.

A view must come out the same, bit for bit, in any worker, in any order of batches, after a resume, and for the teacher
and the student alike. ("A good teacher is patient and consistent", Beyer et al. 2022: both must see the same crop.)

So every random number is a hash of a key (a counter-based generator, Salmon et al. 2011), never a draw from a
generator with state. And every pixel is computed by operations that treat each sample alone, so its rounding does not
depend on which other samples share the batch.

The random numbers are made on the host, about ten a sample. The pixels are made on the device, a batch at a time.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd import augmentations
from kd.augmentations import (AREA, ASPECT, BRIGHTNESS, CONTRAST, FLIP_X, FLIP_Y, LEFT, RANDOM_NUMBERS, SATURATION,
                              TOP, Augmentation)
from kd.data.frames import Split
from kd.machine.devices import host_array, to_device

# The teacher's logits of a view are kept on disk. They are valid only for the code that made the view.
CODE = hashlib.sha256(Path(__file__).read_bytes() + Path(augmentations.__file__).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Views:
    """Which pixels the epochs of a training see."""

    seed: int
    size: int                     # side of the square view, in pixels
    augmentation: Augmentation
    count: int                    # K: how many views a sample has; 0: a fresh one in every epoch

    def index(self, epoch: int) -> int:
        """The view that `epoch` (counted from 0) sees of every sample."""
        return epoch % self.count if self.count else epoch

    def used(self, epochs: int) -> int:
        """How many different views of a sample that many epochs see."""
        return min(self.count or epochs, epochs)


# ---- random numbers from keys --------------------------------------------------------------------------------

def mix_bits(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of uint64 that looks random."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, samples: np.ndarray, view: int, count: int = RANDOM_NUMBERS) -> np.ndarray:
    """`(B, count)` float64 in [0, 1): number j of sample i is a hash of (seed, samples[i], view, j)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        key = mix_bits(np.array([seed], np.uint64) * golden + np.uint64(1))
        key = mix_bits(key ^ (np.array([view], np.uint64) * golden + np.uint64(2)))
        key = mix_bits(key ^ (samples.astype(np.uint64)[:, None] * golden + np.uint64(3)))
        bits = mix_bits(key + golden * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


# ---- one view ------------------------------------------------------------------------------------------------

def make_views(frames: Tensor, samples: np.ndarray, view: int, views: Views) -> Tensor:
    """One view of each sample.

    frames   uint8 `(B, R, R, 3)`, the decoded samples
    samples  int64 `(B,)`, their numbers in the split
    Returns uint8 `(B, 3, size, size)`, channels_last, on the device of `frames`.
    """
    random = uniforms(views.seed, samples, view)
    if views.augmentation.crop == 0:
        assert not views.augmentation.colour, "colour needs a crop: _centre_crops does not change it"
        pixels = _centre_crops(frames, random, views.size, views.augmentation)
    else:
        pixels = _random_crops(frames, random, views.size, views.augmentation)
    return pixels.contiguous(memory_format=torch.channels_last)


def _centre_crops(frames: Tensor, random: np.ndarray, size: int, augmentation: Augmentation) -> Tensor:
    """The very pixels of the evaluation transform. A flip only reorders them."""
    start = round((frames.shape[1] - size) / 2)
    pixels = frames[:, start:start + size, start:start + size].permute(0, 3, 1, 2)
    if not (augmentation.flip_x or augmentation.flip_y):
        return pixels
    flips = random[:, [FLIP_X, FLIP_Y]] < [augmentation.flip_x, augmentation.flip_y]
    flip_x, flip_y = to_device(flips, frames.device).T[:, :, None, None, None]      # one copy for both
    if augmentation.flip_x:
        pixels = torch.where(flip_x, pixels.flip(3), pixels)
    if augmentation.flip_y:
        pixels = torch.where(flip_y, pixels.flip(2), pixels)
    return pixels


def _random_crops(frames: Tensor, random: np.ndarray, size: int, augmentation: Augmentation) -> Tensor:
    """Random resized crop, flips and colour, by one bilinear resampling of the frame."""
    left, top, width, height = crop_boxes(random, augmentation.crop)

    # Output pixel i looks at start + (i + 1/2) / size · extent, in units of the frame. A flip runs the other way.
    flip_x, flip_y = random[:, FLIP_X] < augmentation.flip_x, random[:, FLIP_Y] < augmentation.flip_y
    start = np.stack([np.where(flip_x, left + width, left), np.where(flip_y, top + height, top)], 1)
    extent = np.stack([np.where(flip_x, -width, width), np.where(flip_y, -height, height)], 1)
    jitter = 1 + augmentation.colour * (2 * random[:, [BRIGHTNESS, CONTRAST, SATURATION]] - 1)
    # one copy to the device for all of them
    numbers = to_device(np.concatenate([start, extent, jitter], 1).astype(np.float32), frames.device)

    steps = (torch.arange(size, device=frames.device, dtype=torch.float32) + 0.5) / size
    places = numbers[:, :2, None] + steps * numbers[:, 2:4, None]       # (B, 2, size), in [0, 1]
    places = places * 2 - 1                                             # grid_sample counts from -1 to 1
    grid = torch.stack([places[:, 0, None, :].expand(-1, size, -1), places[:, 1, :, None].expand(-1, -1, size)], -1)
    pixels = frames.permute(0, 3, 1, 2).float()                         # channels_last, 0 to 255
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)

    if augmentation.colour:
        brightness, contrast, saturation = (numbers[:, j, None, None, None] for j in (4, 5, 6))
        # Weights of Rec. 601 luma. Contrast turns about mid-grey: the picture's own mean is a sum, which another
        # batch would round differently.
        grey = 0.299 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]
        pixels = ((pixels - grey) * saturation + grey) * brightness
        pixels = (pixels - 127.5) * contrast + 127.5
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def crop_boxes(random: np.ndarray, smallest: float) -> tuple[np.ndarray, ...]:
    """Random resized crop (Szegedy et al. 2015): area uniform in [smallest, 1], aspect log-uniform in [3/4, 4/3].

    random: the view's numbers, `(B, ...)`. Returns left, top, width, height, each `(B,)`, as shares of the frame.
    A box that would stick out is narrowed to the frame instead of drawn again, so that every view takes the same
    count of random numbers.
    """
    area = smallest + (1 - smallest) * random[:, AREA]
    aspect = np.exp((2 * random[:, ASPECT] - 1) * np.log(4 / 3))
    width, height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    return random[:, LEFT] * (1 - width), random[:, TOP] * (1 - height), width, height


# ---- from the decoded pictures to the device -------------------------------------------------------------------

def load_views(split: Split, samples: np.ndarray, view: int, views: Views, device: torch.device) -> Tensor:
    """Read the frames of `samples`, int64 `(B,)`, and make one view of each.

    Returns uint8 `(B, 3, size, size)`, channels_last, on `device`.
    """
    frames = host_array((len(samples), *split.shape[1:]), device)
    split.read(samples, out=frames.numpy())
    return make_views(to_device(frames, device), samples, view, views)
