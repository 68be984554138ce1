"""The report shows what was found, needs nothing but itself, and runs nothing that it reads."""

import io
import re

import pytest
import torch
from browser import Browser, needs_browser
from pages import Page
from PIL import Image

from eval import results
from eval.report import charts, examples, finish, history, page, tables
from eval.results import Facts
from longclip import gallery, runs
from longclip.captions import First, Whole
from longclip.data import images
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.evaluate import Findings, Pointing, Ranked, Retrieval, examine
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build

HOSTILE = "<script>alert(1)</script> & \"quoted\" </style> <img src='https://example.org/x.png'>"


def png(colour):
    written = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def tower(tiny):
    torch.manual_seed(3)
    return DualTower(build(tiny, None, 248))


@pytest.fixture(scope="module")
def found(tower, scenes):
    data = DataModule(
        root=scenes, train="train", judge=["heldout"], plan=Plan(64, 8), groups=None,
        tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg,
    )  # fmt: skip
    views = {"long": Whole(), "short": First(), "length/20": Whole(limit=20), "length/77": Whole(limit=77)}
    return examine(tower, data, {"scenes": Retrieval("heldout", views), "where": Pointing("heldout")})


@pytest.fixture(scope="module")
def run(tmp_path_factory, found):
    """A run directory with two judgements, and a loss that two starts have written."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    judged = {
        f"{name}/{number}": value for name, one in found.items() for number, value in one.numbers.items()
    }
    runs.record(folder, 0, dict.fromkeys(judged, 0.0))
    runs.record(folder, 640, judged)
    for name, rows in (("csv.1", [(64, 4.0), (128, 3.0)]), ("csv", [(128, 2.5), (192, 2.0)])):
        (folder / name).mkdir()
        lines = [
            "samples_seen,train/loss,train/long,train/long/accuracy",
            *(f"{x},{y},{y},0.5" for x, y in rows),
        ]
        (folder / name / "metrics.csv").write_text("\n".join(lines) + "\n,1.0,,\n256,4")
    return folder


@pytest.fixture(scope="module")
def report(tower, found, run):
    facts = Facts(HOSTILE, "abc123", 248, {}, {"scenes": 2.0})
    kept = results.write(run / "eval", found, facts)
    shown = gallery.galleries(tower, found, 4)
    page.write(run / "eval" / "report.html", kept, shown, page.against(kept, None, run), run)
    return run / "eval" / "report.html"


def test_it_needs_no_network_and_no_script(report):
    seen = Page(report)
    assert not [tag for tag, _ in seen.tags if tag in ("script", "link", "iframe", "object", "base", "form")]
    sources = [value for _, a in seen.tags for name, value in a.items() if name in ("src", "href", "srcset")]
    assert len(sources) > 8
    assert all(value.startswith("data:image/") for value in sources)
    assert all(address.startswith("data:image/") for address in re.findall(r"url\('(.*?)'\)", seen.source))
    (policy,) = [a["content"] for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert HOSTILE in seen.text  # as words


def test_it_shows_every_number_and_how_it_changed(report, found):
    seen = Page(report)
    assert "abc123" in seen.text
    assert "before its first step" in seen.text
    cells = [a.get("data-name") for tag, a in seen.tags if tag == "td"]
    assert cells.count("R@1") == 4  # views
    accuracy = found["where"].numbers["accuracy"]
    assert f"{tables.number(accuracy)} 0.00 {accuracy:+.1f}" in seen.text


def test_a_run_that_was_not_judged_at_its_start_has_none_to_compare_with(report, tmp_path, capsys):
    runs.record(tmp_path, 640, {"scenes/long/i2t_r1": 40.0, "scenes/long/t2i_r1": 30.0})
    assert page.against(results.load(report.parent), None, tmp_path) is None
    finish(tmp_path, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "last judgement" in said
    assert "40.0 / 30.0" in said
    assert "start" not in said
    assert "first" not in said


def test_numbers_of_as_many_queries_alone_are_held_against_the_start(report, tmp_path):
    kept = results.load(report.parent)
    now = results.flat(kept)
    queries = next(name for name in now if name.endswith("i2t_queries"))
    runs.record(tmp_path, 0, now | {queries: now[queries] + 1})
    compared = page.against(kept, None, tmp_path).deltas
    view = queries.removesuffix("queries")
    assert not [name for name in compared if name.startswith(view)]
    assert view.replace("i2t", "t2i") + "r1" in compared


def test_failures_are_the_nearest_and_the_worst_with_the_rank_of_the_truth(tower, found):
    (shown,) = gallery.galleries(tower, found, 4)
    ranked = found["scenes"].ranked["long"]
    failed = sorted(rank for rank in ranked.t2i_ranks if rank > 1)
    assert [failure.rank for failure in shown.t2i.failures] == failed[:2] + failed[-2:]
    assert shown.t2i.right == sum(rank == 1 for rank in ranked.t2i_ranks)
    for failure in shown.t2i.failures:
        m = [gallery._text(ranked, m) for m in range(len(ranked.texts))].index(failure.text)
        assert failure.key == ranked.images[ranked.owners[m]]
        assert failure.rank == ranked.t2i_ranks[m]
        assert failure.found_key == ranked.images[ranked.t2i_first[m]]
        shown_CHW = [images.decode(data) for data in (failure.picture, failure.found_picture)]
        kept_CHW = [images.decode(ranked.picture(n)) for n in (ranked.owners[m], ranked.t2i_first[m])]
        assert all(torch.equal(a, b) for a, b in zip(shown_CHW, kept_CHW, strict=True))
    for failure in shown.i2t.failures:
        q = list(ranked.asked).index(list(ranked.images).index(failure.key))
        assert failure.found_text == gallery._text(ranked, ranked.i2t_first[q])
        assert failure.found_picture is None


def test_maps_belong_to_the_picture_and_the_sentences_that_the_model_was_shown(tower, found):
    (shown,) = gallery.galleries(tower, found, 4)
    assert len(shown.pointed) >= 2
    for one in shown.pointed:
        assert len(one.sentences) == len(one.similarity) == len(one.heat_SYX)
        assert one.heat_SYX.shape[1:] == (2, 2)  # 24 px in patches of 12
        assert Image.open(io.BytesIO(one.picture)).size == (24, 24)


def test_making_a_gallery_restores_training(tower, found):
    tower.train()
    gallery.galleries(tower, found, 2)
    assert tower.training


def handmade(texts, picture):
    ranked = Ranked(["left", "right"], texts, [0, 1], [0, 1], [2, 1], [1, 0], [1, 2], [1, 0], picture)
    return {"own": Findings({"long/i2t_r1": 50.0}, "", {}, {"long": ranked})}


def test_hostile_texts_are_words_and_an_image_that_cannot_be_read_says_so(tower, tmp_path):
    found = handmade([HOSTILE, "A dog. It is wet."], lambda n: [png("red"), b"no image"][n])
    ((shown,), kept) = gallery.galleries(tower, found, 2), results.write(tmp_path, found, Facts("m", "w", 77))
    page.write(tmp_path / "p.html", kept, [shown], None, None)
    seen = Page(tmp_path / "p.html")
    assert "script" not in [tag for tag, _ in seen.tags]
    assert "(cannot be read)" in seen.text
    assert "example" in seen.text
    assert all(a["src"].startswith("data:") for tag, a in seen.tags if tag == "img")
    assert [one.key for one in shown.pointed] == ["left"]
    assert "data of one's own" in seen.text


def test_a_model_without_failures_has_none_to_show():
    assert gallery.chosen([1, 1, 1], 4) == []
    assert gallery.chosen([1, 3, 1, 2, 9], 4) == [3, 1, 4]
    assert gallery.chosen([2, 3, 4, 5, 6, 1], 3) == [0, 1, 4]


def test_words_that_only_one_text_has_are_marked():
    own, theirs = examples._told_apart("A red <dog>.", "A blue <dog>.")
    assert own == "A <mark>red</mark> &lt;dog&gt;."
    assert theirs == "A <mark>blue</mark> &lt;dog&gt;."


def test_a_later_start_replaces_what_was_lost(run):
    assert history.losses(run) == {
        "loss": [(64, 4.0), (128, 2.5), (192, 2.0)],
        "long": [(64, 4.0), (128, 2.5), (192, 2.0)],
    }


def test_judgements_become_curves_but_for_captions_cut_short(run):
    curves = history.judged(run)
    assert list(curves) == ["scenes/long", "scenes/short"]
    assert [x for x, _ in curves["scenes/long"]] == [0, 640]
    assert (
        history.run_of(str(run / "export")) == history.run_of(str(run / "checkpoints" / "step.ckpt")) == run
    )
    assert history.run_of("ViT-B-16/openai") is None


def test_a_chart_puts_points_where_they_belong():
    drawn = charts.chart({"<a>": [(0, 0), (50, 100), (100, 25)]}, charts.Axes("x", "y", mark=(77, "CLIP")))
    assert 'points="0.00 100.00 50.00 0.00 100.00 75.00"' in drawn
    assert 'class="mark before" style="left:77.00%"' in drawn
    assert "&lt;a&gt;" in drawn
    assert charts.chart({}, charts.Axes("x", "y")) == ""
    assert charts.chart({"flat": [(1, 2)]}, charts.Axes("x", "y")).count("<path") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 123456), (97.1, 98.2)])
def test_ticks_are_few_round_and_span_the_range(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low < high <= found[-1] + 1e-9
    assert 3 <= len(found) <= 8


def test_views_own_their_numbers():
    numbers = {
        "s/long/i2t_r1": 12.34,
        "s/long/t2i_r1": 5.0,
        "s/long/tokens": 80.4,
        "s/long/truncated": 3.0,
        "s/gap": 0.5,
    }
    assert tables.cells(numbers, "s/long") == ["12.3 / 5.0", "", "", "", "80", "3.0"]
    assert tables.others(numbers) == ["s/gap"]
    written = tables.markdown(numbers, {"model": "m"})
    assert "| s/long | 12.3 / 5.0 |" in written
    assert "| s/gap | 0.50 |" in written


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint_or_network(report, tmp_path, width):
    with Browser(tmp_path) as browser:
        browser.open(report.as_uri(), width=width, touch=width < 500)
        browser.settle()
        assert not browser.complaints
        assert {address.split(":")[0] for address in browser.asked} <= {"file", "data"}
        assert browser.run("document.documentElement.scrollWidth") <= width
        broken = "[...document.images].filter(i => !i.naturalWidth).length"
        assert browser.run(broken) == 0
        hot = "getComputedStyle(document.querySelector('.large .m1')).opacity"
        assert browser.run(hot) == "0"
        browser.run("document.querySelector('.linked.m1').focus()")
        browser.run("Promise.all(document.getAnimations().map(fading => fading.finished)).then(() => 0)")
        assert browser.run(hot) == "1"


def test_what_to_type_next_works_for_a_run_whose_model_no_export_can_hold(tmp_path, capsys):
    finish(tmp_path, None)
    assert " ".join(capsys.readouterr().out.split()) == f"next: python -m eval.run model={tmp_path}"
