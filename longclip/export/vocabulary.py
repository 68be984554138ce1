"""OpenAI's byte pairs as Hugging Face writes a tokenizer, made from open_clip's own vocabulary.

Ids are open_clip's, also of curly quotes and common HTML entities, which open_clip's cleaning straightens.
They differ where it repairs more (mojibake, ligatures, full-width letters) and where a caption spells a
special token out. Padding is the end token instead of 0; a causal tower that pools at the first end token
sees neither.

transformers' own `CLIPTokenizer` forgets the straightening; `AutoTokenizer` keeps it, and so does the
tokenizers library.
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

# As ftfy and html.unescape do it; "&amp;" first, because open_clip unescapes twice.
_STRAIGHTENED = (
    ("[\u02bc\u2018-\u201b]", "'"),
    ("[\u201c-\u201f]", '"'),
    ("&amp;", "&"),
    ("&quot;", '"'),
    ("&#39;", "'"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&nbsp;", " "),
)


def same_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether this is the tokenizer that `write_tokenizer` writes."""
    return Tokenizer(SimpleTokenizer(), tokenizer.context_length).name_hash == tokenizer.name_hash


def fast() -> Any:
    """A `tokenizers.Tokenizer` without limit or padding."""
    from tokenizers import Regex, decoders, normalizers
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    made = CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    straight = [normalizers.Replace(Regex(seen), meant) for seen, meant in _STRAIGHTENED]
    made.normalizer = normalizers.Sequence([*straight, made.normalizer])
    made.decoder = decoders.Sequence([made.decoder, decoders.Replace("</w>", " "), decoders.Strip(right=1)])
    return made


def write_tokenizer(context_length: int, folder: Path) -> None:
    """For transformers: tokenizer.json and what it is called; vocab.json and merges.txt for release 4."""
    fast().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": _NAMES[START],
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), _NAMES[END]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    vocabulary, merges = _vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_padded(context_length: int, folder: Path) -> None:
    """tokenizer.json for the tokenizers library alone: cut and padded to the context length."""
    made = fast()
    made.enable_truncation(context_length)
    made.enable_padding(length=context_length, pad_id=PAD, pad_token=_NAMES[PAD])
    made.save(str(folder / "tokenizer.json"))


def _vocabulary() -> tuple[dict[str, int], Any]:
    theirs = SimpleTokenizer()
    vocabulary = {_NAMES.get(number, token): number for token, number in theirs.encoder.items()}
    return vocabulary, list(theirs.bpe_ranks)
