"""Decoding and preprocessing, against PIL and open_clip's own transform."""

import io
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from longclip.data import images
from longclip.data.images import Augment, EvalTransform, decode, inside
from longclip.types import UserError


def picture(height: int = 60, width: int = 90, seed: int = 0) -> Image.Image:
    """Smooth shapes with an edge, like a photo rather than noise."""
    y, x = np.mgrid[0:height, 0:width]
    wave = [127 + 120 * np.sin((x * a + y * b) / 9.0 + seed) for a, b in ((1, 0.3), (0.2, 1), (0.7, -0.6))]
    pixels_HWC = np.stack(wave, axis=2).astype(np.uint8)
    pixels_HWC[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 40)
    return Image.fromarray(pixels_HWC)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen_by_pil(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_decodes_to_what_pil_sees(mode: str, options: dict[str, object]) -> None:
    data = encode(picture().convert(mode), "JPEG", **options)
    assert np.array_equal(decode(data).numpy(), seen_by_pil(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1"])
def test_png_of_any_mode_decodes_to_what_pil_sees(mode: str) -> None:
    image = picture().convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(image)
    decoded = decode(data)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.numpy(), seen_by_pil(data))


def test_webp_decodes_to_what_pil_sees() -> None:
    data = encode(picture(), "WEBP", lossless=True)
    assert np.array_equal(decode(data).numpy(), seen_by_pil(data))


def test_sixteen_bit_png_keeps_its_upper_byte_instead_of_turning_white() -> None:
    grey = (np.arange(64 * 48, dtype=np.uint32) * 21).astype(np.uint16).reshape(48, 64)
    decoded = decode(encode(Image.fromarray(grey)))
    assert np.array_equal(decoded.numpy(), np.repeat((grey >> 8)[None], 3, axis=0))


def test_exif_orientation_is_ignored_as_open_clip_ignores_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(picture(60, 90), "JPEG", exif=exif)).shape == (3, 60, 90)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.02, 0.5])
def test_truncated_image_is_an_error_with_a_reason(kind: str, keep: float) -> None:
    data = encode(picture(), kind)
    with pytest.raises(UserError, match=r"image is (truncated|broken)"):
        decode(data[: max(16, int(len(data) * keep))])


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"<html>404</html>", "no JPEG, PNG or WebP")])
def test_what_is_no_image_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_oversized_image_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="too large: 90 x 60"):
        decode(encode(picture(), kind))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(60, 90), (75, 57), (32, 32), (20, 25), (150, 200), (41, 200)])
def test_eval_transform_is_open_clips(mode: str, interpolation: str, shape: tuple[int, int]) -> None:
    difference = beside_open_clip(encode(picture(*shape)), mode, interpolation)
    assert difference.max() <= 1
    assert difference.mean() < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tall_images_differ_at_hard_edges_only(interpolation: str) -> None:
    """Pillow 13 resizes them in the other order, see the module's docstring."""
    difference = beside_open_clip(encode(picture(200, 41)), "squash", interpolation)
    assert difference.gt(1).float().mean() < 0.02
    assert difference.max() < 20


@pytest.mark.parametrize("shape", [(500, 333), (375, 500)])
@pytest.mark.parametrize("quality", [85, 95])
def test_jpeg_at_full_size_is_within_one_level(shape: tuple[int, int], quality: int) -> None:
    rng = np.random.default_rng(quality)
    noise_HWC = rng.normal(0, 12, (*shape, 3)) + np.asarray(picture(*shape))
    image = Image.fromarray(noise_HWC.clip(0, 255).astype(np.uint8))
    difference = beside_open_clip(encode(image, "JPEG", quality=quality), "shortest", "bicubic", 224)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def beside_open_clip(data: bytes, mode: str, interpolation: str, size: int = 32) -> Tensor:
    """How many grey levels apart our evaluation preprocessing and open_clip's are."""
    theirs = image_transform(
        size, False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, interpolation=interpolation
    )(Image.open(io.BytesIO(data)))
    ours = EvalTransform(size, mode, interpolation)(decode(data))
    assert ours.shape == (3, size, size)
    return (ours - 255 * theirs).abs().round()


