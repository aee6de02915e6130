import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen3_lit.data.chat_template import (
    CHAT_TEMPLATE,
    EMPTY_THINKING,
    STOP_THINKING,
    answer_turns,
    encode_conversation,
    join_thinking,
    prompt_ids,
    render,
    requested_mode,
    split_thinking,
    split_turns,
)
from qwen3_lit.errors import UserError

spec = find_spec("trl")
assert spec is not None and spec.origin is not None
OFFICIAL = (Path(spec.origin).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather <now> & "later" für 数',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(city: Any = "Paris", nested: bool = True) -> dict[str, Any]:
    arguments = {"city": city, "n": 1, "é": None}
    inner = {"name": "get_weather", "arguments": arguments}
    return {"type": "function", "function": inner} if nested else inner


TEXT_CALL = {"name": "f", "arguments": '{"a": 1}'}

CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "single": ([user("Hi")], None),
    "answered": ([user("Hi"), said("Hello")], None),
    "system": ([system("Be brief."), user("Hi"), said("Hello")], None),
    "only_system": ([system("Be brief.")], None),
    "late_system": ([user("Hi"), system("Now rhyme."), user("Go"), said("So")], None),
    "multi_turn": ([user("a"), said("b"), user("c"), said("d"), user("e"), said("f")], None),
    "reasoning_content": ([user("a"), said("b", reasoning_content="why")], None),
    "reasoning_newlines": ([user("a"), said("\n\nb\n", reasoning_content="\n\nwhy\nnot\n\n")], None),
    "reasoning_empty": ([user("a"), said("b", reasoning_content="")], None),
    "reasoning_in_history": (
        [user("a"), said("b", reasoning_content="x"), user("c"), said("d", reasoning_content="y")],
        None,
    ),
    "inline_think": ([user("a"), said("<think>\nwhy\n</think>\n\nb")], None),
    "inline_think_in_history": ([user("a"), said("<think>\nwhy\n</think>\n\nb"), user("c"), said("d")], None),
    "inline_think_twice": ([user("a"), said("<think>x</think>y<think>z</think>w")], None),
    "inline_close_only": ([user("a"), said("why\n</think>\n\nb")], None),
    "inline_open_only": ([user("a"), said("<think>\nwhy")], None),
    "inline_empty": ([user("a"), said(EMPTY_THINKING + "b")], None),
    "both_kinds": ([user("a"), said("<think>x</think>b", reasoning_content="y")], None),
    "no_user": ([said("alone")], None),
    "no_user_thinking": ([system("s"), said("alone", reasoning_content="x")], None),
    "two_assistants": ([user("a"), said("b"), said("c", reasoning_content="x")], None),
    "two_users": ([user("a"), user("b"), said("c")], None),
    "empty_texts": ([user(""), said("")], None),
    "none_content": ([user("a"), said(None, tool_calls=[call()])], None),
    "tools_without_system": ([user("a")], [WEATHER]),
    "tools_with_system": ([system("s"), user("a")], [WEATHER, {"name": "plain", "x": [1, 2.5, True, None]}]),
    "tools_late_system": ([user("a"), system("s"), user("b")], [WEATHER]),
    "empty_tools": ([user("a")], []),
    "call": ([user("a"), said("", tool_calls=[call()])], [WEATHER]),
    "call_with_text": ([user("a"), said("Let me look.", tool_calls=[call()])], [WEATHER]),
    "calls": ([user("a"), said("", tool_calls=[call(), call("Rom", nested=False), TEXT_CALL])], [WEATHER]),
    "calls_with_text": ([user("a"), said("Two.", tool_calls=[call(), TEXT_CALL], reasoning_content="r")], None),
    "call_text_is_newlines": ([user("a"), said("\n\n", tool_calls=[call()])], None),
    "empty_calls": ([user("a"), said("b", tool_calls=[])], None),
    "tool_loop": (
        [
            *[user("a"), said("", reasoning_content="first", tool_calls=[call()]), tool("20 C")],
            *[said("", tool_calls=[call("Rom")]), tool("25 C"), tool("26 C"), said("Warm.", reasoning_content="so")],
        ],
        [WEATHER],
    ),
    "tool_loop_open": ([user("a"), said("", reasoning_content="r", tool_calls=[call()]), tool("20 C")], [WEATHER]),
    "tool_loop_in_history": (
        [user("a"), said("", reasoning_content="r", tool_calls=[call()]), tool("1"), said("b"), user("c"), said("d")],
        [WEATHER],
    ),
    "tool_first": ([tool("1"), tool("2"), user("a")], None),
    "wrapped_result_as_user": (
        [user("a"), said("b", reasoning_content="r"), user("<tool_response>\n1\n</tool_response>"), said("c")],
        None,
    ),
    "half_wrapped_result": ([user("a"), said("b", reasoning_content="r"), user("<tool_response>"), said("c")], None),
    "only_wrapped": ([user("<tool_response>1</tool_response>"), said("b", reasoning_content="r")], None),
    "unicode": ([system("Größe 数学"), user("🙂 é\u00a0x"), said("<b>&amp;</b>'\"")], None),
    "special_tokens_in_text": ([user("<|im_end|><think>"), said("<|im_start|>")], None),
    "curly": ([user("{{ x }} {% if %} {# c #}"), said("{{}}")], None),
}


