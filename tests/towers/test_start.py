"""The frozen start reads as the published weights do, whatever the run does to the model."""

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from test_chunks import made_up
from tiny import TINY
from torch.nn import functional as F

from longclip.objectives import Anchored, Contrastive
from longclip.optim import AdamW
from longclip.tokens import Tokenizer, pack
from longclip.towers.chunks import chunks
from longclip.towers.clip import DualTower
from longclip.towers.freezing import Freeze
from longclip.towers.lora import Lora
from longclip.towers.pretrained import build
from longclip.towers.start import cut
from longclip.training import LongClip
from longclip.types import Text

SHORT, LONG = 32, 68  # keep 20 and take the other 12 four times
SLOTS = {"long": slice(0, 1), "sub": slice(1, 4)}
START = frozenset({"start"})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model of 32 tokens as somebody published it, and the folder it lies in."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": SHORT}}
    preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    model = open_clip.CLIP(**config)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {**preprocess, "size": 24}})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model.eval(), str(folder)


def batch_of(longest):
    """Noise with captions of up to `longest` tokens, each from start to end token."""
    batch = made_up()
    lengths_BK = batch.lengths_BK.clone()
    lengths_BK[0] = longest
    tokens = [t for n in lengths_BK.ravel().tolist() if n for t in (49406, *range(500, 500 + n - 2), 49407)]
    return batch._replace(
        tokens_T=torch.tensor(tokens, dtype=torch.int32), lengths_BK=lengths_BK, longest=longest
    )


def as_published(model, batch):
    """Every caption as open_clip pads and cuts it to the model's own context."""
    rows, start = [], 0
    for length in batch.lengths_BK.ravel().tolist():
        ids = batch.tokens_T[start : start + length].tolist()
        start += length
        if length:
            ids = ids if length <= SHORT else [*ids[: SHORT - 1], 49407]
            rows.append(ids + [0] * (SHORT - len(ids)))
    return F.normalize(model.encode_text(torch.tensor(rows)), dim=-1)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 0),
        ({"freeze_positions": True}, 0),
        ({"attention_temperature": 0.5}, 0),
        ({"attention_temperature": 0.5}, 4),
    ],
    ids=str,
)
def test_it_answers_as_published_before_and_after_training(published, options, rank):
    model, folder = published
    tower = DualTower(build(None, f"local-dir:{folder}", LONG, **options), lora=Lora(rank))
    assert tower.context_length == LONG
    tower.check_needs(START)
    batch = batch_of(longest=60)
    wanted = as_published(model, batch)
    for _ in range(2):
        found = tower(batch, SLOTS, START)
        got = found.start.text_BKE[found.mask_BK]
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)
        assert not found.start.text_BKE.requires_grad
        optimizer = AdamW(lr=1e-2, warmup=0, samples=10).build(tower)
        (found.image_BE.sum() + found.text_BKE.square().sum() + found.text_BKE.sum()).backward()
        optimizer.step()
    moved = tower(batch, SLOTS, START).text_BKE[found.mask_BK]
    assert (moved - wanted).abs().max() > 1e-2


def test_it_is_neither_trained_nor_saved(published):
    tower = DualTower(build(None, f"local-dir:{published[1]}", LONG))
    before = set(tower.state_dict()), len(list(tower.parameters()))
    tower.check_needs(START)
    assert (set(tower.state_dict()), len(list(tower.parameters()))) == before
    assert not any(p.requires_grad for p in tower.start[0].parameters())


def test_chunks_of_it_are_those_of_the_whole(published):
    tower = DualTower(build(None, f"local-dir:{published[1]}", LONG)).double()
    tower.check_needs(START)
    batch = batch_of(longest=60)
    whole, parts = (tower(batch, SLOTS, START, size).start for size in (None, 3))
    torch.testing.assert_close(parts.text_BKE, whole.text_BKE, atol=1e-7, rtol=0)
    torch.testing.assert_close(parts.image_BE, whole.image_BE, atol=1e-7, rtol=0)


def test_it_reads_the_captions_of_terms_that_ask_for_it_alone(published, monkeypatch):
    tower, batch = DualTower(build(None, f"local-dir:{published[1]}", LONG)), batch_of(longest=60)
    tower.check_needs(START)
    whole = tower(batch, SLOTS, START)
    terms = {"long": Contrastive("long"), "kept": Anchored("sub")}
    module = LongClip(tower, terms, SLOTS, AdamW(lr=1e-3, warmup=0, samples=10), seed=0)
    read, encode = [], tower.start[0].encode_text
    monkeypatch.setattr(
        tower.start[0], "encode_text", lambda tokens_T, n_S: read.append(n_S) or encode(tokens_T, n_S)
    )
    found = tower(batch, SLOTS, module.needs)
    wanted = batch.lengths_BK[:, SLOTS["sub"]].clamp(max=SHORT)
    assert [n_S.tolist() for n_S in read] == [wanted[wanted > 0].tolist()]
    torch.testing.assert_close(found.start.text("sub"), whole.start.text("sub"), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text_BKE, whole.text_BKE, atol=0, rtol=0)
    assert not found.start.text("long").any()


def test_random_weights_to_hold_on_to_are_told(tiny, published, caplog):
    DualTower(build(None, f"local-dir:{published[1]}", LONG), Freeze(image=True)).check_needs(START)
    with torch.device("meta"):
        DualTower(build(tiny, None, LONG), Freeze(image=True)).check_needs(START)
    assert not caplog.messages
    DualTower(build(tiny, None, LONG), Freeze(image=True)).check_needs(START)
    assert [("random" in said) for said in caplog.messages] == [True, True]


def test_captions_that_no_term_reads_are_told(published, caplog):
    tower = DualTower(build(None, f"local-dir:{published[1]}", LONG))
    LongClip(tower, {"long": Contrastive("long")}, SLOTS, AdamW(lr=1e-3, warmup=0, samples=10), seed=0)
    assert "no term reads the caption group 'sub': ~recipe.captions.sub" in caplog.text


@pytest.mark.parametrize("context", [10, 29, 200])
def test_cutting_is_packing_at_a_shorter_context(context):
    long, short = (Tokenizer(open_clip.get_tokenizer("ViT-B-16"), length) for length in (248, context))
    random = np.random.default_rng(0)
    texts = [
        [Text(long.ids(" ".join(["word"] * int(n)))) if n else None for n in row]
        for row in random.integers(0, 60, (5, 4))
    ]
    packed, wanted = pack(texts, long), pack(texts, short)
    batch = made_up(images=5)._replace(tokens_T=packed.tokens_T, lengths_BK=packed.lengths_BK)
    (part,) = chunks(batch, None)
    got = cut(part, short)
    assert torch.equal(got.tokens_T, wanted.tokens_T)
    assert np.array_equal(got.lengths_BK, wanted.lengths_BK.numpy())
    assert (got is part) == (context == 200)
