"""The folder that `open_clip.create_model_and_transforms("local-dir:DIR")` opens."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
from safetensors.torch import save_file

from .model import Plain

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def write(made: Plain, folder: Path) -> None:
    """Weights, configuration and, where it is not open_clip's own, the tokenizer."""
    preprocess = {key: value for key, value in made.preprocess_cfg.items() if key != "size"}
    config = {"model_cfg": made.model_cfg, "preprocess_cfg": preprocess, "longclip": made.provenance}
    save_file(made.state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    name = made.model_cfg["text_cfg"].get("hf_tokenizer_name")
    if name:  # open_clip looks for it inside the folder and nowhere else
        open_clip.tokenizer.HFTokenizer(name).tokenizer.save_pretrained(folder)


def problems(made: Plain) -> list[str]:
    """None beyond those of every format."""
    return []
