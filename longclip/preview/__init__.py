"""One HTML page of what training shows: `plan` reads the recipe, `look` the data, `page` writes.

longclip preview DIR --recipe NAME|FILE|RUN --out preview.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip

from ..captions import Groups
from ..data.dataset import Dataset
from ..tokens import Tokenizer
from ..types import UserError
from . import look, plan
from .page import Spelling, render

PROBE = 1000  # records whose captions are measured


def preview(
    source: str, recipe: str, out: Path, *, count: int = 12, epoch: int = 0, architecture: str | None = None
) -> str:
    """Write the page; returns a sentence that says what is in it.

    Args:
        source: a folder of shards.
        recipe: a name among conf/recipe, a YAML file, or a run directory (see `plan`).
        out: the HTML file; replaced if it is there.
        count: images to show, evenly spread over the data.
        epoch: which epoch's crops and texts.
        architecture: an open_clip name, for its tokenizer and image size; None: what the recipe says.

    Raises:
        UserError: no such data or recipe, or the page cannot be written.
    """
    chosen = plan.read(recipe, architecture)
    theirs = open_clip.get_tokenizer(chosen.architecture, context_length=chosen.context_length)
    tokenizer = Tokenizer(theirs, chosen.context_length)
    data, groups = Dataset(source, tokenizer), Groups(chosen.policies, chosen.seed)
    extra = len(tokenizer.prefix) + len(tokenizer.suffix)
    samples = [look.sample(data, at, chosen, groups, epoch) for at in look.spread(len(data), count)]
    counts = look.counts(data, look.spread(len(data), PROBE), groups, epoch, extra)
    facts = {
        "data": f"{source}: {len(data):,} images; captions of {counts.images:,} of them were measured",
        "recipe": f"{chosen.label}, epoch {epoch}, seed {chosen.seed}",
        "model": f"{chosen.architecture}: {chosen.transform.size} px, {chosen.context_length} tokens",
        "augmentation": str(chosen.augment or "none: training sees what judging sees"),
    }
    if counts.damaged:
        facts["damaged"] = f"{counts.damaged} of them could not be read: longclip doctor --data {source}"
    spelling = Spelling(_decoder(theirs), extra, tokenizer.pad_id, chosen.context_length)
    _write(out, render(samples, counts, chosen, facts, spelling))
    return f"wrote {out}: {len(samples)} of {len(data):,} images under {chosen.label}; open it in a browser"


def _decoder(theirs: object) -> Callable[[Sequence[int]], str]:
    if isinstance(theirs, open_clip.SimpleTokenizer):
        return lambda ids: theirs.decode(list(ids))
    assert isinstance(theirs, open_clip.HFTokenizer), "Tokenizer takes these two only"
    return lambda ids: str(theirs.tokenizer.decode(list(ids)))


def _write(out: Path, text: str) -> None:
    """Whole or not at all."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(
            f"the preview cannot be written to {out}: {error}; name another file with --out"
        ) from error
