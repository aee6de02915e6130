import pytest

from qwen3_lit.curation.decontaminate import HeldOutIndex, SimilarityConfig, check_similarity
from qwen3_lit.errors import UserError

TEMPLATE = "State the final answer to the following arithmetic problem: {} {} {} ="
HELD_OUT = [TEMPLATE.format(a, op, b) for a in range(10, 40, 3) for b in range(50, 80, 7) for op in "+-"]


@pytest.fixture(scope="module")
def index() -> HeldOutIndex:
    return HeldOutIndex(HELD_OUT)


@pytest.mark.parametrize(
    "rewording",
    ["{}", "  {} ", "Please answer: {}", "{} Thank you!", "Here is a question. {}"],
)
def test_rewordings_are_found(index: HeldOutIndex, rewording: str) -> None:
    for query in HELD_OUT[::7]:
        assert index.match(rewording.format(query)) is not None
        assert index.match(rewording.format(query).upper()) is not None


@pytest.mark.parametrize(("a", "op", "b"), [(10, "+", 51), (57, "+", 10), (110, "+", 50), (10, "*", 50), (1, "+", 5)])
def test_other_numbers_in_the_same_template_are_not(index: HeldOutIndex, a: int, op: str, b: int) -> None:
    assert index.match(TEMPLATE.format(a, op, b)) is None


def test_ngram_of_a_text_without_numbers() -> None:
    text = "A train leaves the old station while a second train waits for the red signal near the bridge."
    index = HeldOutIndex([text, "Some other text about nothing in particular that is held out."])
    assert index.match("We know that a second train waits for the red signal near a hill. Why?") is not None
    assert index.match("A train waits near the bridge for a signal.") is None


def test_numbers_need_not_match_when_told_so() -> None:
    held_out = ["Find the sum of the squares of the first 17 odd numbers, then halve it."]
    changed = held_out[0].replace("17", "18")
    assert HeldOutIndex(held_out).match(changed) is None
    assert HeldOutIndex(held_out, SimilarityConfig(match_numbers=False)).match(changed) == held_out[0].lower()


def test_empty_index_and_bad_config() -> None:
    assert check_similarity("anything", HeldOutIndex([])) is None
    assert check_similarity("anything", None) is None
    with pytest.raises(UserError, match="min_containment=0"):
        SimilarityConfig(min_containment=0)
