"""Where the arms come from, and who looks after the engines that the gateway starts itself.

An arm is a model, for which an engine is started, or the URL of an engine that runs already. An engine of ours that
dies is reaped with every process of its group, and started again after a delay that doubles.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vocabext.errors import ServerError, UsageError
from vocabext.serve.engine import Server, describe_exit, find_this_package, vllm_server
from vocabext.serve.gateway.arms import ARMS, BASE, EXPANDED
from vocabext.serve.gateway.metrics import Metrics

BAN = "vocabext.serve.gateway.ban:BanNewTokens"
ONE_ENGINE_FLAGS = ("--logits-processors", BAN)
LOOK_SECONDS = 0.5
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 1.0, 60.0
STABLE_SECONDS = 300.0  # an engine that has run for so long did not die of its start: the delays begin anew
_MODEL_AND_URL = re.compile(r"(?:(?P<model>.+)@)?(?P<url>[A-Za-z][A-Za-z0-9+.-]*://.*)")


class Place(NamedTuple):
    """Where an arm comes from.

    Attributes:
        model: A folder or hub id; empty if only a URL was given.
        url: A server that runs already, without a trailing slash and without `/v1`; empty if one has to be started.
    """

    model: str
    url: str


def places_of(base: str, expanded: str, *, one_engine: bool) -> dict[str, Place]:
    """Read what the arms are said to be.

    Args:
        base: A model, or the URL of a server; with one engine, a model.
        expanded: The same; with one engine, a model, or `FOLDER@URL`.
        one_engine: Whether the expanded engine serves both arms.

    Raises:
        UsageError: If one of them is not what it has to be.
    """
    places = {BASE: _place_of(base), EXPANDED: _place_of(expanded)}
    if one_engine and places[BASE].url:
        raise UsageError(f"with one engine, BASE is the base model for its tokenizer, not a URL ({base})")
    if one_engine and not places[EXPANDED].model:
        raise UsageError("with one engine, EXPANDED is the expanded model's folder, or FOLDER@URL for an engine that "
                         f"runs already; it is {expanded}")
    for name, place in places.items():
        if not one_engine and place.model and place.url:
            raise UsageError(f"{name.upper()} is {place.model}@{place.url}; FOLDER@URL is for --one-engine, pass the "
                             "URL alone")
    return places


def _place_of(text: str) -> Place:
    found = _MODEL_AND_URL.fullmatch(text)
    if found is None:
        return Place(text, "")
    try:
        parts = urlsplit(found["url"])
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port beyond 65535, half of an IPv6 address
        sound = False
    if not sound:
        raise UsageError(f"{text} is no URL of a server; it must be http://HOST:PORT")
    return Place(found["model"] or "", found["url"].rstrip("/").removesuffix("/v1"))


def engines_of(
    places: Mapping[str, Place], *, one_engine: bool, log_folder: Path, served_name: str, flags: Sequence[str] = (),
    api_key: str | None = None,
) -> dict[str, Server]:
    """Describe the engines that have to be started, by arm; nothing runs yet.

    Args:
        places: Where the arms come from.
        one_engine: Whether the expanded engine serves both arms.
        log_folder: Where the engines' logs go.
        served_name: The model's name in requests.
        flags: Further flags of vLLM's server.
        api_key: What the engines ask for.

    Raises:
        UsageError: If there is no such model.
        CheckpointError: If a folder is no model.
    """
    from vocabext.checkpoint.folder import resolve_model

    engines = {}
    for arm in (EXPANDED,) if one_engine else ARMS:
        if places[arm].url:
            continue
        server = vllm_server(
            resolve_model(places[arm].model), log_folder / f"{arm}.log", name=f"the {arm} engine",
            served_name=served_name, flags=(*flags, *(ONE_ENGINE_FLAGS if one_engine else ())))
        find_this_package(server.environment)  # for the ban
        if api_key is not None:
            server.environment["VLLM_API_KEY"] = api_key
        engines[arm] = server
    return engines


class Keeper:
    """Looks after the engines that the gateway started.

    Attributes:
        engines: These engines, by arm.
        restarts: How often each was started again.
        stopping: Whether the gateway stops; an engine that ends now is left alone.
    """

    def __init__(
        self, engines: Mapping[str, Server], metrics: Metrics, note: Callable[[str], None], *, restart: bool = True,
        start_timeout_seconds: float = 900.0,
    ) -> None:
        """Take over engines that are ready.

        Args:
            engines: The engines, by arm.
            metrics: Count the restarts.
            note: Told what became of an engine.
            restart: Whether an engine that dies is started again.
            start_timeout_seconds: How long that may take.
        """
        self.engines, self.stopping = engines, False
        self.restarts = dict.fromkeys(engines, 0)
        self._metrics, self._note = metrics, note
        self._restart, self._timeout_seconds = restart, start_timeout_seconds
        for arm in engines:
            metrics.restarts.labels(arm)  # shown from the beginning, as 0: Prometheus sees the first restart, too

    async def watch(self, lost: Callable[[str], None], give_up: Callable[[ServerError], None]) -> None:
        """Look after the engines for as long as the gateway runs.

        Args:
            lost: Told the URL of an engine that died.
            give_up: Told why the gateway cannot go on, where restarts are switched off.
        """
        await asyncio.gather(*(self._keep(arm, lost, give_up) for arm in self.engines))

    def report(self) -> dict[str, Any]:
        """Return the process id and the restarts of each engine."""
        return {arm: {"process_id": server.process.pid, "restarts": self.restarts[arm]}
                for arm, server in self.engines.items()}

    async def _keep(self, arm: str, lost: Callable[[str], None], give_up: Callable[[ServerError], None]) -> None:
        server, delay = self.engines[arm], FIRST_DELAY_SECONDS
        while True:
            ran_seconds, ready = await self._until_ended(server)
            if self.stopping:
                return
            lost(server.url)
            code = server.exit_code
            what = (f"{server.name} stopped {describe_exit(code)}" if code is not None else
                    f"{server.name} was not ready after {self._timeout_seconds:.0f} seconds")
            failure = server.failure(what)
            await asyncio.to_thread(server.stop)  # the processes that it leaves behind, too
            if not self._restart:
                give_up(failure)
                return
            delay = FIRST_DELAY_SECONDS if ready and ran_seconds >= STABLE_SECONDS else delay
            self._note(f"{failure}\n{server.name} is started again in {delay:.0f} seconds; this log is kept as "
                       f"{server.keep_log()}")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)
            self.restarts[arm] += 1
            self._metrics.restarts.labels(arm).inc()
            with contextlib.suppress(OSError):  # no process to be had: it counts as one that died at once
                server.start()  # in this thread, the main one: Linux ties the child to its life

    async def _until_ended(self, server: Server) -> tuple[float, bool]:
        """Wait until an engine has ended, or was not ready in time; returns the seconds, and whether it was ready."""
        began, ready = time.monotonic(), False
        while server.exit_code is None:
            seconds = time.monotonic() - began
            if not ready:
                ready = await asyncio.to_thread(server.is_healthy)
                if not ready and seconds > self._timeout_seconds:
                    break
            await asyncio.sleep(LOOK_SECONDS)
        return time.monotonic() - began, ready
