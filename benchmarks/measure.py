"""One contender of one operation: compared with the definition, then timed.

What is wrong is not timed. A contender that is not installed, does not fit or runs out of memory is a row that says so.
"""

import time
from collections.abc import Sequence

import record
import torch
from operation import DIRECTIONS, Call, Inputs, Operation, in_float32, version_of
from timing import Ceilings, Step, Timing, time_step
from torch import Tensor

FLOAT32_TOLERANCE = 1e-3


class Wrong(Exception):
    """The contender does not compute the operation."""


class Check:
    """What the definition gives at one shape, in float32, on random inputs that no run has seen before.

    All contenders get the same inputs, made anew from the seed, so that the definition runs once. Compared is what the
    timed directions compute, as they do: outputs without a graph for the forward pass, which often is other code, and
    outputs and gradients of a training step.
    """

    def __init__(self, operation: Operation, shape_name: str, device: torch.device) -> None:
        self.operation, self.shape_name, self.device = operation, shape_name, device
        self.shape = operation.shapes[shape_name]
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        directions = operation.directions(self.shape)
        self._evaluates, self._trains = "forward" in directions, directions != ("forward",)
        self._seed = time.time_ns() % 2**31
        self._expected: dict[frozenset[str], dict[str, Tensor]] = {}

    def inputs(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(self._seed)
        return self.operation.make_inputs(self.operation.check_shape(self.shape), self.device, self.dtype, generator)

    def errors(self, call: Call, tolerance: float | None = None) -> dict[str, float]:
        """|out - truth| / |truth| by the name of an output, or of a gradient (``d name``).

        Raises:
            Wrong: one is above ``tolerance``, or the operation's where that is None.
        """
        names: set[str] = set()

        def noting_names(inputs: Inputs) -> dict[str, Tensor]:
            outputs = call(inputs)
            names.update(outputs)
            return outputs

        values: list[tuple[str, Tensor]] = []
        if self._evaluates:
            values += self._without_graph(noting_names, self.inputs()).items()
        if self._trains:
            values += self._with_gradients(noting_names, self.inputs()).items()
        if not values:
            raise Wrong("it returned nothing")
        expected = self._truth(frozenset(names))
        errors: dict[str, float] = {}
        for name, value in values:
            truth = expected[name].double()
            if value.shape != truth.shape:
                raise Wrong(f"{name} has shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
            error = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
            limit = FLOAT32_TOLERANCE
            if self.dtype == torch.bfloat16:
                limit = tolerance or self.operation.tolerances.get(name, self.operation.tolerance)
            if not error <= limit:
                raise Wrong(f"{name} is off by {error:.2e}, at most {limit:.0e} is right")
            errors[name] = max(error, errors.get(name, 0.0))
        return errors

    def _truth(self, names: frozenset[str]) -> dict[str, Tensor]:
        """Outputs of these names and what their gradients make: one that computes less has other gradients."""

        def some(inputs: Inputs) -> dict[str, Tensor]:
            return {name: value for name, value in self.operation.truth(inputs).items() if name in names}

        if names not in self._expected:
            exact = in_float32(self.inputs())
            self._expected[names] = (
                self._with_gradients(some, exact) if self._trains else self._without_graph(some, exact)
            )
        return self._expected[names]

    @torch.no_grad()
    def _without_graph(self, call: Call, inputs: Inputs) -> dict[str, Tensor]:
        """Outputs by name."""
        return dict(call(inputs))

    def _with_gradients(self, call: Call, inputs: Inputs) -> dict[str, Tensor]:
        """Outputs by name, and the gradient of each differentiable input as ``d name``."""
        leaves = require_gradients(self.operation, inputs)
        outputs = call(inputs)
        differentiable = {name: value for name, value in outputs.items() if value.requires_grad}
        gradients = torch.autograd.grad(
            list(differentiable.values()),
            leaves,
            [gradient_of(name, value) for name, value in differentiable.items()],
            allow_unused=True,
        )
        return {name: value.detach() for name, value in outputs.items()} | {
            f"d {name}": gradient
            for name, gradient in zip(self.operation.differentiable, gradients, strict=True)
            if gradient is not None
        }


def measure(
    check: Check, name: str, ceilings: Ceilings, directions: Sequence[str] = DIRECTIONS, seconds: float = 0.4
) -> list[record.Row]:
    """The rows of contender ``name`` at the shape of ``check``: one a direction, or one that says why there is none."""
    operation, shape, device = check.operation, check.shape, check.device
    contender = operation.contenders[name]

    def row(**values: object) -> record.Row:
        return record.new_row(device, op=operation.name, implementation=name, shape=check.shape_name, **values)

    reason = contender.only_shapes(shape)
    if reason:
        return [row(status=f"skipped: {reason}")]
    rows = []
    try:
        call = contender.build()
        opponent = version_of(contender)
        errors = check.errors(call, contender.tolerance)
        for direction in (d for d in operation.directions(shape) if d in directions):
            timing = time_direction(check, call, direction, seconds)
            work = operation.work(shape, direction)
            floor_ms = max(work.flops / ceilings.matmul_tflops / 1e9, work.bytes / ceilings.copy_gbps / 1e6)
            extra = timing.extra_bytes
            rows.append(
                row(
                    opponent=opponent,
                    direction=direction,
                    median_ms=timing.median,
                    p20_ms=timing.p20,
                    p80_ms=timing.p80,
                    flops=work.flops,
                    bytes=work.bytes,
                    tflops=work.flops / timing.median / 1e9,
                    gbps=work.bytes / timing.median / 1e6,
                    copy_ceiling_gbps=ceilings.copy_gbps,
                    matmul_ceiling_tflops=ceilings.matmul_tflops,
                    share_of_ceiling=floor_ms / timing.median,
                    peak_extra_mb=None if extra is None else extra / 2**20,
                    error=largest_error(errors, direction),
                )
            )
    except Exception as problem:  # a contender that cannot run is a result
        rows.append(row(status=status_of(problem)))
    release(device)
    return rows


def verdict(check: Check, name: str) -> str:
    """``ok`` and the largest error of contender ``name``, or why there is none."""
    contender = check.operation.contenders[name]
    reason = contender.only_shapes(check.shape)
    if reason:
        return f"skipped: {reason}"
    try:
        errors = check.errors(contender.build(), contender.tolerance)
        found = f"ok, error {largest_error(errors, 'both'):.1e} of {', '.join(errors)}"
    except Exception as problem:  # as in ``measure``
        found = status_of(problem)
    release(check.device)
    return found


def largest_error(errors: dict[str, float], direction: str) -> float:
    """Of what a direction computes: outputs forward, gradients backward, all of them in both."""
    gradient = {"forward": (False,), "backward": (True,), "both": (False, True)}[direction]
    return max(error for name, error in errors.items() if name.startswith("d ") in gradient)


def release(device: torch.device) -> None:
    """Give back what a contender compiled and allocated."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def status_of(problem: Exception) -> str:
    """One line that says why there is no time."""
    text = " ".join(str(problem).split())[:300]
    if isinstance(problem, ImportError):
        return f"skipped: {text}"
    if isinstance(problem, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    if isinstance(problem, Wrong):
        return f"wrong: {text}"
    if isinstance(problem, ValueError) and "was asked for, but" in text:  # dispatch: does not fit here
        return f"skipped: {text}"
    return f"failed: {type(problem).__name__}: {text}"


def require_gradients(operation: Operation, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in operation.differentiable]


def gradient_of(name: str, output: Tensor) -> Tensor:
    """A random gradient of an output, the same for every contender and type; 1 for a scalar."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(sum(map(ord, name)))
    random = torch.randn(output.shape, generator=generator, device=output.device)
    return random.to(torch.bfloat16).to(output.dtype)


def time_direction(check: Check, call: Call, direction: str, seconds: float) -> Timing:
    """Of one direction, on inputs of the timed shape, the same for every contender."""
    generator = torch.Generator(check.device).manual_seed(0)
    inputs = check.operation.make_inputs(check.shape, check.device, check.dtype, generator)
    return time_step(step_of(check.operation, call, inputs, direction), check.device, seconds=seconds)


def step_of(operation: Operation, call: Call, inputs: Inputs, direction: str) -> Step:
    """What one direction does: forward as in evaluation, backward alone, or both as in training."""
    if direction == "forward":
        return Step(torch.no_grad()(lambda _: call(inputs)))
    leaves = require_gradients(operation, inputs)

    def forward() -> dict[str, Tensor]:
        return {name: value for name, value in call(inputs).items() if value.requires_grad}

    gradients = [gradient_of(name, value) for name, value in forward().items()]

    def backward(outputs: dict[str, Tensor]) -> object:
        return torch.autograd.grad(list(outputs.values()), leaves, gradients, allow_unused=True)

    if direction == "backward":
        return Step(backward, prepare=forward)
    return Step(lambda _: backward(forward()))
