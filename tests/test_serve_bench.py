import contextlib
import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import edit_json, tiny_folder

from vocabext.corpus import Document
from vocabext.errors import ServerError, UsageError
from vocabext.serve.bench import pool
from vocabext.serve.bench import stage as bench
from vocabext.serve.bench.client import Load
from vocabext.serve.bench.journal import Journal, Pass
from vocabext.serve.bench.pool import BASE, EXPANDED, ServerPool
from vocabext.serve.bench.scenarios import DECODE, MIXED, PREFILL, Point
from vocabext.serve.bench.stage import BenchConfig
from vocabext.serve.bench.summary import complete_rounds, is_good, summarize, with_points
from vocabext.serve.engine import Server, free_port, wait_until_ready

FAKE = Path(__file__).parent / "support" / "fake_server.py"
TARGET = {"ttft_seconds": None, "request_seconds": None}
READ, WRITE = Point(PREFILL), Point(DECODE)
LENGTHS = {PREFILL: [900] * 4, DECODE: [200] * 4, MIXED: [1700] * 4}


class Characters:
    """A tokenizer with one token per character."""

    num_ids = 100

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def load(seconds: float, characters: int = 300, count: int = 4, *, failed: int = 0, ttft: float = 0.1) -> Load:
    times = tuple(None if i < failed else seconds for i in range(count))
    first = tuple(None if i < failed else ttft for i in range(count))
    return Load(seconds * count, times, first, (characters,) * count, (50,) * count, (64,) * count,
                ("reset",) * bool(failed), ("x" * characters,) * count)


def rounds(measure: Callable[[str, int], Load], point: Point = READ, count: int = 5) -> list[Pass]:
    """Plant runs: `measure` gets the role and the round."""
    return [Pass(number, place, point, measure(role, number))
            for number in range(count) for place, role in enumerate(bench.ROUND)]


def summary(runs: list[Pass], point: Point = READ, target: dict[str, float | None] = TARGET) -> dict[str, Any]:
    (found,) = summarize(runs, [point], LENGTHS, target)
    return found


def jitter(share: float = 0.01) -> Callable[[], float]:
    choose = random.Random(1)
    return lambda: choose.uniform(1 - share, 1 + share)


def test_a_planted_faster_server_is_found_and_base_against_base_is_not() -> None:
    noise = jitter()
    faster = summary(rounds(lambda role, _: load((1 / 1.1 if role == EXPANDED else 1) * noise())))
    assert faster["metrics"]["request_seconds"]["verdict"] == "faster"
    assert faster["metrics"]["input_characters_per_second"]["verdict"] == "faster"
    same = summary(rounds(lambda *_: load(noise())))
    assert same["metrics"]["request_seconds"]["verdict"] == "no difference"


def test_writing_is_counted_in_characters_and_not_in_tokens() -> None:
    noise = jitter()
    found = summary(rounds(lambda role, _: load(noise(), 450 if role == EXPANDED else 300), WRITE), WRITE)["metrics"]
    assert found["seconds_per_1000_output_characters"]["speedup"] == pytest.approx(1.5, rel=0.03)
    assert found["seconds_per_1000_output_characters"]["base"] == pytest.approx(1000 / 300, rel=0.03)
    assert found["request_seconds"]["verdict"] == "no difference"
    assert found["output_characters_per_second"]["speedup"] == pytest.approx(1.5, rel=0.03)
    after = found["seconds_per_1000_output_characters_after_first_token"]["base"]
    assert after == pytest.approx(900 / 300, rel=0.05)  # of one second, a tenth passes before the first token


def test_rates_grow_when_times_fall() -> None:
    metric = summary(rounds(lambda role, _: load(0.5 if role == EXPANDED else 1.0)))["metrics"]
    rate = metric["input_characters_per_second"]
    assert (rate["base"], rate["expanded"], rate["speedup"]) == pytest.approx((900, 1800, 2))
    assert rate["base_interval"][0] <= rate["base"] <= rate["base_interval"][1]
    assert metric["requests_per_second"]["expanded"] == pytest.approx(2)


def test_failed_requests_are_counted_and_never_averaged_away() -> None:
    found = summary(rounds(lambda role, _: load(1.0, failed=role == EXPANDED)))
    assert (found[BASE]["requests"], found[BASE]["failed_requests"]) == (40, 0)
    assert (found[EXPANDED]["requests"], found[EXPANDED]["failed_requests"]) == (20, 5)
    assert found[EXPANDED]["errors"] == ["reset"]
    metric = found["metrics"]["request_seconds"]
    assert (metric["left_out"], metric["lost_rounds"]) == (5, 0)
    assert found["metrics"]["requests_per_second"]["expanded"] == pytest.approx(3 / 4)  # what failed did nothing


