"""Every operation in plain PyTorch: the definition, the truth for tests, the path on a CPU.

Legend: T tokens, D model width, H query heads, G kv heads, C head width, R = C / 2 rotated pairs, E experts, K experts
per token, F expert width, N = T * K routed rows, V vocabulary, B sequences, L document length, P pages, S tokens a
page, M pages a sequence, J = M * S keys of a sequence.

The functions take the positional arguments that the public operations hand on; their docstrings are there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24
"""Elements of one chunk of logits: 64 MB of float32."""


def router_topk(
    logits_TE: Tensor,
    top_k: int,
    renormalize: bool,
    token_mask_T: Tensor | None,
    expert_ids_TK: Tensor | None,
    selection_bias_E: Tensor | None,
) -> tuple[Tensor, ...]:
    all_logits_TE = logits_TE = logits_TE.float()
    num_experts = logits_TE.shape[-1]
    if token_mask_T is not None:
        # A masked token may hold anything, NaN included, which no product with 0 removes.
        logits_TE = logits_TE.masked_fill(~token_mask_T[:, None], 0.0)
    probs_TE = logits_TE.softmax(-1)
    if not (replayed := expert_ids_TK is not None):
        # Logits have the order of probabilities without their rounding, which makes neighbours equal.
        scores_TE = all_logits_TE.detach()
        if selection_bias_E is not None:
            scores_TE = (probs_TE.detach() if token_mask_T is None else scores_TE.softmax(-1)) + selection_bias_E
        expert_ids_TK = _topk_low_id_first(scores_TE, top_k)
    expert_ids_TK = expert_ids_TK.long()
    weights_TK = probs_TE.gather(-1, expert_ids_TK)
    if renormalize:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        lost_T1 = total_T1 == 0
        weights_TK = weights_TK / total_T1.masked_fill(lost_T1, 1.0)
        if replayed:  # these experts may have become so unlikely that all of a token's have 0
            weights_TK = torch.where(lost_T1, logits_TE.gather(-1, expert_ids_TK).softmax(-1), weights_TK)
    z_T = logits_TE.logsumexp(-1) ** 2
    sort_key_TK = expert_ids_TK
    if token_mask_T is not None:
        weights_TK = weights_TK * token_mask_T[:, None]
        probs_TE = probs_TE * token_mask_T[:, None]
        z_T = z_T * token_mask_T
        sort_key_TK = expert_ids_TK.masked_fill(~token_mask_T[:, None], num_experts)
    sort_key_N = sort_key_TK.reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=logits_TE.device)
    counts.scatter_add_(0, sort_key_N, torch.ones_like(sort_key_N))
    # Few distinct keys fit a small integer, which sorts several times faster than int64.
    order_N = sort_key_N.to(torch.int16).argsort(stable=True)
    position_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    counts_E = counts[:num_experts]
    return (
        expert_ids_TK.int(),
        weights_TK,
        counts_E,
        probs_TE.sum(0),
        z_T.sum(),
        order_N.int(),
        position_N.int().view_as(expert_ids_TK),
        counts_E.cumsum(0).int(),
    )


def _topk_low_id_first(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids of the k largest scores, falling; equal scores go to the lower id, which torch.topk does not promise."""
    num_experts = scores_TE.shape[-1]
    bits_TE = scores_TE.contiguous().view(torch.int32).long()
    bits_TE = torch.where(bits_TE < 0, -(bits_TE & 0x7FFFFFFF), bits_TE)  # float order as integer order; -0.0 is 0
    tie_break_E = torch.arange(num_experts - 1, -1, -1, device=scores_TE.device)
    keys_TE = bits_TE * num_experts + tie_break_E
    return keys_TE.topk(top_k, dim=-1, sorted=True).indices


