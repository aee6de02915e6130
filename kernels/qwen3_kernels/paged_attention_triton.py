"""Decode attention over pages: every split of a sequence's keys is read once for all query heads of a kv head.

Legend: B sequences, H query heads, G kv heads, Q = H / G query heads of a kv head, C head width, R = C / 2 rotated
pairs, P pages, S tokens a page, M pages a sequence, X splits of a sequence.

Flash decoding (Dao et al., 2023): programs (kv head, split, sequence) leave partial results, a second launch merges
them. A split is an equal share of the sequence's own keys, cut on the device; how many splits there are follows from
the shapes alone, so a CUDA graph replays for any context lengths. The kv heads of one split run side by side, because
their rows are neighbours in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels.launch import AotCase, Launch, generation
from qwen3_kernels.rotation_triton import cos_sin

PROGRAMS = 1024
"""Splits are added until so many programs run: a few waves of three on each of 132 multiprocessors."""
MIN_KEYS_A_SPLIT = 128
MAX_SPLITS = 64

_LAUNCH = {
    256: Launch({"BLOCK_N": 64}, num_warps=4, num_stages=5),
    512: Launch({"BLOCK_N": 32}, num_warps=8, num_stages=5),
    1024: Launch({"BLOCK_N": 16}, num_warps=8, num_stages=4),
}
"""By the bytes of one head's row, rounded up. The pipeline spends a stage on the page table ahead of each of keys and
values: five stages are two tiles in flight, three only one."""
ATTEND = {(gpu, row_bytes): launch for gpu in (80, 90, 100) for row_bytes, launch in _LAUNCH.items()}
MERGE = Launch({}, num_warps=2, num_stages=1)

_MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _rotated(q, q_ptrs, mask, delta, inv_freq_ptr, R: tl.constexpr, BLOCK_C: tl.constexpr):
    """q turned on by ``delta`` positions; ``q_ptrs`` points at q's elements."""
    channel = tl.arange(0, BLOCK_C)
    is_low = channel < R
    inv_freq = tl.load(inv_freq_ptr + tl.where(is_low, channel, channel - R), mask=channel < 2 * R, other=0.0)
    angle = delta.to(tl.float32) * inv_freq.to(tl.float32)
    partner = tl.load(q_ptrs + tl.where(is_low, R, -R)[None, :], mask=mask, other=0.0).to(tl.float32)
    cos, sin = cos_sin(angle)
    turned = q.to(tl.float32) * cos[None, :] + partner * tl.where(is_low, -sin, sin)[None, :]
    return turned.to(q.dtype)


