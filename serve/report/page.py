"""One page about an expanded model, from results that were measured before. Never measures.

The page needs nothing but itself: no network, no script, no font. It follows the reader's light or
dark setting and prints. What is missing is said to be missing, with the command that would measure it.
The same content comes as Markdown, to paste, and as JSON, to read by program (`report.schema.json`).
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vocabext import __version__
from vocabext.checkpoint.manifest import Manifest, has_manifest, read_manifest
from vocabext.errors import UsageError
from vocabext.serve.bench.summary import with_points
from vocabext.serve.model import card_of
from vocabext.serve.predict import held_against
from vocabext.serve.provenance import machine_of
from vocabext.serve.report import charts, speed
from vocabext.tables import visible

ARTIFACTS = ("lengths", "bench", "eval", "verify")
OPTIONAL = ("predict", "swap", "choice")
SEVERAL = ("lengths", "bench", "predict")  # of which a report can hold more than one: corpora, machines, devices
VERSIONS = {"lengths": 2, "bench": 2, "eval": 1, "verify": 1, "predict": 1, "swap": 1, "choice": 1}
REPORT_VERSION = 1
TEMPLATES = Path(__file__).with_name("templates")
ROW_NAMES = {"base": "base model", "mean": "mean of pieces", "distilled": "distilled"}
SHOWN_TOKENS = 25

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """A rendered report.

    Attributes:
        html: The page.
        markdown: The same as Markdown, without the charts.
        document: The same as JSON-ready values, in the form of `report.schema.json`.
        headline: What it says in one or two sentences.
        missing: Names of results that were not there.
    """

    html: str
    markdown: str
    document: dict[str, Any]
    headline: str
    missing: tuple[str, ...]


def gather(expanded: Path, beside: Path, named: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Find and read the results about a model.

    Args:
        expanded: The expanded model's folder, where `eval` and `verify` write.
        beside: The folder of the report; the working folder of `run` is looked into as well.
        named: Files the user named; these must be there.

    Returns:
        For lengths, bench and predict a list of results, for the others the result or None.

    Raises:
        UsageError: If the model folder or a named file is missing, or a file is something else.
    """
    if not expanded.is_dir():
        raise UsageError(f"the model folder {expanded} does not exist")
    results: dict[str, Any] = {}
    folders = (expanded, beside, expanded.with_name(f"{expanded.name}-work"))
    for name in (*ARTIFACTS, *OPTIONAL):
        found = [folder / f"{name}.json" for folder in folders if (folder / f"{name}.json").is_file()]
        read = [read_result(path, name) for path in (named.get(name) or found[:1])]
        results[name] = read if name in SEVERAL else next(iter(read), None)
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
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON document: {error}") from None
    kind = document.get("artifact") if isinstance(document, dict) else None
    if kind != artifact:
        raise UsageError(f"{path} holds {kind!r}, but {artifact!r} is needed here")
    if document.get("version") != VERSIONS[artifact]:
        raise UsageError(f"{path} has format version {document.get('version')}, this vocabext reads "
                         f"{VERSIONS[artifact]}; measure again")
    return with_points(document) if artifact == "bench" else dict(document)


def render_report(expanded: Path, results: Result, *, price_per_hour: float | None = None) -> Page:
    """Render the page.

    Args:
        expanded: The expanded model's folder.
        results: What `gather` found: the content of each file, or a list where there can be several, or None.
        price_per_hour: What the machine costs, for the cost of a million characters.
    """
    manifest = read_manifest(expanded) if has_manifest(expanded) else None
    all_lengths, benches, predictions = (_several(results.get(name)) for name in SEVERAL)
    lengths, evaluation = next(iter(all_lengths), None), results.get("eval")
    verification, choice = results.get("verify"), results.get("choice")
    lines = headline(lengths, benches, evaluation)
    missing = tuple(name for name in ARTIFACTS if not results.get(name))
    content = {
        "name": expanded.resolve().name,
        "headline": lines,
        "card": card_of(expanded, verification),
        "figures": _figures(lengths, benches, evaluation, verification),
        "beside": speed_and_quality(lengths, benches, evaluation),
        "corpora": [_corpus_row(found) for found in all_lengths],
        "speed": [_speed_content(bench, price_per_hour) for bench in benches],
        "price_per_hour": price_per_hour,
        "predictions": [{**found, "measured": held_against(found, benches)} for found in predictions],
        "evaluation_rows": _evaluation_rows(evaluation),
        "writing": _writing(evaluation),
        "worse": what_got_worse(manifest, lengths, benches, evaluation, verification),
        "sources": [_source(name, found) for name in (*ARTIFACTS, *OPTIONAL) for found in _several(results.get(name))],
        "swap": results.get("swap"),
        "choice": choice_content(choice),
        "commands": _commands(expanded, manifest),
        "version": __version__,
    }
    drawn = {
        "lengths": lengths, "lengths_picture": lengths and _lengths_picture(lengths),
        "distribution_picture": lengths and _distribution_picture(lengths),
        "most_saving": _most_saving(lengths), "evaluation": evaluation,
        "choice_picture": choice_picture(choice),
        "evaluation_picture": evaluation and _evaluation_picture(evaluation), "verification": verification,
    }
    return Page(
        _environment().get_template("report.html.jinja").render(**content, **drawn),
        _environment(markdown=True).get_template("report.md.jinja").render(**content, **drawn),
        _document(content, lengths, evaluation, verification, missing), " ".join(lines), missing)


