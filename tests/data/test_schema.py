import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qwen3_lit.data.schema import iter_rows, read_located_records, read_records, validate_record
from qwen3_lit.errors import UserError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {
    "text": {"text": "x", "source": "s", "free": 1},
    "conversation": {"messages": [USER, ANSWER], "mode": "think", "free": [1]},
    "problem": {"messages": [USER], "answer": "4", "task": "add", "metadata": {"n": 1}, "free": {"a": 1}},
    "preference": {"messages": [USER], "chosen": "good", "rejected": "bad", "free": None},
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_pass_through(kind, write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD[kind]] * 3)
    assert list(read_records(path, kind)) == [GOOD[kind]] * 3


def without(kind, field):
    return {k: v for k, v in GOOD[kind].items() if k != field}


def with_messages(kind, *messages):
    return GOOD[kind] | {"messages": list(messages)}


BAD = [
    ("text", {}, "field 'text': missing, expected text"),
    ("text", {"text": 3}, "field 'text': int 3, expected text"),
    ("text", {"text": "x", "source": 3}, "field 'source': int 3"),
    ("text", [1], r"list \[1\], expected an object"),
    ("conversation", {}, "field 'messages': missing"),
    ("conversation", {"messages": []}, r"field 'messages': list \[\], expected a list of at least one message"),
    ("conversation", with_messages("conversation", USER), r"'messages\[0\]\.role': str 'user', expected assistant as"),
    ("conversation", with_messages("conversation", "x"), r"field 'messages\[0\]': str 'x'"),
    (
        "conversation",
        with_messages("conversation", {"role": "bot", "content": ""}),
        r"'messages\[0\]\.role': str 'bot', expected one of system, user, assistant, tool",
    ),
    ("conversation", with_messages("conversation", USER, {"role": "assistant"}), r"'messages\[1\]\.content': missing"),
    (
        "conversation",
        with_messages("conversation", USER, ANSWER | {"reasoning_content": 1}),
        r"'messages\[1\]\.reasoning_content': int 1",
    ),
    (
        "conversation",
        with_messages("conversation", USER, ANSWER | {"tool_calls": [{"name": "f"}]}),
        r"'messages\[1\]\.tool_calls\[0\]\.arguments': missing",
    ),
    (
        "conversation",
        with_messages("conversation", USER | {"tool_calls": [{"name": "f", "arguments": {}}]}, ANSWER),
        r"'messages\[0\]\.tool_calls'.*only the assistant",
    ),
    (
        "conversation",
        GOOD["conversation"] | {"mode": "fast"},
        "field 'mode': str 'fast', expected one of think, no_think",
    ),
    ("conversation", GOOD["conversation"] | {"tools": {}}, "field 'tools': dict"),
    ("problem", without("problem", "messages"), "field 'messages': missing.*'prompt'"),
    ("problem", without("problem", "answer"), "field 'answer': missing"),
    ("problem", without("problem", "task"), "field 'task': missing"),
    ("problem", GOOD["problem"] | {"answer": 4}, "field 'answer': int 4"),
    ("problem", GOOD["problem"] | {"split": "test"}, "field 'split': str 'test', expected one of train, held_out"),
    (
        "problem",
        with_messages("problem", USER, ANSWER),
        r"'messages\[1\]\.role': str 'assistant', expected user or tool",
    ),
    ("preference", without("preference", "rejected"), "field 'rejected': missing"),
    ("preference", GOOD["preference"] | {"rejected": "good"}, "differs from 'chosen'"),
]


