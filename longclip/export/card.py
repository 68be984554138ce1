"""The model card: README.md of an export, as model hubs show it.

In: what is known of the model and what the check found. Out: Markdown that says what the model is, how to
open it, what it was trained on and how, how it was judged under which protocol, and what it cannot do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..towers.pretrained import Backbone
from .facts import Known, Result
from .formats import FORMATS
from .parity import Row
from .snippets import SNIPPETS

NAME = "README.md"

_LIBRARY = {"open_clip": "open_clip", "onnx": "onnx"}  # others: transformers
_PIPELINE = {
    "hf-vision": "image-feature-extraction",
    "hf-text": "feature-extraction",
    "clip_l": "feature-extraction",
}
_RECIPE = ("model", "recipe", "optim", "curriculum", "samples", "batch_size", "seed")


def write(known: Known, backbone: Backbone, kind: str, rows: Sequence[Row], directory: Path) -> None:
    """Write the card beside the files."""
    (directory / NAME).write_text(text(known, backbone, kind, rows), encoding="utf-8")


def text(known: Known, backbone: Backbone, kind: str, rows: Sequence[Row]) -> str:
    """The card as Markdown with the metadata that hubs read."""
    context = backbone.tokenizer.context_length
    metadata = {
        "library_name": _LIBRARY.get(kind, "transformers"),
        "pipeline_tag": _PIPELINE.get(kind, "zero-shot-image-classification"),
        "tags": ["clip", "long-captions", "longclip"],
    }
    sections = {
        "Use": SNIPPETS[kind].replace("CONTEXT", str(context)),
        "Data": _data(known),
        "Recipe": _recipe(known),
        "Results": _results(known.results),
        "Limits": _limits(known, backbone, kind),
        "Check": _check(kind, rows),
        "Provenance": _fenced("json", json.dumps(known.provenance, indent=2)),
    }
    head = f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {_plain(known.name)}\n\n"
    towers = " and ".join(f"the {part} tower" for part in FORMATS[kind].parts)
    lead = f"{towers.capitalize()} of a CLIP that reads up to {context} tokens, start and end included.\n"
    return head + lead + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())


def _data(known: Known) -> str:
    if "data" not in known.config:
        return "Not known: the export was not made from a training run."
    seen = f"{known.provenance['samples_seen']:,} images of these were seen:\n\n"
    return seen + _yaml({"data": known.config["data"]})


def _recipe(known: Known) -> str:
    chosen = {key: known.config[key] for key in _RECIPE if key in known.config}
    return _yaml(chosen) if chosen else "Not known: the export was not made from a training run."


def _results(results: Sequence[Result]) -> str:
    if not results:
        return "These weights have not been judged."
    lines = ["| benchmark | protocol | number | value |", "|---|---|---|---|"]
    for benchmark, protocol, name, value in results:
        lines.append(
            f"| {_plain(benchmark)} | {_plain(protocol or 'own data')} | {_plain(name)} | {value:.2f} |"
        )
    note = "Percentages are 0 to 100. Numbers compare only under the same protocol."
    return "\n".join([*lines, "", note])


def _limits(known: Known, backbone: Backbone, kind: str) -> str:
    context = backbone.tokenizer.context_length
    limits = [
        f"Text beyond {context} tokens is cut without a word. That so many are read does not say that all "
        "count: see the results by caption length, where there are any.",
        "Captions are lower-cased; the vocabulary was made for English.",
        "Nothing here says how the model treats people or groups of people, nor that it is safe to act on.",
    ]
    if not any(result.protocol for result in known.results):
        limits.append("It has not been judged under a published protocol.")
    if known.provenance["dtype"] != "fp32":
        limits.append(
            f"The weights are rounded to {known.provenance['dtype']}; what that moves stands under Check."
        )
    if kind in ("hf-text", "clip_l"):
        limits.append(
            "SDXL feeds one prompt of one length to two text encoders: this one alone, without a second of "
            f"as many positions, does not make it read {context} tokens. And a diffusion model was trained "
            "with another text tower: pictures change."
        )
    return "\n".join(f"* {limit}" for limit in limits)


def _check(kind: str, rows: Sequence[Row]) -> str:
    lines = ["| feature | largest difference | accepted |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.difference:.1e} | {row.accepted:.0e} |" for row in rows]
    return (
        f"Opened as {kind} in a process without the training code, against the model it was made from: "
        "text/N a caption of N tokens, image/N the same pixels on both sides, picture/N each side's own "
        "resizing.\n\n"
    ) + "\n".join(lines)


def _yaml(values: dict[str, Any]) -> str:
    return _fenced("yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip())


def _fenced(language: str, body: str) -> str:
    fence = "`" * (3 + 3 * ("```" in body))
    return f"{fence}{language}\n{body}\n{fence}"


def _plain(text: str) -> str:
    """One line without Markdown or HTML of its own."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(text.split()))
