"""Every strategy is the same training: same losses, same weights, and each goes on where another stopped."""

import hydra
import pytest
import torch
from engines import Job, fit, fit_on

from conf.launch import CONF, instantiate
from longclip import models, runs
from longclip.stored import Stored

STEPS, SAVED = 6, 3
CLOSE = {"atol": 2e-5, "rtol": 0}  # sums over processes are taken in another order; seen: 3e-6


@pytest.fixture(scope="module")
def alone(scenes, tmp_path_factory):
    """Each recipe on one process; checkpoints after every third step."""
    folder = tmp_path_factory.mktemp("one")

    def job(recipe):
        return Job(recipe, STEPS, str(folder / recipe), str(scenes), save_every=SAVED)

    return folder, {recipe: fit("one", job(recipe)) for recipe in ("dreamlip", "longclip", "siglip")}


def same(found, wanted, **close):
    torch.testing.assert_close(found["losses"], wanted["losses"][-len(found["losses"]) :], **close or CLOSE)
    ended = {name: value for name, value in wanted.items() if name.startswith("ended/")}
    # A parameter that is never used has moments, all zero, where an engine hands it a gradient of zeros; its
    # average is itself.
    extra = {name for name in found if name.startswith("ended/")} - ended.keys()
    idle = {name: found[name] - found[name.replace("/ema/", "/weights/")] if "/ema/" in name else found[name]
            for name in extra if "/step/" not in name}  # fmt: skip
    assert not any(value.any() for value in idle.values()), extra
    for name, value in ended.items():
        torch.testing.assert_close(found[name], value, **close or CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def tensors(folder):
    stored = Stored(folder)
    return {name: stored.read(name) for name in stored.shapes}


def both_ways(engine, alone, folder, scenes):
    """A run in chunks, and one that goes on from one process; then one process goes on from the first."""
    ones, wanted = alone
    saved = runs.checkpoints(ones / "longclip")[0]
    jobs = {
        "dreamlip": Job(
            "dreamlip", STEPS, str(folder / "dreamlip"), str(scenes), micro_batch=3, save_every=SAVED
        ),
        "longclip": Job("longclip", STEPS, str(folder / "longclip"), str(scenes), resume=str(saved)),
    }
    found = fit_on(engine, 2, folder, jobs)
    for recipe in jobs:
        same(found[recipe], wanted[recipe])
    for name, value in tensors(saved).items():
        assert torch.equal(found["longclip"][f"begun/{name}"], value), name
    head = next(name for name in tensors(saved) if name.endswith("original0") and "weights" in name)
    assert torch.equal(found["longclip"][f"ended/{head}"], found["longclip"][f"begun/{head}"])
    first = runs.checkpoints(folder / "dreamlip")[0]
    assert len(list(first.iterdir())) == 2
    back = fit("one", Job("dreamlip", STEPS, str(folder / "back"), str(scenes), resume=str(first)))
    same(back, wanted["dreamlip"])


@pytest.mark.parametrize("name", [path.stem for path in (CONF / "trainer").glob("deepspeed_*.yaml")])
def test_every_zero_config_says_what_its_name_says(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        made = instantiate(hydra.compose("train", [f"trainer={name}"]).trainer.strategy)
    zero = made.config["zero_optimization"]
    offload = name.endswith("_offload")
    assert zero["stage"] == int(name.removesuffix("_offload")[-1])
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offload, offload)
    assert made._timeout.total_seconds() == 15 * 60


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_processes_are_one(engine, alone, scenes, tmp_path):
    both_ways(engine, alone, tmp_path, scenes)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.long)])
def test_in_stages_two_processes_are_one_and_keep_weights_and_averages(engine, alone, scenes, tmp_path):
    job = Job("siglip", STEPS, str(tmp_path), str(scenes))
    (found,) = fit_on(engine, 2, tmp_path, {"siglip": job}).values()
    same(found, alone[1]["siglip"])
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    for weights, kind in (("raw", "weights"), ("ema", "ema")):
        backbone = models.load(str(runs.newest_checkpoint(tmp_path)), weights=weights)
        ended = found[f"ended/{kind}/tower.backbone.{name}"]
        assert torch.equal(backbone.model.get_parameter(name), ended)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero1", "zero3", "zero3_offload"])
def test_two_processes_are_one_under_the_other_stages(engine, alone, scenes, tmp_path):
    both_ways(engine, alone, tmp_path, scenes)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_in_bfloat16_two_processes_are_one_but_for_rounding(engine, scenes, tmp_path):
    job = Job("siglip", 4, str(tmp_path / "one"), str(scenes), precision="bf16-mixed")
    wanted = fit("one", job)
    found = fit_on(engine, 2, tmp_path, {"two": job._replace(run=str(tmp_path / "two"))})["two"]
    weights = {name for name in wanted if name.startswith("ended/weights/")}
    assert {found[name].dtype for name in weights} == {torch.float32}
    torch.testing.assert_close(found["losses"], wanted["losses"], atol=0, rtol=2e-3)
    # Of the way that the weights went: rounding decides where a gradient is next to nothing (key biases).
    apart = sum((found[name] - wanted[name]).norm() ** 2 for name in weights) ** 0.5
    way = sum((wanted[name] - wanted[name.replace("ended", "begun")]).norm() ** 2 for name in weights) ** 0.5
    assert apart < 0.1 * way


@pytest.mark.long
def test_twenty_steps_on_four_processes_end_with_the_weights_of_one(scenes, tmp_path):
    recipes = ("dreamlip", "longclip", "siglip")
    jobs = {r: Job(r, 20, str(tmp_path / r), str(scenes)) for r in recipes}
    found = fit_on("ddp", 4, tmp_path, jobs)
    for recipe, job in jobs.items():
        wanted = fit("one", job._replace(run=str(tmp_path / f"one-{recipe}")))
        for name, value in wanted.items():
            if name.startswith("ended/weights/"):
                torch.testing.assert_close(found[recipe][name], value, atol=1e-4, rtol=0, msg=name)
