"""Ids are open_clip's, and packing loses nothing but what the context cuts off, which it counts."""

from __future__ import annotations

import json
import pickle
from array import array
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer, get_clean_fn

from longclip import tokens
from longclip.tokens import Tokenizer, pack, stored, unpack
from longclip.types import Text, UserError

SAMPLES = [
    json.loads(line)["caption"]
    for line in (Path(__file__).parent / "samples" / "captions.jsonl").read_text("utf-8").splitlines()
]
HARD = [
    "!",
    "",
    "  two   spaces\tand\ntabs \r\n lines ",
    "caf\u00e9 cafe\u0301 \u00d1and\u00fa ÃƒÂ© â€œquotedâ€\x9d na\u00efve",
    "&lt;b&gt; &amp;amp; &#39;x&#39; R&B AT&T &#10; &nbsp;end",
    "a literal <end_of_text> and <start_of_text>, even glued<end_of_text>s",
    "emoji 😀 👨‍👩‍👧 🇯🇵 done",
    "这是一只猫。它很大！東京タワー 서울의 밤 １２３ＡＢＣ",
    "DOG'S it's they're I'll 'S 'tis ''s",
    "3.5 m, ½ cup, x² + 10,000 = ٣",
    "zero\u200bwidth no\u00a0break \u2028 line \x1b[31mred\x1b[0m \x00 nul \x1c sep",
    "ΟΔΟΣ Straße İstanbul ﬁne ǅ",
    "https://example.com/a-very-long-path/that/never/ends?with=queries&and=more#and-fragments",
]
# What hypothesis puts together: entities, whole, cut short and nested, mojibake, special tokens, scripts,
# marks, control characters, odd whitespace, and words longer than the cache keeps.
STRANGE = """&amp; &lt; &gt &#39; &#x27; &#0; &#128; &amp;amp; &nbsp; &notit; &copy &hearts; & ; Ã© â€™ â€œ Â£
    ï»¿ dâ€™accord <start_of_text> <end_of_text> <|endoftext|> <start_of_ <END_OF_TEXT> </w> dog's THE I'LL 'S
    ''re 10,000 ½ x² ٣ é e\u0301 n\u0303o \u0301 ﬁ ß İ ǅ Σ ς 猫 。 ！ ＡＢＣ １２ ｶﾞ 東京 서울 ภาษา עברית
    العربية देवनागरी 😀 👍🏽 👨‍👩‍👧 🇯🇵 ❤️ “ ” ‘ ’ … — ―""".split()  # noqa: SIM905
