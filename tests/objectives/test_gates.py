"""ALIP's gates: against loops, and what the released code gets wrong."""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.contrastive import info_nce
from longclip.objectives.gates import Gated, Gates
from longclip.objectives.running import Running
from longclip.types import UserError

SOURCES = {"raw": slice(0, 1), "sub": slice(1, 4)}


@pytest.fixture
def batch(embed):
    def make(seed=0):
        e = embed(images=7, slots=4, seed=seed)
        e.mask_BK[3] = torch.tensor([True, False, False, False])  # a caption that is alone
        e.mask_BK[4] = False
        return dataclasses.replace(e, slots=SOURCES, text_BKE=e.text_BKE * e.mask_BK[..., None])

    return make


def usual(e, before, momentum=0.99):
    """Sums and weights of what is usual for each source, with those of earlier batches, by loops."""
    found = {}
    for source, slots in SOURCES.items():
        for kind, value in (("agreement", agreement), ("fit", fit)):
            seen = [
                value(e, b, k) for b in range(7) for k in range(slots.start, slots.stop) if e.mask_BK[b, k]
            ]
            seen = [x for x in seen if x is not None]
            total, weight = before.get((kind, source), (0, 0))
            mean = sum(seen) / len(seen)
            found[kind, source] = momentum * total + (1 - momentum) * mean, momentum * weight + 1 - momentum
    return found


def agreement(e, b, k):
    others = [j for j in range(4) if j != k and e.mask_BK[b, j]]
    if others:
        return sum((e.text_BKE[b, k] @ e.text_BKE[b, j]).item() for j in others) / len(others)
    return None


def fit(e, b, k):
    return (e.text_BKE[b, k] @ e.image_BE[b]).item()


def test_gates_equal_loops_over_captions_in_batch_after_batch(batch):
    gates, means = Gates(2), {}
    for seed in (0, 1, 2):
        e = batch(seed)
        means = usual(e, means)
        found = gates(e, ("raw", "sub"))
        for kind, value, gate_Bk in (("agreement", agreement, found[0]), ("fit", fit, found[1])):
            for b, k in e.mask_BK.nonzero().tolist():
                x = value(e, b, k)
                total, weight = means[kind, "raw" if k == 0 else "sub"]
                want = 1.0 if x is None else min(1.0, math.exp(x - total / weight) ** 2)
                assert gate_Bk[b, k].item() == pytest.approx(want, abs=1e-5)


def test_each_gate_is_capped_by_itself(batch):
    """In the released code a pair's gate opens with the gate between captions, and then exceeds 1."""
    e = batch()
    text = normalize(e.text_BKE + 2 * e.image_BE[:, None], dim=-1)  # all captions fit ...
    text[0, 0] = e.image_BE[0]  # ... one perfectly
    text[0, 1:] = normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), dim=-1)
    e = dataclasses.replace(e, text_BKE=text * e.mask_BK[..., None])
    agree, pair = Gates(2)(e, ("raw", "sub"))
    assert agree[0, 0] < 1  # its neighbours disagree with it ...
    assert pair[0, 0] == 1  # ... and it fits better than usual
    assert max(agree.max(), pair.max()) <= 1


def test_the_loss_is_info_nce_weighed_by_gates_and_by_the_data(batch):
    e = batch()
    e = dataclasses.replace(e, weights_BK=torch.rand(7, 4, generator=torch.Generator().manual_seed(5)))
    agree, pair = Gates(2)(e, ("raw", "sub"))
    weights = agree * pair * e.weights_BK
    want, _ = info_nce(e.image_BE, e.text_BKE, e.mask_BK, e.scale, weights_BK=weights)
    term = Gated(["raw", "sub"])
    got = term(e)
    torch.testing.assert_close(got.value, want)
    assert term.groups == ("raw", "sub")
    torch.testing.assert_close(got.measures["fit"], pair[e.mask_BK].mean())


def test_gates_have_no_gradient(batch):
    e = batch()
    e = dataclasses.replace(e, text_BKE=e.text_BKE.requires_grad_())
    assert not any(gate.requires_grad for gate in Gates(2)(e, ("raw", "sub")))


def test_what_is_usual_is_saved_and_learned_only_in_training(batch):
    term, other = (Gated(["raw", "sub"]) for _ in range(2))
    term(batch(0))
    other.load_state_dict(term.state_dict())
    other.eval()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    assert {name for name, x in before.items() if x.any()} == set(before)
    other(batch(1))
    assert all(torch.equal(before[name], x) for name, x in other.state_dict().items())
    assert not torch.equal(term(batch(1)).value, other(batch(1)).value)


def test_running_means_start_with_the_first_batch_and_wait_for_what_is_unknown():
    running = Running(2, momentum=0.9)
    running.update(torch.tensor([4.0, 7.0]), torch.tensor([True, False]))
    assert running.mean(-1.0).tolist() == pytest.approx([4, -1])
    running.update(torch.tensor([2.0, 6.0]), torch.tensor([True, True]))
    assert running.mean(-1.0).tolist() == pytest.approx([(0.9 * 4 + 2) / 1.9, 6])


def test_a_term_that_was_never_trained_opens_all_gates(batch):
    gates = Gates(2).eval()(batch(), ("raw", "sub"))
    assert all((gate == 1).all() for gate in gates)


def test_no_group_at_all_is_refused():
    with pytest.raises(UserError, match="reads no caption group"):
        Gated([])


@pytest.mark.parametrize(
    ("options", "message"), [({"momentum": 1.0}, "momentum is 1"), ({"sharpness": 0}, "sharpness is 0")]
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Gated("raw", **options)