def _several(value: Any) -> list[dict[str, Any]]:
    """Return one result, several, or none as a list."""
    return [dict(value)] if isinstance(value, Mapping) else list(value or ())


def _speed_content(bench: Result, price_per_hour: float | None) -> dict[str, Any]:
    """Return what the report says about one bench.json; what begins with `picture` is markup."""
    return {
        "bench": bench, "machine": machine_of(bench), "rows": speed.speed_rows(bench),
        "goodput": speed.goodput_rows(bench),
        "costs": [] if price_per_hour is None else speed.cost_rows(bench, price_per_hour),
        "picture": speed.speed_picture(bench), "picture_rounds": speed.round_pictures(bench),
        "picture_curves": speed.curves(bench),
    }


def _document(content: Result, lengths: Result | None, evaluation: Result | None, verification: Result | None,
              missing: Sequence[str]) -> dict[str, Any]:
    """Return report.json: what the page says, as values."""
    return {
        "artifact": "report", "version": REPORT_VERSION, "vocabext_version": content["version"],
        "model": content["name"], "headline": content["headline"], "card": dict(content["card"]),
        "lengths": content["corpora"],
        "new_tokens": lengths and {name: lengths["new_tokens"][name] for name in
                                   ("total", "used", "share_of_characters", "most_saving", "never_used")},
        "examples": lengths["passages"] if lengths else [],
        "speed": [{"machine": part["machine"], "state": part["bench"]["state"], "points": [
            {"load": speed.load_name(point), **point} for point in part["bench"]["points"]], "goodput": part["goodput"],
            "cost_per_million_characters": part["costs"]} for part in content["speed"]],
        "price_per_hour": content["price_per_hour"],
        "predictions": [{name: found[name] for name in ("device", "options", "lengths", "loads", "memory", "measured",
                                                        "notes")} for found in content["predictions"]],
        "speed_and_quality": content["beside"], "writing": (evaluation or {}).get("writing"),
        "verified": verification and bool(verification["passed"]), "choice": content["choice"],
        "worse": content["worse"],
        "sources": content["sources"], "missing": list(missing),
    }


def _base_and_ours(evaluation: Result | None) -> tuple[Result, Result] | None:
    """Return the rows of the base and of the best new rows in eval.json; None if one is not there."""
    rows = {row["name"]: row for row in (evaluation or {}).get("rows", [])}
    ours = rows.get("distilled") or rows.get("mean")
    return (rows["base"], ours) if ours and "base" in rows else None


def headline(lengths: Result | None, benches: Sequence[Result], evaluation: Result | None) -> list[str]:
    """Say the result: first in one sentence with its uncertainty, then at most two more."""
    parts = []
    if lengths:
        low, high = lengths["saved_share_interval"]
        parts.append(f"Held-out text needs {percent(lengths['saved_share'])} fewer tokens "
                     f"(95 % interval {percent(low)} to {percent(high)}).")
    elif evaluation and evaluation.get("shorter"):
        shorter = evaluation["shorter"]
        share = 1 - shorter["expanded_tokens"] / shorter["base_tokens"]
        parts.append(f"Held-out text needs {percent(share)} fewer tokens.")
    if benches:
        sentence = speed.speed_sentence(benches[0])
        # One sentence: what became shorter, and what that bought.
        parts = [f"{parts[0].removesuffix('.')}; {sentence[0].lower()}{sentence[1:]}" if parts else sentence]
    if evaluation and (rows := _base_and_ours(evaluation)):
        base, ours = rows
        gap = evaluation.get("gap_recovered")
        recovered = "" if gap is None else f"; distillation recovered {percent(gap)} of what the mean of pieces loses"
        parts.append(f"The model predicts the same text with {ours['bits_per_byte']:.3f} bits per byte, the base with "
                     f"{base['bits_per_byte']:.3f}{recovered}.")
    return parts or ["Nothing has been measured yet."]


