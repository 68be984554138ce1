"""Recipes that lock towers: what trains is what they say, and an export holds it."""

import hydra
import pytest
import torch

from conf.launch import CONF, instantiate
from longclip.captions import Groups
from longclip.optim import AdamW
from longclip.towers.freezing import Freeze, lock
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import UserError

MATRICES = {"visual.proj", "text_projection", "logit_scale"}


def module_of(recipe, tiny):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [f"recipe={recipe}", f"model.backbone.architecture={tiny}"])
    slots = Groups(instantiate(config.recipe.captions), seed=0).slots
    tower, terms = instantiate(config.model), instantiate(config.recipe.terms)
    return LongClip(tower, terms, slots, AdamW(lr=1e-3, warmup=0, samples=64), 0)


def trained(module):
    return {name for name, p in module.tower.backbone.named_parameters() if p.requires_grad}


def test_lit_trains_the_text_tower(tiny):
    names = trained(module_of("lit", tiny))
    assert not any(name.startswith("visual.") for name in names)
    assert {"token_embedding.weight", "text_projection", "logit_scale"} <= names


def test_projectors_train_the_matrices_that_every_export_holds(tiny):
    module = module_of("projectors", tiny)
    assert trained(module) == MATRICES
    assert not list(module.terms.parameters())


@pytest.mark.parametrize("recipe", ["lit", "projectors"])
def test_activations_of_a_locked_tower_are_not_kept(recipe, tiny):
    tower = module_of(recipe, tiny).tower
    image_BE = tower.encode_image(torch.zeros(2, 3, 24, 24, dtype=torch.uint8))
    reached = {type(image_BE.grad_fn).__name__} if image_BE.grad_fn else set()
    assert bool(reached) == (recipe == "projectors")


def test_mcl_trains_the_mlps_of_both_towers_alone(tiny):
    names = trained(module_of("mcl", tiny))
    assert {name.split(".")[-3] for name in names - {"logit_scale"}} == {"mlp"}
    assert len(names) == 1 + 2 * 2 * 4, "two blocks in each tower, two matrices with biases"


def test_what_alone_is_to_train_has_a_known_name_and_is_there(tiny):
    model = build(tiny, None, 248).model
    with pytest.raises(UserError, match=r"model\.freeze\.only is 'mlp'; it is mlps"):
        lock(model, Freeze(only="mlp"))
    with pytest.raises(UserError, match=r"lift .* model\.freeze\.only"):
        lock(model, Freeze(image=True, text=True, only="mlps"))
