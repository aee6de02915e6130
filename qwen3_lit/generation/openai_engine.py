"""A ``RolloutEngine`` that talks to an OpenAI-compatible completions server (vLLM, SGLang, ...).

Prompts go out as token ids and tokens come back as ids: text would have to be encoded again, and the result need not be
what was sampled. The server therefore has to return token ids, as vLLM does on ``return_token_ids`` (0.10.2 and later)
or by ``token_id:123`` names on ``return_tokens_as_token_ids``. Uses the standard library's HTTP client alone.
"""

import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from qwen3_lit.errors import UserError
from qwen3_lit.generation.protocol import OnStop, Progress
from qwen3_lit.generation.sampling import Completion, SamplingParams, per_prompt_params
from qwen3_lit.generation.segments import Segment, SegmentRequest, generate_in_segments, never_sampled
from qwen3_lit.generation.thinking import ThinkingTokens

log = logging.getLogger(__name__)

_RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class OpenAIEngine:
    """Completions from a server; its weights are the server's own business.

    Args:
        base_url: up to and including the version, such as ``http://127.0.0.1:8000/v1``.
        model: name the server knows the model by.
        api_key_env: environment variable that holds the key, when the server wants one.
        max_concurrency: requests in flight.
        timeout_seconds: of one request.
        max_retries: repetitions after a connection error or a busy server, with growing pauses.
        stop_token_ids: end a completion in addition to those that a request names.
        thinking: needed for thinking budgets.
        unused_token_ids: rows of the model's embedding that are no token, ``range(len(tokenizer), vocab_size)``; their
            logits were never trained, and without this the server may sample them.
        seed: of the stream that request seeds are drawn from.

    Log-probs are as the server reports them; vLLM needs ``--logprobs-mode processed_logprobs`` to report them at the
    sampling temperature.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 64,
        timeout_seconds: float = 600.0,
        max_retries: int = 5,
        retry_pause_seconds: float = 0.5,
        stop_token_ids: Sequence[int] = (),
        thinking: ThinkingTokens | None = None,
        unused_token_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UserError(
                f"OpenAIEngine.base_url: seen {base_url!r}, expected a URL such as http://127.0.0.1:8000/v1"
            )
        self.url = base_url.rstrip("/") + "/completions"
        self.model = model
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.timeout_seconds = timeout_seconds
        self.max_retries = max_retries
        self.retry_pause_seconds = retry_pause_seconds
        self.stop_token_ids = tuple(stop_token_ids)
        self.thinking = thinking
        self.logit_bias = never_sampled(unused_token_ids)
        self._random = random.Random(seed)

    def reseed(self, seed: int) -> None:
        """See ``RolloutEngine``."""
        self._random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The stream of request seeds."""
        return {"random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_stop: OnStop | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See ``RolloutEngine``. Raises UserError when the server refuses a request or returns no token ids."""
        all_params = per_prompt_params(params, len(prompts))
        seeds = [self._random.randrange(2**31) for _ in range(sum(p.n for p in all_params))]
        with ThreadPoolExecutor(max(1, self.max_concurrency)) as pool:

            def complete(requests: list[SegmentRequest]) -> list[Segment]:
                return list(pool.map(self._complete, requests))

            return generate_in_segments(complete, prompts, all_params, seeds, self.thinking, on_stop, progress)

    def _complete(self, request: SegmentRequest) -> Segment:
        params = request.params
        stops = [*params.stop_token_ids, *self.stop_token_ids]
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.token_ids,
            "max_tokens": request.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "logprobs": 0,
            "seed": request.seed,
            "stop_token_ids": stops,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if params.top_k:
            body["top_k"] = params.top_k
        if params.min_p:
            body["min_p"] = params.min_p
        if self.logit_bias:
            body["logit_bias"] = self.logit_bias
        choice = self._post(body)["choices"][0]
        token_ids, logprobs = _tokens_and_logprobs(choice, self.url)
        return Segment(token_ids, logprobs, choice.get("finish_reason") == "stop")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.api_key_env)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.max_retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_body_of(error)}"
                if error.code not in _RETRIED_STATUS:
                    raise UserError(f"{self.url}: the server refused the request, {reason}") from error
            except (OSError, ValueError, HTTPException) as error:  # HTTPException, of a cut answer, is neither
                reason = str(error)
            if attempt < self.max_retries:
                pause = self.retry_pause_seconds * 2**attempt
                log.warning("%s: %s; trying again in %.1f s", self.url, reason, pause)
                time.sleep(pause)
        raise UserError(
            f"{self.url}: no answer after {self.max_retries + 1} attempts ({reason}); is the server running?"
        )


def _body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, HTTPException) as failure:
        return f"{error.reason}, body not read: {failure}"


def _tokens_and_logprobs(choice: dict[str, Any], url: str) -> tuple[list[int], list[float]]:
    report = choice.get("logprobs") or {}
    names = report.get("tokens") or []
    token_ids = choice.get("token_ids")
    if token_ids is None and names and all(str(name).startswith("token_id:") for name in names):
        token_ids = [int(name.removeprefix("token_id:")) for name in names]
    if token_ids is None:
        raise UserError(
            f"{url}: the answer holds no token ids, expected choices[].token_ids or token_id:N names in "
            f"logprobs.tokens; serve with vLLM >= 0.10.2 or with --return-tokens-as-token-ids"
        )
    logprobs = report.get("token_logprobs") or []
    if len(logprobs) != len(token_ids):
        raise UserError(f"{url}: seen {len(logprobs)} logprobs for {len(token_ids)} tokens, expected one each")
    return list(token_ids), [float(value) for value in logprobs]
