"""The proxy: one request, one arm, from the first byte to the last.

The arm is chosen once, when the request has been read. What happens to the policy afterwards does not
touch it. Nothing is retried on the other arm: a client gets an answer of one arm, or an error.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vocabext.serve.gateway.answers import Headers, Refusal, error_body
from vocabext.serve.gateway.arms import BASE, Arm, other
from vocabext.serve.gateway.calls import ARM_HEADER, CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE, Request, parse
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.guard import (
    Bodies,
    Limits,
    Origins,
    Receive,
    Scope,
    Send,
    check_headers,
    check_type,
    read_body,
)
from vocabext.serve.gateway.keys import Keys
from vocabext.serve.gateway.load import Loads, Mark
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.observe import Observation, failure
from vocabext.serve.gateway.policy import ArmChoice
from vocabext.serve.gateway.reading import reading_loss
from vocabext.serve.gateway.record import Recorder
from vocabext.serve.gateway.relay import Outbox, Relay, send_whole
from vocabext.serve.gateway.side_tasks import SideTasks, where
from vocabext.serve.gateway.trial import Trial
from vocabext.serve.gateway.upstream import forwarded

MAX_MIRRORS = 16
# A client that leaves after so long without a byte has waited in vain: an engine that hangs would otherwise be a matter
# of its users' patience. Less than the shortest time-out that a client library comes with (httpx: 5 seconds). Once the
# answer has begun, the client knows the arm, and could leave one arm alone: then it does not count.
SILENT_SECONDS = 4.0


@dataclass
class Gateway:
    """The parts of a gateway, put together.

    Attributes:
        engines: The two arms and the way to them.
        trial: The policy, and the comparison under it.
        loads: How busy the arms are.
        metrics: Counters.
        side_tasks: What runs beside the requests.
        limits: What is accepted.
        recorder: Writes requests down; None, unless it was asked for.
        keys: What clients have to know.
        allow_pin: Whether a header may choose the arm.
        bodies: The bytes of bodies in memory.
    """

    engines: Engines
    trial: Trial
    loads: Loads
    metrics: Metrics
    side_tasks: SideTasks
    limits: Limits = field(default_factory=Limits)
    recorder: Recorder | None = None
    keys: Keys = field(default_factory=lambda: Keys(None, None))
    allow_pin: bool = True

    def __post_init__(self) -> None:
        """Make what the limits say."""
        self.bodies = Bodies(self.limits.all_bodies_bytes)

    def measured(self, seen: Observation, since: Mark) -> Observation:
        """Say of an answer what only a look at both arms can tell.

        One engine bears the load of both arms. What it refuses says nothing about one of them, and the base arm's
        requests are refused by the gateway already where they are no requests.
        """
        one = self.engines.are_one
        return replace(seen, alike=one or self.loads.alike(seen.arm, since), refused=seen.refused and not one)

    def status(self) -> dict[str, Any]:
        """Return whether every arm that requests may reach answers, and the policy."""
        arms, policy = self.engines.statuses(), self.trial.policy
        status = "ok" if all(arms[name] == "ok" for name in arms if policy.uses(name)) else "down"
        return {"status": status, "arms": arms, "policy": policy.describe(),
                "in_flight": {name: self.loads.in_flight[name] for name in arms}}


class Exchange:
    """A request on its way through an arm.

    Attributes:
        request: The request.
        choice: Who answers, and why.
        relay: What passes the answer on; None as long as there is nothing to pass on.
        seen: What the answer was, once it is over; None if it says nothing about the arm.
        left_after: Seconds after which the client had waited in vain, and left; None if it did not.
    """

    def __init__(self, request: Request, choice: ArmChoice) -> None:
        """Begin, inside the running loop."""
        self.request, self.choice = request, choice
        self.relay: Relay | None = None
        self.seen: asyncio.Future[Observation | None] = asyncio.get_running_loop().create_future()
        self.left_after: float | None = None

    def is_silent_until(self, seconds: float) -> bool:
        """Tell whether nothing of the answer had come so many seconds after the request's arrival."""
        return self.relay is None or self.relay.is_silent_until(seconds)


