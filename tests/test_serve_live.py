"""The whole comparison against planted servers, under vLLM's real client: what is planted must be found."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_bench import FAKE, run_comparison

from vocabext.errors import ServerError
from vocabext.serve.bench import pool
from vocabext.serve.bench import stage as bench
from vocabext.serve.bench.client import LoadClient
from vocabext.serve.bench.pool import BASE, EXPANDED
from vocabext.serve.bench.scenarios import DECODE
from vocabext.serve.engine import group_members, running_children

pytestmark = [
    pytest.mark.vllm, pytest.mark.fuzz,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadClient]:
    with LoadClient(tmp_path_factory.mktemp("client") / "client.log") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SETTLE_SECONDS", 0.0)


Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(client: LoadClient, tmp_path: Path) -> Measure:
    return functools.partial(run_comparison, client, tmp_path)


def verdict(document: dict[str, Any], name: str = "request_seconds") -> str:
    return str(document["points"][0]["metrics"][name]["verdict"])


def test_a_server_with_a_fixed_delay_is_slower(measure: Measure) -> None:
    found = measure(base="prefill=0.05", expanded="prefill=0.05 delay=0.03")
    assert verdict(found) == "slower"
    assert found["points"][0]["metrics"]["request_seconds"]["speedup"] < 0.8
    assert found["state"] == "complete"


def test_a_server_that_is_a_tenth_faster_is_faster_and_the_base_against_itself_is_not(measure: Measure) -> None:
    found = measure(base="prefill=0.11 wander=0.01", expanded="prefill=0.1 wander=0.01")
    metric = found["points"][0]["metrics"]["request_seconds"]
    assert metric["verdict"] == "faster", metric
    assert metric["noise_interval"][0] <= 1.05
    assert metric["noise_interval"][1] >= 0.95


def test_two_equal_servers_make_no_difference(measure: Measure) -> None:
    assert verdict(measure(base="prefill=0.05 wander=0.02", expanded="prefill=0.05 wander=0.02")) == "no difference"


def test_answers_and_times_to_the_first_token_are_what_was_planted(measure: Measure) -> None:
    found = measure(pairs=1, config={"scenario": (DECODE,), "concurrency": (2,)}, base="prefill=0.03 decode=0.01")
    (point,) = found["points"]
    assert point["base"]["output_tokens_per_run"] == point["base"]["output_characters_per_run"] == 4 * 4
    assert 0.03 <= point["metrics"]["ttft_seconds"]["base"] < 0.2
    assert point["metrics"]["request_seconds"]["base"] >= 0.03 + 3 * 0.01
    assert found["answers_below_wanted"] == {"base": 4, "expanded": 4}  # half as many tokens as characters, and no more


def test_requests_at_a_rate_take_as_long_as_their_arrival(measure: Measure) -> None:
    found = measure(pairs=1, config={"concurrency": (), "rate": (20.0,), "target_request_seconds": 0.5})
    runs = [run for run in found["runs"] if run["role"] == "base"]
    assert all(run["request_rate"] == 20.0 and run["concurrency"] is None for run in runs)
    assert all(0.1 < run["duration_seconds"] < 2 for run in runs)
    assert found["points"][0]["base"]["requests_within_target"] == 2 * 4  # base, and base again


def test_failed_requests_are_counted_and_shown(measure: Measure) -> None:
    found = measure(pairs=2, expanded="fail_every=4")
    (point,) = found["points"]
    assert point["base"]["failed_requests"] == 0
    assert 1 <= point["expanded"]["failed_requests"] < point["expanded"]["requests"] == 8
    assert point["expanded"]["errors"]
    assert point["metrics"]["request_seconds"]["left_out"] == point["expanded"]["failed_requests"]


def test_a_prompt_longer_than_the_context_of_the_server_is_one_clear_line(measure: Measure, tmp_path: Path) -> None:
    with pytest.raises(ServerError) as caught:
        measure(pairs=1, base="context=5", expanded="context=5")
    assert "the base server" in str(caught.value).splitlines()[0]
    assert "Bad Request" in str(caught.value).splitlines()[0]
    assert not running_children or all(child.name == "the load generator" for child in running_children)


def test_a_server_killed_in_mid_run_keeps_what_there_is_and_the_next_run_goes_on(
    measure: Measure, tmp_path: Path
) -> None:
    # One prompt to look at, warm-up (1 + 2), then 1 + 4 per run: the server dies in the third round.
    with pytest.raises(ServerError) as caught:
        measure(pairs=5, expanded="die_after=18")
    line = str(caught.value).splitlines()[0]
    assert "runs are kept in" in line
    assert "the same command goes on from there: the expanded server stopped with exit code 9" in line
    assert "torch.OutOfMemoryError: planted" in line
    partial = json.loads((tmp_path / "bench.json").read_text())
    assert partial["state"] == "partial"
    assert 6 <= len(partial["runs"]) < 15
    assert "the expanded server stopped" in partial["failures"][0]["message"]
    assert partial["points"][0]["metrics"]["request_seconds"]["verdict"] == "too few rounds"
    assert [child.name for child in running_children] == ["the load generator"]  # no orphans

    whole = measure(pairs=5)
    assert (whole["state"], len(whole["runs"]), whole["resumed"]) == ("complete", 15, 1)
    assert whole["dropped_runs"] == len(partial["runs"]) % 3
    assert whole["failures"] == partial["failures"]
    written = json.loads((tmp_path / "bench.json").read_text())["runs"]
    kept = [run for run in written if run in partial["runs"]]
    assert len(kept) == len(partial["runs"]) - whole["dropped_runs"]


def test_restarting_between_the_models_measures_the_same(measure: Measure) -> None:
    found = measure(pairs=1, config={"one_at_a_time": True}, base="prefill=0.05", expanded="prefill=0.02")
    assert found["points"][0]["metrics"]["request_seconds"]["speedup"] > 1.5
    assert found["notes"]["server_starts"] == 3
    assert any("one server at a time, restarted" in line for line in found["method"])


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import live_bench
from vocabext.serve.bench.client import LoadClient
folder = Path({folder!r})
print("started", flush=True)
with LoadClient(folder / "client.log") as client:
    client.wait_until_ready()
    live_bench.run_comparison(client, folder, pairs=50, base="prefill=0.05", expanded="prefill=0.05")
"""


@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_signal_in_mid_run_leaves_results_and_no_orphans(tmp_path: Path, name: str) -> None:
    script = SCRIPT.format(tests=str(FAKE.parent), folder=str(tmp_path))
    script = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + script
    environment = {**os.environ, "PYTHONPATH": str(FAKE.parents[2])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "bench.json").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        children = {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
                    if _parent(path) == process.pid}
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert len(children) >= 2
    assert not [pid for group in children for pid in group_members(group)]
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["state"] == "partial"
    assert kept["runs"]


def _parent(path: Path) -> int:
    try:
        return int(path.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_the_constants_of_the_round_are_the_ones_tested() -> None:
    assert bench.ROUND == (BASE, EXPANDED, BASE)
