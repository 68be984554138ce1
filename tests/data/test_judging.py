"""Evaluation sets as batches: boxes stay on what they are about, and another model reads its own ids."""

import io

import numpy as np
import pytest
from PIL import Image

from longclip.captions import Groups, Sentences, Whole
from longclip.data.images import EvalTransform
from longclip.data.judging import JudgeBatches, Retokenised
from longclip.data.scenes import default_tokenizer
from longclip.sentences import parse
from longclip.types import Record

HEIGHT, WIDTH = 60, 120


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


class Marked:
    """One image, black but for what is in the box of its only sentence."""

    def __init__(self, box, tokenizer):
        self.box, self.tokenizer = box, tokenizer

    def __len__(self):
        return 1

    def record(self, index):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        left, top, right, bottom = (
            round(b * side) for b, side in zip(self.box, [WIDTH, HEIGHT] * 2, strict=True)
        )
        pixels[top:bottom, left:right] = 255
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        caption = parse("It is white.", "a", self.tokenizer, boxes=[self.box])
        return Record("one", encoded.getvalue(), "png", (caption,))

    def shard(self, index):
        return "a shard"


def shown(box, mode, tokenizer):
    groups = Groups({"s": Sentences(1)}, seed=0, shuffle=False)
    ((samples, _),) = JudgeBatches(Marked(box, tokenizer), 4, groups, EvalTransform(60, mode))
    return samples[0]


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("box", [(0.4, 0.2, 0.6, 0.8), (0.0, 0.0, 0.5, 1.0), (0.7, 0.5, 1.0, 1.0)])
def test_a_box_lies_on_what_is_shown_of_its_image(box, mode, tokenizer):
    sample = shown(box, mode, tokenizer)
    rows, columns = np.nonzero(sample.image_CHW[0].numpy() > 127)
    seen = (columns.min() / 60, rows.min() / 60, (columns.max() + 1) / 60, (rows.max() + 1) / 60)
    assert sample.texts[0].box == pytest.approx(seen, abs=0.02)


def test_a_box_outside_of_the_crop_is_left_out(tokenizer):
    assert shown((0.0, 0.0, 0.2, 1.0), "shortest", tokenizer).texts[0].box is None
    assert shown((0.0, 0.0, 0.2, 1.0), "squash", tokenizer).texts[0].box is not None


def test_another_model_reads_its_own_ids(tokenizer):
    class Spelling:
        """A tokenizer of letters."""

        def ids(self, cleaned):
            return tuple(map(ord, cleaned))

    (caption,) = Retokenised(Marked((0, 0, 1, 1), tokenizer), Spelling()).record(0).captions
    (text,) = Whole()([caption], None)
    assert text.ids == tuple(map(ord, "It is white."))
