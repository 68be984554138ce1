"""What a run says before its first step."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from longclip.banner import _chunks, source_table
from longclip.data.module import SourceReport


def test_sources_are_shown_with_what_is_kept_shown_and_joined() -> None:
    reports = [
        SourceReport("cc12m", 12_000_000, 3_600_000, 1.0, 3_600_000, 2.5, {"scores": 0.987}),
        SourceReport("docci", 9_647, 9_647, 4.0, 38_588, 10.0, {}),
    ]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(source_table(reports))
    rows = [line.split() for line in captured.get().replace("│", " ").replace("┃", " ").splitlines()]
    assert ["sources", "samples", "kept", "weight", "an", "epoch", "passes", "in", "scores"] in rows
    assert ["cc12m", "12,000,000", "3,600,000", "1", "3,600,000", "2.50", "98.7", "%"] in rows
    assert ["docci", "9,647", "9,647", "4", "38,588", "10.00", "-"] in rows


@pytest.mark.parametrize(
    ("size", "words"),
    [(None, ""), (256, ""), (32, " images in 8 chunks of 32"), (100, " images in 3 chunks of 100")],
)
def test_chunks_are_told_where_there_are_several(size, words) -> None:
    plan = SimpleNamespace(batch_size=512)
    trainer = SimpleNamespace(world_size=2, datamodule=SimpleNamespace(plan=plan))
    assert _chunks(SimpleNamespace(micro_batch=size), trainer) == words
