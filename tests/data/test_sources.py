import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from qwen3_lit.curation.document_text import DocumentReader
from qwen3_lit.data import source_units
from qwen3_lit.data.source_units import SourceOptions, UnavailableSourceError, list_units
from qwen3_lit.data.sources import make_shards, read_unit, sample_texts
from qwen3_lit.errors import UserError

READER = DocumentReader()


def read_all(paths: list[str], options: SourceOptions | None = None) -> tuple[list[str], Counter[str]]:
    options = options or SourceOptions()
    skipped: Counter[str] = Counter()
    texts = [d.text for u in list_units(paths, READER, options) for d in read_unit(u, READER, options, skipped)]
    return texts, skipped


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_folder_reads_text_and_code_and_leaves_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.md").write_text("---\ntitle: t\n---\n# Hello <!-- hidden -->\n")
    (tmp_path / "c.bin").write_bytes(b"\x00\x01")
    (tmp_path / "binary.txt").write_bytes(b"abc\x00def")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "d.py").write_text("no")
    texts, skipped = read_all([str(tmp_path)])
    assert texts == ["x = 1", "# Hello"]
    assert skipped == {"binary": 1, "encoding": 1}


def test_include_and_exclude(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.txt", "d.strange"):
        (tmp_path / name).write_text(name)
    assert read_all([str(tmp_path)], SourceOptions(include=("*.py",), exclude=("b.*",)))[0] == ["a.py"]
    assert read_all([str(tmp_path)], SourceOptions(include=("*.strange",)))[0] == ["d.strange"]


@pytest.mark.parametrize("range_bytes", [1, 7, 64, 1 << 20])
def test_jsonl_ranges_cover_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int) -> None:
    monkeypatch.setattr(source_units, "_RANGE_BYTES", range_bytes)
    rows = [{"text": f"row {i} " + "x" * (i % 13)} for i in range(50)]
    path = write_jsonl(tmp_path / "a.jsonl", list(rows))
    assert read_all([str(path)])[0] == [row["text"] for row in rows]


@pytest.mark.parametrize("range_bytes", [5, 1 << 20])
def test_bad_row_names_file_line_and_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range_bytes: int) -> None:
    monkeypatch.setattr(source_units, "_RANGE_BYTES", range_bytes)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "fine too"}, {"txt": "oops"}])
    with pytest.raises(UserError, match=r"a\.jsonl:3: field 'text': got columns txt, expected a string"):
        read_all([str(path)])
    texts, skipped = read_all([str(path)], SourceOptions(on_bad_record="skip"))
    assert (texts, skipped["bad_record"]) == (["fine", "fine too"], 1)
    assert read_all([str(path)], SourceOptions(text_field="txt", on_bad_record="skip"))[0] == ["oops"]


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(UserError, match=r"a\.jsonl:3: not JSON"):
        read_all([str(path)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (r'{"text": "half \ud83d"}', r"field 'text': got half a surrogate pair \(\\ud83d\), expected a string"),
        ('{"text": "x", "n": ' + "[" * 200_000 + "]" * 200_000 + "}", "not JSON"),
    ],
)
def test_rows_that_no_tokenizer_takes_are_bad_records(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + row + "\n")
    for read in (read_all, lambda paths: list(sample_texts(paths, READER, SourceOptions(), max_bytes=10**6))):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: {message}"):
            read([str(path)])
    skip = SourceOptions(on_bad_record="skip")
    assert list(sample_texts([str(path)], READER, skip, max_bytes=10**6)) == ["fine"]


def test_sampled_docstrings_are_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    class Reader:
        def accepts(self, path: Path) -> bool:
            return True

        def read(self, path: Path, part: str = "text") -> list[str]:
            return ["a docstring that names \ud83d"]

    (text,) = sample_texts([str(tmp_path)], Reader(), SourceOptions(), max_bytes=10**6)
    assert text == "a docstring that names ?"


