"""Training steps and rollouts beside other frameworks: ``python benchmarks/end_to_end.py {train,rollout}``.

``train``: forward and backward of the first layers of Qwen3-30B-A3B (full widths, bfloat16 weights, random tokens, the
routing of a random router), the head's cross-entropy and, for ours alone, the balance loss. The weight gradients are
made anew in every step, as after ``zero_grad``; no optimizer. ``rollout``: the in-process engine on Qwen3-0.6B's shape,
sampling at temperature 1 to a fixed length.

A row of ours carries the attention that ran: ``ours compile flash`` (the flash-attn package, whose version is in the
row's column ``opponent``), ``ours compile triton`` or ``ours compile sdpa``. ``--attention auto`` is what a training
run gets.

FLOPs are the model's (``qwen3_lit.model.cost``): 6 x active weights and causal attention. The first step is timed from
the call to its end, in a process that begins with empty caches of torch.compile and Triton; models run one after the
other, so the first shape of a model is the cold one. Models of ours share kernels: only the first of them is cold.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

# Before torch: the first step shall compile everything, as on a machine that never ran it.
if "--keep-caches" not in sys.argv:
    _caches = tempfile.TemporaryDirectory(prefix="cold_caches_")
    for _name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
        os.environ[_name] = os.path.join(_caches.name, _name.lower())

import record
import torch
from measure import status_of
from qwen3_kernels import dispatch
from qwen3_kernels import dual_chunk_attention_flash as flash_attn
from timing import Ceilings, measure_ceilings
from torch import Tensor
from train_steps import Batch, build, our_step, read_size, torchtitan_step, transformers_step

from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.cost import training_flops
from qwen3_lit.model.hf_config import hf_config_dict
from qwen3_lit.model.transformer import Qwen3

ATTENTION = "dual_chunk_attention"
OPPONENTS = {
    "torchtitan": ("torchtitan",),
    "transformers": ("transformers",),
    "transformers+liger": ("transformers", "liger-kernel"),
}
"""What a contender's row says of versions."""


def training_contenders(
    options: argparse.Namespace, attentions: Sequence[str]
) -> Mapping[str, Callable[..., Callable[[], Tensor]]]:
    """How each builds a step; Liger last of theirs, since it replaces parts of transformers for good."""
    theirs = {
        "torchtitan": torchtitan_step,
        "transformers": partial(transformers_step, liger=False),
        "transformers+liger": partial(transformers_step, liger=True),
    }
    ours = {
        " ".join(["ours", mode, attention, *options.prefer]): partial(
            our_step, compile_blocks=mode == "compile", attention=attention
        )
        for mode in options.ours
        for attention in attentions
    }
    return {name: make for name, make in theirs.items() if name in options.opponents} | ours


