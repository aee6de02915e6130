"""Reward by a judge that reads the reference answer (Qwen3 report, section 4.4: the second kind of reward).

The judge is a language model that is asked in words: a Hugging Face folder run in process, an engine that the trainer
binds, or any OpenAI-compatible server. Servers are asked with the standard library's HTTP client: one POST is all that
is needed, and the openai package would be one more dependency for it.
"""

import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from qwen3_lit.errors import UserError
from qwen3_lit.rl.environment import safe_text
from qwen3_lit.rl.rewards.reward import Reward, RewardInput

if TYPE_CHECKING:
    from qwen3_lit.data.tokenizer import TextTokenizer
    from qwen3_lit.generation.protocol import RolloutEngine

log = logging.getLogger(__name__)

DEFAULT_INSTRUCTION = """Rate the response to the question against the reference answer.
What matters is whether the response says the same in substance; wording, order and length do not matter.

[Question]
{question}

[Reference answer]
{reference}

[Response]
{response}

End with one line "Score: N", N from 0 (wrong) to 10 (as good as the reference)."""

RETRY_PAUSE_SECONDS = 0.5
"""Pause before the first further attempt; each one after it waits twice as long."""

_SCORE = re.compile(
    r"score[\s*_:=]*(\d{1,3}(?:\.\d{1,4})?)(?:\s*(?:/|out of)\s*(\d{1,3}(?:\.\d{1,4})?))?[\s*_.]*$", re.IGNORECASE
)


def parse_score(text: str, max_score: float) -> float | None:
    """The "Score: N" that ends a verdict, as a fraction of `max_score`; None when there is none or it is out of range.

    It has to end the last line: a "Score: 10" elsewhere may be a quotation of the response.
    """
    found = _SCORE.search(text[-4000:].rstrip().rpartition("\n")[2])
    if found is None or (found[2] is not None and float(found[2]) != max_score):
        return None
    value = float(found[1]) / max_score
    return value if value <= 1 else None


