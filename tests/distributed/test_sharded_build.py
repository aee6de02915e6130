"""A sharded model has the weights that one process would give it, without ever being whole in any."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import save_hf
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.transformer import Qwen3

SCRIPT = Path(__file__).with_name("build_rank.py")
CONFIG = ModelConfig(
    vocab_size=33,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    mlp_only_layers=[1],
)


def build(world_size: int, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment = {**os.environ, "MASTER_PORT": str(probe.getsockname()[1])}
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = range(max(1, world_size))
    command = [sys.executable, str(SCRIPT)]
    processes = [subprocess.Popen([*command, str(r), str(world_size), str(folder)], **options) for r in ranks]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"built_{world_size}_{r}.pt") for r in ranks]


@pytest.mark.slow
def test_one_rank_two_ranks_and_one_plain_process_build_the_same_model(tmp_path: Path) -> None:
    save_hf(Qwen3(CONFIG), CONFIG, tmp_path / "hf")
    (plain,) = build(0, tmp_path)
    for built in (*build(1, tmp_path), *build(2, tmp_path)):
        for way, expected in plain.items():
            assert built[way]["tensors"].keys() == expected["tensors"].keys()
            for name, value in expected["tensors"].items():
                assert torch.equal(built[way]["tensors"][name], value), f"{way}: {name}"
            assert built[way]["next"] == expected["next"], f"{way}: the random stream goes on elsewhere"


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_model_draws_what_a_whole_one_draws_and_holds_no_parameter(tied: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    torch.manual_seed(3)
    whole, after = Qwen3(config), torch.rand(())
    torch.manual_seed(3)
    empty = Qwen3(config, empty=True)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not empty.rope.inv_freq_R.is_meta
    empty.to_empty(device="cpu")
    init_weights(empty)
    assert torch.equal(torch.rand(()), after)
    for name, parameter in whole.named_parameters():
        assert torch.equal(empty.get_parameter(name), parameter), name
