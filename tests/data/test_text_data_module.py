import logging
import random
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.conversation_data import ConversationData
from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.data.text_data_module import BatchStream, TextDataModule
from qwen3_lit.errors import UserError


class CountingData(TextDataModule):
    """Batch i holds the token i: what was seen is read off the tokens."""

    def __init__(self, total: int | None = None, val: int = 0, loads: bool = True, **options: Any) -> None:
        super().__init__("unused", batch_tokens=8, **options)
        self.total, self.val, self.loads = total, val, 0

    def load_data(self) -> None:
        self.loads += 1

    def make_batch(self, index: int) -> PackedBatch:
        return pack_row([Document([index, index])], batch_tokens=8)

    def num_train_batches(self) -> int | None:
        return self.total

    def make_val_batch(self, index: int) -> PackedBatch:
        return pack_row([Document([1000 + index] * 2)], batch_tokens=8)

    def num_val_batches(self) -> int:
        return self.val


class Killed(RuntimeError):
    pass


class Recorder(L.LightningModule):
    """Trains one number on the tokens and keeps what it was given."""

    def __init__(self, kill_at: int | None = None, manual: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.kill_at = kill_at
        self.automatic_optimization = not manual
        self.seen: list[list[int]] = []
        self.seen_in_validation: list[tuple[int, int]] = []

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        if self.kill_at is not None and self.trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.kill_at:
            raise Killed
        self.seen.append(batch.token_ids_T.tolist())
        loss = (self.weight - batch.token_ids_T.float().mean()) ** 2
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        self.seen_in_validation.append((int(batch.token_ids_T[0]), batch.num_loss_tokens))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, data: TextDataModule, module: Recorder, resume: bool = False, **options: Any) -> L.Trainer:
    checkpoints = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=options.pop("save_every", 1), save_top_k=-1
    )
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path="last" if resume else None)
    return trainer


def conversation_file(folder: Path, count: int, write_jsonl: Any) -> str:
    rng = random.Random(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} + {rng.randrange(99)}"},
                {"role": "assistant", "content": str(i) * rng.randint(1, 9), "reasoning_content": "let me think"},
            ]
        }
        for i in range(count)
    ]
    return write_jsonl("train.jsonl", rows)


MODES: dict[str, dict[str, Any]] = {
    "endless": {"data": {"epochs": None}, "trainer": {"max_steps": 23}},
    "limited": {"data": {"epochs": 3}, "trainer": {"max_epochs": 1}},
    "limited_by_steps": {"data": {"epochs": 3}, "trainer": {"max_steps": 1000}},
    "endless_in_short_epochs": {"data": {"epochs": None}, "trainer": {"max_steps": 23, "limit_train_batches": 5}},
    "accumulated": {"data": {"epochs": None}, "trainer": {"max_steps": 11, "accumulate_grad_batches": 2}},
}


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("name", MODES)
def test_killed_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, write_jsonl, chat_tokenizer_dir, name, prefetch):
    path = conversation_file(tmp_path, 30, write_jsonl)
    options = MODES[name]

    def data() -> ConversationData:
        return ConversationData(
            chat_tokenizer_dir, [path], batch_tokens=192, seed=5, prefetch_batches=prefetch, **options["data"]
        )

    whole = Recorder()
    finished = fit(tmp_path / "whole", whole_data := data(), whole, **options["trainer"])
    steps = len(whole.seen)
    rows_of_an_epoch = whole_data._rows.end_of_epoch(0)
    assert steps > 2 * rows_of_an_epoch, "the run must go through several epochs of the data"

    every = options["trainer"].get("accumulate_grad_batches", 1)
    seen: list[list[int]] = []
    weight = None
    kills = sorted(random.Random(name + str(prefetch)).sample(range(every, steps, every), 3))
    for kill_at in [*kills, None]:
        module = Recorder(kill_at)
        try:
            trainer = fit(tmp_path / "killed", data(), module, resume=bool(seen), **options["trainer"])
            weight = module.weight.item()
            assert trainer.global_step == finished.global_step
        except Killed:
            pass
        assert module.seen, "each piece of the run trains something"
        seen += module.seen
    assert seen == whole.seen
    assert weight == whole.weight.item()


def test_kill_between_two_checkpoints_goes_back_to_the_checkpoint(tmp_path):
    whole, killed, resumed = Recorder(), Recorder(kill_at=8), Recorder()
    fit(tmp_path / "whole", CountingData(), whole, max_steps=12)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", CountingData(), killed, max_steps=12, save_every=3)
    fit(tmp_path / "killed", CountingData(), resumed, resume=True, max_steps=12, save_every=3)
    assert whole.seen == [[i, i] for i in range(12)]
    assert killed.seen + resumed.seen[2:] == whole.seen and resumed.seen[0] == [6, 6]
    assert resumed.weight.item() == whole.weight.item()


