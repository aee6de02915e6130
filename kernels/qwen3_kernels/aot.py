"""Compile kernels for a GPU that is not there, and read registers, spills and shared memory of the result.

``python -m qwen3_kernels.aot [--generation 90] [--match TEXT] [--jobs 4] [--json FILE]`` compiles every case that the
operations ship (``AOT_CASES`` of each module) and prints a table; exit code 1 where a case does not compile, spills
more than was recorded, or wants more shared memory than the GPU has. ``--module NAME`` takes the cases of another
module instead, for kernels that are still being written. Every case compiles in a process of its own, because the
compiler ends a bad one by aborting.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import qwen3_kernels
from qwen3_kernels.launch import AotCase

SHARED_MEMORY_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block may use (CUDA programming guide, table of compute capabilities), the least of the GPUs that take a
generation's launches: 8.6, 8.9 and 12.x have 99 KB, where 8.0 has 163."""
ARCH = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
LONGEST_COMPILATION = 300.0
"""Seconds after which a case counts as not compiling; the slowest that ships took 80 on a loaded machine."""


class Resources(NamedTuple):
    """What one compiled kernel takes."""

    name: str
    generation: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    wgmma: int = 0
    seconds: float = 0.0
    error: str = ""


def shipped_cases() -> list[AotCase]:
    """The cases of every operation in the package; raises ValueError where two have one name."""
    cases: list[AotCase] = []
    for info in pkgutil.iter_modules(qwen3_kernels.__path__):
        if info.name != "aot":
            cases += getattr(importlib.import_module(f"qwen3_kernels.{info.name}"), "AOT_CASES", [])
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"AOT_CASES: {', '.join(twice)}: more than one case of that name, expected unique ones")
    return cases


def compile_case(case: AotCase, generation: int) -> Resources:
    """Compile ``case``; a failure comes back as ``error``, never as an exception."""
    start = time.perf_counter()
    try:
        resources = _compile(case, generation)
    except Exception as error:
        resources = Resources(case.name, generation, error=f"{type(error).__name__}: {str(error)[-600:]}")
    return resources._replace(seconds=round(time.perf_counter() - start, 2))


def _compile(case: AotCase, generation: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs: dict[str, Any] = {**case.constexprs, **case.launch.blocks}
    unknown = sorted({*constexprs, *case.signature} - set(case.kernel.arg_names))
    missing = [name for name in case.kernel.arg_names if name not in constexprs and name not in case.signature]
    if unknown or missing:
        raise ValueError(f"the case's arguments are not the kernel's: missing {missing}, unknown {unknown}")
    signature, attrs = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, aligned = case.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or aligned:
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    target = GPUTarget("cuda", generation, 32)
    compiled = triton.compile(source, target=target, options=case.launch.compiler_options())
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, generation)
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    return Resources(case.name, generation, registers, spills, compiled.metadata.shared, wgmma)


def _assemble(ptx: str, generation: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, by the assembler of the triton package."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = folder / "ptxas-blackwell"
    ptxas = blackwell if generation >= 100 and blackwell.exists() else folder / "ptxas"
    if not os.access(ptxas, os.X_OK):
        ptxas.chmod(ptxas.stat().st_mode | stat.S_IXUSR)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        target = re.search(r"\.target\s+(sm_\w+)", ptx)
        arch = target.group(1) if target else ARCH[generation]
        command = [str(ptxas), "-v", f"--gpu-name={arch}", str(source), "-o", str(Path(scratch) / "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ptxas: {result.stderr}")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)]
    return max(registers, default=0), sum(spills)


def _compile_into(pipe: Connection, case: AotCase, generation: int) -> None:
    pipe.send(compile_case(case, generation))


def compile_all(tasks: list[tuple[AotCase, int]], jobs: int) -> Iterator[tuple[AotCase, Resources]]:
    """Compile every (case, generation), ``jobs`` at a time, each in a forked process; yields in order of completion."""
    # Here once instead of in every process: 0.9 s for imports and for a hash over all of Triton.
    import triton.backends.nvidia.compiler
    import triton.compiler
    import triton.runtime.cache

    triton.runtime.cache.triton_key()
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(tasks))
    running: dict[Any, tuple[BaseProcess, AotCase, int]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case, generation = waiting.pop()
            receiver, sender = fork.Pipe(duplex=False)
            started = fork.Process(target=_compile_into, args=(sender, case, generation))
            started.start()
            sender.close()
            running[receiver] = (started, case, generation)
        finished: list[Any] = wait(list(running), LONGEST_COMPILATION) or list(running)
        for pipe in finished:
            process, case, generation = running.pop(pipe)
            try:
                if not pipe.poll():
                    process.kill()
                resources = pipe.recv()
            except EOFError:
                process.join()
                how = f"the compiler died (exit code {process.exitcode}) or took over {LONGEST_COMPILATION:.0f} s"
                resources = Resources(case.name, generation, error=how)
            process.join()
            pipe.close()
            yield case, resources


def complaint(case: AotCase, resources: Resources) -> str:
    """What is wrong with ``resources``, or an empty string."""
    if resources.error:
        return resources.error
    limit = SHARED_MEMORY_LIMIT[resources.generation]
    if resources.shared_bytes > limit:
        return f"{resources.shared_bytes} bytes of shared memory, at most {limit} fit"
    if resources.generation == 90 and resources.spill_bytes > case.max_spill_bytes:
        return f"{resources.spill_bytes} bytes spilled, {case.max_spill_bytes} recorded"
    if resources.generation == 90 and case.wgmma and not resources.wgmma:
        return "no wgmma instruction"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, judge."""
    parser = argparse.ArgumentParser(description="compile every shipped kernel without a GPU")
    parser.add_argument("--generation", type=int, action="append", choices=sorted(ARCH))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--module", action="append", help="take AOT_CASES of this module instead of the package's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which makes kernels of the interpreter; unset it")
    if options.module:
        cases = [case for name in options.module for case in importlib.import_module(name).AOT_CASES]
    else:
        cases = shipped_cases()
    tasks = [
        (case, generation)
        for case in cases
        for generation in case.generations
        if options.match in case.name and generation in (options.generation or case.generations)
    ]
    if not tasks:
        parser.error(f"no case matches {options.match!r} on generation {options.generation or 'any'}")
    rows, failed = [], 0
    for case, resources in compile_all(tasks, options.jobs):
        said = complaint(case, resources)
        failed += bool(said)
        rows.append({**resources._asdict(), "complaint": said})
        print(
            f"{case.name:<56} sm_{resources.generation:<4} {resources.registers:>4} regs "
            f"{resources.spill_bytes:>6} spilled {resources.shared_bytes / 1024:>6.1f} KB "
            f"{resources.wgmma:>4} wgmma {resources.seconds:>6.1f} s  {said}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows))
    print(f"{len(rows)} compiled, {failed} failed, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
