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
    asked = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.12 and later
    return "bf16-mixed" if {"amx_bf16", "avx512_bf16"} & {k for k, v in asked().items() if v} else "32-true"


def wandb_offline() -> bool:
    """True unless this user is logged in to Weights & Biases or asks for a mode by WANDB_MODE."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] != "online"
    import wandb

    return not wandb.api.api_key
