"""``qwen3-lit data inspect``: what the model will really see.

Prints packed samples document by document, with the tokens that are trained in colour, then the lengths and the counts
of what was dropped or cut. Works from a recipe (``-c RECIPE [-c OVERLAY]``) or from data alone (``--data
--tokenizer``).
"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from qwen3_lit.data.batch import PackedBatch
    from qwen3_lit.data.text_data_module import TextDataModule

HELP = (
    "Print packed samples with the trained tokens coloured, a histogram of lengths, and what was dropped. Either "
    "-c RECIPE [-c OVERLAY ...] [--set data.KEY=VALUE], or --data PATH --tokenizer DIR."
)
KINDS = ("pretrain", "conversation", "fusion", "problem")
_BAR = 40
_TRAINED = "bold green"
_CONTEXT = "dim"
_DOCUMENT_TOKENS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("-c", "--config", action="append", default=[], metavar="RECIPE", help="recipe and overlays")
    parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help="a prepared corpus, or JSONL files")
    parser.add_argument("--tokenizer", metavar="DIR", help="tokenizer folder (with --data)")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default=None,
        help="what --data holds (default: pretrain for a folder, else conversation)",
    )
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="N", help="row length with --data")
    parser.add_argument("-n", "--rows", type=int, default=3, metavar="N", help="rows to print (default: 3)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="data.KEY=VALUE", help="change a recipe's setting"
    )


def run(args: argparse.Namespace) -> None:
    """Build the data module and inspect it."""
    from qwen3_lit.errors import UserError

    if args.rows < 0:
        raise UserError(f"--rows: got {args.rows}, expected 0 or more")
    if bool(args.config) == bool(args.data):
        raise UserError("data inspect: give either -c RECIPE or --data PATH --tokenizer DIR")
    if args.config:
        words = [word for file in args.config for word in ("-c", file)] + [f"--{setting}" for setting in args.set]
        datamodule = datamodule_from_recipe(words)
    else:
        if not args.tokenizer:
            raise UserError("data inspect: --data needs --tokenizer DIR")
        datamodule = datamodule_from_paths(args.data, args.tokenizer, args.kind, args.sequence_length)
    inspect_datamodule(datamodule, args.rows)


def datamodule_from_paths(paths: "Sequence[str]", tokenizer: str, kind: str | None, length: int) -> "TextDataModule":
    """A data module over bare paths, with rows of ``length`` tokens."""
    import os

    from qwen3_lit.errors import UserError

    if kind is None:
        kind = "pretrain" if os.path.isdir(paths[0]) else "conversation"
    if kind == "pretrain":
        from qwen3_lit.data.pretrain_data import PretrainData, SourceConfig

        sources = [SourceConfig(path) for path in paths]
        return PretrainData(tokenizer, sources, sequence_length=length, batch_tokens=length, prefetch_batches=0)
    if kind == "conversation":
        from qwen3_lit.data.conversation_data import ConversationData

        return ConversationData(tokenizer, list(paths), batch_tokens=length, prefetch_batches=0)
    if kind == "fusion":
        from qwen3_lit.data.fusion_data import FusionData

        if len(paths) != 2:
            raise UserError(f"--data: got {len(paths)} paths, fusion expects two: thinking and non-thinking")
        return FusionData(tokenizer, [paths[0]], [paths[1]], batch_tokens=length, prefetch_batches=0)
    from qwen3_lit.data.prompt_data import PromptData

    return PromptData(tokenizer, list(paths), prompts_per_step=1)


def datamodule_from_recipe(words: "Sequence[str]") -> "TextDataModule":
    """The data module of a stack of recipe files, without building its model.

    Raises:
        UserError: a mistake in the recipe, as the other verbs report it.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    from qwen3_lit.cli.class_index import import_classes, nearest_class
    from qwen3_lit.cli.config_errors import explain
    from qwen3_lit.cli.lightning_cli import known_keys
    from qwen3_lit.cli.recipe_files import check_stack, class_names, read_settings, split_arguments
    from qwen3_lit.data.text_data_module import TextDataModule
    from qwen3_lit.errors import UserError

    files, _, typed = split_arguments(words)
    stacks = [read_settings(path) for path in files]
    check_stack([*stacks, typed])
    settings = [setting for stack in (*stacks, typed) for setting in stack]
    import_classes(class_names(settings))
    data: dict[str, Any] = {}
    for path in files:
        with open(path, encoding="utf-8") as file:
            # Overlays carry no class_path, so merging key by key is what the full parser does with them.
            data = _merged(data, (yaml.safe_load(file) or {}).get("data") or {})
    for setting in typed:
        first, *keys = setting.path
        if first == "data" and keys:
            value: Any = yaml.safe_load(str(setting.value))
            for key in reversed(keys if keys[0] in ("class_path", "init_args") else ["init_args", *keys]):
                value = {key: value}
            data = _merged(data, value)
    if "class_path" not in data:
        raise UserError(f"{', '.join(map(str, files))}: data is not set; expected a recipe with data.class_path")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data", required=True)
    try:
        built = parser.instantiate(parser.parse_object({"data": data}))
    except ArgumentError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(explain(str(error), settings, known_keys, nearest_class)) from error
    datamodule: TextDataModule = built.data
    return datamodule


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def inspect_datamodule(datamodule: "TextDataModule", n: int, console: "Console | None" = None) -> None:
    """Print the first ``n`` training rows of a data module, its length histogram and its counts."""
    from rich.console import Console

    from qwen3_lit.data.batch import PackedBatch, PreferenceBatch, PromptBatch

    console = console or Console(soft_wrap=True)
    datamodule.ensure_loaded()
    console.rule(type(datamodule).__name__)
    lengths: list[int] = []
    for index in range(n):
        batch = datamodule.make_batch(index)
        if isinstance(batch, PromptBatch):
            _print_prompts(console, datamodule, batch, index)
            continue
        row = batch.packed if isinstance(batch, PreferenceBatch) else batch
        assert isinstance(row, PackedBatch)
        _print_row(console, datamodule, row, index)
        lengths += [end - start for start, end in row.document_spans()]
    _print_histogram(console, _all_lengths(datamodule) or lengths)
    for what, counts in (
        ("length limit", getattr(datamodule, "length_counts", None)),
        ("left out", getattr(datamodule, "dropped", None)),
    ):
        if counts:
            console.print(f"{what}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))
    describe = getattr(datamodule, "describe", None)
    for line in describe() if describe is not None else []:
        console.print(line)


def _print_row(console: "Console", datamodule: "TextDataModule", row: "PackedBatch", index: int) -> None:
    from rich.text import Text

    from qwen3_lit.data.batch import IGNORE_INDEX

    spans = row.document_spans()
    console.print(
        f"[bold]row {index}[/bold]: {row.num_tokens:,} tokens, {len(spans)} documents, {row.num_loss_tokens:,} trained "
        f"([{_TRAINED}]green[/] = trained, [{_CONTEXT}]dim[/] = context)"
    )
    ids, targets = row.token_ids_T.tolist(), row.target_ids_T.tolist()
    for number, (start, end) in enumerate(spans):
        # Token t is trained when it is the target of the position before it in its document.
        trained = [False] + [target != IGNORE_INDEX for target in targets[start : end - 1]]
        line = Text(f"[{number}] ", style="bold cyan")
        shown = min(end - start, _DOCUMENT_TOKENS)
        at = 0
        while at < shown:
            stop = at
            while stop < shown and trained[stop] == trained[at]:
                stop += 1
            text = datamodule.tokenizer.decode(ids[start + at : start + stop])
            line.append(text, style=_TRAINED if trained[at] else _CONTEXT)
            at = stop
        if shown < end - start:
            line.append(f" ... {end - start - shown:,} more tokens", style="yellow")
        console.print(line)


def _print_prompts(console: "Console", datamodule: "TextDataModule", batch: Any, index: int) -> None:
    from rich.text import Text

    from qwen3_lit.data.chat_template import render

    for problem in batch.problems:
        console.print(f"[bold]problem {index}[/bold]: task {problem['task']}", highlight=False)
        console.print(
            Text(render(problem["messages"], tools=problem.get("tools"), add_generation_prompt=True), _CONTEXT)
        )
        console.print(Text(f"answer: {problem['answer']}", _TRAINED))


def _all_lengths(datamodule: "TextDataModule") -> list[int]:
    """Lengths of everything there is, for the data modules that know them."""
    if hasattr(datamodule, "document_lengths"):
        return [int(length) for length in datamodule.document_lengths()]
    if hasattr(datamodule, "samples"):
        return [len(sample) for sample in datamodule.samples]
    if hasattr(datamodule, "problems"):
        from qwen3_lit.data.chat_template import prompt_ids

        return [len(prompt_ids(datamodule.tokenizer, p["messages"], p.get("tools"))) for p in datamodule.problems]
    return []


def _print_histogram(console: "Console", lengths: list[int]) -> None:
    if not lengths:
        return
    console.print(
        f"[bold]lengths[/bold] of {len(lengths):,} documents: {sum(lengths):,} tokens, longest {max(lengths):,}"
    )
    counts: dict[int, int] = {}
    for length in lengths:
        counts[length.bit_length()] = counts.get(length.bit_length(), 0) + 1
    for bits in range(min(counts), max(counts) + 1):
        count = counts.get(bits, 0)
        bar = "█" * max(round(_BAR * count / max(counts.values())), 1 if count else 0)
        console.print(f"{(1 << bits) >> 1:>9,} to {(1 << bits) - 1:>9,} {count:>9,} {bar}", highlight=False)
