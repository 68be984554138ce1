"""Judge a model offline: `python -m eval.run model=runs/demo benchmark=scenes`.

The same evaluators on the same data path as during training (`longclip.evaluate`).
"""

from __future__ import annotations

import json
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

    backbone = load(config.model, config.context_length)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tower = DualTower(backbone).to(device)
    data = instantiate(config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg)
    data.prepare_data()
    metrics = judge(tower, data, instantiate(config.benchmark))
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table(metrics, None, title=f"{config.model}"))
    folder = Path(config.out) if config.out else Path(config.model)
    if config.out or folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "eval.json"
        path.write_text(json.dumps(metrics, indent=1) + "\n")
        console.print(f"metrics: {path}")
    return metrics


if __name__ == "__main__":
    launch(evaluate, "eval")
