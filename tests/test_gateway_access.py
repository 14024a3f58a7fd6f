"""Who may use the gateway, and what of a request reaches the engine."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from vocabext.errors import UsageError
from vocabext.serve.gateway.admin import admin_application
from vocabext.serve.gateway.answers import Refusal
from vocabext.serve.gateway.app import Gateway, application, metrics_application
from vocabext.serve.gateway.arms import ARMS, Arm
from vocabext.serve.gateway.engines import Engines
from vocabext.serve.gateway.guard import FREE_BYTES, Bodies, Limits
from vocabext.serve.gateway.keys import Keys
from vocabext.serve.gateway.load import Loads
from vocabext.serve.gateway.metrics import Metrics
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.run import GatewayConfig, run_gateway
from vocabext.serve.gateway.side_tasks import SideTasks
from vocabext.serve.gateway.state import State
from vocabext.serve.gateway.trial import Trial

ASK = {"model": "m", "prompt": "hi"}
PAGE = "https://chat.example.org"


class Engine:
    """An engine that answers, and remembers the headers."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def call(self, method: str, url: str, *, headers: dict[str, str], **_: Any) -> AsyncIterator[Any]:
        self.headers = headers

        async def read() -> bytes:
            return json.dumps({"choices": [{"text": "hello", "finish_reason": "stop"}]}).encode()

        raw = [(b"Connection", b"x-hop"), (b"X-Hop", b"1"), (b"Set-Cookie", b"a=b"), (b"X-Kept", b"1"),
               (b"Access-Control-Allow-Origin", b"*")]
        yield SimpleNamespace(status=200, content_type="application/json", raw_headers=raw, read=read)

    async def get_json(self, url: str, *, headers: dict[str, str], **_: Any) -> Any:
        self.headers = headers
        return {"data": [{"id": "m"}]}


class Rig:
    """A gateway in this process."""

    def __init__(self, folder: Path, keys: Keys | None = None, origins: tuple[str, ...] = (),
                 limits: Limits | None = None) -> None:
        self.engine: Any = Engine()
        metrics, side_tasks, limits = Metrics(), SideTasks(), limits or Limits()
        arms = {name: Arm(name, f"http://{name}", "m") for name in ARMS}
        engines = Engines(arms, self.engine, None, "m", dict.fromkeys(ARMS, True))
        trial = Trial(State(folder / "state.json", Policy()), None, metrics, side_tasks)
        self.gateway = Gateway(engines, trial, Loads(metrics, limits.in_flight), metrics, side_tasks, limits,
                               keys=keys or Keys(None, None))
        self.app: Any = application(self.gateway, origins)

    def ask(self, method: str = "POST", path: str = "/v1/completions", **request: Any) -> httpx.Response:
        """Send one request; JSON unless it says otherwise."""
        if method == "POST" and "content" not in request:
            request = {"json": ASK, **request}

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway") as client:
                return await client.request(method, path, **request)

        return asyncio.run(send())


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
def test_a_body_that_does_not_say_it_is_json_is_refused(tmp_path: Path, kind: str) -> None:
    rig = Rig(tmp_path)
    answer = rig.ask(content=json.dumps(ASK).encode(), headers={"content-type": kind})
    assert answer.status_code == 415
    assert "it must be 'application/json'" in answer.json()["error"]["message"]
    assert rig.ask(content=json.dumps(ASK).encode(), headers={"content-type": "Application/JSON; charset=utf-8"}
                   ).status_code == 200


def test_pages_of_others_may_not_use_the_gateway(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("OPTIONS", "/v1/completions")):
        answer = rig.ask(method, path, headers={"origin": PAGE})
        assert answer.status_code == 403
        assert "start it with --allow-origin" in answer.json()["error"]["message"]
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert rig.engine.headers == {}


