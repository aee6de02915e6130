"""First launch of the routing: of every token the softmax, the k largest and their weights, of every span of tokens the
counts and partial sums.

The choice works on integers. A key holds a score without its last bits and below it the expert, so keys of a token are
distinct, one maximum gives both, and equal scores go to the lower id. Where two keys that must be told apart agree in
the kept bits of the score, the tile is done again by all bits: one tile in 1,000 on random logits, all on equal ones.

Legend: T tokens, E experts, K experts per token; a tile is ``TOKENS`` consecutive tokens, a span the consecutive tiles
of one program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_lists_triton import merge, merged_neighbours, sorted_eights
from qwen3_kernels.router_topk_rows_triton import LN_2, LOG2_E, expert_of_column, load_rows, padded_experts

# A tile holds 8,192 probabilities, 32 a thread: at E = 128 eight warps and 64 tokens, each in four threads. Two blocks
# of 128 registers a thread fill a multiprocessor, so the 256 spans of T = 32,768 run at once, and each loads its next
# tile before it looks at this one.
LAUNCHES = {
    (gpu, experts): Launch({"TOKENS": 8192 // experts, "PARTS": 8, "AHEAD": 1}, 8, 1, max_registers=128)
    for gpu in (80, 90, 100)
    for experts in (128, 256, 512)
}
SPANS = 256
"""Programs of one launch where there are enough tiles for all; the second launch reads the counts of 256 at once."""
MAX_SPAN_ROWS = 8191
"""Rows of a span beyond which eight counts, added in 16 bits, could overflow: longer inputs get more spans."""


def padded_slots(top_k: int, select: Launch) -> int:
    """K as 8 or 16, and a row for every thread, since ``tl.histogram`` may count replicated rows twice."""
    return max(8 if top_k <= 8 else 16, 32 * select.num_warps // select.blocks["TOKENS"])


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


# The smallest score that keeps all its bits. Added to scores in [0, 1], it leaves three bits of the exponent in use and
# 22 or more of 25 bits for the mantissa; smaller scores lose precision, not their order.
_FLOOR = tl.constexpr(2.0**-7)


@triton.jit
def _scores_as_key(exp_TE, inv_sum_T, bias_E, expert_E, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    """[TOKENS, EXPERTS] uint32 whose low bits are free for the expert."""
    if bias_E is None:
        # Sign and five bits of the exponent are the same in all. Columns without an expert have 0, like the least
        # likely experts, and are beyond choice, or not to be told from those.
        key_TE = (exp_TE + _FLOOR).to(tl.uint32, bitcast=True) << 6
    else:
        scores_TE = _scores_as_int(exp_TE, inv_sum_T, bias_E, expert_E, num_experts)
        key_TE = scores_TE.to(tl.uint32, bitcast=True) ^ 0x80000000
        key_TE = tl.where((expert_E < num_experts)[None, :], key_TE, 0)
    return key_TE & (0xFFFFFFFF - (EXPERTS - 1))


@triton.jit
def _select_by_lists(
    key_TE,
    exists_T,
    top_k: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The largest keys [TOKENS, SLOTS] of at most eight, and [TOKENS, lists] where they may be wrong."""
    LISTS: tl.constexpr = EXPERTS // (4 * PARTS)
    # Columns of a thread differ in what is known at compile time; which thread it is follows when eight are left.
    first_E = expert_of_column(EXPERTS, tl.arange(0, EXPERTS) % (4 * PARTS), PARTS)
    key_TE = key_TE | (EXPERTS - 4 * LISTS + 3 - first_E)[None, :].to(tl.uint32)
    a, b, c, d, e, f, g, h = sorted_eights(key_TE, TOKENS, EXPERTS)
    if PARTS == 8:
        a, b, c, d, e, f, g, h = merged_neighbours(a, b, c, d, e, f, g, h, TOKENS, LISTS * 2)
    a, b, c, d, e, f, g, h = merged_neighbours(a, b, c, d, e, f, g, h, TOKENS, LISTS)
    thread = ((LISTS - 1 - tl.arange(0, LISTS)) * 4)[None, :].to(tl.uint32)
    a, b, c, d = a | thread, b | thread, c | thread, d | thread
    e, f, g, h = e | thread, f | thread, g | thread, h | thread
    best = tl.reduce((a, b, c, d, e, f, g, h), 1, merge)
    # Neighbours in rank that agree in the kept bits may stand in the wrong order.
    close_T = tl.zeros((TOKENS,), tl.int1)
    for k in tl.static_range(min(top_k, 7)):
        close_T = close_T | ((best[k] ^ best[k + 1]) < EXPERTS)
    unsure = tl.broadcast_to(close_T[:, None], (TOKENS, LISTS))
    if top_k == 8:
        # So may the eighth and a key that was not taken: one of any thread's eight, or one that its list dropped.
        last = best[7][:, None]
        cell = last & (0xFFFFFFFF - (EXPERTS - 1))
        room = last - cell
        unsure = unsure | ((a - cell) < room) | ((b - cell) < room) | ((c - cell) < room) | ((d - cell) < room)
        unsure = unsure | ((e - cell) < room) | ((f - cell) < room) | ((g - cell) < room) | ((h - cell) < room)
        unsure = unsure | (h >= last)
    unsure = unsure & exists_T[:, None]
    if SLOTS == 8:
        even = tl.join(tl.join(best[0], best[4]), tl.join(best[2], best[6]))
        odd = tl.join(tl.join(best[1], best[5]), tl.join(best[3], best[7]))
        key_TK = tl.reshape(tl.join(even, odd), (TOKENS, SLOTS))
    else:
        slot_K = tl.arange(0, SLOTS)
        key_TK = tl.zeros((TOKENS, SLOTS), tl.uint32)
        for k in tl.static_range(8):
            key_TK = tl.where(slot_K[None, :] == k, best[k][:, None], key_TK)
    return key_TK, unsure


