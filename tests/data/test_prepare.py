import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_lit.curation.document_text import DocumentReader
from qwen3_lit.data import atomic_files
from qwen3_lit.data import prepare as prepare_module
from qwen3_lit.data.corpus import PreparedCorpus, read_info
from qwen3_lit.data.prepare import PrepareSettings, prepare
from qwen3_lit.data.tokenizer import load_tokenizer, train_tokenizer
from qwen3_lit.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def text(number: int) -> str:
    rng = np.random.default_rng(number)
    return f"document {number} " + " ".join(rng.choice(WORDS, size=int(rng.integers(20, 200))))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text(i) for i in range(20)], 300, folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    for i in range(120):
        (root / f"{i}.txt").write_text(text(i))
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    original = prepare_module.make_shards
    monkeypatch.setattr(prepare_module, "make_shards", lambda units, seed: original(units, seed, shard_bytes=15_000))


def settings(folder: Path, tokenizer: str, **changes: Any) -> PrepareSettings:
    return PrepareSettings(**{"paths": (str(folder),), "tokenizer": tokenizer, "held_out_fraction": 0.2, **changes})


def run(folder: Path, tokenizer: str, out: Path, **changes: Any) -> Any:
    return prepare(settings(folder, tokenizer, **changes), out, DocumentReader(), workers=1)


def contents(out: Path) -> dict[str, str]:
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


def decoded(out: Path, split: str, tokenizer: str) -> list[str]:
    tok, corpus = load_tokenizer(tokenizer), PreparedCorpus(str(out), split)
    return [tok.decode(corpus.read(i).tolist()[:-1]) for i in range(len(corpus.lengths))]


def test_litdata_reads_every_document_back(folder: Path, tokenizer: str, tmp_path: Path, small_shards: None) -> None:
    import litdata

    result = run(folder, tokenizer, tmp_path / "out")
    tok = load_tokenizer(tokenizer)
    found = []
    for split in ("train", "held_out"):
        dataset = litdata.StreamingDataset(str(tmp_path / "out" / split))
        items = [dataset[i] for i in range(len(dataset))]
        assert all(item.dtype == np.uint16 and item[-1] == tok.end_of_text_id for item in items)
        lengths = np.load(tmp_path / "out" / split / "lengths.npy")
        assert [len(item) for item in items] == lengths.tolist()
        assert len(items) == result.info.documents[split] and lengths.sum() == result.info.tokens[split]
        found += [tok.decode(item.tolist()[:-1]) for item in items]
    assert sorted(found) == sorted(text(i) for i in range(120))
    assert 5 < result.info.documents["held_out"] < 50
    assert not (tmp_path / "out" / ".partial").exists()


