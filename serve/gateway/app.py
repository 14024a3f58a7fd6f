"""The proxy: one request, one arm, from the first byte to the last.

The arm is chosen once, when the request has been read. What happens to the policy afterwards does not
touch it. Nothing is retried on the other arm: a client gets an answer of one arm, or an error.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.gateway.answers import Headers, Refusal, error_body, error_event
from serve.gateway.arms import BASE, Arm, other
from serve.gateway.calls import (
    ARM_HEADER,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    TOKENIZE,
    Call,
    Converter,
    Request,
    parse,
    plain_call,
)
from serve.gateway.canary import Canary
from serve.gateway.guard import Limits, Receive, Scope, Send, check_headers, check_key, read_body
from serve.gateway.metrics import Metrics
from serve.gateway.observe import KEPT_BYTES, Observation, failure, observe
from serve.gateway.policy import Choice, Policy
from serve.gateway.reading import reading_loss
from serve.gateway.record import Recorder
from serve.gateway.state import State
from serve.gateway.upstream import Upstream, forwarded, returned

MAX_MIRRORS = 16
ARMS_OWN = b"\n\n"


@dataclass
class Gateway:
    """All that the requests share.

    Attributes:
        arms: The two arms by name.
        state: The policy.
        upstream: Connections to the engines.
        limits: What is accepted.
        metrics: Counters.
        canary: Compares the arms; None to leave that to the operator.
        recorder: Writes requests down; None, unless it was asked for.
        model: What clients call the model.
        api_key: What they have to know; None for nothing.
        allow_pin: Whether a header may choose the arm.
        healthy: Whether each arm's engine answered its last health check.
    """

    arms: dict[str, Arm]
    state: State
    upstream: Upstream
    limits: Limits
    metrics: Metrics
    canary: Canary | None = None
    recorder: Recorder | None = None
    model: str = ""
    api_key: str | None = None
    allow_pin: bool = True
    healthy: dict[str, bool] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    background: set["asyncio.Task[None]"] = field(default_factory=set)

    def names(self) -> Mapping[str, str]:
        """Return the names under which clients may ask for the model."""
        return dict.fromkeys([self.model, *(arm.model for arm in self.arms.values())], "")

    def set_policy(self, policy: Policy, *, by: str, reason: str = "") -> None:
        """Put a policy in force for all requests from now on; those in flight keep their arm."""
        self.state.change(policy, by=by, reason=reason)
        self.metrics.changes.labels(by).inc()
        self.metrics.expanded_percent.set(policy.expanded_percent)
        if self.canary is not None:
            self.canary.restart()

    def saw(self, observation: Observation, *, mirrored: bool = False) -> None:
        """Take an answer into account; roll back if the canary says so."""
        if observation.failed:
            self.metrics.failures.labels(observation.arm).inc()
        if observation.counted and not mirrored:
            self.metrics.characters.labels(observation.arm).inc(observation.characters)
            if observation.first_text_seconds is not None:
                self.metrics.first_text.labels(observation.arm).observe(observation.first_text_seconds)
        if self.canary is not None:
            self.canary.add(observation)
            self.judge()

    def judge(self) -> None:
        """Roll back if the canary has found the expanded arm worse, and it is in use."""
        assert self.canary is not None
        policy = self.state.policy
        if (policy.uses("expanded") or policy.mirror_percent) and (reason := self.canary.reason_to_stop()):
            self.set_policy(policy.rolled_back(), by="canary", reason=reason)

    @contextmanager
    def slot(self, arm: str) -> Iterator[None]:
        """Hold a place among the requests of an arm.

        Raises:
            Refusal: 503 if all are taken.
        """
        busy = self.in_flight.get(arm, 0)
        if busy >= self.limits.in_flight:
            raise Refusal(503, f"the {arm} arm has {busy} requests in flight, the limit is {self.limits.in_flight}; "
                               "try again in a moment", [(b"retry-after", b"1")])
        self.in_flight[arm] = busy + 1
        self.metrics.in_flight.labels(arm).inc()
        try:
            yield
        finally:
            self.in_flight[arm] -= 1
            self.metrics.in_flight.labels(arm).dec()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests; it is cancelled when the gateway stops."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def close(self) -> None:
        """End what runs beside the requests, and all connections."""
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.upstream.close()


class Proxy:
    """The ASGI application behind every path that an engine answers."""

    def __init__(self, gateway: Gateway) -> None:
        """Answer with the arms of a gateway."""
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        gateway, started, arm, status = self._gateway, time.perf_counter(), None, 499
        try:
            request = await self._accept(scope, receive, started)
            choice = gateway.state.policy.choose(pin=request.pin() if gateway.allow_pin else None,
                                                 user=request.user())
            arm = choice.arm
            with gateway.slot(arm):
                finished = await _unless_gone(receive, self._answer(request, choice, send))
            if finished is None:
                gateway.metrics.gone.labels(arm).inc()
            else:
                status = finished
        except Refusal as refusal:
            status = refusal.status
            gateway.metrics.refused.labels(str(status)).inc()
            headers = refusal.headers if arm is None else [*refusal.headers, (ARM_HEADER, arm.encode())]
            await send_whole(send, status, error_body(status, refusal.message), headers)
        finally:
            gateway.metrics.requests.labels(arm or "none", scope["path"], str(status)).inc()
            if arm is not None:
                gateway.metrics.seconds.labels(arm).observe(time.perf_counter() - started)

    async def _accept(self, scope: Scope, receive: Receive, started: float) -> Request:
        gateway, headers = self._gateway, list(scope["headers"])
        check_headers([(b"", scope.get("raw_path") or b""), *headers], gateway.limits.header_bytes)
        check_key(dict(headers), gateway.api_key)
        body = await read_body(receive, dict(headers), gateway.limits.body_bytes)
        return Request(scope["path"], headers, body, parse(body), started)

    async def _answer(self, request: Request, choice: Choice, send: Send) -> int:
        """Answer from the chosen arm, and let the other one answer too if it is to be compared."""
        gateway, arm = self._gateway, self._gateway.arms[choice.arm]
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[Observation | None] = loop.create_future()
        try:
            call = await self._call(request, arm)
            if gateway.recorder is not None and request.is_generation:
                gateway.recorder.write(request)
            if choice.mirrored and request.is_generation:
                self._mirror(request, gateway.arms[other(arm.name)], seen)
            relay = Relay(gateway, arm, request, call, send)
            observation = await relay.run()
            if request.is_generation:
                gateway.saw(observation)
                seen.set_result(observation)
            return relay.status
        except Refusal as refusal:
            if request.is_generation and refusal.status in (502, 504):
                gateway.saw(failure(arm.name, time.perf_counter() - request.started))
            raise
        finally:
            if not seen.done():
                seen.set_result(None)

    async def _call(self, request: Request, arm: Arm) -> Call:
        if arm.front is None:
            return plain_call(request, arm, self._gateway.names())
        return await arm.front.call(request, arm, self._gateway)

    def _mirror(self, request: Request, arm: Arm, seen: "asyncio.Future[Observation | None]") -> None:
        if len(self._gateway.background) >= MAX_MIRRORS:
            self._gateway.metrics.mirrors_dropped.inc()
            return
        self._gateway.spawn(self._answer_unseen(request, arm, seen))

    async def _answer_unseen(
        self, request: Request, arm: Arm, seen: "asyncio.Future[Observation | None]"
    ) -> None:
        """Send a copy of a request to the other arm, and compare the two answers."""
        gateway = self._gateway
        try:
            with gateway.slot(arm.name):
                gateway.metrics.mirrored.labels(arm.name).inc()
                relay = Relay(gateway, arm, request, await self._call(request, arm), _nowhere)
                mirrored = await relay.run()
        except Refusal as refusal:
            if refusal.status == 503:
                gateway.metrics.mirrors_dropped.inc()
                return
            mirrored = failure(arm.name, time.perf_counter() - request.started)
        gateway.saw(mirrored, mirrored=True)
        original = await seen
        if original is None or gateway.canary is None:
            return
        canary = gateway.canary
        if request.is_greedy:
            canary.compare(original, mirrored)
        of_base = original if original.arm == BASE else mirrored
        if of_base.counted and (loss := await reading_loss(gateway, request, of_base.text)) is not None:
            canary.read(loss)
        gateway.judge()


class Relay:
    """Passes one answer on, as it comes, and looks into it when it is complete."""

    def __init__(self, gateway: Gateway, arm: Arm, request: Request, call: Call, send: Send) -> None:
        """Prepare one exchange with an engine."""
        self._gateway, self._arm, self._request, self._call, self._send = gateway, arm, request, call, send
        self._parts: list[tuple[float, bytes]] = []
        self._kept = 0
        self.status = 0

    async def run(self) -> Observation:
        """Send the request and pass the answer on.

        Raises:
            Refusal: If the engine failed before anything was passed on.
        """
        arm, gateway = self._arm, self._gateway
        headers = forwarded(self._request.headers)
        headers["content-type"] = "application/json"
        async with gateway.upstream.call("POST", arm.url + self._call.path, arm=arm.name, headers=headers,
                                         body=self._call.body) as response:
            self.status = response.status
            out = [*returned(response), (ARM_HEADER, arm.name.encode())]
            if response.content_type == "text/event-stream":
                await self._send({"type": "http.response.start", "status": response.status,
                                  "headers": [h for h in out if h[0] != b"content-length"]})
                return await self._stream(response.content.iter_any())
            body = await response.read()
        if self._call.converter is not None and self.status == 200:
            body = self._call.converter.whole(body)
        self._keep(body)
        await send_whole(self._send, self.status, body, [h for h in out if h[0] != b"content-length"])
        return self._observation(streamed=False)

    async def _stream(self, parts: Any) -> Observation:
        """Pass a stream on; if it breaks off, end it with an error event."""
        converter = self._call.converter if self.status == 200 else None
        splitter = None if converter is None else _Splitter(converter)
        tail, trouble = b"", ""
        try:
            async for part in parts:
                out = part if splitter is None else splitter.feed(part)
                if out:
                    tail = (tail + out)[-32:]
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
                    self._keep(out)
        except Exception as error:  # the context manager names what can go wrong with a connection; here it is caught
            trouble = _trouble(error, self._arm.name)
        if not trouble and self.status == 200 and b"data: [DONE]" not in tail:
            trouble = f"the engine of the {self._arm.name} arm broke the answer off"
        last = error_event(502, trouble) if trouble else b""
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if trouble:
            return failure(self._arm.name, time.perf_counter() - self._request.started)
        return self._observation(streamed=True)

    def _keep(self, part: bytes) -> None:
        self._kept += len(part)
        if self._kept <= KEPT_BYTES:
            self._parts.append((time.perf_counter() - self._request.started, part))

    def _observation(self, *, streamed: bool) -> Observation:
        seconds = time.perf_counter() - self._request.started
        if self._kept > KEPT_BYTES or not self._request.is_generation:
            return Observation(self._arm.name, self.status >= 500, seconds)
        return observe(self._arm.name, self.status, self._parts, seconds, streamed=streamed)


class _Splitter:
    """Cuts a stream into events and has each of them converted."""

    def __init__(self, converter: Converter) -> None:
        self._converter = converter
        self._rest = b""

    def feed(self, part: bytes) -> bytes:
        *events, self._rest = (self._rest + part).split(ARMS_OWN)
        return b"".join(self._converter.event(event[5:].strip()) for event in events if event.startswith(b"data:"))


def _trouble(error: Exception, arm: str) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"the engine of the {arm} arm went silent in the middle of the answer"
    if isinstance(error, OSError | EOFError) or type(error).__module__.startswith("aiohttp"):
        return f"the engine of the {arm} arm broke the answer off"
    raise error


async def _nowhere(message: Any) -> None:
    """Take a message of an answer that nobody sees."""


async def send_whole(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Send an answer that is no stream."""
    if not any(name == b"content-type" for name, _ in headers):
        headers = [*headers, (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status,
                "headers": [*headers, (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, int]) -> int | None:
    """Do some work unless the client goes away; then cancel it, which closes the engine's connection.

    Returns:
        The status that was sent, None if the client went away.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refusal):
                await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def application(gateway: Gateway) -> Starlette:
    """Return the application that clients talk to."""
    proxy = Proxy(gateway)

    async def models(request: HttpRequest) -> Response:
        return await _with_errors(_models(gateway, request))

    async def health(_: HttpRequest) -> Response:
        document = status_of(gateway)
        return JSONResponse(document, 200 if document["status"] == "ok" else 503)

    async def metrics(_: HttpRequest) -> Response:
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4")

    async def nothing(_: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = ("this path is not served here; there are " + ", ".join(sorted(paths)) if status == 404
                   else "this method is not allowed here")
        return Response(error_body(status, message), status, media_type="application/json")

    routes = [Route(path, proxy, methods=["POST"]) for path in (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)]
    routes += [Route("/v1/models", models), Route("/health", health), Route("/metrics", metrics)]
    paths = [route.path for route in routes]
    return Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing})


async def _with_errors(work: Coroutine[Any, Any, Response]) -> Response:
    try:
        return await work
    except Refusal as refusal:
        headers = {name.decode(): value.decode() for name, value in refusal.headers}
        return Response(error_body(refusal.status, refusal.message), refusal.status, headers, "application/json")


async def _models(gateway: Gateway, request: HttpRequest) -> Response:
    """List the models of the arm that answers most requests, under the name that clients use."""
    headers = list(request.headers.raw)
    check_headers(headers, gateway.limits.header_bytes)
    check_key(dict(headers), gateway.api_key)
    arm = gateway.arms[gateway.state.policy.main_arm()]
    document = await gateway.upstream.get_json(f"{arm.url}/v1/models", arm=arm.name, headers=forwarded(headers))
    for card in document.get("data") or ():
        if card.get("id") == arm.model:
            card["id"] = gateway.model
    return Response(json.dumps(document), media_type="application/json")


def status_of(gateway: Gateway) -> dict[str, Any]:
    """Return whether every arm that requests may reach answers, and the policy."""
    policy = gateway.state.policy
    arms = {name: "ok" if gateway.healthy.get(name) else "down" for name in gateway.arms}
    needed = [name for name in gateway.arms if policy.uses(name)]
    status = "ok" if all(arms[name] == "ok" for name in needed) else "down"
    return {"status": status, "arms": arms, "policy": policy.describe(),
            "in_flight": {name: gateway.in_flight.get(name, 0) for name in gateway.arms}}
