"""DeepSpeed's ZeRO through Lightning, with longclip's optimizer and numbers."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from ..optim import LN_100
from ..types import UserError
from . import sharding


class Zero(DeepSpeedStrategy):
    """ZeRO over torch's AdamW; bf16-mixed is torch's autocast over float32 weights.

    DeepSpeed's own bf16 mode would round the weights and temperatures that the forward pass sees.

    Args:
        stage: 1, 2 or 3.
        offload: keep moments (stage 3: weights, too) in the host's memory and update there, by torch's fused
            AdamW for processors; DeepSpeed's own would have to be compiled first.
        timeout_minutes: how long a collective waits for a process that has died.
    """

    def __init__(self, stage: int, offload: bool, timeout_minutes: float, **more: Any) -> None:
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            timeout=timedelta(minutes=timeout_minutes),
            logging_batch_size_per_gpu=1,  # of no effect; Lightning would ask our loader for its sampler
            logging_level=logging.ERROR,  # it warns that it cannot look into Embeddings, see `setup`
            **more,
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False

    def setup(self, trainer: lightning.Trainer) -> None:
        """Stage 3 gathers a module's weights for its forward; those read elsewhere belong to the step."""
        super().setup(trainer)
        if self.zero_stage_3:
            import deepspeed

            module: Any = self.lightning_module
            for parameter in sharding.outside_blocks(module.tower, module.terms.values()):
                deepspeed.zero.register_external_parameter(module, parameter)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """The float32 copies that ZeRO updates are clamped, too, else they would drift beyond the bound."""
        done = super().optimizer_step(*args, **kwargs)
        for name, parameter in self.lightning_module.named_parameters():  # type: ignore[union-attr]
            if name.endswith("logit_scale") and parameter.requires_grad:
                for share in self._masters(parameter):
                    share.data.clamp_(0, LN_100)
        return done

    def gradient(self, parameter: Any) -> torch.Tensor | None:
        """This process's share of a gradient, before the update; None where others hold all of it.

        DeepSpeed's `safe_get_full_grad` would be a collective for every parameter.
        """
        if not parameter.requires_grad:
            return None
        if self.zero_stage_3:
            from deepspeed.utils import safe_get_local_grad

            share: torch.Tensor = safe_get_local_grad(parameter)
            return share
        mapping = parameter._hp_mapping
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group) if mapping else None

    def _masters(self, parameter: Any) -> list[torch.Tensor]:
        """This process's share of a parameter's float32 copy; [] where others hold all of it."""
        if self.zero_stage_3:
            return [self.deepspeed_engine.optimizer._get_fp32_opt_state_partition(parameter, True)[0]]
        return [parameter._hp_mapping.get_hp_fragment()] if parameter._hp_mapping else []

    def _format_config(self) -> None:
        super()._format_config()
        assert isinstance(self.config, dict)
        if "fp16" in self.config:
            raise UserError(
                f"trainer.precision={self.precision_plugin.precision} is not supported with DeepSpeed, which "
                "would make the weights float16: use bf16-mixed or 32-true, or trainer=ddp or fsdp2"
            )
        if self.config.pop("bf16", None):
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # gradients travel in float32
            }