@pytest.mark.parametrize(("kind", "record", "message"), BAD)
def test_bad_records_name_file_line_and_field(kind, record, message, write_jsonl):
    path = write_jsonl("data.jsonl", [GOOD[kind], "", record])
    with pytest.raises(UserError, match=message) as error:
        list(read_records(path, kind))
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_bad_json_and_bad_bytes(tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD["text"], '{"text": "cut'])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        list(read_records(path, "text"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: not UTF-8"):
        list(read_records(tmp_path / "b.jsonl", "text"))


def test_skip_counts_and_reports(write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [GOOD["text"], "{", {"text": 1}, GOOD["text"]])
    with caplog.at_level(logging.WARNING):
        assert len(list(read_records(path, "text", "skip"))) == 2
    assert "skipped 2 of 4 records" in caplog.text and "a.jsonl:2: not valid JSON" in caplog.text


@pytest.mark.parametrize("lines", [[], ["", ""]])
def test_empty_file_is_an_error(lines, write_jsonl):
    with pytest.raises(UserError, match=r"e\.jsonl: no text record \(the file is empty\)"):
        list(read_records(write_jsonl("e.jsonl", lines), "text"))


def test_nothing_but_bad_records_is_an_error(write_jsonl):
    with pytest.raises(UserError, match="all 2 records are bad"):
        list(read_records(write_jsonl("e.jsonl", ["{", "["]), "text", "skip"))


def test_prompt_becomes_a_user_turn(write_jsonl):
    path = write_jsonl("p.jsonl", [{"prompt": "1+1?", "answer": "2", "task": "add"}])
    (record,) = read_records(path, "problem")
    assert record["messages"] == [{"role": "user", "content": "1+1?"}] and record["prompt"] == "1+1?"


def test_formats_agree(tmp_path, write_jsonl):
    records = [
        GOOD["conversation"],
        {"messages": [USER, ANSWER | {"reasoning_content": "r"}], "mode": None, "free": [2]},
    ]
    jsonl = write_jsonl("a.jsonl", records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")
    expected = list(read_records(jsonl, "conversation"))
    for name in ("b.json", "c.jsonl.gz", "d.parquet"):
        assert list(read_records(tmp_path / name, "conversation")) == expected, name
    assert len(list(read_records(tmp_path, "conversation"))) == 4 * len(expected)
    assert next(read_located_records(tmp_path / "d.parquet", "conversation"))[0].endswith("d.parquet:row 1")


def test_unreadable_inputs(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.json").write_text('{"text": "not a list"}')
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-4])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing.jsonl", "no such file or folder"),
        ("x.parquet", "not a readable parquet"),
        ("x.csv", "unknown kind of file"),
        ("x.json", "expected a list of records"),
        ("x.jsonl.gz", "cannot be read"),
        ("empty", r"no \.jsonl"),
    ):
        with pytest.raises(UserError, match=message):
            list(iter_rows(tmp_path / name))


def test_datasets_names(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return [GOOD["text"]]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_records("some-owner/some-set", "text")) == [GOOD["text"]]
    assert list(read_records("owner/set:test", "text")) == [GOOD["text"]]
    assert list(read_records("datasets:set", "text")) == [GOOD["text"]]
    assert asked == [("some-owner/some-set", "train", True), ("owner/set", "test", True), ("set", "train", True)]

    def fail(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"owner/set: no local file.*no network\)$"):
        list(read_records("owner/set", "text"))


def test_unknown_options(write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD["text"]])
    with pytest.raises(UserError, match="unknown kind"):
        list(read_records(path, "texts"))
    with pytest.raises(UserError, match="on_bad_record is 'ignore'"):
        list(read_records(path, "text", "ignore"))
    with pytest.raises(UserError, match="here: field 'text'"):
        validate_record({}, "text", "here")


UNREADABLE = {
    "surrogate": (r'{"text": "\ud83d half"}', r"\\ud83d is half a surrogate pair"),
    "capitals": (r'{"text": "x", "free": {"\uDE00": 1}}', r"\\ude00 is half a surrogate pair"),
    "digits": ('{"text": "x", "n": ' + "9" * 5000 + "}", "cannot be read"),
    "nesting": ('{"text": "x", "n": ' + "[" * 200_000 + "]" * 200_000 + "}", "cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_rows_that_no_one_can_train_on_name_their_line_and_can_be_skipped(name, write_jsonl, caplog):
    row, message = UNREADABLE[name]
    whole = r'{"text": "\ud83d\ude00"}'
    path = write_jsonl("a.jsonl", [whole, row])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        list(read_records(path, "text"))
    assert list(read_records(path, "text", "skip")) == [{"text": "\U0001f600"}]
    assert "skipped 1 of 2" in caplog.text
    listed = write_jsonl("a.json", [f"[{whole},{row}]"])
    with pytest.raises(UserError, match=rf"a\.json.*{message}"):
        list(read_records(listed, "text"))


def test_arrow_gives_no_call_the_arguments_of_another_tool(tmp_path, write_jsonl):
    def dialog(name, arguments):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "r"}]
        return {"messages": [*turns, ANSWER], "tools": [{"name": name, "parameters": schema}]}

    records = [
        dialog("weather", {"city": "Paris", "days": ["mon"]}),
        dialog("add", {"x": {"value": 1}}),
        dialog("add", {"x": {"sign": "-"}}),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet", "conversation")) == records
    # A JSON file has no such filling: its nulls are meant.
    meant = [dialog("add", {"x": None, "y": {"z": None}})]
    assert list(read_records(write_jsonl("a.jsonl", meant), "conversation")) == meant
