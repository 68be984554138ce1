"""One model out of several: the weighted mean of their weights.

    average(["ViT-B-16/openai", "runs/mine"], [0.5, 0.5])      # between the start and what came of it
    average(["runs/mine/checkpoints/step-000001000.ckpt", ...])   # checkpoints of one run

In: names as `models.load` takes them, and shares. Out: a `Backbone` as any other.

The first is WiSE-FT (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022): a fine-tuned
model that keeps more of what its start could do. The second is stochastic weight averaging (Izmailov et
al., UAI 2018) or, over runs from one start, a uniform model soup (Wortsman et al., ICML 2022). Means make
sense of models that share a start; of two runs from random weights they are noise, which no check can see.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import models
from .towers import configs
from .towers.pretrained import Backbone
from .types import UserError

log = logging.getLogger(__name__)


def average(
    names: Sequence[str],
    shares: Sequence[float] | None = None,
    context_length: int | None = None,
    weights: str | None = None,
    positions: str = "stretch",
    keep: int = 20,
) -> Backbone:
    """The mean of these models, summed up in float64, one model in memory at a time.

    Args:
        names: run, checkpoint, export, `hf-hub:` ... as `models.load` says.
        shares: how much of each; they add up to 1. None: the same of all. Of a share outside of 0 to 1, as
            1.5 and -0.5, the mean lies beyond the models.
        context_length: fewer positions than this are lengthened to it; None: to those of the last.
        weights: which of checkpoints, as `models.load` says.
        positions, keep: how they are lengthened: as in the training that came of it (model.backbone), or the
            mean is of rows that never belonged together.

    Numbers that are no floating point cannot be mixed. They must be equal, but for what batch normalisation
    counts, which is the last model's.

    Raises UserError where the models are of different architectures, activations or preprocessing.
    """
    shares = _checked(names, shares)
    last = models.load(names[-1], context_length, weights, positions, keep)
    sums = _scaled(last, shares[-1])
    for name, share in zip(names[:-1], shares[:-1], strict=True):
        other = models.load(name, last.tokenizer.context_length, weights, positions, keep)
        _check_alike(name, other, names[-1], last)
        for key, value in _scaled(other, share).items():
            sums[key] += value
    last.model.load_state_dict(last.model.state_dict() | sums)  # copies into the model's own types
    _warn_of_statistics(last.model)
    return last


def _checked(names: Sequence[str], shares: Sequence[float] | None) -> Sequence[float]:
    if len(names) < 2:
        raise UserError(f"a mean is made of two models or more; only {', '.join(names) or 'none'} was named")
    if shares is None:
        return [1 / len(names)] * len(names)
    if len(shares) != len(names) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(
            f"{len(names)} models need {len(names)} shares that add up to 1, not {' '.join(map(str, shares))}"
        )
    return shares


def _scaled(backbone: Backbone, share: float) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {name: tensor.double() * share for name, tensor in state.items() if tensor.is_floating_point()}


def _check_alike(name: str, one: Backbone, other_name: str, other: Backbone) -> None:
    left, right = _facts(one), _facts(other)
    differ = configs.differences(one.model_cfg, other.model_cfg)
    differ += [
        f"{key} {left.get(key, 'absent')} and {right.get(key, 'absent')}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]
    if differ:
        raise UserError(
            f"{name} and {other_name} are different networks, so a mean of their weights is none: "
            f"{'; '.join(differ[:5])}; average models that were trained from one start"
        )


def _facts(backbone: Backbone) -> dict[str, Any]:
    """What must agree besides the architecture: of tensors the shape, of integers the value."""
    config = backbone.model_cfg
    facts = {"context_length": config["text_cfg"]["context_length"], "quick_gelu": config["quick_gelu"]}
    facts |= {f"preprocessing {key}": value for key, value in backbone.preprocess_cfg.items()}
    for name, tensor in backbone.model.state_dict().items():
        if not name.endswith(".num_batches_tracked"):
            facts[name] = list(tensor.shape) if tensor.is_floating_point() else tensor.tolist()
    return facts


def _warn_of_statistics(model: nn.Module) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        log.warning("batch statistics were averaged, too, and fit the mean of the weights only roughly")