def test_pages_that_are_named_may(tmp_path: Path) -> None:
    rig = Rig(tmp_path, origins=(PAGE,))
    asked = {"origin": PAGE, "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type"}
    preflight = rig.ask("OPTIONS", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = rig.ask(headers={"origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
    assert answer.headers["access-control-expose-headers"] == "x-vocabext-arm"
    assert rig.ask(headers={"origin": "https://other.example.org"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_a_key_the_gateway_does_not_listen_beyond_this_machine(tmp_path: Path, host: str) -> None:
    config = GatewayConfig("http://127.0.0.1:1", "http://127.0.0.1:1", False, tmp_path / "state.json", host=host)
    with pytest.raises(UsageError, match="can be reached from other machines, and no key is asked for; set VOCABEXT"):
        run_gateway(config, on_ready=lambda _: None, note=lambda _: None)


@pytest.mark.parametrize("key", ["two words", "a\n", "clé", "a\x00", " a", "\t"])
def test_a_key_that_no_client_can_send_stops_the_start(tmp_path: Path, key: str) -> None:
    config = GatewayConfig("http://127.0.0.1:1", "http://127.0.0.1:1", False, tmp_path / "state.json", api_key=key)
    with pytest.raises(UsageError, match="the key in VOCABEXT_API_KEY has a space, a line break or a character"):
        run_gateway(config, on_ready=lambda _: None, note=lambda _: None)
    path = tmp_path / "keys"
    path.write_text(f"fine\nx {key} y\n")
    with pytest.raises(UsageError, match="has a space, a line break or a character"):
        Keys(None, path)


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def test_metrics_and_the_policy_are_behind_the_key(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Keys("secret", None))
    assert rig.ask("GET", "/metrics").status_code == 401
    assert b"vocabext_gateway" in rig.ask("GET", "/metrics", **bearer("secret")).content
    assert rig.ask("GET", "/health").json() == {"status": "ok"}
    assert rig.ask("GET", "/health", **bearer("secret")).json()["policy"] == "all requests to base"
    rig.app = metrics_application(rig.gateway.metrics)
    assert b"vocabext_gateway" in rig.ask("GET", "/metrics").content


def test_keys_come_from_a_file_that_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vocabext.serve.gateway.keys.KEYS_SECONDS", 0.0)
    path, notes = tmp_path / "keys", list[str]()
    path.write_text("# of the teams\none\n\n two\n")
    rig = Rig(tmp_path, Keys("of-engines", path, notes.append))

    def status(key: str) -> int:
        return rig.ask(**bearer(key)).status_code

    assert [status(key) for key in ("one", "two", "of-engines", "# of the teams", "")] == [200, 200, 401, 401, 401]
    rig.ask(**bearer("one"))
    assert rig.engine.headers["authorization"] == "Bearer of-engines"
    path.write_text("three\n")
    os.utime(path, ns=(1, 1))
    assert [status(key) for key in ("one", "three")] == [401, 200]
    path.unlink()
    assert [status("three"), status("three")] == [200, 200]
    assert len(notes) == 1
    assert "cannot be read" in notes[0]
    assert "the keys stay as they were" in notes[0]


def test_a_file_without_keys_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for text in ("", "# none\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match="holds no key"):
            Keys(None, path)
    with pytest.raises(UsageError, match="cannot be read"):
        Keys(None, tmp_path / "missing")


def test_engines_without_a_key_do_not_see_the_clients_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n")
    rig = Rig(tmp_path, Keys(None, path))
    assert rig.ask(**bearer("one")).status_code == 200
    assert "authorization" not in rig.engine.headers


def test_what_is_for_this_hop_does_not_reach_the_engine_nor_the_client(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    hop = {"connection": "close, X-Hop", "x-hop": "1", "cookie": "a=b", "x-forwarded-for": "192.0.2.1",
           "x-forwarded-host": "evil", "forwarded": "for=1", "x-request-id": "17"}
    answer = rig.ask(headers=hop)
    assert rig.engine.headers["x-request-id"] == "17"
    assert not {*hop} - {"x-request-id"} & {*rig.engine.headers}
    assert answer.headers["x-kept"] == "1"
    assert not {"x-hop", "set-cookie", "access-control-allow-origin"} & {*answer.headers}


def test_a_rollback_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, written = Rig(tmp_path), threading.Event()
    trial = rig.gateway.trial
    trial.set_policy(Policy(100), by="operator")
    write = State._write
    monkeypatch.setattr(State, "_write", lambda *arguments: written.wait(20) and write(*arguments))
    rig.app = admin_application(trial, rig.gateway.status)

    async def order() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(rig.app), base_url="http://admin") as client:
            token = {"x-vocabext-token": trial.state.token}
            answer = await client.post("/swap", json={"rollback": True}, headers=token)
        assert not written.is_set()
        written.set()
        return answer.json()

    answer = asyncio.run(order())
    assert answer["expanded_percent"] == 0
    assert answer["unsaved"].endswith("is being written, and the disk is slow")
    assert trial.state.unsaved == ""
    assert json.loads((tmp_path / "state.json").read_text())["policy"]["expanded_percent"] == 0


def test_an_order_that_is_too_long_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.app = admin_application(rig.gateway.trial, rig.gateway.status)
    token = {"x-vocabext-token": rig.gateway.trial.state.token}
    answer = rig.ask(path="/swap", content=b" " * 70_000, headers=token)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body has 70000 bytes, the limit is 65536"


def test_nobody_is_sent_to_a_host_that_a_client_names(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for app in (rig.app, admin_application(rig.gateway.trial, rig.gateway.status)):
        rig.app = app
        for method, path in (("POST", "/v1/completions/"), ("GET", "/health/"), ("GET", "/status/")):
            answer = rig.ask(method, path, headers={"host": "evil.example.org"})
            assert answer.status_code == 404
            assert "location" not in answer.headers


def test_a_key_that_floods_the_gateway_leaves_half_of_the_places(tmp_path: Path) -> None:
    loads = Loads(Metrics(), 8)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(loads.slot("base", "greedy"))
        with pytest.raises(Refusal, match="this key has 4 requests in flight on the base arm, its share is 4") as no:
            stack.enter_context(loads.slot("base", "greedy"))
        assert no.value.status == 429
        for _ in range(2):
            stack.enter_context(loads.slot("base", "modest"))
        stack.enter_context(loads.slot("base", "third"))
        with pytest.raises(Refusal, match="its share is 2 of 8"):
            stack.enter_context(loads.slot("base", "modest"))
        stack.enter_context(loads.slot("expanded", "greedy"))
    for _ in range(8):
        stack.enter_context(loads.slot("base"))
    with pytest.raises(Refusal, match="the limit is 8"):
        stack.enter_context(loads.slot("base", "new"))
    stack.close()
    assert loads.in_flight == {"base": 0, "expanded": 0}


def test_long_bodies_wait_for_each_other_and_short_ones_for_nobody() -> None:
    bodies = Bodies(100)
    with bodies.share() as first, bodies.share() as second:
        first(FREE_BYTES + 60)
        with pytest.raises(Refusal, match="the bodies of all requests hold 60 bytes, the limit is 100") as no:
            second(FREE_BYTES + 50)
        assert (no.value.status, no.value.headers) == (503, [(b"retry-after", b"1"), (b"connection", b"close")])
        second(FREE_BYTES)
        second(FREE_BYTES + 40)
        assert bodies.held == 100
    assert bodies.held == 0


@pytest.mark.parametrize(("size", "status"), [(128, 200), (129, 400)])
@pytest.mark.parametrize("prompt", ["a", [1]])
def test_so_many_prompts_and_no_more(tmp_path: Path, prompt: Any, size: int, status: int) -> None:
    answer = Rig(tmp_path).ask(json={"model": "m", "prompt": [prompt] * size})
    assert answer.status_code == status
    assert status == 200 or "129 prompts, the limit is 128" in answer.text


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match="raise --max-all-bodies-bytes or lower --max-body-bytes"):
        Limits(body_bytes=10, all_bodies_bytes=9)
