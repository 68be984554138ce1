"""Compositional pairs: readers of the published layouts, and what counts as right."""

import json

import pytest
import torch
from colours import Colours, paint, png
from torch.nn import functional as F

from longclip.data.images import EvalTransform, decode
from longclip.evaluate import Choices, Macro, Questions, Twins
from longclip.evaluate.questions import _other_numbers
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import UserError

ROWS = Questions(
    files={"own": "rows.jsonl"}, image="{image}.png", right=["caption"], wrong=["negatives"], kind="kind"
)


@pytest.fixture
def root(tmp_path):
    paint(tmp_path, red="red", green="green", blue="blue", both="red-green")
    return tmp_path


def ask(root, rows, questions=ROWS, **keywords):
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Choices(str(root), questions, **keywords)(Colours(), None)


def row(image, caption, *negatives, kind="any"):
    return {"image": image, "caption": caption, "negatives": list(negatives), "kind": kind}


def test_a_question_is_right_where_every_right_caption_beats_every_wrong_one(root):
    found = ask(root, [
        row("red", "a red cup", "a green cup", "a blue cup"),
        row("red", "a green cup", "a red cup"),
        row("both", ["red", "green"], "blue"),
        row("both", ["red green", "blue"], "green"),  # the second right caption does not fit
        row("both", "green", "blue", "red green"),  # the second wrong one fits better
    ])  # fmt: skip
    assert found.each["accuracy"].values == [100, 0, 100, 0, 0]
    assert found.each["accuracy"].keys == ["own/0", "own/1", "own/2", "own/3", "own/4"]
    assert found.numbers["accuracy"] == 40
    assert found.numbers["chance"] == pytest.approx(100 * (1 / 3 + 1 / 2 + 1 / 3 + 1 / 3 + 1 / 3) / 5)


def test_a_tie_counts_against_the_model(root):
    found = ask(root, [row("red", "red", "red"), row("red", "a cup", "a hat"), row("red", "red", "RED")])
    assert found.numbers["accuracy"] == 0


