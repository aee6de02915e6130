"""``qwen3-lit report``: write report.md and report.json of a run folder from what its phases left behind."""

import argparse

HELP = (
    "Collect the finished phases of a run folder into report.md (tables, plots, samples) and report.json. Can be "
    "repeated at any time, also while a pipeline is under way."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a pipeline, or of a single phase")


def run(args: argparse.Namespace) -> int:
    """Write the report and show the verdicts."""
    from rich.console import Console
    from rich.table import Table

    from qwen3_lit.evaluation.report_pages import write_report
    from qwen3_lit.evaluation.stage_table import stage_table
    from qwen3_lit.evaluation.verdicts import verdicts

    page = write_report(args.run_dir)
    table = stage_table(args.run_dir)
    shown = Table("phase", "what it did", "seconds", title=str(table.run_dir))
    for phase in table.phases:
        shown.add_row(phase.name, "\n".join(verdicts(phase.metrics)) or "-", f"{phase.seconds:,.0f}")
    console = Console()
    console.print(shown, highlight=False)
    console.print(f"wrote {page}", highlight=False)
    return 0