def test_gzip_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    table = pyarrow.table({"text": [f"row {i}" for i in range(10)], "other": list(range(10))})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=4)
    texts, _ = read_all([str(tmp_path)])
    assert texts == ["zipped", *(f"row {i}" for i in range(10))]
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"b\.parquet: not a parquet file"):
        read_all([str(tmp_path)])


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"row {i} " + "word " * i for i in range(40)]})
    pyarrow.parquet.write_table(table, path, row_group_size=20, compression="zstd")
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet: row group 1 is damaged") as caught:
        read_all([str(path)])
    assert not isinstance(caught.value, UnavailableSourceError)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"text": "row {i}"}}\n' for i in range(500)).encode())
    for damaged in (whole[:-20], b"no gzip", whole[:100] + b"\xff" * 100 + whole[200:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: broken gzip file") as caught:
            read_all([str(tmp_path)])
        assert not isinstance(caught.value, UnavailableSourceError)


def test_a_data_set_is_opened_once_for_all_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    opened: list[str] = []
    load = datasets.load_dataset

    def counted(name: str, *more: object, **options: object) -> object:
        opened.append(name)
        return load(name, *more, **options)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", counted)
    monkeypatch.setattr(source_units, "_HUB_ROWS", 4)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "a.jsonl", [{"text": f"row {i}"} for i in range(10)])
    assert read_all([f"hub:{tmp_path / 'set'}"])[0] == [f"row {i}" for i in range(10)]
    assert len(opened) == 1


def test_a_file_that_changed_since_listing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    (unit,) = list_units([str(tmp_path)], READER, SourceOptions())
    (tmp_path / "a.txt").write_text("after, longer")
    with pytest.raises(UserError, match="13 bytes now, 6 when"):
        list(read_unit(unit, READER, SourceOptions(), Counter()))


@pytest.mark.parametrize("path", ["/does/not/exist", "python:nothing"])
def test_missing_paths(path: str) -> None:
    with pytest.raises(UserError, match=path):
        list_units([path], READER, SourceOptions())


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable text found"):
        list_units([str(tmp_path)], READER, SourceOptions())


def test_standard_library_has_sources_and_docstrings_without_tests() -> None:
    units = list_units(["python:stdlib"], READER, SourceOptions(include=("json/*.py", "test/*.py")))
    assert {Path(u.path).parent.name for u in units} == {"json"}
    texts = [d.text for u in units for d in read_unit(u, READER, SourceOptions(), Counter())]
    assert any(t.startswith("# json\n") and "### load(fp," in t for t in texts)
    assert any("def load(fp," in t for t in texts)


def test_documents_of_one_file_share_a_group() -> None:
    (unit,) = list_units(["python:stdlib"], READER, SourceOptions(include=("json/__init__.py",)))
    documents = list(read_unit(unit, READER, SourceOptions(), Counter()))
    assert len(documents) == 2 and documents[0].text != documents[1].text
    assert documents[0].group == documents[1].group


def test_shards_partition_the_units_and_depend_on_the_seed(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text("word " * (i + 1))
    units = list_units([str(tmp_path)], READER, SourceOptions())
    shards = make_shards(units, 0, shard_bytes=500)
    assert sorted(u.path for s in shards for u in s) == sorted(u.path for u in units) and len(shards) > 3
    assert shards == make_shards(list(reversed(units)), 0, shard_bytes=500)
    assert shards != make_shards(units, 1, shard_bytes=500)


def test_the_order_does_not_hang_on_where_the_folder_lies(tmp_path: Path) -> None:
    orders = []
    for place in ("here", "far/away"):
        folder = tmp_path / place
        for i in range(30):
            (folder / f"{i % 3}").mkdir(parents=True, exist_ok=True)
            (folder / f"{i % 3}" / f"{i}.md").write_text(f"document {i} " * 20)
        texts = sample_texts([str(folder)], READER, SourceOptions(), max_bytes=5_000)
        orders.append([text for text in texts if text.startswith("document")])
    assert orders[0] == orders[1] and orders[0]


def test_sample_is_repeatable_and_limited(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 50)
    first = list(sample_texts([str(tmp_path)], READER, SourceOptions(), max_bytes=1000))
    assert first == list(sample_texts([str(tmp_path)], READER, SourceOptions(), max_bytes=1000))
    assert 1000 <= sum(map(len, first)) < 1200
