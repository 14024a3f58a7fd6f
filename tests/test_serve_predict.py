import dataclasses
import json
from pathlib import Path

import pytest
from tiny_expanded import expanded_pair

from vocabext.errors import UsageError
from vocabext.serve import predict
from vocabext.serve.predict import (
    DEVICES,
    Lengths,
    ModelShape,
    PredictConfig,
    decode_cost,
    find_device,
    predict_loads,
    prefill_cost,
    shape_of,
)

EIGHT_B = ModelShape(6_980_000_000, 128_256, 4096, False, 32, 4096, 131072, 8192)  # about a Llama 3.1 8B
H100 = DEVICES["h100"]
CONFIG = PredictConfig()


def loads(expanded: ModelShape, lengths: Lengths, config: PredictConfig = CONFIG) -> dict[tuple[str, str], float]:
    rows = predict_loads(EIGHT_B, expanded, lengths, H100, config)
    return {(row["scenario"], row["note"][:6]): row["speedup"] for row in rows}


def test_the_prefill_of_a_large_model_is_arithmetic_and_its_writing_is_memory() -> None:
    reading = prefill_cost(EIGHT_B, H100, 2000)
    assert reading.limited_by == "arithmetic"
    assert reading.seconds == pytest.approx(2 * 6.98e9 * 2000 / 989e12, rel=0.05)
    writing = decode_cost(EIGHT_B, H100, 2000, 100, 1)
    assert writing.limited_by == "memory"
    weights = 2 * (6.98e9 + 128_256 * 4096)
    assert writing.seconds == pytest.approx(100 * (weights + 2050 * 131072) / 3.35e12, rel=0.01)


def test_a_short_prompt_waits_for_the_weights() -> None:
    assert prefill_cost(EIGHT_B, H100, 10).seconds == pytest.approx(2 * 7.5e9 / 3.35e12, rel=0.02)


def test_shorter_text_makes_reading_faster_by_a_little_more_than_its_ratio() -> None:
    found = loads(EIGHT_B, Lengths(0.25, 0.2))
    assert 1.25 < found["prefill", ""] < 1.3  # attention falls with the square
    assert found["decode", "no new"] == pytest.approx(1, abs=0.002)
    assert found["decode", "new to"] == pytest.approx(1.25, rel=0.01)


def test_the_growth_of_the_head_is_counted() -> None:
    larger = dataclasses.replace(EIGHT_B, rows=EIGHT_B.rows + 100_000)
    found = loads(larger, Lengths(0.25, 0.25))
    assert found["decode", "no new"] == pytest.approx(7.505 / (7.505 + 0.41), rel=0.01)
    assert found["prefill", ""] == pytest.approx(1, abs=0.02)
    memory = predict.predict_memory(EIGHT_B, larger, Lengths(0.25, 0.25), H100, CONFIG)
    assert memory["expanded"]["weight_bytes"] - memory["base"]["weight_bytes"] == 2 * 2 * 100_000 * 4096  # not tied
    assert memory["expanded"]["requests_that_fit"] < memory["base"]["requests_that_fit"]


def test_a_large_batch_is_limited_by_the_cache() -> None:
    one = decode_cost(EIGHT_B, H100, 4000, 1, 1).seconds
    many = decode_cost(EIGHT_B, H100, 4000, 1, 64).seconds
    assert 2 < many / one < 64


def test_less_cache_per_text_lets_more_requests_in() -> None:
    memory = predict.predict_memory(EIGHT_B, EIGHT_B, Lengths(0.25, 0.2), H100, CONFIG)
    assert memory["base"]["cache_bytes_per_request"] == pytest.approx(9000 * 0.25 * 131072)
    fit = {role: memory[role]["requests_that_fit"] for role in ("base", "expanded")}
    assert fit["expanded"] == pytest.approx(1.25 * fit["base"], rel=0.01)
    assert memory["expanded"]["context_characters"] == pytest.approx(8192 / 0.2)


def test_the_shape_is_read_from_the_folder_and_new_rows_are_in_it(tmp_path: Path) -> None:
    base, expanded = (shape_of(folder) for folder in expanded_pair(tmp_path))
    assert (base.hidden, base.layers, base.attention_width, base.tied) == (64, 1, 64, True)
    assert base.cache_bytes_per_token == 2 * 64 * 2
    assert expanded.body_parameters == base.body_parameters == 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64
    assert expanded.rows >= base.rows


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    base, expanded = expanded_pair(tmp_path)
    return str(base), str(expanded)


def test_a_prediction_needs_an_expanded_model_or_a_plan(folders: tuple[str, str]) -> None:
    lengths = Lengths(0.25, 0.2)
    with pytest.raises(UsageError, match="there is no EXPANDED model; say with --new-tokens"):
        predict.run_predict(folders[0], None, lengths, H100, config=CONFIG)
    planned = predict.run_predict(folders[0], None, lengths, H100, config=CONFIG, new_tokens=1000)
    assert planned["model"]["new_rows"] == 1000
    made = predict.run_predict(*folders, lengths, H100, config=CONFIG)
    assert json.loads(json.dumps(made))["lengths"]["length_ratio"] == pytest.approx(1.25)


