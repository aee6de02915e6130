"""A small tokenizer for all tests of the data package, trained once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_lit.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "The user asks: what is 12 plus 30? Let me think. 12 + 30 = 42, so the answer is 42.\n\nDone.\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))  # 5\n",
    "system user assistant tool thinking answer question number weather Paris Größe naïve 数学 данные\n",
]


@pytest.fixture(scope="session")
def chat_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 5, 400, folder)
    return str(folder)


@pytest.fixture(scope="session")
def chat_tokenizer(chat_tokenizer_dir: str) -> TextTokenizer:
    return load_tokenizer(chat_tokenizer_dir)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[Any]], str]:
    def write(name: str, records: list[Any]) -> str:
        path = tmp_path / name
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        path.write_text("\n".join(lines) + "\n" if lines else "", encoding="utf-8")
        return str(path)

    return write
