"""Heat maps: open_clip's arithmetic patch by patch, laid over the part of the image that the model saw."""

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from longclip import heat
from longclip.data.images import EvalTransform
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import UserError

SENTENCES = ["A red bus.", "Two dogs run over wet grass, one behind the other."]


@pytest.fixture
def backbone(tiny):
    return build(tiny, None, None, image_size=72)  # 6 x 6 patches


def test_every_cell_is_the_cosine_of_its_projected_patch_and_the_sentence(backbone, tiny):
    image_CHW = torch.randint(0, 256, (3, 72, 72), dtype=torch.uint8)
    found = heat.heat(DualTower(backbone).eval(), image_CHW, SENTENCES)
    plain = backbone.model.eval()
    mean, std = (torch.tensor(backbone.preprocess_cfg[name])[:, None, None] for name in ("mean", "std"))
    plain.visual.output_tokens = True
    with torch.no_grad():
        image_1E, tokens_1PD = plain.visual(((image_CHW / 255 - mean) / std)[None])
        patches_PE = (tokens_1PD[0] @ plain.visual.proj).double().numpy()
        ids_SL = open_clip.get_tokenizer(tiny)(SENTENCES)
        text_SE = F.normalize(plain.encode_text(ids_SL), dim=-1).double().numpy()
    assert found.heat_SYX.shape == (2, 6, 6)
    for s in range(2):
        for y in range(6):
            for x in range(6):
                patch_E = patches_PE[6 * y + x]
                cosine = text_SE[s] @ patch_E / np.sqrt(patch_E @ patch_E)
                assert float(found.heat_SYX[s, y, x]) == pytest.approx(cosine, abs=1e-5)
    wanted_S = text_SE @ F.normalize(image_1E[0], dim=-1).double().numpy()
    assert found.similarity_S.tolist() == pytest.approx(wanted_S.tolist(), abs=1e-5)


def test_a_tower_without_patches_is_refused_in_a_sentence(backbone):
    tower = DualTower(backbone)
    tower.backbone.visual = torch.nn.Flatten()
    with pytest.raises(UserError, match=r"Flatten without patch tokens .* such as ViT-B-16"):
        heat.heat(tower, torch.zeros(3, 72, 72, dtype=torch.uint8), SENTENCES)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(("height", "width"), [(60, 200), (200, 60), (90, 90)])
def test_the_window_is_where_the_shown_pixels_come_from(mode, height, width):
    transform = EvalTransform(64, mode)
    left, top, right, bottom = transform.window(height, width)
    image_CHW = torch.zeros(3, height, width)  # red tells the column, green the row, blue the image
    image_CHW[0] = (torch.arange(width) + 0.5) / width
    image_CHW[1] = ((torch.arange(height) + 0.5) / height)[:, None]
    image_CHW[2] = 1
    column_YX, row_YX, inside_YX = transform((255 * image_CHW).round().to(torch.uint8)).double() / 255
    centres = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    wanted_x, wanted_y = left + (right - left) * centres, top + (bottom - top) * centres
    inside = inside_YX > 0.99
    assert inside.any()
    # An odd number of pixels to cut or to pad is half a pixel aside; a level of grey is 1 / 255.
    off_x, off_y = ((0.5 * (end - start) / 64 + 0.01) for start, end in ((left, right), (top, bottom)))
    assert torch.allclose(column_YX[inside], wanted_x.expand(64, 64)[inside], atol=off_x)
    assert torch.allclose(row_YX[inside], wanted_y[:, None].expand(64, 64)[inside], atol=off_y)
    shown = ((wanted_x - 0.5).abs() < 0.5 - 2 * off_x) & ((wanted_y - 0.5).abs() < 0.5 - 2 * off_y)[:, None]
    assert inside[shown].all()


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_an_overlay_has_the_hottest_patch_brightest_and_is_clear_outside_of_the_window():
    map_YX = torch.zeros(4, 4)
    map_YX[3, 0] = 1.0  # bottom left
    drawn = pixels(heat.overlay(map_YX, 100, 200, (0.25, 0.0, 0.75, 1.0)))
    assert drawn.shape == (100, 200, 4)
    assert (drawn[:, :50, 3] == 0).all()
    assert (drawn[:, 150:, 3] == 0).all()
    assert (drawn[:, 50:150, 3] > 0).all()
    brightness = drawn[:, :, :3].sum(axis=2) * (drawn[:, :, 3] > 0)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert y >= 75
    assert 50 <= x < 75
    assert len(np.unique(pixels(heat.overlay(torch.ones(4, 4), 20, 20)).reshape(-1, 4), axis=0)) == 1


def test_a_map_that_reaches_beyond_the_image_is_cut_at_its_edge():
    map_YX = torch.arange(16.0).view(4, 4)
    drawn = pixels(heat.overlay(map_YX, 50, 100, (0.0, -0.5, 1.0, 1.5)))
    assert drawn.shape == (50, 100, 4)
    whole = pixels(heat.overlay(map_YX, 100, 100))
    assert (drawn == whole[25:75]).all()
