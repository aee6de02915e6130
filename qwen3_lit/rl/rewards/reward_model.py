"""Rewards by a trained scalar model (Qwen3 report, section 4.4: without a reference, and with one).

The folder is what `RewardModule` writes: a Hugging Face backbone plus `score_head.safetensors` with `score_head.weight`
[1, D]. The raw score is the head's product with the hidden state of the answer's last token, `<|im_end|>`; trained with
the Bradley-Terry loss, a difference of raw scores is the log-odds of being preferred.

Legend: T tokens, D model width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qwen3_lit.data.chat_template import encode_conversation, split_thinking, with_reference
from qwen3_lit.data.packing import Document, pack_best_fit, pack_row
from qwen3_lit.data.tokenizer import TextTokenizer, load_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.rl.environment import safe_text
from qwen3_lit.rl.rewards.frozen_model import load_frozen
from qwen3_lit.rl.rewards.reward import Reward, RewardInput

SCORE_HEAD_FILE = "score_head.safetensors"
SCORE_HEAD_KEY = "score_head.weight"
Normalisation = Literal["sigmoid", "tanh", "none"]


def normalise(raw: Tensor, kind: Normalisation, scale: float) -> Tensor:
    """Raw scores on the scale of the other rewards.

    `sigmoid`: sigmoid(raw / scale), in (0, 1): with scale 1 the chance of being preferred to an answer of raw score 0.
    `tanh`: tanh(raw / scale), in (-1, 1). `none`: raw / scale, unbounded.
    """
    if kind == "sigmoid":
        return torch.sigmoid(raw / scale)
    return torch.tanh(raw / scale) if kind == "tanh" else raw / scale


def load_score_head(path: str | Path, width: int) -> Tensor:
    """`score_head.weight` [1, D] of a reward model's folder.

    Raises:
        UserError: If the file is missing, damaged or does not fit the backbone.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path) / SCORE_HEAD_FILE
    if not file.is_file():
        raise UserError(f"{file}: not found, expected the folder of a model trained by RewardModule")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); write the folder again") from error
    weight = tensors.get(SCORE_HEAD_KEY)
    if weight is None or weight.shape != (1, width):
        seen = "absent" if weight is None else f"of shape {list(weight.shape)}"
        raise UserError(f"{file}: {SCORE_HEAD_KEY} is {seen}, expected shape [1, {width}]")
    return weight


def response_turns(item: RewardInput) -> list[dict[str, Any]]:
    """The turns of the completion, the last one without its thinking.

    A policy may write `<|im_end|>` with ordinary tokens; read by the encoder as the control token, it would let the
    policy write the turns that follow, so every text is :func:`safe_text`.
    """
    turns: list[dict[str, Any]] = []
    for turn in item.turns[:-1]:
        thinking, content = None, str(turn["content"])
        if turn["role"] == "assistant":
            thinking, content = split_thinking(content)
        turns.append({**turn, "content": safe_text(content), "reasoning_content": safe_text(thinking or "")})
    return [*turns, {"role": "assistant", "content": safe_text(item.answer)}]


class RewardModelReward(Reward):
    """Score of a trained reward model that reads the conversation and the answer, without a reference.

    Args:
        path: Folder written by RewardModule.
        normalisation: How the raw score is squashed: sigmoid, tanh or none.
        scale: Divides the raw score before squashing.
        batch_tokens: Tokens scored in one forward pass.
        max_tokens: Longer inputs lose their beginning.
        device: Where the model runs; null takes a GPU where there is one.
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    in_process = True
    default_name = "reward_model"

    def __init__(
        self,
        path: str,
        normalisation: Normalisation = "sigmoid",
        scale: float = 1.0,
        batch_tokens: int = 16384,
        max_tokens: int = 8192,
        device: str | None = None,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, tasks, name)
        if normalisation not in ("sigmoid", "tanh", "none"):
            raise UserError(f"{type(self).__name__}: normalisation: {normalisation!r}, expected sigmoid, tanh or none")
        if not scale > 0:
            raise UserError(f"{type(self).__name__}: scale: {scale} must be greater than 0")
        if not 1 <= max_tokens <= batch_tokens:
            raise UserError(
                f"{type(self).__name__}: max_tokens: {max_tokens} must be in 1..batch_tokens {batch_tokens}"
            )
        self.path = path
        self.normalisation: Normalisation = normalisation
        self.scale = scale
        self.batch_tokens = batch_tokens
        self.max_tokens = max_tokens
        self.device = device
        self._model: Qwen3 | None = None
        self._tokenizer: TextTokenizer | None = None
        self._head_1D: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_tokenizer": None, "_head_1D": None}

    def prepare(self) -> None:
        if self._model is not None:
            return
        model = load_frozen(self.path, self.device)
        self._head_1D = load_score_head(self.path, model.config.hidden_size).to(model.embed_tokens.weight.device)
        self._tokenizer = load_tokenizer(self.path)
        self._model = model

    def conversation(self, item: RewardInput) -> list[dict[str, Any]]:
        """What the model reads: the dialog and the answer, without its thinking."""
        return [*item.messages, *response_turns(item)]

    def score(self, item: RewardInput) -> float | None:
        return self.score_batch([item])[0]

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        self.prepare()
        assert self._tokenizer is not None
        documents = [
            encode_conversation(self._tokenizer, self.conversation(item), tools=item.problem.get("tools")).token_ids[
                -self.max_tokens :
            ]
            for item in items
        ]
        return list(normalise(self.raw_scores(documents), self.normalisation, self.scale).tolist())

    @torch.no_grad()
    def raw_scores(self, documents: Sequence[list[int]]) -> Tensor:
        """float32 [documents] on the CPU: the head's output at each document's last token."""
        self.prepare()
        assert self._model is not None and self._head_1D is not None
        device = self._head_1D.device
        scores = torch.zeros(len(documents))
        for row in pack_best_fit([len(document) for document in documents], self.batch_tokens):
            batch = pack_row([Document(documents[index]) for index in row]).to(device)
            output = self._model(batch.token_ids_T, batch.position_ids_T, batch.cu_seqlens, batch.max_seqlen)
            ends = torch.tensor([end - 1 for _, end in batch.document_spans()], device=device)
            with torch.autocast(device.type, enabled=False):  # scores of a group may differ by less than bf16 tells
                raw = output.hidden_TD[ends].float() @ self._head_1D[0].float()
            scores[torch.tensor(row)] = raw.cpu()
        return scores


class ReferenceModelReward(RewardModelReward):
    """Score of a trained reward model that reads the question, the reference answer and the response.

    Not applicable to problems without a reference answer. The arguments are those of RewardModelReward.

    Args:
        path: Folder written by RewardModule from preference records with a reference.
        normalisation: How the raw score is squashed: sigmoid, tanh or none.
        scale: Divides the raw score before squashing.
        batch_tokens: Tokens scored in one forward pass.
        max_tokens: Longer inputs lose their beginning.
        device: Where the model runs; null takes a GPU where there is one.
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    default_name = "reference_model"

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.reference)

    def conversation(self, item: RewardInput) -> list[dict[str, Any]]:
        """The dialog with the reference behind its last user turn, and the answer."""
        return [*with_reference(item.messages, item.reference), *response_turns(item)]
