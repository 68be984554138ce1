"""Cheaper at first, whole at the end: image side, caption length and patch dropout by the share of the run.

In: the stages of a run, as `[[share, value], ...]`. Out: for every position the `Stage` of the batch that
begins there. A pure function, so that a resumed run has nothing to restore, and the data (which decodes and
packs) and the tower (which drops patches) agree without a word.

FLIP (Li et al. 2023, arXiv 2212.00794) leaves patches out and is tuned with all of them at the end; CLIPA (Li
et al. 2023, arXiv 2305.07017) trains on small images and short texts first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .types import UserError

Steps = Sequence[tuple[float, float | None]] | None
"""(share of the run from which it holds, value); None for a value: what the model has."""


class Stage(NamedTuple):
    """What a batch is made and trained with; None: what the model has."""

    image_size: int | None = None  # pixels of a side
    context_length: int | None = None  # tokens kept of a caption, start and end included
    patch_dropout: float | None = None  # share of the patches left out


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, each kind with its own.

    Args:
        samples: of the whole run.
        image_size, context_length, patch_dropout: see `Stage`; None: as the model has it, all the time.

    Raises:
        UserError: shares that do not rise from 0, or a value that nothing can be cut to.
    """

    samples: int = 1
    image_size: Steps = None
    context_length: Steps = None
    patch_dropout: Steps = None

    def __post_init__(self) -> None:
        _check("image_size", self.image_size, _at_least(1), "a number of pixels")
        _check(
            "context_length", self.context_length, _at_least(3), "3 tokens or more, start and end included"
        )
        _check("patch_dropout", self.patch_dropout, _share, "a share, 0 or more and below 1")

    def at(self, position: int) -> Stage:
        """The stage of a batch whose first image (over all processes) has this position in the run."""
        size, length = self._value(self.image_size, position), self._value(self.context_length, position)
        size, length = (None if value is None else int(value) for value in (size, length))
        return Stage(size, length, self._value(self.patch_dropout, position))

    @property
    def sizes(self) -> list[int]:
        """All image sides but the model's own."""
        return [int(size) for _, size in self.image_size or () if size is not None]

    def check_model(self, image_size: int | Sequence[int], context_length: int) -> None:
        """Raise UserError where a stage is larger than the model."""
        lengths = [int(length) for _, length in self.context_length or () if length is not None]
        side = image_size if isinstance(image_size, int) else min(image_size)
        for name, values, most in (
            ("image_size", self.sizes, side),
            ("context_length", lengths, context_length),
        ):
            if max(values, default=0) > most:
                raise UserError(
                    f"curriculum.{name} has a stage of {max(values)}, and the model has {most}: stages are "
                    f"not larger, and null stands for the model's own"
                )

    def describe(self) -> str:
        """The stages in a few words; "" where there are none."""
        kinds = {name: getattr(self, name) for name in Stage._fields}
        return "; ".join(f"{name} {_told(steps)}" for name, steps in kinds.items() if steps)

    def _value(self, steps: Steps, position: int) -> float | None:
        begun = [value for share, value in steps or () if position >= round(share * self.samples)]
        return begun[-1] if begun else None  # the first stage begins at 0, wherever there is one


def _check(name: str, steps: Any, allowed: Callable[[Any], bool], what: str) -> None:
    """Raise UserError for anything but stages: YAML brings whatever a user wrote."""
    if steps is None:
        return
    listed = isinstance(steps, Sequence) and all(isinstance(s, Sequence) and len(s) == 2 for s in steps)
    shares = [share for share, _ in steps] if listed else []
    if not all(map(_share, shares)) or shares[:1] != [0] or shares != sorted(set(shares)):
        raise UserError(
            f"curriculum.{name} is {steps}; give [share of the run, value] for every stage, the first from 0 "
            f"on and each later than the one before, for example '[[0,48],[0.8,null]]'"
        )
    wrong = [value for _, value in steps if value is not None and not allowed(value)]
    if wrong:
        raise UserError(f"curriculum.{name} has a stage of {wrong[0]}; it is {what}, or null for the model's")


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _at_least(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _told(steps: Sequence[tuple[float, float | None]]) -> str:
    return ", ".join(
        f"{'as the model' if value is None else f'{value:g}'} from {100 * share:g} %"
        for share, value in steps
    )