def speed_and_quality(
    lengths: Result | None, benches: Sequence[Result], evaluation: Result | None
) -> list[dict[str, str]]:
    """Put what the expansion bought next to what it cost: one line per measure, base and expanded."""
    rows = []
    if lengths:
        rows.append(_beside("tokens per 1000 characters", lengths["base_tokens_per_1000_characters"],
                            lengths["expanded_tokens_per_1000_characters"], "less is better"))
    for bench in benches[:1]:
        for point in speed.headline_points(bench):
            metric = point["metrics"][point["main_metric"]]
            rows.append(_beside(f"{speed.load_name(point)}: {speed.METRIC_NAMES[point['main_metric']]}", metric["base"],
                                metric["expanded"], metric["verdict"]))
    if both := _base_and_ours(evaluation):
        for key, name in (("bits_per_byte", "reading"), ("bits_per_byte_writing", "writing")):
            base, ours = (row.get(key) for row in both)
            if base is not None and ours is not None:
                rows.append(_beside(f"bits per byte, {name}", base, ours, "less is better"))
    return rows


def _beside(name: str, base: float, expanded: float, remark: str) -> dict[str, str]:
    return {"measure": name, "base": f"{base:,.4g}", "expanded": f"{expanded:,.4g}",
            "change": f"{100 * (expanded / base - 1):+.1f} %" if base else "", "remark": remark}


def what_got_worse(
    manifest: Manifest | None, lengths: Result | None, benches: Sequence[Result], evaluation: Result | None,
    verification: Result | None,
) -> list[str]:
    """List what the results show to have become worse, or not better."""
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
    for bench in benches:
        found += speed.speed_costs(bench)
    if evaluation and (both := _base_and_ours(evaluation)):
        base, ours = both
        loss = ours["bits_per_byte"] / base["bits_per_byte"] - 1
        if loss > 0:
            found.append(f"The same text costs {percent(loss)} more bits per byte than with the base model.")
        for row in (evaluation.get("writing") or {}).get("rows", []):
            if row["name"] == ours["name"] and row["places"]["false_use"]:
                found.append(f"At {row['places']['false_use']:.2%} of held-out places the model writes a new token "
                             "where the base writes something else.")
        same = ours.get("greedy_same_share")
        if same is not None and same < 1:
            found.append(f"{percent(1 - same)} of the greedy continuations differ from the base's.")
    return found


def milliseconds(seconds: float) -> str:
    """Write a time with four digits."""
    return f"{1000 * seconds:,.4g} ms"


def percent(share: float) -> str:
    """Write a share in percent, with one decimal below 100."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 99.95 else f"{value:.0f} %"


def _corpus_row(lengths: Mapping[str, Any]) -> dict[str, Any]:
    """Return what report.json says about one corpus."""
    names = ("documents", "characters", "saved_share", "saved_share_interval", "base_tokens_per_document",
             "expanded_tokens_per_document", "base_tokens_per_1000_characters", "expanded_tokens_per_1000_characters",
             "tokens_per_document_percentiles", "tokens_per_1000_characters_percentiles", "saved_share_percentiles",
             "documents_not_shorter", "documents_longer", "cache")
    return {"corpus": ", ".join(Path(str(path)).name for path in lengths["corpus"]),
            "share_of_characters": lengths["new_tokens"]["share_of_characters"],
            **{name: lengths[name] for name in names}}


def _figures(
    lengths: Result | None, benches: Sequence[Result], evaluation: Result | None, verification: Result | None
) -> list[tuple[str, str, str]]:
    """Return the large numbers at the top: (value, what it is, small print)."""
    figures = []
    if lengths:
        low, high = lengths["saved_share_interval"]
        figures.append((percent(lengths["saved_share"]), "fewer tokens", f"{percent(low)} to {percent(high)}"))
    for point in speed.headline_points(benches[0]) if benches else []:
        metric = point["metrics"][point["main_metric"]]
        low, high = metric["speedup_interval"]
        figures.append((f"{metric['speedup']:.2f}×", f"{speed.load_name(point)} speed",
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
    return charts.histogram(data["edges"], data["documents"], marker=median, marker_text=text,
                              label=f"How many documents save which share of their tokens; {text}")


def _distribution_picture(lengths: Mapping[str, Any]) -> Markup:
    data, middle = lengths["tokens_per_1000_characters_histogram"], lengths["tokens_per_1000_characters_percentiles"]
    words = (f"half of the documents need more than {middle['base']['50']:.0f} tokens per 1000 characters with the "
             f"base, {middle['expanded']['50']:.0f} with the expanded model")
    return charts.distributions(data["edges"], {role: data[role] for role in ("base", "expanded")},
                                  x_text="tokens per 1000 characters, by document", label=f"Distribution: {words}")


def _most_saving(lengths: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    rows = lengths["new_tokens"]["most_saving"][:SHOWN_TOKENS] if lengths else []
    return [{**row, "width": round(100 * row["saved_tokens"] / rows[0]["saved_tokens"], 1)} for row in rows]


def _evaluation_rows(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    forms: dict[str, str | Callable[[float], str]] = {
        "tokens": "{:,.0f}", "bits_per_byte": "{:.4f}", "bits_per_byte_writing": "{:.4f}", "target_nll_nats": "{:.4f}",
        "greedy_same_share": percent, "greedy_common_characters": "{:,.1f}"}
    return [{"name": ROW_NAMES.get(row["name"], row["name"]),
             **{key: _number(row.get(key), form) for key, form in forms.items()}}
            for row in (evaluation or {}).get("rows", [])]


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
    }


def choice_content(choice: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what the section about the choice shows; None where tokens were not chosen by what they cost."""
    if choice is None:
        return None
    left_out = [row for row in choice["tokens"] if not row["kept"]]
    measured = sorted((row for row in left_out if row["saved"] is not None), key=lambda row: -row["saved"])
    return {"candidates": choice["candidates"], "budget": choice["budget"],
            "max_loss": choice["options"].get("max_loss"),
            **{key: choice[key] for key in ("chosen", "by_savings", "frontier")},
            "left_out": measured[:SHOWN_TOKENS], "left_out_count": len(left_out),
            "why": dict(Counter(_kind(row["why"]) for row in left_out).most_common())}


