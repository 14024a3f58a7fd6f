"""The proxy: one request, one arm, from the first byte to the last.

The arm is chosen once, when the request has been read. What happens to the policy afterwards does not
touch it. Nothing is retried on the other arm: a client gets an answer of one arm, or an error.
"""

import asyncio
import contextlib
import json
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.gateway.answers import Headers, Refusal, error_body, error_event
from serve.gateway.arms import BASE, EXPANDED, Arm, other
from serve.gateway.calls import (
    ARM_HEADER,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    TOKENIZE,
    Call,
    Request,
    parse,
    plain_call,
)
from serve.gateway.canary import Canary
from serve.gateway.events import DONE, EventSplitter
from serve.gateway.guard import Limits, Message, Receive, Scope, Send, check_headers, check_key, read_body
from serve.gateway.load import Loads, Mark
from serve.gateway.metrics import Metrics
from serve.gateway.observe import KEPT_BYTES, Observation, failure, observe
from serve.gateway.policy import Choice, Policy
from serve.gateway.reading import reading_loss
from serve.gateway.record import Recorder
from serve.gateway.state import State
from serve.gateway.upstream import Upstream, forwarded, returned

MAX_MIRRORS = 16
# A client that leaves after so long without a byte has waited in vain: an engine that hangs would otherwise be a matter
# of its users' patience. Less than the shortest time-out that a client library comes with (httpx: 5 seconds); who
# stops an answer that comes along does not count.
SILENT_SECONDS = 4.0
SAVE_AGAIN_SECONDS = 5.0


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
        loads: How busy the arms are.
        note: Told of what the operator should know; never of what clients say.
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
    loads: Loads = field(default_factory=Loads)
    note: Callable[[str], None] = field(default=lambda message: None)
    background: set["asyncio.Task[None]"] = field(default_factory=set)

    @property
    def in_flight(self) -> dict[str, int]:
        """The number of requests in flight on each arm."""
        return self.loads.in_flight

    def names(self) -> Mapping[str, str]:
        """Return the names under which clients may ask for the model."""
        return dict.fromkeys([self.model, *(arm.model for arm in self.arms.values())], "")

    def set_policy(self, policy: Policy, *, by: str, reason: str = "") -> None:
        """Put a policy in force for all requests from now on; those in flight keep their arm.

        Raises:
            OSError: If it cannot be saved; the old one stays in force.
        """
        self.state.change(policy, by=by, reason=reason)
        self._begin_trial(by)

    def roll_back(self, *, by: str, reason: str = "") -> None:
        """Send all requests to the base arm, whether or not that can be saved; if not, try again until it can."""
        was_saved = not self.state.unsaved
        self.state.roll_back(by=by, reason=reason)
        self._begin_trial(by)
        if self.state.unsaved and was_saved:
            self.note(f"{self.state.unsaved}: the rollback is in force, but a restart would not know of it; "
                      "make room, it is tried again")
            self.spawn(self._save_later())

    def _begin_trial(self, by: str) -> None:
        self.metrics.changes.labels(by).inc()
        self.metrics.expanded_percent.set(self.state.policy.expanded_percent)
        if self.canary is not None:
            self.canary.restart()

    async def _save_later(self) -> None:
        while self.state.unsaved:
            await asyncio.sleep(SAVE_AGAIN_SECONDS)
            if self.state.unsaved and self.state.try_to_save():
                self.note(f"{self.state.path} is written again")

    def measured(self, seen: Observation, since: Mark) -> Observation:
        """Say of an answer what only a look at both arms can tell.

        One engine bears the load of both arms. What it refuses says nothing about one of them, and the base arm's
        requests are refused by the gateway already where they are no requests.
        """
        one_engine = self.arms[BASE].url == self.arms[EXPANDED].url
        return replace(seen, alike=one_engine or self.loads.alike(seen.arm, since),
                       refused=seen.refused and not one_engine)

    def saw(self, observation: Observation, *, mirrored: bool = False) -> None:
        """Count an answer in the metrics."""
        if observation.failed:
            self.metrics.failures.labels(observation.arm).inc()
        if observation.counted and not mirrored:
            self.metrics.characters.labels(observation.arm).inc(observation.characters)
            if observation.first_text_seconds is not None:
                self.metrics.first_text.labels(observation.arm).observe(observation.first_text_seconds)

    def compare(self, *answers: Observation) -> None:
        """Take answers into account that chance has divided between the arms, or that both arms gave to one request."""
        if self.canary is not None:
            for answer in answers:
                self.canary.add(answer)
            self.judge()

    def judge(self) -> None:
        """Roll back if the canary has found the expanded arm worse, and it is in use."""
        assert self.canary is not None
        policy = self.state.policy
        if (policy.uses("expanded") or policy.mirror_percent) and (reason := self.canary.reason_to_stop()):
            self.roll_back(by="canary", reason=reason)

    @contextmanager
    def slot(self, arm: str) -> Iterator[Mark]:
        """Hold a place among the requests of an arm; gives the moment since when.

        Raises:
            Refusal: 503 if all are taken.
        """
        busy = self.in_flight[arm]
        if busy >= self.limits.in_flight:
            raise Refusal(503, f"the {arm} arm has {busy} requests in flight, the limit is {self.limits.in_flight}; "
                               "try again in a moment", [(b"retry-after", b"1")])
        self.loads.begin(arm)
        self.metrics.in_flight.labels(arm).inc()
        try:
            yield self.loads.mark()
        finally:
            self.loads.end(arm)
            self.metrics.in_flight.labels(arm).dec()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the requests; it is cancelled when the gateway stops."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self.background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.note(f"something beside the requests failed: {where(error)}")

    async def close(self) -> None:
        """End what runs beside the requests, and all connections."""
        for task in list(self.background):
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self.upstream.close()


