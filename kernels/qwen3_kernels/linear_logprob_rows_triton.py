"""The two kernels of ``linear_logprob`` over rows of float32 logits: scores, and the gradient of scores in the logits.

Legend: T tokens, V vocabulary, S slots of ``softmax_rows``.

With x = logits / temperature, q = softmax(x) the student, p the teacher, a the token, H the entropy of q:

    log q_a             = x_a - lse                                           gradient in x:  1[v = a] - q_v
    H                   = -log q_a - E_q[x - x_a]                                             -q_v (log q_v + H)
    KL(p || q)          = log p_a - log q_a - E_p[d - d_a],  d = x - x_teacher                q_v - p_v
    KL(q || p)          = log q_a - log p_a + E_q[d - d_a]                                    q_v (log q_v/p_v - KL)
    beta KL(p || m) + (1 - beta) KL(q || m)                                       q_v ((1 - beta) log q_v/m_v - C)
        with m = beta p + (1 - beta) q,  C = (1 - beta) KL(q || m)

Expectations are of differences to the token's own value: a distribution that is sharp on the token has an entropy and a
divergence near zero, and nothing large cancels there. All but the last take one pass over the row; m needs both
logsumexps first, so the Jensen-Shannon divergence takes a second pass.
"""

import math

import triton
import triton.language as tl

from qwen3_kernels.launch import AotCase, Launch
from qwen3_kernels.softmax_rows import LOG2E, LOWEST, columns_of, load_block, merged, seen

NO_DIVERGENCE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON = (tl.constexpr(i) for i in range(4))

SCORE_LAUNCH = {
    80: Launch({"BLOCK": 4096, "STAGES": 2}, num_warps=16, num_stages=1),
    90: Launch({"BLOCK": 4096, "STAGES": 2}, num_warps=16, num_stages=1),
    100: Launch({"BLOCK": 4096, "STAGES": 2}, num_warps=16, num_stages=1),
}
GRADIENT_LAUNCH = {
    80: Launch({"BLOCK": 4096}, num_warps=16, num_stages=1),
    90: Launch({"BLOCK": 4096}, num_warps=16, num_stages=1),
    100: Launch({"BLOCK": 4096}, num_warps=16, num_stages=1),
}


def divergence_kind(jsd_beta: float | None) -> int:
    """The compile-time number of a divergence."""
    if jsd_beta is None:
        return NO_DIVERGENCE.value
    return {0.0: FORWARD_KL.value, 1.0: REVERSE_KL.value}.get(float(jsd_beta), JENSEN_SHANNON.value)


def log_weights(jsd_beta: float | None) -> tuple[float, float]:
    """log beta and log(1 - beta); zeros where no mixture is made."""
    mixes = divergence_kind(jsd_beta) == JENSEN_SHANNON.value
    return (math.log(jsd_beta), math.log1p(-jsd_beta)) if mixes and jsd_beta else (0.0, 0.0)


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):
    """log(beta p + (1 - beta) q), right where either has underflowed."""
    a, b = log_p + log_beta, log_q + log_rest
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp2(-tl.abs(a - b) * LOG2E))


