"""Rule reward for tool tasks: the tool was really called, in valid format, and the final answer is right."""

from itertools import takewhile

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.final_answer import final_answer, same_number
from qwen3_lit.rl.rewards.reward import Reward, RewardInput
from qwen3_lit.rl.tool_calls import parse_tool_calls


class ToolUseReward(Reward):
    """1 for a right final answer behind at least one call that the tool answered and no malformed call, else 0.

    A right answer without the call scores 0: the task is to use the tool. So does one in a turn that calls again, and
    one behind calls that the tool refused (``error: ...``).

    Args:
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
        tool: Name of the function that has to be called; `metadata.tool` of a problem overrides it.
        call_credit: Score of a valid call with a wrong final answer.
    """

    default_name = "tool_use"
    measures_accuracy = True

    def __init__(
        self,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
        tool: str = "calculator",
        call_credit: float = 0.0,
    ) -> None:
        super().__init__(weight, tasks, name)
        if not 0 <= call_credit < 1:
            raise UserError(f"ToolUseReward: call_credit: {call_credit} is outside [0, 1)")
        self.tool = tool
        self.call_credit = call_credit

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.problem.get("tools") or item.metadata.get("tool"))

    def score(self, item: RewardInput) -> float:
        tool = str(item.metadata.get("tool") or self.tool)
        answered = False
        for index, turn in enumerate(item.turns):
            if turn.get("role") != "assistant":
                continue
            calls = parse_tool_calls(str(turn["content"]))
            results = list(takewhile(lambda message: message.get("role") == "tool", item.turns[index + 1 :]))
            # A call of the last turn was never executed: that turn asks on instead of answering.
            if any(call.error for call in calls) or (calls and not results):
                return 0.0
            for call, result in zip(calls, results, strict=False):
                answered |= call.name == tool and not str(result["content"]).startswith("error:")
        if not answered:
            return 0.0
        by_value = same_number(item.answer, item.reference)
        right = final_answer(item.answer) == item.reference.strip() if by_value is None else by_value
        return 1.0 if right else self.call_credit
