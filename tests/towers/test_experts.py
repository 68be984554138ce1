"""Experts in the place of MLPs: the equation, the same model where all are alike, what becomes of it."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from longclip.export.exporting import write
from longclip.models import backbone_of
from longclip.objectives.balance import Balance, imbalance
from longclip.objectives.contrastive import Contrastive
from longclip.optim import AdamW
from longclip.towers.clip import DualTower
from longclip.towers.experts import Experts, Routed, join
from longclip.towers.freezing import Freeze
from longclip.towers.lora import Lora
from longclip.towers.merging import merged_state_dict
from longclip.towers.pretrained import build
from longclip.training import LongClip
from longclip.types import Batch, UserError

CAPTIONS = ["a red square left of a blue disc", "two", "a green ring, and below it nothing at all"]


def features(tower):
    pixels = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(1))
    return torch.cat([tower.encode_image(pixels.to(torch.uint8)), tower.encode_captions(CAPTIONS)])


def mlps(count, width=6):
    torch.manual_seed(0)
    made = [torch.nn.Sequential(torch.nn.Linear(width, 9), torch.nn.Linear(9, width)) for _ in range(count)]
    return [mlp.double() for mlp in made]


@pytest.fixture
def base(tiny):
    torch.manual_seed(0)
    return build(tiny, None, 248, freeze_positions=True)


def export(backbone, path, change=()):
    """Weights in a file, after noise in tensors whose names hold one of `change`."""
    state = {name: tensor.clone() for name, tensor in merged_state_dict(backbone.model).items()}
    for name, tensor in state.items():
        if any(part in name for part in change):
            tensor += torch.randn_like(tensor) * 0.05
    save_file(state, path)
    return str(path)


def module_of(backbone, experts, **options):
    tower = DualTower(backbone, Freeze(only="mlps"), experts=experts, **options)
    terms = {"long": Contrastive("long"), "balance": Balance()}
    return LongClip(tower, terms, {"long": slice(0, 1)}, AdamW(lr=1e-3, warmup=0, samples=64), 0)


@pytest.mark.parametrize(("count", "top"), [(4, 2), (3, 3), (5, 1)])
def test_values_and_gradients_are_those_of_a_loop_over_tokens(count, top):
    routed = Routed(mlps(count), 6, top, torch.empty(0, dtype=torch.float64))
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x.reshape(-1, 6):
        p = torch.softmax(routed.router.weight @ token, 0)
        best = sorted(range(count), key=lambda n: -p[n].item())[:top]
        rows.append(sum(p[n] * routed.experts[n](token) for n in best) / sum(p[n] for n in best))
    wanted, found = torch.stack(rows).view_as(x), routed(x)
    torch.testing.assert_close(found, wanted)
    inputs = [x, *routed.parameters()]
    grads = [
        torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, retain_graph=True)
        for y in (found, wanted)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_copies_are_the_same_model_packed_and_padded(base):
    plain = DualTower(base._replace(model=copy.deepcopy(base.model)))
    tower = DualTower(base, experts=Experts(copies=3))
    tower.check_needs(frozenset({"routing"}))
    torch.testing.assert_close(features(tower), features(plain), atol=1e-6, rtol=0)
    tower.padded_because = "this test says so"
    torch.testing.assert_close(features(tower), features(plain), atol=1e-6, rtol=0)


def test_finished_models_are_the_experts_and_routers_alone_learn(base, tmp_path):
    stages = [export(base, tmp_path / f"{n}.safetensors", [".mlp."]) for n in range(2)]
    own = base.model.transformer.resblocks[1].mlp.c_fc.weight.clone()
    module = module_of(base, Experts(stages, top=2))
    experts = module.tower.backbone.transformer.resblocks[1].mlp.experts
    assert torch.equal(experts[0].c_fc.weight, own)
    assert len({float(mlp.c_fc.weight.sum()) for mlp in experts}) == 3
    names = {name for name, p in module.tower.named_parameters() if p.requires_grad}
    assert names == {
        name for name, _ in module.tower.named_parameters() if "router" in name or "logit" in name
    }


def test_a_checkpoint_brings_its_experts_along_and_no_export_takes_them(base, tmp_path):
    tower = module_of(base, Experts([export(base, tmp_path / "one.safetensors", [".mlp."])], top=1)).tower
    content = {
        "longclip": {"model_cfg": tower.model_cfg, "preprocess_cfg": tower.preprocess_cfg},
        "state_dict": {f"tower.{name}": value for name, value in tower.state_dict().items()},
    }
    read = backbone_of(content, "this test")
    torch.testing.assert_close(features(DualTower(read)), features(tower))
    with pytest.raises(UserError, match=r"blocks have experts and a router .* longclip average"):
        write(read, tmp_path / "export")


@pytest.mark.parametrize("part", ["attn.out_proj.weight", "positional_embedding", "ln_final"])
def test_a_model_that_differs_in_more_than_mlps_is_no_expert(base, tmp_path, part):
    other = export(base, tmp_path / "other.safetensors", [".mlp.", part])
    with pytest.raises(UserError, match=rf"differs from model\.backbone in \S*{part}.*recipe=mcl"):
        join(base.model, Experts([other]))


def test_impossible_experts_are_refused(base):
    with pytest.raises(UserError, match=r"model\.experts\.top is 3 of 2 experts"):
        join(base.model, Experts(copies=2, top=3))
    with pytest.raises(UserError, match=r"without LoRA: .*model\.lora\.rank=0"):
        DualTower(base, lora=Lora(2)).check_needs(frozenset({"routing"}))


def test_imbalance_by_hand():
    asked = torch.tensor([[6.0, 2.0, 0.0], [0.0, 4.0, 0.0]])  # two of three experts by 4 tokens, and one
    sums = torch.tensor([[2.0, 1.5, 0.5], [1.0, 2.0, 1.0]], requires_grad=True)
    found = imbalance(torch.stack([asked, sums], 1))
    blocks = [
        3 * sum(float(f) / 4 * float(p) / 4 for f, p in zip(*rows, strict=True))
        for rows in zip(asked, sums.detach(), strict=True)
    ]
    assert found.item() == pytest.approx(sum(blocks) / 2)
    (grad,) = torch.autograd.grad(found, sums)
    torch.testing.assert_close(grad, 3 * asked / 4 / 4 / 2)
    even = torch.stack([torch.full((2, 4), 5.0), torch.full((2, 4), 2.5)], 1)
    assert imbalance(even).item() == pytest.approx(2), "k of an even load"
    assert imbalance(torch.zeros(2, 2, 4)).isfinite()


def test_what_is_heard_counts_every_token_of_a_step_once(base):
    module = module_of(base, Experts(copies=4))
    pixels, tokens = torch.zeros(5, 3, 24, 24, dtype=torch.uint8), torch.arange(1, 36, dtype=torch.int32)
    lengths = torch.full((5, 1), 7, dtype=torch.int32)
    batch = Batch(list("abcde"), pixels, tokens, lengths, torch.zeros_like(lengths), 7)
    for micro in (None, 2):
        found = module.tower(batch, module.slots, module.needs, micro)
        seen = [5 * 5, 5, 35, 5]  # five tokens an image; a last block works for the pooled one
        assert found.routing_A2N[:, 1].sum(-1).tolist() == pytest.approx(seen)
        assert found.routing_A2N[:, 0].sum(-1).tolist() == [2 * n for n in seen]
        found.image_BE.sum().backward()
    assert all(m.heard is None for m in module.modules() if isinstance(m, Routed))
