"""Judge a model: `python -m eval.run model=runs/demo benchmark=[urban1k,docci]`.

The same evaluators on the same data path as during training (`longclip.evaluate`). Processes that torchrun
or srun starts share the work; the first of them prints and writes.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.launch import evaluators, instantiate, launch, load_libraries


def evaluate(config: DictConfig) -> dict[str, float]:
    """Load a model, run the benchmarks, keep and show what they find; returns all numbers."""
    load_libraries()
    import torch

    from eval.leaks import check
    from longclip import dist
    from longclip.data.tars.dataset import Dataset
    from longclip.launching import place
    from longclip.models import load
    from longclip.towers.clip import DualTower

    here = place()
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and here.world > 1:
        torch.cuda.set_device(here.local_rank)
    if here.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    named = Dataset(config.overlap) if config.overlap else None  # a mistyped folder costs no judging
    with dist.group(device):
        backbone = load(config.source, config.context_length, config.weights)
        tower = DualTower(backbone).to(device)
        findings, seconds = _judge(tower, _data(config, tower), evaluators(config.benchmark))
        if here.rank > 0:
            return {}
        return _finish(config, tower, backbone, check(findings, config.source, named), seconds)


def _data(config: DictConfig, tower: Any) -> Any:
    """What holds the evaluation sets of a run; published sets bring their own and need none of it made."""
    from eval.own import splits

    data = instantiate(config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg)
    if splits(config.benchmark):
        data.prepare_data()
    return data


def _judge(tower: Any, data: Any, benchmarks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Findings, and the seconds that each benchmark took."""
    from longclip.evaluate import examine

    findings: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, evaluator in benchmarks.items():
        started = time.monotonic()
        findings |= examine(tower, data, {name: evaluator})
        seconds[name] = time.monotonic() - started
    return findings, seconds


def _finish(
    config: DictConfig, tower: Any, backbone: Any, findings: dict[str, Any], seconds: dict[str, float]
) -> dict[str, float]:
    """Write what was found, and show it."""
    from rich.console import Console

    from eval.report import page, table
    from eval.results import Facts, folder_of, write
    from longclip.evaluate import flat
    from longclip.models import fingerprint

    settings: Any = OmegaConf.to_container(config.benchmark, resolve=True)
    facts = Facts(config.source, fingerprint(backbone), tower.context_length, settings, seconds)
    folder = Path(config.out) if config.out else folder_of(config.source)
    results = write(folder, findings, facts)
    numbers = flat({name: results[name] for name in findings})
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table(numbers, None, title=config.source))
    console.print(f"metrics: {folder / 'metrics.json'}")
    if config.report:
        console.print(f"report: {page.make(folder, tower, findings, results, config.against)}")
    return numbers


def judge(config: DictConfig) -> dict[str, float]:
    """`evaluate`, for a run on what it was judged on in training, unless the command line chose otherwise."""
    from eval.own import judged_as_trained

    return evaluate(judged_as_trained(config, HydraConfig.get().overrides.task))


def main() -> None:
    """`model=NAME` is told to Hydra as `source=NAME`: it would look for NAME among conf/model/*.yaml."""
    sys.argv = [re.sub(r"^model=", "source=", argument) for argument in sys.argv]
    if not any(argument.startswith(("source=", "-")) for argument in sys.argv[1:]):
        sys.exit("error: say what to judge: python -m eval.run model=runs/demo (--help lists the rest)")
    launch(judge, "eval")


if __name__ == "__main__":
    main()
