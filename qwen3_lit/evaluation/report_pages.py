"""``report.md`` and ``report.json`` of a run folder: what every phase did, in words, tables, pictures and samples."""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3_lit.data.atomic_files import write_text
from qwen3_lit.evaluation.metrics_file import METRICS_FILE, Curve, read_curves
from qwen3_lit.evaluation.report_plots import draw_curves, draw_overview, save
from qwen3_lit.evaluation.stage_table import Phase, StageTable, stage_table
from qwen3_lit.evaluation.verdicts import is_fraction, shown, split_before, title, verdicts

SAMPLES_FILE = "samples.jsonl"
HEATMAP_FILE = "expert_load.png"
MAX_SAMPLES = 3
MAX_CHARS = 1200

log = logging.getLogger(__name__)


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.md``, ``report.json`` and the pictures; gives the path of the page.

    Raises:
        UserError: the folder holds no finished phase, or a damaged file.
    """
    table = stage_table(run_dir)
    pictures = table.run_dir / "report"
    curves = {phase.name: read_curves(phase.folder / METRICS_FILE) for phase in [*table.phases, *table.supporting]}
    save(draw_overview(table), pictures / "overview.png")
    for phase in [*table.phases, *table.supporting]:
        figure = draw_curves(curves[phase.name])
        if figure is not None:
            save(figure, pictures / f"{phase.name}.png")
    write_text(table.run_dir / "report.json", json.dumps(table.as_json(), indent=1, ensure_ascii=False) + "\n")
    page = table.run_dir / "report.md"
    write_text(page, "\n".join(_page(table, curves)) + "\n")
    return page


def _page(table: StageTable, curves: Mapping[str, Mapping[str, Curve]]) -> Iterator[str]:
    yield f"# {table.run_dir.resolve().name}"
    yield ""
    yield (
        f"{len(table.phases)} phases in {_minutes(table.total_seconds)} on {_device(table.phases[-1])}, "
        f"at most {table.peak_rss_gb:.2f} GB of memory."
    )
    yield from ("", "| phase | what it did | time | memory |", "| --- | --- | ---: | ---: |")
    for phase in table.phases:
        lines = "<br>".join(verdicts(phase.metrics)) or "-"
        yield f"| [{phase.name}](#{_anchor(phase.name)}) | {lines} | {_minutes(phase.seconds)} | {_gb(phase)} |"
    yield ""
    for name, absent in table.missing.items():
        yield f"**{name} lacks {', '.join(absent)}.**"
        yield ""
    yield from ("![Overview](report/overview.png)", "")
    yield from _stages(table)
    for phase in table.phases:
        yield from _phase(phase, table, curves[phase.name])
    if table.supporting:
        yield from ("## Supporting runs", "")
        for phase in table.supporting:
            yield from _phase(phase, table, curves[phase.name], level=3)
    yield from _environment(table)


def _stages(table: StageTable) -> Iterator[str]:
    """Figures side by side after each phase that answers problems, one table for each set of problems."""
    by_problems: dict[tuple[str, ...], list[Phase]] = {}
    for phase in table.phases:
        if phase.record.get("problems"):
            by_problems.setdefault(tuple(phase.record["problems"]), []).append(phase)
    if not by_problems:
        return
    yield from ("## Stage by stage", "")
    yield "Figures after each phase on the same held-out problems; in brackets the change, where the model is the same."
    for problems, phases in by_problems.items():
        names = list(dict.fromkeys(name for phase in phases for name in phase.record["after"] if "/" not in name))
        yield from ("", f"Problems: {', '.join(problems)}", "")
        yield "| figure | " + " | ".join(phase.name for phase in phases) + " |"
        yield "| --- |" + " ---: |" * len(phases)
        for name in names:
            cells, last, model = [], None, None
            for phase in phases:
                if phase.record.get("model") != model:  # a student is not to be compared with its teacher
                    last, model = None, phase.record.get("model")
                value = phase.record["after"].get(name)
                cells.append(_cell(name, value, last))
                last = value if value is not None else last
            yield f"| {title(name)} | " + " | ".join(cells) + " |"
    yield ""


def _cell(name: str, value: float | None, before: float | None) -> str:
    if value is None:
        return ""
    if before is None:
        return shown(name, value)
    if is_fraction(name):
        return f"{shown(name, value)} ({100 * (value - before):+.1f})"
    digits = 0 if name.startswith("completion_tokens") else 2
    return f"{shown(name, value)} ({value - before:+.{digits}f})"


def _phase(phase: Phase, table: StageTable, curves: Mapping[str, Curve], level: int = 2) -> Iterator[str]:
    record = phase.record
    yield from (f"{'#' * level} {phase.name}", "")
    yield _sentence(phase, curves)
    yield ""
    for line in verdicts(phase.metrics):
        yield f"- {line}"
    yield ""
    if (table.run_dir / "report" / f"{phase.name}.png").is_file():
        yield from (f"![Curves of {phase.name}](report/{phase.name}.png)", "")
    yield from _tasks(phase.metrics)
    if phase.metrics.get("dropped"):
        yield from ("Candidates dropped before this phase, by reason:", "", "| reason | candidates |", "| --- | ---: |")
        ordered = sorted(phase.metrics["dropped"].items(), key=lambda item: -item[1])
        yield from (f"| {reason} | {count:,} |" for reason, count in ordered)
        yield ""
    if (phase.folder / HEATMAP_FILE).is_file():
        place = (phase.folder / HEATMAP_FILE).relative_to(table.run_dir).as_posix()
        yield from (f"![Expert load of {phase.name}]({place})", "")
    yield from _samples(phase)
    if record.get("command"):
        recipes = re.findall(r"-c (\S+)", record["command"])
        summary = ", ".join(Path(recipe).stem for recipe in recipes) or "command"
        yield from (f"<details><summary>Recipe: {summary}</summary>", "", "```sh", record["command"], "```", "")
        yield from ("</details>", "")


def _sentence(phase: Phase, curves: Mapping[str, Curve]) -> str:
    record = phase.record
    origin = f"from `{record['init_from']}`" if record.get("init_from") else "from random weights"
    parts = [f"{record['module']} {origin}, {record.get('steps', 0):,} steps"]
    if record.get("tokens"):
        parts.append(f"{record['tokens']:,} tokens trained")
    if record.get("rollout_tokens"):
        parts.append(f"{record['rollout_tokens']:,} generated")
    text = ", ".join(parts) + "."
    speed = []
    for name, label in (("tokens_per_second", "trained"), ("rollout_tokens_per_second", "generated")):
        curve = curves.get(f"throughput/{name}")
        if curve is not None:
            middle = sorted(curve.values)[len(curve.values) // 2]
            speed.append(f"{middle:,.0f} tokens {label} a second")
    if "throughput/mfu" in curves:
        values = sorted(curves["throughput/mfu"].values)
        speed.append(f"MFU {100 * values[len(values) // 2]:.1f} %")
    text += f" {_minutes(phase.seconds)} in all: training {_minutes(record['seconds'])}, "
    text += f"evaluation {_minutes(record['eval_seconds'])}; {_gb(phase)}."
    return text + (f" Median speed: {', '.join(speed)}." if speed else "")


def _tasks(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Figures of single tasks: one row a task, one column a figure."""
    cells: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        base, slash, task = name.partition("/")
        when = split_before(task)
        if slash and when is not None:
            cells.setdefault(when, {})[f"{base}_before"] = value
        elif slash and task.endswith("_after"):
            cells.setdefault(task.removesuffix("_after"), {})[f"{base}_after"] = value
        elif slash:
            cells.setdefault(task, {})[base] = value
    if not cells:
        return
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    bases = list(dict.fromkeys(name.removesuffix("_before").removesuffix("_after") for name in columns))
    yield "| task | " + " | ".join(title(base) for base in bases) + " |"
    yield "| --- |" + " ---: |" * len(bases)
    for task, row in sorted(cells.items()):
        values = []
        for base in bases:
            ends = [row[name] for name in (f"{base}_before", f"{base}_after", base) if row.get(name) is not None]
            values.append(" -> ".join(shown(base, value) for value in ends))
        yield f"| {task} | " + " | ".join(values) + " |"
    yield ""


