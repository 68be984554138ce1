"""Late interaction: against loops over patches and words, and what must not take part."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from benchmarks.measures import peak_bytes
from longclip.objectives import late
from longclip.objectives.late import Late, interaction
from longclip.types import UserError, Words

WIDTH, SLOTS = 8, 2
LENGTHS = np.array([[5, 3], [0, 4], [7, 2], [3, 3], [4, 0], [0, 0]], np.int32)
"""Tokens of each caption: none, or with start and end token; a caption of two has no word."""


@pytest.fixture
def batch(embed):
    def make(dtype=torch.float64, lengths=LENGTHS):
        e = embed(images=len(lengths), slots=SLOTS, width=WIDTH)
        states = torch.randn(int(lengths.sum()), WIDTH, generator=torch.Generator().manual_seed(1))
        return dataclasses.replace(
            e,
            mask_BK=torch.from_numpy(lengths > 0),
            patches_BPE=e.patches_BPE.to(dtype).requires_grad_(),
            words=Words(states.to(dtype).requires_grad_(), lengths),
        )

    return make


def said(e):
    """(image, slot) -> its words, as a list of vectors."""
    ends = e.words.lengths_BK.cumsum().reshape(e.words.lengths_BK.shape)
    return {
        (b, k): list(e.words.states_TE[ends[b, k] - n + 1 : ends[b, k] - 1])
        for (b, k), n in np.ndenumerate(e.words.lengths_BK)
        if n > 2
    }


def agree_by_loop(patches, words):
    """Mean over patches of the best word, mean over words of the best patch."""
    like = [[p @ w / (p.norm() * w.norm()) for w in words] for p in patches]
    by_patch = [max(row) for row in like]
    by_word = [max(row[at] for row in like) for at in range(len(words))]
    return sum(by_patch) / len(by_patch), sum(by_word) / len(by_word)


def loss_by_loop(e, scale):
    words, total = said(e), 0.0
    for k in range(SLOTS):
        owners = [b for b, slot in words if slot == k]
        pairs = [[agree_by_loop(p, words[b, k]) for b in owners] for p in e.patches_BPE]
        by_image, by_text = (
            torch.stack([torch.stack([pair[way] for pair in row]) for row in pairs]) for way in (0, 1)
        )
        own = torch.tensor(owners)
        total += cross_entropy(scale * by_image[own], torch.arange(len(own)), reduction="sum")
        total += cross_entropy(scale * by_text.T, own, reduction="sum")
    return total / 2 / len(words)


def test_interaction_equals_a_loop(batch):
    e = batch()
    captions = list(said(e).values())
    longest = max(len(words) for words in captions)
    words = torch.stack(
        [torch.stack(w + [torch.ones(WIDTH).double()] * (longest - len(w))) for w in captions]
    )
    mask = torch.tensor([[at < len(w) for at in range(longest)] for w in captions])
    image, text = interaction(normalize(e.patches_BPE, dim=-1), normalize(words, dim=-1), mask)
    for r, patches in enumerate(e.patches_BPE):
        for x, one in enumerate(captions):
            torch.testing.assert_close((image[r, x], text[r, x]), agree_by_loop(patches, one))


@pytest.mark.parametrize(("most", "captions"), [(1, 1), (60, 2), (10**6, 8)])
def test_loss_and_gradients_equal_a_loop_over_pairs_whatever_the_tiles(batch, monkeypatch, most, captions):
    monkeypatch.setattr(late, "CPU_TILE", most)
    monkeypatch.setattr(late, "CAPTIONS", captions)
    e, term = batch(), Late("sub").double()
    got, want = term(e).value, loss_by_loop(e, term.logit_scale.exp())
    torch.testing.assert_close(got, want)
    leaves = e.patches_BPE, e.words.states_TE, term.logit_scale
    torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_start_and_end_tokens_and_what_fills_a_rectangle_take_no_part(batch):
    e, term = batch(), Late("sub").double()
    inner = torch.zeros(len(e.words.states_TE), dtype=torch.bool)
    ends = LENGTHS.cumsum()
    for end, n in zip(ends.tolist(), LENGTHS.ravel().tolist(), strict=True):
        inner[end - n + 1 : max(end - 1, end - n + 1)] = n > 2
    poisoned = torch.where(inner[:, None], e.words.states_TE, 7.0).detach().requires_grad_()
    value = term(dataclasses.replace(e, words=Words(poisoned, LENGTHS))).value
    torch.testing.assert_close(value, term(e).value)
    (grad,) = torch.autograd.grad(value, poisoned)
    assert torch.equal(grad.abs().amax(1) > 0, inner)


def test_towers_may_come_in_half_precision(batch):
    e, term = batch(torch.float32), Late("sub")
    low = dataclasses.replace(
        e,
        patches_BPE=e.patches_BPE.detach().bfloat16().requires_grad_(),
        words=Words(e.words.states_TE.detach().bfloat16().requires_grad_(), LENGTHS),
    )
    found = term(low)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, term(e).value, rtol=0.03, atol=0)
    found.value.backward()
    for x in (low.patches_BPE, low.words.states_TE):
        assert x.grad.dtype == torch.bfloat16
        assert x.grad.abs().max() > 0


def test_no_word_at_all_gives_zero(batch):
    e, term = batch(), Late("sub")
    loss = term(
        dataclasses.replace(e, words=Words(e.words.states_TE[:24], np.full((6, 2), 2, np.int32)))
    ).value
    loss.backward()
    assert loss == 0


def test_likeness_of_all_patches_with_all_words_never_exists(embed, monkeypatch):
    monkeypatch.setattr(late, "CPU_TILE", 2**13)
    term = Late("sub")

    def most(images, length=12, patches=16):
        e = embed(images=images, slots=1, width=4, patches=patches)
        words = torch.randn(images * length, 4, requires_grad=True)
        lengths = np.full((images, 1), length, np.int32)
        e = dataclasses.replace(e, patches_BPE=e.patches_BPE.requires_grad_(), words=Words(words, lengths))
        return peak_bytes(lambda: torch.autograd.grad(term(e).value, [e.patches_BPE, words]))

    likeness = 4 * 16 * 10 * (48**2 - 24**2)  # of the pairs that the larger batch has more
    assert most(48) - most(24) < likeness / 4


def test_one_image_is_refused(batch):
    with pytest.raises(UserError, match="batch_size to 2"):
        Late("sub")(batch(lengths=np.array([[4, 0]], np.int32)))
