"""Start a Hydra program: compose, run, and turn a user's mistake into a sentence instead of a traceback.

`launch(task, "train")` composes `conf/train.yaml` with the command line and calls `task(config)`.
Exit codes: 0 done, 1 the program failed (with traceback), 2 the user can mend it (one sentence);
85 and 143 see `longclip.stopping`.
"""

from __future__ import annotations

import difflib
import errno
import gc
import importlib
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longclip.launching import ALONE, place
from longclip.types import UserError

CONF = Path(__file__).resolve().parent
LIGHTNING = ("callbacks", "loggers", "plugins", "profilers", "strategies", "trainer")
HOMES = ("longclip", "torch.optim", *(f"lightning.pytorch.{part}" for part in LIGHTNING))
"""What a config's `_target_`s may come from; LONGCLIP_TARGETS=mylab,other adds to them."""
CONNECTORS = re.compile(r"lightning\.(fabric\.connector|pytorch\.trainer\.connectors)\b")
FULL = (errno.ENOSPC, errno.EDQUOT)
PROGRAMS = {"train": "train.py", "eval": "-m eval.run"}


def launch(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Run `task` under Hydra; exits the process with a sentence where the user made a mistake."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra's short form hides the cause
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")  # its own, about torch
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning")
    # data=stream gives every process the same number of batches, which is what this warns about.
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined")
    # Without srun a process is alone, and that is often meant: on a login node, under torchrun.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # Meant so: the module knows which parts of a batch the device must not hold.
    warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device`")
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()
    except Exception as error:
        sentence = explain(error, config_name)
        if sentence is None:
            raise
        print(f"\nerror: {sentence}", file=sys.stderr)
        sys.exit(2)


def load_libraries() -> None:
    """Import torch, Lightning and open_clip before anything else does.

    Imports make a million objects that stay: not looking for garbage among them saves a second of a start.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module("longclip.training")
    finally:
        gc.enable()


def own_name(config: DictConfig) -> str:
    """The run's name; in a sweep (`-m`) with the job's number, as each needs a run directory of its own."""
    job = HydraConfig.get()
    return f"{config.name}-{job.job.num}" if job.mode == RunMode.MULTIRUN else str(config.name)


def check_sweep(processes: int) -> None:
    """Refuse a sweep (`-m`) whose jobs start processes themselves: each would begin the whole sweep anew."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and processes > 1 and place() is ALONE:
        raise UserError(
            f"a sweep with -m runs each job in one process, and this one wants {processes}: "
            "trainer.devices=1, or sbatch --array (slurm/README.md)"
        )


def instantiate(config: Any, **extra: Any) -> Any:
    """Build what a config node describes; no OmegaConf object reaches the package, only plain values.

    Raises:
        UserError: a `_target_` comes from elsewhere than HOMES, or a part of a recipe has none.
    """
    _check_parts(config)
    for target in targets(OmegaConf.to_container(config, resolve=True) if config is not None else None):
        _check_target(target)
    if extra:  # handed over afterwards: Hydra would merge them into the config and turn objects into nodes
        return hydra.utils.instantiate(config, _convert_="all", _partial_=True)(**extra)
    return hydra.utils.instantiate(config, _convert_="all")


def _check_parts(config: Any) -> None:
    """An option of a term or caption group that is not there makes one, which is only that option."""
    where = config._get_full_key(None) if isinstance(config, DictConfig) else ""
    for name, part in config.items() if where in ("recipe.terms", "recipe.captions") else ():
        if not isinstance(part, DictConfig) or "_target_" not in part:
            named = ", ".join(str(key) for key in config if key != name) or "nothing else"
            raise UserError(
                f"{where}.{name} has no _target_, so nothing can be built of it; this recipe has {named}. "
                f"Name one of these, or give the new one a class ('+{where}.{name}={{_target_: ...}}')"
            )


def evaluators(config: Any) -> dict[str, Any]:
    """The benchmarks of a config by name; other entries are values that they share."""
    return {
        name: instantiate(node)
        for name, node in config.items()
        if OmegaConf.is_dict(node) and "_target_" in node
    }


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (str(value) for key, value in node.items() if key == "_target_")
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(value)


def _check_target(target: str) -> None:
    """A YAML that somebody sent must not be able to name os.system, nor to reach it through our imports."""
    added = [home for home in os.environ.get("LONGCLIP_TARGETS", "").split(",") if home]
    homes = (*HOMES, *added)
    if target.partition(".")[0] in {home.partition(".")[0] for home in homes}:
        found = hydra.utils.get_object(target)
        lives = f"{getattr(found, '__module__', '')}."
        at_home = any(lives.startswith(f"{home}.") for home in homes)
        # Of others, classes only: Lightning has functions and methods that unpickle what they are given.
        if at_home and (isinstance(found, type) or not lives.startswith(("lightning.", "torch."))):
            return
    raise UserError(
        f"the config names {target}, and only {', '.join(homes)} may be named; if you know and trust it: "
        f"LONGCLIP_TARGETS={target.partition('.')[0]} python ..."
    )


def explain(error: BaseException, config_name: str) -> str | None:
    """The sentence for a mistake the user can mend; None for a fault of the program."""
    causes = list(_causes(error))
    for cause in causes:
        if _is_user_error(cause):
            return str(cause)
    if any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes):
        return (
            f"no space left for what the run writes ({error}): free some where runs= lies, or point it "
            "elsewhere, then go on with resume=auto; checkpoints that are whole are intact"
        )
    for cause in causes:
        if _refused_by_trainer(cause):
            return (
                f"this trainer cannot be had: {_first_line(cause)} (python train.py --cfg job shows "
                "its keys, longclip doctor looks at this machine)"
            )
    if isinstance(error, InstantiationException):  # it names the class, and its cause what went wrong
        if option := _unknown_option(str(error)):
            return option
        return f"{_first_line(error)} {_first_line(causes[-1])}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _config_sentence(error, config_name)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_user_error(error: BaseException) -> bool:
    # By name, so that a mistyped key is answered without importing torch.
    return any(base.__name__ == "UserError" for base in type(error).__mro__)


def _refused_by_trainer(error: BaseException) -> bool:
    """Whether Lightning does not want the trainer's arguments: its connectors check them."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and bool(frames) and bool(CONNECTORS.match(frames[-1]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unknown_option(said: str) -> str | None:
    """The sentence for an option that a class does not have; `said` is Hydra's."""
    found = re.search(
        r"target '([\w.]+)'.*unexpected keyword argument '(\w+)'.*full_key: (\S+)", said, re.DOTALL
    )
    if found is None:
        return None
    target, option, key = found.groups()
    known = [name for name in inspect.signature(hydra.utils.get_object(target)).parameters if name != option]
    return f"{key} has no option {option!r}: {target.rpartition('.')[2]} has {', '.join(known)}"


def _config_sentence(error: BaseException, config_name: str) -> str:
    """Hydra's message with the nearest names that do exist."""
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", str(error))
    if unknown:
        inner = re.search(r"full_key: (\S+)", str(error.__cause__))  # of what was given in braces
        key = inner[1] if inner else unknown[1] or unknown[2]
        known = list(config_keys(config_name))
        listing = f"python {PROGRAMS[config_name]} --cfg job lists all"
        sentence = f"unknown config key {key!r}; nearest: {', '.join(nearest(key, known))} ({listing})"
        if re.match(r"recipe\.(terms|captions)\.\w", key) and key.rpartition(".")[0] in known:
            sentence += f"; recipes name what they set alone, +{key}=... adds another option of it"
            if unknown[1] in known:
                sentence += f", '++{unknown[1]}={{...}}' puts another in its place"
        return sentence
    missing = re.search(r"Could not find '([\w/]+)/([^'/]+)'", str(error))
    if missing:
        choices = sorted(path.stem for path in (CONF / missing[1]).glob("*.yaml"))
        near = difflib.get_close_matches(missing[2], choices) or choices
        said = "there are" if near == choices else "nearest"
        return f"there is no {missing[1]}={missing[2]}; {said}: {', '.join(near)}"
    listing = f"python {PROGRAMS[config_name]} --help lists the groups and their choices"
    return f"{_first_line(error)} ({listing})"


def nearest(key: str, known: list[str], count: int = 3) -> list[str]:
    """Known dotted keys most like `key`: by the whole path, or by the last part in another place."""
    tail = key.rpartition(".")[2]
    by_tail = [k for k in known if k.rpartition(".")[2] == tail]
    whole = difflib.get_close_matches(key, known, n=count, cutoff=0.5)
    tails = difflib.get_close_matches(tail, sorted({k.rpartition(".")[2] for k in known}), n=1, cutoff=0.7)
    by_near_tail = [k for k in known if tails and k.rpartition(".")[2] == tails[0]]
    return list(dict.fromkeys(by_tail + whole + by_near_tail))[:count] or known[:count]


def config_keys(config_name: str) -> Iterator[str]:
    """Every dotted key of the default config, with the groups that the command line itself chooses."""
    overrides = [
        a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w-]+", a) and (CONF / a.split("=")[0]).is_dir()
    ]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield from _walk(hydra.compose(config_name, overrides=overrides), "")


def _walk(node: Any, prefix: str) -> Iterator[str]:
    for key in node:
        if str(key).startswith("_"):  # _target_ and the like are not what somebody mistypes
            continue
        yield f"{prefix}{key}"
        if not isinstance(key, int) and isinstance(node._get_node(key), DictConfig):
            yield from _walk(node._get_node(key), f"{prefix}{key}.")