CONTROL = (
    "\x00\x01\x08\x1b\x1c\x1f\x7f\x80\x85\x9d\xad\u200b\u200d\u200e\u202e\u2060\ufeff\ufffd\ufffe\U000e0041"
)
SPACE = " \t\n\r\v\f\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"
LONG = ["\x1b[31m", "\r\n", "  ", "a" * 50, "x" * 120, "ab-" * 40, "猫" * 80, "é" * 60]
ATOMS = st.one_of(
    *map(st.sampled_from, (STRANGE, CONTROL, SPACE, LONG)),
    st.text(st.characters(max_codepoint=0x7F), max_size=6),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
FUZZ = settings(
    max_examples=100,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TEXTS = st.lists(ATOMS, max_size=10).map("".join) | st.lists(ATOMS, max_size=10).map(" ".join)


@pytest.fixture(scope="module")
def reference() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(SimpleTokenizer(), 77)


@pytest.mark.parametrize("text", [*SAMPLES, *HARD])
def test_ids_equal_open_clip(text: str, tokenizer: Tokenizer, reference: SimpleTokenizer) -> None:
    for _ in range(2):  # the second time from the cache
        assert tokenizer.ids(tokenizer.clean(text)).tolist() == reference.encode(text)


@FUZZ
@given(text=TEXTS)
def test_ids_of_any_text_equal_open_clip(text: str, tokenizer: Tokenizer, reference: SimpleTokenizer) -> None:
    for _ in range(2):  # the second time from the cache
        assert tokenizer.ids(tokenizer.clean(text)).tolist() == reference.encode(text)


@FUZZ
@given(text=TEXTS)
def test_ids_of_pieces_cut_at_spaces_make_the_ids_of_the_whole(text: str, tokenizer: Tokenizer) -> None:
    cleaned = tokenizer.clean(text)
    pieces = [tokenizer.ids(piece) for piece in cleaned.split(" ")]
    assert list(chain.from_iterable(pieces)) == tokenizer.ids(cleaned).tolist()


@FUZZ
@given(texts=st.lists(st.none() | TEXTS, min_size=6, max_size=6))
def test_any_packed_batch_equals_open_clips_table(
    texts: list[str | None], tokenizer: Tokenizer, reference: SimpleTokenizer
) -> None:
    slots = [None if text is None else Text(tokenizer.ids(tokenizer.clean(text))) for text in texts]
    packed = pack([slots[:3], slots[3:]], tokenizer)
    shown = [text for text in texts if text is not None]
    lengths = packed.lengths_BK.flatten()
    assert (lengths > 0).tolist() == [text is not None for text in texts]
    table = unpack(packed.tokens_T, lengths[lengths > 0], 77)
    assert torch.equal(table, reference(shown, context_length=77) if shown else table[:0])


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_other_cleanings_equal_open_clip(clean: str) -> None:
    reference, tokenizer = SimpleTokenizer(clean=clean), Tokenizer(SimpleTokenizer(clean=clean), 77)
    for text in [*SAMPLES, *HARD]:
        assert tokenizer.ids(tokenizer.clean(text)).tolist() == reference.encode(text)


def test_plain_text_is_cleaned_as_ftfy_would(tokenizer: Tokenizer) -> None:
    """The short cut past ftfy may be taken only where ftfy and unescaping change nothing."""
    for code in range(128):
        text = f"a{chr(code)}b {chr(code)}#39; x{chr(code)}"
        assert tokens.repair(text) == tokens.clip_text.basic_clean(text), hex(code)


def test_clean_keeps_the_case(tokenizer: Tokenizer) -> None:
    assert tokenizer.clean("  A\n Dog &amp; Cat ") == "A Dog & Cat"


def test_a_full_cache_changes_no_ids(monkeypatch: pytest.MonkeyPatch, reference: SimpleTokenizer) -> None:
    monkeypatch.setattr(tokens, "CACHE_LIMIT", 16)
    small = Tokenizer(SimpleTokenizer(), 77)
    for text in [*SAMPLES, *HARD]:
        assert small.ids(small.clean(text)).tolist() == reference.encode(text)
    assert len(small._kind._cache) <= 16  # type: ignore[union-attr]


def test_packed_equals_padded(tokenizer: Tokenizer, reference: SimpleTokenizer) -> None:
    texts = [*SAMPLES, *HARD]
    rows = [[Text(tokenizer.ids(tokenizer.clean(text)))] for text in texts]
    packed = pack(rows, tokenizer)
    assert torch.equal(
        unpack(packed.tokens_T, packed.lengths_BK[:, 0], 77), reference(texts, context_length=77)
    )
    assert packed.dropped_BK[:, 0].tolist() == [max(0, len(reference.encode(text)) - 75) for text in texts]
    assert packed.longest == int(packed.lengths_BK.max()) == 77


def test_the_token_of_pad_id_is_kept(tokenizer: Tokenizer, reference: SimpleTokenizer) -> None:
    """Trap 18: what pads, id 0, is also "!" where the word goes on; "!" alone is 256."""
    packed = pack([[Text(tokenizer.ids("!"))], [Text(tokenizer.ids("wow !→"))]], tokenizer)
    start, end = tokenizer.prefix[0], tokenizer.suffix[0]
    wow = reference.encode("wow !→")
    assert 0 in wow
    assert packed.tokens_T.tolist() == [start, 256, end, start, *wow, end]
    assert packed.lengths_BK.tolist() == [[3], [5]]


@pytest.mark.parametrize(
    ("words", "length", "dropped"), [(0, 2, 0), (74, 76, 0), (75, 77, 0), (76, 77, 1), (300, 77, 225)]
)
def test_start_and_end_are_always_kept(words: int, length: int, dropped: int, tokenizer: Tokenizer) -> None:
    packed = pack([[Text(array("H", [320]) * words)]], tokenizer)
    assert packed.lengths_BK.item() == length
    assert packed.dropped_BK.item() == dropped
    assert (packed.tokens_T[0], packed.tokens_T[-1]) == (tokenizer.prefix[0], tokenizer.suffix[0])


@pytest.mark.parametrize(
    ("words", "limit", "length", "dropped", "withheld"),
    [(300, 20, 20, 225, 57), (60, 20, 20, 0, 42), (18, 20, 20, 0, 0), (5, 20, 7, 0, 0), (300, 77, 77, 225, 0),
     (300, 248, 77, 225, 0)],
)  # fmt: skip
def test_a_limit_withholds_and_does_not_drop(
    words: int, limit: int, length: int, dropped: int, withheld: int, tokenizer: Tokenizer
) -> None:
    packed = pack([[Text(array("H", [320]) * words), None]], tokenizer, limit)
    assert packed.lengths_BK.tolist() == [[length, 0]]
    assert packed.dropped_BK.tolist() == [[dropped, 0]]
    assert packed.withheld == withheld
    assert packed.tokens_T.tolist() == [tokenizer.prefix[0], *(320,) * (length - 2), tokenizer.suffix[0]]


def test_missing_texts_own_no_tokens(tokenizer: Tokenizer) -> None:
    packed = pack(
        [
            [Text(array("H", [1])), None, Text(array("H", [2, 3]))],
            [None, None, None],
            [None, Text(array("H", [4])), None],
        ],
        tokenizer,
    )
    s, e = tokenizer.prefix[0], tokenizer.suffix[0]
    assert packed.lengths_BK.tolist() == [[3, 0, 4], [0, 0, 0], [0, 3, 0]]
    assert packed.tokens_T.tolist() == [s, 1, e, s, 2, 3, e, s, 4, e]
    assert {t.dtype for t in packed[:3]} == {torch.int32}
    assert pack([[None]], tokenizer).longest == 0


@FUZZ
@given(sentences=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9)))
def test_stored_ids_come_back_sentence_by_sentence(sentences: list[list[int]], tokenizer: Tokenizer) -> None:
    flat = np.array(list(chain.from_iterable(sentences)), "<u2").tobytes()
    assert [ids.tolist() for ids in stored(flat, map(len, sentences))] == sentences
    with pytest.raises(ValueError, match="ids for sentences of"):
        stored(flat + b"..", map(len, sentences))
    largest = max(chain.from_iterable(sentences), default=0)
    if largest < tokenizer.vocab_size:
        stored(flat, map(len, sentences), tokenizer)
    else:
        with pytest.raises(ValueError, match=f"token id {largest} "):
            stored(flat, map(len, sentences), tokenizer)


