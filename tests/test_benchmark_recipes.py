"""Recipes side by side: which runs are made, how they are told, and photos composed for them."""

import io
import json
import math
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import documents, finetuning, gains, mosaics, recipe_costs, recipes, side_by_side, trainings
from benchmarks.recipe_costs import Cost
from benchmarks.trainings import Job, cell
from longclip import callbacks
from longclip.data.scenes import default_tokenizer
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.types import Caption, Record, Sentence, UserError

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("red", "green", "blue", "white", "black")
RGB = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255,) * 3, "black": (0,) * 3}
LONG = Cost(images=64, image=600.0, text=300.0, loss=100.0, kept=1000.0, heads=0, tokens=100.0)
DEAR = LONG._replace(loss=600.0, heads=20_000, kept=2000.0)


def judged(run, samples, **numbers):
    run.mkdir(parents=True)
    (run / "judgements.jsonl").write_text(json.dumps({"samples_seen": samples, **numbers}) + "\n")


def photo(colour):
    encoded = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(encoded, "PNG")
    texts = [f"A {colour} wall.", f"somebody painted it {colour}"]
    captions = tuple(Caption("human", text, (Sentence(0, len(text), ()),)) for text in texts)
    return Record(colour, encoded.getvalue(), "png", captions)


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "dev"):
        shards.write([photo(colour) for colour in COLOURS], tmp_path / "photos" / split)
    return tmp_path / "photos"


def test_a_dearer_recipe_affords_fewer_images_in_whole_batches():
    assert recipes.affordable(LONG.each, DEAR.each, 14_400) == 9_600
    assert recipes.affordable(LONG.each, LONG._replace(loss=110.0).each, 14_400) == 14_400, "within 15 %"
    assert recipes.affordable(LONG.each, LONG._replace(images=128).each, 14_400) == 28_800, "an image counts"


def test_only_recipes_of_another_cost_are_trained_at_equal_flops(tmp_path):
    options = Namespace(runs=tmp_path, samples=6_400, data="d", overrides=["a=b"])
    variants = {"long": ["recipe=long"], "flair, x": ["recipe=flair"]}
    costs = {"long": LONG, "flair, x": DEAR}
    (equal, *_), (paid,) = (
        list(recipes.at_equal_steps(variants, 1, options)),
        list(recipes.at_equal_flops(variants, costs, 1, options)),
    )
    assert (equal.run.name, equal.samples) == ("long-seed1", 6_400)
    assert (paid.run.name, paid.samples) == ("flair-x-flops-seed1", 4_256)
    assert {"recipe=flair", "data.root=d", "a=b"} <= set(paid.overrides)


def test_a_cell_is_the_mean_over_seeds_of_the_mean_of_its_numbers():
    seeds = {0: {"a": 10.0, "b": 20.0}, 1: {"a": 30.0, "b": 40.0}}
    assert cell(seeds, ("a", "b")) == "25.0 (15.0 to 35.0)"
    assert cell({0: seeds[0]}, "b") == "20.0"
    assert cell(seeds, ("a", "b"), {"a": 20.0, "b": 20.0}) == "+5.0 (-5.0 to +15.0)"
    assert cell(seeds, "c") == "-"
    assert trainings.means({**seeds, 2: {"a": 1.0}}, ("a", "b")) == [15.0, 35.0], "one that has not both"


def test_finished_runs_are_left_alone_and_a_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    judged(tmp_path / "done", 640, r1=1.0)
    judged(tmp_path / "begun", 64, r1=0.5)
    started = []

    def start(command, **_):
        started.append(next(word for word in command if word.startswith("name=")))
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", start)
    jobs = [Job(name, 0, tmp_path / name, [], 640) for name in ("begun", "done")]
    assert trainings.run_all(jobs, at_once=1) == {"done": {0: {"samples_seen": 640, "r1": 1.0}}}
    assert started == ["name=begun"]
    assert f"{tmp_path / 'begun'} failed" in capsys.readouterr().out


