"""A model over evaluation sets -> names and numbers: one path, in training and offline.

An evaluator is a callable `(tower, data) -> Findings`; a benchmark is a named evaluator
(`conf/benchmark/*.yaml`). Retrieval is zero-shot, both directions, with float32 scores, and a wrong item
that ties with the right one counts against the model (`metrics.places`). Percentages are 0 to 100.
"""

from .classification import Classification
from .judging import Each, Evaluator, Findings, Judged, Ranked, examine, flat, judge
from .masks import Masks
from .pairs import Choices, Macro, Twins
from .pointing import Pointing
from .questions import Questions
from .retrieval import Retrieval
from .segmentation import Segmentation
from .sets import PairSet
from .sliding import Background, Windows
from .swaps import Swaps

__all__ = [
    "Background",
    "Choices",
    "Classification",
    "Each",
    "Evaluator",
    "Findings",
    "Judged",
    "Macro",
    "Masks",
    "PairSet",
    "Pointing",
    "Questions",
    "Ranked",
    "Retrieval",
    "Segmentation",
    "Swaps",
    "Twins",
    "Windows",
    "examine",
    "flat",
    "judge",
]
