"""Zero-shot segmentation: attentions by hand, windows, classes per pixel, and mIoU by torchmetrics."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from longclip.evaluate import Background, Masks, Segmentation, Windows
from longclip.evaluate.classification import classifier, templates_of
from longclip.evaluate.segmentation import _findings, counted
from longclip.evaluate.sliding import Sizes, decide, similarities, starts
from longclip.towers.clip import DualTower
from longclip.towers.dense import attending
from longclip.towers.image import encode_patches
from longclip.towers.pretrained import build
from longclip.types import UserError

MASKS = Masks("images/{}.png", "masks/{}.png")
NAMES = ["sky", "cat, kitten", "grass"]


@pytest.fixture
def tower(tiny):
    with torch.no_grad():
        yield DualTower(build(tiny, None, 248)).eval()


def by_hand(visual, pixels_BCHW, mix):
    """Patches of a tower whose last block mixes values by `mix(q, k)`, head by head, in float64."""
    seen = []
    last = visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    encode_patches(visual, pixels_BCHW)
    hook.remove()
    x_BTD, heads = seen[0].double(), last.attn.num_heads
    weight, bias = last.attn.in_proj_weight.double(), last.attn.in_proj_bias.double()
    q, k, v = (last.ln_1(seen[0]).double() @ weight.T + bias).chunk(3, -1)
    mixed = []
    for q_BTd, k_BTd, v_BTd in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        mixed.append(mix(q_BTd, k_BTd) @ v_BTd)
    out = last.attn.out_proj
    x_BTD = x_BTD + torch.cat(mixed, -1) @ out.weight.double().T + out.bias.double()
    x_BTD = x_BTD.float() + last.mlp(last.ln_2(x_BTD.float()))
    return (visual.ln_post(x_BTD) @ visual.proj)[:, 1:]


def softmax(q, k):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


@pytest.mark.parametrize(("attention", "mix"), [
    ("plain", softmax),
    ("value", lambda q, k: torch.eye(q.shape[1], dtype=q.dtype)),
    ("csa", lambda q, k: softmax(q, q) + softmax(k, k)),
])  # fmt: skip
def test_the_last_block_attends_as_its_name_says_and_is_as_before_afterwards(tower, attention, mix):
    visual, pixels_BCHW = tower.backbone.visual, torch.randn(2, 3, 24, 24)
    before = encode_patches(visual, pixels_BCHW)[1]
    with attending(visual, attention):
        found = encode_patches(visual, pixels_BCHW)[1]
    assert (found - by_hand(visual, pixels_BCHW, mix)).abs().max() < 1e-5
    assert (found - before).abs().max() < 1e-5 or attention != "plain"
    assert torch.equal(encode_patches(visual, pixels_BCHW)[1], before)


def test_windows_cover_a_picture_and_end_with_it():
    for length, size, stride in [(24, 24, 12), (500, 224, 112), (337, 224, 112), (336, 336, 1), (90, 24, 24)]:
        found = starts(length, size, stride)
        covered = {pixel for start in found for pixel in range(start, start + size)}
        assert covered == set(range(length))
        assert found == sorted(set(found))


def test_similarities_are_means_over_the_windows_that_show_a_pixel(tower):
    image_CHW = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8)
    query_QE = F.normalize(torch.randn(3, 32), dim=-1)
    found = similarities(tower, image_CHW, query_QE, Sizes(side=30, size=24, stride=12), "plain")
    lists = {}
    for y in (0, 6):
        for x in (0, 12, 24, 26):
            window = tower.normalise(image_CHW[None, :, y : y + 24, x : x + 24])
            patches = F.normalize(encode_patches(tower.backbone.visual, window)[1][0], dim=-1).reshape(
                2, 2, 32
            )
            maps = F.interpolate((patches @ query_QE.T).permute(2, 0, 1)[None], (24, 24), mode="bilinear")[0]
            for row in range(24):
                for column in range(24):
                    lists.setdefault((y + row, x + column), []).append(maps[:, row, column])
    expected = torch.stack([torch.stack(lists[y, x]).mean(0) for y in range(30) for x in range(50)], 1)
    assert (found - expected.reshape(3, 30, 50)).abs().max() < 1e-5


def test_a_pixel_has_the_class_of_the_best_of_its_names_unless_none_is_likely():
    cosine_QHW = torch.rand(70, 6, 8)
    class_Q = torch.arange(70) // 2  # two names each; more names than are enlarged at once
    background = Background(threshold=0.05, scale=20.0)
    found = decide(cosine_QHW, class_Q, (9, 11), background)
    big = F.interpolate(cosine_QHW[None], (9, 11), mode="bilinear")[0].double()
    probability = (20 * big).softmax(0).reshape(35, 2, 9, 11).amax(1)
    expected = probability.argmax(0).masked_fill(probability.amax(0) < 0.05, 0)
    assert torch.equal(found, expected)
    assert 0 < int((found == 0).sum()) < found.numel()


def test_scores_are_torchmetrics_ones_and_ignored_pixels_count_nowhere():
    predicted, label = torch.randint(0, 4, (3, 20, 20)), torch.randint(0, 4, (3, 20, 20))
    label[:, :5] = 255
    counts = torch.stack([counted(p, own, 5) for p, own in zip(predicted, label, strict=True)])
    found = _findings(counts, ["a", "b", "c", "d", "nowhere"], "")
    theirs = MulticlassJaccardIndex(5, ignore_index=255, average=None)(predicted, label)
    assert found.each["miou"].values == pytest.approx((100 * theirs[:4]).tolist())
    assert found.each["miou"].keys == ["0 a", "1 b", "2 c", "3 d"]  # what nobody has is no zero
    assert found.numbers["pixel_accuracy"] == pytest.approx(
        100 * float((predicted == label)[:, 5:].float().mean())
    )
    predicted[:, :5] = 3
    again = torch.stack([counted(p, own, 5) for p, own in zip(predicted, label, strict=True)])
    assert torch.equal(counts, again)


def write(root, masks, mode="L"):
    """Pictures of noise, and these masks."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    for n, mask in enumerate(masks):
        shape = (*np.shape(mask), 3)
        Image.fromarray(noise.integers(0, 256, shape, np.uint8)).save(root / f"images/{n}.png")
        image = Image.fromarray(np.asarray(mask, np.uint8))
        if mode == "P":
            image.putpalette([level for n in range(256) for level in (n * 37 % 256, n * 91 % 256, 7)])
        image.save(root / f"masks/{n}.png")


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_that_say_what_is_predicted_score_100(tower, tmp_path, mode):
    write(tmp_path, [np.zeros((30, 40)), np.zeros((36, 25))])
    judge = Segmentation(str(tmp_path), MASKS, NAMES, "simple", "noise", 2, attention="csa")
    names = [name for own in NAMES for name in own.split(", ")]
    query_QE, _ = classifier(tower, names, templates_of("simple"))
    sizes, class_Q = Windows().of(tower), torch.tensor([0, 1, 1, 2])
    masks = []
    for scene in MASKS.read(str(tmp_path), None):
        map_QHW = similarities(tower, scene.picture(), query_QE, sizes, "csa")
        masks.append(decide(map_QHW, class_Q, tuple(scene.mask().shape)).numpy())
    write(tmp_path, masks, mode)
    found = judge(tower, None)
    assert found.numbers["miou"] == found.numbers["pixel_accuracy"] == 100
    assert len(found.each["miou"].keys) > 1
    assert found.protocol == "noise/csa/36-24-12"