class Exchange:
    """A request on its way through an arm.

    Attributes:
        request: The request.
        choice: Who answers, and why.
        relay: What passes the answer on; None as long as there is nothing to pass on.
        seen: What the answer was, once it is over; None if it says nothing about the arm.
        left_after: Seconds after which the client had waited in vain, and left; None if it did not.
    """

    def __init__(self, request: Request, choice: Choice) -> None:
        """Begin, inside the running loop."""
        self.request, self.choice = request, choice
        self.relay: Relay | None = None
        self.seen: asyncio.Future[Observation | None] = asyncio.get_running_loop().create_future()
        self.left_after: float | None = None

    def silence(self, after: float) -> float:
        """Return for how many seconds nothing had come, so many seconds after the request's arrival."""
        return after if self.relay is None else self.relay.silence(after)


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


class Proxy:
    """The ASGI application behind every path that an engine answers."""

    def __init__(self, gateway: Gateway) -> None:
        """Answer with the arms of a gateway."""
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        gateway, started, arm, status = self._gateway, time.perf_counter(), None, 499
        exchange, outbox = None, Outbox(send)
        headers: Headers = []
        try:
            request = await self._accept(scope, receive, started)
            choice = gateway.state.policy.choose(pin=request.pin() if gateway.allow_pin else None,
                                                 user=request.user())
            arm, exchange = choice.arm, Exchange(request, choice)
            headers = [(ARM_HEADER, arm.encode())]
            with gateway.slot(arm) as since:
                finished = await _unless_gone(receive, self._answer(exchange, since, outbox))
            if finished is None:
                gateway.metrics.gone.labels(arm).inc()
                self._given_up(exchange)
            else:
                status = finished
        except Refusal as refusal:
            status = refusal.status
            gateway.metrics.refused.labels(str(status)).inc()
            await send_whole(outbox, status, error_body(status, refusal.message), [*refusal.headers, *headers])
        except Exception as error:  # a fault of the gateway's own: the server would write its text into the log
            status = 500
            gateway.note(f"a request failed by a fault of the gateway: {where(error)}")
            await outbox.fail(status, "the gateway failed at this request; its log says where", headers)
        finally:
            if exchange is not None and not exchange.seen.done():
                exchange.seen.set_result(None)
            gateway.metrics.requests.labels(arm or "none", scope["path"], str(status)).inc()
            if arm is not None:
                gateway.metrics.seconds.labels(arm).observe(time.perf_counter() - started)

    async def _accept(self, scope: Scope, receive: Receive, started: float) -> Request:
        gateway, headers = self._gateway, list(scope["headers"])
        check_headers([(b"", scope.get("raw_path") or b""), *headers], gateway.limits.header_bytes)
        check_key(dict(headers), gateway.api_key)
        body = await read_body(receive, dict(headers), gateway.limits.body_bytes)
        return Request(scope["path"], headers, body, parse(body), started)

    async def _answer(self, exchange: Exchange, since: Mark, send: Send) -> int:
        """Answer from the chosen arm, and let the other one answer too if it is to be compared."""
        gateway, request, choice = self._gateway, exchange.request, exchange.choice
        arm = gateway.arms[choice.arm]
        try:
            call = await self._call(request, arm)
            if request.is_generation:
                self._record(exchange)
                if choice.mirrored:
                    self._mirror(exchange, gateway.arms[other(arm.name)])
            exchange.relay = Relay(gateway, arm, request, call, send)
            observation = await exchange.relay.run()
            self._over(exchange, gateway.measured(observation, since))
            return exchange.relay.status
        except Refusal as refusal:
            if refusal.status in (502, 504):
                self._over(exchange, failure(arm.name, time.perf_counter() - request.started))
            raise

    def _over(self, exchange: Exchange, observation: Observation) -> None:
        """Take an answer into account that somebody has waited for.

        Whose answers may be compared: those that chance has divided between the arms. A pin is somebody's choice. A
        user stays on an arm, so a single one with long questions makes that arm slow: there only the two answers to
        one request are compared (`_answer_unseen`).
        """
        if not exchange.request.is_generation:
            return
        self._gateway.saw(observation)
        exchange.seen.set_result(observation if observation.tells else None)
        if exchange.choice.why == "share":
            self._gateway.compare(observation)

    def _given_up(self, exchange: Exchange) -> None:
        """Take into account that a client went away, if nothing had come for long."""
        seconds = time.perf_counter() - exchange.request.started
        if not exchange.seen.done() and exchange.silence(seconds) >= SILENT_SECONDS:
            exchange.left_after = seconds
            self._over(exchange, failure(exchange.choice.arm, seconds))

    def _record(self, exchange: Exchange) -> None:
        """Write a request down, unless it is pinned: those are a rehearsal's, not users'."""
        gateway = self._gateway
        if (gateway.recorder is not None and exchange.choice.why != "pinned"
                and (fault := gateway.recorder.write(exchange.request))):
            gateway.note(fault)

    async def _call(self, request: Request, arm: Arm) -> Call:
        if arm.front is None:
            return plain_call(request, arm, self._gateway.names())
        return await arm.front.call(request, arm, self._gateway)

    def _mirror(self, exchange: Exchange, arm: Arm) -> None:
        if len(self._gateway.background) >= MAX_MIRRORS:
            self._gateway.metrics.mirrors_dropped.inc()
            return
        self._gateway.spawn(self._answer_unseen(exchange, arm))

    async def _answer_unseen(self, exchange: Exchange, arm: Arm) -> None:
        """Send a copy of a request to the other arm, and compare the two answers if the first one counts."""
        gateway, request = self._gateway, exchange.request
        copy = Exchange(request, exchange.choice)
        try:
            with gateway.slot(arm.name) as since:
                gateway.metrics.mirrored.labels(arm.name).inc()
                copy.relay = Relay(gateway, arm, request, await self._call(request, arm), _nowhere)
                mirrored = gateway.measured(await copy.relay.run(), since)
        except Refusal as refusal:
            if refusal.status == 503:
                gateway.metrics.mirrors_dropped.inc()
            if refusal.status not in (502, 504):
                return  # the gateway's own: what the base arm of one engine cannot do is no failure of an engine
            mirrored = failure(arm.name, time.perf_counter() - request.started)
        gateway.saw(mirrored, mirrored=True)
        original = await exchange.seen
        if original is None or gateway.canary is None:
            return
        if exchange.left_after is not None and copy.silence(exchange.left_after) >= SILENT_SECONDS:
            mirrored = failure(arm.name, exchange.left_after)  # the same client would have left this arm, too
        gateway.compare(*([mirrored] if exchange.choice.why == "share" else [original, mirrored]))
        if request.is_greedy:
            gateway.canary.compare(original, mirrored)
        of_base = original if original.arm == BASE else mirrored
        if of_base.counted and (loss := await reading_loss(gateway, request, of_base.text)) is not None:
            gateway.canary.read(loss)
        gateway.judge()


