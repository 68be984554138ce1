"""Pictures that no other is like."""

import numpy as np
from PIL import Image


def draw(path, seed, size=(24, 24)):
    """Noise of its own, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path
