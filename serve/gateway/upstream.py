"""Calls to vLLM, and every way in which they fail.

aiohttp, not httpx: under 32 streams the same proxy took 23 seconds of CPU time with httpx and 2 with
aiohttp (docs/decisions/gateway.md), and vLLM brings both. An answer that began ends where it began. One thing is
repeated, on the same arm: a request whose kept-alive connection turned out to be closed before a byte came
back. vLLM closes idle connections after five seconds, and a request that is on its way then is lost.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.guard import Limits

# Hop-by-hop headers, and those that the client library writes itself.
_NOT_FORWARDED = {b"host", b"content-length", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer",
                  b"upgrade", b"proxy-authorization", b"proxy-connection", b"accept-encoding", b"expect",
                  # What is said to the gateway, or by whoever stands in front of it.
                  b"cookie", b"origin", b"forwarded", b"x-real-ip"}
_NOT_FORWARDED_PREFIXES = (b"x-vocabext-", b"x-forwarded-", b"access-control-")
_NOT_RETURNED = {b"connection", b"keep-alive", b"transfer-encoding", b"server", b"date", b"trailer", b"upgrade",
                 b"set-cookie"}


class Upstream:
    """Connections to the engines, shared by all requests."""

    def __init__(self, limits: Limits) -> None:
        """Prepare; connections are made when they are needed."""
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The pool of connections; made inside the running loop."""
        if self._session is None:
            self._session = self._new_session(aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0))
        return self._session

    def _new_session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_seconds,
                                        sock_read=self._limits.idle_seconds)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False, trust_env=False,
                                     read_bufsize=2**18)

    async def _open(self, method: str, url: str, **options: Any) -> aiohttp.ClientResponse:
        """Send a request; again, on a new connection, if the old one was closed without an answer."""
        try:
            return await self.session.request(method, url, **options)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if self._fresh is None:
                self._fresh = self._new_session(aiohttp.TCPConnector(limit=0, force_close=True))
            return await self._fresh.request(method, url, **options)

    async def close(self) -> None:
        """Close all connections."""
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()
        self._session = self._fresh = None

    @asynccontextmanager
    async def call(
        self, method: str, url: str, *, arm: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and wait for the head of its answer; the block reads the rest.

        Args:
            method: GET or POST.
            url: Where to.
            arm: Whose engine it is, for messages.
            headers: Headers to pass on.
            body: The body, if any.

        Raises:
            Refusal: 502 if the engine cannot be reached or breaks off, 504 if it is silent for too long; also
                for what happens inside of the block.
        """
        try:
            async with await self._open(method, url, headers=headers, data=body, allow_redirects=False) as response:
                yield response
        except aiohttp.ServerTimeoutError as error:
            seconds = self._limits.idle_seconds
            late = (f"could not be reached within {self._limits.connect_seconds:g} seconds"
                    if isinstance(error, aiohttp.ConnectionTimeoutError) else f"sent nothing for {seconds:g} seconds")
            raise Refusal(504, f"the engine of the {arm} arm {late}") from error
        except aiohttp.ClientConnectorError as error:
            raise Refusal(502, f"the engine of the {arm} arm cannot be reached") from error
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise Refusal(502, f"the engine of the {arm} arm broke the connection off") from error

    async def post_json(self, url: str, value: bytes, *, arm: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Send JSON and read the whole answer.

        Returns:
            The status and the body.

        Raises:
            Refusal: As in `call`.
        """
        async with self.call("POST", url, arm=arm, headers={**headers, "content-type": "application/json"},
                             body=value) as response:
            return response.status, await response.read()

    async def get_json(self, url: str, *, arm: str, headers: Mapping[str, str] | None = None) -> Any:
        """Read a JSON document.

        Raises:
            Refusal: As in `call`; 502 if the answer is no success, or no JSON.
        """
        async with self.call("GET", url, arm=arm, headers=headers) as response:
            if response.status != 200:
                raise Refusal(502, f"the engine of the {arm} arm answered with status {response.status}")
            with contextlib.suppress(ValueError, aiohttp.ContentTypeError):
                return await response.json(content_type=None)
        raise Refusal(502, f"the engine of the {arm} arm did not answer in JSON")


def forwarded(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers of a client's request that are passed on to the engine, the API key among them."""
    named = _hop_by_hop(headers)
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers
            if name not in _NOT_FORWARDED and name not in named and not name.startswith(_NOT_FORWARDED_PREFIXES)}


def returned(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """Return the headers of an engine's answer that are passed on to the client."""
    headers = [(name.lower(), value) for name, value in response.raw_headers]
    named = _hop_by_hop(headers)
    return [(name, value) for name, value in headers
            if name not in _NOT_RETURNED and name not in named and not name.startswith(b"access-control-")]


def _hop_by_hop(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """Return the headers that `Connection` says are for the next hop alone."""
    return {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
