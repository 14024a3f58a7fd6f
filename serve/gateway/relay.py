"""Passes one answer of an engine on, as it comes, and looks into it when it is complete."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

from vocabext.serve.gateway.answers import Headers, error_body, error_event
from vocabext.serve.gateway.arms import Arm
from vocabext.serve.gateway.calls import ARM_HEADER, Call, Request
from vocabext.serve.gateway.events import DONE, EventSplitter
from vocabext.serve.gateway.guard import Message, Send
from vocabext.serve.gateway.observe import KEPT_BYTES, Observation, failure, observe
from vocabext.serve.gateway.upstream import Upstream, returned


class Relay:
    """Passes one answer on, as it comes, and looks into it when it is complete."""

    def __init__(self, upstream: Upstream, arm: Arm, request: Request, call: Call, send: Send) -> None:
        """Prepare one exchange with an engine."""
        self._upstream, self._arm, self._request, self._call, self._send = upstream, arm, request, call, send
        self._parts: list[tuple[float, bytes]] = []
        self._kept = 0
        self.status = 0

    async def run(self) -> Observation:
        """Send the request and pass the answer on.

        Raises:
            Refusal: If the engine failed before anything was passed on.
        """
        arm = self._arm
        headers = {**self._request.forwarded, "content-type": "application/json"}
        async with self._upstream.call("POST", arm.url + self._call.path, arm=arm.name, headers=headers,
                                       body=self._call.body) as response:
            self.status = response.status
            out = [*returned(response), (ARM_HEADER, arm.name.encode())]
            if response.content_type == "text/event-stream":
                head = {"type": "http.response.start", "status": response.status,
                        "headers": [h for h in out if h[0] != b"content-length"]}
                return await self._stream(head, response.content.iter_any())
            body = await response.read()
        if self._call.converter is not None and self.status == 200:
            body = self._call.converter.whole(body)
        self._keep(body)
        await send_whole(self._send, self.status, body, [h for h in out if h[0] != b"content-length"])
        return self._observation(streamed=False)

    async def _stream(self, head: Message, parts: AsyncIterator[bytes]) -> Observation:
        """Pass a stream on; if it breaks off, end it with an error event.

        The head names the arm, so it waits for the first part: who leaves before that does not know whom it hurts.
        """
        converter = self._call.converter if self.status == 200 else None
        done, begun, trouble = False, False, ""
        try:
            async for part, events in _with_events(parts):
                out = part if converter is None else b"".join(map(converter.event, events))
                done = done or DONE in events
                self._keep(out)
                if out:
                    if not begun:
                        begun = True
                        await self._send(head)
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
        except Exception as error:  # the context manager names what can go wrong with a connection; here it is caught
            trouble = _trouble(error, self._arm.name)
        if not trouble and self.status == 200 and not done:
            trouble = f"the engine of the {self._arm.name} arm broke the answer off"
        last = error_event(502, trouble) if trouble else b""
        if not begun:
            await self._send(head)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if trouble:
            return failure(self._arm.name, time.perf_counter() - self._request.started)
        return self._observation(streamed=True)

    def is_silent_until(self, seconds: float) -> bool:
        """Tell whether nothing of the answer had come so many seconds after the request's arrival."""
        return not self._parts or self._parts[0][0] > seconds

    def _keep(self, part: bytes) -> None:
        self._kept += len(part)
        self._parts.append((time.perf_counter() - self._request.started, part if self._kept <= KEPT_BYTES else b""))

    def _observation(self, *, streamed: bool) -> Observation:
        seconds = time.perf_counter() - self._request.started
        if self._kept > KEPT_BYTES or not self._request.is_generation:
            return Observation(self._arm.name, self.status >= 500, seconds)
        return observe(self._arm.name, self.status, self._parts, seconds, streamed=streamed)


class Outbox:
    """Sends an answer, and knows how far it has come."""

    def __init__(self, send: Send) -> None:
        """Send by way of the server."""
        self._send = send
        self._begun = self._streams = False

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self._begun = True
            self._streams = any(name == b"content-type" and value.startswith(b"text/event-stream")
                                for name, value in message["headers"])
        await self._send(message)

    async def fail(self, status: int, message: str, headers: Headers) -> None:
        """End an answer that cannot be given; one that is no stream and has begun breaks off."""
        if not self._begun:
            await send_whole(self._send, status, error_body(status, message), headers)
        elif self._streams:
            await self._send({"type": "http.response.body", "body": error_event(status, message), "more_body": False})


async def _with_events(parts: AsyncIterator[bytes]) -> AsyncIterator[tuple[bytes, list[bytes]]]:
    """Yield every part of a stream with the data of the events that it completes."""
    splitter = EventSplitter()
    async for part in parts:
        yield part, splitter.feed(part)
    if last := [data for data in splitter.close() if data == DONE or _is_json(data)]:  # else it is half of one
        yield b"", last


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _trouble(error: Exception, arm: str) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"the engine of the {arm} arm went silent in the middle of the answer"
    if isinstance(error, OSError | EOFError) or type(error).__module__.startswith("aiohttp"):
        return f"the engine of the {arm} arm broke the answer off"
    raise error


async def send_whole(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Send an answer that is no stream."""
    if not any(name == b"content-type" for name, _ in headers):
        headers = [*headers, (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status,
                "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
