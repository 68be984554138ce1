"""`engines.ZeroOnProcessors` for whole programs, without the collective that DeepSpeed would compile."""

import deepspeed.ops
from engines import ZeroOnProcessors

__all__ = ["ZeroOnProcessors"]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
