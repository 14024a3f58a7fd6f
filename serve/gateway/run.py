"""Starts the engines, the proxy and the admin endpoint, and stops them all."""

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vocabext.checkpoint.manifest import read_manifest
from vocabext.errors import ServerError, UsageError
from vocabext.files.scratch import scratch_folder
from vocabext.progress import Progress, no_progress
from vocabext.serve.engine import LOCAL, Server, check_port, wait_until_ready
from vocabext.serve.gateway.admin import admin_application
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.app import Gateway, application, metrics_application
from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED, Arm
from vocabext.serve.gateway.canary import Bounds, Canary
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.front import BaseFront
from vocabext.serve.gateway.guard import Limits
from vocabext.serve.gateway.health import Health, ban_fault, served_model
from vocabext.serve.gateway.keeper import Keeper, Place, engines_of, places_of
from vocabext.serve.gateway.keys import Keys
from vocabext.serve.gateway.load import Loads
from vocabext.serve.gateway.log import GatewayLog
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.protocol import BESIDE, BesideThread, QuietServer, fitting
from vocabext.serve.gateway.record import Recorder
from vocabext.serve.gateway.side_tasks import SideTasks
from vocabext.serve.gateway.state import State, locked, open_state
from vocabext.serve.gateway.trial import Trial
from vocabext.serve.gateway.upstream import Upstream

STOPPED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
EXCLUDES_TOOLS = "--exclude-tools-when-tool-choice-none"


@dataclass(frozen=True)
class GatewayConfig:
    """How a gateway runs.

    Attributes:
        base: The base arm: a URL of a running server, or a model for which one is started. With one engine, the
            base model's folder, for its tokenizer.
        expanded: The expanded arm in the same way.
        one_engine: Whether the expanded engine serves both arms.
        state_path: The state file.
        initial: The policy where there is no state yet.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        admin_port: Port of the admin endpoint, always on loopback; 0 picks a free one.
        model: What clients call the model; empty for the base arm's own name.
        limits: What is accepted.
        bounds: When the canary rolls back; None to leave that to the operator.
        api_key: What engines get; what clients have to know as well, unless there is a file of keys.
        api_key_file: The clients' keys, one per line; None where they have none of their own.
        allowed_origins: Whose pages may use the gateway.
        metrics_port: A port that shows the metrics to everybody; None for none, 0 picks a free one.
        allow_pin: Whether a header may choose the arm.
        record_path: Where to write requests down; None for nowhere.
        record_limit: How many at most.
        drain_seconds: How long requests in flight may take after the signal to stop.
        start_timeout_seconds: How long engines may take to start.
        log_folder: Where the engines' logs go; None for a folder that is removed at the end.
        restart: Whether an engine that was started here and dies is started again; else the gateway ends.
        vllm_flags: Further flags of engines that are started.
        trust_remote_code: Whether the base tokenizer may run code of its folder.
        unverified: Whether an expanded folder that `verify` has not passed as it is now is served.
        check_digests: Whether the weights' digests are compared with verify.json, too.
    """

    base: str
    expanded: str
    one_engine: bool
    state_path: Path
    initial: Policy = field(default_factory=Policy)
    host: str = LOCAL
    port: int = 8080
    admin_port: int = 0
    model: str = ""
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds | None = field(default_factory=Bounds)
    api_key: str | None = None
    api_key_file: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    metrics_port: int | None = None
    allow_pin: bool = True
    record_path: Path | None = None
    record_limit: int = 1000
    drain_seconds: float = 30.0
    start_timeout_seconds: float = 900.0
    log_folder: Path | None = None
    restart: bool = True
    vllm_flags: tuple[str, ...] = ()
    trust_remote_code: bool = False
    unverified: bool = False
    check_digests: bool = False


def run_gateway(
    config: GatewayConfig, *, on_ready: Callable[[dict[str, Any]], None], note: Callable[[str], None],
    progress: Progress = no_progress,
) -> int:
    """Run a gateway until a signal ends it.

    Args:
        config: How.
        on_ready: Told of URLs and process ids once requests can come.
        note: Takes the lines of the log.
        progress: Told how far the engines are.

    Returns:
        The number of the signal.

    Raises:
        UsageError: If the state, a model or a combination of options cannot be used.
        CheckpointError: If an expanded folder was not verified, or failed.
        ServerError: If an engine does not start, cannot serve its arm, or dies where it is not started again.
    """
    if not config.state_path.absolute().parent.is_dir():
        raise UsageError(f"the folder {config.state_path.absolute().parent} does not exist; create it, or name another "
                         "--state")
    log = GatewayLog(note)
    keys = Keys(config.api_key, config.api_key_file, log.note)
    check_exposed(config, keys)
    places = places_of(config.base, config.expanded, one_engine=config.one_engine)
    if not config.unverified:
        check_verified(places, check_digests=config.check_digests)
    with locked(config.state_path), log.listening(), ExitStack() as stack:
        state = open_state(config.state_path, config.initial)
        listening = [(config.host, config.port), (LOCAL, config.admin_port)]
        if config.metrics_port is not None:
            listening.append((config.host, config.metrics_port))
        listeners = [stack.enter_context(_listening(host, port)) for host, port in listening]
        front = load_front(config, places) if config.one_engine else None
        engines = start_engines(config, places, stack)
        wait_until_ready(list(engines.values()), timeout_seconds=config.start_timeout_seconds, progress=progress)
        service = Service(config, places, state, engines, front, listeners, on_ready, log, keys)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(service.run())


