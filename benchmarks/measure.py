"""One contender of one operation: compared with the definition, then timed.

What is wrong is not timed. A contender that is not installed, does not fit or runs out of memory is a row that says so.
"""

import time
from collections.abc import Sequence

import record
import torch
from operation import DIRECTIONS, Call, Inputs, Operation, Shape, in_float32, version_of
from timing import CACHE_BYTES, MOST_SETS, Ceilings, Step, Timing, peak_extra_bytes, time_steps
from torch import Tensor

FLOAT32_TOLERANCE = 1e-3


class Wrong(Exception):
    """The contender does not compute the operation."""


def measure(
    operation: Operation,
    shape_name: str,
    name: str,
    ceilings: Ceilings,
    device: torch.device,
    directions: Sequence[str] = DIRECTIONS,
    seconds: float = 0.4,
) -> list[record.Row]:
    """The rows of contender ``name`` at one shape: one a direction, or one that says why there is none."""
    shape, contender = operation.shapes[shape_name], operation.contenders[name]

    def row(**values: object) -> record.Row:
        return record.new_row(device, op=operation.name, implementation=name, shape=shape_name, **values)

    reason = contender.only_shapes(shape)
    if reason:
        return [row(status=f"skipped: {reason}")]
    rows = []
    try:
        call = contender.build()
        opponent = version_of(contender)
        error = check(operation, call, shape, device, contender.tolerance)
        for direction in (d for d in operation.directions(shape) if d in directions):
            timing, extra = time_direction(operation, call, shape, direction, device, seconds)
            work = operation.work(shape, direction)
            floor_ms = max(work.flops / ceilings.matmul_tflops / 1e9, work.bytes / ceilings.copy_gbps / 1e6)
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
                    error=error,
                )
            )
    except Exception as problem:  # a contender that cannot run is a result
        rows.append(row(status=status_of(problem)))
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


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


def check(
    operation: Operation, call: Call, shape: Shape, device: torch.device, tolerance: float | None = None
) -> float:
    """Largest relative error of any output or gradient; raises ``Wrong`` above the tolerance."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(time.time_ns() % 2**31)
    inputs = operation.make_inputs(operation.check_shape(shape), device, dtype, generator)
    exact = in_float32(inputs)
    seen = values_and_gradients(operation, call, inputs)
    if not seen:
        raise Wrong("it returned nothing")
    expected = values_and_gradients(
        operation, lambda x: {n: v for n, v in operation.truth(x).items() if n in seen}, exact
    )
    errors = {}
    for name, value in seen.items():
        truth = expected[name].double()
        if value.shape != truth.shape:
            raise Wrong(f"{name} has shape {tuple(value.shape)}, expected {tuple(truth.shape)}")
        errors[name] = ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    limit = (tolerance or operation.tolerance) if dtype == torch.bfloat16 else FLOAT32_TOLERANCE
    if not errors[worst] <= limit:
        raise Wrong(f"{worst} is off by {errors[worst]:.2e}, at most {limit:.0e} is right")
    return errors[worst]


def values_and_gradients(operation: Operation, call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs by name, and the gradient of each differentiable input as ``d name``."""
    if not operation.differentiable:
        with torch.no_grad():
            return dict(call(inputs))
    leaves = require_gradients(operation, inputs)
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
        for name, gradient in zip(operation.differentiable, gradients, strict=True)
        if gradient is not None
    }


def require_gradients(operation: Operation, inputs: Inputs) -> list[Tensor]:
    return [inputs[name].requires_grad_() for name in operation.differentiable]


def gradient_of(name: str, output: Tensor) -> Tensor:
    """A random gradient of an output, the same for every contender and type; 1 for a scalar."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(sum(map(ord, name)))
    random = torch.randn(output.shape, generator=generator, device=output.device)
    return random.to(torch.bfloat16).to(output.dtype)


def time_direction(
    operation: Operation,
    call: Call,
    shape: Shape,
    direction: str,
    device: torch.device,
    seconds: float,
) -> tuple[Timing, int | None]:
    """Timing and peak extra bytes of one direction, over as many sets of inputs as leave the cache cold."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def one_set() -> Inputs:
        return operation.make_inputs(shape, device, dtype, generator)

    sets = [one_set()]
    size = sum(value.nbytes for value in sets[0].values() if isinstance(value, Tensor))
    if device.type == "cuda":
        sets += [one_set() for _ in range(min(-(-CACHE_BYTES // size), MOST_SETS) - 1)]
    steps = [step_of(operation, call, inputs, direction) for inputs in sets]
    steps[0].run(steps[0].prepare())  # what it compiles or keeps for good is not its memory
    extra = peak_extra_bytes(steps[0], device)
    return time_steps(steps, device, seconds=seconds), extra


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