def test_a_crop_is_resized_as_if_it_were_an_image_of_its_own() -> None:
    image = decode(encode(picture()))
    crop = image[:, 7:51, 11:80]
    copy = torch.from_numpy(crop.numpy().copy())
    assert torch.equal(EvalTransform(32)(crop), EvalTransform(32)(copy))


def test_image_of_the_right_size_passes_through_untouched() -> None:
    image = decode(encode(picture(32, 32)))
    assert EvalTransform(32)(image).data_ptr() == image.data_ptr()
    plain = Augment(scale=(1.0, 1.0))(image, 32, random.Random(0))
    assert plain.data_ptr() == image.data_ptr()
    assert torch.equal(plain, image)


def test_augment_is_a_function_of_its_generator() -> None:
    image, augment = decode(encode(picture())), Augment((0.3, 0.9), flip=0.5, jitter=0.4)
    one, same, other = (augment(image, 32, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_augment_leaves_global_randomness_alone() -> None:
    random.seed(0)
    before = (random.getstate(), torch.get_rng_state())
    Augment((0.3, 0.9), flip=0.5, jitter=0.4)(decode(encode(picture())), 32, random.Random(0))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_crops_keep_to_scale_and_ratio_and_reach_every_edge() -> None:
    augment, rng = Augment((0.3, 0.8), (0.8, 1.25)), random.Random(0)
    crops = [augment._crop(100, 120, rng) for _ in range(2000)]
    for top, left, height, width in crops:
        assert 0.29 < height * width / 12_000 < 0.81
        assert 0.78 < width / height < 1.28
        assert top >= 0
        assert left >= 0
        assert top + height <= 100
        assert left + width <= 120
    assert min(top for top, *_ in crops) == 0
    assert max(top + height for top, _, height, _ in crops) == 100
    assert max(left + width for _, left, _, width in crops) == 120


def test_panorama_falls_back_to_the_centre() -> None:
    assert Augment()._crop(10, 200, random.Random(0)) == (0, 93, 10, 13)


def test_flip_mirrors() -> None:
    image = decode(encode(picture(32, 32)))
    mirrored: Tensor = Augment((1.0, 1.0), flip=1.0)(image, 32, random.Random(0))
    assert torch.equal(mirrored, image.flip(2))


@pytest.mark.parametrize(
    "bad",
    [{"scale": (0.0, 1.0)}, {"scale": (1.0, 0.5)}, {"ratio": (2.0, 1.0)}, {"flip": 2.0}, {"jitter": 1.0}],
)
def test_impossible_augmentation_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Augment(**bad)  # type: ignore[arg-type]


def test_unknown_resize_mode_lists_the_choices() -> None:
    with pytest.raises(UserError, match="shortest, longest, squash"):
        EvalTransform(32, "crop")


def test_boxes_follow_crops_and_mirrors() -> None:
    """What is white in the image is white where the moved box says."""
    augment, centres_S = Augment(scale=(0.3, 1), flip=0.5), (torch.arange(64) + 0.5) / 64
    seen = 0
    for seed in range(60):
        rng = random.Random(seed)
        height, width = rng.randint(60, 200), rng.randint(60, 200)
        left, top = round(rng.uniform(0, 0.6) * width), round(rng.uniform(0, 0.6) * height)
        right, bottom = left + width // 3, top + height // 3
        image_CHW = torch.zeros(3, height, width, dtype=torch.uint8)
        image_CHW[:, top:bottom, left:right] = 255
        white_SS = augment(image_CHW, 64, random.Random(f"s{seed}"))[0] > 127
        window = augment.window(height, width, random.Random(f"s{seed}"))
        box = inside((left / width, top / height, right / width, bottom / height), window)
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) < 0.02:
            assert white_SS.float().mean() < 0.03
            continue
        seen += 1
        across_S = (centres_S > box[0]) & (centres_S < box[2])
        down_S = (centres_S > box[1]) & (centres_S < box[3])
        boxed_SS = down_S[:, None] & across_S
        assert (white_SS & boxed_SS).sum() > 0.85 * (white_SS | boxed_SS).sum(), seed
    assert seen > 40
