"""Which implementation of an operation runs, and one log line that says why.

Every operation registers its implementations in order of preference, each with a reason function that returns None
where the implementation fits the given tensor and else says in words why it does not. ``prefer`` forces one by name
(tests and benchmarks); forcing one that does not fit is an error, never a silent change. ``autocast`` is how operations
follow ``torch.autocast``.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None

Unfit = Callable[..., str | None]


class Implementation(NamedTuple):
    """One way to compute an operation."""

    function: Callable[..., Any]
    unfit: Unfit
    """Called with the tensor, and by name the facts that the operation gives ``choose``: why it can't take this call,
    or None."""


_registry: dict[str, dict[str, Implementation]] = {}
_forced: dict[str, str] = {}


def fits_anything(tensor: Tensor, **facts: object) -> None:
    """The reason function of an implementation that takes every call."""
    return None


_interpreting = False


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Let Triton kernels take CPU tensors inside the block, through Triton's interpreter.

    Raises RuntimeError unless TRITON_INTERPRET=1 was set before the kernels were imported.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("interpreted(): TRITON_INTERPRET is not 1; set it before qwen3_kernels is imported")
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False


def needs_triton(tensor: Tensor, **facts: object) -> str | None:
    """The reason function of a Triton kernel: a GPU from Ampere on, or the interpreter by ``interpreted``."""
    if not HAS_TRITON:
        return "the triton package is not installed"
    if _interpreting:
        return None
    if not tensor.is_cuda:
        return f"the tensor is on {tensor.device.type}"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "compute capability 8.0 is the oldest supported"
    return None


def needs_float_triton(tensor: Tensor, **facts: object) -> str | None:
    """``needs_triton`` of a kernel that takes no other types than bfloat16, float16 and float32."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the tensor is {tensor.dtype}, not bfloat16, float16 or float32"
    return needs_triton(tensor)


def register(op: str, name: str, function: Callable[..., Any], unfit: Unfit = fits_anything) -> None:
    """Add an implementation; earlier ones are preferred."""
    _registry.setdefault(op, {})[name] = Implementation(function, unfit)


def implementations(op: str) -> list[str]:
    """Names of the implementations of ``op``, in order of preference."""
    return list(_registry[op])


@contextlib.contextmanager
def prefer(op: str, name: str) -> Iterator[None]:
    """Force implementation ``name`` of ``op`` inside the block; raises ValueError for an unknown name."""
    if name not in _registry.get(op, {}):
        raise ValueError(f"{op}: no implementation {name!r}, expected one of {implementations(op)}")
    before = _forced.get(op)
    _forced[op] = name
    try:
        yield
    finally:
        if before is None:
            _forced.pop(op)
        else:
            _forced[op] = before


def choose(op: str, tensor: Tensor, name: str = "auto", **facts: object) -> Callable[..., Any]:
    """The function that computes ``op`` on ``tensor``'s device; raises ValueError where a named one does not fit.

    ``facts`` reach the reason functions, for what the tensor alone does not tell. Where another GPU is current, the
    function makes the tensor's current while it runs.
    """
    wanted = _forced.get(op, name)
    candidates = _registry[op]
    if wanted != "auto":
        if wanted not in candidates:
            raise ValueError(f"{op}: no implementation {wanted!r}, expected one of {implementations(op)}")
        reason = candidates[wanted].unfit(tensor, **facts)
        if reason is not None:
            raise ValueError(f"{op}: implementation {wanted!r} was asked for, but {reason}")
        return _on_device_of(tensor, candidates[wanted].function)
    skipped: list[str] = []
    for candidate, implementation in candidates.items():
        reason = implementation.unfit(tensor, **facts)
        if reason is None:
            if not torch.compiler.is_compiling():  # a log call would break the graph
                _say_once(op, candidate, tensor.device.type, "; ".join(skipped))
            return _on_device_of(tensor, implementation.function)
        skipped.append(f"not {candidate}: {reason}")
    raise ValueError(f"{op}: no implementation fits: {'; '.join(skipped)}")


def _on_device_of(tensor: Tensor, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with the GPU of ``tensor`` current while it runs: Triton launches on the current one.

    Backward passes need no such care, since autograd gives every GPU a thread on which it is current, and compiled code
    does by itself what this does. Without an initialized CUDA a tensor on a GPU is a fake one.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda or not torch.cuda.is_initialized():
        return function
    if tensor.device.index == torch.cuda.current_device():
        return function

    @functools.wraps(function)
    def on_its_device(*arguments: Any) -> Any:
        with torch.cuda.device(tensor.device):
            return function(*arguments)

    return on_its_device


def autocast(tensor: Tensor) -> Tensor:
    """``tensor`` in the type that ``torch.autocast`` gives to matrix products, where it is on for the tensor's device.

    The gradient comes back in the tensor's own type. float64 stays, as it does everywhere under autocast.
    """
    device = tensor.device.type
    if tensor.is_meta or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


@functools.cache
def _say_once(op: str, name: str, device: str, skipped: str) -> None:
    log.info("%s runs as %r on %s%s", op, name, device, f" ({skipped})" if skipped else "")
