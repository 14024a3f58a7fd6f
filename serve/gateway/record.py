"""Requests, written down for `serve swap-test`: only if it was asked for, readable by the owner alone."""

import json
import os
from pathlib import Path
from typing import IO

from serve.gateway.calls import Request
from vocabext.errors import UsageError


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
            self._file: IO[str] = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w")
        except OSError as error:
            raise UsageError(f"requests cannot be recorded in {path}: {(error.strerror or '').lower()}") from None
        self._left = limit

    def write(self, request: Request) -> None:
        """Write one request down: its path and body, no header."""
        if self._left > 0:
            self._left -= 1
            self._file.write(json.dumps({"path": request.path, "body": request.document}, ensure_ascii=True) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
