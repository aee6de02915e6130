"""Dual chunk attention composed of flash-attention calls: what one can have without a fused kernel, exact gradients.

Every chunk of queries calls attention up to three times, over its own chunk (causal), the one before, and all older
ones, with its query at another position each time; the parts are merged by their logsumexp. ``TwoPass`` uses what is
behind torch's SDPA, ``aten::_flash_attention_forward`` (torch's own build of flash-attention 2, not the flash-attn
package), which gives no gradient of the logsumexp: its backward pass calls each part's backward with the merged output
and logsumexp, which is the gradient of the union (as ring attention does). flash-attention 4 differentiates the
logsumexp itself.

Legend: B documents of equal length, L their tokens, H query heads, G kv heads, C head width, R = C / 2.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from qwen3_kernels.reference import rotate
from torch import Tensor

Part = tuple[slice, slice, int, bool]
"""Queries, keys, the regime (0 own chunk, 1 the one before, 2 older), causal."""


def parts_of(length: int, chunk_len: int) -> Iterator[Part]:
    """The attention calls that cover the causal triangle of one document."""
    for start in range(0, length, chunk_len):
        queries = slice(start, min(start + chunk_len, length))
        yield queries, queries, 0, True
        if start:
            yield queries, slice(start - chunk_len, start), 1, False
        if start > chunk_len:
            yield queries, slice(0, start - chunk_len), 2, False


def queries_by_regime(q_BLHC: Tensor, inv_freq_R: Tensor, chunk_size: int, chunk_len: int) -> list[Tensor]:
    """q comes at its position inside the chunk; rotations add up, so it moves on by the difference."""
    batch, length = q_BLHC.shape[:2]
    local_T = (torch.arange(length, device=q_BLHC.device) % chunk_len).repeat(batch)
    shifts = ((local_T + chunk_len).clamp(max=chunk_size) - local_T, chunk_size - local_T)
    return [q_BLHC, *(rotate(q_BLHC.flatten(0, 1), shift, inv_freq_R).view_as(q_BLHC) for shift in shifts)]


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs [B, l, H, C] and logsumexps [B, H, l] of disjoint keys become those of the union."""
    lse_BHL = torch.stack(lses).logsumexp(0)
    parts = [
        out.float() * (lse - lse_BHL).exp().transpose(1, 2)[..., None] for out, lse in zip(outs, lses, strict=True)
    ]
    return torch.stack(parts).sum(0).to(outs[0].dtype), lse_BHL


class TwoPass(torch.autograd.Function):
    """The merged result of ``aten::_flash_attention_forward`` over q by regime, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q_own: Tensor, q_before: Tensor, q_older: Tensor, k: Tensor, v: Tensor, chunk_len: int
    ) -> Tensor:
        queries_by = (q_own, q_before, q_older)
        out, lse = torch.empty_like(q_own), q_own.new_empty(*q_own.shape[::2], q_own.shape[1], dtype=torch.float32)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for queries, keys, regime, causal in parts_of(q_own.shape[1], chunk_len):
            part = torch.ops.aten._flash_attention_forward(
                queries_by[regime][:, queries], k[:, keys], v[:, keys], None, None,
                queries.stop - queries.start, keys.stop - keys.start, 0.0, causal, False,
            )  # fmt: skip
            found.setdefault(queries.start, []).append((part[0], part[1]))
            ctx.rng = part[2:4]
        for start, found_parts in found.items():
            outs, lses = zip(*found_parts, strict=True)
            rows = slice(start, min(start + chunk_len, q_own.shape[1]))
            out[:, rows], lse[:, :, rows] = merge(list(outs), list(lses))
        ctx.save_for_backward(*queries_by, k, v, out, lse)
        ctx.chunk_len = chunk_len
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *queries_by, k, v, out, lse = ctx.saved_tensors
        grads_q = [torch.zeros_like(q) for q in queries_by]
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for queries, keys, regime, causal in parts_of(k.shape[1], ctx.chunk_len):
            grad_q, part_k, part_v = torch.ops.aten._flash_attention_backward(
                grad_out[:, queries], queries_by[regime][:, queries], k[:, keys], v[:, keys],
                out[:, queries], lse[:, :, queries].contiguous(), None, None,
                queries.stop - queries.start, keys.stop - keys.start, 0.0, causal, *ctx.rng,
            )  # fmt: skip
            grads_q[regime][:, queries] = grad_q
            grad_k[:, keys] += part_k
            grad_v[:, keys] += part_v
        return *grads_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def aten_flash(q: Tensor, k: Tensor, v: Tensor, inv_freq_R: Tensor, chunk_size: int, chunk_len: int) -> Tensor:
    """[B, L, H, C] out of torch's internal flash attention."""
    return TwoPass.apply(*queries_by_regime(q, inv_freq_R, chunk_size, chunk_len), k, v, chunk_len)  # type: ignore[no-any-return]


def flash_4() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]:
    """The same out of flash-attention 4."""
    from flash_attn.cute import flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, inv_freq_R: Tensor, chunk_size: int, chunk_len: int) -> Tensor:
        queries_by = queries_by_regime(q, inv_freq_R, chunk_size, chunk_len)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for queries, keys, regime, causal in parts_of(q.shape[1], chunk_len):
            part = flash_attn_func(
                queries_by[regime][:, queries], k[:, keys], v[:, keys], causal=causal, return_lse=True
            )
            found.setdefault(queries.start, []).append(part)
        rows = [merge(*map(list, zip(*parts, strict=True)))[0] for parts in found.values()]
        return torch.cat(rows, dim=1)

    return run