def check_exposed(config: GatewayConfig, keys: Keys) -> None:
    """Refuse to listen beyond this machine where everybody may ask.

    Raises:
        UsageError: If there is no key.
    """
    try:
        local = config.host == "localhost" or ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        local = False
    if not local and not keys.are_asked_for:
        raise UsageError(f"{config.host} can be reached from other machines, and no key is asked for; set "
                         "VOCABEXT_API_KEY or give --api-key-file, or listen on 127.0.0.1")


def check_verified(places: Mapping[str, Place], *, check_digests: bool = False) -> None:
    """Refuse what `serve start` refuses: an expanded folder that `verify` has not passed. URLs name no folder.

    With one engine, the base arm trusts the runs in the folder, whoever started the engine.

    Raises:
        CheckpointError: As `require_verified` does.
    """
    from vocabext.serve.model import require_verified

    for place in places.values():
        if place.model:
            require_verified(_folder_of(place.model), check_digests=check_digests)


@cache  # a swap asks again, and does not ask the hub
def _folder_of(model: str) -> Path:
    from vocabext.checkpoint.folder import resolve_model

    return resolve_model(model)


def start_engines(config: GatewayConfig, places: Mapping[str, Place], stack: ExitStack) -> dict[str, Server]:
    """Start the engines that do not run yet, by arm; the end of the stack stops them, and removes logs of no use."""
    if all(place.url for place in places.values()) or (config.one_engine and places[EXPANDED].url):
        return {}
    log_folder = config.log_folder or stack.enter_context(scratch_folder("vocabext-gateway-"))
    log_folder.mkdir(parents=True, exist_ok=True)
    engines = engines_of(places, one_engine=config.one_engine, log_folder=log_folder, flags=config.vllm_flags,
                         served_name=config.model or config.base, api_key=config.api_key)
    for server in engines.values():
        stack.enter_context(server)
    return engines


def load_front(config: GatewayConfig, places: Mapping[str, Place]) -> BaseFront:
    """Load the base tokenizer and the new tokens.

    Raises:
        UsageError: If the two do not belong together.
    """
    from vocabext.checkpoint.folder import resolve_model
    from vocabext.tokenizer import load_base_of
    from vocabext.tokens import Expansion, NewToken

    folder = places[EXPANDED].model
    manifest = read_manifest(resolve_model(folder))
    tokens = [NewToken(token.token, token.key, token.run) for token in manifest.tokens]
    base = load_base_of(resolve_model(config.base), manifest.first_new_id,
                        trust_remote_code=config.trust_remote_code)
    if base.first_new_id != manifest.first_new_id:
        raise UsageError(f"the tokenizer of {config.base} has {base.first_new_id} ids, but the new tokens of {folder} "
                         f"begin at {manifest.first_new_id}; this is not its base")
    excludes = any(flag.replace("_", "-") == EXCLUDES_TOOLS for flag in config.vllm_flags)
    return BaseFront(base, Expansion(tokens, manifest.first_new_id), excludes_tools=excludes)


