"""``qwen3-lit cp``: copy a shipped recipe to a file of one's own."""

import argparse
import os
from pathlib import Path

from qwen3_lit.cli.recipe_files import resolve_recipe
from qwen3_lit.errors import UserError

HELP = "Copy a shipped recipe to edit it; the copy is a complete recipe and keeps its header comment."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("recipe", help="short name as `qwen3-lit ls` shows it, or a path")
    parser.add_argument("destination", help="file or folder to write to")
    parser.add_argument("--force", action="store_true", help="replace a file that is there already")


def run(args: argparse.Namespace) -> int:
    """Write the copy atomically; UserError when the destination exists."""
    source = resolve_recipe(args.recipe)
    destination = Path(args.destination)
    if destination.is_dir():
        destination = destination / source.name
    elif destination.suffix not in (".yaml", ".yml"):
        raise UserError(f"{destination}: expected a folder that exists or a name that ends in .yaml")
    if destination.exists() and not args.force:
        raise UserError(f"{destination}: there is a file already; choose another name or add --force")
    destination.parent.mkdir(parents=True, exist_ok=True)
    half = destination.with_name(f".{destination.name}.half")
    half.write_bytes(source.read_bytes())
    os.replace(half, destination)
    print(f"{source} -> {destination}")
    return 0