@triton.jit
def _select_by_heads(
    key_TE, expert_E, exists_T, top_k: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr
):
    """The same for more than eight: only heads of the sorted lists are compared, and a hit moves its list up."""
    key_TE = key_TE | (EXPERTS - 1 - expert_E)[None, :].to(tl.uint32)
    a, b, c, d, e, f, g, h = sorted_eights(key_TE, TOKENS, EXPERTS)
    slot_K = tl.arange(0, SLOTS)
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
    unsure_TK = (exists_T[:, None] & (slot_K < top_k)[None, :]) & ((key_TK ^ next_TK) < EXPERTS)
    return key_TK, unsure_TK


@triton.jit
def _select_exactly(
    scores_TE,
    rounds,
    num_experts: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The ids by all bits of the scores: in each of ``rounds`` the largest, then the lowest expert that has it."""
    # A thread's C columns apart from its place L among the threads of a token: the experts of C are constants.
    C: tl.constexpr = 4 * PARTS
    L: tl.constexpr = EXPERTS // C
    expert_C = expert_of_column(EXPERTS, tl.arange(0, C), PARTS)
    more_L = tl.arange(0, L) * 4
    slot_K = tl.arange(0, SLOTS)
    taken = -0x80000000
    scores_TLC = tl.reshape(scores_TE, (TOKENS, L, C))
    scores_TLC = tl.where((more_L[:, None] + expert_C[None, :] < num_experts)[None, :, :], scores_TLC, taken)
    ids_TK = tl.zeros((TOKENS, SLOTS), tl.int32)
    for k in range(rounds):
        best_T = tl.max(tl.max(scores_TLC, axis=2), axis=1)
        best_TLC = tl.where(scores_TLC == best_T[:, None, None], expert_C[None, None, :], EXPERTS)
        id_T = tl.minimum(tl.min(tl.min(best_TLC, axis=2) + more_L[None, :], axis=1), EXPERTS - 1)
        ids_TK = tl.where(slot_K[None, :] == k, id_T[:, None], ids_TK)
        hit_TL = id_T[:, None] - more_L[None, :]
        scores_TLC = tl.where(expert_C[None, None, :] == hit_TL[:, :, None], taken, scores_TLC)
    return ids_TK


@triton.jit(do_not_specialize=["num_tokens", "span_tiles"])
def select_kernel(
    logits_TE,
    bias_E,
    given_ids_TK,
    token_mask_T,
    expert_ids_TK,
    weights_TK,
    lse_out_T,
    tile_counts,
    span_counts,
    span_prob_sums,
    span_z_sums,
    num_tokens,
    span_tiles,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    span = tl.program_id(0)
    first_tile = span * span_tiles
    end_tile = tl.minimum(first_tile + span_tiles, tl.cdiv(num_tokens, TOKENS))
    expert_E = expert_of_column(EXPERTS, tl.arange(0, EXPERTS), PARTS)
    bin_E = tl.arange(0, EXPERTS)
    slot_K = tl.arange(0, SLOTS)
    prob_8E = tl.zeros((8, EXPERTS), tl.float32)
    z_T = tl.zeros((TOKENS,), tl.float32)
    span_count_E = tl.zeros((EXPERTS,), tl.int32)

    # Offsets in a tile are small: the pointer to its first row has the 64 bits.
    local_T = tl.arange(0, TOKENS)
    tile_logits_TE = logits_TE + first_tile.to(tl.int64) * (TOKENS * num_experts)
    if AHEAD:
        row_T = tl.minimum(local_T, num_tokens - 1 - first_tile * TOKENS)
        logits = load_rows(tile_logits_TE, row_T, None, TOKENS, num_experts, EXPERTS, PARTS)
    for tile in range(first_tile, end_tile):
        first_token = tile * TOKENS
        tokens_left = num_tokens - first_token
        exists_T = local_T < tokens_left
        # Where there is no token, its last neighbour stands in: loads without a mask need nothing to fill in.
        row_T = tl.minimum(local_T, tokens_left - 1)
        in_KT = exists_T[None, :] & (slot_K < top_k)[:, None]
        at_KT = local_T[None, :] * top_k + slot_K[:, None]
        first_row = tl.cast(first_token, tl.int64) * top_k
        if AHEAD:
            # After the span's last tile, one row that is in the cache.
            last_row = tl.minimum(tokens_left, tl.where(tile + 1 < end_tile, 2 * TOKENS, TOKENS)) - 1 - TOKENS
            next_tile = tile_logits_TE + TOKENS * num_experts
            next_row_T = tl.minimum(local_T, last_row)
            next_logits = load_rows(next_tile, next_row_T, None, TOKENS, num_experts, EXPERTS, PARTS)
        else:
            logits = load_rows(tile_logits_TE, row_T, None, TOKENS, num_experts, EXPERTS, PARTS)
        counted_T = exists_T
        if token_mask_T is not None:
            counted_T = tl.load(token_mask_T + first_token + local_T, mask=exists_T, other=0) != 0
        peak_T = tl.max(logits, axis=1) * LOG2_E
        exp_TE = tl.exp2(logits * LOG2_E - peak_T[:, None])
        sum_T = tl.sum(exp_TE, axis=1)
        inv_sum_T = 1.0 / sum_T
        lse2_T = peak_T + tl.log2(sum_T)
        lse_T = lse2_T * LN_2
        tl.store(lse_out_T + first_token + local_T, lse_T, mask=exists_T)
        # A masked token may hold anything, NaN included: it is left out, not multiplied by 0.
        z_T += tl.where(counted_T, lse_T * lse_T, 0.0)

        if given_ids_TK is not None:
            ids_KT = tl.load(given_ids_TK + first_row + at_KT, mask=in_KT, other=0).to(tl.int32)
        else:
            key_TE = _scores_as_key(exp_TE, inv_sum_T, bias_E, expert_E, num_experts, EXPERTS)
            if top_k <= 8:
                key_TK, unsure = _select_by_lists(key_TE, exists_T, top_k, EXPERTS, SLOTS, TOKENS, PARTS)
            else:
                key_TK, unsure = _select_by_heads(key_TE, expert_E, exists_T, top_k, EXPERTS, SLOTS, TOKENS)
            ids_TK = EXPERTS - 1 - (key_TK & (EXPERTS - 1)).to(tl.int32)
            if tl.max(unsure.to(tl.int32)) != 0:
                # Read again: the tile's registers are free for the common way.
                again = load_rows(tile_logits_TE, row_T, None, TOKENS, num_experts, EXPERTS, PARTS)
                exp_TE = tl.exp2(again * LOG2_E - peak_T[:, None])
                scores_TE = _scores_as_int(exp_TE, inv_sum_T, bias_E, expert_E, num_experts)
                # K rounds, hidden from the compiler, which would unroll them into half of the kernel's code.
                rounds = top_k + tl.minimum(tokens_left, 0)
                ids_TK = _select_exactly(scores_TE, rounds, num_experts, EXPERTS, SLOTS, TOKENS, PARTS)
            ids_KT = tl.trans(ids_TK)

        # Slots first: a gather has no contiguous axis, and the compiler then lays out neighbours along the first one.
        chosen_ptr = tile_logits_TE + (row_T[None, :] * num_experts + ids_KT)
        chosen_KT = tl.load(chosen_ptr, mask=(slot_K < top_k)[:, None], other=float("-inf"))
        # Sums over tokens want a thread to hold tokens of one expert. Reading the tile again, from the cache, in that
        # layout takes a third of the instructions of sums across threads. A row of warps reads eight tokens at a time,
        # so the tokens of a thread are eight apart, and threads meet for the last eight once, after the last tile.
        again_ptr = tile_logits_TE + (row_T[:, None] * num_experts + bin_E[None, :])
        if num_experts < EXPERTS or token_mask_T is not None:
            inside_TE = counted_T[:, None] & (bin_E < num_experts)[None, :]
            again_TE = tl.load(again_ptr, mask=inside_TE, other=float("-inf"))
        else:
            again_TE = tl.load(again_ptr)
        counted_lse2_T = tl.where(counted_T, lse2_T, float("inf"))
        prob_TE = tl.exp2(again_TE * LOG2_E - counted_lse2_T[:, None])
        prob_8E += tl.sum(tl.reshape(prob_TE, (TOKENS // 8, 8, EXPERTS)), axis=0)

        if RENORMALIZE:
            # Softmax over the chosen logits: the same value, and no 0 / 0 where a replayed choice has become unlikely.
            chosen_peak_T = tl.max(chosen_KT, axis=0)
            chosen_exp_KT = tl.exp2((chosen_KT - chosen_peak_T[None, :]) * LOG2_E)
            weight_KT = chosen_exp_KT / tl.sum(chosen_exp_KT, axis=0)[None, :]
        else:
            weight_KT = tl.exp2(chosen_KT * LOG2_E - peak_T[None, :]) * inv_sum_T[None, :]
        if token_mask_T is not None:
            weight_KT = tl.where(counted_T[None, :], weight_KT, 0.0)
        tl.store(expert_ids_TK + first_row + at_KT, ids_KT, mask=in_KT)
        tl.store(weights_TK + first_row + at_KT, weight_KT, mask=in_KT)

        # No mask of tl.histogram: the compiler may reorder the rows, and reorders a mask of another layout otherwise.
        # Rows that do not count go to the first bin and are taken off it.
        counted_KT = in_KT & counted_T[None, :]
        binned = tl.reshape(tl.where(counted_KT, ids_KT, 0), (TOKENS * SLOTS,))
        if token_mask_T is not None:
            counted_tokens = tl.sum(counted_T.to(tl.int32), axis=0)
        else:
            counted_tokens = tl.minimum(tokens_left, TOKENS)
        not_counted = TOKENS * SLOTS - top_k * counted_tokens
        count_E = tl.histogram(binned, EXPERTS) - tl.where(bin_E == 0, not_counted, 0)
        tl.store(tile_counts + tl.cast(tile, tl.int64) * EXPERTS + bin_E, count_E.to(tl.int16))
        span_count_E += count_E
        tile_logits_TE += TOKENS * num_experts
        if AHEAD:
            logits = next_logits

    own_E = span.to(tl.int64) * EXPERTS + bin_E
    tl.store(span_counts + own_E, span_count_E.to(tl.int16))
    tl.store(span_prob_sums + own_E, tl.sum(prob_8E, axis=0))
    tl.store(span_z_sums + span, tl.sum(z_T, axis=0))


def _aot_cases() -> list[AotCase]:
    floats = ("logits_TE", "bias_E", "weights_TK", "lse_out_T", "span_prob_sums", "span_z_sums")
    types = {
        **dict.fromkeys(floats, "*fp32"),
        **{"given_ids_TK": "*u8", "token_mask_T": "*i1", "expert_ids_TK": "*i32"},
        **{"tile_counts": "*i16", "span_counts": "*i16", "num_tokens": "i32", "span_tiles": "i32"},
    }
    cases = []
    for name, E, K, renormalize, absent in (
        ("e128_k8", 128, 8, True, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e128_k8_masked_bias", 128, 8, True, ("given_ids_TK",)),
        ("e128_k8_replay", 128, 8, True, ("bias_E", "token_mask_T")),
        ("e60_k4", 60, 4, False, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e256_k8", 256, 8, True, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e512_k8", 512, 8, True, ("bias_E", "given_ids_TK", "token_mask_T")),
        ("e512_k16_masked", 512, 16, True, ("bias_E", "given_ids_TK")),
    ):
        for gpu in (80, 90, 100):
            launch = LAUNCHES[gpu, padded_experts(E)]
            shape = {"num_experts": E, "top_k": K, "EXPERTS": padded_experts(E), "SLOTS": padded_slots(K, launch)}
            constexprs = {**shape, **dict.fromkeys(absent), "RENORMALIZE": renormalize, "PDL": gpu >= 90}
            label = f"router_topk_select_{name}_sm{gpu}"
            spills = {"e128_k8_masked_bias": 24, "e512_k16_masked": 96}.get(name, 0)
            cases.append(AotCase(label, select_kernel, types, constexprs, launch, (gpu,), max_spill_bytes=spills))
    return cases


AOT_CASES = _aot_cases()
