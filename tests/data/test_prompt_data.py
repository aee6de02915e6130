import logging
from collections import Counter
from types import SimpleNamespace

import pytest

from qwen3_lit.data.prompt_data import PromptData
from qwen3_lit.errors import UserError


def problem(i: int, **more):
    return {"prompt": f"{i} + {i}?", "answer": str(2 * i), "task": "add" if i % 2 else "sub", "free": i, **more}


def make(chat_tokenizer_dir, path, **options) -> PromptData:
    data = PromptData(chat_tokenizer_dir, [path], **{"prompts_per_step": 4, **options})
    data.setup("fit")
    return data


def test_every_epoch_shows_every_problem_once_in_a_new_order(chat_tokenizer_dir, write_jsonl):
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", [problem(i) for i in range(10)]))
    stream = [i for index in range(10) for i in data.make_batch(index).indices]
    epochs = [stream[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    batch = data.make_batch(3)
    assert [p["free"] for p in batch.problems] == batch.indices and batch.batch_index == 3
    assert batch.problems[0]["messages"][0]["content"] == f"{batch.indices[0]} + {batch.indices[0]}?"


def test_batches_are_a_function_of_seed_and_index(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [problem(i) for i in range(10)])
    one, two, other = (make(chat_tokenizer_dir, path, seed=s) for s in (0, 0, 1))
    backwards = [two.make_batch(i) for i in reversed(range(8))][::-1]
    assert [one.make_batch(i) for i in range(8)] == backwards
    assert [other.make_batch(i) for i in range(8)] != backwards


def test_refill_is_repeatable_and_excludes(chat_tokenizer_dir, write_jsonl):
    data = make(chat_tokenizer_dir, write_jsonl("a.jsonl", [problem(i) for i in range(30)]))
    spare = data.refill(2, 0, 5, exclude=set(range(20)))
    assert spare == data.refill(2, 0, 5, exclude=set(range(20)))
    assert len(set(spare.indices)) == 5 and min(spare.indices) >= 20
    assert data.refill(2, 1, 5).indices != data.refill(2, 0, 5).indices != data.refill(3, 0, 5).indices
    assert len(data.refill(0, 0, 99)) == 30 and len(data.refill(0, 0, 3, exclude=set(range(30)))) == 0


def test_held_out_problems_stay_apart(chat_tokenizer_dir, write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [*[problem(i) for i in range(10)], problem(50, split="held_out")])
    held_out = write_jsonl("h.jsonl", [problem(3), problem(60), problem(61)])
    with caplog.at_level(logging.WARNING):
        data = make(chat_tokenizer_dir, path, held_out_path=held_out)
    assert [p["free"] for p in data.held_out_problems] == [50, 3, 60, 61]
    assert [p["free"] for p in data.problems] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert data.dropped["held_out_duplicate"] == 1 and "held_out_duplicate" in caplog.text
    val = [p["free"] for batch in data.val_dataloader() for p in batch.problems]
    assert val == [50, 3, 60, 61]
    assert make(chat_tokenizer_dir, path, prompts_per_step=3).num_val_batches() == 1


class FakeTrainer:
    """Stands for one rank of several."""

    def __init__(self, rank: int, world_size: int, steps: int = 0) -> None:
        self.global_rank, self.world_size, self.overfit_batches = rank, world_size, 0
        total = SimpleNamespace(processed=steps)
        progress = SimpleNamespace(total=total)
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))


def test_a_step_has_the_same_problems_on_any_number_of_ranks(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [problem(i) for i in range(30)])

    def steps_of(world_size, count, done=0, state=None):
        loaders = []
        for rank in range(world_size):
            data = make(chat_tokenizer_dir, path)
            data.trainer = FakeTrainer(rank, world_size, done)
            if state is not None:
                data.load_state_dict(state)
            loaders.append(iter(data.train_dataloader()))
        return [sorted(i for loader in loaders for i in next(loader).indices) for _ in range(count)]

    alone = steps_of(1, 6)
    assert steps_of(2, 6) == steps_of(4, 6) == alone
    four = make(chat_tokenizer_dir, path)
    four.trainer = FakeTrainer(0, 4, steps=2)
    assert steps_of(2, 4, done=2, state=four.state_dict()) == alone[2:]
    three = make(chat_tokenizer_dir, path)
    three.trainer = FakeTrainer(0, 3)
    with pytest.raises(UserError, match="3 ranks cannot share equally"):
        three.make_batch(0)


def test_tasks_and_long_prompts(chat_tokenizer_dir, write_jsonl):
    path = write_jsonl("a.jsonl", [*[problem(i) for i in range(10)], problem(11) | {"prompt": "x " * 300}])
    data = make(chat_tokenizer_dir, path, tasks=["add"], max_prompt_tokens=60)
    assert Counter(p["task"] for p in data.problems) == {"add": 5}
    assert data.dropped == {"other_task": 5, "held_out_duplicate": 0, "too_long": 1}
    with pytest.raises(UserError, match="no problem is left to train on"):
        make(chat_tokenizer_dir, path, tasks=["mul"])


def test_errors(chat_tokenizer_dir, write_jsonl):
    with pytest.raises(UserError, match=r"a\.jsonl:2: field 'answer': missing"):
        make(chat_tokenizer_dir, write_jsonl("a.jsonl", [problem(1), {"prompt": "x", "task": "t"}]))
    with pytest.raises(UserError, match="no problem record"):
        make(chat_tokenizer_dir, write_jsonl("b.jsonl", []))
    with pytest.raises(UserError, match="prompts_per_step is 0"):
        PromptData(chat_tokenizer_dir, ["a"], prompts_per_step=0)
    with pytest.raises(UserError, match="paths is empty"):
        PromptData(chat_tokenizer_dir, [])
