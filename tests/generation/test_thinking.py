"""When the thinking budget strikes."""

import numpy as np
import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.generation.thinking import CLOSED, OPEN, THINKING, ThinkingTokens

THINK, END, TURN = 1, 2, 3
TOKENS = ThinkingTokens(END, (9, END, 8), THINK, TURN)


def test_states_through_a_turn() -> None:
    state, count = np.array([OPEN]), np.array([0])
    seen = []
    for token in (5, THINK, 5, 6, THINK, END, 5, THINK, 5):
        TOKENS.advance(state, count, np.array([token]))
        seen.append((int(state[0]), int(count[0])))
    assert [s for s, _ in seen] == [OPEN, THINKING, THINKING, THINKING, THINKING, CLOSED, CLOSED, CLOSED, CLOSED]
    assert [c for _, c in seen] == [0, 0, 1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([5, 6], (OPEN, 0)),
        ([TURN, THINK, 5, END, TURN], (OPEN, 0)),  # an earlier turn's block does not count
        ([TURN, 5, TURN, THINK, END], (CLOSED, 0)),  # the non-thinking mode
        ([TURN, 5, TURN, THINK, 5, 5], (THINKING, 2)),
    ],
)
def test_prompt_decides_where_the_turn_starts(prompt: list[int], expected: tuple[int, int]) -> None:
    assert TOKENS.after_prompt(prompt) == expected


def test_models_without_an_opening_tag_start_thinking() -> None:
    tokens = ThinkingTokens(END, (END,))
    assert tokens.after_prompt([5, 6]) == (THINKING, 0)
    assert tokens.after_prompt([5, END]) == (CLOSED, 0)


def test_stop_sentence_must_close_the_block() -> None:
    with pytest.raises(UserError, match="contains </think>"):
        ThinkingTokens(END, (9, 8))
