"""Write the section "Serving" of docs/benchmarks.md from the committed JSON: `python benchmarks/serve_docs.py`."""

import json
from pathlib import Path
from typing import Any

from sections import DOCS, put_section
from serve_false_alarms import table as false_alarm_table

from vocabext.serve.report.speed import METRIC_NAMES, shown_metrics

ROOT = Path(__file__).resolve().parent.parent
BIOMED, ALARMS, LENGTHS = (ROOT / "benchmarks" / f"{name}.json"
                           for name in ("serve_biomed", "serve_false_alarms", "lengths_speed"))
TITLE = "## Serving"


def main() -> None:
    """Replace the section, or append it."""
    put_section(DOCS, section())


def section() -> str:
    """Render the section from what is committed."""
    parts = [TITLE, "", "<!-- Written by benchmarks/serve_docs.py from the JSON beside it. Change it there. -->", ""]
    parts += biomed(_read(BIOMED))
    if ALARMS.is_file():
        parts += alarms(_read(ALARMS))
    if LENGTHS.is_file():
        parts += lengths(_read(LENGTHS))
    return "\n".join(parts).rstrip() + "\n"


def biomed(result: dict[str, Any]) -> list[str]:
    """Render base against expanded."""
    bench, lengths, share = result["bench"], result["lengths"], result["prefill_share_of_length_ratio"]
    new = {name: lengths[f"{name}_tokens_per_1000_characters"] for name in ("base", "expanded")}
    lines = [
        f"`biomed-13m` (13M parameters) with up to 1,000 new tokens from MedQuAD, under vLLM on {_machine(bench)}; "
        f"{bench['options']['pairs']} rounds of base, expanded, base. Held-out MedQuAD takes {new['base']:.1f} tokens "
        f"per 1000 characters before and {new['expanded']:.1f} after: {lengths['saved_share']:.1%} fewer "
        f"({lengths['saved_share_interval'][0]:.1%} to {lengths['saved_share_interval'][1]:.1%}).",
        "",
        f"Prefill reaches {share['value']:.2f} ({share['interval'][0]:.2f} to {share['interval'][1]:.2f}) of the "
        "speed-up that the lengths of its prompts predict.",
        "",
        "| point | measure | base | expanded | speed-up (95 %) | noise floor | expanded is |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in bench["points"]:
        for name, metric in shown_metrics(point):
            low, high = metric["speedup_interval"]
            lines.append(f"| {point['name']} | {METRIC_NAMES[name]} | {metric['base']:.4g} | {metric['expanded']:.4g} "
                         f"| {metric['speedup']:.3f} ({low:.3f} to {high:.3f}) | {1 / metric['noise_floor']:.3f} to "
                         f"{metric['noise_floor']:.3f} | {metric['verdict']} |")
    lines += ["", "| point | by length alone | measured (95 %) | share |", "|---|---|---|---|"]
    for row in result["measured_beside_lengths"]:
        low, high = row["speedup_interval"]
        lines.append(f"| {row['point']} | {row['length_ratio']:.3f} | {row['speedup']:.3f} ({low:.3f} to {high:.3f}) "
                     f"| {row['share_of_length_ratio']:.2f} |")
    counted = [point[role] for point in bench["points"] for role in ("base", "expanded")]
    requests, failed, held_up = (sum(c[name] for c in counted)
                                 for name in ("requests", "failed_requests", "held_up_runs"))
    return [*lines, "", f"{requests:,} requests, {failed} failed; {held_up} runs took more than 1.5 times their "
            f"siblings; taken up again {bench['resumed']} time(s). For `decode` and `mixed`, what the lengths alone "
            "predict is the ratio of tokens per written character: the model hardly writes new tokens by itself. "
            "Made by `python benchmarks/serve_biomed.py`.", ""]


def alarms(result: dict[str, Any]) -> list[str]:
    """Render the false-alarm rate."""
    return [f"False alarms, the embedded example against itself on {_machine(result)}, "
            f"{result['rounds_per_repetition']} rounds per repetition:", "", false_alarm_table(result["measures"]), "",
            "Made by `python benchmarks/serve_false_alarms.py`.", ""]


def lengths(result: dict[str, Any]) -> list[str]:
    """Render the speed of `serve lengths`."""
    speed = result["lengths_megabytes_per_second"]
    return [f"`serve lengths` encodes {speed:.2f} MB/s on {_machine(result)}, where "
            f"both tokenizers alone do {result['tokenizers_megabytes_per_second']:.2f} MB/s: {result['share']:.2f} of "
            "their speed, with reading, counting and the check of every document. Made by "
            "`python benchmarks/lengths_speed.py`.", ""]


def _machine(result: dict[str, Any]) -> str:
    about = result["provenance"]
    hardware = about["hardware"]
    return f"{', '.join(hardware['gpus']) or hardware['cpu']} ({hardware['cores']} cores), {about['date'][:10]}"


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
