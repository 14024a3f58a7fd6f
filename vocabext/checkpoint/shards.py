"""Safetensors files as headers and byte ranges.

A file is eight bytes with the length of a JSON header, the header (name -> dtype, shape, byte range), and
the bytes. Headers alone tell everything that `inspect` and `patch` must decide. `write_shard` rewrites a shard in one
pass over its bytes, and holds no more than a few chunks of them, however large a matrix is.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vocabext.errors import CheckpointError
from vocabext.files.ranges import READ_BYTES, Advance, Extent

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
CHUNK_BYTES = 16 * 1024 * 1024  # of rows that are computed at a time
REWRITE_BYTES = 4 * 1024 * 1024  # of a shard that are copied at a time: one chunk is read while another is hashed
# Sizes of the types that this module computes with; it copies tensors of other types without looking into them.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
               "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies.

    Attributes:
        file: Name of the shard, relative to the model folder.
        dtype: The type as safetensors spells it, such as `BF16`.
        shape: The shape.
        start: First byte, counted from the end of the shard's header.
        end: The byte after the last one.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start

    @property
    def row_bytes(self) -> int:
        """Size of one row; the tensor must have rows."""
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file.

    Attributes:
        file: Name of the file, relative to the model folder.
        data_start: Offset of the first tensor byte in the file.
        metadata: The header's `__metadata__`, None if it has none.
        tensors: Every tensor in the file, in the order of its bytes.
    """

    file: str
    data_start: int
    metadata: dict[str, str] | None
    tensors: dict[str, TensorInfo]


