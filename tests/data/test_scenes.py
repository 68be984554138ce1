"""Scenes: true, told in whole, reproducible, and distractors that only a late sentence tells apart."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest

from longclip.captions import parse
from longclip.data import scenes
from longclip.data.scenes.facts import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing, compose
from longclip.data.scenes.render import render
from longclip.data.scenes.text import GROUP, describe, tell
from longclip.data.tars.dataset import Dataset
from longclip.tokens import Tokenizer
from longclip.types import Caption, UserError

TOKENIZER = scenes.default_tokenizer()
SOME = [tell("train", index, 0) for index in range(400)]
OPEN_CLIP = open_clip.tokenizer.SimpleTokenizer(context_length=248)


def bytes_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def text_of(told: list) -> str:
    return " ".join(text for text, _ in told)


def alone(thing: Thing, size: int) -> np.ndarray:
    """Where the thing's pixels are, by drawing the scene with it and without."""
    empty, full = render(Scene("white", ()), size), render(Scene("white", (thing,)), size)
    return (empty != full).any(axis=2)


def test_paragraphs_have_80_to_240_tokens() -> None:
    ids = OPEN_CLIP([text_of(told) for _, told, _ in SOME])
    lengths = (ids == OPEN_CLIP.eot_token_id).int().argmax(dim=1) + 1
    assert lengths.min() >= 80
    assert lengths.max() <= 240
    assert 95 <= lengths.float().mean() <= 120, "length costs compute"
    assert (lengths > 160).any(), "the effective-length curve needs long ones too"


def test_sentences_are_the_splitters_and_cover_the_text() -> None:
    for _, told, _ in SOME[:60]:
        boxes = [box for _, box in told]
        assert scenes.caption(told, TOKENIZER) == parse(text_of(told), "scene", TOKENIZER, boxes=boxes)


def test_sentence_ids_concatenate_to_open_clips() -> None:
    for _, told, _ in SOME[:60]:
        made = scenes.caption(told, TOKENIZER)
        assert TOKENIZER.clean(made.text) == made.text
        assert [i for sentence in made.sentences for i in sentence.ids] == OPEN_CLIP.encode(made.text)


def test_every_thing_is_told_with_its_box_and_the_first_sentence_has_none() -> None:
    for scene, told, _ in SOME:
        assert told[0][1] is None
        for thing in scene.things:
            about = [text for text, box in told if box == thing.box]
            assert len(about) == 1
            assert all(word in about[0].lower() for word in (thing.size, thing.texture, thing.name))
        assert len({thing.name for thing in scene.things}) == len(scene.things), "names are unique"


def test_first_sentence_is_true_and_far_from_unique() -> None:
    numbers = {4: "four", 5: "five", 6: "six", 7: "seven"}
    for scene, told, _ in SOME:
        first = told[0][0].lower()
        assert numbers[len(scene.things)] in first
        assert f"a {scene.background} background" in first
        if "largest" in first:
            largest = max(scene.things, key=lambda thing: SIZES[thing.size])
            assert [thing.size for thing in scene.things].count(largest.size) == 1
            assert first.split()[-1].strip(".") in (largest.colour, largest.shape)
    assert max(Counter(told[0][0] for _, told, _ in SOME).values()) > 1


