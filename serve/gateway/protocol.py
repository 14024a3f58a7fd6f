"""uvicorn's servers, made to live with clients that are slow, silent, or many.

uvicorn limits neither how long a header or a body may take, nor how long a client may leave its answer unread, nor how
many connections there are (`limit_concurrency` counts requests). Each connection is always in one of five phases; each
phase has a deadline, and connections are kept in the order in which they came into it, so that looking for those that
are late costs nothing while none is. Where there is no room for a new connection, the one that has waited longest
without a request in it gives way.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from socket import socket
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from vocabext.errors import UsageError
from vocabext.serve.gateway.answers import error_body
from vocabext.serve.gateway.guard import Limits

KEEP_ALIVE_SECONDS = 30
MAX_PIPELINED = 8
DESCRIPTORS_EACH, RESERVED_DESCRIPTORS = 3, 96
# An unfinished body may give way to a new connection once it has taken so long.
SLOW_BODY_SECONDS = 1.0
# What the admin endpoint and the port for metrics accept: they have few clients, and must not be in anybody's way.
BESIDE = Limits(connections=24, header_seconds=5.0, body_seconds=5.0, write_seconds=5.0)
HEAD, IDLE, BODY, ANSWER, LEAVING, UNREAD = "header", "idle", "body", "answer", "leaving", "unread"


class Connections:
    """The connections of one server, by phase: each phase in the order in which they came into it.

    `UNREAD` is beside the phases: there are those whose client does not read what waits for it.
    """

    def __init__(self, limits: Limits, closed: Callable[[str], None]) -> None:
        """Begin without connections.

        Args:
            limits: What is accepted.
            closed: Told why a connection was closed that was in its way: `header`, `body`, `unread`, `full`.
        """
        self._limits, self._closed = limits, closed
        self._places: dict[str, dict[GuardedProtocol, float]] = {
            phase: {} for phase in (HEAD, IDLE, BODY, ANSWER, LEAVING, UNREAD)}
        self._seconds = {HEAD: limits.header_seconds, IDLE: KEEP_ALIVE_SECONDS + limits.write_seconds,
                         BODY: limits.body_seconds, LEAVING: limits.write_seconds, UNREAD: limits.write_seconds}

    def __len__(self) -> int:
        """Count them, but for those that have been told to leave."""
        return sum(len(self._places[phase]) for phase in (HEAD, IDLE, BODY, ANSWER))

    def move(self, one: "GuardedProtocol", old: str, new: str, now: float) -> None:
        """Take a connection from a phase to another; `""` is none."""
        if old:
            self._places[old].pop(one, None)
        if new:
            self._places[new][one] = now

    def make_room(self, now: float) -> bool:
        """Tell whether there is room for one more, after somebody may have given way."""
        if len(self) < self._limits.connections:
            return True
        for phase, seconds in ((HEAD, 0.0), (IDLE, 0.0), (BODY, SLOW_BODY_SECONDS)):
            for one, since in self._places[phase].items():
                if now - since < seconds:
                    break
                self._closed("full")
                one.end(503, "there are too many connections, and this one had no request; try again")
                return True
        self._closed("full")
        return False

    def close_late(self, now: float) -> None:
        """Close the connections that have been in their phase for too long."""
        for phase, seconds in self._seconds.items():
            for one in self._late(phase, now - seconds):
                if phase in (HEAD, BODY):
                    self._closed(phase)
                    one.end(408, f"the {phase} was not complete within {seconds:g} seconds")
                else:
                    if phase == UNREAD:
                        self._closed(phase)
                    one.transport.abort()  # `close` would wait until the client has read everything

    def _late(self, phase: str, before: float) -> list["GuardedProtocol"]:
        late = []
        for one, since in self._places[phase].items():
            if since > before:
                break
            late.append(one)
        return late


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a limit on headers while they arrive, and a phase."""

    limits: Limits
    places: Connections
    _phase = ""
    _head_bytes = 0
    _part_bytes = 0
    _in_head = False
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection if there is room."""
        super().connection_made(transport)
        if self.places.make_room(self.loop.time()):
            self._enter(HEAD)
        else:
            self.end(503, f"there are {self.limits.connections} connections, the limit; try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._enter("")
        self.places.move(self, UNREAD, "", 0.0)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, up to the limit on headers."""
        self._part_bytes = len(data)
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self.limits.header_bytes:
            self.end(431, f"the headers have more than {self.limits.header_bytes} bytes")
        self._enter(self._phase_now())

    def on_message_begin(self) -> None:
        """Begin a request, unless too many wait for their answers."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests before the first answer")
        super().on_message_begin()
        # The part in which it begins counts as a whole: where in it the message begins is not told.
        self._head_bytes, self._in_head = self._part_bytes, True

    def on_headers_complete(self) -> None:
        """Wait for the body."""
        self._in_head, self._in_body = False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Wait for the answer."""
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._enter(self._phase_now())

    def pause_writing(self) -> None:
        """Note since when the client does not read."""
        super().pause_writing()
        self.places.move(self, "", UNREAD, self.loop.time())

    def resume_writing(self) -> None:
        """Note that the client reads."""
        super().resume_writing()
        self.places.move(self, UNREAD, "", 0.0)

    def end(self, status: int, message: str) -> None:
        """Close the connection, with an error unless an answer has begun or nothing was asked."""
        if not self.transport.is_closing():
            if self._phase != IDLE and (self.cycle is None or not self.cycle.response_started or self._in_head):
                body = error_body(status, message)
                self.transport.write(
                    STATUS_LINE[status] + b"content-type: application/json\r\nconnection: close\r\ncontent-length: "
                    + str(len(body)).encode() + b"\r\n\r\n" + body)
            self.transport.close()
        self._enter(LEAVING)

    def _phase_now(self) -> str:
        if self._phase in ("", LEAVING) or self.transport.is_closing():
            return self._phase and LEAVING
        if self._in_body:
            return BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return ANSWER
        return HEAD if self._in_head or self.cycle is None else IDLE

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self.places.move(self, self._phase, phase, self.loop.time())
            self._phase = phase


