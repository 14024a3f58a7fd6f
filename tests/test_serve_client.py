import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vocabext.errors import ServerError
from vocabext.serve.bench.client import Job, LoadClient, arguments, load_from, write_prompts
from vocabext.serve.engine import Server

JOB = Job("http://127.0.0.1:1", "base", "/prompts.jsonl", 2, (7, 9), 3)
RESULT = {
    "duration": 2.0, "latencies": [1.0, 0.0], "ttfts": [0.25, 0.0], "generated_texts": ["four", ""],
    "input_lens": [11, 1], "output_lens": [7, 0], "errors": ["", "Traceback ...\n  File x\nClientOSError: reset\n"],
}

# Stands in for the child: answers every job with the file it is given, or does what the file's name says.
CHILD = """
import json, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print("noise on stderr", file=sys.stderr)
    if sys.argv[1] == "dies":
        sys.exit("ImportError: no such thing")
    if sys.argv[1] == "hangs":
        time.sleep(600)
    print(sys.argv[1], flush=True)
"""


def client(tmp_path: Path, answer: dict[str, Any] | str) -> LoadClient:
    made = LoadClient(tmp_path / "client.log")
    made.command = [sys.executable, "-c", CHILD, answer if isinstance(answer, str) else json.dumps(answer)]
    return made


def server(*, alive: bool = True) -> Server:
    made = Server(["server"], "http://127.0.0.1:1", Path(os.devnull), name="the base server")
    made._process = SimpleNamespace(poll=lambda: None if alive else 9)  # type: ignore[assignment]
    return made


def test_failed_requests_are_kept_apart() -> None:
    load = load_from(RESULT)
    assert load.request_seconds == (1.0, None)
    assert load.ttft_seconds == (0.25, None)
    assert load.output_characters == (4, 0)
    assert load.num_failed == 1
    assert load.errors == ("ClientOSError: reset",)


def test_a_job_becomes_a_command_line_without_a_tokenizer() -> None:
    line = arguments(JOB)
    assert "--skip-tokenizer-init" in line
    assert "--disable-shuffle" in line
    assert line[line.index("--max-concurrency") + 1] == "3"
    assert "--request-rate" not in line
    at_a_rate = arguments(dataclasses.replace(JOB, concurrency=None, request_rate=2.5, seed=4))
    assert at_a_rate[at_a_rate.index("--request-rate") + 1] == "2.5"
    assert at_a_rate[at_a_rate.index("--seed") + 1] == "4"
    assert "--max-concurrency" not in at_a_rate


def test_prompts_are_written_one_per_line(tmp_path: Path) -> None:
    path = write_prompts(["one\ntwo", "three"], tmp_path, "decode")
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == ["one\ntwo", "three"]


def test_jobs_come_back_as_loads(tmp_path: Path) -> None:
    with client(tmp_path, RESULT) as running:
        running.wait_until_ready()
        running.wait_until_ready()  # asking twice does not wait for a second sign
        assert running.run(JOB, server()).num_failed == 1
        assert running.run(JOB, server()).duration_seconds == 2.0
    assert "noise on stderr" in (tmp_path / "client.log").read_text()


def test_a_child_that_dies_is_an_error_with_its_log(tmp_path: Path) -> None:
    with client(tmp_path, "dies") as running:
        running.wait_until_ready()
        with pytest.raises(ServerError, match="the load generator stopped: ImportError: no such thing; the log is"):
            running.run(JOB, server())


def test_a_server_that_dies_under_load_is_noticed(tmp_path: Path) -> None:
    with client(tmp_path, "hangs") as running:
        running.wait_until_ready()
        with pytest.raises(ServerError, match="the base server stopped with exit code 9"):
            running.run(JOB, server(alive=False))


@pytest.mark.slow
def test_a_run_has_an_end(tmp_path: Path) -> None:
    with client(tmp_path, "hangs") as running:
        running.wait_until_ready()
        with pytest.raises(ServerError, match="did not answer within 1 seconds"):
            running.run(JOB, server(), timeout_seconds=1)


def test_a_run_in_which_every_request_failed_is_an_error(tmp_path: Path) -> None:
    failed = {**RESULT, "latencies": [0.0, 0.0], "errors": ["Not Found", "Not Found"]}
    with client(tmp_path, failed) as running:
        running.wait_until_ready()
        with pytest.raises(ServerError, match=r"every request to the base server failed \(Not Found\)"):
            running.run(JOB, server())


def test_a_failure_of_vllms_client_is_passed_on(tmp_path: Path) -> None:
    with client(tmp_path, {"failure": "ValueError: bad url"}) as running:
        running.wait_until_ready()
        with pytest.raises(ServerError, match="vLLM's benchmark client failed: ValueError: bad url"):
            running.run(JOB, server())


def test_a_job_before_the_child_is_ready_waits_for_it(tmp_path: Path) -> None:
    with client(tmp_path, RESULT) as running:
        assert running.run(JOB, server()).duration_seconds == 2.0
