"""Tool calls as Qwen3 writes them: a JSON object with `name` and `arguments` between `<tool_call>` tags."""

import json
import re
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call, or what is wrong with it."""

    name: str
    """Name of the function; empty when the call is malformed."""

    arguments: dict[str, Any]
    """Its arguments."""

    error: str | None = None
    """Why the call cannot be read, in words the model can act on; None for a well-formed call."""


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Every tool call of an assistant turn in order, malformed ones included.

    Well-formed means ``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`` outside the think block.
    """
    answer = text.rpartition("</think>")[2] if "</think>" in text else text
    if "<think>" in answer:
        return []
    return [_parse(match.group(1), match.group().endswith("</tool_call>")) for match in _CALL.finditer(answer)]


def _parse(body: str, closed: bool) -> ToolCall:
    def malformed(reason: str) -> ToolCall:
        return ToolCall("", {}, f"malformed tool call: {reason}")

    if not closed:
        return malformed("</tool_call> is missing")
    if not (body.startswith("\n") and body.endswith("\n")):
        return malformed("the JSON object must stand on its own line between the tags")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return malformed("the text between the tags is not JSON")
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        return malformed('expected a JSON object with the keys "name" and "arguments"')
    if not isinstance(value["name"], str) or not isinstance(value["arguments"], dict):
        return malformed('"name" must be a string and "arguments" an object')
    return ToolCall(value["name"], value["arguments"])
