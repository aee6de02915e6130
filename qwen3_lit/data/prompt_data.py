"""Problems in batches: data for reinforcement learning and on-policy distillation.

Contract: the training problems are an endless stream of shuffled epochs. Each step takes the next ``prompts_per_step``
of it, in equal shares for the ranks, so the problems of a step are the same on any number of ranks. ``refill`` gives
spare problems for a step (dynamic sampling) from another stream, also a pure function of the seed and its arguments, so
that a resumed run draws the same ones.
"""

import json
import logging
from functools import lru_cache
from typing import Any

from qwen3_lit.data.batch import PromptBatch
from qwen3_lit.data.chat_template import prompt_ids
from qwen3_lit.data.packing import seeded_random
from qwen3_lit.data.schema import OnBadRecord, read_records
from qwen3_lit.data.text_data_module import TextDataModule
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)


def prompt_key(problem: dict[str, Any]) -> str:
    """What makes two problems the same: their messages."""
    return json.dumps(problem["messages"], sort_keys=True, ensure_ascii=False)


class PromptData(TextDataModule):
    """Batches of problems.

    Records with ``split: held_out`` in ``paths`` join the held-out problems. A training problem whose messages equal
    those of a held-out one is left out and counted.

    Args:
        tokenizer_path: tokenizer folder (any Hugging Face one with Qwen3's chat tokens).
        paths: JSONL or parquet files, folders of them, or datasets names, with problem records.
        held_out_path: file of problems to evaluate on.
        prompts_per_step: problems of one training step over all ranks; the number of ranks must divide it.
        max_prompt_tokens: longer prompts are left out and counted.
        tasks: keep only problems of these tasks; None keeps all.
        on_bad_record: "raise" stops at a bad record, "skip" counts and leaves it out.
        seed: decides every order.
        prefetch_batches: batches made ahead by a background thread.
    """

    def __init__(
        self,
        tokenizer_path: str,
        paths: list[str],
        held_out_path: str | None = None,
        prompts_per_step: int = 64,
        max_prompt_tokens: int | None = None,
        tasks: list[str] | None = None,
        on_bad_record: OnBadRecord = "raise",
        seed: int = 0,
        prefetch_batches: int = 0,
    ) -> None:
        super().__init__(tokenizer_path, seed=seed, prefetch_batches=prefetch_batches)
        if not paths:
            raise UserError("data.paths is empty, expected at least one file of problems")
        if prompts_per_step < 1:
            raise UserError(f"data.prompts_per_step is {prompts_per_step}, expected 1 or more")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise UserError(f"data.max_prompt_tokens is {max_prompt_tokens}, expected 1 or more, or null for no limit")
        self.paths = paths
        self.held_out_path = held_out_path
        self.prompts_per_step = prompts_per_step
        self.max_prompt_tokens = max_prompt_tokens
        self.tasks = tasks
        self.on_bad_record: OnBadRecord = on_bad_record
        self.problems: list[dict[str, Any]] = []
        """Training problems in file order."""
        self.held_out_problems: list[dict[str, Any]] = []
        """Held-out problems in file order."""
        self.known_tasks: set[str] = set()
        """Tasks of all records read, those that ``tasks`` leaves out included."""
        self.dropped: dict[str, int] = {}
        """Training problems left out, by reason."""
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def prompts_per_batch(self) -> int:
        """Problems of one rank in one step.

        Raises:
            UserError: the number of ranks does not divide ``prompts_per_step``.
        """
        share, rest = divmod(self.prompts_per_step, self.world_size)
        if rest:
            raise UserError(
                f"data.prompts_per_step is {self.prompts_per_step}, which {self.world_size} ranks cannot share equally"
                f"; use a multiple of {self.world_size}"
            )
        return share

    def load_data(self) -> None:
        """Read all problems and keep training and held-out ones apart.

        Raises:
            UserError: a bad record, or no problem left to train on.
        """
        records = [r for path in self.paths for r in read_records(path, "problem", self.on_bad_record)]
        held_out = [r for r in records if r.get("split") == "held_out"]
        if self.held_out_path is not None:
            held_out += list(read_records(self.held_out_path, "problem", self.on_bad_record))
        self.known_tasks = {r["task"] for r in [*records, *held_out]}
        self.dropped = {"other_task": 0, "held_out_duplicate": 0, "too_long": 0}
        self.held_out_problems = [r for r in held_out if self.tasks is None or r["task"] in self.tasks]
        held_out_keys = {prompt_key(r) for r in held_out}
        self.problems = []
        for record in records:
            if record.get("split") == "held_out":
                continue
            if self.tasks is not None and record["task"] not in self.tasks:
                self.dropped["other_task"] += 1
            elif prompt_key(record) in held_out_keys:
                self.dropped["held_out_duplicate"] += 1
            elif self._too_long(record):
                self.dropped["too_long"] += 1
            else:
                self.problems.append(record)
        if any(self.dropped.values()):
            log.warning("problems left out of training: %s", {k: v for k, v in self.dropped.items() if v})
        if not self.problems:
            raise UserError(
                f"{', '.join(map(str, self.paths))}: no problem is left to train on (dropped: {self.dropped})"
            )
        self._order.cache_clear()

    def make_batch(self, index: int) -> PromptBatch:
        """The share of one rank in one step: batch ``index`` follows batch ``index - 1`` in the stream of epochs."""
        self.ensure_loaded()
        first = index * self.prompts_per_batch
        indices = [self._at("order", n) for n in range(first, first + self.prompts_per_batch)]
        return PromptBatch([self.problems[i] for i in indices], indices, batch_index=index)

    def refill(self, batch_index: int, attempt: int, count: int, exclude: set[int] | None = None) -> PromptBatch:
        """Spare problems for a step, a pure function of the arguments and the seed.

        Args:
            batch_index: ``PromptBatch.batch_index`` of the step.
            attempt: 0, 1, ... within the step.
            count: how many; fewer come back when there are not that many.
            exclude: indices that the step has used already.
        """
        self.ensure_loaded()
        rng = seeded_random(self.seed, "refill", batch_index, attempt)
        choices = [i for i in range(len(self.problems)) if not exclude or i not in exclude]
        indices = rng.sample(choices, min(count, len(choices)))
        return PromptBatch([self.problems[i] for i in indices], indices, batch_index=batch_index)

    def make_val_batch(self, index: int) -> PromptBatch:
        """Held-out problems in file order, ``prompts_per_batch`` at a time."""
        first = index * self.prompts_per_batch
        indices = list(range(first, min(first + self.prompts_per_batch, len(self.held_out_problems))))
        return PromptBatch([self.held_out_problems[i] for i in indices], indices, batch_index=index)

    def num_val_batches(self) -> int:
        """Batches of held-out problems."""
        return -(-len(self.held_out_problems) // self.prompts_per_batch)

    def state_dict(self) -> dict[str, Any]:
        """The base's state and the number of ranks, which decides how many problems a batch had."""
        return super().state_dict() | {"world_size": self.world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last finished step; batches of another number of ranks are converted."""
        steps = state_dict["batches_done"] // state_dict["world_size"]
        super().load_state_dict(state_dict | {"batches_done": steps * self.world_size})

    def order_settings(self) -> dict[str, Any]:
        """Seed, batch size, and how many problems there are."""
        return {"seed": self.seed, "prompts_per_step": self.prompts_per_step, "problems": len(self.problems)}

    def _at(self, stream: str, position: int) -> int:
        epoch, within = divmod(position, len(self.problems))
        return self._order(stream, epoch)[within]

    def _make_order(self, stream: str, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        seeded_random(self.seed, stream, epoch).shuffle(order)
        return order

    def _too_long(self, record: dict[str, Any]) -> bool:
        if self.max_prompt_tokens is None:
            return False
        return len(prompt_ids(self.tokenizer, record["messages"], record.get("tools"))) > self.max_prompt_tokens

    def _filler(self) -> PromptBatch:
        return PromptBatch([], [], batch_index=-1)
