"""Raw text to LitData chunks: tokenise in shards, drop duplicates, split, write; resumable at any point.

Contract: the result is a pure function of the settings and the source files, not of the number of workers and not of
how often the run was killed. Three stages, all state in ``OUT/.partial``:

1. plan: list the sources and group them into shards in hashed order; saved once.
2. tokenise: each shard becomes a folder of flat arrays (tokens, lengths, hashes), put in place by one rename. Done
   shards are kept by the next run. With ``max_total_tokens`` shards are taken in order until they hold enough.
3. write: one pass over the hashes of all shards keeps the first copy of every text, applies ``max_total_tokens`` and
   sends documents to train or held-out by hash; then the kept ones become LitData chunks, again shard by shard.

The finished parts move to OUT by renames and ``prepared.json`` comes last. ``litdata.optimize`` was not enough here: it
starts over when killed between chunks, its file layout depends on the number of workers, and it knows neither
duplicates nor splits; its ``BinaryWriter`` writes the chunks.

A document's hash is 64 bits of BLAKE2b over its text. Among 10^9 documents, the chance that any two different ones
collide (which would drop one of them) is 3 %.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from qwen3_lit.data.atomic_files import new_folder, save_array, write_text
from qwen3_lit.data.corpus import INFO_NAME, LENGTHS_NAME, SPLITS, CorpusInfo, read_info
from qwen3_lit.data.shard_workers import ShardWorkers, WorkerKilledError
from qwen3_lit.data.source_units import FileReader, SourceOptions, UnavailableSourceError, Unit, list_units
from qwen3_lit.data.sources import make_shards, read_unit
from qwen3_lit.data.tokenizer import TextTokenizer, load_tokenizer
from qwen3_lit.errors import UserError

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int, int], None]
"""Called with (stage, shards done, shards in all, tokens so far)."""

_PARTIAL = ".partial"
_PLAN = "plan.json"
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the contents of a prepared corpus."""

    paths: tuple[str, ...]
    """Folders, files, hub:NAME, python:stdlib, python:site-packages."""
    tokenizer: str
    """Tokenizer folder."""
    name: str = "corpus"
    """Name shown in reports."""
    min_tokens: int = 16
    """Shorter documents are left out (<|endoftext|> counts)."""
    max_tokens: int | None = None
    """Longer documents are cut into pieces of this length, each a document of its own."""
    max_total_tokens: int | None = None
    """Stop when this many tokens are kept, both splits together."""
    held_out_fraction: float = 0.005
    """Share of the documents that goes to the held-out split, by hash."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    on_bad_record: str = "raise"
    seed: int = 0
    """Order of the sources in the corpus; it decides which part max_total_tokens keeps."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("no source given; expected one or more of: folder, file, hub:NAME, python:stdlib")
        if self.min_tokens < 2:
            raise UserError(f"min_tokens: got {self.min_tokens}, expected 2 or more (one token has no target)")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise UserError(f"max_tokens: got {self.max_tokens}, expected min_tokens ({self.min_tokens}) or more")
        if self.max_total_tokens is not None and self.max_total_tokens < 1:
            raise UserError(f"max_total_tokens: got {self.max_total_tokens}, expected 1 or more")
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise UserError(f"held_out_fraction: got {self.held_out_fraction}, expected 0 <= fraction < 1")

    @property
    def options(self) -> SourceOptions:
        return SourceOptions(self.include, self.exclude, self.text_field, self.on_bad_record)


@dataclass(frozen=True)
class PrepareResult:
    info: CorpusInfo
    already_done: bool
    """True when a finished corpus with the same settings was there and nothing was done."""
    shards_reused: int = 0
    """Tokenised shards found from an interrupted run."""


def prepare(
    settings: PrepareSettings,
    out: str | os.PathLike[str],
    reader: FileReader,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PrepareResult:
    """Prepare a corpus in ``out``, going on where an interrupted run with the same settings stopped.

    Raises:
        UserError: bad settings or sources, an empty corpus, another corpus already in ``out``, a full disk.
    """
    out = Path(out)
    try:
        return _prepare(settings, out, reader, workers or min(os.cpu_count() or 1, 16), progress or (lambda *_: None))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{error.filename or out}: {error.strerror or error}; check the path and its permissions"
            ) from error
        raise UserError(
            f"{out}: the disk is full; free some space and run the same command again (finished shards are kept), or "
            "choose another --out"
        ) from error


