"""Small data from the real verbs, small weights, and what a user sets to run a recipe on them; once per session."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen3_lit.cli.main import main
from qwen3_lit.cli.recipe_files import header, recipes_folder
from qwen3_lit.data.chat_template import prompt_ids
from qwen3_lit.data.tokenizer import load_tokenizer
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.hf_checkpoint import save_hf
from qwen3_lit.model.transformer import Qwen3

FOLDER = recipes_folder()
VERDICT = "Score: 7"


def run(*argv: str) -> None:
    """One verb, in this process."""
    assert main(list(argv)) == 0, argv


@dataclass(frozen=True)
class Small:
    """A tokenizer, a corpus, problems and conversations, and weights to start from."""

    root: Path

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)

    def arguments(self, recipe: str, folder: Path, overlay: str = "debug/smoke", **more: Any) -> list[str]:
        """``fit`` with the recipe at laptop size on the small data, an overlay, and ``more`` settings."""
        settings = self.settings(recipe) | {"trainer.default_root_dir": str(folder), **more}
        typed = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        return ["fit", "-c", recipe, "-c", "size/nano", "-c", "hardware/cpu", "-c", overlay, *typed]

    def settings(self, recipe: str) -> dict[str, Any]:
        """What a user sets to run the recipe on the small data."""
        content = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
        module, data = content["model"]["class_path"], content["data"]["class_path"]
        assert module in header(FOLDER / f"{recipe}.yaml")["module"]
        model = content["model"]["init_args"]
        values: dict[str, Any] = {
            "data.init_args.tokenizer_path": self / "tokenizer",
            "model.init_args.config.max_position_embeddings": 1024,
            "model.init_args.schedule.warmup_steps": 0,
        }
        if "init_from" in model:
            values["model.init_args.init_from"] = self / "hf"
        if "teacher" in model:
            values["model.init_args.teacher"] = self / "teacher"
        if data == "PretrainData":
            values |= {
                "data.init_args.sources": [{"path": self / "corpus"}],
                "data.init_args.sequence_length": 256,
                "data.init_args.batch_tokens": 512,
                "data.init_args.val_tokens": 512,
                "data.init_args.val_min_tokens": 0,
                "trainer.accumulate_grad_batches": 2,
                "trainer.val_check_interval": 2,
            }
            if "length_mix" in content["data"]["init_args"]:
                values["data.init_args.length_mix"] = [{"min_tokens": 0, "max_tokens": None, "fraction": 1.0}]
                values["model.init_args.extrapolation_chunks"] = {"chunk_size": 64, "local_size": 16}
        elif data == "PromptData":
            values["data.init_args.prompts_per_step"] = 2
        else:
            values["data.init_args.batch_tokens"] = 1024
        if data == "ConversationData":
            values["data.init_args.paths"] = [self / "thinking.jsonl"]
        if data == "FusionData":
            values["data.init_args.thinking_paths"] = [self / "thinking.jsonl"]
            values["data.init_args.non_thinking_paths"] = [self / "dialogs.jsonl"]
        if data == "PreferenceData":
            values["data.init_args.paths"] = [self / "preferences.jsonl"]
        if data == "PromptData":
            values["data.init_args.paths"] = [self / ("general.jsonl" if recipe.startswith("7") else "train.jsonl")]
            values["data.init_args.held_out_path"] = self / "held_out.jsonl"
            values["model.init_args.sampling"] = {"max_new_tokens": 8}
            values["model.init_args.engine"] = {"max_batch_size": 16, "max_cached_tokens": 16384}
        if "group_size" in model:
            values["model.init_args.group_size"] = 2
            values["model.init_args.num_minibatches"] = 1
        if "samples_per_prompt" in model:
            values["model.init_args.samples_per_prompt"] = 2
        if "reward_workers" in model:
            values["model.init_args.reward_workers"] = {"num_workers": 1, "deadline_seconds": 60.0}
        if "evaluation" in model:
            values["model.init_args.evaluation"] = {
                "problems": [self / "held_out.jsonl"],
                "limit": 2,
                "sampling": {"max_new_tokens": 8},
            }
            if "sampling_no_think" in model["evaluation"]:
                values["model.init_args.evaluation"]["sampling_no_think"] = {"max_new_tokens": 8}
        folders = {"JudgeReward": self.judge, "RewardModelReward": self.reward_model}
        rewards = model.get("rewards", [])
        for reward in rewards:
            if reward["class_path"] in folders:
                reward["init_args"]["path"] = folders[reward["class_path"]]()
                values["model.init_args.rewards"] = rewards
        return values

    def reward_model(self) -> str:
        """A reward model's folder, from two steps of its recipe."""
        folder = self.root / "reward_model"
        if not folder.is_dir():
            run(*self.arguments("reward_model", folder))
        return str(folder / "hf")

    def judge(self) -> str:
        """A judge whose every verdict is VERDICT: what follows a token depends on that token alone."""
        folder = self.root / "judge"
        if folder.is_dir():
            return str(folder)
        tokenizer = load_tokenizer(self / "tokenizer")
        asked = prompt_ids(tokenizer, [{"role": "user", "content": "?"}], enable_thinking=False)
        chain = [asked[-1], *tokenizer.encode(VERDICT), tokenizer.im_end_id]
        assert len(set(chain)) == len(chain), f"{chain}: a token that comes twice has no single successor"
        config = ModelConfig(
            vocab_size=384,
            hidden_size=128,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=8,
            num_experts=0,
        )
        model = Qwen3(config)
        with torch.no_grad():
            model.layers[0].self_attn.o_proj.weight.zero_()
            model.layers[0].mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            for token, successor in zip(chain[:-1], chain[1:], strict=True):
                model.lm_head.weight[successor] = model.embed_tokens.weight[token]
        save_hf(model, config, str(folder), tokenizer_dir=self / "tokenizer")
        return str(folder)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The data and weights of this session."""
    made = Small(tmp_path_factory.mktemp("small"))
    (made.root / "text").mkdir()
    library = Path(os.__file__).parent
    for name in ("argparse", "tarfile", "typing", "inspect"):
        shutil.copyfile(library / f"{name}.py", made.root / "text" / f"{name}.py")
    run("data", "tokenizer", made / "text", "--out", made / "tokenizer", "--vocab-size", "384")
    run(
        *("data", "prepare", made / "text", "--tokenizer", made / "tokenizer", "--out", made / "corpus"),
        *("--max-tokens", "2048", "--held-out-fraction", "0.2", "--workers", "1"),
    )
    tasks = ("--tasks", "chain_sum", "--option", "style=short")
    synthesize = ("data", "synthesize")
    run(*synthesize, "problems", "--out", made / "train.jsonl", "--count", "40", *tasks)
    run(*synthesize, "problems", "--out", made / "held_out.jsonl", "--count", "4", "--split", "held_out", *tasks)
    run(*synthesize, "reasoning_candidates", "--out", made / "candidates.jsonl", "--count", "60", *tasks)
    run("data", "curate", made / "candidates.jsonl", "--out", made / "thinking.jsonl")
    run(*synthesize, "dialogs", "--out", made / "dialogs.jsonl", "--count", "60")
    run(*synthesize, "general_problems", "--out", made / "general.jsonl", "--count", "120")
    run(*synthesize, "preferences", "--out", made / "preferences.jsonl", "--count", "60")
    config = ModelConfig(**yaml.safe_load((FOLDER / "size/nano.yaml").read_text())["model"]["init_args"]["config"])
    for seed, name in enumerate(("hf", "teacher")):
        torch.manual_seed(seed)
        save_hf(Qwen3(config), config, made / name, tokenizer_dir=made / "tokenizer")
    return made
