"""Fixtures of several tests of the data path."""

from pathlib import Path

import open_clip
import pytest
from waves import make

from longclip.tokens import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make(tmp_path_factory.mktemp("data"), tokenizer)