class Proxy:
    """The ASGI application behind every path that an engine answers."""

    def __init__(self, gateway: Gateway) -> None:
        """Answer with the arms of a gateway."""
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        with self._gateway.bodies.share() as grow:
            await self._exchange(scope, receive, send, grow)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send, grow: Callable[[int], None]) -> None:
        gateway, started, arm, status = self._gateway, time.perf_counter(), None, 499
        exchange, outbox = None, Outbox(send)
        headers: Headers = []
        try:
            request = await self._accept(scope, receive, started, grow)
            choice = gateway.trial.policy.choose(pin=request.pin() if gateway.allow_pin else None,
                                                 user=request.user())
            arm, exchange = choice.arm, Exchange(request, choice)
            headers = [(ARM_HEADER, arm.encode())]
            with gateway.loads.slot(arm, request.key) as since:
                left = gateway.limits.total_seconds - (time.perf_counter() - started)
                finished = await _unless_gone(receive, self._answer(exchange, since, outbox), left)
            if finished is None:
                gateway.metrics.gone.labels(arm).inc()
                self._given_up(exchange)
            else:
                status = finished
        except _OverdueError:
            status = 504
            await outbox.fail(status, f"the answer was not complete after {gateway.limits.total_seconds:g} seconds",
                              headers)
        except Refusal as refusal:
            status = refusal.status
            gateway.metrics.refused.labels(str(status)).inc()
            await send_whole(outbox, status, error_body(status, refusal.message), [*refusal.headers, *headers])
        except Exception as error:  # a fault of the gateway's own: the server would write its text into the log
            status = 500
            gateway.side_tasks.note(f"a request failed by a fault of the gateway: {where(error)}")
            await outbox.fail(status, "the gateway failed at this request; its log says where", headers)
        finally:
            if exchange is not None and not exchange.seen.done():
                exchange.seen.set_result(None)
            gateway.metrics.requests.labels(arm or "none", scope["path"], str(status)).inc()
            if arm is not None:
                gateway.metrics.seconds.labels(arm).observe(time.perf_counter() - started)

    async def _accept(
        self, scope: Scope, receive: Receive, started: float, grow: Callable[[int], None]
    ) -> Request:
        gateway, headers = self._gateway, list(scope["headers"])
        limits, by_name = gateway.limits, dict(headers)
        check_headers([(b"", scope.get("raw_path") or b""), *headers], limits.header_bytes)
        key = gateway.keys.check(by_name)
        check_type(by_name)
        body = await read_body(receive, by_name, limits.body_bytes, grow)
        return Request(scope["path"], headers, body, parse(body, limits.prompts), started,
                       gateway.keys.toward_engine(forwarded(headers)), key if gateway.keys.are_several else "")

    async def _answer(self, exchange: Exchange, since: Mark, send: Send) -> int:
        """Answer from the chosen arm, and let the other one answer too if it is to be compared."""
        gateway, request, choice = self._gateway, exchange.request, exchange.choice
        arm = gateway.engines.arms[choice.arm]
        try:
            call = await gateway.engines.call_for(request, arm)
            if request.is_generation:
                self._record(exchange)
                if choice.mirrored:
                    self._mirror(exchange, gateway.engines.arms[other(arm.name)])
            exchange.relay = Relay(gateway.engines.upstream, arm, request, call, send)
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
        self._gateway.metrics.saw(observation)
        exchange.seen.set_result(observation if observation.tells else None)
        if exchange.choice.why == "share":
            self._gateway.trial.compare(observation)

    def _given_up(self, exchange: Exchange) -> None:
        """Take into account that a client went away, if it had waited for long and nothing had come."""
        seconds = time.perf_counter() - exchange.request.started
        if not exchange.seen.done() and seconds >= SILENT_SECONDS and exchange.is_silent_until(seconds):
            exchange.left_after = seconds
            self._over(exchange, failure(exchange.choice.arm, seconds, left=True))

    def _record(self, exchange: Exchange) -> None:
        """Write a request down, unless it is pinned: those are a rehearsal's, not users'."""
        gateway = self._gateway
        if (gateway.recorder is not None and exchange.choice.why != "pinned"
                and (fault := gateway.recorder.write(exchange.request))):
            gateway.side_tasks.note(fault)

    def _mirror(self, exchange: Exchange, arm: Arm) -> None:
        if len(self._gateway.side_tasks.tasks) >= MAX_MIRRORS:
            self._gateway.metrics.mirrors_dropped.inc()
            return
        self._gateway.side_tasks.spawn(self._answer_unseen(exchange, arm))

    async def _answer_unseen(self, exchange: Exchange, arm: Arm) -> None:
        """Send a copy of a request to the other arm, and compare the two answers if the first one counts."""
        gateway, request, engines = self._gateway, exchange.request, self._gateway.engines
        copy = Exchange(request, exchange.choice)
        try:
            with gateway.loads.slot(arm.name) as since:
                gateway.metrics.mirrored.labels(arm.name).inc()
                call = await engines.call_for(request, arm)
                copy.relay = Relay(engines.upstream, arm, request, call, _nowhere)
                mirrored = gateway.measured(await copy.relay.run(), since)
        except Refusal as refusal:
            if refusal.status == 503:
                gateway.metrics.mirrors_dropped.inc()
            if refusal.status not in (502, 504):
                return  # the gateway's own: what the base arm of one engine cannot do is no failure of an engine
            mirrored = failure(arm.name, time.perf_counter() - request.started)
        gateway.metrics.saw(mirrored, mirrored=True)
        original = await exchange.seen
        if original is None or gateway.trial.canary is None:
            return
        if exchange.left_after is not None and copy.is_silent_until(exchange.left_after):
            # The same client would have left this arm, too.
            mirrored = failure(arm.name, exchange.left_after, left=True)
        gateway.trial.compare(*([mirrored] if exchange.choice.why == "share" else [original, mirrored]))
        if request.is_greedy:
            gateway.trial.compare_pair(original, mirrored)
        of_base = original if original.arm == BASE else mirrored
        if of_base.counted and (loss := await reading_loss(engines, gateway.loads, request, of_base.text)) is not None:
            gateway.trial.read(loss)
        gateway.trial.judge()