def test_a_recipe_that_reads_a_side_car_takes_part_where_it_has_one(capsys):
    variants = {name: [f"recipe={name}"] for name in ("long", "mobileclip2", "mcl")}
    assert trainings.equipped(variants, [], []) == {"long": ["recipe=long"]}
    assert "mobileclip2 is left out" in (said := capsys.readouterr().out)
    assert "mcl is left out: it reads cluster" in said
    found = trainings.equipped(variants, ["mobileclip2=stores/teacher"], ["mobileclip2:optim.lr=1", "x:a=2"])
    store = "data.sidecar.stores=[stores/teacher]"
    assert found["mobileclip2"] == ["recipe=mobileclip2", store, "optim.lr=1"]
    assert found["long"] == ["recipe=long"]


def test_the_table_ranks_recipes_by_whole_captions_and_tells_equal_flops():
    def numbers(r1):
        lengths = {f"scenes/length/{n}/{w}_r1": r1 * n / 248 for n in (20, 40, 248) for w in ("i2t", "t2i")}
        return {"scenes/long/i2t_r1": r1, "scenes/long/t2i_r1": r1, "scenes/pointing/chance": 18.6, **lengths}

    found = {"long": {0: numbers(10.0)}, "flair": {0: numbers(20.0)}}
    text = recipes.markdown(
        found, {"flair": {0: numbers(8.0)}}, {"long": 640, "flair": 384}, {"long": LONG, "flair": DEAR}
    )
    first, second = [line.split(" | ") for line in text.splitlines()[2:4]]
    assert first[:3] == ["| flair", "20.0", "20.0"]
    assert first[-2:] == ["384", "8.0 |"]
    assert second[-1] == "10.0 |", "at equal steps is at equal FLOPs for long"
    without = recipes.markdown(found, {}, {"long": 640, "flair": 384}, {"long": LONG, "flair": DEAR})
    assert without.splitlines()[2].endswith("| 384 | - |"), "not run is not what it is at equal steps"
    assert first[-4] == "236", "95 % of the way up a straight line"


def test_one_recipe_alone_is_told_beside_long(tmp_path, monkeypatch, capsys):
    lengths = {f"scenes/length/{n}/{way}_r1": 5.0 for n in (20, 248) for way in ("i2t", "t2i")}
    for name, r1 in {"long": 10.0, "hn": 20.0}.items():
        numbers = {"scenes/long/i2t_r1": r1, "scenes/long/t2i_r1": r1, **lengths}
        judged(tmp_path / "runs" / f"{name}-seed0", 7_200, **numbers)
    (marks := tmp_path / "marks.md").write_text("<!-- scenes: made by this -->\n<!-- /scenes -->\n")
    monkeypatch.setattr(recipes, "cost", lambda *_, **__: LONG)
    places = ["--runs", tmp_path / "runs", "--out", tmp_path, "--markdown", marks]
    monkeypatch.setattr(
        "sys.argv", ["recipes", "--recipes", "hn", "--seeds", "0", "--report", *map(str, places)]
    )
    recipes.main()
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["| hn", "20.0"],
        ["| long", "10.0"],
    ]


@pytest.mark.parametrize(("start", "judged"), [(True, [0, 64]), (False, [64])])
def test_runs_from_one_start_need_not_judge_it_each(start, judged, tmp_path, monkeypatch):
    judge, found = callbacks.Judge(str(tmp_path), {}, every=64, start=start), []

    def note(_, module):
        found.append(module.samples_seen)
        judge.judged_at = module.samples_seen

    monkeypatch.setattr(judge, "_judge", note)
    module = Namespace(samples_seen=0)
    judge.on_train_start(None, module)
    for module.samples_seen in (32, 64, 96):
        judge.on_train_batch_end(None, module)
    assert found == judged


