"""First launch of the routing: of every token the softmax, the k largest and their weights; of every tile of tokens
which chose each expert, and partial sums.

The choice works on integers. A key holds a score and below it the expert, so keys of a token are distinct, one maximum
gives both, and equal scores go to the lower id. Where two scores that must be told apart are so close that their
rounding may have changed their order, the tile is done again by logits: one tile in 2,000 of random logits.

Legend: T tokens, E experts, K experts per token, L lists of 32 experts, one a thread; a tile is the ``TOKENS``
consecutive tokens of one program.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.router_topk_lists_triton import merge, merged_neighbours, sorted_eights
from qwen3_kernels.router_topk_rows_triton import LN_2, LOG2_E, expert_of_column, load_rows, padded_experts

TILE_TOKENS = 8
"""Tokens of a tile: the bits of a byte."""
# Eight parts of a row are 32 columns a thread: at E = 128 a token is in four threads and a program is one warp, in
# which nothing waits for other warps. Limited to 128 registers, a thread takes 80; left alone, 64, and the launch takes
# 0.7 us more.
LAUNCHES = {
    (gpu, experts): Launch({"PARTS": 8}, experts // 128, 1, max_registers=128)
    for gpu in (80, 90, 100)
    for experts in (128, 256, 512)
}


def padded_slots(top_k: int, select: Launch) -> int:
    """K as 8 or 16, and a row for every thread, since ``tl.histogram`` may count replicated rows twice."""
    return max(8 if top_k <= 8 else 16, 32 * select.num_warps // TILE_TOKENS)


# The approximate exponential is off by 2^-22.5 at most, and scores are rounded once more: at most five units of a key's
# score together.
_CLOSE = tl.constexpr(8)


@triton.jit
def _biased(exp_TE, inv_sum_T, bias_E, expert_E, num_experts: tl.constexpr):
    bias = tl.load(bias_E + expert_E, mask=expert_E < num_experts, other=0.0)
    return exp_TE * inv_sum_T[:, None] + bias[None, :]


@triton.jit
def _as_int(scores_TE):
    """Signed integers of the same order; 0.0 makes one zero of two. None is the least one, NaN included."""
    bits_TE = (scores_TE + 0.0).to(tl.int32, bitcast=True)
    return tl.maximum(tl.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE), -0x7FFFFFFF)


@triton.jit
def _scores_as_key(exp_TE, inv_sum_T, bias_E, expert_E, num_experts: tl.constexpr, EXPERTS: tl.constexpr):
    """[TOKENS, EXPERTS] uint32 whose low bits are free for the expert."""
    if bias_E is None:
        # A number added to exponentials, which are at most 1, leaves one, two or four exponents: a shift by the bits of
        # an expert takes off what is the same in all. Small scores lose bits, not their order. Columns without an
        # expert have 0, like the least likely experts, and are beyond choice, or not to be told from those.
        if EXPERTS == 128:
            key_TE = (exp_TE + 0.125).to(tl.uint32, bitcast=True) * EXPERTS
        elif EXPERTS == 256:
            key_TE = (exp_TE + 0.5).to(tl.uint32, bitcast=True) * EXPERTS
        else:
            key_TE = (exp_TE * (1.0 - 2.0**-22) + 1.0).to(tl.uint32, bitcast=True) * EXPERTS
    else:
        scores_TE = _as_int(_biased(exp_TE, inv_sum_T, bias_E, expert_E, num_experts))
        key_TE = scores_TE.to(tl.uint32, bitcast=True) ^ 0x80000000
        key_TE = tl.where((expert_E < num_experts)[None, :], key_TE & (0xFFFFFFFF - (EXPERTS - 1)), 0)
    return key_TE


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
    a, b, c, d, e, f, g, h = merged_neighbours(a, b, c, d, e, f, g, h, TOKENS, LISTS * 2)
    a, b, c, d, e, f, g, h = merged_neighbours(a, b, c, d, e, f, g, h, TOKENS, LISTS)
    thread = ((LISTS - 1 - tl.arange(0, LISTS)) * 4)[None, :].to(tl.uint32)
    a, b, c, d = a | thread, b | thread, c | thread, d | thread
    e, f, g, h = e | thread, f | thread, g | thread, h | thread
    best = tl.reduce((a, b, c, d, e, f, g, h), 1, merge)
    # Close neighbours in rank may stand in the wrong order.
    close_T = tl.zeros((TOKENS,), tl.int1)
    for k in tl.static_range(min(top_k, 7)):
        close_T = close_T | (best[k] - best[k + 1] < _CLOSE * EXPERTS)
    unsure = tl.broadcast_to(close_T[:, None], (TOKENS, LISTS))
    if top_k == 8:
        # So may the eighth and the next below it, in a thread's eight or among those that its list dropped. What is not
        # below wraps around to the largest numbers.
        last = best[7][:, None]
        a, b, c, d = last - 1 - a, last - 1 - b, last - 1 - c, last - 1 - d
        e, f, g, below = last - 1 - e, last - 1 - f, last - 1 - g, last - 1 - h
        a, b, c, d = tl.minimum(a, b), tl.minimum(c, d), tl.minimum(e, f), tl.minimum(g, below)
        gap = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
        unsure = unsure | (gap < _CLOSE * EXPERTS) | (h >= last)
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
    unsure_TK = (exists_T[:, None] & (slot_K < top_k)[None, :]) & (key_TK - next_TK < _CLOSE * EXPERTS)
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


@triton.jit
def _swap(word_TL, partner_TL, upper, MASK: tl.constexpr, SHIFT: tl.constexpr):
    """One step of a transposition of bits: of two threads the lower gives its upper bits for the other's lower ones."""
    return tl.where(
        upper,
        ((partner_TL >> SHIFT) & MASK) | (word_TL & (0xFFFFFFFF - MASK)),
        (word_TL & MASK) | ((partner_TL & MASK) << SHIFT),
    )


