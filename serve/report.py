"""One page about an expanded model, from results that were measured before. Never measures.

The page needs nothing but itself: no network, no script, no font. It follows the reader's light or
dark setting and prints. What is missing is said to be missing, with the command that would measure it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from serve import pictures
from serve.compare import FASTER, NO_DIFFERENCE, SLOWER
from vocabext import __version__
from vocabext.errors import UsageError
from vocabext.manifest import Manifest, has_manifest, read_manifest

ARTIFACTS = ("lengths", "bench", "eval", "verify")
VERSION = 1
TEMPLATE = Path(__file__).with_name("report.html.jinja")
METRIC_NAMES = {
    "seconds_per_text": "seconds per text",
    "seconds_per_1000_output_characters": "seconds per 1000 characters",
    "ttft_seconds": "seconds to the first token",
}
SHORT_NAMES = {"seconds_per_text": "per text", "seconds_per_1000_output_characters": "per character",
               "ttft_seconds": "first token"}
LOAD_NAMES = {"prefill": "reading", "decode": "writing"}
ROW_NAMES = {"base": "base model", "mean": "mean of pieces", "distilled": "distilled"}
SHOWN_TOKENS = 25

Results = Mapping[str, dict[str, Any] | None]


@dataclass(frozen=True)
class Page:
    """A rendered report.

    Attributes:
        html: The page.
        headline: What it says in one or two sentences.
        missing: Names of results that were not there.
    """

    html: str
    headline: str
    missing: tuple[str, ...]


def gather(expanded: Path, beside: Path, named: Mapping[str, Path]) -> dict[str, dict[str, Any] | None]:
    """Find and read the results about a model.

    Args:
        expanded: The expanded model's folder, where `eval` and `verify` write.
        beside: The folder of the report.
        named: Files the user named; these must be there.

    Returns:
        For each of lengths, bench, eval and verify: the result, None if there is none.

    Raises:
        UsageError: If the model folder or a named file is missing, or a file is something else.
    """
    if not expanded.is_dir():
        raise UsageError(f"the model folder {expanded} does not exist")
    results: dict[str, dict[str, Any] | None] = {}
    for name in ARTIFACTS:
        found = [folder / f"{name}.json" for folder in (expanded, beside) if (folder / f"{name}.json").is_file()]
        path = named.get(name) or next(iter(found), None)
        results[name] = None if path is None else read_result(path, name)
    return results


def read_result(path: Path, artifact: str) -> dict[str, Any]:
    """Read one result file.

    Raises:
        UsageError: If it is missing, damaged, of another kind or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no JSON document: {error}") from None
    kind = document.get("artifact") if isinstance(document, dict) else None
    if kind != artifact:
        raise UsageError(f"{path} holds {kind!r}, but {artifact!r} is needed here")
    if document.get("version") != VERSION:
        raise UsageError(f"{path} has format version {document.get('version')}, this vocabext reads {VERSION}; "
                         "measure again")
    return dict(document)


