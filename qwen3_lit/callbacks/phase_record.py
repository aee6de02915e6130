"""What a phase leaves behind for the report: the facts of the run beside its figures, as plain JSON."""

import functools
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch

from qwen3_lit.data.atomic_files import write_text
from qwen3_lit.losses.reduction import gather_over_ranks
from qwen3_lit.model.cost import active_parameter_count, parameter_count
from qwen3_lit.modules.phase_module import PhaseModule

PHASE_FILE = "phase.json"
PACKAGES = ("qwen3_lit", "torch", "lightning", "litdata", "transformers", "triton", "flash-attn-4", "flash-attn")


@functools.cache
def git_commit() -> str | None:
    """Commit of the source tree that this code runs from, with ``-dirty`` when files differ; None outside of git."""
    folder = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Python and the packages whose version decides what a run does; those not installed are absent."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_trial(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries out the code (fast_dev_run), so that nothing may be left behind."""
    return bool(getattr(trainer, "fast_dev_run", False))


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if sys.platform.startswith("linux") and cpu_info.exists():
        for line in cpu_info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def work_done(module: PhaseModule) -> dict[str, int | float]:
    """Tokens of all ranks together, and the rollout seconds of the slowest; every rank has to call it."""
    ranks = gather_over_ranks(module.counters)
    return {
        "tokens": sum(counters.tokens for counters in ranks),
        "rollout_tokens": sum(counters.rollout_tokens for counters in ranks),
        "rollout_seconds": round(max(counters.rollout_seconds for counters in ranks), 2),
    }


def run_facts(trainer: L.Trainer, module: PhaseModule) -> dict[str, Any]:
    """Module, data, model size, trainer and environment of a run."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    device = trainer.strategy.root_device
    return {
        "module": type(module).__name__,
        "data": None if data is None else type(data).__name__,
        "command": shlex.join(["qwen3-lit", *sys.argv[1:]]),
        "init_from": module.init_from,
        "problems": [Path(path).name for path in getattr(getattr(module, "evaluation", None), "problems", ())],
        "seed": getattr(data, "seed", None),
        "steps": trainer.global_step,
        "max_steps": trainer.max_steps,
        "model": {
            "parameters": parameter_count(module.config),
            "active_parameters": active_parameter_count(module.config),
            "layers": module.config.num_hidden_layers,
            "hidden_size": module.config.hidden_size,
            "experts": module.config.num_experts,
            "experts_per_token": module.config.num_experts_per_tok if module.config.num_experts else 0,
            "vocab_size": module.config.vocab_size,
        },
        "trainer": {
            "devices": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "precision": str(trainer.precision),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        },
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
        "versions": versions(),
    }


def finite(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, torch.Tensor):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_record(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")


def read_record(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file that this package writes whole, or None when there is none."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else None
