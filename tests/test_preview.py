"""The page shows what training shows, needs nothing but itself, and runs nothing that it reads."""

import io
import json
import re
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import yaml
from pages import Page
from PIL import Image

from conf import launch
from longclip.captions import Groups, Sentences, Whole
from longclip.cli import main
from longclip.data.corpus import Corpus
from longclip.data.images import Augment, EvalTransform
from longclip.data.loading import Samples
from longclip.data.plans.plan import Plan
from longclip.data.scenes import default_tokenizer
from longclip.data.sidecars.joining import Join, Joined
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.preview import look, preview, recipe
from longclip.preview.look import Moment
from longclip.preview.page import Spelling, pads, pieces
from longclip.preview.summary import shares
from longclip.types import Caption, Record, Sentence, UserError

CONF = Path(__file__).resolve().parents[1] / "conf"
RECIPES = sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


@pytest.fixture(scope="module")
def page(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "preview.html"
    preview(str(scenes / "train"), "dreamlip", out, count=4, architecture="ViT-scenes")
    return Page(out)


def png(size=(40, 30), colour=(10, 200, 90)):
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "PNG")
    return written.getvalue()


def caption(tokenizer, *sentences, source="raw"):
    found, start = [], 0
    for sentence in sentences:
        found.append(Sentence(start, start + len(sentence), tokenizer.ids(sentence)))
        start += len(sentence) + 1
    return Caption(source, " ".join(sentences), tuple(found))


def written(folder, tokenizer, *captions, image=None):
    records = [
        Record(f"k{number}", image or png(), "png", (told,), {}) for number, told in enumerate(captions)
    ]
    shards.write(records, folder, tokenizer_hash=tokenizer.name_hash)
    return folder


def corpus(folder, tokenizer):
    return Corpus({"x": Joined(Dataset(folder, tokenizer), Join())})


