"""``linear_logprob`` on a GPU: chunks of float32 logits by cuBLAS, one kernel over rows forward and one backward.

Legend: T tokens, R rows (tokens) of one chunk, D model width, V vocabulary, P row pitch of the logits.

Forward, a chunk of R rows: logits = hidden @ weight.T, float32 out of bfloat16 operands, then one pass over each row,
or over student's and teacher's side by side. Backward computes the logits again, overwrites them with their gradient in
the input's dtype (in the same memory) and makes both gradients (``head_products``), the head's as a float32 sum.

Why float32 logits: bfloat16 has 8 bits, so a logit near 20 is off by up to 0.06 and so is the log-probability, and a
policy ratio by 6 %. Rounded by nothing, log-probs of sampler and trainer agree to the order of summation, 1e-5. The
price is 2 more bytes a logit and pass.

Roofline at T = 16,384, V = 151,936, D = 2,048 (H200: 790 TFLOP/s, 4.28 TB/s): forward 2 T V D = 10.2 TFLOP = 12.9 ms,
and the logits written and read, 8 T V = 20 GB = 4.7 ms, the writing half behind the product: 15.3 ms. A teacher as wide
doubles both. Backward 6 T V D = 38.7 ms, logits 10 T V = 25 GB = 5.8 ms, the head's sum 8 V D = 2.5 GB a chunk.
Memory beyond the inputs at R = 2,048: logits 4 R V = 1.24 GB, as much for a teacher; backward the sum, 4 V D = 1.24 GB.
"""

import torch
from torch import Tensor

from qwen3_kernels import launch
from qwen3_kernels.head_products import Columns, HeadGradients, multiprocessors, product_into, rows_per_chunk
from qwen3_kernels.linear_logprob_rows_triton import (
    GRADIENT_LAUNCH,
    SCORE_LAUNCH,
    divergence_kind,
    gradient_rows,
    log_weights,
    score_rows,
)

LOGITS_BYTES = 1_250_000_000
"""Most that one chunk of one model's logits takes."""
_GROUP = 4  # float32 logits in 16 bytes


class _Chunks:
    """Rows of logits of one model, made again and again in one buffer."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, columns: Columns, chunk_rows: int) -> None:
        self._hidden_TD = hidden_TD
        self._columns = columns
        self._weight_VD = weight_VD[: columns.pitch].to(hidden_TD.dtype)
        self.buffer_RP = torch.empty((chunk_rows, columns.pitch), dtype=torch.float32, device=hidden_TD.device)

    def at(self, start: int) -> Tensor:
        """Hidden states of the chunk that begins at ``start``; its logits are in the buffer."""
        hidden_RD = self._hidden_TD[start : start + self.buffer_RP.shape[0]]
        product_into(self.buffer_RP[: hidden_RD.shape[0], : self._weight_VD.shape[0]], hidden_RD, self._weight_VD.t())
        return hidden_RD

    def gradient_buffer(self) -> Tensor:
        """The buffer's memory as the hidden states' dtype: a row begins where it began, and is used up to V."""
        return self.buffer_RP.view(self._hidden_TD.dtype)


def _chunk_rows(hidden_TD: Tensor, columns: Columns) -> int:
    most_rows = LOGITS_BYTES // (4 * columns.pitch)
    return rows_per_chunk(
        hidden_TD.shape[0], columns.computed, hidden_TD.shape[1], most_rows, multiprocessors(hidden_TD)
    )


@torch.library.custom_op("qwen3_kernels::linear_logprob", mutates_args=())
def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_ids_T: Tensor,
    temperature: float,
    valid_vocab: int,
    teacher_hidden_TD: Tensor | None,
    teacher_weight_VD: Tensor | None,
    jsd_beta: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, divergence, logsumexp, the teacher's, and the centre of the divergence's gradient, all [T].

    The teacher's have no element without one.
    """
    num_tokens = hidden_TD.shape[0]
    columns = Columns.of(weight_VD.shape[0], valid_vocab)
    chunk_rows = _chunk_rows(hidden_TD, columns)
    student = _Chunks(hidden_TD, weight_VD, columns, chunk_rows)
    teacher = None
    if teacher_hidden_TD is not None and teacher_weight_VD is not None:
        teacher = _Chunks(teacher_hidden_TD, teacher_weight_VD, columns, chunk_rows)
    token_ids_T = token_ids_T.contiguous()
    sizes = [num_tokens] * 3 + [0 if teacher is None else num_tokens] * 3
    logprob_T, entropy_T, lse_T, divergence_T, teacher_lse_T, center_T = (
        torch.empty(size, dtype=torch.float32, device=hidden_TD.device) for size in sizes
    )
    log_beta, log_rest = log_weights(jsd_beta)
    options = SCORE_LAUNCH[launch.generation(hidden_TD.device)].options()
    for start in range(0, num_tokens, chunk_rows):
        rows = student.at(start).shape[0]
        if teacher is not None:
            teacher.at(start)
        score_rows[(rows,)](
            student.buffer_RP,
            None if teacher is None else teacher.buffer_RP,
            token_ids_T[start:],
            logprob_T[start:],
            entropy_T[start:],
            divergence_T[start:],
            lse_T[start:],
            teacher_lse_T[start:],
            center_T[start:],
            1.0 / temperature,
            log_beta,
            log_rest,
            columns.valid,
            columns.pitch,
            KIND=divergence_kind(jsd_beta),
            GROUP=_GROUP,
            **options,
        )
    return logprob_T, entropy_T, divergence_T, lse_T, teacher_lse_T, center_T


