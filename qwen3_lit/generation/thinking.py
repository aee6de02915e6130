"""The thinking budget as a state machine over tokens, one row or many at once.

An assistant turn starts OPEN; ``<think>`` moves it to THINKING, ``</think>`` to CLOSED, and CLOSED stays closed until a
new turn begins (after a tool result). While THINKING, every token but the opening tag counts; when the count reaches
the budget the stop-thinking tokens, which contain ``</think>``, are forced. Nothing is forced in a turn whose
``</think>`` has appeared, be it sampled, forced, or given by the prompt as in the non-thinking mode.

Source: Qwen3 Technical Report (arXiv 2505.09388), section 4.3, and thinking_budget.md of QwenLM/Qwen3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen3_lit.data.chat_template import STOP_THINKING
from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError

OPEN, THINKING, CLOSED = 0, 1, 2
UNLIMITED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class ThinkingTokens:
    """The token ids that the budget works with."""

    end_think_id: int
    """``</think>``."""
    stop_thinking_ids: tuple[int, ...]
    """The sentence that is spliced in; contains ``</think>``."""
    think_id: int | None = None
    """``<think>``; None means that every turn starts thinking, for models whose prompt opens the block."""
    turn_start_id: int | None = None
    """``<|im_start|>``: only what follows its last occurrence in the prompt belongs to the current turn."""

    def __post_init__(self) -> None:
        if self.end_think_id not in self.stop_thinking_ids:
            raise UserError(
                f"stop_thinking_ids: seen {list(self.stop_thinking_ids)}, expected a sentence that contains "
                f"</think> = {self.end_think_id}, or thinking would never end"
            )

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "ThinkingTokens":
        """Those of a tokenizer with Qwen3's chat tokens."""
        sentence = tuple(tokenizer.encode(STOP_THINKING))
        return cls(tokenizer.end_think_id, sentence, tokenizer.think_id, tokenizer.im_start_id)

    @property
    def first_state(self) -> int:
        """The state in which a turn without any token starts."""
        return THINKING if self.think_id is None else OPEN

    def after_prompt(self, prompt: Sequence[int]) -> tuple[int, int]:
        """State and count of thinking tokens after the last turn of ``prompt``."""
        turn = list(prompt)
        if self.turn_start_id is not None and self.turn_start_id in turn:
            turn = turn[len(turn) - turn[::-1].index(self.turn_start_id) :]
        state, count = np.array([self.first_state]), np.zeros(1, dtype=np.int64)
        if self.think_id is None:  # the prompt may close the block, its other tokens are not thinking
            return (CLOSED if self.end_think_id in turn else THINKING), 0
        for token in turn:
            self.advance(state, count, np.array([token]))
        return int(state[0]), int(count[0])

    def advance(self, state_B: np.ndarray, count_B: np.ndarray, token_B: np.ndarray) -> None:
        """Take one token a row, in place."""
        closes_B = token_B == self.end_think_id
        count_B += (state_B == THINKING) & ~closes_B
        if self.think_id is not None:
            state_B[(token_B == self.think_id) & (state_B == OPEN)] = THINKING
        state_B[closes_B] = CLOSED
