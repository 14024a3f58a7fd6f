"""What clients see when an engine, the gateway, or a client goes away."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gateway_rig import Running, events, fake_engine, gateway, inspect, wait_for

from vocabext.serve.engine import Server


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[dict[str, Server]]:
    with fake_engine(tmp_path, "base") as base, fake_engine(tmp_path, "expanded") as expanded:
        yield {"base": base, "expanded": expanded}


@contextlib.contextmanager
def between(engines: dict[str, Server], folder: Path, *options: str) -> Iterator[Running]:
    with gateway(folder, engines["base"].url, engines["expanded"].url, "--model-name", "m", *options) as running:
        yield running


def stream(client: httpx.Client, prompt: str, arm: str = "expanded", **more: object) -> tuple[int, list[str]]:
    answer = client.post("/v1/completions", json={"model": "m", "prompt": prompt, "stream": True, **more},
                         headers={"x-vocabext-arm": arm})
    return answer.status_code, events(answer.text) if answer.status_code == 200 else [answer.text]


@pytest.mark.slow
def test_an_engine_killed_in_mid_stream_ends_the_answer_with_an_error_and_leaves_the_other_arm_alone(
    engines: dict[str, Server], tmp_path: Path
) -> None:
    with between(engines, tmp_path) as running, running.client() as client:
        other: list[tuple[int, list[str]]] = []
        with running.client() as second:
            beside = threading.Thread(target=lambda: other.append(stream(second, "long", "base", max_tokens=300)))
            beside.start()
            status, parts = stream(client, "fault:die-later", max_tokens=20)
            beside.join()
        assert status == 200
        assert len(parts) == 4  # three tokens, then the error; no [DONE]
        assert json.loads(parts[-1])["error"]["message"] == "the engine of the expanded arm broke the answer off"
        assert other[0][0] == 200
        assert len(other[0][1]) == 301
        status, parts = stream(client, "again")
        assert status == 502
        assert json.loads(parts[0])["error"]["message"] == "the engine of the expanded arm cannot be reached"
        whole = client.post("/v1/completions", json={"prompt": "x"}, headers={"x-vocabext-arm": "expanded"})
        assert whole.status_code == 502
        assert wait_for(lambda: client.get("/health").json()["arms"] == {"base": "ok", "expanded": "down"})
        assert client.get("/health").status_code == 200  # nobody is sent there
        running.order(to="expanded")
        assert client.get("/health").status_code == 503


@pytest.mark.slow
def test_an_engine_that_hangs_is_given_up(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path, "--idle-seconds", "0.5") as running, running.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "fault:hang"})
        assert answer.status_code == 504
        assert answer.json()["error"]["message"] == "the engine of the base arm sent nothing for 0.5 seconds"
        status, parts = stream(client, "fault:hang-later", "base", max_tokens=20)
        assert status == 200
        assert json.loads(parts[-1])["error"]["message"] == (
            "the engine of the base arm went silent in the middle of the answer")
        assert wait_for(lambda: inspect(engines["base"])["running"]["now"] == 0), "the engine still works on them"
        assert stream(client, "fine", "base")[1][-1] == "[DONE]"


@pytest.mark.slow
def test_a_connection_that_was_closed_without_an_answer_loses_no_request(
    engines: dict[str, Server], tmp_path: Path
) -> None:
    with between(engines, tmp_path) as running, running.client() as client:
        status, parts = stream(client, "fault:drop-once", "base")
        assert (status, parts[-1]) == (200, "[DONE]")
        asked = [row for row in inspect(engines["base"])["seen"] if "drop-once" in row["document"]["prompt"]]
        assert len(asked) == 2
        assert not inspect(engines["expanded"])["seen"]


@pytest.mark.slow
def test_a_client_that_goes_away_takes_its_request_along(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path) as running:
        for body in ({"prompt": "x", "stream": True, "max_tokens": 100_000}, {"prompt": "fault:hang"}):
            with running.client() as client, contextlib.suppress(httpx.TimeoutException):
                with client.stream("POST", "/v1/completions", json=body, timeout=0.5) as answer:
                    next(answer.iter_raw())
            assert wait_for(lambda: inspect(engines["base"])["running"]["now"] == 0), "the engine still works on it"
        with running.client() as client:
            assert 'in_flight{arm="base"} 0.0' in client.get("/metrics").text
            assert 'clients_gone_total{arm="base"} 2.0' in client.get("/metrics").text
            assert 'engine_failures_total{arm="base"}' not in client.get("/metrics").text
        assert connections(running.process.pid, engines["base"]) <= 1  # the health check's, kept alive


def connections(process_id: int, engine: Server) -> int:
    """Count a process's open connections to an engine."""
    port = f"{int(engine.url.rpartition(':')[2]):04X}"
    inodes = {str(path.readlink()) for path in Path(f"/proc/{process_id}/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port}") and row[3] == "01" and f"socket:[{row[9]}]" in inodes for row in rows)


