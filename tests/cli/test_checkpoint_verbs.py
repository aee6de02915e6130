"""``qwen3-lit import`` and ``export``: every kind of source, what is written, and one-line refusals."""

import dataclasses
import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from safetensors.torch import load_file

from qwen3_lit.cli.checkpoint_writing import parse_size
from qwen3_lit.cli.main import EXIT_BAD_INPUT, main
from qwen3_lit.data.tokenizer import train_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.model.config import ModelConfig, YarnConfig
from qwen3_lit.model.hf_checkpoint import load_hf, read_hf_config, save_hf
from qwen3_lit.model.transformer import Qwen3

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=20,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    rope_scaling=YarnConfig(4.0, 64),
    max_position_embeddings=256,
)


class Phase(L.LightningModule):
    """A module with the names of a training phase: the model, a teacher, and a head of its own."""

    def __init__(self, config: ModelConfig, extra: str = "kept by save_hyperparameters") -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.model = Qwen3(config)
        self.teacher = Qwen3(config)
        self.score_head = torch.nn.Linear(config.hidden_size, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids_T = torch.arange(8)
        hidden_TD = self.model(ids_T, ids_T, torch.tensor([0, 8], dtype=torch.int32), 8).hidden_TD
        return self.score_head(hidden_TD).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> list[int]:
        return [0, 1]


@pytest.fixture(autouse=True)
def no_stale_log_handler() -> Iterator[None]:
    """The command line logs to stderr as it was when first called; pytest gives every test a stderr of its own."""
    yield
    for name in ("qwen3_lit", "qwen3_kernels"):
        logging.getLogger(name).handlers.clear()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def f(x): return x + 1\n", "the quick brown fox"] * 20, 290, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Phase, Path]:
    """A module after a real Trainer run, and its checkpoint file."""
    folder = tmp_path_factory.mktemp("run")
    phase = Phase(CONFIG)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(phase)
    file = folder / "checkpoints" / "epoch=0-step=2.ckpt"
    trainer.save_checkpoint(file)
    return phase, file


def assert_weights(folder: Path, model: Qwen3) -> None:
    loaded = load_hf(folder)
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    message = printed.splitlines()[-1]  # log lines may come before
    assert message.startswith(f"qwen3-lit {arguments[0]}: ")
    return message


# ---- import


def test_import_of_a_folder_that_transformers_saved(tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3MoeConfig(
            vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=20, head_dim=6,
        ),
        dtype=torch.bfloat16,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours"
    assert main(["import", str(tmp_path / "theirs"), "--out", str(out), "--dtype", "float32", "--layout", "v5"]) == 0
    printed = capsys.readouterr().out
    assert "4 experts, top-2" in printed and "with its tokenizer" in printed
    tensors = load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    expected = theirs.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].float()
    assert torch.equal(tensors["model.layers.1.mlp.experts.gate_up_proj"], expected)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template
    assert read_hf_config(out).norm_topk_prob is False


def test_import_without_out_checks_only(tmp_path: Path, capsys) -> None:
    save_hf(Qwen3(CONFIG), CONFIG, tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", str(tmp_path / "hf")]) == 0
    assert "complete" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_import_refuses_in_one_line_and_writes_nothing(tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    small = dataclasses.replace(CONFIG, vocab_size=50)
    save_hf(Qwen3(small), small, source)
    message = fails(capsys, "import", str(source), "--out", str(out), "--tokenizer", str(tokenizer_dir))
    assert "does not fit" in message
    os.truncate(source / "model.safetensors", 5000)
    assert "truncated" in fails(capsys, "import", str(source), "--out", str(out))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "model_type": "llama"}))
    assert "'llama'" in fails(capsys, "import", str(source), "--out", str(out))
    assert "no such folder" in fails(capsys, "import", str(tmp_path / "nowhere"), "--out", str(out))
    assert not out.exists()


