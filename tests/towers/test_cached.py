"""Cached features: a step is that of the frozen tower, without running it; what does not fit is refused."""

import json

import hydra
import open_clip
import project
import pytest
import torch
from processes import descend, spawn
from safetensors.torch import save_file
from tiny import TINY

from conf.launch import CONF, instantiate
from longclip import cli, dist, models, runs
from longclip.captions import Groups, Sentences, Whole
from longclip.curriculum import Curriculum
from longclip.data import loading
from longclip.data.faults import Reason
from longclip.data.images import Augment
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.sidecars.joining import Join
from longclip.embedding import embed
from longclip.objectives import Contrastive, Grouping
from longclip.optim import AdamW
from longclip.planner.estimate import Costs, Job
from longclip.planner.lengths import synthetic
from longclip.towers.cached import Cached
from longclip.towers.clip import DualTower
from longclip.towers.freezing import Freeze
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import UserError

LOCKED = {
    "lit": Freeze(image=True),
    "projectors": Freeze(image=True, image_groups=1, text=True, text_layers=1),
}
COLUMN = {"lit": "teacher_image", "projectors": "teacher_unprojected"}
GROUPS = {"long": Whole(), "sub": Sentences(2)}
BATCH, NAME = 12, "ViT-longclip-narrow"


def model(folder, seed):
    """A model in a folder, whose features are wider before the projection."""
    torch.manual_seed(seed)
    (folder / f"{NAME}.json").write_text(json.dumps(TINY | {"embed_dim": 24}))
    open_clip.add_model_config(folder)
    backbone = build(NAME, None, None)
    config = {"model_cfg": backbone.model_cfg, "preprocess_cfg": backbone.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(backbone.model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return model(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(scope="module")
def stores(weights, scenes, tmp_path_factory):
    """The columns that `longclip embed` makes of the training scenes, by recipe."""
    folder = tmp_path_factory.mktemp("stores")
    for recipe in LOCKED:
        option = {"images_only": True} if recipe == "lit" else {"before_projection": True}
        report = embed(weights, str(scenes / "train"), folder / recipe, batch_size=40, **option)
        assert (report.image, report.texts, report.damaged) == (COLUMN[recipe], [], 0)
    return folder


def module_of(weights, recipe="lit", cached=True, micro_batch=None, terms=None, **options):
    column = COLUMN[recipe] if cached is True else cached or None
    named = (None, f"local-dir:{weights}") if weights else (NAME, None)
    backbone = build(*named, None, **options)
    tower = DualTower(backbone, LOCKED[recipe], cached=Cached(column))
    terms = terms or {"long": Contrastive("long"), "sub": Contrastive("sub")}
    slots = Groups(GROUPS, seed=0).slots
    module = LongClip(tower, terms, slots, AdamW(lr=1e-2, warmup=0, samples=64), 0, micro_batch)
    module.log_every = 99
    module.configure_model()
    return module.train()


def data_of(scenes, module, store=None, column=None, **options):
    join = Join([str(store)]) if store else Join()
    options = {"workers": 0, "augment": Augment(scale=(0.3, 0.5)) if column else None} | options
    return DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(96, BATCH), groups=Groups(GROUPS, seed=0),
        tokenizer=module.tower.tokenizer, preprocess=module.tower.preprocess_cfg, sidecar=join, cached=column,
        **options,
    )  # fmt: skip


def batches(data, count):
    found = iter(data.train_dataloader())
    return [next(found) for _ in range(count)]


def step(module, batch):
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("recipe", LOCKED)
def test_a_step_is_that_of_the_tower(recipe, micro_batch, weights, stores, scenes):
    real = module_of(weights, recipe, cached=False)
    wanted = [step(real, batch) for batch in batches(data_of(scenes, real), 2)]
    module = module_of(weights, recipe, micro_batch=micro_batch)
    found = batches(data_of(scenes, module, stores / recipe, COLUMN[recipe]), 2)
    assert [batch.pixels_BCHW.numel() > 0 for batch in found] == [True, False], "the first proves the column"
    for batch, (loss, grads) in zip(found, wanted, strict=True):
        got, parts = step(module, batch)
        torch.testing.assert_close(got, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(parts, grads, rtol=1e-5, atol=1e-5)
    learns = {"tower.backbone.text_projection", *(["tower.backbone.visual.proj"] * (recipe == "projectors"))}
    assert all(parts[name].abs().max() > 1e-4 for name in learns)
    assert any("token_embedding" in name for name in parts) == (recipe == "lit")


def test_the_image_tower_does_not_run_in_training_and_does_in_judging(weights, stores, scenes, monkeypatch):
    module = module_of(weights)
    data = data_of(scenes, module, stores / "lit", COLUMN["lit"])
    _, second = batches(data, 2)
    seen = []
    module.tower.backbone.visual.register_forward_hook(lambda *_: seen.append(1))
    step(module, second)
    assert not seen
    samples, _ = next(iter(data.judge_batches("heldout", 4, Groups(GROUPS, seed=0))))
    judged = loading.collate(samples, module.tower.tokenizer)
    with torch.no_grad():
        found = module.tower.eval()(judged, module.slots).image_BE
    assert seen
    torch.testing.assert_close(found, module_of(weights, cached=False).tower.encode_image(judged.pixels_BCHW))


@pytest.mark.parametrize("recipe", LOCKED)
def test_the_start_of_the_run_answers_by_the_column_too(recipe, weights, stores, scenes):
    module = module_of(weights, recipe)
    module.tower.check_needs(frozenset({"start"}))
    _, batch = batches(data_of(scenes, module, stores / recipe, COLUMN[recipe]), 2)
    with torch.no_grad():
        before = module.tower(batch, module.slots).image_BE
        for parameter in module.tower.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=float(parameter.requires_grad))
        found = module.tower(batch, module.slots, frozenset({"start"}))
    torch.testing.assert_close(found.start.image_BE, before)
    assert torch.equal(found.image_BE, before) == (recipe == "lit")


def test_images_are_neither_decoded_nor_looked_at_behind_the_first_batch(
    weights, stores, scenes, monkeypatch
):
    module = module_of(weights)
    decoded = []
    real = loading.decode
    monkeypatch.setattr(loading, "decode", lambda image: decoded.append(1) or real(image))
    data = data_of(scenes, module, stores / "lit", COLUMN["lit"])
    assert "not decoded or augmented: teacher_image stands for them" in data.describe()
    plain = data_of(scenes, module)
    assert [b.keys for b in batches(data, 3)] == [b.keys for b in batches(plain, 3)]
    assert len(decoded) == BATCH + 3 * BATCH
    data.resume(2 * BATCH, 2)
    first, second = batches(data, 2)
    assert (first.pixels_BCHW.numel() > 0, second.pixels_BCHW.numel() > 0) == (True, False)
    assert first.boxes_BK4 is not None
    assert second.boxes_BK4 is None, "nobody knows what of the image they would be fractions of"


def test_damaged_pictures_do_not_matter_where_none_is_decoded(weights, stores, scenes, monkeypatch):
    module = module_of(weights)
    data = data_of(scenes, module, stores / "lit", COLUMN["lit"])
    record = data.corpus.record
    monkeypatch.setattr(data.corpus, "record", lambda index: record(index)._replace(image=b"no image"))
    monkeypatch.setattr(loading.Samples, "decoded", lambda samples: samples)
    for batch in batches(data, 2):
        assert not batch.skips
        step(module, batch)


def test_workers_hand_over_batches_without_pictures(weights, stores, scenes):
    module = module_of(weights)
    data = data_of(scenes, module, stores / "lit", COLUMN["lit"], workers=1)
    *_, batch = batches(data, 2)
    assert batch.pixels_BCHW.shape == (BATCH, 3, 0, 0)


def test_an_image_without_a_vector_is_replaced_and_counted(weights, stores, scenes, monkeypatch):
    module = module_of(weights)
    data = data_of(scenes, module, stores / "lit", COLUMN["lit"])
    plain = batches(data, 2)[1]
    (part,) = data.corpus.parts
    index = next(n for n in range(len(part)) if part.record(n).key == plain.keys[3])
    part.rows[0][index] = -1
    batch = batches(data, 2)[1]
    assert [a == b for a, b in zip(batch.keys, plain.keys, strict=True)].index(False) == 3
    (skip,) = batch.skips
    assert skip.reason is Reason.VECTOR
    assert f"sample {plain.keys[3]!r} has no finite vector in the column 'teacher_image'" in skip.text
    assert batch.columns["teacher_image"].isfinite().all()


def test_a_batch_that_cannot_be_had_tells_its_own_fault(weights, stores, scenes):
    module = module_of(weights)
    loader = data_of(scenes, module, stores / "lit", COLUMN["lit"]).train_dataloader()
    with pytest.raises(UserError, match="the disk is gone"):
        module.training_step(loader.fetch.blank(4, "the disk is gone"), 0)


@pytest.mark.parametrize("recipe", LOCKED)
def test_a_column_of_another_model_is_refused_at_the_first_step(recipe, weights, scenes, tmp_path):
    other = model(tmp_path, 2)
    option = {"images_only": True} if recipe == "lit" else {"before_projection": True}
    embed(other, str(scenes / "train"), tmp_path / "out", **option)
    module = module_of(weights, recipe)
    data = data_of(scenes, module, tmp_path / "out", COLUMN[recipe])
    with pytest.raises(
        UserError, match=r"is not of this image tower: the column has a cosine of -?0\.\d\d"
    ) as e:
        module.training_step(*batches(data, 1), 0)
    assert ("--images-only" if recipe == "lit" else "--before-projection") in str(e.value)


def test_a_column_of_another_width_or_none_is_refused(weights, stores, scenes):
    module = module_of(weights, cached="teacher_unprojected")
    data = data_of(scenes, module, stores / "projectors", "teacher_unprojected")
    with pytest.raises(UserError, match=r"the column holds 32 numbers an image, not 24; make it with"):
        module.training_step(*batches(data, 1), 0)
    with pytest.raises(
        UserError, match=r"is no column of these batches: .*--images-only.*data=stream joins none"
    ):
        module.training_step(*batches(data_of(scenes, module), 1), 0)
    with pytest.raises(UserError, match=r"the side-cars have no column 'teacher_image'.*longclip embed"):
        batches(data_of(scenes, module, column="teacher_image"), 1)


def test_what_would_go_stale_or_change_the_pictures_is_refused(weights, scenes):
    plain = build(None, f"local-dir:{weights}", None)
    for freeze in (Freeze(), Freeze(image=True, image_groups=2)):
        with pytest.raises(UserError, match=r"of this one \S+ trains: set model\.freeze\.image=true"):
            DualTower(plain, freeze, cached=Cached("x"))
    with pytest.raises(UserError, match=r"set model\.backbone\.patch_dropout=0"):
        module_of(weights, patch_dropout=0.5)
    with pytest.raises(UserError, match=r"reads patches of the image tower, and the column 'teacher_image'"):
        module_of(weights, terms={"sub": Grouping("sub")})
    stages = Curriculum(samples=64, image_size=[[0, 12], [0.5, None]])
    with pytest.raises(UserError, match=r"curriculum\.image_size changes .* set curriculum\.image_size=null"):
        data_of(scenes, module_of(weights), column="x", curriculum=stages)


@pytest.mark.parametrize(
    ("recipe", "data", "width", "projected"),
    [("lit", "scenes", 24, True), ("projectors", "shards", 32, False)],
)
def test_one_key_says_it_to_the_towers_and_to_the_data(recipe, data, width, projected, weights):
    overrides = [f"recipe={recipe}", f"data={data}", "data.root=x", "model.cached.image=mine"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [*overrides, f"model.backbone.architecture={NAME}"])
    tower = instantiate(config.model)
    made = instantiate(config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg)
    assert (tower.cached.name, tower.cached.width, tower.cached.projected) == ("mine", width, projected)
    assert (made.cached, made.augment) == ("mine", None)


def test_a_plan_counts_no_image_tower(weights):
    costs = {}
    for recipe in LOCKED:
        with torch.device("meta"):
            module = module_of(None, recipe)
        lengths_BK = synthetic(Groups(GROUPS, seed=0), module.tower.tokenizer, images=8)
        costs[recipe] = Costs(module, lengths_BK, Job(8))
    flops = {recipe: cost.flops(None, False) for recipe, cost in costs.items()}
    assert flops["lit"]["image tower"] == 0 < flops["lit"]["text tower"]
    assert flops["projectors"]["image tower"] == 2 * 2 * 8 * 32 * 24, "a product, and its gradient"
    assert costs["lit"].memory(None, False)["pixels"] == 8 * 4 * 24, "of the vectors in their place"


class TwoSteps:
    """Weights after two steps on this process's part of the batches, in chunks where there are several."""

    def __init__(self, *places):
        self.places = places

    def __call__(self):
        weights, stores, scenes = self.places
        module = module_of(weights, "projectors", micro_batch=4 if dist.world() > 1 else None)
        data = data_of(scenes, module, f"{stores}/projectors", COLUMN["projectors"])
        return descend(module, batches(data, 2))


def test_two_processes_equal_one(weights, stores, scenes, tmp_path):
    steps = TwoSteps(weights, str(stores), str(scenes))
    first, second = spawn(steps, 2, tmp_path)
    torch.testing.assert_close(first, steps(), rtol=0, atol=1e-6)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_the_command_says_what_to_type_next(weights, scenes, tmp_path, capsys):
    command = ["embed", weights, str(scenes / "heldout"), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--before-projection"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"teacher_unprojected: for runs that begin with the weights of {weights}" in printed
    assert "next: python train.py recipe=projectors data=shards" in printed
    assert printed.endswith("model.cached.image=teacher_unprojected")
    assert cli.main([*command, "--images-only", "--source", "scenes"]) == 2
    assert "only images are asked for" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_is_judged_resumed_and_exported_as_ever(weights, stores, scenes, tmp_path):
    data = ["data=shards", f"data.root={scenes}", "data.judge=[heldout]"]
    data += ["benchmark=shards", "benchmark.dev.split=heldout"]
    command = [
        *project.SMALL, *data, "name=mine", "recipe=lit", "checkpoints.every_steps=1",
        "model.backbone.architecture=null", f"model.backbone.weights=local-dir:{weights}",
        f"data.sidecar.stores=[{stores / 'lit'}]", "model.cached.image=teacher_image",
    ]  # fmt: skip
    with project.inside(tmp_path), project.unproven():
        printed = project.typed("python train.py", *command)
        assert "teacher_image stands for them" in " ".join(printed.replace("│", "").split())
        more = ["samples=16", "resume=auto", "export=open_clip"]
        assert "data position restored" in project.typed("python train.py", *command, *more)
        project.typed("python -m eval.run model=runs/mine/export report=false", *data)
    assert [row["samples_seen"] for row in runs.judgements(tmp_path / "runs/mine")] == [0, 8, 16]
    trained, start = (models.load(name).model.state_dict() for name in (str(tmp_path / "runs/mine"), weights))
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    assert "text_projection" in moved
    assert not any(name.startswith("visual.") for name in moved)
