"""The synthetic dataset: images of ten shapes, drawn with integer arithmetic from a seed.

It is used where there is neither data nor a network. Every image shows one shape at a random
place, size and angle, in random colours, lighter or darker than the background, over a colour
gradient, two dots and noise. No single pixel depends on the class, so a linear model stays near
chance, while a small convolutional network learns the shapes in a few epochs. Mirroring or shifting
keeps the class, so the usual augmentation applies.

Numerics: random words come from the Philox counter (Salmon et al. 2011), whose output does
not depend on the NumPy release, and all geometry is int32 fixed point: lengths in 1/256 pixel,
directions in 1/4096, depth (the distance inside an edge) in 1/256 pixel. The same seed therefore
gives the same bytes on every machine.

Source: own construction.
"""

import math
from collections.abc import Callable

import numpy as np

from fastres.data.dataset import Dataset, ImageSet

__all__ = ["SYNTHETIC_CLASSES", "SYNTHETIC_VERSION", "synthetic_dataset"]

# Increase whenever the same seed gives other pixels than before, so that no cache mixes the two.
SYNTHETIC_VERSION = 1

_PIXEL = 256  # one pixel in the fixed-point unit of lengths
_WORDS = 8  # random uint64 words for the geometry and colours of one image
_NOISE_WORDS = 32 * 32 * 3 // 8  # and for its noise, one byte a value
_CHUNK = 250  # images drawn at a time, so that the int32 planes stay in cache

# Rounding to 1/4096 hides the last bit in which two C libraries may disagree about a cosine.
_ANGLES = 256
_COSINES = np.array(
    [round(4096 * math.cos(2 * math.pi * k / _ANGLES)) for k in range(_ANGLES)], dtype=np.int32
)

_Plane = np.ndarray  # (n, 32, 32) int32, or (n, 1, 1) where one value holds for a whole image


