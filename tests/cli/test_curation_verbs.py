import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_lit.cli.main import main
from qwen3_lit.data.schema import read_records
from qwen3_lit.data.tokenizer import train_tokenizer
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import save_hf
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.transformer import Qwen3

SMALL = ["--tasks", "chain_sum,products", "--option", "max_terms=2", "--option", "max_digits=2"]


def test_synthesize_then_curate(tmp_path: Path) -> None:
    names = ("problems", "held_out", "candidates", "kept")
    problems, held_out, candidates, kept = (str(tmp_path / f"{name}.jsonl") for name in names)
    assert main(["data", "synthesize", "problems", "--out", problems, "--count", "30", *SMALL]) == 0
    assert (
        main(["data", "synthesize", "problems", "--out", held_out, "--count", "9", "--split", "held_out", *SMALL]) == 0
    )
    arguments = ["--count", "30", "--problems", problems, "--held-out", held_out, "--option", "n=2"]
    assert main(["data", "synthesize", "reasoning_candidates", "--out", candidates, *arguments]) == 0
    report = tmp_path / "report.json"
    filters = ["--problems", problems, "--held-out", held_out, "--report", str(report), "--max-samples", "12"]
    assert main(["data", "curate", candidates, "--out", kept, *filters]) == 0
    result = json.loads(report.read_text())
    assert result["kept"] == len(list(read_records(kept, "conversation"))) == 12
    assert result["seen"] == 60 and sum(result["dropped"].values()) == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["problem", "--count", "3"], "did you mean 'problems'"),
        (["problems", "--count", "0"], "at least one record"),
        (["problems", "--count", "3", "--tasks", "chain_sun"], "did you mean 'chain_sum'"),
        (["problems", "--count", "3", "--option", "digits"], "name=value"),
        (["reasoning_candidates", "--count", "3", "--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["data", "synthesize", *arguments, "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not any("Traceback" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_sample_from_a_folder(tmp_path: Path) -> None:
    problems, out, folder = tmp_path / "p.jsonl", tmp_path / "out.jsonl", tmp_path / "hf"
    assert main(["data", "synthesize", "problems", "--out", str(problems), "--count", "6", *SMALL]) == 0
    texts = [record["messages"][0]["content"] for record in read_records(problems, "problem")] * 3
    tokenizer = train_tokenizer(texts, 320, tmp_path / "tokenizer")
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        num_experts=0,
        max_position_embeddings=512,
    )
    model = Qwen3(config)
    init_weights(model, torch.Generator().manual_seed(0))
    save_hf(model, config, folder, tokenizer_dir=tmp_path / "tokenizer")
    report = tmp_path / "report.json"
    sizes = ["--n", "2", "--limit", "4", "--chunk", "3", "--max-cached-tokens", "8192"]
    command = ["data", "sample", str(folder), str(problems), "--out", str(out), "--keep", "all", "--mode", "both"]
    command += [*sizes, "--report", str(report), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "2"]) == 2 and not out.exists(), "nothing kept"
    assert json.loads(report.read_text())["kept"] == 0
    assert main([*command, "--max-new-tokens", "300"]) == 0
    result = json.loads(report.read_text())
    assert result["sampled"] == 16 and result["kept"] + sum(result["dropped"].values()) == 16
    assert len(out.read_text().splitlines()) == result["kept"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out.jsonl"]


@pytest.mark.parametrize("verb", ["synthesize", "curate", "sample"])
def test_help_does_not_import_torch(verb: str) -> None:
    code = (
        "import sys; from qwen3_lit.cli.main import main\n"
        f"try: main(['data', '{verb}', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout
