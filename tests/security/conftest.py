"""`marker` is a file that an attack would make: it must never exist."""

import pytest

from longclip.data.scenes import default_tokenizer


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the attack ran"


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()
