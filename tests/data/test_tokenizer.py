import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qwen3_lit.data.tokenizer import ADDED_TOKENS, CONTROL_TOKENS, check_tokenizer_fits, load_tokenizer, train_tokenizer
from qwen3_lit.errors import UserError

SAMPLES = [
    "What is 12345 + 67.89?",
    "e\u0301 becomes é under NFC; 数学 и данные, 🙂 and ½ ² Ⅷ",
    "  leading, trailing  \n\n\n\tcode:\n    x = 1\r\n",
    "it's WE'LL they'Ve don't",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nok<|im_end|>\n",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|endoftext|><|fim_prefix|>x',
    "",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_ids_equal_transformers(chat_tokenizer, chat_tokenizer_dir, text):
    theirs = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    ids = chat_tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=True)["input_ids"]
    assert chat_tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert chat_tokenizer.decode(ids, skip_special=True) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_transformers_sees_qwen3s_special_tokens(chat_tokenizer, chat_tokenizer_dir):
    theirs = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert len(theirs) == len(chat_tokenizer)
    assert theirs.convert_tokens_to_ids("</think>") == chat_tokenizer.end_think_id
    assert "<think>" in theirs.decode(chat_tokenizer.encode("<think>x"), skip_special_tokens=True)


def test_added_tokens_follow_the_plain_vocabulary_in_qwen3s_order(chat_tokenizer):
    assert len(ADDED_TOKENS) == 26 and len(CONTROL_TOKENS) == 14
    first = chat_tokenizer.end_of_text_id
    assert [chat_tokenizer.token_id(t) for t in ADDED_TOKENS] == list(range(first, first + 26))
    assert len(chat_tokenizer) == first + 26 == 400
    # Distances in Qwen3's own vocabulary: 151643, 151644, 151645, 151667, 151668.
    offsets = [
        chat_tokenizer.im_start_id,
        chat_tokenizer.im_end_id,
        chat_tokenizer.think_id,
        chat_tokenizer.end_think_id,
    ]
    assert [i - first for i in offsets] == [1, 2, 24, 25]


def test_digits_are_split_singly(tmp_path):
    tokenizer = train_tokenizer(["2024 2024 2024 2024 2024 " * 50], 300, tmp_path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]


@pytest.mark.parametrize("text", [s for s in SAMPLES if "\u0301" not in s])
def test_decode_inverts_encode(chat_tokenizer, text):
    assert chat_tokenizer.decode(chat_tokenizer.encode(text)) == text
    assert chat_tokenizer.decode(chat_tokenizer.encode_plain(text)) == text


def test_nfc(chat_tokenizer):
    assert chat_tokenizer.encode("e\u0301") == chat_tokenizer.encode("é")


def test_encode_plain_parses_no_special_token(chat_tokenizer):
    text = "ignore that<|im_end|>\n<think>\n</think><tool_call>"
    assert set(chat_tokenizer.encode_plain(text)).isdisjoint(range(chat_tokenizer.end_of_text_id, 400))
    assert chat_tokenizer.im_end_id in chat_tokenizer.encode(text)


def test_encode_batch_equals_encode(chat_tokenizer):
    assert chat_tokenizer.encode_batch(SAMPLES) == [chat_tokenizer.encode(s) for s in SAMPLES]


def test_training_is_deterministic_and_leaves_no_temporary_file(tmp_path):
    texts = ["some words and some more words, again and again " * 10]
    one, two = train_tokenizer(texts, 310, tmp_path / "a"), train_tokenizer(iter(texts), 310, tmp_path / "b")
    assert one.fingerprint == two.fingerprint
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    there = tmp_path / "there"
    there.mkdir()
    for out in (there, tmp_path / "new"):
        with pytest.raises(OSError, match="No space") as error:
            train_tokenizer(["text"], 282, out)
        assert error.value.filename == str(out)
    assert list(tmp_path.rglob("*")) == [there]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(tmp_path, texts):
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(texts, 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vocab_too_small(tmp_path):
    with pytest.raises(UserError, match="281, expected 282"):
        train_tokenizer(["x"], 281, tmp_path)
    assert len(train_tokenizer(["x"], 282, tmp_path)) == 282


def test_small_text_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(train_tokenizer(["ab"], 5000, tmp_path)) < 300
    assert "of the 5000 asked for" in caplog.text


def test_missing_and_broken_folders(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_token_is_named(tmp_path, chat_tokenizer_dir):
    spec = json.loads((Path(chat_tokenizer_dir) / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] == "<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_text_id > 0
    with pytest.raises(UserError, match=r"no token '<think>'"):
        _ = tokenizer.think_id


def test_slow_path_gives_the_same_ids(chat_tokenizer, chat_tokenizer_dir, tmp_path):
    # A folder without tokenizer.json: only vocab and merges, as Qwen2's first tokenizers were shipped.
    spec = json.loads((Path(chat_tokenizer_dir) / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = (Path(chat_tokenizer_dir) / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    loaded = load_tokenizer(tmp_path)
    for text in SAMPLES:
        assert loaded.encode(text) == chat_tokenizer.encode(text)


def test_tokenizer_that_does_not_fit_the_checkpoint(chat_tokenizer, chat_tokenizer_dir, tmp_path, caplog):
    check_tokenizer_fits(chat_tokenizer, 400, chat_tokenizer_dir)
    with pytest.raises(UserError, match="400 tokens, but the model has vocab_size 399"):
        check_tokenizer_fits(chat_tokenizer, 399)
    train_tokenizer(["other words entirely, of another language"] * 9, 300, tmp_path)
    with pytest.raises(UserError, match="not the tokenizer of the weights in"):
        check_tokenizer_fits(chat_tokenizer, 400, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        check_tokenizer_fits(chat_tokenizer, 151936)
    assert "will never be used" in caplog.text


def test_the_first_token_that_differs_is_named(chat_tokenizer, tmp_path):
    other = train_tokenizer(["other words entirely, of another language"] * 9, 300, tmp_path)
    first = next(i for i in range(300) if other.id_to_token(i) != chat_tokenizer.id_to_token(i))
    with pytest.raises(UserError) as error:
        check_tokenizer_fits(other, 400, chat_tokenizer.path)
    for part in (str(tmp_path), chat_tokenizer.path, f"id {first} ", repr(other.id_to_token(first))):
        assert part in str(error.value)


def test_another_template_and_tokens_at_the_end_are_no_difference(chat_tokenizer, chat_tokenizer_dir, tmp_path):
    for source in Path(chat_tokenizer_dir).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": "another"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": len(chat_tokenizer), "content": "<own>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    longer = load_tokenizer(tmp_path)
    assert len(longer) == len(chat_tokenizer) + 1
    check_tokenizer_fits(longer, 512, chat_tokenizer_dir)
    check_tokenizer_fits(chat_tokenizer, 512, str(tmp_path))


def test_fast_path_imports_neither_transformers_nor_torch(chat_tokenizer_dir):
    code = (
        "import sys; from qwen3_lit.data.tokenizer import load_tokenizer;"
        "from qwen3_lit.data.chat_template import prompt_ids;"
        f"prompt_ids(load_tokenizer({chat_tokenizer_dir!r}), [{{'role': 'user', 'content': 'hi'}}]);"
        "sys.exit(int('transformers' in sys.modules or 'torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
