"""Published sets: each is read as it comes, by its protocol, or refused with a sentence that says why."""

import hashlib
import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from folders import BUILDERS, LONG, REJOINED, picture, save
from omegaconf import OmegaConf
from PIL import Image

from conf.launch import evaluators
from longclip.captions import All, Groups, Whole
from longclip.evaluate import PairSet, Retrieval, examine
from longclip.evaluate.sets import CLEAN
from longclip.metrics import retrieval
from longclip.types import UserError

CONF = Path(__file__).resolve().parents[2] / "conf" / "benchmark"


def described(name, root, **changes):
    """The benchmark of a YAML, on a folder of ours."""
    config = OmegaConf.create({"benchmark": OmegaConf.load(CONF / f"{name}.yaml")})
    config.benchmark.root = str(root)  # where users give it for jsonl
    for key, value in {"root": str(root), **changes}.items():
        config.benchmark[name][key] = value
    return evaluators(config.benchmark)[name]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_set_is_read_by_its_protocol(name, tmp_path):
    expected = BUILDERS[name](tmp_path)
    counts = {"images": len(expected), "texts": sum(map(len, expected.values()))}
    found = described(name, tmp_path, expected=counts)
    assert {pair.key: [text for _, text in pair.texts] for pair in found.pairs} == expected
    assert all(Path(pair.image.path).is_file() for pair in found.pairs)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_missing_set_shows_the_tree_that_is_expected(name, tmp_path):
    for root in (tmp_path / "nowhere", tmp_path):
        found = described(name, root)
        with pytest.raises(UserError, match="Expected in it:\n") as refused:
            _ = found.pairs
        assert found.tree.splitlines()[0] in str(refused.value)
        assert str(root) in str(refused.value)


def test_a_wrong_set_says_how_many_and_which(tmp_path):
    for number in range(1, 6):
        picture(tmp_path / f"image/{number}.jpg", number)
        save(
            tmp_path / f"caption/{number}.txt", "\nThe first line is empty." if number in (2, 4) else "Text."
        )
    (tmp_path / "image/5.jpg").unlink()
    counts = {"images": 5, "texts": 5}
    with pytest.raises(UserError, match="expected 5 pairs, found 2: captions 2, 4 empty, images 5 missing;"):
        _ = described("urban1k", tmp_path, expected=counts).pairs
    assert len(described("urban1k", tmp_path, expected=None).pairs) == 2


def test_missing_images_of_other_splits_are_no_concern(tmp_path):
    BUILDERS["docci"](tmp_path)
    (tmp_path / "images/test_00002.jpg").unlink()
    counts = {"images": 2, "texts": 2}
    with pytest.raises(UserError, match=r"expected 2 pairs, found 1: images test_00002 missing; get"):
        _ = described("docci", tmp_path, expected=counts).pairs


def test_as_many_images_but_other_ones_are_refused_by_their_checksum(tmp_path):
    BUILDERS["jsonl"](tmp_path)
    digest = hashlib.sha256(b"0\n1\n2").hexdigest()
    assert described("jsonl", tmp_path, expected={"images": 3, "keys": digest}).pairs
    with pytest.raises(UserError, match=f"not the same ones .SHA-256 of the sorted keys {digest}"):
        _ = described("jsonl", tmp_path, expected={"images": 3, "keys": "0" * 64}).pairs


def test_a_checksum_that_is_not_known_is_told(tmp_path, caplog):
    BUILDERS["jsonl"](tmp_path)
    digest = hashlib.sha256(b"0\n1\n2").hexdigest()
    with caplog.at_level(logging.INFO):
        _ = described("jsonl", tmp_path).pairs
    assert "3 images, 6 texts" in caplog.text
    assert f"SHA-256 of the sorted keys {digest}" in caplog.text


def test_cleanings_by_hand():
    assert CLEAN["rejoin"](LONG) == REJOINED
    assert CLEAN["rejoin"]("One.</s>Two\n\n") == "One. Two"
    assert CLEAN["first_line"]("One.\nTwo.") == "One."
    with pytest.raises(UserError, match="clean has 'upper'; choose from first_line, rejoin, lower"):
        PairSet("x", clean=["upper"])


