"""Which texts of an image are shown.

In: an image's captions, as `parse` (of `sentences`, offered here too) made them. Out: K slots of texts. A
policy chooses texts, and `Groups` lays the policies of a recipe side by side, seeded by (seed, epoch, key)
and by the progress of the run, and nothing else: the same texts whatever the number of workers or processes,
and after a resume.
"""

from longclip.sentences import parse, split, texts_of, tokenise

from .groups import Groups
from .mixing import Best, Likely, Mix
from .order import Beginning, Moved, Preceded, Prefixes, Shuffled, WithoutFirst
from .phrases import Parts
from .policies import All, Debias, First, Merged, Policy, Sentences, Source, Whole
from .swaps import Contrasted, Swapped
from .weighing import Scored

__all__ = [
    "All",
    "Beginning",
    "Best",
    "Contrasted",
    "Debias",
    "First",
    "Groups",
    "Likely",
    "Merged",
    "Mix",
    "Moved",
    "Parts",
    "Policy",
    "Preceded",
    "Prefixes",
    "Scored",
    "Sentences",
    "Shuffled",
    "Source",
    "Swapped",
    "Whole",
    "WithoutFirst",
    "parse",
    "split",
    "texts_of",
    "tokenise",
]
