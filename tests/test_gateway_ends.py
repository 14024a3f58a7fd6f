"""Engines that die, and gateways that are told to end, or are killed."""

import contextlib
import json
import logging
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from gateway_rig import Running, cli, gateway, wait_for, with_fake_vllm
from tiny_checkpoints import tiny_folder

from vocabext.errors import ServerError, UsageError
from vocabext.files.scratch import LOCK_NAME, SETTLED_SECONDS, scratch_folder
from vocabext.serve.engine import group_members
from vocabext.serve.gateway.admin import send_order
from vocabext.serve.gateway.log import MOST_LINES, WINDOW_SECONDS, GatewayLog
from vocabext.serve.gateway.policy import Policy
from vocabext.serve.gateway.state import State, read_state

ASK = {"prompt": "hello", "max_tokens": 2}
EXPANDED = {"x-vocabext-arm": "expanded"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model") / "model"))


@contextlib.contextmanager
def started(model: str, folder: Path, *options: str, **more: str) -> Iterator[Running]:
    """Run a gateway with two engines of its own."""
    (folder / "temp").mkdir(exist_ok=True)
    with gateway(folder, model, model, *options, TMPDIR=str(folder / "temp"), **more) as running:
        yield running


def engine_groups(running: Running) -> list[int]:
    return [pid for group in running.document["process_ids"].values() for pid in group_members(group)]


# -- an engine dies ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_engine_that_is_killed_is_reaped_with_its_core_and_serves_again(model: str, tmp_path: Path) -> None:
    with started(model, tmp_path) as running, running.client() as client:
        server = running.document["process_ids"]["expanded"]
        core = next(pid for pid in group_members(server) if pid != server)
        os.kill(server, signal.SIGKILL)
        assert wait_for(lambda: running.status()["engines"]["expanded"]["restarts"] == 1)
        assert wait_for(lambda: client.post("/v1/completions", json=ASK, headers=EXPANDED).status_code == 200)
        assert wait_for(lambda: not psutil.pid_exists(core))  # whoever is process 1 here reaps it
        assert not psutil.pid_exists(server)  # not even a zombie
        assert running.status()["engines"]["expanded"]["process_id"] != server
        assert wait_for(lambda: client.get("/health").json()["arms"] == {"base": "ok", "expanded": "ok"})
        metrics = client.get("/metrics").text
        assert 'vocabext_gateway_engine_restarts_total{arm="expanded"} 1.0' in metrics
        assert 'vocabext_gateway_engine_restarts_total{arm="base"} 0.0' in metrics
    said = (tmp_path / "gateway.err").read_text()
    assert "the expanded engine stopped by SIGKILL (out of memory?)" in said
    assert "its last lines:\n  starting with" in said
    assert "the expanded engine is started again in 1 seconds" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_engine_that_dies_at_every_start_is_tried_again_less_and_less_often(model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with started(model, tmp_path, "--", "--dies-if", str(broken)) as running, running.client() as client:
        broken.touch()
        os.kill(running.document["process_ids"]["base"], signal.SIGKILL)
        assert wait_for(lambda: "is started again in 2 seconds" in (tmp_path / "gateway.err").read_text(), 20)
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=ASK, headers=EXPANDED).status_code == 200
        broken.unlink()
        assert wait_for(lambda: client.get("/health").status_code == 200, 20)
    said = (tmp_path / "gateway.err").read_text()
    assert "the base engine stopped with exit code 1: ValueError: the model needs 80 GiB" in said


@pytest.mark.slow
def test_without_restarts_the_gateway_ends_with_the_reason(model: str, tmp_path: Path) -> None:
    with started(model, tmp_path, "--no-restart") as running:
        os.kill(running.document["process_ids"]["base"], signal.SIGKILL)
        assert running.process.wait(timeout=30) == 1
        assert not engine_groups(running)
    said = (tmp_path / "gateway.err").read_text()
    assert "error: the base engine stopped by SIGKILL (out of memory?); the log is" in said
    assert "Traceback" not in said


# -- the gateway is told to end ------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_every_signal_that_ends_ends_the_gateway_and_its_engines(
    number: signal.Signals, model: str, tmp_path: Path
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # where tests run in a shell's background, some are ignored
    try:
        with started(model, tmp_path) as running:
            assert len(engine_groups(running)) == 4
            running.process.send_signal(number)
            assert running.process.wait(timeout=30) == 128 + number
            assert not engine_groups(running)
    finally:
        signal.signal(number, before)
    assert "Traceback" not in (tmp_path / "gateway.err").read_text()
    assert json.loads(running.state.read_text())["admin_url"] == ""
    assert not list((tmp_path / "temp").glob("vocabext-*"))


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_the_gateway_and_its_engines(model: str, tmp_path: Path) -> None:
    terminal, inner = pty.openpty()
    state = tmp_path / "state.json"
    command = [sys.executable, "-c", "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
               "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])", "vocabext", "serve", "gateway", model,
               model, "--port", "0", "--state", str(state), "--logs", str(tmp_path / "logs")]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=with_fake_vllm(),
                          start_new_session=True) as process:
        os.close(inner)
        said = b""
        while b"ready; Ctrl-C stops it" not in said:
            said += os.read(terminal, 4096)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(children) == 4
        os.close(terminal)
        assert process.wait(timeout=30) == 128 + signal.SIGHUP
    assert not [pid for pid in children if psutil.pid_exists(pid)]
    assert json.loads(state.read_text())["admin_url"] == ""


