import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_lit.cli.main import main
from qwen3_lit.data.chat_template import prompt_ids
from qwen3_lit.data.schema import read_records
from qwen3_lit.data.tokenizer import load_tokenizer, train_tokenizer
from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import load_hf, save_hf
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


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a small model and its tokenizer, and problems."""
    problems, folder = tmp_path / "p.jsonl", tmp_path / "hf"
    assert main(["data", "synthesize", "problems", "--out", str(problems), "--count", "6", *SMALL]) == 0
    texts = [record["messages"][0]["content"] for record in read_records(problems, "problem")] * 3
    tokenizer = train_tokenizer(texts, 320, tmp_path / "tokenizer")
    config = ModelConfig(
        vocab_size=len(tokenizer) + 3,
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
    return folder, problems


class Completions(BaseHTTPRequestHandler):
    """A completions server with the folder's model, greedy."""

    engine: PagedEngine
    bodies: list[dict[str, Any]]

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        wanted = SamplingParams(max_new_tokens=body["max_tokens"], temperature=0.0)
        (completion,) = self.engine.generate([body["prompt"]], wanted)[0]
        choice = {"token_ids": completion.token_ids, "logprobs": {"token_logprobs": completion.logprobs}}
        answer = json.dumps({"choices": [{**choice, "finish_reason": completion.finish_reason}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def always_answer(folder: Path, text: str) -> None:
    """Make the folder's model say ``text``: what follows a token depends on that token alone."""
    model, tokenizer = load_hf(folder), load_tokenizer(folder)
    asked = prompt_ids(tokenizer, [{"role": "user", "content": "?"}])
    chain = [asked[-1], *tokenizer.encode(text), tokenizer.im_end_id]
    assert len(set(chain)) == len(chain), f"{chain}: a token that comes twice has no single successor"
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in zip(chain[:-1], chain[1:], strict=True):
            model.lm_head.weight[successor] = model.embed_tokens.weight[token]
    save_hf(model, model.config, folder, tokenizer_dir=folder)


def test_a_server_of_the_same_folder_gives_the_same_answers(asked: tuple[Path, Path], tmp_path: Path) -> None:
    folder, problems = asked
    always_answer(folder, "<think>so</think>7")
    engine = PagedEngine.for_tokenizer(load_hf(folder), load_tokenizer(folder), max_cached_tokens=8192)
    handler = type("Handler", (Completions,), {"engine": engine, "bodies": []})
    command = ["data", "sample", str(folder), str(problems), "--keep", "all", "--n", "1", "--temperature", "0"]
    command += ["--max-new-tokens", "30"]
    assert main([*command, "--out", str(tmp_path / "paged.jsonl"), "--device", "cpu"]) == 0
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        chosen = ["--out", str(tmp_path / "served.jsonl"), "--engine", url, "--served-model", "small"]
        assert main([*command, *chosen]) == 0
        server.shutdown()
    assert (tmp_path / "served.jsonl").read_text() == (tmp_path / "paged.jsonl").read_text()
    vocab = len(load_tokenizer(folder))
    assert all(body["model"] == "small" for body in handler.bodies)
    assert all(set(body["logit_bias"]) == {str(vocab + row) for row in range(3)} for body in handler.bodies)


def test_an_engine_that_is_none_is_one_line(
    asked: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "sample", *map(str, asked), "--out", str(tmp_path / "out.jsonl"), "--engine", "sglang"]
    assert main(command) == 2
    assert "--engine sglang: expected paged, vllm, or a URL" in capsys.readouterr().err


def test_sample_from_a_folder(asked: tuple[Path, Path], tmp_path: Path) -> None:
    (folder, problems), out = asked, tmp_path / "out.jsonl"
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
