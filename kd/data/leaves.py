"""Nobody needs to read this file: it draws the built-in dataset, bean leaves, so that the demo needs no network.

There are three classes, named as in the beans photographs (AI-Lab-Makerere/beans). A grower tells
them by:

- angular_leaf_spot: few grey-brown polygons bounded by the veins, in a yellow halo;
- bean_rust: many small round reddish pustules, in a yellow halo;
- healthy: neither.

Everything else is drawn from one distribution for all three: the leaf's shape, pose, number, veins,
yellowing, dried tip, holes, soil specks, drops and mines; hands, background, light and camera. So
the label is in the *shape* of the marks, and not in how much brown, yellow or detail there is.

A picture is a pure function of (seed, split, index). Its random numbers come from a Philox counter
keyed by them (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), so any worker
may draw any picture in any order. Lengths are fractions of the side or of the leaf: `side` sets the
resolution, and the scene stays the same.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("angular_leaf_spot", "bean_rust", "healthy")
ANGULAR, RUST, HEALTHY = range(len(CLASSES))
SIZES = {"train": 1080, "validation": 150, "test": 240}

Array = np.ndarray
Rng = np.random.Generator

# Colours are (red, green, blue) in [0, 1].
SOILS = np.array([(.60, .36, .26), (.52, .37, .24), (.44, .38, .32), (.56, .39, .38), (.38, .27, .19),
                  (.64, .48, .33)])
SKINS = np.array([(.42, .27, .20), (.55, .36, .27), (.33, .21, .17), (.70, .50, .40), (.80, .62, .52)])


def draw(split: str, index: int, seed: int = 0, side: int = 256) -> tuple[Image.Image, int]:
    """Draw one picture: RGB, `side` × `side` pixels, and its label, a position in CLASSES (index modulo 3).

    The same bytes come out whatever was drawn before, under one version of NumPy and Pillow.

    Raises ValueError for an unknown split or a side below 16, IndexError for an index outside of
    the split.
    """
    if split not in SIZES:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SIZES)}")
    if not 0 <= index < SIZES[split]:
        raise IndexError(f"index {index} is outside of split {split!r}, which has {SIZES[split]} pictures")
    if side < 16:
        raise ValueError(f"side {side} is too small to show a leaf; choose 16 or more")
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, list(SIZES).index(split) << 32 | index], dtype=np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    label = index % len(CLASSES)

    azimuth = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(.5, 1.2) * _heading(azimuth)  # its length: how hard the light is
    canvas = _background(rng, side, light)
    leaves = _subject(rng, side)
    hand = rng.random() < .35
    skin = SKINS[rng.integers(len(SKINS))] * rng.uniform(.8, 1.15)
    _cast_shadow(rng, canvas, leaves, light)
    if hand:
        _fingers(rng, canvas, leaves[0], light, skin)
    severity = rng.uniform(.5, 1)
    colour = _leaf_colour(rng)
    for leaf in leaves:
        stem = leaf.base - leaf.axis * rng.uniform(.15, .5) + rng.normal(size=2) * .1 * leaf.length
        _capsule(canvas, stem, leaf.base, .012 * side, .009 * side, colour * (.95, 1.0, .8), light)
    for number, leaf in enumerate(leaves):
        leaf_severity = severity if number == 0 else severity * rng.uniform(.5, 1.2)
        _paint_leaf(rng, canvas, leaf, colour * rng.uniform(.9, 1.1), light, label, leaf_severity)
    if hand:
        _thumb(rng, canvas, leaves[0], light, skin)
    if rng.random() < .25:
        _blade(rng, canvas, light)
    return _photograph(rng, canvas), label


class Leaf(NamedTuple):
    """A leaflet. Its coordinates x, y are in leaf lengths: y from 0 at the base to 1 at the tip, x across."""

    base: Array  # pixels
    axis: Array  # pixels; base to tip
    across: Array  # pixels; one leaf length sideways, foreshortened by the pose
    widths: Array  # (2,): half-widths to the left and to the right
    powers: tuple[float, float]  # of the outline y^a (1-y)^b
    bend: float  # of the midrib
    wave: Array  # (3,): amplitude, frequency and phase of the margin
    veins: float  # secondary veins along the midrib
    slope: float  # with which a vein leaves the midrib
    stagger: float  # between the veins of the two sides, in vein spacings

    @property
    def length(self) -> float:
        return float(np.hypot(*self.axis))

    def half_width(self, y: Array, right: Array) -> Array:
        a, b = self.powers
        peak = a / (a + b)
        y = np.clip(y, 0, 1)
        return self.widths[right.astype(int)] * (y / peak) ** a * ((1 - y) / (1 - peak)) ** b

    def to_pixels(self, x: Array, y: Array) -> Array:
        """(N,), (N,) in leaf lengths → (N, 2) in pixels."""
        x = x + self.bend * 4 * y * (1 - y)
        return self.base + y[:, None] * self.axis + x[:, None] * self.across

    def from_pixels(self, columns: Array, rows: Array) -> tuple[Array, Array]:
        """(W,), (H,) in pixels → x, y (H, W) in leaf lengths."""
        (a, b), (c, d) = np.linalg.inv(np.stack([self.across, self.axis], axis=1)).astype(np.float32)
        columns = (columns - self.base[0]).astype(np.float32)
        rows = (rows - self.base[1]).astype(np.float32)[:, None]
        y = c * columns + d * rows
        return a * columns + b * rows - np.float32(4 * self.bend) * y * (1 - y), y

    def along_vein(self, t: Array, reach: Array, right: Array) -> Array:
        """The point `reach` from the midrib on vein number t; a fraction lies between two → (N, 2) pixels."""
        y = (t - self.stagger * right) / self.veins + self.slope * reach + .35 * reach ** 2
        return self.to_pixels(np.where(right, reach, -reach), y)

    def vein_number(self, x: Array, y: Array) -> Array:
        """The inverse of along_vein."""
        reach = np.abs(x)
        stagger = np.multiply(x > 0, self.stagger, dtype=x.dtype)
        return (y - (self.slope + .35 * reach) * reach) * self.veins + stagger

    def outline(self) -> Array:
        y = np.linspace(0, 1, 40) ** 1.3  # denser at the base, where the margin turns fastest
        y = np.concatenate([y, y[-2::-1]])
        right = np.arange(79) < 40
        amplitude, frequency, phase = self.wave
        x = self.half_width(y, right) * (1 + amplitude * np.sin(frequency * y + phase + right))
        return self.to_pixels(np.where(right, x, -x), y)


def _random_leaf(rng: Rng, base: Array, angle: float, length: float, width: float) -> Leaf:
    """A leaflet at `base` that points along `angle`; lengths in pixels, width a fraction of the length."""
    tilt, shear = rng.uniform(.7, 1), rng.normal() * .12
    axis, across = length * _heading(angle), tilt * length * _heading(angle + np.pi / 2 + shear)
    return Leaf(base, axis, across, width * rng.uniform(.85, 1.15, size=2),
                (rng.uniform(.36, .62), rng.uniform(.85, 1.4)), rng.normal() * .03,
                np.array([rng.uniform(0, .04), rng.uniform(10, 30), rng.uniform(0, 6)]),
                rng.uniform(5.5, 9), rng.uniform(.35, .8), rng.random())


def _subject(rng: Rng, side: int) -> list[Leaf]:
    """The leaflets in front: one, a pair, or the bean's three on one joint."""
    centre = side * (.5 + rng.uniform(-.1, .1, size=2))
    angle = rng.uniform(0, 2 * np.pi) if rng.random() < .4 else rng.normal(-np.pi / 2, .5)
    kind, width, scale = rng.random(), rng.uniform(.32, .48), rng.uniform(.85, 1.15) * side
    if kind < .6:
        length, turns, back = .88 * scale, [0.], .5
    elif kind < .8:
        length, turns, back = .68 * scale, [-.75, .75], .3
    else:
        length, turns, back = .58 * scale, [0., 1.65, -1.65], .1
    joint = centre - back * length * _heading(angle)
    leaves = []
    for turn in turns:
        heading = angle + turn + (rng.normal() * .2 if len(turns) > 1 else 0)
        base = joint + rng.uniform(.03, .12) * length * _heading(heading) * (len(turns) > 1)
        leaves.append(_random_leaf(rng, base, heading, length * rng.uniform(.85, 1.1), width))
    return leaves


