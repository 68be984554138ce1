"""Loss terms: one file per family, each a small module around a pure function.

In: `types.Embeddings`. Out: `Loss(value, measures)`. A term never sees a model. To add one, write a
file here (or anywhere) with a subclass of `Term` and name it in a recipe.
"""

from longclip.objectives.components import PrimaryComponents
from longclip.objectives.conditioned import TextConditioned
from longclip.objectives.contrastive import Contrastive
from longclip.objectives.grouping import Grouping
from longclip.objectives.sigmoid import Sigmoid
from longclip.objectives.term import Loss, Term

__all__ = [
    "Contrastive",
    "Grouping",
    "Loss",
    "PrimaryComponents",
    "Sigmoid",
    "Term",
    "TextConditioned",
]
