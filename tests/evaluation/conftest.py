"""Run folders as the pipeline and the callbacks leave them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_phase(root: Path, name: str, metrics: dict[str, Any], **fields: Any) -> Path:
    """The record of one phase."""
    folder = root / name
    folder.mkdir(parents=True)
    record = {
        "name": name,
        "seconds": 40.0,
        "eval_seconds": 5.0,
        "metrics": metrics,
        "before": {},
        "after": {},
        "peak_memory_gb": 1.0,
        "module": "PretrainModule",
        "init_from": None,
        "steps": 100,
        "tokens": 200_000,
        "rollout_tokens": 0,
        "device": "Some Processor",
        "threads": 2,
        "commit": "abc123",
        "versions": {"torch": "2.11.0"},
        "trainer": {"devices": 1},
        "problems": [],
        "model": {"parameters": 7_000_000},
        "command": "qwen3-lit fit -c recipes/1_pretrain_general.yaml -c recipes/hardware/cpu.yaml",
        **fields,
    }
    (folder / "phase.json").write_text(json.dumps(record))
    return folder


def write_metrics(folder: Path, figures: dict[str, Callable[[int], float]], steps: int = 100) -> None:
    """A metrics.jsonl whose figures follow functions of the step."""
    rng = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            row = {"step": step, "seconds": 1e9 + step}
            row |= {name: of(step) * (1 + 0.03 * rng.standard_normal()) for name, of in figures.items()}
            file.write(json.dumps(row) + "\n")
            if step % 25 == 24 and "train/loss" in figures:
                file.write(json.dumps({"step": step, "val/loss": figures["train/loss"](step) + 0.1}) + "\n")


def _losses(before: float, after: float) -> dict[str, Any]:
    return {"held_out_loss_before": before, "held_out_loss_after": after}


def _answers(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {f"{k}_before": v for k, v in before.items()} | {f"{k}_after": v for k, v in after.items()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished pipeline: nine phases, a reward model, a comparison run, and steps that only prepare."""
    root = tmp_path / "demo"
    math = {"problems": ["problems_held_out.jsonl"]}
    for name, before, after in (("1_pretrain_general", 7.6, 4.1), ("2_pretrain_reasoning", 3.0, 1.2)):
        folder = write_phase(root, name, _losses(before, after))
        write_metrics(
            folder,
            {
                "train/loss": lambda s, a=after, b=before: a + (b - a) * np.exp(-s / 15),
                "router/max_violation": lambda s: 1.5 + 2 * np.exp(-s / 20),
                "train/grad_norm": lambda s: 0.4 + 8 * np.exp(-s / 2),
                "throughput/tokens_per_second": lambda s: 7000.0,
            },
        )
    four = {"held_out_loss_4x_plain": 5.2, "held_out_loss_4x_dca": 3.9}
    write_phase(root, "3_pretrain_long_context", _losses(4.3, 3.8) | four)
    after4 = {
        "accuracy_think": 0.31,
        "reward_think": 0.31,
        "accuracy_think/chain_sum": 0.4,
        "completion_tokens_think": 90.0,
    }
    sft = {"module": "ColdStartSFTModule", "after": after4, **math}
    write_phase(root, "4_cold_start_sft", after4, init_from=str(root / "3_pretrain_long_context/hf"), **sft)
    after5 = {"accuracy_think": 0.58, "reward_think": 0.58, "completion_tokens_think": 101.0, "truncated_think": 0.1}
    folder = write_phase(
        root, "5_reasoning_rl", _answers(after4, after5), module="GRPOModule", before=after4, after=after5, **math
    )
    write_metrics(
        folder,
        {
            "reward": lambda s: 0.3 + 0.003 * s,
            "policy/entropy": lambda s: 0.3,
            "rollout/completion_tokens/mean": lambda s: 90 + 0.1 * s,
            "throughput/rollout_tokens_per_second": lambda s: 4000.0,
        },
    )
    samples = [
        {
            "stage": stage,
            "global_step": step,
            "task": "chain_sum",
            "mode": "think",
            "prompt": "12 + 30?",
            "reference": "42",
            "completion": f"<think>\n{text}\n</think>\n\n{text}",
            "correct": text == "42",
            "reward": float(text == "42"),
        }
        for stage, step, text in (("before", 0, "41"), ("train", 5, "43"), ("after", 10, "42"))
    ]
    samples.append({**samples[-1], "task": "code", "prompt": "show code", "completion": "````py\nprint(1)\n````"})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples) + '{"half')
    (folder / "expert_load.png").write_bytes(b"\x89PNG")
    after6 = {"accuracy_think": 0.55, "accuracy_no_think": 0.42, "think_follow": 0.97}
    write_phase(root, "6_thinking_fusion", after6, module="FusionModule", after=after6, **math)
    before7 = {"reward": 0.4, "think_follow": 0.96, "reward/title": 0.2, "accuracy": 0.3}
    after7 = {"reward": 0.7, "think_follow": 0.99, "reward/title": 0.8, "accuracy": 0.5}
    write_phase(
        root,
        "7_general_rl",
        _answers(before7, after7) | {"think_follow": 0.99},
        module="GRPOModule",
        before=before7,
        after=after7,
        problems=["general_held_out.jsonl"],
    )
    after8 = {"accuracy_think": 0.4, "accuracy_no_think": 0.3}
    write_phase(
        root,
        "8_distill_off_policy",
        after8,
        module="DistillModule",
        after=after8,
        model={"parameters": 2_000_000},
        **math,
    )
    start = {"model": {"parameters": 2_000_000}, "init_from": f"{root}/8_distill_off_policy/hf"}
    for name, module, after, seconds in (
        ("9_distill_on_policy", "DistillModule", 0.5, 30.0),
        ("rl_from_off_policy", "GRPOModule", 0.42, 60.0),
    ):
        answers = {"accuracy": 0.4}, {"accuracy": after}
        write_phase(
            root, name, _answers(*answers), module=module, seconds=seconds, before=answers[0], after=answers[1],
            **start, **math,
        )  # fmt: skip
    write_phase(root, "reward_model", {"pair_accuracy_before": 0.5, "pair_accuracy_after": 0.9}, module="RewardModule")
    (root / "data").mkdir()
    curation = {"kept_fraction": 0.6, "dropped": {"wrong_answer": 300, "repetition": 20}}
    (root / "data" / "cold_start_report.json").write_text(json.dumps(curation))
    order = ["tokenizer", "1_pretrain_general", "2_pretrain_reasoning", "3_pretrain_long_context", "4_cold_start_sft"]
    order += ["5_reasoning_rl", "6_thinking_fusion", "reward_model", "7_general_rl", "8_distill_off_policy"]
    order += ["9_distill_on_policy", "rl_from_off_policy"]
    steps = {
        name: {"hash": "0", "done": True, "seconds": 50.0 + place, "peak_rss_gb": 1.0 + place / 10}
        for place, name in enumerate(order)
    }
    state = {"total_seconds": 666.0, "peak_rss_gb": 2.1, "steps": steps, "forced": {}}
    (root / "pipeline_state.json").write_text(json.dumps(state))
    return root
