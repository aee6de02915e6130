from collections import Counter

import numpy as np
import pytest

from qwen3_lit.data.mixture import (
    LengthBucket,
    Mixture,
    SourceStream,
    TokenStream,
    apportion,
    permute,
)
from qwen3_lit.data.window_packing import Span, pack_window
from qwen3_lit.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_bijection(size: int) -> None:
    image = permute(np.arange(size), size, key=5)
    assert sorted(image.tolist()) == list(range(size))


def test_permute_shuffles_evenly() -> None:
    size, trials = 6, 3000
    seen = np.zeros((size, size))
    for key in range(trials):
        seen[np.arange(size), permute(np.arange(size), size, key)] += 1
    assert np.abs(seen / trials - 1 / size).max() < 0.05


def test_permute_of_a_part_equals_the_part_of_the_whole() -> None:
    whole = permute(np.arange(100_000), 100_000, 3)
    assert (permute(np.array([5, 77_777]), 100_000, 3) == whole[[5, 77_777]]).all()
    assert np.abs(np.corrcoef(np.arange(100_000), whole)[0, 1]) < 0.02


def lengths_of(count: int, low: int = 5, high: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, count).astype(np.uint32)


def test_an_epoch_of_a_token_stream_holds_each_token_once() -> None:
    lengths = lengths_of(700)
    stream = TokenStream(lengths, key=1)
    spans = stream.spans(0, stream.num_tokens)
    assert sorted(spans) == [Span(i, 0, int(n)) for i, n in enumerate(lengths)]
    second = stream.spans(stream.num_tokens, 2 * stream.num_tokens)
    assert sorted(second) == sorted(spans) and second != spans