def test_a_round_that_failed_is_lost_and_said_so() -> None:
    found = summary(rounds(lambda role, number: load(1.0, failed=4 if (role, number) == (EXPANDED, 2) else 0)))
    metric = found["metrics"]["request_seconds"]
    assert (metric["lost_rounds"], metric["verdict"]) == (1, "too few rounds")


def test_a_point_at_which_everything_failed_says_why_instead_of_a_number() -> None:
    found = summary(rounds(lambda role, _: load(1.0, failed=4 * (role == EXPANDED))))
    assert found["metrics"] == {}
    assert "no request of any round succeeded on both servers" in found["not_comparable"]["request_seconds"]


def test_runs_that_something_else_held_up_are_counted() -> None:
    found = summary(rounds(lambda role, number: load(2.0 if (role, number) == (EXPANDED, 3) else 1.0)))
    assert (found[BASE]["held_up_runs"], found[EXPANDED]["held_up_runs"]) == (0, 1)


def test_goodput_counts_requests_that_met_the_target() -> None:
    target = {"ttft_seconds": 0.2, "request_seconds": 1.0}
    assert is_good(load(0.9, failed=1), target) == [False, True, True, True]
    assert is_good(load(0.9, ttft=0.3), target) == [False] * 4
    found = summary(rounds(lambda role, _: load(0.8 if role == EXPANDED else 1.2)), target=target)
    assert found[BASE]["requests_within_target"] == 0
    assert found[EXPANDED]["requests_within_target"] == 20
    assert found[EXPANDED]["goodput_per_run"] == pytest.approx([1 / 0.8] * 5)
    assert "goodput_requests_per_second" in found["not_comparable"]  # nothing to divide by: the base did none
    reason = "10 of 10 runs of the base and 0 of 5 of the expanded model did none, so there is no ratio"
    assert found["not_comparable"]["goodput_requests_per_second"] == reason
    both = summary(rounds(lambda role, _: load(0.4 if role == EXPANDED else 0.8)), target=target)
    assert both["metrics"]["goodput_requests_per_second"]["speedup"] == pytest.approx(2)


def test_no_verdict_is_given_on_the_rounds_that_went_well() -> None:
    target = {"ttft_seconds": None, "request_seconds": 1.0}
    # twice as fast in five rounds of seven, and too late in two
    found = summary(rounds(lambda role, number: load(0.8 if role != EXPANDED else 1.2 if number > 4 else 0.4), count=7),
                    target=target)
    assert "goodput_requests_per_second" not in found["metrics"]
    assert found["not_comparable"]["goodput_requests_per_second"] == (
        "0 of 14 runs of the base and 2 of 7 of the expanded model did none, so there is no ratio")
    lost = summary(rounds(lambda role, number: load(1.0, failed=4 if (role, number) == (EXPANDED, 2) else 0), count=6))
    assert "1 of 6 of the expanded model did none" in lost["not_comparable"]["requests_per_second"]
    assert lost["metrics"]["request_seconds"]["lost_rounds"] == 1  # requests are compared with themselves


def test_units_are_in_every_name_and_no_rate_of_tokens_is_there() -> None:
    text = json.dumps(summary(rounds(lambda *_: load(1.0), WRITE), WRITE))
    assert "tokens_per_second" not in text
    for name in ("request_seconds", "ttft_seconds", "output_characters_per_second"):
        assert f'"{name}"' in text


def test_only_rounds_with_all_three_runs_count() -> None:
    runs = rounds(lambda *_: load(1.0))
    assert len(complete_rounds(runs[:-1], READ)) == 4
    assert summarize(runs[:2], [READ], LENGTHS, TARGET) == []


CONFIG = BenchConfig(pairs=2, scenario=(PREFILL, DECODE))


def test_rounds_alternate_and_end_with_the_base() -> None:
    blocks = list(bench.plan(CONFIG, one_at_a_time=False))
    assert blocks[0] == [(0, 0, READ), (0, 1, READ), (0, 2, READ)]
    assert [block[0][2] for block in blocks] == [READ, WRITE, READ, WRITE]


def test_one_at_a_time_changes_the_server_only_between_places() -> None:
    blocks = list(bench.plan(CONFIG, one_at_a_time=True))
    assert blocks[0] == [(0, 0, READ), (0, 0, WRITE), (0, 1, READ), (0, 1, WRITE), (0, 2, READ), (0, 2, WRITE)]
    both = [step for block in bench.plan(CONFIG, one_at_a_time=False) for step in block]
    assert {step for block in blocks for step in block} == set(both)


