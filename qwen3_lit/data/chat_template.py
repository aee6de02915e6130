"""Qwen3's chat format: messages to text, to prompts, and to training samples with a token-exact loss mask.

``render`` gives byte for byte what Qwen3's official Jinja template gives, without Jinja, and ``CHAT_TEMPLATE`` is a
Jinja template of the same format for the folders we export. Facts of the format (Qwen3 Technical Report, section 4.3,
Table 9): turns are ``<|im_start|>role\\n ... <|im_end|>\\n``; the reasoning of assistant turns before the last real
user query is left out; the last assistant turn always has a think block, an empty one when there is no reasoning.

Because earlier reasoning is left out, turn k of a dialog is not a prefix of turn k + 1: a dialog is trained as one
sample for each assistant turn (``split_turns``), with loss on that turn alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qwen3_lit.errors import UserError

if TYPE_CHECKING:
    from qwen3_lit.data.tokenizer import TextTokenizer

Message = Mapping[str, Any]
Mode = Literal["think", "no_think"]

EMPTY_THINKING = "<think>\n\n</think>\n\n"
STOP_THINKING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
"""Spliced in when the thinking budget is used up: the form of Qwen's published code (the report's has a stray stop)."""
GENERATION_PROMPT = "<|im_start|>assistant\n"
ROLES = ("system", "user", "assistant", "tool")

_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


CHAT_TEMPLATE = r"""{#- Qwen3 chat format. Reads messages, tools, add_generation_prompt, enable_thinking. -#}
{%- macro write_call(call) -%}
    {%- set called = call.function or call -%}
    {{- '<tool_call>\n{"name": "' ~ called.name ~ '", "arguments": ' -}}
    {{- called.arguments if called.arguments is string else called.arguments | tojson -}}
    {{- '}\n</tool_call>' -}}
{%- endmacro -%}
{%- set dialog = namespace(query=messages | length - 1) -%}
{%- for message in messages -%}
    {%- set text = message.content if message.content is string else none -%}
    {%- set wraps_result = text is not none and text[:15] == '<tool_response>' and text[-16:] == '</tool_response>' -%}
    {%- if message.role == 'user' and text is not none and not wraps_result -%}
        {%- set dialog.query = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- set opening = messages[0].content if messages[0].role == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' ~ (opening ~ '\n\n' if opening is not none else '') -}}
    {{- @TOOLS_HEAD@ -}}
    {%- for tool in tools -%}
        {{- '\n' ~ tool | tojson -}}
    {%- endfor -%}
    {{- @TOOLS_TAIL@ ~ '<|im_end|>\n' -}}
{%- elif opening is not none -%}
    {{- '<|im_start|>system\n' ~ opening ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set here = loop.index0 -%}
    {%- set text = message.content if message.content is string else '' -%}
    {%- if message.role == 'user' or (message.role == 'system' and here > 0) -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ text ~ '<|im_end|>\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if here == 0 or messages[here - 1].role != 'tool' else '' -}}
        {{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or messages[here + 1].role != 'tool' else '' -}}
    {%- elif message.role == 'assistant' -%}
        {%- if message.reasoning_content is string -%}
            {%- set thought, said = message.reasoning_content, text -%}
        {%- elif '</think>' in text -%}
            {%- set before = text.split('</think>')[0].rstrip('\n') -%}
            {%- set thought = before.split('<think>')[-1].lstrip('\n') -%}
            {%- set said = text.split('</think>')[-1].lstrip('\n') -%}
        {%- else -%}
            {%- set thought, said = '', text -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if here > dialog.query and (loop.last or thought) -%}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ said.lstrip('\n') -}}
        {%- else -%}
            {{- said -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- ('\n' if said or not loop.first else '') ~ write_call(call) -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '' -}}
{%- endif -%}
""".replace("@TOOLS_HEAD@", _jinja_string(_TOOLS_HEAD)).replace("@TOOLS_TAIL@", _jinja_string(_TOOLS_TAIL))
"""Jinja template of the same format, for ``tokenizer_config.json``; used by transformers, vLLM and others."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Text of one message: ``head + body + tail``. Only ``body`` and the end of turn are ever written by a model."""

    message_index: int
    head: str
    body: str
    tail: str

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.head + self.body + self.tail


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """One training sample: a document that ends with ``<|im_end|>``."""

    token_ids: list[int]
    loss_mask: list[bool]
    """True for tokens that the model is to write."""
    mode: str | None = None
    """"think", "no_think", or None where the record does not say."""
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.token_ids)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text_of(message: Message, index: int) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise UserError(f"messages[{index}].content is a {type(content).__name__}, expected text")
    return content


def is_query(message: Message) -> bool:
    """Whether a turn is the user's own: a tool result that is wrapped in a user turn is not."""
    content = message.get("content")
    if message.get("role") != "user" or not isinstance(content, str):
        return False
    return not (content.startswith("<tool_response>") and content.endswith("</tool_response>"))


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last query; the last message where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if is_query(messages[index]):
            return index
    return len(messages) - 1


def _render_calls(calls: Sequence[Mapping[str, Any]], after_text: bool, index: int) -> str:
    parts: list[str] = []
    for call in calls:
        called = call.get("function") or call
        if "name" not in called or "arguments" not in called:
            raise UserError(f"messages[{index}].tool_calls: a call needs 'name' and 'arguments', got {sorted(called)}")
        arguments = called["arguments"]
        written = arguments if isinstance(arguments, str) else _to_json(arguments)
        parts.append(f'<tool_call>\n{{"name": "{called["name"]}", "arguments": {written}}}\n</tool_call>')
    return ("\n" if after_text and parts else "") + "\n".join(parts)


def _assistant_body(message: Message, index: int, with_thinking: bool, is_last: bool) -> str:
    content = _text_of(message, index)
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str):
        reasoning = ""
        if "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    calls = _render_calls(message.get("tool_calls") or (), bool(content), index)
    if with_thinking and (is_last or reasoning):
        thinking = reasoning.strip("\n")
        return f"<think>\n{thinking}\n</think>\n\n" + content.lstrip("\n") + calls
    return content + calls


