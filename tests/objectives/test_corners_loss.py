"""Every corner's contrast with the images, by plain loops."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from longclip.objectives.corners import Corners
from longclip.types import UserError


def naive(image_BE, corners_BKME, mask_BK, scale, smoothing):
    """Both directions, one caption's one corner after the other, among those in the same place."""
    total, captions = 0.0, 0
    images, slots, corners, _ = corners_BKME.shape
    for k in range(slots):
        for m in range(corners):
            rows = [b for b in range(images) if mask_BK[b, k]]
            for b in rows:
                texts = torch.stack([scale * image_BE[b] @ corners_BKME[i, k, m] for i in rows])
                others = torch.stack([scale * image_BE[i] @ corners_BKME[b, k, m] for i in range(images)])
                for scores, own in ((texts, rows.index(b)), (others, b)):
                    logs = scores.log_softmax(0)
                    total = total - ((1 - smoothing) * logs[own] + smoothing * logs.mean()) / 2
                captions += 1
    return total / captions


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_the_equations(embed, smoothing):
    found = embed()
    raw = torch.randn(6, 3, 2, 8, requires_grad=True)
    corners_BKME = normalize(raw, dim=-1) * found.mask_BK[..., None, None]
    loss = Corners("sub", label_smoothing=smoothing)(replace(found, corners_BKME=corners_BKME)).value
    wanted = naive(
        found.image_BE.double(), corners_BKME.double(), found.mask_BK, found.scale.double(), smoothing
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(x, raw, retain_graph=True)[0] for x in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_image_has_nothing_to_contrast(embed):
    found = embed(images=1)
    with pytest.raises(UserError, match="holds 1"):
        Corners("sub")(replace(found, corners_BKME=torch.randn(1, 3, 2, 8)))
