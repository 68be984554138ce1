"""What is observed of one process, and who of many is called slow; real processes: tests/strategies."""

import mmap

import lightning
import pytest
import torch
from test_training import parts

from longclip.observing import Observe, Spans, Table, peak_gib, resident_gib, slow_ranks
from longclip.types import UserError


class Oracle(lightning.Callback):
    """Norms by a naive float64 sum over all gradients of a step."""

    def __init__(self):
        self.norms, self.logged = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        sums = {"image": 0.0, "text": 0.0, "terms": 0.0, "scale": 0.0}
        for name, p in module.named_parameters():
            own = "terms" if "terms." in name else "image" if "visual" in name else "text"
            own = "scale" if name == "tower.backbone.logit_scale" else own
            sums[own] += float(p.grad.double().pow(2).sum()) if p.grad is not None else 0.0
        self.norms.append({f"grad_norm/{name}": value**0.5 for name, value in sums.items()})

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % trainer.log_every_n_steps == 0:
            values = trainer.logged_metrics
            self.logged.append({name: float(values[name]) for name in values})


def test_gradient_norms_are_those_before_clipping(scenes, tiny):
    oracle, observe = Oracle(), Observe(slow=1.5, patience=3)
    trainer, module, data = parts(scenes, tiny, samples=64, extra=[observe, oracle])
    trainer.gradient_clip_val = 1e-4
    trainer.fit(module, data)
    assert len(oracle.logged) == 2
    for values, wanted in zip(oracle.logged, oracle.norms[1::2], strict=True):
        found = {name: value for name, value in values.items() if name.startswith("grad_norm/")}
        assert found.pop("grad_norm/image") > 1e-3, "clipping would show"
        assert found.keys() <= wanted.keys()
        for name, value in found.items():
            assert value == pytest.approx(wanted[name], rel=1e-5), name


def test_what_is_logged_and_that_a_locked_tower_has_no_norm(scenes, tiny):
    oracle, observe = Oracle(), Observe(slow=1.5, patience=3, each=True)
    trainer, module, data = parts(scenes, tiny, samples=32, extra=[observe, oracle])
    module.tower.backbone.visual.requires_grad_(False)
    trainer.fit(module, data)
    values = oracle.logged[0]
    assert "grad_norm/text" in values
    assert "grad_norm/image" not in values
    assert values["rank/step_time_max"] > values["rank/compute_time_max"] > 0
    assert values["rank/data_time_max"] == values["rank/data_time_median"] == values["rank/0/data_time"]
    assert values["rank/slowest"] == 0
    assert 0 < values["memory/host_gib"] <= values["memory/peak_gib"] < 64


class Judges(lightning.Callback):
    """Encodes after the first step, as a judgement does."""

    def __init__(self, observe):
        self.observe = observe

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            module.tower.eval()(batch, module.slots)
            module.tower.train()
            self.spans = len(self.observe.compute.spans)


def test_what_a_judgement_encodes_is_not_counted(scenes, tiny):
    observe = Observe(slow=1.5, patience=3)
    judges = Judges(observe)
    trainer, module, data = parts(scenes, tiny, samples=32, extra=[judges, observe])
    trainer.fit(module, data)
    assert judges.spans == 1


def table(data, compute, step=1.0):
    none = [0.0] * len(data)
    return Table([step] * len(data), data, compute, none, none, {})


@pytest.mark.parametrize(
    ("data", "compute", "slow"),
    [
        ([0.0, 0.0, 0.0], [0.3, 0.3, 0.32], []),
        ([0.0, 0.5, 0.0], [0.3, 0.3, 0.3], [(1, "waiting for data")]),
        ([0.1, 0.1, 0.0], [0.2, 0.2, 0.7], [(2, "computing")]),
        ([0.0, 0.0], [0.3, 0.6], [(1, "computing")]),  # of two: the median of both would hide it
        ([0.0, 0.5, 0.5, 0.0, 0.0], [0.3] * 5, [(1, "waiting for data"), (2, "waiting for data")]),
        ([0.001, 0.0, 0.0], [0.001] * 3, []),  # twice the others, a thousandth of the step
        ([5.0], [5.0], []),
    ],
)
def test_a_process_is_slow_compared_with_the_others(data, compute, slow):
    assert [(s.rank, s.cause) for s in slow_ranks(table(data, compute), 1.5)] == slow


def test_slowness_is_told_when_it_lasts_and_again_when_it_comes_back():
    observe = Observe(slow=1.5, patience=3)
    observe.streaks = [0, 0]
    slow, fine = table([0.0, 0.9], [0.3, 0.3]), table([0.0, 0.0], [0.3, 0.3])
    told = [
        bool(observe._persistent(t)) for t in [slow, slow, fine, slow, slow, slow, slow, fine, *[slow] * 3]
    ]
    assert [i for i, said in enumerate(told) if said] == [5, 10]


@pytest.mark.parametrize(("slow", "patience"), [(1, 3), (1.5, 0)])
def test_factors_that_mean_nothing_are_refused(slow, patience):
    with pytest.raises(UserError, match=f"observe.slow is {slow} and observe.patience {patience}; "):
        Observe(slow, patience)


def test_memory_is_that_of_the_process():
    before = resident_gib("VmRSS")
    with mmap.mmap(-1, 2**27) as held:  # new pages: an allocator may give what the process holds already
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert resident_gib("VmRSS") - before > 0.1
        assert peak_gib(torch.device("cpu")) >= resident_gib("VmRSS")


def test_spans_are_averaged_once():
    spans = Spans(torch.device("cpu"))
    spans.spans = [(1.0, 2.0), (2.0, 5.0)]
    assert (spans.mean(), spans.mean()) == (2.0, 0.0)