def _heading(angle: float) -> Array:
    return np.array([np.cos(angle), np.sin(angle)])


def _leaf_colour(rng: Rng) -> Array:
    """From yellow-green to blue-green, pale to dark: (3,) in [0, 1]."""
    hue = rng.uniform(0, 1)
    young, old = np.array([.56, .66, .20]), np.array([.27, .48, .25])
    return (young + (old - young) * hue) * rng.uniform(.65, 1.1)


def _noise(rng: Rng, cells: int, width: int, height: int) -> Array:
    """Smooth noise (height, width) in about [-1, 1], with features of 1/cells of the field."""
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    smooth = Image.Resampling.BICUBIC if cells < 20 else Image.Resampling.BILINEAR
    return np.asarray(grid.resize((width, height), smooth), np.float32) * (2 / 255) - 1


def _relief(field: Array, light: Array, pixels: float) -> Array:
    """Slope of a height field towards the light, per hundredth of `pixels`: shows folds, veins and clods."""
    out = np.zeros_like(field)
    k = np.float32(pixels / 100)
    out[:, 1:-1] = (field[:, 2:] - field[:, :-2]) * (k * np.float32(light[0]))
    out[1:-1] += (field[2:] - field[:-2]) * (k * np.float32(light[1]))
    return out


def _mix(canvas: Array, colour: Array, weight: Array) -> None:
    """canvas (3, H, W) towards colour (3,) by weight (H, W), in place."""
    for channel, value in zip(canvas, colour):
        channel += (np.float32(value) - channel) * weight


