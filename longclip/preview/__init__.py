"""One HTML page of what training shows: `recipe` reads the recipe, `look` the data, `page` writes.

longclip preview DIR --recipe NAME|FILE|RUN --out preview.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip

from ..captions import Groups
from ..data.corpus import Corpus
from ..data.sidecars.joining import Joined
from ..data.tars.dataset import Dataset
from ..data.tars.retry import shown
from ..tokens import Tokenizer
from ..types import UserError
from . import look, recipe
from .look import Moment
from .page import Spelling, render

PROBE = 1000  # records whose captions are measured


def preview(
    source: str,
    name: str,
    out: Path,
    *,
    count: int = 12,
    moment: Moment = Moment(),
    architecture: str | None = None,
) -> str:
    """Write the page; returns a sentence that says what is in it.

    Args:
        source: a folder of shards, or a URL of one.
        name: a recipe among conf/recipe, a YAML file, or a run directory (see `recipe`).
        out: the HTML file; replaced if it is there.
        count: images to show, evenly spread over the data.
        moment: of the run, whose crops and texts are shown.
        architecture: an open_clip name, for its tokenizer and image size; None: what the recipe says.

    Raises:
        UserError: no such data or recipe, or the page cannot be written.
    """
    chosen = recipe.read(name, architecture)
    theirs = open_clip.get_tokenizer(chosen.architecture, context_length=chosen.context_length)
    tokenizer = Tokenizer(theirs, chosen.context_length)
    joined = Joined(Dataset(source, tokenizer), chosen.sidecar)
    data, groups = Corpus({source: joined}), Groups(chosen.policies, chosen.seed).reading(tokenizer.ids)
    kept = range(len(data)) if joined.kept is None else joined.kept
    probed, extra = look.spread(kept, PROBE), len(tokenizer.prefix) + len(tokenizer.suffix)
    samples = [look.sample(data, at, chosen, groups, moment) for at in look.spread(kept, count)]
    counts = look.counts(data, probed, groups, moment, extra)
    spelling = Spelling(_decoder(theirs), extra, tokenizer.pad_id, chosen.context_length)
    facts = {
        "data": f"{shown(source)}: {len(kept):,} images; captions of {len(probed):,} of them were measured",
        "recipe": f"{chosen.label}, seed {chosen.seed}, epoch {moment.epoch}, progress {moment.progress:g}",
        "model": f"{chosen.architecture}: {chosen.transform.size} px, {chosen.context_length} tokens",
        "augmentation": str(chosen.augment or "none: training sees what judging sees"),
    }
    if counts.damaged:
        facts["damaged"] = (
            f"{counts.damaged} of them could not be read: longclip doctor --data {shown(source)}"
        )
    _write(out, render(samples, counts, chosen, facts, spelling))
    return f"wrote {out}: {len(samples)} of {len(kept):,} images under {chosen.label}; open it in a browser"


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
