"""What a benchmark of one operation is made of; ``benchmarks/ops/<operation>.py`` fills it in.

A contender is one way to compute the operation: ours under every name that ``dispatch`` knows, and the alternatives of
the field. It takes the inputs by name and returns the outputs by name, so that one that computes less (no entropy, say)
can be compared in what it has.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from qwen3_kernels import dispatch
from torch import Tensor

Shape = Mapping[str, int]
Inputs = dict[str, Any]
Call = Callable[[Inputs], dict[str, Tensor]]
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Work:
    """What has to be done at least: every input read once, every output written once, no product done twice."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Contender:
    """One implementation."""

    build: Callable[[], Call]
    """Imports and compiles; ImportError where its package is missing."""
    package: str | None = None
    """Distribution whose version belongs into the row."""
    only_shapes: Callable[[Shape], str | None] = lambda shape: None
    """Why it can't take a shape, or None."""
    on_request: bool = False
    """Runs only where it is named: it takes long, and no reader waits for its figure."""
    tolerance: float | None = None
    """Where it is documented to be less exact than ``Operation.tolerance`` asks."""
    ours: bool = False
    """Part of this repository, so that a wrong result fails the run."""


@dataclass(frozen=True)
class Operation:
    """One operation with its inputs, its truth and its contenders."""

    name: str
    shapes: Mapping[str, Shape]
    """By name. Those that begin with ``tiny`` (for a CPU) or ``check`` run only where they are named. ``check`` shapes
    are small enough for ``memcheck.sh`` and lie in the launch buckets that ``tiny`` does not reach."""
    make_inputs: Callable[[Shape, torch.device, torch.dtype, torch.Generator], Inputs]
    """Fresh random inputs; floating-point activations and weights in the given type."""
    truth: Call
    """The definition, to be called with float32 inputs."""
    contenders: Mapping[str, Contender]
    work: Callable[[Shape, str], Work]
    """Of a direction."""
    differentiable: tuple[str, ...] = ()
    """Inputs that get a gradient."""
    directions: Callable[[Shape], tuple[str, ...]] = lambda shape: DIRECTIONS
    """Which of them are timed at a shape."""
    slow_shapes: tuple[str, ...] = ()
    """More shapes that run only where they are named."""
    check_shape: Callable[[Shape], Shape] = lambda shape: shape
    """The shape at which a contender is compared with the truth: the timed one, unless float32 would not fit there."""
    tolerance: float = 2e-2
    """Largest ``|out - truth| / |truth|`` of any output or gradient in bfloat16; float32 must reach 1e-3."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Other ones, by the name of an output or of a gradient (``d name``)."""

    def runs_unasked(self, shape_name: str) -> bool:
        """Whether a run that names no shapes takes this one."""
        return not shape_name.startswith(("tiny", "check")) and shape_name not in self.slow_shapes


def every_implementation(op: str, call: Call, on_request: tuple[str, ...] = ()) -> dict[str, Contender]:
    """The implementations that ``dispatch`` knows of ``op``, each forced by its name; ``call`` calls the public op."""

    def forced(name: str) -> Contender:
        def run(inputs: Inputs) -> dict[str, Tensor]:
            with dispatch.prefer(op, name):
                return call(inputs)

        return Contender(lambda: run, ours=True, on_request=name in on_request)

    return {name: forced(name) for name in dispatch.implementations(op)}


def compiled(call: Call) -> Contender:
    """``call`` through ``torch.compile``, anew for every shape: code for any shape is slower."""
    return Contender(lambda: torch.compile(call, dynamic=False))


def version_of(contender: Contender) -> str:
    """``package version``, or nothing for what comes with torch and with this repository."""
    if contender.package is None:
        return ""
    return f"{contender.package} {importlib.metadata.version(contender.package)}"


def in_float32(inputs: Inputs) -> Inputs:
    """Detached copies of the tensors, floating-point ones in float32."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().float() if value.is_floating_point() else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(copy, value))
        return value

    return {name: copy(value) for name, value in inputs.items()}


def operations() -> dict[str, Operation]:
    """Every operation of ``benchmarks/ops``, by name."""
    package = importlib.import_module("ops")
    modules = [importlib.import_module(f"ops.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    return {module.OPERATION.name: module.OPERATION for module in modules}


QWEN3_30B_A3B = {"D": 2048, "E": 128, "K": 8, "F": 768, "H": 32, "G": 4, "C": 128, "V": 151936}
"""Widths of Qwen3-30B-A3B (Technical Report, arXiv 2505.09388, table 2)."""


def qwen3_30b_a3b(**sizes: int) -> dict[str, int]:
    """Those widths, and what a shape adds to them."""
    return {**QWEN3_30B_A3B, **sizes}


def at_most(**limits: int) -> Callable[[Shape], Shape]:
    """A ``check_shape`` that caps some sizes."""
    return lambda shape: {name: min(size, limits.get(name, size)) for name, size in shape.items()}
