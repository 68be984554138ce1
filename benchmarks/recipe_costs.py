"""What a step of every recipe costs beside `recipe=long`: FLOPs, and bytes kept for the backward pass.

    python -m benchmarks.recipe_costs                            # ViT-B/16, 1,024 images on 4 processes
    python -m benchmarks.recipe_costs --recipes long flair --model vit_l14

Nothing is timed and no weights are read: the towers and terms that train run on fake tensors
(`longclip.planner`), for captions of the lengths that each recipe shows of the scenes' paragraphs, told five
times an image. FLOPs are of matrix products, convolutions and attentions, of both passes. Writes
docs/recipe_costs.json and the table in docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from longclip import recipes
from longclip.types import UserError

from . import documents

IMAGES = 128
"""Whose captions say how long the texts of a recipe are."""

TELLINGS = 5
"""Captions an image: as many as human-made sets have."""


class Cost(NamedTuple):
    """Of a step on one process."""

    images: int
    image: float  # FLOPs of the image tower
    text: float
    loss: float
    kept: float  # bytes kept for the backward pass: activations of both towers and of the terms, embeddings
    heads: int  # parameters of the terms, trained and not exported
    tokens: float  # of an image's texts

    @property
    def flops(self) -> float:
        return self.image + self.text + self.loss

    @property
    def each(self) -> float:
        """FLOPs an image."""
        return self.flops / self.images


def main() -> None:
    options = _options()
    found = {
        name: cost([f"recipe={name}", f"model={options.model}", f"batch_size={options.batch}"], options.world)
        for name in dict.fromkeys(["long", *options.recipes])
    }
    options.out.mkdir(parents=True, exist_ok=True)
    told = {name: one._asdict() for name, one in found.items()}
    (options.out / "recipe_costs.json").write_text(json.dumps(told, indent=1) + "\n")
    text = markdown(found, options)
    documents.replace(options.markdown, "costs", text)
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=recipes.names(), default=recipes.names())
    parser.add_argument("--model", default="vit_b16", help="a name in conf/model")
    parser.add_argument("--batch", type=int, default=1024, help="images of a step, over all processes")
    parser.add_argument("--world", type=int, default=4, help="processes")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/recipes.md"), help="has marks")
    return parser.parse_args()


def cost(overrides: Sequence[str], world: int = 1, tellings: int = TELLINGS) -> Cost:
    """What a step costs one of `world` processes; `overrides` are those of `python train.py`."""
    import hydra
    import torch

    from conf.launch import CONF, instantiate
    from conf.planning import without_weights
    from longclip.captions import Groups
    from longclip.planner.estimate import Costs, Job
    from longclip.training import LongClip

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [*overrides])
    groups = Groups(instantiate(config.recipe.captions), seed=0)
    with torch.device("meta"):
        tower, terms = instantiate(without_weights(config.model)), instantiate(config.recipe.terms)
        module = LongClip(tower, terms, groups.slots, instantiate(config.optim), seed=0)
    heads = sum(parameter.numel() for parameter in module.terms.parameters())
    lengths_BK = lengths(groups, tower.tokenizer, tuple(_sources(config.recipe.captions)), tellings)
    counted = Costs(module, lengths_BK, Job(config.batch_size, world, "bf16-mixed"))
    image, text, loss = counted.flops(None, False).values()
    memory = counted.memory(None, False)
    kept = [
        memory[part] for part in memory if part.startswith("activations") or part in ("embeddings", "loss")
    ]
    return Cost(counted.job.local, image, text, loss, sum(kept), heads, float(lengths_BK.sum(1).mean()))


def lengths(groups: Any, tokenizer: Any, sources: Sequence[str], tellings: int) -> Any:
    """lengths_BK of the texts that a recipe shows of scenes, told a few times, by the sources it names."""
    from longclip.tokens import pack

    groups = groups.reading(tokenizer.ids)
    shown = [
        groups.show(list(_captions(index, tokenizer, sources, tellings)), str(index), epoch=0)
        for index in range(IMAGES)
    ]
    return pack(shown, tokenizer).lengths_BK.numpy()


def _captions(index: int, tokenizer: Any, sources: Sequence[str], tellings: int) -> Iterator[Any]:
    from longclip.data.scenes import caption
    from longclip.data.scenes.text import describe, tell

    scene, told, _ = tell("costs", index, seed=0)
    for number in range(max(tellings, len(sources))):
        made = caption(told if number == 0 else describe(scene, Random(f"{index}/{number}")), tokenizer)
        source = sources[number % len(sources)] if sources else made.source
        yield made._replace(source=source, score=1.0 / (1 + number))


def _sources(node: Any) -> Iterator[str]:
    """The sources of captions that a recipe names."""
    if hasattr(node, "items"):
        named = str(node.get("_target_", "")).endswith(".Source")
        for key, value in node.items():
            if key in ("source", "sources") or (named and key == "name"):
                yield from [value] if isinstance(value, str) else value or ()
            else:
                yield from _sources(value)


def markdown(found: dict[str, Cost], options: argparse.Namespace) -> str:
    """Every recipe as multiples of `long`, the dearest first, and what its parts add."""
    base = found["long"]
    head = ["recipe", "FLOPs", "image tower", "text tower", "loss", "bytes kept", "heads", "tokens an image"]
    lines = [
        [
            name,
            f"{one.flops / base.flops:.2f}",
            *(f"{part / base.flops:.2f}" for part in (one.image, one.text, one.loss)),
            f"{one.kept / base.kept:.2f}",
            f"{one.heads / 1e6:.2f} M" if one.heads >= 1e4 else str(one.heads),
            f"{one.tokens:.0f}",
        ]
        for name, one in sorted(found.items(), key=lambda pair: -pair[1].flops)
    ]
    return "\n".join(
        [
            documents.table(head, lines),
            "",
            f"A step of {options.batch:,} images on {options.world} processes, `model={options.model}`, "
            f"bfloat16, on one process; `long` is 1.00: {base.flops / 1e12:.2f} TFLOP and "
            f"{base.kept / 2**30:.1f} GiB. FLOPs of towers and loss are shares of `long`'s total. Heads: "
            f"parameters that are trained and not exported. The scenes' paragraphs, {TELLINGS} an image.",
        ]
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