def _background(rng: Rng, side: int, light: Array) -> Array:
    """Soil, foliage or a field, more or less out of focus → float32 (3, side, side)."""
    small = max(side // 2, 16)  # drawn at half size: it is blurred anyway
    kind = rng.random()
    coarse, middle, fine = (_noise(rng, cells, small, small) for cells in (9, 24, 70))
    clods = coarse + .6 * middle + .4 * fine
    soil = SOILS[rng.integers(len(SOILS))] * rng.uniform(.75, 1.2)
    tone = 1 + .12 * clods + rng.uniform(.1, .4) * _relief(clods, light, small)
    canvas = soil.astype(np.float32)[:, None, None] * tone
    if kind > .5:  # weeds: everywhere in foliage, in patches in a field
        green = _leaf_colour(rng) * rng.uniform(.45, .9)
        cover = clods + 1.5 * _noise(rng, 5, small, small) + (1.2 if kind > .75 else -.2)
        _mix(canvas, green, np.clip(cover * 2, 0, .9))
        canvas *= 1 + .25 * _noise(rng, 30, small, small)
    for _ in range(rng.integers(0, 4)):  # twigs and dry stalks
        start, turn, reach = rng.uniform(0, small, 2), rng.uniform(0, 6.3), rng.uniform(.2, .7) * small
        end = start + reach * _heading(turn)
        _capsule(canvas, start, end, .012 * small, .006 * small, soil * rng.uniform(.7, 1.6), light)
    for _ in range(rng.integers(0, 3) + (rng.integers(1, 4) if kind > .6 else 0)):
        base, angle, length = rng.uniform(-.1, 1.1, 2), rng.uniform(0, 6.3), rng.uniform(.3, .7)
        leaf = _random_leaf(rng, base * small, angle, length * small, rng.uniform(.3, .46))
        _paint_leaf(rng, canvas, leaf, _leaf_colour(rng) * rng.uniform(.5, 1), light)
    blur = rng.uniform(0, 1) ** 2 * .012 * side
    planes = [plane.filter(ImageFilter.BoxBlur(blur)).resize((side, side), Image.Resampling.BILINEAR)
              for plane in _planes(canvas)]
    canvas = np.stack([_weight(plane) for plane in planes])
    if blur < .003 * side:
        canvas *= 1 + rng.uniform(.03, .12) * _noise(rng, 150, side, side)
    return canvas


def _cast_shadow(rng: Rng, canvas: Array, leaves: list[Leaf], light: Array) -> None:
    """The shadow that the leaves throw upon the background."""
    side, small = canvas.shape[1], 64
    image = Image.new("L", (small, small))
    offset = -light * rng.uniform(.01, .12) * side
    for leaf in leaves:
        ImageDraw.Draw(image).polygon(((leaf.outline() + offset) * (small / side)).ravel().tolist(), fill=255)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(.6, 2.5)))
    canvas *= 1 - _weight(image.resize((side, side), Image.Resampling.BILINEAR)) * rng.uniform(.15, .65)