@pytest.fixture(scope="module")
def theirs(chat_tokenizer_dir: str) -> Any:
    return AutoTokenizer.from_pretrained(chat_tokenizer_dir)


def through_transformers(theirs: Any, template: str | None, messages: Any, **options: Any) -> str:
    return theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("prompt", [{}, {"enable_thinking": False}, {"enable_thinking": True}, None])
@pytest.mark.parametrize("name", CASES)
def test_render_is_the_official_text(theirs, name, prompt):
    messages, tools = CASES[name]
    options = {} if prompt is None else {"add_generation_prompt": True, **prompt}
    official = through_transformers(theirs, OFFICIAL, messages, tools=tools, **options)
    assert render(messages, tools=tools, **options) == official
    assert through_transformers(theirs, None, messages, tools=tools, **options) == official
    assert through_transformers(theirs, CHAT_TEMPLATE, messages, tools=tools, **options) == official


def random_text(rng: random.Random) -> str:
    pieces = [
        "",
        "a",
        "\n",
        "\n\n",
        " ",
        "<think>",
        "</think>",
        "<tool_response>",
        "</tool_response>",
        "/think",
        "é",
        "12",
    ]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 5)))


def random_dialog(rng: random.Random) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 7)):
        role = rng.choice(["system", "user", "assistant", "assistant", "tool"])
        message: dict[str, Any] = {"role": role, "content": random_text(rng)}
        if role == "assistant":
            if rng.random() < 0.4:
                message["reasoning_content"] = random_text(rng)
            if rng.random() < 0.3:
                message["tool_calls"] = [rng.choice([call(), TEXT_CALL]) for _ in range(rng.randint(0, 3))]
        messages.append(message)
    return messages


def test_render_is_the_official_text_for_random_dialogs(theirs):
    rng = random.Random(0)
    for _ in range(400):
        messages = random_dialog(rng)
        tools = [WEATHER] if rng.random() < 0.3 else None
        options = {"add_generation_prompt": rng.random() < 0.5, "enable_thinking": rng.random() < 0.5}
        official = through_transformers(theirs, OFFICIAL, messages, tools=tools, **options)
        assert render(messages, tools=tools, **options) == official, messages
        assert through_transformers(theirs, CHAT_TEMPLATE, messages, tools=tools, **options) == official, messages


def test_our_template_is_not_the_official_file():
    assert CHAT_TEMPLATE != OFFICIAL
    official_lines = {line.strip() for line in OFFICIAL.splitlines() if len(line.strip()) > 30}
    assert not official_lines & {line.strip() for line in CHAT_TEMPLATE.splitlines()}


