"""What is said about a scene: one general sentence, then one for every thing and for some relations.

In: a split, an index and a seed (`tell`), or a `Scene` and a `random.Random` that chooses order and
wording (`describe`). Out: sentences with the box of what they speak of. The language is regular on
purpose (few phrasings for a fact), so that a small model learns it in minutes, and every phrasing is
long enough that no paragraph falls below 80 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from longclip.data.scenes.facts import Relation, Scene, Thing, compose, relations, vary
from longclip.types import Box

Told = tuple[str, Box | None]
"""A sentence and its box; None where it speaks of the whole picture."""

GROUP = 4
"""Scenes in a distractor group."""

_NUMBERS = {4: "four", 5: "five", 6: "six", 7: "seven"}
_GENERAL = (
    "there are {number} objects on a {background} background",
    "the picture shows {number} objects on a {background} background",
    "{number} different objects lie on a {background} background",
)
_THING = (
    "{article} {size} {texture} {name} is {place}.",
    "{place} is {article} {size} {texture} {name}.",
    "{article} {name}, {size} and {texture}, lies {place}.",
)
_RELATION = ("The {first} is {word} the {second}.", "{word} the {second} we see the {first}.")
_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLACES = (
    (
        ("in the upper left corner", "at the top left"),
        ("along the top edge", "at the very top"),
        ("in the upper right corner", "at the top right"),
    ),
    (
        ("along the left edge", "on the left side"),
        ("near the very centre", "in the very middle"),
        ("along the right edge", "on the right side"),
    ),
    (
        ("in the lower left corner", "at the bottom left"),
        ("along the bottom edge", "at the very bottom"),
        ("in the lower right corner", "at the bottom right"),
    ),
)
_EXTRA_RELATIONS = (0,) * 13 + (1, 2, 6)  # a long tail: most paragraphs are short, some approach 200 tokens


def tell(split: str, index: int, seed: int) -> tuple[Scene, list[Told], dict[str, object]]:
    """The scene, its sentences and its meta: the one place where randomness begins."""
    if split != "distractors":
        rng = random.Random(f"{seed}/{split}/{index}")
        scene = compose(rng)
        return scene, describe(scene, rng), {"things": len(scene.things)}
    group, member = divmod(index, GROUP)
    rng = random.Random(f"{seed}/{split}/{group}")
    # Six things at least: the sentences before the last then always pass 77 tokens.
    variants, odd, attribute = vary(compose(rng, fewest=6), rng, GROUP)
    scene = variants[member]
    meta = {"things": len(scene.things), "group": group, "member": member, "attribute": attribute}
    return scene, describe(scene, rng, last=odd), meta


def describe(scene: Scene, rng: random.Random, last: int | None = None) -> list[Told]:
    """The paragraph, sentence by sentence.

    A relation comes somewhere after both of its things. With `last`, the sentence of that thing ends the
    paragraph and no relation names it; order and wording do not depend on what the things look like, so
    scenes that differ only in that thing get the same paragraph up to there.
    """
    things = [index for index in range(len(scene.things)) if index != last]
    known = [found for found in relations(scene.things) if last not in (found.first, found.second)]
    count = max(1, 7 - len(things)) + rng.choice(_EXTRA_RELATIONS)
    chosen = rng.sample(known, min(count, len(known)))
    rng.shuffle(things)
    told = [(general(scene, rng), None), *_told(things, chosen, scene, rng)]
    if last is not None:
        told.append((about(scene.things[last], rng), scene.things[last].box))
    return told


def general(scene: Scene, rng: random.Random) -> str:
    """The first sentence: how many things, the background, and where one is largest, something about it."""
    text = rng.choice(_GENERAL).format(number=_NUMBERS[len(scene.things)], background=scene.background)
    large = [thing for thing in scene.things if thing.size == "large"]
    if len(large) == 1:
        told = rng.choice((f"is {large[0].colour}", f"is a {large[0].shape}"))
        text += f", and the largest {told}"
    return _capital(text) + "."


def about(thing: Thing, rng: random.Random) -> str:
    """The sentence of one thing: size, texture, colour, shape, place."""
    row, column = thing.place
    template, place = rng.choice(_THING), rng.choice(_PLACES[row][column])
    # Only the phrasing that puts the name first can meet a vowel.
    article = "an" if "{article} {name}" in template and thing.name[0] in "aeiou" else "a"
    words = {"size": thing.size, "texture": thing.texture, "name": thing.name, "place": place}
    return _capital(template.format(article=article, **words))


def relate(relation: Relation, things: Sequence[Thing], rng: random.Random) -> Told:
    """The sentence of one relation, from either side, and the box around both things."""
    first, word, second = relation
    if rng.random() < 0.5:
        first, word, second = second, _OPPOSITE[word], first
    a, b = things[first], things[second]
    text = rng.choice(_RELATION).format(first=a.name, word=_WORDS[word], second=b.name)
    return _capital(text), union(a.box, b.box)


def union(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _told(order: list[int], chosen: list[Relation], scene: Scene, rng: random.Random) -> list[Told]:
    """Sentences of the things in this order, each relation at a random place after its two things."""
    told: list[tuple[float, Told]] = []
    for position, index in enumerate(order):
        told.append((position, (about(scene.things[index], rng), scene.things[index].box)))
    for relation in chosen:
        earliest = max(order.index(relation.first), order.index(relation.second))
        told.append((rng.uniform(earliest, len(order)), relate(relation, scene.things, rng)))
    return [sentence for _, sentence in sorted(told, key=lambda pair: pair[0])]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
