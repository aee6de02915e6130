"""Weights and configuration out of a training checkpoint: a Lightning ``.ckpt`` file or a distributed folder.

For exports. Nothing in a checkpoint is executed: its pickles are read by an exact list of names (``_ALLOWED``), and
every other name is replaced by an inert stand-in, so a file from elsewhere, or one that holds classes since renamed,
opens as well.
"""

import logging
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as checkpoint_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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
        storage = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
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
    return TrainingCheckpoint(weights, config, tokenizer if isinstance(tokenizer, str) else None)


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
            except (yaml.YAMLError, UnicodeDecodeError) as error:
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
            self._reader = _InertReader(folder)
            self._entries = {
                name: (torch.Size(entry.size), entry.properties.dtype)
                for name, entry in self._reader.metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            odd = [name for name, (_, dtype) in self._entries.items() if not isinstance(dtype, torch.dtype)]
            if odd or not all(isinstance(name, str) for name in self._entries):
                raise ValueError("entries without a name or a type")
        except Exception as error:  # a damaged pickle raises nearly every type
            raise UserError(
                f"{folder}: .metadata of the distributed checkpoint is damaged ({_reason(error)}); take another one"
            ) from error

    def dtype_of(self, name: str) -> torch.dtype:
        return self._entries[name][1]

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name][0])

    def __getitem__(self, name: str) -> Tensor:
        try:
            whole = {name: torch.empty(self.shape_of(name), dtype=self.dtype_of(name))}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
                dcp.load(whole, storage_reader=self._reader, no_dist=True)
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
            raise UserError(
                f"{self._folder}: {name} cannot be read ({_reason(error)}); take another checkpoint"
            ) from error
        return whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _InertReader(dcp.FileSystemReader):
    """torch's reader unpickles .metadata with whatever that names; the shards it reads with ``weights_only``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self.metadata: Metadata = _InertUnpickler(file).load()
        if not isinstance(self.metadata, Metadata):
            raise ValueError(f"seen {type(self.metadata).__name__}, expected Metadata")
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What ``dcp.load`` asks for, once a tensor: unpickled once only."""
        return self.metadata


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


_OBJECTS = (
    set,
    frozenset,
    slice,
    OrderedDict,
    torch.Size,
    torch.device,
    torch.UntypedStorage,
    torch._utils._rebuild_tensor,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_tensor_v3,
    torch._utils._rebuild_parameter,
    torch._utils._rebuild_parameter_with_state,
    # .metadata of a distributed checkpoint
    Metadata,
    TensorStorageMetadata,
    checkpoint_metadata.TensorProperties,
    checkpoint_metadata.ChunkStorageMetadata,
    checkpoint_metadata.MetadataIndex,
    checkpoint_metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {(found.__module__, found.__name__): found for found in _OBJECTS}
_ALLOWED |= {("torch", name): found for name, found in vars(torch).items() if isinstance(found, torch.dtype)}
"""What a pickle may name: none of it reads or writes a file, imports, or calls what it is given.

Whole names only. Protocol 4 resolves dots: ``_rebuild_tensor.__builtins__.get`` of an allowed module leads to eval.
"""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _ALLOWED.get((module, name)) or type(name, (_Inert,), {})


def _load_inert(file: Path) -> dict[str, Any]:
    stand_in = SimpleNamespace(Unpickler=_InertUnpickler, __name__="inert_pickle")
    try:
        # torch.load hands such an archive to torch.jit.load, which runs the TorchScript code inside.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(file)).get_all_records():
            raise ValueError("a TorchScript archive")
        content = torch.load(file, map_location="cpu", pickle_module=stand_in, weights_only=False, mmap=True)
    except Exception as error:  # a damaged pickle raises nearly every type
        raise UserError(f"{file}: truncated or not a checkpoint ({_reason(error)}); take another one") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: seen {type(content).__name__}, expected a checkpoint of a Lightning run")
    return content


def _reason(error: BaseException) -> str:
    """One line: the last one of torch's CheckpointException, which quotes a traceback; else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, dcp.api.CheckpointException) else 0]
