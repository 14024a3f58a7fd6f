import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import tiny_folder

from vocabext.errors import MissingExtraError, ServerError
from vocabext.serve import engine
from vocabext.serve.bench.client import LoadClient
from vocabext.serve.engine import Server, free_port, wait_until_ready
from vocabext.serve.gateway.keeper import engines_of, places_of

ROOT = Path(__file__).resolve().parent.parent
FAKE = Path(__file__).parent / "support" / "fake_server.py"


def fake(tmp_path: Path, mode: str, seconds: float = 0.0) -> Server:
    port = free_port()
    command = [sys.executable, str(FAKE), str(port), mode, str(seconds)]
    return Server(command, f"http://127.0.0.1:{port}", tmp_path / f"{mode}.log", name="the test server")


def members(group: int) -> list[int]:
    return engine.group_members(group)


def wait_for(condition: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_server_is_ready_when_it_is_healthy_and_gone_after_the_block(tmp_path: Path) -> None:
    with fake(tmp_path, "healthy", 0.5) as server:
        group = server.process.pid
        assert wait_until_ready([server], timeout_seconds=30) >= 0.5
        assert os.getpgid(group) == group != os.getpgid(0)
    assert not members(group)
    assert "starting in mode healthy" in server.log_path.read_text()


def test_a_server_that_dies_names_the_cause_and_the_end_of_its_log(tmp_path: Path) -> None:
    with fake(tmp_path, "dies") as server, pytest.raises(ServerError) as caught:
        wait_until_ready([server], timeout_seconds=30)
    head, *tail = str(caught.value).splitlines()
    assert head.startswith("the test server stopped with exit code 1: ValueError: the model needs 80 GiB; the log is")
    assert "Engine core initialization failed" in tail[-1]


def test_a_server_that_hangs_is_given_up_and_stopped(tmp_path: Path) -> None:
    with fake(tmp_path, "hangs") as server:
        group = server.process.pid
        with pytest.raises(ServerError, match="the test server was not ready after 1 seconds; the log is"):
            wait_until_ready([server], timeout_seconds=1)
    assert not members(group)


def test_one_dead_server_of_two_ends_the_waiting(tmp_path: Path) -> None:
    with fake(tmp_path, "hangs") as slow, fake(tmp_path, "dies") as dead, pytest.raises(ServerError, match="80 GiB"):
        wait_until_ready([slow, dead], timeout_seconds=60)


def test_the_whole_group_is_stopped(tmp_path: Path) -> None:
    with fake(tmp_path, "crowd") as server:
        wait_until_ready([server], timeout_seconds=30)
        group = server.process.pid
        assert len(members(group)) == 2
    assert not members(group)


def test_a_group_without_its_leader_is_stopped_too(tmp_path: Path) -> None:
    with fake(tmp_path, "crowd") as server:
        wait_until_ready([server], timeout_seconds=30)
        group = server.process.pid
        os.kill(group, signal.SIGKILL)
        server.process.wait()
        assert len(members(group)) == 1
    assert not members(group)


def test_sigkill_follows_where_sigterm_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STOP_GRACE_SECONDS", 0.5)
    with fake(tmp_path, "stubborn") as server:
        wait_until_ready([server], timeout_seconds=30)
        group = server.process.pid
    assert server.exit_code == -signal.SIGKILL
    assert not members(group)


def test_a_second_interrupt_while_stopping_leaves_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake(tmp_path, "stubborn") as server:
        wait_until_ready([server], timeout_seconds=30)
        group = server.process.pid
        sleep = time.sleep
        calls = iter([KeyboardInterrupt])

        def interrupted(seconds: float) -> None:
            sleep(seconds)
            for error in calls:
                raise error

        monkeypatch.setattr(engine.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.stop()
    assert not members(group)


PARENT = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
from vocabext.serve.engine import Server, wait_until_ready
port, log, fake, handle = sys.argv[1:]
if handle == "handled":
    def stop(number, frame):
        raise SystemExit(143)
    signal.signal(signal.SIGTERM, stop)
with Server([sys.executable, fake, port, "crowd"], f"http://127.0.0.1:{port}", Path(log)) as server:
    wait_until_ready([server], timeout_seconds=30)
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "handle"), [
    (signal.SIGTERM, "handled"), (signal.SIGINT, "plain"), (signal.SIGTERM, "plain"), (signal.SIGKILL, "plain")])