class Relay:
    """Passes one answer on, as it comes, and looks into it when it is complete."""

    def __init__(self, gateway: Gateway, arm: Arm, request: Request, call: Call, send: Send) -> None:
        """Prepare one exchange with an engine."""
        self._gateway, self._arm, self._request, self._call, self._send = gateway, arm, request, call, send
        self._parts: list[tuple[float, bytes]] = []
        self._kept = 0
        self._complete = False
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

    async def _stream(self, parts: AsyncIterator[bytes]) -> Observation:
        """Pass a stream on; if it breaks off, end it with an error event."""
        converter = self._call.converter if self.status == 200 else None
        done, trouble = False, ""
        try:
            async for part, events in _with_events(parts):
                out = part if converter is None else b"".join(map(converter.event, events))
                done = done or DONE in events
                self._keep(out)
                if out:
                    await self._send({"type": "http.response.body", "body": out, "more_body": True})
        except Exception as error:  # the context manager names what can go wrong with a connection; here it is caught
            trouble = _trouble(error, self._arm.name)
        if not trouble and self.status == 200 and not done:
            trouble = f"the engine of the {self._arm.name} arm broke the answer off"
        last = error_event(502, trouble) if trouble else b""
        await self._send({"type": "http.response.body", "body": last, "more_body": False})
        if trouble:
            return failure(self._arm.name, time.perf_counter() - self._request.started)
        return self._observation(streamed=True)

    def silence(self, after: float) -> float:
        """Return for how many seconds nothing had come, so many after the request's arrival; 0 if all had come."""
        before = [when for when, _ in self._parts if when <= after]
        return 0.0 if self._complete and len(before) == len(self._parts) else after - (before[-1] if before else 0.0)

    def _keep(self, part: bytes) -> None:
        self._kept += len(part)
        self._parts.append((time.perf_counter() - self._request.started, part if self._kept <= KEPT_BYTES else b""))

    def _observation(self, *, streamed: bool) -> Observation:
        seconds = time.perf_counter() - self._request.started
        self._complete = True
        if self._kept > KEPT_BYTES or not self._request.is_generation:
            return Observation(self._arm.name, self.status >= 500, seconds)
        return observe(self._arm.name, self.status, self._parts, seconds, streamed=streamed)


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


def where(error: BaseException) -> str:
    """Say what failed and where, without the error's text: that may quote a request."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at " + " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)


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
            "in_flight": {name: gateway.in_flight[name] for name in gateway.arms}}
