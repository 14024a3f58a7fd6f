"""Read the documents of a corpus: files, folders, globs and hub datasets.

A file's name says how it is read: `.txt` is one document, `.jsonl` (or `.json`, one object per
line), `.parquet`, `.csv` and `.tsv` (with a header) hold one document per record, and each may be
compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Documents are streamed: a compressed corpus larger than
memory is no problem, a single document is.

Nothing is repaired or left out in silence, because a corpus that is quietly shorter than its owner
thinks makes every number measured on it wrong. A line that is no JSON, a byte that is no UTF-8 or
half a gzip stream ends the reading with the file's name and the line. What is passed over, such as
a `.pdf` in a folder or an empty record, is counted, named in one line, and recorded (`LeftOut`).
"""

import bz2
import csv
import fnmatch
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from vocabext.errors import CorpusError, UsageError
from vocabext.files.atomic import real_path

CHUNK_BYTES = 1 << 20
# Compressed bytes that zstd gets at once, because it returns all that they hold: at most 128 KiB for each four of them.
PIECE_BYTES = 512
# A line holds one record. Without a bound, a small compressed file may hold one that fills the memory.
MAX_LINE_BYTES = 128 << 20
MAX_TEXT_BYTES = 1 << 30  # of a compressed .txt; of a plain one the owner sees the size
# What the decompressors may allocate because a file asks for it: `xz -9` asks for 65 MiB, `zstd --long=31`, in which
# some public corpora come, for 2 GiB.
MAX_XZ_BYTES = 1 << 30
MAX_ZSTD_WINDOW_BYTES = 1 << 31
MAX_NAME_BYTES = 255  # of a file, on any common file system
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_FORMATS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv")
_EXPECTED = ".txt, .jsonl, .parquet, .csv or .tsv, plain, .gz, .bz2, .xz or .zst"
_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}
_EMPTY, _NO_RECORD = "empty record", "no record in the file"
# What artifacts name as the source of texts that were in memory.
IN_MEMORY = "(in memory)"
_MOST_NAMES = 1000  # of what was left out, in an artifact
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        name: Where it came from, such as `notes.jsonl:17`.
        text: The text itself.
    """

    name: str
    text: str


class _File(NamedTuple):
    """A file that is there and whose format is known."""

    path: Path
    format: str
    compression: str
    was_named: bool  # by the user, not found in a folder


class _HubDataset(NamedTuple):
    """A dataset on the hub; no split means `train`, or the only one."""

    name: str
    split: str | None


class LeftOut:
    """What of a corpus was not read, by reason: such as `unknown format .pdf`, `hidden`, `empty record`.

    Attributes:
        counts: How much there is of each reason.
        names: For each reason, the first names.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}
        self._paths: set[tuple[str, Path]] = set()

    def add(self, reason: str, name: str | Path) -> None:
        """Count something, and keep its name; a path counts once, however many sources lead to it."""
        if isinstance(name, Path):
            if (reason, name) in self._paths:
                return
            self._paths.add((reason, name))
        self.counts[reason] += 1
        if len(names := self.names.setdefault(reason, [])) < _MOST_NAMES:
            names.append(os.fsencode(str(name)).decode("utf-8", "replace"))  # a name on a disk may be any bytes

    def describe(self, but: Container[str] = ()) -> str:
        """Say in one line what was left out, for other reasons than `but`; nothing if there is nothing to say."""
        parts = [f"{reason}: {self.counts[reason]:,} (such as {names[0]})" for reason, names in self.names.items()
                 if reason not in but]
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return counts and names by reason, as JSON-ready values."""
        return {reason: {"count": self.counts[reason], "names": list(names)} for reason, names in self.names.items()}


class Documents(Iterator[Document]):
    """The documents of a corpus, and what of it was left out so far.

    Attributes:
        left_out: Complete when the last document has been read.
    """

    def __init__(self, documents: Iterator[Document], left_out: LeftOut) -> None:
        """Hand out `documents`."""
        self._documents, self.left_out = documents, left_out

    def __next__(self) -> Document:
        return next(self._documents)


def read_documents(
    sources: Sequence[str], *, text_field: str = "text", say: Callable[[str], None] = lambda _: None
) -> Documents:
    """Read every document of a corpus, in a fixed order.

    Paths are checked, and hub datasets opened, by the call itself; texts are read while iterating.
    A file that several sources name is read once. Records whose text is null, empty or only
    whitespace are passed over.

    Args:
        sources: Files, folders (searched recursively, also behind links), globs or hub ids
            (`OWNER/NAME[:SPLIT]`).
        text_field: Name of the field with the text, in `.jsonl`, `.parquet`, `.csv`, `.tsv` and hub datasets.
        say: Told what is left out: of the files by this call, of the records when the last one has been read.

    Returns:
        The documents. Reading them raises `CorpusError` where a text cannot be read, and at
        the end if there was no document at all.

    Raises:
        UsageError: If a source is neither a path nor a hub dataset, or a file's format is unknown.
        CorpusError: If a folder holds no file of a known format.
    """
    left_out = LeftOut()
    streams = [
        _open_hub_dataset(source, text_field) if isinstance(source, _HubDataset)
        else _read_file(source, text_field, left_out)
        for source in _find_all(sources, left_out)
    ]
    if line := left_out.describe():
        say(f"not read of the corpus: {line}; formats that are read: {_EXPECTED}")
    return Documents(_pass_over_empty(streams, sources, left_out, say), left_out)


def documents_in_memory(
    records: Iterable[object], *, text_field: str = "text", say: Callable[[str], None] = lambda _: None
) -> Documents:
    """Hand out what a program has in memory as the documents of a corpus.

    Args:
        records: Texts, `Document`s, or records with a text each, such as the rows of a dataset. Those that are empty
            or only whitespace are passed over.
        text_field: Name of the field with the text of a record.
        say: Told what was passed over, when the last record has been read.

    Returns:
        The documents. Reading them raises `CorpusError` at what is no text, and at the end if there was no document.
    """
    left_out = LeftOut()
    return Documents(_pass_over_empty([_in_memory(records, text_field)], [IN_MEMORY], left_out, say), left_out)


def _in_memory(records: Iterable[object], text_field: str) -> Iterator[Document]:
    for number, record in enumerate(records, start=1):
        name = record.name if isinstance(record, Document) else f"{IN_MEMORY}:{number}"
        if isinstance(record, Path):
            raise CorpusError(f"{name} is the path {record}, but a text is needed; pass paths as a list")
        if isinstance(record, Mapping):
            yield Document(name, _text_of(record, text_field, name))
        else:
            text = record.text if isinstance(record, Document) else record
            yield Document(name, _text_of({"text": text}, "text", name))


def left_out_of(documents: Iterable[Document]) -> dict[str, Any]:
    """Return what was left out of documents that come from a corpus, as JSON-ready values."""
    return documents.left_out.to_json() if isinstance(documents, Documents) else {}


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
    for source in _find_all(sources, LeftOut()):
        if isinstance(source, _HubDataset):
            entry: list[object] = ["hub", source.name, source.split]
        else:
            with _blaming(source.path):
                status = source.path.stat()
            entry = ["file", str(source.path.absolute()), status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


# ---- finding -------------------------------------------------------------------------------------


def _find_all(sources: Sequence[str], left_out: LeftOut) -> list[_File | _HubDataset]:
    if not sources:
        raise UsageError("no corpus was given")
    found: dict[object, _File | _HubDataset] = {}  # a dict keeps the order and drops repetitions
    for source in sources:
        for item in _find(source, left_out):
            found.setdefault(real_path(item.path) if isinstance(item, _File) else item, item)
    return list(found.values())


def _find(source: str, left_out: LeftOut) -> Sequence[_File | _HubDataset]:
    path = Path(source).expanduser()
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise UsageError(f"{source!r:.100} does not exist (a hub dataset is written OWNER/NAME or OWNER/NAME:SPLIT)")
    if path.is_dir():
        return _search_folder(path, left_out)
    if path.exists():
        return [_known_file(path)]
    if glob.has_magic(source):
        return _match(source, path, left_out)
    hub_id = _HUB_ID.fullmatch(source)
    # OWNER is no folder here, and NAME no file: else it is a path with a typing error
    if hub_id and _split_suffixes(path)[0] not in _FORMATS and not path.parent.exists():
        return [_HubDataset(hub_id["name"], hub_id["split"])]
    raise UsageError(f"{source} does not exist (a hub dataset is written OWNER/NAME or OWNER/NAME:SPLIT)")


def _match(source: str, pattern: Path, left_out: LeftOut) -> list[_File]:
    matches = sorted(_glob(pattern), key=str)
    files = [_known_file(path) for path in matches if not path.is_dir()]
    if not files:
        raise UsageError(f"no file matches {source}")
    read = {parent for file in files for parent in file.path.parents}
    for path in matches:
        if path.is_dir() and path not in read:
            left_out.add("folder that a pattern matches", path)
    return files


def _glob(pattern: Path) -> Iterator[Path]:
    """Find what a pattern matches, as `glob.glob` does; where links lead in circles, that one goes on for ever."""
    parts = pattern.parts
    first = parts.index("**") if "**" in parts else len(parts)
    for start in map(Path, glob.glob(str(Path(*parts[:first])))):
        if first == len(parts):
            yield start
        elif start.is_dir():
            yield from _matches_below(start, parts[first:])


def _matches_below(start: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the paths below a folder that match `parts`.

    `places` are the parts that may be next in a folder. Links may lead to a folder in very many ways; it is searched
    once for each set of places, for it holds the same matches every time.
    """
    seen: set[tuple[str, frozenset[int]]] = set()
    left = [(start, _behind_stars({0}, parts))]
    while left:
        folder, places = left.pop()
        if (key := (os.path.realpath(folder), places)) in seen:
            continue
        seen.add(key)
        for path in folder.iterdir():
            after = _behind_stars({place for i in places for place in _step(path.name, i, parts)}, parts)
            if len(parts) in after:
                yield path
            if after - {len(parts)} and path.is_dir():
                left.append((path, after))


