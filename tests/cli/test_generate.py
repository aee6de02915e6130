"""The generate verb: what is streamed, what is remembered, what is refused."""

import argparse
from pathlib import Path

import pytest
import torch

from qwen3_lit.cli import generate
from qwen3_lit.data.tokenizer import TextTokenizer, train_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.transformer import Qwen3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = ["one plus two is three", "two times two is four: 2 * 2 = 4", "größer ☃ als"] * 20
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


def make_dialog(tokenizer: TextTokenizer, **options: object) -> tuple[generate.Dialog, list[tuple[str, bool]]]:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=0,
        intermediate_size=24,
    )
    written: list[tuple[str, bool]] = []
    engine = PagedEngine.for_tokenizer(Qwen3(config), tokenizer, max_batch_size=1, max_cached_tokens=2048)
    settings = {"params": SamplingParams(max_new_tokens=150, thinking_budget=4), **options}
    dialog = generate.Dialog(engine, tokenizer, write=lambda text, dim: written.append((text, dim)), **settings)
    return dialog, written


def test_stream_is_whole_characters_with_thinking_marked(tokenizer: TextTokenizer) -> None:
    written: list[tuple[str, bool]] = []
    printer = generate.StreamPrinter(tokenizer, lambda text, dim: written.append((text, dim)), thinking=False)
    for token in tokenizer.encode("<think>\ngrößer ☃ 🦉</think>\n\n4<|im_end|>"):
        printer.add(token)
    printer.close("stop")
    assert "".join(text for text, dim in written if dim) == "<think>\ngrößer ☃ 🦉</think>"
    assert "".join(text for text, dim in written if not dim) == "\n\n4\n"
    assert "\ufffd" not in "".join(text for text, _ in written)


def test_hard_switch_think_is_bound_by_the_budget(tokenizer: TextTokenizer) -> None:
    dialog, written = make_dialog(tokenizer, think=True)
    reply = dialog.answer("2 * 2 /think")
    assert "I have to give the solution based on the thinking directly now.\n</think>" in reply
    dimmed = "".join(text for text, dim in written if dim)
    assert "Considering the limited time" in dimmed and dialog.messages[-1]["reasoning_content"]


def test_hard_switch_no_think_puts_the_empty_block_in_the_prompt(tokenizer: TextTokenizer) -> None:
    dialog, _ = make_dialog(tokenizer, think=False, system="Be brief.")
    prompt = tokenizer.decode(dialog._prompt_ids({"role": "user", "content": "hello /no_think"}))
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert prompt.endswith("hello /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_dialog_remembers_until_reset(tokenizer: TextTokenizer) -> None:
    dialog, _ = make_dialog(tokenizer, system="Be brief.")
    dialog.answer("one")
    dialog.answer("two")
    assert [m["role"] for m in dialog.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "one<|im_end|>" in tokenizer.decode(dialog._prompt_ids({"role": "user", "content": "three"}))
    dialog.reset()
    assert dialog.messages == [{"role": "system", "content": "Be brief."}]


def test_whole_verb_on_a_folder(tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen3_lit.model.hf_checkpoint import save_hf

    dialog, _ = make_dialog(tokenizer)
    model = dialog.engine.model
    save_hf(model, model.config, tmp_path / "hf", tokenizer_dir=tokenizer.path)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    words = [str(tmp_path / "hf"), "--prompt", "one plus two", "--device", "cpu", "--max-new-tokens", "5"]
    assert generate.run(parser.parse_args([*words, "--think", "--thinking-budget", "2"])) == 0
    first = capsys.readouterr().out
    assert "[cut at --max-new-tokens]" in first
    assert generate.run(parser.parse_args([*words, "--think", "--thinking-budget", "2"])) == 0
    assert capsys.readouterr().out == first


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    with pytest.raises(UserError, match="no such folder"):
        generate.run(parser.parse_args([str(tmp_path / "nowhere")]))
    with pytest.raises(UserError, match="temperature: seen -1"):
        generate.run(parser.parse_args([str(tmp_path), "--temperature", "-1"]))
