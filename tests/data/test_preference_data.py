import logging

import pytest

from qwen3_lit.data.preference_data import PreferenceData
from qwen3_lit.errors import UserError


def record(i: int, chosen: str = "", rejected: str = ""):
    prompt = [{"role": "user", "content": f"q{i}"}]
    return {"messages": prompt, "chosen": chosen or f"good{i}", "rejected": rejected or f"bad {i} " * (i % 4 + 1)}


def make(chat_tokenizer_dir, path, **options) -> PreferenceData:
    data = PreferenceData(chat_tokenizer_dir, [path], **{"batch_tokens": 160, "prefetch_batches": 0, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("pad_rows", [False, True])
def test_ends_point_at_the_last_token_of_each_answer(chat_tokenizer_dir, write_jsonl, pad_rows):
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", [record(i) for i in range(10)]), epochs=1, pad_rows=pad_rows)
    seen = []
    for index in range(data.num_train_batches()):
        batch = data.make_batch(index)
        spans = batch.packed.document_spans()
        assert len(spans) == 2 * batch.num_pairs
        assert [b - 1 for _, b in spans[0::2]] == batch.chosen_end_P.tolist()
        assert [b - 1 for _, b in spans[1::2]] == batch.rejected_end_P.tolist()
        ends = [*batch.chosen_end_P.tolist(), *batch.rejected_end_P.tolist()]
        assert all(batch.packed.token_ids_T[i] == data.tokenizer.im_end_id for i in ends)
        texts = [data.tokenizer.decode(batch.packed.token_ids_T[a:b].tolist()) for a, b in spans]
        for chosen, rejected in zip(texts[0::2], texts[1::2], strict=True):
            prompt = chosen.split("good")[0]
            assert rejected.startswith(prompt) and "bad" in rejected
            seen.append(prompt)
    assert len(seen) == len(set(seen)) == 10


def test_answers_are_rendered_with_their_thinking(chat_tokenizer_dir, write_jsonl):
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", [record(0, chosen="<think>\nwhy\n</think>\n\nyes")]))
    assert data.tokenizer.decode(data.pairs[0].chosen.token_ids).endswith("<think>\nwhy\n</think>\n\nyes<|im_end|>")
    assert "<think>\n\n</think>\n\nbad" in data.tokenizer.decode(data.pairs[0].rejected.token_ids)


def test_held_out_and_too_long_pairs(chat_tokenizer_dir, write_jsonl, caplog):
    rows = [record(i) for i in range(40)] + [record(99, chosen="long " * 100)]
    with caplog.at_level(logging.WARNING):
        data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", rows), held_out_fraction=0.3)
    assert data.dropped == 1 and "1 preference pairs dropped" in caplog.text
    assert data.held_out_pairs and len(data.pairs) + len(data.held_out_pairs) == 40
    val = [data.make_val_batch(i) for i in range(data.num_val_batches())]
    assert sum(b.num_pairs for b in val) == len(data.held_out_pairs)


def test_no_more_documents_than_allowed(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [record(i) for i in range(10)])
    data = make(chat_tokenizer_dir, path, batch_tokens=4096, max_documents=5, epochs=1)
    assert [data.make_batch(i).num_pairs for i in range(data.num_train_batches())] == [2] * 5
    with pytest.raises(UserError, match="a pair is two documents"):
        make(chat_tokenizer_dir, path, max_documents=1)


def test_nothing_left(chat_tokenizer_dir, write_jsonl):
    with pytest.raises(UserError, match="no pair is left to train on"):
        make(chat_tokenizer_dir, write_jsonl("a.jsonl", [record(0)]), batch_tokens=8)
    with pytest.raises(UserError, match="no preference record"):
        make(chat_tokenizer_dir, write_jsonl("b.jsonl", []))
