"""Text to ids, exactly open_clip's, and many captions to one flat row.

In: cleaned text, or the texts that a policy chose. Out: ids without start and end token, or `Packed`
(every caption's real tokens end to end, with lengths and no padding).

Why not just call open_clip: its cleaning runs ftfy on plain ASCII, and its byte-pair search runs per
word. Here ASCII text that ftfy cannot change skips it, and whatever stands between two spaces is looked
up in a cache. No token of open_clip's pattern holds whitespace, so the ids stay the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import regex
import torch
from numpy.typing import ArrayLike
from open_clip import tokenizer as clip_text
from torch import Tensor

from longclip.types import NO_IDS, Ids, Text, UserError

CACHE_LIMIT = 2**17  # chunks per process, about 25 MB
CACHED_LENGTH = 40  # longer chunks are links or scripts without spaces: they hardly come again

# ftfy and html.unescape change none of these; "&" is left out because it may begin an entity.
_PLAIN = re.compile(r"[\n\t -%'-~]*").fullmatch

_FINISH: dict[Callable[[str], str], tuple[str, Callable[[str], str]]] = {
    clip_text.get_clean_fn("lower"): ("lower", str.lower),
    clip_text.get_clean_fn("whitespace"): ("whitespace", str),
    clip_text.get_clean_fn("canonicalize"): ("canonicalize", clip_text.canonicalize_text),
}


class Packed(NamedTuple):
    """The text part of a `Batch`: caption (b, k) owns `lengths_BK[b, k]` tokens, row-major."""

    tokens_T: Tensor  # int32, start and end tokens included
    lengths_BK: Tensor  # int32; 0 where there is no caption
    dropped_BK: Tensor  # int32; tokens that the context length cut off
    longest: int  # max of lengths_BK
    withheld: int = 0  # tokens of the whole batch that fit the context and were left out on purpose


def repair(text: str) -> str:
    """What open_clip calls basic cleaning: mojibake, HTML entities, outer whitespace; lines are kept."""
    return text.strip() if _PLAIN(text) else clip_text.basic_clean(text)


class Tokenizer:
    """open_clip's tokenizer of an architecture, split into its two steps: `clean`, then `ids`.

    Args:
        open_clip_tokenizer: what `open_clip.get_tokenizer` returns: `SimpleTokenizer` or `HFTokenizer`.
        context_length: the longest caption in tokens, start and end token included.

    Raises:
        UserError: for any other kind of tokenizer, for one that drops tokens at random, and for a
            context too short to hold a word.
    """

    def __init__(self, open_clip_tokenizer: object, context_length: int) -> None:
        self._kind = _kind(open_clip_tokenizer)
        self.context_length = context_length
        self.prefix = self._kind.prefix
        self.suffix = self._kind.suffix
        self.vocab_size = self._kind.vocab_size
        self.pad_id = self._kind.pad_id
        self.typecode = "H" if self.vocab_size <= 2**16 else "I"
        if context_length <= len(self.prefix) + len(self.suffix):
            raise UserError(
                f"context_length is {context_length}, which leaves no room for text beside the "
                f"{len(self.prefix) + len(self.suffix)} start and end tokens; set it to 77 or 248."
            )

    def clean(self, text: str) -> str:
        """open_clip's cleaning, the case kept: sentence splitting needs it, `ids` removes it."""
        return " ".join(repair(text).split())

    def ids(self, cleaned: str) -> Ids:
        """Ids of cleaned text, without start and end token and without any limit.

        `SimpleTokenizer`: `ids(clean(text))` equals open_clip's `encode(text)`, and the ids of pieces cut
        at spaces concatenate to the ids of the whole. `HFTokenizer`: the first holds too; the second only
        where the vocabulary treats words alone (WordPiece, SentencePiece), not for GPT-2's byte pairs.
        """
        return array(self.typecode, self._kind.ids(cleaned))

    def text(self, ids: Sequence[int]) -> str:
        """What these ids say, as far as it can be told: with open_clip's tokenizer in small letters."""
        return self._kind.text(ids)

    @cached_property
    def name_hash(self) -> str:
        """12 hex digits over the vocabulary, the merges and the cleaning: equal hash, equal ids."""
        return hashlib.sha256(self._kind.fingerprint().encode()).hexdigest()[:12]