def test_another_tokenizer_than_the_weights_came_with_is_refused(tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    source, other, out = tmp_path / "hf", tmp_path / "other", tmp_path / "out"
    save_hf(Qwen3(CONFIG), CONFIG, source, tokenizer_dir=tokenizer_dir)
    train_tokenizer(["zebras quickly jump over vexed foxes"] * 20, 290, other)
    for verb in ("import", "export"):
        message = fails(capsys, verb, str(source), "--out", str(out), "--tokenizer", str(other))
        assert f"{other}: not the tokenizer of the weights in {source}: id 256 is the token" in message
        assert main([verb, str(source), "--out", str(tmp_path / verb), "--tokenizer", str(tokenizer_dir)]) == 0
    assert not out.exists()


def test_a_full_disk_names_the_folder(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf(Qwen3(CONFIG), CONFIG, tmp_path / "hf")

    def full_disk(file: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwen3_lit.model.hf_checkpoint.write_file", full_disk)
    out = tmp_path / "out"
    assert f"import: {out}: no space left" in fails(capsys, "import", str(tmp_path / "hf"), "--out", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- export


def test_export_of_a_lightning_checkpoint(
    trained: tuple[Phase, Path], tokenizer_dir: Path, tmp_path: Path, caplog
) -> None:
    phase, file = trained
    out = tmp_path / "out"
    arguments = ["export", str(file), "--out", str(out), "--max-shard-size", "5KB", "--tokenizer", str(tokenizer_dir)]
    assert main(arguments) == 0
    assert_weights(out, phase.model)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert "teacher." in caplog.text or "score_head" in caplog.text  # what is left out is said
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>") < 320


def test_export_of_a_run_folder_takes_the_newest_checkpoint(
    trained: tuple[Phase, Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    phase, file = trained
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    content = torch.load(file, weights_only=False)
    old = {**content, "state_dict": {name: value * 0 for name, value in content["state_dict"].items()}}
    torch.save(content, run / "checkpoints" / "epoch=0-step=20.ckpt")
    torch.save(old, run / "checkpoints" / "epoch=0-step=3.ckpt")
    save_hf(Qwen3(CONFIG), CONFIG, run / "hf", tokenizer_dir=tokenizer_dir)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert_weights(tmp_path / "out", phase.model)
    assert (tmp_path / "out" / "tokenizer.json").is_file(), "the run's own tokenizer goes along"


def test_export_of_a_finished_run_without_checkpoints(tmp_path: Path) -> None:
    model = Qwen3(CONFIG)
    save_hf(model, CONFIG, tmp_path / "run" / "hf")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "v5"]) == 0
    assert_weights(tmp_path / "out", model)


def test_export_of_a_hugging_face_folder_changes_layout_and_type(tmp_path: Path) -> None:
    model = Qwen3(CONFIG)
    save_hf(model, CONFIG, tmp_path / "hf")
    arguments = ["--out", str(tmp_path / "out"), "--layout", "v5", "--dtype", "bf16"]
    assert main(["export", str(tmp_path / "hf"), *arguments]) == 0
    assert_weights(tmp_path / "out", model.bfloat16())
    assert "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("where", ["inside", "recipe", "argument"])
def test_export_of_a_distributed_checkpoint(where: str, trained: tuple[Phase, Path], tmp_path: Path, capsys) -> None:
    phase, _ = trained
    folder = tmp_path / "run" / "checkpoints" / "epoch=0-step=7.ckpt"
    state = phase.state_dict()
    state = {name.replace("model.layers.0.", "model.layers.0._orig_mod."): value for name, value in state.items()}
    optimizer = {"state": {"model.norm.weight": {"exp_avg": torch.ones(16)}}}
    dcp.save({"state_dict": state, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    values = dataclasses.asdict(CONFIG)
    rest = {"phase": {"config": values}} if where == "inside" else {"epoch": 0}
    torch.save(rest, folder / "meta.pt")
    arguments = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    if where != "inside":
        assert "--config" in fails(capsys, *arguments)
    if where == "recipe":
        recipe = {"model": {"class_path": "PretrainModule", "init_args": {"config": values}}}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(recipe))
    if where == "argument":
        save_hf(Qwen3(CONFIG), CONFIG, tmp_path / "other")
        arguments += ["--config", str(tmp_path / "other")]
    assert main(arguments) == 0
    assert_weights(tmp_path / "out", phase.model)


def test_export_runs_no_code_of_the_checkpoint(tmp_path: Path, capsys) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    state = {f"model.{name}": value for name, value in Qwen3(CONFIG).state_dict().items()}
    config = dataclasses.asdict(CONFIG)
    content = {"state_dict": state, "hyper_parameters": {"config": config, "x": Bomb()}, "callbacks": [Bomb()]}
    torch.save(content, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "ran").exists()
    assert read_hf_config(tmp_path / "out") == CONFIG


def test_export_refuses_in_one_line(trained: tuple[Phase, Path], tmp_path: Path, capsys) -> None:
    _, file = trained
    out = ["--out", str(tmp_path / "out")]
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(file.read_bytes()[:20_000])
    assert "truncated" in fails(capsys, "export", str(cut), *out)
    torch.save({"state_dict": {"backbone.weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    assert "no embed_tokens.weight" in fails(capsys, "export", str(tmp_path / "other.ckpt"), *out)
    assert "no such file" in fails(capsys, "export", str(tmp_path / "nowhere"), *out)
    (tmp_path / "empty").mkdir()
    assert "neither a run folder" in fails(capsys, "export", str(tmp_path / "empty"), *out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "__0_0.distcp").write_bytes(b"x")
    assert ".metadata is missing" in fails(capsys, "export", str(tmp_path / "half"), *out)
    (tmp_path / "half" / ".metadata").write_bytes(b"x")
    assert "damaged" in fails(capsys, "export", str(tmp_path / "half"), *out)
    assert "--dtype" in fails(capsys, "export", str(file), *out, "--dtype", "int4")
    assert "--max-shard-size" in fails(capsys, "export", str(file), *out, "--max-shard-size", "lots")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 KiB", 1536), ("77", 77), ("1gib", 2**30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5 apples", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)
