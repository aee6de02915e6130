"""The matrix products of a linear head, a chunk of rows at a time: logits, and both gradients from theirs.

Legend: T tokens, R rows (tokens) of one chunk, D model width, V vocabulary.

cuBLAS does the products: at V = 151,936 a chunk is large enough for its full rate, and what a fused kernel would save,
the logits' way through memory, is a few percent. What costs time is a badly chosen chunk (``rows_per_chunk``). Both
gradients read the [R, V] gradient of the logits; the head's is a sum over chunks, kept in float32, because adding up in
bfloat16 rounds once a chunk (linkedin/Liger-Kernel#1391: 1.3 times the error at 16 chunks, 7.3 times at 1,024).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

PITCH = 128
"""Logits rows start at multiples of this many elements: 16-byte loads, whatever V is."""
_TILE_ROWS, _TILE_COLUMNS = 128, 256
"""Output tile of cuBLAS's large bfloat16 kernels on Hopper."""
_TILE_FLOPS_PER_S = 5.5e12
"""Rate of one multiprocessor, 726 TFLOP/s over 132."""
_BYTES_PER_S = 4.28e12


class Columns(NamedTuple):
    """How many columns a chunk of logits has."""

    valid: int
    """Real tokens: the columns that get probability."""
    computed: int
    """Columns of the product: ``valid`` rounded up, so that every alignment is as good as can be."""
    pitch: int
    """Elements from one row to the next."""

    @classmethod
    def of(cls, vocab: int, valid_vocab: int) -> "Columns":
        pitch = -(-valid_vocab // PITCH) * PITCH
        return cls(valid_vocab, min(vocab, pitch), pitch)


def check_valid_vocab(op: str, vocab: int, valid_vocab: int | None) -> None:
    """Raise ValueError where ``valid_vocab`` is no number of rows of a head of ``vocab`` rows."""
    if valid_vocab is not None and not 1 <= valid_vocab <= vocab:
        raise ValueError(f"{op}: valid_vocab is {valid_vocab}, expected between 1 and the head's {vocab} rows")


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; 132, Hopper's, where there is none."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 132


@functools.cache
def rows_per_chunk(tokens: int, vocab: int, width: int, most_rows: int, multiprocessors: int = 132) -> int:
    """Rows of a chunk, at most ``most_rows``, that make the two gradients fastest; fewer where it makes no difference.

    Two costs depend on the choice. The gradient of the hidden states has few tiles with a long sum: its time is a
    number of whole waves, V * 128 * 256 * 2 / 5.5e12 = 1.8 ms each at V = 151,936, and one wave of 132 multiprocessors
    covers 2,048 rows of D = 2,048, two cover 4,096. Each chunk reads and writes the sum of the head's gradient,
    8 * V * D = 2.5 GB = 0.58 ms. For T = 16,384 and D = 2,048: 2,048 rows make 8 waves and 8 sums = 19 ms, 4,096 rows
    8 waves and 4 sums = 17 ms, 3,328 rows 10 waves and 5 sums = 21 ms. The other two products do not depend on it.
    """
    wave_s = _TILE_ROWS * _TILE_COLUMNS * vocab * 2 / _TILE_FLOPS_PER_S
    sum_s = 8 * vocab * width / _BYTES_PER_S

    def waves(rows: int) -> int:
        tiles = -(-rows // _TILE_ROWS) * -(-width // _TILE_COLUMNS)
        return -(-tiles // multiprocessors)

    def seconds(rows: int) -> float:
        full, rest = divmod(tokens, rows)
        return (full * waves(rows) + waves(rest)) * wave_s + (full + (rest > 0)) * sum_s

    if tokens <= _TILE_ROWS:
        return max(tokens, 1)
    most_rows = min(max(most_rows, _TILE_ROWS), tokens + _TILE_ROWS - 1)
    return min(min(range(_TILE_ROWS, most_rows + 1, _TILE_ROWS), key=seconds), tokens)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``; a float32 ``out`` of bfloat16 operands holds the sums as they were, rounded nowhere."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class HeadGradients:
    """Both gradients of a head, filled chunk by chunk from the gradients of the logits."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, columns: Columns, hidden: bool, weight: bool) -> None:
        """``hidden`` and ``weight`` say which of the two is wanted; the other stays empty."""
        self._weight_VD = weight_VD[: columns.computed]
        self.hidden_TD = torch.empty_like(hidden_TD, memory_format=torch.contiguous_format) if hidden else None
        self.weight_VD = None
        if weight:
            self.weight_VD = torch.empty(weight_VD.shape, dtype=torch.float32, device=weight_VD.device)
            self.weight_VD[columns.computed if hidden_TD.shape[0] else 0 :].zero_()

    def add(self, start: int, hidden_RD: Tensor, grad_logits_RV: Tensor) -> None:
        """Take in the chunk of rows that begins at ``start``; the chunk at 0 comes first."""
        if self.hidden_TD is not None:
            torch.mm(grad_logits_RV, self._weight_VD, out=self.hidden_TD[start : start + hidden_RD.shape[0]])
        if self.weight_VD is None:
            return
        sum_VD, grad_logits_VR = self.weight_VD[: self._weight_VD.shape[0]], grad_logits_RV.t()
        if start == 0:  # overwrites: 1.2 GB need neither be zeroed nor read
            product_into(sum_VD, grad_logits_VR, hidden_RD)
        elif hidden_RD.dtype == torch.float32:
            torch.addmm(sum_VD, grad_logits_VR, hidden_RD, out=sum_VD)
        else:
            torch.addmm(sum_VD, grad_logits_VR, hidden_RD, out_dtype=torch.float32, out=sum_VD)