def grouped_experts(
    x_TD: Tensor,
    w_gate_up_E2FD: Tensor,
    w_down_EDF: Tensor,
    weights_TK: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    position_TK: Tensor,
    offsets_E: Tensor,
) -> Tensor:
    top_k = weights_TK.shape[1]
    out_TD = torch.zeros_like(x_TD)
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = order_N[start : start + count]
        start += count
        gate, up = F.linear(x_TD[rows // top_k], w_gate_up_E2FD[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w_down_EDF[expert])
        out_TD = out_TD.index_add(0, rows // top_k, y * weights_TK.reshape(-1)[rows, None].to(y.dtype))
    return out_TD


def rotate(x_THC: Tensor, position_T: Tensor, inv_freq_R: Tensor, factor: float = 1.0) -> Tensor:
    """RoPE: rotate the pairs (i, i + C/2) of every head by position * inv_freq and scale by ``factor``."""
    angle_TR = position_T.float()[:, None] * inv_freq_R.float()
    cos_T1R, sin_T1R = angle_TR.cos()[:, None] * factor, angle_TR.sin()[:, None] * factor
    low, high = x_THC.float().chunk(2, dim=-1)
    return torch.cat((low * cos_T1R - high * sin_T1R, high * cos_T1R + low * sin_T1R), dim=-1).to(x_THC.dtype)


def qk_norm_rope(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_norm_weight_C: Tensor,
    k_norm_weight_C: Tensor,
    position_ids_T: Tensor,
    inv_freq_R: Tensor,
    attention_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q_THC = F.rms_norm(q_THC, (q_THC.shape[-1],), q_norm_weight_C, eps)
    k_TGC = F.rms_norm(k_TGC, (k_TGC.shape[-1],), k_norm_weight_C, eps)
    heads = q_THC.shape[1]
    both = rotate(torch.cat((q_THC, k_TGC), dim=1), position_ids_T, inv_freq_R, attention_factor)
    return both[:, :heads], both[:, heads:]


def dual_chunk_attention(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    inv_freq_R: Tensor | None,
    chunk_size: int | None,
    local_size: int | None,
    softmax_scale: float | None,
) -> Tensor:
    bounds = sorted(set(cu_seqlens.tolist()))
    documents = list(zip(bounds[:-1], bounds[1:], strict=True))
    chunk_len = max_seqlen if chunk_size is None else chunk_size - local_size  # type: ignore[operator]
    short = [(a, b) for a, b in documents if b - a <= chunk_len]
    out_THC = torch.zeros_like(q_THC)
    # Documents of similar length share one call, right-padded: under a causal mask no query sees the padding.
    for bucket in _buckets_by_length(short):
        longest = max(b - a for a, b in bucket)
        starts_B = torch.tensor([a for a, _ in bucket], device=q_THC.device)
        lengths_B = torch.tensor([b - a for a, b in bucket], device=q_THC.device)
        offsets_L = torch.arange(longest, device=q_THC.device)
        valid_BL = offsets_L < lengths_B[:, None]
        rows_BL = starts_B[:, None] + torch.where(valid_BL, offsets_L, 0)
        q, k, v = (x[rows_BL].transpose(1, 2) for x in (q_THC, k_TGC, v_TGC))
        out_BLHC = _sdpa(q, k, v, softmax_scale, is_causal=True).transpose(1, 2)
        out_THC = out_THC.index_put((rows_BL[valid_BL],), out_BLHC[valid_BL])
    for a, b in documents:
        if b - a > chunk_len:
            assert inv_freq_R is not None and chunk_size is not None  # else no document is longer than a chunk
            out = _dual_chunks(q_THC[a:b], k_TGC[a:b], v_TGC[a:b], inv_freq_R, chunk_size, chunk_len, softmax_scale)
            out_THC = out_THC.index_put((torch.arange(a, b, device=q_THC.device),), out)
    return out_THC


def _buckets_by_length(documents: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups in which the longest document has less than 1.5 times the tokens of the shortest, plus 16."""
    buckets: list[list[tuple[int, int]]] = []
    for a, b in sorted(documents, key=lambda d: d[1] - d[0]):
        if buckets and b - a <= 1.5 * (buckets[-1][0][1] - buckets[-1][0][0]) + 16:
            buckets[-1].append((a, b))
        else:
            buckets.append([(a, b)])
    return buckets


def _sdpa(q_BHLC: Tensor, k_BGLC: Tensor, v_BGLC: Tensor, softmax_scale: float | None, **mask) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BHLC, k_BGLC, v_BGLC, scale=softmax_scale, enable_gqa=q_BHLC.shape[1] != k_BGLC.shape[1], **mask
    )


def _dual_chunks(
    q_LHC: Tensor,
    k_LGC: Tensor,
    v_LGC: Tensor,
    inv_freq_R: Tensor,
    chunk_size: int,
    chunk_len: int,
    softmax_scale: float | None,
) -> Tensor:
    """One document longer than a chunk: per query chunk, three score blocks side by side and one softmax."""
    length, heads, width = q_LHC.shape
    groups = k_LGC.shape[1]
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    local_L = torch.arange(length, device=q_LHC.device) % chunk_len
    # Rotations add up, so q moves on from l(i) to the position that a regime asks for.
    q_succ_LHC = rotate(q_LHC, (local_L + chunk_len).clamp(max=chunk_size) - local_L, inv_freq_R)
    q_inter_LHC = rotate(q_LHC, chunk_size - local_L, inv_freq_R)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q_GRLC = q.view(q.shape[0], groups, heads // groups, width).permute(1, 2, 0, 3)
        return q_GRLC.float() @ k.permute(1, 2, 0).float()[:, None] * scale

    out = []
    for start in range(0, length, chunk_len):
        end, before = min(start + chunk_len, length), max(start - chunk_len, 0)
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q_LHC.device).triu(1)
        blocks = [
            scores(q_inter_LHC[start:end], k_LGC[:before]),
            scores(q_succ_LHC[start:end], k_LGC[before:start]),
            scores(q_LHC[start:end], k_LGC[start:end]).masked_fill(future, float("-inf")),
        ]
        p_GRLL = torch.cat(blocks, dim=-1).softmax(-1)
        o_GRLC = p_GRLL @ v_LGC[:end].permute(1, 0, 2).float()[:, None]
        out.append(o_GRLC.permute(2, 0, 1, 3).reshape(end - start, heads, width).to(q_LHC.dtype))
    return torch.cat(out)


def paged_attention(
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
    batch, heads, width = q_BHC.shape
    page, groups = k_cache_PSGC.shape[1:3]
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    position_J = torch.arange(block_table_BM.shape[1] * page, device=q_BHC.device)
    valid_BJ = position_J < context_lens_B[:, None]
    table_BM = torch.where(valid_BJ[:, ::page], block_table_BM, 0).long()
    k_BJGC = k_cache_PSGC[table_BM].flatten(1, 2)
    v_BJGC = v_cache_PSGC[table_BM].flatten(1, 2)

    def scores(q: Tensor) -> Tensor:
        q_BGRC = q.view(batch, groups, heads // groups, width).float()
        return q_BGRC @ k_BJGC.permute(0, 2, 3, 1).float() * scale

    scores_BGRJ = scores(q_BHC)
    if chunk_size is not None:
        assert inv_freq_R is not None and local_size is not None
        chunk_len = chunk_size - local_size
        query_B = (context_lens_B - 1).clamp(min=0)
        local_B = query_B % chunk_len
        distance_BJ = (query_B // chunk_len)[:, None] - position_J // chunk_len
        succ = scores(rotate(q_BHC, (local_B + chunk_len).clamp(max=chunk_size) - local_B, inv_freq_R))
        inter = scores(rotate(q_BHC, chunk_size - local_B, inv_freq_R))
        distance = distance_BJ[:, None, None]
        scores_BGRJ = torch.where(distance == 0, scores_BGRJ, torch.where(distance == 1, succ, inter))
    scores_BGRJ = scores_BGRJ.masked_fill(~valid_BJ[:, None, None], float("-inf"))
    p_BGRJ = scores_BGRJ.softmax(-1).nan_to_num(0.0)  # an empty slot has no key at all
    # Unwritten pages may hold anything, NaN included.
    v_BGJC = v_BJGC.transpose(1, 2).float().masked_fill(~valid_BJ[:, None, :, None], 0.0)
    return (p_BGRJ @ v_BGJC).reshape(batch, heads, width).to(q_BHC.dtype)


def _head_logits(hidden_TD: Tensor, weight_VD: Tensor, valid_vocab: int | None) -> Tensor:
    if valid_vocab is not None:
        weight_VD = weight_VD[:valid_vocab]
    return (hidden_TD @ weight_VD.t().to(hidden_TD.dtype)).float()


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    loss_weights_T: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    valid_vocab: int | None,
) -> tuple[Tensor, Tensor]:
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, target_ids_T, loss_weights_T, ignore_index, z_loss_weight, valid_vocab
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made beside the loss, chunk by chunk, so that logits are computed once and never kept."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, target_ids_T, loss_weights_T, ignore_index, z_loss_weight, valid_vocab):
        num_tokens, vocab = hidden_TD.shape[0], valid_vocab or weight_VD.shape[0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        nll_T = torch.zeros(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        kept_T = (target_ids_T != ignore_index).nonzero().squeeze(-1)
        for rows in kept_T.split(max(1, LOGITS_PER_CHUNK // vocab)):
            hidden, target = hidden_TD[rows], target_ids_T[rows]
            weight = 1.0 if loss_weights_T is None else loss_weights_T[rows].float()
            logits = _head_logits(hidden, weight_VD, valid_vocab)
            lse = logits.logsumexp(-1)
            nll = lse - logits.gather(-1, target[:, None]).squeeze(-1)
            nll_T[rows] = nll
            loss += ((nll + z_loss_weight * lse**2) * weight).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = logits.sub_(lse[:, None]).exp_()
            if z_loss_weight:
                grad.mul_((1 + 2 * z_loss_weight * lse)[:, None])
            grad.scatter_add_(-1, target[:, None], torch.full_like(lse, -1.0)[:, None])
            if loss_weights_T is not None:
                grad.mul_(weight[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[rows] = grad @ weight_VD[:vocab].to(hidden.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD[:vocab] += grad.t() @ hidden
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_T)
        return loss, nll_T

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = (grad_hidden_TD.float() * grad_loss).to(grad_hidden_TD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_ids_T: Tensor,
    temperature: float,
    valid_vocab: int | None,
    teacher_hidden_TD: Tensor | None,
    teacher_weight_VD: Tensor | None,
    jsd_beta: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    def chunk(hidden: Tensor, tokens: Tensor, teacher_hidden: Tensor | None) -> tuple[Tensor, ...]:
        logp = (_head_logits(hidden, weight_VD, valid_vocab) / temperature).log_softmax(-1)
        logprob = logp.gather(-1, tokens[:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        if teacher_hidden is None:
            return logprob, entropy
        with torch.no_grad():
            teacher = _head_logits(teacher_hidden, teacher_weight_VD, valid_vocab)  # type: ignore[arg-type]
            teacher_logp = (teacher / temperature).log_softmax(-1)
        return logprob, entropy, divergence(teacher_logp, logp, jsd_beta)  # type: ignore[arg-type]

    size = max(1, LOGITS_PER_CHUNK // weight_VD.shape[0])
    parts = []
    for start in range(0, hidden_TD.shape[0], size):
        part = slice(start, start + size)
        inputs = (hidden_TD[part], token_ids_T[part], None if teacher_hidden_TD is None else teacher_hidden_TD[part])
        if hidden_TD.shape[0] > size and torch.is_grad_enabled():
            parts.append(checkpoint(chunk, *inputs, use_reentrant=False))  # one chunk of logits alive at a time
        else:
            parts.append(chunk(*inputs))
    if not parts:
        empty = hidden_TD.sum(-1).float()
        return empty, empty, None if teacher_hidden_TD is None else empty
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return columns[0], columns[1], columns[2] if len(columns) == 3 else None


def divergence(teacher_logp_TV: Tensor, student_logp_TV: Tensor, jsd_beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence in nats; 0 is KL(teacher || student), 1 KL(student || teacher).

    Between them, with m = beta teacher + (1 - beta) student: beta KL(teacher || m) + (1 - beta) KL(student || m).
    """
    kl: Callable[[Tensor, Tensor], Tensor] = lambda p, q: (p.exp() * (p - q)).sum(-1)  # noqa: E731
    if jsd_beta == 0:
        return kl(teacher_logp_TV, student_logp_TV)
    if jsd_beta == 1:
        return kl(student_logp_TV, teacher_logp_TV)
    log_beta = torch.log(torch.tensor([jsd_beta, 1 - jsd_beta], device=teacher_logp_TV.device))
    mixture = torch.logaddexp(teacher_logp_TV + log_beta[0], student_logp_TV + log_beta[1])
    return jsd_beta * kl(teacher_logp_TV, mixture) + (1 - jsd_beta) * kl(student_logp_TV, mixture)
