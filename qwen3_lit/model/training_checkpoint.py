"""Weights and configuration out of a training checkpoint: a Lightning ``.ckpt`` file or a distributed folder.

For exports. Nothing in a checkpoint is executed: its pickles are read with every class but torch's own replaced by an
inert stand-in, so a file from elsewhere, or one that holds classes since renamed, opens as well.
"""

import logging
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_config import model_config_from, read_hf_config
from qwen3_lit.model.hf_weights import LazyWeights

logger = logging.getLogger(__name__)

ANCHOR = "embed_tokens.weight"
"""The parameter by which a model is found among other weights."""
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What an export needs of a checkpoint."""

    weights: Mapping[str, Tensor]
    """By parameter name of ``Qwen3``; read on access from a distributed folder."""
    config: ModelConfig
    """The configuration that the run trained."""
    tokenizer: str | None
    """Tokenizer folder that the run used, where it is known."""


def is_training_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a Lightning file or a distributed checkpoint folder."""
    return (path.is_file() and path.suffix == ".ckpt") or (path.is_dir() and (path / ".metadata").is_file())


def read_training_checkpoint(path: str | Path, config: ModelConfig | None = None) -> TrainingCheckpoint:
    """Open a checkpoint.

    The configuration comes from ``config``, else from the checkpoint itself, else from config.yaml or hf/config.json
    of the run folder around it.

    Raises:
        UserError: the checkpoint is damaged, holds no single Qwen3 model, or its configuration is not to be found.
    """
    path = Path(path)
    if path.is_dir():
        storage: Mapping[str, Tensor] = _DistributedTensors(path)
        meta = path / "meta.pt"
        rest = _load_inert(meta) if meta.is_file() else {}
    else:
        rest = _load_inert(path)
        found = rest.get("state_dict")
        if not isinstance(found, Mapping):
            raise UserError(f"{path}: no state_dict inside, expected a checkpoint of a Lightning run")
        storage = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    prefix, names = _backbone(storage, path)
    weights: Mapping[str, Tensor] = _Renamed(storage, names) if isinstance(storage, LazyWeights) else {
        name: storage[stored] for name, stored in names.items()
    }  # fmt: skip
    recipe = _recipe(path)
    tokenizer = _dig(rest, "datamodule_hyper_parameters", "tokenizer_path") or _dig(
        recipe, "data", "init_args", "tokenizer_path"
    )
    config = config or _find_config(rest, recipe, path)
    left_out = [name for name in storage if name not in names.values() and not name.startswith("optimizer_")]
    if left_out:
        logger.warning("%s: %d tensors outside %r are left out, such as %s", path, len(left_out), prefix, left_out[0])
    return TrainingCheckpoint(weights, config, tokenizer)


def _backbone(storage: Mapping[str, Tensor], path: Path) -> tuple[str, dict[str, str]]:
    """The prefix of the trained model, and parameter name -> stored name."""
    clean = {_unwrapped(name): name for name in storage if not name.startswith("optimizer_")}
    prefixes = [name.removesuffix(ANCHOR) for name in clean if name.endswith(ANCHOR)]
    trained = [prefix for prefix in prefixes if prefix in ("", "model.", "state_dict.", "state_dict.model.")]
    if len(trained) != 1 and len(prefixes) != 1:
        seen = f"{len(prefixes)} models ({', '.join(prefixes)})" if prefixes else f"no {ANCHOR}"
        raise UserError(f"{path}: seen {seen}, expected the weights of one Qwen3 model under 'model.'")
    prefix = (trained if len(trained) == 1 else prefixes)[0]
    return prefix, {name.removeprefix(prefix): stored for name, stored in clean.items() if name.startswith(prefix)}


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _recipe(path: Path) -> dict[str, Any]:
    """config.yaml of the run folder that a checkpoint lies in, empty when there is none."""
    import yaml

    for folder in (path.parent.parent, path.parent):
        file = folder / "config.yaml"
        if file.is_file():
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise UserError(f"{file}: not valid YAML ({error}); name the configuration by --config") from error
            return content if isinstance(content, dict) else {}
    return {}


def _find_config(rest: Mapping[str, Any], recipe: Mapping[str, Any], path: Path) -> ModelConfig:
    places = (
        (_dig(rest, "phase", "config"), path),
        (_dig(rest, "hyper_parameters", "config"), path),
        (_dig(recipe, "model", "init_args", "config"), "config.yaml of the run folder"),
        (_dig(recipe, "model", "config"), "config.yaml of the run folder"),
    )
    for values, where in places:
        if isinstance(values, Mapping):
            return model_config_from(values, str(where))
    for folder in (path.parent.parent / "hf", path.parent / "hf"):
        if (folder / "config.json").is_file():
            logger.info("%s: the model's configuration is taken from %s", path, folder)
            return read_hf_config(folder)
    raise UserError(
        f"{path}: the model's configuration is neither inside nor in config.yaml of the run folder; name a Hugging "
        "Face folder of the same model by --config"
    )


def _dig(content: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


class _Renamed(LazyWeights):
    def __init__(self, storage: LazyWeights, names: dict[str, str]) -> None:
        self._storage, self._names = storage, names

    def __getitem__(self, name: str) -> Tensor:
        return self._storage[self._names[name]]

    def dtype_of(self, name: str) -> torch.dtype:
        return self._storage.dtype_of(self._names[name])

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._storage.shape_of(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _DistributedTensors(LazyWeights):
    """The tensors of a torch.distributed.checkpoint folder, put together from their shards in one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}: the distributed checkpoint is damaged ({error}); take another one") from error
        self._entries = {name: e for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def dtype_of(self, name: str) -> torch.dtype:
        return self._entries[name].properties.dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].size)

    def __getitem__(self, name: str) -> Tensor:
        whole = {name: torch.empty(self.shape_of(name), dtype=self.dtype_of(name))}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
                dcp.load(whole, storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)
        except (OSError, EOFError, RuntimeError, dcp.api.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{self._folder}: {name} cannot be read ({reason}); take another checkpoint") from error
        return whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Inert(dict[Any, Any]):
    """Stands for an object of any class: keeps its attributes and items as dict items, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)

    def append(self, item: Any) -> None:
        """What unpickling calls on list-like objects."""

    def extend(self, items: Any) -> None:
        """What unpickling calls on list-like objects."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return _Inert()

    __hash__ = object.__hash__  # type: ignore[assignment]


_HARMLESS: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
}
_TORCH_MODULES = ("torch", "torch._utils", "torch.storage", "torch.nn.parameter")


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        rebuilds = name.startswith("_rebuild_") or name.endswith("Storage") or name in ("Size", "device", "_set_dtype")
        if module in _TORCH_MODULES and (rebuilds or isinstance(getattr(torch, name, None), torch.dtype)):
            found: Callable[..., Any] = super().find_class(module, name)
            return found
        return type(name, (_Inert,), {})


def _load_inert(file: Path) -> dict[str, Any]:
    stand_in = SimpleNamespace(Unpickler=_InertUnpickler, load=pickle.load, __name__="inert_pickle")
    try:
        content = torch.load(file, map_location="cpu", pickle_module=stand_in, weights_only=False, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file}: truncated or not a checkpoint ({reason}); take another one") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: seen {type(content).__name__}, expected a checkpoint of a Lightning run")
    return content
