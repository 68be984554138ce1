"""longclip: train CLIP on long, detailed captions.

One idea: a recipe is named groups of captions times a list of loss terms. Everything else follows
one flow, and a file imports only from files above it:

    shard -> Sample -> Batch (pixels, packed tokens) -> towers -> Embeddings -> terms -> metrics

Reading order: `types`, `dist`, `tokens`, `sentences`, `captions`, `data/` (`tars`, `plans`,
`sidecars`, `loading`, `module`; then `converting`, `streams`, `scenes`), `towers/`, `objectives/`,
`metrics`, `heat`, `ema`, `optim`, `runs`, `models`, `embedding`, `evaluate/`, `gallery`, `memory`,
`training`, `planner/`, `callbacks`, `banner`, `export/`, `recipes`, `preview/`, `doctor/`, `search/`, `cli`.

Shape legend. Tensors carry their axes as a suffix (`text_BKE`), so there are no shape comments:

    B  images in the batch                 K  caption slots per image (static for a recipe)
    T  packed text tokens of the batch     S  texts that are present, at most B * K
    P  image patches                       E  shared embedding width
    D  tower width                         N, M  images, texts of a whole evaluation set
    C, H, W  channels and pixels           L  context length, in tokens with start and end
"""

__version__ = "0.1.0"