def _prepare(
    settings: PrepareSettings, out: Path, reader: FileReader, workers: int, progress: Progress
) -> PrepareResult:
    tokenizer = load_tokenizer(settings.tokenizer)
    identity = _identity(settings, tokenizer)
    if (out / INFO_NAME).exists():
        info = read_info(str(out))
        _check_same(out, info.settings, identity)
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
        return PrepareResult(info, already_done=True)
    partial = out / _PARTIAL
    if out.exists() and not partial.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty and not a prepared corpus; choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial, out), _discarded_on_bad_input(partial, out):
        dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
        shards = _load_plan(partial, out, settings, identity, reader)
        reused = sum((partial / _shard_name(i)).exists() for i in range(len(shards)))
        with ShardWorkers(workers, _start_worker, (settings, reader, dtype)) as pool:
            used = _tokenize(pool, partial, shards, settings, progress)
            keep, dropped = _choose(partial, used, settings)
            counts = _write(pool, partial, used, keep, progress)
        info = CorpusInfo(
            name=settings.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=len(tokenizer),
            dtype=dtype,
            settings=identity,
            documents={split: counts[split][0] for split in SPLITS},
            tokens={split: counts[split][1] for split in SPLITS},
            dropped=dropped,
            sources=list(settings.paths),
        )
        _publish(partial, out, info)
    return PrepareResult(info, already_done=False, shards_reused=reused)


# ---- stage 1: the plan


