"""The base of phases whose model answers problems: an engine on the trained weights, rewards, and their evaluation."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from qwen3_lit.data.schema import read_records
from qwen3_lit.errors import UserError
from qwen3_lit.generation.engine import PagedEngine
from qwen3_lit.generation.sampling import SamplingParams
from qwen3_lit.modules.phase_module import PhaseModule
from qwen3_lit.rl.environment import CalculatorEnvironment, Environment
from qwen3_lit.rl.replay import split_micro_batches
from qwen3_lit.rl.rewards.reward import Reward
from qwen3_lit.rl.rewards.workers import RewardPool
from qwen3_lit.rl.rollout import Rollout, RolloutBatch, to_packed
from qwen3_lit.rl.scoring import EvaluationResult, evaluate_problems


@dataclass
class EngineConfig:
    """The in-process generation engine."""

    page_size: int = 16
    """Tokens a page of the cache."""
    max_batch_size: int = 256
    """Sequences that decode together."""
    max_cached_tokens: int = 262144
    """Size of the cache in tokens."""
    max_prefill_tokens: int = 8192
    """Prompt tokens of one forward pass."""


@dataclass
class RewardWorkers:
    """The processes that score rule rewards."""

    num_workers: int = 2
    """Processes."""
    deadline_seconds: float = 10.0
    """Wall-clock limit of one reward on one completion; an overrun costs the default reward."""
    memory_limit_mb: int = 2048
    """Address space of one process in MiB."""
    default_reward: float = 0.0
    """Score of a reward that failed."""


@dataclass
class EvaluationConfig:
    """Held-out problems, answered before and after the phase."""

    problems: list[str] = field(default_factory=list)
    """Problem files."""
    limit: int | None = None
    """Problems taken from each file, from its start; null takes all."""
    modes: list[Literal["think", "no_think"]] = field(default_factory=list)
    """Modes in which every problem is answered; empty takes each problem's own."""
    mode_switch: Literal["auto", "soft", "hard"] = "auto"
    """How a mode is asked for: by a flag in the text (soft) or by the template (hard); auto keeps flags."""
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(max_new_tokens=32768, temperature=0.6, top_p=0.95, top_k=20)
    )
    """How answers are drawn; the default is the report's for thinking mode (section 4.6)."""
    sampling_no_think: SamplingParams | None = None
    """How answers in mode no_think are drawn; null draws them as the others."""