def test_the_page_needs_no_network_and_no_script(page):
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base")]
    sources = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "srcset")]
    assert sources
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?:|url\(|@import", page.source)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_it_shows_every_slot_with_its_tokens_and_every_source(page, scenes):
    data = Dataset(scenes / "train")
    for index in (0, 24, 48, 72):
        record = data.record(index)
        assert record.key in page.text
        for sentence in record.captions[0].sentences:
            assert record.captions[0].text[sentence.start : sentence.end] in page.text
    assert page.text.count("tokens") > 12
    assert "scene" in page.text


def test_texts_with_a_box_are_linked_with_it_in_both_pictures(page):
    linked = [a["data-box"] for tag, a in page.tags if tag == "li" and "data-box" in a]
    boxes = [a["data-box"] for tag, a in page.tags if a.get("class", "").startswith("box")]
    assert set(linked) == set(boxes)
    assert sum(tag == "img" for tag, _ in page.tags) == 8  # judging and training, four images


def test_the_training_picture_is_the_one_that_training_decodes(scenes, tokenizer):
    data = corpus(scenes / "train", tokenizer)
    augment = Augment(scale=(0.3, 0.9), flip=0.5, jitter=0.4)
    policies = {"sub": Sentences(2)}
    wanted = recipe.Recipe("x", policies, augment, EvalTransform(24), "ViT-B-16", 248, 5, Join())

    class Chosen:
        def at(self, position):
            return 3, position  # epoch 3, that record

    groups = Groups(policies, seed=5)
    samples = Samples(data, Chosen(), groups, wanted.transform, augment, Plan(10**9, 1, seed=5))
    for index in (0, 7, 30):
        shown, trained = look.sample(data, index, wanted, groups, Moment(epoch=3)), samples[index]
        pixels_HWC = np.asarray(Image.open(io.BytesIO(shown.pictures[1].png)))
        assert torch.equal(torch.tensor(pixels_HWC).permute(2, 0, 1), trained.image_CHW)
        # Training's boxes follow its crop; the page draws every view of an image, each with its own.
        assert [slot.text.ids for slot in shown.slots] == [text.ids for text in trained.texts]


def test_boxes_follow_crops_and_flips():
    image_CHW = torch.zeros(3, 100, 200, dtype=torch.uint8)

    def boxes(transform, augment, **of_image):
        numbers = {box: name for name, box in of_image.items()}
        return look._seen(image_CHW, transform, augment, "seed", numbers)[1]

    # Of the width, the middle half is left.
    found = boxes(EvalTransform(50), None, half=(0.25, 0.0, 0.5, 1.0), away=(0.0, 0.0, 0.2, 1.0))
    assert found == {"half": pytest.approx((0, 0, 0.5, 1))}
    found = boxes(EvalTransform(50, "longest"), None, all=(0, 0, 1, 1))
    assert found == {"all": pytest.approx((0, 0.25, 1, 0.75))}
    mirror = Augment(scale=(1.0, 1.0), ratio=(2.0, 2.0), flip=1.0)
    found = boxes(EvalTransform(60), mirror, part=(0.1, 0.2, 0.4, 0.6))
    assert found == {"part": pytest.approx((0.6, 0.2, 0.9, 0.6))}


@pytest.mark.parametrize("context", [20, 77, 100, 248, 512])
@pytest.mark.parametrize("count", [1, 75, 76, 246, 247, 600])
def test_pieces_tell_for_every_token_what_it_has_passed_and_whether_it_is_seen(context, count):
    spelling = Spelling(str, 2, 0, context)
    told = [
        (token, passed, taken) for passed, taken, ids in pieces(range(count), 0, spelling) for token in ids
    ]
    # Token i is the (i + 2)nd of the model's, and the end token needs a place behind the last that is kept.
    expected = [(i, (i + 3 > 77) + (i + 3 > 248), i + 3 <= context) for i in range(count)]
    assert told == expected


def test_padding_before_a_text_is_counted_but_one_exclamation_mark_is_text():
    assert (pads((0, 0, 0, 5, 0), 0), pads((0, 5), 0), pads((5, 0, 0), 0), pads((0, 0), 0)) == (3, 0, 0, 2)


def test_what_the_model_does_not_see_is_struck_out_and_counted(tmp_path, tokenizer):
    long = caption(tokenizer, "A " + "very " * 90 + "long tale.")
    folder = written(tmp_path / "data", tokenizer, long)
    preview(str(folder), "clip", tmp_path / "p.html", architecture="ViT-scenes")
    found = Page(tmp_path / "p.html")
    tokens = len(tokenizer.ids(long.text)) + 2
    assert f"{tokens} tokens" in found.text
    assert f"{tokens - 77} cut" in found.text
    struck = found.source.split('<mark class="late"><span class="unseen">')[1].split("</span>")[0]
    assert struck.split() == ["very"] * (90 - 74) + ["long", "tale", "."]
    assert found.source.count('<span class="limit-mark">77</span>') == 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_shown(name):
    chosen = recipe.read(name)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"recipe={name}"])
    policies = launch.instantiate(config.recipe.captions)  # as train.py reads it
    assert chosen.policies == policies
    # A recipe may leave the length to the weights, as tulip does: previews then show 248.
    assert chosen.context_length == (config.model.backbone.context_length or 248)


def test_a_run_brings_its_model_seed_and_augmentation(tmp_path):
    config = {
        "seed": 7,
        "data": {"augment": {"_target_": "longclip.data.images.Augment", "scale": [0.5, 1.0], "flip": 0.5}},
        "model": {"backbone": {"architecture": "ViT-scenes", "weights": None, "context_length": None}},
        "recipe": {"captions": {"a": {"_target_": "longclip.captions.Whole", "limit": 60}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    chosen = recipe.read(str(tmp_path))
    assert chosen.policies == {"a": Whole(limit=60)}
    assert chosen.augment == Augment(scale=(0.5, 1.0), flip=0.5)
    assert (chosen.architecture, chosen.transform, chosen.seed) == ("ViT-scenes", EvalTransform(72), 7)
    assert chosen.context_length == 248
    config["data"]["augment"] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert recipe.read(str(tmp_path / "config.yaml")).augment is None


def test_numbers_are_read_as_hydra_reads_them(tmp_path):
    text = "recipe: {captions: {a: {_target_: longclip.captions.Likely, temperature: 1e-3}}}"
    (tmp_path / "r.yaml").write_text(text)
    assert recipe.read(str(tmp_path / "r.yaml")).policies["a"].temperature == 0.001


def recipe_file(folder, captions):
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"recipe": {"captions": captions}}))
    return str(path)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ({"a": {"_target_": "os.system", "command": "true"}}, ["os.system", "does not build"]),
        ({"a": {"_target_": "longclip.captions.nothing"}}, ["longclip.captions.nothing"]),
        ({"a": {"_target_": "Whole"}}, ["wants Whole", "does not build"]),
        ({"a": {"_target_": "longclip.captions.Whole", "limits": 3}}, ["limits"]),
        ({"a": {"_target_": "longclip.captions.Whole", "limit": "${seed}"}}, ["${seed}", "--cfg job"]),
        ({}, ["no caption groups"]),
        ([1], ["captions is [1]"]),
    ],
)
def test_a_recipe_that_cannot_be_shown_is_one_sentence(tmp_path, captions, words):
    with pytest.raises(UserError) as caught:
        recipe.read(recipe_file(tmp_path, captions))
    for word in words:
        assert word in str(caught.value)