@triton.jit
def _seen_scores(
    state_SSS, state_tSSS, x_row, t_row, start, valid, x_token, d_token, inverse_temperature,
    KIND: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Statistics of student and teacher (maximum, sum, sum of values) after one more block."""
    max_S, sum_S, entropy_S, gap_S = state_SSS
    x = load_block(x_row, start, valid, BLOCK, GROUP, MASKED, "evict_first") * inverse_temperature
    max_S, sum_S, shrink_S, e = seen(max_S, sum_S, x)
    entropy_S = entropy_S * shrink_S + tl.sum(e * (x - x_token), 1)
    teacher_max_S, teacher_sum_S = state_tSSS
    if KIND != NO_DIVERGENCE:
        t = load_block(t_row, start, valid, BLOCK, GROUP, MASKED, "evict_first") * inverse_temperature
        teacher_max_S, teacher_sum_S, teacher_shrink_S, teacher_e = seen(teacher_max_S, teacher_sum_S, t)
        if KIND == FORWARD_KL:
            gap_S = gap_S * teacher_shrink_S + tl.sum(teacher_e * (x - t - d_token), 1)
        if KIND == REVERSE_KL:
            gap_S = gap_S * shrink_S + tl.sum(e * (x - t - d_token), 1)
    return (max_S, sum_S, entropy_S, gap_S), (teacher_max_S, teacher_sum_S)


@triton.jit
def _mixture_terms(
    x_row, t_row, start, valid, lse, teacher_lse, inverse_temperature, log_beta, log_rest,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[S] sums over a block of p log p/m and of q log q/m."""
    log_q = load_block(x_row, start, valid, BLOCK, GROUP, MASKED, "evict_first") * inverse_temperature - lse
    log_p = load_block(t_row, start, valid, BLOCK, GROUP, MASKED, "evict_first") * inverse_temperature - teacher_lse
    log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
    return (
        tl.sum(tl.exp2(log_p * LOG2E) * (log_p - log_m), 1),
        tl.sum(tl.exp2(log_q * LOG2E) * (log_q - log_m), 1),
    )


@triton.jit
def score_rows(
    x_ptr,
    t_ptr,
    token_ptr,
    logprob_ptr,
    entropy_ptr,
    divergence_ptr,
    lse_ptr,
    teacher_lse_ptr,
    center_ptr,
    inverse_temperature,
    log_beta,
    log_rest,
    valid,
    pitch,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row: log-prob, entropy, divergence, and what their gradients need (both logsumexps, the term C or KL)."""
    index = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + index * pitch
    t_row = x_row
    token = tl.load(token_ptr + index)
    exists = (token >= 0) & (token < valid)
    # A token out of range has no probability: -inf, and no number for the rest.
    x_token = tl.load(x_row + token, mask=exists, other=float("-inf")).to(tl.float32) * inverse_temperature
    d_token = 0.0
    t_token = 0.0
    if KIND != NO_DIVERGENCE:
        t_row = t_ptr + index * pitch
        t_token = tl.load(t_row + token, mask=exists, other=0.0).to(tl.float32) * inverse_temperature
        d_token = x_token - t_token

    lowest_S = tl.full([BLOCK // GROUP], LOWEST, tl.float32)
    zero_S = tl.zeros([BLOCK // GROUP], tl.float32)
    whole = valid // BLOCK * BLOCK
    student = (lowest_S, zero_S, zero_S, zero_S)
    teacher = (lowest_S, zero_S)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        student, teacher = _seen_scores(
            student, teacher, x_row, t_row, start, valid, x_token, d_token, inverse_temperature,
            KIND, BLOCK, GROUP, False,
        )  # fmt: skip
    if whole < valid:
        student, teacher = _seen_scores(
            student, teacher, x_row, t_row, whole, valid, x_token, d_token, inverse_temperature,
            KIND, BLOCK, GROUP, True,
        )  # fmt: skip
    max_S, sum_S, entropy_S, gap_S = student
    lse, share_S = merged(max_S, sum_S)
    logprob = x_token - lse
    tl.store(lse_ptr + index, lse)
    tl.store(logprob_ptr + index, logprob)
    tl.store(entropy_ptr + index, -logprob - tl.sum(entropy_S * share_S, 0))
    if KIND != NO_DIVERGENCE:
        teacher_max_S, teacher_sum_S = teacher
        teacher_lse, teacher_share_S = merged(teacher_max_S, teacher_sum_S)
        log_ratio = logprob - (t_token - teacher_lse)
        divergence = 0.0
        center = 0.0
        if KIND == FORWARD_KL:
            divergence = -log_ratio - tl.sum(gap_S * teacher_share_S, 0)
        if KIND == REVERSE_KL:
            divergence = log_ratio + tl.sum(gap_S * share_S, 0)
            center = divergence
        if KIND == JENSEN_SHANNON:
            of_p_S, of_q_S = zero_S, zero_S
            if whole < valid:
                of_p_S, of_q_S = _mixture_terms(
                    x_row, t_row, whole, valid, lse, teacher_lse, inverse_temperature, log_beta, log_rest,
                    BLOCK, GROUP, True,
                )  # fmt: skip
            for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
                more_p_S, more_q_S = _mixture_terms(
                    x_row, t_row, start, valid, lse, teacher_lse, inverse_temperature, log_beta, log_rest,
                    BLOCK, GROUP, False,
                )  # fmt: skip
                of_p_S += more_p_S
                of_q_S += more_q_S
            center = tl.exp2(log_rest * LOG2E) * tl.sum(of_q_S, 0)
            divergence = tl.exp2(log_beta * LOG2E) * tl.sum(of_p_S, 0) + center
        tl.store(teacher_lse_ptr + index, teacher_lse)
        tl.store(divergence_ptr + index, divergence)
        tl.store(center_ptr + index, center)


@triton.jit
def _gradient_block(
    x_row, t_row, out_row, start, valid, pitch, token, lse, teacher_lse, entropy, center, inverse_temperature, log_beta,
    log_rest, of_logprob, of_entropy, of_divergence,
    KIND: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    columns = columns_of(start, BLOCK, GROUP)
    log_q = load_block(x_row, start, valid, BLOCK, GROUP, MASKED, "evict_first") * inverse_temperature - lse
    q = tl.exp2(log_q * LOG2E)
    factor = -of_logprob - of_entropy * (log_q + entropy)
    if KIND == FORWARD_KL:
        factor += of_divergence
    if KIND != NO_DIVERGENCE:
        t = load_block(t_row, start, valid, BLOCK, GROUP, MASKED, "evict_first")
        log_p = t * inverse_temperature - teacher_lse
        if KIND == REVERSE_KL:
            factor += of_divergence * (log_q - log_p - center)
        if KIND == JENSEN_SHANNON:
            log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
            factor += of_divergence * (tl.exp2(log_rest * LOG2E) * (log_q - log_m) - center)
    grad = q * factor
    if KIND == FORWARD_KL:
        grad -= of_divergence * tl.exp2(log_p * LOG2E)
    grad = tl.where(columns == token, grad + of_logprob, grad) * inverse_temperature
    # A narrower gradient lies over logits of this block and of earlier ones, which every thread must have read.
    tl.debug_barrier()
    if MASKED:
        there = start + tl.arange(0, BLOCK // GROUP) * GROUP < pitch
        grad = tl.where(columns < valid, grad, 0.0)
        tl.store(out_row + columns, grad.to(out_row.dtype.element_ty), mask=there[:, None])
    else:
        tl.store(out_row + columns, grad.to(out_row.dtype.element_ty))


@triton.jit
def gradient_rows(
    x_ptr,
    t_ptr,
    out_ptr,
    token_ptr,
    of_logprob_ptr,
    of_entropy_ptr,
    of_divergence_ptr,
    lse_ptr,
    teacher_lse_ptr,
    entropy_ptr,
    center_ptr,
    inverse_temperature,
    log_beta,
    log_rest,
    valid,
    pitch,
    out_pitch,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: gradient in its logits, from the front to the back, so that ``out_ptr`` may be the same memory in a
    narrower type: element v, 2 v bytes in, lies where logit v / 2 was."""
    index = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + index * pitch
    t_row = x_row
    out_row = out_ptr + index * out_pitch
    token = tl.load(token_ptr + index)
    lse = tl.load(lse_ptr + index)
    entropy = tl.load(entropy_ptr + index)
    of_logprob = tl.load(of_logprob_ptr + index)
    of_entropy = tl.load(of_entropy_ptr + index)
    of_divergence, teacher_lse, center = 0.0, 0.0, 0.0
    if KIND != NO_DIVERGENCE:
        t_row = t_ptr + index * pitch
        of_divergence = tl.load(of_divergence_ptr + index)
        teacher_lse = tl.load(teacher_lse_ptr + index)
        center = tl.load(center_ptr + index)
    whole = valid // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        _gradient_block(
            x_row, t_row, out_row, start, valid, pitch, token, lse, teacher_lse, entropy, center, inverse_temperature,
            log_beta, log_rest, of_logprob, of_entropy, of_divergence, KIND, BLOCK, GROUP, False,
        )  # fmt: skip
    if whole < pitch:
        _gradient_block(
            x_row, t_row, out_row, whole, valid, pitch, token, lse, teacher_lse, entropy, center, inverse_temperature,
            log_beta, log_rest, of_logprob, of_entropy, of_divergence, KIND, BLOCK, GROUP, True,
        )  # fmt: skip


def _case(direction: str, kernel, launches: dict[int, Launch], generation: int, kind: int, name: str) -> AotCase:
    integers = {"valid": "i32", "pitch": "i32:16", "out_pitch": "i32:16"}
    others = integers | {"inverse_temperature": "fp32", "log_beta": "fp32", "log_rest": "fp32"}
    others |= {"token_ptr": "*i64", "out_ptr": "*bf16"}
    return AotCase(
        f"linear_logprob {direction} {name} {generation}",
        kernel,
        {argument: others.get(argument, "*fp32") for argument in kernel.arg_names},
        {"KIND": kind, "GROUP": 4},
        launches[generation],
        (generation,),
    )


AOT_CASES = [
    _case(direction, kernel, launches, generation, kind, name)
    for direction, kernel, launches in (
        ("scores", score_rows, SCORE_LAUNCH),
        ("gradient", gradient_rows, GRADIENT_LAUNCH),
    )
    for kind, name in enumerate(("no teacher", "forward KL", "reverse KL", "JSD"))
    for generation in (80, 90, 100)
]
