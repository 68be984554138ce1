"""What a preview shows: a recipe, read without Hydra and without running anything it names.

In: what the user typed as --recipe: a name among conf/recipe/*.yaml, a YAML file (also what `python train.py
... --cfg job --resolve` prints) or a run directory. Out: a `Recipe`.

A YAML file is data: its `_target_`s may name policies, augmentation and side-cars, and nothing else is built
but what lies in packages that the user admits (LONGCLIP_TARGETS=mylab), as in training.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import open_clip
import yaml

from .. import captions, recipes
from ..captions import Policy
from ..data import images
from ..data.images import Augment, EvalTransform
from ..data.sidecars import joining
from ..data.sidecars.joining import Join
from ..towers import configs
from ..types import UserError

_MODULES = {module.__name__: module for module in (captions, images, joining)}
_CONTEXT = "${model.backbone.context_length}"  # recipes refer to this, and to captions of their own
_GROUP = re.compile(r"\$\{recipe\.captions\.([\w-]+)\}$")


class Recipe(NamedTuple):
    """How a run would show its data."""

    label: str
    policies: dict[str, Policy]
    augment: Augment | None
    transform: EvalTransform
    architecture: str
    context_length: int
    seed: int
    sidecar: Join


class _Loader(yaml.SafeLoader):
    """Numbers as Hydra reads them: 1e-9 is one, which YAML 1.1 takes for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(name: str, architecture: str | None = None) -> Recipe:
    """What is behind --recipe; `architecture` (an open_clip name) goes before what the file says.

    Raises:
        UserError: there is no such recipe, it has no caption groups, or it names what no preview builds.
    """
    path = _find(name)
    config = _load(path)
    backbone = _node(config, "model", "backbone", path=path)
    model = str(architecture or backbone.get("architecture") or "ViT-B-16")
    described = configs.named(model)
    own = described["text_cfg"].get("context_length", 77) if "architecture" in backbone else 248
    context = backbone.get("context_length") or own
    groups = _node(config, "recipe", "captions", path=path)
    policies = _build({name: _referred(node, groups) for name, node in groups.items()}, context, path)
    if not policies:
        raise UserError(f"{path} has no caption groups; name a recipe that has some under recipe.captions")
    data = _node(config, "data", path=path)
    return Recipe(
        name,
        policies,
        _build(data["augment"], context, path) if "augment" in data else Augment(),
        _transform(model, backbone, described),
        model,
        int(context),
        int(config.get("seed") or 0),
        _build(data.get("sidecar"), context, path) or Join(),
    )


def _find(name: str) -> Path:
    given = Path(name)
    if (given / "config.yaml").is_file():
        return given / "config.yaml"
    if given.is_file():
        return given
    if name in recipes.names():
        return recipes.find(name)
    raise UserError(
        f"--recipe {name} is no run directory (no config.yaml in it), no file, and no recipe by name "
        f"({', '.join(recipes.names()) or 'there is no conf/recipe here'})"
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        found = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, not the keys of a recipe or a run's config")
    return found


def _node(config: Mapping[str, Any], *keys: str, path: Path) -> dict[str, Any]:
    node: Any = config
    for key in keys:
        node = node.get(key) or {}
        if not isinstance(node, dict):
            raise UserError(f"{path}: {key} is {node!r:.60}, where keys and values are expected")
    return node


def _referred(node: Any, groups: Mapping[str, Any]) -> Any:
    """A group with the policies that it refers to written out."""
    if isinstance(node, dict):
        return {key: _referred(value, groups) for key, value in node.items()}
    named = _GROUP.match(node) if isinstance(node, str) else None
    return groups.get(named[1], node) if named else node


def _build(node: Any, context: int, path: Path) -> Any:
    """What a YAML node describes: policies and plain values."""
    if isinstance(node, dict):
        target = node.get("_target_")
        given = {key: _build(value, context, path) for key, value in node.items() if key != "_target_"}
        return given if target is None else _made(target, given, path)
    if isinstance(node, list):
        return [_build(value, context, path) for value in node]
    if node == _CONTEXT:
        return context
    if isinstance(node, str) and "${" in node:
        raise UserError(
            f"{path} refers to {node}, which only a run resolves; write one out and name that: "
            "python train.py ... --cfg job --resolve > recipe.yaml"
        )
    return node


def _made(target: object, given: dict[str, Any], path: Path) -> Any:
    home, _, name = str(target).rpartition(".")
    package = home.partition(".")[0]
    own = package not in ("", "longclip") and package in os.environ.get("LONGCLIP_TARGETS", "").split(",")
    kind = getattr(_imported(home) if own else _MODULES.get(home), name, None)
    if not isinstance(kind, type) or kind.__module__.partition(".")[0] != package:
        raise UserError(
            f"{path} wants {target}, which a preview does not build: only what is in {', '.join(_MODULES)}, "
            "or in a package of yours: LONGCLIP_TARGETS=mylab longclip preview ..."
        )
    try:
        return kind(**given)
    except TypeError as error:
        raise UserError(f"{path}: {target} does not take these values: {error}") from error


def _imported(home: str) -> ModuleType:
    try:
        return importlib.import_module(home)
    except ImportError as error:
        raise UserError(f"{error}: is it installed here, or does it lie in PYTHONPATH?") from error


def _transform(name: str, backbone: Mapping[str, Any], described: Mapping[str, Any]) -> EvalTransform:
    tag = backbone.get("weights")
    theirs = (open_clip.get_pretrained_cfg(name, tag) or {}) if isinstance(tag, str) else {}
    size = backbone.get("image_size") or described["vision_cfg"].get("image_size", 224)
    modes = (theirs.get("resize_mode") or "shortest", theirs.get("interpolation") or "bicubic")
    return EvalTransform(size, *modes)
