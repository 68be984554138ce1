"""Facets for FLAME: what a frozen language model reads from each caption, prompt by prompt -> a side-car.

    report = facets("models/Mistral-Nemo", "datasets/mine/train", Path("datasets/mine/facets"))

In: any language model that transformers opens, shards. Out: one column, the embeddings of all prompts of an
image's caption end to end, which `recipe=flame` reads. FLAME (Cao et al., CVPR 2025, arXiv 2411.11927) asks
all its prompts in one pass under a mask that keeps them apart; a pass for each says the same, and costs more.
Local legend: F prompts, N texts of a batch, T tokens, d the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .captions.policies import admitted
from .data.faults import Damaged
from .data.sidecars.table import Row
from .data.sidecars.writer import Encoder, SidecarReport, write_rows
from .data.tars.dataset import Dataset
from .data.tars.retry import shown
from .towers import configs
from .types import Caption, UserError

COLUMN = "facets"

PROMPTS = tuple(
    f'The caption of a picture: "{{caption}}" {asked}: "'
    for asked in (
        "The whole picture in one word",
        "The things in it in one word",
        "The things in it in one sentence",
        "What they look like in one word",
        "What they look like in one sentence",
        "Where they are in one word",
        "Where they are in one sentence",
    )
)
"""Ours; as FLAME's, seven facets that end in an open quotation mark, whose token is what is kept."""


class FacetsReport(NamedTuple):
    """What was written, and what `recipe=flame` has to know of it."""

    written: SidecarReport
    facets: int
    width: int
    cut: int  # captions that were too long for the model and lost their last sentences
    damaged: int  # images left out


def facets(
    model: str,
    shards: str,
    out: Path,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    prompts: Sequence[str] = PROMPTS,
    source: str | None = None,
    pool: str = "last",
    device: str | None = None,
    batch_size: int = 8,
) -> FacetsReport:
    """Write a side-car of a language model's embeddings of captions under several prompts, float32.

    Args:
        model: a folder or a name that transformers opens; its code is never run, its weights are safetensors.
        shards: a folder of them, a path or a URL.
        out: the folder to make.
        progress: called as (done, total) after every batch.
        prompts: each with "{caption}" where the caption belongs.
        source: whose captions; None: the first one that an image has.
        pool: "last" takes the last token's state, as of a model that writes on; "mean" the mean of all, as
            of an encoder of sentences.
        device: torch's name; None: a GPU where there is one.
        batch_size: captions at once, each under all prompts.

    Raises:
        UserError: no such model or shards; the folder exists; a prompt without a place for the caption.
    """
    reader = _Reader(model, prompts, pool, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = Dataset(shards)
    tokenizer = configs.tokenizer("ViT-B-16")  # any: the column holds no texts
    encoder = Encoder(shown(data.url), "key", {COLUMN: "vector"}, tokenizer, "syntok")
    written = write_rows(_rows(reader, data, source, batch_size, progress), out, encoder)
    return FacetsReport(written, len(prompts), reader.width, reader.cut, len(data) - written.rows)


class _Reader:
    """A language model that reads captions."""

    def __init__(self, model: str, prompts: Sequence[str], pool: str, device: str) -> None:
        lacking = [prompt for prompt in prompts if "{caption}" not in prompt]
        if lacking or not prompts:
            raise UserError(
                f"a prompt says with {{caption}} where the caption belongs, {lacking or 'none'} does"
            )
        if pool not in ("last", "mean"):
            raise UserError(f"pool is {pool!r}; it is last or mean")
        self.prompts, self.pool, self.device, self.cut = prompts, pool, device, 0
        self.tokenizer, self.model = _opened(model)
        self.model.to(device).eval()
        self.width: int = self.model.config.hidden_size
        longest = getattr(self.model.config, "max_position_embeddings", None)
        self.limit = min(self.tokenizer.model_max_length, longest or self.tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, captions: Sequence[Caption]) -> Tensor:
        """[N, F d] of N captions."""
        texts = [text for caption in captions for text in self._asked(caption)]
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        state_NTd = self.model(**tokens).last_hidden_state.float()
        there_NT = tokens["attention_mask"]
        if self.pool == "last":
            facet_Nd = state_NTd[torch.arange(len(texts)), there_NT.sum(1) - 1]  # padding stands behind
        else:
            facet_Nd = (state_NTd * there_NT[..., None]).sum(1) / there_NT.sum(1, keepdim=True)
        return facet_Nd.reshape(len(captions), -1).cpu()

    def _asked(self, caption: Caption) -> list[str]:
        """The caption in every prompt, without its last sentences where the model cannot read them."""
        ends = [len(caption.text), *(sentence.start for sentence in reversed(caption.sentences[1:]))]
        for number, end in enumerate(ends):
            texts = [prompt.replace("{caption}", caption.text[:end].strip()) for prompt in self.prompts]
            if max(map(len, self.tokenizer(texts)["input_ids"])) <= self.limit:
                self.cut += number > 0
                return texts
        raise UserError(
            f"the model reads {self.limit} tokens, too few for a prompt and the caption's first sentence, "
            f"{caption.text[: ends[-1]]!r:.80}: take another model, or shorter prompts"
        )


def _opened(name: str) -> tuple[Any, Any]:
    """Tokenizer and model, without a head."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError("facets need transformers: pip install 'longclip[huggingface]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        model = AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"transformers cannot open {name!r} as a language model: {said}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so any will do
    return tokenizer, model


def _rows(
    reader: _Reader,
    data: Dataset,
    source: str | None,
    batch_size: int,
    progress: Callable[[int, int], object],
) -> Iterator[Row]:
    """Of each image that can be read, its key and facets; None where it has no such caption."""
    for start in range(0, len(data), batch_size):
        indices = range(start, min(start + batch_size, len(data)))
        found = [pair for index in indices for pair in _captioned(data, index, source)]
        captions = [caption for _, caption in found if caption is not None]
        read = iter(reader(captions) if captions else ())
        for number, (key, caption) in enumerate(found):
            yield number, {"key": key, COLUMN: None if caption is None else next(read).numpy()}
        progress(indices.stop, len(data))


def _captioned(data: Dataset, index: int, source: str | None) -> Iterator[tuple[str, Caption | None]]:
    try:
        record = data.record(index)
    except Damaged:
        return
    yield record.key, next(iter(admitted(record.captions, source)), None)