def _step(name: str, place: int, parts: Sequence[str]) -> Iterator[int]:
    """Yield the place behind a name; only a leading dot matches a hidden one."""
    if place < len(parts) and (parts[place].startswith(".") or not name.startswith(".")):
        if parts[place] == "**":
            yield place
        elif fnmatch.fnmatchcase(name, parts[place]):
            yield place + 1


def _behind_stars(places: set[int], parts: Sequence[str]) -> frozenset[int]:
    """Add the places that are reached without a name, because `**` matches no folder as well."""
    for place in range(len(parts)):
        if place in places and parts[place] == "**":
            places.add(place + 1)
    return frozenset(places)


def _search_folder(folder: Path, left_out: LeftOut) -> list[_File]:
    files: list[_File] = []
    seen: set[str] = set()  # links may lead to the same folder twice, or in a circle
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(name for name in (*folders, *names) if name.startswith(".")):
            left_out.add("hidden", Path(parent, name))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            kind, compression = _split_suffixes(path)
            if kind not in _FORMATS:
                left_out.add(f"unknown format {kind + compression or '(no suffix)'}", path)
            elif path.exists() and not path.is_file():  # a pipe would be waited for; a dangling link is an error
                left_out.add("no regular file", path)
            else:
                files.append(_File(path, kind, compression, was_named=False))
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