def card_of(folder: Path, verification: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Return what a model folder says of itself, as lines of a table.

    Args:
        folder: The model folder.
        verification: The content of verify.json; looked for in the folder if it is not given.
    """
    if not has_manifest(folder):
        return [("vocabulary", "as published (no vocabext.json)")]
    manifest = read_manifest(folder)
    last = manifest.first_new_id + len(manifest.tokens) - 1
    path = folder / "verify.json"
    if verification is None and path.is_file():
        verification = read_result(path, "verify")
    verified = "not yet; run: vocabext verify"
    if verification is not None:
        verified = "passed" if verification["passed"] else "FAILED"
    return [
        ("base", manifest.base.model),
        ("new tokens", f"{len(manifest.tokens):,} (ids {manifest.first_new_id} to {last})"),
        ("rows made by", manifest.method),
        ("made", manifest.created),
        ("verified", verified),
    ]


def render_report(expanded: Path, results: Results) -> Page:
    """Render the page.

    Args:
        expanded: The expanded model's folder.
        results: The content of lengths.json, bench.json, eval.json and verify.json, None where missing.
    """
    manifest = read_manifest(expanded) if has_manifest(expanded) else None
    lengths, bench, evaluation, verification = (results.get(name) for name in ARTIFACTS)
    lines = headline(lengths, bench, evaluation)
    missing = tuple(name for name in ARTIFACTS if results.get(name) is None)
    html = _environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=expanded.resolve().name,
        headline=lines,
        card=card_of(expanded, verification),
        figures=_figures(lengths, bench, evaluation, verification),
        lengths=lengths,
        lengths_picture=lengths and _lengths_picture(lengths),
        most_saving=_most_saving(lengths),
        bench=bench,
        bench_picture=bench and _bench_picture(bench),
        bench_rows=_bench_rows(bench),
        round_pictures=_round_pictures(bench),
        evaluation=evaluation,
        evaluation_rows=_evaluation_rows(evaluation),
        evaluation_picture=evaluation and _evaluation_picture(evaluation),
        writing=_writing(evaluation),
        verification=verification,
        worse=what_got_worse(manifest, lengths, bench, evaluation, verification),
        sources=[_source(name, result) for name, result in zip(ARTIFACTS, (
            lengths, bench, evaluation, verification), strict=True) if result],
        commands=_commands(expanded, manifest),
        version=__version__,
    )
    return Page(html, " ".join(lines), missing)


def headline(
    lengths: dict[str, Any] | None, bench: dict[str, Any] | None, evaluation: dict[str, Any] | None
) -> list[str]:
    """Say the result in at most three sentences, each with its uncertainty."""
    sentences = []
    if lengths:
        low, high = lengths["saved_share_interval"]
        sentences.append(f"Held-out text needs {percent(lengths['saved_share'])} fewer tokens "
                         f"(95 % interval {percent(low)} to {percent(high)}).")
    elif evaluation and evaluation.get("shorter"):
        shorter = evaluation["shorter"]
        share = 1 - shorter["expanded_tokens"] / shorter["base_tokens"]
        sentences.append(f"Held-out text needs {percent(share)} fewer tokens.")
    if bench:
        phrases = [_speed_phrase(LOAD_NAMES[s["name"]], s["metrics"][s["main_metric"]]) for s in bench["scenarios"]]
        sentences.append(f"In vLLM, {'; '.join(phrases)}.")
    rows = {row["name"]: row for row in (evaluation or {}).get("rows", [])}
    if "base" in rows and len(rows) > 1:
        best = rows.get("distilled") or rows.get("mean") or rows["base"]
        line = (f"The model predicts the same text with {best['bits_per_byte']:.3f} bits per byte, "
                f"the base with {rows['base']['bits_per_byte']:.3f}")
        gap = (evaluation or {}).get("gap_recovered")
        sentences.append(line + (f"; distillation recovered {percent(gap)} of what the mean of pieces loses."
                                 if gap is not None else "."))
    return sentences or ["Nothing has been measured yet."]


def what_got_worse(
    manifest: Manifest | None, lengths: dict[str, Any] | None, bench: dict[str, Any] | None,
    evaluation: dict[str, Any] | None, verification: dict[str, Any] | None,
) -> list[str]:
    """List every cost and every disappointment that the results show."""
    found = []
    if verification and not verification["passed"]:
        found.append("The checkpoint failed verification: do not ship it.")
    if manifest:
        found.append(f"The model has {len(manifest.tokens):,} more rows to store and to compute at the output; "
                     "its tokenizer is no longer the published one, so both must be deployed together.")
    if lengths:
        new = lengths["new_tokens"]
        if unused := new["total"] - new["used"]:
            found.append(f"{unused:,} of {new['total']:,} new tokens never occur in the held-out text.")
        if lengths["documents_not_shorter"]:
            found.append(f"{lengths['documents_not_shorter']:,} of {lengths['documents']:,} documents are not shorter.")
        if lengths["invariant"]["differing"]:
            found.append(f"{lengths['invariant']['differing']:,} documents are not tokenized as pure merges of the "
                         "base's tokens: this is a defect.")
    for row in _bench_rows(bench):
        if row["verdict"] != FASTER:
            what = "is slower" if row["verdict"] == SLOWER else "is not measurably faster"
            found.append(f"{row['load'].capitalize()} ({row['measure']}) {what}: {row['speedup']}.")
    for scenario in (bench or {}).get("scenarios", []):
        for role in ("base", "expanded"):
            counted = scenario[role]
            if counted["failed_requests"]:
                found.append(f"{counted['failed_requests']:,} of {counted['requests']:,} requests of the "
                             f"{scenario['name']} load to the {role} server failed: {'; '.join(counted['errors'])}")
    rows = {row["name"]: row for row in (evaluation or {}).get("rows", [])}
    ours = rows.get("distilled") or rows.get("mean")
    if ours and "base" in rows:
        loss = ours["bits_per_byte"] / rows["base"]["bits_per_byte"] - 1
        if loss > 0:
            found.append(f"The same text costs {percent(loss)} more bits per byte than with the base model.")
        for row in ((evaluation or {}).get("writing") or {}).get("rows", []):
            if row["name"] == ours["name"] and row["places"]["false_use"]:
                found.append(f"At {row['places']['false_use']:.2%} of held-out places the model writes a new token "
                             "where the base writes something else.")
        same = ours.get("greedy_same_share")
        if same is not None and same < 1:
            found.append(f"{percent(1 - same)} of the greedy continuations differ from the base's.")
    return found


def shown_metrics(scenario: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the measures of a load that say something of their own.

    With one output token, the time to the first is the time of all: prefill has one line, not two.
    """
    return [(name, metric) for name, metric in scenario["metrics"].items()
            if name == scenario["main_metric"] or scenario["output_tokens_per_request"] > 1]


def percent(share: float) -> str:
    """Write a share with as many digits as it deserves."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 99.95 else f"{value:.0f} %"


def _speed_phrase(load: str, metric: Mapping[str, Any]) -> str:
    low, high = metric["speedup_interval"]
    if metric["verdict"] == NO_DIFFERENCE:
        return f"{load} is not measurably different ({low:.2f} to {high:.2f} times as fast)"
    return f"{load} is {metric['speedup']:.2f} times as fast ({low:.2f} to {high:.2f})"


def _figures(
    lengths: dict[str, Any] | None, bench: dict[str, Any] | None, evaluation: dict[str, Any] | None,
    verification: dict[str, Any] | None,
) -> list[tuple[str, str, str]]:
    """Return the large numbers at the top: (value, what it is, small print)."""
    figures = []
    if lengths:
        low, high = lengths["saved_share_interval"]
        figures.append((percent(lengths["saved_share"]), "fewer tokens", f"{percent(low)} to {percent(high)}"))
    for scenario in (bench or {}).get("scenarios", []):
        metric = scenario["metrics"][scenario["main_metric"]]
        low, high = metric["speedup_interval"]
        figures.append((f"{metric['speedup']:.2f}×", f"{LOAD_NAMES[scenario['name']]} speed",
                        f"{low:.2f} to {high:.2f}: {metric['verdict']}"))
    if evaluation and evaluation.get("gap_recovered") is not None:
        ends = evaluation.get("gap_recovered_interval")
        figures.append((percent(evaluation["gap_recovered"]), "of the gap recovered",
                        f"{percent(ends[0])} to {percent(ends[1])}" if ends else ""))
    if verification:
        figures.append(("passed" if verification["passed"] else "FAILED", "verification",
                        f"{len(verification['checks'])} checks"))
    return figures


def _lengths_picture(lengths: Mapping[str, Any]) -> Markup:
    data, median = lengths["saved_share_histogram"], lengths["saved_share_percentiles"]["50"]
    text = f"half of the documents: at least {percent(median)} fewer"
    return pictures.histogram(data["edges"], data["documents"], marker=median, marker_text=text,
                              label=f"How many documents save which share of their tokens; {text}")


def _most_saving(lengths: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = lengths["new_tokens"]["most_saving"][:SHOWN_TOKENS] if lengths else []
    return [{**row, "width": round(100 * row["saved_tokens"] / rows[0]["saved_tokens"], 1)} for row in rows]


def _bench_rows(bench: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for scenario in (bench or {}).get("scenarios", []):
        for name, metric in shown_metrics(scenario):
            low, high = metric["speedup_interval"]
            rows.append({
                "load": LOAD_NAMES[scenario["name"]], "measure": METRIC_NAMES[name], "name": name,
                "base": f"{metric['base']:.4g}", "expanded": f"{metric['expanded']:.4g}",
                "speedup": f"{metric['speedup']:.3f}× ({low:.3f} to {high:.3f})",
                "noise": f"{1 / metric['noise_floor']:.3f} to {metric['noise_floor']:.3f}",
                "verdict": metric["verdict"],
            })
    return rows


def _bench_picture(bench: Mapping[str, Any]) -> Markup:
    estimates = []
    for scenario in bench["scenarios"]:
        for name, metric in shown_metrics(scenario):
            tokens = [scenario[role]["prompt_tokens_per_run"] for role in ("base", "expanded")]
            expected = tokens[0] / max(1, tokens[1]) if scenario["name"] == "prefill" else None
            low, high = metric["speedup_interval"]
            estimates.append(pictures.Estimate(
                f"{LOAD_NAMES[scenario['name']]}: {SHORT_NAMES[name]}",
                metric["speedup"], (low, high), metric["noise_floor"], f"{metric['speedup']:.2f}×", expected))
    words = "; ".join(f"{e.label} {e.text}, {e.interval[0]:.2f} to {e.interval[1]:.2f}" for e in estimates)
    return pictures.intervals(estimates, low_text="slower than base", high_text="faster than base",
                              label=f"Speed-up with 95 % interval over the noise floor: {words}")


def _round_pictures(bench: Mapping[str, Any] | None) -> list[tuple[str, Markup]]:
    found = []
    for scenario in (bench or {}).get("scenarios", []):
        unit = METRIC_NAMES[scenario["main_metric"]]
        rounds = scenario["metrics"][scenario["main_metric"]]["rounds"]
        load = LOAD_NAMES[scenario["name"]]
        words = f"Every round of the {load} load: {unit} for base, expanded and base again"
        found.append((load, pictures.rounds(rounds, unit=unit, label=words)))
    return found


def _evaluation_rows(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for row in (evaluation or {}).get("rows", []):
        rows.append({
            "name": ROW_NAMES.get(row["name"], row["name"]),
            "tokens": _number(row.get("tokens"), "{:,.0f}"),
            "bits_per_byte": _number(row.get("bits_per_byte"), "{:.4f}"),
            "writing": _number(row.get("bits_per_byte_writing"), "{:.4f}"),
            "target_nll_nats": _number(row.get("target_nll_nats"), "{:.4f}"),
            "greedy_same_share": _number(row.get("greedy_same_share"), percent),
            "greedy_common_characters": _number(row.get("greedy_common_characters"), "{:,.1f}"),
        })
    return rows


def _writing(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the section about writing shows; None if it was not measured."""
    writing = (evaluation or {}).get("writing")
    if evaluation is None or not writing:
        return None
    bits = {row["name"]: row["bits_per_byte"] for row in evaluation["rows"]}
    base, shorter, rows, places = writing["base"], evaluation["shorter"], writing["rows"], writing["rows"][-1]["places"]
    return {
        "prompt_saving": percent(1 - shorter["expanded_tokens"] / shorter["base_tokens"]),
        "reading_cost": f"{bits[rows[-1]['name']] - bits['base']:+.4f}", "prompts": base["prompts"],
        "places": f"{places['places']:,}", "deserved": f"{places['deserved']:,}",
        "base_per_step": f"{base['characters_per_step']:.2f}",
        "full_per_step": f"{base['characters_per_step_if_all_adopted']:.2f}",
        "rows": [{
            "name": ROW_NAMES.get(row["name"], row["name"]),
            "per_step": f"{row['greedy']['characters_per_step']:.2f}",
            "gain": _number(row["greedy"]["share_of_possible_gain"], percent),
            "adoption": _number(row["places"]["adoption"], percent),
            "false_use": f"{row['places']['false_use']:.2%}", "nll": f"{row['places']['nll_rise_nats']:.4f}",
            "merged": f"{_number(row['merged']['adoption'], percent)}; {row['merged']['false_use']:.2%}",
            "greedy": " / ".join(str(row["greedy"][kind]) for kind in ("identical", "similar", "worse")),
            "shift": f"{row['sampling']['kl_nats_per_piece']:.4f}",
        } for row in rows],
        "examples": rows[-1]["greedy"]["examples"],
    }  # fmt: skip


def _evaluation_picture(evaluation: Mapping[str, Any]) -> Markup:
    rows = [(ROW_NAMES.get(row["name"], row["name"]), row["bits_per_byte"],
             "base" if row["name"] == "base" else "expanded" if row["name"] == "distilled" else "mean")
            for row in evaluation["rows"] if row.get("bits_per_byte") is not None]
    if not rows:
        return Markup("")
    words = ", ".join(f"{name} {value:.3f}" for name, value, _ in rows)
    return pictures.bars(rows, unit="bits per byte of held-out text; less is better", label=f"Bits per byte: {words}")


def _number(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return "not measured"
    return form.format(value) if isinstance(form, str) else form(value)


def _source(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    about = result.get("provenance") or {}
    hardware = about.get("hardware") or {}
    machine = [str(hardware[key]) + (" cores" if key == "cores" else "") for key in ("cpu", "cores") if key in hardware]
    machine += hardware.get("gpus", [])
    if "memory_bytes" in hardware:
        machine.append(f"{hardware['memory_bytes'] / 2**30:.0f} GiB memory")
    if "load_average_1_minute" in hardware:
        machine.append(f"load {hardware['load_average_1_minute']} at the start")
    return {
        "name": f"{name}.json",
        "command": about.get("command") or result.get("command") or "",
        "date": about.get("date") or result.get("created") or result.get("date") or "",
        "versions": ", ".join(f"{key} {value}" for key, value in (about.get("versions") or {}).items()),
        "hardware": ", ".join(machine),
        "models": " and ".join(str(result[role]) for role in ("base", "expanded") if isinstance(result.get(role), str)),
        "corpus": ", ".join(map(str, result["corpus"])) if isinstance(result.get("corpus"), list) else "",
    }


def _commands(expanded: Path, manifest: Manifest | None) -> dict[str, str]:
    base = manifest.base.model if manifest else "BASE"
    return {
        "lengths": f"vocabext serve lengths {base} {expanded} --corpus HELDOUT -o lengths.json",
        "bench": f"vocabext serve bench {base} {expanded} --corpus HELDOUT -o bench.json",
        "eval": f"vocabext eval {expanded} --against {base} --corpus HELDOUT",
        "verify": f"vocabext verify {expanded} --against {base}",
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["percent"] = percent
    environment.filters["thousands"] = lambda value, digits=0: f"{value:,.{digits}f}"
    environment.filters["size"] = _size
    return environment


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable")