def test_the_protocol_tells_what_was_done(tmp_path):
    assert described("urban1k", tmp_path).id == "urban1k/first_line"
    assert described("urban1k", tmp_path, clean=["first_line", "rejoin"]).id == "urban1k/first_line+rejoin"
    assert described("docci", tmp_path, resize_mode="squash").id == "docci-test/raw/squash"
    assert described("docci", tmp_path, expected=None).id == described("jsonl", tmp_path).id == ""
    ids = [described(name, tmp_path).id for name in BUILDERS if name != "jsonl"]
    assert len(set(ids)) == len(ids)


def test_a_set_is_judged_as_open_clip_would(tmp_path, tower, tiny):
    """Texts by open_clip's own tokenizer, images by its own transform, ranks by the metric."""
    BUILDERS["jsonl"](tmp_path)
    found = examine(tower, None, {"own": described("jsonl", tmp_path)})["own"]
    config = open_clip.transform.PreprocessCfg(**tower.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    tokenizer = open_clip.get_tokenizer(tiny, context_length=248)
    texts = [text for n in range(3) for text in (LONG, f"Image {n}.")]
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(tmp_path / f"images/{n}.jpg")) for n in range(3)])
        image = tower.backbone.eval().encode_image(pixels, normalize=True)
        text = tower.backbone.encode_text(tokenizer(texts), normalize=True)
    by_hand = retrieval(image, text, torch.arange(3).repeat_interleave(2))
    assert {name: found.numbers[f"captions/{name}"] for name in by_hand} == by_hand


def test_findings_tell_every_query_text_and_picture(tmp_path, tower):
    BUILDERS["jsonl"](tmp_path)
    pairs = described("jsonl", tmp_path)
    found = Retrieval(pairs, {"two": All(2), "cut": Whole(limit=4)}, batch_size=2)(tower, None)
    for name, each in found.each.items():
        assert sum(each.values) / len(each.values) == pytest.approx(found.numbers[name])
    assert found.each["two/t2i_r1"].keys == ["0#0", "0#1", "1#0", "1#1", "2#0", "2#1"]
    ranked = found.ranked["two"]
    assert (ranked.images, ranked.owners, ranked.asked) == (["0", "1", "2"], [0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert ranked.texts[3] == "image 1 ."
    assert list(found.ranked["cut"].texts) == ["a red"] * 3
    assert ranked.picture(2) == (tmp_path / "images/2.jpg").read_bytes()
    # LONG is the same text of every image: no model can tell them apart.
    assert [ranked.t2i_ranks[m] for m in (0, 2, 4)] != [1, 1, 1]
    assert all(ranked.t2i_first[m] != ranked.owners[m] for m in range(6))


def test_lengths_and_cuts_are_counted(tmp_path, tower):
    words = [10, 300]
    save(tmp_path / "captions.jsonl", "\n".join(
        json.dumps({"image": f"{n}.jpg", "captions": ["dog " * count]}) for n, count in enumerate(words)
    ))  # fmt: skip
    for number in range(2):
        picture(tmp_path / f"{number}.jpg", number)
    found = PairSet(str(tmp_path))(tower, None).numbers
    assert (found["long/tokens"], found["long/tokens_max"], found["long/truncated"]) == (157, 302, 50)


def test_crop_or_squash_is_a_choice(tmp_path, tower):
    BUILDERS["jsonl"](tmp_path)
    whole = Groups({"long": Whole()}, seed=0, shuffle=False)
    shown = [
        described("jsonl", tmp_path, resize_mode=mode).batches(tower, 3, whole)[0][1].pixels_BCHW
        for mode in (None, "shortest", "squash")
    ]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[1], shown[2])


def test_an_image_that_cannot_be_read_is_named(tmp_path, tower):
    BUILDERS["jsonl"](tmp_path)
    (tmp_path / "images/1.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"image of 1 \(captions.jsonl:2\) cannot be read: image is no JPEG"):
        described("jsonl", tmp_path)(tower, None)


def test_names_in_a_listing_do_not_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.jpg")
    save(tmp_path / "set/captions.jsonl", json.dumps({"image": "../secret.jpg", "captions": ["x y"]}))
    with pytest.raises(UserError, match="path leads out of the source"):
        _ = PairSet(str(tmp_path / "set")).pairs