def test_duplicates_go_and_splits_stay_apart(folder: Path, tokenizer: str, tmp_path: Path, small_shards: None) -> None:
    rows = [{"text": text(i % 50)} for i in range(150)]
    jsonl = tmp_path / "more.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, tokenizer, tmp_path / "a")
    result = run(folder, tokenizer, tmp_path / "b", paths=(str(jsonl), str(folder)))
    assert result.info.reasons["duplicate"] == 150
    train, held_out = (set(decoded(tmp_path / "b", split, tokenizer)) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 120 and not train & held_out
    assert held_out == set(decoded(tmp_path / "a", "held_out", tokenizer))


def test_length_limits(folder: Path, tokenizer: str, tmp_path: Path) -> None:
    result = run(folder, tokenizer, tmp_path / "out", min_tokens=30, max_tokens=100)
    lengths = np.concatenate([PreparedCorpus(str(tmp_path / "out"), s).lengths for s in ("train", "held_out")])
    assert lengths.max() == 100 and lengths.min() >= 30 and result.info.reasons["too_short"] > 0
    limited = run(folder, tokenizer, tmp_path / "limited", max_total_tokens=5000)
    total = sum(limited.info.tokens.values())
    assert 5000 <= total < 5000 + 1000


def test_limit_is_the_same_with_any_number_of_workers(
    folder: Path, tokenizer: str, tmp_path: Path, small_shards: None
) -> None:
    for workers in (1, 2):
        prepare(
            settings(folder, tokenizer, max_total_tokens=9000),
            tmp_path / str(workers),
            DocumentReader(),
            workers=workers,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_finished_is_left_alone_and_other_settings_are_refused(folder: Path, tokenizer: str, tmp_path: Path) -> None:
    run(folder, tokenizer, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(folder, tokenizer, tmp_path / "out").already_done
    assert contents(tmp_path / "out") == before
    with pytest.raises(UserError, match=r"other settings \(min_tokens 16 there, 17 asked\)"):
        run(folder, tokenizer, tmp_path / "out", min_tokens=17)


def test_interrupted_at_every_rename_gives_the_same_result(
    folder: Path, tokenizer: str, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tokenizer, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    out, stops = tmp_path / "broken", 0
    real_replace, real_rename, real_rmtree = os.replace, os.rename, prepare_module.shutil.rmtree
    for allowed in range(1, 200):
        left = [allowed]

        def stop_after(real: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop_after(real_replace))
            patch.setattr(os, "rename", stop_after(real_rename))
            try:
                run(folder, tokenizer, out)
                break
            except KeyboardInterrupt:
                stops += 1
                assert not (out / "prepared.json").exists()
                # Each third time everything but the tokens of the shards is lost as well.
                if stops % 3 == 0:
                    real_rmtree(out / ".partial" / "final", ignore_errors=True)
    assert stops > 10
    assert contents(out) == expected


_KILLED = """
import os, signal, sys
from qwen3_lit.curation.document_text import DocumentReader
from qwen3_lit.data import prepare as module
from qwen3_lit.data.prepare import PrepareSettings, prepare

original = module.make_shards
module.make_shards = lambda units, seed: original(units, seed, shard_bytes=15_000)

def progress(stage, done, total, tokens):
    if (stage, done) == (sys.argv[4], int(sys.argv[5])):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    settings = PrepareSettings(paths=(sys.argv[1],), tokenizer=sys.argv[2], held_out_fraction=0.2)
    prepare(settings, sys.argv[3], DocumentReader(), workers=2, progress=progress)
"""


def test_kill_9_then_the_same_command(folder: Path, tokenizer: str, tmp_path: Path, small_shards: None) -> None:
    run(folder, tokenizer, tmp_path / "whole")
    out, script = tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(_KILLED)
    for stage, done in (("tokenize", 2), ("write", 1)):
        arguments = [sys.executable, str(script), str(folder), tokenizer, str(out), stage, str(done)]
        assert subprocess.run(arguments, timeout=120).returncode == -signal.SIGKILL
        with pytest.raises(UserError, match="interrupted"):
            read_info(str(out))
    result = run(folder, tokenizer, out)
    assert result.shards_reused >= 2
    assert contents(out) == contents(tmp_path / "whole")


def test_full_disk_is_one_line_and_the_next_run_goes_on(
    folder: Path, tokenizer: str, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = atomic_files.write_bytes, [0]

    def full(file: Path, data: bytes) -> None:
        calls[0] += 1
        if calls[0] > 8:
            file.with_name(f"{file.name}.0.tmp").write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "write_bytes", full)
        with pytest.raises(UserError, match="the disk is full"):
            run(folder, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "prepared.json").exists()
    run(folder, tokenizer, tmp_path / "out")
    run(folder, tokenizer, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_out_of_reach_costs_no_finished_shard(
    folder: Path, tokenizer: str, tmp_path: Path, small_shards: None
) -> None:
    run(folder, tokenizer, tmp_path / "whole")
    texts = tmp_path / "texts"
    shutil.copytree(folder, texts)
    moved: list[Path] = []

    def lose_the_last(stage: str, done: int, total: int, tokens: int) -> None:
        if (stage, done) == ("tokenize", 2):
            plan = json.loads((tmp_path / "out" / ".partial" / "plan.json").read_text())
            moved.append(Path(plan["shards"][-1][-1][1]))
            moved[0].rename(tmp_path / "away")

    with pytest.raises(UserError, match=r"\d+\.txt: cannot be read \(No such file.*finished shards are kept"):
        prepare(settings(texts, tokenizer), tmp_path / "out", DocumentReader(), workers=1, progress=lose_the_last)
    (tmp_path / "away").rename(moved[0])
    result = run(texts, tokenizer, tmp_path / "out")
    assert result.shards_reused >= 2
    parts = [{k: v for k, v in contents(tmp_path / name).items() if "prepared" not in k} for name in ("out", "whole")]
    assert parts[0] == parts[1]


def test_a_source_that_was_never_in_reach_leaves_nothing_behind(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="datasets cannot load it"):
        run(tmp_path, tokenizer, tmp_path / "out", paths=(f"hub:{tmp_path / 'missing'}",))
    assert not (tmp_path / "out").exists()


def test_a_bad_row_leaves_nothing_behind_and_its_repair_is_enough(tokenizer: str, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text(i)}) for i in range(30)]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("\n".join([*rows, '{"txt": 1}']) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:31: field 'text'"):
        run(jsonl, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    jsonl.write_text("\n".join(rows) + "\n")
    assert sum(run(jsonl, tokenizer, tmp_path / "out").info.documents.values()) == 30


def test_interrupted_work_of_other_settings_is_kept(folder: Path, tokenizer: str, tmp_path: Path) -> None:
    def stop(stage: str, *_: int) -> None:
        if stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(folder, tokenizer), tmp_path / "out", DocumentReader(), workers=1, progress=stop)
    with pytest.raises(UserError, match="other settings"):
        run(folder, tokenizer, tmp_path / "out", min_tokens=20)
    assert run(folder, tokenizer, tmp_path / "out").shards_reused >= 1


def test_two_at_once_are_refused(folder: Path, tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    with (
        prepare_module._locked(tmp_path / "out" / ".partial", tmp_path / "out"),
        pytest.raises(UserError, match="another process"),
    ):
        run(folder, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_tokens": 1}, "min_tokens: got 1"),
        ({"max_tokens": 3}, "max_tokens: got 3"),
        ({"held_out_fraction": 1.0}, "held_out_fraction: got 1.0"),
        ({"max_total_tokens": 0}, "max_total_tokens: got 0"),
        ({"paths": ()}, "no source given"),
        ({"tokenizer": "/no/such/tokenizer"}, "/no/such/tokenizer"),
    ],
)
def test_bad_settings(folder: Path, tokenizer: str, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(settings(folder, **{"tokenizer": tokenizer, **changes}), tmp_path / "out", DocumentReader(), workers=1)
    assert not (tmp_path / "out").exists()


def test_nothing_left_and_foreign_folder(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("short")
    with pytest.raises(UserError, match=r"nothing is left to train on \(1 too_short\)"):
        run(tmp_path / "in", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="not empty and not a prepared corpus"):
        run(tmp_path / "in", tokenizer, tmp_path / "in")


def test_special_tokens_in_the_text_stay_text(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    body = (
        "<|endoftext|> and <|im_start|> are written here, with \ud800".encode("utf-8", "replace").decode()
        + " word" * 30
    )
    (tmp_path / "in" / "a.txt").write_text(body)
    run(tmp_path / "in", tokenizer, tmp_path / "out", held_out_fraction=0.0)
    ids = PreparedCorpus(str(tmp_path / "out")).read(0).tolist()
    tok = load_tokenizer(tokenizer)
    assert ids.count(tok.end_of_text_id) == 1 and ids[-1] == tok.end_of_text_id and tok.im_start_id not in ids
    assert tok.decode(ids[:-1]) == body
