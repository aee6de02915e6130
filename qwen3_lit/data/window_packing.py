"""Pieces of documents fill equal slots exactly: best-fit, and an even order where that crowds a slot."""

import bisect
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from qwen3_lit.errors import UserError


class Span(NamedTuple):
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


def pack_window(spans: Sequence[Span], slots: int, slot_tokens: int, max_pieces: int | None = None) -> list[list[Span]]:
    """Spans of ``slots * slot_tokens`` tokens in all -> ``slots`` lists of exactly ``slot_tokens`` tokens each.

    Best-fit, longest first (spans longer than a slot are cut to slots first); what fits nowhere whole is cut to fill
    the holes. Where that puts more than ``max_pieces`` pieces into one slot (the short ends of long documents gather in
    the last one), the window is laid end to end in ``_level_order`` instead: P pieces then give a slot at most
    2 P / slots + 2 of them. Deterministic.

    Raises:
        UserError: the pieces are too many for ``max_pieces`` in either way.
    """
    pieces = [
        Span(span.document, at, min(at + slot_tokens, span.stop))
        for span in spans
        for at in range(span.start, span.stop, slot_tokens)
    ]
    longest_first = [pieces[i] for i in sorted(range(len(pieces)), key=lambda i: (-_size(pieces[i]), i))]
    packed: list[list[Span]] = [[] for _ in range(slots)]
    free = [(slot_tokens, slot) for slot in range(slots)]
    homeless: list[Span] = []
    for piece in longest_first:
        at = bisect.bisect_left(free, (_size(piece), -1))
        if at == len(free):
            homeless.append(piece)
            continue
        room, slot = free.pop(at)
        packed[slot].append(piece)
        room -= _size(piece)
        if room:
            bisect.insort(free, (room, slot))
    _fill(packed, free[::-1], homeless)
    if max_pieces is None or max(map(len, packed)) <= max_pieces:
        return packed
    packed = [[] for _ in range(slots)]
    _fill(packed, [(slot_tokens, slot) for slot in range(slots)], _level_order(longest_first))
    most = max(map(len, packed))
    if most > max_pieces:
        raise UserError(
            f"{len(pieces)} documents in {slots} sequences of {slot_tokens} tokens: up to {most} in one of them, but "
            f"data.max_documents allows {max_pieces}; raise it, or leave the shortest documents out"
        )
    return packed


def _size(span: Span) -> int:
    return span.stop - span.start


def _fill(packed: list[list[Span]], rooms: Sequence[tuple[int, int]], pieces: Sequence[Span]) -> None:
    """Put pieces end to end into ``rooms`` of (tokens, slot), which they fill exactly; cut them at the borders."""
    waiting = deque(pieces)
    for room, slot in rooms:
        while room:
            piece = waiting.popleft()
            middle = min(piece.start + room, piece.stop)
            packed[slot].append(piece._replace(stop=middle))
            if middle < piece.stop:
                waiting.appendleft(piece._replace(start=middle))
            room -= middle - piece.start
    assert not waiting, "a window holds exactly its slots' tokens"


def _level_order(longest_first: Sequence[Span]) -> list[Span]:
    """The pieces in an order whose every stretch has about the mean length: the longest left while the tokens so far
    are behind the mean, the shortest left while they are ahead of it. So they stray from it by one piece at most."""
    left, order = deque(longest_first), list[Span]()
    total, so_far = sum(map(_size, longest_first)), 0
    while left:
        order.append(left.pop() if so_far * len(longest_first) > len(order) * total else left.popleft())
        so_far += _size(order[-1])
    return order
