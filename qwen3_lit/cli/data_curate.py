"""``qwen3-lit data curate``: filter candidate responses into a set to train on, counting each reason."""

import argparse
import sys

HELP = (
    "Filter candidate conversations: queries that are hard to verify, too easy for a judge model or similar to "
    "held-out ones, and responses that are wrong, repetitive, guessed, contradictory or in mixed languages. Writes "
    "the kept conversations and a report with each reason counted."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("candidates", help="conversations that end in an assistant turn with reasoning_content")
    parser.add_argument("--out", required=True, help="JSON lines file for the kept conversations")
    parser.add_argument("--report", help="JSON file for the counts")
    parser.add_argument("--problems", help="problem file with the references, where the candidates do not carry them")
    parser.add_argument(
        "--held-out", action="append", default=[], metavar="FILE", help="problem file that must stay unseen; repeatable"
    )
    parser.add_argument("--judge", metavar="HF_DIR", help="drop queries that this model answers without thinking")
    parser.add_argument(
        "--judge-max-new-tokens", type=int, default=256, help="room for the judge's answer (default 256)"
    )
    parser.add_argument("--domains", default="", help="domain labels for the judge to choose from, comma-separated")
    parser.add_argument("--max-domain-ratio", type=float, help="most queries of a domain, as multiple of the median")
    parser.add_argument("--max-samples", type=int, help="most samples in the output, spread over the domains")
    parser.add_argument("--per-query", type=int, default=1, help="most samples a query, 0 for all (default 1)")
    parser.add_argument("--workers", type=int, default=1, help="verifier processes (default 1)")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds one verification may take (default 10)")
    parser.add_argument("--device", default="auto", help="where the judge runs: auto, cpu, cuda (default auto)")
    parser.add_argument(
        "--on-bad-record", choices=("raise", "skip"), default="raise", help="stop at a bad record, or leave it out"
    )


def run(args: argparse.Namespace) -> int:
    """Filter the file and print the counts."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from qwen3_lit.curation.curate import CurationConfig, curate
    from qwen3_lit.curation.query_filter import EngineJudge, QueryFilterConfig
    from qwen3_lit.curation.verification import AnswerVerifier

    config = CurationConfig(
        max_samples=args.max_samples,
        per_query=args.per_query or None,
        query=QueryFilterConfig(max_domain_ratio=args.max_domain_ratio),
        domains=tuple(name.strip() for name in args.domains.split(",") if name.strip()),
        on_bad_record=args.on_bad_record,
    )
    console = Console(file=sys.stderr)
    with AnswerVerifier(num_workers=args.workers, deadline_seconds=args.deadline) as verifier:
        judge = None
        if args.judge:
            from qwen3_lit.cli.data_sample import load_engine

            engine, tokenizer = load_engine(args.judge, args.device)
            judge = EngineJudge(engine, tokenizer, verifier, max_new_tokens=args.judge_max_new_tokens)
        with Progress(console=console, transient=True) as bar:
            job = bar.add_task("reading", total=None)
            result = curate(
                args.candidates,
                args.out,
                config=config,
                verifier=verifier,
                problems=args.problems,
                held_out=args.held_out,
                judge=judge,
                report=args.report,
                progress=lambda what, done: bar.update(job, description=f"{what}: {done}", completed=done),
            )
    table = Table("reason", "candidates", title=f"{args.out}: kept {result['kept']} of {result['seen']}")
    for reason, count in result["dropped"].items():
        table.add_row(reason, str(count))
    console.print(table)
    return 0