def _paint_leaf(rng: Rng, canvas: Array, leaf: Leaf, colour: Array, light: Array,
                label: int | None = None, severity: float = 0) -> None:
    """Paint one leaflet onto canvas (3, H, W); without a label it lies in the background, clean and whole."""
    outline = leaf.outline()
    # The box is never empty, so that a leaflet out of the frame takes as many random numbers as one inside.
    low = np.clip(np.floor(outline.min(0)).astype(int) - 1, 0, canvas.shape[1] - 4)
    high = np.clip(np.ceil(outline.max(0)).astype(int) + 1, low + 4, canvas.shape[1])
    width, height = (high - low).tolist()
    # Hard edges are drawn at twice the size and averaged down: the antialiasing that ImageDraw lacks.
    silhouette = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(silhouette)
    pen.polygon(((outline - low) * 2).ravel().tolist(), fill=255)
    if label is not None:
        _bite(rng, pen, leaf, low)
    cover = _weight(silhouette.reduce(2))

    x, y = leaf.from_pixels(np.arange(low[0], high[0]) + .5, np.arange(low[1], high[1]) + .5)
    number = leaf.vein_number(x, y)
    between = number - np.floor(number)
    quilt = 4 * between * (1 - between)  # 0 on a secondary vein, 1 half-way to the next
    reach = np.abs(x)
    pixel = 1 / leaf.length
    thin = max(.006, .8 * pixel)
    vein = np.maximum(1 - np.minimum(between, 1 - between) / (leaf.veins * thin), 0) * .6
    np.maximum(vein, 1 - reach / (np.maximum(1.15 - y, .15) * max(.014, 1.2 * pixel)), out=vein)
    patches, fine = _noise(rng, 4, width, height), _noise(rng, 48, width, height)

    # Light: the blade bulges between veins, is folded along the midrib, and curls.
    bulge, fold, curl = rng.uniform(.2, 1.0), rng.normal() * .12, rng.normal() * .2
    field = bulge * (np.sqrt(quilt) * np.minimum(reach * 12, 1) + .3 * fine) - .4 * vein
    relief = _relief(field, light, leaf.length)
    shade = 1 + .16 * relief
    shade += np.clip(x * 10, -1, 1) * fold + (y - .5) * curl + patches * .07
    blade = colour.astype(np.float32)[:, None, None] * shade
    yellowing = rng.uniform(0, 1) ** 2.5
    yellow = np.array([.78, .70, .18]) * rng.uniform(.8, 1.1)
    _mix(blade, yellow, np.clip(.45 * patches + .12 * fine * quilt + 1.1 * yellowing - .35, 0, .7))
    if rng.random() < .35:  # margin dries from the tip
        dry = np.clip((y - rng.uniform(.75, .98) + .12 * patches + .03 * fine) * 12, 0, 1)
        _mix(blade, np.array([.52, .38, .20]) * rng.uniform(.7, 1.2), dry * .85)
    _mix(blade, colour * .6 + (.32, .36, .22), vein * rng.uniform(.25, .7))
    if label == ANGULAR:
        _angular_spots(rng, blade, leaf, low, severity, fine)
    elif label == RUST:
        _pustules(rng, blade, leaf, low, severity, fine)
    if label is not None:
        _litter(rng, blade, leaf, low)
    gloss = np.maximum(relief + .5 * patches, 0) * rng.uniform(0, .25)
    _mix(blade, np.array([.85, .9, .95]), np.minimum(gloss, .5))
    region = canvas[:, low[1]:high[1], low[0]:high[0]]
    region += (blade - region) * cover