def test_costs_are_told_as_multiples_of_long():
    text = recipe_costs.markdown(
        {"long": LONG, "flair": DEAR}, Namespace(batch=256, world=4, model="vit_b16")
    )
    assert "| flair | 1.50 | 0.60 | 0.30 | 0.60 | 2.00 | 0.02 M | 100 |" in text
    assert "| long | 1.00 | 0.60 | 0.30 | 0.10 | 1.00 | 0 | 100 |" in text


def test_a_step_of_sub_captions_and_groups_costs_more_than_one_of_whole_captions():
    long, dreamlip = (recipe_costs.cost([f"recipe={name}", "batch_size=8"]) for name in ("long", "dreamlip"))
    assert 1.05 < dreamlip.flops / long.flops < 2
    assert dreamlip.text > long.text
    assert dreamlip.kept > long.kept
    assert (long.images, long.heads) == (8, 0)
    assert dreamlip.heads > 0


def test_fine_tuning_is_told_as_points_above_the_start(tmp_path):
    def numbers(long, brief):
        names = {"scenes/long/": long, "scenes/length/40/": brief, "scenes/length/248/": long}
        return {f"{name}{way}_r1": value for name, value in names.items() for way in ("i2t", "t2i")}

    told = gains.Told(
        numbers(10.0, 30.0),
        {"long": {0: numbers(40.0, 20.0), 1: numbers(50.0, 24.0)}, "robust": {0: numbers(60.0, 30.0)}},
        {"long": {"0.25": numbers(15.0, 31.0), "0.5": numbers(30.0, 32.0)}},
        {"robust": {0: numbers(55.0, 30.0)}},
        {"long": 1.0, "robust": 1.6},
    )
    start, robust, long = gains.markdown("scenes", told).splitlines()[2:5]
    assert start.startswith("| the start | 10.0 | 30.0 | - |")
    assert robust.startswith("| robust | +50.0 | +0.0 |")
    assert long.startswith("| long | +35.0 (+30.0 to +40.0) | -8.0 (-10.0 to -6.0) |")
    assert long.endswith("| +20.0 | +2.0 | 1.00 | - |")
    assert robust.endswith("| 1.60 | +45.0 |")
    gains.plot("scenes", told, tmp_path / "way.png")
    assert (tmp_path / "way.png").stat().st_size > 1000


def test_a_recipe_that_has_no_mean_with_the_start_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def judge(job, *_):
        if job.variant == "clipmoe":
            raise UserError("different networks")
        return {"0.5": {"r1": 1.0}}

    monkeypatch.setattr(finetuning, "_judged", judge)
    jobs = [Job(name, 0, tmp_path / name, [], 64) for name in ("clipmoe", "long", "late")]
    for job in jobs[:2]:
        judged(job.run, 64)
    setting = finetuning.Setting("scenes", tmp_path, [], [], [])
    for wanted in (["clipmoe", "long", "late"], []):
        found = finetuning._between(jobs, setting, wanted)
        assert found == {"long": {"0.5": {"r1": 1.0}}}, "finished ones, and what was kept"
    assert capsys.readouterr().out.count("clipmoe: nothing between") == 1


