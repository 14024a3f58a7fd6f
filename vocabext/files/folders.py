"""A new folder that is there whole or not at all, whatever happens to the process that writes it.

It is built as `.NAME.vocabext-RANDOM.tmp` beside its destination, synced to disk, and renamed last. A folder that it
replaces is moved aside as `.NAME.vocabext-RANDOM.old` and deleted once the new one is in place. Only the holder of the
lock on `.NAME.vocabext.lock` makes and removes these, so what it finds was left by a process that died: the next run
puts an old folder back, deletes the rest, and begins again.

`locked` is that lock. Where a file system has no locks, the lines of the file decide: each process adds its number
and its machine's name, and the first one that lives has the lock.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from vocabext.errors import CheckpointError, OutputExistsError, UsageError
from vocabext.files.atomic import NO_LOCKS, hold, naming, real_path, remove_unfinished, sync, temporary_path, unfinished

# What only a write can meet: no space, no quota, a file that is too large, nothing may be written at all.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_HOLDERS = re.compile(rb"(\d+ \S+ [0-9a-f]{16}\n)*")  # what a lock file may hold: process, machine, a random number
_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())


@contextmanager
def new_folder(output: Path, *, force: bool, like: Path | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of `output`; sync it and rename it onto `output` if the block succeeds.

    Args:
        output: The folder to make, an absolute path.
        force: Whether a folder that is there already is replaced.
        like: A folder that it is made from. Nobody may read the new one who may not read this one.

    Raises:
        OutputExistsError: If `output` exists in the end and `force` is false.
        UsageError: If another process is making the same folder.
    """
    with locked(output):
        clean_up(output)
        try:
            with _hidden_folder(output) as (temporary, mode):
                yield temporary
                if like is not None:
                    mode = _keep_modes(temporary, like, mode)
                if output.is_dir():
                    mode &= stat.S_IMODE(output.stat().st_mode) | 0o7700
                temporary.chmod(mode)
                sync_tree(temporary)
                _put(temporary, output, force=force)
        except OSError as error:
            if error.errno in NO_ROOM:  # nothing else is written meanwhile, and nobody knows the temporary name
                error.filename, error.filename2 = str(output), None
            raise


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty folder beside an output that nobody else may enter; it is removed at the end.

    What processes that were killed have left of the same output is removed first.
    """
    remove_unfinished(beside.parent, beside.name)
    with _hidden_folder(beside) as (folder, _):
        yield folder


@contextmanager
def _hidden_folder(output: Path) -> Iterator[tuple[Path, int]]:
    """Yield a temporary sibling that nobody else may enter, and the mode it would have had; remove it at the end."""
    while True:
        folder = temporary_path(output)
        with naming(output):
            folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process took it for a dead one before it was locked
            continue
        if hold(descriptor, folder):
            break
        os.close(descriptor)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, mode & 0o7700)
        yield folder, mode
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _keep_modes(folder: Path, like: Path, usual: int) -> int:
    """Let nobody read a file of a folder who may not read the file of the same name in another; return its own mode.

    A file that has no counterpart gets the modes that all files there have in common. The owner keeps every right.
    """
    modes = {path.relative_to(like): path.stat().st_mode for path in like.rglob("*") if path.is_file()}
    common = 0o777
    for mode in modes.values():
        common &= mode
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # a hard link is the base's own file
            mode = stat.S_IMODE(status.st_mode)
            path.chmod(mode & (modes.get(path.relative_to(folder), common) | 0o700))
    return usual & (stat.S_IMODE(like.stat().st_mode) | 0o7700)


def check_space(parent: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        parent: The folder that gets it.
        needed: How many bytes.
        what: What it is, in words.

    Raises:
        CheckpointError: If there is less room.
    """
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"{what} needs {needed:,} bytes, but {parent} has {free:,} bytes free; free some, or "
                              "choose an output elsewhere")


def clean_up(output: Path) -> None:
    """Remove what a dead process left beside `output`; an old folder that it had moved aside comes back."""
    for old in unfinished(output.parent, output.name, "old"):
        if output.exists():
            shutil.rmtree(old)
        else:
            old.rename(output)
            sync(output.parent)
    remove_unfinished(output.parent, output.name)


def _put(temporary: Path, output: Path, *, force: bool) -> None:
    """Rename the finished folder; a folder that it replaces is moved aside first, and deleted last."""
    if not output.exists():
        temporary.rename(output)
        sync(output.parent)
        return
    if not force:
        raise OutputExistsError(output)  # it was not there when we began
    old = temporary_path(output, "old")
    try:
        output.rename(old)
        temporary.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    sync(output.parent)
    shutil.rmtree(old)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Let nobody else write an output meanwhile; who holds the lock already may take it again.

    Args:
        output: A file or folder to write, there or not.

    Raises:
        UsageError: If another process is writing it.
    """
    output = real_path(output)
    if output in _held.get():
        yield
        return
    path = output.with_name(f".{output.name}.vocabext.lock")
    descriptor = _take(path, output)
    token = _held.set(_held.get() | {output})
    try:
        yield
    finally:
        _held.reset(token)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, output: Path) -> int:
    """Open the file of a lock and take the lock; return its descriptor."""
    while True:
        descriptor = _open_lock(path, output)
        try:
            with naming(output):
                if _is_first(descriptor, path, output):
                    return descriptor
        except BaseException as error:
            if isinstance(error, OSError):  # the disk takes no name of the holder: the lock is ours, and of no use
                path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open_lock(path: Path, output: Path) -> int:
    try:
        with naming(output):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and _HOLDERS.fullmatch(os.pread(descriptor, 1 << 16, 0)):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise UsageError(f"{path} should be the lock on {output}, but vocabext has not written it; move it away, or choose "
                     "another output")


def _is_first(descriptor: int, path: Path, output: Path) -> bool:
    """Take the lock; false if whoever held it has deleted the file in between: then this lock is nobody's."""
    mine = f"{os.getpid()} {socket.gethostname()} {secrets.token_hex(8)}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(output, _holders(descriptor)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        os.write(descriptor, f"{mine}\n".encode())
        first = next(line for line in _holders(descriptor) if line == mine or _lives(line))
        if first != mine:
            raise _busy(output, [first], f"; if it is gone, delete {path}") from None
    else:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{mine}\n".encode())
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _holders(descriptor: int) -> list[str]:
    return os.pread(descriptor, 1 << 16, 0).decode().splitlines()


def _lives(line: str) -> bool:
    """Tell whether a process that a lock file names may be running; of another machine nobody knows."""
    number, machine, _ = line.split(" ")
    if machine != socket.gethostname():
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _busy(output: Path, holders: list[str], advice: str = "") -> UsageError:
    who = " ({} on {})".format(*holders[0].split(" ")[:2]) if holders else ""
    return UsageError(f"another process{who} is writing {output} right now; wait for it, or choose another output"
                      f"{advice}")


# -- down to the disk ---------------------------------------------------------------------------------------------

class Syncer:
    """Brings finished files to disk in a second thread, while the first one writes the next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Syncer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # `sync_tree` makes sure of every file in the end

    def add(self, path: Path) -> None:
        """Sync a file that is complete; returns at once."""
        self._pool.submit(sync, path)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder` to disk, and `folder` itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))
