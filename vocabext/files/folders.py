"""A new folder that is there whole or not at all, whatever happens to the process that writes it.

It is built as `.NAME.tmp` beside its destination, synced to disk, and renamed last. A folder that it replaces
is moved aside as `.NAME.old` and deleted once the new one is in place. Only the holder of the lock on
`.NAME.lock` touches these names, so what it finds under them was left by a process that died: the next run
puts an old folder back, deletes the rest, and begins again.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from vocabext.errors import CheckpointError, OutputExistsError, UsageError
from vocabext.files.atomic import naming

# What only a write can meet: no space, no quota, a file that is too large, nothing may be written at all.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without locks


@contextmanager
def new_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `output`; sync it and rename it onto `output` if the block succeeds.

    Args:
        output: The folder to make, an absolute path.
        force: Whether a folder that is there already is replaced.

    Raises:
        OutputExistsError: If `output` exists in the end and `force` is false.
        UsageError: If another process is making the same folder.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    with _lock(output):
        clean_up(output)
        try:
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            _put(temporary, output, force=force)
        except OSError as error:
            if error.errno in NO_ROOM:  # nothing else is written meanwhile, and nobody knows the temporary name
                error.filename, error.filename2 = str(output), None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
    temporary, old = (output.with_name(f".{output.name}.{kind}") for kind in ("tmp", "old"))
    if old.exists() and not output.exists():
        old.rename(output)
        _sync(output.parent)
    for left in (temporary, old):
        if left.exists():
            shutil.rmtree(left)


def _put(temporary: Path, output: Path, *, force: bool) -> None:
    """Rename the finished folder; a folder that it replaces is moved aside first, and deleted last."""
    if not output.exists():
        temporary.rename(output)
        _sync(output.parent)
        return
    if not force:
        raise OutputExistsError(output)  # it was not there when we began
    old = output.with_name(f".{output.name}.old")
    try:
        output.rename(old)
        temporary.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    _sync(output.parent)
    shutil.rmtree(old)


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    path = output.with_name(f".{output.name}.lock")
    while True:
        with naming(output):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"another process is writing {output} right now; wait for it, or choose another output"
                             ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        try:  # whoever held it before may have deleted it in between: then this lock is nobody's
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


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
        self._pool.submit(_sync, path)


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder` to disk, and `folder` itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)
