"""The weights of a Hugging Face folder, checked whole by their headers and read one parameter at a time."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.cost import parameter_shapes
from qwen3_lit.model.hf_config import CONFIG_FILE, config_path, read_hf_config
from qwen3_lit.model.hf_layout import layout_of, pieces
from qwen3_lit.model.safetensors_file import DTYPE_NAMES, TensorEntry, read_header

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_NOT_WEIGHTS = (".rotary_emb.inv_freq",)
"""Buffers that early checkpoints carry and that follow from the configuration."""


def is_hf_folder(path: str | Path) -> bool:
    """Whether ``path`` looks like a checkpoint folder: a config.json with weights beside it."""
    path = Path(path)
    return (path / CONFIG_FILE).is_file() and any((path / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


class LazyWeights(Mapping[str, Tensor]):
    """A state_dict that reads a weight when it is asked for one."""

    @abstractmethod
    def dtype_of(self, name: str) -> torch.dtype:
        """The type of the weight, without reading it."""

    @abstractmethod
    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the weight."""


class HfWeights(LazyWeights):
    """The weights of a Hugging Face folder under this project's parameter names, read one at a time.

    A mapping that loads on access: as a ``state_dict`` for ``save_hf`` it converts a folder of any size in the memory
    of its largest parameter.
    """

    def __init__(self, path: str | Path, config: ModelConfig | None = None) -> None:
        """Check the folder whole, by its headers, without reading a weight.

        Raises:
            UserError: a file is missing or cut off, a key is missing, unexpected or of another shape.
        """
        self.folder = config_path(path).parent
        self.config = read_hf_config(path) if config is None else config
        self._files, self._entries = _weight_map(self.folder)
        self._shapes = parameter_shapes(self.config)
        self._pieces = {
            name: pieces(name, shape, layout_of(name, self._entries)) for name, shape in self._shapes.items()
        }
        self._open: tuple[Path, Any] | None = None
        self._check()

    def _check(self) -> None:
        wanted = {piece.key: piece for found in self._pieces.values() for piece in found}
        missing = [key for key in wanted if key not in self._entries]
        if missing:
            raise UserError(
                f"{self.folder}: key {missing[0]} is missing{and_more(missing)}; {CONFIG_FILE} asks for it: the folder "
                f"is incomplete, or {_likely_field(missing[0])} in {CONFIG_FILE} is wrong"
            )
        tied_head = "lm_head.weight" if self.config.tie_word_embeddings else None
        unexpected = [k for k in self._entries if k not in wanted and k != tied_head and not k.endswith(_NOT_WEIGHTS)]
        if unexpected:
            key = unexpected[0]
            raise UserError(
                f"{self._files[key]}: key {key} is unexpected{and_more(unexpected)}; {CONFIG_FILE} describes no such "
                f"weight: check {_likely_field(key)} there, or remove adapter and quantization tensors"
            )
        for key, piece in wanted.items():
            entry = self._entries[key]
            if entry.shape != piece.shape:
                raise UserError(
                    f"{self._files[key]}: key {key}: seen shape {list(entry.shape)}, expected {list(piece.shape)} by "
                    f"{CONFIG_FILE}; weights and configuration are not of the same model"
                )
            if entry.dtype not in TORCH_DTYPES:
                raise UserError(
                    f"{self._files[key]}: key {key}: seen type {entry.dtype}, expected one of "
                    f"{', '.join(TORCH_DTYPES)}; quantized checkpoints cannot be trained: take the original one"
                )
        if tied_head in self._entries and not torch.equal(self._read("lm_head.weight"), self["embed_tokens.weight"]):
            raise UserError(
                f"{self._files['lm_head.weight']}: key lm_head.weight differs from model.embed_tokens.weight, but "
                f"{CONFIG_FILE} says tie_word_embeddings true; set it to false or delete the key"
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """The type on disk; where experts are of several types, the smallest one that keeps every bit of each."""
        types = (TORCH_DTYPES[self._entries[piece.key].dtype] for piece in self._pieces[name])
        return reduce(torch.promote_types, types)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that the configuration gives the parameter, which the headers agreed with."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        found = self._pieces[name]
        if found[0].index == ():
            return self._read(found[0].key)
        whole = torch.empty(self._shapes[name], dtype=self.dtype_of(name))
        for piece in found:
            whole[piece.index] = self._read(piece.key)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _read(self, key: str) -> Tensor:
        file = self._files[key]
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(file, framework="pt", device="cpu"))
            return self._open[1].get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{file}: key {key} cannot be read: {error}; copy or download the file again") from error


def and_more(keys: list[str]) -> str:
    """ " (and 3 more)" after the first of ``keys``, empty for one."""
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _likely_field(key: str) -> str:
    if key.startswith("lm_head"):
        return "tie_word_embeddings"
    return "num_experts, mlp_only_layers or decoder_sparse_step" if ".mlp." in key else "num_hidden_layers"


def _weight_map(folder: Path) -> tuple[dict[str, Path], dict[str, TensorEntry]]:
    """File and header entry of every tensor in ``folder``."""
    index_file, single = folder / INDEX_FILE, folder / WEIGHTS_FILE
    if not index_file.is_file():
        if not single.is_file():
            others = sorted(file.name for file in folder.glob("*.bin"))
            fix = "save it with save_pretrained of a current transformers" if others else "is this a checkpoint folder?"
            raise UserError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; {fix}")
        entries = read_header(single)
        return dict.fromkeys(entries, single), entries
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): folder / str(file) for key, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index_file}: no readable weight_map ({error!r}); copy or download it again") from error
    headers = {file: read_header(file) for file in sorted(set(names.values()))}
    entries = {}
    for key, file in names.items():
        if key not in headers[file]:
            raise UserError(f"{file}: key {key} is missing, but {INDEX_FILE} says it is here; download the file again")
        entries[key] = headers[file][key]
    return names, entries
