"""The gateway in front of two fake engines: what passes, who answers, what is refused."""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gateway_rig import Running, cli, events, fake_engine, gateway, inspect, text_of, wait_for

from vocabext.serve.engine import Server


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("engines")
    with fake_engine(folder, "base") as base, fake_engine(folder, "expanded") as expanded:
        yield {"base": base, "expanded": expanded}


@pytest.fixture(scope="module")
def running(engines: dict[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("gateway")
    with gateway(folder, engines["base"].url, engines["expanded"].url, "--no-canary", "--model-name", "m",
                 "--max-body-bytes", "20000", "--max-header-bytes", "4000") as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    running.order(rollback=True)
    with running.client() as found:
        yield found


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    headers = more.pop("headers", {})
    return client.post("/v1/completions", json={"model": "m", "prompt": "hello", **more}, headers=headers)


def test_an_answer_comes_from_the_arm_that_is_named(client: httpx.Client) -> None:
    answer = ask(client)
    assert answer.status_code == 200
    assert answer.headers["x-vocabext-arm"] == "base"
    assert answer.json()["choices"][0]["text"].startswith(" base:")
    pinned = ask(client, headers={"x-vocabext-arm": "expanded"})
    assert pinned.headers["x-vocabext-arm"] == "expanded"
    assert pinned.json()["choices"][0]["text"].startswith(" expanded:")


def test_a_stream_is_passed_on_event_by_event(client: httpx.Client, engines: dict[str, Server]) -> None:
    with client.stream("POST", "/v1/chat/completions", json={
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 40,
    }) as answer:
        parts = list(answer.iter_raw())
    assert len(parts) > 5
    stream = b"".join(parts).decode()
    assert events(stream)[-1] == "[DONE]"
    assert text_of(stream).count(" base:") == 40


def test_the_name_of_the_model_becomes_that_of_the_arm(client: httpx.Client, engines: dict[str, Server]) -> None:
    ask(client, headers={"x-vocabext-arm": "expanded"})
    assert inspect(engines["expanded"])["seen"][-1]["document"]["model"] == "expanded-model"
    ask(client, model="some-adapter")
    assert inspect(engines["base"])["seen"][-1]["document"]["model"] == "some-adapter"


def test_headers_are_passed_on_but_for_ours(client: httpx.Client, engines: dict[str, Server]) -> None:
    ask(client, headers={"authorization": "Bearer abc", "x-request-id": "17", "x-vocabext-user": "me"})
    seen = inspect(engines["base"])["seen"][-1]["headers"]
    assert seen["authorization"] == "Bearer abc"
    assert seen["x-request-id"] == "17"
    assert not [name for name in seen if name.startswith("x-vocabext")]


@pytest.mark.slow
def test_a_swap_moves_all_requests_and_a_rollback_moves_them_back(running: Running, client: httpx.Client) -> None:
    status = running.swap("--to", "expanded")
    assert status["expanded_percent"] == 100
    assert ask(client).headers["x-vocabext-arm"] == "expanded"
    assert running.swap("--rollback")["policy"] == "all requests to base"
    assert ask(client).headers["x-vocabext-arm"] == "base"


@pytest.mark.slow
def test_a_share_is_kept_and_users_stay_where_they_are(running: Running, client: httpx.Client) -> None:
    running.order(to="expanded", percent=30)
    arms = Counter(ask(client, max_tokens=1).headers["x-vocabext-arm"] for _ in range(120))
    assert 15 <= arms["expanded"] <= 60
    users = [f"user-{i}" for i in range(20)]
    first = {user: ask(client, user=user, max_tokens=1).headers["x-vocabext-arm"] for user in users}
    assert set(first.values()) == {"base", "expanded"}
    for user in users:
        assert ask(client, max_tokens=1, headers={"x-vocabext-user": user}).headers["x-vocabext-arm"] == first[user]
    running.order(to="base", percent=40)
    after = {user: ask(client, user=user, max_tokens=1).headers["x-vocabext-arm"] for user in users}
    assert all(after[user] == "expanded" for user in users if first[user] == "expanded")


def test_a_request_in_flight_ends_on_its_arm(running: Running, client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json={
        "model": "m", "prompt": "long", "stream": True, "max_tokens": 200}) as answer:
        parts = answer.iter_text()
        first = next(parts)
        running.order(to="expanded")
        assert ask(client, max_tokens=1).headers["x-vocabext-arm"] == "expanded"
        stream = first + "".join(parts)
    assert text_of(stream).count(" base:") == 200
    assert " expanded:" not in stream


def test_a_mirrored_request_reaches_both_and_one_answers(
    running: Running, client: httpx.Client, engines: dict[str, Server]
) -> None:
    running.order(mirror_percent=100)
    answer = ask(client, prompt="to be mirrored")
    assert answer.headers["x-vocabext-arm"] == "base"
    assert wait_for(lambda: any(row["document"].get("prompt") == "to be mirrored"
                                for row in inspect(engines["expanded"])["seen"]))


def test_models_health_tokenize_metrics(running: Running, client: httpx.Client) -> None:
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["m"]
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json()["arms"] == {"base": "ok", "expanded": "ok"}
    assert client.post("/tokenize", json={"model": "m", "prompt": "ab"}).json()["tokens"] == [97, 98]
    ask(client)
    deadline = time.monotonic() + 10  # a client may have its answer before the gateway has counted its end
    while 'vocabext_gateway_in_flight{arm="base"} 0.0' not in (text := client.get("/metrics").text):
        assert time.monotonic() < deadline, text
    assert 'vocabext_gateway_requests_total{arm="base",path="/v1/completions",status="200"}' in text


@pytest.mark.parametrize(("send", "status", "message"), [
    ({"content": b"{not json"}, 400, "no JSON document"),
    ({"content": b"[1]"}, 400, "it must be an object"),
    ({"content": b'{"model": [], "prompt": "a"}'}, 400, "it must be a string"),
    ({"content": b'{"prompt": "' + b"a" * 30_000 + b'"}'}, 413, "the limit is 20000"),
    ({"content": iter([b'{"prompt": "', b"a" * 30_000])}, 413, "more than 20000"),
    ({"json": {"prompt": "a"}, "headers": {"x-long": "a" * 3_990}}, 431, "the limit is 4000"),
    ({"json": {"prompt": "a"}, "headers": {"x-vocabext-arm": "green"}}, 400, "it must be base or expanded"),
])
def test_bad_requests_are_refused_in_json(
    client: httpx.Client, send: dict[str, Any], status: int, message: str
) -> None:
    headers = {"content-type": "application/json", **send.get("headers", {})}
    answer = client.post("/v1/completions", **{**send, "headers": headers})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["code"] == status


def test_unknown_paths_and_methods_are_refused_in_json(client: httpx.Client) -> None:
    assert "/v1/chat/completions" in client.get("/v2/nothing").json()["error"]["message"]
    assert client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("parts", [20, 1])
def test_endless_headers_are_cut_off(running: Running, parts: int) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-long: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(parts):
                connection.sendall(b"a" * (20_000 // parts))
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_errors_of_an_engine_are_passed_on(client: httpx.Client) -> None:
    for status in (400, 500):
        answer = ask(client, prompt=f"fault:{status}")
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, f"asked for {status}")


def test_the_admin_endpoint_wants_its_token(running: Running) -> None:
    url = json.loads(running.state.read_text())["admin_url"]
    assert url.startswith("http://127.0.0.1:")
    for answer in (httpx.post(f"{url}/swap", json={"to": "expanded"}, trust_env=False),
                   httpx.get(f"{url}/status", headers={"x-vocabext-token": "guess"}, trust_env=False)):
        assert answer.status_code == 401
    assert running.state.stat().st_mode & 0o077 == 0
    assert httpx.get(f"{running.url}/swap", trust_env=False).status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (["--percent", "10"], "--percent needs --to"),
    (["--rollback", "--to", "base"], "--rollback goes without"),
    (["--to", "expanded", "--percent", "110"], "110"),
])
def test_orders_that_make_no_sense_are_refused(running: Running, arguments: list[str], message: str) -> None:
    done = cli("serve", "swap", "--state", str(running.state), *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_swap_without_a_gateway_says_so(tmp_path: Path) -> None:
    missing = cli("serve", "swap", "--rollback", "--state", str(tmp_path / "none.json"))
    assert missing.returncode == 2
    assert "start `vocabext serve gateway` first" in missing.stderr


@pytest.mark.slow
def test_two_gateways_do_not_share_a_state(running: Running, engines: dict[str, Server]) -> None:
    done = cli("serve", "gateway", engines["base"].url, engines["expanded"].url, "--port", "0", "--state",
               str(running.state))
    assert done.returncode == 1
    assert "another gateway uses" in done.stderr


@pytest.mark.slow
def test_the_official_client_works(running: Running, client: httpx.Client) -> None:
    api = openai.OpenAI(base_url=running.document["url"], api_key="any", http_client=httpx.Client(trust_env=False))
    with api:
        assert api.models.list().data[0].id == "m"
        whole = api.completions.create(model="m", prompt="hello", max_tokens=5)
        assert whole.choices[0].text.count("base:") == 5
        parts = list(api.completions.create(model="m", prompt="hello", max_tokens=5, stream=True))
        assert sum(part.choices[0].text.count("base:") for part in parts) == 5
        chat = api.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
        assert (chat.choices[0].message.content or "").count("base:") == 5
        chunks = list(api.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}],
                                                  max_tokens=5, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).count("base:") == 5
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="asked for 400"):
            api.completions.create(model="m", prompt="fault:400")
        with pytest.raises(openai.APIError, match="broke the answer off"):
            list(api.completions.create(model="m", prompt="fault:cut", stream=True))


