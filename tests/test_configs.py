"""Every file in conf/ composes and instantiates, every recipe trains a step, every mistake is a sentence."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from conf import launch
from conf.launch import evaluators, instantiate
from longclip.captions import Groups
from longclip.objectives import Term
from longclip.types import UserError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
ROOTS = {"jsonl": ["benchmark.root=somewhere"]}
"""What a benchmark must be told on the command line."""


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(*overrides, name="train"):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_instantiates_and_its_terms_name_its_groups(recipe):
    config = compose(f"recipe={recipe}")
    groups = Groups(instantiate(config.recipe.captions), seed=0)
    terms = instantiate(config.recipe.terms)
    assert all(isinstance(term, Term) for term in terms.values())
    assert {group for term in terms.values() for group in term.groups} <= set(groups.slots)
    first = (CONF / "recipe" / f"{recipe}.yaml").read_text().splitlines()[1]
    assert "arXiv" in (CONF / "recipe" / f"{recipe}.yaml").read_text(), f"{recipe} names no paper: {first}"


@pytest.mark.parametrize("group", ["trainer", "logger", "optim", "benchmark", "data", "model", "experiment"])
def test_every_file_composes_and_resolves(group):
    for choice in choices(group):
        override = f"+experiment={choice}" if group == "experiment" else f"{group}={choice}"
        overrides = [override.removeprefix("+")]
        if choice in ("shards",):
            overrides += ["data.root=somewhere"] if group == "data" else []
        overrides += ROOTS.get(choice, []) if group == "benchmark" else []
        OmegaConf.to_container(compose(*overrides), resolve=True)


def test_every_retrieval_can_be_scored_by_late_interaction():
    config = compose("benchmark=urban1k", "benchmark.urban1k.scoring=late", name="eval")
    assert evaluators(config.benchmark)["urban1k"].scoring == "late"
    for path in (CONF / "benchmark").glob("*.yaml"):
        for node in OmegaConf.to_container(OmegaConf.load(path)).values():
            if isinstance(node, dict) and node.get("_target_", "").endswith((".PairSet", ".Retrieval")):
                assert "scoring" in node, path


def test_sources_filters_and_batches_are_chosen_on_the_command_line():
    config = compose(
        "data=shards",
        "data.root=somewhere",
        "data.train={cc12m: {folder: cc12m/train, weight: 0.5}, docci: {folder: 's3://docci'}}",
        "data.sidecar.stores=[scores]",
        "data.sidecar.filter={score: {top: 0.3}, key: {in: uids.npy}}",
        "data.plan.batches=balanced",
    )
    preprocess = {"size": 16, "resize_mode": "shortest", "interpolation": "bicubic"}
    data = instantiate(config.data, groups=None, tokenizer=None, preprocess=preprocess)
    assert {name: (s.folder, s.weight) for name, s in data.sources.items()} == {
        "cc12m": ("cc12m/train", 0.5), "docci": ("s3://docci", 1.0)
    }  # fmt: skip
    assert data.sidecar.filter == {"score": {"top": 0.3}, "key": {"in": "uids.npy"}}
    assert (data.plan.batches, data.plan.samples) == ("balanced", config.samples)


def test_a_recipe_that_no_export_can_hold_makes_none_unless_asked():
    assert compose("recipe=long").export == "open_clip"
    assert compose("recipe=clipmoe").export is None
    assert compose("recipe=clipmoe", "export=hf").export == "hf"


@pytest.mark.parametrize("trainer", ["cpu"])
def test_trainers_instantiate(trainer, tmp_path):
    config = compose(f"trainer={trainer}", f"runs={tmp_path}")
    assert instantiate(config.trainer, max_steps=1, logger=False).max_steps == 1


@pytest.mark.parametrize("optim", choices("optim"))
def test_optimisers_instantiate(optim):
    config = compose(f"optim={optim}", "samples=1_000_000")
    assert instantiate(config.optim).samples == 1_000_000


@pytest.mark.parametrize("program", ["train", "eval"])
def test_all_benchmarks_instantiate_at_once_under_names_of_their_own(program):
    every = ",".join(choices("benchmark"))
    roots = [root for own in ROOTS.values() for root in own]
    found = evaluators(compose(f"benchmark=[{every}]", *roots, name=program).benchmark)
    assert all(callable(evaluator) for evaluator in found.values())
    files = [OmegaConf.to_container(OmegaConf.load(path)) for path in (CONF / "benchmark").glob("*.yaml")]
    nodes = [node for file in files for node in file.get("benchmark", file).values()]
    assert len(found) == sum(isinstance(node, dict) and "_target_" in node for node in nodes)


def test_models_without_download_instantiate():
    for model in ("scenes", "photos"):
        tower = instantiate(compose(f"model={model}").model)
        assert tower.context_length == 248
        assert tower.padded_because is None


def test_only_plain_files_name_their_pretrained_weights():
    for model in ("vit_b32", "vit_b16", "vit_l14"):
        backbone = compose(f"model={model}").model.backbone
        assert (backbone.weights, backbone.context_length, backbone.keep) == ("openai", 248, 20)
        assert backbone.freeze_positions


def test_unknown_keys_name_their_neighbours():
    assert launch.nearest("optim.lrr", ["optim.lr", "optim.eps", "seed"])[0] == "optim.lr"
    known = ["seed", "model.backbone.context_length"]
    assert launch.nearest("context_length", known)[0] == "model.backbone.context_length"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe.terms.raw.margin=1", ["unknown config key", "+recipe.terms.raw.margin=... adds"]),
        ("optim.lrr=1", ["unknown config key 'optim.lrr'", "optim.lr"]),
        ("recipe=dreamlipp", ["there is no recipe=dreamlipp; nearest: dreamlip"]),
        ("context_length=77", ["context_length", "model.backbone.context_length"]),
    ],
)
def test_a_typo_is_one_sentence_without_traceback(override, words):
    done = run("train.py", override)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["recipe=dreamlip", "++recipe.terms.long.margin=1"],
            "recipe.terms.long has no _target_, .*raw, sub",
        ),
        (["recipe=long", "++recipe.terms.long.margn=1"], "recipe.terms.long has no option 'margn': .*margin"),
        (
            ["recipe=lotlip", "recipe.captions.raw={_target_:longclip.captions.Source,name:raw}"],
            r"'recipe.captions.raw.name'; .*'\+\+recipe.captions.raw=\{\.\.\.\}' puts another in its place",
        ),
    ],
)
def test_a_recipes_wrong_option_is_named_with_those_that_there_are(overrides, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    mistakes = (UserError, HydraException)
    with pytest.raises(mistakes) as raised, hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        launch.instantiate(hydra.compose("train", overrides).recipe.terms)
    assert re.search(words, launch.explain(raised.value, "train"))


def test_help_lists_the_groups_and_does_not_import_torch():
    done = run("-X", "importtime", "train.py", "--help")
    assert done.returncode == 0
    for group in ("recipe: ", "model: ", "data: ", "trainer: ", "logger: "):
        assert group in done.stdout
    assert "dreamlip" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "open_clip"}


def test_user_errors_are_found_through_hydras_wrapping():
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = UserError("this is what you see")
    assert launch.explain(wrapped, "train") == "this is what you see"
    assert launch.explain(RuntimeError("a fault of ours"), "train") is None


def test_a_full_disk_is_a_sentence_whoever_ran_into_it():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "then go on with resume=auto" in launch.explain(full, "train")
    full.__context__ = UserError("no space left for the checkpoint of step 20")
    assert launch.explain(full, "train") == "no space left for the checkpoint of step 20"
