"""A model over evaluation sets -> names and numbers: one path, in training and offline.

An evaluator is a callable `(tower, data) -> Findings`; a benchmark is a named evaluator
(`conf/benchmark/*.yaml`). Retrieval is zero-shot, both directions, with float32 scores, and a wrong item
that ties with the right one counts against the model (`metrics.places`). Percentages are 0 to 100.
"""

from .judging import Each, Evaluator, Findings, Judged, Ranked, examine, flat, judge
from .pointing import Pointing
from .retrieval import Retrieval

__all__ = [
    "Each",
    "Evaluator",
    "Findings",
    "Judged",
    "Pointing",
    "Ranked",
    "Retrieval",
    "examine",
    "flat",
    "judge",
]
