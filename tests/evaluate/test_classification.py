"""Zero-shot classification: open_clip's classifier, counts by hand and by torchmetrics, the layouts."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from colours import Colours, paint, png
from torchmetrics.classification import MulticlassAccuracy

from longclip.evaluate import Classification
from longclip.evaluate.classification import _namesakes, classifier, places_of, templates_of
from longclip.evaluate.labelled import cifar, folders
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import UserError


def judge(root, layout="folders", folder="", **keywords):
    return Classification(str(root), layout, folder, **keywords)(Colours(), None)


@pytest.fixture
def root(tmp_path):
    paint(tmp_path / "blue", a="blue", b="red")
    paint(tmp_path / "dark_red", a="red", b="red-blue-red-red", c="green")
    paint(tmp_path / "green", a="green")
    return tmp_path


def test_numbers_are_those_counted_by_hand(root):
    found = judge(root)
    assert found.each["top1"].keys == ["blue/a.png", "blue/b.png", "dark_red/a.png", "dark_red/b.png",
                                       "dark_red/c.png", "green/a.png"]  # fmt: skip
    assert found.each["top1"].values == [100, 0, 100, 100, 0, 100]
    assert found.each["mean_per_class"].values == pytest.approx([50, 200 / 3, 100])
    assert found.numbers["top1"] == pytest.approx(400 / 6)
    assert found.numbers["chance"] == pytest.approx(100 / 3)
    assert "top5" not in found.numbers  # of three classes


def test_numbers_are_torchmetrics_ones():
    torch.manual_seed(1)
    image_NE = torch.nn.functional.normalize(torch.randn(200, 16), dim=-1)
    class_CE = torch.nn.functional.normalize(torch.randn(12, 16), dim=-1)
    label_N = torch.randint(0, 12, (200,))
    place_N = places_of(image_NE, class_CE, label_N, _namesakes([str(n) for n in range(12)]))
    for k in (1, 5):
        theirs = MulticlassAccuracy(12, top_k=k, average="micro")(image_NE @ class_CE.T, label_N)
        assert float((place_N <= k).float().mean()) == pytest.approx(float(theirs))


def test_ties_count_against_the_model_but_a_name_that_comes_twice_belongs_to_the_first():
    same_CE, label_N = torch.ones(4, 2), torch.arange(4)
    apart = places_of(torch.ones(4, 2), same_CE, label_N, _namesakes(["a", "b", "c", "d"]))
    assert apart.tolist() == [4, 4, 4, 4]
    twice = places_of(torch.ones(4, 2), same_CE, label_N, _namesakes(["a", "b", "a", "c"]))
    assert twice.tolist() == [3, 4, 4, 4]


def test_the_classifier_is_open_clips(tiny):
    backbone = build(tiny, None, 248)
    names, templates = ["tench", "great white shark", "hot dog"], open_clip.SIMPLE_IMAGENET_TEMPLATES
    with torch.no_grad():
        mine, cut = classifier(DualTower(backbone).eval(), names, templates)
        tokenizer = open_clip.get_tokenizer(tiny, context_length=248)
        theirs = open_clip.build_zero_shot_classifier(backbone.model, tokenizer, names, templates)
    assert (mine.T - theirs).abs().max() < 1e-5
    assert cut == 0


def test_a_real_model_is_judged_the_same_in_any_batches(tiny, root):
    tower = DualTower(build(tiny, None, 248)).eval()
    with torch.no_grad():
        one, all_ = (Classification(str(root), "folders", "", batch_size=n)(tower, None) for n in (1, 128))
    assert one.numbers == all_.numbers


def test_templates_are_names_or_texts_with_a_place(root):
    assert [make("cat") for make in templates_of(["a {}.", "{c}!", "{c.__class__} {}"])] == [
        "a cat.", "cat!", "{c.__class__} cat"]  # fmt: skip
    assert len(templates_of("openai")) == 80
    with pytest.raises(UserError, match="openai or simple"):
        templates_of("best")
    with pytest.raises(UserError, match="where the class name goes"):
        templates_of(["a photo"])


def test_two_layouts_of_one_set_give_the_same_numbers(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("wds")
    (other / "test").mkdir()
    files = sorted(root.rglob("*.png"))
    labels = {"blue": 0, "dark_red": 1, "green": 2}
    for shard in (0, 1):
        with tarfile.open(other / f"test/{shard}.tar", "w") as tar:
            for n, path in list(enumerate(files))[shard::2]:
                for kind, content in (
                    ("cls", str(labels[path.parent.name]).encode()),
                    ("png", path.read_bytes()),
                ):
                    member = tarfile.TarInfo(f"s{n:07d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (other / "test/nshards.txt").write_text("2\n")
    (other / "classnames.txt").write_text("blue\ndark red\ngreen\n")
    (other / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    found, plain = judge(other, "webdataset", "test"), judge(root, templates=["a {}."])
    assert found.numbers["top1"] == plain.numbers["top1"]
    assert found.each["mean_per_class"] == plain.each["mean_per_class"]
    (other / "test/nshards.txt").write_text("3\n")
    with pytest.raises(UserError, match="says 3 tars, found 2"):
        judge(other, "webdataset", "test")


def test_a_tar_without_labels_is_a_sentence(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("red\n")
    with tarfile.open(tmp_path / "test/0.tar", "w") as tar:
        member = tarfile.TarInfo("s1.png")
        member.size = len(png("red"))
        tar.addfile(member, io.BytesIO(png("red")))
    with pytest.raises(UserError, match=r"s1 has only \.png, and needs a picture and \.cls"):
        judge(tmp_path, "webdataset", "test")


@pytest.mark.parametrize(("folder", "file", "meta", "ahead"), [
    ("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", b""),
    ("cifar-100-binary", "test.bin", "fine_label_names.txt", b"\x07"),  # the coarse label
])  # fmt: skip
def test_cifars_binary_files_are_read_as_documented(tmp_path, folder, file, meta, ahead):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    (tmp_path / folder).mkdir()
    records = [ahead + bytes([label]) + own.tobytes() for label, own in zip((2, 0, 1), pixels, strict=True)]
    (tmp_path / folder / file).write_bytes(b"".join(records))
    (tmp_path / folder / meta).write_text("airplane\nlawn_mower\nbird\n\n")
    found = cifar(str(tmp_path), "")
    assert [item.label for item in found.items] == [2, 0, 1]
    assert found.names == ["airplane", "lawn mower", "bird"]
    assert all(
        torch.equal(item.load(), torch.from_numpy(own)) for item, own in zip(found.items, pixels, strict=True)
    )
    (tmp_path / folder / file).write_bytes(b"".join(records)[:-1])
    with pytest.raises(UserError, match="download it again"):
        cifar(str(tmp_path), "")


class Run:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_cifar_is_refused_and_never_opened(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(Run(tmp_path / "ran")))
    with pytest.raises(UserError, match="which are pickles and never opened"):
        judge(tmp_path, "cifar")
    assert not (tmp_path / "ran").exists()


def test_folders_that_are_numbers_are_labels(tmp_path):
    for label in range(11):
        paint(tmp_path / "val" / str(label), a="red")
    (tmp_path / "classnames.txt").write_text("".join(f"name {label}\n" for label in range(11)))
    found = folders(str(tmp_path), "val")
    assert {item.key: item.label for item in found.items} == {f"{n}/a.png": n for n in range(11)}
    assert found.names[10] == "name 10"


def test_names_that_are_not_as_many_as_the_folders_are_refused(root):
    (root / "classnames.txt").write_text("ant\nbird\ncat\n")
    assert folders(str(root), "").names == ["ant", "bird", "cat"]
    (root / "classnames.txt").write_text("ant\nbird\ncat\ndog\n")
    with pytest.raises(UserError, match=r"classnames\.txt has 4 lines, and .* has 3 class folders"):
        folders(str(root), "")


def test_a_set_that_is_not_whole_is_a_sentence_and_has_no_protocol(root):
    with pytest.raises(UserError, match="expected 7 pictures, found 6; get the set again"):
        judge(root, expected=7)
    assert judge(root, protocol="mine", expected=6).protocol == "mine"
    assert judge(root, protocol="mine", expected=6, resize_mode="squash").protocol == "mine/squash"
    assert judge(root, protocol="mine").protocol == ""
    digest = hashlib.sha256("\n".join(sorted(judge(root).each["top1"].keys)).encode()).hexdigest()
    assert judge(root, protocol="mine", expected=6, keys=digest).protocol == "mine"
    with pytest.raises(
        UserError, match=f"as many as expected, but not the same ones .* {digest}, expected 0"
    ):
        judge(root, protocol="mine", expected=6, keys="0" * 64)
    with pytest.raises(UserError, match="expected 1000 classes, as many as there are names, found 3"):
        judge(root, names="imagenet")


def test_a_picture_that_cannot_be_decoded_is_named(root):
    (root / "blue" / "c.png").write_bytes(png("red")[:40])
    with pytest.raises(UserError, match=r"blue/c\.png: image cannot be decoded"):
        judge(root)