def _known_file(path: Path) -> _File:
    if path.exists() and not path.is_file():  # a pipe would be waited for, and /dev/zero has no end
        raise UsageError(f"{path} is a pipe, a socket or a device, but a corpus is read several times; write the text "
                         "to a file, and pass that")
    kind, compression = _split_suffixes(path)
    if kind not in _FORMATS:
        raise UsageError(f"{path} has the unknown format {kind + compression or '(no suffix)'}; expected {_EXPECTED}")
    return _File(path, kind, compression, was_named=True)


# ---- reading -------------------------------------------------------------------------------------


def _pass_over_empty(
    streams: Iterable[Iterator[Document]], sources: Sequence[str], left_out: LeftOut, say: Callable[[str], None]
) -> Iterator[Document]:
    said = set(left_out.counts)
    num_documents = 0
    for stream in streams:
        for document in stream:
            if not document.text or document.text.isspace():
                left_out.add(_EMPTY, document.name)
                continue
            num_documents += 1
            yield document
    line = left_out.describe(but=said)
    if not num_documents:
        num_empty = left_out.counts[_EMPTY]
        seen = f"all {num_empty:,} records are empty" if num_empty else "there is no record in it"
        if more := left_out.describe(but={*said, _EMPTY, _NO_RECORD}):
            seen += f"; {more}; choose another with --text-field"
        raise CorpusError(f"the corpus {' '.join(sources)} holds no text: {seen}")
    if line:
        say(f"passed over in the corpus of {num_documents:,} documents: {line}")


