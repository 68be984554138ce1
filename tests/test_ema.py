"""The running average of the weights: its arithmetic, who has one, and that it survives a stop exactly."""

import logging

import pytest
import torch
from test_training import BATCH, Watch, going_on, parts, saver
from torch import nn

from longclip import callbacks, ema, models, runs
from longclip.evaluate import Findings
from longclip.optim import LN_100, AdamW
from longclip.types import UserError

HALFLIFE = 2 * BATCH


def test_a_weight_of_the_past_counts_half_as_much_after_every_half_life():
    assert ema.decay(400, seen=100_000, batch=400) == 0.5
    assert ema.decay(400, seen=100_000, batch=100) ** 4 == pytest.approx(0.5)
    assert ema.decay(400, seen=4_000, batch=100) ** 2 == pytest.approx(0.5), "early: a twentieth of the past"
    assert ema.decay(400, seen=0, batch=100) == 0


def test_the_average_is_that_of_a_loop_in_float64():
    used, unused = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))
    module = nn.ParameterList([used, unused, nn.Parameter(torch.randn(2), requires_grad=False)])
    config = AdamW(lr=0.1, warmup=0, samples=10_000, ema=300)
    optimizer, expected = config.build(module), None
    for seen in range(0, 6_400, 64):
        for group in optimizer.param_groups:
            group.update(config.settings(seen, 64))
        used.grad = torch.randn(5)
        optimizer.step()
        share = 0.0 if seen == 0 else 0.5 ** (64 / min(300, 0.05 * seen))
        now = used.detach().double()
        expected = now if expected is None else share * expected + (1 - share) * now
    found = optimizer.state[used][ema.KIND]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert (found - used).abs().max() > 1e-3
    assert not optimizer.state.get(unused), "it must get its moments, should it ever be used"


def test_without_a_half_life_nothing_is_kept_and_one_of_nothing_is_refused():
    module = nn.ParameterList([nn.Parameter(torch.ones(2))])
    config = AdamW(lr=0.1, warmup=0, samples=10)
    optimizer = config.build(module)
    module[0].grad = torch.ones(2)
    optimizer.step()
    assert ema.KIND not in optimizer.state[module[0]]
    assert config.settings(0, 1).keys() == {"lr"}
    with pytest.raises(UserError, match=r"optim\.ema is 0; it is a half-life in samples"):
        AdamW(lr=0.1, warmup=0, samples=10, ema=0)


def run(scenes, tiny, *extra, halflife=HALFLIFE, precision="32-true", micro_batch=None):
    trainer, module, data = parts(
        scenes, tiny, precision=precision, samples=6 * BATCH, extra=extra, ema=halflife
    )
    module.micro_batch = micro_batch
    trainer.fit(module, data)
    return module


def state(path):
    return models.read_checkpoint(path, "ema")["state_dict"]


def test_a_resumed_average_is_the_uninterrupted_one_bit_by_bit(scenes, tiny, tmp_path):
    how = {"precision": "bf16-mixed", "micro_batch": 5}
    run(scenes, tiny, saver(tmp_path / "whole"), **how)
    run(scenes, tiny, saver(tmp_path / "cut"), Watch(stop_after=3), **how)
    run(scenes, tiny, going_on(tmp_path / "cut"), **how)
    whole, resumed = (state(runs.newest_checkpoint(tmp_path / name)) for name in ("whole", "cut"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    raw = models.read_checkpoint(runs.newest_checkpoint(tmp_path / "whole"), "raw")["state_dict"]
    assert raw.keys() == whole.keys()
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert any(not torch.equal(value, raw[name]) for name, value in whole.items())


def test_an_average_may_begin_and_end_at_a_resume_and_does_not_change_the_run(scenes, tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run(scenes, tiny, saver(tmp_path), Watch(stop_after=2), halflife=None)
        run(scenes, tiny, going_on(tmp_path), Watch(stop_after=4))
        assert "a running average of the weights begins here" in caplog.text
        assert models.read_checkpoint(runs.newest_checkpoint(tmp_path))["weights"] == "ema"
        module = run(scenes, tiny, going_on(tmp_path), halflife=None)
        assert "its running average ends here" in caplog.text
    ended = runs.newest_checkpoint(tmp_path)
    assert models.read_checkpoint(ended)["weights"] == "raw"
    with pytest.raises(UserError, match=r"weights=ema, but .*ckpt keeps no running average"):
        models.load(str(ended), weights="ema")
    undisturbed = run(scenes, tiny)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_the_averages_are_judged_where_there_are_some_unless_raw_ones_are_asked_for(scenes, tiny, tmp_path):
    name = "visual.proj"
    for weights in (None, "raw"):
        seen = []

        def weigh(tower, data, seen=seen):
            seen.append(tower.backbone.get_parameter(name).detach().clone())
            return Findings({"sum": 0.0})

        folder = tmp_path / str(weights)
        judge = callbacks.Judge(str(folder), {"weigh": weigh}, weights=weights)
        module = run(scenes, tiny, judge, saver(folder))
        content = models.read_checkpoint(runs.newest_checkpoint(folder), weights)
        assert torch.equal(seen[-1], content["state_dict"][models.PREFIX + name])
        assert torch.equal(module.tower.backbone.get_parameter(name), seen[-1]) == (weights == "raw")
    with pytest.raises(UserError, match="weights=ema, but this run keeps no running average"):
        run(scenes, tiny, callbacks.Judge(str(tmp_path / "none"), {}, weights="ema"), halflife=None)
    with pytest.raises(UserError, match="weights=best is not known: choose raw or ema"):
        ema.chosen("best", True, "this run")


def test_an_averaged_temperature_stays_within_its_bound(scenes, tiny, tmp_path):
    class Hot(Watch):
        def on_train_batch_end(self, trainer, module, *args):
            trainer.optimizers[0].state[module.tower.backbone.logit_scale][ema.KIND].fill_(LN_100 + 0.1)

    run(scenes, tiny, Hot(), saver(tmp_path))
    backbone = models.load(str(tmp_path))
    assert backbone.model.logit_scale.item() == pytest.approx(LN_100)
