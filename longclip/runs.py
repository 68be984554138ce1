"""A run directory: what lies where, and who may write there.

    config.yaml            the resolved config of the first start (config.resume-N.yaml of later ones)
    checkpoints/           step-000001200.ckpt/, the newest few; each complete on its own (see `stored`)
    metrics.json           the last judgement, flat name -> number
    judgements.jsonl       every judgement with the samples seen, appended
    stacks-rank3.txt       where process 3 was when nothing happened any more (see `watchdog`)
    csv/ ...               loggers
    export/                the open_clip folder

The directory is a pure function of the run's name, so a requeued job finds its own checkpoints.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import yaml

from .stored import Stored, why_not_whole
from .types import UserError

log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}.ckpt"


def folder_of(model: str, file: str) -> Path | None:
    """The run that a model comes from, by a file in it: itself, or that of a checkpoint or export inside."""
    path = Path(model.removeprefix("local-dir:"))
    around = (path, path.parent, path.parent.parent)
    return next((folder for folder in around if (folder / file).is_file()), None)


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*.ckpt"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; a torn one is named and passed over."""
    for path in reversed(checkpoints(run)):
        reason = why_not_whole(path)
        if reason is None:
            return path
        log.warning("passed over: %s", reason)
    return None


def claim(run: Path, resume: str | None, leader: bool = True) -> Path | None:
    """Decide where a start goes on: the checkpoint to resume from, None for a new run.

    Args:
        run: the run directory.
        resume: None for a new run, "auto" for the newest checkpoint of this run, or the path of a checkpoint
            that a new run begins from; with the same path once more it goes on from its own newest.
        leader: this is process 0; the others follow it into the directory that it has begun.

    Raises:
        UserError: a run of this name exists and resume is None, or the path is no whole checkpoint, or the
            run has newer ones.
    """
    if resume == "auto":
        return newest_checkpoint(run)
    if resume is not None:
        if not Path(resume).exists():
            raise UserError(f"resume={resume}: no such checkpoint; resume=auto takes the newest of {run}")
        chosen, newest = Stored(Path(resume)).folder, newest_checkpoint(run)
        if newest and _began_from(run) == resume:  # the same command again: a job that was requeued
            return newest
        if leader and newest and newest.resolve() != chosen.resolve():
            # Of two branches in one directory the older would be taken for the newer, and pruned for it.
            raise UserError(
                f"resume={resume} would go back behind {newest}: resume=auto goes on from there, "
                "name=OTHER begins a run of its own from your checkpoint"
            )
        return chosen
    if leader and begun(run):
        raise UserError(
            f"{run} already holds a run: resume=auto continues it, name=OTHER starts a new one beside it, "
            f"or remove the directory yourself"
        )
    return None


def _began_from(run: Path) -> str | None:
    """What its first start was told to resume from."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.exists() else None
    return config.get("resume") if isinstance(config, dict) else None


def begun(run: Path) -> bool:
    """Whether anything came of it: a mistyped start leaves only a config."""
    return (run / "judgements.jsonl").exists() or bool(checkpoints(run))


def write_config(run: Path, text: str) -> Path:
    """Keep the config of the first start that came to something; later ones are written beside it."""
    run.mkdir(parents=True, exist_ok=True)
    path, attempt = run / "config.yaml", 0
    while begun(run) and path.exists():
        attempt += 1
        path = run / f"config.resume-{attempt}.yaml"
    path.write_text(text)
    return path


def record(run: Path, samples_seen: int, metrics: dict[str, float]) -> None:
    """Append a judgement, and make it the run's `metrics.json`."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "judgements.jsonl", "a") as f:
        f.write(json.dumps({"samples_seen": samples_seen, **metrics}) + "\n")
    temporary = run / "metrics.json.tmp"
    temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    temporary.replace(run / "metrics.json")


def judgements(run: Path) -> list[dict[str, float]]:
    """All judgements of a run, in order; a line torn by a kill is left out."""
    path = run / "judgements.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a torn line was passed over", path)
    return rows


def start(run: Path) -> dict[str, float] | None:
    """The judgement from before the run's first step; None where training began without one."""
    return next((row for row in judgements(run) if row.get("samples_seen") == 0), None)
