"""Swapped texts: one thing differs, no caption says it, slots correspond, and chance is seeded."""

import json
import pickle
import random
from array import array
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from longclip.captions import Contrasted, Groups, Sentences, Shuffled, Swapped, Whole
from longclip.captions.lexicon import load
from longclip.captions.swapping import Said, swapped, swaps
from longclip.data.scenes import text as language
from longclip.types import Caption, Ids, Sentence, Text, UserError

PARAGRAPHS = [
    json.loads(line)["caption"]
    for line in (Path(__file__).parent / "samples" / "captions.jsonl").read_text().splitlines()
]
VOCABULARY: dict[str, int] = {}


def read(words: str) -> Ids:
    """A tokenizer of whole words."""
    return array("H", [VOCABULARY.setdefault(word, 1 + len(VOCABULARY)) for word in words.split()])


def said(*ids):
    names = {number: word for word, number in VOCABULARY.items()}
    return " ".join(names[i] for i in ids)


def caption(*sentences, source="a"):
    """Sentences with their ids, parted by a space."""
    spans, start = [], 0
    for sentence in sentences:
        spans.append(Sentence(start, start + len(sentence), read(sentence), (0.0, 0.0, 0.5, 0.5)))
        start += len(sentence) + 1
    return Caption(source, " ".join(sentences), tuple(spans))


def paragraph(written):
    return caption(*[part.strip().rstrip(".") + "." for part in written.split(". ")])


def every(sentence, kind, *others):
    """All swaps of a kind that no caption says."""
    lexicon = load()
    known = Said([sentence, *others], lexicon)
    return {swapped(sentence, s) for s in swaps(sentence, kind, lexicon) if not known.has(sentence, s)}


@pytest.mark.parametrize(
    ("kind", "sentence", "wrong"),
    [
        ("colour", "A red cat sleeps.", "A green cat sleeps."),
        ("colour", "An orange cat sleeps.", "A red cat sleeps."),
        ("colour", "It is a red cat.", "It is an orange cat."),
        ("colour", "Red cats sleep.", "Orange cats sleep."),
        ("number", "There are two dogs.", "There are seven dogs."),
        ("size", "A big dog barks.", "A small dog barks."),
        ("material", "A wooden chair stands there.", "A metal chair stands there."),
        ("action", "A man is sitting.", "A man is standing."),
        ("relation", "The cup is left of the plate.", "The cup is right of the plate."),
        ("relation", "Beneath the tree lies a dog.", "Above the tree lies a dog."),
        ("relation", "It is in the top left corner.", "It is in the bottom left corner."),
        ("order", "The red cup is left of the blue plate.", "The blue cup is left of the red plate."),
        ("order", "The red cup is left of the blue plate.", "The red plate is left of the blue cup."),
        ("order", "A man riding a horse is tall.", "A horse riding a man is tall."),
    ],
)
def test_one_thing_is_swapped(kind, sentence, wrong):
    assert wrong in every(sentence, kind)


@pytest.mark.parametrize(
    ("kind", "sentence", "others", "never"),
    [
        ("colour", "A red cat sleeps.", ["The cat is partly white."], "A white cat sleeps."),
        ("colour", "The largest is red.", ["A blue star is there."], "The largest is blue."),
        ("colour", "A grey cat sleeps.", [], "A gray cat sleeps."),
        ("size", "A big dog barks.", [], "A large dog barks."),
        ("number", "There are two dogs.", ["Three dogs run."], "There are three dogs."),
        ("relation", "The cup is left of the plate.", ["Right of the cup is the plate."],
         "The cup is right of the plate."),
        ("order", "The red cup is left of the blue plate.", ["the blue cup is left of the red plate!"],
         "The blue cup is left of the red plate."),
        ("order", "The red cup is left of the blue plate.", ["A red plate lies by a blue cup."],
         "The red plate is left of the blue cup."),
        ("order", "A black cat and a white dog sleep.", [], "A white cat and a black dog sleep."),
        ("order", "A black, white flag waves.", [], "A white, black flag waves."),
        ("order", "The cat is next to the dog.", [], "The dog is next to the cat."),
    ],
)  # fmt: skip
def test_what_is_true_or_said_is_never_made(kind, sentence, others, never):
    assert never not in every(sentence, kind, *others)
    if others:
        assert never in every(sentence, kind), "it is the other caption that forbids it"


