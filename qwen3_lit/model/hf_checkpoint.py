"""Hugging Face folders: the hand-over between phases, and to transformers and vLLM.

``load_hf`` makes a ``Qwen3`` from any Qwen3 folder, ``save_hf`` writes one. Both know the two on-disk layouts (see
``hf_layout``), hold at most one parameter beyond the model itself, and keep every bit of every weight. Nothing is
accepted half: a missing, unexpected, misshapen or cut-off tensor is a UserError that names file and key.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.cost import parameter_shapes
from qwen3_lit.model.failing_together import failing_together
from qwen3_lit.model.folder_swap import swapped_folder
from qwen3_lit.model.hf_companions import (
    CARD_FILE,
    GENERATION_FILE,
    copy_tokenizer,
    generation_defaults,
    read_json,
    require_fit,
    special_token_ids,
    tokenizer_ids,
    write_json,
)
from qwen3_lit.model.hf_config import CONFIG_FILE, hf_config_dict, read_hf_config
from qwen3_lit.model.hf_layout import Piece, pieces, require_layout
from qwen3_lit.model.hf_weights import (
    INDEX_FILE,
    TORCH_DTYPES,
    WEIGHTS_FILE,
    HfWeights,
    LazyWeights,
    and_more,
    is_hf_folder,
)
from qwen3_lit.model.init import copy_whole
from qwen3_lit.model.safetensors_file import DTYPE_NAMES, write_file
from qwen3_lit.model.transformer import Qwen3

__all__ = ["HfWeights", "is_hf_folder", "load_hf", "load_hf_weights", "read_hf_config", "save_hf"]

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
"""transformers 4's size of a shard."""


