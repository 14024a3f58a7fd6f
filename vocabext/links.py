"""Bring a file of the base into the new folder: as a link where that is wanted and possible, else as a copy.

A *reflink* shares the bytes on disk until one side is written to, and is as safe as a copy. A *hard link* is
the same file under a second name: whoever edits it in place edits the base. So only weights are linked, which
are replaced and not edited, and vocabext itself never opens a file of an output for writing.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from vocabext.errors import CheckpointError

AUTO, HARD, COPY = "auto", "hard", "copy"
LINKS = (AUTO, HARD, COPY)
COPY_BYTES = 64 * 1024 * 1024  # by which the kernel copies, between two reports of progress
FICLONE = 0x40049409  # Linux: share the bytes of another file, copy on write
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


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


def copy_file(source: Path, target: Path, advance: Callable[[int], object]) -> None:
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
