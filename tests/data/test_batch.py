import dataclasses

import pytest
import torch

from qwen3_lit.data.batch import PackedBatch, PreferenceBatch, PromptBatch
from qwen3_lit.data.packing import Document, pack_row


def row(**options) -> PackedBatch:
    return pack_row([Document([1, 2, 3], weight=0.5), Document([4, 5])], batch_tokens=8, max_documents=4, **options)


def test_to_keeps_every_field():
    batch = row(pad_rows=True)
    moved = batch.to("cpu")
    for field in dataclasses.fields(PackedBatch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    meta = batch.to(torch.device("meta"))
    tensors = [getattr(meta, f.name) for f in dataclasses.fields(PackedBatch)]
    assert all(t.device.type == "meta" for t in tensors if isinstance(t, torch.Tensor))


def test_counts_agree_with_the_tensors_when_nothing_was_counted():
    batch = row(pad_rows=True)
    bare = dataclasses.replace(batch, document_bounds=None, loss_tokens=None)
    assert (batch.num_tokens, batch.num_loss_tokens) == (bare.num_tokens, bare.num_loss_tokens) == (5, 3)
    assert batch.document_spans() == bare.document_spans()


def test_counts_and_spans_ask_no_device():
    meta = row(pad_rows=True).to("meta")
    assert (meta.num_tokens, meta.num_loss_tokens, meta.document_spans()) == (5, 3, [(0, 3), (3, 5)])


def test_document_spans_leave_padding_out():
    assert row(pad_rows=True).document_spans() == row().document_spans() == [(0, 3), (3, 5)]
    assert row(pad_rows=True).num_documents == 2


def test_without_loss_keeps_the_tokens():
    batch = row()
    empty = batch.without_loss()
    assert empty.num_loss_tokens == 0 and (empty.target_ids_T == -100).all()
    assert torch.equal(empty.token_ids_T, batch.token_ids_T)


def test_batch_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().max_seqlen = 1


def test_prompt_and_preference_batches_move():
    prompts = PromptBatch([{"answer": "1"}], [0])
    assert prompts.to("cpu") is prompts and len(prompts) == 1
    pairs = PreferenceBatch(row(), torch.tensor([2]), torch.tensor([4]))
    moved = pairs.to("cpu")
    assert moved.num_pairs == 1 and moved.num_tokens == 5
    assert pairs.without_loss().num_pairs == 0
