"""The vLLM engine without vLLM says what to install; with a module of vLLM's interface it asks for the right things."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import RolloutEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.generation.vllm_engine import VLLMEngine


def test_missing_vllm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'qwen3_lit\[vllm\]'"):
        VLLMEngine("folder")


def test_requests_and_answers_have_vllms_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, object] = {}

    class LLM:
        def __init__(self, **options: object) -> None:
            made.update(options)

        def generate(self, prompts: list[dict], sampling: list[SimpleNamespace], use_tqdm: bool) -> list:
            answers = []
            for prompt, params in zip(prompts, sampling, strict=True):
                made["logit_bias"] = params.logit_bias
                tokens = [prompt["prompt_token_ids"][-1] + 1 + i for i in range(params.max_tokens)]
                steps = [{t: SimpleNamespace(logprob=-0.5)} for t in tokens]
                answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens), logprobs=steps)]))
            return answers

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = VLLMEngine("folder", options={"gpu_memory_utilization": 0.5}, stop_token_ids=[8], unused_token_ids=[9])
    assert isinstance(engine, RolloutEngine)
    results = engine.generate([[1], [5]], SamplingParams(max_new_tokens=3, n=2))
    assert [[c.token_ids for c in group] for group in results] == [[[2, 3, 4]] * 2, [[6, 7, 8]] * 2]
    assert results[0][0].logprobs == [-0.5] * 3
    assert [group[0].finish_reason for group in results] == ["length", "stop"]
    assert made == {
        "model": "folder",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.5,
        "logit_bias": {9: -100.0},
    }
