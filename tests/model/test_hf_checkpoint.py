"""Hugging Face folders: both layouts bit for bit, files that old and new transformers read, and every refusal."""

import dataclasses
import datetime as dt
import hashlib
import json
import os
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from qwen3_lit.data.tokenizer import train_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.model import folder_swap
from qwen3_lit.model.config import DualChunkConfig, ModelConfig, YarnConfig
from qwen3_lit.model.hf_checkpoint import load_hf, load_hf_weights, read_hf_config, save_hf
from qwen3_lit.model.hf_config import hf_config_dict
from qwen3_lit.model.hf_weights import HfWeights, LazyWeights
from qwen3_lit.model.transformer import Qwen3

MOE = ModelConfig(
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
    mlp_only_layers=[0],
    rope_theta=12345.0,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
)
DENSE = dataclasses.replace(
    MOE, num_experts=0, num_experts_per_tok=8, moe_intermediate_size=768, mlp_only_layers=[], tie_word_embeddings=True
)
LONG = dataclasses.replace(
    MOE,
    rope_scaling=YarnConfig(4.0, 64, attention_factor=1.25, truncate=False),
    dual_chunk=DualChunkConfig(48, 8),
    max_position_embeddings=256,
)
CONFIGS = {"moe": MOE, "dense": DENSE, "long": LONG}


