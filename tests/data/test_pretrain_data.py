from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_lit.curation.document_text import DocumentReader
from qwen3_lit.data.batch import PackedBatch
from qwen3_lit.data.corpus import PreparedCorpus
from qwen3_lit.data.mixture import LengthBucket
from qwen3_lit.data.prepare import PrepareSettings, prepare
from qwen3_lit.data.pretrain_data import PretrainData, SourceConfig
from qwen3_lit.data.tokenizer import load_tokenizer, train_tokenizer
from qwen3_lit.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def make_corpus(root: Path, name: str, count: int, seed: int, tokenizer: str, words: list[str] = WORDS) -> str:
    folder = root / f"{name}-texts"
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"{name} {i} " + " ".join(rng.choice(words, size=int(rng.integers(5, 120)))))
    settings = PrepareSettings(paths=(str(folder),), tokenizer=tokenizer, held_out_fraction=0.2)
    prepare(settings, root / name, DocumentReader(), workers=1)
    return str(root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    train_tokenizer([" ".join(WORDS) * 5 + " one two"], 300, folder / "tokenizer")
    make_corpus(folder, "one", 80, 1, str(folder / "tokenizer"))
    make_corpus(folder, "two", 60, 2, str(folder / "tokenizer"))
    return folder


def make_data(root: Path, **changes: object) -> PretrainData:
    options: dict = {
        "tokenizer_path": str(root / "tokenizer"),
        "sources": [SourceConfig(str(root / "one"), 3.0), SourceConfig(str(root / "two"), 1.0)],
        "sequence_length": 64,
        "batch_tokens": 256,
        "val_tokens": 600,
        "window_slots": 8,
        "prefetch_batches": 0,
    }
    data = PretrainData(**{**options, **changes})
    data.ensure_loaded()
    return data


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("token_ids_T", "target_ids_T", "position_ids_T", "cu_seqlens")
    )


def documents_of(root: Path, split: str) -> list[list[int]]:
    return [
        corpus.read(i).tolist()
        for corpus in (PreparedCorpus(str(root / "one"), split), PreparedCorpus(str(root / "two"), split))
        for i in range(len(corpus.lengths))
    ]


def test_rows_are_full_and_made_of_true_document_pieces(root: Path) -> None:
    data = make_data(root)
    known = documents_of(root, "train")
    joined = [" ".join(map(str, d)) + " " for d in known]
    for index in range(20):
        row = data.make_batch(index)
        assert row.token_ids_T.shape == (256,) and row.num_tokens == 256 and row.token_mask_T is None
        assert row.max_seqlen <= 64 and len(row.cu_seqlens) == data.max_documents + 2
        for start, end in row.document_spans():
            ids, targets = row.token_ids_T[start:end].tolist(), row.target_ids_T[start:end].tolist()
            assert row.position_ids_T[start:end].tolist() == list(range(end - start))
            assert targets[:-1] == ids[1:]
            # The last token predicts the document's next token, or nothing after <|endoftext|>.
            closed = ids[-1] == data.tokenizer.end_of_text_id
            assert (targets[-1] == -100) == closed
            piece = " ".join(map(str, ids if closed else [*ids, targets[-1]])) + " "
            assert any(piece in text for text in joined)
        assert row.num_loss_tokens == int((row.target_ids_T != -100).sum())


def test_a_row_is_a_pure_function_of_seed_and_index(root: Path) -> None:
    forward, backward, other = make_data(root), make_data(root), make_data(root, seed=1)
    rows = [forward.make_batch(i) for i in range(40)]
    assert all(same(backward.make_batch(i), rows[i]) for i in reversed(range(40)))
    assert not any(same(other.make_batch(i), rows[i]) for i in range(40))


