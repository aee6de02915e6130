"""``linear_cross_entropy`` on a GPU: products by cuBLAS, and one kernel that turns logits into their gradient in place.

Legend: T tokens, R rows (tokens) of one chunk, D model width, V vocabulary, S slots of ``softmax_rows``.

A chunk of R rows: logits = hidden @ weight.T in the input's dtype; a kernel with one program a row that reads the row
twice, for its logsumexp and to overwrite it with (softmax - onehot) * weight; then both gradients (``head_products``).
Everything happens in the forward pass and the backward pass only scales, so logits are computed once.

Roofline at T = 16,384, V = 151,936, D = 2,048 in bfloat16 (H200: 790 TFLOP/s, 4.28 TB/s): the three products are
6 T V D = 30.6 TFLOP = 38.7 ms. Beside them: the kernel, T * V * (2 read + 2 written) = 10 GB = 2.3 ms when the second
read finds the row in L2 and 3.5 ms when not; the sum of the head's gradient, 8 V D = 2.5 GB a chunk, 4.4 ms in 8,
part of it behind the product; scale and cast, 6 V D = 1.9 GB = 0.4 ms. Together 46-47 ms.
Memory beyond the inputs: the sum 4 V D = 1.24 GB, one chunk of logits 2 R V = 0.62 GB at R = 2,048, the gradient of the
hidden states 2 T D = 0.07 GB: 1.93 GB; in the backward pass the sum and its cast, 1.24 + 0.62 + 0.13 = 2.0 GB.

The second read: a row is 304 KB, more than a multiprocessor holds. A program of 32 warps with more than 32 registers a
thread has a multiprocessor to itself, so 132 rows = 40 MB are under way, and L2 holds 50. The second pass goes back
from what was read last; loads that are not pipelined (STAGES = 1) also ask L2 to keep the first pass, drop the second.

Ignored tokens cost as much as others in the products: their rows are zeroed, not skipped, because only the device knows
which they are. A batch that is mostly prompt pays for its prompts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_kernels import launch
from qwen3_kernels.head_products import Columns, HeadGradients, multiprocessors, product_into, rows_per_chunk
from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.softmax_rows import LOG2E, LOWEST, columns_of, load_block, merged, seen

LOGITS_BYTES = 1_000_000_000
"""Most that one chunk of logits takes."""

ROWS_LAUNCH = {
    (80, 2): Launch({"BLOCK": 16384, "STAGES": 3}, num_warps=32, num_stages=1),
    (80, 4): Launch({"BLOCK": 8192, "STAGES": 3}, num_warps=32, num_stages=1),
    (90, 2): Launch({"BLOCK": 16384, "STAGES": 1}, num_warps=32, num_stages=1),
    (90, 4): Launch({"BLOCK": 16384, "STAGES": 1}, num_warps=32, num_stages=1),
    (100, 2): Launch({"BLOCK": 16384, "STAGES": 3}, num_warps=32, num_stages=1),
    (100, 4): Launch({"BLOCK": 16384, "STAGES": 3}, num_warps=32, num_stages=1),
}
"""By GPU generation and bytes of a logit."""
SCALE_LAUNCH = {generation: Launch({"BLOCK": 4096}, num_warps=8, num_stages=1) for generation in (80, 90, 100)}


@triton.jit
def _loss_rows(
    logits_ptr,
    target_ptr,
    loss_weight_ptr,
    nll_ptr,
    loss_ptr,
    ignore_index,
    z_loss_weight,
    valid,
    pitch,
    GRADIENT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row: its loss, and with GRADIENT the gradient of the loss written over the logits."""
    index = tl.program_id(0).to(tl.int64)
    row = logits_ptr + index * pitch
    target = tl.load(target_ptr + index)
    whole = valid // BLOCK
    if target == ignore_index:
        tl.store(nll_ptr + index, 0.0)
        tl.store(loss_ptr + index, 0.0)
        if GRADIENT:
            for start in tl.range(0, pitch, BLOCK):
                columns = columns_of(start, BLOCK, GROUP)
                there = start + tl.arange(0, BLOCK // GROUP) * GROUP < pitch
                tl.store(row + columns, tl.zeros_like(columns).to(row.dtype.element_ty), mask=there[:, None])
    else:
        # Read before anything is overwritten. A target out of range has no probability: the loss is infinite.
        exists = (target >= 0) & (target < valid)
        target_logit = tl.load(row + target, mask=exists, other=float("-inf")).to(tl.float32)
        loss_weight = 1.0
        if HAS_WEIGHTS:
            loss_weight = tl.load(loss_weight_ptr + index)

        max_S = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
        sum_S = tl.zeros([BLOCK // GROUP], tl.float32)
        for start in tl.range(0, whole * BLOCK, BLOCK, num_stages=STAGES):
            x = load_block(row, start, valid, BLOCK, GROUP, False, "evict_last")
            max_S, sum_S, _, _ = seen(max_S, sum_S, x)
        if whole * BLOCK < valid:
            x = load_block(row, whole * BLOCK, valid, BLOCK, GROUP, True, "evict_last")
            max_S, sum_S, _, _ = seen(max_S, sum_S, x)
        lse, _ = merged(max_S, sum_S)
        nll = lse - target_logit
        tl.store(nll_ptr + index, nll)
        tl.store(loss_ptr + index, loss_weight * (nll + z_loss_weight * lse * lse))

        if GRADIENT:
            scale = loss_weight * (1.0 + 2.0 * z_loss_weight * lse)
            if whole * BLOCK < pitch:
                columns = columns_of(whole * BLOCK, BLOCK, GROUP)
                x = load_block(row, whole * BLOCK, valid, BLOCK, GROUP, True, "evict_first")
                grad = tl.exp2((x - lse) * LOG2E) * scale
                grad = tl.where(columns == target, grad - loss_weight, grad)
                there = whole * BLOCK + tl.arange(0, BLOCK // GROUP) * GROUP < pitch
                tl.store(row + columns, grad.to(row.dtype.element_ty), mask=there[:, None])
            for i in tl.range(0, whole, num_stages=STAGES):
                start = (whole - 1 - i) * BLOCK
                columns = columns_of(start, BLOCK, GROUP)
                x = load_block(row, start, valid, BLOCK, GROUP, False, "evict_first")
                grad = tl.exp2((x - lse) * LOG2E) * scale
                grad = tl.where(columns == target, grad - loss_weight, grad)
                tl.store(row + columns, grad.to(row.dtype.element_ty), eviction_policy="evict_first")


@triton.jit
def _scale_kernel(out_ptr, in_ptr, scale_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(in_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=offsets < size)


@torch.library.custom_op("qwen3_kernels::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    loss_weights_T: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    valid_vocab: int,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, nll_T and both gradients of the loss, the head's in float32; a gradient not asked for has no element."""
    num_tokens, width = hidden_TD.shape
    columns = Columns.of(weight_VD.shape[0], valid_vocab)
    weight_VD = weight_VD.to(hidden_TD.dtype)
    target_ids_T = target_ids_T.contiguous()
    nll_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
    loss_T = torch.empty_like(nll_T)
    gradients = HeadGradients(hidden_TD, weight_VD, columns, needs_hidden, needs_weight)
    size = hidden_TD.element_size()
    most_rows = LOGITS_BYTES // (size * columns.pitch)
    chunk_rows = rows_per_chunk(num_tokens, columns.computed, width, most_rows, multiprocessors(hidden_TD))
    buffer_RP = torch.empty((chunk_rows, columns.pitch), dtype=hidden_TD.dtype, device=hidden_TD.device)
    options = ROWS_LAUNCH[launch.generation(hidden_TD.device), size].options()
    for start in range(0, num_tokens, chunk_rows):
        hidden_RD = hidden_TD[start : start + chunk_rows]
        rows = hidden_RD.shape[0]
        logits_RV = buffer_RP[:rows, : columns.computed]
        product_into(logits_RV, hidden_RD, weight_VD[: columns.computed].t())
        _loss_rows[(rows,)](
            buffer_RP,
            target_ids_T[start:],
            None if loss_weights_T is None else loss_weights_T[start:],
            nll_T[start:],
            loss_T[start:],
            ignore_index,
            z_loss_weight,
            columns.valid,
            columns.pitch,
            GRADIENT=needs_hidden or needs_weight,
            HAS_WEIGHTS=loss_weights_T is not None,
            GROUP=16 // size,
            **options,
        )
        gradients.add(start, hidden_RD, logits_RV)
    empty = hidden_TD.new_empty
    grad_hidden_TD = empty(0) if gradients.hidden_TD is None else gradients.hidden_TD
    grad_weight_VD = empty(0, dtype=torch.float32) if gradients.weight_VD is None else gradients.weight_VD
    return loss_T.sum(), nll_T, grad_hidden_TD, grad_weight_VD


@_forward.register_fake
def _(
    hidden_TD, weight_VD, target_ids_T, loss_weights_T, ignore_index, z_loss_weight, valid_vocab, needs_hidden,
    needs_weight,
):  # fmt: skip
    empty = hidden_TD.new_empty
    return (
        empty((), dtype=torch.float32),
        empty(hidden_TD.shape[0], dtype=torch.float32),
        empty(hidden_TD.shape if needs_hidden else 0),
        empty(weight_VD.shape if needs_weight else 0, dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    _, *parts = output
    ctx.save_for_backward(*parts[1:])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)  # else zeros for the gradients of the gradients, 1.3 GB
    ctx.mark_non_differentiable(*parts)


def _differentiate(ctx, grad_loss: Tensor | None, *_: None):
    if grad_loss is None:
        return (None,) * 9
    grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    return (
        _scaled(grad_hidden_TD, grad_loss, grad_hidden_TD.dtype) if needs_hidden else None,
        _scaled(grad_weight_VD, grad_loss, ctx.weight_dtype) if needs_weight else None,
        *(None,) * 7,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("qwen3_kernels::scaled", mutates_args=())
def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(tensor * scale).to(dtype)`` in one pass, of a contiguous tensor and a scalar on the device."""
    out = torch.empty_like(tensor, dtype=dtype)
    options = SCALE_LAUNCH[launch.generation(tensor.device)].options()
    if out.numel():
        _scale_kernel[(triton.cdiv(out.numel(), options["BLOCK"]),)](out, tensor, scale, out.numel(), **options)
    return out


@_scaled.register_fake
def _(tensor, scale, dtype):
    return torch.empty_like(tensor, dtype=dtype)


def run(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    loss_weights_T: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    valid_vocab: int | None,
) -> tuple[Tensor, Tensor]:
    """The implementation "triton" of ``linear_cross_entropy``."""
    wanted = torch.is_grad_enabled()
    loss, nll_T, _, _ = _forward(
        hidden_TD,
        weight_VD,
        target_ids_T,
        None if loss_weights_T is None else loss_weights_T.detach().float().contiguous(),
        ignore_index,
        z_loss_weight,
        weight_VD.shape[0] if valid_vocab is None else valid_vocab,
        wanted and hidden_TD.requires_grad,
        wanted and weight_VD.requires_grad,
    )
    return loss, nll_T


def _rows_case(generation: int, size: int, gradient: bool) -> AotCase:
    kind = {2: "bf16", 4: "fp32"}[size]
    floats = ("logits_ptr", "nll_ptr", "loss_ptr", "loss_weight_ptr")
    signature = {name: "*fp32" for name in floats} | {"logits_ptr": f"*{kind}", "target_ptr": "*i64"}
    signature |= {"ignore_index": "i32", "z_loss_weight": "fp32", "valid": "i32", "pitch": "i32:16"}
    return AotCase(
        f"linear_cross_entropy rows {kind} {'gradient' if gradient else 'loss only'} {generation}",
        _loss_rows,
        signature,
        {"GRADIENT": gradient, "HAS_WEIGHTS": True, "GROUP": 16 // size},
        ROWS_LAUNCH[generation, size],
        (generation,),
    )


AOT_CASES = [
    *(_rows_case(generation, size, gradient) for generation, size in ROWS_LAUNCH for gradient in (True, False)),
    AotCase(
        "linear_cross_entropy scale and cast",
        _scale_kernel,
        {"out_ptr": "*bf16", "in_ptr": "*fp32", "scale_ptr": "*fp32", "size": "i32:16"},
        {},
        SCALE_LAUNCH[90],
    ),
]
