"""Texts are pulled to those of the frozen start, each to its own, and nothing else moves."""

import pytest
import torch
from test_dist import embed, leaves

from longclip.objectives import Imitated


@pytest.fixture
def both():
    features, mask_BK = leaves()
    return embed(features, mask_BK)


def test_it_is_one_minus_the_mean_cosine_with_its_gradient(both):
    embeddings, _ = both
    loss = Imitated("sub")(embeddings)
    text_BkE, mask_Bk = embeddings.text("sub"), embeddings.mask("sub")
    start_BkE = embeddings.start.text("sub")
    cosines = [text_BkE[b, k] @ start_BkE[b, k] for b, k in mask_Bk.nonzero().tolist()]
    wanted = 1 - torch.stack(cosines).mean()
    torch.testing.assert_close(loss.value, wanted)
    torch.testing.assert_close(loss.measures["cosine"], 1 - wanted.detach())
    ours, theirs = (
        torch.autograd.grad(x, embeddings.text_BKE, retain_graph=True)[0] for x in (loss.value, wanted)
    )
    torch.testing.assert_close(ours, theirs)


def test_absent_captions_say_nothing_whatever_stands_in_their_place(both):
    embeddings, _ = both
    wanted = Imitated("sub")(embeddings).value
    with torch.no_grad():
        embeddings.start.text_BKE[~embeddings.mask_BK] = 1e6
    torch.testing.assert_close(Imitated("sub")(embeddings).value, wanted)