def test_class_zero_may_mean_nothing():
    mask = torch.tensor([[0, 1, 21, 255]], dtype=torch.uint8)
    assert MASKS.labels(mask).tolist() == [[0, 1, 21, 255]]
    assert Masks("", "", zero_is_nothing=True).labels(mask).tolist() == [[255, 0, 20, 255]]


def test_only_what_is_listed_is_read(tmp_path):
    write(tmp_path, [np.zeros((24, 24))] * 3)
    (tmp_path / "val.txt").write_text("2\n0\n")
    listed = Masks("images/{}.png", "masks/{}.png", "val.txt")
    assert [scene.key for scene in listed.read(str(tmp_path), 2)] == ["2", "0"]
    assert [scene.key for scene in MASKS.read(str(tmp_path), 3)] == ["0", "1", "2"]
    (tmp_path / "masks/2.png").unlink()
    with pytest.raises(UserError, match=r"expected 3 pictures with masks, found 2: 2 \(no mask\)"):
        MASKS.read(str(tmp_path), 3)


def test_masks_of_colours_or_of_unnamed_classes_are_sentences(tower, tmp_path):
    write(tmp_path, [np.full((24, 24), 3)])
    with pytest.raises(UserError, match="has class 3, and there are names for 0 to 2"):
        Segmentation(str(tmp_path), MASKS, NAMES, "simple")(tower, None)
    written = io.BytesIO()
    Image.new("RGB", (24, 24)).save(written, "PNG")
    (tmp_path / "masks/0.png").write_bytes(written.getvalue())
    with pytest.raises(UserError, match=r"is no mask \(RGB of 24 x 24\)"):
        Segmentation(str(tmp_path), MASKS, NAMES, "simple")(tower, None)


def test_towers_and_windows_that_cannot_are_sentences(tower):
    with pytest.raises(UserError, match="attention is one of plain, value, csa"):
        attending(tower.backbone.visual, "best").__enter__()
    with pytest.raises(UserError, match="size is a multiple of the model's patches"):
        Windows(size=20).of(tower)
    with pytest.raises(UserError, match="without patch tokens"):
        attending(torch.nn.Linear(1, 1), "plain").__enter__()