def _identity(settings: PrepareSettings, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The settings in JSON form; the tokenizer counts by its contents, not by its path."""
    identity = json.loads(json.dumps(asdict(settings)))
    identity["tokenizer"] = tokenizer.fingerprint
    return identity


class _OtherSettingsError(UserError):
    """The folder belongs to another command, whose work must stay."""


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        seen = ", ".join(f"{key} {found.get(key)!r} there, {wanted[key]!r} asked" for key in changed)
        raise _OtherSettingsError(
            f"{out}: holds a corpus made with other settings ({seen}); delete it or choose another --out"
        )


def _load_plan(
    partial: Path, out: Path, settings: PrepareSettings, identity: dict[str, Any], reader: FileReader
) -> list[list[Unit]]:
    file = partial / _PLAN
    if file.exists():
        plan = json.loads(file.read_text(encoding="utf-8"))
        _check_same(out, plan["identity"], identity)
        return [[Unit(*row) for row in shard] for shard in plan["shards"]]
    shards = make_shards(list_units(settings.paths, reader, settings.options), settings.seed)
    plan = {"identity": identity, "shards": [[unit.as_row() for unit in shard] for shard in shards]}
    write_text(file, json.dumps(plan))
    return shards


# ---- stage 2: tokens of each shard


def _shard_name(index: int) -> str:
    return f"shard-{index:06d}"


@dataclass
class _Worker:
    """What a worker process holds."""

    settings: PrepareSettings
    reader: FileReader
    dtype: str
    tokenizer: TextTokenizer


_worker: _Worker | None = None


def _start_worker(settings: PrepareSettings, reader: FileReader, dtype: str) -> None:
    global _worker
    _worker = _Worker(settings, reader, dtype, load_tokenizer(settings.tokenizer))


def _tokenize(
    pool: ShardWorkers, partial: Path, shards: list[list[Unit]], settings: PrepareSettings, progress: Progress
) -> list[int]:
    """Tokenises until all shards, or enough of them, are done. Returns the shards to use: a prefix of all."""
    limit = settings.max_total_tokens
    jobs = ((partial, index, shard) for index, shard in enumerate(shards))
    tokens = 0
    seen: set[int] = set()
    progress("tokenize", 0, len(shards), 0)
    for index, _ in enumerate(pool.imap(_tokenize_shard, jobs)):
        folder = partial / _shard_name(index)
        lengths, hashes = np.load(folder / "lengths.npy"), np.load(folder / "hashes.npy")
        if limit is None:
            tokens += int(lengths.sum())
        else:
            for length, digest in zip(lengths.tolist(), hashes.tolist(), strict=True):
                if digest not in seen:
                    seen.add(digest)
                    tokens += length
        progress("tokenize", index + 1, len(shards), tokens)
        if limit is not None and tokens >= limit:
            progress("tokenize", index + 1, index + 1, tokens)
            return list(range(index + 1))
    return list(range(len(shards)))


def _tokenize_shard(partial: Path, index: int, units: Sequence[Unit]) -> None:
    final = partial / _shard_name(index)
    if final.exists():
        return
    assert _worker is not None
    settings, tokenizer = _worker.settings, _worker.tokenizer
    counts: Counter[str] = Counter()
    tokens: list[np.ndarray] = []
    hashes: list[int] = []
    groups: list[int] = []
    for unit in units:
        for document in read_unit(unit, _worker.reader, settings.options, counts):
            digest, group = _hash(document.text), _hash(document.group)
            for number, piece in enumerate(_encode(document.text, tokenizer, settings, counts)):
                tokens.append(piece.astype(_worker.dtype))
                # Pieces of one document differ; the same document again has the same pieces.
                hashes.append((digest + number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
                groups.append(group)
    with new_folder(final) as folder:
        with open(folder / "tokens.bin", "wb") as file:
            for piece in tokens:
                file.write(piece.tobytes())
        save_array(folder / "lengths.npy", np.array([len(piece) for piece in tokens], np.uint32))
        save_array(folder / "hashes.npy", np.array(hashes, np.uint64))
        save_array(folder / "groups.npy", np.array(groups, np.uint64))
        write_text(folder / "counts.json", json.dumps(counts))


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest(), "little"
    )


def _encode(text: str, tokenizer: TextTokenizer, settings: PrepareSettings, counts: Counter[str]) -> list[np.ndarray]:
    """Token ids closed by <|endoftext|>, in pieces of at most max_tokens."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    ids = np.array([*tokenizer.encode_plain(text), tokenizer.end_of_text_id], np.int64)
    size = settings.max_tokens or len(ids)
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    kept = [piece for piece in pieces if len(piece) >= settings.min_tokens]
    counts["too_short"] += len(pieces) - len(kept)
    return kept


# ---- stage 3: what is kept, and the chunks


def _choose(partial: Path, used: list[int], settings: PrepareSettings) -> tuple[list[np.ndarray], dict[str, int]]:
    """For each shard an int8 [documents]: -1 dropped, else the index into ``SPLITS``; and what is dropped, counted."""
    folders = [partial / _shard_name(index) for index in used]
    lengths = [np.load(folder / "lengths.npy") for folder in folders]
    hashes = np.concatenate([np.load(folder / "hashes.npy") for folder in folders])
    groups = np.concatenate([np.load(folder / "groups.npy") for folder in folders])
    dropped: Counter[str] = Counter()
    for folder in folders:
        dropped.update(json.loads((folder / "counts.json").read_text()))

    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    dropped["duplicate"] = int((~first).sum())
    all_lengths = np.concatenate(lengths).astype(np.int64)
    if settings.max_total_tokens is not None:
        kept_so_far = np.cumsum(np.where(first, all_lengths, 0))
        beyond = first & (kept_so_far - all_lengths >= settings.max_total_tokens)
        dropped["beyond_max_total_tokens"] = int(beyond.sum())
        first &= ~beyond
    held_out = groups < np.uint64(int(settings.held_out_fraction * 2.0**64))
    split = np.where(first, held_out.astype(np.int8), np.int8(-1))
    if not (split == 0).any():
        what = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()) if count) or "no documents"
        raise UserError(
            f"{' '.join(settings.paths)}: nothing is left to train on ({what}); give more text, or lower min_tokens "
            f"({settings.min_tokens}) or held_out_fraction ({settings.held_out_fraction})"
        )
    if settings.held_out_fraction > 0 and not (split == 1).any():
        log.warning(
            "no document fell into the held-out split (%d documents, held_out_fraction %g): raise held_out_fraction to "
            "measure a held-out loss",
            *(int((split >= 0).sum()), settings.held_out_fraction),
        )
    ends = np.cumsum([len(part) for part in lengths])
    return np.split(split, ends[:-1]), {reason: count for reason, count in sorted(dropped.items()) if count}


