"""What a request must not do: be too large, or come without the key."""

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from vocabext.serve.gateway.answers import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What is accepted.

    Attributes:
        body_bytes: Longest body.
        header_bytes: Longest request line and headers together.
        in_flight: Requests that one arm may have at once; more are refused, not queued.
        idle_seconds: Longest silence of an engine before it counts as hanging.
        connect_seconds: Longest time to reach an engine.
    """

    body_bytes: int = 16 * 2**20
    header_bytes: int = 32 * 2**10
    in_flight: int = 256
    idle_seconds: float = 600.0
    connect_seconds: float = 15.0


def check_headers(headers: Iterable[tuple[bytes, bytes]], limit: int) -> None:
    """Refuse headers that are too long.

    Raises:
        Refusal: 431.
    """
    if (size := sum(len(name) + len(value) + 4 for name, value in headers)) > limit:
        raise Refusal(431, f"the headers have {size} bytes, the limit is {limit}")


def check_key(headers: dict[bytes, bytes], key: str | None) -> None:
    """Refuse a request without the API key, if there is one.

    Raises:
        Refusal: 401.
    """
    if key is None:
        return
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
        raise Refusal(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                      [(b"www-authenticate", b"Bearer")])


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """Read the body of a request, up to a limit.

    Raises:
        Refusal: 413 if it is longer, 400 if the client went away in the middle.
    """
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise Refusal(413, f"the body has {int(declared)} bytes, the limit is {limit}", [(b"connection", b"close")])
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client went away before the request was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the body has more than {limit} bytes", [(b"connection", b"close")])
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
