"""Requests, written down for `serve swap-test`: only if it was asked for, readable by the owner alone."""

import contextlib
import errno
import json
import os
from pathlib import Path

from vocabext.errors import UsageError
from vocabext.serve.gateway.calls import Request


class Recorder:
    """Appends requests, and never answers, to a JSON Lines file."""

    def __init__(self, path: Path, limit: int) -> None:
        """Open the file; what is there stays.

        Args:
            path: Where to write.
            limit: How many requests to write down at most.

        Raises:
            UsageError: If it cannot be written.
        """
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb", buffering=0)
        except OSError as error:
            raise UsageError(f"requests cannot be recorded in {path}: {(error.strerror or '').lower()}") from None
        self._path, self._left = path, limit

    def write(self, request: Request) -> str:
        """Write one request down: its path and body, no header.

        Returns:
            Why nothing more is recorded, once, if the line could not be written; half a line is taken back.
        """
        if self._left <= 0:
            return ""
        self._left -= 1
        line = json.dumps({"path": request.path, "body": dict(request.document)}, ensure_ascii=True).encode() + b"\n"
        size = None
        try:
            size = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) == len(line):
                return ""
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as raised:
            error = raised
        self._left = 0
        with contextlib.suppress(OSError):
            if size is not None:
                self._file.truncate(size)
        return f"no more requests are recorded: {self._path} cannot be written ({error.strerror})"

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()
