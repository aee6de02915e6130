"""The OpenAI-compatible engine against a small server on loopback that speaks the completions protocol."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.generation.openai_engine import OpenAIEngine
from qwen3_lit.generation.protocol import RolloutEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.generation.thinking import ThinkingTokens

STOP, THINK, END_THINK = 99, 50, 51


class Server(ThreadingHTTPServer):
    """Continues a prompt that ends in t with t + 1, t + 2, ... up to its context; stops at a stop token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.headers_seen: list[dict] = []
        self.failures = 0
        self.status = 503
        self.cut = False
        self.context = 1000
        self.style = "token_ids"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers_seen.append(dict(self.headers))
        if self.server.failures:
            self.server.failures -= 1
            if self.server.cut:
                self.send_response(200)
                self.send_header("Content-Length", "5000")
                self.end_headers()
                self.wfile.write(b"{")
            else:
                self.send_error(self.server.status)
            return
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        tokens: list[int] = []
        last = body["prompt"][-1]
        room = self.server.context - len(body["prompt"])
        if room <= 0:
            self.send_error(400, "the prompt is longer than the context")
            return
        while len(tokens) < min(room, body["max_tokens"]):
            last = 90 if last > 99 else last + 1
            if str(last) in body.get("logit_bias", {}):
                continue
            tokens.append(last)
            if last in body["stop_token_ids"]:
                break
        names = [f"token_id:{t}" if self.server.style == "names" else f"w{t}" for t in tokens]
        choice = {"index": 0, "text": "", "finish_reason": "stop" if tokens[-1] in body["stop_token_ids"] else "length"}
        choice["logprobs"] = {"tokens": names, "token_logprobs": [-t / 100 for t in tokens]}
        if self.server.style == "token_ids":
            choice["token_ids"] = tokens
        answer = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def make_engine(server: Server, **options: object) -> OpenAIEngine:
    settings = {
        "stop_token_ids": (STOP,),
        "thinking": ThinkingTokens(END_THINK, (70, END_THINK, 80), THINK),
        "retry_pause_seconds": 0.001,
        "max_retries": 2,
    }
    return OpenAIEngine(server.url, "qwen", **{**settings, **options})


@pytest.mark.parametrize("style", ["token_ids", "names"])
def test_completions_come_back_in_order(server: Server, style: str) -> None:
    server.style = style
    done = []
    results = make_engine(server).generate(
        [[1, 2], [96]],
        [SamplingParams(max_new_tokens=3, n=2, top_k=4), SamplingParams(max_new_tokens=9)],
        progress=lambda *args: done.append(args),
    )
    assert [c.token_ids for c in results[0]] == [[3, 4, 5]] * 2
    assert results[0][0].logprobs == [-0.03, -0.04, -0.05] and results[0][0].finish_reason == "length"
    assert results[1][0].token_ids == [97, 98, STOP] and results[1][0].finish_reason == "stop"
    assert done == [(3, 3, 9)]
    assert server.bodies[0]["model"] == "qwen" and {b.get("top_k") for b in server.bodies} == {4, None}
    assert len({b["seed"] for b in server.bodies}) == 3


def test_thinking_budget_is_spliced_between_requests(server: Server) -> None:
    params = SamplingParams(max_new_tokens=8, thinking_budget=2)
    [[late], [closed], [opened]] = make_engine(server).generate([[5, THINK, 1], [THINK, END_THINK, 1], [49]], params)
    assert late.token_ids == [2, 70, END_THINK, 80, 81, 82, 83, 84]
    assert late.sampled_mask == [True, False, False, False, True, True, True, True]
    assert late.logprobs[1:4] == [0.0, 0.0, 0.0]
    assert closed.token_ids == list(range(2, 10)) and all(closed.sampled_mask)
    assert opened.token_ids == [THINK, END_THINK, 52, 53, 54, 55, 56, 57] and all(opened.sampled_mask)


def test_a_turn_that_opens_no_block_takes_two_requests(server: Server) -> None:
    params = SamplingParams(max_new_tokens=20, thinking_budget=0)
    [[never], [late]] = make_engine(server).generate([[52], [46]], params)
    assert never.token_ids == list(range(53, 73)) and all(never.sampled_mask)
    assert [body["max_tokens"] for body in server.bodies if body["prompt"][0] == 52] == [1, 19]
    # What was thought beyond the budget is dropped, the sentence stands where the budget ended.
    assert late.token_ids[:8] == [47, 48, 49, THINK, 70, END_THINK, 80, 81] and len(late.token_ids) == 20
    assert late.sampled_mask[:8] == [True] * 4 + [False] * 3 + [True] and late.logprobs[3:5] == [-0.5, 0.0]
    assert [body["max_tokens"] for body in server.bodies if body["prompt"][0] == 46] == [1, 19, 13]


