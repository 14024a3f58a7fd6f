"""The parts of the report that come from bench.json and predict.json: tables, curves, cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vocabext.serve.bench.compare import FASTER, NO_DIFFERENCE, SLOWER, TOO_FEW, TOO_NOISY
from vocabext.serve.bench.journal import PARTIAL
from vocabext.serve.bench.scenarios import DECODE, PREFILL
from vocabext.serve.bench.summary import GOODPUT, PASS_METRICS, REQUEST_METRICS
from vocabext.serve.report import charts

METRIC_NAMES = {
    "request_seconds": "seconds per request",
    "ttft_seconds": "seconds to the first token",
    "seconds_per_1000_output_characters": "seconds per 1000 output characters",
    "seconds_per_1000_output_characters_after_first_token": "seconds per 1000 characters after the first token",
    "input_characters_per_second": "input characters per second",
    "output_characters_per_second": "output characters per second",
    "requests_per_second": "requests per second",
    "goodput_requests_per_second": "requests per second within the target",
}
LOAD_NAMES = {"prefill": "reading", "decode": "writing", "mixed": "retrieval"}
SHOWN = {
    "prefill": ("request_seconds", "input_characters_per_second"),
    "decode": ("seconds_per_1000_output_characters", "ttft_seconds", "output_characters_per_second"),
    "mixed": ("request_seconds", "ttft_seconds", "seconds_per_1000_output_characters_after_first_token"),
}
CURVE_METRICS = ("request_seconds", "ttft_seconds", "input_characters_per_second", "output_characters_per_second",
                 GOODPUT)
MILLION, SECONDS_PER_HOUR = 1_000_000, 3600


def shown_metrics(point: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the measures of a point that are shown; bench.json has all.

    With one output token, the time to the first token is the time of the request: prefill shows one of the two.
    """
    names = (*SHOWN[point["scenario"]], GOODPUT)
    return [(name, point["metrics"][name]) for name in names if name in point["metrics"]]


def load_name(point: Mapping[str, Any]) -> str:
    """Name a point for readers who never saw the command line: `reading`, `writing, 8 at once`."""
    name = LOAD_NAMES[point["scenario"]]
    if point["request_rate"] is not None:
        return f"{name}, {point['request_rate']:g} per second"
    return name if point["concurrency"] == 1 else f"{name}, {point['concurrency']} at once"