def load_hf(path: str | Path, *, dtype: torch.dtype | None = None, overrides: Mapping[str, Any] | None = None) -> Qwen3:
    """A model on the CPU with the weights of a Hugging Face folder.

    Args:
        path: folder in either layout, in one file or sharded.
        dtype: type of the parameters; null keeps what is on disk.
        overrides: fields of ``ModelConfig`` that win over config.json, such as ``rope_theta``.

    Raises:
        UserError: the folder is no complete Qwen3 checkpoint.
    """
    config = read_hf_config(path, overrides)
    weights = HfWeights(path, config)
    with torch.device("meta"):
        model = Qwen3(config)
    state = {name: _own(weights[name], dtype) for name in weights}
    model.load_state_dict(state, assign=True)
    model.rope.to_empty(device="cpu")
    model.rope.reset_parameters()
    return model


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in memory of its own: what safetensors hands out may be a view of the mapped file."""
    return tensor.to(dtype) if dtype not in (None, tensor.dtype) else tensor.clone()


def load_hf_weights(model: Qwen3, path: str | Path) -> None:
    """Copy the weights of a folder into an existing model, wherever it lies and however it is sharded.

    Every rank of a sharded model has to call it; each reads the file and keeps its own part.

    Raises:
        UserError: the folder does not fit the model's configuration.
    """
    weights = HfWeights(path, model.config)
    for name, parameter in model.named_parameters():
        copy_whole(parameter, weights[name])


def save_hf(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    path: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    layout: str = "v4",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation_config: Mapping[str, Any] | None = None,
    model_card: str | None = None,
) -> None:
    """Write a folder that transformers (4 and 5), vLLM and ``load_hf`` load. It appears complete or not at all.

    Sharded parameters are gathered one by one: every rank has to call it then, rank 0 writes, and what it raises every
    rank raises. Otherwise the call needs no other rank.

    Args:
        model_or_state_dict: a ``Qwen3``, its state_dict, or any mapping with its parameter names.
        config: the model's configuration.
        path: folder to write; a checkpoint that is there already is replaced.
        tokenizer_dir: folder (or hub name) whose tokenizer and chat template go along; its generation_config.json
            too, unless ``generation_config`` is given.
        layout: v4, one tensor an expert, which every transformers and vLLM reads; v5, stacked experts.
        dtype: type on disk; null keeps the type of each parameter.
        max_shard_bytes: a file grows no larger, except for a single tensor that is.
        generation_config: content of generation_config.json.
        model_card: content of README.md.

    Raises:
        UserError: a parameter is missing, unknown or misshapen, the tokenizer does not fit, or ``path`` holds
            something else.
        OSError: the disk is full; nothing is left behind.
    """
    known_layout = require_layout(layout)
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    shapes = parameter_shapes(config)
    _check_state(state, shapes)
    types = {name: dtype or _dtype_of(state, name) for name in shapes}
    for name, kind in types.items():
        if kind not in DTYPE_NAMES:
            raise UserError(f"{name}: seen type {kind}, expected a floating-point type of {', '.join(TORCH_DTYPES)}")
    plan = [(name, piece) for name, shape in shapes.items() for piece in pieces(name, shape, known_layout)]
    shards = _shards(plan, types, max_shard_bytes)
    source = _Source(state, shapes)
    together = failing_together if source.to_gather else nullcontext
    with together(), ExitStack() as stack:
        with together():  # nobody gathers before rank 0 knows that it can write
            if _is_writer():
                folder = stack.enter_context(swapped_folder(Path(path), is_hf_folder))
                main_dtype = str(types["embed_tokens.weight"]).removeprefix("torch.")
                _write_companions(folder, config, main_dtype, tokenizer_dir, generation_config, model_card)
        if not _is_writer():
            source.gather_rest()
            return
        try:
            _write_weights(folder, shards, types, source.piece)
        except Exception:
            source.gather_rest()  # the other ranks wait in these collectives
            raise


class _Source:
    """Whole parameters of a state_dict, gathered when sharded; the latest one is kept for its pieces."""

    def __init__(self, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._state = state
        self._latest: tuple[str, Tensor] | None = None
        lazy = isinstance(state, LazyWeights)
        self.to_gather = [] if lazy else [name for name in names if isinstance(state[name], DTensor)]

    def whole(self, name: str) -> Tensor:
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            tensor = self._state[name].detach()
            self._latest = (name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            if isinstance(tensor, DTensor):
                self.to_gather.remove(name)
        return self._latest[1]

    def gather_rest(self) -> None:
        """Take part in gathering what has not been gathered, in order."""
        for name in list(self.to_gather):
            self.whole(name)

    def piece(self, name: str, piece: Piece) -> Tensor:
        tensor = self.whole(name)
        return tensor[piece.index] if piece.index else tensor


def _is_writer() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _dtype_of(state: Mapping[str, Tensor], name: str) -> torch.dtype:
    return state.dtype_of(name) if isinstance(state, LazyWeights) else state[name].dtype


def _check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in state]
    if missing:
        raise UserError(
            f"parameter {missing[0]} is missing{and_more(missing)}; the configuration to export asks for it"
        )
    unknown = [name for name in state if name not in shapes]
    biases = [name for name in unknown if name.endswith(".expert_bias_E")]
    if biases:
        logger.warning(
            "%d expert biases of aux-loss-free balancing are not exported: Hugging Face's Qwen3 has no place for them",
            len(biases),
        )
    unknown = [name for name in unknown if name not in biases]
    if unknown:
        raise UserError(
            f"parameter {unknown[0]} is unknown{and_more(unknown)}: Hugging Face's Qwen3 has no such weight; export "
            "the backbone alone"
        )
    for name, shape in shapes.items():
        seen = state.shape_of(name) if isinstance(state, LazyWeights) else tuple(state[name].shape)
        if seen != shape:
            raise UserError(f"parameter {name}: seen shape {list(seen)}, expected {list(shape)} by the configuration")


def _shards(
    plan: list[tuple[str, Piece]], types: Mapping[str, torch.dtype], max_bytes: int
) -> list[list[tuple[str, Piece]]]:
    shards: list[list[tuple[str, Piece]]] = [[]]
    filled = 0
    for name, piece in plan:
        size = torch.Size(piece.shape).numel() * types[name].itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, piece))
        filled += size
    return shards


def _write_weights(
    folder: Path,
    shards: list[list[tuple[str, Piece]]],
    types: Mapping[str, torch.dtype],
    read: Callable[[str, Piece], Tensor],
) -> None:
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        of_key = {piece.key: (name, piece) for name, piece in shard}
        header = [(piece.key, types[name], piece.shape) for name, piece in shard]
        write_file(folder / file, header, lambda key, of_key=of_key: read(*of_key[key]))
        weight_map |= dict.fromkeys(of_key, file)
        total_bytes += sum(torch.Size(shape).numel() * kind.itemsize for _, kind, shape in header)
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_companions(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    tokenizer_dir: str | Path | None,
    generation_config: Mapping[str, Any] | None,
    model_card: str | None,
) -> None:
    special: dict[str, Any] = {}
    ids: dict[str, int] = {}
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, folder)
        ids = tokenizer_ids(folder)
        require_fit(ids, config.vocab_size, tokenizer_dir)
        special = special_token_ids(folder, ids)
        inherited = Path(tokenizer_dir) / GENERATION_FILE
        if generation_config is None and inherited.is_file():
            generation_config = read_json(inherited)
    write_json(folder / CONFIG_FILE, hf_config_dict(config, dtype, special))
    write_json(folder / GENERATION_FILE, generation_config or generation_defaults(ids, special))
    if model_card is not None:
        (folder / CARD_FILE).write_text(model_card, encoding="utf-8")