@pytest.mark.slow
def test_a_full_queue_is_refused_at_once_and_only_on_its_arm(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path, "--max-in-flight", "2") as running, running.client() as client:
        clients = [running.client() for _ in range(2)]
        threads = [threading.Thread(target=stream, args=(one, "long", "base"), kwargs={"max_tokens": 400})
                   for one in clients]
        for thread in threads:
            thread.start()
        assert wait_for(lambda: running.status()["in_flight"]["base"] == 2)
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "the limit is 2" in answer.json()["error"]["message"]
        assert stream(client, "x", "expanded")[0] == 200
        for thread, one in zip(threads, clients, strict=True):
            thread.join()
            one.close()
        assert wait_for(lambda: running.status()["in_flight"]["base"] == 0)
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.mark.slow
def test_the_policy_survives_a_gateway_that_is_killed(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path) as running:
        running.order(to="expanded", percent=25, mirror_percent=5, reason="trial")
        with running.client() as client, client.stream("POST", "/v1/completions", json={
            "prompt": "x", "stream": True, "max_tokens": 100_000}, headers={"x-vocabext-arm": "base"}) as answer:
            parts = answer.iter_raw()
            next(parts)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
            with pytest.raises(httpx.TransportError):
                list(parts)
        assert wait_for(lambda: inspect(engines["base"])["running"]["now"] == 0), "the engine still works on it"
    with between(engines, tmp_path) as running:
        status = running.status()
        assert (status["expanded_percent"], status["mirror_percent"], status["serial"]) == (25, 5, 1)
        assert status["changes"][-1]["reason"] == "trial"


@pytest.mark.slow
def test_a_state_that_cannot_be_read_is_not_guessed(engines: dict[str, Server], tmp_path: Path) -> None:
    from gateway_rig import cli

    (tmp_path / "state.json").write_text("{")
    done = cli("serve", "gateway", "http://127.0.0.1:1", "http://127.0.0.1:1", "--state", str(tmp_path / "state.json"))
    assert done.returncode == 2
    assert "cannot be read as the state of a gateway" in done.stderr


@pytest.mark.slow
def test_requests_in_flight_are_finished_before_the_gateway_stops(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path) as running:
        found: list[tuple[int, list[str]]] = []
        with running.client() as client:
            thread = threading.Thread(target=lambda: found.append(stream(client, "x", "base", max_tokens=300)))
            thread.start()
            assert wait_for(lambda: running.status()["in_flight"]["base"] == 1)
            running.process.terminate()
            thread.join()
        assert found[0][1][-1] == "[DONE]"
        assert running.process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_an_arm_that_cannot_be_reached_stops_the_start(engines: dict[str, Server], tmp_path: Path) -> None:
    from gateway_rig import cli

    done = cli("serve", "gateway", engines["base"].url, "http://127.0.0.1:1", "--port", "0", "--state",
               str(tmp_path / "state.json"))
    assert done.returncode == 1
    assert "the engine of the expanded arm cannot be reached; start it first" in done.stderr


@pytest.mark.slow
def test_a_record_on_a_full_disk_is_given_up_and_said_to_be(engines: dict[str, Server], tmp_path: Path) -> None:
    with between(engines, tmp_path, "--record", "/dev/full") as running, running.client() as client:
        for _ in range(2):
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    said = (tmp_path / "gateway.err").read_text()
    assert said.count("no more requests are recorded: /dev/full cannot be written (No space left on device)") == 1
