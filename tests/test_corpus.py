import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vocabext import corpus
from vocabext.corpus import corpus_signature, read_documents
from vocabext.errors import CorpusError, UsageError
from vocabext.records import Document


def texts(*sources: object, **options: Any) -> list[str]:
    return [document.text for document in read_documents([str(s) for s in sources], **options)]


def as_json_lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


ROWS = [{"text": "one", "id": 1}, {"text": "zwei ß", "id": 2}]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_format_is_read_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    data = {".txt": "one\nzwei ß\n".encode(), ".parquet": as_parquet(ROWS)}.get(suffix, as_json_lines(ROWS))
    path = tmp_path / f"notes{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](data))
    assert texts(path) == (["one\nzwei ß\n"] if suffix == ".txt" else ["one", "zwei ß"])


def test_documents_say_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + as_json_lines(ROWS))
    (tmp_path / "b.txt").write_text("whole file")
    assert list(read_documents([str(tmp_path)])) == [
        Document(f"{tmp_path}/a.jsonl:2", "one"),
        Document(f"{tmp_path}/a.jsonl:3", "zwei ß"),
        Document(f"{tmp_path}/b.txt", "whole file"),
    ]


def test_a_folder_is_searched_in_order_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.TXT", "a/z/deep.txt", ".git/x.txt", "a/.hidden.txt", "a/image.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/z/deep.txt", "b/1.TXT", "b/2.txt"]


def test_globs(tmp_path: Path) -> None:
    for name in ("1.txt", "2.txt", "3.jsonl", "sub/4.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/*.txt") == ["1.txt", "2.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["1.txt", "2.txt", "sub/4.txt"]
    with pytest.raises(UsageError, match=r"no file matches .*/\*\.parquet"):
        read_documents([f"{tmp_path}/*.parquet"])


def test_a_file_that_is_there_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "notes[1].txt").write_text("brackets")
    assert texts(tmp_path / "notes[1].txt") == ["brackets"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path / "b.txt", tmp_path, f"{tmp_path}/*.txt") == ["b", "a"]


def test_empty_documents_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_json_lines([{"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": "x"}]))
    (tmp_path / "b.txt").write_text("")
    assert texts(tmp_path) == ["x"]


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    text = "\r\n  indented\r\n\u2028next\x1fline\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_bytes(as_json_lines([{"text": text}]))
    assert texts(tmp_path) == [text, text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffx".encode())
    (tmp_path / "b.jsonl").write_bytes("\ufeff".encode() + as_json_lines([{"text": "y"}]))
    assert texts(tmp_path) == ["x", "y"]


def test_another_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_json_lines([{"body": "a"}]))
    (tmp_path / "b.parquet").write_bytes(as_parquet([{"body": "b"}]))
    assert texts(tmp_path, text_field="body") == ["a", "b"]


@given(lines=st.lists(st.binary(max_size=6).filter(lambda b: b"\n" not in b)), size=st.integers(1, 4))
def test_lines_do_not_depend_on_the_chunks(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(corpus._split_lines(chunks)) == data.split(b"\n")


def test_compressed_files_are_longer_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 7)
    rows = [{"text": f"document {i}"} for i in range(200)]
    for compression, compress in COMPRESS.items():
        (tmp_path / f"a.jsonl{compression}").write_bytes(compress(as_json_lines(rows)))
        assert texts(tmp_path / f"a.jsonl{compression}") == [row["text"] for row in rows]


def test_concatenated_streams_are_read_to_the_end(tmp_path: Path) -> None:
    for compression in (".gz", ".zst"):
        compress = COMPRESS[compression]
        (tmp_path / f"a.txt{compression}").write_bytes(compress(b"first ") + compress(b"second"))
        assert texts(tmp_path / f"a.txt{compression}") == ["first second"]


# ---- what is wrong is said by the call, or at the place where it is ------------------------------


@pytest.mark.parametrize("source", ["missing.txt", "missing", "./missing/folder", "data/missing", "/nowhere/x.jsonl"])
def test_a_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=f"^{source} does not exist"):
        read_documents([source])
    with pytest.raises(UsageError, match="does not exist"):
        corpus_signature([source])


def test_an_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UsageError, match=r"a\.docx has the unknown format \.docx; expected \.txt, \.jsonl"):
        read_documents([str(tmp_path / "a.docx")])
    with pytest.raises(CorpusError, match="holds no file of a known format"):
        read_documents([str(tmp_path)])


