"""Write the section "Gateway" of docs/benchmarks.md from the committed JSON: `python benchmarks/gateway_docs.py`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sections import DOCS, put_section

from vocabext.serve.gateway.canary import READING

ROOT = Path(__file__).resolve().parent
SOAKS = ("gateway_soak", "gateway_soak_one_engine")
UPSTREAMS = {"fake": "one that answers after 20 ms", "vllm": "vLLM"}
MODELS = {"base": "the base itself", "expanded": "expanded", "shuffled": "expanded, new rows shuffled"}
Found = dict[str, Any]


def main() -> None:
    """Replace the section, or append it."""
    put_section(DOCS, section(ROOT))


def section(folder: Path) -> str:
    """Render the section from the JSON files of a folder; what was not measured is left out."""
    parts = ["## Gateway", "", "<!-- Written by benchmarks/gateway_docs.py from the JSON beside it. -->", ""]
    parts += overhead(_read(folder, "gateway_overhead")) + ban(_read(folder, "gateway_ban"))
    soaks = [_read(folder, name) for name in SOAKS if (folder / f"{name}.json").is_file()]
    parts += soak(soaks)
    if (folder / "gateway_canary.json").is_file():
        parts += canary(_read(folder, "gateway_canary"))
    return "\n".join(parts).rstrip() + "\n"


def overhead(found: Found) -> list[str]:
    """Render what the gateway adds to a request, and what it keeps of the throughput."""
    rows = []
    for kind, row in found["upstreams"].items():
        kept = row["throughput_kept_rounds"]
        rows.append((UPSTREAMS[kind], f"{row['direct_ms']:.1f}", f"{row['added_ms']:.2f}", _spread(
            row["added_ms_rounds"], ".2f"), f"{row['throughput_kept']:.1%}", _spread(kept, ".0%")))
    rounds = len(next(iter(found["upstreams"].values()))["added_ms_rounds"])
    return [f"What it adds: medians of {rounds} rounds, direct and through the gateway in turn, clients, gateway and "
            f"engine on the same cores; {found['concurrency']} streams at once for the throughput.", "",
            *_table(("engine", "direct, ms", "added, ms", "quartiles", "throughput kept", "quartiles"), rows), "",
            _measured("gateway_overhead.py", found), ""]


def ban(found: Found) -> list[str]:
    """Render the ways to keep new tokens out of base answers."""
    rows = [(way, f"{row['seconds']:.2f}", f"{row['request_bytes']:,}", f"{row['leaks']:,} of {row['tokens']:,}",
             f"{row['leaks_if_asked_for']:,}") for way, row in found["ways"].items()]
    return ["Ways to keep new tokens out of base answers, with an engine that wants to write them all the time:", "",
            *_table(("way", "seconds", "bytes per request", "leaks", "leaks if a client asks for one"), rows), "",
            _measured("gateway_ban.py", found), ""]


def soak(found: Sequence[Found]) -> list[str]:
    """Render what clients saw while the gateway swapped."""
    rows = [("one" if run["one_engine"] else "two", f"{run['minutes']:g}", run["clients"], run["swaps"],
             f"{run['answers']:,}", f"{run['answers_across_a_swap']:,}", _faults(run["faults"]),
             f"{run['median_seconds']:.2f}", run["connections_left"]) for run in found]
    head = ("engines", "minutes", "clients", "swaps", "answers", "of them across a swap", "faults", "median seconds",
            "sockets left")
    return ["Swaps under load. A fault is an answer that failed, was cut, came twice, or cannot have come from one arm "
            "alone:", "", *_table(head, rows), "", _measured("gateway_soak.py", found[0]), ""]


def canary(found: Found) -> list[str]:
    """Render which arms the canary took back."""
    rows = []
    for arm, trial in found["trials"].items():
        after = trial["taken_back_after"]
        loss = next(finding for finding in trial["findings"] if finding["measure"] == READING)
        low, high = (_number(loss[end]) for end in ("low", "high"))
        rows.append((MODELS[arm], trial["requests"], "no" if after is None else f"after {after} requests",
                     f"{_number(loss['expanded'])} ({low} to {high})"))
    return [f"The canary, {found['base']} against its expansion ({found['expanded']}), {found['requests']} requests "
            f"mirrored to the other arm, bound {found['max_reading_loss']:g} nats per character of the base's answer; "
            "the base itself reads every prompt alike, so that its loss is 0:", "",
            *_table(("other arm", "requests", "taken back", "nats lost per character (confidence sequence)"), rows), "",
            _measured("gateway_canary.py", found), ""]


def _number(value: float | None) -> str:
    return "open" if value is None else f"{value:.3f}"


def _faults(faults: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in faults.items()) or "none"


def _spread(values: Sequence[float], form: str) -> str:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:{form}} to {high:{form}}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _measured(script: str, found: Found) -> str:
    about = found["provenance"]
    hardware = about["hardware"]
    return (f"Measured by `python benchmarks/{script}` on {', '.join(hardware['gpus']) or hardware['cpu']} with "
            f"{hardware['cores']} cores, {about['date'][:10]}.")


def _read(folder: Path, name: str) -> Found:
    document: Found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    main()
