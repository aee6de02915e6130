"""``qwen3-lit data tokenizer``: a byte-level BPE with Qwen3's pre-tokenizer and special tokens."""

import argparse

from qwen3_lit.cli.text_source_arguments import add_text_source_arguments, text_source

HELP = (
    "Train a byte-level BPE tokenizer with Qwen3's pre-tokenizer (digits split singly), special tokens and chat "
    "template on a repeatable sample of the text. The folder loads in transformers and vLLM."
)
_DEFAULT_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_text_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="tokenizer folder to write")
    parser.add_argument("--vocab-size", required=True, type=int, metavar="N", help="tokens, the special ones included")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=_DEFAULT_BYTES,
        metavar="N",
        help="bytes of text to learn from (default: 64 MB)",
    )


def run(args: argparse.Namespace) -> None:
    """Train and write the tokenizer; say its size and how well it compresses."""
    from pathlib import Path

    from rich.console import Console

    from qwen3_lit.data.sources import sample_texts
    from qwen3_lit.data.tokenizer import train_tokenizer
    from qwen3_lit.errors import UserError

    if args.max_bytes < 1:
        raise UserError(f"--max-bytes: got {args.max_bytes}, expected 1 or more")
    # A second of reading is lost when this fails late, so what can be known is checked first.
    if (Path(args.out) / "tokenizer.json").exists():
        raise UserError(f"{args.out}: holds a tokenizer already; delete it or choose another --out")
    source = text_source(args)
    with Console(stderr=True).status("reading text"):
        texts = list(
            sample_texts(source.paths, source.reader, source.options, max_bytes=args.max_bytes, seed=args.seed)
        )
    if not texts:
        raise UserError(f"{' '.join(source.paths)}: no text in it; give other paths")
    size = sum(len(text.encode("utf-8", errors="replace")) for text in texts)
    with Console(stderr=True).status(f"training on {size / 1e6:.1f} MB of text"):
        tokenizer = train_tokenizer(texts, args.vocab_size, args.out)
    sample = texts[:: max(1, len(texts) // 64)]
    tokens = sum(len(tokenizer.encode_plain(text)) for text in sample)
    compression = sum(len(text.encode("utf-8", errors="replace")) for text in sample) / max(tokens, 1)
    Console(soft_wrap=True).print(
        f"{args.out}: {len(tokenizer):,} tokens, learnt from {len(texts):,} documents ({size / 1e6:.1f} MB), "
        f"{compression:.2f} bytes a token"
    )
