"""From passes to medians, intervals and verdicts: what bench.json says about each point.

Two kinds of measures, told apart by what they compare:

    per request   seconds per request, to the first token, per output character: each request with itself
    per pass      characters and requests per second, goodput: each pass with the pass beside it

All are stored so that `speedup` above 1 means that the expanded model is better. Goodput is how many requests
per second met the latency target. A pass that did nothing has no rate to compare: leaving its round out would give
a verdict on the rounds that went well, so the measure is not compared at that point.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import compress
from statistics import median
from typing import Any

import numpy as np

from vocabext.errors import ServerError
from vocabext.serve.bench.client import Load
from vocabext.serve.bench.compare import Comparison, Floats, Series, compare
from vocabext.serve.bench.journal import Pass
from vocabext.serve.bench.scenarios import DECODE, PREFILL, Point, points_of

PLACES = 3  # of a round: base, expanded, base again
HELD_UP = 1.5  # a pass that took this many times what its siblings took was held up by something else
CHARACTERS = 1000  # output costs are per so many
REQUEST_METRICS = WHOLE, FIRST, WRITING, AFTER_FIRST = (
    "request_seconds", "ttft_seconds", "seconds_per_1000_output_characters",
    "seconds_per_1000_output_characters_after_first_token")
PASS_METRICS = INPUT, OUTPUT, REQUESTS, GOODPUT = (
    "input_characters_per_second", "output_characters_per_second", "requests_per_second", "goodput_requests_per_second")


def summarize(
    passes: Sequence[Pass], points: Sequence[Point], prompt_characters: Mapping[str, Sequence[int]],
    target: Mapping[str, float | None], *, seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare base and expanded at every point that has a complete round.

    Args:
        passes: What was measured.
        points: The points, in the order wanted.
        prompt_characters: Length of each prompt of each scenario.
        target: `ttft_seconds` and `request_seconds` that a good request stays below; None is no limit.
        seed: Seed of the bootstrap.
    """
    found = []
    for point in points:
        rounds = complete_rounds(passes, point)
        if rounds:
            found.append(_summary_of(point, rounds, prompt_characters[point.scenario], target, seed))
    return found