def test_a_recipe_of_two_runs_has_half_of_the_images_in_each(monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetuning", "--seeds", "3", "--samples", "640"])
    options = finetuning._options()
    assert "robust" in options.flops
    assert "long" not in options.flops
    setting = finetuning._setting(options)
    variants = {name: [f"recipe={name}"] for name in ("long", "tulip")}
    long, second = finetuning._jobs(variants, dict.fromkeys(variants, 640), setting, options)
    first = second.first
    assert (long.first, long.samples, first.samples, second.samples) == (None, 640, 320, 320)
    assert first.run.name == "tulip-seed3-first"
    assert f"model.backbone.name={first.run}" in second.overrides
    assert {"recipe=tulip", "optim.warmup=32", *setting.start} <= set(first.overrides)
    assert "recipe=tulip" not in second.overrides
    assert not set(setting.start) & set(second.overrides)
    order = []
    monkeypatch.setattr(trainings, "train", lambda run, *_: order.append(run))
    trainings.run_all([second], 1)
    assert order == [first.run, second.run]


def test_every_sentence_of_a_mosaic_is_about_its_quadrant(photos):
    (record,) = mosaics.compose(Dataset(photos / "train"), "0/train", 1, 2, 40, default_tokenizer())
    picture = Image.open(io.BytesIO(record.image))
    assert picture.size == (40, 40)
    (caption,) = record.captions
    assert len(caption.sentences) == 8
    for sentence in caption.sentences:
        text = caption.text[sentence.start : sentence.end]
        left, top, right, bottom = sentence.box
        middle = picture.getpixel((int(20 * (left + right)), int(20 * (top + bottom))))
        nearest = min(COLOURS, key=lambda name: math.dist(middle, RGB[name]))
        assert nearest in text, "what is said is seen where it is said to be"
        assert text.endswith(".")
        assert len(sentence.ids) > 2
    assert len({sentence.box for sentence in caption.sentences}) == 4


def test_mosaics_depend_on_seed_and_number_alone(photos):
    def made(seed, count):
        return list(mosaics.compose(Dataset(photos / "train"), seed, count, 1, 40, default_tokenizer()))

    assert made("0/train", 3)[:2] == made("0/train", 2)
    assert [r.captions for r in made("0/train", 4)] != [r.captions for r in made("1/train", 4)]


def test_beside_mosaics_lie_the_photos_that_they_are_judged_on(photos, tmp_path, monkeypatch):
    command = f"mosaics {photos} --out {tmp_path / 'out'} --train 2 --heldout 1 --size 40"
    monkeypatch.setattr("sys.argv", command.split())
    mosaics.main()
    made = {split: Dataset(tmp_path / "out" / split) for split in ("train", "heldout", "photos")}
    assert [len(data) for data in made.values()] == [2, 1, len(COLOURS)]
    assert made["photos"].record(1) == Dataset(photos / "dev").record(1)


def test_recipes_are_drawn_best_first_with_and_without_runs_at_equal_flops(tmp_path):
    found = {"low": {0: {"a": 1.0, "b": 3.0}}, "high": {0: {"a": 5.0, "b": 5.0}, 1: {"a": 9.0, "b": 9.0}}}
    assert side_by_side.ranked(found, ("a", "b")) == ["high", "low"]
    side_by_side.plot(found, {"low": {0: {"a": 2.0}}}, {"A": ("a",), "C": ("c",)}, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as drawn:
        assert min(drawn.size) > 100


def test_only_mosaics_have_photos_to_forget():
    start = {"scenes/long/i2t_r1": 1.0, "scenes/long/t2i_r1": 1.0}
    assert "photos" not in gains.columns("scenes")
    assert "Photos" not in gains.markdown("scenes", gains.Told(start, {}, {}, {}, {}))
    told = gains.markdown("mosaics", gains.Told({}, {}, {}, {}, {}))
    assert "| photos |" in told
    assert "R@10 in %" in told


def test_recipes_that_need_weights_are_not_begun_from_random_ones():
    beginners = recipes.beginners()
    assert {"long", "flair", "mobileclip2"} <= set(beginners)
    assert not {"lit", "lora", "longpo", "robust", "tulip", "clipmoe", "captions"} & set(beginners)


def test_too_few_photos_make_no_mosaic(tmp_path):
    shards.write([photo("red"), photo("blue")], tmp_path / "few")
    with pytest.raises(UserError, match="holds 2 photos"):
        next(mosaics.compose(Dataset(tmp_path / "few"), "0", 1, 1, 40, default_tokenizer()))


def test_pages_have_marks_for_every_table():
    documents.read(ROOT / "docs" / "recipes.md", "costs")
    for name in ("scenes", "finetuning-scenes", "finetuning-mosaics"):
        documents.read(ROOT / "docs" / "results.md", name)


def test_sentences_of_photos_end_with_one_stop():
    assert mosaics._sentence("A dog runs .") == "A dog runs."
    assert mosaics._sentence("Is it a dog?") == "Is it a dog?"
