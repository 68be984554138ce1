"""What a run is judged on unless the command line says otherwise: its own evaluation sets.

In: the composed config and the overrides that were typed. Out: the config with `data` and `benchmark` as the
run's config.yaml has them. Any other model is judged on what `conf/eval.yaml` names.

The run may be somebody else's: of its config nothing is built but what our own conf/data and conf/benchmark
name, nothing is looked up in the environment, and no data are made (`data.prepare`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from conf.launch import CONF, targets
from longclip import runs
from longclip.types import UserError

log = logging.getLogger(__name__)


def config_of(model: str) -> Path | None:
    """The config.yaml of the run that a model comes from."""
    run = runs.folder_of(model, "config.yaml")
    return run and run / "config.yaml"


def judged_as_trained(config: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config with what the run behind `source` was judged on, where no data or benchmark was chosen.

    A benchmark that is chosen brings its data, or finds its splits in the run's; data bring their benchmark.

    Raises:
        UserError: the run's config does not say what it was judged on, or has no such key as was typed.
    """
    file = config_of(config.source)
    overrides = OverridesParser.create().parse_overrides(list(typed))
    chosen = {override.key_or_group for override in overrides}
    if file is None or "data" in chosen:
        return config
    if "benchmark" in chosen and not splits(config.benchmark):
        return config
    parts = ["data"] if "benchmark" in chosen else ["data", "benchmark"]
    found, rest = _read(file, parts), _without(config, parts)
    own = OmegaConf.merge(rest, found)
    if "benchmark" in chosen and not splits(own.benchmark) <= {*own.data.get("judge", ())}:
        return config
    for override in overrides:
        if override.key_or_group.partition(".")[0] in parts:
            _apply(override, found, file)
    log.info("%s of %s; data=... or benchmark=... chooses", " and ".join(parts), file)
    return OmegaConf.merge(rest, found)  # type: ignore[return-value]


def splits(benchmark: DictConfig) -> set[str]:
    """The splits of `data` that it judges on; published sets bring their own."""
    nodes = [node for node in benchmark.values() if OmegaConf.is_dict(node)]
    return {node.split for node in nodes if isinstance(node.get("split"), str)}


def known() -> set[str]:
    """What configs of data and benchmarks in conf/ build."""
    files = [file for part in ("data", "benchmark") for file in (CONF / part).rglob("*.yaml")]
    return {name for file in files for name in re.findall(r"_target_: *([\w.]+)", file.read_text())}


def _read(file: Path, parts: Sequence[str]) -> DictConfig:
    try:
        whole = yaml.safe_load(file.read_text())
        found = {part: whole[part] for part in parts}
        found["data"]["prepare"] = None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} does not say what its run was judged on ({error!r}); choose data=... and benchmark=..."
        ) from error
    strange = sorted({*targets(found)} - known())
    if strange or "${" in yaml.safe_dump(found):
        raise UserError(
            f"{file} builds what no config of longclip's data and benchmarks does "
            f"({', '.join(strange) or '${...}'}), and may be anybody's: choose data=... and benchmark=..."
        )
    if not found.get("benchmark", True):
        raise UserError(
            f"the run of {file} was trained with benchmark=none: say what to judge it by (benchmark=...)"
        )
    return OmegaConf.create(found)


def _apply(override: Override, found: DictConfig, file: Path) -> None:
    """One typed override, on what the run had."""
    key = override.key_or_group
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(found, parent)
    may_be_new = override.is_add() or override.is_force_add()
    if not isinstance(node, DictConfig) or (name not in node and not may_be_new):
        raise UserError(
            f"{key} is no key of what the run was judged on ({file}); data=... or benchmark=... chooses "
            "something else to judge on"
        )
    if override.is_delete():
        del node[name]
    else:
        OmegaConf.update(node, name, override.value(), force_add=True)


def _without(config: DictConfig, parts: Sequence[str]) -> DictConfig:
    kept = OmegaConf.masked_copy(config, [str(key) for key in config if key not in parts])
    OmegaConf.set_struct(kept, False)
    return kept
