"""Sentences survive hard text; policies show what they promise, the same wherever they run."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from longclip import captions
from longclip.captions import (
    All,
    Debias,
    First,
    Groups,
    Merged,
    Policy,
    Sentences,
    Source,
    Whole,
    parse,
    split,
    texts_of,
    tokenise,
)
from longclip.data.loading import collate
from longclip.tokens import Tokenizer, pack
from longclip.types import NO_IDS, Box, Caption, Ids, Sample, Sentence, Text, UserError

SAMPLES = [
    json.loads(line)["caption"]
    for line in (Path(__file__).parent / "samples" / "captions.jsonl").read_text("utf-8").splitlines()
]

# Sentences as they should come out; joined by the separator they make the input.
HARD = {
    "decimals": (" ", ["A pole 3.5 m tall stands.", "It cost $3.50 in 1990.", "It is red."]),
    "saints": (" ", ["Near St. Paul Cathedral is Mt. Hood.", "The Dr. Smith clinic is open."]),
    "latin": (" ", ["Toys, e.g. this one, i.e. The Bear, hang vs. others.", "Some fell."]),
    "initials": (" ", ["Mr. J. R. R. Tolkien met J.R.R. Martin and George W. Bush.", "He smiled."]),
    "juniors": (" ", ["Jr. High is near Martin Luther King Jr. Park.", "Gov. Smith spoke."]),
    "states": (" ", ["The U.S. flag flies in the U.S.", "The wind blows.", "At 5 p.m. the sun sets."]),
    "numbers": (" ", ["Route No. 12 goes on.", "Fig. 3 shows it at 5 ft. from here."]),
    "quotes": (
        " ",
        ['A sign reads "Stop here. Go back."', "The car waits.", 'He said "Hello."', "She left."],
    ),
    "curly quotes": (" ", ["“Stop. Go,” it says.", "It is red."]),
    "inches": (" ", ['A 6" pole stands.', 'A 5" one lies.']),
    "ellipses": (" ", ["He waits...", "Then he goes... but not far.", "Well…", "Then he stops…and goes."]),
    "marks": (" ", ["Is it?", "Yes!", "No?!", "Wow!!!", "The end."]),
    "brackets": (" ", ["A box (with a lid. And more) sits.", "It is old."]),
    "hyphen bullets": ("\n", ["- A red ball", "- A blue cube."]),
    "star bullets": ("\n", ["* item one", "* item two"]),
    "numbered": ("\n", ["1. A red ball.", "2. A blue cube", "12. The last one."]),
    "numbered in a line": (" ", ["1. A red ball.", "2. A blue cube.", "3. A cat."]),
    "chinese": ("", ["这是一只猫。", "它很大！", "是吗？", "是。"]),
    "chinese quotes": ("", ["这是“猫。”", "它很大。"]),
    "chinese ASCII marks": ("", ["很好!", "是吗?!", "是。"]),
    "mixed scripts": (" ", ["Tokyo, Japan.", "東京タワー。", "Next one."]),
    "newlines": ("\n", ["a title without a stop", "The first line.", "The second"]),
    "windows newlines": ("\r\n", ["one", "two"]),
    "end of sentence marks": ("</s>", ["first line", "second line"]),
    "small letters": (
        " ",
        ["a tall tree.", "see dr. smith, e.g. this one.", "it is 5 ft. tall.", "yes!", "ok"],
    ),
    "missing space": ("", ["It is on the rim.", "The second is not."]),
    "names with dots": (" ", ["The file a.Txt and Node.JS at example.com are here.", "The end."]),
    "one word": ("", ["Daytime"]),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SimpleTokenizer(), 248)


def pieces(text: str, method: str = "syntok") -> list[str]:
    return [text[a:b] for a, b in split(text, method)]


def of(*numbers: int) -> Ids:
    return array("H", numbers)


def told(text: Text | None) -> tuple[int, ...]:
    assert text is not None
    return tuple(text.ids)


def made(source: str, count: int, first_id: int = 100) -> Caption:
    """A caption of `count` sentences with two ids each, none of them equal."""
    sentences = [Sentence(3 * i, 3 * i + 2, of(first_id + 2 * i, first_id + 2 * i + 1)) for i in range(count)]
    return Caption(source, "a. " * count, tuple(sentences))


def drawn(policy: Policy, given: list[Caption], times: int = 400) -> list[list[Text]]:
    return [policy(given, random.Random(seed)) for seed in range(times)]


# ---------------------------------------------------------------- splitting


@pytest.mark.parametrize("name", HARD)
def test_hard_cases_split_where_sentences_end(name: str) -> None:
    separator, sentences = HARD[name]
    assert pieces(separator.join(sentences)) == sentences


@pytest.mark.parametrize("method", ["syntok", "dreamlip"])
@pytest.mark.parametrize("text", [*SAMPLES, "", " ", "...", "\n\n</s> \n", " a.  b ", "_x_ (y. Z"])
def test_spans_are_stripped_ordered_and_cover_the_text(text: str, method: str) -> None:
    end = 0
    for start, stop in split(text, method):
        assert end <= start < stop
        assert text[start:stop] == text[start:stop].strip()
        assert not text[end:start].replace("</s>", "").strip(" \n.")
        end = stop
    assert not text[end:].replace("</s>", "").strip(" \n.")


def test_dreamlip_cuts_at_every_full_stop() -> None:
    text = "A 3.5 m pole.  St. Paul</s>line two\nend..."
    assert pieces(text, "dreamlip") == ["A 3", "5 m pole", "St", "Paul", "line two", "end"]


def test_unknown_splitter_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"'spacy'.*syntok, dreamlip"):
        split("A cat.", "spacy")


# ---------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    "text",
    [
        *SAMPLES,
        *(separator.join(sentences) for separator, sentences in HARD.values() if separator != "</s>"),
        "It is &lt;b&gt;bold&lt;/b&gt;. R&amp;B &#10; A literal <end_of_text>. The 😀. İstanbul.ΟΔΟΣ. Next",
        "他说。「好。」走了。's day 。。。 x's。'tis",
        "It's. 'Tis. Dog.'s Foo's.The 's. They're.Then",
    ],
)
def test_sentence_ids_concatenate_to_open_clip_ids(text: str, tokenizer: Tokenizer) -> None:
    caption = parse(text, "raw", tokenizer)
    assert [i for s in caption.sentences for i in s.ids] == SimpleTokenizer().encode(text)


def test_sentence_ids_of_generated_texts_concatenate(tokenizer: Tokenizer) -> None:
    rng, reference = random.Random(1), SimpleTokenizer()
    atoms = [
        "The",
        "dog's",
        "'s",
        '"',
        "“",
        "。",
        "！",
        "?",
        ".",
        "...",
        "…",
        "\n",
        "猫",
        "「",
        "」",
        "é",
        "😀",
        "3",
    ]
    atoms += ["e.g.", "St.", "(", ")", "-", "_", "&amp;", "<end_of_text>", "İ", "ΟΔΟΣ", "1.", "small"]
    for _ in range(1500):
        text = "x" + "".join(rng.choice(atoms) + rng.choice(["", " "]) for _ in range(rng.randint(1, 14)))
        caption = parse(text, "raw", tokenizer)
        assert [i for s in caption.sentences for i in s.ids] == reference.encode(text), repr(text)


def test_spans_point_into_the_stored_text(tokenizer: Tokenizer) -> None:
    caption = parse(" A\tred  ball\nB &amp; C.</s>Dogs.  The end. ", "raw", tokenizer)
    assert caption.text == "A red ball B & C. Dogs. The end."
    found = [caption.text[s.start : s.end] for s in caption.sentences]
    assert found == ["A red ball", "B & C.", "Dogs.", "The end."]
    assert [s.ids for s in caption.sentences] == [tokenizer.ids(text) for text in found]


def test_boxes_go_to_their_sentences(tokenizer: Tokenizer) -> None:
    box: Box = (0.0, 0.0, 0.5, 1.0)
    caption = parse("A cat. A dog.", "raw", tokenizer, boxes=[None, box])
    assert [s.box for s in caption.sentences] == [None, box]
    with pytest.raises(UserError, match=r"2 sentences but 1 boxes"):
        parse("A cat. A dog.", "raw", tokenizer, boxes=[box])


@pytest.mark.parametrize("text", ["", "  \n ", "</s>", "&nbsp;"])
def test_empty_captions_are_refused(text: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"'raw' in rows.jsonl:7 is empty"):
        parse(text, "raw", tokenizer, where="rows.jsonl:7")


@pytest.mark.parametrize("text", [None, 3, ["A cat."], b"A cat."])
def test_captions_that_are_no_strings_are_refused(text: object, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not a string"):
        parse(text, "raw", tokenizer)


def test_tokenise_fills_in_what_parse_would_have_made(tokenizer: Tokenizer) -> None:
    caption = parse(SAMPLES[0], "raw", tokenizer)
    bare = caption._replace(sentences=tuple(s._replace(ids=()) for s in caption.sentences))
    assert tokenise(bare, tokenizer) == caption


def test_a_string_is_no_list_of_captions() -> None:
    """Trap 20: a string taken for a list trains on single letters, to chance level."""
    assert texts_of(["A cat.", "!"], "row 1") == ["A cat.", "!"]
    assert texts_of(("A cat.",), "row 1") == ["A cat."]
    assert texts_of("A cat.", "row 1", allow_string=True) == ["A cat."]
    with pytest.raises(UserError, match=r"row 1 are one string \('A cat.'\)"):
        texts_of("A cat.", "row 1")
    with pytest.raises(UserError, match=r"single letters \('A cat.'\)"):
        texts_of(list("A cat."), "row 1", allow_string=True)
    for wrong in (None, 3, [1, 2], ["A cat.", None], {"a": "b"}, b"A cat."):
        with pytest.raises(UserError, match="row 1 must be a list of strings"):
            texts_of(wrong, "row 1")


# ---------------------------------------------------------------- policies


def test_whole_is_the_first_admitted_caption() -> None:
    given = [made("raw", 1, 0), made("long", 3, 100), made("long", 2, 200)]
    rng = random.Random(0)
    assert Whole()(given, rng) == [Text(of(0, 1))]
    assert Whole(source="long")(given, rng) == [Text(of(100, 101, 102, 103, 104, 105))]
    assert Whole(source=["long", "raw"])(given, rng) == [Text(of(0, 1))]
    assert Whole(join=True)(given, rng)[0].ids == of(0, 1, *range(100, 106), *range(200, 204))
    assert Whole(source="none")(given, rng) == []


def test_limit_counts_start_and_end_token(tokenizer: Tokenizer) -> None:
    short = Tokenizer(SimpleTokenizer(), 77)
    caption = parse(max(SAMPLES, key=len), "raw", tokenizer)
    shown = Whole(limit=77)([caption], random.Random(0))
    assert (
        pack([shown], tokenizer).tokens_T.tolist()
        == pack([Whole()([caption], random.Random(0))], short)[0].tolist()
    )


def test_first_is_the_first_sentence_of_the_whole() -> None:
    given = [made("raw", 1, 0), made("long", 3, 100)]
    assert First()(given, random.Random(0)) == [Text(of(0, 1))]
    assert First(source="long")(given, random.Random(0)) == [Text(of(100, 101))]


def test_absent_sources_are_masked() -> None:
    groups = Groups({"raw": Source("raw"), "sub": Sentences(2, source="long")}, seed=0)
    shown = groups.show([made("long", 1)], "a", 0)
    assert shown == (None, Text(of(100, 101)), None)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_every_sentence_can_be_drawn_first_and_last(merge: int) -> None:
    given = [made("a", 4, 100), made("b", 1, 200), made("c", 2, 300)]
    runs = {
        tuple(tuple(s.ids) for s in c.sentences[i : i + merge])
        for c in given
        for i in range(len(c.sentences))
    }
    expected = {sum(run, ()) for run in runs}
    seen = Counter(told(text) for texts in drawn(Sentences(2, merge), given) for text in texts)
    assert set(seen) == expected
    mean = 400 * 2 / len(expected)
    assert all(0.7 * mean < times < 1.3 * mean for times in seen.values()), seen


def test_draws_never_repeat_and_small_pools_leave_slots_empty() -> None:
    """Trap 21."""
    for texts in drawn(Sentences(6), [made("a", 3, 100), made("b", 1, 200)], 50):
        assert len(texts) == 4 == len({told(text) for text in texts})
    groups = Groups({"sub": Sentences(6)}, seed=0)
    assert groups.show([made("a", 4)], "key", 0)[4:] == (None, None)
    assert len({told(text) for texts in drawn(Sentences(3), [made("a", 1)], 5) for text in texts}) == 1


def test_equal_sentences_of_two_captions_count_once() -> None:
    assert len(Sentences(6)([made("a", 2, 100), made("b", 2, 100)], random.Random(0))) == 2


def test_merged_sentences_stay_within_their_caption() -> None:
    for texts in drawn(Sentences(3, 2), [made("a", 3, 100), made("b", 3, 200)], 50):
        assert all(len({i // 100 for i in text.ids}) == 1 for text in texts)


def test_merged_shows_one_to_three_sentences_half_of_them_in_a_row() -> None:
    given = [made("a", 4, 100), made("b", 4, 200)]
    rows = {
        tuple(j for s in c.sentences[i : i + n] for j in s.ids)
        for c in given
        for i in range(4)
        for n in (1, 2, 3)
    }
    seen = [told(text) for texts in drawn(Merged(1), given, 3000) for text in texts]
    sizes = Counter(len(ids) // 2 for ids in seen)
    assert sizes.keys() == {1, 2, 3}
    assert all(900 < times < 1100 for times in sizes.values()), sizes
    assert {s.ids[0] for c in given for s in c.sentences} == {ids[0] for ids in seen}
    several = [ids for ids in seen if len(ids) > 2]
    in_a_row = sum(ids in rows for ids in several) / len(several)
    # Random ones are in a row by chance: 6 of 56 ordered pairs, 4 of 336 ordered triples.
    assert abs(in_a_row - (0.5 + 0.5 * (6 / 56 + 4 / 336) / 2)) < 0.04
    assert all(len(set(ids)) == len(ids) for ids in seen)


def test_merged_leaves_slots_empty_where_it_drew_the_same() -> None:
    for texts in drawn(Merged(8), [made("a", 2)], 50):
        assert len({told(text) for text in texts}) == len(texts) <= 4
    assert Merged(8)([], random.Random(0)) == []
    assert Merged(2, source="none")([made("a", 2)], random.Random(0)) == []


def test_boxes_follow_their_sentences() -> None:
    left, right = (0.0, 0.0, 0.4, 0.5), (0.3, 0.2, 0.9, 0.6)
    a, b, c = made("a", 3).sentences
    caption = Caption("a", "", (a._replace(box=left), b._replace(box=right), c))
    by_ids = {told(t): t.box for t in Sentences(3)([caption], random.Random(0))}
    assert by_ids == {(100, 101): left, (102, 103): right, (104, 105): None}
    merged = {told(t): t.box for t in Sentences(3, 2)([caption], random.Random(0))}
    assert merged == {
        (100, 101, 102, 103): (0.0, 0.0, 0.9, 0.6),
        (102, 103, 104, 105): None,
        (104, 105): None,
    }


def test_debias_draws_and_shifts_over_the_whole_range() -> None:
    """methods.md section 2: s1 never, n in 1..k-1, any order, n_pre in 0..n_post, nothing cut."""
    caption, context = made("a", 4), 12
    numbers, orders, shifts = Counter[int](), set(), dict[int, set[int]]()
    for (text,) in drawn(Debias(context), [caption], 2000):
        shift = next(i for i, token in enumerate(text.ids) if token != 0)
        rest = told(text)[shift:]
        chosen = [rest[i : i + 2] for i in range(0, len(rest), 2)]
        assert set(chosen) <= {tuple(s.ids) for s in caption.sentences[1:]}
        assert len(set(chosen)) == len(chosen)
        assert len(text.ids) + 2 <= context
        numbers[len(chosen)] += 1
        orders.add(tuple(chosen))
        shifts.setdefault(len(chosen), set()).add(shift)
    assert set(numbers) == {1, 2, 3}
    assert all(abs(times - 2000 / 3) < 100 for times in numbers.values()), numbers
    assert len(orders) == 3 + 6 + 6
    assert shifts == {n: set(range(context - 2 - 2 * n + 1)) for n in (1, 2, 3)}


def test_debias_shows_the_only_sentence_there_is() -> None:
    shown = [text for (text,) in drawn(Debias(5), [made("a", 1)], 50)]
    assert {told(text) for text in shown} == {(100, 101), (0, 100, 101)}


def test_debias_leaves_long_texts_to_pack() -> None:
    assert {told(text) for (text,) in drawn(Debias(3), [made("a", 2)], 20)} == {(102, 103)}


def test_debias_ends_up_as_the_paper_lays_it_out(tokenizer: Tokenizer) -> None:
    (text,) = Debias(248)([parse(SAMPLES[0], "raw", tokenizer)], random.Random(3))
    packed = pack([[text]], tokenizer)
    assert packed.tokens_T[0] == tokenizer.prefix[0]
    assert packed.tokens_T[-1] == tokenizer.suffix[0]
    assert packed.dropped_BK.item() == 0


def test_all_gives_each_caption_a_slot() -> None:
    given = [made("a", 1, 0), made("b", 2, 100), made("a", 1, 200)]
    assert [told(t) for t in All(5)(given, random.Random(0))] == [(0, 1), (100, 101, 102, 103), (200, 201)]
    assert [told(t) for t in All(1, source="b")(given, random.Random(0))] == [(100, 101, 102, 103)]
    assert Groups({"all": All(5)}, seed=0).show(given, "a", 0)[3:] == (None, None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Sentences(0), "Sentences.count is 0"),
        (lambda: Sentences(2, merge=0), "Sentences.merge is 0"),
        (lambda: Sentences("6"), "Sentences.count is '6'"),  # type: ignore[arg-type]
        (lambda: Merged(0), "Merged.count is 0"),
        (lambda: Merged(2, most=0), "Merged.most is 0"),
        (lambda: Whole(limit=2), "Whole.limit is 2.* at least 3"),
        (lambda: All(0), "All.count is 0"),
        (lambda: Debias(2), "Debias.context_length is 2"),
        (lambda: Groups({}, seed=0), "no caption groups"),
    ],
)
def test_impossible_settings_are_refused(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]


# ---------------------------------------------------------------- groups

RECIPE: dict[str, Policy] = {"long": Whole(), "short": First(), "sub": Sentences(3, 2), "debias": Debias(40)}
PINNED = [
    (100, 101, 102, 103, 104, 105),
    (100, 101),
    (104, 105),
    (102, 103),
    (0, 0, 0, 0, 104, 105, 102, 103),
]
IMAGE = [made(name, 4, 1000 * i) for i, name in enumerate("abcde", start=1)]


def test_slots_lie_side_by_side() -> None:
    groups = Groups(RECIPE, seed=0)
    assert groups.slots == {
        "long": slice(0, 1),
        "short": slice(1, 2),
        "sub": slice(2, 5),
        "debias": slice(5, 6),
    }
    assert groups.count == 6 == len(groups.show(IMAGE, "a", 0))


def test_groups_of_one_caption_show_the_same_one() -> None:
    groups = Groups(RECIPE, seed=0)
    shown = [groups.show(IMAGE, f"key{i}", 0) for i in range(60)]
    for texts in shown:
        long, short, debias = texts[0], texts[1], texts[5]
        assert long is not None
        assert short is not None
        assert debias is not None
        assert long.ids[:2] == short.ids
        assert {i // 1000 for i in debias.ids if i} == {long.ids[0] // 1000}
    assert {texts[0].ids[0] // 1000 for texts in shown if texts[0]} == {1, 2, 3, 4, 5}


def test_shown_texts_depend_on_seed_epoch_and_key_alone() -> None:
    def shown(seed: int, epoch: int, key: str) -> tuple[Text | None, ...]:
        return Groups(RECIPE, seed).show(IMAGE, key, epoch)

    base = shown(0, 0, "a")
    random.seed(5)
    warm = Groups(RECIPE, 0)
    warm.show(IMAGE, "other", 3)
    assert warm.show(IMAGE, "a", 0) == base
    assert all(shown(*other) != base for other in [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")])


def test_another_process_shows_the_same_texts() -> None:
    """Pinned, so that nothing which differs between processes or machines (string hashing) can be in it."""
    groups = Groups({"long": Whole(), "sub": Sentences(3), "debias": Debias(12)}, seed=7)
    shown = groups.show([made("a", 3, 100), made("b", 3, 200)], "key", 2)
    assert [told(text) for text in shown if text] == PINNED


def test_adding_a_group_leaves_the_others_alone() -> None:
    more = {"extra": Sentences(2), **RECIPE}
    assert Groups(more, 0).show(IMAGE, "a", 0)[2:] == Groups(RECIPE, 0).show(IMAGE, "a", 0)


def test_judging_keeps_the_given_order() -> None:
    groups = Groups({"all": All(5)}, seed=0, shuffle=False)
    shown = groups.show(IMAGE, "a", 3)
    assert [text.ids[0] // 1000 for text in shown if text] == [1, 2, 3, 4, 5]


def test_a_sample_without_captions_is_named() -> None:
    with pytest.raises(UserError, match="'img7' has no captions"):
        Groups(RECIPE, 0).show([], "img7", 0)


def test_captions_without_ids_are_not_trained_on_silently() -> None:
    bare = Caption("raw", "A cat.", (Sentence(0, 6, NO_IDS),))
    with pytest.raises(UserError, match=r"'img7' has a caption without token ids"):
        Groups({"long": Whole()}, 0).show([bare], "img7", 0)


def test_what_recipes_name_is_offered_here() -> None:
    assert all(getattr(captions, name) for name in captions.__all__)


def test_a_policy_may_write_texts_of_its_own():
    def written(captions, rng, progress=0.0):
        return [Text(NO_IDS, words="a red square", weight=0.5), Text(of(5, 6), box=(0, 0, 1, 1))]

    written.count = 3
    groups = Groups({"own": written}, seed=0).reading(lambda words: of(*map(len, words.split())))
    first, second, third = groups.show(IMAGE, "a", 0)
    assert (told(first), told(second)) == ((1, 3, 6), (5, 6))
    assert third is None
    batch = collate(
        [Sample("a", torch.zeros(3, 4, 4, dtype=torch.uint8), (first, second, third))],
        Tokenizer(SimpleTokenizer(), 77),
    )
    assert batch.weights_BK.tolist() == [[0.5, 1.0, 0.0]]
    assert batch.boxes_BK4[0, 1].tolist() == [0, 0, 1, 1]
    assert batch.boxes_BK4[0, [0, 2]].isnan().all()
