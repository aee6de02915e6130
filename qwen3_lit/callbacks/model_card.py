"""The model card of an exported folder: what it is, where it came from, how it did, how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_lit.data.atomic_files import write_text
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.cost import active_parameter_count, parameter_count

CARD_FILE = "README.md"


def write_model_card(
    folder: Path, config: ModelConfig, phases: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None
) -> None:
    """Write ``README.md``.

    Args:
        folder: Hugging Face folder.
        config: the model.
        phases: what the weights went through, the latest last.
        record: content of the phase's ``phase.json``; None leaves its figures out.
    """
    name = str(phases[-1]["name"])
    kind = (
        f"mixture of {config.num_experts} experts, {config.num_experts_per_tok} a token"
        if config.num_experts
        else "dense"
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [qwen3_lit, lightning]",
        "---",
        "",
        f"# {name}",
        "",
        f"A Qwen3-shaped language model ({kind}) with {_count(parameter_count(config))} parameters, "
        f"{_count(active_parameter_count(config))} of them active for each token, trained with qwen3_lit.",
        "",
        "## Training",
        "",
        "| phase | module | steps |",
        "| --- | --- | --- |",
        *(f"| {p['name']} | {p.get('module', '')} | {p.get('steps', '')} |" for p in phases),
        "",
    ]
    if record is not None:
        figures = {k: v for k, v in record["metrics"].items() if "/" not in k and isinstance(v, int | float)}
        lines += ["## Figures", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {metric} | {value:.4g} |" for metric, value in figures.items()]
        lines += [
            "",
            f"Trained in {record['seconds']:.0f} s on {record['device']}; commit {record['commit'] or 'unknown'}.",
        ]
        lines += [""]
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "or `qwen3-lit generate path/to/this/folder`.",
        "",
    ]
    write_text(folder / CARD_FILE, "\n".join(lines))


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(int(number))