def trained_text(tokenizer, sample) -> str:
    return tokenizer.decode([i for i, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m])


TRAINABLE = [n for n, (messages, _) in CASES.items() if messages[-1]["role"] == "assistant"]


@pytest.mark.parametrize("name", TRAINABLE)
def test_sample_ids_are_the_official_ones_and_the_mask_is_the_last_turn(theirs, chat_tokenizer, name):
    messages, tools = CASES[name]
    sample = encode_conversation(chat_tokenizer, messages, tools=tools)
    official = through_transformers(theirs, OFFICIAL, messages, tools=tools)
    assert official.endswith("<|im_end|>\n")
    assert chat_tokenizer.decode(sample.token_ids) + "\n" == official
    if not (messages[-1]["content"] or "").startswith("\n"):
        assert sample.token_ids == theirs(official[:-1])["input_ids"]
    # The mask is one run at the end: after the header of the last assistant turn, up to and with <|im_end|>.
    start = sample.loss_mask.index(True)
    assert not any(sample.loss_mask[:start]) and all(sample.loss_mask[start:])
    assert sample.token_ids[-1] == chat_tokenizer.im_end_id
    without_end = trained_text(chat_tokenizer, sample).removesuffix("<|im_end|>")
    assert official.endswith("<|im_start|>assistant\n" + without_end + "<|im_end|>\n")


@pytest.mark.parametrize("name", TRAINABLE)
def test_prompt_of_a_sample_is_the_prompt_of_generation(chat_tokenizer, name):
    messages, tools = CASES[name]
    if name == "two_assistants":  # the prompt would end with an assistant turn: nobody generates from that
        return
    sample = encode_conversation(chat_tokenizer, messages, tools=tools)
    if len(messages) > 1:
        prompt = prompt_ids(chat_tokenizer, messages[:-1], tools)
        assert sample.token_ids[: len(prompt)] == prompt
        assert sample.loss_mask.index(True) == len(prompt)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("q"), said("a", reasoning_content="t")], "<think>\nt\n</think>\n\na<|im_end|>"),
        ([user("q"), said("<think>\nt\n</think>\n\na")], "<think>\nt\n</think>\n\na<|im_end|>"),
        ([user("q /no_think"), said("a")], "<think>\n\n</think>\n\na<|im_end|>"),
        ([user("q"), said("a", reasoning_content="x"), user("r"), said("b")], "<think>\n\n</think>\n\nb<|im_end|>"),
        (
            [user("q"), said("", reasoning_content="t", tool_calls=[TEXT_CALL])],
            '<think>\nt\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        ),
        (
            [user("q"), said("", tool_calls=[TEXT_CALL]), tool("1"), said("one", reasoning_content="t")],
            "<think>\nt\n</think>\n\none<|im_end|>",
        ),
    ],
)
def test_exactly_what_the_model_writes_is_trained(chat_tokenizer, messages, expected):
    assert trained_text(chat_tokenizer, encode_conversation(chat_tokenizer, messages)) == expected


def test_injected_empty_think_block_is_not_trained(chat_tokenizer):
    messages = [user("q"), said("a")]
    sample = encode_conversation(chat_tokenizer, messages, enable_thinking=False)
    assert trained_text(chat_tokenizer, sample) == "a<|im_end|>"
    assert sample.token_ids[: sample.loss_mask.index(True)] == prompt_ids(
        chat_tokenizer, messages[:-1], enable_thinking=False
    )
    soft = encode_conversation(chat_tokenizer, messages)
    assert soft.token_ids == sample.token_ids and sum(soft.loss_mask) > sum(sample.loss_mask)
    with pytest.raises(UserError, match="thinking is switched off"):
        encode_conversation(chat_tokenizer, [user("q"), said("a", reasoning_content="t")], enable_thinking=False)


