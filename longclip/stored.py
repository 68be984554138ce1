"""A checkpoint on disk: a folder in which every process has written its share of the tensors.

    step-000001200.ckpt/
        00001-of-00004.safetensors     whole tensors; the run's plain values as JSON in every header
        00002-of-00004.safetensors     ...

A file appears under its name when it is complete and on the disk, and the names say how many there must
be: whether a checkpoint is whole can be seen from the folder alone. Nothing in it can run code.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .types import UserError

_NAME = re.compile(r"(\d{5})-of-(\d{5})\.safetensors")
_VALUES = "longclip"


def write_share(
    folder: Path, rank: int, world: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write one process's file, whole or not at all. `tensors` lie on the host, each in memory of its own.

    Raises OSError where the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rank + 1:05d}-of-{world:05d}.safetensors"
    partial = folder / f".{path.name}.{secrets.token_hex(4)}"
    try:
        _save(partial, tensors, values)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync(folder)


def _save(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    try:
        save_file(dict(tensors), path, metadata={_VALUES: json.dumps(values)})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    _sync(path)


def _sync(path: Path) -> None:
    """Let a power cut find what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Stored:
    """A checkpoint opened for reading; tensors are read when they are asked for.

    Raises UserError where it is torn, or no checkpoint of longclip's.

    Attributes:
        values: what was written beside the tensors.
        shapes: name -> shape of every tensor.
        world: how many processes wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = _files(folder)
        self.world = len(files)
        try:
            self._shares = [safe_open(path, framework="pt") for path in files]
            headers = [share.metadata() or {} for share in self._shares]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder} is torn ({error}): take an older one beside it") from error
        if any(_VALUES not in header for header in headers):
            raise UserError(
                f"{folder} was not written by longclip; weights files of others go through `longclip import`"
            )
        if any(header != headers[0] for header in headers):
            raise UserError(f"{folder} is torn (its files are of two saves): take an older one beside it")
        self.values: dict[str, Any] = json.loads(headers[0][_VALUES])
        self._home = {name: share for share in self._shares for name in share.keys()}  # noqa: SIM118
        self.shapes = {
            name: torch.Size(share.get_slice(name).get_shape()) for name, share in self._home.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the host."""
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def read_all(self, kind: str) -> dict[str, Tensor]:
        """All tensors called kind/NAME, by NAME."""
        prefix = f"{kind}/"
        return {n.removeprefix(prefix): self.read(n) for n in self.shapes if n.startswith(prefix)}


def why_not_whole(folder: Path) -> str | None:
    """Why a checkpoint cannot be read, None if it can; looks at names, sizes and headers only."""
    try:
        Stored(folder)
    except UserError as error:
        return str(error)
    return None


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no checkpoint of longclip's, which is a folder of .safetensors files; "
            "weights files of others go through `longclip import`"
        )
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.iterdir())}
    shares = [(path, match) for path, match in found.items() if match]
    worlds = {int(match[2]) for _, match in shares}
    if len(worlds) != 1 or len(shares) != worlds.copy().pop():
        raise UserError(
            f"{folder} is torn ({len(shares)} of {'/'.join(map(str, sorted(worlds))) or '?'} files are "
            "there): take an older one beside it"
        )
    return [path for path, _ in shares]


def owners(shapes: Mapping[str, torch.Size], world: int) -> dict[str, int]:
    """Which process writes which tensor: runs of neighbours of about equal size."""
    total, before, found = sum(map(torch.Size.numel, shapes.values())), 0, {}
    for name, shape in shapes.items():
        found[name] = min(before * world // max(total, 1), world - 1)
        before += shape.numel()
    return found
