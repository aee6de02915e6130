"""``qwen3-lit import``: check a Hugging Face folder and convert it into this project's hand-over folder."""

import argparse
from pathlib import Path

from qwen3_lit.cli.checkpoint_writing import (
    add_writing_arguments,
    check_given_tokenizer,
    parse_dtype,
    parse_size,
    summary,
    written_summary,
)

HELP = (
    "Check a Hugging Face Qwen3 folder, dense or mixture of experts, in either layout, and write it as a folder that "
    "init_from loads. Without --out nothing is written: the folder is checked only."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", help="Hugging Face checkpoint folder")
    parser.add_argument("--out", metavar="DIR", help="folder to write; an older checkpoint there is replaced")
    add_writing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check, then write atomically, holding one parameter at a time. UserError for anything that does not fit."""
    from qwen3_lit.model.hf_checkpoint import save_hf
    from qwen3_lit.model.hf_companions import require_fit, tokenizer_files, tokenizer_ids
    from qwen3_lit.model.hf_weights import HfWeights

    source = Path(args.source)
    dtype, shard_bytes = parse_dtype(args.dtype), parse_size(args.max_shard_size)
    weights = HfWeights(source)
    tokenizer = args.tokenizer or (source if tokenizer_files(source) else None)
    if tokenizer:
        require_fit(tokenizer_ids(Path(tokenizer)), weights.config.vocab_size, tokenizer)
    check_given_tokenizer(args.tokenizer, weights.config.vocab_size, source)
    print(f"{source}: {summary(weights.config)}")
    if args.out is None:
        print(f"{source}: complete; init_from can name it as it is")
        return 0
    save_hf(
        weights,
        weights.config,
        args.out,
        tokenizer_dir=tokenizer,
        layout=args.layout,
        dtype=dtype,
        max_shard_bytes=shard_bytes,
    )
    print(written_summary(Path(args.out)))
    return 0
