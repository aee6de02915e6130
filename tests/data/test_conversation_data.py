import logging

import pytest

from qwen3_lit.data.batch import IGNORE_INDEX
from qwen3_lit.data.conversation_data import ConversationData, fraction_of
from qwen3_lit.errors import UserError


def record(i: int, **more):
    answer = {"role": "assistant", "content": f"a{i}", "reasoning_content": f"r{i}"}
    return {"messages": [{"role": "user", "content": f"q{i}"}, answer], **more}


def make(chat_tokenizer_dir, *paths, **options) -> ConversationData:
    data = ConversationData(chat_tokenizer_dir, list(paths), **{"batch_tokens": 128, "prefetch_batches": 0, **options})
    data.setup("fit")
    return data


def documents_of(data, batch):
    return [data.tokenizer.decode(batch.token_ids_T[a:b].tolist()) for a, b in batch.document_spans()]


def test_an_epoch_trains_every_turn_once(chat_tokenizer_dir, write_jsonl):
    dialogs = [record(i) for i in range(9)]
    dialogs.append({"messages": [*record(90)["messages"], *record(91)["messages"]]})
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", dialogs), epochs=2)
    per_epoch = data._rows.end_of_epoch(0)
    for epoch in range(2):
        first = data._rows.end_of_epoch(epoch - 1) if epoch else 0
        rows = [data.make_batch(i) for i in range(first, data._rows.end_of_epoch(epoch))]
        texts = sorted(t for row in rows for t in documents_of(data, row))
        assert len(texts) == 11 and len(set(texts)) == 11
        assert sum("r90" in t for t in texts) == 1 and sum("r91" in t for t in texts) == 1
        assert all(t.endswith("<|im_end|>") for t in texts)
        assert sum(r.num_loss_tokens for r in rows) == sum(sum(s.loss_mask) for s in data.samples)
    assert per_epoch > 1 and data.num_train_batches() == data._rows.end_of_epoch(1)
    assert documents_of(data, data.make_batch(0)) != documents_of(data, data.make_batch(per_epoch))


def test_targets_are_what_the_model_writes(chat_tokenizer_dir, write_jsonl):
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", [record(i) for i in range(6)]))
    batch = data.make_batch(0)
    for a, b in batch.document_spans():
        targets = [t for t in batch.target_ids_T[a:b].tolist() if t != IGNORE_INDEX]
        text = data.tokenizer.decode(targets)
        name = text[text.index("r") + 1 : text.index("\n</think>")]
        assert text == f"<think>\nr{name}\n</think>\n\na{name}<|im_end|>"


def test_last_turn_only(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [{"messages": [*record(1)["messages"], *record(2)["messages"]]}])
    assert len(make(chat_tokenizer_dir, path).samples) == 2
    assert len(make(chat_tokenizer_dir, path, turns="last").samples) == 1
    assert len(make(chat_tokenizer_dir, path, turns="answer").samples) == 1


def test_mode_is_kept_and_hard_switch_moves_the_empty_block(chat_tokenizer_dir, write_jsonl):
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "mode": "no_think"}
    path = write_jsonl("a.jsonl", [plain, record(1, mode="think"), record(2)])
    soft = make(chat_tokenizer_dir, path)
    hard = make(chat_tokenizer_dir, path, no_think_prompt="hard_switch")
    assert [s.mode for s in soft.samples] == [s.mode for s in hard.samples] == ["no_think", "think", None]
    assert soft.samples[0].token_ids == hard.samples[0].token_ids
    assert sum(soft.samples[0].loss_mask) > sum(hard.samples[0].loss_mask)
    assert soft.samples[1:] == hard.samples[1:]


def test_two_modes_after_prompts_that_do_not_tell_them_apart_are_warned_of(chat_tokenizer_dir, write_jsonl, caplog):
    def answer(question: str) -> dict:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]
        return {"messages": turns, "mode": "no_think"}

    unmarked = write_jsonl("a.jsonl", [record(1, mode="think"), answer("q"), answer("r")])
    make(chat_tokenizer_dir, unmarked)
    assert "2 answers without thinking" in caplog.text and "a.jsonl:2" in caplog.text
    caplog.clear()
    make(chat_tokenizer_dir, unmarked, no_think_prompt="hard_switch")
    make(chat_tokenizer_dir, write_jsonl("b.jsonl", [record(1, mode="think"), answer("q /no_think")]))
    make(chat_tokenizer_dir, write_jsonl("c.jsonl", [answer("q")]))
    assert "answers without thinking" not in caplog.text


def test_batches_depend_on_seed_and_index_alone(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [record(i) for i in range(20)])
    one, two = make(chat_tokenizer_dir, path, seed=3), make(chat_tokenizer_dir, path, seed=3)
    backwards = {i: two.make_batch(i).token_ids_T.tolist() for i in reversed(range(12))}
    assert [one.make_batch(i).token_ids_T.tolist() for i in range(12)] == [backwards[i] for i in range(12)]
    other = make(chat_tokenizer_dir, path, seed=4)
    assert [other.make_batch(i).token_ids_T.tolist() for i in range(12)] != [backwards[i] for i in range(12)]