def model_of(config: ModelConfig) -> Qwen3:
    torch.manual_seed(5)
    model = Qwen3(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; ``...`` removes one."""
    content = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    (folder / "config.json").write_text(json.dumps(content))


def assert_same_weights(a: Qwen3, b: Qwen3) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def f(x): return x + 1\n", "the quick brown fox"] * 20, 290, folder)
    return folder


# ---- round trips


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("shard", [10**9, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_of_export_is_bit_identical(
    name: str, layout: str, shard: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    model = model_of(config).to(dtype)
    save_hf(model, config, tmp_path / "a", layout=layout, max_shard_bytes=shard)
    again = load_hf(tmp_path / "a")
    assert again.config == config
    assert_same_weights(model, again)
    assert torch.equal(again.rope.inv_freq_R, Qwen3(config).rope.inv_freq_R)  # float32 whatever the weights are
    save_hf(again, again.config, tmp_path / "b", layout=layout, max_shard_bytes=shard)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1 or shard == 4000


def test_layouts_convert_into_each_other_without_a_model(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "v4", layout="v4")
    save_hf(HfWeights(tmp_path / "v4"), MOE, tmp_path / "v5", layout="v5")
    save_hf(HfWeights(tmp_path / "v5"), MOE, tmp_path / "back", layout="v4")
    v4, v5 = load_file(tmp_path / "v4/model.safetensors"), load_file(tmp_path / "v5/model.safetensors")
    fused = v5["model.layers.1.mlp.experts.gate_up_proj"]
    assert fused.shape == (4, 16, 16)
    assert torch.equal(fused[3, :8], v4["model.layers.1.mlp.experts.3.gate_proj.weight"])
    assert torch.equal(fused[3, 8:], v4["model.layers.1.mlp.experts.3.up_proj.weight"])
    down = v4["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert torch.equal(v5["model.layers.1.mlp.experts.down_proj"][2], down)
    assert not any("experts.gate_up" in key for key in v4) and not any("experts.0." in key for key in v5)
    assert digest(tmp_path / "v4") == digest(tmp_path / "back")


def test_tied_models_store_no_head(tmp_path: Path) -> None:
    save_hf(model_of(DENSE), DENSE, tmp_path / "a")
    assert "lm_head.weight" not in load_file(tmp_path / "a/model.safetensors")
    save_hf(model_of(MOE), MOE, tmp_path / "b")
    assert "lm_head.weight" in load_file(tmp_path / "b/model.safetensors")


def test_files_stay_below_the_limit_and_the_index_is_right(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a", max_shard_bytes=4000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    seen: dict[str, str] = {}
    total = 0
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        tensors = load_file(file)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        seen |= dict.fromkeys(tensors, file.name)
        total += size
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["weight_map"] == seen
    assert index["metadata"]["total_size"] == total
    assert not (tmp_path / "a/model.safetensors").exists()


def test_dtype_is_cast_on_export_and_on_load(tmp_path: Path) -> None:
    model = model_of(MOE)
    save_hf(model, MOE, tmp_path / "a", dtype=torch.bfloat16)
    raw = json.loads((tmp_path / "a/config.json").read_text())
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"
    loaded = load_hf(tmp_path / "a", dtype=torch.float32)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, model.get_parameter(name).bfloat16().float())
    assert load_hf(tmp_path / "a").norm.weight.dtype == torch.bfloat16


def test_loaded_weights_do_not_follow_the_file(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    loaded = load_hf(tmp_path / "a")
    before = {name: p.detach().clone() for name, p in loaded.named_parameters()}
    with (tmp_path / "a/model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    assert all(torch.equal(before[name], p) for name, p in loaded.named_parameters())


def test_overrides_win_over_the_folder(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    model = load_hf(tmp_path / "a", overrides={"rope_theta": 1e6, "rope_scaling": yarn, "max_position_embeddings": 256})
    assert model.config.rope_scaling == YarnConfig(4.0, 64)
    assert model.config.rope_theta == 1e6
    assert torch.equal(model.rope.inv_freq_R, Qwen3(model.config).rope.inv_freq_R)
    with pytest.raises(UserError, match="rope_base"):
        load_hf(tmp_path / "a", overrides={"rope_base": 1e6})


def test_weights_load_into_an_existing_model_of_another_type(tmp_path: Path) -> None:
    model = model_of(MOE)
    save_hf(model, MOE, tmp_path / "a")
    target = Qwen3(MOE).bfloat16()
    load_hf_weights(target, tmp_path / "a")
    assert_same_weights(target, model.bfloat16())


class OneAtATime(LazyWeights):
    """Weights that exist while somebody holds them; fails when two are held."""

    def __init__(self, model: Qwen3) -> None:
        self.state = model.state_dict()
        self.latest: weakref.ref[torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        assert self.latest is None or self.latest() is None, "the parameter before is still held"
        fresh = self.state[name].clone()
        self.latest = weakref.ref(fresh)
        return fresh

    def dtype_of(self, name: str) -> torch.dtype:
        return self.state[name].dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_writing_holds_one_parameter_at_a_time(layout: str, tmp_path: Path) -> None:
    save_hf(OneAtATime(model_of(MOE)), MOE, tmp_path / "a", layout=layout, max_shard_bytes=4000)
    assert_same_weights(load_hf(tmp_path / "a"), model_of(MOE))


# ---- transformers, old and new


def test_config_states_both_spellings() -> None:
    raw = hf_config_dict(LONG, "bfloat16")
    assert raw["num_experts"] == raw["num_local_experts"] == 4
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 12345.0
    assert raw["rope_scaling"]["rope_type"] == raw["rope_parameters"]["rope_type"] == "yarn"
    assert raw["rope_scaling"]["factor"] == raw["rope_parameters"]["factor"] == 4.0
    assert raw["head_dim"] == 6 and raw["norm_topk_prob"] is True
    assert raw["architectures"] == ["Qwen3MoeForCausalLM"] and raw["model_type"] == "qwen3_moe"
    assert raw["dual_chunk_attention_config"] == {"chunk_size": 48, "local_size": 8}
    assert hf_config_dict(DENSE)["architectures"] == ["Qwen3ForCausalLM"]
    assert "num_experts" not in hf_config_dict(DENSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_our_config_without_a_warning(name: str, tmp_path: Path, caplog) -> None:
    config = CONFIGS[name]
    save_hf(model_of(config), config, tmp_path / "a")
    with caplog.at_level("WARNING"):
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert not [record for record in caplog.records if "rope" in record.getMessage().lower()]
    assert theirs.head_dim == config.head_dim
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if config.rope_scaling else "default")
    assert theirs.dtype == torch.float32
    assert theirs.tie_word_embeddings is config.tie_word_embeddings
    if config.num_experts:
        assert theirs.num_experts == 4 and theirs.norm_topk_prob is True and theirs.mlp_only_layers == [0]


@pytest.mark.parametrize("drop", [("rope_parameters", "num_local_experts", "dtype"), ("rope_theta", "rope_scaling")])
def test_a_config_in_one_spelling_alone_reads_the_same(drop: tuple[str, ...], tmp_path: Path) -> None:
    save_hf(model_of(LONG), LONG, tmp_path / "a")
    edit(tmp_path / "a", **dict.fromkeys(drop, ...))
    assert read_hf_config(tmp_path / "a") == LONG


def test_yarn_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    edit(tmp_path / "a", rope_parameters=..., max_position_embeddings=512)
    edit(tmp_path / "a", rope_scaling={"type": "yarn", "original_max_position_embeddings": 64})
    assert read_hf_config(tmp_path / "a").rope_scaling == YarnConfig(8.0, 64)
    mscale = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    mscale |= {"mscale": 2.0, "mscale_all_dim": 0.5}
    edit(tmp_path / "a", rope_scaling=mscale)
    found = read_hf_config(tmp_path / "a").rope_scaling
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    _, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert found is not None and found.attention_factor == pytest.approx(factor)


def test_max_position_embeddings_follows_yarn(tmp_path: Path) -> None:
    config = dataclasses.replace(MOE, rope_scaling=YarnConfig(4.0, 64), max_position_embeddings=80)
    save_hf(model_of(config), config, tmp_path / "a")
    assert read_hf_config(tmp_path / "a").max_position_embeddings == 256


def test_missing_head_dim_follows_transformers(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    edit(tmp_path / "a", head_dim=...)
    assert read_hf_config(tmp_path / "a").head_dim == 16 // 4
    edit(tmp_path / "a", model_type="qwen3")
    assert read_hf_config(tmp_path / "a").head_dim == 128


# ---- companions


def test_tokenizer_template_and_generation_defaults_go_along(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a", tokenizer_dir=tokenizer_dir, model_card="# A model\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    source = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    text = [{"role": "user", "content": "hi 12"}]
    assert tokenizer.apply_chat_template(text, tokenize=False) == source.apply_chat_template(text, tokenize=False)
    assert tokenizer("x + 1 <|im_end|>").input_ids == source("x + 1 <|im_end|>").input_ids
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    end, text_end = (source.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert generation.eos_token_id == [end, text_end]
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.6, 20, 0.95)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert config.eos_token_id == source.eos_token_id
    assert (tmp_path / "a/README.md").read_text() == "# A model\n"
    # The next export from this folder carries the same files.
    save_hf(load_hf(tmp_path / "a"), MOE, tmp_path / "b", tokenizer_dir=tmp_path / "a", model_card="# A model\n")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(MOE, vocab_size=100)
    with pytest.raises(UserError, match=r"does not fit.*100 rows"):
        save_hf(model_of(small), small, tmp_path / "a", tokenizer_dir=tokenizer_dir)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        save_hf(model_of(MOE), MOE, tmp_path / "a", tokenizer_dir=tmp_path)


# ---- atomic writing


def test_an_existing_folder_survives_a_failed_write_and_is_replaced_by_a_good_one(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "a"
    save_hf(model_of(MOE), MOE, target, max_shard_bytes=4000)
    before = digest(target)

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qwen3_lit.model.hf_checkpoint.write_file", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_hf(model_of(DENSE), DENSE, target)
    assert digest(target) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    save_hf(model_of(DENSE), DENSE, target)
    assert read_hf_config(target) == DENSE
    assert [file.name for file in target.glob("*.safetensors")] == ["model.safetensors"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_works_with_and_without_an_exchange(exchange: bool, tmp_path: Path, monkeypatch) -> None:
    if not exchange:
        monkeypatch.setattr(folder_swap, "_exchange", lambda a, b: False)
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    save_hf(model_of(DENSE), DENSE, tmp_path / "a")
    assert read_hf_config(tmp_path / "a") == DENSE
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".a.old")
    assert load_hf(tmp_path / "a").config == MOE
    assert (tmp_path / "a").is_dir()


def test_a_folder_converts_onto_itself(tmp_path: Path) -> None:
    model = model_of(MOE)
    save_hf(model, MOE, tmp_path / "a", layout="v4")
    save_hf(HfWeights(tmp_path / "a"), MOE, tmp_path / "a", layout="v5")
    assert_same_weights(load_hf(tmp_path / "a"), model)
    assert "model.layers.1.mlp.experts.down_proj" in load_file(tmp_path / "a/model.safetensors")


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not replaced"):
        save_hf(model_of(MOE), MOE, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- refusals


def test_exporting_what_is_no_qwen3(tmp_path: Path, caplog) -> None:
    state = model_of(MOE).state_dict()
    with pytest.raises(UserError, match=r"score_head\.weight is unknown"):
        save_hf({**state, "score_head.weight": torch.zeros(1, 16)}, MOE, tmp_path / "a")
    with pytest.raises(UserError, match=r"norm\.weight is missing"):
        save_hf({name: t for name, t in state.items() if name != "norm.weight"}, MOE, tmp_path / "a")
    with pytest.raises(UserError, match=r"norm\.weight: seen shape \[3\]"):
        save_hf({**state, "norm.weight": torch.zeros(3)}, MOE, tmp_path / "a")
    with pytest.raises(UserError, match="layout"):
        save_hf(state, MOE, tmp_path / "a", layout="v6")
    assert not (tmp_path / "a").exists()
    save_hf({**state, "layers.1.mlp.gate.expert_bias_E": torch.ones(4)}, MOE, tmp_path / "a")
    assert "expert biases" in caplog.text


# ---- sharded parameters


def _sharded_model(rank: int, folder: str) -> Qwen3:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    seconds = dt.timedelta(seconds=20)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=seconds)
    mesh = init_device_mesh("cpu", (2,))
    model = Qwen3(MOE)
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    load_hf_weights(model, f"{folder}/a")
    return model


def _sharded_rank(rank: int, folder: str) -> None:
    model = _sharded_model(rank, folder)
    save_hf(model, MOE, f"{folder}/b", max_shard_bytes=4000)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_load_and_save_their_shards(tmp_path: Path) -> None:
    model = model_of(MOE)
    save_hf(model, MOE, tmp_path / "a", max_shard_bytes=4000)
    mp.spawn(_sharded_rank, args=(str(tmp_path),), nprocs=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def _failing_rank(rank: int, folder: str) -> None:
    model = _sharded_model(rank, folder)
    with pytest.raises(UserError, match=r"thesis: holds files"):
        save_hf(model, MOE, f"{folder}/thesis")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        save_hf(model, MOE, f"{folder}/b", tokenizer_dir=f"{folder}/thesis")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:  # the disk of rank 0 is full after the first parameter
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    with pytest.raises(OSError, match="File too large"):
        save_hf(model, MOE, f"{folder}/b")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.path.exists(f"{folder}/b")
    save_hf(model, MOE, f"{folder}/b", max_shard_bytes=4000)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_what_rank_0_fails_at_ends_both_ranks_with_its_error(tmp_path: Path) -> None:
    save_hf(model_of(MOE), MOE, tmp_path / "a", max_shard_bytes=4000)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    mp.spawn(_failing_rank, args=(str(tmp_path),), nprocs=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", "store", "thesis"}
