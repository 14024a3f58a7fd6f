import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import bench
from serve.bench import BASE, DECODE, EXPANDED, PREFILL, BenchConfig, Prompts, ServerPool
from serve.client import Load
from serve.engine import Server, free_port, wait_until_ready
from vocabext.errors import CorpusError, ServerError, UsageError

FAKE = Path(__file__).with_name("fake_server.py")
WORDS = "the heart is a muscle that pumps blood through the body in one long loop".split()


class Words:
    """A tokenizer with one token per word."""

    num_ids = 100

    def encode(self, text: str) -> list[int]:
        return [ord(word[0]) for word in text.split()]


class Characters:
    """A tokenizer with one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def documents(count: int = 40, words: int = 30) -> list[str]:
    choose = random.Random(0)
    return [" ".join(choose.choice(WORDS) for _ in range(words)) for _ in range(count)]


def load(seconds: float, characters: int, count: int = 4, *, failed: int = 0, text: str = "x") -> Load:
    times = tuple(None if i < failed else seconds for i in range(count))
    return Load(seconds * count, times, times, (characters,) * count, (50,) * count, (64,) * count,
                ("reset",) * bool(failed), (text * characters,) * count)


CONFIG = BenchConfig(pairs=5, prefill_texts=4, decode_texts=4)
PROMPTS = Prompts(("long",) * 4, ("short",) * 4)


def bench_with(measure: Callable[[str, str], Load], config: BenchConfig = CONFIG) -> dict[str, object]:
    return bench.summarize(bench.measure_rounds(measure, config), PROMPTS, config)


def metric(document: dict[str, object], scenario: str, name: str) -> dict[str, object]:
    (found,) = [s for s in document["scenarios"] if s["name"] == scenario]  # type: ignore[attr-defined]
    return dict(found["metrics"][name])


def jitter() -> Callable[[], float]:
    choose = random.Random(1)
    return lambda: choose.uniform(0.99, 1.01)


def test_a_planted_faster_server_is_found_and_base_against_base_is_not() -> None:
    noise = jitter()
    faster = bench_with(lambda role, _: load((1 / 1.1 if role == EXPANDED else 1) * noise(), 300))
    assert metric(faster, PREFILL, "seconds_per_text")["verdict"] == "faster"
    assert metric(faster, DECODE, "seconds_per_1000_output_characters")["verdict"] == "faster"
    same = bench_with(lambda *_: load(noise(), 300))
    assert metric(same, PREFILL, "seconds_per_text")["verdict"] == "no difference"
    assert metric(same, DECODE, "seconds_per_1000_output_characters")["verdict"] == "no difference"


def test_decode_counts_characters_and_not_tokens() -> None:
    noise = jitter()
    found = bench_with(lambda role, _: load(noise(), 450 if role == EXPANDED else 300))
    decode = metric(found, DECODE, "seconds_per_1000_output_characters")
    assert decode["speedup"] == pytest.approx(1.5, rel=0.03)
    assert decode["base"] == pytest.approx(1000 / 300, rel=0.03)
    assert metric(found, PREFILL, "seconds_per_text")["verdict"] == "no difference"


def test_failed_requests_are_counted_and_shown() -> None:
    found = bench_with(lambda role, _: load(1.0, 300, failed=role == EXPANDED))
    scenario = found["scenarios"][0]  # type: ignore[index]
    assert (scenario[BASE]["requests"], scenario[BASE]["failed_requests"]) == (40, 0)
    assert (scenario[EXPANDED]["requests"], scenario[EXPANDED]["failed_requests"]) == (20, 5)
    assert scenario[EXPANDED]["errors"] == ["reset"]


def test_units_are_in_every_name_and_no_rate_of_tokens_is_there() -> None:
    text = json.dumps(bench_with(lambda *_: load(1.0, 300)))
    assert "tokens_per_second" not in text
    for name in ("seconds_per_text", "request_seconds", "ttft_seconds", "output_characters", "duration_seconds"):
        assert f'"{name}"' in text


def test_rounds_alternate_and_end_with_the_base() -> None:
    steps = list(bench.plan(dataclasses.replace(CONFIG, pairs=2)))
    assert [(n, place) for n, place, scenario in steps if scenario == PREFILL] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert steps[:4] == [(0, 0, PREFILL), (0, 1, PREFILL), (0, 2, PREFILL), (0, 0, DECODE)]


def test_one_at_a_time_changes_the_server_only_between_places() -> None:
    config = dataclasses.replace(CONFIG, pairs=2, one_at_a_time=True)
    assert list(bench.plan(config))[:4] == [(0, 0, PREFILL), (0, 0, DECODE), (0, 1, PREFILL), (0, 1, DECODE)]
    assert sorted(bench.plan(config)) == sorted(bench.plan(dataclasses.replace(config, one_at_a_time=False)))


def test_long_prompts_fill_the_context_in_base_tokens_and_end_at_a_space() -> None:
    texts = documents()
    prompts = bench.build_prompts(texts, Words(), dataclasses.replace(CONFIG, output_tokens=8), context=116)
    lengths = [len(Words().encode(p)) for p in prompts.prefill]
    assert len(lengths) == 4
    assert all(90 <= n <= 100 for n in lengths)
    source = set(" ".join(texts).split())
    assert all(set(p.split()) <= source for p in prompts.prefill)


def test_prompts_never_exceed_the_limit_of_prompt_tokens() -> None:
    config = dataclasses.replace(CONFIG, prompt_tokens=64)
    prompts = bench.build_prompts(documents(), Characters(), config, context=None)
    assert all(len(p) <= 64 for p in prompts.prefill)


def test_short_prompts_are_the_beginnings_of_documents() -> None:
    texts = documents()
    prompts = bench.build_prompts(texts, Words(), dataclasses.replace(CONFIG, prompt_characters=40), context=512)
    assert all(any(t.startswith(p) for t in texts) and 30 <= len(p) <= 40 for p in prompts.decode)
    assert len(set(prompts.decode)) == 4


def test_a_small_corpus_gives_fewer_prompts_and_an_empty_one_an_error() -> None:
    assert len(bench.build_prompts(["only this"], Words(), CONFIG, context=512).prefill) == 1
    with pytest.raises(CorpusError, match="no text to make prompts from"):
        bench.build_prompts(["", " \n"], Words(), CONFIG, context=512)


def test_an_answer_that_does_not_fit_into_the_context_is_refused() -> None:
    with pytest.raises(UsageError, match="--output-tokens 64 leaves too little of the model's context of 96"):
        bench.build_prompts(documents(), Words(), CONFIG, context=96)


@pytest.mark.parametrize("name", ["pairs", "prefill_texts", "output_tokens", "concurrency"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is 0; it must be at least 1"):
        BenchConfig(**{name: 0})


def test_flags_switch_prefix_caching_off_and_give_way_to_the_user() -> None:
    assert bench.server_flags(CONFIG, 512, "cpu") == ("--no-enable-prefix-caching",)
    long = bench.server_flags(CONFIG, 131072, "gpu")
    assert long == ("--no-enable-prefix-caching", "--max-model-len", "2160", "--gpu-memory-utilization", "0.42")
    mine = dataclasses.replace(CONFIG, vllm_flags=(
        "--enable-prefix-caching", "--max-model-len=9000", "--gpu-memory-utilization", "0.3"))
    assert bench.server_flags(mine, 131072, "gpu") == mine.vllm_flags


def fake_server(role: str, folder: Path, mode: str = "healthy") -> Server:
    port = free_port()
    return Server([sys.executable, str(FAKE), str(port), mode], f"http://127.0.0.1:{port}", folder / f"{role}.log",
                  name=f"the {role} server")


def test_both_servers_are_up_and_warmed_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0.0)
    warmed: list[str] = []
    with ServerPool(lambda role: fake_server(role, tmp_path), CONFIG, lambda _, role: warmed.append(role)) as pool:
        pool.start_all()
        servers = [pool.get(role) for role in (BASE, EXPANDED, BASE, EXPANDED)]
        assert servers[0] is servers[2]
        assert all(server.exit_code is None for server in servers)
    assert warmed == [BASE, EXPANDED]
    assert all(server.exit_code is not None for server in servers)


def test_one_at_a_time_stops_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0.0)
    warmed: list[str] = []
    config = dataclasses.replace(CONFIG, one_at_a_time=True)
    with ServerPool(lambda role: fake_server(role, tmp_path), config, lambda _, role: warmed.append(role)) as pool:
        pool.start_all()
        first = pool.get(BASE)
        assert pool.get(BASE) is first
        second = pool.get(EXPANDED)
        assert first.exit_code is not None
        assert second.exit_code is None
        pool.get(BASE)
    assert warmed == [BASE, EXPANDED, BASE]


def test_two_servers_that_do_not_fit_come_with_advice(tmp_path: Path) -> None:
    with ServerPool(lambda role: fake_server(role, tmp_path, "dies"), CONFIG, lambda *_: None) as pool:
        with pytest.raises(ServerError, match=r"(?s)the model needs 80 GiB.*pass --one-at-a-time"):
            pool.start_all()


def test_a_server_that_tokenizes_otherwise_is_noticed(tmp_path: Path) -> None:
    with fake_server(BASE, tmp_path) as server:
        wait_until_ready([server], timeout_seconds=30)
        found = bench.agreement_of(server, BASE, ["even", "odd one", "last"], Characters())
    assert found == {"prompts": 3, "agreeing": 2}


@pytest.mark.parametrize(("config", "expected"), [
    ({"max_position_embeddings": 2048}, 2048), ({"n_positions": 1024}, 1024), ({}, None),
    ({"text_config": {"max_position_embeddings": 8}}, 8)])
def test_the_context_is_read_from_the_config(tmp_path: Path, config: dict[str, object], expected: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bench.context_length(tmp_path) == expected


def test_the_method_says_what_was_done_about_caching_and_servers() -> None:
    lines = " ".join(bench.method_of(CONFIG, ["--no-enable-prefix-caching"]))
    assert "Prefix caching off" in lines
    assert "both servers up all the time" in lines
    alone = " ".join(bench.method_of(dataclasses.replace(CONFIG, one_at_a_time=True), ["--enable-prefix-caching"]))
    assert "Prefix caching as the flags say" in alone
    assert "one server at a time" in alone
