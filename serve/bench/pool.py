"""The two servers of a comparison: both up, or, where memory does not hold two, one at a time."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from vocabext.errors import ServerError
from vocabext.progress import Progress, no_progress
from vocabext.serve.engine import Server, wait_until_ready

BASE, EXPANDED = "base", "expanded"
SETTLE_SECONDS = 1.2  # vLLM's worker polls for one second after its last request, on the core the other one needs


class ServerPool(AbstractContextManager["ServerPool"]):
    """Hands out a server that is ready and warm, and stops all of them in the end.

    Attributes:
        one_at_a_time: Whether one server is stopped before the other starts.
        fallback: Why both servers could not be up, if that was tried and failed; empty otherwise.
        start_seconds: Time spent starting servers.
        num_starts: How many starts there were.
    """

    def __init__(
        self, make: Callable[[str], Server], prepare: Callable[[Server, str], None], *, one_at_a_time: bool,
        timeout_seconds: float, progress: Progress = no_progress,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            make: Describes the server of a role.
            prepare: Called with every server that became ready, before it is handed out.
            one_at_a_time: Never have both up.
            timeout_seconds: How long a start may take.
            progress: Told about the waiting.
        """
        self._make, self._prepare, self._progress = make, prepare, progress
        self._timeout_seconds = timeout_seconds
        self._servers: dict[str, Server] = {}
        self._prepared: set[str] = set()
        self._last_role: str | None = None
        self.one_at_a_time = one_at_a_time
        self.fallback = ""
        self.start_seconds = 0.0
        self.num_starts = 0

    def start_all(self) -> None:
        """Start both servers; where they do not start together, go on with one at a time.

        Raises:
            ServerError: If a server does not start alone, either.
        """
        if self.one_at_a_time:
            return
        try:
            self._start((BASE, EXPANDED))
        except ServerError as error:
            self._stop_all()
            self.fallback = str(error).partition("\n")[0]
            self.one_at_a_time = True
            self._start((BASE,))

    def get(self, role: str) -> Server:
        """Return a server that is ready and warm.

        Raises:
            ServerError: If it has died, or does not start.
        """
        if role not in self._servers:
            self._stop_all()
            self._start((role,))
        server = self._servers[role]
        server.check_alive()
        if self._last_role not in (None, role):
            time.sleep(SETTLE_SECONDS)
        self._last_role = role
        if role not in self._prepared:
            self._prepared.add(role)
            self._prepare(server, role)
        return server

    def __exit__(self, *_: object) -> None:
        """Stop what is running."""
        self._stop_all()

    def _start(self, roles: Sequence[str]) -> None:
        for role in roles:  # one after the other, so that they do not pick the same port
            server = self._servers[role] = self._make(role)
            server.start()
        servers = list(self._servers.values())
        self.start_seconds += wait_until_ready(servers, timeout_seconds=self._timeout_seconds, progress=self._progress)
        self.num_starts += len(roles)

    def _stop_all(self) -> None:
        while self._servers:
            role, server = self._servers.popitem()
            self._prepared.discard(role)
            server.stop()
