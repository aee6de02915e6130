"""First launch of the routing: of a tile of tokens the softmax, the k largest, their weights, counts and partial sums.

The choice works on integers. A key holds a score without its last bits and below it the expert, so keys of a token are
distinct, one maximum gives both, and equal scores go to the lower id. Where two keys that must be told apart agree in
the kept bits of the score, the tile is done again by all bits: 1 % of the tiles on random logits, all on equal ones.

Legend: T tokens, E experts, K experts per token; a tile is ``TOKENS`` consecutive tokens.
"""

import triton
import triton.language as tl

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_rows_triton import LN_2, LOG2_E, expert_of_column, load_rows, padded_experts

# A tile holds 4,096 probabilities, 32 a thread: 1,024 tiles at T = 32,768 and E = 128. On an H200 all three launches
# take 29 us so, 36 us with 8 warps.
LAUNCHES = {
    (gpu, experts): Launch({"TOKENS": 4096 // experts}, num_warps=4, num_stages=1)
    for gpu in (80, 90, 100)
    for experts in (128, 256, 512)
}


def padded_slots(top_k: int, select: Launch) -> int:
    """K as a power of two, and a row for every thread, since ``tl.histogram`` may count replicated rows twice."""
    return max(triton.next_power_of_2(top_k), 32 * select.num_warps // select.blocks["TOKENS"])


@triton.jit
def _scores_as_int(exp_TE, inv_sum_T, bias_E, expert_E, num_experts: tl.constexpr):
    """What the choice is made by, as signed integers of the same order."""
    if bias_E is None:
        # The row's sum divides all of them, so exponentials and probabilities have one order; none is negative.
        bits_TE = exp_TE.to(tl.int32, bitcast=True)
    else:
        bias = tl.load(bias_E + expert_E, mask=expert_E < num_experts, other=0.0)
        bits_TE = (exp_TE * inv_sum_T[:, None] + bias[None, :]).to(tl.int32, bitcast=True)
        bits_TE = tl.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    return bits_TE


@triton.jit
def _larger_first(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _sorted_eights(key_TE, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Eight tensors [T, E / 8], falling: lists of eight keys that one thread holds, sorted by Batcher's network."""
    low, high = tl.split(tl.reshape(key_TE, (TOKENS, EXPERTS // 8, 2, 2, 2)))
    p, q = tl.split(low)
    r, s = tl.split(high)
    a, b = tl.split(p)
    c, d = tl.split(q)
    e, f = tl.split(r)
    g, h = tl.split(s)
    a, b = _larger_first(a, b)
    c, d = _larger_first(c, d)
    e, f = _larger_first(e, f)
    g, h = _larger_first(g, h)
    a, c = _larger_first(a, c)
    b, d = _larger_first(b, d)
    e, g = _larger_first(e, g)
    f, h = _larger_first(f, h)
    b, c = _larger_first(b, c)
    f, g = _larger_first(f, g)
    a, e = _larger_first(a, e)
    b, f = _larger_first(b, f)
    c, g = _larger_first(c, g)
    d, h = _larger_first(d, h)
    c, e = _larger_first(c, e)
    d, f = _larger_first(d, f)
    b, c = _larger_first(b, c)
    d, e = _larger_first(d, e)
    f, g = _larger_first(f, g)
    return a, b, c, d, e, f, g, h


@triton.jit
def _select_exactly(
    scores_TE,
    expert_E,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The ids by all bits of the scores: for each slot the largest, then the lowest expert that has it."""
    slot_K = tl.arange(0, SLOTS)
    taken = -0x80000000
    scores_TE = tl.where((expert_E < num_experts)[None, :], scores_TE, taken)
    ids_TK = tl.zeros((TOKENS, SLOTS), tl.int32)
    for k in range(top_k):
        best_T = tl.max(scores_TE, axis=1)
        id_T = tl.min(tl.where(scores_TE == best_T[:, None], expert_E[None, :], EXPERTS - 1), axis=1)
        ids_TK = tl.where(slot_K[None, :] == k, id_T[:, None], ids_TK)
        scores_TE = tl.where(expert_E[None, :] == id_T[:, None], taken, scores_TE)
    return ids_TK


@triton.jit(do_not_specialize=["num_tokens"])
def select_kernel(
    logits_TE,
    bias_E,
    given_ids_TK,
    token_mask_T,
    expert_ids_TK,
    weights_TK,
    lse_out_T,
    tile_counts,
    tile_prob_sums,
    tile_z_sums,
    num_tokens,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tile = tl.program_id(0)
    token_T = tile * TOKENS + tl.arange(0, TOKENS)
    expert_E = expert_of_column(EXPERTS)
    slot_K = tl.arange(0, SLOTS)
    row_T = token_T.to(tl.int64)
    exists_T = token_T < num_tokens
    in_TK = exists_T[:, None] & (slot_K < top_k)[None, :]
    counted_T = exists_T
    if token_mask_T is not None:
        counted_T = tl.load(token_mask_T + token_T, mask=exists_T, other=0) != 0

    logits = load_rows(logits_TE, row_T, exists_T, TOKENS, num_experts, EXPERTS)
    peak_T = tl.where(exists_T, tl.max(logits, axis=1), 0.0) * LOG2_E
    exp_TE = tl.exp2(logits * LOG2_E - peak_T[:, None])
    sum_T = tl.sum(exp_TE, axis=1)
    inv_sum_T = tl.where(exists_T, 1.0 / sum_T, 0.0)
    lse2_T = tl.where(exists_T, peak_T + tl.log2(sum_T), 0.0)
    lse_T = lse2_T * LN_2
    tl.store(lse_out_T + token_T, lse_T, mask=exists_T)
    # A masked token may hold anything, NaN included: it is left out, not multiplied by 0.
    tl.store(tile_z_sums + tile, tl.sum(tl.where(counted_T, lse_T * lse_T, 0.0), axis=0))
    # Summing over tokens wants a thread to hold tokens of one expert: reading the tile again, from the cache, in that
    # layout takes a third of the instructions of sums across threads.
    bin_E = tl.arange(0, EXPERTS)
    inside = counted_T[:, None] & (bin_E < num_experts)[None, :]
    logits = tl.load(logits_TE + row_T[:, None] * num_experts + bin_E[None, :], mask=inside, other=float("-inf"))
    counted_lse2_T = tl.where(counted_T, lse2_T, 0.0)
    prob_E = tl.sum(tl.exp2(logits * LOG2_E - counted_lse2_T[:, None]), axis=0)
    own_E = tile.to(tl.int64) * num_experts + bin_E
    tl.store(tile_prob_sums + own_E, prob_E, mask=bin_E < num_experts)

    if given_ids_TK is not None:
        ids_TK = tl.load(given_ids_TK + row_T[:, None] * top_k + slot_K[None, :], mask=in_TK, other=0).to(tl.int32)
    else:
        scores_TE = _scores_as_int(exp_TE, inv_sum_T, bias_E, expert_E, num_experts)
        if bias_E is None:
            key_TE = scores_TE.to(tl.uint32, bitcast=True) << 2  # a number in [0, 1] has two leading zeros
        else:
            key_TE = scores_TE.to(tl.uint32, bitcast=True) ^ 0x80000000
        key_TE = (key_TE & (0xFFFFFFFF - (EXPERTS - 1))) | (EXPERTS - 1 - expert_E[None, :]).to(tl.uint32)
        if num_experts < EXPERTS:
            key_TE = tl.where((expert_E < num_experts)[None, :], key_TE, 0)
        # Threads sort their keys in lists of eight; from then on only heads are compared, and a hit moves its list up.
        a, b, c, d, e, f, g, h = _sorted_eights(key_TE, TOKENS, EXPERTS)
        key_TK = tl.zeros((TOKENS, SLOTS), tl.uint32)
        next_TK = tl.full((TOKENS, SLOTS), 0xFFFFFFFF, tl.uint32)
        for k in tl.static_range(top_k + 1):  # one more, to compare with the last that is taken
            best_T = tl.max(a, axis=1)
            key_TK = tl.where(slot_K[None, :] == k, best_T[:, None], key_TK)
            next_TK = tl.where(slot_K[None, :] == k - 1, best_T[:, None], next_TK)
            hit = a == best_T[:, None]
            a, b = tl.where(hit, b, a), tl.where(hit, c, b)
            c, d = tl.where(hit, d, c), tl.where(hit, e, d)
            e, f = tl.where(hit, f, e), tl.where(hit, g, f)
            g, h = tl.where(hit, h, g), tl.where(hit, 0, h)
        ids_TK = EXPERTS - 1 - (key_TK & (EXPERTS - 1)).to(tl.int32)
        # Neighbours in rank that agree in the kept bits may stand in the wrong order.
        unsure_TK = in_TK & ((key_TK ^ next_TK) < EXPERTS)
        if tl.max(unsure_TK.to(tl.int32)) != 0:
            # Read again: the tile's registers are free for the common way.
            logits = load_rows(logits_TE, row_T, exists_T, TOKENS, num_experts, EXPERTS)
            exp_TE = tl.exp2(logits * LOG2_E - peak_T[:, None])
            scores_TE = _scores_as_int(exp_TE, inv_sum_T, bias_E, expert_E, num_experts)
            ids_TK = _select_exactly(scores_TE, expert_E, num_experts, top_k, EXPERTS, SLOTS, TOKENS)

    chosen_TK = tl.load(logits_TE + row_T[:, None] * num_experts + ids_TK, mask=in_TK, other=float("-inf"))
    if RENORMALIZE:
        # Softmax over the chosen logits: the same value, and no 0 / 0 where a replayed choice has become unlikely.
        chosen_peak_T = tl.where(exists_T, tl.max(chosen_TK, axis=1), 0.0)
        chosen_exp_TK = tl.exp2((chosen_TK - chosen_peak_T[:, None]) * LOG2_E)
        weight_TK = chosen_exp_TK / tl.sum(chosen_exp_TK, axis=1)[:, None]
    else:
        weight_TK = tl.exp2(chosen_TK * LOG2_E - peak_T[:, None]) * inv_sum_T[:, None]
    if token_mask_T is not None:
        weight_TK = tl.where(counted_T[:, None], weight_TK, 0.0)
    at_TK = row_T[:, None] * top_k + slot_K[None, :]
    tl.store(expert_ids_TK + at_TK, ids_TK, mask=in_TK)
    tl.store(weights_TK + at_TK, weight_TK, mask=in_TK)

    counted_TK = in_TK & counted_T[:, None]
    counts_E = tl.histogram(
        tl.reshape(ids_TK, (TOKENS * SLOTS,)), EXPERTS, mask=tl.reshape(counted_TK, (TOKENS * SLOTS,))
    )
    tl.store(tile_counts + own_E, counts_E, mask=bin_E < num_experts)


def _aot_cases() -> list[AotCase]:
    floats = ("logits_TE", "bias_E", "weights_TK", "lse_out_T", "tile_prob_sums", "tile_z_sums")
    types = {
        **dict.fromkeys(floats, "*fp32"),
        **{"given_ids_TK": "*u8", "token_mask_T": "*i1", "expert_ids_TK": "*i32", "tile_counts": "*i32"},
        "num_tokens": "i32",
    }
    cases = []
    for name, E, K, renormalize, absent in (
        ("e128_k8", 128, 8, True, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e128_k8_masked_bias", 128, 8, True, ("given_ids_TK",)),
        ("e128_k8_replay", 128, 8, True, ("bias_E", "token_mask_T")),
        ("e60_k4", 60, 4, False, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e256_k8", 256, 8, True, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e512_k16_masked", 512, 16, True, ("bias_E", "given_ids_TK")),
    ):
        for gpu in (80, 90, 100):
            launch = LAUNCHES[gpu, padded_experts(E)]
            shape = {"num_experts": E, "top_k": K, "EXPERTS": padded_experts(E), "SLOTS": padded_slots(K, launch)}
            constexprs = {**shape, **dict.fromkeys(absent), "RENORMALIZE": renormalize}
            label = f"router_topk_select_{name}_sm{gpu}"
            cases.append(AotCase(label, select_kernel, types, constexprs, launch, (gpu,)))
    return cases


AOT_CASES = _aot_cases()
