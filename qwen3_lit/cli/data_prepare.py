"""``qwen3-lit data prepare``: raw text to LitData chunks."""

import argparse
from typing import TYPE_CHECKING

from qwen3_lit.cli.text_source_arguments import add_text_source_arguments, text_source

if TYPE_CHECKING:
    from qwen3_lit.data.prepare import Progress

HELP = (
    "Tokenise text into LitData chunks, one item a document, without exact duplicates, split into training and "
    "held-out documents. Interrupted at any point, the same command goes on where it was."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_text_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the prepared corpus")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder")
    parser.add_argument("--name", default=None, help="name in reports (default: the name of --out)")
    parser.add_argument(
        "--min-tokens", type=int, default=16, metavar="N", help="leave out shorter documents (default: 16)"
    )
    parser.add_argument("--max-tokens", type=int, default=None, metavar="N", help="cut longer documents into pieces")
    parser.add_argument("--max-total-tokens", type=int, default=None, metavar="N", help="stop when so many are kept")
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.005,
        metavar="X",
        help="share of held-out documents (default: 0.005)",
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: one a core, up to 16)"
    )


def run(args: argparse.Namespace) -> None:
    """Prepare the corpus and say what is in it."""
    from pathlib import Path

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from qwen3_lit.data.prepare import PrepareSettings, prepare
    from qwen3_lit.errors import UserError

    source = text_source(args)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: got {args.workers}, expected 1 or more")
    settings = PrepareSettings(
        paths=source.paths,
        tokenizer=args.tokenizer,
        name=args.name or Path(args.out).name,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        max_total_tokens=args.max_total_tokens,
        held_out_fraction=args.held_out_fraction,
        include=source.options.include,
        exclude=source.options.exclude,
        text_field=source.options.text_field,
        on_bad_record=source.options.on_bad_record,
        seed=args.seed,
    )
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards  {task.fields[tokens]:>14,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        result = prepare(settings, args.out, source.reader, workers=args.workers, progress=_follow(bars))
    out = Console(soft_wrap=True)
    if result.already_done:
        out.print(f"{args.out}: already prepared with these settings, nothing to do (delete it to prepare it again)")
    elif result.shards_reused:
        out.print(f"{args.out}: went on from {result.shards_reused} finished shards")
    out.print(f"{args.out}: {result.info.summary()}")


def _follow(bars: "object") -> "Progress":
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    assert isinstance(bars, Bars)
    tasks: dict[str, TaskID] = {}

    def follow(stage: str, done: int, total: int, tokens: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, tokens=tokens)
        bars.update(tasks[stage], completed=done, total=total, tokens=tokens)

    return follow