class PolicyModule(PhaseModule):
    """A phase with an engine, rewards and held-out problems."""

    def __init__(
        self,
        rewards: list[Reward] | None = None,
        evaluation: EvaluationConfig | None = None,
        engine: EngineConfig | None = None,
        reward_workers: RewardWorkers | None = None,
        environments: list[CalculatorEnvironment] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            rewards: what scores a completion; weights and tasks are set on each.
            evaluation: held-out problems; null evaluates nothing.
            engine: sizes of the generation engine.
            reward_workers: limits of the reward processes.
            environments: what answers tool calls.
            kwargs: see PhaseModule.
        """
        super().__init__(**kwargs)
        self.rewards = rewards or []
        self.evaluation = evaluation or EvaluationConfig()
        self.engine_config = engine or EngineConfig()
        self.reward_workers = reward_workers or RewardWorkers()
        self.environments: list[Environment] = list(environments or [])
        self._engine: PagedEngine | None = None
        self._pool: RewardPool | None = None
        self._engine_state: dict[str, Any] | None = None
        if self.evaluation.sampling_no_think is not None and "no_think" not in self.evaluation.modes:
            raise UserError(
                f"model.init_args.evaluation: sampling_no_think is set, but modes is {self.evaluation.modes}: "
                "add no_think to modes, or leave sampling_no_think null"
            )
        if self.evaluation.problems and not self.rewards:
            raise UserError("model.init_args.evaluation.problems is set, but rewards is empty: add what scores answers")

    @property
    def engine(self) -> PagedEngine:
        """The engine; it generates with the weights as they are at each call."""
        if self._engine is None:
            seed = int(self.trainer.datamodule.seed) + self.trainer.global_rank  # type: ignore[attr-defined]
            self._engine = PagedEngine.for_tokenizer(self.model, self.tokenizer, seed=seed, **vars(self.engine_config))
            if self._engine_state is not None:
                self._engine.load_state_dict(self._engine_state)
        return self._engine

    @property
    def pool(self) -> RewardPool:
        """The reward processes, started on first use."""
        if self._pool is None:
            self._pool = RewardPool(self.rewards, **vars(self.reward_workers))
        return self._pool

    @contextlib.contextmanager
    def generating(self) -> Iterator[PagedEngine]:
        """The engine with all weights on this rank, whatever the strategy; its cache is freed afterwards.

        The cache of a 30B-A3B at 262,144 tokens is 26 GB in bf16: the update has better use for them, and zeroing it
        anew takes some 10 ms.
        """
        gathered = getattr(self.trainer.strategy, "gathered", None)
        with contextlib.nullcontext() if gathered is None else gathered(self.model):
            yield self.engine
        self.engine.release_cache()

    def check_rollouts_fit(self, max_new_tokens: int, micro_batch_tokens: int) -> None:
        """Refuse lengths with which a rollout may fit into no micro-batch, before anything is sampled.

        Raises:
            UserError: naming both lengths and the budget.
        """
        limit = getattr(self.trainer.datamodule, "max_prompt_tokens", None)  # type: ignore[attr-defined]
        needed = (limit or 1) + max_new_tokens
        if needed > micro_batch_tokens:
            raise UserError(
                f"model.init_args.micro_batch_tokens: seen {micro_batch_tokens}, expected at least {needed}, the "
                f"longest rollout: data.init_args.max_prompt_tokens {limit}, model.init_args.sampling.max_new_tokens "
                f"{max_new_tokens}; raise the first or lower one of the others"
            )

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch's backward pass: only the last one of an optimizer step reduces gradients."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if last or block is None else block()

    def setup(self, stage: str) -> None:
        """Refuse held-out problems that are not there before anything runs."""
        super().setup(stage)
        for path in self.evaluation.problems:
            next(iter(read_records(path, "problem")), None)

    def teardown(self, stage: str) -> None:
        """End the reward processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def answer_held_out(self) -> dict[str, EvaluationResult]:
        """Answer the held-out problems: one result a mode ("own" when each problem keeps its own)."""
        config = self.evaluation
        if not config.problems:
            return {}
        problems: list[dict[str, Any]] = []
        for path in config.problems:
            problems += list(read_records(path, "problem"))[: config.limit]
        results: dict[str, EvaluationResult] = {}
        modes: list[Literal["think", "no_think"] | None] = [*config.modes] or [None]
        state = self.engine.state_dict()  # evaluation must not move the random stream of training
        with self.generating() as engine:
            for mode in modes:
                own = config.sampling_no_think if mode == "no_think" else None
                results[mode or "own"] = evaluate_problems(
                    engine,
                    self.tokenizer,
                    problems,
                    self.pool,
                    own or config.sampling,
                    environments=self.environments,
                    mode=mode,
                    mode_switch=config.mode_switch,
                )
        self.engine.load_state_dict(state)
        self.samples = [sample for result in results.values() for sample in result.samples]
        return results

    def evaluate(self) -> dict[str, float]:
        """Accuracy, reward and mode following over the held-out problems, by mode (if several) and by task."""
        figures: dict[str, float] = {}
        results = self.answer_held_out()
        for mode, result in results.items():
            suffix = "" if len(results) == 1 else f"_{mode}"
            for task, row in {"": result.overall, **result.tasks}.items():
                end = f"{suffix}/{task}" if task else suffix
                if row.accuracy is not None:
                    figures[f"accuracy{end}"] = row.accuracy
                figures[f"reward{end}"] = row.reward
                if row.think_follow is not None:
                    figures[f"think_follow{end}"] = row.think_follow
            figures[f"truncated{suffix}"] = result.overall.truncated_frac
            figures[f"completion_tokens{suffix}"] = result.overall.mean_tokens
        follows = [r.overall.think_follow for r in results.values() if r.overall.think_follow is not None]
        if len(results) > 1 and follows:
            figures["think_follow"] = sum(follows) / len(follows)
        return figures

    def phase_state(self) -> dict[str, Any]:
        """The engine's random stream, also of an engine that a resumed run has not used yet."""
        return {"engine": self.engine.state_dict()}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        """Restored when the engine is next used."""
        self._engine_state = state["engine"]


def pack_for_ranks(
    rollouts: list[Rollout], token_budget: int, *, mask_truncated: bool, device: torch.device
) -> list[RolloutBatch]:
    """Micro-batches; every rank gets the same number of them, or collectives would wait for ever.

    Args:
        rollouts: this rank's, at least one; their number and lengths may differ from other ranks'.
        token_budget: most tokens of a micro-batch.
        mask_truncated: see ``to_packed``.
        device: where ranks compare their numbers; the rows stay on the CPU.

    Raises:
        UserError: a rollout is longer than the budget.
    """
    parts = split_micro_batches(rollouts, token_budget)
    wanted = len(parts)
    if dist.is_available() and dist.is_initialized():
        most = torch.tensor(wanted, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        wanted = int(most)
        parts = split_micro_batches(rollouts, token_budget, num_at_least=wanted)
    rows = [to_packed(part, mask_truncated=mask_truncated) for part in parts]
    while len(rows) < wanted:  # a row that trains nothing
        filler = to_packed([min(rollouts, key=lambda rollout: rollout.num_tokens)], mask_truncated=mask_truncated)
        filler.mask_T.zero_()
        rows.append(filler)
    return rows


def training_params(params: SamplingParams, group_size: int, record_routing: bool) -> SamplingParams:
    """Sampling for training rollouts.

    Raises:
        UserError: a filter is on: log-probs of a truncated distribution bias the importance ratio.
    """
    if params.is_filtered or params.temperature == 0:
        raise UserError(
            f"model.init_args.sampling: temperature {params.temperature}, top_p {params.top_p}, top_k {params.top_k}: "
            "training samples the full distribution, expected temperature > 0, top_p 1 and top_k, min_p, penalty 0"
        )
    return replace(params, n=group_size, record_routing=record_routing)
