"""Files that are there whole or not at all, and where they may be written.

What is not finished lies beside its destination as `.NAME.vocabext-RANDOM.tmp`, made with O_EXCL, so that nobody can
put a link there before. Its process holds a lock (flock) on it: what nobody holds was left by a process that died.
The next one that writes NAME removes it, and touches nothing of any other name.
"""

import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vocabext.errors import OutputExistsError, UsageError

UNFINISHED = re.compile(r"\.(?P<name>.+)\.vocabext-[0-9a-f]{16}\.(?P<kind>tmp|old)", re.DOTALL)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks
ABANDONED_SECONDS = 7 * 24 * 3600  # where there are no locks: what nobody has changed for so long is dead


def check_output(path: Path, *, force: bool, folder: bool = False) -> None:
    """Refuse an output that exists (unless `force`) or whose parent folder does not.

    Args:
        path: Where something is to be written.
        force: Whether what is there may be replaced.
        folder: Whether a folder is to be written, not a file.

    Raises:
        OutputExistsError: If `path` exists and `force` is false.
        UsageError: If the parent of `path` is not a folder, or `path` is one and a file is to be written.
    """
    if path.is_dir() and not folder:
        raise UsageError(f"{path} is a folder, but a file is written here; choose another output")
    if path.exists() and not force:
        raise OutputExistsError(path)
    if real_path(path).is_symlink():
        raise UsageError(f"{path} is a link that leads to itself; choose another output")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder {path.absolute().parent} does not exist; create it, or choose another output")


def real_path(path: Path) -> Path:
    """Return a path without links in it; one that leads to itself stays as it is (`Path.resolve` gives up there)."""
    return Path(os.path.realpath(path))


class _OutputFile(io.FileIO):
    """A new file; an error of writing it names the output that it will be."""

    def __init__(self, path: Path, output: Path) -> None:
        self._output = output
        with naming(output):
            super().__init__(path, "x")

    def write(self, data: Any, /) -> int:
        with naming(self._output):
            return super().write(data)


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Let errors of the system name an output: a full disk does not say which, and temporary names mean nothing."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(output), None
        raise


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; rename it onto `path` if the block succeeds.

    An error of the system that comes from the output names `path`; any other of the block stays as it is.

    Raises:
        UsageError: If `path` is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, but a file is written here; choose another output")
    remove_unfinished(path.parent, path.name)
    binary = _open_temporary(path)
    temporary = Path(os.fsdecode(binary.name))
    try:
        with io.BufferedWriter(binary) as buffered:
            file = buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")
            with suppress(FileNotFoundError):  # a private file stays private
                os.fchmod(binary.fileno(), path.stat().st_mode & 0o777)
            yield file
            file.flush()
            with naming(path):
                os.fsync(file.fileno())
            with naming(path):  # while the lock is held: afterwards another process may take the file for a dead one
                os.replace(temporary, path)
                sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open_temporary(path: Path) -> _OutputFile:
    """Open a temporary sibling, and lock it."""
    while True:
        file = _OutputFile(temporary_path(path), path)
        if hold(file.fileno(), Path(os.fsdecode(file.name))):
            return file
        file.close()


def temporary_path(path: Path, kind: str = "tmp") -> Path:
    """Return a name beside `path` that nobody can guess, for what is not in place: `tmp`, or `old` once replaced."""
    return path.with_name(f".{path.name}.vocabext-{secrets.token_hex(8)}.{kind}")


def hold(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder; false if another process holds it, or has removed it before it was locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def unfinished(folder: Path, name: str | None = None, kind: str = "tmp") -> Iterator[Path]:
    """Yield what vocabext has not put in place in a folder: of the output `name`, or of all."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = UNFINISHED.fullmatch(path.name)
        if found and found["kind"] == kind and name in (None, found["name"]):
            yield path


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what processes that died have left half-written in a folder: of the output `name`, or of all."""
    for path in unfinished(folder, name):
        with suppress(OSError):  # somebody else removes it at this moment, or it belongs to another user
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if _is_dead(descriptor):
                    remove(path)
            finally:
                os.close(descriptor)


def _is_dead(descriptor: int) -> bool:
    """Tell whether the process that was writing an open file or folder is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in NO_LOCKS and time.time() - os.fstat(descriptor).st_mtime > ABANDONED_SECONDS
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file to disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document, atomically."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """Read one JSON object; None for a file that is missing or damaged, or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
