"""The ``qwen3-lit`` console script: one table of verbs, each imported only when it is typed.

``qwen3-lit --help`` touches neither torch nor yaml. Whatever the user can fix leaves as one line on stderr with exit
code 2; Ctrl-C leaves as one line with exit code 130; ``QWEN3_LIT_DEBUG=1`` shows the traceback instead. Anything else
is a defect of this package and keeps its traceback.
"""

import argparse
import difflib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen3_lit import __version__
from qwen3_lit.errors import UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """One word of the command line and the module that carries it out."""

    name: str
    """What the user types; two words for the verbs about data."""
    module: str
    """Dotted path of a module with HELP, add_arguments(parser) and run(args)."""
    summary: str
    """The line in ``qwen3-lit --help``; the module's own HELP opens the verb's help."""


VERBS = [
    Verb("fit", "qwen3_lit.cli.lightning_cli", "train one phase: -c RECIPE [-c OVERLAY ...] [--key=value ...]"),
    Verb("validate", "qwen3_lit.cli.lightning_cli", "held-out loss of a phase's newest checkpoint"),
    Verb("test", "qwen3_lit.cli.lightning_cli", "evaluate a phase's newest checkpoint, as its own report does"),
    Verb("pipeline", "qwen3_lit.cli.pipeline", "run the phases of a pipeline file in order; resumes where it stopped"),
    Verb("generate", "qwen3_lit.cli.generate", "talk to a phase's folder, with /think, /no_think, a thinking budget"),
    Verb("data tokenizer", "qwen3_lit.cli.data_tokenizer", "train a byte-level BPE tokenizer with Qwen3's tokens"),
    Verb("data prepare", "qwen3_lit.cli.data_prepare", "turn text, code, JSONL, parquet or hub sets into chunks"),
    Verb("data inspect", "qwen3_lit.cli.data_inspect", "print packed samples with the trained tokens coloured"),
    Verb("data synthesize", "qwen3_lit.cli.data_synthesize", "write procedural problems, dialogs and reasoning text"),
    Verb("data curate", "qwen3_lit.cli.data_curate", "filter queries and responses, counting each reason"),
    Verb("data sample", "qwen3_lit.cli.data_sample", "sample responses of a checkpoint and keep the right ones"),
    Verb("import", "qwen3_lit.cli.checkpoint_import", "check and convert a Hugging Face folder for training here"),
    Verb("export", "qwen3_lit.cli.checkpoint_export", "write a Hugging Face folder from a checkpoint or folder"),
    Verb("report", "qwen3_lit.cli.report", "write report.md and report.json of a run folder"),
    Verb("ls", "qwen3_lit.cli.recipe_list", "list the shipped recipes and overlays"),
    Verb("cp", "qwen3_lit.cli.recipe_copy", "copy a shipped recipe to edit it"),
]
LIGHTNING_VERBS = ("fit", "validate", "test")


def _verb_lines(prefix: str = "") -> list[str]:
    verbs = [verb for verb in VERBS if verb.name.startswith(prefix)]
    width = max(len(verb.name) for verb in verbs)
    return [f"  {verb.name:<{width}}  {verb.summary}" for verb in verbs]


def overall_help() -> str:
    """The text of ``qwen3-lit --help``, from the table alone."""
    return "\n".join(
        [
            "usage: qwen3-lit VERB [arguments]",
            "",
            "Trains Qwen3 models through the whole published pipeline, one recipe a phase.",
            "",
            *_verb_lines(),
            "",
            "`qwen3-lit VERB --help` explains a verb. A first run: qwen3-lit pipeline pipelines/nano",
        ]
    )


def data_help() -> str:
    """The text of ``qwen3-lit data --help``."""
    lines = _verb_lines("data ")
    return "\n".join(["usage: qwen3-lit data VERB [arguments]", "", *lines, "", "`... VERB --help` explains a verb."])


def find_verb(argv: Sequence[str]) -> tuple[Verb, list[str]]:
    """The verb that the words name and the arguments left for it; UserError with the nearest verb otherwise."""
    by_name = {verb.name: verb for verb in VERBS}
    for words in (2, 1):
        verb = by_name.get(" ".join(argv[:words]))
        if verb and len(argv) >= words:
            return verb, list(argv[words:])
    if argv[0] == "data":
        known = [name.split()[1] for name in by_name if name.startswith("data ")]
        typed = argv[1] if len(argv) > 1 else "nothing"
        raise UserError(f"seen {typed!r}, expected one of {', '.join(known)}")
    near = difflib.get_close_matches(argv[0], by_name, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`qwen3-lit --help` lists the verbs"
    raise UserError(f"there is no such verb; {hint}")


def _run_verb(verb: Verb, arguments: list[str]) -> int:
    from qwen3_lit.cli.quick_import import no_collection

    with no_collection():
        module = importlib.import_module(verb.module)
    if verb.name in LIGHTNING_VERBS:
        return int(module.run_lightning(verb.name, arguments))
    parser = argparse.ArgumentParser(prog=f"qwen3-lit {verb.name}", description=module.HELP)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(arguments)) or 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def user_message(error: BaseException, place: str = "the run folder") -> str | None:
    """The one line to show for an error that the user can fix, or None for a defect of the program.

    ``place`` names where the verb writes, for a full disk that comes without a path.
    """
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    for link in _chain(error):
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(link) or "os error 28" in str(link):
            where = getattr(link, "filename", None) or place
            return f"{where}: no space left on the disk; free some and run the same command again"
    by_path = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    if by_path and getattr(error, "filename", None) is not None:
        return f"{error.filename}: {error.strerror}"  # type: ignore[attr-defined]
    return None


def _place(arguments: Sequence[str]) -> str:
    """Where a verb writes: its --out, or its run folder."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--out" or word.startswith("--out="):
            return word.partition("=")[2] or after
    return "the run folder"


def _name(argv: Sequence[str]) -> str:
    """The verb as it was typed, both words of it."""
    words = " ".join(argv[:2])
    return words if any(verb.name == words for verb in VERBS) else argv[0]


def die_with_parent() -> None:
    """Ask Linux to kill this process when the pipeline that started it dies, so that no orphan writes to its run."""
    parent = os.environ.pop("QWEN3_LIT_PARENT_PID", "")
    if not parent or not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def import_from_current_folder() -> None:
    """Find the user's own modules, which a recipe names, as ``python -m`` does: a console script looks beside itself.

    The folder comes last, so that a file in it hides no installed package.
    """
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)


def log_to_stderr() -> None:
    """Show what this project logs as plain lines; other libraries keep their own handlers."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("qwen3_lit", "qwen3_kernels"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not logger.handlers:
            logger.addHandler(handler)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overall_help())
        return 0
    if argv[0] == "data" and argv[1:2] and argv[1] in ("-h", "--help", "help"):
        print(data_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, arguments = find_verb(argv)
    code = _run_verb(verb, arguments)
    sys.stdout.flush()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    die_with_parent()
    import_from_current_folder()
    log_to_stderr()
    debug = os.environ.get("QWEN3_LIT_DEBUG", "") not in ("", "0")
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\nqwen3-lit {_name(argv)}: interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, had enough: that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = user_message(error, _place(argv))
        if debug or message is None:
            raise
        print(f"qwen3-lit {_name(argv)}: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
