"""What a view may change, by name, and the random numbers that it takes.

A new augmentation is a field of `Augmentation`, an entry in AUGMENTATIONS, a name for each random number it needs,
and its pixels in `kd/views.py`. `--augment` offers whatever stands here. (Nothing heavy is imported, because
`python train.py --help` reads the names before torch is loaded.)
"""

from typing import NamedTuple


class Augmentation(NamedTuple):
    """What a view may change. All zero is the identity: the centre crop of evaluation."""

    crop: float = 0.0     # smallest area of the random resized crop, as a share of the frame; 0: the centre crop
    flip_x: float = 0.0   # probability of a left-right flip
    flip_y: float = 0.0   # probability of an up-down flip
    colour: float = 0.0   # with a crop only: brightness, contrast and saturation, each times 1 - colour to 1 + colour


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip_x=0.5, flip_y=0.5),                   # leaves, cells, aerial photographs
    "flip-x": Augmentation(flip_x=0.5),                             # most photographs: never upside down
    "crop": Augmentation(crop=0.35, flip_x=0.5, flip_y=0.5, colour=0.2),
    "crop-x": Augmentation(crop=0.35, flip_x=0.5, colour=0.2),
    "crop-only": Augmentation(crop=0.35, colour=0.2),               # digits, letters, traffic signs
}

# The random numbers of a view, each uniform in [0, 1): number j is a hash of (seed, sample, view, j).
# Add new names at the end: then every existing view keeps its pixels.
AREA, ASPECT, LEFT, TOP = 0, 1, 2, 3            # of the crop
FLIP_X, FLIP_Y = 4, 5
BRIGHTNESS, CONTRAST, SATURATION = 6, 7, 8
RANDOM_NUMBERS = 9