def _samples(phase: Phase) -> Iterator[str]:
    chosen = _choose(_read_samples(phase.folder / SAMPLES_FILE))
    if not chosen:
        return
    yield from ("Samples:", "")
    for sample in chosen:
        facts = [sample["stage"] if sample["stage"] != "train" else f"step {sample['global_step']}"]
        facts += [str(sample[key]) for key in ("task", "mode") if sample.get(key)]
        if sample.get("reference") is not None:
            facts.append(f"reference `{str(sample['reference'])[:80]}`")
        if sample.get("correct") is not None:
            facts.append("right" if sample["correct"] else "wrong")
        elif sample.get("reward") is not None:
            facts.append(f"reward {sample['reward']:.2f}")
        yield from (f"*{', '.join(facts)}*", "")
        yield from _fenced(f"{sample.get('prompt', '')}\n---\n{sample.get('completion', '')}")


def _choose(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same problem before and after where there is one, then others of as many tasks and modes as there is room."""
    after = [sample for sample in samples if sample["stage"] == "after"]
    pool = after or [sample for sample in samples if sample["stage"] == "train"][-2 * MAX_SAMPLES :]
    chosen: list[Mapping[str, Any]] = []
    used: Counter[tuple[Any, Any]] = Counter()
    for sample in pool:
        key = sample.get("task"), sample.get("mode")
        if len(chosen) < MAX_SAMPLES and not used[key]:
            used[key] += 1
            chosen.append(sample)
    if chosen and after:
        first = chosen[0]
        for sample in samples:
            same = all(sample.get(key) == first.get(key) for key in ("prompt", "mode"))
            if sample["stage"] == "before" and same:
                return [sample, *chosen]
    return chosen


def _read_samples(file: Path) -> list[dict[str, Any]]:
    rows = []
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                log.warning("%s:%d: half a line, left out of the report", file, number)
    return rows


def _fenced(text: str) -> Iterator[str]:
    if len(text) > MAX_CHARS:
        text = f"{text[: MAX_CHARS // 2]}\n[... {len(text) - MAX_CHARS} characters ...]\n{text[-MAX_CHARS // 2 :]}"
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}text", text, fence, "")


def _environment(table: StageTable) -> Iterator[str]:
    yield from ("## Environment", "")
    record = table.phases[-1].record
    yield from ("| | |", "| --- | --- |")
    yield f"| device | {_device(table.phases[-1])} |"
    yield f"| commit | {record.get('commit') or 'not a git checkout'} |"
    for package, version in (record.get("versions") or {}).items():
        yield f"| {package} | {version} |"
    if table.steps:
        yield from ("", "| step | time | peak memory |", "| --- | ---: | ---: |")
        for name, step in table.steps.items():
            mark = "" if step.get("done") else " (not finished)"
            yield f"| {name}{mark} | {_minutes(step.get('seconds') or 0)} | {step.get('peak_rss_gb') or 0:.2f} GB |"


def _device(phase: Phase) -> str:
    record = phase.record
    count = (record.get("trainer") or {}).get("devices", 1)
    name = str(record.get("device") or "an unknown device")
    threads = record.get("threads")
    shown_threads = f", {threads} threads" if threads and not re.search("NVIDIA|AMD Instinct", name) else ""
    return (f"{count} x {name}" if count > 1 else name) + shown_threads


def _gb(phase: Phase) -> str:
    return f"{phase.peak_rss_gb:.2f} GB"


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02d} s"


def _anchor(name: str) -> str:
    return re.sub(r"[^\w-]", "", name.lower())