class _OverdueError(Exception):
    """A request took longer than `Limits.total_seconds`."""


async def _nowhere(message: Any) -> None:
    """Take a message of an answer that nobody sees."""


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, int], seconds: float) -> int | None:
    """Do some work unless the client goes away; then cancel it, which closes the engine's connection.

    Returns:
        The status that was sent, None if the client went away.

    Raises:
        _OverdueError: If it took longer than so many seconds.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        done, _ = await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise _OverdueError
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


def application(gateway: Gateway, allowed_origins: Sequence[str] = ()) -> Origins:
    """Return the application that clients talk to.

    Args:
        gateway: Answers.
        allowed_origins: Whose pages may talk to it.
    """
    proxy = Proxy(gateway)

    async def models(request: HttpRequest) -> Response:
        return await _models(gateway, request)

    async def health(request: HttpRequest) -> Response:
        document = gateway.status()
        status = 200 if document["status"] == "ok" else 503
        with contextlib.suppress(Refusal):
            gateway.keys.check(dict(request.headers.raw))
            return JSONResponse(document, status)
        return JSONResponse({"status": document["status"]}, status)

    async def metrics(request: HttpRequest) -> Response:
        gateway.keys.check(dict(request.headers.raw))
        return _metrics_page(gateway.metrics)

    async def nothing(_: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = ("this path is not served here; there are " + ", ".join(sorted(paths)) if status == 404
                   else "this method is not allowed here")
        return Response(error_body(status, message), status, media_type="application/json")

    routes = [Route(path, proxy, methods=["POST"]) for path in (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)]
    routes += [Route("/v1/models", models), Route("/health", health), Route("/metrics", metrics)]
    paths = [route.path for route in routes]
    app = Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing, Refusal: _refused})
    app.router.redirect_slashes = False  # it would send clients to the host that they named
    return Origins(app, allowed_origins)


def metrics_application(metrics: Metrics) -> Starlette:
    """Return the application of a port for metrics alone, which asks for no key."""

    async def page(_: HttpRequest) -> Response:
        return _metrics_page(metrics)

    return Starlette(routes=[Route("/metrics", page)])


def _metrics_page(metrics: Metrics) -> Response:
    return Response(metrics.text(), media_type="text/plain; version=0.0.4")


async def _refused(_: HttpRequest, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    headers = {name.decode(): value.decode() for name, value in refusal.headers}
    return Response(error_body(refusal.status, refusal.message), refusal.status, headers, "application/json")


async def _models(gateway: Gateway, request: HttpRequest) -> Response:
    """List the models of the arm that answers most requests, under the name that clients use."""
    headers = list(request.headers.raw)
    check_headers(headers, gateway.limits.header_bytes)
    gateway.keys.check(dict(headers))
    engines = gateway.engines
    arm = engines.arms[gateway.trial.policy.main_arm()]
    document = await engines.upstream.get_json(f"{arm.url}/v1/models", arm=arm.name,
                                               headers=gateway.keys.toward_engine(forwarded(headers)))
    for card in document.get("data") or ():
        if card.get("id") == arm.model:
            card["id"] = engines.model
    return Response(json.dumps(document), media_type="application/json")