@pytest.mark.slow
def test_a_signal_while_engines_start_leaves_none_behind(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vocabext", "serve", "gateway", model, model, "--port", "0", "--state",
               str(tmp_path / "state.json"), "--logs", str(tmp_path / "logs")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=with_fake_vllm(), text=True) as process:
        me = psutil.Process(process.pid)
        assert wait_for(lambda: len(me.children(recursive=True)) >= 2)
        children = me.children(recursive=True)
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in said) == (129, False)
    assert wait_for(lambda: not [child for child in children if child.is_running()])


# -- what a killed gateway leaves ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_next_start_removes_what_a_killed_gateway_left(model: str, tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    with started(model, tmp_path) as running:
        groups = list(running.document["process_ids"].values())
        running.process.kill()
        running.process.wait()
    assert wait_for(lambda: not [pid for group in groups for pid in group_members(group)])
    (left,) = temp.glob("vocabext-gateway-*")
    os.utime(left, (1, 1))
    killed = read_state(running.state)
    assert killed.is_killed()
    with pytest.raises(ServerError, match=rf"its process {running.process.pid} has ended without a word"):
        send_order(killed, {"rollback": True})
    with started(model, tmp_path) as running:
        assert not left.exists()
        assert len(list(temp.glob("vocabext-gateway-*"))) == 1
        assert read_state(running.state).token != killed.token
        assert running.swap("--rollback")["policy"] == "all requests to base"


def test_only_folders_that_nobody_holds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("vocabext-x-dead", "vocabext-x-new", "vocabext-x-foreign", "elsewhere"):
        (tmp_path / name).mkdir()
        if name != "vocabext-x-foreign":
            (tmp_path / name / LOCK_NAME).touch()
        if name != "vocabext-x-new":
            os.utime(tmp_path / name, (1, 1))
    (tmp_path / "vocabext-x-link").symlink_to(tmp_path / "elsewhere")
    with scratch_folder("vocabext-x-") as first:
        os.utime(first, (time.time() - 2 * SETTLED_SECONDS,) * 2)
        with scratch_folder("vocabext-x-") as second:
            assert sorted(path.name for path in tmp_path.iterdir()) == sorted([
                "vocabext-x-new", "vocabext-x-foreign", "vocabext-x-link", "elsewhere", first.name, second.name])
    with pytest.raises(ServerError), scratch_folder("vocabext-x-") as useful:
        raise ServerError("its log is there")
    assert useful.is_dir()
    os.utime(useful, (1, 1))
    with scratch_folder("vocabext-x-"):
        assert not useful.exists()