def test_a_policy_of_ones_own_package_is_shown_once_the_package_is_admitted(tmp_path, monkeypatch):
    (tmp_path / "ownpolicies.py").write_text("from subprocess import Popen\nclass Last:\n    count = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = recipe_file(tmp_path, {"a": {"_target_": "ownpolicies.Last"}})
    with pytest.raises(UserError, match="LONGCLIP_TARGETS"):
        recipe.read(path)
    monkeypatch.setenv("LONGCLIP_TARGETS", "other,ownpolicies,missing")
    assert recipe.read(path).policies["a"].count == 1
    for foreign in ("ownpolicies.Popen", "missing.Last", "os.system", ""):
        with pytest.raises(UserError):
            recipe.read(recipe_file(tmp_path, {"a": {"_target_": foreign, "args": "true"}}))


def test_a_misspelt_recipe_lists_those_that_exist(tmp_path, capsys):
    assert main(["preview", str(tmp_path), "--recipe", "dreamlib"]) == 2
    printed = capsys.readouterr().err
    assert "dreamlib" in printed
    assert "dreamlip" in printed


def test_a_damaged_sample_says_why_and_the_others_are_shown(tmp_path, tokenizer):
    told = caption(tokenizer, "A field.")
    folder = written(tmp_path / "data", tokenizer, told, image=b"\x89PNG\r\n\x1a\nno picture")
    preview(str(folder), "long", tmp_path / "p.html", architecture="ViT-scenes")
    assert "image is broken" in Page(tmp_path / "p.html").text


def test_the_command_writes_the_file_and_says_so(scenes, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ["--out", str(out), "--count", "2", "--model", "ViT-scenes"]
    assert main(["preview", str(scenes / "heldout"), *arguments]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.stat().st_size > 10_000
    assert not list(tmp_path.glob("*.partial"))
    assert main(["preview", str(scenes / "heldout"), "--out", str(tmp_path / "no" / "page.html")]) == 2


def test_samples_are_spread_and_shares_are_of_what_is_longer():
    assert look.spread(range(10), 4) == [0, 2, 5, 7]
    assert look.spread([5, 6, 9], 12) == [5, 6, 9]
    assert shares([77, 78, 248, 249], 77) == 75
    assert shares([], 77) == 0


def test_lengths_are_counted_by_source_and_by_group(tmp_path, tokenizer):
    told = caption(tokenizer, "A dog runs.", "It is wet.", source="human")
    folder = written(tmp_path / "data", tokenizer, told)
    groups = Groups({"whole": Whole(), "sub": Sentences(3)}, seed=0)
    counts = look.counts(corpus(folder, tokenizer), [0], groups, Moment(), 2)
    lengths = [len(tokenizer.ids(sentence)) for sentence in ("A dog runs.", "It is wet.")]
    assert counts.sources == {"human": [sum(lengths) + 2]}
    assert counts.sentences == {"human": [2]}
    assert sorted(counts.groups["sub"]) == sorted(length + 2 for length in lengths)
    json.dumps(counts)  # plain values
