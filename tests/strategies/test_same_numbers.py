"""Every recipe in conf/: loss and gradients of a batch do not depend on how many processes hold it."""

import json
import os
from functools import partial
from pathlib import Path

import hydra
import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from processes import spawn
from tiny import TINY
from torch import distributed

from conf.launch import CONF, instantiate
from longclip import dist
from longclip.captions import Groups
from longclip.data.loading import collate
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.optim import AdamW
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.training import LongClip

IMAGES, WORLD = 12, 3
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))

TEXT_ALONE = {"tulip"}
"""Recipes that read no images."""


def recipe(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        whole = hydra.compose("train", [f"recipe={name}"])
    config = OmegaConf.to_container(whole.recipe, resolve=True)
    config["rotary"] = whole.model.backbone.rotary
    for term in config["terms"].values():
        if term.get("k"):
            term["k"] = 3  # components of twelve images, not of thousands
    return config


def ragged(samples):
    """One image that lacks every other slot; one without any caption, and so all of the last process's."""
    gappy = samples[4]
    for index in (1, *range(IMAGES - IMAGES // WORLD, IMAGES)):
        samples[index] = samples[index]._replace(texts=(None,) * len(gappy.texts))
    samples[4] = gappy._replace(texts=tuple(t if k % 2 == 0 else None for k, t in enumerate(gappy.texts)))
    return samples


def columns(terms):
    """What side-cars might hold of all images; one image is in none of them."""
    random = torch.Generator().manual_seed(0)
    asked = {name: size for term in terms.values() for name, size in term.columns.items()}
    made = {}
    for name, size in sorted(asked.items()):
        made[name] = torch.rand((IMAGES,) if size == 0 else (IMAGES, size or 20), generator=random)
        made[name][2] = torch.nan
    return made


def step(config, scenes):
    """Loss and parameter gradients, both averaged over the processes as strategies do."""
    torch.manual_seed(0)
    tower = DualTower(build("ViT-longclip-numbers", None, 248, rotary=config["rotary"]))
    groups = Groups(instantiate(OmegaConf.create(config["captions"])), seed=0)
    terms = instantiate(OmegaConf.create(config["terms"]))
    module = LongClip(tower, terms, groups.slots, AdamW(lr=1e-3, warmup=0, samples=1), seed=0)
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(IMAGES, IMAGES), groups=groups,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg, workers=0,
    )  # fmt: skip
    samples, _ = next(iter(data.judge_batches("heldout", IMAGES, groups)))
    own = dist.rows(IMAGES // dist.world())
    batch = collate(ragged(samples)[own], tower.tokenizer)
    batch = batch._replace(columns={name: x[own] for name, x in columns(terms).items()})
    embeddings = tower(batch, groups.slots, module.needs)
    total = sum(term.weight * term(embeddings).value for term in terms.values())
    total.backward()
    found = {"loss": total.detach().reshape(1)}
    for name, parameter in module.named_parameters():  # one process may use what another does not
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for value in found.values() if dist.world() > 1 else ():
        distributed.all_reduce(value)
        value /= dist.world()
    return found


def steps(configs, scenes, folder):
    here = Path(folder) / str(os.getpid())
    here.mkdir()
    (here / "ViT-longclip-numbers.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(here)
    return {f"{r}:{n}": x for r, config in configs.items() for n, x in step(config, scenes).items()}


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    configs = {name: recipe(name) for name in RECIPES}
    return configs, steps(configs, str(scenes), tmp_path_factory.mktemp("one"))


def test_loss_and_gradients_of_every_recipe_are_those_of_one_process(alone, scenes, tmp_path):
    """On three; on four, every term is in test_dist and a whole training in test_engines."""
    configs, wanted = alone
    found = spawn(partial(steps, configs, str(scenes), str(tmp_path)), WORLD, tmp_path)[0]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_gradients_in_both_towers(name, alone):
    got = {key for key, value in alone[1].items() if key.startswith(f"{name}:") and value.any()}
    assert any("visual" in key for key in got) == (name not in TEXT_ALONE)
    assert any("token_embedding" in key for key in got)