def test_manual_optimization_resumes_too(tmp_path):
    killed, resumed = Recorder(kill_at=4, manual=True), Recorder(manual=True)
    with pytest.raises(Killed):
        fit(tmp_path, CountingData(), killed, max_steps=9)
    fit(tmp_path, CountingData(), resumed, resume=True, max_steps=9)
    assert killed.seen + resumed.seen == [[i, i] for i in range(9)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_used_up_data_end_the_run(tmp_path, prefetch):
    module = Recorder()
    fit(tmp_path, CountingData(total=7, prefetch_batches=prefetch), module, max_steps=50)
    assert module.seen == [[i, i] for i in range(7)]
    again = Recorder()
    fit(tmp_path, CountingData(total=7, prefetch_batches=prefetch), again, resume=True, max_steps=50)
    assert again.seen == []


def test_validation_in_the_middle_does_not_disturb_the_order(tmp_path):
    module = Recorder()
    fit(
        tmp_path,
        CountingData(val=3),
        module,
        max_steps=6,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
    )
    assert module.seen == [[i, i] for i in range(6)]
    assert module.seen_in_validation == [(1000, 1), *[(1000, 1), (1001, 1), (1002, 1)] * 3]


class FakeTrainer:
    """Stands for one rank of several."""

    def __init__(self, rank: int, world_size: int, processed: int = 0) -> None:
        self.global_rank, self.world_size, self.should_stop = rank, world_size, False
        self.overfit_batches = 0

        class Node:
            pass

        node: Any = self
        for name in ("fit_loop", "epoch_loop", "batch_progress", "total"):
            setattr(node, name, Node())
            node = getattr(node, name)
        node.processed = processed


def rank_data(rank: int, world_size: int, processed: int = 0, state: Any = None, **options: Any) -> CountingData:
    data = CountingData(prefetch_batches=0, **options)
    data.trainer = FakeTrainer(rank, world_size, processed)  # type: ignore[assignment]
    if state is not None:
        data.load_state_dict(state)
    return data


def first(stream: Any, count: int | None = None) -> list[int]:
    tokens = []
    for batch in stream:
        tokens.append(int(batch.token_ids_T[0]))
        if len(tokens) == count:
            break
    return tokens


def test_ranks_share_one_stream_and_another_number_of_ranks_goes_on_with_it():
    assert [first(rank_data(r, 4).train_dataloader(), 3) for r in range(4)] == [[r, r + 4, r + 8] for r in range(4)]
    state = rank_data(0, 4, processed=3).state_dict()
    assert state["batches_done"] == 12
    # The trainer restores its own count before it asks for the loader.
    two = [rank_data(r, 2, processed=3, state=state) for r in range(2)]
    assert [first(d.train_dataloader(), 2) for d in two] == [[12, 14], [13, 15]]
    for data in two:
        data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 5  # two more steps on two ranks
    assert {d.state_dict()["batches_done"] for d in two} == {16}


def test_ranks_make_equally_many_steps():
    loaders = [rank_data(r, 4, total=10).train_dataloader() for r in range(4)]
    assert [len(x) for x in loaders] == [3, 3, 3, 3]
    assert sorted(i for x in loaders for i in first(x)) == list(range(12))
    resumed = [
        rank_data(r, 2, processed=1, total=10, state={"batches_done": 4, "processed": 1}).train_dataloader()
        for r in range(2)
    ]
    assert [len(x) for x in resumed] == [1 + 3, 1 + 3]
    assert sorted(i for x in resumed for i in first(x)) == list(range(4, 10))


def test_ranks_get_equally_many_validation_batches_and_no_row_counts_twice():
    batches = [list(rank_data(r, 4, val=6).val_dataloader()) for r in range(4)]
    assert [len(b) for b in batches] == [2, 2, 2, 2]
    counted = sorted(int(b.token_ids_T[0]) for rank in batches for b in rank if b.num_loss_tokens)
    assert counted == list(range(1000, 1006))
    assert rank_data(0, 4, val=0).val_dataloader() == []


def test_data_are_loaded_once():
    data = CountingData()
    data.setup("fit")
    data.setup("validate")
    data.train_dataloader()
    assert data.loads == 1


def test_other_order_settings_are_said(caplog):
    state = CountingData(seed=1).state_dict()
    with caplog.at_level(logging.WARNING):
        CountingData(seed=1).load_state_dict(state)
        assert caplog.text == ""
        CountingData(seed=2).load_state_dict(state)
    assert "seed (1 -> 2)" in caplog.text


def test_no_batch_and_bad_settings_are_errors():
    with pytest.raises(UserError, match="no training batch"):
        CountingData(total=0).train_dataloader()
    for options, message in (
        ({"prefetch_batches": -1}, "prefetch_batches is -1"),
        ({"max_documents": 0}, "max_documents is 0"),
    ):
        with pytest.raises(UserError, match=message):
            CountingData(**options)
    with pytest.raises(UserError, match="batch_tokens is 1"):
        TextDataModule("t", batch_tokens=1)


def test_error_in_the_prefetch_thread_reaches_the_consumer_at_its_batch():
    def make(index: int) -> int:
        if index == 3:
            raise UserError("row 3 is broken")
        return index

    seen = []
    with pytest.raises(UserError, match="row 3 is broken"):
        for value in BatchStream(make, lambda: 0, prefetch=2):
            seen.append(value)
    assert seen == [0, 1, 2]


def test_prefetch_thread_ends_with_the_iterator():
    iterator = iter(BatchStream(lambda i: i, lambda: 0, prefetch=2))
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == "batch-prefetch"]
