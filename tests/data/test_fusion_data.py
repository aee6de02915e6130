import logging
from collections import Counter

import pytest

from qwen3_lit.data.chat_template import requested_mode
from qwen3_lit.data.fusion_data import FusionData, add_flag, has_reasoning
from qwen3_lit.errors import UserError


def thinking(i: int, **more):
    answer = {"role": "assistant", "content": f"a{i}", "reasoning_content": f"r{i}"}
    return {"messages": [{"role": "user", "content": f"t{i}"}, answer], **more}


def plain(i: int):
    return {"messages": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": f"b{i}"}]}


@pytest.fixture
def make(chat_tokenizer_dir, write_jsonl):
    think_path = write_jsonl("think.jsonl", [thinking(i) for i in range(150)])
    plain_path = write_jsonl("plain.jsonl", [plain(i) for i in range(150)])

    def build(**options) -> FusionData:
        options = {"thinking_paths": [think_path], "non_thinking_paths": [plain_path], "batch_tokens": 512, **options}
        return FusionData(chat_tokenizer_dir, prefetch_batches=0, **options)

    return build


def dialogs(data: FusionData):
    return [c.record for c in data.conversations()]


def test_the_last_flag_is_the_mode_of_the_answer(make):
    seen = Counter()
    for record in dialogs(make()):
        asked = requested_mode(record["messages"])
        users = sum(m["role"] == "user" for m in record["messages"])
        seen[record["mode"], asked, users > 1] += 1
        assert asked == record["mode"] or (asked is None and record["mode"] == "think")
        assert has_reasoning(record["messages"][-1]) == (record["mode"] == "think")
    for case in (("think", "think"), ("think", None), ("no_think", "no_think")):
        assert seen[*case, False] and seen[*case, True], case


def test_every_record_is_trained_once_and_in_its_own_words(make):
    records = dialogs(make())
    assert Counter(r["messages"][-1]["content"] for r in records) == Counter(
        [f"a{i}" for i in range(150)] + [f"b{i}" for i in range(150)]
    )
    for i, record in enumerate(records):
        question = [m for m in record["messages"] if m["role"] == "user"][-1]["content"]
        assert question.split()[0] == (f"t{i}" if i < 150 else f"p{i - 150}")


def test_flags_stand_in_system_and_user_turns_and_contradict_each_other(make):
    records = dialogs(make())
    systems = [r for r in records if r["messages"][0]["role"] == "system"]
    assert 0.08 < len(systems) / len(records) < 0.3
    overruled = 0
    for record in records:
        flags = [requested_mode([m]) for m in record["messages"] if m["role"] != "assistant"]
        overruled += len({f for f in flags if f}) > 1
    assert overruled > 5, "some dialogs must hold flags that a later flag overrules"


def test_an_answer_may_inherit_its_mode_from_an_earlier_turn(make):
    inherited = [
        r
        for r in dialogs(make())
        if r["mode"] == "no_think" and requested_mode([m for m in r["messages"] if m["role"] == "user"][-1:]) is None
    ]
    assert any(r["messages"][0]["role"] == "user" for r in inherited)


def test_shares_are_obeyed_at_their_ends(make):
    never = dialogs(make(system_flag_fraction=0.0, unflagged_fraction=0.0, multi_turn_fraction=0.0))
    assert all(len(r["messages"]) == 2 and requested_mode(r["messages"][:1]) == r["mode"] for r in never)
    always = dialogs(make(system_flag_fraction=1.0, unflagged_fraction=1.0, multi_turn_fraction=0.0))
    assert all(requested_mode(r["messages"]) is None for r in always if r["mode"] == "think")
    assert all(r["messages"][0]["content"] == "/no_think" for r in always if r["mode"] == "no_think")
    long = dialogs(make(multi_turn_fraction=1.0, max_extra_turns=2))
    assert {sum(m["role"] == "user" for m in r["messages"]) for r in long} == {2, 3}


def test_dialogs_are_a_function_of_seed_and_index(make):
    assert dialogs(make(seed=1)) == dialogs(make(seed=1))
    assert dialogs(make(seed=1)) != dialogs(make(seed=2))


def test_held_out_questions_are_in_no_dialog_that_is_trained(chat_tokenizer_dir, write_jsonl):
    question = [{"role": "user", "content": f"q{i}"} for i in range(60)]
    think = [{"messages": [q, thinking(n)["messages"][1]]} for n, q in enumerate(question * 4)]
    no_think = [{"messages": [q, plain(n)["messages"][1]]} for n, q in enumerate(question * 4)]
    paths = write_jsonl("t.jsonl", think), write_jsonl("p.jsonl", no_think)
    data = FusionData(chat_tokenizer_dir, [paths[0]], [paths[1]], held_out_fraction=0.2, multi_turn_fraction=1.0)
    asked = {False: set(), True: set()}
    for conversation in data.conversations():
        users = [m["content"].split()[0] for m in conversation.record["messages"] if m["role"] == "user"]
        asked[conversation.held_out] |= set(users)
        assert len(users) > 1
    assert asked[True] and not asked[True] & asked[False] and len(asked[True] | asked[False]) == 60


def test_one_more_record_changes_few_dialogs(chat_tokenizer_dir, write_jsonl):
    def built(name: str, records: list[dict]) -> dict[str, dict]:
        paths = write_jsonl(f"t{name}", records), write_jsonl(f"p{name}", [plain(i) for i in range(100)])
        data = FusionData(chat_tokenizer_dir, [paths[0]], [paths[1]], multi_turn_fraction=0.5)
        return {r["messages"][-1]["content"]: r for r in dialogs(data)}

    records = [thinking(i) for i in range(100)]
    before, after = built("1.jsonl", records), built("2.jsonl", [thinking(999), *records])
    assert sum(before[answer] != after[answer] for answer in before) <= 10


def test_targets_keep_the_think_block_of_their_mode(make):
    data = make()
    data.setup("fit")
    assert Counter(s.mode for s in data.samples) == {"think": 150, "no_think": 150}
    for sample in data.samples:
        target = data.tokenizer.decode([t for t, m in zip(sample.token_ids, sample.loss_mask, strict=True) if m])
        empty = target.startswith("<think>\n\n</think>\n\n")
        assert target.startswith("<think>\n") and empty == (sample.mode == "no_think")
        # Reasoning of earlier turns is not shown, and no earlier turn is trained.
        assert data.tokenizer.decode(sample.token_ids).count("<think>") == 1


def test_records_of_several_turns_and_with_tools_keep_their_turns(chat_tokenizer_dir, write_jsonl):
    dialog = {"messages": [*plain(0)["messages"], *plain(1)["messages"]]}
    system = {"messages": [{"role": "system", "content": "Be kind."}, *plain(2)["messages"]]}
    paths = [write_jsonl("t.jsonl", [thinking(0)]), write_jsonl("p.jsonl", [dialog, system])]
    for seed in range(12):
        data = FusionData(chat_tokenizer_dir, paths[:1], paths[1:], seed=seed, unflagged_fraction=0.0)
        _, two_turns, with_system = dialogs(data)
        users = [m["content"].split()[0] for m in two_turns["messages"] if m["role"] == "user"]
        assert users == ["p0", "p1"] and requested_mode(two_turns["messages"]) == "no_think"
        assert with_system["messages"][0]["content"].startswith("Be kind.")
        assert sum(m["role"] == "system" for m in with_system["messages"]) == 1


def test_tool_calls_of_the_answer_are_trained_too(chat_tokenizer_dir, write_jsonl):
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+2"}}}
    question, answer = {"role": "user", "content": "p9"}, {"role": "assistant", "content": "b9"}
    loop = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        answer,
    ]
    tool_dialog = {
        "messages": [*plain(1)["messages"], *loop],
        "tools": [{"type": "function", "function": {"name": "calculator"}}],
    }
    paths = [write_jsonl("t.jsonl", [thinking(0)]), write_jsonl("p.jsonl", [tool_dialog])]
    data = FusionData(chat_tokenizer_dir, paths[:1], paths[1:], prefetch_batches=0, multi_turn_fraction=0.0)
    data.setup("fit")
    trained = [
        data.tokenizer.decode([i for i, kept in zip(s.token_ids, s.loss_mask, strict=True) if kept])
        for s in data.samples
    ]
    assert "r0" in trained[0] and len(trained) == 3, "the turn before the last question is not trained"
    assert trained[1].startswith("<think>\n\n</think>\n\n<tool_call>") and '"1+2"' in trained[1]
    assert "b9" in trained[2] and "<tool_call>" not in trained[2]


