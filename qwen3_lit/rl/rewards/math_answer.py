"""Rule reward: is the final answer mathematically equal to the reference, and worked out as far as the reference is?

Numbers are compared exactly without leaving this file. Everything else goes to math-verify, whose own timeouts are
switched off: they rely on SIGALRM, which works in main threads only, while a worker process that overruns is killed
as a whole. sympy may still hang or eat memory on hostile text, so this reward belongs into a worker.
"""

import logging
import re

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.evaluated import is_evaluated, is_numeric
from qwen3_lit.rl.rewards.final_answer import final_answer, last_boxed, same_number
from qwen3_lit.rl.rewards.reward import Reward, RewardInput

_FORMULA = re.compile(r"(?:\$|\\\()([^$]+?)(?:\$|\\\))")


class MathAnswerReward(Reward):
    """1 when the boxed answer (else the announced one, else the last expression) equals the reference, else 0.

    Not applicable to problems without a reference. An expression that asks for a value instead of being one is wrong
    (:mod:`qwen3_lit.rl.rewards.evaluated`).

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
        require_boxed: Score 0 when nothing is boxed.
        max_chars: How much of the end of the answer is read.
        max_expression_chars: A boxed expression longer than this counts as wrong.
    """

    default_name = "math_answer"
    measures_accuracy = True

    def __init__(
        self,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
        require_boxed: bool = False,
        max_chars: int = 4000,
        max_expression_chars: int = 500,
    ) -> None:
        super().__init__(weight, tasks, name)
        if min(max_chars, max_expression_chars) < 1:
            raise UserError("MathAnswerReward: max_chars and max_expression_chars must be at least 1")
        self.require_boxed = require_boxed
        self.max_chars = max_chars
        self.max_expression_chars = max_expression_chars

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.reference.strip())

    def score(self, item: RewardInput) -> float:
        question = " ".join(str(turn.get("content", "")) for turn in item.messages if turn.get("role") == "user")
        return float(self._equal(item.answer[-self.max_chars :], item.reference, question))

    def _equal(self, text: str, reference: str, question: str) -> bool:
        boxed = last_boxed(text)
        if boxed is None and self.require_boxed:
            return False
        if boxed is not None and len(boxed) > self.max_expression_chars:
            return False
        answer = final_answer(text)
        if _with_tight_commas(answer) == _with_tight_commas(reference):
            return True
        by_value = same_number(text, reference)
        if by_value or (by_value is False and boxed is None):
            return bool(by_value)
        if boxed is None and is_numeric(reference):
            formulas = _FORMULA.findall(answer)
            boxed = formulas[-1] if formulas else answer
        if not is_evaluated(answer if boxed is None else boxed, reference, question):
            return False
        return _math_verify_equal(answer if boxed is None else f"\\boxed{{{boxed}}}", reference)


def _with_tight_commas(text: str) -> str:
    return re.sub(r"\s*,\s*", ",", text.strip())


def _math_verify_equal(text: str, reference: str) -> bool:
    # Imported here so that workers start fast and problems with plain numbers never pay for sympy.
    from math_verify import parse, verify

    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    gold_text = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold = parse(gold_text, parsing_timeout=None)  # type: ignore[arg-type]
    candidate = parse(text, parsing_timeout=None)  # type: ignore[arg-type]
    # verify is not symmetric: the reference has to come first.
    return bool(gold) and bool(candidate) and bool(verify(gold, candidate, timeout_seconds=None))
