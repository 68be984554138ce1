"""What a scene is: things at places on a background, before it is drawn or told.

In: a `random.Random`. Out: `Scene`s whose things do not overlap and can be told apart by name, and
the relations that hold between them. All lengths are fractions of the (square) picture's side.
"""

from __future__ import annotations

import random
from itertools import combinations
from typing import NamedTuple

from longclip.types import Box

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": 14 / 72, "medium": 19 / 72, "large": 23 / 72}  # diameters: 14, 19, 23 of 72 pixels
BACKGROUNDS = ("white", "grey", "pale blue", "pale green", "pale yellow", "pale pink", "lavender", "peach")

CHOICES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}
"""The attributes in which distractors differ, with their values."""

_GRID = 3  # a thing lies in the middle of one of the nine places: few words, learned in minutes
_CLEAR = 1.5  # a direction is told where the distance along it is this many times the distance across


class Thing(NamedTuple):
    """One object. `x`, `y` are its centre."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float

    @property
    def name(self) -> str:
        """What the paragraph calls it: unique within a scene."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> Box:
        """The square that it is drawn in."""
        half = SIZES[self.size] / 2
        edges = (self.x - half, self.y - half, self.x + half, self.y + half)
        return tuple(round(edge, 4) for edge in edges)  # type: ignore[return-value]

    @property
    def place(self) -> tuple[int, int]:
        """Row and column of its centre in a 3 by 3 grid."""
        return int(self.y * 3), int(self.x * 3)


class Scene(NamedTuple):
    """A picture's facts."""

    background: str
    things: tuple[Thing, ...]


class Relation(NamedTuple):
    """Thing `first` is `word` ("left", "right", "above", "below") of thing `second`: indices of `things`."""

    first: int
    word: str
    second: int


def compose(rng: random.Random, fewest: int = 4, most: int = 7) -> Scene:
    """A scene of `fewest` to `most` things, at least three pairs of which stand in a clear relation."""
    count = rng.randint(fewest, most)
    background = rng.choice(BACKGROUNDS)
    while True:
        things = _things(count, rng)
        if len(relations(things)) >= 3:
            return Scene(background, things)


def relations(things: tuple[Thing, ...]) -> list[Relation]:
    """The clear relation of every pair that has one, told from its earlier thing.

    Boxes that do not overlap are apart along the direction in which their centres are further apart, so
    "left" also means that the whole box is to the left.
    """
    found = []
    for (first, a), (second, b) in combinations(enumerate(things), 2):
        across, down = b.x - a.x, b.y - a.y
        if abs(across) >= _CLEAR * abs(down):
            found.append(Relation(first, "left" if across > 0 else "right", second))
        elif abs(down) >= _CLEAR * abs(across):
            found.append(Relation(first, "above" if down > 0 else "below", second))
    return found


def vary(scene: Scene, rng: random.Random, of: int) -> tuple[list[Scene], int, str]:
    """`of` scenes that differ in one attribute of one thing, that thing's index, and the attribute.

    The thing is not a large one, because the general sentence may speak of the largest.
    """
    odd = rng.choice([index for index, thing in enumerate(scene.things) if thing.size != "large"])
    attribute = rng.choice(tuple(CHOICES))
    names = {thing.name for index, thing in enumerate(scene.things) if index != odd}
    like = scene.things[odd]._asdict()
    variants = [Thing(**(like | {attribute: value})) for value in CHOICES[attribute]]
    variants = [thing for thing in variants if thing.name not in names]
    assert len(variants) >= of, f"only {len(variants)} values of {attribute} leave the names unique"
    chosen = rng.sample(variants, of)
    things = scene.things
    return (
        [scene._replace(things=(*things[:odd], thing, *things[odd + 1 :])) for thing in chosen],
        odd,
        attribute,
    )


def _things(count: int, rng: random.Random) -> tuple[Thing, ...]:
    """Things at places of their own, no two of one name, at least one of them not large."""
    things: list[Thing] = []
    sizes = [*rng.choices(tuple(SIZES), k=count - 1), "medium"]
    for place, size in zip(rng.sample(range(_GRID**2), count), sizes, strict=True):
        x, y = (round((cell + 0.5) / _GRID, 4) for cell in (place % _GRID, place // _GRID))
        things.append(_dress(size, x, y, {thing.name for thing in things}, rng))
    rng.shuffle(things)
    return tuple(things)


def _dress(size: str, x: float, y: float, names: set[str], rng: random.Random) -> Thing:
    """A thing at (x, y) whose name is none of `names`."""
    while True:
        thing = Thing(rng.choice(SHAPES), rng.choice(COLOURS), size, rng.choice(TEXTURES), x, y)
        if thing.name not in names:
            return thing
