"""Files that are there whole or not at all, and where they may be written."""

import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vocabext.errors import OutputExistsError, UsageError

UNFINISHED = re.compile(r"\..+\.\d+\.tmp")  # what `atomic_file` calls a file that it is writing


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
    """A temporary file; an error of writing it names the output that it will be."""

    def __init__(self, path: Path, output: Path) -> None:
        self._output = output
        with naming(output):
            super().__init__(path, "w")

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with io.BufferedWriter(_OutputFile(temporary, path)) as binary:
            file = binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")
            yield file
            file.flush()
            with naming(path):
                os.fsync(file.fileno())
        with naming(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what `atomic_file` left in a folder when its process was killed; nobody may be writing there."""
    for path in folder.glob(".*.tmp"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
