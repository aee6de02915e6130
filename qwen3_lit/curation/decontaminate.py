"""Is a query too similar to a held-out one?

Plain n-gram overlap would condemn every problem that shares its task's boilerplate with a held-out problem, and plain
Jaccard similarity calls ``47 + 38`` and ``47 + 39`` the same question. The index therefore

- looks at those character shingles only that few held-out texts have, weighs them by how few (inverse document
  frequency), and calls a query similar when it contains most of the weight of one held-out item;
- calls it similar, too, when it shares an n-gram of words both halves of which few held-out texts have: an n-gram of
  boilerplate with a number or a letter filled in always has a common half;
- and, unless told otherwise, asks in either case that the held-out item's numbers and operators occur in the query, in
  their order and without a gap.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qwen3_lit.curation.synthesis_split import normalized_text
from qwen3_lit.errors import UserError

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]")
_SYMBOL = re.compile(r"\d+(?:\.\d+)?|[-+*/^%<>]")
_INTERESTING_DOCUMENT_SHARE = 0.02


@dataclass(frozen=True)
class SimilarityConfig:
    """When two queries count as the same."""

    ngram_words: int = 8
    """A shared run of this many words, not common among the held-out items, makes a query similar."""
    shingle_chars: int = 5
    """Length of the character shingles."""
    min_containment: float = 0.8
    """Share of a held-out item's shingle weight that a similar query contains."""
    match_numbers: bool = True
    """Similar queries must hold the item's numbers and operators in order."""

    def __post_init__(self) -> None:
        if self.ngram_words < 2 or self.shingle_chars < 2:
            raise UserError(
                f"similarity: ngram_words={self.ngram_words}, shingle_chars={self.shingle_chars}: expected 2 or more"
            )
        if not 0 < self.min_containment <= 1:
            raise UserError(f"similarity: min_containment={self.min_containment}: expected above 0 and at most 1")


class HeldOutIndex:
    """Inverted index over held-out query texts."""

    def __init__(self, texts: Iterable[str], config: SimilarityConfig | None = None) -> None:
        self.config = config or SimilarityConfig()
        self._half = self.config.ngram_words // 2
        self._texts = sorted({normalized_text(text) for text in texts if text.strip()})
        self._exact = set(self._texts)
        self._symbols = [_symbols(text) for text in self._texts]
        documents: Counter[str] = Counter()
        half_documents: Counter[tuple[str, ...]] = Counter()
        for text in self._texts:
            documents.update(self._shingles(text))
            half_documents.update(set(_ngrams(text, self._half)))
        size = len(self._texts)
        rare = max(2, _INTERESTING_DOCUMENT_SHARE * size)
        self._weight = {shingle: math.log((size + 1) / count) for shingle, count in documents.items() if count <= rare}
        self._total = [self._shared_weight(text, self._shingles(text)) for text in self._texts]
        self._by_shingle: dict[str, list[int]] = defaultdict(list)
        self._by_ngram: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for item, text in enumerate(self._texts):
            for shingle in self._shingles(text):
                if shingle in self._weight:
                    self._by_shingle[shingle].append(item)
            for ngram in set(_ngrams(text, self.config.ngram_words)):
                halves = (ngram[: self._half], ngram[-self._half :])
                if all(half_documents[half] <= rare for half in halves):
                    self._by_ngram[ngram].append(item)

    def __len__(self) -> int:
        return len(self._texts)

    def match(self, text: str) -> str | None:
        """The held-out text that a query is too similar to, None when there is none."""
        query = normalized_text(text)
        if query in self._exact:
            return query
        symbols = _symbols(query)
        for ngram in _ngrams(query, self.config.ngram_words):
            for item in self._by_ngram.get(ngram, ()):
                if self._numbers_match(item, symbols):
                    return self._texts[item]
        shingles = self._shingles(query)
        nominated = {item for shingle in shingles for item in self._by_shingle.get(shingle, ())}
        for item in sorted(nominated):
            if not self._numbers_match(item, symbols):
                continue
            shared = self._shared_weight(self._texts[item], shingles)
            if shared >= self.config.min_containment * self._total[item]:
                return self._texts[item]
        return None

    def _numbers_match(self, item: int, symbols: Sequence[str]) -> bool:
        return not self.config.match_numbers or _contains(symbols, self._symbols[item])

    def _shingles(self, text: str) -> set[str]:
        length = self.config.shingle_chars
        return {text[i : i + length] for i in range(max(1, len(text) - length + 1))}

    def _shared_weight(self, text: str, shingles: set[str]) -> float:
        return sum(self._weight.get(shingle, 0.0) for shingle in self._shingles(text) & shingles)


def check_similarity(query: str, index: HeldOutIndex | None) -> str | None:
    """``"held_out_similarity"`` when the query is too similar to a held-out item, else None."""
    return "held_out_similarity" if index is not None and index.match(query) is not None else None


def _ngrams(text: str, length: int) -> Iterator[tuple[str, ...]]:
    words = _WORD.findall(text)
    for i in range(len(words) - length + 1):
        yield tuple(words[i : i + length])


def _symbols(text: str) -> list[str]:
    return _SYMBOL.findall(text)


def _contains(sequence: Sequence[str], part: Sequence[str]) -> bool:
    return any(list(sequence[i : i + len(part)]) == list(part) for i in range(len(sequence) - len(part) + 1))