class Service:
    """The part that runs in the event loop."""

    def __init__(
        self, config: GatewayConfig, places: Mapping[str, Place], state: State, engines: Mapping[str, Server],
        front: BaseFront | None, listeners: Sequence[socket.socket], on_ready: Callable[[dict[str, Any]], None],
        log: GatewayLog, keys: Keys,
    ) -> None:
        """Take over what was prepared outside of the loop."""
        self._keys = keys
        self._config, self._places, self._state, self._front = config, places, state, front
        self._listeners, self._on_ready, self._log = listeners, on_ready, log
        self._metrics = Metrics()
        self._keeper = Keeper(engines, self._metrics, log.note, restart=config.restart,
                              start_timeout_seconds=config.start_timeout_seconds)
        self._servers: list[QuietServer] = []
        self._task: asyncio.Task[Any] | None = None
        self._signal = 0
        self._failure: ServerError | None = None

    async def run(self) -> int:
        """Serve until a signal comes; returns its number.

        Raises:
            ServerError: If an engine cannot serve its arm, or has died and is not started again.
        """
        self._task = asyncio.current_task()
        with self._signals():
            try:
                await self._run()
            except asyncio.CancelledError:
                if not self._signal:
                    raise
        if self._failure is not None:
            raise self._failure
        return self._signal

    async def _run(self) -> None:
        config, upstream, metrics = self._config, Upstream(self._config.limits), self._metrics
        recorder = None if config.record_path is None else Recorder(config.record_path, config.record_limit)
        side_tasks = SideTasks(self._log.note)
        try:
            arms = await self._arms(upstream)
            canary = None if config.bounds is None else Canary(config.bounds)
            gateway = Gateway(
                Engines(arms, upstream, self._front, config.model or arms[BASE].model),
                Trial(self._state, canary, metrics, side_tasks), Loads(metrics, config.limits.in_flight), metrics,
                side_tasks, config.limits, recorder, self._keys, config.allow_pin)
            health = Health(gateway.engines, metrics, self._headers(), self._log.note)
            await health.check()
            await self._serve(gateway, health)
        finally:
            await side_tasks.close()
            await upstream.close()
            if recorder is not None:
                recorder.close()

    async def _serve(self, gateway: Gateway, health: Health) -> None:
        config, keeper, metrics = self._config, self._keeper, gateway.metrics
        server = QuietServer(application(gateway, config.allowed_origins), fitting(config.limits, self._log.note),
                             lambda why: metrics.closed.labels(why).inc(), config.drain_seconds)
        self._servers = [server]
        metrics.connections.set_function(server.places.__len__)
        metrics.body_bytes.set_function(lambda: gateway.bodies.held)
        admin_pages = admin_application(gateway.trial, lambda: {**gateway.status(), "engines": keeper.report()},
                                        self._check_folders)
        pages = (admin_pages, metrics_application(metrics))
        beside = {QuietServer(page, BESIDE, lambda _: None, 1.0): listener
                  for page, listener in zip(pages, self._listeners[1:], strict=False)}
        public, admin, *more = (listener.getsockname() for listener in self._listeners)
        self._state.opened(f"http://{LOCAL}:{admin[1]}")
        gateway.side_tasks.spawn(self._look_after(health))
        for listener in self._listeners:
            listener.listen(2048)  # before anybody is told: whoever comes now waits a moment, and is not refused
        host = f"[{public[0]}]" if ":" in public[0] else public[0]
        self._on_ready({
            "url": f"http://{host}:{public[1]}/v1", "model": gateway.engines.model, "admin_url": self._state.admin_url,
            **({"metrics_url": f"http://{host}:{more[0][1]}/metrics"} if more else {}),
            "state": str(self._state.path), "policy": self._state.policy.describe(),
            "engines": {name: {"url": arm.url, "model": arm.model} for name, arm in gateway.engines.arms.items()},
            "process_ids": {name: engine.process.pid for name, engine in keeper.engines.items()},
            "logs": {name: str(engine.log_path) for name, engine in keeper.engines.items()}})
        try:
            with BesideThread(beside):
                await server.serve(sockets=[self._listeners[0]])
        finally:
            self._state.closed()

    async def _look_after(self, health: Health) -> None:
        await asyncio.gather(health.watch(), self._log.watch(), self._keeper.watch(health.lost, self._give_up))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let signals end the service, but for those that somebody had us ignore, such as `nohup` does."""
        loop = asyncio.get_running_loop()
        handlers = {number: handler for number in STOPPED_BY
                    if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
        for number in handlers:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                loop.remove_signal_handler(number)  # leaves the default in place, not what was there before
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        self._signal = number
        self._keeper.stopping = True
        for server in self._servers:
            server.force_exit = server.should_exit  # a second signal waits for nobody
            server.should_exit = True
        if not self._servers and self._task is not None:
            self._task.cancel()

    def _give_up(self, failure: ServerError) -> None:
        self._failure = failure
        for server in self._servers:
            server.should_exit = True

    async def _arms(self, upstream: Upstream) -> dict[str, Arm]:
        """Ask the engines what they serve."""
        headers = self._headers()
        try:
            if self._front is not None:
                url = self._url(EXPANDED)
                model = (await served_model(upstream, url, EXPANDED, headers))["id"]
                if fault := await ban_fault(upstream, self._front, url, headers):
                    raise ServerError(fault)
                return {name: Arm(name, url, model) for name in ARMS}
            cards = {name: await served_model(upstream, self._url(name), name, headers) for name in ARMS}
            return {name: Arm(name, self._url(name), card["id"]) for name, card in cards.items()}
        except Refusal as refusal:
            raise ServerError(f"{refusal.message}; start it first") from None

    def _check_folders(self) -> None:
        """Refuse more requests for folders that changed since they were verified; weights are compared by size."""
        if not self._config.unverified:
            check_verified(self._places)

    def _url(self, arm: str) -> str:
        return self._places[arm].url or self._keeper.engines[arm].url

    def _headers(self) -> dict[str, str]:
        key = self._config.api_key
        return {} if key is None else {"authorization": f"Bearer {key}"}


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen before the engines start: a port that is taken should not cost their start-up."""
    if port:
        check_port(host, port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of each connection: else the system keeps up to 4 MiB for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServerError(f"cannot listen on {host} port {port}: {(error.strerror or '').lower()}") from None
        yield listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
