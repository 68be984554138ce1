"""What this machine can do, asked once at the start. Values for the config, no side effects."""

from __future__ import annotations

import os

import torch


def best_precision(accelerator: str) -> str:
    """ "bf16-mixed" where the device computes in bfloat16, else "32-true".

    A processor without AMX or AVX512-BF16 emulates bfloat16 about ten times slower than float32.
    """
    if accelerator == "gpu":
        return (
            "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "32-true"
        )
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "32-true"


def wandb_offline() -> bool:
    """True unless this user is logged in to Weights & Biases or asks for a mode by WANDB_MODE."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] != "online"
    import wandb

    return not wandb.api.api_key
