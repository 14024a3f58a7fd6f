import bz2
import csv
import glob
import gzip
import io
import json
import lzma
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
from vocabext.corpus import Document, corpus_signature, left_out_of, read_documents
from vocabext.errors import CorpusError, UsageError


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
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv"])
def test_every_format_is_read_plain_and_compressed(tmp_path: Path, suffix: str, compression: str) -> None:
    data = {".txt": "one\nzwei ß\n".encode(), ".parquet": as_parquet(ROWS), ".csv": "text,id\none,1\nzwei ß,2".encode(),
            ".tsv": "id\ttext\r\n1\tone\r\n2\tzwei ß\r\n".encode()}.get(suffix, as_json_lines(ROWS))
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
    assert list(corpus._split_lines(chunks, Path("a.jsonl"))) == data.split(b"\n")


def test_compressed_files_are_longer_than_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 7)
    rows = [{"text": f"document {i}"} for i in range(200)]
    for compression, compress in COMPRESS.items():
        (tmp_path / f"a.jsonl{compression}").write_bytes(compress(as_json_lines(rows)))
        assert texts(tmp_path / f"a.jsonl{compression}") == [row["text"] for row in rows]


def test_concatenated_streams_are_read_to_the_end(tmp_path: Path) -> None:
    for compression in (".gz", ".bz2", ".xz", ".zst"):
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


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_stream_that_was_cut_off(tmp_path: Path, suffix: str, compression: str) -> None:
    noise = os.urandom(50_000).hex()
    rows = [{"text": noise}]
    data = {".txt": noise.encode(), ".parquet": as_parquet(rows)}.get(suffix, as_json_lines(rows))
    (tmp_path / f"a{suffix}{compression}").write_bytes(COMPRESS[compression](data)[:-100])
    with pytest.raises(CorpusError, match=rf"a\{suffix}\{compression} is no complete (gzip|bzip2|xz|zstd) file"):
        texts(tmp_path)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_stream_that_is_none(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(b"not compressed at all")
    with pytest.raises(CorpusError, match=rf"a\.txt\{compression} is no (complete|valid) (gzip|bzip2|xz|zstd) file"):
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


# ---- what is left out is said and recorded -------------------------------------------------------


def said_and_left_out(*sources: object, **options: Any) -> tuple[list[str], list[str], dict[str, Any]]:
    """Read a corpus; returns its texts, what was said, and what is recorded."""
    said: list[str] = []
    documents = read_documents([str(s) for s in sources], say=said.append, **options)
    return [document.text for document in documents], said, left_out_of(documents)


def write(folder: Path, **files: str) -> Path:
    """Write files; `__` in a name stands for a slash, `_` for a dot."""
    for name, text in files.items():
        path = folder / name.replace("___", "/.").replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_of_everything_is_read_whole(tmp_path: Path) -> None:
    """Sixty of 120 documents were read here, without a word."""
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "a.jsonl").write_bytes(as_json_lines([{"text": "a"}]))
    (elsewhere / "b.jsonl").write_bytes(as_json_lines([{"text": "b"}]))
    (folder / "b").symlink_to(elsewhere)
    (folder / "c.csv").write_text("id,text\n1,c\n")
    (folder / "d.jsonl.bz2").write_bytes(bz2.compress(as_json_lines([{"text": "d"}])))
    (folder / "e.txt.XZ").write_bytes(lzma.compress(b"e"))
    (folder / "f.tsv").write_text("text\tid\nf\t1\n")
    assert said_and_left_out(folder) == (["a", "c", "d", "e", "f", "b"], [], {})


def test_what_a_folder_holds_beside_is_counted_and_named_once(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a", b_pdf="", c__d_PDF="", c_jsonl_lz4="", README_md="", LICENSE="", _git__config="",
          _x_txt="")
    found, said, left_out = said_and_left_out(tmp_path)
    assert found == ["a"]
    assert said == [
        f"not read of the corpus: hidden: 2 (such as {tmp_path}/.git); unknown format (no suffix): 1 (such as "
        f"{tmp_path}/LICENSE); unknown format .md: 1 (such as {tmp_path}/README.md); unknown format .pdf: 2 (such as "
        f"{tmp_path}/b.pdf); unknown format .lz4: 1 (such as {tmp_path}/c.jsonl.lz4); formats that are read: "
        ".txt, .jsonl, .parquet, .csv or .tsv, plain, .gz, .bz2, .xz or .zst"]
    assert left_out["unknown format .pdf"] == {"count": 2, "names": [f"{tmp_path}/b.pdf", f"{tmp_path}/c/d.PDF"]}
    assert json.loads(json.dumps(left_out)) == left_out


