"""A real vLLM server, started, asked, put under load and stopped."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoints import TEXT, tiny_folder

from vocabext.serve.bench.answers import plan_answers
from vocabext.serve.bench.client import Job, LoadClient, write_prompts
from vocabext.serve.bench.stage import agreement_of
from vocabext.serve.engine import Server, ask_local, group_members
from vocabext.serve.model import load_encoder

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def started(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """`vocabext serve start`, and what it wrote to stdout when it was ready."""
    log = tmp_path_factory.mktemp("logs") / "server.log"
    command = [sys.executable, "-m", "vocabext", "serve", "start", str(model), "--port", "0", "--log", str(log),
               "--json", "--", "--max-num-seqs", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line.rstrip() == "}":
                break
        try:
            yield process, json.loads(text)
        finally:
            process.terminate()


@pytest.fixture
def server(started: tuple[subprocess.Popen[str], Any]) -> Server:
    """The running server as the load generator wants to see it."""
    document = started[1]
    found = Server([], document["url"].removesuffix("/v1"), Path(document["log"]))
    found._process = SimpleNamespace(poll=started[0].poll)  # type: ignore[assignment]
    return found


def test_it_answers(started: tuple[subprocess.Popen[str], Any], server: Server) -> None:
    name = started[1]["model"]
    answer = ask_local(f"{server.url}/v1/completions", {
        "model": name, "prompt": "the heart", "max_tokens": 5, "temperature": 0}).json()
    assert answer["usage"]["prompt_tokens"] >= 2
    assert 1 <= answer["usage"]["completion_tokens"] <= 5


def test_it_tokenizes_as_the_folder_does(
    started: tuple[subprocess.Popen[str], Any], server: Server, model: Path
) -> None:
    found = agreement_of(server, started[1]["model"], TEXT, load_encoder(model))
    assert found == {"prompts": len(TEXT), "agreeing": len(TEXT)}


def test_vllms_own_client_puts_load_on_it(
    started: tuple[subprocess.Popen[str], Any], server: Server, tmp_path: Path
) -> None:
    path = write_prompts(TEXT[:3], tmp_path, "decode")
    job = Job(server.url, started[1]["model"], str(path), 3, (6, 5, 4), 2)
    with LoadClient(tmp_path / "client.log") as client:
        client.wait_until_ready()
        load = client.run(job, server)
        assert load.num_failed == 0
        assert load.output_tokens == (6, 5, 4)
        assert all(0 < first < whole for first, whole in zip(load.ttft_seconds, load.request_seconds, strict=True)
                   if first is not None and whole is not None)
        assert load.output_characters == tuple(len(text) for text in load.texts)
        at_a_rate = client.run(dataclasses.replace(job, concurrency=None, request_rate=20.0), server)
        assert at_a_rate.num_failed == 0
        again = client.run(dataclasses.replace(job, output_tokens=(1, 1, 1)), server)
        assert again.output_tokens == (1, 1, 1)


def test_it_says_how_many_tokens_an_answer_takes(started: tuple[subprocess.Popen[str], Any], server: Server) -> None:
    plan = plan_answers(server, started[1]["model"], TEXT[:2], 12, most_tokens=6)
    for prompt, tokens, characters in zip(TEXT, plan.tokens, plan.characters, strict=False):
        answer = ask_local(f"{server.url}/v1/completions", {
            "model": started[1]["model"], "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens,
            "ignore_eos": True, "temperature": 0}).json()
        assert len(answer["choices"][0]["text"]) == characters


def test_sigterm_stops_all_of_it(started: tuple[subprocess.Popen[str], Any]) -> None:
    process, document = started
    group = document["process_id"]
    assert len(group_members(group)) >= 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not group_members(group)
