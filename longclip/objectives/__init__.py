"""Loss terms: one file per family, each a small module around a pure function.

In: `types.Embeddings`. Out: `Loss(value, measures)`. A term never sees a model. To add one, write a
file here (or anywhere) with a subclass of `Term` and name it in a recipe.
"""

from longclip.objectives.anchored import Anchored
from longclip.objectives.balance import Balance
from longclip.objectives.beta import Beta
from longclip.objectives.components import PrimaryComponents
from longclip.objectives.conditioned import TextConditioned
from longclip.objectives.contrastive import Contrastive
from longclip.objectives.corners import Corners
from longclip.objectives.distilled import Distilled, Teacher
from longclip.objectives.facets import Facets
from longclip.objectives.gates import Gated
from longclip.objectives.glimpsed import Glimpsed
from longclip.objectives.grounding import Grounding
from longclip.objectives.grouping import Grouping
from longclip.objectives.imitated import Imitated
from longclip.objectives.late import Late
from longclip.objectives.local import LocalNegatives
from longclip.objectives.masked import Masked
from longclip.objectives.matching import Matching
from longclip.objectives.noise import NoiseAdaptive
from longclip.objectives.own_row import Choice, OwnRow
from longclip.objectives.regions import RegionChoice, Regions
from longclip.objectives.sigmoid import Sigmoid
from longclip.objectives.term import Loss, Term
from longclip.objectives.visualness import Visualness

__all__ = [
    "Anchored",
    "Balance",
    "Beta",
    "Choice",
    "Contrastive",
    "Corners",
    "Distilled",
    "Facets",
    "Gated",
    "Glimpsed",
    "Grounding",
    "Grouping",
    "Imitated",
    "Late",
    "LocalNegatives",
    "Loss",
    "Masked",
    "Matching",
    "NoiseAdaptive",
    "OwnRow",
    "PrimaryComponents",
    "RegionChoice",
    "Regions",
    "Sigmoid",
    "Teacher",
    "Term",
    "TextConditioned",
    "Visualness",
]