@pytest.mark.parametrize(("options", "message"), [
    ({"pairs": 0}, "--pairs is 0; it must be at least 1"),
    ({"texts": 0}, "--texts is 0; it must be at least 1"),
    ({"output_characters": 0}, "--output-characters is 0; it must be at least 1"),
    ({"concurrency": (1, 0)}, "--concurrency is 0; it must be at least 1"),
    ({"rate": (-1.0,)}, "--rate is -1.0; it must be a number of requests per second above 0"),
    ({"scenario": ("reading",)}, "--scenario is 'reading'; it must be one of prefill, decode, mixed"),
    ({"target_ttft_seconds": 0.0}, "--target-ttft-seconds is 0.0; it must be above 0"),
    ({"concurrency": ()}, "there is nothing to measure"),
])
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BenchConfig(**options)


def test_flags_switch_prefix_caching_off_and_give_way_to_the_user() -> None:
    assert bench.server_flags(CONFIG, 512, "cpu", 2224) == ("--no-enable-prefix-caching",)
    long = bench.server_flags(CONFIG, 131072, "gpu", 2224)
    assert long == ("--no-enable-prefix-caching", "--max-model-len", "2224", "--gpu-memory-utilization", "0.42")
    assert "0.42" not in bench.server_flags(CONFIG, 131072, "gpu", 2224, alone=True)
    mine = dataclasses.replace(CONFIG, vllm_flags=(
        "--enable-prefix-caching", "--max-model-len=9000", "--gpu-memory-utilization", "0.3"))
    assert bench.server_flags(mine, 131072, "gpu", 2224) == mine.vllm_flags


