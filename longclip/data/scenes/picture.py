"""A figure of a few scenes: pictures, whole captions, and boxes in the colour of their sentences.

In: a seed. Out: a PNG, made with matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longclip.data.scenes.facts import Scene
from longclip.data.scenes.render import render
from longclip.data.scenes.text import GROUP, Told, tell
from longclip.types import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = ("#c2185b", "#1565c0", "#2e7d32")
_PLAIN, _FAINT = "#222222", "#8a8a8a"
_WIDTH, _HEIGHT, _SIDE = 12.6, 9.2, 2.6  # inches: the figure, a picture
_MARGIN, _DPI = 0.25, 150
_LINE = 0.195  # inches from line to line
_FONT = 9.3  # points
_LONGEST = 540  # characters of a paragraph that fits beside its picture


def picture(path: Path, seed: int = 0) -> None:
    """Four scenes with three sentences marked, and two scenes of a distractor group, as a PNG at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white")
    page = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    page.axis("off")
    scenes = list(_handsome(seed))
    for number, (scene, told) in enumerate(scenes):
        _cell(page, number, scene, told, _marked(told), _PLAIN)
    title = "Distractors: the first 77 tokens are the same, the last sentence tells the scenes apart"
    page.text(_MARGIN, _top(4) - 0.17, title, fontsize=11, color=_PLAIN, fontweight="bold", va="baseline")
    pair = _pair(seed, {scene.background for scene, _ in scenes})
    for number, (scene, told) in enumerate(pair, start=4):
        _cell(page, number, scene, told, {len(told) - 1: _INK[0]}, _FAINT)
    page.set(xlim=(0, _WIDTH), ylim=(_HEIGHT, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _handsome(seed: int) -> Iterator[tuple[Scene, list[Told]]]:
    """Scenes of four, five, six and seven things, each on another background, whose paragraphs fit."""
    seen: set[str] = set()
    for count in (4, 5, 6, 7):
        for index in range(10_000):
            scene, told, _ = tell("picture", index, seed)
            if len(scene.things) == count and scene.background not in seen and _fits(told):
                seen.add(scene.background)
                yield scene, told
                break


def _pair(seed: int, seen: set[str]) -> list[tuple[Scene, list[Told]]]:
    """Two scenes of the first distractor group that fits and has a background of its own."""
    for first in range(0, 10_000, GROUP):
        scenes = [tell("distractors", first + member, seed)[:2] for member in range(2)]
        if all(_fits(told) and scene.background not in seen for scene, told in scenes):
            return scenes
    raise AssertionError("no short group among thousands")


def _fits(told: list[Told]) -> bool:
    return sum(len(text) + 1 for text, _ in told) <= _LONGEST


def _marked(told: list[Told]) -> dict[int, str]:
    """The colours of three sentences: the relation with the smallest box, and things outside it."""
    boxes = {index: box for index, (_, box) in enumerate(told) if box}
    things = [index for index, box in boxes.items() if _is_square(box)]
    relation = min(boxes.keys() - things, key=lambda index: _area(boxes[index]))
    outside = [index for index in things if not _meet(boxes[index], boxes[relation])]
    return dict(zip([relation, *outside[:2]], _INK, strict=False))


def _cell(page: Axes, number: int, scene: Scene, told: list[Told], inks: dict[int, str], rest: str) -> None:
    """One picture with its caption to the right; marked sentences and their boxes share a colour."""
    left, top = _MARGIN + (number % 2) * _WIDTH / 2, _top(number)
    page.imshow(render(scene, round(_SIDE * _DPI)), extent=(left, left + _SIDE, top + _SIDE, top))
    for index, ink in inks.items():
        _outline(page, told[index][1], left, top, ink)
    words = [(word, inks.get(index, rest)) for index, (text, _) in enumerate(told) for word in text.split()]
    _write(page, words, left + _SIDE + 0.17, top + 0.14, _WIDTH / 2 - _SIDE - 0.17 - 2 * _MARGIN)


def _outline(page: Axes, box: Box | None, left: float, top: float, ink: str) -> None:
    from matplotlib.patches import Rectangle

    assert box is not None, "only sentences with a box are marked"
    grow = 0.012  # a little air around the thing
    corner = (left + (box[0] - grow) * _SIDE, top + (box[1] - grow) * _SIDE)
    width, height = (box[2] - box[0] + 2 * grow) * _SIDE, (box[3] - box[1] + 2 * grow) * _SIDE
    page.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=ink, linewidth=1.8))


def _write(page: Axes, words: list[tuple[str, str]], left: float, top: float, width: float) -> None:
    """Words in their colours, wrapped at `width` inches, the first base line at `top`."""
    x, y, space = 0.0, top, _length("| |") - 2 * _length("|")  # a space alone has no extent
    for word, ink in words:
        length = _length(word)
        if x + length > width:
            x, y = 0.0, y + _LINE
        page.text(left + x, y, word, fontsize=_FONT, color=ink, va="baseline")
        x += length + space


def _length(text: str) -> float:
    """Inches that a line of text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=_FONT), ismath=False)[0] / 72


def _top(number: int) -> float:
    """Where the picture's top edge is; the distractors stand a little apart."""
    return _MARGIN + (number // 2) * (_SIDE + 0.27) + (0.35 if number >= 4 else 0.0)


def _is_square(box: Box) -> bool:
    return abs((box[2] - box[0]) - (box[3] - box[1])) < 1e-3


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
