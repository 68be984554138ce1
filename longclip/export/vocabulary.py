"""OpenAI's byte pairs as Hugging Face writes a tokenizer, made from open_clip's own vocabulary.

Ids are open_clip's for text that its cleaning leaves alone. They differ where it repairs text (mojibake, HTML
entities) and where a caption spells a special token out; padding is the end token instead of 0, which a
causal tower that pools at the first end token never sees.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from ..tokens import Tokenizer

START, END = 49406, 49407
PAD = END
_NAMES = {START: "<|startoftext|>", END: "<|endoftext|>"}  # open_clip spells them <start_of_text> and so on


def same_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether this is the tokenizer that `write_tokenizer` writes."""
    return Tokenizer(SimpleTokenizer(), tokenizer.context_length).name_hash == tokenizer.name_hash


def hugging_face(context_length: int) -> Any:
    """A `transformers.CLIPTokenizer` that cuts at `context_length` tokens."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)


def write_tokenizer(context_length: int, folder: Path) -> None:
    """tokenizer.json for transformers 5 and others; vocab.json and merges.txt for transformers 4."""
    hugging_face(context_length).save_pretrained(folder)
    vocabulary, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_padded(context_length: int, folder: Path) -> None:
    """tokenizer.json for the tokenizers library alone: cut and padded to the context length."""
    fast = hugging_face(context_length).backend_tokenizer
    fast.enable_truncation(context_length)
    fast.enable_padding(length=context_length, pad_id=PAD, pad_token=_NAMES[PAD])
    fast.save(str(folder / "tokenizer.json"))


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    theirs = SimpleTokenizer()
    vocabulary = {_NAMES.get(number, token): number for token, number in theirs.encoder.items()}
    return vocabulary, list(theirs.bpe_ranks)