def _write(
    pool: ShardWorkers, partial: Path, used: list[int], keep: list[np.ndarray], progress: Progress
) -> dict[str, tuple[int, int]]:
    """Chunks of both splits in ``.partial/final``. Returns (documents, tokens) of each split."""
    final = partial / "final"
    indices = list(range(len(used)))
    # Held-out documents are few: one part for all shards, or there would be as many small chunks as shards.
    jobs = [(partial, "train", f"{used[i]:06d}", [used[i]], [keep[i] == 0]) for i in indices]
    jobs.append((partial, "held_out", "held", used, [keep[i] == 1 for i in indices]))
    jobs = [job for job in jobs if any(mask.any() for mask in job[4])]
    counts = {split: (0, 0) for split in SPLITS}
    chunks: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    config: dict[str, Any] = {}
    progress("write", 0, len(jobs), 0)
    # A copy, bound by the disk: worth the processes (which import torch through litdata) only when there is much of it.
    in_process = sum(int(mask.sum()) for mask in keep) < 200_000
    tokens = 0
    parts = pool.imap(_write_part, iter(jobs), in_process=in_process)
    for done, (job, part) in enumerate(zip(jobs, parts, strict=True), 1):
        split = job[1]
        chunks[split] += part["chunks"]
        config = part["config"]
        lengths[split].append(np.load(final / split / f"{job[2]}.lengths.npy"))
        tokens += int(lengths[split][-1].sum(dtype=np.int64))
        progress("write", done, len(jobs), tokens)
    for split in SPLITS:
        if chunks[split]:
            joined = np.concatenate(lengths[split])
            counts[split] = (len(joined), int(joined.sum(dtype=np.int64)))
            save_array(final / split / LENGTHS_NAME, joined)
            index = {"chunks": chunks[split], "config": config}
            # LitData keys its local cache of remote data on this field: it must change with the contents, and only
            # then.
            index["updated_at"] = hashlib.sha256(
                json.dumps(index, sort_keys=True).encode() + joined.tobytes()
            ).hexdigest()
            write_text(final / split / "index.json", json.dumps(index, sort_keys=True))
    return counts


def _write_part(partial: Path, split: str, part: str, shards: list[int], masks: list[np.ndarray]) -> dict[str, Any]:
    """Writes the masked documents of some shards as chunks ``chunk-PART-N.bin``. Returns their LitData index."""
    folder = partial / "final" / split
    index_file = folder / f"{part}.part.json"
    if index_file.exists():
        done: dict[str, Any] = json.loads(index_file.read_text())
        return done
    from litdata.streaming.writer import BinaryWriter

    assert _worker is not None
    folder.mkdir(parents=True, exist_ok=True)
    staging = partial / f"writing-{split}-{part}.{os.getpid()}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        writer = BinaryWriter(str(staging), chunk_bytes=_CHUNK_BYTES)
        lengths, number = [], 0
        for shard, mask in zip(shards, masks, strict=True):
            source = partial / _shard_name(shard)
            stored = np.load(source / "lengths.npy")
            tokens = np.fromfile(source / "tokens.bin", _worker.dtype)
            starts = np.concatenate([[0], np.cumsum(stored, dtype=np.int64)])
            lengths.append(stored[mask])
            for document in np.flatnonzero(mask):
                writer.add_item(number, tokens[starts[document] : starts[document + 1]])
                number += 1
        writer.done()
        index: dict[str, Any] = json.loads(next(staging.glob("*.index.json")).read_text())
        for position, chunk in enumerate(index["chunks"]):
            name = f"chunk-{part}-{position}.bin"
            os.replace(staging / chunk["filename"], folder / name)
            chunk["filename"] = name
        save_array(folder / f"{part}.lengths.npy", np.concatenate(lengths))
        write_text(index_file, json.dumps(index))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return index


def _publish(partial: Path, out: Path, info: CorpusInfo) -> None:
    """Moves the finished splits to ``out``. Every step may be the last one of a killed run and is then done again."""
    for split in SPLITS:
        folder = partial / "final" / split
        if folder.exists():
            for leftover in [*folder.glob("*.part.json"), *folder.glob("*.lengths.npy")]:
                leftover.unlink()
    write_text(partial / "final" / INFO_NAME, info.to_json())
    for split in SPLITS:
        if (partial / "final" / split).exists():
            shutil.rmtree(
                out / split, ignore_errors=True
            )  # of a run killed right here; no prepared.json vouches for it
            os.replace(partial / "final" / split, out / split)
    os.replace(partial / "final" / INFO_NAME, out / INFO_NAME)
    shutil.rmtree(partial, ignore_errors=True)


# ---- files


@contextlib.contextmanager
def _discarded_on_bad_input(partial: Path, out: Path) -> Iterator[None]:
    """Removes the unfinished state when the input is at fault: its repair changes what the state was made from."""
    try:
        yield
    except UserError as error:
        passes = isinstance(error, (WorkerKilledError, _OtherSettingsError, UnavailableSourceError))
        if not (passes and (partial / _PLAN).exists()):
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock ends with the process that holds it."""
    lock = FileLock(str(partial / "lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{out}: another process is preparing it; wait for it, or choose another --out") from None
    try:
        for leftover in partial.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.release()