def test_relations_are_true_of_the_boxes() -> None:
    """Read back from the English: the box of the thing named first against that of the other."""
    true = {
        "left of": lambda a, b: a[2] <= b[0],
        "right of": lambda a, b: a[0] >= b[2],
        "above": lambda a, b: a[3] <= b[1],
        "below": lambda a, b: a[1] >= b[3],
    }
    told_of: Counter[str] = Counter()
    for scene, told, _ in SOME:
        boxes = {thing.name: thing.box for thing in scene.things}
        for text, box in told[1:]:
            named = sorted((name for name in boxes if f"the {name}" in text.lower()), key=text.find)
            if len(named) != 2:
                assert box in boxes.values(), text
                continue
            first, second = reversed(named) if " we see " in text else named
            word = next(word for word in true if word in text.lower())
            a, b = boxes[first], boxes[second]
            assert true[word](a, b), text
            assert box == (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
            told_of[word] += 1
    assert min(told_of[word] for word in true) > 50


def test_places_are_true_of_the_boxes() -> None:
    thirds = {
        "left": (0, 0),
        "right": (0, 2),
        "top": (1, 0),
        "upper": (1, 0),
        "bottom": (1, 2),
        "lower": (1, 2),
    }
    for scene, told, _ in SOME:
        for thing in scene.things:
            text = next(text for text, box in told if box == thing.box).lower()
            centre = (int(thing.x * 3), int(thing.y * 3))
            said = {
                word: thirds[word] for word in thirds if word in text.split() or f"{word}." in text.split()
            }
            assert all(centre[axis] == third for axis, third in said.values()), text
            assert len(said) == (centre[0] != 1) + (centre[1] != 1), text


@pytest.mark.parametrize("size", [32, 72, 101, 240])
def test_boxes_contain_their_things_pixels_and_are_filled(size: int) -> None:
    things = [thing for scene, _, _ in SOME[:25] for thing in scene.things]
    for thing in things[:100]:
        rows, columns = np.nonzero(alone(thing, size))
        left, top, right, bottom = (edge * size for edge in thing.box)
        assert left - 1 <= columns.min() <= left + 0.25 * (right - left)
        assert right - 0.25 * (right - left) - 1 <= columns.max() + 1 <= right + 1
        assert top - 1 <= rows.min() <= top + 0.25 * (bottom - top)
        assert bottom - 0.25 * (bottom - top) - 1 <= rows.max() + 1 <= bottom + 1


def test_boxes_lie_inside_the_picture_and_apart() -> None:
    for scene, told, _ in SOME:
        assert all(0 <= edge <= 1 for _, box in told if box for edge in box)
        boxes = [thing.box for thing in scene.things]
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


@pytest.mark.parametrize("size", [16, 72, 97, 224])
def test_any_size_renders(size: int) -> None:
    picture = render(SOME[0][0], size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES), ("size", tuple(SIZES))],
)
def test_looks_are_distinguishable_at_72_pixels(attribute: str, values: tuple[str, ...]) -> None:
    thing = Thing("circle", "blue", "small", "plain", 0.5, 0.5)
    drawn = [
        render(Scene("white", (thing._replace(**{attribute: value}),))).astype(float) for value in values
    ]
    for i, a in enumerate(drawn):
        for b in drawn[i + 1 :]:
            assert (np.abs(a - b).max(axis=2) > 40).sum() >= 20


def test_backgrounds_are_distinguishable() -> None:
    drawn = [render(Scene(name, ())).mean(axis=(0, 1)) for name in BACKGROUNDS]
    assert all(np.abs(a - b).max() > 20 for i, a in enumerate(drawn) for b in drawn[i + 1 :])


def test_a_distractor_group_reads_the_same_for_77_tokens_and_differs_after() -> None:
    for group in range(60):
        told = [tell("distractors", group * GROUP + member, 0) for member in range(GROUP)]
        ids = OPEN_CLIP([text_of(sentences) for _, sentences, _ in told])
        assert (ids[:, :77] == ids[0, :77]).all()
        assert len({tuple(row) for row in ids.tolist()}) == GROUP
        assert len({text_of(sentences[:-1]) for _, sentences, _ in told}) == 1, (
            "all but the last sentence agree"
        )
        assert len({render(scene).tobytes() for scene, _, _ in told}) == GROUP