def test_no_signal_to_the_parent_leaves_a_server_behind(
    tmp_path: Path, number: signal.Signals, handle: str
) -> None:
    arguments = [str(free_port()), str(tmp_path / "log"), str(FAKE), handle]
    command = [sys.executable, "-c", PARENT, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        helpers = [pid for pid in members(server) if pid != server]
        parent.send_signal(number)
        try:
            parent.wait(timeout=30)
        finally:
            parent.kill()  # leaving the block waits without a limit
    try:
        # Without a chance to act, the parent cannot end the server's own children; the server can and vLLM's does.
        left = [server] if (number, handle) in ((signal.SIGTERM, "plain"), (signal.SIGKILL, "plain")) else [
            server, *helpers]
        assert wait_for(lambda: not set(left) & set(members(server))), "the server outlived its parent"
    finally:
        for pid in members(server):
            os.kill(pid, signal.SIGKILL)


def test_a_server_that_dies_later_is_noticed(tmp_path: Path) -> None:
    with fake(tmp_path, "dies-later", 1.0) as server:
        wait_until_ready([server], timeout_seconds=30)
        server.check_alive()
        server.process.wait()
        with pytest.raises(ServerError, match="the test server stopped with exit code 7"):
            server.check_alive()


def test_a_port_in_use_is_refused_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}: address already in use; choose another --port"):
            engine.check_port("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_refused_in_one_line() -> None:
    with pytest.raises(ServerError, match=r"cannot listen on 192\.0\.2\.1"):
        engine.free_port("192.0.2.1")


def test_a_missing_vllm_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; run: pip install 'vocabext\[serve\]'"):
        engine.vllm_server(tmp_path, tmp_path / "log")


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cpu_dtype", lambda: "bfloat16")
    monkeypatch.setattr(engine, "require_vllm", lambda: None)
    monkeypatch.setattr(engine, "vllm_device", lambda: "cpu")


@pytest.mark.usefixtures("on_a_cpu")
def test_the_command_is_the_module_with_the_users_flags_last(tmp_path: Path) -> None:
    server = engine.vllm_server("MODEL", tmp_path / "log", served_name="base", flags=["--seed", "1"])
    assert server.command[:5] == [sys.executable, "-m", engine.SERVER_MODULE, "--model", "MODEL"]
    assert server.command[-5:] == ["--enforce-eager", "--dtype", "bfloat16", "--seed", "1"]
    assert server.command[server.command.index("--host") + 1] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.command[server.command.index('--port') + 1]}"


@pytest.mark.usefixtures("on_a_cpu")
def test_a_server_for_everybody_is_reached_locally(tmp_path: Path) -> None:
    assert engine.vllm_server("MODEL", tmp_path / "log", host="0.0.0.0").url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(("cpuinfo", "expected"), [
    ("model name : x\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", "bfloat16"),
    ("flags : fpu avx2 avx512_bf16\n", "bfloat16"), ("Features : fp asimd bf16\n", "bfloat16"),
    ("flags : fpu avx2\nbugs : bf16\n", "float32")])
def test_bfloat16_is_only_for_processors_that_multiply_it(tmp_path: Path, cpuinfo: str, expected: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert engine.cpu_dtype(path) == expected
    assert engine.cpu_dtype(tmp_path / "nowhere") == "bfloat16"


@pytest.mark.parametrize(("flags", "value"), [
    (["--max-model-len", "9"], "9"), (["--max_model_len=9"], "9"), (["--seed", "1"], None), ([], None),
    (["--max-model-len"], "")])
def test_the_value_of_a_flag_is_found_however_it_is_spelled(flags: list[str], value: str | None) -> None:
    assert engine.flag_value(flags, "max-model-len") == value


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(("flags", "expected"), [
    ([], ["--enforce-eager", "--dtype", "bfloat16"]),
    (["--dtype=float32"], ["--enforce-eager"]),
    (["--no_enforce_eager"], ["--dtype", "bfloat16"]),
])
def test_defaults_give_way_to_the_users_flags(flags: list[str], expected: list[str]) -> None:
    assert engine.default_flags(flags, "cpu") == expected
    assert engine.default_flags(flags, "gpu") == []


def test_the_environment_sends_nothing_home_and_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    environment = engine.server_environment("cpu")
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine.server_environment("gpu")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert engine.server_environment("cpu")["VLLM_CPU_KVCACHE_SPACE"] == "9"


@pytest.mark.parametrize(("lines", "cause"), [
    (["fine", "(Worker pid=9) ERROR 11-23 10:00:00 [x.py:3] torch.OutOfMemoryError: tried to allocate 9 GiB"],
     "torch.OutOfMemoryError: tried to allocate 9 GiB"),
    (["RuntimeError: Engine core initialization failed. See root cause above."], ""),
    (["  [--seed SEED]", "api_server.py: error: unrecognized arguments: --nonsense"],
     "unrecognized arguments: --nonsense"),
    (["x.ValidationError: 1 validation error for Model", "  Value error, too long"],
     "x.ValidationError: 1 validation error for Model: Value error, too long"),
    (["all is well"], ""),
    ([], ""),
])
def test_the_likely_cause_is_the_first_real_exception(lines: list[str], cause: str) -> None:
    assert engine.likely_cause(lines) == cause


@pytest.mark.parametrize(("code", "text"), [
    (3, "with exit code 3"), (-15, "by SIGTERM"), (-9, "by SIGKILL (out of memory?)")])
def test_the_way_a_process_ended_is_said_in_words(code: int, text: str) -> None:
    assert engine.describe_exit(code) == text


# -- the package itself -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("child", ["client", "engine"])
def test_a_child_process_finds_the_package_whatever_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(engine, "require_vllm", lambda: None)
    if child == "client":
        environment = LoadClient(tmp_path / "log").environment
    else:
        tiny_folder(tmp_path / "model")
        places = places_of("http://base", str(tmp_path / "model"), one_engine=False)
        environment = engines_of(places, one_engine=False, log_folder=tmp_path, served_name="m")["expanded"].environment
    code = "import importlib.util as u; print(u.find_spec('vocabext.serve.gateway.ban').origin)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)
    assert done.stdout.strip() == str(ROOT / "vocabext" / "serve" / "gateway" / "ban.py"), done.stderr


def test_the_folder_is_imported_under_one_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"this package was imported as serve; import vocabext\.serve"):
        importlib.import_module("serve")
