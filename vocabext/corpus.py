"""Read the documents of a corpus: files, folders, globs and hub datasets.

A file's name says how it is read: `.txt` is one document, `.jsonl` (or `.json`, one object per
line) and `.parquet` hold one document per record, and each may be compressed (`.gz`, `.zst`).
Documents are streamed: a compressed corpus larger than memory is no problem, a single document is.

Nothing is repaired in silence. A line that is no JSON, a byte that is no UTF-8 or half a gzip
stream ends the reading with the file's name and the line, because a corpus that is quietly shorter
than its owner thinks makes every number measured on it wrong.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from vocabext.errors import CorpusError, UsageError
from vocabext.records import Document

CHUNK_BYTES = 1 << 20
_COMPRESSIONS = (".gz", ".zst")
_FORMATS = (".txt", ".jsonl", ".json", ".parquet")
_EXPECTED = ".txt, .jsonl or .parquet, plain, .gz or .zst"
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<split>[\w.-]+))?")


class _File(NamedTuple):
    """A file that is there and whose format is known."""

    path: Path
    format: str
    compression: str


class _HubDataset(NamedTuple):
    """A dataset on the hub; no split means `train`, or the only one."""

    name: str
    split: str | None


def read_documents(sources: Sequence[str], *, text_field: str = "text") -> Iterator[Document]:
    """Read every document of a corpus, in a fixed order.

    Paths are checked, and hub datasets opened, by the call itself; texts are read while iterating.
    A file that several sources name is read once. Records whose text is null, empty or only
    whitespace are passed over.

    Args:
        sources: Files, folders (searched recursively), globs or hub ids (`OWNER/NAME[:SPLIT]`).
        text_field: Name of the field with the text, in `.jsonl`, `.parquet` and hub datasets.

    Returns:
        An iterator over the documents. It raises `CorpusError` where a text cannot be read, and at
        its end if there was no document at all.

    Raises:
        UsageError: If a source is neither a path nor a hub dataset, or a file's format is unknown.
        CorpusError: If a folder holds no file of a known format.
    """
    streams = [
        _open_hub_dataset(source, text_field) if isinstance(source, _HubDataset) else _read_file(source, text_field)
        for source in _find_all(sources)
    ]
    return _pass_over_empty(streams, sources)


def corpus_signature(sources: Sequence[str]) -> str:
    """Digest what identifies a corpus cheaply: path, size and time of change of each file.

    Two equal signatures mean that a result made from the corpus is still up to date. Hub datasets
    enter with their id only: a new revision on the hub is not noticed.

    Args:
        sources: As for `read_documents`.

    Returns:
        A hexadecimal digest of 64 characters.

    Raises:
        UsageError: If a source is missing or of an unknown format.
        CorpusError: If a folder holds no file of a known format.
    """
    digest = hashlib.sha256()
    for source in _find_all(sources):
        if isinstance(source, _HubDataset):
            entry: list[object] = ["hub", source.name, source.split]
        else:
            status = source.path.stat()
            entry = ["file", str(source.path.absolute()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


# ---- finding -------------------------------------------------------------------------------------


def _find_all(sources: Sequence[str]) -> list[_File | _HubDataset]:
    if not sources:
        raise UsageError("no corpus was given")
    found: dict[object, _File | _HubDataset] = {}  # a dict keeps the order and drops repetitions
    for source in sources:
        for item in _find(source):
            found.setdefault(item.path.resolve() if isinstance(item, _File) else item, item)
    return list(found.values())


def _find(source: str) -> Sequence[_File | _HubDataset]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _search_folder(path)
    if path.exists():
        return [_known_format(path)]
    if glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [_known_format(Path(match)) for match in matches if not Path(match).is_dir()]
        if not files:
            raise UsageError(f"no file matches {source}")
        return files
    hub_id = _HUB_ID.fullmatch(source)
    # OWNER is no folder here, and NAME no file: else it is a path with a typing error
    if hub_id and _split_suffixes(path)[0] not in _FORMATS and not path.parent.exists():
        return [_HubDataset(hub_id["name"], hub_id["split"])]
    raise UsageError(f"{source} does not exist (a hub dataset is written OWNER/NAME or OWNER/NAME:SPLIT)")


def _search_folder(folder: Path) -> list[_File]:
    files: list[_File] = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        files += [_File(path, *_split_suffixes(path)) for path in paths if _split_suffixes(path)[0] in _FORMATS]
    if not files:
        raise CorpusError(f"the folder {folder} holds no file of a known format ({_EXPECTED})")
    return files


def _raise_unreadable(error: OSError) -> None:
    raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from None


def _split_suffixes(path: Path) -> tuple[str, str]:
    """Split a name into format and compression: `notes.jsonl.gz` into `.jsonl` and `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _known_format(path: Path) -> _File:
    kind, compression = _split_suffixes(path)
    if kind not in _FORMATS:
        raise UsageError(f"{path} has the unknown format {kind + compression or '(no suffix)'}; expected {_EXPECTED}")
    return _File(path, kind, compression)


# ---- reading -------------------------------------------------------------------------------------


def _pass_over_empty(streams: Iterable[Iterator[Document]], sources: Sequence[str]) -> Iterator[Document]:
    num_documents = num_empty = 0
    for stream in streams:
        for document in stream:
            if not document.text or document.text.isspace():
                num_empty += 1
                continue
            num_documents += 1
            yield document
    if not num_documents:
        seen = f"all {num_empty:,} records are empty" if num_empty else "there is no record in it"
        raise CorpusError(f"the corpus {' '.join(sources)} holds no text: {seen}")


def _read_file(file: _File, text_field: str) -> Iterator[Document]:
    with _blaming(file.path):
        if file.format == ".txt":
            yield Document(str(file.path), _read_text(file))
        elif file.format == ".parquet":
            yield from _read_parquet(file, text_field)
        else:
            yield from _read_json_lines(file, text_field)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or unreadable file makes a decoder raise into one line about it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is no complete gzip file: {error}; fetch or compress it again") from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_text(file: _File) -> str:
    data = b"".join(_read_chunks(file))
    if b"\0" in data:
        raise CorpusError(f"{file.path} looks like binary data or UTF-16 (a zero byte at {data.index(0):,}), "
                          "but text in UTF-8 is needed")
    return _decode(data, str(file.path))


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}; "
                          "convert it to UTF-8") from None


def _read_json_lines(file: _File, text_field: str) -> Iterator[Document]:
    for number, data in enumerate(_split_lines(_read_chunks(file)), start=1):
        name = f"{file.path}:{number}"
        line = _decode(data, name)
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{name} is not JSON: {error.msg} at column {error.colno}; "
                              "one object per line is needed") from None
        except RecursionError:
            raise CorpusError(f"{name} is not JSON: nested too deep; one object per line is needed") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{name} is a JSON {type(record).__name__}; one object per line is needed")
        yield Document(name, _text_of(record, text_field, name))


def _text_of(record: dict[str, Any], text_field: str, name: str) -> str:
    if text_field not in record:
        raise CorpusError(f"{name} has no field {text_field!r}, only {_list(record)}; choose one with --text-field")
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorpusError(f"{name}: the field {text_field!r} is of type {type(text).__name__}, but text is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone is valid JSON, but no tokenizer takes it
        raise CorpusError(f"{name}: the text has half a surrogate pair at character {error.start:,}; "
                          "write it again as valid Unicode") from None
    return text


def _list(names: Iterable[str], limit: int = 8) -> str:
    names = [str(name) for name in names]
    return ", ".join(repr(name) for name in names[:limit]) + (", ..." if len(names) > limit else "") or "no fields"


def _read_parquet(file: _File, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _seekable(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            names = table.schema_arrow.names
            if text_field not in names:
                raise CorpusError(f"{file.path} has no field {text_field!r}, only {_list(names)}; "
                                  "choose one with --text-field")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for record in batch.to_pylist():
                    number += 1
                    name = f"{file.path}:{number}"
                    yield Document(name, _text_of(record, text_field, name))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"{file.path} is no readable Parquet file: {_first_line(error)}") from None


@contextmanager
def _seekable(file: _File) -> Iterator[IO[bytes]]:
    """Open a file for reading anywhere in it; a compressed one is unpacked to a temporary file."""
    if not file.compression:
        with open(file.path, "rb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        for chunk in _read_chunks(file):
            unpacked.write(chunk)
        unpacked.seek(0)
        yield unpacked


def _read_chunks(file: _File) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed, a megabyte or so at a time."""
    if file.compression == ".zst":
        yield from _read_zst_chunks(file.path)
        return
    with gzip.open(file.path, "rb") if file.compression == ".gz" else open(file.path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _read_zst_chunks(path: Path) -> Iterator[bytes]:
    # Not `stream_reader`: it takes a file that was cut off for a complete one.
    import zstandard

    def new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    frame, is_open = new_frame(), False
    with open(path, "rb") as stream:
        try:
            while chunk := stream.read(CHUNK_BYTES):
                while chunk:
                    yield frame.decompress(chunk)
                    chunk, is_open = frame.unused_data, not frame.eof
                    if frame.eof:
                        frame = new_frame()
        except zstandard.ZstdError as error:
            raise CorpusError(f"{path} is no valid zstd file: {error}; fetch or compress it again") from None
    if is_open:
        raise CorpusError(f"{path} is no complete zstd file: it ends inside a frame; fetch or compress it again")


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    yield b"".join(rest)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- hub datasets --------------------------------------------------------------------------------


def _open_hub_dataset(dataset: _HubDataset, text_field: str) -> Iterator[Document]:
    """Open a dataset for streaming now, and read it later."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    label = f"{dataset.name}:{dataset.split}" if dataset.split else dataset.name
    try:
        # Asks once. `load_dataset` asks six times, half a minute, when there is no network.
        with suppress(OfflineModeIsEnabled):
            huggingface_hub.dataset_info(dataset.name, timeout=10)
        splits = datasets.load_dataset(dataset.name, streaming=True)
    except Exception as error:  # the hub's client raises errors of a dozen libraries
        raise UsageError(f"{dataset.name} does not exist here, and cannot be opened as a hub dataset: "
                         f"{type(error).__name__}: {_first_line(error)}") from None
    split = dataset.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise UsageError(f"the hub dataset {dataset.name} has no split {split!r}, only {_list(splits)}; "
                         f"write {dataset.name}:SPLIT")
    return _read_hub_records(lambda: splits[split], label, text_field)


def _read_hub_records(
    records: Callable[[], Iterable[dict[str, Any]]], label: str, text_field: str
) -> Iterator[Document]:
    try:
        for number, record in enumerate(records(), start=1):
            name = f"{label}:{number}"
            yield Document(name, _text_of(record, text_field, name))
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(f"the hub dataset {label} broke off while reading: "
                          f"{type(error).__name__}: {_first_line(error)}") from None
