"""Judge a model offline: `python -m eval.run model=runs/demo benchmark=scenes`.

The same evaluators on the same data path as during training (`longclip.evaluate`).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from omegaconf import DictConfig

from conf.launch import launch


def evaluate(config: DictConfig) -> dict[str, float]:
    """Load a model, run the benchmarks, print a table, write metrics.json."""
    import torch
    from rich.console import Console

    from conf.launch import instantiate
    from eval.report import table
    from longclip.evaluate import judge
    from longclip.models import load
    from longclip.towers.clip import DualTower

    backbone = load(config.source, config.context_length, config.weights)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tower = DualTower(backbone).to(device)
    data = instantiate(config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg)
    data.prepare_data()
    metrics = judge(tower, data, instantiate(config.benchmark))
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table(metrics, None, title=config.source))
    folder = Path(config.out) if config.out else Path(config.source)
    if config.out or folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "eval.json"
        path.write_text(json.dumps(metrics, indent=1) + "\n")
        console.print(f"metrics: {path}")
    return metrics


def main() -> None:
    """`model=NAME` is told to Hydra as `source=NAME`: it would look for NAME among conf/model/*.yaml."""
    sys.argv = [re.sub(r"^model=", "source=", argument) for argument in sys.argv]
    if not any(argument.startswith(("source=", "-")) for argument in sys.argv[1:]):
        sys.exit("error: say what to judge: python -m eval.run model=runs/demo (--help lists the rest)")
    launch(evaluate, "eval")


if __name__ == "__main__":
    main()