def pack(texts: Sequence[Sequence[Text | None]], tokenizer: Tokenizer, limit: int | None = None) -> Packed:
    """B rows of K slots each become one flat row of tokens.

    Every text is start + ids + end; ids beyond the context are cut and counted, the end token never is
    (open_clip forces it into the last slot as well). A slot that is None owns no tokens. A `limit` below the
    context cuts in the same way, for a curriculum; what it takes is withheld, not dropped.
    """
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    extra = len(prefix) + len(suffix)
    room = tokenizer.context_length - extra
    kept = room if limit is None else min(limit - extra, room)
    assert kept > 0, f"a limit of {limit} leaves no room for text"
    shape = (len(texts), len(texts[0]) if texts else 0)
    assert all(len(row) == shape[1] for row in texts), "every image has the same number of caption slots"
    code = tokenizer.typecode
    tokens, counts = array(code, prefix), list[int]()
    seam = array(code, suffix + prefix)  # between two texts: one piece to copy instead of two
    for text in chain.from_iterable(texts):
        if text is None:
            counts.append(-extra)  # so that its length is 0
            continue
        ids, count = text.ids, len(text.ids)
        counts.append(count)
        tokens += ids if count <= kept else ids[:kept]
        tokens += seam
    del tokens[len(tokens) - len(prefix) :]
    counts_BK = np.array(counts, np.int32).reshape(shape)
    dropped_BK = (counts_BK - room).clip(0)
    withheld_BK = (counts_BK - dropped_BK - kept).clip(0)
    lengths_BK = counts_BK - dropped_BK - withheld_BK + extra
    return Packed(
        torch.from_numpy(np.frombuffer(tokens, tokens.typecode).astype(np.int32)),
        torch.from_numpy(lengths_BK),
        torch.from_numpy(dropped_BK),
        int(lengths_BK.max(initial=0)),
        int(withheld_BK.sum()),
    )


def joined(parts: Iterable[Ids]) -> Ids:
    """Ids of several texts, end to end."""
    left = iter(parts)
    whole = next(left, NO_IDS)[:]
    for part in left:
        whole += part
    return whole


def stored(ids: bytes, counts: Iterable[int], tokenizer: Tokenizer | None = None) -> list[Ids]:
    """The ids of sentence after sentence, from uint16, little-endian, as shards hold them end to end.

    Raises:
        ValueError: `counts` do not add up to the number of ids, or an id is not of the vocabulary.
    """
    flat, start = array("H", ids), 0
    if sys.byteorder == "big":
        flat.byteswap()
    if (
        tokenizer
        and flat
        and (highest := np.maximum.reduce(np.frombuffer(flat, "H"))) >= tokenizer.vocab_size
    ):
        raise ValueError(f"token id {highest} of a vocabulary of {tokenizer.vocab_size}")
    if tokenizer and tokenizer.typecode != flat.typecode:
        flat = array(tokenizer.typecode, flat)
    sentences = []
    for count in counts:
        sentences.append(flat[start : start + count])
        start += count
    if start != len(flat):
        raise ValueError(f"{len(flat)} ids for sentences of {start}")
    return sentences


def unpack(tokens_T: Tensor, lengths_S: ArrayLike, context_length: int, pad_id: int = 0) -> Tensor:
    """The padded table that open_clip's own tokenizer makes: [S, L] int64, on the tokens' device.

    Args:
        tokens_T: flat tokens of S texts, end to end.
        lengths_S: how many belong to each; on the host.
        context_length: L.
        pad_id: what fills the rest (0 for `SimpleTokenizer`, also its token of a "!" that begins a word).
    """
    host_S = np.asarray(lengths_S)
    longest, total = int(host_S.max(initial=0)), int(host_S.sum())
    assert longest <= context_length, f"a text of {longest} tokens does not fit {context_length}"
    assert total == len(tokens_T), f"lengths add up to {total}, there are {len(tokens_T)} tokens"
    own_SL = (
        torch.arange(context_length, device=tokens_T.device)
        < torch.from_numpy(host_S).to(tokens_T.device)[:, None]
    )
    ids_SL = torch.full(own_SL.shape, pad_id, dtype=torch.int64, device=tokens_T.device)
    return ids_SL.masked_scatter(own_SL, tokens_T.long())