def test_empty_records_and_files_are_counted_when_all_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_json_lines([{"text": ""}, {"text": " \n"}, {"text": None}, {"text": "x"}]))
    write(tmp_path, b_txt="", c_jsonl="", d_csv="", e_csv="text\n")
    found, said, left_out = said_and_left_out(tmp_path)
    assert found == ["x"]
    assert said == [f"passed over in the corpus of 1 documents: empty record: 4 (such as {tmp_path}/a.jsonl:1); "
                    f"no record in the file: 3 (such as {tmp_path}/c.jsonl)"]
    names = left_out["no record in the file"]["names"]
    assert names == [f"{tmp_path}/{name}" for name in ("c.jsonl", "d.csv", "e.csv")]


def test_links_to_folders_end_where_they_lead_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, a__x_txt="x", a__b__y_txt="y", z__z_txt="z")
    for place, target in {"a/b/up": "..", "a/self": ".", "loop": tmp_path, "a/side": tmp_path / "z"}.items():
        (tmp_path / place).symlink_to(target)
    assert said_and_left_out(tmp_path) == (["x", "y", "z"], [], {})
    assert sorted(texts(f"{tmp_path}/**/*.txt")) == sorted(texts(f"{tmp_path}/**")) == ["x", "y", "z"]


@pytest.mark.parametrize("pattern", ["**/*.txt", "**/b/*", "a/**/y.txt", "**/.h/*.txt", "*/**/[xy].txt",
                                     "**/b/**/*.txt", "a/**", "**/a/*.txt", "**/*/x.txt", "**/.*.txt"])
def test_a_pattern_matches_what_it_matches_elsewhere(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, a__x_txt="1", a__b__y_txt="2", a__b__b__y_txt="3", x_txt="4", _h__x_txt="5", a___h__b__x_txt="6",
          a___y_txt="7")
    files = {match for match in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(match).is_file()}
    assert {document.name for document in read_documents([f"{tmp_path}/{pattern}"])} == files


