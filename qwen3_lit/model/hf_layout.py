"""Where each weight lies on disk: the two layouts of Hugging Face's Qwen3 checkpoints.

Legend: D model width, E experts, F expert width.

v4 (transformers up to 4.57, and what transformers 5 saves by default): one tensor an expert and projection,
``model.layers.0.mlp.experts.3.gate_proj.weight [F, D]``. v5: the stacked tensors that the model itself holds,
``model.layers.0.mlp.experts.gate_up_proj [E, 2F, D]`` (gate rows first) and ``down_proj [E, D, F]``. Everything else is
the same in both. ``pieces`` describes a layout once; reading and writing both follow it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from qwen3_lit.errors import UserError

Layout = Literal["v4", "v5"]
LAYOUTS: tuple[Layout, ...] = ("v4", "v5")

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@dataclass(frozen=True)
class Piece:
    """One tensor on disk and the part of a model parameter that it is."""

    key: str
    """Name in the safetensors file."""
    shape: tuple[int, ...]
    """Shape in the file."""
    index: tuple[int | slice, ...] = ()
    """Where it lies in the parameter; () is the whole of it."""


def hf_key(name: str) -> str:
    """The name transformers gives a parameter: under ``model.``, the head beside it."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def pieces(name: str, shape: tuple[int, ...], layout: Layout) -> list[Piece]:
    """The tensors on disk that make up the parameter ``name`` of ``shape``, in file order."""
    if layout == "v5" or not name.endswith((GATE_UP, DOWN)):
        return [Piece(hf_key(name), shape)]
    stem = hf_key(name).rpartition(".")[0]
    num_experts, rows, columns = shape
    found = []
    for expert in range(num_experts):
        if name.endswith(DOWN):
            found.append(Piece(f"{stem}.{expert}.down_proj.weight", (rows, columns), (expert,)))
        else:
            half = (rows // 2, columns)
            found.append(Piece(f"{stem}.{expert}.gate_proj.weight", half, (expert, slice(0, rows // 2))))
            found.append(Piece(f"{stem}.{expert}.up_proj.weight", half, (expert, slice(rows // 2, rows))))
    return found


def layout_of(name: str, keys: Collection[str]) -> Layout:
    """The layout in which the parameter ``name`` is present among ``keys``."""
    return "v5" if hf_key(name) in keys else "v4"


def require_layout(layout: str) -> Layout:
    """``layout`` if it is one. Raises UserError."""
    for known in LAYOUTS:
        if layout == known:
            return known
    raise UserError(f"layout: seen {layout!r}, expected v4 (one tensor an expert) or v5 (stacked experts)")