def planned_server(
    monkeypatch: pytest.MonkeyPatch, folder: Path, corpus: list[str], *, context: int = 131072, **options: Any
) -> tuple[bench.Setting, int, Journal]:
    """Pass `serve bench` up to the start of its servers; returns what is to be measured, and --max-model-len."""
    base = tiny_folder(folder / "base")
    edit_json(base / "config.json", max_position_embeddings=context)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    found: list[Any] = []

    def compare(setting: bench.Setting, make: Any, client: Any, journal: Journal, *_: Any, **__: Any) -> None:
        found.extend((setting, make(BASE, alone=True), journal))

    monkeypatch.setattr(bench, "require_vllm", lambda: None)
    monkeypatch.setattr(bench, "vllm_device", lambda: "cpu")
    monkeypatch.setattr(bench, "LoadClient", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(bench, "vllm_server", lambda *_, flags, **__: flags)
    monkeypatch.setattr(bench, "compare_servers", compare)
    bench.run_bench(str(base), str(base), [str(folder / "corpus.jsonl")], config=BenchConfig(**options),
                    output=folder / "bench.json", log_folder=folder)
    setting, flags, journal = found
    return setting, int(flags[flags.index("--max-model-len") + 1]), journal


def thai(count: int, characters: int) -> list[str]:
    choose = random.Random(1)
    return ["".join(chr(choose.randrange(0xE01, 0xE2F)) for _ in range(characters)) for _ in range(count)]


@pytest.mark.parametrize("scenario", [PREFILL, DECODE, MIXED])
def test_thai_prompts_fit_the_server_that_is_started_for_them(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three base tokens per character: 1,700 characters are over 5,000 tokens."""
    setting, length, _ = planned_server(monkeypatch, tmp_path, thai(6, 4000), scenario=(scenario,))
    encoder = setting.encoders[BASE]
    prompts = setting.prompts[scenario]
    longest = max(len(encoder.encode(prompt)) for prompt in prompts)
    assert longest > {PREFILL: 2000, DECODE: 500, MIXED: 4700}[scenario]
    answer = 1 if scenario == PREFILL else len(encoder.encode(thai(1, 256)[0]))
    assert longest + answer <= length <= longest + 2 * 3 * 256 + 200


def test_the_method_says_how_long_prompts_are_and_how_many_documents_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, _, journal = planned_server(monkeypatch, tmp_path, thai(4, 300) * 2, scenario=(DECODE, MIXED))
    journal.notes["prompt_tokens"] = setting.prompt_tokens
    lines = " ".join(bench.method_of(setting.config, [], journal.notes))
    assert "4 different ones of 8" in lines
    counts = setting.prompt_tokens[BASE]
    assert f"decode {min(counts[DECODE]):,} to {max(counts[DECODE]):,}, mixed {min(counts[MIXED]):,} to" in lines
    monkeypatch.setattr(bench, "MAX_CORPUS_CHARACTERS", 500)
    assert len(bench._texts([Document(str(i), text) for i, text in enumerate(thai(4, 300))])) == 2
    lines = " ".join(bench.method_of(setting.config, [], {"documents": bench._described(thai(2, 300))}))
    assert "the first 500 characters of the corpus" in lines


def test_a_smaller_context_of_the_servers_limits_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    assert bench._context([tmp_path], []) == 2048
    assert bench._context([tmp_path], ["--max-model-len", "100"]) == 100
    assert bench._context([tmp_path], ["--max_model_len=200"]) == 200


def test_the_method_says_what_was_done_about_caching_servers_and_lengths() -> None:
    lines = " ".join(bench.method_of(CONFIG, ["--no-enable-prefix-caching"], {}))
    assert "Prefix caching off" in lines
    assert "both servers up all the time" in lines
    assert "equal in characters, not in tokens" in lines
    alone = dataclasses.replace(CONFIG, one_at_a_time=True, target_ttft_seconds=0.5)
    lines = " ".join(bench.method_of(alone, ["--enable-prefix-caching"], {}))
    assert "Prefix caching as the flags say" in lines
    assert "one server at a time, restarted" in lines
    assert "Goodput counts requests with ttft seconds at most 0.5" in lines
    assert "did not start together (no memory)" in " ".join(bench.method_of(CONFIG, [], {"fallback": "no memory"}))


# -- the two servers ----------------------------------------------------------------------------------------------

def fake_server(role: str, folder: Path, mode: str = "healthy") -> Server:
    port = free_port()
    return Server([sys.executable, str(FAKE), str(port), mode], f"http://127.0.0.1:{port}", folder / f"{role}.log",
                  name=f"the {role} server")


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(pool, "SETTLE_SECONDS", 0.0)
    return []


def server_pool(folder: Path, warmed: list[str], *, one_at_a_time: bool = False, mode: Any = "healthy") -> ServerPool:
    def make(role: str) -> Server:
        return fake_server(role, folder, mode if isinstance(mode, str) else mode(role))

    return ServerPool(make, lambda _, role: warmed.append(role), one_at_a_time=one_at_a_time, timeout_seconds=30)


def test_both_servers_are_up_and_warmed_up_once(tmp_path: Path, warmed: list[str]) -> None:
    with server_pool(tmp_path, warmed) as running:
        running.start_all()
        servers = [running.get(role) for role in (BASE, EXPANDED, BASE, EXPANDED)]
        assert servers[0] is servers[2]
        assert all(server.exit_code is None for server in servers)
    assert warmed == [BASE, EXPANDED]
    assert all(server.exit_code is not None for server in servers)


def test_one_at_a_time_stops_the_other(tmp_path: Path, warmed: list[str]) -> None:
    with server_pool(tmp_path, warmed, one_at_a_time=True) as running:
        running.start_all()
        first = running.get(BASE)
        assert running.get(BASE) is first
        second = running.get(EXPANDED)
        assert first.exit_code is not None
        assert second.exit_code is None
        running.get(BASE)
    assert warmed == [BASE, EXPANDED, BASE]


@pytest.mark.slow
def test_two_servers_that_do_not_fit_together_take_turns(tmp_path: Path, warmed: list[str]) -> None:
    started: list[str] = []

    def mode(role: str) -> str:
        started.append(role)
        return "dies" if started == [BASE, EXPANDED] else "healthy"  # the second one finds no memory, once

    with server_pool(tmp_path, warmed, mode=mode) as running:
        running.start_all()
        assert running.one_at_a_time
        assert "the expanded server stopped with exit code 1: ValueError: the model needs 80 GiB" in running.fallback
        running.get(BASE)
        running.get(EXPANDED)
    assert warmed == [BASE, EXPANDED]


def test_a_model_that_does_not_fit_alone_is_an_error_that_says_why(tmp_path: Path, warmed: list[str]) -> None:
    with server_pool(tmp_path, warmed, mode="dies") as running, pytest.raises(ServerError, match="needs 80 GiB"):
        running.start_all()


def test_a_server_that_died_between_two_runs_is_noticed(tmp_path: Path, warmed: list[str]) -> None:
    with server_pool(tmp_path, warmed) as running:
        running.start_all()
        server = running.get(BASE)
        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerError, match="the base server stopped by SIGKILL"):
            running.get(BASE)


def test_a_server_that_tokenizes_otherwise_is_noticed(tmp_path: Path) -> None:
    with fake_server(BASE, tmp_path) as server:
        wait_until_ready([server], timeout_seconds=30)
        found = bench.agreement_of(server, BASE, ["even", "odd one", "last"], Characters())  # type: ignore[arg-type]
    assert found == {"prompts": 3, "agreeing": 2}


def test_a_result_without_points_is_summarized_when_it_is_read(tmp_path: Path) -> None:
    settings = {"options": dataclasses.asdict(dataclasses.replace(CONFIG, scenario=(PREFILL,))), "versions": {},
                "machine": {"cpu": "a processor"},
                "models": {"base": {"name": "b"}, "expanded": {"name": "e"}}}
    journal = Journal(tmp_path / "bench.json", settings)
    journal.notes["prompt_characters"] = LENGTHS
    journal.passes = rounds(lambda *_: load(1.0))
    journal.save()  # all that a killed process leaves
    found = with_points(json.loads((tmp_path / "bench.json").read_text()))
    assert (found["state"], found["base"], found["points"][0]["rounds"]) == ("partial", "b", 5)