def with_points(document: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the content of a bench.json that was cut off before its passes were summarized."""
    if "points" in document:
        return dict(document)
    options, notes = document["settings"]["options"], document["notes"]
    target = {"ttft_seconds": options["target_ttft_seconds"], "request_seconds": options["target_request_seconds"]}
    points = points_of(options["scenario"], options["concurrency"], options["rate"])
    passes = [Pass.from_json(row) for row in document["runs"]]
    models = document["settings"]["models"]
    return {
        **document, "points": summarize(passes, points, notes["prompt_characters"], target, seed=options["seed"]),
        "base": models["base"]["name"], "expanded": models["expanded"]["name"], "options": options, "method": [],
        "server_flags": notes.get("server_flags", []), "tokenize_agreement": notes.get("tokenize_agreement", {}),
        "answers_below_wanted": {}, "sample_answers": [], "device": "unknown",
        "provenance": {"versions": document["settings"]["versions"], "hardware": document["settings"]["machine"]},
    }


def complete_rounds(passes: Sequence[Pass], point: Point) -> list[list[Load]]:
    """Return base, expanded and base again of every round of a point that has all three."""
    by_round: dict[int, dict[int, Load]] = {}
    for one in passes:
        if one.point == point:
            by_round.setdefault(one.round, {})[one.place] = one.load
    return [[places[i] for i in range(PLACES)] for _, places in sorted(by_round.items()) if len(places) == PLACES]


def main_metric(scenario: str) -> str:
    """Return the measure that stands for a scenario in the headline."""
    return WRITING if scenario == DECODE else WHOLE


def is_good(load: Load, target: Mapping[str, float | None]) -> list[bool]:
    """Tell for each request whether it succeeded and met the latency target."""
    def within(seconds: float | None, limit: float | None) -> bool:
        return seconds is not None and (limit is None or seconds <= limit)

    return [within(first, target.get("ttft_seconds")) and within(whole, target.get("request_seconds"))
            for first, whole in zip(load.ttft_seconds, load.request_seconds, strict=True)]


def _summary_of(
    point: Point, rounds: list[list[Load]], characters: Sequence[int], target: Mapping[str, float | None], seed: int
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name in _metrics_of(point, target):
        series = [_series(name, [places[i] for places in rounds], characters, target) for i in range(PLACES)]
        if name in PASS_METRICS and (idle := _idle_passes(series)):
            failures[name] = idle
            continue
        try:
            found = compare(series[0], series[1], series[2], seed=seed)
        except ServerError as error:  # nothing to compare; the reason is part of the result
            failures[name] = str(error)
            continue
        metrics[name] = asdict(_as_rate(found) if name in PASS_METRICS else found)
    loads = {"base": [places[i] for places in rounds for i in (0, 2)], "expanded": [places[1] for places in rounds]}
    used = len(rounds[0][0].request_seconds)
    return {
        "name": point.name, "scenario": point.scenario, "concurrency": point.concurrency,
        "request_rate": point.request_rate, "main_metric": main_metric(point.scenario),
        "rounds": len(rounds), "requests_per_run": used, "prompt_characters_per_run": sum(characters[:used]),
        **{role: _totals(found, target) for role, found in loads.items()},
        "metrics": metrics, "not_comparable": failures,
    }


def _idle_passes(series: Sequence[Series]) -> str:
    """Say how many passes did none of what a measure counts; nothing if all did some."""
    first, expanded, second = (int((one.amount_RQ == 0).sum()) for one in series)
    if not first + expanded + second:
        return ""
    rounds = len(series[0].amount_RQ)
    return (f"{first + second} of {2 * rounds} runs of the base and {expanded} of {rounds} of the expanded model did "
            "none, so there is no ratio")


def _metrics_of(point: Point, target: Mapping[str, float | None]) -> list[str]:
    names = [WHOLE, INPUT, REQUESTS]
    if point.scenario != PREFILL:  # with one output token, the first is all there is
        names += [FIRST, WRITING, AFTER_FIRST, OUTPUT]
    return [*names, GOODPUT] if _has_limit(target) else names


def _has_limit(target: Mapping[str, float | None]) -> bool:
    return any(limit is not None for limit in target.values())


def _series(name: str, loads: Sequence[Load], characters: Sequence[int], target: Mapping[str, float | None]) -> Series:
    """Return costs of a measure: seconds, and how much of what is counted they were for."""
    if name in PASS_METRICS:
        amounts = [_amount(name, load, characters, target) for load in loads]
        return Series(np.array([[load.duration_seconds] for load in loads]), np.array(amounts, float)[:, None])
    seconds = _matrix(loads, FIRST if name == FIRST else WHOLE)
    if name in (WHOLE, FIRST):
        return Series(seconds, np.ones_like(seconds))
    if name == AFTER_FIRST:
        seconds = seconds - _matrix(loads, FIRST)
    return Series(np.where(seconds > 0, seconds, np.nan), _matrix(loads, "output_characters") / CHARACTERS)


def _amount(name: str, load: Load, characters: Sequence[int], target: Mapping[str, float | None]) -> float:
    """Return how much a pass did; what failed did nothing."""
    if name == GOODPUT:
        return sum(is_good(load, target))
    done = [seconds is not None for seconds in load.request_seconds]
    amounts = {INPUT: characters, OUTPUT: load.output_characters, REQUESTS: [1] * len(done)}
    return sum(compress(amounts[name], done))


def _matrix(loads: Sequence[Load], field: str) -> Floats:
    return np.array([getattr(load, field) for load in loads], dtype=float)  # None becomes NaN


def _as_rate(found: Comparison) -> Comparison:
    """Turn seconds per unit into units per second."""
    return replace(
        found, base=1 / found.base, base_interval=_inverse(found.base_interval), expanded=1 / found.expanded,
        expanded_interval=_inverse(found.expanded_interval),
        rounds=tuple((1 / a, 1 / e, 1 / b) for a, e, b in found.rounds))


def _inverse(interval: tuple[float, float]) -> tuple[float, float]:
    return 1 / interval[1], 1 / interval[0]


def _totals(loads: Sequence[Load], target: Mapping[str, float | None]) -> dict[str, Any]:
    """Count what a server was asked and what it did, failures and disturbances included."""
    errors = list(dict.fromkeys(error for load in loads for error in load.errors))
    typical = median(load.duration_seconds for load in loads)
    good = [sum(is_good(load, target)) for load in loads] if _has_limit(target) else []
    return {
        "runs": len(loads),
        "requests": sum(len(load.request_seconds) for load in loads),
        "failed_requests": sum(load.num_failed for load in loads),
        "errors": errors[:5],
        "requests_within_target": sum(good) if good else None,
        "goodput_per_run": [count / load.duration_seconds for count, load in zip(good, loads, strict=False)],
        "held_up_runs": sum(load.duration_seconds > HELD_UP * typical for load in loads),
        "prompt_tokens_per_run": sum(loads[0].prompt_tokens),
        "output_tokens_per_run": sum(loads[0].output_tokens),
        "output_characters_per_run": sum(loads[0].output_characters),
    }