def _disc(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    """Depth inside a disc of radius r, (r^2 - u^2 - v^2) / 2r: exact on the edge, with slope 1."""
    return (r * r - u * u - v * v) // (2 * r)


def _box(u: _Plane, v: _Plane, half_u: _Plane, half_v: _Plane) -> _Plane:
    return np.minimum(half_u - np.abs(u), half_v - np.abs(v))


def _ring(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    return np.minimum(_disc(u, v, r), -_disc(u, v, r * 9 // 16))


def _square(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    half = r * 7 // 8
    return _box(u, v, half, half)


def _frame(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    hole = r // 2
    return np.minimum(_square(u, v, r), -_box(u, v, hole, hole))


def _triangle(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    """The three half-planes of an equilateral triangle; 887/1024 is sin 60 degrees."""
    inner = r * 9 // 16
    left, right = -u * 887 // 1024 - v // 2, u * 887 // 1024 - v // 2
    return inner - np.maximum(np.maximum(left, right), v)


def _cross(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    arm = r * 5 // 16
    return np.maximum(_box(u, v, r, arm), _box(u, v, arm, r))


def _bar(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    return _box(u, v, r * 9 // 8, r * 5 // 16)


def _crescent(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    return np.minimum(_disc(u, v, r), -_disc(u - r * 5 // 8, v, r * 3 // 4))


def _hourglass(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    """Two triangles that meet in a point; 181/256 is 1/sqrt 2, for edges at 45 degrees."""
    waist = (np.abs(v) - np.abs(u)) * 181 // 256
    return np.minimum(r * 7 // 8 - np.abs(v), waist)


def _pair(u: _Plane, v: _Plane, r: _Plane) -> _Plane:
    dot, apart = r * 7 // 16, r * 5 // 8
    return np.maximum(_disc(u - apart, v, dot), _disc(u + apart, v, dot))


_SHAPES: dict[str, Callable[[_Plane, _Plane, _Plane], _Plane]] = {
    "bar": _bar,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "frame": _frame,
    "hourglass": _hourglass,
    "pair": _pair,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
}
SYNTHETIC_CLASSES = tuple(_SHAPES)


def synthetic_dataset(num_train: int = 10_000, num_test: int = 2_000, *, seed: int = 0) -> Dataset:
    """Draw the synthetic dataset; image i of a split depends on (seed, split, i) alone.

    Args:
        num_train: training images; label i is i mod 10, so the classes are balanced.
        num_test: test images, drawn from another random stream.
        seed: 0 <= seed < 2**63.

    Returns:
        The dataset named `synthetic`, of the classes `SYNTHETIC_CLASSES`.
    """
    train = _draw_split(num_train, key=2 * seed)
    test = _draw_split(num_test, key=2 * seed + 1)
    source = f"the synthetic set, drawn by fastres from seed {seed}"
    return Dataset.from_sets("synthetic", SYNTHETIC_CLASSES, train, test, source=source)


def _draw_split(count: int, *, key: int) -> ImageSet:
    words = np.random.Philox(key=key).random_raw(count * _WORDS).reshape(count, _WORDS)
    # The noise starts at counter 2**128, which no number of images can reach from 0.
    noise = np.random.Philox(key=key, counter=1 << 128)
    labels = np.arange(count, dtype=np.int64) % len(_SHAPES)
    images = np.empty((count, 32, 32, 3), dtype=np.uint8)
    shapes = list(_SHAPES.values())
    for start in range(0, count, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, count))
        bytes_ = noise.random_raw(len(rows) * _NOISE_WORDS).astype("<u8").view(np.uint8)
        grain = bytes_.reshape(len(rows), 32, 32, 3)
        for label, shape in enumerate(shapes):
            members = rows[labels[rows] == label]
            images[members] = _draw(shape, words[members], grain[members - start])
    return ImageSet(images, labels)


class _RandomIntegers:
    """Random integers for n images; each draw takes the next 16 bits of their (n, 8) words."""

    def __init__(self, words: np.ndarray) -> None:
        self._words = words
        self._lane = 0

    def draw(self, low: int, high: int, *shape: int) -> np.ndarray:
        """(n, 1, 1, *shape) int32 in low..high, both included."""
        lanes = []
        for _ in range(math.prod(shape)):
            word, lane = divmod(self._lane, 4)
            lanes.append((self._words[:, word] >> np.uint64(16 * lane)).astype(np.int64) & 0xFFFF)
            self._lane += 1
        drawn = np.stack(lanes, axis=-1) * (high - low + 1) >> 16
        return (drawn + low).astype(np.int32).reshape(len(drawn), 1, 1, *shape)


def _draw(
    shape: Callable[[_Plane, _Plane, _Plane], _Plane], words: np.ndarray, grain: np.ndarray
) -> np.ndarray:
    """Draw n images of one shape.

    Args:
        shape: returns the depth of each pixel inside the shape.
        words: (n, 8) uint64 random words.
        grain: (n, 32, 32, 3) uint8 random bytes.

    Returns:
        (n, 32, 32, 3) uint8 images.
    """
    random = _RandomIntegers(words)
    radius = random.draw(6 * _PIXEL, 11 * _PIXEL)
    x, y = _offsets(random, 11 * _PIXEL, 21 * _PIXEL)
    angle = random.draw(0, _ANGLES - 1)
    cosine, sine = _COSINES[angle], _COSINES[angle - _ANGLES // 4]
    u, v = (x * cosine + y * sine) // 4096, (y * cosine - x * sine) // 4096

    background = random.draw(48, 207, 3)
    slope_x, slope_y = random.draw(-2, 2, 3), random.draw(-2, 2, 3)
    step = np.arange(-16, 16, dtype=np.int32)
    picture = background + slope_x * step[:, None] + slope_y * step[:, None, None]
    # Each channel differs by at least 20 grey levels and has a sign of its own, so that most shapes
    # are lighter than the background in one channel and darker in another.
    contrast = random.draw(20, 110, 3) * (2 * random.draw(0, 1, 3) - 1)

    for _ in range(2):
        dot_x, dot_y = _offsets(random, 0, 31 * _PIXEL)
        dot = _disc(dot_x, dot_y, random.draw(_PIXEL, 2 * _PIXEL))
        picture = _paint(picture, dot, background + random.draw(-80, 80, 3))
    picture = _paint(picture, shape(u, v, radius), background + contrast)

    # The difference of two uniform nibbles: triangular noise of about 6.5 grey levels, twice over.
    noise = ((grain & 15).astype(np.int32) - (grain >> 4)) * 2
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def _offsets(random: _RandomIntegers, low: int, high: int) -> tuple[_Plane, _Plane]:
    """Distance of each pixel, along x and along y, from a random centre in low..high."""
    grid = np.arange(32, dtype=np.int32) * _PIXEL
    centre_x, centre_y = random.draw(low, high), random.draw(low, high)
    x, y = grid[None, None, :] - centre_x, grid[None, :, None] - centre_y
    return np.broadcast_to(x, (len(x), 32, 32)), np.broadcast_to(y, (len(y), 32, 32))


def _paint(picture: np.ndarray, depth: _Plane, colour: np.ndarray) -> np.ndarray:
    """Blend `colour` into `picture` where depth > 0; the edge is one pixel wide."""
    coverage = np.clip(depth + _PIXEL // 2, 0, _PIXEL)[..., None]
    return picture + (colour - picture) * coverage // _PIXEL
