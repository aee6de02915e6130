"""``qwen3-lit generate``: talk to the Hugging Face folder of any phase, once or in a dialog.

``/think`` and ``/no_think`` typed in a message are part of its text: the model was taught to obey them. ``--think`` and
``--no-think`` are the hard switch, which fixes how the answer begins.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen3_lit.errors import UserError

if TYPE_CHECKING:
    from qwen3_lit.data.tokenizer import TextTokenizer
    from qwen3_lit.generation.engine import PagedEngine
    from qwen3_lit.generation.sampling import SamplingParams

HELP = "Talk to a model: HF_DIR --prompt TEXT answers once; without --prompt a dialog (/reset forgets it, /exit ends)."

_COMMANDS = {"/exit": "leave", "/quit": "leave", "/reset": "forget the dialog so far"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("folder", metavar="HF_DIR", help="Hugging Face folder, such as runs/nano/5_reasoning_rl/hf")
    parser.add_argument("--prompt", help="answer this message and leave; - reads it from standard input")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without chat template")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--think", action="store_true", help="hard switch: begin the answer with <think>")
    mode.add_argument("--no-think", action="store_true", help="hard switch: begin the answer with an empty think block")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="close the think block after N tokens")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer (default 1024)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus mass (default 0.95)")
    parser.add_argument("--top-k", type=int, default=20, help="most likely tokens kept, 0 all (default 20)")
    parser.add_argument("--min-p", type=float, default=0.0, help="least probability relative to the best (default 0)")
    parser.add_argument("--presence-penalty", type=float, default=0.0, help="against repetition, 0 to 2 (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random stream (default 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 elsewhere"
    )


def run(args: argparse.Namespace) -> int:
    """Answer ``--prompt``, or hold a dialog until /exit or the end of the input."""
    if not os.path.isdir(args.folder):
        raise UserError(f"{args.folder}: no such folder, expected a Hugging Face folder with config.json")
    from qwen3_lit.generation.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        presence_penalty=args.presence_penalty,
        thinking_budget=args.thinking_budget,
    )
    engine, tokenizer = load_engine(args.folder, device=args.device, dtype=args.dtype, seed=args.seed)
    dialog = Dialog(engine, tokenizer, params, system=args.system, think=_mode(args), raw=args.raw)
    if args.prompt is not None:
        dialog.answer(sys.stdin.read() if args.prompt == "-" else args.prompt)
        return 0
    return _read_messages(dialog)


def load_engine(
    folder: str, *, device: str | None = None, dtype: str | None = None, seed: int = 0
) -> tuple["PagedEngine", "TextTokenizer"]:
    """The engine and the tokenizer of a Hugging Face folder."""
    import torch

    from qwen3_lit.data.tokenizer import check_tokenizer_fits, load_tokenizer
    from qwen3_lit.generation.engine import PagedEngine
    from qwen3_lit.model.hf_checkpoint import load_hf

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    tokenizer = load_tokenizer(folder)
    model = load_hf(folder, dtype=getattr(torch, dtype)).to(device)
    check_tokenizer_fits(tokenizer, model.config.vocab_size)
    cached = max(4096, min(model.config.max_position_embeddings * 4, 131072))
    return PagedEngine.for_tokenizer(model, tokenizer, max_batch_size=1, max_cached_tokens=cached, seed=seed), tokenizer


class Dialog:
    """The messages so far, and answers that appear while they are made."""

    def __init__(
        self,
        engine: "PagedEngine",
        tokenizer: "TextTokenizer",
        params: "SamplingParams",
        *,
        system: str | None = None,
        think: bool | None = None,
        raw: bool = False,
        write: Callable[[str, bool], None] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.params = engine, tokenizer, params
        self.system, self.think, self.raw = system, think, raw
        self.write = write or console_writer()
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> str:
        """Take a message, stream the answer through ``write(text, is_thinking)``, and remember both."""
        from qwen3_lit.data.chat_template import split_thinking

        message = {"role": "user", "content": text}
        printer = StreamPrinter(self.tokenizer, self.write, thinking=self.think is True)
        [[completion]] = self.engine.generate(
            [self._prompt_ids(message)], self.params, on_token=lambda prompt, sample, token: printer.add(token)
        )
        printer.close(completion.finish_reason)
        reply = self.tokenizer.decode(completion.token_ids, skip_special=True)
        thinking, answer = split_thinking(("<think>\n" if self.think else "") + reply)
        turn = {"role": "assistant", "content": answer}
        if thinking:
            turn["reasoning_content"] = thinking
        self.messages += [message, turn]
        return reply

    def _prompt_ids(self, message: dict[str, Any]) -> list[int]:
        from qwen3_lit.data.chat_template import prompt_ids

        if self.raw:
            return self.tokenizer.encode(message["content"])
        ids = prompt_ids(self.tokenizer, [*self.messages, message], enable_thinking=self.think is not False)
        return ids + self.tokenizer.encode("<think>\n") if self.think else ids


class StreamPrinter:
    """Turns tokens into text as they come: whole characters only, thinking marked, the stop token left out."""

    def __init__(self, tokenizer: "TextTokenizer", write: Callable[[str, bool], None], *, thinking: bool) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.in_thinking = thinking
        self._pending: list[int] = []

    def add(self, token: int) -> None:
        """Take the next token."""
        if token == self.tokenizer.think_id:
            self._flush()
            self.in_thinking = True
            self.write("<think>", True)
        elif token == self.tokenizer.end_think_id:
            self._flush()
            self.write("</think>", True)
            self.in_thinking = False
        elif token not in (self.tokenizer.im_end_id, self.tokenizer.end_of_text_id):
            self._pending.append(token)
            text = self.tokenizer.decode(self._pending)
            if not text.endswith("\ufffd"):  # a character may take several tokens
                self._flush()

    def close(self, finish_reason: str) -> None:
        """Print what is left and say so when the answer was cut."""
        self._flush()
        self.write("\n" if finish_reason == "stop" else "\n[cut at --max-new-tokens]\n", finish_reason != "stop")

    def _flush(self) -> None:
        if self._pending:
            self.write(self.tokenizer.decode(self._pending), self.in_thinking)
            self._pending = []


def console_writer() -> Callable[[str, bool], None]:
    """``write(text, dimmed)`` to the terminal; plain text where standard output is none."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)

    def write(text: str, dimmed: bool) -> None:
        console.print(text, style="dim" if dimmed else None, end="", soft_wrap=True)
        console.file.flush()

    return write


def _mode(args: argparse.Namespace) -> bool | None:
    if args.raw and (args.think or args.no_think or args.system):
        raise UserError("--raw: seen together with --think, --no-think or --system, which need the chat template")
    return True if args.think else False if args.no_think else None


def _read_messages(dialog: Dialog) -> int:
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if _COMMANDS.get(line) == "leave":
            return 0
        if line == "/reset":
            dialog.reset()
        elif line:
            try:
                dialog.answer(line)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                dialog.write("\n[stopped]\n", True)