# -- orders --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def listener(answer: bytes) -> Iterator[tuple[str, list[str]]]:
    """Listen where a gateway was; gives the address, and everything that comes."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            heard.append(f"{self.requestline} {self.headers} {self.rfile.read(length).decode()}")
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", heard
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", [b'{"nonce": "a", "proof": "b"}', b'{"nonce": "a", "proof": "\xc3\xa9"}', b"[]", b"",
                                    b"[" * 100_000])
def test_an_order_tells_nothing_to_whoever_holds_the_port_of_a_killed_gateway(answer: bytes, tmp_path: Path) -> None:
    with listener(answer) as (url, heard):
        state = State(tmp_path / "state.json", Policy(), admin_url=url)
        with pytest.raises(ServerError, match=r"is not the gateway of|no gateway answers"):
            send_order(state, {"rollback": True, "reason": "a reason"})
    assert heard
    assert not [text for text in heard if state.token in text or "reason" in text]


@pytest.mark.parametrize("url", [
    "file:///etc/passwd", "https://127.0.0.1:1", "http://192.0.2.1:80", "http://example.org:80", "http://127.0.0.1",
    "http://me@127.0.0.1:1", "http://127.0.0.1:1/path", "http://[::1", "ftp://127.0.0.1:1"])
def test_an_admin_address_that_is_not_http_on_loopback_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has the admin address .* nothing was sent"):
        send_order(State(tmp_path / "state.json", Policy(), admin_url=url), None)


# -- the state file ------------------------------------------------------------------------------------------------

GOOD = {"artifact": "gateway-state", "version": 1, "policy": Policy().to_json(), "serial": 0, "changes": [],
        "admin_url": "", "token": "abc"}


@pytest.mark.parametrize("change", [
    '"serial": 1e999', '"serial": ' + "[" * 900 + "]" * 900, '"changes": ' + "[" * 900 + "]" * 900,
    '"changes": [{"time": "a", "by": ' + "[" * 900 + "]" * 900 + ', "reason": "", "serial": 1}]', '"changes": [5]',
    '"token": "caf\\u00e9"', '"token": "a\\nb"', '"token": ""', '"process_started": "x"', '"process_id": 1e999',
    '"policy": {"expanded_percent": 1e999, "mirror_percent": 0, "salt": ""}', '"serial": ' + "9" * 5000,
    '"policy": ' + "[" * 100_000])
def test_a_state_that_is_damaged_is_one_line(change: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(json.dumps(GOOD)[:-1] + f", {change}}}")
    with pytest.raises(UsageError, match="move it away to start with all requests on base"):
        read_state(path)


def test_a_state_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is no file"):
        read_state(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 2_000_000)
    with pytest.raises(UsageError, match="has more than"):
        read_state(tmp_path / "large")


# -- the log -------------------------------------------------------------------------------------------------------

def test_lines_of_the_log_have_a_time_and_those_alike_are_counted() -> None:
    now, lines = [0.0], list[str]()
    written = GatewayLog(lines.append, clock=lambda: now[0])
    log = logging.getLogger("test.journal")
    with written.listening():
        for _ in range(100):
            log.warning("Invalid HTTP request received.")
        written.note("something else")
        assert len(lines) == MOST_LINES + 1
        assert all(datetime.fromisoformat(line.split()[0]).tzinfo for line in lines)
        now[0] = WINDOW_SECONDS
        written.flush()
        assert lines[-1].endswith("95 more lines like this were left out: test.journal: Invalid HTTP request received.")
        for i in range(1000):
            written.note(f"kind {i}")
        assert len(lines) < 300
    assert "more lines like this were left out: (of several kinds)" in lines[-1]
    log.warning("after the end")
    assert "after the end" not in lines[-1]


def test_an_error_is_logged_without_its_text() -> None:
    lines: list[str] = []
    with GatewayLog(lines.append).listening():
        try:
            raise ValueError("a secret of a client")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\nof a secret")
    assert len(lines) == 1
    assert "Exception in ASGI application (ValueError at test_gateway_ends.py:" in lines[0]
    assert "secret" not in lines[0]


@pytest.mark.slow
def test_malformed_requests_do_not_fill_the_log(model: str, tmp_path: Path) -> None:
    with started(model, tmp_path) as running:
        host, port = running.url.removeprefix("http://").split(":")
        for _ in range(30):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(b"NONSENSE\r\n\r\n")
                assert b"400" in connection.recv(100)
        done = cli("serve", "swap", "--state", str(running.state))
        assert done.returncode == 0
    said = [line for line in (tmp_path / "gateway.err").read_text().splitlines() if "Invalid HTTP" in line]
    assert len(said) == MOST_LINES + 1
    assert "25 more lines like this were left out" in said[-1]
