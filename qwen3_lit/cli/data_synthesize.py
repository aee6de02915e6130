"""``qwen3-lit data synthesize``: write made-up problems, reasoning text, candidates, dialogs or preferences."""

import argparse
import sys

HELP = (
    "Write procedural data of one kind to a JSON lines file. The same arguments give the same file; train and held_out "
    "never share a query. Kinds: problems (reasoning-gym), worked_steps (pre-training text), reasoning_candidates "
    "(responses with known flaws), general_problems, dialogs (no thinking), preferences."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("kind", help="one of the kinds above")
    parser.add_argument("--out", required=True, help="JSON lines file to write; appears only when it is complete")
    parser.add_argument("--count", type=int, required=True, help="records to make (candidates: problems to answer)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random stream (default 0)")
    parser.add_argument("--split", default="train", help="train or held_out (default train)")
    parser.add_argument("--tasks", default="", help="task names, separated by commas; a name given twice counts twice")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the kind or, as task.name=value, of one task (chain_sum.max_digits=2); may be repeated",
    )
    parser.add_argument("--problems", help="reasoning_candidates: problem file to answer instead of fresh problems")
    parser.add_argument("--held-out", help="reasoning_candidates: problem file that the flawed teacher copies from")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="never repeat a query of this file; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file with a progress bar."""
    from rich.console import Console
    from rich.progress import Progress

    from qwen3_lit.curation.synthesis import SynthesisRequest, parse_options, synthesize_to_file

    request = SynthesisRequest(
        count=args.count,
        seed=args.seed,
        split=args.split,
        tasks=tuple(name.strip() for name in args.tasks.split(",") if name.strip()),
        options=parse_options(args.option),
        problems=args.problems,
        held_out=args.held_out,
        exclude=tuple(args.exclude),
    )
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True) as bar:
        total = None if args.kind == "reasoning_candidates" else args.count
        job = bar.add_task(f"{args.kind} -> {args.out}", total=total)
        written = synthesize_to_file(args.kind, request, args.out, progress=lambda: bar.advance(job))
    console.print(f"{args.out}: {written} records", highlight=False)
    return 0
