"""Photos and captions to measure on, made from a seed: nothing is downloaded.

A photo is 1/f noise, as natural images have it, under a dozen hard-edged, half-opaque shapes, stored as
JPEG: about 65 kB at 500 x 375 pixels, like Flickr's. A caption is eight sentences of words drawn from
open_clip's own vocabulary by Zipf's law, about 140 tokens, one in ten with what needs cleaning.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from longclip.captions import parse
from longclip.data.tars.shards import write
from longclip.tokens import Tokenizer
from longclip.types import Record

SENTENCES = 8
_ODD = ("caf\u00e9", "it\u2019s", "R&amp;B", "\u2014", "na\u00efve", "\u201cexit\u201d", "3.5", "x²")


def photo(seed: int, longer: int = 500, quality: int = 88) -> bytes:
    """A JPEG of 4:3, every third upright."""
    rng = np.random.default_rng(seed)
    height, width = (longer, longer * 3 // 4) if seed % 3 == 0 else (longer * 3 // 4, longer)
    grey_HW = _noise(rng, height, width)
    pixels_HWC = np.stack([0.9 * grey_HW + 0.35 * _noise(rng, height, width) for _ in range(3)], axis=2)
    pixels_HWC = 45 * pixels_HWC + rng.uniform(90, 150, 3)
    for _ in range(12):
        inside_HW = _shape(rng, height, width)
        pixels_HWC[inside_HW] = 0.25 * pixels_HWC[inside_HW] + 0.75 * rng.uniform(0, 255, 3)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _noise(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Standardised noise whose amplitude falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    spectrum = np.exp(2j * np.pi * rng.random((height, width))) / np.maximum(frequency, 1 / width)
    noise: NDArray[np.float64] = np.fft.ifft2(spectrum).real
    return (noise - noise.mean()) / noise.std()


def _shape(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """A turned rectangle or ellipse somewhere in the picture."""
    y, x = np.mgrid[0:height, 0:width] - rng.uniform((0, 0), (height, width))[:, None, None]
    turn, (a, b) = rng.uniform(0, np.pi), rng.uniform(0.02, 0.25, 2) * max(height, width)
    u, v = (x * np.cos(turn) + y * np.sin(turn)) / a, (y * np.cos(turn) - x * np.sin(turn)) / b
    return np.maximum(abs(u), abs(v)) < 1 if rng.random() < 0.5 else np.hypot(u, v) < 1


def captions(count: int, seed: int = 0) -> Iterator[list[str]]:
    """Captions as lists of SENTENCES sentences."""
    rng = random.Random(seed)
    vocabulary = [name.removesuffix("</w>") for name in SimpleTokenizer().encoder if name.endswith("</w>")]
    words = [word for word in vocabulary if len(word) > 1 and word.isascii() and word.isalpha()]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    for number in range(count):
        said = [rng.choices(words, weights, k=max(4, round(rng.gauss(15, 5)))) for _ in range(SENTENCES)]
        for sentence in said:
            sentence[rng.randrange(len(sentence) - 1)] += rng.choice(("", "", ","))
        if number % 10 == 0:
            said[rng.randrange(SENTENCES)].insert(1, rng.choice(_ODD))
        yield [" ".join(sentence).capitalize() + "." for sentence in said]


def shards(
    directory: Path, images: list[bytes], samples: int, samples_per_shard: int, tokenizer: Tokenizer
) -> None:
    """Shards of `samples` records: the images in turn, and a thousand captions in turn."""
    said = [parse(" ".join(said), "long", tokenizer) for said in captions(min(samples, 1000))]
    records = (
        Record(f"{number:08d}", images[number % len(images)], "jpg", (said[number % len(said)],))
        for number in range(samples)
    )
    write(records, directory, samples_per_shard, tokenizer.name_hash)
