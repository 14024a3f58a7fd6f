"""The base arm of one engine, in front of engines that are functions: what is sent, what comes back, what is refused."""

import asyncio
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serve.gateway.answers import Refusal
from serve.gateway.app import Gateway, Proxy
from serve.gateway.arms import BASE, EXPANDED, Arm
from serve.gateway.calls import Request
from serve.gateway.guard import Limits
from serve.gateway.metrics import Metrics
from serve.gateway.policy import Choice

MESSAGES = [{"role": "user", "content": "hi"}]


def request(path: str, **document: Any) -> Request:
    return Request(path, [], json.dumps(document).encode(), document, time.perf_counter())


def between(front: Any, engine: Callable[[str, dict[str, Any]], tuple[int, Any]]) -> Gateway:
    """Return a gateway whose one engine is a function of path and body."""

    async def post_json(url: str, value: bytes, **_: Any) -> tuple[int, bytes]:
        status, answer = engine(url.removeprefix("http://engine"), json.loads(value))
        return status, json.dumps(answer).encode()

    arms = {BASE: Arm(BASE, "http://engine", "m", front), EXPANDED: Arm(EXPANDED, "http://engine", "m")}
    return Gateway(arms, SimpleNamespace(), SimpleNamespace(post_json=post_json), Limits(), Metrics(),  # type: ignore
                   model="m")


def test_an_engine_that_fails_while_a_chat_is_rendered_counts_as_failing() -> None:
    async def call(*_: Any) -> Any:
        raise Refusal(502, "the engine of the base arm cannot be reached")

    gateway = between(SimpleNamespace(call=call), lambda *_: (200, {}))
    with pytest.raises(Refusal):
        asyncio.run(Proxy(gateway)._answer(request("/v1/chat/completions", messages=MESSAGES),
                                           Choice(BASE, "share", False), None))  # type: ignore[arg-type]
    assert b'engine_failures_total{arm="base"} 1.0' in gateway.metrics.text()