def row_ranges(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield ranges `[first, last)` of rows that may be computed at a time: they take a few copies in float32."""
    step = max(1, CHUNK_BYTES // (4 * row_bytes))
    return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))


# -- reading a header ---------------------------------------------------------------------------------------------

def read_shard(folder: Path, file: str) -> Shard:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: If the file is truncated, or its header is no safetensors header.
    """
    path = folder / file
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, fewer than a safetensors file can have; download it again")
    with open(path, "rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        if length > MAX_HEADER_BYTES and length <= size - 8:
            raise CheckpointError(f"{path} announces a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise CheckpointError(
                f"{path} announces a header of {length} bytes, but the file has {size} bytes; "
                "it is truncated or no safetensors file"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {name: _tensor_info(file, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has a damaged safetensors header; download it again") from None
    data_bytes = size - 8 - length
    for name, info in tensors.items():
        _check_tensor(path, name, info, data_bytes)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(path, ordered, data_bytes)
    return Shard(file, 8 + length, metadata, ordered)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice; readers differ in which one they take")
    return found


def _metadata(value: Any) -> dict[str, str] | None:
    if value is not None and not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise ValueError("metadata are texts by name")
    return value


def _tensor_info(file: str, entry: Mapping[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(value) is int and value >= 0 for value in (start, end, *shape)):
        raise ValueError("sizes are counts")
    return TensorInfo(file, str(entry["dtype"]), shape, start, end)


def _check_tensor(path: Path, name: str, info: TensorInfo, data_bytes: int) -> None:
    if info.start > info.end or info.end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {info.end} of the data, the file has {data_bytes}; "
            "download it again"
        )
    expected = DTYPE_BYTES.get(info.dtype, 0) * math.prod(info.shape)
    if info.dtype in DTYPE_BYTES and expected != info.num_bytes:
        raise CheckpointError(
            f"{path}: {name} has {info.num_bytes} bytes, but shape {list(info.shape)} of {info.dtype} needs {expected}"
        )


def _check_ranges(path: Path, ordered: Mapping[str, TensorInfo], data_bytes: int) -> None:
    position = 0
    for name, info in ordered.items():
        if info.start != position:
            raise CheckpointError(f"{path}: {name} starts at byte {info.start}, the tensor before ends at {position}")
        position = info.end
    if position != data_bytes:
        raise CheckpointError(f"{path} has {data_bytes} bytes of data, but its tensors end at byte {position}")


# -- rewriting a shard --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Growth:
    """How the rows of one tensor change.

    Attributes:
        first_row: Where the new rows go; all rows before stay as they are.
        num_new: How many there are.
        num_rows: Rows of the tensor afterwards; those behind the new ones stay as they are, or are surplus.
        rows: Returns the bytes of new rows `[i, j)`, counted from the first new one.
        surplus: The bytes of each row that belongs to no id of the base and to no token; zeros if None.
    """

    first_row: int
    num_new: int
    num_rows: int
    rows: Callable[[int, int], bytes]
    surplus: bytes | None = None

    @property
    def end_row(self) -> int:
        """The row after the last new one."""
        return self.first_row + self.num_new

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the shape of the tensor afterwards."""
        return (self.num_rows, *info.shape[1:])

    def num_bytes(self, info: TensorInfo) -> int:
        """Return the size of the tensor afterwards."""
        return self.num_rows * info.row_bytes


@dataclass(frozen=True)
class Copied:
    """A tensor that a shard gets in addition: a copy of another one in it, with new rows of its own.

    Attributes:
        source: Stored name of the tensor that is copied.
        growth: How the copy changes.
    """

    source: str
    growth: Growth


@dataclass(frozen=True)
class Rewritten:
    """What `write_shard` saw of the old shard, and the digests of what it wrote.

    Attributes:
        header: The first bytes of the old shard: length and header.
        num_bytes: Size of the old shard.
        sha256: Digest of the old shard.
        tensors_sha256: By stored name, the digest of the old bytes of each tensor that changes.
        overwritten: By the same names, offset and size of the overwritten rows in the file `kept`, and their digest.
        new_rows_sha256: By stored name, the digest of the new rows, also of tensors that were added.
    """

    header: bytes
    num_bytes: int
    sha256: str
    tensors_sha256: dict[str, str]
    overwritten: dict[str, tuple[int, int, str]]
    new_rows_sha256: dict[str, str]


def write_shard(source_folder: Path, shard: Shard, target: Path, growths: Mapping[str, Growth],
                added: Mapping[str, Copied], kept: BinaryIO, advance: Advance) -> Rewritten:
    """Write a copy of a shard with more rows in some tensors; every other byte is as it was.

    Args:
        source_folder: Folder of the shard.
        shard: Its header.
        target: The file to write. It is not synced.
        growths: By stored name, what becomes of the tensors that change; names of other shards are ignored.
        added: By stored name, tensors that this shard gets in addition.
        kept: Where rows that new ones overwrite are appended.
        advance: Told how many bytes of the old file have been read.

    Returns:
        What restores the old shard.
    """
    raw = new_header(shard, growths, added)
    source = Extent.whole(source_folder / shard.file)
    with open(target, "xb", buffering=READ_BYTES) as out, ThreadPoolExecutor(1) as pool:
        digests = _Digests(pool)
        header = bytes(source.part(0, shard.data_start).read())
        digests.file.update(header)
        out.write(raw)
        copy = _ShardCopy(source, shard, out, kept, digests, advance)
        old_sha256, overwritten, new_rows_sha256 = dict[str, str](), dict[str, tuple[int, int, str]](), dict[str, str]()
        done = 0  # everything between two tensors that change is copied as one piece
        for name, info in shard.tensors.items():
            if name in growths:
                copy.plain(done, info.start)
                old_sha256[name], overwritten[name], new_rows_sha256[name] = copy.grow(info, growths[name])
                done = info.end
        copy.plain(done, max((info.end for info in shard.tensors.values()), default=0))
        for name, tensor in added.items():
            new_rows_sha256[name] = copy.duplicate(shard.tensors[tensor.source], tensor.growth)
    return Rewritten(header, source.count, digests.file.hexdigest(), old_sha256, overwritten, new_rows_sha256)


def new_header(shard: Shard, growths: Mapping[str, Growth], added: Mapping[str, Copied]) -> bytes:
    """Return the first bytes of a shard as it will be: length and header."""
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": shard.metadata}
    position = 0
    entries = [(name, info, growths.get(name)) for name, info in shard.tensors.items()]
    entries += [(name, shard.tensors[tensor.source], tensor.growth) for name, tensor in added.items()]
    for name, info, growth in entries:
        shape, size = (info.shape, info.num_bytes) if growth is None else (growth.shape(info), growth.num_bytes(info))
        header[name] = {"dtype": info.dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format asks for tensor data at a multiple of 8
    return struct.pack("<Q", len(raw)) + raw


class _Digests:
    """Digests of chunks, computed in a thread of a pool while the caller writes the chunks."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.file = hashlib.sha256()
        self._pool = pool
        self._pending: Future[None] | None = None

    def update(self, chunk: bytes, *more: Any) -> None:
        """Add a chunk to the digest of the file and to others; waits until the chunk before is done."""
        self.wait()
        self._pending = self._pool.submit(self._update, chunk, *more)

    def _update(self, chunk: bytes, *more: Any) -> None:
        for digest in (self.file, *more):
            digest.update(chunk)

    def wait(self) -> None:
        """Wait until the digests have all chunks."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None


class _ShardCopy:
    """The pass over the bytes of one shard."""

    def __init__(self, source: Extent, shard: Shard, out: BinaryIO, kept: BinaryIO, digests: _Digests,
                 advance: Advance) -> None:
        self._source, self._shard, self._out, self._kept = source, shard, out, kept
        self._digests, self._advance = digests, advance

    def plain(self, first: int, last: int) -> None:
        """Copy the bytes `[first, last)` of the data as they are."""
        self._read(first, last, self._out)
        self._digests.wait()

    def grow(self, info: TensorInfo, growth: Growth) -> tuple[str, tuple[int, int, str], str]:
        """Copy a tensor with its new rows.

        Returns:
            The digest of its old bytes; offset, size and digest of its overwritten rows; the digest of its new rows.
        """
        whole, overwritten = hashlib.sha256(), hashlib.sha256()
        first, last = self._overwritten(info, growth)
        offset = self._kept.tell()
        self._read(info.start, first, self._out, whole)
        new_rows = self._write_rows(info, growth)
        self._read(first, last, self._kept, whole, overwritten)
        self._read(last, info.end, self._out, whole)
        self._write_surplus(info, growth)
        self._digests.wait()
        return whole.hexdigest(), (offset, last - first, overwritten.hexdigest()), new_rows

    def duplicate(self, info: TensorInfo, growth: Growth) -> str:
        """Write a copy of a tensor that `plain` or `grow` has read, with new rows of its own; returns their digest."""
        first, last = self._overwritten(info, growth)
        self._again(info.start, first)
        new_rows = self._write_rows(info, growth)
        self._again(last, info.end)
        self._write_surplus(info, growth)
        return new_rows

    @staticmethod
    def _overwritten(info: TensorInfo, growth: Growth) -> tuple[int, int]:
        """Return which bytes `[first, last)` of the data the rows have that new ones overwrite."""
        first, last = (min(row, info.shape[0]) * info.row_bytes for row in (growth.first_row, growth.end_row))
        return info.start + first, info.start + last

    def _read(self, first: int, last: int, out: BinaryIO, *digests: Any) -> None:
        for chunk in self._chunks(first, last):
            self._digests.update(chunk, *digests)
            out.write(chunk)
            self._advance(len(chunk))

    def _again(self, first: int, last: int) -> None:
        for chunk in self._chunks(first, last):
            self._out.write(chunk)
            self._advance(0)  # these bytes were counted when `plain` or `grow` read them; this lets a caller stop

    def _chunks(self, first: int, last: int) -> Iterator[bytes]:
        return self._source.part(self._shard.data_start + first, last - first).chunks(REWRITE_BYTES)

    def _write_rows(self, info: TensorInfo, growth: Growth) -> str:
        """Write rows for ids of the base that have none, then the new rows; returns the digest of the new rows."""
        self._write_silent(info, growth, growth.first_row - info.shape[0])
        digest = hashlib.sha256()
        for first, last in row_ranges(growth.num_new, info.row_bytes):
            rows = growth.rows(first, last)
            if len(rows) != (last - first) * info.row_bytes:
                raise CheckpointError(f"new rows {first} to {last} have {len(rows):,} bytes, but one row of the model "
                                      f"has {info.row_bytes:,}; they were made for another model")
            digest.update(rows)
            self._out.write(rows)
        return digest.hexdigest()

    def _write_surplus(self, info: TensorInfo, growth: Growth) -> None:
        self._write_silent(info, growth, growth.num_rows - max(info.shape[0], growth.end_row))

    def _write_silent(self, info: TensorInfo, growth: Growth, count: int) -> None:
        for _ in range(count):
            self._out.write(growth.surplus or bytes(info.row_bytes))