def test_ranges_of_a_token_stream_join_without_gap_or_overlap() -> None:
    lengths = lengths_of(700)
    stream = TokenStream(lengths, key=1)

    def tokens(spans: list[Span]) -> list[tuple[int, int]]:
        return [(s.document, at) for s in spans for at in range(s.start, s.stop)]

    total = 2 * stream.num_tokens + 100
    whole = tokens(stream.spans(0, total))
    cuts = [0, 1, 3000, 3001, stream.num_tokens - 1, stream.num_tokens + 5, total]
    parts = [tokens(TokenStream(lengths, key=1).spans(a, b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    assert sum(parts, []) == whole


def test_pack_window_fills_exactly_and_prefers_whole_documents() -> None:
    spans = [Span(0, 0, 60), Span(1, 0, 40), Span(2, 0, 70), Span(3, 0, 30)]
    packed = pack_window(spans, slots=2, slot_tokens=100)
    assert sorted(map(sorted, packed)) == [[Span(0, 0, 60), Span(1, 0, 40)], [Span(2, 0, 70), Span(3, 0, 30)]]


def test_pack_window_cuts_what_fits_nowhere() -> None:
    packed = pack_window([Span(0, 0, 60), Span(1, 0, 60), Span(2, 0, 60), Span(3, 10, 30)], slots=2, slot_tokens=100)
    assert [sum(s.stop - s.start for s in slot) for slot in packed] == [100, 100]
    covered = Counter((s.document, at) for slot in packed for s in slot for at in range(s.start, s.stop))
    assert set(covered.values()) == {1} and len(covered) == 200


def test_pack_window_spreads_pieces_that_gather_in_one_slot() -> None:
    spans = [Span(i, 0, 101) for i in range(31)] + [Span(31, 0, 69)]
    pieces = 31 * 2 + 1
    assert max(map(len, pack_window(spans, slots=32, slot_tokens=100))) == 32
    packed = pack_window(spans, slots=32, slot_tokens=100, max_pieces=2 * pieces // 32 + 2)
    assert max(map(len, packed)) <= 5 and {sum(s.stop - s.start for s in slot) for slot in packed} == {100}
    covered = Counter((s.document, at) for slot in packed for s in slot for at in range(s.start, s.stop))
    assert set(covered.values()) == {1} and len(covered) == 3200


@pytest.mark.parametrize("seed", range(20))
def test_pack_window_keeps_its_promise_for_any_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.pareto(0.3 + rng.random(), 400) + 1, 5000).astype(int)
    slots = -(-int(lengths.sum()) // 128)
    lengths[0] += slots * 128 - int(lengths.sum())
    spans = [Span(i, 0, int(n)) for i, n in enumerate(lengths)]
    pieces = sum(-(-int(n) // 128) for n in lengths)
    packed = pack_window(spans, slots, 128, max_pieces=2 * pieces // slots + 2)
    assert {sum(s.stop - s.start for s in slot) for slot in packed} == {128}


def test_pack_window_says_when_the_documents_are_too_many() -> None:
    with pytest.raises(UserError, match="200 documents in 2 sequences of 100 tokens.*allows 50"):
        pack_window([Span(i, 0, 1) for i in range(200)], slots=2, slot_tokens=100, max_pieces=50)


def test_slots_are_full_and_cover_an_epoch_once() -> None:
    lengths = lengths_of(2000, 5, 400)
    stream = SourceStream(lengths, seed=0, name="a", slot_tokens=128, window_slots=16)
    slots = stream.epoch_tokens // 128 // 16 * 16
    covered: Counter[tuple[int, int]] = Counter()
    for ordinal in range(slots):
        spans = stream.slot(ordinal)
        assert sum(s.stop - s.start for s in spans) == 128
        covered.update((s.document, at) for s in spans for at in range(s.start, s.stop))
    assert set(covered.values()) == {1} and len(covered) == slots * 128


def test_slot_is_a_pure_function_of_its_number() -> None:
    lengths = lengths_of(500)
    make = lambda **kw: SourceStream(lengths, **{"seed": 0, "name": "a", "slot_tokens": 64, **kw})  # noqa: E731
    forward = make()
    expected = [forward.slot(i) for i in range(1000)]
    backward = make()
    assert [backward.slot(i) for i in reversed(range(1000))] == expected[::-1]
    assert [make(seed=1).slot(i) for i in range(50)] != expected[:50]
    assert [make(name="b").slot(i) for i in range(50)] != expected[:50]


def test_most_tokens_are_in_whole_documents() -> None:
    lengths = lengths_of(20_000, 10, 300)
    stream = SourceStream(lengths, seed=0, name="a", slot_tokens=512)
    cut = sum(s.stop - s.start for i in range(640) for s in stream.slot(i) if s.stop - s.start != lengths[s.document])
    assert cut / (640 * 512) < 0.04


def test_length_buckets_keep_their_shares_and_bounds() -> None:
    lengths = lengths_of(4000, 10, 1500)
    buckets = [LengthBucket(256, 512, 0.75), LengthBucket(64, 256, 0.25)]
    stream = SourceStream(lengths, seed=0, name="a", slot_tokens=512, buckets=buckets)
    tokens = Counter[str]()
    for i in range(640):
        for s in stream.slot(i):
            length = min(int(lengths[s.document]), 512)
            assert length > 64
            tokens["long" if length > 256 else "short"] += s.stop - s.start
    assert tokens["long"] / (640 * 512) == 0.75


def test_one_document_read_over_and_over_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lengths = np.array([100] + [20] * 400, np.uint32)
    buckets = [LengthBucket(60, None, 0.75), LengthBucket(0, 60, 0.25)]
    SourceStream(lengths, seed=0, name="a", slot_tokens=128, buckets=buckets)
    assert "1 documents (100 tokens) is read 240 times" in caplog.text


def test_empty_bucket_gives_its_share_away_and_no_document_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    short = lengths_of(100, 10, 50)
    stream = SourceStream(
        short, seed=0, name="a", slot_tokens=64, buckets=[LengthBucket(60, None, 0.5), LengthBucket(0, 60, 0.5)]
    )
    assert "no document of 61" in caplog.text and stream.num_documents == 100
    with pytest.raises(UserError, match="longest: 49"):
        SourceStream(short, seed=0, name="a", slot_tokens=64, buckets=[LengthBucket(60, None, 1.0)])


def test_mixture_keeps_weights_and_counts_ordinals() -> None:
    mixture = Mixture([3.0, 1.0], seed=0)
    located = [mixture.locate(g) for g in range(4096)]
    for source, share in ((0, 0.75), (1, 0.25)):
        assert [o for s, o in located if s == source] == list(range(int(4096 * share)))
    assert len({s for s, _ in located[:32]}) == 2
    assert Mixture([3.0, 1.0], seed=0).locate(4000) == located[4000]


def test_mixture_is_the_same_stream_on_any_number_of_ranks() -> None:
    mixture = Mixture([1.0, 2.0], seed=0)
    one = [mixture(step, 0, 1, 8) for step in range(6)]
    four = [sum((mixture(step, rank, 4, 2) for rank in range(4)), []) for step in range(6)]
    assert one == four


def test_apportion_and_bad_weights() -> None:
    assert apportion([0.75, 0.25], 7) == [5, 2]
    assert apportion([1e-9, 1.0], 10) == [1, 9]
    with pytest.raises(UserError, match="above 0"):
        Mixture([1.0, -1.0], seed=0)