def test_a_server_at_the_end_of_its_context_is_not_asked_again(server: Server) -> None:
    server.context = 5
    [[completion]] = make_engine(server).generate([[1, 2]], SamplingParams(max_new_tokens=8))
    assert completion.token_ids == [3, 4, 5] and completion.finish_reason == "length"
    assert len(server.bodies) == 1


def test_tokens_that_are_none_are_not_sampled(server: Server) -> None:
    engine = make_engine(server, unused_token_ids=range(3, 6))
    assert engine.generate([[1]], SamplingParams(max_new_tokens=3))[0][0].token_ids == [2, 6, 7]
    assert server.bodies[0]["logit_bias"] == {"3": -100.0, "4": -100.0, "5": -100.0}


def test_on_stop_goes_on_with_forced_tokens(server: Server) -> None:
    seen = []

    def on_stop(prompt: int, sample: int, tokens: list[int]) -> list[int] | None:
        seen.append((prompt, sample, list(tokens)))
        return [10, 97] if len(seen) == 1 else None

    [[completion]] = make_engine(server).generate([[97]], SamplingParams(max_new_tokens=20), on_stop=on_stop)
    assert completion.token_ids == [98, STOP, 10, 97, 98, STOP]
    assert completion.sampled_mask == [True, True, False, False, True, True]
    assert seen == [(0, 0, [98, STOP]), (0, 0, [98, STOP, 10, 97, 98, STOP])]
    assert server.bodies[1]["prompt"] == [97, 98, STOP, 10, 97]


def test_busy_server_is_asked_again_and_a_refusal_is_not(server: Server) -> None:
    server.failures = 2
    assert make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))[0][0].token_ids == [2]
    server.failures, server.status = 1, 400
    with pytest.raises(UserError, match="refused the request, HTTP 400"):
        make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))
    server.failures, server.status = 9, 503
    with pytest.raises(UserError, match="no answer after 3 attempts"):
        make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))


def test_a_cut_answer_is_asked_for_again(server: Server) -> None:
    server.failures, server.cut = 2, True
    assert make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))[0][0].token_ids == [2]
    server.failures = 9
    with pytest.raises(UserError, match="no answer after 3 attempts .IncompleteRead"):
        make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))


def test_server_without_token_ids_is_refused(server: Server) -> None:
    server.style = "text"
    with pytest.raises(UserError, match="holds no token ids"):
        make_engine(server).generate([[1]], SamplingParams(max_new_tokens=1))


def test_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "abc")
    make_engine(server, api_key_env="SOME_KEY").generate([[1]], SamplingParams(max_new_tokens=1))
    assert server.headers_seen[0]["Authorization"] == "Bearer abc"


def test_seeds_survive_a_resume(server: Server) -> None:
    engine = make_engine(server)
    assert isinstance(engine, RolloutEngine)
    state = json.loads(json.dumps(engine.state_dict()))
    engine.generate([[1]], SamplingParams(max_new_tokens=1))
    other = make_engine(server, seed=9)
    other.load_state_dict(state)
    other.generate([[1]], SamplingParams(max_new_tokens=1))
    assert server.bodies[0]["seed"] == server.bodies[1]["seed"]


def test_unsupported_requests_are_refused(server: Server) -> None:
    with pytest.raises(UserError, match="only the in-process PagedEngine"):
        make_engine(server).generate([[1]], SamplingParams(record_routing=True))
    penalty = SamplingParams(max_new_tokens=1, presence_penalty=1.0)
    assert make_engine(server).generate([[1]], penalty)[0][0].token_ids == [2]
    with pytest.raises(UserError, match="presence_penalty: seen 1.0, expected 0"):
        make_engine(server).generate([[1]], penalty, on_stop=lambda *_: None)
    with pytest.raises(UserError, match="presence_penalty: seen 1.0, expected 0"):
        make_engine(server).generate([[1]], SamplingParams(presence_penalty=1.0, thinking_budget=4))
    with pytest.raises(UserError, match="base_url: seen 'localhost'"):
        OpenAIEngine("localhost", "qwen")
