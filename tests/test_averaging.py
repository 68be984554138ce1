"""The mean of models: the arithmetic, what is not averaged, and that the start may be shorter."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longclip import models as loading
from longclip.averaging import average
from longclip.export import write
from longclip.towers.experts import Experts, join
from longclip.towers.positions import stretch
from longclip.towers.pretrained import build
from longclip.types import UserError


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Three exports of one architecture and other random weights; the first knows 77 positions only."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("short", "one", "other")]
    for seed, (folder, length) in enumerate(zip(folders, (77, 248, 248), strict=True)):
        torch.manual_seed(seed)
        write(build(tiny, None, length), folder)
    return [str(folder) for folder in folders]


def state(folder):
    return load_file(Path(folder) / "open_clip_model.safetensors")


def test_shares_weigh_every_tensor(models):
    found = average(models[1:], [0.3, 0.7]).model.state_dict()
    one, other = map(state, models[1:])
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.3 * one[name] + 0.7 * other[name], atol=1e-6, rtol=0)
        assert tensor.dtype == one[name].dtype


def test_all_of_one_is_that_one_bit_by_bit_and_shares_may_lie_beyond(models):
    one, other = map(state, models[1:])
    found = average(models[1:], [0, 1]).model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in found.items())
    beyond = average(models[1:], [-0.5, 1.5]).model.state_dict()["text_projection"]
    torch.testing.assert_close(beyond, 1.5 * other["text_projection"] - 0.5 * one["text_projection"])


@pytest.mark.parametrize(("keep", "ratio"), [(20, 4), (58, 10)])
def test_a_start_with_fewer_positions_is_stretched_as_training_stretched_it(models, keep, ratio):
    found = average(models[:2], keep=keep)
    short, one = map(state, models[:2])
    stretched_LD = stretch(short["positional_embedding"], keep, ratio)
    mean_LD = (stretched_LD + one["positional_embedding"]) / 2
    torch.testing.assert_close(found.model.positional_embedding.detach(), mean_LD, atol=1e-6, rtol=0)
    assert found.tokenizer.context_length == 248


@pytest.mark.parametrize(
    ("shares", "message"),
    [([0.5, 0.6], "shares that add up to 1, not 0.5 0.6"), ([1.0], "2 models need 2 shares")],
)
def test_shares_that_make_no_mean_are_refused(models, shares, message):
    with pytest.raises(UserError, match=message):
        average(models[1:], shares)
    with pytest.raises(UserError, match="two models or more"):
        average(models[:1])


def test_other_networks_are_refused_and_named(models, tiny, tmp_path):
    write(build(tiny, None, 248, quick_gelu=True), tmp_path / "quick")
    with pytest.raises(UserError, match="quick_gelu True and False"):
        average([str(tmp_path / "quick"), models[1]])
    write(build("ViT-scenes-8", None, 248), tmp_path / "wide")
    with pytest.raises(UserError, match=r"different networks.*embed_dim"):
        average([str(tmp_path / "wide"), models[1]])
    with pytest.raises(UserError, match="positions are never cut"):
        average([models[1], models[0]])


@pytest.fixture
def with_experts(tiny, monkeypatch):
    """A model with experts of which a token asks one, one of which it asks two, and a plain one, by name."""
    plain = build(tiny, None, 248)
    backbones = {"plain": plain}
    for name, top in (("one", 1), ("two", 2)):
        backbones[name] = plain._replace(model=deepcopy(plain.model))
        join(backbones[name].model, Experts(copies=2, top=top))
    monkeypatch.setattr(loading, "load", lambda name, *_: deepcopy(backbones[name]))
    return backbones


@pytest.mark.parametrize("names", [("one", "plain"), ("plain", "one")])
def test_experts_and_none_are_different_networks(with_experts, names):
    with pytest.raises(UserError, match=r"different networks.*resblocks\.0\.mlp.* absent"):
        average(names)


def test_integers_are_no_shares_of_anything(with_experts):
    found = average(["one"] * 6).model.state_dict()
    wanted = with_experts["one"].model.state_dict()
    assert all(found[name].item() == 1 for name in wanted if name.endswith(".top"))
    with pytest.raises(UserError, match=r"different networks.*\.mlp\.top \[1\] and \[2\]"):
        average(["one", "two"])
