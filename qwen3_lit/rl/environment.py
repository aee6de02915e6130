"""What answers a model's tool calls during a rollout, and how the answer enters the token stream.

An environment sees the conversation and the assistant turn that just ended and returns tool messages, or None when the
turn ends the completion. The tool messages become tokens through the chat template itself, so the stream a rollout
trains on is the stream the template renders. One difference is the template's own: in non-thinking mode it drops the
empty think block of assistant turns that are no longer last, while the cache keeps the block those turns were generated
behind.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from qwen3_lit.data.chat_template import render
from qwen3_lit.data.tokenizer import TextTokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.rl.calculator import CalculatorError, evaluate
from qwen3_lit.rl.tool_calls import ToolCall, parse_tool_calls

Message = dict[str, Any]

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "For example (3 + 4) * 12"}},
            "required": ["expression"],
        },
    },
}


@runtime_checkable
class Environment(Protocol):
    """The other side of a multi-turn rollout. Keeps no state between calls: the conversation is the state."""

    tools: list[dict[str, Any]]
    """Function schemas shown to the model when a problem brings none."""

    def applies(self, problem: dict[str, Any]) -> bool:
        """Whether this environment answers the tool calls of `problem`."""
        ...

    def step(self, messages: Sequence[Message], assistant_text: str) -> list[Message] | None:
        """Tool messages that follow the assistant turn, or None when the turn is the last one.

        Args:
            messages: the conversation before the turn, earlier tool turns included.
            assistant_text: the turn as generated, think block included, without `<|im_end|>`.
        """
        ...


class CalculatorEnvironment:
    """Evaluates the model's `calculator` calls; malformed calls are answered with what is wrong with them.

    Args:
        tasks: Tasks whose problems get the calculator; null takes the problems whose own `tools` name it.
        max_turns: Assistant turns with tool calls that are answered since the last user turn.
        max_calls_per_turn: Calls answered in one turn; the rest gets an error message.
    """

    def __init__(self, tasks: list[str] | None = None, max_turns: int = 4, max_calls_per_turn: int = 4) -> None:
        if min(max_turns, max_calls_per_turn) < 1:
            raise UserError("CalculatorEnvironment: max_turns and max_calls_per_turn must be at least 1")
        self.tasks = None if tasks is None else list(tasks)
        self.max_turns = max_turns
        self.max_calls_per_turn = max_calls_per_turn
        self.tools = [CALCULATOR_TOOL]

    def applies(self, problem: dict[str, Any]) -> bool:
        """Whether the problem's task is listed, or its tools contain `calculator`."""
        if self.tasks is not None:
            return problem.get("task") in self.tasks
        return any(tool.get("function", tool).get("name") == "calculator" for tool in problem.get("tools") or ())

    def step(self, messages: Sequence[Message], assistant_text: str) -> list[Message] | None:
        """One tool message for each call of the turn."""
        calls = parse_tool_calls(assistant_text)
        # Tool turns that an earlier question of the prompt needed are not this completion's.
        asked = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=0)
        answered = sum(
            message["role"] == "assistant" and following["role"] == "tool"
            for message, following in pairwise(messages[asked:])
        )
        if not calls or answered >= self.max_turns:
            return None
        return [
            {
                "role": "tool",
                "content": self._answer(call) if index < self.max_calls_per_turn else "error: too many calls at once",
            }
            for index, call in enumerate(calls)
        ]

    @staticmethod
    def _answer(call: ToolCall) -> str:
        if call.error:
            return f"error: {call.error}"
        if call.name != "calculator":
            return "error: unknown tool, expected calculator"
        if set(call.arguments) != {"expression"} or not isinstance(call.arguments["expression"], str):
            return 'error: calculator takes one argument, "expression", a string'
        try:
            return evaluate(call.arguments["expression"])
        except CalculatorError as error:
            return f"error: {error}"


def find_environment(environments: Sequence[Environment], problem: dict[str, Any]) -> Environment | None:
    """The first environment that applies to the problem."""
    return next((environment for environment in environments if environment.applies(problem)), None)


def tool_turn_text(tool_messages: Sequence[Message], enable_thinking: bool) -> str:
    """What the template writes between an assistant turn's `<|im_end|>` and the next assistant turn.

    Ends with the generation prompt of that turn; with `enable_thinking` off this includes its empty think block.
    """
    marker = "x"
    rendered = render(
        [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}, *tool_messages],
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    head = render([{"role": "user", "content": marker}], add_generation_prompt=True)
    before = f"{head}{marker}<|im_end|>"
    if not rendered.startswith(before):
        raise RuntimeError(f"the chat template renders an assistant turn in a way not understood: {rendered!r}")
    return rendered[len(before) :]


def tool_turn_ids(tokenizer: TextTokenizer, tool_messages: Sequence[Message], enable_thinking: bool) -> list[int]:
    """:func:`tool_turn_text` as token ids to force behind a sampled `<|im_end|>`."""
    return tokenizer.encode(tool_turn_text(tool_messages, enable_thinking))


_CONTROL = re.compile(r"<(?=\||/?think>)")


def safe_text(text: str) -> str:
    """Untrusted text with every `<|`, `<think>` and `</think>` broken up by a space: it can end or start no turn."""
    return _CONTROL.sub("< ", text)


def safe_tool_messages(tool_messages: Sequence[Message]) -> list[Message]:
    """The messages with their content as :func:`safe_text`: a tool result must not be able to end its own turn."""
    return [{**message, "content": safe_text(str(message["content"]))} for message in tool_messages]
