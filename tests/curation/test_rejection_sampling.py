import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from qwen3_lit.curation.rejection_sampling import (
    SampleConfig,
    conversation_record,
    read_queries,
    sample_responses,
    select,
)
from qwen3_lit.curation.synthesis import SynthesisRequest, synthesize, synthesize_to_file
from qwen3_lit.curation.verification import AnswerVerifier
from qwen3_lit.data.schema import read_records, validate_conversation
from qwen3_lit.data.tokenizer import TextTokenizer, train_tokenizer
from qwen3_lit.errors import UserError
from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.model.config import ModelConfig
from qwen3_lit.model.init import init_weights
from qwen3_lit.model.transformer import Qwen3
from qwen3_lit.rl.rollout import Rollout

PROBLEMS = list(
    synthesize("problems", SynthesisRequest(count=10, tasks=("chain_sum",), options={"max_digits": 1, "max_terms": 2}))
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = [record["messages"][0]["content"] for record in PROBLEMS] * 3
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(tokenizer: TextTokenizer) -> PagedEngine:
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        num_experts=0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = Qwen3(config)
    init_weights(model, torch.Generator().manual_seed(0))
    return PagedEngine.for_tokenizer(model, tokenizer, max_cached_tokens=4096)


def rollout(tokenizer: TextTokenizer, text: str, mode: str = "think", finish: str = "stop") -> Rollout:
    ids = tokenizer.encode(text) + [tokenizer.im_end_id]
    return Rollout(
        prompt_ids=[0],
        completion_ids=ids,
        logprobs=[0.0] * len(ids),
        trained_mask=[True] * len(ids),
        finish_reason=finish,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        group_id=0,
        problem={**PROBLEMS[0], "mode": mode},
        text=text,
        turns=[{"role": "assistant", "content": text}],
    )


def test_select_keeps_and_counts(tokenizer: TextTokenizer) -> None:
    good = rollout(tokenizer, "<think>\n1+2\n3\n</think>\n\n3")
    long = rollout(tokenizer, "<think>\n1+2\n3 3 3\n3\n</think>\n\n3")
    cut = rollout(tokenizer, "<think>\n1+2", finish="length")
    silent = rollout(tokenizer, "<think>\n1+2\n</think>\n\n")
    direct = rollout(tokenizer, "<think>\n\n</think>\n\n3")
    opened = rollout(tokenizer, "<think>\n1+2\n3\n</think>\n\n3\n<think>\n\n3")
    group: Sequence[Rollout] = [long, good, cut, silent, direct, opened, good]
    scores = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    kept, dropped = select(group, scores, "correct")
    assert len(kept) == 2
    assert dropped == {"truncated": 1, "no_answer": 1, "wrong_mode": 1, "think_tag_in_answer": 1, "wrong_answer": 1}
    kept, dropped = select(group, scores, "best")
    assert [record["messages"][-1]["reasoning_content"] for record in kept] == ["1+2\n3"]
    assert dropped["not_best"] == 2
    assert len(select(group, scores, "all")[0]) == 3
    assert select([good], [None], "correct") == ([], {"unverifiable": 1})


def test_a_response_that_thinks_unasked_in_an_earlier_turn_is_dropped(tokenizer: TextTokenizer) -> None:
    made = rollout(tokenizer, "<think>\n\n</think>\n\n3", mode="no_think")
    thought = {"role": "assistant", "content": "<think>\n1+2\n</think>\n\n<tool_call>"}
    made.turns = [thought, {"role": "tool", "content": "3"}, *made.turns]
    assert select([made], [1.0], "correct")[1] == {"wrong_mode": 1}


def test_thoughts_behind_an_empty_block_are_no_thinking_sample(tokenizer: TextTokenizer) -> None:
    """The stored reasoning would be empty, which no training set of thinking dialogs takes."""
    made = rollout(tokenizer, "<think>\n\n</think>\n\n1+2</think>3")
    assert select([made], [1.0], "all")[1] == {"wrong_mode": 1}


def test_conversation_record_keeps_tool_calls(tokenizer: TextTokenizer) -> None:
    body = '{"name": "calculator", "arguments": {"expression": "1+2"}}'
    call = f"<think>\nuse it\n</think>\n\n<tool_call>\n{body}\n</tool_call>"
    answer = "<think>\n\n</think>\n\n3"
    made = rollout(tokenizer, call + answer)
    made.turns = [
        {"role": "assistant", "content": call},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": answer},
    ]
    record = validate_conversation(conversation_record(made, 1.0), "here")
    first, tool, last = record["messages"][1:]
    assert first["reasoning_content"] == "use it" and first["content"] == ""
    assert first["tool_calls"][0]["function"] == {"name": "calculator", "arguments": {"expression": "1+2"}}
    assert tool["content"] == "3" and last == {"role": "assistant", "content": "3"}


class Interrupted(Exception):
    pass


def test_killed_run_continues_with_the_same_file(engine: PagedEngine, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    config = SampleConfig(n=2, mode="both", keep="all", max_new_tokens=40, temperature=1.5, chunk_problems=3, seed=7)
    config_thinking = SampleConfig(**(config.__dict__ | {"thinking_budget": 5}))

    def run(out: Path, stop_after: int | None = None, chosen: SampleConfig = config_thinking) -> None:
        def progress(done: int, total: int, kept: int) -> None:
            if done == stop_after:
                raise Interrupted

        with AnswerVerifier() as verifier:
            sample_responses(
                engine,
                tokenizer,
                PROBLEMS,
                str(out),
                config=chosen,
                verifier=verifier,
                source="s",
                report=str(out.with_suffix(".report")),
                progress=progress,
            )

    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    run(whole)
    with pytest.raises(Interrupted):
        run(resumed, stop_after=2)
    assert not resumed.exists()
    parts = Path(f"{resumed}.parts")
    first_chunk = (parts / "000000.jsonl").stat().st_mtime_ns
    # A file half written by a killed chunk must not be taken for a finished one.
    (parts / "000002.jsonl").write_text("{half")
    with pytest.raises(Interrupted):
        run(resumed, stop_after=3)
    assert (parts / "000000.jsonl").stat().st_mtime_ns == first_chunk
    run(resumed)
    assert resumed.read_bytes() == whole.read_bytes()
    assert resumed.with_suffix(".report").read_text() == whole.with_suffix(".report").read_text()
    assert not parts.exists()


def test_chunks_of_another_request_are_not_taken_over(
    engine: PagedEngine, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    parts = Path(f"{out}.parts")
    parts.mkdir()
    (parts / "request.json").write_text("{}")
    (parts / "000000.json").write_text('{"kept": 99, "sampled": 99}')
    report = tmp_path / "report.json"
    with AnswerVerifier() as verifier, pytest.raises(UserError, match="none of 6 responses to 2 problems.*6 truncated"):
        sample_responses(
            engine,
            tokenizer,
            PROBLEMS[:2],
            str(out),
            config=SampleConfig(n=3, max_new_tokens=4),
            verifier=verifier,
            source="s",
            report=str(report),
        )
    assert json.loads(report.read_text())["dropped"] == {"truncated": 6}
    assert not out.exists() and not parts.exists(), "nothing kept is an error, not an empty file"


def test_right_answers_are_kept_as_conversations(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    class Teacher:
        """Answers every prompt with the reference, the second sample wrongly."""

        def reseed(self, seed: int) -> None: ...

        def generate(self, prompts, params: SamplingParams, **_):  # type: ignore[no-untyped-def]
            from qwen3_lit.generation.sampling import Completion

            groups = []
            for index in range(len(prompts)):
                answer = str(PROBLEMS[index // 2]["answer"])
                opened = index % 2 == 0  # "both" asks for think first
                group = []
                for text in (answer, answer + "1"):
                    ids = tokenizer.encode(f"<think>\nso {text}\n</think>\n\n{text}" if opened else text)
                    ids.append(tokenizer.im_end_id)
                    group.append(Completion(ids, [0.0] * len(ids), [True] * len(ids), "stop"))
                groups.append(group)
            return groups

    out = tmp_path / "out.jsonl"
    config = SampleConfig(n=2, mode="both")
    with AnswerVerifier() as verifier:
        result = sample_responses(
            Teacher(),  # type: ignore[arg-type]
            tokenizer,
            PROBLEMS[:4],
            str(out),
            config=config,
            verifier=verifier,
            source="s",
        )
    records = list(read_records(out, "conversation"))
    assert result["dropped"] == {"wrong_answer": 8} and result["kept"] == len(records) == 8
    assert result["tasks"] == {"chain_sum": {"think": 0.5, "no_think": 0.5}}
    for record in records:
        last = record["messages"][-1]
        assert last["content"] == record["answer"] and record["score"] == 1.0
        assert ("reasoning_content" in last) == (record["mode"] == "think")


def test_queries_of_conversations_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    request = SynthesisRequest(count=5, tasks=("chain_sum",), options={"max_terms": 2, "held_out_similarity": 0.0})
    synthesize_to_file("reasoning_candidates", request, str(path))
    queries = read_queries(str(path))
    assert len(queries) == 5 and len(read_queries(str(path), limit=2)) == 2
    assert all([message["role"] for message in query["messages"]] == ["user"] for query in queries)
    assert not any("mode" in query or "provenance" in query for query in queries)
    path.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(UserError, match="c.jsonl:1: field 'answer'"):
        read_queries(str(path))
    with pytest.raises(UserError, match="no problem in it"):
        read_queries(str(path), "skip")


def test_config_is_checked() -> None:
    for changes in ({"n": 0}, {"mode": "sometimes"}, {"keep": "none"}):
        with pytest.raises(UserError):
            SampleConfig(**changes)  # type: ignore[arg-type]
