"""The batch in chunks: nothing lost, nothing kept, and the same step as all at once."""

import json
from functools import partial
from pathlib import Path

import hydra
import open_clip
import pytest
import torch
from processes import Results, descend, spawn

from conf.launch import instantiate
from longclip import dist
from longclip.captions import Groups
from longclip.objectives import Contrastive, Grouping
from longclip.optim import AdamW
from longclip.towers import answers
from longclip.towers.chunks import chunks
from longclip.towers.clip import DualTower
from longclip.towers.freezing import Freeze
from longclip.towers.lora import Lora
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import Batch, UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
IMAGES = 11
SLOTS = {"long": slice(0, 1), "sub": slice(1, 4)}


def made_up(images=IMAGES, slots=4, size=24, channels=3):
    """A batch of noise: ragged captions, an image without any, a slot that only the first images fill."""
    random = torch.Generator().manual_seed(0)
    lengths_BK = torch.randint(3, 30, (images, slots), generator=random, dtype=torch.int32)
    lengths_BK[torch.rand(images, slots, generator=random) < 0.2] = 0
    lengths_BK[4] = 0
    lengths_BK[5:, -1] = 0
    tokens_T = torch.randint(1, 49000, (int(lengths_BK.sum()),), generator=random, dtype=torch.int32)
    pixels = torch.randint(0, 256, (images, channels, size, size), generator=random, dtype=torch.uint8)
    keys = [f"image-{b}" for b in range(images)]
    dropped_BK, longest = torch.zeros_like(lengths_BK), int(lengths_BK.max())
    return Batch(keys, pixels, tokens_T, lengths_BK, dropped_BK, longest, boxes_BK4=boxes(lengths_BK))


def boxes(lengths_BK):
    """One for most captions."""
    random = torch.Generator().manual_seed(1)
    low_BK2 = torch.rand(*lengths_BK.shape, 2, generator=random) / 2
    absent_BK = (lengths_BK == 0) | (torch.rand(lengths_BK.shape, generator=random) < 0.2)
    return torch.cat([low_BK2, low_BK2 + 0.4], -1).masked_fill(absent_BK[..., None], torch.nan)


def module_of(tower, terms=None, slots=SLOTS, micro_batch=None):
    terms = terms or {"long": Contrastive("long"), "sub": Contrastive("sub"), "grouping": Grouping("sub")}
    module = LongClip(tower, terms, slots, AdamW(lr=1e-3, warmup=0, samples=64), 0, micro_batch)
    module.log_every = 2  # a step by hand logs nothing
    module.configure_model()  # as the trainer does: temperatures are no scalars then
    return module


def step(module, batch, micro_batch):
    """Loss and gradients of everything that trains."""
    module.zero_grad()
    module.micro_batch = micro_batch
    loss = module.training_step(batch, 0)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def check(module, batch, sizes, tolerance=1e-5):
    start = {name: x.clone() for name, x in module.terms.state_dict().items()}  # terms may have a memory
    loss, grads = step(module, batch, None)
    for size in sizes:
        module.terms.load_state_dict(start)
        again, parts = step(module, batch, size)
        torch.testing.assert_close(again, loss, rtol=tolerance, atol=0)
        assert parts.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(
                parts[name], grad, rtol=0, atol=tolerance * float(grad.abs().max()), msg=f"{size}: {name}"
            )
    return grads


@pytest.mark.parametrize("size", [1, 3, 8, IMAGES, 100, None])
def test_chunks_are_the_batch_in_order_and_copy_nothing(size):
    batch = made_up()
    parts = list(chunks(batch, size))
    assert [len(part.pixels_BCHW) for part in parts[:-1]] == [size] * (len(parts) - 1)
    for name in ("pixels_BCHW", "tokens_T", "lengths_BK"):
        joined = torch.cat([torch.as_tensor(getattr(part, name)) for part in parts])
        assert torch.equal(joined, getattr(batch, name)), name
    assert all(int(part.lengths_BK.sum()) == len(part.tokens_T) for part in parts)
    storages = {part.pixels_BCHW.untyped_storage().data_ptr() for part in parts}
    assert storages == {batch.pixels_BCHW.untyped_storage().data_ptr()}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONF / "recipe").glob("*.yaml")))
def test_every_recipe_has_the_loss_and_gradients_of_the_whole_batch(recipe, tiny):
    few = ["recipe.terms.short.k=3"] if recipe in ("longclip", "debias") else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [f"recipe={recipe}", *few])
    rotary, config = config.model.backbone.rotary, config.recipe
    slots = Groups(instantiate(config.captions), seed=0).slots
    backbone = build(tiny, None, 248, rotary=rotary)
    tower = DualTower(backbone).double()  # so that only the float32 losses can differ
    terms, batch = instantiate(config.terms), made_up(slots=max(slot.stop for slot in slots.values()))
    asked = {name: size for term in terms.values() for name, size in term.columns.items()}
    shapes = {name: (IMAGES,) if size == 0 else (IMAGES, size or 20) for name, size in asked.items()}
    batch = batch._replace(columns={name: torch.rand(shape) for name, shape in sorted(shapes.items())})
    grads = check(module_of(tower, terms, slots), batch, [1, 3, 8], tolerance=1e-6)
    reached = {name for name, grad in grads.items() if grad.abs().max() > 0}
    # Of experts, some are asked by none of so few images.
    assert {name for name in grads if "bias" not in name and ".experts." not in name} <= reached


