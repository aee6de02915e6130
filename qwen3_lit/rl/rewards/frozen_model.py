"""The language model behind a reward: where it runs and in which type. It is never trained."""

import torch

from qwen3_lit.model.hf_checkpoint import load_hf
from qwen3_lit.model.transformer import Qwen3


def load_frozen(path: str, device: str | None) -> Qwen3:
    """The model of a Hugging Face folder, without gradients: bf16 on a GPU, fp32 on a CPU (bf16 has no speed there).

    Args:
        path: Hugging Face folder.
        device: where it runs; null takes a GPU where there is one.

    Raises:
        UserError: the folder is no complete Qwen3 checkpoint.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    return load_hf(path, dtype=dtype).to(place).eval().requires_grad_(False)
