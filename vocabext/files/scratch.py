"""Folders in the temp directory that do not outlive whoever made them, nor pile up behind those that were killed."""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vocabext.errors import VocabextError

LOCK_NAME = ".in-use"
SETTLED_SECONDS = 60.0  # a younger folder may not be locked yet


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a folder in the temp directory, and remove it at the end; first, remove those that killed processes left.

    A folder is in use as long as its maker lives, who holds a lock in it. If the block ends with an error that
    is told to a user, the folder stays, since the error may name a log in it; the next call removes it.

    Args:
        prefix: How the folder's name begins.
    """
    remove_dead(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    lock = FileLock(folder / LOCK_NAME)
    lock.acquire()
    useful = False
    try:
        yield folder
    except VocabextError:
        useful = True
        raise
    finally:
        lock.release()
        if not useful:
            shutil.rmtree(folder, ignore_errors=True)


def remove_dead(prefix: str) -> None:
    """Remove the folders of this user that `scratch_folder` made and that no living process holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError, Timeout):
            found = folder.lstat()
            if (stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and (folder / LOCK_NAME).is_file()
                    and time.time() - found.st_mtime > SETTLED_SECONDS):
                with FileLock(folder / LOCK_NAME, timeout=0):
                    shutil.rmtree(folder)