def test_a_distractor_group_differs_in_one_attribute_inside_one_box() -> None:
    for group in range(30):
        told = [tell("distractors", group * GROUP + member, 0) for member in range(GROUP)]
        (scene, sentences, meta), others = told[0], told[1:]
        assert [other[2]["group"] for other in told] == [group] * GROUP
        left, top, right, bottom = (round(edge * 72) for edge in sentences[-1][1])
        for other, _, _ in others:
            changed = [(a, b) for a, b in zip(scene.things, other.things, strict=True) if a != b]
            assert len(changed) == 1
            one, two = (thing._asdict() for thing in changed[0])
            assert [key for key in one if one[key] != two[key]] == [meta["attribute"]]
            difference = (render(scene) != render(other)).any(axis=2)
            assert difference.any()
            difference[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = False
            assert not difference.any()


def test_object_order_is_not_reading_order() -> None:
    rows = [[thing.place for thing in scene.things] for scene, _, _ in SOME]
    assert sum(row == sorted(row) for row in rows) < 40


def test_describing_depends_on_nothing_but_the_rng() -> None:
    scene = compose(random.Random(3))
    assert describe(scene, random.Random(1)) == describe(scene, random.Random(1))
    assert describe(scene, random.Random(1)) != describe(scene, random.Random(2))


def test_records_do_not_depend_on_what_was_made_before() -> None:
    whole = list(scenes.records("train", range(6), 0, 72, TOKENIZER))
    assert list(scenes.records("train", [4], 0, 72, TOKENIZER)) == whole[4:5]
    assert list(scenes.records("train", [4], 1, 72, TOKENIZER)) != whole[4:5]
    assert len({record.image for record in whole}) == 6


def test_make_writes_the_same_bytes_on_any_number_of_processes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    small = {"train": 230, "heldout": 7, "groups": 2, "tokenizer": TOKENIZER}
    scenes.make(tmp_path / "one", **small, processes=1)
    scenes.make(
        tmp_path / "three", **small, processes=3, progress=lambda done, total: seen.append((done, total))
    )
    one = bytes_below(tmp_path / "one")
    assert one == bytes_below(tmp_path / "three")
    assert seen[-1] == (245, 245)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"], "nothing temporary stays"


def test_what_make_writes_reads_back(tmp_path: Path) -> None:
    paths = scenes.make(tmp_path / "s", train=5, heldout=0, groups=1, tokenizer=TOKENIZER, processes=1)
    assert sorted(paths) == ["distractors", "train"]
    dataset = Dataset(paths["distractors"])
    assert len(dataset) == GROUP
    expected = list(scenes.records("distractors", range(GROUP), 0, 72, TOKENIZER))
    assert [dataset.record(index) for index in range(GROUP)] == expected
    assert isinstance(expected[0].captions[0], Caption)


def test_make_twice_makes_nothing_new(tmp_path: Path) -> None:
    small = {"train": 5, "heldout": 2, "groups": 1, "tokenizer": TOKENIZER, "processes": 1}
    paths = scenes.make(tmp_path / "s", **small)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert scenes.make(tmp_path / "s", **small) == paths
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    small = {"train": 5, "heldout": 2, "groups": 1, "tokenizer": TOKENIZER, "processes": 1}
    scenes.make(tmp_path / "s", **small)
    with pytest.raises(UserError, match=r"made with seed=0, not seed=7; choose another directory"):
        scenes.make(tmp_path / "s", **small, seed=7)
    shorter = Tokenizer(OPEN_CLIP, 77)
    assert shorter.name_hash == TOKENIZER.name_hash, "the context length changes no shard"


def test_a_foreign_or_unreadable_root_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="exists but holds no scenes"):
        scenes.make(tmp_path, train=1, heldout=1, groups=1, tokenizer=TOKENIZER)
    (tmp_path / "scenes.json").write_text("{")
    with pytest.raises(UserError, match=r"scenes\.json does not list the parameters"):
        scenes.make(tmp_path, train=1, heldout=1, groups=1, tokenizer=TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenes.json", "train"]


def test_an_interrupted_make_leaves_no_root(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    small = {"train": 5, "heldout": 2, "groups": 1, "tokenizer": TOKENIZER, "processes": 1}
    with pytest.raises(KeyboardInterrupt):
        scenes.make(tmp_path / "s", **small, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_scenes_too_small_to_see_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size=8 pixels"):
        scenes.make(tmp_path / "s", size=8, tokenizer=TOKENIZER)


def test_the_manifest_tells_the_parameters(tmp_path: Path) -> None:
    scenes.make(tmp_path / "s", train=3, heldout=1, groups=1, size=32, tokenizer=TOKENIZER, processes=1)
    told = json.loads((tmp_path / "s" / "scenes.json").read_text())
    assert {key: told[key] for key in ("train", "heldout", "groups", "size", "seed")} == {
        "train": 3,
        "heldout": 1,
        "groups": 1,
        "size": 32,
        "seed": 0,
    }


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from longclip.data.scenes.picture import picture

    picture(tmp_path / "some" / "scenes.png", seed=1)
    assert (tmp_path / "some" / "scenes.png").stat().st_size > 50_000
