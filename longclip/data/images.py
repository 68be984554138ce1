"""Encoded bytes -> uint8 pixels, as open_clip would see them, several times faster.

In: the bytes of a JPEG, PNG or WebP. Out: a uint8 tensor [3, H, W]; normalising happens on the
device. `EvalTransform` is open_clip's evaluation preprocessing and `Augment` its training
preprocessing, both on uint8 tensors, within one level of 255: torch's antialiased resize rounds its
weights to 16 bits, PIL's to 22, which moves one value in 200. There are two known exceptions. Pillow 13
resizes images more than twice as high as wide (1.4 times where they are squashed) vertically first,
torch and earlier Pillows horizontally, which shows at hard edges. And a 16-bit grey PNG keeps its upper
eight bits, where PIL's `convert("RGB")`, and so open_clip, clips it.

As in open_clip, EXIF orientation is ignored and transparency is dropped, not blended.
"""

from __future__ import annotations

import io
import math
import random
import warnings
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from ..types import Box, UserError

MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs: 256 MiB of RGB


def extension(data: bytes) -> str:
    """ "jpg", "png" or "webp", told from the first bytes, not from a file name.

    Raises:
        UserError: the bytes are none of these.
    """
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise UserError("image is empty" if not data else "image is no JPEG, PNG or WebP")


