"""What is exported: a plain dual encoder under open_clip's names, and why a model may not be one.

In: a `Backbone` as training leaves it. Out: `Plain`, with split position tables merged, training-only
settings dropped and the weights in the precision of the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from open_clip.transformer import PatchDropout
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tokens import Tokenizer
from ..towers import configs, rotary
from ..towers.experts import held_by
from ..towers.merging import merged_state_dict
from ..towers.pretrained import Backbone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Plain(NamedTuple):
    """All that any format needs to know of a model."""

    state: dict[str, Tensor]  # open_clip's names; on the host, each in memory of its own
    model_cfg: dict[str, Any]  # open_clip's configuration of exactly this model
    preprocess_cfg: dict[str, Any]  # mean, std, interpolation, resize_mode, size
    tokenizer: Tokenizer
    provenance: dict[str, Any]  # plain JSON values; stands in every configuration under "longclip"

    @property
    def context_length(self) -> int:
        return self.tokenizer.context_length

    @property
    def dtype(self) -> torch.dtype:
        """What the files hold."""
        return self.state["logit_scale"].dtype


def plain(backbone: Backbone, dtype: str = "fp32", provenance: Mapping[str, Any] | None = None) -> Plain:
    """The model as files will hold it; `backbone` is left as it is."""
    state = {name: _own(t, DTYPES[dtype]) for name, t in merged_state_dict(backbone.model).items()}
    config = _inference_cfg(backbone.model_cfg)
    return Plain(state, config, backbone.preprocess_cfg, backbone.tokenizer, dict(provenance or {}))


def find_problems(backbone: Backbone, made: Plain) -> list[str]:
    """All that keeps open_clip from building this very model from its model_cfg, in words; [] if nothing.

    Every other format is made from that configuration, so what is wrong here is wrong everywhere.
    """
    if rotary.KEY in made.model_cfg:
        return [
            "its text positions are rotary (model.backbone.rotary), which no other library reads: judge, "
            "search and go on from the run itself, and train with export=null"
        ]
    if held_by(backbone.model):
        return [
            "its blocks have experts and a router (model.experts), for which no other library has a place; "
            "the mean of the exports that they were made of is a plain CLIP: longclip average EXPORT EXPORT "
            "--out DIR"
        ]
    context, limit = made.model_cfg["text_cfg"]["context_length"], made.context_length
    problems = []
    if context != limit:
        problems.append(f"model_cfg says context_length {context}, the tokenizer cuts at {limit}")
    with torch.device("meta"):
        reference = configs.instantiate(backbone.model_cfg, backbone.preprocess_cfg)
    return problems + _module_problems(backbone.model, reference) + _tensor_problems(made.state, reference)


def _module_problems(model: nn.Module, reference: nn.Module) -> list[str]:
    theirs = dict(reference.named_modules())
    problems = []
    for name, module in model.named_modules():
        if "parametrizations" in name.split(".") or isinstance(module, PatchDropout):  # training's alone
            continue
        kind = parametrize.type_before_parametrizations(module)
        if name not in theirs:
            problems.append(f"module {name} ({kind.__name__}) has no place in open_clip's model")
        elif kind is not type(theirs[name]):
            made = type(theirs[name]).__name__
            problems.append(f"module {name} is a {kind.__name__}, model_cfg makes it a {made}")
    return problems


def _tensor_problems(state: Mapping[str, Tensor], reference: nn.Module) -> list[str]:
    expected = reference.state_dict()
    problems = [f"tensor {name} has no place in open_clip's model" for name in state if name not in expected]
    for name, tensor in expected.items():
        if name not in state:
            problems.append(f"tensor {name} is missing")
        elif state[name].shape != tensor.shape:
            problems.append(
                f"{name} is {list(state[name].shape)} where model_cfg makes it {list(tensor.shape)}"
            )
    problems += [f"{name} holds NaN or infinity" for name, tensor in state.items() if not _finite(tensor)]
    return problems


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _inference_cfg(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Without patch dropout, which belongs to a training run and not to the model."""
    config = deepcopy(dict(model_cfg))
    config["vision_cfg"].pop("patch_dropout", None)
    return config


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu")
    # clone: safetensors refuses tensors that share storage.
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().clone()