class JudgeReward(Reward):
    """A language model's rating of the answer against the reference, divided by `max_score` into [0, 1].

    Exactly one source of verdicts is needed: `path`, `base_url`, or an engine given to :meth:`bind`. Verdicts that
    cannot be read, and requests that fail, count as failed rewards. Not applicable without a reference answer.

    Args:
        path: Hugging Face folder of the judge, run in process.
        device: Where the judge of `path` runs; null takes a GPU where there is one.
        base_url: OpenAI-compatible server, such as http://localhost:8000/v1.
        model: Model name for the server.
        api_key_env: Environment variable that holds the server's key; null sends none.
        instruction: What the judge is asked; `{question}`, `{reference}` and `{response}` are filled in.
        max_score: The rating that means as good as the reference.
        max_new_tokens: Limit of a verdict.
        enable_thinking: Let the judge think first.
        temperature: Sampling temperature; 0 is greedy.
        max_chars: How much of the end of a response the judge reads.
        timeout_seconds: Limit of one request to the server.
        retries: Further attempts after a failed request, with growing pauses.
        parallel_requests: Requests under way at a time.
        weight: Weight in the composition.
        tasks: Tasks the reward applies to; null means every task.
        name: Name in metrics.
    """

    in_process = True
    default_name = "judge"

    def __init__(
        self,
        path: str | None = None,
        device: str | None = None,
        base_url: str | None = None,
        model: str = "judge",
        api_key_env: str | None = None,
        instruction: str = DEFAULT_INSTRUCTION,
        max_score: float = 10.0,
        max_new_tokens: int = 512,
        enable_thinking: bool = False,
        temperature: float = 0.0,
        max_chars: int = 8000,
        timeout_seconds: float = 60.0,
        retries: int = 2,
        parallel_requests: int = 16,
        weight: float = 1.0,
        tasks: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, tasks, name)
        if path is not None and base_url is not None:
            raise UserError("JudgeReward: path and base_url are both set; name one source of verdicts")
        for field_name in ("{question}", "{reference}", "{response}"):
            if field_name not in instruction:
                raise UserError(f"JudgeReward: instruction: {field_name} is missing from the text")
        if max_score <= 0 or max_new_tokens < 1 or parallel_requests < 1 or retries < 0:
            raise UserError(
                "JudgeReward: max_score, max_new_tokens and parallel_requests must be positive, retries >= 0"
            )
        self.path = path
        self.device = device
        self.base_url = base_url
        self.model = model
        self.api_key_env = api_key_env
        self.instruction = instruction
        self.max_score = max_score
        self.max_new_tokens = max_new_tokens
        self.enable_thinking = enable_thinking
        self.temperature = temperature
        self.max_chars = max_chars
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.parallel_requests = parallel_requests
        self._engine: RolloutEngine | None = None
        self._tokenizer: TextTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None, "_tokenizer": None}

    def bind(self, engine: "RolloutEngine", tokenizer: "TextTokenizer") -> None:
        """Ask this engine; it may serve other purposes between the calls."""
        self._engine, self._tokenizer = engine, tokenizer

    def applies(self, item: RewardInput) -> bool:
        return super().applies(item) and bool(item.reference)

    def prepare(self) -> None:
        if self._engine is not None or self.base_url is not None:
            return
        if self.path is None:
            raise UserError("JudgeReward: no judge is given; set path or base_url")
        from qwen3_lit.data.tokenizer import load_tokenizer
        from qwen3_lit.generation.engine import PagedEngine
        from qwen3_lit.rl.rewards.frozen_model import load_frozen

        tokenizer = load_tokenizer(self.path)
        self.bind(PagedEngine.for_tokenizer(load_frozen(self.path, self.device), tokenizer), tokenizer)

    def question(self, item: RewardInput) -> list[dict[str, Any]]:
        """The conversation put to the judge; a control token that a text spells out, such as `<|im_end|>`, is none."""
        asked = "\n\n".join(str(message.get("content", "")) for message in item.messages)
        text = self.instruction
        # Not str.format: braces in the texts are no fields.
        parts = {"question": asked, "reference": item.reference, "response": item.answer[-self.max_chars :]}
        pattern = re.compile(r"\{(question|reference|response)\}")
        return [{"role": "user", "content": safe_text(pattern.sub(lambda match: parts[match.group(1)], text))}]

    def score(self, item: RewardInput) -> float | None:
        return self.score_batch([item])[0]

    def score_batch(self, items: Sequence[RewardInput]) -> list[float | None]:
        """Ratings in [0, 1]; nan where no verdict could be read."""
        self.prepare()
        questions = [self.question(item) for item in items]
        if self.base_url is not None:
            with ThreadPoolExecutor(self.parallel_requests) as pool:
                verdicts = list(pool.map(self._ask_server, questions))
        else:
            verdicts = self._ask_engine(questions)
        scores = [None if verdict is None else parse_score(verdict, self.max_score) for verdict in verdicts]
        unread = sum(score is None for score in scores)
        if unread:
            log.warning("reward %s: %d of %d verdicts could not be read", self.name, unread, len(scores))
        return [float("nan") if score is None else score for score in scores]

    def _ask_engine(self, questions: Sequence[list[dict[str, Any]]]) -> list[str | None]:
        from qwen3_lit.data.chat_template import prompt_ids, split_thinking
        from qwen3_lit.generation.sampling import SamplingParams

        engine, tokenizer = self._engine, self._tokenizer
        if engine is None or tokenizer is None:
            raise UserError("JudgeReward: no judge is given; set path or base_url")
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop_token_ids=(tokenizer.im_end_id, tokenizer.end_of_text_id),
        )
        prompts = [prompt_ids(tokenizer, asked, enable_thinking=self.enable_thinking) for asked in questions]
        groups = engine.generate(prompts, params)
        return [split_thinking(tokenizer.decode(group[0].token_ids, skip_special=True))[1] for group in groups]

    def _ask_server(self, question: list[dict[str, Any]]) -> str | None:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if key:
            headers["Authorization"] = f"Bearer {key}"
        body = {
            "model": self.model,
            "messages": question,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "chat_template_kwargs": {"enable_thinking": self.enable_thinking},
        }
        request = urllib.request.Request(
            f"{str(self.base_url).rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        error: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as failure:
                error = failure
        log.warning("reward %s: %s does not answer: %s", self.name, self.base_url, error)
        return None