def _bite(rng: Rng, pen: ImageDraw.ImageDraw, leaf: Leaf, low: Array) -> None:
    """Holes in the blade and notches in its margin, cut out of the silhouette (drawn at twice the size)."""
    for _ in range(rng.integers(1, 5) if rng.random() < .35 else 0):
        y, right = rng.uniform(.1, .9, 1), rng.random(1) < .5
        out, most = (rng.uniform(.95, 1.1), .06) if rng.random() < .5 else (rng.uniform(.1, .8), .03)
        x = leaf.half_width(y, right) * np.where(right, out, -out)
        hole = _blobs(rng, leaf.to_pixels(x, y), leaf.length * rng.uniform(.01, most, 1), 9, .3)
        pen.polygon(((hole - low) * 2).ravel().tolist(), fill=0)


def _blobs(rng: Rng, centres: Array, radii: Array, corners: int, roughness: float) -> Array:
    """Irregular round polygons (N, corners, 2) about centres (N, 2)."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 6.3, (len(centres), 1))
    reach = radii[:, None] * (1 + roughness * rng.uniform(-1, 1, turn.shape))
    return centres[:, None] + reach[..., None] * np.stack([np.cos(turn), np.sin(turn)], axis=-1)


def _marks(shapes: Array, blade: Array, low: Array) -> Image.Image:
    """Filled polygons (N, corners, 2), in pixels, as a mask of blade (3, H, W)."""
    height, width = blade.shape[1:]
    image = Image.new("L", (2 * width, 2 * height))
    pen = ImageDraw.Draw(image)
    for shape in ((shapes - low) * 2).reshape(len(shapes), -1).tolist():
        pen.polygon(shape, fill=255)
    return image.reduce(2)


def _weight(mask: Image.Image) -> Array:
    """A mask's (H, W) in [0, 1]."""
    return np.asarray(mask, np.float32) * np.float32(1 / 255)


def _inside(rng: Rng, leaf: Leaf, count: int, deviation: float) -> tuple[Array, Array]:
    """`count` points x, y on the blade, in leaf lengths, about four centres."""
    centre = rng.integers(0, 4, count)
    y = np.clip(rng.uniform(.08, .9, 4)[centre] + rng.normal(size=count) * deviation, .05, .95)
    right = rng.random(count) < np.array([.2, .5, .8, .5])[centre]
    reach = rng.uniform(.04, .93, count) * leaf.half_width(y, right)
    return np.where(right, reach, -reach), y


def _angular_spots(rng: Rng, blade: Array, leaf: Leaf, low: Array, severity: float, fine: Array) -> None:
    """Angular leaf spot: cells of the blade between two veins die; so the lesions have straight sides."""
    count = int(4 + 13 * severity * rng.uniform(.6, 1))
    cells = rng.integers(1, 5, count)  # that have run together in each lesion
    lesion = np.repeat(np.arange(count), cells)
    count = len(lesion)
    x, y = (coordinate[lesion] for coordinate in _inside(rng, leaf, len(cells), .15))
    size = rng.uniform(.8, 1.6, len(cells))[lesion]
    cell = np.floor(leaf.vein_number(x, y))
    height = np.minimum(rng.uniform(.25, .7, count) * size, .92)
    first = cell + .04 + rng.uniform(0, 1, count) * (.94 - height)
    long, skew = rng.uniform(.010, .024, count) * size, rng.uniform(-.02, .02, count)
    reach = np.abs(x) + rng.uniform(-.022, .022, count)
    corners_t = first[:, None] + height[:, None] * np.array([0, .1, .9, 1, .9, .1])
    corners_r = reach[:, None] + long[:, None] * np.array([0, -1, -1, 0, 1, 1])
    corners_r = corners_r + skew[:, None] * np.array([0, 0, 1, 1, 1, 0])
    corners_r = np.maximum(corners_r + rng.uniform(-.006, .006, corners_r.shape), .004)
    shapes = leaf.along_vein(corners_t.ravel(), corners_r.ravel(), np.repeat(x > 0, 6)).reshape(count, 6, 2)
    colour = np.array([.46, .36, .25]) + rng.uniform(0, .12) * np.array([0, .5, 1])  # brown to grey
    _lesions(rng, blade, shapes, low, colour, .03 * leaf.length, fine)