def test_in_float32_too(tiny):
    check(module_of(DualTower(build(tiny, None, 248))), made_up(), [1, 3, 8, IMAGES])


@pytest.mark.parametrize(
    "options",
    [
        {"grad_checkpointing": True},
        {"freeze": Freeze(image=True)},
        {"freeze": Freeze(text=True, text_layers=1)},
        {"lora": Lora(4)},
    ],
    ids=str,
)
def test_with_checkpointed_blocks_and_locked_towers(options, tiny):
    tower = DualTower(build(tiny, None, 248, freeze_positions=True), **options).double()
    check(module_of(tower), made_up(), [1, 3], tolerance=1e-6)


def test_padded_towers(tiny):
    tower = DualTower(build(tiny, None, 248)).double()
    tower.padded_because = "this test says so"
    check(module_of(tower), made_up(images=6), [1, 4], tolerance=1e-6)


@pytest.mark.parametrize("size", [24, 36])  # 4 patches and 9
def test_patch_dropout_leaves_out_the_same_patches_in_chunks(tiny, size):
    module = module_of(DualTower(build(tiny, None, 248, patch_dropout=0.5)).double())
    batch = made_up(size=size)._replace(draws_B=torch.arange(IMAGES))
    loss, grads = step(module, batch, None)
    for chunk in (3, 1):
        in_chunks, kept = step(module, batch, chunk)
        torch.testing.assert_close(in_chunks, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(kept, grads, rtol=1e-5, atol=1e-8)
    other, _ = step(module, batch._replace(draws_B=torch.arange(IMAGES) + 1), None)
    assert abs(other - loss) > 1e-4, "this dropout does something"


def test_under_autocast_gradients_of_chunks_add_up_in_float32(tiny):
    """Chunks that shared one cast of a weight would add their gradients up in its bfloat16."""
    module, batch = module_of(DualTower(build(tiny, None, 248))), made_up(images=64)
    found = []
    for cache in (False, True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            found.append(step(module, batch, 1)[1]["tower.backbone.text_projection"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_under_autocast_chunks_are_as_exact_as_the_whole(tiny):
    module, batch = module_of(DualTower(build(tiny, None, 248))), made_up(images=32)
    _, exact = step(module, batch, None)

    def error(size):
        with torch.autocast("cpu", torch.bfloat16):
            _, grads = step(module, batch, size)
        return float(sum((grads[name] - exact[name]).norm() for name in exact))

    assert error(4) < 1.1 * error(None)


def test_a_whole_chunk_is_the_plain_path(tiny, monkeypatch):
    def forbidden(*_):
        raise AssertionError("nothing needs to be encoded again")

    monkeypatch.setattr(answers, "in_backward_again", forbidden)
    module = module_of(DualTower(build(tiny, None, 248)))
    for size in (None, IMAGES, IMAGES + 1):
        step(module, made_up(), size)


@pytest.mark.long
def test_compiled_towers(tiny, monkeypatch):
    """Graphs and their gradients; that the code made of a graph computes it is test_clip's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tower = DualTower(build(tiny, None, 248), compile=True)
    check(module_of(tower), made_up(), [3])


def test_batch_norms_are_refused_until_they_are_frozen(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "RN-longclip-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    terms = {"long": Contrastive("long")}
    with pytest.raises(UserError, match=r"micro_batch=4 .*batch norms.*model\.freeze\.image_bn_stats=true"):
        module_of(DualTower(build("RN-longclip-tiny", None, 16)), terms, micro_batch=4)
    frozen = DualTower(build("RN-longclip-tiny", None, 16), Freeze(image=True, image_bn_stats=True))
    module_of(frozen, terms, micro_batch=4)


def test_a_size_of_nothing_is_refused(tiny):
    with pytest.raises(UserError, match="micro_batch is 0"):
        module_of(DualTower(build(tiny, None, 248)), micro_batch=0)


def two_steps() -> Results:
    """Weights after two steps on this process's part of the batch, in chunks of 3 where there are several."""
    torch.manual_seed(0)
    module = module_of(DualTower(build("ViT-scenes", None, 248)), micro_batch=3 if dist.world() > 1 else None)
    batch, rows = made_up(images=10, size=72), dist.rows(10 // dist.world())
    own = list(chunks(batch, 10 // dist.world()))[dist.rank()]
    batch = batch._replace(
        keys=batch.keys[rows],
        pixels_BCHW=own.pixels_BCHW,
        tokens_T=own.tokens_T,
        lengths_BK=batch.lengths_BK[rows],
    )
    return descend(module, [batch, batch])


def test_two_processes_in_chunks_equal_one_process_at_once(tmp_path):
    first, second = spawn(two_steps, 2, tmp_path)
    whole = two_steps()
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