def test_a_dangling_link_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a")
    (tmp_path / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.txt").symlink_to("c.txt")
    with pytest.raises(CorpusError, match=r"b\.txt cannot be read: No such file"):
        texts(tmp_path)
    with pytest.raises(CorpusError, match=r"b\.txt cannot be read: No such file"):
        corpus_signature([str(tmp_path)])
    (tmp_path / "b.txt").unlink()
    with pytest.raises(CorpusError, match=r"c\.txt cannot be read: Too many levels"):
        texts(tmp_path)


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a")
    os.mkfifo(tmp_path / "b.txt")
    found, _, left_out = said_and_left_out(tmp_path)
    assert (found, left_out["no regular file"]["count"]) == (["a"], 1)


def test_folders_that_a_pattern_matches_are_named(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a", b__c_txt="c")
    found, (line,), _ = said_and_left_out(f"{tmp_path}/*")
    assert found == ["a"]
    assert f"folder that a pattern matches: 1 (such as {tmp_path}/b)" in line
    assert said_and_left_out(f"{tmp_path}/**") == (["a", "c"], [], {})


def test_a_name_that_is_no_utf8_can_be_written_down(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a")
    (tmp_path / os.fsdecode(b"caf\xe9.pdf")).write_text("")
    _, said, left_out = said_and_left_out(tmp_path)
    assert json.dumps(left_out, ensure_ascii=False).encode()
    assert "caf\ufffd.pdf" in said[0].encode().decode()


def test_what_two_sources_lead_to_is_counted_once(tmp_path: Path) -> None:
    write(tmp_path, a__a_txt="a", a__b_pdf="")
    _, _, left_out = said_and_left_out(tmp_path, tmp_path / "a")
    assert left_out["unknown format .pdf"]["count"] == 1


def test_many_names_are_counted_and_the_first_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MOST_NAMES", 2)
    write(tmp_path, a_txt="a", **{f"{i}_pdf": "" for i in range(5)})
    _, _, left_out = said_and_left_out(tmp_path)
    assert left_out["unknown format .pdf"] == {"count": 5, "names": [f"{tmp_path}/0.pdf", f"{tmp_path}/1.pdf"]}


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [["one, two"], ['"quoted" and\r\nin\n\nlines'], ["\u2028 next"], ["x" * 200_000], ["tab\tbed"], [" spaced "]]
    for suffix, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
        with open(tmp_path / f"a.{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, dialect).writerows([["id", "text"], *([i, *row] for i, row in enumerate(rows))])
        assert texts(tmp_path / f"a.{suffix}") == [row[0] for row in rows]


def test_documents_of_a_table_say_on_which_line_they_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n\n"one\ntwo"\nthree\n')
    assert [document.name for document in read_documents([str(tmp_path)])] == [
        f"{tmp_path}/a.csv:4", f"{tmp_path}/a.csv:5"]


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", r"a\.csv has no field 'text', only 'a', 'b'; choose one with --text-field"),
    ("text;b\n1;2\n", r"a\.csv has no field 'text', only 'text;b'"),
    ("text,b,text\n1,2,3\n", r"a\.csv has 2 fields 'text'; rename all but one"),
    ("text,b\n1,2\n3\n", r"a\.csv:3 ends a record of 1 fields, but the header has 2"),
    ("text,b\n1,2,3\n", r"a\.csv:2 ends a record of 3 fields, but the header has 2"),
    ('text\n"never closed\nnext\n', r"a\.csv:\d is no readable \.csv table: unexpected end of data"),
    ('text\n"a" b\n', r"a\.csv:2 is no readable \.csv table: ',' expected after"),
])
def test_a_bad_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path / "a.csv")


def test_a_table_about_something_else_is_named_and_left_out_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a", b_csv="name,size\na,1\n")
    found, said, left_out = said_and_left_out(tmp_path)
    assert found == ["a"]
    assert said == [f"passed over in the corpus of 1 documents: no field 'text': 1 (such as {tmp_path}/b.csv, which "
                    "has 'name', 'size')"]
    assert list(left_out) == ["no field 'text'"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(CorpusError, match=r"there is no record in it; no field 'text': 1 \(such as .*b\.csv, which has "
                                          r"'name', 'size'\); choose another with --text-field"):
        texts(tmp_path)
    assert texts(tmp_path, text_field="name") == ["a"]


@pytest.mark.parametrize("compression", [".bz2", ".xz", ".zst"])
def test_what_follows_a_frame_and_is_none_is_no_end(tmp_path: Path, compression: str) -> None:
    """Python's readers of bzip2 and xz take it for the end of the file: what follows would be lost."""
    compress, path = COMPRESS[compression], tmp_path / f"a.txt{compression}"
    path.write_bytes(compress(b"first ") + b"\0" * 8 + compress(b"second") + b"\0" * 512)
    assert texts(path) == ["first second"]
    path.write_bytes(compress(b"first ") + b"x" + compress(b"second"))
    with pytest.raises(CorpusError, match=r"is no valid (bzip2|xz|zstd) file"):
        texts(path)


@pytest.mark.parametrize("name", ["a.txt", "*.txt", "**/*.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_that_is_named_is_refused_and_not_read(tmp_path: Path, name: str, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / "a.txt")
    else:
        (tmp_path / "a.txt").symlink_to("/dev/zero")
    for read in (texts, lambda source: corpus_signature([source])):
        with pytest.raises(UsageError, match=r"a\.txt is a pipe, a socket or a device"):
            read(f"{tmp_path}/{name}")


def test_a_pattern_over_many_links_that_lead_to_each_other_ends(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(12)]
    for name in names:
        write(tmp_path, **{f"{name}__a_txt": name})
    for name in names:
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert sorted(texts(f"{tmp_path}/**/*.txt")) == sorted(names)
    assert texts(f"{tmp_path}/**/to_d3/to_d4/*.txt") == ["d4"]


def test_a_number_of_too_many_digits_is_one_line_with_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, a_jsonl='{"text": "x"}\n{"text": "y", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2 holds a number of more than 4,300 digits"):
        texts(tmp_path)


def bomb(suffix: str, megabytes: int) -> bytes:
    chunk, parts = b"ab\n" * 349_525, []
    if suffix == ".zst":
        packer: Any = zstandard.ZstdCompressor().compressobj()
    else:
        packer = bz2.BZ2Compressor() if suffix == ".bz2" else lzma.LZMACompressor()
    parts = [packer.compress(chunk) for _ in range(megabytes)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ".xz"])
def test_a_small_file_that_holds_much_is_decompressed_a_little_at_a_time(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(bomb(suffix, 24))
    assert path.stat().st_size < 60_000
    sizes = [len(chunk) for chunk in corpus._read_chunks(corpus._known_file(path))]
    assert sum(sizes) == 24 * 3 * 349_525
    assert max(sizes) <= 17 * corpus.CHUNK_BYTES


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.csv"])
def test_a_line_longer_than_one_may_be_is_refused_with_its_size(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1000)
    data = b'{"text": "x"}\n{"text": "' + b"y" * 2000 + b'"}\n'
    if name == "a.csv":
        data = b"text\n" + b"y" * 2011 + b"\n"
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith(".zst") else data)
    with pytest.raises(CorpusError, match=r"a\..*:2 is a line of 2,01[12] bytes or more, but one may have 1,000"):
        texts(tmp_path)


def test_a_compressed_text_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 1001))
    with pytest.raises(CorpusError, match=r"a\.txt\.gz is one document of more than 1,000 bytes"):
        texts(tmp_path)