def true_of(scene):
    """Every sentence of the scenes' language that holds, in small letters, whether it is told or not."""
    found = set()
    for thing in scene.things:
        row, column = thing.place
        told = {"size": thing.size, "texture": thing.texture, "name": thing.name}
        found |= {
            template.format(article=article, place=place, **told)
            for template in language._THING
            for place in language._PLACES[row][column]
            for article in ("a", "an")
        }
    for a, b in permutations(scene.things, 2):
        held = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
        found |= {
            template.format(first=a.name, second=b.name, word=language._WORDS[word])
            for template in language._RELATION
            for word in held
            if held[word]
        }
    for general in language._GENERAL:
        start = general.format(number=language._NUMBERS[len(scene.things)], background=scene.background)
        large = [t for t in scene.things if t.size == "large"]
        told = {f", and the largest is {said}" for t in large for said in (t.colour, f"a {t.shape}")}
        found |= {start + end + "." for end in {"", *told}}
    return {sentence.lower() for sentence in found}


def test_negatives_of_scenes_are_false_of_the_scene():
    kinds, false = Counter(), Counter()
    for index in range(40):
        scene, told, _ = language.tell("train", index, 0)
        known, whole = true_of(scene), caption(*(sentence for sentence, _ in told))
        assert {sentence.lower() for sentence, _ in told} <= known
        for kind in ("colour", "number", "size", "material", "relation", "order"):
            policy = Swapped(Sentences(20), negatives=2, kinds=[kind])
            made = [t.words.lower() for t in policy([whole], random.Random(index)) if t]
            kinds[kind] += len(made)
            false[kind] += sum(words not in known for words in made)
    assert kinds == false
    assert min(kinds.values()) > 50


def test_words_inside_others_are_left_alone():
    assert every("The bored leftover tenants blackened a redwood.", "colour") == set()
    assert every("Someone asked for tennis.", "number") == set()


@pytest.mark.parametrize("text", PARAGRAPHS, ids=range(len(PARAGRAPHS)))
def test_real_captions_differ_from_their_negatives_in_one_sentence(text):
    whole = paragraph(text)
    original = [whole.text[s.start : s.end] for s in whole.sentences]
    found = [t for t in Swapped(Whole(), negatives=10)([whole], random.Random(0)) if t]
    assert found
    assert len({t.words for t in found}) == len(found)
    for one in found:
        assert one.words != whole.text
        kept = sum(sentence in one.words for sentence in original)
        assert kept >= len(original) - 1
        assert abs(len(one.words.split()) - len(whole.text.split())) <= 3


def test_negatives_stand_in_the_slots_of_their_texts():
    plain = caption("Nothing to swap here.", "A big cat sleeps.", "A tall tree grows.")
    groups = Groups(
        {"sub": Sentences(3), "other": Whole(), "sub-wrong": Swapped(Sentences(3), negatives=2)}, seed=0
    ).reading(read)
    for key in "abcdef":
        shown = groups.show([plain], key, epoch=0)
        right, wrong = shown[groups.slots["sub"]], shown[groups.slots["sub-wrong"]]
        for k, text in enumerate(right):
            own = wrong[2 * k : 2 * k + 2]
            words = said(*text.ids)
            assert [w is None for w in own] == (
                [True] * 2 if "Nothing" in words else [False] * 2 if "cat" in words else [False, True]
            )
            for w in filter(None, own):
                assert len(set(words.split()) ^ set(said(*w.ids).split())) == 2  # one word for another
                assert w.box == text.box