@triton.jit
def _attend(
    q,
    first,
    last,
    peak,
    total,
    acc,
    block_table_ptr,
    k_ptr,
    v_ptr,
    stride_P,
    stride_S,
    scale_log2,
    PAGE_SIZE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys [first, last), all seen by the same q."""
    channel = tl.arange(0, BLOCK_C)
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        exists = key < last
        page = tl.load(block_table_ptr + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        offset = (page * stride_P + (key % PAGE_SIZE) * stride_S)[:, None] + channel[None, :]
        # Slots past the context may hold anything, NaN included: they are never loaded.
        mask = exists[:, None] & (channel < C)[None, :]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where(exists[None, :], scores, _MINUS_INFINITY)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))  # finite: a tile has a key
        p = tl.exp2(scores - new_peak[:, None])
        correction = tl.exp2(peak - new_peak)
        peak, total = new_peak, total * correction + tl.sum(p, axis=1)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return peak, total, acc


@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    context_lens_ptr,
    inv_freq_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    pages_a_sequence,
    table_stride_B,
    stride_P,
    stride_S,
    stride_G,
    scale_log2,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,
    CHUNK_LEN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(1)
    context = tl.load(context_lens_ptr + sequence).to(tl.int32)
    num_keys = tl.minimum(context, pages_a_sequence * PAGE_SIZE)
    keys_a_split = tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_N) * BLOCK_N
    first = tl.minimum(split * keys_a_split, num_keys)
    last = tl.minimum(first + keys_a_split, num_keys)

    row, channel = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_C)
    in_rows = row < H // G
    head = sequence.to(tl.int64) * H + group * (H // G) + row
    mask = in_rows[:, None] & (channel < C)[None, :]
    q_ptrs = q_ptr + head[:, None] * C + channel[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)

    k_ptr += group.to(tl.int64) * stride_G
    v_ptr += group.to(tl.int64) * stride_G
    block_table_ptr += sequence.to(tl.int64) * table_stride_B
    peak = tl.full([BLOCK_Q], _MINUS_INFINITY, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    intra_first = first
    if CHUNK_LEN > 0:
        # Keys two chunks back or more, of the chunk before, of the query's own: each range sees one rotation of q.
        query = tl.maximum(context - 1, 0)
        local = query % CHUNK_LEN
        own = query - local
        before = tl.maximum(own - CHUNK_LEN, 0)
        inter = _rotated(q, q_ptrs, mask, CHUNK_SIZE - local, inv_freq_ptr, C // 2, BLOCK_C)
        peak, total, acc = _attend(
            inter, first, tl.minimum(last, before), peak, total, acc, block_table_ptr, k_ptr, v_ptr,
            stride_P, stride_S, scale_log2, PAGE_SIZE, C, BLOCK_C, BLOCK_N, PRECISION,
        )  # fmt: skip
        delta = tl.minimum(local + CHUNK_LEN, CHUNK_SIZE) - local
        succ = _rotated(q, q_ptrs, mask, delta, inv_freq_ptr, C // 2, BLOCK_C)
        peak, total, acc = _attend(
            succ, tl.maximum(first, before), tl.minimum(last, own), peak, total, acc, block_table_ptr, k_ptr, v_ptr,
            stride_P, stride_S, scale_log2, PAGE_SIZE, C, BLOCK_C, BLOCK_N, PRECISION,
        )  # fmt: skip
        intra_first = tl.maximum(first, own)
    peak, total, acc = _attend(
        q, intra_first, last, peak, total, acc, block_table_ptr, k_ptr, v_ptr,
        stride_P, stride_S, scale_log2, PAGE_SIZE, C, BLOCK_C, BLOCK_N, PRECISION,
    )  # fmt: skip

    has_keys, total = total > 0, tl.where(total > 0, total, 1.0)
    out = acc / total[:, None]  # without keys 0 / 1
    if SPLIT:
        row_out = head * num_splits + split
        # -inf marks an empty split, whose partial result is neither written nor read.
        tl.store(lse_ptr + row_out, tl.where(has_keys, peak + tl.log2(total), _MINUS_INFINITY), mask=in_rows)
        if first < last:
            tl.store(partial_ptr + row_out[:, None] * C + channel[None, :], out, mask=mask)
    else:
        tl.store(out_ptr + head[:, None] * C + channel[None, :], out, mask=mask)


@triton.jit
def _merge_kernel(partial_ptr, lse_ptr, out_ptr, C: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program a (sequence, head): softmax-weighted mean of its splits."""
    head = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, BLOCK_C)
    lse = tl.load(lse_ptr + head * SPLITS + split)
    peak = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(peak == _MINUS_INFINITY, 0.0, peak))
    total = tl.sum(weight, axis=0)
    mask = (weight > 0)[:, None] & (channel < C)[None, :]
    offset = (head * SPLITS + split)[:, None] * C + channel[None, :]
    partial = tl.load(partial_ptr + offset, mask=mask, other=0.0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * C + channel, out, mask=channel < C)