def _read_file(file: _File, text_field: str, left_out: LeftOut) -> Iterator[Document]:
    num_records, before = 0, left_out.counts.total()
    with _blaming(file.path):
        for document in _read_records(file, text_field, left_out):
            num_records += 1
            yield document
    if not num_records and left_out.counts.total() == before:
        left_out.add(_NO_RECORD, file.path)


def _read_records(file: _File, text_field: str, left_out: LeftOut) -> Iterator[Document]:
    if file.format == ".txt":
        yield Document(str(file.path), _read_text(file))
    elif file.format == ".parquet":
        yield from _read_parquet(file, text_field)
    elif file.format in _DIALECTS:
        yield from _read_table(file, text_field, left_out)
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
    data = bytearray()
    for chunk in _read_chunks(file):
        if b"\0" in chunk:
            raise CorpusError(f"{file.path} looks like binary data or UTF-16 (a zero byte at "
                              f"{len(data) + chunk.index(0):,}), but text in UTF-8 is needed")
        data += chunk
        if file.compression and len(data) > MAX_TEXT_BYTES:
            raise CorpusError(f"{file.path} is one document of more than {MAX_TEXT_BYTES:,} bytes when it is "
                              "decompressed; split it into documents, such as the lines of a .jsonl")
    return _decode(data, str(file.path))


def _decode(data: bytes | bytearray, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{name} is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}; "
                          "convert it to UTF-8") from None


def _read_json_lines(file: _File, text_field: str) -> Iterator[Document]:
    for number, data in enumerate(_split_lines(_read_chunks(file), file.path), start=1):
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
        except ValueError:  # what Python says names a function of its own
            raise CorpusError(f"{name} holds a number of more than {sys.get_int_max_str_digits():,} digits; write it "
                              "as a text, or leave the field out") from None
        if not isinstance(record, dict):
            raise CorpusError(f"{name} is a JSON {type(record).__name__}; one object per line is needed")
        yield Document(name, _text_of(record, text_field, name))


def _text_of(record: Mapping[str, Any], text_field: str, name: str) -> str:
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


