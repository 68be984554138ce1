"""Draw a scene: facts in, uint8 pixels out, at any size.

Things are drawn three times too large without antialiasing and reduced at the end. Every look of a thing
is drawn once per picture size and kept, so that a scene of 72 pixels costs a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from longclip.data.scenes.facts import SIZES, Scene

Pixels = NDArray[np.uint8]
Field = NDArray[np.float64]
Mask = NDArray[np.bool_]

_OVER = 3  # supersampling
_PAINTS = {  # body and pattern colour; the outline is a darker body
    "red": ((216, 38, 38), (255, 214, 206)),
    "orange": ((247, 138, 22), (255, 236, 196)),
    "yellow": ((250, 208, 20), (150, 104, 0)),
    "green": ((38, 158, 62), (206, 250, 196)),
    "blue": ((36, 86, 214), (204, 226, 255)),
    "purple": ((132, 52, 178), (236, 208, 255)),
    "pink": ((250, 112, 182), (150, 12, 92)),
    "brown": ((132, 80, 40), (240, 212, 172)),
    "black": ((34, 34, 40), (226, 226, 232)),
}
_BACKDROPS = {
    "white": (253, 253, 253),
    "grey": (205, 207, 211),
    "pale blue": (190, 220, 250),
    "pale green": (198, 236, 194),
    "pale yellow": (253, 244, 176),
    "pale pink": (254, 208, 218),
    "lavender": (214, 204, 246),
    "peach": (254, 219, 184),
}


def render(scene: Scene, size: int = 72) -> Pixels:
    """The picture, [size, size, 3] uint8, RGB."""
    side = size * _OVER
    canvas = _backdrop(scene.background, side).copy()
    for thing in scene.things:
        left, top = round(thing.box[0] * side), round(thing.box[1] * side)
        body, mask = _sprite(thing.shape, thing.colour, thing.size, thing.texture, side)
        width = len(mask)
        np.copyto(canvas[top : top + width, left : left + width], body, where=mask)
    return np.asarray(Image.fromarray(canvas).reduce(_OVER))


@lru_cache(maxsize=64)
def _backdrop(name: str, side: int) -> Pixels:
    """The background: a gradient, lightest at the top left, too faint to be mistaken for another colour."""
    down, across = np.mgrid[0:side, 0:side] / (2 * side)
    shade = 1.01 - 0.05 * (down + across)
    return np.clip(shade[:, :, None] * _BACKDROPS[name], 0, 255).astype(np.uint8)


@lru_cache(maxsize=4096)
def _sprite(shape: str, colour: str, size: str, texture: str, side: int) -> tuple[Pixels, Mask]:
    """One look of a thing: colours [w, w, 3] and the mask [w, w, 1] of where it is."""
    body, pattern = (np.array(paint, dtype=np.uint8) for paint in _PAINTS[colour])
    mask, inside = _silhouette(shape, size, side)
    pixels = np.where((_pattern(texture, len(mask), side) & inside)[:, :, None], pattern, body)
    outline = (body * 0.62).astype(np.uint8)
    return np.where(inside[:, :, None], pixels, outline), mask[:, :, None]


@lru_cache(maxsize=256)
def _silhouette(shape: str, size: str, side: int) -> tuple[Mask, Mask]:
    """The mask of a shape, and the mask without its outline."""
    width = int(SIZES[size] * side) - 1  # one less, so that rounding never pushes a pixel out of the box
    down, across = (np.mgrid[0:width, 0:width] + 0.5) / width * 2 - 1
    mask = _MASKS[shape](across, down)
    line = max(1, round(side / 120))
    inside = Image.fromarray(np.pad(mask, line).astype(np.uint8))
    for _ in range(line):
        inside = inside.filter(ImageFilter.MinFilter(3))
    return mask, np.asarray(inside)[line:-line, line:-line] > 0


@lru_cache(maxsize=256)
def _pattern(texture: str, width: int, side: int) -> Mask:
    """Where a texture shows the pattern colour, [w, w]; its grain is the same for things of all sizes."""
    down, across = (np.mgrid[0:width, 0:width] + 0.5 - width / 2) / (side / 72)  # in 72nds of the picture
    return _TEXTURES[texture](across, down)


def _striped(x: Field, y: Field) -> Mask:
    return (y / 4.4 + 0.25) % 1 < 0.5


def _dotted(x: Field, y: Field) -> Mask:
    return ((x + 2.6) % 5.2 - 2.6) ** 2 + ((y + 2.6) % 5.2 - 2.6) ** 2 < 1.5**2


def _checkered(x: Field, y: Field) -> Mask:
    return (x % 7 < 3.5) ^ (y % 7 < 3.5)


def _plain(x: Field, y: Field) -> Mask:
    return np.zeros(x.shape, dtype=bool)


_TEXTURES: dict[str, Callable[[Field, Field], Mask]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}


def _triangle(x: Field, y: Field) -> Mask:
    return (y < 0.92) & (y > 2 * np.abs(x) - 1)


def _star(x: Field, y: Field) -> Mask:
    """Five points: within each tenth of the turn, the inner side of the line from a tip to a notch."""
    tenth = np.pi / 5
    angle = np.arctan2(x, -y) % (2 * tenth)
    angle = np.minimum(angle, 2 * tenth - angle)
    radius, notch = np.hypot(x, y), 0.46
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    run, rise = 1 - notch * np.cos(tenth), notch * np.sin(tenth)
    return across * run + along * rise < rise


def _heart(x: Field, y: Field) -> Mask:
    u, v = x * 1.16, 0.12 - y * 1.14
    return (u**2 + v**2 - 1) ** 3 < u**2 * v**3


def _crescent(x: Field, y: Field) -> Mask:
    return (np.hypot(x, y) < 1) & (np.hypot(x - 0.52, y) > 0.74)


def _ring(x: Field, y: Field) -> Mask:
    return (np.hypot(x, y) < 1) & (np.hypot(x, y) > 0.45)


_MASKS: dict[str, Callable[[Field, Field], Mask]] = {
    "circle": lambda x, y: np.hypot(x, y) < 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.88,
    "triangle": _triangle,
    "star": _star,
    "cross": lambda x, y: np.minimum(np.abs(x), np.abs(y)) < 0.34,
    "diamond": lambda x, y: np.abs(x) / 0.8 + np.abs(y) < 1,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}