def test_chance_is_seeded_and_travels_to_workers():
    policy = Swapped(Sentences(2), negatives=2)
    captions = [paragraph(text) for text in PARAGRAPHS[:2]]
    again = pickle.loads(pickle.dumps(policy))
    first = policy(captions, random.Random(3))
    assert first == again(captions, random.Random(3))
    assert first != policy(captions, random.Random(4))


def test_weights_of_the_right_text_are_kept():
    class Half:
        count = 1

        def __call__(self, captions, rng, progress=0.0):
            return [Text(captions[0].sentences[0].ids, weight=0.5)]

    (wrong,) = Swapped(Half())([caption("A red cat sleeps.")], random.Random(0))
    assert wrong.weight == 0.5


def test_only_what_the_model_reads_is_changed():
    whole = caption("A red cat sleeps.", "A tall tree grows.")
    for seed in range(9):
        (wrong,) = Swapped(Whole(), within=2 + 4)([whole], random.Random(seed))
        assert wrong.words.endswith("A tall tree grows.")
    assert Swapped(Whole(), within=5)([whole], random.Random(0)) == [None]
    changed = {Swapped(Whole())([whole], random.Random(seed))[0].words.split()[-3] for seed in range(9)}
    assert changed == {"tall", "short"}


def test_kinds_take_turns():
    whole = caption("Two red cats are left of a big dog.")
    for seed in range(9):
        found = Swapped(Whole(), negatives=4, kinds=["number", "relation", "size"])(
            [whole], random.Random(seed)
        )
        changed = [set(t.words.split()) - set(whole.text.split()) for t in found]
        assert {"right"} in changed
        assert changed[0] | changed[1] | changed[2] > {"right"}


def test_judging_shows_a_sentence_and_the_same_with_one_thing_swapped():
    whole = caption("Nothing to swap here.", "A red cat sleeps.", "A tall tree grows.")
    right, wrong = Contrasted("colour")([whole], random.Random(0))
    assert said(*right.ids) == "A red cat sleeps."
    assert wrong.words.startswith("A")
    assert wrong.words.endswith("cat sleeps.")
    right, wrong = Contrasted("colour", whole=True)([whole], random.Random(0))
    assert said(*right.ids) == whole.text
    assert wrong.words.endswith("cat sleeps. A tall tree grows.")
    assert Contrasted("number")([whole], random.Random(0)) == []
    assert Contrasted("colour", source="b")([whole], random.Random(0)) == []


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(UserError, match="kinds of swaps has 'color'; choose from colour, number"):
        Swapped(Whole(), kinds=["color"])
    with pytest.raises(UserError, match=r"Swapped.negatives is 0"):
        Swapped(Whole(), negatives=0)
    with pytest.raises(UserError, match=r"lexicon=.*none.yaml cannot be used"):
        Swapped(Whole(), lexicon=str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="cut, padded or made of phrases"):
        Swapped(Whole(limit=5))([caption("A red cat sleeps now.")], random.Random(0))


def test_a_lexicon_of_ones_own(tmp_path):
    path = tmp_path / "de.yaml"
    path.write_text(
        "attributes: {farbe: [[rote/dunkelrote, gelbe]]}\nrelations: [[links, rechts]]\noriented: [auf]\n"
        "symmetric: [und]\nglue: [ist]\nnouns: []\nfunction: [die, der]\n"
    )
    policy = Swapped(Whole(), kinds=["farbe"], lexicon=str(path))
    assert policy([caption("Die dunkelrote Katze.")], random.Random(0))[0].words == "Die gelbe Katze."


def test_reordered_texts_are_traced():
    whole = caption("A red cat sleeps.", "A tall tree grows.", "Two dogs bark.")
    (wrong,) = Swapped(Shuffled())([whole], random.Random(1))
    (right,) = Shuffled()([whole], random.Random(1))
    assert len(set(said(*right.ids).split()) ^ set(wrong.words.split())) == 2
