"""The walls of a phase: exact token normalisation, dimension checks, hand-over, and a reward model that learns."""

import logging
from pathlib import Path

import lightning as L
import pytest
import torch

from qwen3_lit.data.batch import PreferenceBatch
from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.data.tokenizer import train_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.losses.load_balance import AuxFreeBias, GlobalBatchBalance
from qwen3_lit.model.config import DualChunkConfig, ModelConfig
from qwen3_lit.model.hf_checkpoint import read_hf_config
from qwen3_lit.modules.cold_start_sft import ColdStartSFTModule
from qwen3_lit.modules.distill import DistillModule
from qwen3_lit.modules.pretrain import PretrainModule
from qwen3_lit.modules.reward_model import RewardModule
from qwen3_lit.optim.param_groups import OptimizerConfig
from qwen3_lit.optim.schedule import ScheduleConfig


class Rows(TextDataModule):
    """Given rows, in order, for ever."""

    def __init__(self, tokenizer_path, rows):
        super().__init__(tokenizer_path, batch_tokens=64, prefetch_batches=0)
        self.rows = rows

    def load_data(self):
        pass

    def make_batch(self, index):
        return self.rows[index % len(self.rows)]

    def num_val_batches(self):
        return len(self.rows)

    make_val_batch = make_batch


def config(**changes):
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 8}
    return ModelConfig(**{**sizes, "num_experts_per_tok": 2, **changes})


def document(length, trained, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, 280, (length,), generator=generator).tolist()
    return Document(ids, [False] * (length - trained) + [True] * trained)


def trainer(folder, **options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


class Recording(ColdStartSFTModule):
    """Keeps the gradients that the optimizer sees."""

    def clip_gradients_and_log(self, optimizer):
        self.seen = {name: p.grad.clone() for name, p in self.named_parameters()}


@pytest.mark.parametrize("num_experts", [0, 8])
def test_accumulated_unequal_rows_give_the_gradient_of_one_row(tmp_path, tokenizer_folder, num_experts):
    documents = [document(20, 15, 0), document(12, 2, 1), document(9, 1, 2)]
    whole, parts = [pack_row(documents)], [pack_row(documents[:1]), pack_row(documents[1:])]
    gradients = []
    for rows in (whole, parts):
        torch.manual_seed(0)
        module = Recording(config=config(num_experts=num_experts), balance=GlobalBatchBalance(0.0))
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=len(rows)).fit(module, Rows(tokenizer_folder, rows))
        gradients.append(module.seen)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_the_balance_counts_span_the_accumulated_rows_and_no_more(tmp_path, tokenizer_folder):
    rows = [pack_row([document(20, 15, 0)]), pack_row([document(12, 2, 1)])]
    totals = []

    class Watching(GlobalBatchBalance):
        def loss(self, stats, num_tokens_total=None):
            value = super().loss(stats, num_tokens_total)
            totals.append(int(self._counts_LE.sum()))
            return value

    module = ColdStartSFTModule(config=config(), balance=Watching(0.01), activation_checkpointing=True)
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(module, Rows(tokenizer_folder, rows))
    per_token = 2 * 2  # two layers, top 2
    assert totals == [20 * per_token, 32 * per_token] * 2


def test_aux_free_balancing_moves_the_bias_of_every_router(tmp_path, tokenizer_folder):
    module = ColdStartSFTModule(config=config(), balance=AuxFreeBias(rate=0.5))
    trainer(tmp_path, max_steps=1).fit(module, Rows(tokenizer_folder, [pack_row([document(30, 20, 0)])]))
    biases = [b for name, b in module.model.named_buffers() if name.endswith("expert_bias_E")]
    assert len(biases) == 2
    assert all(set(b.tolist()) <= {-0.5, 0.0, 0.5} and b.abs().sum() > 0 for b in biases)


