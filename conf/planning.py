"""`python train.py ... plan=auto`: what a step will need, before anything is trained, read or downloaded.

In: the composed config. Out: a table and sentences on the terminal, or lines in the log.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from conf.launch import instantiate
from longclip.types import UserError

PROBED = 256  # images whose captions are looked at


def plan(config: DictConfig) -> None:
    """Say what a step of this run needs and which micro_batch fits; train nothing."""
    import torch
    from rich.console import Console

    from longclip.captions import Groups
    from longclip.planner import estimate, report
    from longclip.training import LongClip

    groups = Groups(instantiate(config.recipe.captions), seed=config.seed)
    with torch.device("meta"):
        tower = instantiate(without_weights(config.model))
        terms = instantiate(config.recipe.terms)
        module = LongClip(tower, terms, groups.slots, instantiate(config.optim), config.seed)
    lengths_BK, source = _lengths(config, groups, tower)
    trainer = config.trainer
    job = estimate.Job(config.batch_size, _world(trainer), _plain(trainer.precision))
    costs = estimate.Costs(module, lengths_BK, job)
    memory, where = _memory(str(config.plan), trainer.accelerator)
    choice = estimate.choose(costs, memory, tower.grad_checkpointing)
    told = report.Told(
        config.name, config.samples, source, memory, where, config.micro_batch, tower.grad_checkpointing
    )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(report.table(costs, choice, told))
    given = [word for word in sys.argv[1:] if word.partition("=")[0] not in _ANSWERED]
    command = shlex.join(["python", "train.py", *given, *report.overrides(choice)])
    for line in report.sentences(costs, choice, told, command):
        console.print(line, highlight=False, soft_wrap=True)


_ANSWERED = ("plan", "micro_batch", "model.grad_checkpointing")


def without_weights(model: DictConfig) -> DictConfig:
    """The same model with random weights, where its name tells the shapes and the tag the activation."""
    import open_clip

    from longclip.towers import configs

    bare = OmegaConf.create(OmegaConf.to_container(model, resolve=True))
    architecture, tag = bare.backbone.get("architecture"), bare.backbone.weights
    if architecture and tag:
        own = configs.named(architecture).get("quick_gelu", False)
        known = open_clip.get_pretrained_cfg(architecture, tag) or {}
        bare.backbone.weights, bare.backbone.quick_gelu = None, bool(known.get("quick_gelu", False) or own)
    return bare


def _lengths(config: DictConfig, groups: Any, tower: Any) -> tuple[Any, str]:
    """Tokens of the first images' captions; of made-up paragraphs where there are no data."""
    from longclip.planner import lengths

    try:
        data = instantiate(
            config.data, groups=groups, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg
        )
        data.setup("fit")
        batch = data.probe(min(PROBED, data.epoch_size))
    except (UserError, OSError, MissingMandatoryValue):
        return lengths.synthetic(groups, tower.tokenizer, PROBED), "made-up paragraphs: no data at hand"
    return batch.lengths_BK.numpy(), f"of {len(batch.keys)} images of {config.data.root}"


def _memory(asked: str, accelerator: str) -> tuple[int, str]:
    from longclip.hardware import as_bytes, free_memory

    if asked.lower() in ("auto", "true"):
        return free_memory(accelerator), "free here now"
    return as_bytes(asked), f"plan={asked}"


def _world(trainer: DictConfig) -> int:
    """Processes of the run, as far as this one can see: those started, else one per device."""
    import torch

    from longclip.launching import ALONE, place

    here = place()
    if here is not ALONE:
        return here.world
    devices = _plain(trainer.devices)
    own = devices if isinstance(devices, int) and devices > 0 else max(1, torch.cuda.device_count())
    return own * int(_plain(trainer.get("num_nodes", 1)))


def _plain(value: Any) -> Any:
    return instantiate(value) if isinstance(value, DictConfig) else value
