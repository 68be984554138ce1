"""What keeps a device waiting: batches that are not there yet, and a host that waits before it asks for more.

A real loader (JPEGs in tars, one long caption and eight sentences each) feeds real steps.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer

from longclip.data.converting.workers import processors
from longclip.tokens import Tokenizer

from .data_loading import CONTEXT, our_loader
from .data_synthetic import photo, shards
from .device import Device
from .gpu_steps import config_of, models
from .gpu_training import Given, Ours, given
from .measures import Row, at_most

SHARE = 0.02


def rows(device: Device) -> list[Row]:
    model, steps = models(device)[0], 4 if device.quick else 40
    batch, workers = (4, 1) if device.quick else (model.alone, min(16, processors()))
    config = config_of(device, model)
    ours = Ours(device, config, compile=not device.quick)
    tokenizer = Tokenizer(SimpleTokenizer(), CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        kept = [photo(seed) for seed in range(2 if device.quick else 48)]
        shards(Path(folder) / "train", kept, batch * steps, batch * steps // 2, tokenizer)
        size = config["vision_cfg"]["image_size"]
        loader = our_loader(Path(folder) / "train", tokenizer, batch, batch * steps, workers, True, size)
        share = _waiting(device, ours, iter(loader), skip=steps // 4)
    measure = (
        f"{model.name}, {batch} images, {workers} workers: share of time that a step waits for its batch"
    )
    return [at_most("GPU.wait.data", measure, share, SHARE), *_syncs(device, ours, given(device, config, 2))]


def _waiting(device: Device, ours: Ours, batches: Iterator[Any], skip: int) -> float:
    """The share of the time after the first steps, which fill queues and compile."""
    waited, started, step = 0.0, time.perf_counter(), 0
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        waited += time.perf_counter() - asked
        ours.step(_moved(batch, device))
        step += 1
        if step == skip:
            device.wait()
            waited, started = 0.0, time.perf_counter()
    device.wait()
    return waited / (time.perf_counter() - started)


def _moved(batch: Any, device: Device) -> Any:
    return batch._replace(
        pixels_BCHW=batch.pixels_BCHW.to(device.at, non_blocking=True),
        tokens_T=batch.tokens_T.to(device.at, non_blocking=True),
    )


def _syncs(device: Device, ours: Ours, data: Given) -> list[Row]:
    """How often a step makes the host wait for the device; checking that the loss is finite takes one."""
    if device.at.type != "cuda":
        return []
    ours.step(data.batch)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.step(data.batch)
    torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    return [at_most("GPU.wait.host", "times that a step's host waits for the device", len(found), 1)]