def test_a_load_that_is_longer_than_the_context_in_tokens_is_named(folders: tuple[str, str]) -> None:
    context = shape_of(Path(folders[0])).context_tokens
    assert context is not None

    def notes(rate: float) -> list[str]:
        config = PredictConfig(prompt_characters=100, output_characters=100)
        found = predict.run_predict(*folders, Lengths(rate, rate), H100, config=config)["notes"]
        return [note for note in found if "context" in note]

    assert notes(context / 200) == []
    assert notes((context + 10) / 200) == [
        f"A long prompt and its answer take {context + 10:,} base tokens, but the context has {context:,}: the base "
        "cannot run this load; use fewer --prompt-characters."]


def test_what_was_measured_stands_beside_what_the_lengths_predict() -> None:
    def role(prompt: int, output: int, characters: int) -> dict[str, int]:
        return {"prompt_tokens_per_run": prompt, "output_tokens_per_run": output,
                "output_characters_per_run": characters}

    def point(scenario: str, metric: str) -> dict[str, object]:
        return {"name": f"{scenario} x1", "scenario": scenario, "main_metric": metric,
                "base": role(1000, 100, 300), "expanded": role(800, 80, 300),
                "metrics": {metric: {"speedup": 1.2, "speedup_interval": [1.1, 1.3], "verdict": "faster"}}}

    bench = {"points": [point("prefill", "request_seconds"), point("decode", "seconds")],
             "provenance": {"hardware": {"cpu": "a processor", "gpus": []}}}
    rows = predict.measured_beside(bench)
    assert [row["length_ratio"] for row in rows] == pytest.approx([1.25, 1.25])
    assert rows[0]["share_of_length_ratio"] == pytest.approx(1.2 / 1.25)
    assert rows[0]["share_interval"] == pytest.approx([1.1 / 1.25, 1.3 / 1.25])
    assert rows[0]["machine"] == "a processor"


@pytest.mark.parametrize(("scenario", "at_once"), [("prefill", 1), ("decode", 8), ("mixed", 4), ("mixed", None)])
def test_what_the_roofline_predicts_for_a_measured_point_stands_beside_it(scenario: str, at_once: int | None) -> None:
    def role(prompt: int, output: int, characters: int) -> dict[str, int]:
        return {"prompt_tokens_per_run": 2 * prompt, "output_tokens_per_run": 2 * output,
                "output_characters_per_run": 2 * characters}

    point = {"name": "p", "scenario": scenario, "main_metric": "m", "concurrency": at_once, "requests_per_run": 2,
             "base": role(2000, 100, 300), "expanded": role(1600, 80, 240),
             "metrics": {"m": {"speedup": 1.2, "speedup_interval": [1.1, 1.3], "verdict": "faster"}}}
    (row,) = predict.measured_beside({"points": [point]}, {"base": EIGHT_B, "expanded": EIGHT_B}, H100)
    if at_once is None:  # requests that arrive at a rate wait, and the roofline knows no waiting
        assert (row["predicted_speedup"], row["prediction_error"]) == (None, None)
        return
    seconds = [at_once * prefill_cost(EIGHT_B, H100, prompt).seconds
               + (scenario != "prefill") * decode_cost(EIGHT_B, H100, prompt, output, at_once).seconds
               for prompt, output in ((2000, 100), (1600, 80))]
    per_character = 240 / 300 if scenario == "decode" else 1
    assert row["predicted_speedup"] == pytest.approx(seconds[0] / seconds[1] * per_character)
    assert row["prediction_error"] == pytest.approx(row["predicted_speedup"] / 1.2 - 1)


def test_devices_have_a_source_and_numbers_of_the_right_size() -> None:
    for device in DEVICES.values():
        assert "data sheet" in device.source
        assert 1e14 < device.flops_per_second < 1e16
        assert 1e11 < device.bytes_per_second < 1e13
        assert 100 < device.flops_per_second / device.bytes_per_second < 500


def test_an_unknown_device_needs_both_numbers() -> None:
    with pytest.raises(UsageError, match="there is no device 'abacus' here; choose from h200, "):
        find_device("abacus", flops_per_second=1e12)
    with pytest.raises(UsageError, match="no device was named"):
        find_device(None)
    found = find_device("abacus", flops_per_second=1e12, bytes_per_second=1e10)
    assert (found.name, found.source, found.memory_bytes) == ("abacus", "given on the command line", None)
    assert find_device("H100", bytes_per_second=3e12).flops_per_second == H100.flops_per_second
    with pytest.raises(UsageError, match="must be numbers above 0"):
        find_device("h100", flops_per_second=-1.0)