def num_splits(batch: int, groups: int, max_keys: int) -> int:
    """A power of two, from host-known shapes only."""
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, max(batch * groups, 1)))
    useful = triton.next_power_of_2(max(max_keys // MIN_KEYS_A_SPLIT, 1))
    return min(wanted, useful, MAX_SPLITS)


def _launch(q_BHC: Tensor) -> Launch:
    row_bytes = max(256, triton.next_power_of_2(q_BHC.shape[-1]) * q_BHC.element_size())
    gpu = generation(q_BHC.device)
    if (gpu, row_bytes) not in ATTEND:
        raise ValueError(f"paged_attention: heads of {q_BHC.shape[-1]} x {q_BHC.dtype}, expected at most 1,024 bytes")
    return ATTEND[gpu, row_bytes]


@torch.library.custom_op("qwen3_kernels::paged_attention", mutates_args=())
def run(
    q_BHC: Tensor,
    k_cache_PSGC: Tensor,
    v_cache_PSGC: Tensor,
    block_table_BM: Tensor,
    context_lens_B: Tensor,
    inv_freq_R: Tensor | None,
    chunk_size: int | None,
    local_size: int | None,
    softmax_scale: float | None,
) -> Tensor:
    """See ``paged_attention``; a custom operator, so one node of a compiled graph."""
    batch, heads, width = q_BHC.shape
    _, page_size, groups, _ = k_cache_PSGC.shape
    if k_cache_PSGC.stride() != v_cache_PSGC.stride() or k_cache_PSGC.stride(3) != 1:
        raise ValueError(
            f"paged_attention: caches with strides {k_cache_PSGC.stride()} and {v_cache_PSGC.stride()}, expected equal "
            "ones that end in 1; allocate both as [pages, tokens, kv heads, width]"
        )
    chunk_len = 0 if chunk_size is None or local_size is None else chunk_size - local_size
    q_BHC = q_BHC.contiguous()
    out_BHC = torch.empty(q_BHC.shape, dtype=q_BHC.dtype, device=q_BHC.device)
    if batch == 0:
        return out_BHC
    pages = block_table_BM.shape[1]
    splits = num_splits(batch, groups, pages * page_size)
    partial_BHXC = lse_BHX = None
    if splits > 1:
        shape = (batch, heads, splits)
        partial_BHXC = torch.empty((*shape, width), dtype=torch.float32, device=q_BHC.device)
        lse_BHX = torch.empty(shape, dtype=torch.float32, device=q_BHC.device)
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    launch = _launch(q_BHC)
    block_table_BM = block_table_BM if block_table_BM.stride(1) == 1 else block_table_BM.contiguous()
    _split_kernel[groups, splits, batch](
        q_BHC,
        k_cache_PSGC,
        v_cache_PSGC,
        block_table_BM,
        context_lens_B.contiguous(),
        inv_freq_R if chunk_len else None,
        out_BHC,
        partial_BHXC,
        lse_BHX,
        pages,
        block_table_BM.stride(0),
        *k_cache_PSGC.stride()[:3],
        scale * 1.4426950408889634,  # log2(e): exp2 is one instruction
        H=heads,
        G=groups,
        C=width,
        PAGE_SIZE=page_size,
        CHUNK_SIZE=chunk_size if chunk_len else 0,
        CHUNK_LEN=chunk_len,
        SPLIT=splits > 1,
        PRECISION="ieee" if q_BHC.dtype == torch.float32 else "tf32",
        BLOCK_Q=max(16, triton.next_power_of_2(heads // groups)),
        BLOCK_C=max(16, triton.next_power_of_2(width)),
        **launch.options(),
    )
    if splits > 1:
        block_C = triton.next_power_of_2(width)
        _merge_kernel[batch * heads,](
            partial_BHXC, lse_BHX, out_BHC, C=width, SPLITS=splits, BLOCK_C=block_C, **MERGE.options()
        )
    return out_BHC


@run.register_fake
def _(q_BHC, *unused):
    return q_BHC.new_empty(q_BHC.shape)


def _cases() -> list[AotCase]:
    shapes = {256: (128, "bf16", "tf32"), 512: (128, "fp32", "ieee"), 1024: (256, "fp32", "ieee")}
    integers = dict.fromkeys(("table_stride_B", "pages_a_sequence"), "i32")
    integers |= dict.fromkeys(("stride_P", "stride_S", "stride_G"), "i32:16")
    cases = []
    for (gpu, row_bytes), launch in ATTEND.items():
        width, dtype, precision = shapes[row_bytes]
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}") | integers
        signature |= {"block_table_ptr": "*i32", "context_lens_ptr": "*i64", "scale_log2": "fp32"}
        signature |= dict.fromkeys(("inv_freq_ptr", "partial_ptr", "lse_ptr"), "*fp32")
        for chunks, name in (
            ({"CHUNK_SIZE": 0, "CHUNK_LEN": 0}, "plain"),
            ({"CHUNK_SIZE": 8192, "CHUNK_LEN": 7168}, "dual"),
        ):
            constexprs = {"H": 32, "G": 4, "C": width, "PAGE_SIZE": 16, "SPLIT": True, "PRECISION": precision}
            constexprs |= {"BLOCK_Q": 16, "BLOCK_C": width, **chunks}
            name = f"paged_attention {name} {row_bytes} B ({gpu})"
            cases.append(AotCase(name, _split_kernel, signature, constexprs, launch, generations=(gpu,)))
    merge = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    for splits in (2, MAX_SPLITS):
        constexprs = {"C": 128, "SPLITS": splits, "BLOCK_C": 128}
        cases.append(AotCase(f"paged_attention merge of {splits}", _merge_kernel, merge, constexprs, MERGE))
    return cases


AOT_CASES = _cases()
