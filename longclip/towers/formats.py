"""Weights files of every kind that CLIP users hold, told apart by content: path in, named tensors out.

    OpenAI archive        TorchScript zip; QuickGELU; three extra integers that are no weights
    Long-CLIP .pt         state dict with two text position tables; QuickGELU
    open_clip epoch_N.pt  a training checkpoint: "state_dict" with "module." before each name
    Hugging Face          CLIPModel's names (see `huggingface`); the rest stands in config.json beside it
    state dict            .pt, .pth, .bin or .safetensors

No file is unpickled freely: `torch.load(weights_only=True)`, safetensors, or `archive.read_torchscript`.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..types import UserError
from . import archive, huggingface

log = logging.getLogger(__name__)

LONG_CLIP_KEEP = 20
"""Rows that Long-CLIP takes from its frozen table; the others come from `positional_embedding_res`."""

_OPENAI_INTEGERS = ("input_resolution", "context_length", "vocab_size")
_WRAPPERS = ("module.", "_orig_mod.")


class Weights(NamedTuple):
    """Tensors of a whole model, under open_clip's names."""

    tensors: dict[str, Tensor]
    kind: str  # "openai", "long-clip", "hugging face" or "state dict"
    quick_gelu: bool | None  # what they were trained with; None where the file does not tell


def read(path: str | Path) -> Weights:
    """The weights in a file, floating point as float32, on the CPU.

    Raises UserError for a file that is absent, no weights file, a Lightning checkpoint, or one that
    holds Python objects besides tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no weights file {path}.")
    state = _unwrapped({name: _float(tensor) for name, tensor in _raw(path).items()})
    if not state:
        raise UserError(f"{path} holds no tensors.")
    return _told_apart(state)


def _raw(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        members = _members(path)
        if archive.is_torchscript(members):
            return archive.read_torchscript(path)
        if any(name.endswith("/data.pkl") for name in members):
            return _torch_load(path)
    elif start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size:
        return _safetensors(path)
    elif start[:1] == b"\x80":
        return _torch_load(path)
    elif start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` there.")
    raise UserError(
        f"{path} is no weights file that longclip knows: it reads OpenAI archives, Long-CLIP's .pt, "
        f"state dicts of torch.save and safetensors (is it a web page or a download that was cut off?)."
    )


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as zipped:
            return zipped.namelist()
    except archive.DAMAGE as error:
        raise _damaged(path, error) from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} could not be read as safetensors: {error}.") from error


def _torch_load(path: Path) -> dict[str, Tensor]:
    try:
        # mmap: a training checkpoint's optimizer state is two more models that nobody asked for.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if _is_lightning(path):
            raise _lightning(path) from error
        raise UserError(
            f"{path} holds Python objects besides tensors, which longclip does not load because they can run "
            f"code: save the model's state_dict() alone, best as safetensors."
        ) from error
    except archive.DAMAGE as error:
        raise _damaged(path, error) from error
    if isinstance(loaded, dict) and "pytorch-lightning_version" in loaded:
        raise _lightning(path)
    return _state_dict(loaded, path)


def _is_lightning(path: Path) -> bool:
    """Whether a file of torch.save that will not load says that Lightning wrote it."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as zipped:
            pickles = [name for name in zipped.namelist() if name.endswith("/data.pkl")]
            return any(b"pytorch-lightning_version" in zipped.read(name) for name in pickles)
    except archive.DAMAGE:
        return False


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} could not be read, it may be damaged or cut off ({error!r}): copy or download it again."
    )


def _lightning(path: Path) -> UserError:
    return UserError(
        f"{path} is a training checkpoint of Lightning, not a weights file: run "
        f"`longclip export {path} --format open_clip --out DIR` first, then use local-dir:DIR."
    )


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict of named tensors.")
    strangers = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strangers:
        raise UserError(
            f"{path} is no state dict: {', '.join(strangers[:5])} "
            f"({len(strangers)} in all) are no named tensors. Save the model's state_dict() alone."
        )
    return state


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel and torch.compile put before every name."""
    for prefix in _WRAPPERS:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _told_apart(state: dict[str, Tensor]) -> Weights:
    if {"positional_embedding", "positional_embedding_res"} <= state.keys():
        return Weights(_merge_long_clip(state), "long-clip", True)
    if huggingface.is_theirs(state):
        return Weights(huggingface.renamed(state), "hugging face", None)
    if all(name in state for name in _OPENAI_INTEGERS):
        log.info("left out of an OpenAI file, being no weights: %s", ", ".join(_OPENAI_INTEGERS))
        tensors = {name: tensor for name, tensor in state.items() if name not in _OPENAI_INTEGERS}
        return Weights(tensors, "openai", True)
    return Weights(state, "state dict", None)


def _merge_long_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of its frozen and its trained table, equal in shape, each is dead where the other counts."""
    merged = dict(state)
    trained_LD = merged.pop("positional_embedding_res")
    frozen_LD = merged["positional_embedding"]
    if frozen_LD.shape != trained_LD.shape:
        raise UserError(
            f"These look like Long-CLIP weights, but positional_embedding is {list(frozen_LD.shape)} and "
            f"positional_embedding_res is {list(trained_LD.shape)}, which should be equal."
        )
    table_LD = torch.cat([frozen_LD[:LONG_CLIP_KEEP], trained_LD[LONG_CLIP_KEEP:]])
    merged["positional_embedding"] = table_LD
    log.info(
        "Long-CLIP positions merged: %d frozen rows, %d trained",
        LONG_CLIP_KEEP,
        len(table_LD) - LONG_CLIP_KEEP,
    )
    return merged