def test_init_from_refuses_other_dimensions_and_takes_other_positions(tmp_path, tokenizer_folder):
    rows = Rows(tokenizer_folder, [pack_row([document(20, 15, 0)])])
    first = PretrainModule(config=config(rope_theta=1e4))
    trainer(tmp_path, max_steps=1).fit(first, rows)
    first.export(tmp_path / "hf")
    with pytest.raises(UserError, match="hidden_size: seen 32, expected 16"):
        PretrainModule(config=config(hidden_size=32), init_from=str(tmp_path / "hf"))
    wanted = config(rope_theta=1e6, max_position_embeddings=77, dual_chunk=DualChunkConfig(8, 2))
    second = PretrainModule(config=wanted, init_from=str(tmp_path / "hf"))
    second.configure_model()
    for name, parameter in first.model.named_parameters():
        assert torch.equal(second.model.get_parameter(name), parameter)
    assert second.model.config.rope_theta == 1e6 and second.model.rope.dual_chunk == DualChunkConfig(8, 2)
    assert read_hf_config(tmp_path / "hf").rope_theta == 1e4


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_folder):
    module = PretrainModule(config=config(vocab_size=100))
    with pytest.raises(UserError, match="the model has vocab_size 100"):
        trainer(tmp_path, max_steps=1).fit(module, Rows(tokenizer_folder, [pack_row([document(9, 5, 0)])]))


def test_a_warmup_as_long_as_the_phase_is_refused_before_it_trains(tmp_path, tokenizer_folder):
    rows = Rows(tokenizer_folder, [pack_row([document(9, 5, 0)])])
    module = PretrainModule(config=config(), schedule=ScheduleConfig(kind="cosine", warmup_steps=3))
    with pytest.raises(UserError, match="schedule.warmup_steps: got 3, expected fewer than the 2 .*trainer.max_steps"):
        trainer(tmp_path, max_steps=2).fit(module, rows)
    assert module.global_step == 0 and module.counters.tokens == 0


def test_another_tokenizer_of_the_same_size_than_that_of_init_from_or_of_the_teacher_is_refused(
    tmp_path, tokenizer_folder
):
    row = [pack_row([document(9, 5, 0)])]
    first = PretrainModule(config=config())
    trainer(tmp_path, max_steps=1).fit(first, Rows(tokenizer_folder, row))
    folder = str(tmp_path / "hf")
    first.export(folder)
    other = str(tmp_path / "other")
    train_tokenizer(["zebras quickly jump over vexed foxes"] * 20, 290, other)
    taught = {"on_policy": True, "teacher": folder}
    for module in (PretrainModule(config=config(), init_from=folder), DistillModule(config=config(), **taught)):
        with pytest.raises(UserError, match=f"{other}: not the tokenizer of the weights in {folder}: id 256 is"):
            trainer(tmp_path, max_steps=1).fit(module, Rows(other, row))


def test_the_reward_model_learns_which_answer_is_better(tmp_path, tokenizer_folder):
    pairs = []
    for seed in range(8):
        good, bad = document(8, 4, seed), document(8, 4, seed + 100)
        good.token_ids[-2], bad.token_ids[-2] = 41, 42
        pairs += [good, bad]
    packed = pack_row(pairs)
    ends = packed.cu_seqlens[1:17].long() - 1
    rows = Rows(tokenizer_folder, [PreferenceBatch(packed, ends[0::2], ends[1::2])])
    module = RewardModule(config=config(), optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0))
    trainer(tmp_path, max_steps=40).fit(module, rows)
    assert module.evaluate() == {"pair_accuracy": 1.0}
    module.export(tmp_path / "hf")
    assert (Path(tmp_path) / "hf" / "score_head.safetensors").is_file()


def test_counters_count_tokens_of_training_alone(tmp_path, tokenizer_folder, caplog):
    logging.getLogger("lightning").setLevel(logging.ERROR)
    module = PretrainModule(config=config())
    trainer(tmp_path, max_steps=3).fit(module, Rows(tokenizer_folder, [pack_row([document(20, 15, 0)])]))
    assert module.counters.tokens == 60
    assert module.counters.flops > 60 * 6 * 16 * 300  # at least the head
