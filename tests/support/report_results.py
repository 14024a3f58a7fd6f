"""Results of every kind that a report shows, made without a server."""

import dataclasses
import json
import random
from typing import Any

from vocabext.serve.bench.client import Load
from vocabext.serve.bench.journal import Pass
from vocabext.serve.bench.scenarios import Point
from vocabext.serve.bench.stage import BenchConfig
from vocabext.serve.bench.summary import summarize
from vocabext.serve.predict import (
    DEVICES,
    Lengths,
    ModelShape,
    PredictConfig,
    measured_beside,
    predict_loads,
    predict_memory,
)

HOSTILE = "<script>alert('&')</script>"


def lengths_result() -> dict[str, Any]:
    return {
        "artifact": "lengths", "version": 2, "base": "b", "expanded": "e", "corpus": ["held.jsonl"],
        "documents": 200, "characters": 9000, "bytes": 9100, "base_tokens": 2500, "expanded_tokens": 1800,
        "saved_share": 0.28, "saved_share_interval": [0.26, 0.3],
        "base_tokens_per_document": 12.5, "expanded_tokens_per_document": 9.0,
        "base_tokens_per_1000_characters": 277.8, "expanded_tokens_per_1000_characters": 200.0,
        "tokens_per_document_percentiles": {role: dict.fromkeys(("0", "5", "25", "50", "75", "95", "100"), 9.0)
                                            for role in ("base", "expanded")},
        "tokens_per_1000_characters_percentiles": {role: dict.fromkeys(("0", "5", "25", "50", "75", "95", "100"), 200.0)
                                                   for role in ("base", "expanded")},
        "tokens_per_1000_characters_histogram": {"edges": [150.0, 200.0, 250.0, 300.0], "base": [10, 90, 100],
                                                 "expanded": [90, 100, 10]},
        "saved_share_percentiles": {"0": 0, "5": 0.1, "25": 0.2, "50": 0.27, "75": 0.3, "95": 0.5, "100": 0.6},
        "saved_share_histogram": {"edges": [0.0, 0.2, 0.4, 0.6], "documents": [50, 100, 50]},
        "documents_not_shorter": 3, "documents_longer": 0, "invariant": {"documents": 200, "differing": 0, "first": ""},
        "new_tokens": {"total": 10, "used": 8, "share_of_tokens": 0.2, "share_of_characters": 0.4,
                       "most_saving": [{"token": f" {HOSTILE}", "count": 40, "base_tokens": 5, "saved_tokens": 160},
                                       {"token": " heart", "count": 30, "base_tokens": 3, "saved_tokens": 60}],
                       "never_used_count": 2, "never_used": [" zebra", HOSTILE]},
        "cache": {"bytes_per_token": 6144, "base_bytes_per_document": 76800.0, "expanded_bytes_per_document": 55296.0,
                  "saved_bytes_per_document": 21504.0, "context_tokens": 512, "base_context_characters": 1843.2,
                  "expanded_context_characters": 2560.0},
        "passages": [{"document": "held.jsonl:1", "saved_share": 0.4, "percentile": 50,
                      "base_pieces": [["a ", False], [HOSTILE, False], [" he", False], ["art", False]],
                      "expanded_pieces": [["a ", False], [HOSTILE, False], [" heart", True]]}],
        "encoding_seconds": 0.1, "megabytes_per_second": 10.0,
        "provenance": {"command": "vocabext serve lengths b e", "date": "2026-01-02T03:04:05+00:00",
                       "versions": {"python": "3.11"}, "hardware": {"cpu": "a processor", "cores": 2, "gpus": []}},
    }


READ, WRITE, WRITE_8, MIXED_RATE = (Point("prefill"), Point("decode"), Point("decode", 8), Point("mixed", None, 2.0))
POINTS = (READ, WRITE, WRITE_8, MIXED_RATE)


def bench_result(*, speedup: float = 1.5, pairs: int = 5, state: str = "complete", failed: int = 0) -> dict[str, Any]:
    """A result made by our own summary of planted runs: reading is faster, writing is not."""
    choose = random.Random(0)

    def load(point: Point, place: int) -> Load:
        faster = speedup if place == 1 and point.scenario != "decode" else 1.0
        seconds = [(1.0 + 0.1 * i) * choose.uniform(0.995, 1.005) / faster for i in range(3)]
        times = tuple(None if place == 1 and i < failed else s for i, s in enumerate(seconds))
        return Load(sum(seconds), times, tuple(s and s / 10 for s in times), (300,) * 3,
                    (70 if place == 1 else 100,) * 3, (64,) * 3, ("reset",) * (place == 1 and failed > 0), ())

    runs = [Pass(number, place, point, load(point, place)) for number in range(pairs) for point in POINTS
            for place in range(3)]
    options = {**dataclasses.asdict(BenchConfig(pairs=5)), "target_request_seconds": 1.15}
    target = {"ttft_seconds": None, "request_seconds": 1.15}
    return json.loads(json.dumps({
        "artifact": "bench", "version": 2, "state": state, "base": "b", "expanded": "e", "corpus": ["held.jsonl"],
        "device": "cpu", "options": options, "server_flags": ["--no-enable-prefix-caching"],
        "method": ["Measured with care."],
        "tokenize_agreement": {"base": {"prompts": 6, "agreeing": 6}, "expanded": {"prompts": 6, "agreeing": 6}},
        "points": summarize(runs, POINTS, {p.scenario: [300] * 3 for p in POINTS}, target),
        "answers_below_wanted": {"base": 0, "expanded": 0}, "failures": [], "dropped_runs": 0, "resumed": 0,
        "sample_answers": [{"prompt": HOSTILE, "base": "one", "expanded": "two"}],
        "runs": [run.to_json() for run in runs],
        "provenance": {"hardware": {"cpu": "a processor", "cores": 2, "gpus": []}},
    }))


