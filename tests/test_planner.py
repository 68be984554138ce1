"""A plan counts on fake tensors what a real step does, and proposes chunks that fit."""

import re

import hydra
import numpy as np
import project
import pytest
import torch

from benchmarks.measures import flops, peak_bytes, saved_bytes
from conf.launch import CONF, instantiate
from longclip.captions import First, Groups, Sentences, Whole
from longclip.hardware import as_bytes, free_memory
from longclip.objectives import Contrastive, Grouping
from longclip.optim import AdamW
from longclip.planner import report
from longclip.planner.estimate import Choice, Costs, Job, choose
from longclip.planner.lengths import synthetic
from longclip.towers.answers import embed_images, embed_texts
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import Batch, UserError

PATCHES = frozenset({"patches"})
QUICK = ["mobileclip2", "longpo", "flame"]  # columns, a frozen start
OTHERS = ["betaclip", "count", "filip", "fixclip", "grain_matching", "lora", "lotlip", "negclip", "smartclip"]
GROUPS = Groups({"long": Whole(), "sub": Sentences(2)}, seed=0)


def module_of(tiny, **options):
    terms = {"long": Contrastive("long"), "sub": Contrastive("sub"), "grouping": Grouping("sub")}
    tower = DualTower(build(tiny, None, 248), **options)
    module = LongClip(tower, terms, GROUPS.slots, AdamW(lr=1e-3, warmup=0, samples=64), 0)
    module.log_every = 2
    return module


def blank(tiny):
    with torch.device("meta"):
        return module_of(tiny)


def batch_of(lengths_BK, size=24):
    images, tokens = len(lengths_BK), int(lengths_BK.sum())
    return Batch(
        ["an image"] * images,
        torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
        torch.randint(0, 49000, (tokens,), dtype=torch.int32),
        torch.from_numpy(lengths_BK),
        torch.zeros(lengths_BK.shape, dtype=torch.int32),
        int(lengths_BK.max()),
    )


@pytest.fixture(scope="module")
def lengths_BK(tiny):
    with torch.device("meta"):
        tokenizer = DualTower(build(tiny, None, 248)).tokenizer
    return synthetic(GROUPS, tokenizer, images=24)


@pytest.fixture(scope="module")
def costs(tiny, lengths_BK):
    return Costs(blank(tiny), lengths_BK, Job(24))


def step(module, batch, micro_batch=None):
    module.micro_batch = micro_batch
    module.training_step(batch, 0).backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_those_of_a_real_step(tiny, lengths_BK, costs, checkpointing):
    module, batch = module_of(tiny, grad_checkpointing=checkpointing), batch_of(lengths_BK)
    memory = costs.memory(None, checkpointing)
    real = saved_bytes(lambda: embed_images(module.tower, batch.pixels_BCHW, PATCHES))
    assert memory["activations, image tower"] == pytest.approx(real, rel=0.1)
    real = saved_bytes(lambda: embed_texts(module.tower, batch.tokens_T, lengths_BK, PATCHES)[0])
    assert memory["activations, text tower"] == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("micro_batch", [None, 8])
def test_planned_memory_and_flops_are_those_of_a_real_step(tiny, lengths_BK, costs, micro_batch):
    module, batch = module_of(tiny), batch_of(lengths_BK)
    parts = costs.memory(micro_batch, False)
    planned = sum(parts.values()) - parts["parameters"] - parts["optimiser states"]
    peak = peak_bytes(lambda: step(module, batch, micro_batch))
    assert 0.85 * peak < planned < 1.5 * peak
    module.zero_grad()
    real = flops(lambda: step(module, batch, micro_batch))
    assert sum(costs.flops(micro_batch, False).values()) == pytest.approx(real, rel=0.1)


def test_parameters_are_counted_to_the_byte(tiny, costs):
    module = module_of(tiny)
    assert costs.parameters == sum(p.numel() * 4 for p in module.parameters())


def test_bfloat16_keeps_less_and_more_processes_hold_less(tiny, lengths_BK, costs):
    half = Costs(blank(tiny), lengths_BK, Job(24, world=2, precision="bf16-mixed"))
    own, other = costs.memory(None, False), half.memory(None, False)
    assert other["activations, text tower"] < 0.4 * own["activations, text tower"]
    assert other["embeddings"] < 0.6 * own["embeddings"]


