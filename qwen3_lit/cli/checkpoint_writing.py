"""What ``qwen3-lit import`` and ``qwen3-lit export`` share: the arguments about the folder written, and its summary.

torch is imported only when a verb runs, so that ``--help`` is instant.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_lit.errors import UserError

if TYPE_CHECKING:
    import torch

    from qwen3_lit.model.config import ModelConfig

_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16"}
_DTYPES |= {"float32": "float32", "fp32": "float32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare layout, dtype, shard size and tokenizer."""
    parser.add_argument(
        "--layout",
        choices=("v4", "v5"),
        default="v4",
        help="v4: one tensor an expert, which every transformers and vLLM reads (default); v5: stacked experts",
    )
    parser.add_argument("--dtype", default="keep", help="keep (default), bfloat16, float16 or float32")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest file, such as 5GB or 500MB")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder with the tokenizer to copy along; default: the source's own"
    )


def check_given_tokenizer(given: str | None, vocab_size: int, own: Path | str | None) -> None:
    """Refuse a ``--tokenizer`` that gives other ids than the one the weights came with. Raises UserError."""
    if given is not None:
        from qwen3_lit.data.tokenizer import check_tokenizer_fits, load_tokenizer

        check_tokenizer_fits(load_tokenizer(given), vocab_size, None if own is None else str(own))


def parse_dtype(text: str) -> "torch.dtype | None":
    """A torch type by name, None for ``keep``. Raises UserError."""
    import torch

    if text == "keep":
        return None
    if text not in _DTYPES:
        raise UserError(f"--dtype: seen {text!r}, expected keep, {', '.join(_DTYPES)}")
    dtype = getattr(torch, _DTYPES[text])
    assert isinstance(dtype, torch.dtype)
    return dtype


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise UserError(f"--max-shard-size: seen {text!r}, expected a positive size such as 5GB, 500MB or 1000000")
    return size


def summary(config: "ModelConfig") -> str:
    """One line about a model: kind, sizes, positions."""
    from qwen3_lit.model.cost import active_parameter_count, parameter_count

    total = f"{parameter_count(config):,} parameters"
    kind = "dense"
    if config.num_experts:
        kind = f"{config.num_experts} experts, top-{config.num_experts_per_tok}"
        total += f" ({active_parameter_count(config):,} active)"
    extras = [f"RoPE base {config.rope_theta:g}"]
    if config.rope_scaling:
        extras.append(f"YaRN x{config.rope_scaling.factor:g}")
    if config.dual_chunk:
        extras.append(f"dual chunks of {config.dual_chunk.chunk_size}")
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}"
    return f"Qwen3 {kind}: {total}, {shape}, {', '.join(extras)}"


def written_summary(folder: Path) -> str:
    """One line about the files in a folder just written."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    tokenizer = "with its tokenizer" if (folder / "tokenizer_config.json").is_file() else "without a tokenizer"
    return f"wrote {folder}: {size:.3g} GB in {len(files)} weight file{'s' if len(files) != 1 else ''}, {tokenizer}"
