"""Tensors out of a TorchScript archive (the files OpenAI released), without running its code.

`torch.jit.load` executes what the archive brings along. Here only its zip members `data.pkl` and `data/*`
are read: the pickle is interpreted with four inert names (a plain container for modules, tensor
reconstruction, storage types, an ordered dict) and anything else it asks for is refused.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from ..types import UserError

DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    LookupError,
    ArithmeticError,
    EOFError,
    OSError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    RuntimeError,  # of torch; RecursionError; NotImplementedError: a zip of a version that there never was
    MemoryError,
)
"""What a damaged or forged zip or pickle makes its reader run into, torch's or the one below."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(members: list[str]) -> bool:
    """Whether a zip with these members is a TorchScript archive (torch.save makes zips, too)."""
    return any(name.endswith("/constants.pkl") for name in members)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """All parameters and buffers of the archived module by their dotted names, on the CPU, as stored.

    Plain tensor attributes are in, too, since the archive does not tell them apart; `attn_mask`, which
    OpenAI's blocks hold that way and which follows from the context length, is left out. Raises
    UserError on a damaged archive or one that asks for more than tensors.
    """
    with zipfile.ZipFile(path) as archive:
        data = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if data is None:
            raise UserError(f"{path} is a TorchScript archive without data.pkl: the file is damaged.")
        try:
            return dict(_walk(_Unpickler(archive, data).load(), ""))
        except DAMAGE as error:
            raise UserError(f"{path} could not be read as a TorchScript archive ({error!r}).") from error


class _Module:
    """Stands for any scripted module: its attributes and nothing else."""

    def __init__(self) -> None:
        self.attributes: dict[str, object] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module's state is not a dictionary")
        self.attributes = state


class _Rebuild:
    """Stands for torch._utils._rebuild_tensor_v2. An instance without state, so a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
        # as_strided checks the bounds against the storage.
        return storage.as_strided(size, stride, offset)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _Dtype:
    """Stands for a storage type, with the name it has in the archive."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a storage type has no state")


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, data: str) -> None:
        super().__init__(io.BytesIO(archive.read(data)))
        self._archive = archive
        self._folder = data.removesuffix(".pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _Dtype(name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a tensor or a module")

    def persistent_load(self, pid: tuple) -> Tensor:
        _, storage, key, _, count = pid
        if key not in self._storages:
            raw = bytearray(self._archive.read(f"{self._folder}/{key}"))
            if not raw:
                self._storages[key] = torch.empty(0, dtype=_STORAGES[storage.name])
            else:
                self._storages[key] = torch.frombuffer(raw, dtype=_STORAGES[storage.name])
        if len(self._storages[key]) != count:
            raise pickle.UnpicklingError(f"tensor data {key} is cut short")
        return self._storages[key]


def _walk(value: object, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [] if name.endswith("attn_mask") else [(name, value)]
    if not isinstance(value, _Module):
        return []
    prefix = f"{name}." if name else ""
    return [found for key, child in value.attributes.items() for found in _walk(child, prefix + key)]