@_forward.register_fake
def _(hidden_TD, weight_VD, token_ids_T, temperature, valid_vocab, teacher_hidden_TD, teacher_weight_VD, jsd_beta):
    size = hidden_TD.shape[0]
    teacher_size = 0 if teacher_hidden_TD is None else size
    empty = hidden_TD.new_empty
    student = [empty(size, dtype=torch.float32) for _ in range(3)]
    teacher = [empty(teacher_size, dtype=torch.float32) for _ in range(3)]
    return student[0], student[1], teacher[0], student[2], teacher[1], teacher[2]


@torch.library.custom_op("qwen3_kernels::linear_logprob_backward", mutates_args=())
def _backward(
    of_logprob_T: Tensor | None,
    of_entropy_T: Tensor | None,
    of_divergence_T: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_ids_T: Tensor,
    teacher_hidden_TD: Tensor | None,
    teacher_weight_VD: Tensor | None,
    entropy_T: Tensor,
    lse_T: Tensor,
    teacher_lse_T: Tensor,
    center_T: Tensor,
    temperature: float,
    valid_vocab: int,
    jsd_beta: float | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and head; one not asked for has no element."""
    columns = Columns.of(weight_VD.shape[0], valid_vocab)
    chunk_rows = _chunk_rows(hidden_TD, columns)
    compute_weight_VD = weight_VD.to(hidden_TD.dtype)
    student = _Chunks(hidden_TD, compute_weight_VD, columns, chunk_rows)
    teacher = None
    if teacher_hidden_TD is not None and teacher_weight_VD is not None and of_divergence_T is not None:
        teacher = _Chunks(teacher_hidden_TD, teacher_weight_VD, columns, chunk_rows)
    gradients = HeadGradients(hidden_TD, compute_weight_VD, columns, needs_hidden, needs_weight)
    token_ids_T = token_ids_T.contiguous()
    of_logprob_T, of_entropy_T, of_divergence_T = (
        torch.zeros_like(lse_T) if of_T is None else of_T.contiguous()
        for of_T in (of_logprob_T, of_entropy_T, of_divergence_T)
    )
    log_beta, log_rest = log_weights(jsd_beta)
    options = GRADIENT_LAUNCH[launch.generation(hidden_TD.device)].options()
    gradient_RP = student.gradient_buffer()
    for start in range(0, hidden_TD.shape[0], chunk_rows):
        hidden_RD = student.at(start)
        if teacher is not None:
            teacher.at(start)
        gradient_rows[(hidden_RD.shape[0],)](
            student.buffer_RP,
            None if teacher is None else teacher.buffer_RP,
            gradient_RP,
            token_ids_T[start:],
            of_logprob_T[start:],
            of_entropy_T[start:],
            of_divergence_T[start:],
            lse_T[start:],
            teacher_lse_T[start:],
            entropy_T[start:],
            center_T[start:],
            1.0 / temperature,
            log_beta,
            log_rest,
            columns.valid,
            columns.pitch,
            gradient_RP.shape[1],
            KIND=divergence_kind(None if teacher is None else jsd_beta),
            GROUP=_GROUP,
            **options,
        )
        gradients.add(start, hidden_RD, gradient_RP[: hidden_RD.shape[0], : columns.computed])
    del student, teacher, gradient_RP  # before the cast makes another copy of the head
    grad_hidden_TD, grad_weight_VD = gradients.hidden_TD, gradients.weight_VD
    empty = hidden_TD.new_empty
    return (
        empty(0) if grad_hidden_TD is None else grad_hidden_TD,
        empty(0, dtype=weight_VD.dtype) if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
    )


@_backward.register_fake
def _(
    of_logprob_T, of_entropy_T, of_divergence_T, hidden_TD, weight_VD, token_ids_T, teacher_hidden_TD,
    teacher_weight_VD, entropy_T, lse_T, teacher_lse_T, center_T, temperature, valid_vocab, jsd_beta, needs_hidden,
    needs_weight,
):  # fmt: skip
    return (
        hidden_TD.new_empty(hidden_TD.shape if needs_hidden else 0),
        weight_VD.new_empty(weight_VD.shape if needs_weight else 0),
    )


def _save(ctx, inputs, output) -> None:
    hidden_TD, weight_VD, token_ids_T, temperature, valid_vocab, teacher_hidden_TD, teacher_weight_VD, jsd_beta = inputs
    _, entropy_T, divergence_T, lse_T, teacher_lse_T, center_T = output
    ctx.save_for_backward(
        hidden_TD, weight_VD, token_ids_T, teacher_hidden_TD, teacher_weight_VD, entropy_T, lse_T, teacher_lse_T,
        center_T,
    )  # fmt: skip
    ctx.scalars = temperature, valid_vocab, jsd_beta
    ctx.set_materialize_grads(False)
    without_teacher = () if teacher_hidden_TD is not None else (divergence_T,)
    ctx.mark_non_differentiable(lse_T, teacher_lse_T, center_T, *without_teacher)


def _differentiate(ctx, of_logprob_T, of_entropy_T, of_divergence_T, *_: None):
    if of_logprob_T is None and of_entropy_T is None and of_divergence_T is None:
        return (None,) * 8
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden_TD, grad_weight_VD = _backward(
        of_logprob_T, of_entropy_T, of_divergence_T, *ctx.saved_tensors, *ctx.scalars, needs_hidden, needs_weight
    )
    return grad_hidden_TD if needs_hidden else None, grad_weight_VD if needs_weight else None, *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def run(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    token_ids_T: Tensor,
    temperature: float,
    valid_vocab: int | None,
    teacher_hidden_TD: Tensor | None,
    teacher_weight_VD: Tensor | None,
    jsd_beta: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The implementation "triton" of ``linear_logprob``."""
    vocab = weight_VD.shape[0]
    if teacher_hidden_TD is not None and teacher_weight_VD is not None:
        teacher_hidden_TD, teacher_weight_VD = teacher_hidden_TD.detach(), teacher_weight_VD.detach()
        teacher_vocab = teacher_weight_VD.shape[0]
        if teacher_vocab < (valid_vocab or vocab) or (valid_vocab is None and teacher_vocab != vocab):
            raise ValueError(
                f"linear_logprob: the teacher's head has {teacher_vocab} rows and the student's {vocab}, expected as "
                f"many; pass valid_vocab (now {valid_vocab}), the number of tokens that both have"
            )
    logprob_T, entropy_T, divergence_T, *_ = _forward(
        hidden_TD, weight_VD, token_ids_T, temperature, valid_vocab or vocab, teacher_hidden_TD, teacher_weight_VD,
        jsd_beta,
    )  # fmt: skip
    return logprob_T, entropy_T, None if teacher_hidden_TD is None else divergence_T
