"""Ranges of bytes in files, looked at a chunk at a time: a file may be larger than the memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np

from vocabext.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash

# By which files are read, compared, hashed and written: few enough to stay in the processor's cache between these.
READ_BYTES = 1024 * 1024
READ_THREADS = 4  # one stream alone keeps neither a fast disk busy nor a file system across a network

Item = TypeVar("Item")
Found = TypeVar("Found")
Advance = Callable[[int], object]


def ignore(count: int, /) -> None:
    """Count nothing: what is told how far long work is, where nobody asks."""


@dataclass(frozen=True)
class Extent:
    """A range of bytes in a file.

    Attributes:
        path: The file.
        start: Its first byte.
        count: How many bytes it has.
    """

    path: Path
    start: int
    count: int

    @classmethod
    def whole(cls, path: Path) -> "Extent":
        """The whole of a file."""
        return cls(path, 0, path.stat().st_size)

    def part(self, start: int, count: int) -> "Extent":
        """Return `count` of its bytes, from byte `start` of it on."""
        return Extent(self.path, self.start + start, count)

    def chunks(self, size: int | None = None) -> Iterator[bytes]:
        """Read it, `size` bytes at a time (`READ_BYTES` if None).

        Raises:
            CheckpointError: If the file is shorter than it was.
        """
        left, most = self.count, size or READ_BYTES
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while left:
                chunk = _exactly(file.read, min(most, left))
                if not chunk:
                    raise _shorter(self.path)
                left -= len(chunk)
                yield chunk

    def read(self) -> bytearray:
        """Return all its bytes."""
        return bytearray().join(self.chunks())

    def sha256(self, advance: Advance = ignore) -> str:
        """Return the digest of the bytes, as hexadecimal digits.

        Args:
            advance: Told how many bytes were read.
        """
        return pass_on(self.chunks(), None, advance)[1]


def read_scattered(path: Path, starts: Iterable[int], count: int) -> bytearray:
    """Return `count` bytes from each of some places of a file, one after the other.

    Raises:
        CheckpointError: If the file ends before.
    """
    found = bytearray()
    with open(path, "rb", buffering=0) as file:
        for start in starts:
            file.seek(start)
            part = _exactly(file.read, count)
            if len(part) < count:
                raise _shorter(path)
            found += part
    return found


def _shorter(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} became shorter while it was read")


def pass_on(chunks: Iterable[bytes], out: IO[bytes] | None, advance: Advance = ignore) -> tuple[int, str]:
    """Write chunks to a file, and return their size in bytes and their SHA-256 digest as hexadecimal digits.

    Args:
        chunks: What to write.
        out: Where; None only counts.
        advance: Told how many bytes were written.
    """
    digest, count = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        if out is not None:
            out.write(chunk)
        count += len(chunk)
        advance(len(chunk))
    return count, digest.hexdigest()


def file_sha256(path: Path) -> str | None:
    """Return the digest of a file as hexadecimal digits, None if there is no such file."""
    return Extent.whole(path).sha256() if path.is_file() else None


def _exactly(read: Callable[[int], bytes | None], count: int) -> bytes:
    """Read until there are `count` bytes, or the file ends: a raw file may return fewer at a time."""
    first = read(count) or b""
    if len(first) == count or not first:
        return first
    parts, left = [first], count - len(first)
    while left and (part := read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def first_difference(left: Extent, right: Extent, advance: Advance = ignore,
                     digest: "_Hash | None" = None) -> int | None:
    """Return the place of the first byte in which two extents differ, None if they are equal.

    Args:
        left: One extent.
        right: The other; where one is shorter, they differ at its end.
        advance: Told how many bytes were compared.
        digest: Gets the bytes that both have.
    """
    position, common = 0, min(left.count, right.count)
    shortened = (Extent(extent.path, extent.start, common) for extent in (left, right))
    for here, there in zip(*(extent.chunks() for extent in shortened), strict=True):
        if here != there:
            odd = np.frombuffer(here, np.uint8) != np.frombuffer(there, np.uint8)
            return position + int(odd.argmax())
        if digest is not None:
            digest.update(here)
        position += len(here)
        advance(len(here))
    return None if left.count == right.count else common


def in_parallel(work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    """Do something with each of several files, a few at a time; return what was found, in their order.

    Args:
        work: What to do; it may be called from any thread.
        items: What to do it with.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def same_inode(left: Path, right: Path) -> bool:
    """Tell whether two paths are one file on the disk, by a hard link or any other way."""
    return left.samefile(right)