def render_segments(messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> list[Segment]:
    """The conversation in pieces, one for each message (plus one with index -1 where tools need a system turn).

    Raises:
        UserError: no message, an unknown role, or content that is not text.
    """
    if not messages:
        raise UserError("messages is empty, expected at least one message")
    segments: list[Segment] = []
    first_is_system = messages[0].get("role") == "system"
    if tools:
        opening = _text_of(messages[0], 0) + "\n\n" if first_is_system else ""
        listed = "".join("\n" + _to_json(tool) for tool in tools)
        text = opening + _TOOLS_HEAD + listed + _TOOLS_TAIL
        segments.append(Segment(0 if first_is_system else -1, "<|im_start|>system\n", text, "<|im_end|>\n"))
    last_query = _last_query(messages)
    for index, message in enumerate(messages):
        role = message.get("role")
        is_last = index == len(messages) - 1
        if role == "assistant":
            body = _assistant_body(message, index, index > last_query, is_last)
            segments.append(Segment(index, GENERATION_PROMPT, body, "<|im_end|>\n"))
        elif role == "tool":
            opens = index == 0 or messages[index - 1].get("role") != "tool"
            closes = is_last or messages[index + 1].get("role") != "tool"
            head = ("<|im_start|>user" if opens else "") + "\n<tool_response>\n"
            tail = "\n</tool_response>" + ("<|im_end|>\n" if closes else "")
            segments.append(Segment(index, head, _text_of(message, index), tail))
        elif role in ("user", "system"):
            if role == "system" and index == 0 and tools:
                continue
            segments.append(Segment(index, f"<|im_start|>{role}\n", _text_of(message, index), "<|im_end|>\n"))
        else:
            raise UserError(f"messages[{index}].role is {role!r}, expected one of {', '.join(ROLES)}")
    return segments


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> str:
    """The conversation as text, byte for byte as Qwen3's official template gives it.

    Args:
        messages: {"role", "content", "reasoning_content"?, "tool_calls"?}; reasoning may also stand inline as
            ``<think>...</think>`` in the content.
        tools: JSON schemas of the functions the model may call.
        add_generation_prompt: end with the header of the answer to come.
        enable_thinking: False adds an empty think block to that header (the hard switch).

    Raises:
        UserError: no message, an unknown role, or content that is not text.
    """
    text = "".join(segment.text for segment in render_segments(messages, tools=tools))
    if add_generation_prompt:
        text += GENERATION_PROMPT + ("" if enable_thinking else EMPTY_THINKING)
    return text


def prompt_ids(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    enable_thinking: bool = True,
) -> list[int]:
    """Token ids to generate an answer from: the conversation and the header of the answer."""
    return tokenizer.encode(render(messages, tools=tools, add_generation_prompt=True, enable_thinking=enable_thinking))


def encode_conversation(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    train_turns: Literal["last", "all"] = "last",
    enable_thinking: bool = True,
    mode: str | None = None,
    weight: float = 1.0,
) -> EncodedSample:
    """A conversation that ends with an assistant turn, as one sample.

    Loss is on what the model writes: the think block (an empty one too), the answer, tool calls, and ``<|im_end|>``;
    never on headers, system, user and tool turns, nor on an empty think block that the prompt injects
    (``enable_thinking=False``). The prompt part has exactly the ids of ``prompt_ids``. The newline that the template
    writes after the last ``<|im_end|>`` is left out: nothing is learnt from it.

    Args:
        train_turns: "last" trains the last turn. "all" trains every assistant turn as rendered: right for a tool loop
            whose steps all have reasoning, wrong for dialogs with thinking (use ``split_turns``).
        enable_thinking: False makes a sample of the hard switch; its last turn must have no reasoning.

    Raises:
        UserError: the last message is not the assistant's, or has reasoning although thinking is switched off.
    """
    segments = render_segments(messages, tools=tools)
    if messages[-1].get("role") != "assistant":
        raise UserError(f"the last message has role {messages[-1].get('role')!r}, expected 'assistant' to train on")
    last = segments[-1]
    head, body = last.head, last.body
    if not enable_thinking:
        head += EMPTY_THINKING
        if body.startswith(EMPTY_THINKING):
            body = body[len(EMPTY_THINKING) :]
        elif body.startswith("<think>"):
            raise UserError(
                f"messages[{len(messages) - 1}] has reasoning, but thinking is switched off for this sample"
            )

    runs: list[tuple[str, bool]] = []
    text = ""
    for segment in segments[:-1]:
        index = segment.message_index
        if train_turns == "all" and index >= 0 and messages[index].get("role") == "assistant":
            runs += [(text + segment.head, False), (segment.body + "<|im_end|>", True)]
            text = "\n"
        else:
            text += segment.text
    runs += [(text + head, False), (body + "<|im_end|>", True)]

    token_ids: list[int] = []
    loss_mask: list[bool] = []
    for run, trained in runs:
        ids = tokenizer.encode(run)
        token_ids += ids
        loss_mask += [trained] * len(ids)
    return EncodedSample(token_ids, loss_mask, mode=mode, weight=weight)


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """One conversation for each assistant turn: everything up to and including it.

    Reasoning of earlier turns stays in the messages; the template leaves it out where the model would not see it.
    """
    return [list(messages[: i + 1]) for i, message in enumerate(messages) if message.get("role") == "assistant"]


def answer_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Those of ``split_turns`` after the last query, which a wrapped tool result is not; all where nobody asked."""
    dialogs = split_turns(messages)
    asked = _last_query(messages)
    return [dialog for dialog in dialogs if len(dialog) - 1 > asked] or dialogs


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thinking, answer) of generated text.

    Thinking is None without any think tag and "" for an empty block. Text that never closes its think block has no
    answer yet: all of it is thinking. A missing opening tag is accepted (the prompt may have had it).
    """
    if "</think>" in text:
        before, answer = text.split("</think>", 1)[0], text.rsplit("</think>", 1)[1]
        return before.split("<think>")[-1].strip("\n"), answer.lstrip("\n")
    if "<think>" in text:
        return text.split("<think>", 1)[1].strip("\n"), ""
    return None, text


def join_thinking(thinking: str | None, answer: str) -> str:
    """What the model writes for this thinking and answer; no thinking gives the empty block."""
    stripped = (thinking or "").strip("\n")
    return f"<think>\n{stripped}\n</think>\n\n" + answer.lstrip("\n")


_FLAG = re.compile(r"(?<!\S)/(no_)?think(?!\S)")


def requested_mode(messages: Sequence[Message]) -> Mode | None:
    """Mode that the last ``/think`` or ``/no_think`` flag in system and user turns asks for, None without a flag."""
    mode: Mode | None = None
    for message in messages:
        if message.get("role") in ("system", "user") and isinstance(message.get("content"), str):
            for found in _FLAG.finditer(message["content"]):
                mode = "no_think" if found.group(1) else "think"
    return mode


def with_reference(messages: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """The dialog with the reference answer behind its last user turn: what a model with reference is trained on too."""
    messages = list(messages)
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            content = f"{messages[index]['content']}\n\nReference answer: {reference}"
            messages[index] = {**messages[index], "content": content}
            return messages
    return [*messages, {"role": "user", "content": f"Reference answer: {reference}"}]
