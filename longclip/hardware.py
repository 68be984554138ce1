"""What this machine can do, asked once at the start. Values for the config, no side effects."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from .types import UserError


def best_precision(accelerator: str) -> str:
    """ "bf16-mixed" where the device computes in bfloat16, else "32-true".

    A processor without AMX or AVX512-BF16 emulates bfloat16 about ten times slower than float32.
    """
    if accelerator == "gpu":
        return (
            "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "32-true"
        )
    asked = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.12 and later
    return "bf16-mixed" if {"amx_bf16", "avx512_bf16"} & {k for k, v in asked().items() if v} else "32-true"


def free_memory(accelerator: str) -> int:
    """Bytes that a process may still take: of the GPU it would get, else of this machine."""
    if accelerator == "gpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text() if meminfo.exists() else "")
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def as_bytes(text: str) -> int:
    """Bytes of "24GiB", "80GB", "512 MiB".

    Raises:
        UserError: it says no size.
    """
    found = re.fullmatch(r"([\d.]+) *([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise UserError(
            f"plan={text} is no size of memory; write 24GiB or 80GB, or auto for what is free here"
        )
    return round(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))


def gib(size: float) -> str:
    """Bytes as people say them.

    >>> [gib(size) for size in (2**30, 5e7, 12)]
    ['1.00 GiB', '47.7 MiB', '12 bytes']
    """
    if size >= 2**30:
        return f"{size / 2**30:,.2f} GiB"
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size:,.0f} bytes"


def wandb_offline() -> bool:
    """True unless this user is logged in to Weights & Biases or asks for a mode by WANDB_MODE."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] != "online"
    import wandb

    return not wandb.api.api_key