def _pustules(rng: Rng, blade: Array, leaf: Leaf, low: Array, severity: float, fine: Array) -> None:
    """Bean rust: pustules break through anywhere, veins or not; so they are round, small and many."""
    count = int(40 + 100 * severity * rng.uniform(.6, 1))
    x, y = _inside(rng, leaf, count, .2)
    radii = leaf.length * rng.uniform(.010, .017) * rng.uniform(.7, 1.4, count)
    shapes = _blobs(rng, leaf.to_pixels(x, y), radii, 8, .12)
    _lesions(rng, blade, shapes, low, np.array([.54, .29, .14]), .016 * leaf.length, fine)


def _lesions(rng: Rng, blade: Array, shapes: Array, low: Array, colour: Array, halo: float,
             fine: Array) -> None:
    """Paint dead tissue in the shapes, and the yellow of the tissue around it."""
    mask = _marks(shapes, blade, low)
    core, around = _weight(mask), _weight(mask.filter(ImageFilter.BoxBlur(halo)))
    _mix(blade, np.array([.76, .72, .26]), np.minimum(around * 2, 1) * rng.uniform(.25, .7))
    colour = colour * rng.uniform(.55, 1) + rng.normal(size=3) * .02
    _mix(blade, colour, core * (.8 + .2 * fine))
    blade *= 1 - .45 * core * (1 - around)  # darker towards the rim


def _litter(rng: Rng, blade: Array, leaf: Leaf, low: Array) -> None:
    """What lies on a leaf of any class: a splash of soil, drops, a leaf miner's trail."""
    if rng.random() < .4:
        count = int(rng.integers(3, 16))
        centres = leaf.to_pixels(*_inside(rng, leaf, 1, 0)) + rng.normal(size=(count, 2)) * .06 * leaf.length
        specks = _blobs(rng, centres, leaf.length * rng.uniform(.003, .014, count), 6, .5)
        soil = SOILS[rng.integers(len(SOILS))] * rng.uniform(.6, 1)
        _mix(blade, soil, _weight(_marks(specks, blade, low)) * .9)
    if rng.random() < .25:
        count = int(rng.integers(3, 14))
        centres = leaf.to_pixels(*_inside(rng, leaf, count, .3))
        radii = leaf.length * rng.uniform(.008, .028, count)
        drops = _blobs(rng, centres, radii, 12, .08)
        glints = _blobs(rng, centres - .3 * radii[:, None], radii * .4, 8, .1)
        blade *= 1 - .25 * _weight(_marks(drops, blade, low))
        blade += .5 * _weight(_marks(glints, blade, low))
    if rng.random() < .2:
        walk = np.cumsum(rng.normal(size=(30, 2)) * .02 * leaf.length, axis=0)
        trail = (leaf.to_pixels(*_inside(rng, leaf, 1, 0)) + walk - low) * 2
        image = Image.new("L", (2 * blade.shape[2], 2 * blade.shape[1]))
        wide = max(1, round(.016 * leaf.length))
        ImageDraw.Draw(image).line(trail.ravel().tolist(), fill=255, width=wide, joint="curve")
        _mix(blade, np.array([.75, .76, .55]), _weight(image.reduce(2)) * .7)


def _capsule(canvas: Array, start: Array, end: Array, first: float, last: float, colour: Array,
             light: Array) -> None:
    """A round rod from start to end with radii first and last, in pixels: stems, twigs and fingers."""
    height, width = canvas.shape[1:]
    most = max(first, last) + 1
    low = np.clip((np.minimum(start, end) - most).astype(int), 0, (width, height))
    high = np.clip((np.maximum(start, end) + most + 1).astype(int), 0, (width, height))
    if (high <= low).any():
        return
    x = (np.arange(low[0], high[0], dtype=np.float32) + np.float32(.5 - start[0]))
    y = (np.arange(low[1], high[1], dtype=np.float32) + np.float32(.5 - start[1]))[:, None]
    dx, dy = (end - start).astype(np.float32)
    along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + np.float32(1e-6)), 0, 1)
    x, y = x - along * dx, y - along * dy
    radius = np.float32(first) + along * np.float32(last - first)
    distance = np.sqrt(x * x + y * y)
    cover = np.clip(radius - distance + .5, 0, 1)
    shade = .62 + .38 * np.sqrt(np.maximum(1 - (distance / radius) ** 2, 0))
    shade += (x * np.float32(light[0]) + y * np.float32(light[1])) / radius * np.float32(.18)
    region = canvas[:, low[1]:high[1], low[0]:high[0]]
    region += (colour.astype(np.float32)[:, None, None] * shade - region) * cover