@pytest.mark.slow
def test_the_key_is_checked_and_passed_on(engines: dict[str, Server], tmp_path: Path) -> None:
    with gateway(tmp_path, engines["base"].url, engines["expanded"].url, key="secret") as running, \
            running.client() as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            answer = ask(client, headers=headers)
            assert answer.status_code == 401
            assert "Authorization: Bearer" in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 401
        assert ask(client, headers={"authorization": "Bearer secret"}).status_code == 200
        assert inspect(engines["base"])["seen"][-1]["headers"]["authorization"] == "Bearer secret"
        assert client.get("/health").status_code == 200


@pytest.mark.slow
def test_nothing_that_clients_say_is_written_down_unless_asked(engines: dict[str, Server], tmp_path: Path) -> None:
    record = tmp_path / "requests.jsonl"
    logs = tmp_path / "logs"
    with gateway(tmp_path, engines["base"].url, engines["expanded"].url, "--record", str(record), "--record-limit",
                 "1", "--logs", str(logs)) as running, running.client() as client:
        ask(client, prompt="my secret", model="base-model")
        ask(client, prompt="another secret", model="base-model")
        ask(client, prompt="fault:not-json secret", model="base-model")
        metrics = client.get("/metrics").text
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert lines == [{"path": "/v1/completions", "body": {"model": "base-model", "prompt": "my secret"}}]
    assert record.stat().st_mode & 0o077 == 0
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != record]
    assert written
    assert not [p for p in written if "secret" in p.read_text()]
    assert "secret" not in metrics