def test_held_out_dialogs_are_never_trained(chat_tokenizer_dir, write_jsonl):
    dialogs = [record(i) for i in range(40)]
    path = write_jsonl("a.jsonl", dialogs + dialogs[:10])
    data = make(chat_tokenizer_dir, path, held_out_fraction=0.25)
    training = {tuple(s.token_ids) for s in data.samples}
    held_out = {tuple(s.token_ids) for s in data.held_out_samples}
    assert training and held_out and not training & held_out
    assert len(data.samples) + len(data.held_out_samples) == 50
    # The choice stays when data are added.
    more = make(chat_tokenizer_dir, write_jsonl("b.jsonl", [record(99), *dialogs]), held_out_fraction=0.25)
    assert held_out <= {tuple(s.token_ids) for s in more.held_out_samples}
    val = [data.make_val_batch(i) for i in range(data.num_val_batches())]
    assert sum(b.num_documents for b in val) == len(data.held_out_samples)
    assert 0.2 < sum(fraction_of(i, 0) < 0.25 for i in range(2000)) / 2000 < 0.3


def test_answers_to_one_question_are_on_one_side(chat_tokenizer_dir, write_jsonl):
    def dialog(i: int, answer: int, system: str = "s", wrapped: bool = False) -> dict:
        result = {"role": "tool", "content": f"t{answer}"}
        if wrapped:
            result = {"role": "user", "content": f"<tool_response>\nt{answer}\n</tool_response>"}
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": answer}}]}
        asked = [{"role": "system", "content": system}, {"role": "user", "content": f"q{i}"}]
        return {"messages": [*asked, call, result, {"role": "assistant", "content": f"a{answer}"}]}

    dialogs = [dialog(i, answer, wrapped=bool(answer % 2)) for i in range(40) for answer in range(4)]
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", dialogs), held_out_fraction=0.25, turns="last")
    text = [[data.tokenizer.decode(s.token_ids) for s in side] for side in (data.samples, data.held_out_samples)]
    questions = [{t.split("q")[1].split("<")[0] for t in side} for side in text]
    assert len(questions[0] | questions[1]) == 40 and questions[1] and not questions[0] & questions[1]
    assert len(text[1]) == 4 * len(questions[1])
    rows = [dialog(i, 0, "other") for i in range(40)]
    other = make(chat_tokenizer_dir, write_jsonl("b.jsonl", rows), held_out_fraction=0.25, turns="last")
    held_out = {data.tokenizer.decode(s.token_ids).split("q")[1].split("<")[0] for s in other.held_out_samples}
    assert held_out != questions[1], "another system message makes another question"


def test_overlong_samples_are_counted(chat_tokenizer_dir, write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [record(1), {"messages": [*record(2)["messages"][:1], {**record(3)["messages"][1]}]}])
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 200}]}
    path = write_jsonl("a.jsonl", [record(1), long])
    with caplog.at_level(logging.WARNING):
        dropped = make(chat_tokenizer_dir, path)
    assert len(dropped.samples) == 1 and dropped.length_counts["dropped"] == 1
    assert "1 dropped" in caplog.text
    cut = make(chat_tokenizer_dir, path, overlong="truncate")
    assert [len(s) for s in cut.samples][1] == 128 and cut.length_counts["truncated"] == 1


def test_padded_rows_have_one_shape(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [record(i) for i in range(20)])
    data = make(chat_tokenizer_dir, path, pad_rows=True, max_documents=6)
    rows = [data.make_batch(i) for i in range(8)]
    assert {(r.token_ids_T.numel(), r.cu_seqlens.numel()) for r in rows} == {(128, 8)}
    assert all(r.token_ids_T[~r.token_mask_T].eq(data.tokenizer.end_of_text_id).all() for r in rows)
    plain = make(chat_tokenizer_dir, path, max_documents=6)
    assert [r.num_loss_tokens for r in rows] == [plain.make_batch(i).num_loss_tokens for i in range(8)]


def test_errors(chat_tokenizer_dir, write_jsonl):
    good = write_jsonl("a.jsonl", [record(1)])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: messages\[1\] has reasoning, but thinking is switched off"):
        bad = write_jsonl("bad.jsonl", [record(1, mode="no_think")])
        make(chat_tokenizer_dir, bad, no_think_prompt="hard_switch")
    with pytest.raises(UserError, match=r"empty\.jsonl: no conversation record"):
        make(chat_tokenizer_dir, write_jsonl("empty.jsonl", []))
    with pytest.raises(UserError, match="no sample is left to train on"):
        make(chat_tokenizer_dir, good, max_sample_tokens=3)
    with pytest.raises(UserError, match="paths is empty"):
        make(chat_tokenizer_dir)
    with pytest.raises(UserError, match="no such file"):
        make(chat_tokenizer_dir, "/nowhere/x.jsonl")
    for options, message in (
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_sample_tokens": 999}, "max_sample_tokens is 999"),
        ({"turns": "first"}, "turns is 'first'"),
    ):
        with pytest.raises(UserError, match=message):
            make(chat_tokenizer_dir, good, **options)
