"""A small real tokenizer."""

import pytest

from qwen3_lit.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat, 1 + 2 = 3"] * 20, 290, folder)
    return str(folder)