@triton.jit
def _token_masks(ids_TK, counted_TK, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """Which tokens of a tile chose each expert: words [TOKENS, LISTS] whose bytes are four consecutive experts, a bit
    for each of eight tokens, and where each word belongs among those of all experts.

    A thread sets the bits of one token's experts, and five exchanges of bits between threads turn bits of experts into
    bits of tokens.
    """
    LISTS: tl.constexpr = EXPERTS // 32
    tl.static_assert(TOKENS == 8)
    list_L = tl.arange(0, LISTS)
    bit_TK = tl.where(counted_TK, 1, 0).to(tl.uint32) << (ids_TK // LISTS).to(tl.uint32)
    in_list = (ids_TK % LISTS)[:, :, None] == list_L[None, None, :]
    # Experts of a token are distinct, so adding sets bits.
    word_TL = tl.sum(tl.where(in_list, bit_TK[:, :, None], 0), axis=1)
    token = tl.broadcast_to(tl.arange(0, TOKENS)[:, None], (TOKENS, LISTS))
    other = tl.broadcast_to(list_L[None, :], (TOKENS, LISTS))
    word_TL = _swap(word_TL, tl.gather(word_TL, token ^ 4, axis=0), (token & 4) != 0, 0x0F0F0F0F, 4)
    word_TL = _swap(word_TL, tl.gather(word_TL, token ^ 2, axis=0), (token & 2) != 0, 0x33333333, 2)
    word_TL = _swap(word_TL, tl.gather(word_TL, token ^ 1, axis=0), (token & 1) != 0, 0x55555555, 1)
    word_TL = _swap(word_TL, tl.gather(word_TL, other ^ 2, axis=1), (other & 2) != 0, 0x0000FFFF, 16)
    word_TL = _swap(word_TL, tl.gather(word_TL, other ^ 1, axis=1), (other & 1) != 0, 0x00FF00FF, 8)
    return word_TL, other % 4 * (2 * LISTS) + token * (LISTS // 4) + other // 4


@triton.jit(do_not_specialize=["num_tokens"])
def select_kernel(
    logits_TE,
    bias_E,
    given_ids_TK,
    token_mask_T,
    expert_ids_TK,
    weights_TK,
    lse_out_T,
    tile_masks,
    tile_counts,
    tile_prob_sums,
    tile_z_sums,
    num_tokens,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    QUADS: tl.constexpr = EXPERTS // 4
    tile = tl.program_id(0)
    expert_E = expert_of_column(EXPERTS, tl.arange(0, EXPERTS), PARTS)
    bin_E = tl.arange(0, EXPERTS)
    slot_K = tl.arange(0, SLOTS)
    local_T = tl.arange(0, TOKENS)
    first_token = tile * TOKENS
    tokens_left = num_tokens - first_token
    exists_T = local_T < tokens_left
    # Offsets in a tile are small: the pointer to its first row has the 64 bits. Where there is no token, its last
    # neighbour stands in: loads without a mask need nothing to fill in.
    tile_logits_TE = logits_TE + first_token.to(tl.int64) * num_experts
    row_T = tl.minimum(local_T, tokens_left - 1)
    first_row = tl.cast(first_token, tl.int64) * top_k
    at_TK = local_T[:, None] * top_k + slot_K[None, :]
    in_TK = exists_T[:, None] & (slot_K < top_k)[None, :]

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

    if given_ids_TK is not None:
        ids_TK = tl.load(given_ids_TK + first_row + at_TK, mask=in_TK, other=0).to(tl.int32)
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
            if bias_E is not None:
                again = _biased(tl.exp2(again * LOG2_E - peak_T[:, None]), inv_sum_T, bias_E, expert_E, num_experts)
            # K rounds, hidden from the compiler, which would unroll them into half of the kernel's code.
            rounds = top_k + tl.minimum(tokens_left, 0)
            ids_TK = _select_exactly(_as_int(again), rounds, num_experts, EXPERTS, SLOTS, TOKENS, PARTS)

    chosen_ptr = tile_logits_TE + (row_T[:, None] * num_experts + ids_TK)
    chosen_TK = tl.load(chosen_ptr, mask=(slot_K < top_k)[None, :], other=float("-inf"))
    if RENORMALIZE:
        # Softmax over the chosen logits: the same value, and no 0 / 0 where a replayed or biased choice is unlikely.
        chosen_peak_T = peak_T
        if given_ids_TK is not None or bias_E is not None:
            chosen_peak_T = tl.max(chosen_TK, axis=1) * LOG2_E
        chosen_exp_TK = tl.exp2(chosen_TK * LOG2_E - chosen_peak_T[:, None])
        weight_TK = chosen_exp_TK / tl.sum(chosen_exp_TK, axis=1)[:, None]
    else:
        weight_TK = tl.exp2(chosen_TK * LOG2_E - peak_T[:, None]) * inv_sum_T[:, None]
    if token_mask_T is not None:
        weight_TK = tl.where(counted_T[:, None], weight_TK, 0.0)
    tl.store(expert_ids_TK + first_row + at_TK, ids_TK, mask=in_TK)
    tl.store(weights_TK + first_row + at_TK, weight_TK, mask=in_TK)

    # Sums over tokens want a thread to hold tokens of one expert. Reading the tile again, from the cache, in that
    # layout takes a third of the instructions of sums across threads.
    again_ptr = tile_logits_TE + (row_T[:, None] * num_experts + bin_E[None, :])
    if num_experts < EXPERTS or token_mask_T is not None:
        inside_TE = counted_T[:, None] & (bin_E < num_experts)[None, :]
        again_TE = tl.load(again_ptr, mask=inside_TE, other=float("-inf"))
    else:
        again_TE = tl.load(again_ptr)
    # A masked token may hold anything, NaN included: it is left out, not multiplied by 0.
    prob_TE = tl.exp2(again_TE * LOG2_E - tl.where(counted_T, lse2_T, float("inf"))[:, None])
    first_E = tile.to(tl.int64) * EXPERTS
    tl.store(tile_prob_sums + first_E + bin_E, tl.sum(prob_TE, axis=0))
    tl.store(tile_z_sums + tile, tl.sum(tl.where(counted_T, lse_T * lse_T, 0.0), axis=0))

    counted_TK = in_TK & counted_T[:, None]
    first_word = tile.to(tl.int64) * QUADS
    if given_ids_TK is None:
        mask_TL, at_TL = _token_masks(ids_TK, counted_TK, EXPERTS, TOKENS)
        tl.store(tile_masks + first_word + at_TL, mask_TL.to(tl.int32, bitcast=True))
        count_TL = mask_TL - ((mask_TL >> 1) & 0x55555555)
        count_TL = (count_TL & 0x33333333) + ((count_TL >> 2) & 0x33333333)
        count_TL = (count_TL + (count_TL >> 4)) & 0x0F0F0F0F
        tl.store(tile_counts + first_word + at_TL, count_TL.to(tl.int32, bitcast=True))
    else:
        # No mask of tl.histogram: the compiler may reorder the rows, and reorders a mask of another layout otherwise.
        # Rows that do not count go to the first bin and are taken off it.
        binned = tl.reshape(tl.where(counted_TK, ids_TK, 0), (TOKENS * SLOTS,))
        not_counted = TOKENS * SLOTS - top_k * tl.sum(counted_T.to(tl.int32), axis=0)
        count_E = tl.histogram(binned, EXPERTS) - tl.where(bin_E == 0, not_counted, 0)
        word_Q = tl.sum(tl.reshape(count_E, (QUADS, 4)) << (tl.arange(0, 4) * 8)[None, :], axis=1)
        tl.store(tile_counts + first_word + tl.arange(0, QUADS), word_Q)


def _aot_cases() -> list[AotCase]:
    floats = ("logits_TE", "bias_E", "weights_TK", "lse_out_T", "tile_prob_sums", "tile_z_sums")
    types = {
        **dict.fromkeys(floats, "*fp32"),
        **{"given_ids_TK": "*u8", "token_mask_T": "*i1", "expert_ids_TK": "*i32"},
        **{"tile_masks": "*i32", "tile_counts": "*i32", "num_tokens": "i32"},
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
            others = {"RENORMALIZE": renormalize, "TOKENS": TILE_TOKENS, "PDL": gpu >= 90}
            constexprs = {**shape, **others, **dict.fromkeys(absent)}
            label = f"router_topk_select_{name}_sm{gpu}"
            cases.append(AotCase(label, select_kernel, types, constexprs, launch, (gpu,)))
    return cases


AOT_CASES = _aot_cases()
