"""What keeps made-up training data and held-out data apart.

Two independent walls: the random streams of the splits have unrelated seeds, and the text of a query alone decides,
by a hash, which split may own it. A query that a stream draws but its split may not own is thrown away, so no query
text occurs in both splits whatever seeds, options or versions made the files.
"""

import hashlib
import random
import re
from typing import Literal

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

HELD_OUT_FRACTION = 0.125
"""Share of the space of query texts that belongs to the held-out split. Changing it invalidates existing files."""


def normalized_text(text: str) -> str:
    """Lower-cased text with runs of white space folded: two queries are the same when this is the same."""
    return re.sub(r"\s+", " ", text).strip().lower()


def text_key(text: str) -> int:
    """64-bit hash of the normalised text, stable over processes and versions."""
    return int.from_bytes(hashlib.blake2b(normalized_text(text).encode(), digest_size=8).digest(), "big")


def split_of(text: str) -> Split:
    """The split that may own a query text."""
    return "held_out" if text_key(f"split|{normalized_text(text)}") < HELD_OUT_FRACTION * 2**64 else "train"


def stream_seed(*parts: object) -> int:
    """Seed of a random stream named by its parts; 60 bits, so neighbouring user seeds give unrelated streams.

    reasoning-gym seeds item i with ``seed + i``: small neighbouring seeds would share nearly all their items.
    """
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 4


def stream(*parts: object) -> random.Random:
    """Random stream named by its parts."""
    return random.Random(stream_seed(*parts))
