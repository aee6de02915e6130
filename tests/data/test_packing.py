import logging
import random

import pytest
import torch

from qwen3_lit.data.packing import (
    Document,
    LengthLimit,
    default_max_documents,
    pack_best_fit,
    pack_in_order,
    pack_row,
    plan_epoch,
    seeded_random,
)
from qwen3_lit.errors import UserError

A = Document([10, 11, 12, 13], [False, False, True, True])
B = Document([20, 21], None)
C = Document([30, 31, 32], [True, True, False], weight=0.25)


def test_row_by_hand():
    row = pack_row([A, B, C], batch_tokens=12, max_documents=5)
    assert row.token_ids_T.tolist() == [10, 11, 12, 13, 20, 21, 30, 31, 32]
    assert row.target_ids_T.tolist() == [-100, 12, 13, -100, 21, -100, 31, -100, -100]
    assert row.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 4, 6, 9, 9, 9, 9]
    assert row.loss_weights_T.tolist() == [1, 1, 1, 1, 1, 1, 0.25, 0.25, 0.25]
    assert row.token_mask_T is None
    assert (row.max_seqlen, row.num_tokens, row.num_loss_tokens) == (4, 9, 4)
    dtypes = row.token_ids_T.dtype, row.target_ids_T.dtype, row.position_ids_T.dtype, row.cu_seqlens.dtype
    assert dtypes == (torch.int64, torch.int64, torch.int64, torch.int32)


def test_padded_row_by_hand():
    row = pack_row([A, B], batch_tokens=11, max_documents=3, pad_rows=True, pad_token_id=7)
    assert row.token_ids_T.tolist() == [10, 11, 12, 13, 20, 21, 7, 7, 7, 7, 7]
    assert row.target_ids_T.tolist()[5:] == [-100] * 6
    assert row.token_mask_T.tolist() == [True] * 6 + [False] * 5
    assert row.position_ids_T.tolist()[6:] == [0, 1, 2, 3, 4]
    assert row.cu_seqlens.tolist() == [0, 4, 6, 11, 11]
    assert (row.max_seqlen, row.num_tokens, row.num_loss_tokens) == (5, 6, 3)
    assert row.loss_weights_T is None


def test_cu_seqlens_never_change_shape():
    shapes = set()
    for count in range(1, 6):
        for pad in (False, True):
            row = pack_row([B] * count, batch_tokens=10, max_documents=5, pad_rows=pad)
            shapes.add(tuple(row.cu_seqlens.shape))
            total = row.token_ids_T.numel()
            bounds = row.cu_seqlens.tolist()
            assert bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == total
            assert row.max_seqlen == max(b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True))
    assert shapes == {(7,)}
    assert default_max_documents(64) == 16 and default_max_documents(3200) == 100


def test_full_row_is_padded_by_nothing():
    row = pack_row([A, B], batch_tokens=6, max_documents=2, pad_rows=True)
    assert row.token_mask_T.all() and row.cu_seqlens.tolist() == [0, 4, 6, 6]


def test_weights_of_single_tokens_follow_the_predicted_token():
    row = pack_row([Document([1, 2, 3], weight=[9.0, 0.5, 2.0]), B])
    assert row.loss_weights_T.tolist() == [0.5, 2.0, 1.0, 1.0, 1.0]


def test_loss_tokens_are_kept_by_packing():
    rng = random.Random(0)
    documents = []
    for _ in range(200):
        n = rng.randint(2, 40)
        documents.append(Document([rng.randrange(60) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]))
    rows = [
        pack_row([documents[i] for i in row], batch_tokens=64, max_documents=8)
        for row in pack_best_fit([len(d) for d in documents], 64, 8)
    ]
    expected = sorted(d.token_ids[i] for d in documents for i in range(1, len(d)) if d.loss_mask[i])
    assert sorted(t for row in rows for t in row.target_ids_T.tolist() if t != -100) == expected
    assert sum(row.num_loss_tokens for row in rows) == sum(d.num_loss_tokens for d in documents) == len(expected)


@pytest.mark.parametrize("pack", [pack_in_order, pack_best_fit])
@pytest.mark.parametrize("max_documents", [None, 1, 3])
def test_plans_hold_every_document_once_within_the_limits(pack, max_documents):
    rng = random.Random(1)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    rows = pack(lengths, 100, max_documents)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert all(len(row) <= (max_documents or 500) for row in rows)


def test_in_order_keeps_the_order_and_best_fit_pads_less():
    rng = random.Random(2)
    lengths = [rng.randint(1, 100) for _ in range(500)]
    in_order, best = pack_in_order(lengths, 128), pack_best_fit(lengths, 128)
    assert [i for row in in_order for i in row] == list(range(500))
    assert len(best) < len(in_order)
    assert sum(lengths) / (128 * len(best)) > 0.97
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_in_order([], 10) == pack_best_fit([], 10) == []


def test_overlong_document_is_refused():
    for pack in (pack_in_order, pack_best_fit):
        with pytest.raises(UserError, match="11 tokens does not fit a row of 10"):
            pack([3, 11], 10)


def test_epochs_are_reshuffled_by_seed():
    lengths = [1 + i % 30 for i in range(300)]
    first = plan_epoch(lengths, 64, seed=0, epoch=0, window=64)
    assert first == plan_epoch(lengths, 64, seed=0, epoch=0, window=64)
    assert first != plan_epoch(lengths, 64, seed=0, epoch=1, window=64)
    assert first != plan_epoch(lengths, 64, seed=1, epoch=0, window=64)
    assert sorted(i for row in first for i in row) == list(range(300))
    assert seeded_random(0, "a", 1).random() != seeded_random(0, "a", 2).random()
    # Stable for ever: a resumed run on another machine must see the same order.
    assert plan_epoch([3, 5, 2, 4, 1, 6], 8, seed=7, epoch=2) == [[5, 2], [3, 4], [1, 0]]


def test_length_limit_drops_or_truncates_and_counts(caplog):
    long = Document(list(range(10)), [False] * 5 + [True] * 5, weight=[1.0] * 10)
    drop = LengthLimit(8)
    assert drop.apply(long) is None and drop.apply(A) is A
    assert drop.counts() == {"seen": 2, "dropped": 1, "truncated": 0, "without_loss": 0, "tokens_cut": 10}
    cut = LengthLimit(8, "truncate")
    shorter = cut.apply(long)
    assert shorter is not None
    assert list(shorter.token_ids) == list(range(8)) and sum(shorter.loss_mask) == 3 and len(shorter.weight) == 8
    assert LengthLimit(5, "truncate").apply(long) is None  # nothing trained is left
    assert cut.counts()["truncated"] == 1 and cut.counts()["tokens_cut"] == 2
    with caplog.at_level(logging.WARNING):
        drop.report("some.jsonl")
        LengthLimit(8).report("other.jsonl")
    assert "some.jsonl: of 2 samples 1 dropped" in caplog.text and "other.jsonl" not in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_row([]), "cannot pack 0 documents"),
        (lambda: pack_row([Document([])]), "none may be empty"),
        (lambda: pack_row([A], batch_tokens=3), "4 tokens in one row, but batch_tokens is 3"),
        (lambda: pack_row([B, B], batch_tokens=9, max_documents=1), "max_documents is 1"),
        (lambda: pack_row([A], pad_rows=True), "pad_rows needs batch_tokens"),
        (lambda: pack_row([Document([1, 2], [True])]), "loss mask of 1 entries for 2 tokens"),
        (lambda: LengthLimit(1), "max_tokens is 1"),
        (lambda: LengthLimit(9, "split"), "overlong is 'split'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(UserError, match=message):
        call()