def test_the_largest_chunks_that_fit_are_proposed(costs):
    whole = sum(costs.memory(None, False).values())
    assert choose(costs, 2 * whole) == Choice(None, False, whole, True)
    eight = sum(costs.memory(8, False).values())
    assert choose(costs, eight / 0.9).micro_batch == 8
    least = choose(costs, 1)
    assert not least.fits
    assert least.need <= eight
    assert choose(costs, 2 * whole, checkpointing=True).grad_checkpointing


def test_a_report_is_plain_words_with_the_command(costs):
    choice = choose(costs, 2**34)
    told = report.Told("mine", 4800, "made up", 2**34, "plan=16GiB", 8, False)
    lines = report.sentences(costs, choice, told, "python train.py")
    assert "24 images a step = 1 process(es) x 24" in lines[0]
    assert lines[1].startswith("200 steps")
    assert "the whole batch at once fits into 16.00 GiB (plan=16GiB)" in lines[2]
    assert report.overrides(choice) == ["micro_batch=null", "model.grad_checkpointing=false"]
    assert report.table(costs, choice, told).row_count == 14
    none = report.sentences(costs, choose(costs, 1), told._replace(memory=1), "python train.py")
    assert "nothing fits into 1 bytes" in none[-1]


def planned(recipe, tiny):
    """What a step of a recipe costs on a tiny model, batch 8."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"recipe={recipe}", f"model.backbone.architecture={tiny}"]
        config = hydra.compose("train", overrides)
    for term in config.recipe.terms.values():
        if term.get("k"):
            term.k = 3  # components of a tiny model
    groups = Groups(instantiate(config.recipe.captions), seed=0)
    with torch.device("meta"):
        tower, terms = instantiate(config.model), instantiate(config.recipe.terms)
        optim = AdamW(lr=1e-3, warmup=0, samples=64)
        module = LongClip(tower, terms, groups.slots, optim, seed=0)
    return Costs(module, synthetic(groups, tower.tokenizer, images=8), Job(64))


@pytest.mark.parametrize("recipe", QUICK + [pytest.param(name, marks=pytest.mark.long) for name in OTHERS])
def test_recipes_of_every_kind_can_be_planned(recipe, tiny):
    flops = planned(recipe, tiny).flops(None, False)
    assert all(flops[part] > 0 for part in ("image tower", "text tower", "loss"))


def test_a_frozen_start_is_counted(tiny):
    with_start, without = planned("longpo", tiny), planned("longclip", tiny)
    assert with_start.parameters == 2 * without.parameters
    short = 1 - planned("long", tiny).tokens / with_start.tokens  # of all tokens: what the start reads
    # The same captions; a forward pass more, of three.
    for part, more in {"image tower": 1 / 3, "text tower": short / 3}.items():
        share = with_start.flops(None, False)[part] / without.flops(None, False)[part]
        assert share == pytest.approx(1 + more, abs=0.02)


def test_made_up_captions_go_through_the_recipe(lengths_BK):
    long_B, subs_BK = lengths_BK[:, 0], lengths_BK[:, 1:]
    assert 110 < long_B.mean() < 170
    assert 15 < subs_BK[subs_BK > 0].mean() < 30
    with torch.device("meta"):
        tokenizer = DualTower(build("ViT-scenes", None, 248)).tokenizer
    first = synthetic(Groups({"short": First()}, seed=0), tokenizer, images=8)
    assert (first < long_B[:8, None]).all()
    assert np.array_equal(first, synthetic(Groups({"short": First()}, seed=0), tokenizer, images=8))


def test_sizes_of_memory():
    assert [as_bytes(text) for text in ("24GiB", "80 GB", "512m")] == [24 * 2**30, 80 * 10**9, 512 * 10**6]
    assert free_memory("cpu") > 2**20
    with pytest.raises(UserError, match="plan=lots is no size"):
        as_bytes("lots")


@pytest.mark.long
def test_the_command_needs_neither_weights_nor_data(tmp_path):
    """`long` in place of dreamlip: a ninth of the captions to pretend."""
    with project.inside(tmp_path):
        printed = project.typed("python train.py model=vit_b16 recipe=long batch_size=512 plan=24GiB")
    assert "made-up paragraphs" in printed
    assert re.search(r"chunks of \d+ fits into 24\.00 GiB", printed)
    assert re.search(r"next: python train\.py model=vit_b16 .* micro_batch=\d+ model", printed)
    assert not (tmp_path / "datasets").exists()
