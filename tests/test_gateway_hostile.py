"""Clients that mean harm, or behave as if: honest ones are answered, and a rollback is, within a second.

The second is a bound that the gateway promises, not a comparison of times. All clients are on loopback.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_rig import Running, environment, fake_engine, gateway, inspect, wait_for

from vocabext.serve.engine import Server

MIB = 2**20
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ROLLBACK_SECONDS = 1.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fake_engine(tmp_path_factory.mktemp("engine"), "base", "--model", "m") as found:
        yield found


@pytest.fixture(scope="module")
def strict(engine: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Run a gateway with little patience."""
    options = {"header-seconds": 1, "body-seconds": 1, "total-seconds": 3, "max-connections": 50,
               "max-all-bodies-bytes": 2 * MIB}
    with guarded(tmp_path_factory.mktemp("strict"), engine, *(part for name, value in options.items()
                                                              for part in (f"--{name}", str(value)))) as running:
        yield running


@contextlib.contextmanager
def guarded(folder: Path, engine: Server, *options: str, **more: Any) -> Iterator[Running]:
    with gateway(folder, engine.url, engine.url, "--no-canary", *options, **more) as running:
        yield running


@contextlib.contextmanager
def sockets(running: Running, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connect so many times, and send some bytes on each connection."""
    host, port = running.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(10)
            one.connect((host, int(port)))
            with contextlib.suppress(OSError):
                one.sendall(first)
            found.append(one)
        yield found


def is_closed(one: socket.socket) -> bool:
    """Read what is there; tell whether the other side has closed."""
    one.settimeout(0.01)
    try:
        while one.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def honest(running: Running) -> float:
    """Ask as a client does; returns the seconds."""
    began = time.monotonic()
    with running.client() as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "hello", "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


def roll_back(running: Running) -> None:
    began = time.monotonic()
    assert running.order(rollback=True)["expanded_percent"] == 0
    assert time.monotonic() - began < ROLLBACK_SECONDS


def body_of(prompt: bytes, pad: int = 0) -> bytes:
    return b'{"model":"m","prompt":' + prompt + b" " * pad + b"}"


def request(body: bytes, *, length: int | None = None) -> bytes:
    return HEAD + f"content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def resident(running: Running) -> int:
    pages = int(Path(f"/proc/{running.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def metric(running: Running, name: str) -> float:
    with running.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vocabext_gateway_{name}"))


def closed_all(some: list[socket.socket], seconds: float = 8.0) -> bool:
    return wait_for(lambda: all(map(is_closed, some)), seconds)


@pytest.mark.slow
def test_slow_headers_and_bodies_are_cut_off(strict: Running) -> None:
    late = {why: metric(strict, f'connections_closed_total{{why="{why}"}}') for why in ("header", "body")}
    with sockets(strict, 5) as silent, sockets(strict, 5, HEAD) as heads, \
            sockets(strict, 5, request(b"{", length=1000)) as bodies:
        honest(strict)
        roll_back(strict)
        assert bodies[0].recv(100).startswith(b"HTTP/1.1 408 Request Timeout")
        assert closed_all([*silent, *heads, *bodies])
    assert metric(strict, 'connections_closed_total{why="header"}') == late["header"] + 10
    assert metric(strict, 'connections_closed_total{why="body"}') == late["body"] + 5


@pytest.mark.slow
def test_clients_that_do_not_read_lose_their_places(tmp_path: Path, engine: Server) -> None:
    body = b'{"model":"m","prompt":"' + b"x" * 10 + b'","stream":true,"max_tokens":100000}'
    options = ("--max-in-flight", "4", "--write-seconds", "0.5")
    with fake_engine(tmp_path, "fast", "--model", "m", "--delay", "0") as fast, guarded(
            tmp_path, fast, *options) as running, sockets(running, 4, request(body)) as lazy:
        assert wait_for(lambda: running.status()["in_flight"]["base"] == 4)
        roll_back(running)
        assert wait_for(lambda: running.status()["in_flight"]["base"] == 0, 20)
        honest(running)
        assert wait_for(lambda: inspect(fast)["running"]["now"] == 0), "the engine still works for them"
        assert metric(running, 'connections_closed_total{why="unread"}') == 4
        assert closed_all(lazy)


@pytest.mark.slow
def test_an_answer_that_never_ends_is_ended(strict: Running) -> None:
    with strict.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 100_000})
        assert json.loads(answer.text.split("data: ")[-1])["error"]["message"] == (
            "the answer was not complete after 3 seconds")


GIANTS = {
    "empty prompts": (body_of(b"[" + b'"",' * 300_000 + b'""]'), 400, "300001 prompts, the limit is 128"),
    "empty objects": (body_of(b"[" + b"{}," * 300_000 + b"{}]"), 400, "objects and lists, the limit is 10000"),
    "deep": (body_of(b"[" * 500 + b"]" * 500), 400, "nests 501 deep, the limit is 64"),
    "deeper": (body_of(b"[" * 500_000 + b"]" * 500_000), 400, "no JSON document"),
    "long": (body_of(b'"a"', MIB), 413, f"the limit is {MIB}"),
}


@pytest.mark.slow
def test_giant_requests_are_refused_early_and_in_bounded_memory(strict: Running) -> None:
    running = strict
    with running.client() as client:
        honest(running)
        before = resident(running)
        for _, (body, status, message) in GIANTS.items():
            headers = {"content-type": "application/json"}
            try:
                answer = client.post("/v1/completions", content=body, headers=headers)
            except httpx.TransportError:  # the refusal came while the client was still sending
                continue
            assert (answer.status_code, message in answer.text) == (status, True), (body[:30], answer.text[:200])
        attack = [threading.Thread(target=hammer, args=(running, GIANTS[kind][0], 12))
                  for kind in ("empty prompts", "empty objects") for _ in range(3)]
        for thread in attack:
            thread.start()
        while any(thread.is_alive() for thread in attack):
            roll_back(running)
            honest(running)
        assert resident(running) - before < 128 * MIB


def hammer(running: Running, body: bytes, times: int) -> None:
    with running.client() as client:
        for _ in range(times):
            with contextlib.suppress(httpx.HTTPError):
                client.post("/v1/completions", content=body, headers={"content-type": "application/json"})


@pytest.mark.slow
def test_unfinished_bodies_hold_no_more_than_the_budget(strict: Running) -> None:
    before, refused = resident(strict), metric(strict, 'refused_total{status="503"}')
    with sockets(strict, 40, request(b"{" * (900 * 1024), length=MIB)):
        assert metric(strict, "body_bytes ") <= 2 * MIB
        roll_back(strict)
        honest(strict)  # short bodies do not count
        assert wait_for(lambda: metric(strict, 'refused_total{status="503"}') >= refused + 30)
        assert resident(strict) - before < 40 * MIB
    assert wait_for(lambda: metric(strict, "body_bytes ") == 0)


@pytest.mark.slow
@pytest.mark.parametrize("first", [b"", HEAD], ids=["silent", "half a header"])
def test_idle_connections_leave_room_for_others(strict: Running, first: bytes) -> None:
    crowd(strict, first, 150, 50)


@pytest.mark.fuzz
@pytest.mark.parametrize("first", [b"", HEAD], ids=["silent", "half a header"])
@pytest.mark.parametrize("limit", [500, 1024])
def test_a_thousand_idle_connections_leave_room_for_others(
    tmp_path: Path, engine: Server, first: bytes, limit: int
) -> None:
    with guarded(tmp_path, engine, "--max-connections", str(limit)) as running:
        crowd(running, first, 1000, limit)


def crowd(running: Running, first: bytes, count: int, limit: int) -> None:
    with sockets(running, count, first) as idle:
        for _ in range(10):
            honest(running)
            roll_back(running)
        assert metric(running, "connections ") <= limit
        assert sum(map(is_closed, idle)) >= count - limit


@pytest.mark.slow
def test_a_low_limit_of_descriptors_leaves_some_for_the_rollback(tmp_path: Path, engine: Server) -> None:
    # The limit is the process's own: what `ulimit -n 200` does to a shell.
    command = f"ulimit -n 200; exec {sys.executable} -m vocabext serve gateway {engine.url} {engine.url} " \
              f"--no-canary --port 0 --json --state {tmp_path}/state.json"
    with limited(command, tmp_path) as running, sockets(running, 250, HEAD):
        for _ in range(3):
            roll_back(running)
            honest(running)
    assert "clients may have 34 connections, not 1024" in (tmp_path / "gateway.err").read_text()


@contextlib.contextmanager
def limited(command: str, folder: Path) -> Iterator[Running]:
    with open(folder / "gateway.err", "a") as errors, subprocess.Popen(
            ["sh", "-c", command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            text = ""
            for line in process.stdout:
                text += line
                if line.rstrip() == "}":
                    break
            yield Running(process, json.loads(text), folder / "state.json")
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.slow
def test_many_requests_before_the_first_answer_are_refused(strict: Running) -> None:
    with sockets(strict, 1, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 50) as some:
        assert closed_all(some)
    honest(strict)