def headline_points(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one point per scenario: the lightest load, where requests wait least for each other."""
    found: dict[str, dict[str, Any]] = {}
    for point in bench["points"]:
        if point["main_metric"] in point["metrics"]:
            found.setdefault(point["scenario"], point)
    return list(found.values())


def speed_sentence(bench: Mapping[str, Any]) -> str:
    """Say in one sentence how much faster, with intervals."""
    phrases = [_speed_phrase(load_name(p), p["metrics"][p["main_metric"]]) for p in headline_points(bench)]
    if not phrases:
        return "The measurement of speed was stopped before its first round was complete."
    rounds = min(point["rounds"] for point in bench["points"])
    stopped = f" (stopped after {rounds} of {bench['options']['pairs']} rounds)" if bench["state"] == PARTIAL else ""
    return f"In vLLM{stopped}, {'; '.join(phrases)}."


def _speed_phrase(load: str, metric: Mapping[str, Any]) -> str:
    low, high = metric["speedup_interval"]
    interval = f"{low:.2f} to {high:.2f}"
    if metric["verdict"] in (FASTER, SLOWER):
        return f"{load} is {metric['speedup']:.2f} times as fast ({interval})"
    if metric["verdict"] == NO_DIFFERENCE:
        return f"{load} is not measurably different ({interval} times as fast)"
    return f"{load} cannot be judged, {metric['verdict']} ({interval} times as fast)"


def speed_rows(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the table of speeds, formatted."""
    rows = []
    for point in bench["points"]:
        for name, metric in shown_metrics(point):
            low, high = metric["speedup_interval"]
            rows.append({
                "load": load_name(point), "point": point["name"], "measure": METRIC_NAMES[name],
                "base": f"{metric['base']:.4g}", "expanded": f"{metric['expanded']:.4g}",
                "speedup": f"{metric['speedup']:.3f}× ({low:.3f} to {high:.3f})",
                "noise": f"{1 / metric['noise_floor']:.3f} to {metric['noise_floor']:.3f}",
                "left_out": left_out(metric), "verdict": metric["verdict"],
            })
    return rows


def left_out(metric: Mapping[str, Any]) -> str:
    """Say what a comparison leaves out because it failed; `nothing` if it leaves out nothing."""
    counts = ((metric["lost_rounds"], "round"), (metric["left_out"], "request"))
    return ", ".join(f"{count:,} {name}{'s' if count > 1 else ''}" for count, name in counts if count) or "nothing"


def speed_costs(bench: Mapping[str, Any]) -> list[str]:
    """List what a bench.json shows that got worse, failed, or could not be told."""
    found = []
    if bench["state"] == PARTIAL:
        found.append("The measurement of speed is not complete: " + (
            bench["failures"][-1]["message"] if bench["failures"] else "it was stopped") + ".")
    for row in speed_rows(bench):
        if row["verdict"] == FASTER:
            continue
        what = {SLOWER: "is worse", NO_DIFFERENCE: "is not measurably better", TOO_NOISY: "was too noisy to tell",
                TOO_FEW: "has too few rounds to tell"}[row["verdict"]]
        found.append(f"{row['load'].capitalize()} ({row['measure']}) {what}: {row['speedup']}.")
    for point in bench["points"]:
        for role in ("base", "expanded"):
            counted = point[role]
            if counted["failed_requests"]:
                found.append(f"{counted['failed_requests']:,} of {counted['requests']:,} requests of the load "
                             f"{load_name(point)} to the {role} server failed: {'; '.join(counted['errors'])}")
        if held_up := sum(point[role]["held_up_runs"] for role in ("base", "expanded")):
            found.append(f"{held_up} runs of the load {load_name(point)} took more than 1.5 times their siblings: "
                         "something else was busy.")
        found += [f"{load_name(point).capitalize()}, {METRIC_NAMES[name]}: {reason}."
                  for name, reason in point["not_comparable"].items()]
    if bench["resumed"]:
        found.append(f"The measurement of speed was taken up again {bench['resumed']} time(s), and "
                     f"{bench['dropped_runs']} runs were measured again.")
    found += [f"{count} answers of the {role} model stay below the wanted number of characters."
              for role, count in bench["answers_below_wanted"].items() if count]
    return found


def speed_picture(bench: Mapping[str, Any]) -> Markup:
    """Draw the speed-up of the main measure of every point over its noise floor."""
    estimates = []
    for point in bench["points"]:
        metric = point["metrics"].get(point["main_metric"])
        if metric is None:
            continue
        tokens = [point[role]["prompt_tokens_per_run"] for role in ("base", "expanded")]
        expected = tokens[0] / max(1, tokens[1]) if point["scenario"] == PREFILL else None
        low, high = metric["speedup_interval"]
        estimates.append(charts.Estimate(load_name(point), metric["speedup"], (low, high), metric["noise_floor"],
                                           f"{metric['speedup']:.2f}×", expected))
    if not estimates:
        return Markup("")
    words = "; ".join(f"{e.label} {e.text}, {e.interval[0]:.2f} to {e.interval[1]:.2f}" for e in estimates)
    return charts.intervals(estimates, low_text="slower than base", high_text="faster than base",
                              label=f"Speed-up with 95 % interval over the noise floor: {words}")


def round_pictures(bench: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Draw every round of the lightest load of each scenario."""
    found = []
    for point in headline_points(bench):
        unit = METRIC_NAMES[point["main_metric"]]
        load = load_name(point)
        words = f"Every round of the load {load}: {unit} for base, expanded and base again"
        found.append((load, charts.rounds(point["metrics"][point["main_metric"]]["rounds"], unit=unit, label=words)))
    return found


def curves(bench: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Draw latency and throughput over the load, where a scenario was measured at two loads or more."""
    found = []
    for scenario, load in ((s, k) for s in LOAD_NAMES for k in ("concurrency", "request_rate")):
        points = sorted((p for p in bench["points"] if p["scenario"] == scenario and p[load] is not None),
                        key=lambda p: p[load])
        for name in CURVE_METRICS:
            here = [p for p in points if name in p["metrics"]]
            if len(here) > 1 and not (name == "input_characters_per_second" and scenario == DECODE):
                found.append(_curve(scenario, load, name, here))
    return found


def _curve(scenario: str, load: str, name: str, points: Sequence[Mapping[str, Any]]) -> tuple[str, Markup]:
    def at(point: Mapping[str, Any], role: str) -> tuple[float, float, tuple[float, float]]:
        metric = point["metrics"][name]
        low, high = metric[f"{role}_interval"]
        return float(point[load]), metric[role], (low, high)

    lines = {role: [at(point, role) for point in points] for role in ("base", "expanded")}
    axis = "requests at once" if load == "concurrency" else "requests arriving per second"
    title = f"{LOAD_NAMES[scenario].capitalize()}: {METRIC_NAMES[name]}"
    words = "; ".join(f"{role} " + ", ".join(f"{x:g}: {y:.4g}" for x, y, _ in line) for role, line in lines.items())
    return title, charts.curves(lines, x_text=axis, unit=METRIC_NAMES[name], label=f"{title} over {axis}: {words}")


def cost_rows(bench: Mapping[str, Any], price_per_hour: float) -> list[dict[str, Any]]:
    """Work out what a million characters cost at every point: the price over the characters handled in an hour."""
    rows = []
    for point in bench["points"]:
        name = "input_characters_per_second" if point["scenario"] == PREFILL else "output_characters_per_second"
        metric = point["metrics"].get(name)
        if metric is None:
            continue
        row: dict[str, Any] = {"load": load_name(point), "of": "input" if point["scenario"] == PREFILL else "output",
                               "verdict": metric["verdict"]}
        for role in ("base", "expanded"):
            low, high = metric[f"{role}_interval"]
            price = [price_per_hour / SECONDS_PER_HOUR / rate * MILLION for rate in (metric[role], high, low)]
            row[role], row[f"{role}_interval"] = price[0], price[1:]
        rows.append(row)
    return rows


def goodput_rows(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the most requests per second within the latency target that each model reached, per scenario."""
    best: dict[str, dict[str, Any]] = {}
    for point in bench["points"]:
        for role in ("base", "expanded"):
            runs = sorted(point[role]["goodput_per_run"])
            if not runs:
                continue
            row = best.setdefault(point["scenario"], {"scenario": LOAD_NAMES[point["scenario"]]})
            middle = runs[len(runs) // 2]
            if role not in row or middle > row[role]["requests_per_second"]:
                row[role] = {"requests_per_second": middle, "lowest": runs[0], "highest": runs[-1],
                             "load": load_name(point)}
    return [row for row in best.values() if "base" in row and "expanded" in row]


assert set(METRIC_NAMES) == {*REQUEST_METRICS, *PASS_METRICS}