def test_tool_results_in_user_turns_are_no_questions(chat_tokenizer_dir, write_jsonl):
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+2"}}}
    result = "<tool_response>\n3\n</tool_response>"
    loop = [
        {"role": "user", "content": "p9"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": result},
        {"role": "assistant", "content": "b9"},
    ]
    tools = [{"type": "function", "function": {"name": "calculator"}}]
    paths = [write_jsonl("t.jsonl", [thinking(0)]), write_jsonl("p.jsonl", [{"messages": loop, "tools": tools}])]
    for seed in range(8):
        data = FusionData(chat_tokenizer_dir, paths[:1], paths[1:], seed=seed, prefetch_batches=0)
        data.setup("fit")
        (_, record) = dialogs(data)
        users = [m["content"] for m in record["messages"] if m["role"] == "user"]
        assert users[-1] == result and requested_mode(record["messages"]) == "no_think"
        assert len(data.samples) == 3, "the call is trained too"


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_turns_that_call_tools_are_of_the_mode_too(mode, chat_tokenizer_dir, write_jsonl):
    reasoning = {"reasoning_content": "r"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    answer = {"role": "assistant", "content": "b"}
    call, answer = (call, answer | reasoning) if mode == "think" else (call | reasoning, answer)
    user, result = {"role": "user", "content": "u"}, {"role": "tool", "content": "3"}
    record = {"messages": [user, call, result, answer]}
    good = thinking(0) if mode == "think" else plain(0)
    paths = {"think": [thinking(1)], "no_think": [plain(1)]} | {mode: [good, record]}
    data = FusionData(chat_tokenizer_dir, *([write_jsonl(f"{name}.jsonl", rows)] for name, rows in paths.items()))
    expected = "no reasoning" if mode == "think" else "has reasoning"
    with pytest.raises(UserError, match=rf"{mode}\.jsonl:2: field 'messages\[1\]': {expected}"):
        data.conversations()


def test_records_of_the_wrong_kind(chat_tokenizer_dir, write_jsonl, caplog):
    think, no_think = write_jsonl("t.jsonl", [thinking(0), plain(0)]), write_jsonl("p.jsonl", [plain(1)])
    with pytest.raises(UserError, match=r"t\.jsonl:2: field 'messages\[1\]': no reasoning"):
        FusionData(chat_tokenizer_dir, [think], [no_think]).setup("fit")
    with caplog.at_level(logging.WARNING):
        data = FusionData(chat_tokenizer_dir, [think], [no_think], on_bad_record="skip")
        data.setup("fit")
    assert len(data.samples) == 2 and "skipped 1 conversations" in caplog.text
    with pytest.raises(UserError, match=r"t\.jsonl:1: field 'messages\[1\]': has reasoning"):
        FusionData(chat_tokenizer_dir, [write_jsonl("u.jsonl", [thinking(0)])], [think]).setup("fit")
    flagged = write_jsonl("f.jsonl", [{"messages": [{"role": "user", "content": "x /think"}, plain(0)["messages"][1]]}])
    with pytest.raises(UserError, match="has a mode flag already"):
        FusionData(chat_tokenizer_dir, [write_jsonl("v.jsonl", [thinking(0)])], [flagged]).setup("fit")


def test_bad_settings(make):
    for options, message in (
        ({"multi_turn_fraction": 1.5}, "multi_turn_fraction is 1.5"),
        ({"max_extra_turns": 0}, "max_extra_turns is 0"),
        ({"non_thinking_paths": []}, "both need a file"),
    ):
        with pytest.raises(UserError, match=message):
            make(**options)


def test_add_flag():
    assert add_flag("hi", "no_think") == "hi /no_think" and add_flag("", "think") == "/think"