def _fingers(rng: Rng, canvas: Array, leaf: Leaf, light: Array, skin: Array) -> None:
    """Fingers that hold the leaf from behind, so drawn before it."""
    side = canvas.shape[1]
    axis, across = leaf.axis / leaf.length, leaf.across / np.hypot(*leaf.across)
    for number in range(rng.integers(2, 4)):
        apart = .13 * (number - 1 + rng.normal() * .15)
        tip = leaf.base + (axis * rng.uniform(0, .12) + across * apart) * side
        knuckle = tip - (axis + .3 * across) * .8 * side
        _capsule(canvas, knuckle, tip, .075 * side, .058 * side, skin * .9, light)


def _thumb(rng: Rng, canvas: Array, leaf: Leaf, light: Array, skin: Array) -> None:
    """The thumb upon the leaf's base, with its nail."""
    side = canvas.shape[1]
    axis, across = leaf.axis / leaf.length, leaf.across / np.hypot(*leaf.across)
    back = -(axis + across * rng.normal() * .5)
    tip = leaf.base + (axis * rng.uniform(0, .06) + across * rng.normal() * .03) * side
    _capsule(canvas, tip + back * .8 * side, tip, .085 * side, .06 * side, skin, light)
    nail = skin * .5 + .42 if rng.random() < .85 else np.array([.15, .6, .75])
    _capsule(canvas, tip + .03 * side * back, tip - .015 * side * back, .034 * side, .03 * side, nail, light)


def _blade(rng: Rng, canvas: Array, light: Array) -> None:
    """A blade of grass or a stalk across the picture, in front of the leaf."""
    side = canvas.shape[1]
    start, turn = rng.uniform(0, side, 2), rng.uniform(0, 6.3)
    reach = side * rng.uniform(.4, 1.2) * _heading(turn)
    colour = _leaf_colour(rng) if rng.random() < .5 else SOILS[rng.integers(len(SOILS))] * 1.2
    wide = rng.uniform(.006, .018) * side
    _capsule(canvas, start - reach / 2, start + reach / 2, wide, .004 * side, colour, light)


def _planes(canvas: Array) -> list[Image.Image]:
    """canvas (3, H, W) in [0, 1], which it spends, → three greyscale images."""
    canvas *= 255
    canvas += .5
    np.clip(canvas, 0, 255, out=canvas)
    return [Image.fromarray(plane) for plane in canvas.astype(np.uint8)]


def _photograph(rng: Rng, canvas: Array) -> Image.Image:
    """Light and camera: dappled shade, colour temperature, exposure, contrast, focus and sensor noise."""
    side = canvas.shape[1]
    if rng.random() < .4:
        shade = _noise(rng, 4, side, side) * 6 + _noise(rng, 12, side, side) * 2 + rng.uniform(-3, 4)
        canvas *= 1 - rng.uniform(.2, .5) * np.clip(shade, 0, 1)
    warmth, tint, haze = rng.normal() * .07, rng.normal() * .035, rng.uniform(0, .12)
    gain = rng.uniform(.85, 1.5) * (1 - haze) * np.array([1 + warmth, 1 + tint, 1 - warmth])
    canvas *= gain.astype(np.float32)[:, None, None]
    canvas += haze * .8
    # A film-like shoulder, so that sunlit parts fade to white and do not clip.
    canvas *= 1.12 / (1 + .25 * canvas * canvas)
    unsharp = rng.uniform(.001, .004) * side if rng.random() < .3 else 0
    # The difference of two uniform bytes is triangular: noise at a tenth of the price of a normal.
    noise = rng.integers(0, 256, (2, side, side), dtype=np.uint8).astype(np.float32)
    canvas += (noise[0] - noise[1]) * rng.uniform(.00005, .00035)
    image = Image.merge("RGB", _planes(canvas))
    return image.filter(ImageFilter.BoxBlur(unsharp)) if unsharp else image
