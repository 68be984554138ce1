"""Equal compute: what a run costs up to any share of it, and what is read off its judgements."""

import pytest

from benchmarks import vision
from benchmarks.vision import Cost, reached

FLIP = Cost([(0.0, 100.0), (0.8, 200.0)])


@pytest.mark.parametrize(("share", "flops"), [(0, 0), (0.4, 40), (0.8, 80), (0.9, 100), (1, 120)])
def test_the_cost_of_a_run_adds_up_over_its_stages(share, flops):
    assert FLIP.until(share) == pytest.approx(flops)


def test_a_cheaper_method_affords_as_many_more_images_in_whole_batches():
    whole = Cost([(0.0, 200.0)])
    images = vision._affordable(whole, FLIP, 30_720)
    assert images % 64 == 0
    assert images * FLIP.until(1) == pytest.approx(30_720 * whole.until(1), rel=64 / 30_720)
    assert vision._affordable(whole, whole, 30_720) == 30_720


def test_the_compute_to_a_level_lies_between_two_judgements():
    curve = [(0.0, 0.0), (100.0, 20.0), (200.0, 60.0), (300.0, 50.0)]
    assert reached(curve, 40) == pytest.approx(150)
    assert reached(curve, 10) == pytest.approx(50)
    assert reached(curve, 61) is None
    assert vision._at(curve, 150) == pytest.approx(40)


def test_the_table_says_what_an_image_costs_and_what_was_never_reached():
    curves = {"flip": {1: [(0.0, 0.0), (1e12, 30.0)], 0: [(0.0, 0.0), (1e12, 10.0)]}}
    text = vision.markdown(curves, {"flip": FLIP}, {"flip": 640})
    assert "| flip | 0.000 | 640 | 10.0 (15.0, 5.0) | 20.0 (30.0, 10.0) | 0.8, - | -, - | -, - |" in text
    assert "seeds 1, 0" in text


def test_real_batches_cost_less_with_half_the_patches_small_images_or_short_captions(scenes, monkeypatch):
    monkeypatch.setattr(vision, "BATCHES", 1)
    monkeypatch.setattr(vision, "MODEL", ["batch_size=4", "data.prepare=null"])
    (_, half), (_, whole) = vision.cost(vision.METHODS["flip"], scenes).stages
    assert 0.7 < half / whole < 0.9, "images are two fifths of the demo's cost"
    (_, both), (_, again) = vision.cost(vision.METHODS["clipa"], scenes).stages
    assert both < half
    assert again == pytest.approx(whole, rel=0.1), "other batches, and whole ones"