def _read_table(file: _File, text_field: str, left_out: LeftOut) -> Iterator[Document]:
    """Read the records of a table with a header; one that was found beside other files may be about something else."""
    lines = (_decode(line, f"{file.path}:{number}") + "\n"
             for number, line in enumerate(_split_lines(_read_chunks(file), file.path), start=1))
    csv.field_size_limit(MAX_LINE_BYTES)  # the default is shorter than many a document
    table = csv.reader(lines, _DIALECTS[file.format], strict=True)
    try:
        rows = (row for row in table if row)
        header = next(rows, None)
        if header is None:
            return
        if text_field not in header and not file.was_named:
            left_out.add(f"no field {text_field!r}", f"{file.path}, which has {_list(header)}")
            return
        if text_field not in header:
            raise CorpusError(f"{file.path} has no field {text_field!r}, only {_list(header)}; "
                              "choose one with --text-field")
        if header.count(text_field) > 1:
            raise CorpusError(f"{file.path} has {header.count(text_field)} fields {text_field!r}; rename all but one")
        for row in rows:
            name = f"{file.path}:{table.line_num}"
            if len(row) != len(header):
                raise CorpusError(f"{name} ends a record of {len(row)} fields, but the header has {len(header)}")
            yield Document(name, row[header.index(text_field)])
    except csv.Error as error:
        raise CorpusError(f"{file.path}:{table.line_num} is no readable {file.format} table: {error}") from None


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
    if file.compression not in ("", ".gz"):
        yield from _read_frames(file)
        return
    with gzip.open(file.path, "rb") if file.compression else open(file.path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _read_frames(file: _File) -> Iterator[bytes]:
    # Not the readers of bz2, lzma and zstandard: they take a file for complete that was cut off, or that ends in bytes
    # which are no frame.
    kind, (new_frame, errors) = _COMPRESSIONS[file.compression], _decompressor(file.compression)
    frame, is_open, is_first = new_frame(), False, True
    with open(file.path, "rb") as stream:
        while chunk := stream.read(PIECE_BYTES if file.compression == ".zst" else CHUNK_BYTES):
            # between frames there may be zeros that fill a block of a disk or tape
            while chunk := (chunk if is_open or is_first else chunk.lstrip(b"\0")):
                try:
                    yield from _decompress(frame, chunk)
                except errors as error:
                    raise CorpusError(f"{file.path} is no valid {kind} file: {_first_line(error)}; fetch or compress "
                                      "it again") from None
                chunk, is_open, is_first = frame.unused_data, not frame.eof, False
                if frame.eof:
                    frame = new_frame()
    if is_open:
        raise CorpusError(f"{file.path} is no complete {kind} file: it ends inside a frame; fetch or compress it again")


def _decompress(frame: Any, chunk: bytes) -> Iterator[bytes]:
    """Yield what a chunk holds, a megabyte or so at a time: a few bytes may hold gigabytes."""
    if not hasattr(frame, "needs_input"):  # zstd
        yield frame.decompress(chunk)
        return
    yield frame.decompress(chunk, CHUNK_BYTES)
    while not (frame.eof or frame.needs_input):
        yield frame.decompress(b"", CHUNK_BYTES)


def _decompressor(compression: str) -> tuple[Callable[[], Any], type[Exception]]:
    """Return what decompresses one frame, and the error that it raises for bytes that are none."""
    if compression == ".bz2":
        return bz2.BZ2Decompressor, OSError
    if compression == ".xz":
        return lambda: lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES), lzma.LZMAError
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    return decompressor.decompressobj, zstandard.ZstdError


def _split_lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    rest = bytearray()
    number = 1
    for chunk in chunks:
        *lines, last = chunk.split(b"\n")
        for line in lines:
            _check_line(path, number, len(rest) + len(line))
            yield bytes(rest + line) if rest else line
            rest.clear()
            number += 1
        rest += last
        _check_line(path, number, len(rest))
    yield bytes(rest)


def _check_line(path: Path, number: int, size: int) -> None:
    if size > MAX_LINE_BYTES:
        raise CorpusError(f"{path}:{number} is a line of {size:,} bytes or more, but one may have "
                          f"{MAX_LINE_BYTES:,}; split the document that it holds")


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