def _kind(why: str) -> str:
    """Take the names and numbers out of a reason, so that equal reasons can be counted."""
    return re.sub(r"'[^']*'|[\d.]+%?", "...", why)


def choice_picture(choice: Mapping[str, Any] | None) -> Markup:
    """Draw savings against loss for both rules, on held-out text."""
    points = choice["frontier"] if choice else []
    if not points:
        return Markup("")
    lines = {kind: sorted((point["saved_share"], point["loss_bits_per_byte"], f"{point['tokens']:,} tokens by {rule}")
                          for point in points if point["rule"] == rule)
             for kind, rule in (("base", "savings"), ("expanded", "cost"))}
    chosen = next(((p["saved_share"], p["loss_bits_per_byte"]) for p in points if p["chosen"]), None)
    words = "; ".join(f"{name}: {saved:.1%} saved, {loss:.4f} bits per byte lost"
                      for some in lines.values() for saved, loss, name in some)
    return charts.frontier({kind: some for kind, some in lines.items() if some}, chosen=chosen,
                           x_text="fewer tokens, held-out text", unit="bits per byte lost",
                           label=f"Savings against loss: {words}")


def _evaluation_picture(evaluation: Mapping[str, Any]) -> Markup:
    rows = [(ROW_NAMES.get(row["name"], row["name"]), row["bits_per_byte"],
             "base" if row["name"] == "base" else "expanded" if row["name"] == "distilled" else "mean")
            for row in evaluation["rows"] if row.get("bits_per_byte") is not None]
    if not rows:
        return Markup("")
    words = ", ".join(f"{name} {value:.3f}" for name, value, _ in rows)
    return charts.bars(rows, unit="bits per byte of held-out text; less is better", label=f"Bits per byte: {words}")


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
    base = shlex.quote(manifest.base.model if manifest else "BASE")
    new = shlex.quote(str(expanded))
    return {
        "lengths": f"vocabext serve lengths {base} {new} --corpus HELDOUT -o lengths.json",
        "bench": f"vocabext serve bench {base} {new} --corpus HELDOUT -o bench.json",
        "eval": f"vocabext eval {new} --against {base} --corpus HELDOUT",
        "verify": f"vocabext verify {new} --against {base}",
        "predict": f"vocabext serve predict {base} {new} --lengths lengths.json --device h100 -o predict.json",
    }


class _Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def _as_markdown(value: object) -> str:
    """Escape a value for report.md, so that it shows as it is: no HTML, links, code or further cells and lines."""
    if isinstance(value, _Markdown):
        return value
    text = re.sub(r"([\\`\[\]|])", r"\\\1", _in_a_line(value))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _in_a_line(value: object) -> _Markdown:
    return _Markdown(" ".join(visible(str(value)).splitlines()))


def _code(value: object) -> _Markdown:
    """Put a value between as many backticks as it takes."""
    text = _in_a_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return _Markdown(f"{ticks}{space}{text}{space}{ticks}")


def _environment(*, markdown: bool = False) -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=not markdown,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True, finalize=_as_markdown if markdown else None)
    environment.filters |= {"line": _in_a_line, "code": _code, "percent": percent, "size": _size,
                            "thousands": _thousands, "milliseconds": milliseconds}
    return environment


def _thousands(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def _size(num_bytes: float) -> str:
    power = next(power for power in range(4) if abs(num_bytes) < 1024 ** (power + 1) or power == 3)
    return f"{num_bytes / 1024**power:,.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
