"""``qwen3-lit ls``: the shipped recipes and overlays, read from their header comments without importing torch."""

import argparse
import shutil
import textwrap

from qwen3_lit.cli.recipe_files import header, recipes_folder, shipped_names

HELP = "List the shipped recipes and overlays: what each does, what it needs and which recipe comes next."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("filter", nargs="?", default="", help="show only names or descriptions that contain this text")


def run(args: argparse.Namespace) -> int:
    """Print one block a recipe; returns 0, or 1 when nothing matches."""
    folder = recipes_folder()
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    rows = []
    for name in shipped_names():
        fields = header(folder / f"{name}.yaml")
        if args.filter.lower() in " ".join([name, *fields.values()]).lower():
            rows.append((name, fields))
    if not rows:
        print(f"nothing shipped matches {args.filter!r}")
        return 1
    column = max(len(name) for name, _ in rows) + 2
    for name, fields in sorted(rows, key=lambda row: ("/" in row[0], row[0])):
        text = fields.get("what", "")
        if fields.get("module"):
            text = f"[{fields['module']}] {text}"
        for key in ("needs", "next"):
            if fields.get(key):
                text += f" | {key}: {fields[key]}"
        lines = textwrap.wrap(text, max(30, width - column)) or [""]
        print(f"{name:<{column}}{lines[0]}")
        for line in lines[1:]:
            print(" " * column + line)
    return 0