class QuietServer(uvicorn.Server):
    """A server that leaves signals to whoever runs it, and closes connections that are late."""

    def __init__(self, app: Any, limits: Limits, closed: Callable[[str], None], drain_seconds: float) -> None:
        """Prepare a server.

        Args:
            app: The ASGI application.
            limits: What is accepted.
            closed: Told why a connection was closed (`Connections`).
            drain_seconds: How long requests in flight may take once it is told to stop.
        """
        self.places = places = Connections(limits, closed)
        protocol = type("Guarded", (GuardedProtocol,), {"limits": limits, "places": places})
        super().__init__(uvicorn.Config(
            app, http=protocol, log_config=None, access_log=False, lifespan="off", server_header=False, ws="none",
            timeout_graceful_shutdown=max(1, round(drain_seconds)), timeout_keep_alive=KEEP_ALIVE_SECONDS))

    async def on_tick(self, counter: int) -> bool:
        """Look for connections that are late, ten times a second."""
        self.places.close_late(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def fitting(limits: Limits, note: Callable[[str], None]) -> Limits:
    """Return limits under which the process does not run out of file descriptors, so that the admin endpoint has some.

    A connection may need three: its own, and one to the engine of each arm (an idle one is kept for two seconds).

    Args:
        limits: What is wished for; the process's own limit is raised for it as far as that is allowed.
        note: Told if it has to be less.

    Raises:
        UsageError: If there are too few for anything.
    """
    try:
        import resource
    except ImportError:  # Windows
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_EACH * limits.connections + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    room = (soft - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH
    if room < 1:
        raise UsageError(f"this process may open {soft} files, a gateway needs "
                         f"{RESERVED_DESCRIPTORS + DESCRIPTORS_EACH} or more; raise the limit (ulimit -n)")
    note(f"this process may open {soft} files, so clients may have {room} connections, not {limits.connections}; "
         f"raise the limit (ulimit -n {wanted}) for more")
    return replace(limits, connections=room)


class BesideThread:
    """Servers in a thread and an event loop of their own: they answer whatever the main loop is busy with."""

    def __init__(self, servers: dict[QuietServer, socket]) -> None:
        """Prepare; `with` runs it.

        Args:
            servers: Each with the socket that it listens on.
        """
        self._servers = servers
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)

    def __enter__(self) -> "BesideThread":
        """Begin to serve."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and wait until it has stopped."""
        for server in self._servers:
            server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        async def serve() -> None:
            await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in self._servers.items()))

        asyncio.run(serve())