def predict_result() -> dict[str, Any]:
    shape = ModelShape(10**9, 32000, 2048, True, 16, 2048, 65536, 4096)
    lengths, device, config = Lengths(0.25, 0.2), DEVICES["h100"], PredictConfig()
    expanded = dataclasses.replace(shape, rows=33000)
    return json.loads(json.dumps({
        "artifact": "predict", "version": 1, "base": "b", "expanded": "e", "device": dataclasses.asdict(device),
        "options": dataclasses.asdict(config), "lengths": {"length_ratio": 1.25},
        "loads": predict_loads(shape, expanded, lengths, device, config),
        "memory": predict_memory(shape, expanded, lengths, device, config),
        "model": {"base": dataclasses.asdict(shape), "expanded": dataclasses.asdict(expanded)},
        "measured": measured_beside(bench_result(), {"base": shape, "expanded": expanded}, device),
        "notes": ["A bound."], "provenance": {},
    }))


def eval_result() -> dict[str, Any]:
    def row(name: str, bits: float, same: float | None) -> dict[str, Any]:
        return {"name": name, "tokens": 1800, "target_nll_nats": 2.5, "bits_per_byte": bits,
                "greedy_same_share": same, "greedy_common_characters": None}

    return {"artifact": "eval", "version": 1, "documents": 200, "bytes": 9100,
            "rows": [row("base", 1.0, 1.0), row("mean", 1.8, 0.1), row("distilled", 1.04, 0.6)],
            "gap_recovered": 0.95, "gap_recovered_interval": [0.93, 0.97],
            "shorter": {"base_tokens": 2500, "expanded_tokens": 1800, "ratio": 1.39}, "writing": writing_result()}


def writing_result() -> dict[str, Any]:
    def row(name: str, adoption: float | None, false_use: float, per_step: float) -> dict[str, Any]:
        return {"name": name, "merged": {"adoption": None, "false_use": 0.003},
                "places": {"places": 5000, "deserved": 700, "adoption": adoption, "false_use": false_use,
                           "nll_rise_nats": 0.0125},
                "greedy": {"characters_per_step": per_step, "share_of_possible_gain": 0.4321, "identical": 3,
                           "similar": 5, "worse": 8, "examples": [
                               {"kind": "similar", "prompt": HOSTILE, "base": "one", "expanded": "two"}]},
                "sampling": {"kl_nats_per_piece": 0.0421}}

    return {"base": {"prompts": 16, "characters_per_step": 3.25, "characters_per_step_if_all_adopted": 5.5},
            "rows": [row("mean", 0.0, 0.0, 3.3), row("distilled", 0.815, 0.0095, 4.75)]}


def choice_result() -> dict[str, Any]:
    """What was chosen: the bound is kept, one token costs too much, and one never got a row."""
    def point(rule: str, tokens: int, saved: float, loss: float, *, chosen: bool = False) -> dict[str, Any]:
        return {"rule": rule, "tokens": tokens, "saved_share": saved, "loss_bits_per_byte": loss, "chosen": chosen}

    def row(token: str, uses: int | None, nats: float | None, why: str | None) -> dict[str, Any]:
        return {"token": token, "uses": uses, "saved": uses and 3 * uses, "loss_nats_per_use": nats,
                "kept": why is None, "why": why}

    summary = {"tokens": 2, "saved_share": 0.21, "loss_bits_per_byte": 0.0123}
    return {"artifact": "choice", "version": 1, "options": {"max_loss": 0.015}, "budget": 2, "candidates": 5,
            "chosen": summary, "by_savings": {**summary, "saved_share": 0.25, "loss_bits_per_byte": 0.0345},
            "frontier": [point("savings", 1, 0.15, 0.02), point("savings", 2, 0.24, 0.033),
                         point("cost", 2, 0.2, 0.0119, chosen=True), point("cost", 1, 0.1, 0.004)],
            "tokens": [row(" a", 9, 0.1, None), row(" b", 5, 0.2, None),
                       row(f" {HOSTILE}", 1234, 5.678, "it costs more than it saves"),
                       row(" d", 3, 4.0, "it costs more than it saves"),
                       row(" e", None, None, "error 0.282 is above 0.223")]}


def verify_result(*, passed: bool = True) -> dict[str, Any]:
    return {"artifact": "verify", "version": 1, "passed": passed, "checks": [
        {"name": "invariant", "verdict": "pass", "detail": "200 documents"},
        {"name": "old rows", "verdict": "pass" if passed else "fail", "detail": HOSTILE},
        {"name": "corpus", "verdict": "not checked", "detail": "none given"}]}


def everything() -> dict[str, dict[str, Any] | None]:
    return {"lengths": lengths_result(), "bench": bench_result(), "eval": eval_result(), "verify": verify_result(),
            "predict": predict_result()}