def test_equal_captions_tie_in_a_real_model_whatever_stands_beside_them(tiny, root):
    same = [row("red", "a cup on a table", "a cup on a table") for _ in range(3)]
    rows = [row("both", f"word {'more ' * n}", "other") for n in range(9)] + same
    (root / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    tower = DualTower(build(tiny, None, 248)).eval()
    with torch.no_grad():
        found = Choices(str(root), ROWS)(tower, None)
    assert found.each["accuracy"].values[9:] == [0, 0, 0]


def test_a_real_model_answers_as_open_clip_does_one_question_at_a_time(tiny, root):
    backbone = build(tiny, None, 248)
    tower = DualTower(backbone).eval()
    captions = ["a red cup", "green leaves in a wide field", "blue", "two hats and a red box", "nothing"]
    rows = [row(image, right, wrong) for image in ("red", "green", "both")
            for right, wrong in zip(captions, captions[1:] + captions[:1], strict=True)]  # fmt: skip
    (root / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with torch.no_grad():
        found = Choices(str(root), ROWS, batch_size=4)(tower, None)
        tokenizer, expected = __import__("open_clip").get_tokenizer(tiny, context_length=248), []
        for one in rows:
            pixels = EvalTransform(24)(decode((root / f"{one['image']}.png").read_bytes()))[None]
            image = backbone.model.encode_image(tower.normalise(pixels))
            text = backbone.model.encode_text(tokenizer([one["caption"], *one["negatives"]]))
            right, wrong = F.cosine_similarity(image.double(), text.double()).tolist()
            expected.append(100.0 * (right > wrong))
    assert found.each["accuracy"].values == expected
    assert 0 < sum(expected) < 100 * len(expected)  # else the comparison would say little


def test_kinds_have_numbers_of_their_own_or_one_mean(root):
    rows = [row("red", "red", "blue", kind="a"), row("red", "blue", "red", kind="a"),
            row("red", "red", "blue", kind="b"), row("red", "blue", "red", kind="c")]  # fmt: skip
    found = ask(root, rows)
    assert [found.numbers[f"{kind}/accuracy"] for kind in "abc"] == [50, 100, 0]
    assert found.each["b/accuracy"].keys == ["own/2"]
    assert ask(root, rows, macro=Macro()).numbers["macro_accuracy"] == 50
    assert ask(root, rows, macro=Macro(left_out=["c"])).numbers["macro_accuracy"] == 75
    assert ask(root, rows, macro=Macro(least=2)).numbers["macro_accuracy"] == 50
    with pytest.raises(UserError, match=r"set macro\.least lower"):
        ask(root, rows, macro=Macro(least=3))


def test_the_text_only_task_looks_at_no_picture(root):
    rows = [row("blue", ["red", "red red"], "green"), row("red", ["red", "green"], "red green")]
    found = ask(root, rows, text_only=True)
    assert found.each["text_only"].values == [100, 0]  # red and green are less alike than either and both
    assert found.each["accuracy"].values == [0, 0]
    with pytest.raises(UserError, match="do not have two right captions and a wrong one"):
        ask(root, [row("red", "red", "blue")], text_only=True)


def test_captions_that_the_context_cuts_are_counted(root):
    found = ask(root, [row("red", "red", "blue"), row("red", "red", "word " * 100)])
    assert found.numbers["truncated"] == 25


def test_sugarcrepes_files_are_read_as_published(tmp_path):
    paint(tmp_path / "val2017", one="red", two="blue")
    (tmp_path / "data").mkdir()
    rows = {"4": {"filename": "one.png", "caption": "red", "negative_caption": "blue"},
            "17": {"filename": "two.png", "caption": "red", "negative_caption": "blue"}}  # fmt: skip
    (tmp_path / "data/swap_obj.json").write_text(json.dumps(rows))
    questions = Questions(
        {"swap_obj": "data/swap_obj.json"}, "val2017/{filename}", ["caption"], ["negative_caption"]
    )
    found = Choices(str(tmp_path), questions, protocol="sugarcrepe", expected=2)(Colours(), None)
    assert found.each["accuracy"] == (["swap_obj/4", "swap_obj/17"], [100, 0])
    assert found.protocol == "sugarcrepe"
    (tmp_path / "val2017/two.png").unlink()
    with pytest.raises(
        UserError, match=r"expected 2 questions, found 1: swap_obj/17 \(no picture val2017/two.png\)"
    ):
        Choices(str(tmp_path), questions, expected=2)(Colours(), None)
    rest = Choices(str(tmp_path), questions, protocol="sugarcrepe")(Colours(), None)
    assert (rest.numbers["questions"], rest.protocol) == (1, "")  # a part of a set has no protocol


def test_a_listing_cannot_name_what_lies_outside(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    with pytest.raises(UserError, match="path leads out of the source"):
        ask(root, [row("../secret", "red", "blue")])


def test_aros_questions_are_about_a_part_of_the_picture(root):
    questions = Questions({"own": "rows.jsonl"}, "{image}.png", ["true_caption"], ["false_caption"],
                          kind="attributes", box=["x", "y", "w", "h"])  # fmt: skip
    case = {"image": "both", "y": 0, "w": 4, "h": 8, "attributes": ["white", "black"]}
    found = ask(root, [
        case | {"x": 0, "true_caption": "red", "false_caption": "green"},
        case | {"x": 4, "true_caption": "green", "false_caption": "red"},
        case | {"x": 4, "true_caption": "red", "false_caption": "green"},
        case | {"x": 6, "true_caption": "green", "false_caption": "red", "attributes": ["a", "b"]},  # beyond
    ], questions)  # fmt: skip
    assert found.each["accuracy"].values == [100, 100, 0, 100]
    assert found.numbers["white_black/accuracy"] == pytest.approx(200 / 3)


def test_order_is_asked_with_the_items_of_a_list(root):
    wrong = [f"caption_options[{n}]" for n in range(1, 5)]
    questions = Questions({"own": "rows.jsonl"}, "{image}.png", ["caption_options[0]"], wrong)
    found = ask(
        root, [{"image": "red", "caption_options": ["red", "blue", "green", "blue", "green"]}], questions
    )
    assert (found.numbers["accuracy"], found.numbers["chance"]) == (100, 20)


def test_counting_swaps_the_number_wherever_the_caption_has_it(root):
    assert _other_numbers("Three cups, three of them red", 3)[0] == "two cups, two of them red"
    questions = Questions({"own": "rows.jsonl"}, "{image}.png", ["text"], number="number")
    found = ask(root, [{"image": "red", "text": "two cups", "number": 2}], questions)
    assert found.numbers["chance"] == pytest.approx(100 / 9)
    assert found.numbers["accuracy"] == 0  # a model that cannot count scores all nine alike
    with pytest.raises(UserError, match="its caption does not say seven"):
        ask(root, [{"image": "red", "text": "two cups", "number": 7}], questions)


MMVP = Questions({"mmvp": "Questions.csv"}, "MLLM_VLM Images/{Type}/{Question ID}.png", ["Statement"],
                 prefix="a photo of ", kind="Type")  # fmt: skip


def twins(root, *statements):
    lines = [f"{n},{'Color' if n < 3 else 'State'},{said}" for n, said in enumerate(statements, 1)]
    (root / "Questions.csv").write_text("\n".join(["Question ID,Type,Statement", *lines]) + "\n")


def test_twins_are_right_where_both_captions_find_their_picture(root):
    folder = root / "MLLM_VLM Images"
    paint(folder / "Color", **{"1": "red", "2": "blue"})
    paint(folder / "State", **{"3": "red", "4": "red-green"})
    twins(root, "red", "blue", "red", "red")
    found = Twins(str(root), MMVP, protocol="mmvp-vlm", expected=2)(Colours(), None)
    # The fourth caption fits the third picture better; equal captions leave pictures nothing to choose.
    assert found.each["image_score"] == (["mmvp/0+mmvp/1", "mmvp/2+mmvp/3"], [100, 0])
    assert [found.numbers[name] for name in ("image_score", "text_score", "group_score")] == [50, 50, 50]
    assert found.numbers["State/image_score"] == 0
    assert found.protocol == "mmvp-vlm"


def test_both_directions_of_twins_are_told_apart(root):
    folder = root / "MLLM_VLM Images"
    paint(folder / "Color", **{"1": "red-green", "2": "red-green-green-green"})
    twins(root, "red", "green")
    found = Twins(str(root), MMVP)(Colours(), None)
    scores = [found.numbers[name] for name in ("image_score", "text_score", "group_score")]
    assert scores == [100, 0, 0]  # each caption finds its picture, but the first picture fits both alike


def test_a_picture_that_is_lost_does_not_shift_the_other_twins(root):
    folder = root / "MLLM_VLM Images"
    paint(folder / "Color", **{"1": "red"})
    paint(folder / "State", **{"3": "red", "4": "blue"})
    twins(root, "red", "blue", "red", "blue")
    found = Twins(str(root), MMVP)(Colours(), None)
    assert found.each["image_score"] == (["mmvp/2+mmvp/3"], [100])
    with pytest.raises(UserError, match="expected 4 pictures with a caption, found 3"):
        Twins(str(root), MMVP, expected=2)(Colours(), None)
