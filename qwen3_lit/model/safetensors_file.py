"""safetensors files read with a check of every byte range, and written one tensor at a time.

The safetensors library reads; its ``save_file`` is not used because it holds a second copy of every tensor of the file
as bytes while it writes, which doubles the memory of an export. The format is its published one: a little-endian
uint64 header length, a JSON header of name -> {dtype, shape, data_offsets}, then the raw tensors.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_lit.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Types that weights are stored in here."""

_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One line of a header."""

    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Names, types and shapes of the tensors in ``file``.

    Raises UserError when the file is missing, damaged, or shorter than its header says.
    """
    again = "copy or download it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise UserError(f"{file}: truncated or not a safetensors file ({size} bytes, no whole header); {again}")
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                key: (TensorEntry(entry["dtype"], tuple(entry["shape"])), entry["data_offsets"][1])
                for key, entry in header.items()
            }
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing, but the checkpoint's index names it; {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: truncated or not a safetensors file (unreadable header); {again}") from error
    cut = [key for key, (_, end) in entries.items() if 8 + length + end > size]
    if cut:
        expected = 8 + length + max(end for _, end in entries.values())
        raise UserError(f"{file}: truncated: seen {size} bytes, expected {expected}; {cut[0]} is cut off; {again}")
    return {key: entry for key, (entry, _) in entries.items()}


def write_file(file: Path, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], next_tensor: Any) -> None:
    """Write ``tensors`` in order.

    Args:
        file: to write; the caller renames it into place.
        tensors: name, type and shape of each, known before any tensor is made.
        next_tensor: ``next_tensor(name) -> Tensor``, called once a name, in order; the only tensor alive.

    Raises:
        OSError: the disk is full.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name, dtype, shape in tensors:
            stream.write(memoryview(_raw_bytes(next_tensor(name), dtype, shape)))
        stream.flush()
        os.fsync(stream.fileno())


def _raw_bytes(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} written as {shape}"
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(-1).view(torch.uint8).numpy()