def test_no_corpus_at_all() -> None:
    with pytest.raises(UsageError, match="no corpus was given"):
        read_documents([])


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "there is no record in it"), (b'{"text": ""}\n{"text": " "}\n', "all 2 records are empty")]
)
def test_an_empty_corpus(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(CorpusError, match=f"holds no text: {why}"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"plain text", r"a\.jsonl:2 is not JSON: Expecting value at column 1; one object per line is needed"),
        (b'{"text": "cut', r"a\.jsonl:2 is not JSON: Unterminated string"),
        (b"[" * 100_000, r"a\.jsonl:2 is not JSON: nested too deep"),
        (b'["x"]', r"a\.jsonl:2 is a JSON list; one object per line"),
        (b'{"body": "x", "id": 1}', r"a\.jsonl:2 has no field 'text', only 'body', 'id'; choose one with --text-field"),
        (b"{}", r"a\.jsonl:2 has no field 'text', only no fields"),
        (b'{"text": ["x"]}', r"a\.jsonl:2: the field 'text' is of type list, but text is needed"),
        (b'{"text": 7}', r"a\.jsonl:2: the field 'text' is of type int, but text is needed"),
        (b'{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8: byte 0xff at 10; convert it"),
        (b'{"text": "ab\\ud83d"}', r"a\.jsonl:2: the text has half a surrogate pair at character 2"),
    ],
)
def test_a_bad_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    documents = read_documents([str(tmp_path)])
    assert next(documents).text == "good"
    with pytest.raises(CorpusError, match=message) as caught:
        next(documents)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9 x", "is not UTF-8: byte 0xe9 at 3"),
        (b"\x7fELF\0\0\1", r"looks like binary data or UTF-16 \(a zero byte at 4\)"),
        ("hello".encode("utf-16"), "looks like binary data or UTF-16"),
    ],
)
def test_text_that_is_none(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.txt " + message):
        texts(tmp_path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_stream_that_was_cut_off(tmp_path: Path, suffix: str, compression: str) -> None:
    noise = os.urandom(50_000).hex()
    rows = [{"text": noise}]
    data = {".txt": noise.encode(), ".parquet": as_parquet(rows)}.get(suffix, as_json_lines(rows))
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](data)[:-100])
    with pytest.raises(CorpusError, match=rf"a\{suffix}\{compression} is no complete (gzip|zstd) file"):
        texts(tmp_path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_stream_that_is_none(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(b"not compressed at all")
    with pytest.raises(CorpusError, match=rf"a\.txt\{compression} is no (complete|valid) (gzip|zstd) file"):
        texts(tmp_path)


def test_a_damaged_stream(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(os.urandom(5000)))
    data[2000] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.txt\.gz is no complete gzip file"):
        texts(tmp_path)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet(ROWS)[:-9])
    with pytest.raises(CorpusError, match=r"a\.parquet is no readable Parquet file: ") as caught:
        texts(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet([{"body": "x", "n": 1}]))
    with pytest.raises(CorpusError, match="has no field 'text', only 'body', 'n'"):
        texts(tmp_path)
    with pytest.raises(CorpusError, match=r"a\.parquet:1: the field 'n' is of type int"):
        texts(tmp_path, text_field="n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read: Permission denied"):
        texts(tmp_path)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    documents = read_documents([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CorpusError, match=r"a\.txt cannot be read: No such file"):
        next(documents)


# ---- signatures ----------------------------------------------------------------------------------


def test_the_signature_changes_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = corpus_signature([str(tmp_path)])
    assert before == corpus_signature([str(path)]) == corpus_signature([str(tmp_path)])

    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    touched = corpus_signature([str(tmp_path)])
    (tmp_path / "b.txt").write_text("two")
    assert len({before, touched, corpus_signature([str(tmp_path)])}) == 3


def test_the_signature_of_a_hub_dataset_needs_no_network() -> None:
    assert corpus_signature(["owner/name"]) != corpus_signature(["owner/name:test"])


# ---- hub datasets: the hub is far away, so its client is replaced --------------------------------


class FakeHub:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any] | Exception) -> None:
        self.splits, self.asked = splits, list[str]()
        monkeypatch.setattr(huggingface_hub, "dataset_info", self.dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def dataset_info(self, name: str, timeout: float) -> None:
        self.asked.append(name)

    def load_dataset(self, name: str, streaming: bool) -> dict[str, Any]:
        assert streaming
        if isinstance(self.splits, Exception):
            raise self.splits
        return self.splits


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]})
    assert list(read_documents(["owner/name"])) == [Document("owner/name:1", "a"), Document("owner/name:2", "b")]
    assert list(read_documents(["owner/name:test"])) == [Document("owner/name:test:1", "c")]
    assert hub.asked == ["owner/name", "owner/name"]


def test_a_hub_dataset_with_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {"validation": [{"text": "v"}]})
    assert texts("owner/name") == ["v"]


def test_a_hub_dataset_without_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {"a": [], "b": []})
    with pytest.raises(UsageError, match="owner/name has no split 'train', only 'a', 'b'; write owner/name:SPLIT"):
        read_documents(["owner/name"])


def test_a_hub_dataset_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, RuntimeError("no such thing.\nand a page of advice"))
    with pytest.raises(UsageError) as caught:
        read_documents(["owner/name"])
    assert str(caught.value) == (
        "owner/name does not exist here, and cannot be opened as a hub dataset: RuntimeError: no such thing"
    )


def test_a_hub_dataset_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionError("reset by peer")

    FakeHub(monkeypatch, {"train": rows()})
    documents = read_documents(["owner/name"])
    assert next(documents).text == "a"
    with pytest.raises(CorpusError, match="owner/name broke off while reading: ConnectionError: reset by peer"):
        next(documents)


def test_a_hub_dataset_without_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {"train": [{"question": "a"}]})
    with pytest.raises(CorpusError, match="owner/name:1 has no field 'text', only 'question'"):
        texts("owner/name")
