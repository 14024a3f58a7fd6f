"""The gateway's log: one line for each thing that happened, with the time, and not one for each that a client sends.

What the gateway says and what the libraries below it log goes the same way. Of lines that are alike, `MOST_LINES` are
written per minute; the next one after that says how many were left out.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from vocabext.serve.gateway.side_tasks import where

MOST_LINES = 5
WINDOW_SECONDS = 60.0
MOST_KINDS = 200  # of lines that are told apart; the others share one kind


class GatewayLog(logging.Handler):
    """Writes lines, unless there were too many like them."""

    def __init__(self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without lines.

        Args:
            write: Takes a line. An error of the system is passed over: the terminal may be gone, the disk full.
            clock: Tells the time in seconds.
        """
        super().__init__()
        self._write, self._clock = write, clock
        self._mine = threading.RLock()  # the admin endpoint's thread writes, too
        self._since: dict[str, float] = {}
        self._lines: dict[str, int] = {}

    def note(self, message: str) -> None:
        """Write a line of the gateway's own; lines are alike if their texts are."""
        self._take(message, message)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a library's line. Of an error it says what and where, not its text: that may quote a request."""
        error = record.exc_info[1] if record.exc_info else None
        text = (record.getMessage().splitlines() or [""])[0]  # asyncio's further lines quote the error
        self._take(f"{record.name}: {record.msg}", f"{record.name}: {text}" + (f" ({where(error)})" if error else ""))

    def flush(self) -> None:
        """Say how many lines were left out of the minutes that are over."""
        with self._mine:
            for kind in [kind for kind, since in self._since.items() if self._clock() - since >= WINDOW_SECONDS]:
                self._end(kind)

    def close(self) -> None:
        """Say how many lines were left out."""
        with self._mine:
            for kind in list(self._since):
                self._end(kind)
        super().close()

    async def watch(self) -> None:
        """Say every minute how many lines were left out."""
        while True:
            await asyncio.sleep(WINDOW_SECONDS)
            self.flush()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take what libraries log, from warnings on."""
        root = logging.getLogger()
        root.addHandler(self)
        try:
            yield
        finally:
            root.removeHandler(self)
            self.close()

    def _take(self, kind: str, text: str) -> None:
        with self._mine:
            self.flush()
            kind = kind if kind in self._since or len(self._since) < MOST_KINDS else ""
            self._since.setdefault(kind, self._clock())
            self._lines[kind] = self._lines.get(kind, 0) + 1
            if self._lines[kind] <= MOST_LINES:
                self._say(text)

    def _end(self, kind: str) -> None:
        del self._since[kind]
        left_out = self._lines.pop(kind) - MOST_LINES
        if left_out > 0:
            first = kind.partition("\n")[0][:100]
            self._say(f"{left_out} more lines like this were left out: {first or '(of several kinds)'}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}")
