"""A model that sees colours and reads their names, and pictures for it: answers are counted by hand."""

import io

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.nn import functional as F

from longclip.dist import Gather
from longclip.tokens import Tokenizer
from longclip.types import Embeddings

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Colours(torch.nn.Module):
    """A picture is its mean colour, a text the sum of the colours that it names, grey where it names none."""

    preprocess_cfg = {"size": 8, "resize_mode": "shortest", "interpolation": "bicubic"}

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)
        self.named = {tuple(self.tokenizer.ids(name)): place for place, name in enumerate(RGB)}

    def forward(self, batch, slots, needs):
        image_BE = F.normalize(batch.pixels_BCHW.double().mean((2, 3)), dim=-1)
        texts = [part.tolist() for part in batch.tokens_T.split(batch.lengths_BK.ravel().tolist())]
        counts = [[text.count(ids[0]) for ids in self.named] for text in texts]
        counts = torch.tensor([own if any(own) else [1, 1, 1] for own in counts]).double()
        text_BKE = F.normalize(counts, dim=-1).unflatten(0, batch.lengths_BK.shape)
        exists = batch.lengths_BK > 0
        return Embeddings(image_BE.float(), text_BKE.float(), exists, slots, torch.ones(()), Gather())


def png(*columns):
    """A picture of 8 x 8 pixels, of colours side by side."""
    pixels = np.concatenate([np.full((8, 8 // len(columns), 3), RGB[name], np.uint8) for name in columns], 1)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def paint(folder, **pictures):
    """NAME.png of each colour, or of several side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colours in pictures.items():
        (folder / f"{name}.png").write_bytes(png(*colours.split("-")))