class _Simple:
    """OpenAI's byte pairs with a cache over whatever stands between two spaces."""

    def __init__(self, tokenizer: clip_text.SimpleTokenizer) -> None:
        if tokenizer.reduction_fn is not None:
            raise UserError(
                "This tokenizer drops tokens at random (reduction_mask), which ids made once cannot do; "
                "build it without reduction_mask and choose a caption policy instead."
            )
        self._tokenizer = tokenizer
        self._clean_name, self._finish = _finish(tokenizer.clean_fn)
        self._cache: dict[str, tuple[int, ...]] = {}
        self.prefix: tuple[int, ...] = (tokenizer.sot_token_id,)
        self.suffix: tuple[int, ...] = (tokenizer.eot_token_id,)
        self.vocab_size = tokenizer.vocab_size
        self.pad_id = 0
        self._specials = [tokenizer.decoder[i] for i in tokenizer.all_special_ids]
        if any(char.isspace() for name in self._specials for char in name):
            raise UserError("A special token of this tokenizer holds a space; rename it without.")

    def ids(self, cleaned: str) -> tuple[int, ...]:
        cache = self._cache
        ids: list[int] = []
        for chunk in self._finish(cleaned).split():
            found = cache.get(chunk)
            ids += self._search(chunk) if found is None else found
        return tuple(ids)

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids)).strip()

    def _search(self, chunk: str) -> tuple[int, ...]:
        """open_clip's `encode` of one chunk, less the cleaning."""
        tokenizer = self._tokenizer
        ids: list[int] = []
        for word in regex.findall(tokenizer.pat, chunk):
            coded = "".join(tokenizer.byte_encoder[byte] for byte in word.encode("utf-8"))
            ids += [tokenizer.encoder[piece] for piece in tokenizer.bpe(coded).split(" ")]
        if max(len(self._cache), len(tokenizer.cache)) >= CACHE_LIMIT:
            self._cache.clear()
            tokenizer.cache = {name: name for name in self._specials}  # open_clip's grows without end
        if len(chunk) <= CACHED_LENGTH:
            self._cache[chunk] = tuple(ids)
        return tuple(ids)

    def fingerprint(self) -> str:
        merges = [" ".join(pair) for pair in self._tokenizer.bpe_ranks]
        return json.dumps(["simple", self._clean_name, list(self._tokenizer.encoder), merges])


class _HuggingFace:
    """A Hugging Face tokenizer; what it puts around a text is read off a probe."""

    def __init__(self, tokenizer: clip_text.HFTokenizer) -> None:
        if tokenizer.tokenizer_mode:
            raise UserError(
                f"Tokenizers in mode {tokenizer.tokenizer_mode!r} put a class token behind the padding, "
                "of which packed text has none; choose an architecture without tokenizer_mode."
            )
        self._tokenizer = tokenizer.tokenizer
        self._clean_name, self._finish = _finish(tokenizer.clean_fn)
        self.vocab_size = len(self._tokenizer)
        self.pad_id = int(self._tokenizer.pad_token_id or 0)
        bare, full = self.ids("a photo"), tuple(self._tokenizer("a photo")["input_ids"])
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise UserError(
                f"{type(self._tokenizer).__name__} does not put its special tokens around a text "
                f"({full} against {bare} without them), so captions cannot be composed from sentences."
            )
        stripped = self._tokenizer.sep_token_id if tokenizer.strip_sep_token else None
        self.prefix = tuple(0 if i == stripped else i for i in full[: starts[0]])
        self.suffix = tuple(0 if i == stripped else i for i in full[starts[0] + len(bare) :])

    def ids(self, cleaned: str) -> tuple[int, ...]:
        # verbose=False: Hugging Face warns beyond its own limit, which is not the one that holds here
        found = self._tokenizer(self._finish(cleaned), add_special_tokens=False, verbose=False)
        return tuple(found["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids)).strip()

    def fingerprint(self) -> str:
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        kind = type(self._tokenizer).__name__
        return json.dumps([kind, self._clean_name, self.prefix, self.suffix, vocabulary])


def _kind(tokenizer: object) -> _Simple | _HuggingFace:
    if isinstance(tokenizer, clip_text.SimpleTokenizer):
        return _Simple(tokenizer)
    if isinstance(tokenizer, clip_text.HFTokenizer):
        return _HuggingFace(tokenizer)
    raise UserError(
        f"Cannot make ids with a {type(tokenizer).__name__}; open_clip's SimpleTokenizer and HFTokenizer "
        "work, so choose an architecture whose open_clip.get_tokenizer gives one of them."
    )


def _finish(clean: Callable[[str], str]) -> tuple[str, Callable[[str], str]]:
    """What a cleaning does beyond whitespace, by name: it runs after sentences have been split."""
    if clean not in _FINISH:
        raise UserError(
            f"Unknown text cleaning {clean!r}; known: {', '.join(n for n, _ in _FINISH.values())}."
        )
    return _FINISH[clean]