def decode(data: bytes) -> Tensor:
    """Any JPEG, PNG or WebP as uint8 RGB [3, H, W] (a view of rows of pixels: channels last in memory).

    Raises:
        UserError: unreadable, truncated, or larger than MAX_PIXELS; the text is the reason alone.
    """
    kind = extension(data)
    pixels_HWC = _decode_jpeg(data) if kind == "jpg" else None
    if pixels_HWC is None:
        pixels_HWC = _decode_pil(data)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """None where only PIL knows what to do: four-channel JPEGs and recoverable damage."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"image is too large: {width} x {height} pixels, at most {MAX_PIXELS} in all")


def _decode_pil(data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            _check_size(image.width, image.height)
            if image.mode.startswith("I"):
                grey_HW = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey_HW[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"image is too large: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        reason = "truncated" if "truncated" in str(error) else "broken"
        raise UserError(f"image is {reason}") from error


@dataclass(frozen=True)
class EvalTransform:
    """open_clip's evaluation preprocessing, up to the normalisation: uint8 [3, H, W] -> [3, size, size].

    Args:
        size: pixels of a side.
        resize_mode: "shortest" (resize the shorter side, crop the centre), "longest" (resize the
            longer side, pad with black) or "squash".
        interpolation: "bicubic" or "bilinear".
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _one_of("resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        _one_of("interpolation", self.interpolation, ("bicubic", "bilinear"))

    def sized(self, size: int | None) -> EvalTransform:
        """The same for another side; None: for this one."""
        return self if size is None else replace(self, size=size)

    def __call__(self, image_CHW: Tensor) -> Tensor:
        height, width = image_CHW.shape[1:]
        image_CHW = _resize(image_CHW, self.resized(height, width), self.interpolation)
        return image_CHW if self.resize_mode == "squash" else _centre(image_CHW, self.size)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the centre is cut out, or black put around."""
        size = self.size
        if self.resize_mode == "squash":
            return size, size
        if self.resize_mode == "longest":
            longest = max(height, width)
            return max(1, round(size * height / longest)), max(1, round(size * width / longest))
        # Truncated, as torchvision's Resize does.
        return (size, int(size * width / height)) if height < width else (int(size * height / width), size)

    def window(self, height: int, width: int) -> Box:
        """The part of an image that is shown, as fractions of the image; beyond [0, 1] where it is padded."""
        down, across = (self.size / side for side in self.resized(height, width))
        return ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)


@dataclass(frozen=True)
class Augment:
    """Training preprocessing: a random crop, resized, optionally mirrored and colour-jittered.

    The crop is drawn as torchvision's RandomResizedCrop draws it, but only from the generator passed in.
    `scale=(1, 1)` means the largest centred crop that `ratio` allows, and draws nothing. With
    `flip=0` and `jitter=0` on top, an image that has the right size passes through untouched.

    Args:
        scale: share of the image's area, least and most.
        ratio: width / height of the crop, least and most.
        flip: probability of mirroring; captions that say "left" are then wrong.
        jitter: brightness, contrast and saturation each change by a factor in [1 - jitter, 1 + jitter].
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):  # configurations bring lists of their own kind, slow to read
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale is two shares of the area in (0, 1], smaller first; got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio is two numbers above 0, smaller first; got {self.ratio}")
        if not (0 <= self.flip <= 1 and 0 <= self.jitter < 1):
            raise UserError(f"flip and jitter lie in [0, 1]; got flip={self.flip} and jitter={self.jitter}")

    def __call__(
        self, image_CHW: Tensor, size: int, rng: random.Random, interpolation: str = "bicubic"
    ) -> Tensor:
        """uint8 [3, H, W] -> [3, size, size]."""
        top, left, height, width = self._crop(image_CHW.shape[1], image_CHW.shape[2], rng)
        image_CHW = image_CHW[:, top : top + height, left : left + width]
        image_CHW = _resize(image_CHW, (size, size), interpolation)
        if self.flip and rng.random() < self.flip:
            image_CHW = image_CHW.flip(2)
        if self.jitter:
            for adjust in (
                functional.adjust_brightness,
                functional.adjust_contrast,
                functional.adjust_saturation,
            ):
                image_CHW = adjust(image_CHW, rng.uniform(1 - self.jitter, 1 + self.jitter))
        return image_CHW

    def window(self, height: int, width: int, rng: random.Random) -> Box:
        """What `__call__` shows of an image when `rng` begins as there, as fractions of the image.

        Where the image is mirrored, left and right change places: the first is then the larger.
        """
        top, left, h, w = self._crop(height, width, rng)
        sides = left / width, (left + w) / width
        if self.flip and rng.random() < self.flip:
            sides = sides[::-1]
        return sides[0], top / height, sides[1], (top + h) / height

    def _crop(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Top, left, height and width: ten tries, then the largest centred crop of an allowed ratio."""
        low, high = self.ratio
        if self.scale != (1.0, 1.0):
            for _ in range(10):
                area = height * width * rng.uniform(*self.scale)
                ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
                w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < w <= width and 0 < h <= height:
                    return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        h = height if width / height >= low else max(1, round(width / low))
        w = width if width / height <= high else max(1, round(height * high))
        return (height - h) // 2, (width - w) // 2, h, w


def _resize(image_CHW: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if tuple(image_CHW.shape[1:]) == size:
        return image_CHW
    # Rows of pixels end to end, in a batch of one: torch resizes anything else a quarter slower.
    pixels_1HWC = image_CHW.permute(1, 2, 0).contiguous()[None]
    return interpolate(pixels_1HWC.permute(0, 3, 1, 2), size, mode=interpolation, antialias=True)[0]


def _centre(image_CHW: Tensor, size: int) -> Tensor:
    """The centre as open_clip cuts it; black where the image is smaller."""
    return functional.center_crop_image(image_CHW, [size, size])


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is one of {', '.join(choices)}; got {value!r}")


def inside(box: Box | None, window: Box) -> Box | None:
    """What of a box lies in a window, in fractions of the window; None where nothing does.

    The window of a mirrored image has its sides the other way round, and so mirrors the box.
    """
    if box is None:
        return None
    left, right = _part(box[0], box[2], window[0], window[2])
    top, bottom = _part(box[1], box[3], window[1], window[3])
    return (left, top, right, bottom) if left <= right and top <= bottom else None


def _part(low: float, high: float, start: float, end: float) -> tuple[float, float]:
    """Low to high in fractions of start to end, cut off there; the wrong way round where they are apart."""
    first, last = sorted(((low - start) / (end - start), (high - start) / (end - start)))
    return max(first, 0), min(last, 1)