def test_an_epoch_trains_every_token_once(root: Path) -> None:
    data = make_data(root, sources=[SourceConfig(str(root / "one"))], batch_tokens=64, window_slots=1)
    total = int(PreparedCorpus(str(root / "one")).lengths.sum())
    rows = [data.make_batch(i) for i in range(total // 64)]
    expected = np.bincount(
        np.concatenate([np.array(d) for d in documents_of(root, "train")[: _count(root)]]), minlength=300
    )
    found = np.bincount(torch.cat([r.token_ids_T for r in rows]).numpy(), minlength=300)
    assert (expected - found >= 0).all() and (expected - found).sum() == total % 64


def _count(root: Path) -> int:
    return len(PreparedCorpus(str(root / "one")).lengths)


def test_weights_are_shares_of_tokens(root: Path, tmp_path: Path) -> None:
    # No word occurs in both corpora, so that every piece of a document tells where it comes from.
    words = {"left": WORDS[:5], "right": WORDS[5:]}
    tokenizer = str(root / "tokenizer")
    sources = [
        SourceConfig(make_corpus(tmp_path, name, 70, 3, tokenizer, words[name]), weight)
        for name, weight in (("left", 3.0), ("right", 1.0))
    ]
    encode = load_tokenizer(tokenizer).encode
    ids = {name: set(encode(" ".join(["", *words[name]]))) for name in words}
    ids = {"left": ids["left"] - ids["right"], "right": ids["right"] - ids["left"]}
    data = make_data(root, sources=sources, batch_tokens=64)
    tokens = {"left": 0, "right": 0}
    for index in range(1024):
        row = data.make_batch(index)
        for start, end in row.document_spans():
            piece = set(row.token_ids_T[start:end].tolist())
            (name,) = [name for name in tokens if piece & ids[name]] or ["neither"]
            if name in tokens:
                tokens[name] += end - start
    assert sum(tokens.values()) > 0.97 * 1024 * 64  # the rest are pieces of a file's number alone
    assert tokens["left"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.04)


def test_any_number_of_ranks_sees_the_same_stream(root: Path) -> None:
    data = make_data(root)
    # TextDataModule gives rank r of W the indices r, r + W, ...: the union is the same, whatever W.
    single = [data.make_batch(i) for i in range(12)]
    for world in (2, 3):
        by_rank = [[make_data(root).make_batch(i) for i in range(rank, 12, world)] for rank in range(world)]
        assert all(same(by_rank[i % world][i // world], single[i]) for i in range(12))


def test_resume_goes_on_where_it_was(root: Path) -> None:
    whole = iter(make_data(root).train_dataloader())
    expected = [next(whole) for _ in range(8)]
    resumed = make_data(root, prefetch_batches=2)
    resumed.load_state_dict({"batches_done": 5, "processed": 5, "order_settings": resumed.order_settings()})
    rest = iter(resumed.train_dataloader())
    assert all(same(next(rest), expected[i]) for i in range(5, 8))


def test_a_resume_on_another_corpus_of_the_name_is_warned_of(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpora = [make_corpus(tmp_path, name, 60 + i, i, str(root / "tokenizer")) for i, name in enumerate(("a", "b"))]
    before, after = (make_data(root, sources=[SourceConfig(path, name="text")]) for path in corpora)
    before.load_state_dict({"batches_done": 5, "processed": 5, "order_settings": before.order_settings()})
    assert "differ from the checkpoint's" not in caplog.text
    after.load_state_dict(before.state_dict())
    assert "corpora ([[" in caplog.text and "differ from the checkpoint's" in caplog.text


def test_held_out_rows_are_fixed_limited_and_held_out(root: Path) -> None:
    data = make_data(root)
    rows = [data.make_val_batch(i) for i in range(data.num_val_batches())]
    assert 500 <= sum(r.num_tokens for r in rows) <= 600
    assert all(r.token_ids_T.shape == (256,) for r in rows)
    assert all(
        same(a, b) for a, b in zip(rows, (make_data(root, seed=7).make_val_batch(i) for i in range(9)), strict=False)
    )
    held_out = [" ".join(map(str, d)) for d in documents_of(root, "held_out")]
    for row in rows:
        for start, end in row.document_spans():
            assert any(" ".join(map(str, row.token_ids_T[start:end].tolist())) in text for text in held_out)
    assert make_data(root, val_tokens=0).num_val_batches() == 0


def test_held_out_minimum_length(root: Path) -> None:
    data = make_data(root, val_min_tokens=64, val_tokens=100_000)
    long = [d for d in documents_of(root, "held_out") if len(d) >= 64]
    tokens = sum(data.make_val_batch(i).num_tokens for i in range(data.num_val_batches()))
    assert sum(map(len, long)) - len(long) <= tokens <= sum(map(len, long))


@pytest.mark.parametrize(("length", "val_tokens"), [(40, 100_000), (30, 600), (60, 0)])
def test_long_held_out_rows_are_one_piece_of_one_document(root: Path, length: int, val_tokens: int) -> None:
    data = make_data(root, val_tokens=val_tokens)
    rows = data.long_val_batches(length)
    expected = []
    for name, share in (("one", 0.75), ("two", 0.25)):
        corpus = PreparedCorpus(str(root / name), "held_out")
        documents = [corpus.read(i).tolist() for i in range(len(corpus.lengths))]
        pieces = [d[at : at + length] for d in documents for at in range(0, len(d) - length + 1, length)]
        expected += pieces[: max(int(share * val_tokens) // length, 1)]
    assert [row.token_ids_T.tolist() for row in rows] == expected
    assert all(row.document_spans() == [(0, length)] for row in rows)
    with pytest.raises(UserError, match="no held-out document of 100000 tokens"):
        data.long_val_batches(100_000)


def test_length_mix(root: Path) -> None:
    data = make_data(root, length_mix=[LengthBucket(48, None, 0.75), LengthBucket(20, 48, 0.25)])
    longest = {tuple(d[:20]): len(d) for d in documents_of(root, "train")}
    row_documents = [
        tuple(row.token_ids_T[a : a + 20].tolist())
        for row in map(data.make_batch, range(16))
        for a, b in row.document_spans()
        if b - a >= 20
    ]
    assert all(longest[d] > 20 for d in row_documents if d in longest)


def test_ends_of_documents_longer_than_a_sequence_fit_the_rows(root: Path, tmp_path: Path) -> None:
    # Every document leaves a piece of 1 token, and best-fit gathers those of a whole window in one sequence.
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):
        (folder / f"{i}.txt").write_text("".join(rng.choice(list("bcdfghjklmnpqrstvwxz"), size=64)))
    settings = PrepareSettings(paths=(str(folder),), tokenizer=str(root / "tokenizer"), held_out_fraction=0.2)
    prepare(settings, tmp_path / "corpus", DocumentReader(), workers=1)
    data = make_data(
        root, sources=[SourceConfig(str(tmp_path / "corpus"))], batch_tokens=128, window_slots=64, val_tokens=0
    )
    assert set(data.document_lengths().tolist()) == {65}
    assert data.max_documents == 2 * 16
    rows = [data.make_batch(index) for index in range(64)]
    assert all(row.num_tokens == 128 and len(row.cu_seqlens) == 34 for row in rows)


def test_wrong_tokenizer_is_refused(root: Path, tmp_path: Path) -> None:
    train_tokenizer(["other words entirely, to be different"], 290, tmp_path / "other")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        make_data(root, tokenizer_path=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 100}, "data.batch_tokens is 100"),
        ({"sources": []}, "data.sources is empty"),
        ({"length_mix": [LengthBucket(0, 10, 0.5)]}, "add up to 0.5"),
        ({"window_slots": 0}, "data.window_slots 0"),
        ({"max_documents": 3}, "data.max_documents is 3: expected 4 or more"),
    ],
)
def test_bad_settings(root: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_data(root, **changes)


def test_sources_of_one_name_and_missing_sources(root: Path) -> None:
    with pytest.raises(UserError, match="not all different"):
        make_data(root, sources=[SourceConfig(str(root / "one"))] * 2)
    with pytest.raises(UserError, match="does not exist"):
        make_data(root, sources=[SourceConfig(str(root / "missing"))])


def test_tokenizer_of_the_corpus_is_loaded_by_contents_not_path(root: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for file in (root / "tokenizer").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer(tmp_path / "copy").fingerprint == load_tokenizer(root / "tokenizer").fingerprint
    make_data(root, tokenizer_path=str(tmp_path / "copy"))
