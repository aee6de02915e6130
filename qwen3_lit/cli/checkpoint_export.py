"""``qwen3-lit export``: a Hugging Face folder from a run, a training checkpoint or another Hugging Face folder."""

import argparse
import logging
from pathlib import Path

from qwen3_lit.cli.checkpoint_writing import (
    add_writing_arguments,
    check_given_tokenizer,
    parse_dtype,
    parse_size,
    summary,
    written_summary,
)
from qwen3_lit.cli.resume_point import newest_checkpoint
from qwen3_lit.errors import UserError

logger = logging.getLogger(__name__)

HELP = (
    "Write a Hugging Face folder that transformers and vLLM load. The source is a run folder (its newest checkpoint), "
    "a Lightning .ckpt file, a distributed checkpoint folder or a Hugging Face folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", help="run folder, .ckpt file, distributed checkpoint folder or Hugging Face folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; an older checkpoint is replaced")
    parser.add_argument(
        "--config", metavar="DIR", help="Hugging Face folder whose config.json describes a checkpoint without its own"
    )
    add_writing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write atomically; UserError when the source is no checkpoint or is not whole."""
    from qwen3_lit.model.hf_checkpoint import read_hf_config, save_hf
    from qwen3_lit.model.hf_companions import tokenizer_files
    from qwen3_lit.model.hf_weights import HfWeights, is_hf_folder
    from qwen3_lit.model.training_checkpoint import read_training_checkpoint

    dtype, shard_bytes = parse_dtype(args.dtype), parse_size(args.max_shard_size)
    given = None if args.config is None else read_hf_config(args.config)
    source = find_checkpoint(Path(args.source))
    tokenizers: list[Path | str]
    if is_hf_folder(source):
        weights = HfWeights(source, given)
        config, tokenizers = weights.config, [source]
        state = weights
    else:
        checkpoint = read_training_checkpoint(source, given)
        state, config = checkpoint.weights, checkpoint.config  # type: ignore[assignment]
        tokenizers = [folder / "hf" for folder in (source.parent.parent, source.parent)]
        tokenizers += [checkpoint.tokenizer] if checkpoint.tokenizer else []
    own = next((folder for folder in tokenizers if tokenizer_files(Path(folder))), None)
    check_given_tokenizer(args.tokenizer, config.vocab_size, own)
    tokenizer = args.tokenizer or own
    if tokenizer is None:
        logger.warning("%s: no tokenizer found; the folder gets none (--tokenizer DIR adds one)", source)
    print(f"{source}: {summary(config)}")
    save_hf(
        state,
        config,
        args.out,
        tokenizer_dir=tokenizer,
        layout=args.layout,
        dtype=dtype,
        max_shard_bytes=shard_bytes,
    )
    print(written_summary(Path(args.out)))
    return 0


def find_checkpoint(source: Path) -> Path:
    """The checkpoint or Hugging Face folder that the user's path means; UserError when there is none."""
    from qwen3_lit.model.hf_weights import is_hf_folder
    from qwen3_lit.model.training_checkpoint import is_training_checkpoint

    if not source.exists():
        raise UserError(
            f"{source}: no such file or folder; expected a run folder, a checkpoint or a Hugging Face folder"
        )
    if is_training_checkpoint(source) or is_hf_folder(source):
        return source
    newest = newest_checkpoint(source / "checkpoints") or newest_checkpoint(source)
    if newest is not None:
        logger.info("%s: the newest checkpoint is %s", source, newest)
        return newest
    if is_hf_folder(source / "hf"):
        return source / "hf"
    if source.is_file():
        raise UserError(f"{source}: expected a Lightning checkpoint whose name ends in .ckpt")
    if (source / "config.json").is_file():
        raise UserError(
            f"{source}: config.json is there, but neither model.safetensors nor its index; copy the weights"
        )
    if (source / "meta.pt").is_file() or any(source.glob("*.distcp")):
        raise UserError(f"{source}: not a complete distributed checkpoint, .metadata is missing; take another one")
    raise UserError(
        f"{source}: neither a run folder (checkpoints/*.ckpt or hf/), nor a checkpoint, nor a Hugging Face folder"
    )