def attention_that_runs(backend: str, device: torch.device) -> str:
    """The implementation behind ``auto``, or the one that is named, which fails in its row where it does not fit."""
    if backend != "auto":
        return backend
    config = read_size("30b_a3b", device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q_THC = torch.empty(1, config.num_attention_heads, config.head_dim, device=device, dtype=dtype)
    chosen = inspect.unwrap(dispatch.choose(ATTENTION, q_THC, chunked=False))
    for name in dispatch.implementations(ATTENTION):
        with contextlib.suppress(ValueError):
            if inspect.unwrap(dispatch.choose(ATTENTION, q_THC, name, chunked=False)) is chosen:
                return name
    raise AssertionError(f"{ATTENTION}: {chosen} has no name")


def run_training(
    options: argparse.Namespace, device: torch.device, ceilings: Ceilings, attentions: Sequence[str]
) -> list[record.Row]:
    """Time every contender on every batch."""
    config = read_size("30b_a3b", device, num_hidden_layers=options.layers)
    rows = []
    for name, make in training_contenders(options, attentions).items():
        for shape in options.shape:
            documents, length = map(int, shape.split("x"))
            batch = Batch.random(documents, length, config.vocab_size, device)
            row = record.new_row(
                device,
                op=f"train_step_{config.num_hidden_layers}_layers",
                implementation=name,
                shape=shape,
                direction="both",
                opponent=version(name),
                flops=training_flops(config, [length] * documents),
                copy_ceiling_gbps=ceilings.copy_gbps,
                matmul_ceiling_tflops=ceilings.matmul_tflops,
            )
            try:
                row = timed(row, make(config, batch, device), options.steps, device, documents * length)
            except Exception as problem:  # a contender that cannot run is a result
                row = replace(row, status=status_of(problem))
            rows.append(row)
            report(row, options.csv)
            release(device)
    return rows


def timed(row: record.Row, step: Callable[[], Tensor], steps: int, device: torch.device, tokens: int) -> record.Row:
    """``row`` with the first step, what ``timings`` gives, and the share of the ceiling."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = seconds(step, device)
    for _ in range(2):
        loss = step()
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}")
    row = timings(row, step, steps, device, tokens)
    print(f"  {row.implementation}: loss {loss.item():.4f}", flush=True)
    assert row.flops is not None and row.matmul_ceiling_tflops is not None and row.median_ms is not None
    tflops = row.flops / row.median_ms / 1e9
    return replace(row, tflops=tflops, share_of_ceiling=tflops / row.matmul_ceiling_tflops, first_step_s=first)


def timings(row: record.Row, call: Callable[[], object], runs: int, device: torch.device, tokens: int) -> record.Row:
    """``row`` with median, 20th and 80th percentile of ``runs``, and the peak of all memory, weights included."""
    samples = sorted(seconds(call, device) for _ in range(runs))
    median = statistics.median(samples)
    return replace(
        row,
        median_ms=1e3 * median,
        p20_ms=1e3 * samples[round(0.2 * (runs - 1))],
        p80_ms=1e3 * samples[round(0.8 * (runs - 1))],
        peak_extra_mb=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        tokens_per_s=tokens / median,
    )


def run_rollout(
    options: argparse.Namespace, device: torch.device, ceilings: Ceilings, attentions: Sequence[str]
) -> list[record.Row]:
    """Sample ``--prompts`` completions with each engine; attention is that of the prompts."""
    config = read_size("0_6b", device)
    prompts = torch.randint(config.vocab_size, (options.prompts, options.prompt_length), device=device)
    makers = {"transformers": partial(their_engine, config)} if "transformers" in options.opponents else {}
    if options.ours:
        for attention in attentions:
            name = " ".join(["ours", attention, *options.prefer])
            makers[name] = partial(our_engine, replace(config, attention_backend=attention))
    rows = []
    for name, make in makers.items():
        shape = f"{options.prompts}x({options.prompt_length}+{options.new_tokens})"
        row = record.new_row(
            device, op="rollout_0_6b", implementation=name, shape=shape, direction="forward", opponent=version(name)
        )
        try:
            generate = make(prompts, options.new_tokens, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            row = replace(row, first_step_s=seconds(generate, device))
            row = timings(row, generate, options.repeats, device, options.prompts * options.new_tokens)
        except Exception as problem:  # an engine that cannot run is a result
            row = replace(row, status=status_of(problem))
        rows.append(row)
        report(row, options.csv)
        release(device)
    return rows


def our_engine(config: ModelConfig, prompts: Tensor, new_tokens: int, device: torch.device) -> Callable[[], object]:
    """The in-process engine, all prompts at once."""
    model = build(lambda: Qwen3(config), device)
    count, length = prompts.shape
    pages = count * -(-(length + new_tokens) // 16)
    engine = PagedEngine(model, max_batch_size=count, max_cached_tokens=16 * pages)
    asked = prompts.tolist()

    def generate() -> object:
        completions = engine.generate(asked, SamplingParams(max_new_tokens=new_tokens))
        assert all(len(group[0].token_ids) == new_tokens for group in completions)
        return completions

    return generate


def their_engine(config: ModelConfig, prompts: Tensor, new_tokens: int, device: torch.device) -> Callable[[], object]:
    """``generate`` with SDPA and its dynamic cache."""
    import transformers

    settings = transformers.Qwen3Config(**hf_config_dict(config, "bfloat16"))
    model = build(
        lambda: transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa"), device
    ).eval()
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def generate() -> object:
        with torch.no_grad():
            out = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, **sampling
            )
        assert out.shape[1] == prompts.shape[1] + new_tokens
        return out

    return generate


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def version(name: str) -> str:
    """The packages behind a contender, as far as they are neither ours nor torch."""
    packages = OPPONENTS.get(name, ())
    if "flash" in name.split():
        packages = ("flash-attn" if flash_attn.VERSION == 2 else f"flash-attn-{flash_attn.VERSION}",)
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return " ".join(f"{package} {installed.get(package, 'missing')}" for package in packages)


def release(device: torch.device) -> None:
    """Give back what the last contender held."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report(row: record.Row, csv: Path | None) -> None:
    """Print a row and keep it."""
    head = f"{row.op:<22} {row.shape:<16} {row.implementation:<20}"
    if row.status != "ok":
        print(f"{head} {row.status}", flush=True)
    else:
        flops = "" if row.tflops is None else f"{row.tflops:7.1f} TFLOP/s"
        peak = "" if row.peak_extra_mb is None else f"{row.peak_extra_mb / 1024:6.1f} GiB"
        rate = f"{row.median_ms:9.1f} ms {row.tokens_per_s:9.0f} tok/s"
        print(f"{head} {rate} {flops} {peak} first {row.first_step_s:.1f} s", flush=True)
    if csv is not None:
        record.append(csv, [row])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; exit code 1 where ours failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "rollout"))
    parser.add_argument("--ours", nargs="*", choices=("eager", "compile"), default=["compile"])
    parser.add_argument(
        "--attention", nargs="+", choices=("auto", "flash", "triton", "sdpa"), default=["auto"], help="of ours"
    )
    parser.add_argument("--opponents", nargs="*", choices=OPPONENTS, default=["transformers+liger"])
    parser.add_argument("--shape", nargs="+", default=["4x4096", "1x32768"], help="documents x length, of train")
    parser.add_argument("--layers", type=int, default=8, help="of train")
    parser.add_argument("--steps", type=int, default=10, help="of train, after three that warm up")
    parser.add_argument("--repeats", type=int, default=3, help="of rollout, after one that warms up")
    parser.add_argument("--prompts", type=int, default=256, help="of rollout")
    parser.add_argument("--prompt-length", type=int, default=128, help="of rollout")
    parser.add_argument("--new-tokens", type=int, default=256, help="of rollout")
    parser.add_argument("--prefer", action="append", default=[], metavar="OP=NAME", help="force an implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="append here")
    parser.add_argument("--keep-caches", action="store_true", help="compile into the usual caches")
    options = parser.parse_args(arguments)
    if any(pair.startswith(f"{ATTENTION}=") for pair in options.prefer):
        parser.error(f"--prefer {ATTENTION}=...: say --attention, which goes into the name of the row")
    device = torch.device(options.device)
    if options.csv is not None:
        record.ready(options.csv)
    attentions = [attention_that_runs(backend, device) for backend in options.attention]
    ceilings = measure_ceilings(device)
    with contextlib.ExitStack() as forced:
        for pair in options.prefer:
            forced.enter_context(dispatch.prefer(*pair.split("=", 1)))
        rows = {"train": run_training, "rollout": run_rollout}[options.what](options, device, ceilings, attentions)
    return int(any(row.status != "ok" and row.implementation.startswith("ours") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
