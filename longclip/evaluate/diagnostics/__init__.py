"""What retrieval alone does not tell: how a model fares along the caption, the sentences, the frequencies.

`Diagnostics` runs several parts on one split in one pass: `EffectiveLength`, `ByLength`, `Truncation`,
`Order`, `HiMo`, `Space`. `Retention` needs another model and `Concepts` the training captions: they are
evaluators of their own. `evaluate.Pointing` needs boxes.
"""

from .concepts import Concepts
from .lengths import ByLength, EffectiveLength, Truncation
from .order import HiMo, Order
from .retention import Retention
from .space import Space
from .suite import Diagnostics, Part

__all__ = [
    "ByLength",
    "Concepts",
    "Diagnostics",
    "EffectiveLength",
    "HiMo",
    "Order",
    "Part",
    "Retention",
    "Space",
    "Truncation",
]