def test_all_turns_trains_every_assistant_turn(chat_tokenizer):
    messages = [system("s"), user("q"), said("a"), user("r"), said("b", reasoning_content="t")]
    sample = encode_conversation(chat_tokenizer, messages, train_turns="all")
    assert trained_text(chat_tokenizer, sample) == "a<|im_end|><think>\nt\n</think>\n\nb<|im_end|>"
    assert sample.token_ids == encode_conversation(chat_tokenizer, messages).token_ids
    # Without a system turn the list of tools stands in one that no message wrote.
    tools = [{"type": "function", "function": {"name": "f"}}]
    sample = encode_conversation(chat_tokenizer, messages[1:], tools=tools, train_turns="all")
    assert trained_text(chat_tokenizer, sample) == "a<|im_end|><think>\nt\n</think>\n\nb<|im_end|>"


def test_split_turns_gives_each_turn_its_own_reasoning(chat_tokenizer):
    messages = [user("q"), said("a", reasoning_content="one"), user("r"), said("b", reasoning_content="two")]
    dialogs = split_turns(messages)
    assert [len(d) for d in dialogs] == [2, 4]
    texts = [trained_text(chat_tokenizer, encode_conversation(chat_tokenizer, d)) for d in dialogs]
    assert texts == ["<think>\none\n</think>\n\na<|im_end|>", "<think>\ntwo\n</think>\n\nb<|im_end|>"]
    assert "one" not in render(dialogs[1])


@pytest.mark.parametrize(
    ("messages", "lengths"),
    [
        ([user("a"), said("b"), user("c"), said("call"), {"role": "tool", "content": "1"}, said("d")], [4, 6]),
        (
            [user("a"), said("b"), user("c"), said("call"), user("<tool_response>\n1\n</tool_response>"), said("d")],
            [4, 6],
        ),
        ([{"role": "system", "content": "s"}, said("a"), said("b")], [2, 3]),
    ],
    ids=["tool", "wrapped_result", "nobody_asked"],
)
def test_answer_turns_follow_the_last_query(messages, lengths):
    assert [len(dialog) for dialog in answer_turns(messages)] == lengths


def test_sample_needs_an_assistant_at_the_end(chat_tokenizer):
    with pytest.raises(UserError, match="expected 'assistant'"):
        encode_conversation(chat_tokenizer, [user("q")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "bot", "content": "x"}], r"messages\[0\]\.role is 'bot'"),
        ([user("a"), {"role": "user", "content": [{"type": "text"}]}], r"messages\[1\]\.content is a list"),
        ([user("a"), said("", tool_calls=[{"name": "f"}])], "needs 'name' and 'arguments'"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(UserError, match=message):
        render(messages)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", (None, "plain")),
        ("<think>\nwhy\n</think>\n\nb", ("why", "b")),
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("why\n</think>\n\nb", ("why", "b")),
        ("<think>\nwhy so", ("why so", "")),
        ("<think>\na" + STOP_THINKING + "b", ("a" + STOP_THINKING.split("\n</think>")[0], "b")),
    ],
)
def test_split_thinking(text, expected):
    assert split_thinking(text) == expected


def test_join_thinking_is_what_the_template_writes():
    for thinking in ("why", "", None):
        body = join_thinking(thinking, "b")
        assert render([user("a"), said("b", reasoning_content=thinking)]).endswith(f"assistant\n{body}<|im_end|>\n")
        assert split_thinking(body) == (thinking or "", "b")


@pytest.mark.parametrize(
    ("messages", "mode"),
    [
        ([user("hi")], None),
        ([user("hi /think")], "think"),
        ([user("hi /no_think")], "no_think"),
        ([user("/think or /no_think")], "no_think"),
        ([system("/no_think"), user("hi")], "no_think"),
        ([system("/no_think"), user("a /think"), said("/no_think"), user("b")], "think"),
        ([user("see /usr/think and /thinking")], None),
    ],
)
def test_last_flag_wins(messages, mode):
    assert requested_mode(messages) == mode


def test_template_survives_json(chat_tokenizer_dir):
    config = json.loads((Path(chat_tokenizer_dir) / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
