"""Makers of small weights files in every format that users hold, from one seeded model.

They are written by hand here, not by longclip, so that reading is tested against the formats themselves.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
"""Heads are 64 wide, as in every OpenAI model, so that the architecture can be told from the shapes."""

CONFIGS = {
    "tiny": TINY,
    "tiny-quickgelu": {**TINY, "quick_gelu": True},
    "tiny-custom": {**TINY, "custom_text": True},
    "tiny-wide": {**TINY, "text_cfg": {**TINY["text_cfg"], "width": 128, "heads": 2}},
}


def register(folder: Path) -> None:
    """Make `CONFIGS` known to open_clip by name."""
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def model(name: str = "tiny", seed: int = 0, **options: object) -> nn.Module:
    """open_clip's model with random weights, in eval mode, positions large enough to matter."""
    torch.manual_seed(seed)
    made = open_clip.create_model(name, **options).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith("positional_embedding"):
                parameter.normal_(std=0.3)
            elif "mlp" in key:
                parameter.mul_(8)  # into the range where GELU and QuickGELU differ
    return made


def openai_archive(source: nn.Module, path: Path, half: bool = True) -> Path:
    """A TorchScript archive in OpenAI's layout: half precision, three integers, masks as plain attributes."""
    archived = _module_of(source.state_dict(), half)
    archived.register_buffer("input_resolution", torch.tensor(32))
    archived.register_buffer("context_length", torch.tensor(source.context_length))
    archived.register_buffer("vocab_size", torch.tensor(source.vocab_size))
    archived.transformer.resblocks._modules["0"].attn_mask = torch.zeros(77, 77)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format; the released files stay
        torch.jit.script(archived).save(str(path))
    return path


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _module_of(state: dict[str, Tensor], half: bool) -> nn.Module:
    root = _Branch()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        branch = root
        for part in path:
            if part not in branch._modules:
                branch.add_module(part, _Branch())
            branch = branch._modules[part]
        branch.register_parameter(leaf, nn.Parameter(tensor.half() if half else tensor.clone()))
    return root


def long_clip(source: nn.Module, path: Path) -> Path:
    """Long-CLIP's release: two tables of 248 rows, of which either has rows that must not be used."""
    state = dict(source.state_dict())
    table_LD = state["positional_embedding"]
    frozen_LD, trained_LD = table_LD.clone(), table_LD.clone()
    frozen_LD[20:] = 1e3
    trained_LD[:20] = -1e3
    state["positional_embedding"], state["positional_embedding_res"] = frozen_LD, trained_LD
    torch.save(state, path)
    return path


def trainer_checkpoint(source: nn.Module, path: Path) -> Path:
    """open_clip's epoch_N.pt after distributed training."""
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


def state_dict(source: nn.Module, path: Path) -> Path:
    """A bare state dict of torch.save."""
    torch.save(source.state_dict(), path)
    return path


def safetensors(source: nn.Module, path: Path) -> Path:
    """A bare state dict as safetensors."""
    save_file({name: tensor.contiguous().clone() for name, tensor in source.state_dict().items()}, path)
    return path


def folder(source: nn.Module, config: dict, path: Path, preprocess: dict | None = None) -> Path:
    """What open_clip calls local-dir."""
    path.mkdir(parents=True, exist_ok=True)
    safetensors(source, path / "open_clip_model.safetensors")
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or {}})
    (path / "open_clip_config.json").write_text(text)
    return path


def hub_cache(source: nn.Module, config: dict, cache: Path, name: str = "org/tiny") -> Path:
    """The same as huggingface_hub lays it out in its cache."""
    home = cache / f"models--{name.replace('/', '--')}"
    folder(source, config, home / "snapshots" / "abc123")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    return cache


def lightning_checkpoint(source: nn.Module, path: Path) -> Path:
    """What a training run of longclip leaves."""
    state = {f"model.backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state, "global_step": 7}, path)
    return path
