"""A reward that misbehaves costs one default reward, shows in the metrics, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qwen3_lit.errors import UserError
from qwen3_lit.rl.rewards.math_answer import MathAnswerReward
from qwen3_lit.rl.rewards.reward import Reward, RewardInput
from qwen3_lit.rl.rewards.workers import RewardPool

# Seconds: 0.7 was once too short for an item that allocates in vain, on a machine with other work.
DEADLINE = 5.0

HOSTILE = textwrap.dedent(
    """
    import os, signal, sys, time
    from qwen3_lit.rl.rewards.reward import Reward

    class Hostile(Reward):
        default_name = "hostile"

        def score(self, item):
            text = item.answer
            if text == "sleep":
                time.sleep(10_000)
            if text == "allocate":
                blocks = []
                while True:
                    blocks.append(bytearray(1 << 24))
            if text == "raise":
                raise RuntimeError("no")
            if text == "exit":
                sys.exit(3)
            if text == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "nan":
                return float("nan")
            if text == "regex":
                import re
                return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))
            if text == "torch":
                return float("torch" in sys.modules)
            return len(text) / 10

    class Pid(Reward):
        default_name = "pid"

        def score(self, item):
            return float(os.getpid())
    """
)


@pytest.fixture
def hostile_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hostile_rewards_for_test.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    import hostile_rewards_for_test

    yield hostile_rewards_for_test
    sys.modules.pop("hostile_rewards_for_test", None)


def item(text: str, **problem: object) -> RewardInput:
    record = {"answer": "4", "task": "add", **problem}
    return RewardInput([{"role": "user", "content": "2+2"}], text, None, text, record)


@pytest.mark.parametrize(
    ("bad", "failure"),
    [
        ("sleep", "timeouts"),
        ("regex", "timeouts"),
        ("allocate", "oom"),
        ("raise", "errors"),
        ("exit", "errors"),
        ("nan", "errors"),
        ("die", "crashes"),
    ],
)
def test_one_bad_item_costs_one_default_reward(hostile_module, bad: str, failure: str) -> None:
    answers = ["a", "bb", bad, "ccc", "dddd", "eeeee", "f"]
    rewards = [hostile_module.Hostile(), MathAnswerReward()]
    limits = {"deadline_seconds": DEADLINE, "memory_limit_mb": 600}
    with RewardPool(rewards, num_workers=1, default_reward=-1.0, **limits) as pool:
        scores = pool.score([item(answer) for answer in answers])
        expected = [-1.0 if answer == bad else len(answer) / 10 for answer in answers]
        assert [score["hostile"] for score in scores] == expected
        assert [score["math_answer"] for score in scores] == [0.0] * len(answers), "the other reward of the item counts"
        assert pool.metrics[failure] == 1 and pool.metrics[f"hostile/{failure}"] == 1
        assert sum(pool.metrics[name] for name in ("timeouts", "errors", "oom", "crashes")) == 1
        # The pool goes on working, and a clean batch reports no failure.
        assert pool.score([item("xx")])[0]["hostile"] == 0.2
        assert pool.metrics[failure] == 0 and pool.totals[failure] == 1
        since_start = pool.metrics_since({})
        assert since_start[failure] == since_start[f"hostile/{failure}"] == 1
        assert max(value for name, value in since_start.items() if name.endswith("_frac")) == 1 / (2 * 7 + 2)


def test_two_workers_survive_a_batch_full_of_trouble(hostile_module) -> None:
    answers = ["sleep", "a", "die", "bb", "raise", "ccc", "allocate", "dddd", "die", "e"] * 2
    with RewardPool([hostile_module.Hostile()], num_workers=2, deadline_seconds=DEADLINE, memory_limit_mb=600) as pool:
        scores = [score["hostile"] for score in pool.score([item(answer) for answer in answers])]
    assert scores == [0.0 if a in ("sleep", "die", "raise", "allocate") else len(a) / 10 for a in answers]
    assert (pool.metrics["timeouts"], pool.metrics["crashes"]) == (2, 4)
    assert (pool.metrics["errors"], pool.metrics["oom"]) == (2, 2)
    assert (pool.metrics["crash_frac"], pool.metrics["timeout_frac"]) == (0.2, 0.1)


def test_order_none_and_task_limits_are_kept(hostile_module) -> None:
    rewards = [hostile_module.Hostile(tasks=["short"]), MathAnswerReward(tasks=["add"])]
    inputs = [item(str(i % 7), task="add" if i % 2 else "short") for i in range(101)]
    with RewardPool(rewards, num_workers=2) as pool:
        for i, score in enumerate(pool.score(inputs)):
            assert score["hostile"] == (None if i % 2 else 0.1)
            assert score["math_answer"] == (float(i % 7 == 4) if i % 2 else None)


def test_workers_do_not_import_torch(hostile_module) -> None:
    with RewardPool([hostile_module.Hostile(), MathAnswerReward()], num_workers=1) as pool:
        assert pool.score([item("torch")])[0]["hostile"] == 0.0


def test_a_symbolic_bomb_is_stopped() -> None:
    with RewardPool([MathAnswerReward()], num_workers=1, deadline_seconds=DEADLINE, memory_limit_mb=800) as pool:
        scores = pool.score([item("\\boxed{9^{9^{9^{9^{9}}}}}", answer="x+1"), item("\\boxed{1+x}", answer="x+1")])
    assert [score["math_answer"] for score in scores] == [0.0, 1.0]


def test_no_process_is_left_after_close(hostile_module) -> None:
    pool = RewardPool([hostile_module.Pid()], num_workers=2)
    pids = {int(score["pid"]) for score in pool.score([item("a")] * 64)}
    assert pids
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([item("a")])


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_when_the_parent_is_killed_in_mid_score(hostile_module, tmp_path: Path) -> None:
    """Also: a start script without a __main__ guard is fine."""
    script = tmp_path / "start.py"
    script.write_text(
        "import sys, threading\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from hostile_rewards_for_test import Hostile, Pid\n"
        "from qwen3_lit.rl.rewards.reward import RewardInput\n"
        "from qwen3_lit.rl.rewards.workers import RewardPool\n"
        "make = lambda text: RewardInput([], text, None, text, {})\n"
        "pool = RewardPool([Pid(), Hostile()], num_workers=1, deadline_seconds=300)\n"
        "print(int(pool.score([make('a')])[0]['pid']), flush=True)\n"
        "pool.score([make('sleep')])\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert _alive(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for _ in range(500):
        if not _alive(pid):
            return
        time.sleep(0.02)
    pytest.fail("the worker outlived its parent")


def test_a_reward_that_cannot_be_loaded_is_a_user_error(hostile_module, tmp_path: Path) -> None:
    reward = hostile_module.Hostile()
    with RewardPool([reward], num_workers=1) as pool:
        (tmp_path / "hostile_rewards_for_test.py").write_text("raise ImportError('gone')")
        with pytest.raises(UserError, match="could not load the rewards: ImportError: gone"):
            pool.score([item("a")])


class _InProcess(Reward):
    in_process = True
    default_name = "model"

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def applies(self, item: RewardInput) -> bool:
        return item.answer != "skip"

    def score_batch(self, items):
        self.batches.append(len(items))
        return [float("nan") if item.answer == "bad" else float(len(item.answer)) for item in items]


def test_model_rewards_run_in_this_process_as_one_batch() -> None:
    reward = _InProcess()
    with RewardPool([reward], default_reward=0.25) as pool:
        scores = pool.score([item("ab"), item("skip"), item("bad"), item("abc")])
        assert not pool._workers, "no worker is started for rewards that need none"
    assert [score["model"] for score in scores] == [2.0, None, 0.25, 3.0]
    assert reward.batches == [3] and pool.metrics["errors"] == 1


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="deadline_seconds"):
        RewardPool([MathAnswerReward()], deadline_seconds=0)
    with pytest.raises(UserError, match="two rewards are named"):
        RewardPool([MathAnswerReward(), MathAnswerReward()])
    unpicklable = MathAnswerReward()
    unpicklable.hook = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="cannot be sent"):
        RewardPool([unpicklable])
