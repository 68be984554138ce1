"""Whole training steps on the device: useful FLOPs, images a second, the largest batch, compilation.

Useful FLOPs are those of real tokens (`work.step`), whatever a layout computes beyond; the ceiling is that of
a large matrix product on the same device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters

from . import padded, work
from .device import Device
from .gpu_training import Given, Ours, Theirs, given, real_tokens
from .measures import Job, Row, at_most, faster

WAYS = {"pad248": padded.at_full_context, "pad77+248": padded.at_two_lengths}
TOY_MEMORY = 128 * 2**20


class Model(NamedTuple):
    """An architecture, images in a step of ours alone and of one beside open_clip's, and what to reach."""

    name: str
    alone: int
    beside: int
    mfu: float
    speedups: dict[str, float]


MODELS = [
    Model("ViT-B-16", alone=384, beside=64, mfu=0.4, speedups={"pad248": 3.0, "pad77+248": 1.6}),
    Model("ViT-L-14", alone=160, beside=32, mfu=0.5, speedups={}),
]
TOY = [Model("ViT-scenes", alone=2, beside=2, mfu=0.4, speedups={"pad248": 3.0, "pad77+248": 1.6})]


def models(device: Device) -> list[Model]:
    return TOY if device.quick else MODELS


def config_of(device: Device, model: Model) -> dict[str, Any]:
    """For captions of 248 tokens."""
    return padded.config(model.name, layers=1 if device.quick else None)


def speed(device: Device) -> list[Row]:
    """MFU, and images a second beside open_clip's, both as they are and compiled."""
    ceiling = device.ceiling()
    found = [Row("GPU.ceiling", "large bf16 matrix product, TFLOP/s", ceiling / 1e12)]
    for model in models(device):
        for compiled in (False, True):
            found += [_mfu(device, model, compiled, ceiling), *_beside(device, model, compiled)]
            device.clear()
    return found


def _mfu(device: Device, model: Model, compiled: bool, ceiling: float) -> Row:
    config = config_of(device, model)
    ours, data = Ours(device, config, compiled), given(device, config, model.alone)
    took = device.seconds({"ours": lambda: ours.step(data.batch)})["ours"]
    useful = work.step(config, real_tokens(data)) / took
    measure = f"{model.name}{_tag(compiled)}, {model.alone} images: real TFLOP/s (MFU of the ceiling)"
    id = f"GPU.mfu.{model.name}{_tag(compiled, '.compiled')}"
    return faster(id, measure, useful / 1e12, ceiling / 1e12, model.mfu, "1")


def _beside(device: Device, model: Model, compiled: bool) -> list[Row]:
    config = config_of(device, model)
    data = given(device, config, model.beside)
    ours = Ours(device, config, compiled)
    theirs = {way: Theirs(device, config, encode, compiled) for way, encode in WAYS.items()}
    jobs: dict[str, Job] = {way: partial(trainee.step, data) for way, trainee in theirs.items()}
    took = device.seconds({"ours": lambda: ours.step(data.batch), **jobs})
    found = []
    for way in WAYS:
        measure = f"{model.name}{_tag(compiled)}, {model.beside} images: images/s, against {way}"
        fast, slow = model.beside / took["ours"], model.beside / took[way]
        id = f"GPU.images.{model.name}.{way}{_tag(compiled, '.compiled')}"
        found.append(faster(id, measure, fast, slow, model.speedups.get(way)))
    return found


def largest(device: Device) -> list[Row]:
    """The largest batch that fits, to a sixteenth: ours against open_clip's, everything at 248 tokens."""
    model = models(device)[0]
    config = config_of(device, model)
    ours, theirs = Ours(device, config), Theirs(device, config, padded.at_full_context)
    fit = (
        _largest(device, config, lambda given: ours.step(given.batch)),
        _largest(device, config, theirs.step),
    )
    measure = f"{model.name}: images of the largest step that fits, against pad248"
    return [faster(f"GPU.largest.{model.name}", measure, *fit, 3.5)]


def _largest(device: Device, config: dict[str, Any], step: Callable[[Given], None]) -> int:
    def fits(images: int) -> bool:
        try:
            peak = device.peak(lambda: step(given(device, config, images)))
        except torch.OutOfMemoryError:
            return False
        return device.at.type == "cuda" or peak <= TOY_MEMORY

    step(given(device, config, 2))  # the optimizer's state is part of what must fit
    return _bisect(fits)


def _bisect(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, to a sixteenth."""
    low = 2
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def compilation(device: Device) -> list[Row]:
    """Twenty batches of different lengths: compiled against not, and how often it compiled again."""
    model, batches = models(device)[0], 2 if device.quick else 20
    config = config_of(device, model)
    data = [given(device, config, model.beside, seed) for seed in range(batches)]
    trainees = {"plain": Ours(device, config), "compiled": Ours(device, config, compile=True)}
    counters.clear()
    trainees["compiled"].step(data[0].batch)
    first = counters["stats"]["unique_graphs"]
    took = device.seconds({name: partial(_all, trainee, data) for name, trainee in trainees.items()}, 3)
    again = counters["stats"]["unique_graphs"] - first
    fast, slow = (batches * model.beside / took[name] for name in ("compiled", "plain"))
    what = f"{model.name}, {batches} batches of {model.beside} images of different lengths: "
    return [
        faster("GPU.compile.speed", what + "images/s, compiled against not", fast, slow, 1.15),
        at_most("GPU.compile.again", what + "graphs compiled after the first batch", again, 3),
    ]


def _all(trainee: Ours, data: list[Given]) -> None:
    for one in data:
        trainee.step(one.batch)


def _tag(compiled: bool, text: str = ", compiled") -> str:
    return text if compiled else ""
