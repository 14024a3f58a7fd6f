"""Bring a file of the base into the new folder: as a link where that is wanted and possible, else as a copy.

A *reflink* shares the bytes on disk until one side is written to, and is as safe as a copy. A *hard link* is
the same file under a second name: whoever edits it in place edits the base. So only weights are linked, which
are replaced and not edited, and vocabext itself never opens a file of an output for writing.
"""

import errno
import fcntl
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from vocabext.errors import CheckpointError
from vocabext.files.ranges import Advance

AUTO, HARD, COPY = "auto", "hard", "copy"
LINKS = (AUTO, HARD, COPY)
COPY_BYTES = 64 * 1024 * 1024  # by which the kernel copies, between two reports of progress
COPY_THREADS = 4  # one copy alone keeps neither a fast disk busy nor a file system across a network
FICLONE = 0x40049409  # Linux: share the bytes of another file, copy on write
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def leads_outside(path: Path, folder: Path) -> bool:
    """Tell whether a path in a folder leads to a file outside it: what a model's author puts there is not the model's.

    A hub cache keeps its files in `blobs` beside `snapshots`, and links to them: these count as inside.
    """
    real, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [inside, *(parent.parent / "blobs" for parent in (inside, *inside.parents) if parent.name == "snapshots")]
    return not any(real.is_relative_to(place) for place in allowed)


def link_file(source: Path, target: Path, how: str) -> str | None:
    """Link a file, if that is asked for and possible. Links of a hub cache are followed.

    Args:
        source: The file.
        target: Its new name; must not exist.
        how: `auto` tries a reflink, then a hard link; `hard` insists on a hard link; `copy` links nothing.

    Returns:
        `reflink` or `hard link`; None if the file is to be copied.

    Raises:
        CheckpointError: If `how` is `hard` and the file system refuses.
    """
    if how == COPY:
        return None
    real = os.path.realpath(source)
    if how == AUTO and _reflinked(real, target):
        return "reflink"
    try:
        os.link(real, target)
    except OSError as error:  # another file system, one without links, or a file of another user
        if how == AUTO:
            return None
        raise CheckpointError(
            f"{source} cannot be hard-linked into {target.parent.parent}: {error.strerror}; use --link auto or copy, "
            "or an output on the file system of the model"
        ) from None
    return "hard link"


def _reflinked(source: str, target: Path) -> bool:
    with open(source, "rb") as old, open(target, "xb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:  # most file systems cannot
            pass
        else:
            return True
    target.unlink()
    return False


def copy_file(source: Path, target: Path, advance: Advance) -> None:
    """Copy the bytes of a file inside the kernel where it can do that; memory does not grow with the file.

    Args:
        source: The file.
        target: Its new name; must not exist.
        advance: Told how many bytes were copied.
    """
    with open(source, "rb") as old, open(target, "xb", buffering=0) as new:
        try:
            while count := os.copy_file_range(old.fileno(), new.fileno(), COPY_BYTES):
                advance(count)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY or new.tell():
                raise
        # Some file systems report an end that is none: whatever is left, or all of it.
        while chunk := os.read(old.fileno(), COPY_BYTES // 4):
            while chunk:
                written = os.write(new.fileno(), chunk)
                chunk = chunk[written:]
                advance(written)


class _StoppedError(Exception):
    """Other work failed, or all of it was interrupted."""


class Copier:
    """Copies files in threads of its own while the caller does other work, and syncs each that is complete.

    The threads do nothing but copy bytes.

    Leaving the `with` block waits for all of them. The first error, of a thread or of the caller, stops the rest and
    is the one that is raised; nothing is written any more once the block is left.

    Args:
        advance: Told how many bytes were copied, from one thread at a time.
    """

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(COPY_THREADS)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._work: list[Future[None]] = []

    def add(self, source: Path, target: Path) -> None:
        """Copy a file; returns at once."""
        self._work.append(self._pool.submit(self._copy, source, target))

    def advance(self, count: int) -> None:
        """Count bytes, of the caller's work as well; raises if a copy failed, so that nobody goes on."""
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._advance(count)

    def _copy(self, source: Path, target: Path) -> None:
        try:
            copy_file(source, target, self.advance)
            with open(target, "rb") as file:
                os.fsync(file.fileno())
        except BaseException as error:
            with self._lock:
                if self._error is None and not self._stop.is_set():
                    self._error = error
                self._stop.set()

    def __enter__(self) -> "Copier":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                for work in self._work:
                    work.result()
            earlier = self._error
        finally:  # after an error, or an interruption while we wait: nothing may be written any more
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)
        # An interruption is one, whatever else went wrong.
        if earlier is not None and earlier is not error and (kind is None or issubclass(kind, Exception)):
            raise earlier
