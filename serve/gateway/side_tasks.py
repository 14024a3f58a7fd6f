"""What runs beside the requests: copies for the other arm, the health check, a policy that waits for a disk."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any


class SideTasks:
    """Tasks beside the requests.

    Attributes:
        tasks: Those that have not ended.
        note: Told of what the operator should know; never of what clients say.
    """

    def __init__(self, note: Callable[[str], None] = lambda message: None) -> None:
        """Begin with no task."""
        self.tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.note = note

    def attach(self) -> None:
        """Run everything in the loop that runs here, unless it has a loop already."""
        self._loop = self._loop or asyncio.get_running_loop()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests; it is cancelled when the gateway stops.

        The admin endpoint's threads may ask for it, too: everything runs in the loop that asked or attached first.
        """
        if self._loop is None:
            self.attach()
        assert self._loop is not None
        if asyncio._get_running_loop() is not self._loop:
            self._loop.call_soon_threadsafe(self.spawn, work)
            return
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.note(f"something beside the requests failed: {where(error)}")

    async def close(self) -> None:
        """Cancel every task, and wait until it has ended."""
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def where(error: BaseException) -> str:
    """Say what failed and where, without the error's text: that may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at " + " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