def test_ragged_rows_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(AssertionError, match="same number of caption slots"):
        pack([[None], [None, None]], tokenizer)


def test_unpack_pads_with_what_it_is_told() -> None:
    ids = unpack(torch.tensor([5, 6, 7], dtype=torch.int32), torch.tensor([2, 0, 1]), 3, pad_id=9)
    assert ids.tolist() == [[5, 6, 9], [9, 9, 9], [7, 9, 9]]
    with pytest.raises(AssertionError, match="does not fit"):
        unpack(torch.arange(4), torch.tensor([4]), 3)
    with pytest.raises(AssertionError, match="add up"):
        unpack(torch.arange(4), torch.tensor([3]), 3)


def test_name_hash_tells_tokenizers_apart() -> None:
    plain = Tokenizer(SimpleTokenizer(), 77).name_hash
    assert plain == Tokenizer(SimpleTokenizer(), 248).name_hash
    assert plain != Tokenizer(SimpleTokenizer(clean="whitespace"), 77).name_hash
    assert plain != Tokenizer(SimpleTokenizer(additional_special_tokens=["<mask>"]), 77).name_hash
    assert len(plain) == 12


def test_survives_the_way_to_a_worker(tokenizer: Tokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).ids("a red ball") == tokenizer.ids("a red ball")


class Words:
    """Stands in for a Hugging Face tokenizer: [1] words [2], cut to max_length, padded with 0."""

    pad_token_id, sep_token_id = 0, 2

    def __init__(self) -> None:
        self.words: dict[str, int] = {}

    def __len__(self) -> int:
        return 100

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        ids = [self.words.setdefault(word, 3 + len(self.words)) for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def hugging_face(mode: str = "", strip_sep: bool = False) -> HFTokenizer:
    """An HFTokenizer without transformers, which longclip does not require."""
    made = object.__new__(HFTokenizer)
    made.__dict__.update(
        tokenizer=Words(), tokenizer_mode=mode, strip_sep_token=strip_sep, clean_fn=get_clean_fn("whitespace")
    )
    return made


def test_hugging_face_specials_come_from_the_tokenizer() -> None:
    tokenizer = Tokenizer(hugging_face(), 6)
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad_id) == ((1,), (2,), 0)
    packed = pack([[Text(tokenizer.ids("x y"))], [Text(tokenizer.ids("a b c d e"))]], tokenizer)
    assert packed.lengths_BK.tolist() == [[4], [6]]
    assert packed.dropped_BK.tolist() == [[0], [1]]
    assert Tokenizer(hugging_face(strip_sep=True), 6).suffix == (0,)


def test_unusable_tokenizers_are_named() -> None:
    with pytest.raises(UserError, match="SigLipTokenizer"):
        Tokenizer(object.__new__(SigLipTokenizer), 64)
    with pytest.raises(UserError, match="SimpleNamespace"):
        Tokenizer(SimpleNamespace(), 77)
    with pytest.raises(UserError, match="'clips'"):
        Tokenizer(hugging_face(mode="clips"), 77)
    with pytest.raises(UserError, match="reduction_mask"):
        Tokenizer(SimpleTokenizer(reduction_mask="random"), 77)
    with pytest.raises(UserError, match="no room for text"):
        Tokenizer(SimpleTokenizer(), 2)
