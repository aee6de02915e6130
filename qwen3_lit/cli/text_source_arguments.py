"""The arguments that ``data prepare`` and ``data tokenizer`` share: which text to read, and how."""

import argparse
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qwen3_lit.data.source_units import FileReader, SourceOptions

PATHS_HELP = (
    "folders of text, code and Markdown; files; JSONL (.jsonl, .jsonl.gz) or parquet with a text column; "
    "hub:NAME[?config=C&split=S] (a datasets name); python:stdlib (sources and docstrings of the standard library); "
    "python:site-packages (documentation of the installed packages)"
)


class TextSource(NamedTuple):
    """What the shared arguments say."""

    paths: tuple[str, ...]
    options: "SourceOptions"
    reader: "FileReader"


def add_text_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add PATH and the options that choose files and rows."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATHS_HELP)
    parser.add_argument(
        "--include", nargs="+", action="extend", default=[], metavar="GLOB", help="read only files that match"
    )
    parser.add_argument(
        "--exclude", nargs="+", action="extend", default=[], metavar="GLOB", help="leave out files that match"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="column with the text (default: text)")
    parser.add_argument(
        "--on-bad-record",
        choices=("raise", "skip"),
        default="raise",
        help="stop at a bad row (default), or count it and go on",
    )
    parser.add_argument("--ocr", action="store_true", help="also read PDF files and images (needs the ocr extra)")
    parser.add_argument("--ocr-language", default="eng", metavar="LANG", help="tesseract language (default: eng)")
    parser.add_argument("--seed", type=int, default=0, help="order of the sources, which decides what limits keep")


def text_source(args: argparse.Namespace) -> TextSource:
    """The parsed arguments as objects. Files given by name are read by OCR when they are PDF or images."""
    from qwen3_lit.curation.document_text import DocumentReader
    from qwen3_lit.data.source_units import SourceOptions

    options = SourceOptions(tuple(args.include), tuple(args.exclude), args.text_field, args.on_bad_record)
    return TextSource(tuple(args.paths), options, DocumentReader(ocr=args.ocr, language=args.ocr_language))
