"""A small real tokenizer, and an engine that plays back texts through the real protocol."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qwen3_lit.data.tokenizer import TextTokenizer, train_tokenizer
from qwen3_lit.generation.sampling import Completion, SamplingParams


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = ["the sum of three and four is seven", "What is 3 + 4? system user assistant tool think"] * 20
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


class ScriptedEngine:
    """Answers from a script: one list of assistant turns for each (prompt, sample); obeys `on_stop` as engines do."""

    def __init__(self, tokenizer: TextTokenizer, script: Callable[[int, int], list[str]]) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.prompts: list[list[int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Any, *, on_stop: Any = None, progress: Any = None
    ) -> list[list[Completion]]:
        assert isinstance(params, SamplingParams)
        self.prompts = [list(prompt) for prompt in prompts]
        return [
            [self._complete(prompt, sample, params, on_stop) for sample in range(params.n)]
            for prompt in range(len(prompts))
        ]

    def _complete(self, prompt: int, sample: int, params: SamplingParams, on_stop: Any) -> Completion:
        ids: list[int] = []
        mask: list[bool] = []
        for turn in self.script(prompt, sample):
            said = [*self.tokenizer.encode(turn), self.tokenizer.im_end_id]
            ids += said
            mask += [True] * len(said)
            if len(ids) > params.max_new_tokens:
                break
            forced = on_stop(prompt, sample, list(ids)) if on_stop else None
            if not forced:
                break
            ids += forced
            mask += [False] * len(forced)
        cut = len(ids) > params.max_new_tokens
        ids, mask = ids[: params.max_new_tokens], mask[: params.max_new_tokens]
        logprobs = [-0.01 * (index + 1) for index in range(len(ids))]
        return Completion(ids, logprobs, mask, "length" if cut else "stop")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.fixture
def scripted(tokenizer: TextTokenizer) -> Callable[[Callable[[int, int], list[str]]], ScriptedEngine]:
    return lambda script: ScriptedEngine(tokenizer, script)
