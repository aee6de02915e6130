"""The base of every data module: batches by index, and an exact resume.

Contract: a subclass answers ``make_batch(index)``, a pure function of the settings and a global batch index. Rank r of
W takes the indices r, r + W, r + 2W, ..., counted from the batches already done. A resume therefore needs one number,
the count of finished batches, and works on another number of ranks: the union of what all ranks see stays the same.

Lightning may fetch one batch ahead of training, so fetched batches are not counted here. The trainer's own count of
processed batches is what goes into the checkpoint.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch

from qwen3_lit.data.packing import default_max_documents
from qwen3_lit.data.tokenizer import TextTokenizer, load_tokenizer
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)


class BatchStream:
    """An endless iterable over ``make(index)`` for start, start + stride, ...

    Args:
        make: index -> batch.
        start: gives the first index each time iteration begins (a new epoch of the Trainer goes on where it was).
        stride: distance between two batches of this rank.
        stop: first index that is not produced, None for no end.
        prefetch: batches made ahead by a background thread; 0 makes each one on demand.
        pin: put tensors into page-locked memory.
        on_exhausted: called when the last batch is handed out, or at once when there is none.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        start: Callable[[], int],
        *,
        stride: int = 1,
        stop: int | None = None,
        prefetch: int = 0,
        pin: bool = False,
        on_exhausted: Callable[[], None] | None = None,
    ) -> None:
        self._make = make
        self._start = start
        self._stride = stride
        self._stop = stop
        self._prefetch = prefetch
        self._pin = pin
        self._on_exhausted = on_exhausted

    def __iter__(self) -> Iterator[Any]:
        index = self._start()
        indices = self._indices(index)
        for batch in self._ahead(indices) if self._prefetch > 0 else map(self._finish, indices):
            index += self._stride
            if self._stop is not None and index >= self._stop:
                self._exhausted()
            yield batch
        if self._stop is not None and index >= self._stop:
            self._exhausted()

    def _exhausted(self) -> None:
        if self._on_exhausted is not None:
            self._on_exhausted()

    def _indices(self, index: int) -> Iterator[int]:
        while self._stop is None or index < self._stop:
            yield index
            index += self._stride

    def _finish(self, index: int) -> Any:
        batch = self._make(index)
        return batch.pin_memory() if self._pin and hasattr(batch, "pin_memory") else batch

    def _ahead(self, indices: Iterator[int]) -> Iterator[Any]:
        """Batches made by a thread. An error in the thread is raised here, at the batch that caused it."""
        ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=self._prefetch)
        stopped = threading.Event()

        def put(kind: str, value: Any) -> None:
            while not stopped.is_set():
                try:
                    ready.put((kind, value), timeout=0.1)
                    return
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for index in indices:
                    if stopped.is_set():
                        return
                    put("batch", self._finish(index))
                put("end", None)
            except BaseException as error:  # handed to the consumer, which raises it
                put("error", error)

        thread = threading.Thread(target=produce, name="batch-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                kind, value = ready.get()
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value
        finally:
            stopped.set()
            thread.join(timeout=10.0)

    # Lightning warns that a loader without these two cannot be resumed. The position lives in the data module's state.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the data module keeps the position."""


class SizedBatchStream(BatchStream):
    """A stream that knows how many batches a whole run on this rank has, those already done included."""

    def __init__(self, *args: Any, length: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._length = length

    def __len__(self) -> int:
        return self._length


class TextDataModule(L.LightningDataModule):
    """Base class of the data modules.

    A subclass implements ``load_data()`` and ``make_batch(index)``, and where it has them ``num_train_batches()``,
    ``num_val_batches()`` and ``make_val_batch(index)``.

    Args:
        tokenizer_path: tokenizer folder (any Hugging Face one).
        batch_tokens: most tokens of a row, which is one micro batch of one rank.
        seed: decides every order; the data of two runs with the same seed are the same.
        pad_rows: pad rows to exactly batch_tokens, for compiled code and for CUDA graphs.
        max_documents: most documents in a row, which fixes the length of cu_seqlens; default batch_tokens / 32, min 16.
        prefetch_batches: batches made ahead by a background thread, 0 for none.
    """

    def __init__(
        self,
        tokenizer_path: str,
        batch_tokens: int = 16384,
        seed: int = 0,
        pad_rows: bool = False,
        max_documents: int | None = None,
        prefetch_batches: int = 2,
    ) -> None:
        super().__init__()
        if batch_tokens < 2:
            raise UserError(f"data.batch_tokens is {batch_tokens}, expected 2 or more")
        if prefetch_batches < 0:
            raise UserError(f"data.prefetch_batches is {prefetch_batches}, expected 0 or more")
        if max_documents is not None and max_documents < 1:
            raise UserError(f"data.max_documents is {max_documents}, expected 1 or more")
        self.tokenizer_path = tokenizer_path
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.pad_rows = pad_rows
        self.max_documents = default_max_documents(batch_tokens) if max_documents is None else max_documents
        self.prefetch_batches = prefetch_batches
        self._tokenizer: TextTokenizer | None = None
        self._loaded = False
        # Global batches done, and the trainer's own count, at the moment the last checkpoint was loaded.
        self._restored_batches = 0
        self._restored_processed = 0

    # ---- what a subclass fills in

    def load_data(self) -> None:
        """Read what ``make_batch`` needs; called once, on every rank, before the first batch.

        Raises:
            UserError: the data are missing, malformed or empty.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement load_data()")

    def make_batch(self, index: int) -> Any:
        """Training batch of global index ``index`` >= 0, a pure function of the settings. Any index is valid."""
        raise NotImplementedError(f"{type(self).__name__} must implement make_batch()")

    def num_train_batches(self) -> int | None:
        """Training batches of the whole run over all ranks; None when the stream has no end."""
        return None

    def make_val_batch(self, index: int) -> Any:
        """Validation batch ``index`` of ``num_val_batches()``."""
        raise NotImplementedError(f"{type(self).__name__} has no validation batches")

    def num_val_batches(self) -> int:
        """Validation batches over all ranks; 0 when there is no held-out data."""
        return 0

    def order_settings(self) -> dict[str, Any]:
        """Settings that change which batch has which index; a resume with others logs a warning."""
        return {"seed": self.seed, "batch_tokens": self.batch_tokens}

    # ---- what the modules use

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_path)
        return self._tokenizer

    @property
    def batches_done(self) -> int:
        """Training batches finished so far over all ranks."""
        processed = self._trainer_processed()
        return self._restored_batches + max(processed - self._restored_processed, 0) * self.world_size

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world_size(self) -> int:
        """Ranks that share the data."""
        return self.trainer.world_size if self.trainer is not None else 1

    def setup(self, stage: str | None = None) -> None:
        """Load the data once, whatever the stage."""
        self.ensure_loaded()

    def ensure_loaded(self) -> None:
        """Load the data if nobody has yet; for use without a Trainer."""
        if not self._loaded:
            self.load_data()
            self._loaded = True

    def train_dataloader(self) -> BatchStream:
        """Training batches of this rank, from the first one that is not done yet; in each epoch of a Trainer with
        ``overfit_batches``, from the very first one."""
        self.ensure_loaded()
        total = self.num_train_batches()
        if total is not None and total < 1:
            raise UserError(f"{type(self).__name__} has no training batch: check the data paths and length limits")
        options: dict[str, Any] = {
            "stride": self.world_size,
            "prefetch": self.prefetch_batches,
            "pin": torch.cuda.is_available(),
        }
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return BatchStream(self.make_batch, lambda: self.rank, **options)
        if total is None:
            return BatchStream(self.make_batch, self._first_index, **options)
        # Every rank makes the same number of steps: the last round may reach into the (reshuffled) next epoch.
        world = self.world_size
        rounds_left = -(-max(total - self._restored_batches, 0) // world)
        return SizedBatchStream(
            self.make_batch,
            self._first_index,
            stop=self._restored_batches + rounds_left * world,
            length=self._restored_processed + rounds_left,
            on_exhausted=self._stop_trainer,
            **options,
        )

    def val_dataloader(self) -> BatchStream | list[Any]:
        """Validation batches of this rank in fixed order; every rank gets equally many, the last ones without loss."""
        self.ensure_loaded()
        total = self.num_val_batches()
        if total == 0:
            return []
        rounds = -(-total // self.world_size)

        def make(index: int) -> Any:
            return self.make_val_batch(index) if index < total else self._filler()

        return SizedBatchStream(
            make, lambda: self.rank, stride=self.world_size, stop=rounds * self.world_size, length=rounds
        )

    def test_dataloader(self) -> range:
        """One round without data: a phase's test is its evaluation, which reads the held-out data itself."""
        self.ensure_loaded()
        return range(1)

    def state_dict(self) -> dict[str, Any]:
        """``batches_done`` over all ranks, the trainer's own count, and the settings that decide the order."""
        return {
            "batches_done": self.batches_done,
            "processed": max(self._trainer_processed(), self._restored_processed),
            "order_settings": self.order_settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after ``batches_done``."""
        self._restored_batches = int(state_dict["batches_done"])
        self._restored_processed = int(state_dict["processed"])
        saved, now = state_dict.get("order_settings", {}), self.order_settings()
        changed = [k for k in now if k in saved and saved[k] != now[k]]
        if changed:
            log.warning(
                "the data settings %s differ from the checkpoint's: the batches are not the ones an uninterrupted run "
                "would see",
                ", ".join(f"{k} ({saved[k]} -> {now[k]})" for k in changed),
            )

    # ---- positions

    def _trainer_processed(self) -> int:
        """Batches this rank has trained on in the life of the run, by the trainer's own progress record."""
        if self.trainer is None:
            return self._restored_processed
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]

    def _first_index(self) -> int:
        return self.batches_done + self.rank

    def _filler(self) -> Any:
        batch = self.make_val_batch(0)
        return batch.without_loss() if hasattr(batch, "without_loss") else batch

    def _stop_trainer(self) -> None:
        # A Trainer with max_steps starts epoch after epoch of an ended stream and would never return.
        if self.trainer is not None:
            log.info("the training data of %s are used up: the run ends", type(self).__name__)
            self.trainer.should_stop = True
