"""Fake engines and real gateways, each a process of its own, for the gateway's tests."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from vocabext.serve.engine import Server, free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_vllm.py")
INSTALLED = Path(__file__).with_name("installed")


@contextlib.contextmanager
def fake_engine(folder: Path, name: str, *options: str) -> Iterator[Server]:
    """Run a fake vLLM server."""
    port = free_port()
    command = [sys.executable, str(FAKE), str(port), name, *options]
    with Server(command, f"http://127.0.0.1:{port}", folder / f"{name}.log", name=name) as server:
        wait_until_ready([server], timeout_seconds=30)
        yield server


@dataclass
class Running:
    """A gateway that runs.

    Attributes:
        process: Its process.
        document: What it said when it was ready.
        state: Its state file.
    """

    process: subprocess.Popen[str]
    document: dict[str, Any]
    state: Path

    @property
    def url(self) -> str:
        """Where it listens, without `/v1`."""
        return str(self.document["url"]).removesuffix("/v1")

    def client(self, **options: Any) -> httpx.Client:
        """Return a client of the gateway."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30, **options)

    def swap(self, *arguments: str) -> dict[str, Any]:
        """Run `vocabext serve swap`."""
        done = cli("serve", "swap", "--state", str(self.state), "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def order(self, **order: Any) -> dict[str, Any]:
        """Give an order to the admin endpoint, without the start of a command."""
        state = json.loads(self.state.read_text())
        answer = httpx.post(f"{state['admin_url']}/swap", json=order, headers={"x-vocabext-token": state["token"]},
                            trust_env=False)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def status(self) -> dict[str, Any]:
        """Ask the admin endpoint where the gateway stands."""
        state = json.loads(self.state.read_text())
        answer = httpx.get(f"{state['admin_url']}/status", headers={"x-vocabext-token": state["token"]},
                           trust_env=False)
        return dict(answer.json())


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command of ours."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def with_fake_vllm(**more: str) -> dict[str, str]:
    """Return the environment of a command of ours in which `vllm` is the one of tests/support/installed."""
    return environment(PYTHONPATH=f"{INSTALLED}{os.pathsep}{ROOT}", **more)


def cli(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run `vocabext`."""
    return subprocess.run([sys.executable, "-m", "vocabext", *arguments], capture_output=True, text=True,
                          env=environment(**more), timeout=120, check=False)


@contextlib.contextmanager
def gateway(
    folder: Path, base: str, expanded: str, *options: str, key: str = "", timeout_seconds: float = 60,
    real_engines: bool = False, **more: str
) -> Iterator[Running]:
    """Run `vocabext serve gateway`; engines that it starts are fakes, unless asked otherwise."""
    found = environment if real_engines else with_fake_vllm
    state = folder / "state.json"
    command = [sys.executable, "-m", "vocabext", "serve", "gateway", base, expanded, "--port", "0", "--state",
               str(state), "--json", *options]
    with open(folder / "gateway.err", "a") as errors, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=found(VOCABEXT_API_KEY=key, **more),
    ) as process:
        try:
            text, deadline = "", time.monotonic() + timeout_seconds
            assert process.stdout is not None
            for line in process.stdout:
                text += line
                if line.rstrip() == "}" or time.monotonic() > deadline:
                    break
            assert text.strip(), (folder / "gateway.err").read_text()
            yield Running(process, json.loads(text), state)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def inspect(engine: Server) -> dict[str, Any]:
    """Ask a fake engine what it has seen."""
    return dict(httpx.get(f"{engine.url}/inspect", trust_env=False).json())


def events(text: str) -> list[str]:
    """Return the data of a stream's events."""
    return [part.removeprefix("data:").strip() for part in text.split("\n\n") if part.startswith("data:")]


def text_of(stream: str) -> str:
    """Put the text of a stream together."""
    pieces = []
    for data in events(stream):
        if data != "[DONE]":
            for choice in json.loads(data).get("choices", ()):
                pieces.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
    return "".join(pieces)
