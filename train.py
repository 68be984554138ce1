"""Train a CLIP on long captions: `python train.py` is the demo, `python train.py --help` lists the choices.

A table of contents: compose, build, fit, report. Everything below is importable and tested on its own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.launch import launch, load_libraries


def train(config: DictConfig) -> dict[str, float]:
    """Run one training; returns the final judgement."""
    import lightning

    from conf.launch import check_sweep, instantiate, own_name
    from eval import report
    from longclip import runs
    from longclip.captions import Groups
    from longclip.export import export_model
    from longclip.loggers import leader
    from longclip.training import LongClip

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the banner says it better
    config.name = own_name(config)
    run = Path(config.runs) / config.name
    checkpoint = runs.claim(run, config.resume, leader())
    lightning.seed_everything(config.seed, verbose=False)

    tower = instantiate(config.model)
    groups = Groups(instantiate(config.recipe.captions), seed=config.seed)
    terms = instantiate(config.recipe.terms)
    module = LongClip(
        tower, terms, groups.slots, instantiate(config.optim), config.seed, micro_batch=config.micro_batch
    )
    curriculum = instantiate(config.curriculum)
    data = instantiate(
        config.data,
        groups=groups,
        tokenizer=tower.tokenizer,
        preprocess=tower.preprocess_cfg,
        curriculum=curriculum,
    )
    trainer = instantiate(
        config.trainer,
        max_steps=config.samples // config.batch_size,
        logger=[instantiate(logger) for logger in config.logger.values()],
        callbacks=_callbacks(config, run, checkpoint, curriculum),
    )
    check_sweep(trainer.world_size)
    if leader():
        runs.write_config(run, OmegaConf.to_yaml(config, resolve=True))
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    trainer.fit(module, data)

    if not leader():
        return {}
    folder = run / "export"
    if config.export:
        export_model(run, folder, config.export, weights=config.weights)
    return report.finish(run, folder if config.export else None)


def _callbacks(config: DictConfig, run: Path, checkpoint: Path | None, curriculum: Any) -> list[Any]:
    """In the order in which they are called; Telemetry last, so that no other counts as waiting for data."""
    from conf.launch import evaluators, instantiate
    from longclip import callbacks
    from longclip.banner import Banner
    from longclip.failing import Together
    from longclip.stopping import Stop

    checkpoints = instantiate(config.checkpoints, resume=checkpoint)
    return [
        Stop(checkpoints),
        instantiate(config.watchdog),
        Banner(config.name, checkpoint),
        callbacks.progress(),
        callbacks.Stages(curriculum),
        instantiate(config.judge, benchmarks=evaluators(config.benchmark)),
        checkpoints,
        Together(run),
        callbacks.Skips(),
        instantiate(config.observe),
        callbacks.Telemetry(),
    ]


def main(config: DictConfig) -> None:
    """Train, or with `plan=...` only say what that would need."""
    load_libraries()
    if config.plan:
        from conf.planning import plan

        plan(config)
    else:
        train(config)


if __name__ == "__main__":
    launch(main, "train")
