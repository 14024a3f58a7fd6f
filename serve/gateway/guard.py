"""What a request must not do: be too large or too slow, or come from a page of somebody else."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from vocabext.errors import UsageError
from vocabext.serve.gateway.answers import Headers, Refusal, error_body
from vocabext.serve.gateway.calls import ARM_HEADER

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# A body's first bytes do not count against `all_bodies_bytes`: short requests are answered whoever sends long ones.
FREE_BYTES = 64 * 2**10
CLOSE: Headers = [(b"connection", b"close")]


@dataclass(frozen=True)
class Limits:
    """What is accepted.

    Attributes:
        body_bytes: Longest body.
        all_bodies_bytes: Bytes that the bodies of all requests may hold together, beyond `FREE_BYTES` of each.
        header_bytes: Longest request line and headers together.
        prompts: Prompts that one request may have.
        in_flight: Requests that one arm may have at once; more are refused, not queued.
        connections: Connections that clients may have at once.
        header_seconds: Longest time from a connection, or a header's first byte, to the end of the header.
        body_seconds: Longest time to receive a body.
        write_seconds: Longest time in which a client does not read what waits for it.
        total_seconds: Longest time for a request from its arrival to the end of its answer.
        idle_seconds: Longest silence of an engine before it counts as hanging.
        connect_seconds: Longest time to reach an engine.
    """

    body_bytes: int = 2**20
    all_bodies_bytes: int = 128 * 2**20
    header_bytes: int = 32 * 2**10
    prompts: int = 128
    in_flight: int = 256
    connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    total_seconds: float = 1800.0
    idle_seconds: float = 600.0
    connect_seconds: float = 15.0

    def __post_init__(self) -> None:
        """Check that a body of full length can be accepted."""
        if self.all_bodies_bytes < self.body_bytes:
            raise UsageError(f"all bodies together may hold {self.all_bodies_bytes} bytes, and one alone "
                             f"{self.body_bytes}; raise --max-all-bodies-bytes or lower --max-body-bytes")


class Origins:
    """An application that pages of named origins may use, and no other page.

    A browser sends `Origin` with every request that a page makes of another server. Without this, any page could
    spend a gateway that asks for no key.
    """

    def __init__(self, app: Any, allowed: Sequence[str]) -> None:
        """Guard an application.

        Args:
            app: The application.
            allowed: Origins such as `https://chat.example.org`; `*` allows all.
        """
        self._app, self._allowed = app, frozenset(allowed)
        self._with_answers = CORSMiddleware(app, allow_origins=list(allowed), allow_methods=["GET", "POST"],
                                            allow_headers=["*"], expose_headers=[ARM_HEADER.decode()])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin is None:
            await self._app(scope, receive, send)
        elif "*" in self._allowed or origin.decode("latin-1") in self._allowed:
            await self._with_answers(scope, receive, send)
        else:
            body = error_body(403, f"pages of {origin[:80].decode('latin-1')!r} may not use this gateway; start it "
                                   "with --allow-origin to allow that")
            await send({"type": "http.response.start", "status": 403, "headers": [
                (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *CLOSE]})
            await send({"type": "http.response.body", "body": body})


class Bodies:
    """The bytes of bodies that are in memory, those of all requests together.

    Attributes:
        held: How many there are, beyond the first `FREE_BYTES` of each body.
    """

    def __init__(self, limit: int) -> None:
        """Hold none yet."""
        self.held, self._limit = 0, limit

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Hold a request's body; gives what is called with the body's length, as often as it has grown.

        Raises:
            Refusal: 503 from the call, if all bodies together would be too large.
        """
        mine = 0

        def grow(size: int) -> None:
            nonlocal mine
            more = max(0, size - FREE_BYTES) - mine
            if more > 0 and self.held + more > self._limit:
                raise Refusal(503, f"the bodies of all requests hold {self.held} bytes, the limit is {self._limit}; "
                                   "try again in a moment", [(b"retry-after", b"1"), *CLOSE])
            mine, self.held = mine + more, self.held + more

        try:
            yield grow
        finally:
            self.held -= mine


def check_headers(headers: Iterable[tuple[bytes, bytes]], limit: int) -> None:
    """Refuse headers that are too long.

    Raises:
        Refusal: 431.
    """
    if (size := sum(len(name) + len(value) + 4 for name, value in headers)) > limit:
        raise Refusal(431, f"the headers have {size} bytes, the limit is {limit}")


def check_type(headers: dict[bytes, bytes]) -> None:
    """Refuse a body that does not say that it is JSON: a page may send any other kind without being asked first.

    Raises:
        Refusal: 415.
    """
    given = headers.get(b"content-type", b"")
    if given.partition(b";")[0].strip().lower() != b"application/json":
        raise Refusal(415, f"the content-type is {given[:80].decode('latin-1')!r}, it must be 'application/json'",
                      CLOSE)


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int, grow: Callable[[int], None]) -> bytes:
    """Read the body of a request, up to a limit.

    Args:
        receive: Gives the next part.
        headers: The request's.
        limit: Longest body in bytes.
        grow: Told how long the body is by now (`Bodies.share`).

    Raises:
        Refusal: 413 if it is longer, 503 if all bodies together are too large, 400 if the client went away in the
            middle.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise Refusal(413, f"the body has {int(declared[:20])} bytes, the limit is {limit}", CLOSE)
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client went away before the request was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the body has more than {limit} bytes", CLOSE)
        grow(size)
        body += part
        if not message.get("more_body"):
            return bytes(body)
