"""The contrastive loss of a large batch on one device: time, and memory above features and gradients."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from longclip.objectives import Contrastive
from longclip.types import Embeddings

from .device import Device
from .measures import Job, Row, at_most

WIDTH, CAPTIONS = 512, 8


def rows(device: Device) -> list[Row]:
    images = 64 if device.quick else 32_768
    torch.manual_seed(0)
    image_BE = normalize(torch.randn(images, WIDTH, device=device.at), dim=-1).requires_grad_()
    text_BKE = normalize(torch.randn(images, CAPTIONS, WIDTH, device=device.at), dim=-1).requires_grad_()
    embeddings = Embeddings(
        image_BE=image_BE,
        text_BKE=text_BKE,
        mask_BK=torch.ones(images, CAPTIONS, dtype=torch.bool, device=device.at),
        slots={"sub": slice(0, CAPTIONS)},
        scale=torch.tensor(100.0, device=device.at, requires_grad=True),
        gather=lambda x: x,
    )
    term = Contrastive("sub").to(device.at)

    def job() -> None:
        image_BE.grad = text_BKE.grad = None
        term(embeddings).value.backward()

    job()
    gradients = image_BE.nbytes + text_BKE.nbytes
    image_BE.grad = text_BKE.grad = None
    above = device.peak(job) - gradients
    what = f"InfoNCE of {images:,} images with {CAPTIONS} captions, forward and backward, "
    memory = at_most("GPU.loss.memory", what + "GiB above features and gradients", above / 2**30, 3)
    return [
        memory,
        Row("GPU.loss.ms.float32", what + "ms", _ms(device, job, "highest")),
        at_most("GPU.loss.ms", what + "ms, products in TF32", _ms(device, job, "high"), 90),
    ]


def _ms(device: Device, job: Job, precision: str) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    took = device.seconds({"loss": job})["loss"]
    torch.set_float32_matmul_precision(before)
    return 1e3 * took
