"""Documents that share a row share nothing else: through the whole model, bit for bit, forward and backward.

One thing is held for that in a mixture of experts: where the tokens of the changed document go. A CPU's matrix product
rounds differently for another number of rows, so an expert that got one row more gives every row other last bits.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from qwen3_kernels import linear_cross_entropy
from torch import Tensor

from qwen3_lit.data.packing import Document, pack_row
from qwen3_lit.losses.language_model import IGNORE_INDEX
from qwen3_lit.model.config import DualChunkConfig, ModelConfig, YarnConfig
from qwen3_lit.model.transformer import Qwen3

FIRST, SECOND, THIRD, ROW = 23, 41, 7, 80
INSIDE = slice(FIRST, FIRST + SECOND)
YARN = {"rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=16)}
CHUNKS = {"dual_chunk": DualChunkConfig(chunk_size=16, local_size=4)}
POSITIONS = {"plain": {}, "yarn": YARN, "dual_chunk": CHUNKS, "yarn_dual_chunk": YARN | CHUNKS}
every_model = pytest.mark.parametrize(
    ("positions", "num_experts"), [(name, experts) for name in POSITIONS for experts in (0, 8)]
)


def build(positions: str, num_experts: int) -> Qwen3:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        initializer_range=0.2,  # attention far from uniform: a leak would move every figure
        **POSITIONS[positions],
    )
    return Qwen3(config)


def document(length: int, seed: int) -> Document:
    rng = random.Random(seed)
    return Document([rng.randrange(64) for _ in range(length)])


def changed(original: Document, place: int) -> Document:
    ids = list(original.token_ids)
    ids[place] = (ids[place] + 1) % 64
    return Document(ids)


@dataclass
class Run:
    """A packed row after the model: its embeddings, hidden states, experts, and the loss of every token."""

    embedded_TD: Tensor
    hidden_TD: Tensor
    expert_ids_LTK: Tensor | None
    nll_T: Tensor


def run(model: Qwen3, documents: list[Document], *, experts_of: Run | None = None, trained: slice = slice(None)) -> Run:
    """Padded to ROW tokens; ``trained`` are the places whose loss is summed for a backward pass."""
    row = pack_row(documents, batch_tokens=ROW, pad_rows=True)
    embedded: list[Tensor] = []
    hook = model.embed_tokens.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    output = model(
        row.token_ids_T,
        row.position_ids_T,
        row.cu_seqlens,
        row.max_seqlen,
        token_mask_T=row.token_mask_T,
        replay_expert_ids_LTK=None if experts_of is None else experts_of.expert_ids_LTK,
        record_routing=True,
    )
    hook.remove()
    target_ids_T = torch.full_like(row.target_ids_T, IGNORE_INDEX)
    target_ids_T[trained] = row.target_ids_T[trained]
    result = linear_cross_entropy(output.hidden_TD, model.lm_head_weight, target_ids_T, ignore_index=IGNORE_INDEX)
    if torch.is_grad_enabled():
        embedded[0].retain_grad()
        result.loss.backward()
    routing = output.routing
    return Run(embedded[0], output.hidden_TD, None if routing is None else routing.expert_ids_LTK, result.nll_T)


@every_model
@pytest.mark.parametrize("place", [0, FIRST // 2, FIRST - 1])
def test_a_changed_token_stays_in_its_document(positions: str, num_experts: int, place: int) -> None:
    model = build(positions, num_experts)
    first, second, third = document(FIRST, 0), document(SECOND, 1), document(THIRD, 2)
    others = changed(first, place)
    with torch.no_grad():
        before = run(model, [first, second, third])
        after = run(model, [others, second, third], experts_of=before)
        free = run(model, [others, second, third])
    assert torch.equal(before.hidden_TD[FIRST:], after.hidden_TD[FIRST:])
    assert torch.equal(before.nll_T[FIRST:], after.nll_T[FIRST:])
    assert torch.equal(before.hidden_TD[:place], after.hidden_TD[:place]), "the past does not see the future"
    assert (before.hidden_TD != after.hidden_TD)[place:FIRST].any(-1).all(), "all that follows sees the change"
    if num_experts:
        assert not torch.equal(before.expert_ids_LTK[:, :FIRST], free.expert_ids_LTK[:, :FIRST])
        assert torch.equal(before.expert_ids_LTK[:, FIRST:], free.expert_ids_LTK[:, FIRST:])
    torch.testing.assert_close(free.hidden_TD[FIRST:], before.hidden_TD[FIRST:], rtol=1e-4, atol=2e-5)


@every_model
def test_a_changed_token_leaves_the_documents_before_it(positions: str, num_experts: int) -> None:
    model = build(positions, num_experts)
    first, second = document(FIRST, 0), document(SECOND, 1)
    with torch.no_grad():
        before = run(model, [first, second])
        after = run(model, [first, changed(second, 0)], experts_of=before)
    assert torch.equal(before.hidden_TD[:FIRST], after.hidden_TD[:FIRST])
    assert torch.equal(before.nll_T[:FIRST], after.nll_T[:FIRST])
    assert (before.hidden_TD != after.hidden_TD)[INSIDE].any(-1).all()


@every_model
def test_the_loss_of_a_document_has_no_gradient_in_another(positions: str, num_experts: int) -> None:
    model = build(positions, num_experts)
    done = run(model, [document(FIRST, 0), document(SECOND, 1), document(THIRD, 2)], trained=INSIDE)
    gradient_TD = done.embedded_TD.grad
    outside_T = torch.ones(ROW, dtype=torch.bool)
    outside_T[INSIDE] = False
    assert (gradient_TD[outside_T] == 0).all()
    assert (gradient_TD[INSIDE][:-1] != 0).any(-1).all() and (gradient_TD[INSIDE][-1] == 0).all()


@every_model
def test_positions_restart(positions: str, num_experts: int) -> None:
    """A document is what it is at the start of a row, behind whatever number of tokens. Queries and keys rotate in
    another batch of rows then, and experts get other numbers of rows, so this is to rounding."""
    model = build(positions, num_experts)
    second = document(SECOND, 1)
    with torch.no_grad():
        alone = run(model, [second])
        for length in (1, 11, FIRST):
            behind = run(model, [document(length, 0), second])
            inside = slice(length, length + SECOND)
            torch.testing.assert_close(behind.hidden_TD[inside], alone.hidden_TD[:SECOND], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(behind.nll_T[inside], alone.nll_T[:SECOND], rtol=1e-4, atol=2e-5)
        if "dual_chunk" in POSITIONS[positions]:
            # Rotary positions are relative, so only the borders of chunks show where a document is thought to begin.
            row = pack_row([second])
            late = model(row.token_ids_T, row.position_ids_T + 5, row.cu_seqlens, row.max_seqlen)
            assert (late.hidden_TD - alone.hidden_TD[:SECOND]).abs().max() > 1e-2
